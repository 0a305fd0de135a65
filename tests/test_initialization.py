"""PiSSA and OLoRA: against PEFT on a dense base, over packed ones, and refused."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from initialization_models import BASES, METHODS, OPTIONS, adapted, effective, parts, spectral, stored
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora_layer
from peft_models import Net, to_kind
from tolerances import relative_error
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_fast import DoRALinear, LoRALinear, UnsupportedLayer, UnsupportedWeight
from peft_fast.formats import from_linear
from peft_fast.initialization import initialize

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("method", "niter"), METHODS)
def test_a_dense_base_gets_what_peft_gives_it(method, niter, use_rslora, monkeypatch):
    net, name = spectral(Net()), method if niter is None else f"{method}_niter_{niter}"
    randomized = torch.svd_lowrank

    def seeded(*args, **kwargs):
        torch.manual_seed(1)
        return randomized(*args, **kwargs)

    monkeypatch.setattr(torch, "svd_lowrank", seeded)
    monkeypatch.setattr(lora_layer, "svd_lowrank", seeded)
    theirs = adapted(copy.deepcopy(net), "peft", init_lora_weights=name, use_rslora=use_rslora)
    ours = adapted(copy.deepcopy(net), "accelerated", use_rslora=use_rslora)
    initialize(ours, method, niter=niter)
    for expected, got in zip(parts(theirs), parts(ours), strict=True):
        for a, b in ((expected[0].weight, got[0].weight), *zip(expected[1:3], got[1:3], strict=True)):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    assert ours.peft_config["default"].init_lora_weights == name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("owner", ["peft", "accelerated", "ours"])
@pytest.mark.parametrize(("method", "niter"), METHODS)
def test_factors_and_residual_on_every_base(method, niter, owner, base):
    net = spectral(Net())
    net.up, net.down = BASES[base](net.up), BASES[base](net.down)
    model = adapted(net, owner)
    before = [(stored(layer), from_linear(layer)) for layer, *_ in parts(model)]
    states = [getattr(layer.weight, "quant_state", None) for layer, *_ in parts(model)]
    initialize(model, method, niter=niter)
    for (layer, A, B, s), (W, old), state in zip(parts(model), before, states, strict=True):
        A, B, new = A.detach().double(), B.detach().double(), from_linear(layer)
        residual = W - s * B @ A
        if method == "olora":
            Q, R = torch.linalg.qr(W)
            assert relative_error(B @ A, Q[:, :4] @ R[:4]) < 1e-5
            assert (B.t() @ B - torch.eye(4)).norm() < 1e-5
        else:
            best = torch.linalg.svdvals(W)[4:].norm()  # Eckart and Young: no rank 4 leaves less
            assert best * (1 - 1e-6) <= residual.norm() <= best * (1 + (1e-6 if niter is None else 0.1))
            assert relative_error(B.norm(dim=0), A.norm(dim=1)) < 1e-5
        assert relative_error(stored(layer), residual) < {"fp32": 1e-6, "bf16": 4e-3}.get(base, 0.2)
        assert old.check()._replace(**dict.fromkeys(old._fields[:6])) == new.check()._replace(
            **dict.fromkeys(new._fields[:6])
        )
        assert new.weight.dtype == old.weight.dtype
        if state is not None:
            assert layer.weight.quant_state is layer.quant_state is not state
            assert layer.quant_state.dtype == state.dtype
            assert layer.weight.dtype == layer.quant_storage
            exact = bnb.functional.quantize_4bit(
                residual.float(),
                blocksize=old.blocksize,
                compress_statistics=old.nested,
                quant_type=old.format,
            )
            assert (new.weight == exact[0].flatten()).double().mean() > 0.99


@pytest.mark.parametrize("base", BASES)
def test_the_output_stays_and_training_starts(base):
    net = spectral(Net())
    net.up, net.down = BASES[base](net.up), BASES[base](net.down)
    dtype = torch.bfloat16 if "bf16" in base else torch.float32
    model = adapted(net, "accelerated")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = torch.randn(3, 5, net.up.in_features).to(dtype)
    expected = model(x).detach()
    initialize(model, "pissa")
    got = model(x)
    assert relative_error(got, expected) < {"fp32": 1e-5, "bf16": 2e-2}.get(base, 0.1)
    losses = []
    for _ in range(3):
        loss = model(x).float().square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("base", ["nf4", "nf4-plain-128", "fp4"])
def test_quantization_loses_less_only_when_the_original_is_given(base, method):
    """QPiSSA's claim is about the weight before quantization; of the decoded one the error can only grow."""
    net = spectral(Net(256, 256))
    original = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.up, net.down = BASES[base](net.up), BASES[base](net.down)
    model = adapted(net, "accelerated", r=16, lora_alpha=16)
    W = [original["up.weight"], original["down.weight"]]
    quantized = [relative_error(stored(layer), w) for (layer, *_), w in zip(parts(model), W, strict=True)]
    again = copy.deepcopy(model)
    initialize(model, method, weights=original)
    initialize(again, method)
    for got, decoded, w, alone in zip(effective(model), effective(again), W, quantized, strict=True):
        if method == "pissa":
            assert relative_error(got, w) < 0.7 * alone
        assert relative_error(decoded, w) > relative_error(got, w)
        assert relative_error(decoded, w) > alone


def test_a_conv1d_keeps_its_layout():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"c": spectral(Conv1D(48, 32))}),
        LoraConfig(r=4, target_modules=["c"], fan_in_fan_out=True),
    )
    W = effective(model)[0]
    initialize(model, "pissa")
    assert parts(model)[0][0].weight.shape == (32, 48)
    assert relative_error(effective(model)[0], W) < 1e-6


def test_models_that_share_the_weight_keep_theirs():
    net = to_kind(Net(), "nf4")
    shared = copy.deepcopy(net, {id(p): p for p in net.parameters()})
    expected = shared.up.weight.clone()
    assert shared.up.weight is net.up.weight
    initialize(adapted(net, "peft"), "pissa")
    assert torch.equal(shared.up.weight, expected)
    assert not torch.equal(net.up.base_layer.weight, expected)


# ------------------------------------------------------------------------------------------ what is refused


def broken(model: nn.Module, how: str) -> nn.Module:
    """The model with its second layer such that it cannot be initialized."""
    layer = model.base_model.model.down
    base = layer.base_layer
    match how:
        case "merged":
            layer.merge()
        case "tied":
            model.base_model.model.other = nn.Linear(1, 1)
            model.base_model.model.other.weight = base.weight
        case "tied A":
            layer.lora_A.default.weight = model.base_model.model.up.lora_A.default.weight
        case "trained":
            layer.lora_B.default.weight.data[0, 0] = 1
        case "others":
            model.add_adapter("second", LoraConfig(**OPTIONS))
        case "repacked":
            base.weight.quant_state.packing_format_for_cpu = True
        case "nan":
            base.weight.data[1, 2] = float("nan")
        case "subclass":
            base.__class__ = type("Subclass", (nn.Linear,), {})
        case "parametrized":
            nn.utils.parametrizations.orthogonal(layer.lora_A.default)
        case "trained base":
            base.weight.requires_grad_()
        case "scaling":
            layer.scaling["default"] = -1.0
        case "meta":
            layer.to("meta")
    return model


@pytest.mark.parametrize(
    ("kind", "how", "error", "text"),
    [
        ("dense", "merged", UnsupportedLayer, r"'base_model\.model\.down': merged adapters: \['default'\]"),
        ("nf4", "tied", UnsupportedLayer, r"model\.down': a weight \[4096, 1\] that another module has too"),
        ("dense", "tied A", UnsupportedLayer, r"a weight \[4, 64\] that another module has too"),
        ("nf4", "trained", UnsupportedLayer, "lora_B is not zero"),
        ("nf4", "others", UnsupportedLayer, r"under further adapters, \['second'\]"),
        ("nf4", "repacked", UnsupportedWeight, "repacked in place"),
        ("dense", "nan", UnsupportedWeight, "expected finite values"),
        ("dense", "subclass", UnsupportedLayer, "base_layer is a Subclass"),
        ("nf4", "parametrized", UnsupportedLayer, "lora_A is a ParametrizedLinear"),
        ("dense", "trained base", UnsupportedLayer, "the weight of base_layer is trained"),
        ("nf4", "scaling", UnsupportedLayer, r"scaling -1\.0"),
        ("dense", "meta", UnsupportedLayer, "on the meta device"),
    ],
)
def test_one_layer_that_cannot_be_initialized_leaves_all_as_they_were(kind, how, error, text):
    net = to_kind(Net(64, 64) if how == "tied A" else Net(), kind)
    model = broken(adapted(net, "peft"), how)
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    states = [getattr(m, "quant_state", None) for m in model.modules()]
    with pytest.raises(error, match=text):
        initialize(model, "pissa")
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert [getattr(m, "quant_state", None) for m in model.modules()] == states
    assert model.peft_config["default"].init_lora_weights is True


def test_layers_of_other_kinds_are_refused():
    dora = adapted(Net(), "peft", use_dora=True)
    with pytest.raises(UnsupportedLayer, match="the adapter is dora"):
        initialize(dora, "pissa")
    with pytest.raises(UnsupportedLayer, match="'': a DoRALinear"):
        initialize(DoRALinear.from_linear(nn.Linear(8, 8), r=2), "pissa")
    embedding = nn.ModuleDict({"e": nn.Embedding(9, 8)})
    with pytest.raises(UnsupportedLayer, match=r"'base_model\.model\.e': a peft\.tuners\.lora\.layer\.Embed"):
        initialize(get_peft_model(embedding, LoraConfig(target_modules=["e"], r=2)), "olora")
    with pytest.raises(UnsupportedLayer, match="rank 9, of a weight that has 8"):
        initialize(LoRALinear.from_linear(nn.Linear(8, 8), r=9), "pissa")
    reader = get_peft_model(Reader(), LoraConfig(target_modules=["proj"], r=2))
    with pytest.raises(UnsupportedLayer, match=r"Reader uses its \.weight"):
        initialize(reader, "pissa")


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.proj.weight


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "loftq"}, r"method: expected one of \['pissa', 'olora'\], got 'loftq'"),
        ({"method": "olora", "niter": 2}, "niter: expected None, or for 'pissa'"),
        ({"niter": -1}, "niter: expected None, or for 'pissa' an integer from 0 on, got -1"),
        ({"niter": True}, "niter: expected None, or for 'pissa' an integer from 0 on, got True"),
        ({"adapter": "other"}, "adapter: expected that of a LoRA layer in model, got 'other'"),
        ({"weights": {"up.weight": torch.zeros(128, 64)}}, "weights: expected 'down.weight' among them"),
        (
            {"weights": {"up.weight": torch.zeros(8192, 1, dtype=torch.uint8)}},
            r"weights: expected a floating \[128, 64\] as 'up.weight', got torch.uint8 \[8192, 1\]",
        ),
    ],
)
def test_arguments_are_checked_first(arguments, text):
    model = adapted(to_kind(Net(), "nf4"), "accelerated")
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=text):
        initialize(model, **{"method": "pissa", **arguments})
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
