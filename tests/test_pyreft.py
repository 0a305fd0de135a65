"""The functional level against pyreft's interventions, module by module: values, gradients, training."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from peft_fast.functional import loreft
from peft_fast.orthonormal import OrthonormalRows, dense_base
from peft_fast.reference import ACTIVATIONS

D, R = 24, 4
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12}
"""Of the largest element. In fp32 pyreft's own gradient of the rotation is up to 1e-6 from that in fp64."""

pytestmark = pytest.mark.usefixtures("one_thread")


class Variant(NamedTuple):
    """How one of pyreft's classes is written with `loreft`."""

    orthonormal: bool
    source: bool
    subtract: bool
    act: bool
    dropout: bool


VARIANTS = {
    "LoreftIntervention": Variant(True, True, True, True, True),
    "NoreftIntervention": Variant(False, True, True, True, True),
    "DireftIntervention": Variant(True, True, False, True, True),
    "NodireftIntervention": Variant(False, True, False, True, True),
    "ConsreftIntervention": Variant(True, False, True, False, False),
    "LobireftIntervention": Variant(True, False, False, False, True),
}
WITH_ACT = [name for name, variant in VARIANTS.items() if variant.act]
WITH_DROPOUT = [name for name, variant in VARIANTS.items() if variant.dropout]


class Pair:
    """An intervention of pyreft, and the same with `loreft`: of equal weights, base included."""

    def __init__(self, pyreft, name: str, dtype=torch.float32, act="linear", dropout=0.0, rotated=True):
        self.variant = VARIANTS[name]
        self.act, self.dropout = act, dropout
        options = {"act_fn": act, "dropout": dropout, "dtype": dtype, "add_bias": False}
        self.theirs = getattr(pyreft.interventions, name)(embed_dim=D, low_rank_dimension=R, **options).to(
            dtype
        )
        source = self.theirs.learned_source
        self.ours = nn.ParameterDict()
        if self.variant.source:
            nn.init.normal_(source.bias)
            self.ours["source"] = source.weight.detach().clone()
            self.ours["bias"] = source.bias.detach().clone()
            self.matches = [("source", source.weight), ("bias", source.bias)]
        else:
            self.ours["bias"] = source.detach().clone()
            self.matches = [("bias", source)]
        if not self.variant.orthonormal:
            self.ours["basis"] = self.theirs.proj_layer.weight.detach().clone()
            self.matches.append(("basis", self.theirs.proj_layer.weight))
            self.basis = lambda: self.ours["basis"]
            return
        self.basis = OrthonormalRows.from_rows(self.theirs.rotate_layer.weight.float().mT).to(dtype)
        if rotated:
            nn.init.normal_(self.basis.rotation, std=0.3)
        parametrization = self.theirs.rotate_layer.parametrizations.weight
        parametrization[0].base.copy_(dense_base(self.basis.base, self.basis.base_sign))
        with torch.no_grad():
            parametrization.original += self.basis.rotation.mT.tril(-1)
        self.ours["rotation"] = self.basis.rotation
        self.matches.append(("rotation", parametrization.original))

    def __call__(self, h: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        return loreft(
            h,
            self.basis(),
            self.ours["source"] if self.variant.source else None,
            self.ours["bias"],
            subtract=self.variant.subtract,
            rows=rows,
            act=self.act,
            dropout_p=self.dropout,
            dropout_on="state",
        )

    def check(self, h: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Compares outputs, the gradient of h and those of all parameters, both with the same seed."""
        tolerance = TOLERANCE[h.dtype]
        grad = torch.randn_like(h)
        results = []
        for run in (self._theirs_in_rows, self):
            torch.manual_seed(7)
            x = h.clone().requires_grad_()
            out = run(x, rows)
            out.backward(grad)
            results.append((out, x.grad))
        (expected, expected_grad), (out, out_grad) = results
        assert relative(out, expected) < tolerance
        assert relative(out_grad, expected_grad) < tolerance
        assert {name for name, _ in self.matches} == set(self.ours)
        for name, parameter in self.matches:
            expected = parameter.grad.mT if name == "rotation" else parameter.grad
            assert expected.abs().max() > 0.1
            assert relative(self.ours[name].grad, expected) < tolerance, name

    def _theirs_in_rows(self, h: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        if rows is None:
            return self.theirs(h)
        flat = h.view(-1, D)
        return flat.index_copy(0, rows, self.theirs(flat[rows])).view_as(h)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradients(pyreft, name, dtype):
    Pair(pyreft, name, dtype).check(torch.randn(2, 5, D, dtype=dtype))


@pytest.mark.parametrize("name", VARIANTS)
def test_in_selected_rows(pyreft, name):
    Pair(pyreft, name).check(torch.randn(2, 5, D), torch.tensor([9, 0, 4]))


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act != "linear"])
@pytest.mark.parametrize("name", WITH_ACT)
def test_act_fn(pyreft, name, act):
    Pair(pyreft, name, act=act).check(torch.randn(2, 5, D))


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_of_the_state(pyreft, name):
    """One seed, one mask: the elements dropped are the same ones, of the whole state."""
    pair = Pair(pyreft, name, dropout=0.4)
    h = torch.randn(2, 5, D)
    pair.check(h)
    dropped = (pair(h) == 0).float().mean()
    assert 0.3 < dropped < 0.5


def test_same_seed_same_start(pyreft):
    torch.manual_seed(11)
    theirs = pyreft.interventions.LoreftIntervention(embed_dim=D, low_rank_dimension=R)
    torch.manual_seed(11)
    assert relative(OrthonormalRows(D, R)(), theirs.rotate_layer.weight.mT) < 1e-6


def test_rows_of_its_checkpoint(pyreft):
    saved = pyreft.interventions.LoreftIntervention(embed_dim=D, low_rank_dimension=R).state_dict()[
        "rotate_layer"
    ]
    assert relative(OrthonormalRows.from_rows(saved.mT)(), saved.mT) < 1e-6


def test_hundred_steps_of_training(pyreft):
    pair = Pair(pyreft, "LoreftIntervention", rotated=False)
    x, y = torch.randn(2, 40, D)
    losses = []
    for run, parameters in ((pair.theirs, pair.theirs.parameters()), (pair, pair.ours.parameters())):
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
        losses.append([])
        for _ in range(100):
            loss = (run(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    theirs, ours = losses
    assert theirs[-1] < 0.95 * theirs[0]
    assert max(abs(a - b) / a for a, b in zip(theirs, ours, strict=True)) < 1e-6
