"""DoRALinear: equal to the formula in fp64 and to PEFT's layer, and well-behaved as a module."""

import copy
import io
import math

import pytest
import torch
from cases import dense_norm
from peft_models import dora_net, lora_layers
from test_modules import K, N, make_base
from tolerances import assert_as_exact, relative_error
from torch import nn
from torch.nn import functional as F

from peft_fast import DoRALinear, UnsupportedLayer, UnsupportedWeight, backends, explain, formats

NAMES = ("y", "x", "lora_A", "lora_B", "magnitude", "bias")


def trained(base: nn.Linear, **options) -> DoRALinear:
    layer = DoRALinear.from_linear(base, **{"r": 5, "lora_alpha": 7, **options})
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude.mul_(torch.rand(N) + 0.5)
    return layer


def formula(layer: DoRALinear, x, A, B, m, bias, dtype=torch.float64):
    """The equation of the docstring, in `dtype`."""
    weight = formats.from_linear(layer.base_layer)
    x, A, B, m, bias = (None if t is None else t.to(dtype) for t in (x, A, B, m, bias))
    W, s = weight.decode(dtype), layer.scaling
    norm = dense_norm(weight, A, B, s, dtype)
    c = m / (norm if layer.norm_grad == "full" else norm.detach())
    x_d = F.dropout(x, layer.lora_dropout, layer.training)
    if layer.dropout == "paper":
        y = c * (x @ W.t() + s * (x_d @ A.t() @ B.t()))
    else:
        y = c * (x_d @ W.t() + s * (x_d @ A.t() @ B.t())) + (x - x_d) @ W.t()
    return y if bias is None else y + bias


def results(layer, x, grad, dtype=None):
    """Output and gradients of the layer, or of the formula in `dtype`."""
    leaves = [x.detach().requires_grad_(), layer.lora_A, layer.lora_B, layer.magnitude]
    bias = layer.base_layer.bias
    if bias is not None and bias.requires_grad:
        leaves.append(bias)
    torch.manual_seed(3)
    y = layer(leaves[0]) if dtype is None else formula(layer, *leaves[:4], bias, dtype).to(x.dtype)
    grads = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    return dict(zip(NAMES, [y.detach(), *grads], strict=False))


@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"bias": "all"},
        {"bias": "lora_only", "lora_dropout": 0.3},
        {"lora_dropout": 0.3, "dropout": "peft"},
        {"norm_grad": "full", "bias": "all"},
        {"norm_grad": "full", "lora_dropout": 0.3},
    ],
    ids=str,
)
def test_against_the_formula_in_fp64(kind, options):
    layer, x, grad = trained(make_base(kind), **options), torch.randn(2, 9, K), torch.randn(2, 9, N)
    truth, got = results(layer, x, grad, torch.float64), results(layer, x, grad)
    assert len(got) == (6 if "bias" in options else 5)
    for name, value in truth.items():
        assert relative_error(got[name], value) < 1e-5, name
    layer.eval()
    assert relative_error(layer(x), results(layer, x, grad, torch.float64)["y"]) < 1e-5


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_half_activations(kind, dtype, bias):
    layer, grad = trained(make_base(kind, bias=bias)), torch.randn(2, 9, N).to(dtype)
    if kind == "dense":
        layer.base_layer.to(dtype)
    x = torch.randn(2, 9, K).to(dtype)
    truth, plain = results(layer, x, grad, torch.float64), results(layer, x, grad, torch.float32)
    got = results(layer, x, grad)
    for name in ("y", "x", "lora_A", "lora_B"):
        assert_as_exact(name, got[name], plain[name], truth[name])
    # Read out of the rounded output: exact to its rounding.
    assert relative_error(got["magnitude"], truth["magnitude"]) < 2 * torch.finfo(dtype).eps


def test_against_the_layer_of_peft(kind):
    peft_layer = lora_layers(dora_net(kind, lora_dropout=0.2))[0]
    layer = DoRALinear.from_linear(
        copy.deepcopy(peft_layer.base_layer), r=4, lora_alpha=12, lora_dropout=0.2, dropout="peft"
    )
    theirs = [peft_layer.lora_A, peft_layer.lora_B, peft_layer.lora_magnitude_vector]
    theirs = [part["default"].weight for part in theirs]
    ours = [layer.lora_A, layer.lora_B, layer.magnitude]
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b)
    x = torch.randn(3, 7, K, requires_grad=True)
    outcomes = []
    for module, leaves in ((layer, ours), (peft_layer, theirs)):
        torch.manual_seed(1)
        y = module(x)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, *leaves])])
    for a, b in zip(*outcomes, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4"])
@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16])
def test_a_new_layer_equals_its_base_and_trains_only_the_adapter(kind, adapter_dtype):
    base = make_base(kind)
    with torch.no_grad():
        if kind == "dense":
            base.weight[3] = 0
    weight, x = formats.from_linear(base).decode(torch.float32), torch.randn(3, K)
    layer = DoRALinear.from_linear(base, adapter_dtype=adapter_dtype)
    torch.testing.assert_close(layer(x), F.linear(x, weight, base.bias))
    torch.testing.assert_close(layer.magnitude.float(), weight.norm(dim=1))
    assert layer.lora_A.dtype == (adapter_dtype or torch.float32)
    assert layer.magnitude.dtype == torch.float32
    trainable = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B", "magnitude"}
    assert layer.base_layer is base
    assert layer.scaling == 2
    assert DoRALinear.from_linear(
        make_base("dense"), r=9, lora_alpha=6, use_rslora=True
    ).scaling == 6 / math.sqrt(9)


def test_training_moves_length_and_direction():
    layer, x = DoRALinear.from_linear(make_base("nf4"), r=4), torch.randn(64, K)
    target = torch.randn(64, N)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    norms = dense_norm(formats.from_linear(layer.base_layer), layer.lora_A, layer.lora_B, 8.0, torch.float64)
    merged = layer.magnitude / norms
    assert (merged - 1).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_state_dict_deepcopy_and_pickle_round_trips(kind):
    layer, x = trained(make_base(kind)), torch.randn(3, K)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), y)
    other = trained(make_base("dense")) if kind == "dense" else copy.deepcopy(layer)
    other(x)
    with torch.no_grad():
        other.lora_A.zero_()
        other.magnitude.zero_()
    keys = other.load_state_dict(layer.state_dict(), strict=kind == "dense")
    assert not keys.missing_keys
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2, "dropout": "peft"}, {"norm_grad": "full"}])
def test_autocast(kind, options):
    layer, x = trained(make_base(kind), **options), torch.randn(5, K)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype
    grads = torch.autograd.grad(y.sum(), (layer.lora_A, layer.lora_B, layer.magnitude))
    truth = results(layer, x, torch.ones(5, N), torch.float64)
    assert relative_error(y, truth["y"]) < 0.01
    for name, grad in zip(("lora_A", "lora_B", "magnitude"), grads, strict=True):
        assert relative_error(grad, truth[name]) < 0.02, name


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear4bit_compute_dtype_is_honoured(compute, dtype):
    base, x = make_base("nf4", compute_dtype=compute), torch.randn(5, K, dtype=dtype)
    y = DoRALinear.from_linear(base, r=4)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, base(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 1e-9, "dropout": "peft"}, {"norm_grad": "full"}], ids=str
)
def test_compiles_into_one_graph_that_follows_the_adapter(kind, options):
    layer, x = trained(make_base(kind), **options), torch.randn(3, K)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        outcomes = []
        for forward in (layer, compiled):
            torch.manual_seed(1)
            leaves = (layer.lora_A, layer.lora_B, layer.magnitude)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                y = forward(x)
            outcomes.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        for a, b in zip(*outcomes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        layer.lora_A.data.add_(0.1)
        layer.base_layer.weight.data = layer.base_layer.weight.data.clone()
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", ["paper", "peft"])
@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_gradient_checkpointing(reentrant, dropout, norm_grad):
    layer = trained(make_base("nf4"), lora_dropout=0.5, dropout=dropout, norm_grad=norm_grad)
    x = torch.randn(6, K, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B, layer.magnitude)
    outcomes = []
    for forward in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        for leaf in leaves:
            leaf.grad = None
        forward(x).square().sum().backward()
        outcomes.append([leaf.grad.clone() for leaf in leaves])
    for plain, recomputed in zip(*outcomes, strict=True):
        assert torch.equal(plain, recomputed)


def test_moves_and_casts_like_any_module():
    layer, x = trained(make_base("dense")), torch.randn(3, K)
    layer(x)
    layer.double()
    assert (
        relative_error(layer(x.double()), results(layer, x.double(), torch.ones(3, N), torch.float64)["y"])
        < 1e-12
    )
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert (
        relative_error(
            layer.float()(x), formula(layer, x, *list(layer.parameters())[:3], layer.base_layer.bias)
        )
        < 1e-5
    )


def test_an_explicit_backend_runs():
    layer, x = trained(make_base("nf4"), backend="reference"), torch.randn(3, K)
    before = backends.calls["lora_linear", "reference"]
    layer(x)
    assert backends.calls["lora_linear", "reference"] == before + 2  # the norm, and the layer
    assert "DoRALinear: r=5, scaling=1.4, dropout='paper', norm_grad='detached'" in explain(layer)
    assert "dropout='paper'" in repr(layer)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("r", {"r": 0}),
        ("r", {"r": 2.0}),
        ("lora_dropout", {"lora_dropout": -0.1}),
        ("bias", {"bias": "some"}),
        ("dropout", {"dropout": "both"}),
        ("norm_grad", {"norm_grad": "half"}),
    ],
)
def test_bad_options_are_named_and_the_base_is_left_as_it_was(named, options):
    base = make_base("dense")
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        DoRALinear.from_linear(base, **options)
    assert base.weight.requires_grad
    with pytest.raises(ValueError, match=r"^bias: expected a base layer with a bias"):
        DoRALinear.from_linear(make_base("dense", bias=False), bias="all")


def test_unfusable_bases_and_inputs_are_refused():
    with pytest.raises(UnsupportedLayer, match="got Conv1d"):
        DoRALinear.from_linear(nn.Conv1d(K, N, 1))
    import bitsandbytes as bnb

    with pytest.raises(UnsupportedWeight, match="moving the layer quantizes it"):
        DoRALinear.from_linear(bnb.nn.Linear4bit(K, N))
    layer = trained(make_base("nf4"))
    with pytest.raises(ValueError, match=r"^x: expected \[\.\.\., K\] = \[\.\.\., 64\], got \[2, 63\]"):
        layer(torch.randn(2, 63))
    layer.magnitude = nn.Parameter(torch.ones(N + 1))
    with pytest.raises(ValueError, match=r"^magnitude: expected \[N\] = \[48\], got \[49\]"):
        layer(torch.randn(2, K))
