"""Rows that stay orthonormal: torch's parametrization in value and gradient, without its d×d matrices."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from peft_fast.orthonormal import OrthonormalRows, complete, dense_base, orthonormal_rows

SIZES = [(1, 1), (5, 1), (5, 5), (7, 3), (12, 4), (64, 8), (33, 32), (33, 33)]
EXACT = 1e-12
"""In fp64: rounding of d·r products with condition 1."""
ORTHONORMAL = 1e-6
"""Of R in fp32, whatever happened before: R is rounded once, by 6e-8 of each element."""

pytestmark = pytest.mark.usefixtures("one_thread")


def draw_rows(*shape: int, dtype=torch.float64) -> torch.Tensor:
    rows = torch.empty(*shape, dtype=dtype)
    for row in rows.view(-1, *shape[-2:]):
        nn.init.orthogonal_(row)
    return rows


def theirs(ours: OrthonormalRows) -> nn.Module:
    """torch's parametrization of a [d, r] weight, of the same base and rotation."""
    module = nn.Linear(*ours.rotation.shape, bias=False, dtype=ours.rotation.dtype)
    parametrizations.orthogonal(module, orthogonal_map="householder")
    parametrization = module.parametrizations.weight
    parametrization[0].base = dense_base(ours.base, ours.base_sign)
    with torch.no_grad():
        parametrization.original.copy_(ours.rotation.mT.tril(-1) - torch.eye(*ours.rotation.shape).mT)
    return module


def rotated(d: int, r: int, dtype=torch.float64, scale: float = 1.0) -> OrthonormalRows:
    module = OrthonormalRows(d, r, dtype=dtype)
    nn.init.normal_(module.rotation, std=scale)
    return module


def error(rows: torch.Tensor) -> float:
    rows = rows.detach().double()
    return (rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype)).abs().max().item()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ----------------------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize(("d", "r"), SIZES)
def test_equals_torch(d, r):
    ours = rotated(d, r)
    other = theirs(ours)
    grad = torch.randn(r, d, dtype=torch.float64)
    rows = ours()
    rows.backward(grad)
    other.weight.backward(grad.mT)
    assert distance(rows, other.weight.mT) < EXACT
    assert distance(ours.rotation.grad, other.parametrizations.weight.original.grad.mT) < EXACT
    assert ours.rotation.grad.tril().count_nonzero() == 0


@pytest.mark.parametrize(("d", "r"), SIZES)
def test_dense_base_completes_rows(d, r):
    rows = draw_rows(r, d)
    base, base_sign = complete(rows)
    dense = dense_base(base, base_sign)
    assert error(dense) < EXACT
    assert distance(dense[:, :r], rows.mT) < EXACT
    assert distance(orthonormal_rows(torch.zeros_like(base), base, base_sign), rows) < EXACT
    assert base.tril().count_nonzero() == 0
    assert base_sign.dtype == torch.int8


@pytest.mark.parametrize("rows", [torch.eye(3, 5), -torch.eye(3, 5), torch.eye(5).flip(0), -torch.eye(5)])
def test_complete_of_unit_rows(rows):
    """LAPACK leaves reflectors out here, and cancellation would be total with the other sign."""
    base, base_sign = complete(rows)
    assert torch.equal(orthonormal_rows(torch.zeros_like(base), base, base_sign), rows)


def test_only_the_strict_upper_triangle_is_read():
    ours = rotated(12, 4)
    before = ours().clone()
    with torch.no_grad():
        ours.rotation += torch.randn(4, 12, dtype=torch.float64).tril()
        ours.base += torch.randn(4, 12, dtype=torch.float64).tril()
    assert torch.equal(ours(), before)


def test_gradcheck():
    base, base_sign = complete(draw_rows(2, 3, 5))
    rotation = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthonormal_rows, (rotation, base.requires_grad_(), base_sign))
    assert torch.autograd.gradgradcheck(orthonormal_rows, (rotation, base, base_sign))


@pytest.mark.parametrize("lead", [(3,), (2, 3), (0,)])
def test_batch_equals_its_items(lead):
    d, r = 9, 4
    base, base_sign = complete(draw_rows(*lead, r, d))
    rotation = torch.randn(*lead, r, d, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*lead, r, d, dtype=torch.float64)
    rows = orthonormal_rows(rotation, base, base_sign)
    rows.backward(grad)
    dense = dense_base(base, base_sign)
    assert rows.shape == (*lead, r, d)
    assert dense.shape == (*lead, d, d)
    flat = [t.flatten(0, -3) for t in (rotation.detach(), base, rows, rotation.grad, grad, dense)]
    for one, b, R, g, dR, full, s in zip(*flat, base_sign.view(-1, r), strict=True):
        one = one.clone().requires_grad_()
        alone = orthonormal_rows(one, b, s)
        alone.backward(dR)
        assert distance(alone, R) < EXACT
        assert distance(one.grad, g) < EXACT
        assert distance(dense_base(b, s), full) < EXACT


def test_rank_zero():
    ours = OrthonormalRows(6, 0)
    rows = ours()
    rows.sum().backward()
    assert rows.shape == ours.rotation.grad.shape == (0, 6)
    assert torch.equal(dense_base(ours.base, ours.base_sign), torch.eye(6))
    assert OrthonormalRows.from_rows(torch.empty(0, 6))().shape == (0, 6)


def test_starts_as_a_weight_of_torch():
    torch.manual_seed(3)
    expected = nn.init.orthogonal_(torch.empty(64, 8)).mT
    torch.manual_seed(3)
    assert distance(OrthonormalRows(64, 8)(), expected) < ORTHONORMAL


# --------------------------------------------------------------------------------------------------- training


def train(weight, parameters, steps: int, x, y, **options) -> list[float]:
    """Fits x·weight()ᵀ to y; the losses."""
    step = torch.optim.AdamW(parameters, **options)
    losses = []
    for _ in range(steps):
        loss = (x @ weight().mT - y).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    return losses


def regression(d: int, r: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, d, dtype=dtype)
    return x, x @ draw_rows(r, d, dtype=dtype).mT


@pytest.mark.parametrize(("d", "r"), [(16, 1), (24, 5), (8, 8)])
def test_training_equals_torch(d, r):
    ours = OrthonormalRows(d, r, dtype=torch.float64)
    other = theirs(ours)
    x, y = regression(d, r)
    options = {"lr": 1e-2, "weight_decay": 0.0}
    mine = train(ours, [ours.rotation], 100, x, y, **options)
    expected = train(lambda: other.weight.mT, other.parameters(), 100, x, y, **options)
    assert mine[-1] < 0.9 * mine[0]
    assert max(abs(a - b) for a, b in zip(mine, expected, strict=True)) < EXACT
    assert distance(ours(), other.weight.mT) < EXACT


def test_weight_decay_keeps_rows_orthonormal():
    """torch's it makes zero: the signs there are the integer part of a diagonal that decays too."""
    ours = OrthonormalRows(24, 5)
    other = theirs(ours)
    x, y = regression(24, 5, torch.float32)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    train(ours, [ours.rotation], 300, x, y, **options)
    train(lambda: other.weight.mT, other.parameters(), 300, x, y, **options)
    assert error(ours()) < ORTHONORMAL
    assert other.weight.count_nonzero() == 0


def test_weight_decay_alone_leads_to_the_base():
    ours = OrthonormalRows(24, 5)
    start = ours().clone()
    with torch.no_grad():
        ours.rotation.normal_()
    assert distance(ours(), start) > 0.1
    with torch.no_grad():
        ours.rotation *= 1e-9
    assert distance(ours(), start) < ORTHONORMAL


def test_ten_thousand_steps_in_fp32():
    ours = OrthonormalRows(12, 3)
    x, y = regression(12, 3, torch.float32)
    losses = train(ours, [ours.rotation], 10_000, x, y, lr=1e-2, weight_decay=0.1)
    assert losses[-1] < losses[0]
    assert ours.rotation.abs().max() > 0.1
    assert error(ours()) < ORTHONORMAL


def test_resumed_training_is_the_same():
    x, y = regression(24, 5, torch.float32)

    def steps(module, state, count):
        step = torch.optim.AdamW([module.rotation], lr=1e-2)
        if state is not None:
            step.load_state_dict(state)
        for _ in range(count):
            step.zero_grad()
            (x @ module().mT - y).square().mean().backward()
            step.step()
        return step.state_dict()

    ours = OrthonormalRows(24, 5)
    torch.save((ours.state_dict(), steps(ours, None, 20)), file := io.BytesIO())
    file.seek(0)
    weights, state = torch.load(file)
    resumed = OrthonormalRows(24, 5)
    assert distance(resumed(), ours()) > 0.1
    resumed.load_state_dict(weights)
    assert set(weights) == {"rotation", "base", "base_sign"}
    assert torch.equal(resumed(), ours())
    steps(resumed, copy.deepcopy(state), 20)
    steps(ours, copy.deepcopy(state), 20)
    assert torch.equal(resumed.rotation, ours.rotation)
    assert torch.equal(resumed(), ours())
    assert error(resumed()) < ORTHONORMAL


# -------------------------------------------------------------------------- whatever is stored or switched on


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-3, 1.0, 1e6, 1e30])
@pytest.mark.parametrize(("d", "r"), [(5, 1), (9, 9), (64, 8), (300, 100)])
def test_any_stored_value_is_orthonormal(d, r, scale):
    base, rotation = scale * torch.randn(2, r, d)
    assert error(orthonormal_rows(rotation, base, torch.randint(-128, 128, (r,)))) < ORTHONORMAL
    parallel = (scale * torch.randn(d)).expand(r, d)
    assert error(orthonormal_rows(parallel, -parallel, torch.zeros(r, dtype=torch.int8))) < ORTHONORMAL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    ours = rotated(64, 8, torch.float32, scale=0.1)
    exact = ours().clone()
    ours.to(dtype)
    rows = ours()
    assert ours.rotation.dtype == ours.base.dtype == dtype
    assert ours.base_sign.dtype == torch.int8
    assert rows.dtype == torch.float32
    assert error(rows) < ORTHONORMAL
    assert distance(rows, exact) < torch.finfo(dtype).eps
    rows.sum().backward()
    assert ours.rotation.grad.dtype == dtype
    built = OrthonormalRows(64, 8, dtype=dtype)
    assert error(built()) < ORTHONORMAL
    assert built.rotation.dtype == dtype


def test_autocast_does_not_reach_it():
    ours = rotated(64, 8, torch.float32)
    exact = ours()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_from_rows(dtype):
    rows = draw_rows(8, 64).to(dtype)
    ours = OrthonormalRows.from_rows(rows)
    assert ours.rotation.dtype == dtype
    assert ours.rotation.requires_grad
    assert error(ours()) < (EXACT if dtype == torch.float64 else ORTHONORMAL)
    assert distance(ours(), rows.to(ours().dtype)) < 16 * torch.finfo(dtype).eps


def test_from_rows_does_not_draw():
    rows = draw_rows(3, 7)
    state = torch.get_rng_state()
    OrthonormalRows.from_rows(rows)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "rows",
    [
        1.01 * torch.eye(3, 5),
        torch.zeros(3, 5),
        torch.full((1, 5), torch.nan),
        torch.eye(5, 3),
        torch.eye(3, 5).long(),
        torch.eye(3, 5)[None],
        torch.tensor([[1.0, 0.0], [0.1, 0.995]]),
    ],
    ids=["long", "zero", "nan", "tall", "integer", "batch", "oblique"],
)
def test_from_rows_refuses(rows):
    with pytest.raises(ValueError, match=r"^rows: expected"):
        OrthonormalRows.from_rows(rows)


def test_arguments_are_named():
    base, base_sign = complete(draw_rows(3, 7))
    with pytest.raises(ValueError, match=r"^rows: .*got \[7, 3\]"):
        complete(base.mT)
    with pytest.raises(ValueError, match=r"^rotation: .*got \[7, 3\]"):
        orthonormal_rows(base.mT, base, base_sign)
    with pytest.raises(ValueError, match=r"^base: expected \[3, 7\], got \[3, 6\]"):
        orthonormal_rows(base, base[:, 1:], base_sign)
    with pytest.raises(ValueError, match=r"^base_sign: expected \[3\], got \[2\]"):
        orthonormal_rows(base, base, base_sign[1:])
    with pytest.raises(ValueError, match=r"^base_sign: expected \[3\], got \[2\]"):
        dense_base(base, base_sign[1:])
    with pytest.raises(ValueError, match=r"^r: expected 0 ≤ r ≤ d = 4, got 5"):
        OrthonormalRows(4, 5)
    with pytest.raises(ValueError, match=r"^r: expected 0 ≤ r ≤ d = 4, got -1"):
        OrthonormalRows(4, -1)


# --------------------------------------------------------------------------------------- as a module of torch


def test_deepcopy():
    ours = rotated(12, 4)
    other = copy.deepcopy(ours)
    assert torch.equal(other(), ours())
    with torch.no_grad():
        other.rotation.zero_()
        other.base.zero_()
    assert distance(other(), ours()) > 0.1


def test_compiles_whole():
    ours = rotated(12, 4, torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    grad = torch.randn(4, 12)
    ours().backward(grad)
    expected, ours.rotation.grad = ours.rotation.grad, None
    rows = compiled()
    rows.backward(grad)
    assert distance(rows, ours()) < ORTHONORMAL
    assert distance(ours.rotation.grad, expected) < 1e-5


def test_saves_nothing_of_size_d_squared():
    d, r = 512, 4
    ours = rotated(d, r, torch.float32)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows = ours()
    assert rows.grad_fn is not None
    matrix = d * r * 8
    assert max(saved.values()) <= matrix
    assert sum(saved.values()) <= 2 * matrix + 16 * (r * r + d) * 8
