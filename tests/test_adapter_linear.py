"""AdapterLinear as a module: identity, state, copies, autocast, compilation, and what it refuses."""

import copy
import io

import pytest
import torch
from method_cases import CASES, K, N, make_base, moved, trained
from peft import get_peft_model
from peft_models import Net, accelerated, fused_calls, inputs, lora_config, to_kind, unpacked
from tolerances import relative_error
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peft_fast import (
    AdapterLinear,
    LoRALinear,
    SharedFactors,
    UnsupportedLayer,
    backends,
    convert,
    explain,
    formats,
    quantize,
    restore,
)
from peft_fast.base_layers import FusedBase
from peft_fast.methods import METHODS


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_a_new_layer_equals_its_frozen_base_and_learns(kind, method, options):
    base = make_base(kind)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    layer = AdapterLinear.from_linear(base, method, **options)
    x, target = torch.randn(5, K), torch.randn(5, N)
    W = formats.from_linear(base).decode(torch.float32)
    torch.testing.assert_close(layer(x), F.linear(x, W, base.bias), rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("base_layer") for name in trained(layer))

    # Every parameter moves: one that started as zero times another takes a gradient from the second step on.
    start = {name: p.detach().clone() for name, p in trained(layer).items()}
    optimizer = torch.optim.SGD(trained(layer).values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    for name, p in trained(layer).items():
        assert not torch.equal(p, start[name]), name
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_state_dict_deepcopy_and_pickle_round_trips(kind, method, options):
    layer = moved(AdapterLinear.from_linear(make_base(kind), method, **options))
    x = torch.randn(3, K)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), y)
    # bitsandbytes' state dict has keys that its own strict load does not know.
    other = AdapterLinear.from_linear(copy.deepcopy(layer.base_layer), method, **options)
    other = moved(other)
    assert not torch.equal(other(x), y)
    keys = other.load_state_dict(layer.state_dict(), strict=kind == "dense")
    assert not keys.missing_keys
    assert torch.equal(other(x), y)


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_autocast_and_linear4bit_return_what_the_base_returns(kind, method, options):
    layer = moved(AdapterLinear.from_linear(make_base(kind), method, **options))
    x = torch.randn(5, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype
    assert relative_error(y, layer(x)) < 2e-2


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_compiles_into_one_graph(method, options):
    layer = moved(AdapterLinear.from_linear(make_base("nf4"), method, **options))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, grad = torch.randn(3, K, requires_grad=True), torch.randn(3, N)
    leaves = [x, *trained(layer).values()]
    expected = torch.autograd.grad(layer(x), leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), leaves, grad), expected)


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_one_fused_call_on_the_backend_that_was_asked_for(method, options):
    layer = AdapterLinear.from_linear(make_base("nf4"), method, backend="reference", **options)
    before = dict(backends.calls)
    layer(torch.randn(3, K))
    made = {key: count - before.get(key, 0) for key, count in backends.calls.items()}
    assert {key: count for key, count in made.items() if count} == {("lora_linear", "reference"): 1}
    layer.backend = "triton-none-such"
    with pytest.raises(ValueError, match=r"^backend: expected"):
        layer(torch.randn(3, K))


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_a_conv1d_base(method, options):
    """transformers' layer with the weight stored as its transpose."""
    conv = Conv1D(N, K)
    linear = nn.Linear(K, N)
    linear.load_state_dict({"weight": conv.weight.t(), "bias": conv.bias})
    layers = [AdapterLinear.from_linear(base, method, **options) for base in (conv, linear)]
    moved(layers[0])
    own = {k: t for k, t in layers[0].state_dict().items() if not k.startswith("base_layer")}
    layers[1].load_state_dict(own, strict=False)
    x = torch.randn(3, K)
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-5, atol=1e-5)


def test_vera_without_saved_projections_draws_them_again():
    layer = AdapterLinear.from_linear(make_base("dense"), "vera", save_projection=False)
    assert not any("vera_A" in key or "vera_B" in key for key in layer.state_dict())
    other = AdapterLinear.from_linear(make_base("dense"), "vera", save_projection=False)
    other.load_state_dict(moved(layer).state_dict())
    x = torch.randn(3, K)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("method", "options", "error", "said"),
    [
        ("lora", {}, ValueError, "method: expected one of"),
        ("vera", {"r": 0}, ValueError, "r: expected a positive integer, got 0"),
        ("vera", {"r": True}, ValueError, "r: expected a positive integer, got True"),
        ("vera", {"dropout": 1.5}, ValueError, "dropout: expected"),
        ("vera", {"d_initial": "1"}, ValueError, "d_initial: expected a finite number, got '1'"),
        ("vera", {"save_projection": 1}, ValueError, "save_projection: expected True or False, got 1"),
        ("vera", {"projection_prng_key": None}, ValueError, "projection_prng_key: expected an integer"),
        ("vera", {"projection_prng_key": 2**70}, ValueError, "projection_prng_key: expected an integer from"),
        ("vera", {"alpha": 3}, TypeError, "alpha: expected an option of 'vera'"),
        ("s2lora", {"threshold": -0.1}, ValueError, "threshold: expected a number ≥ 0, got -0.1"),
        ("s2lora", {"threshold": 0.5, "coefficient": 0.5}, ValueError, "coefficient: expected a magnitude"),
        ("s2lora", {"lora_alpha": float("nan")}, ValueError, "lora_alpha: expected a finite number, got nan"),
        ("kadaptation", {"n": 5}, ValueError, "n: expected a divisor of out_features = 48, got 5"),
        ("kadaptation", {"n": 3}, ValueError, "n: expected a divisor of in_features = 64, got 3"),
        ("kadaptation", {"terms": 0}, ValueError, "terms: expected a positive integer, got 0"),
        ("ia3", {"feedforward": "down"}, ValueError, "feedforward: expected True or False, got 'down'"),
        ("ssf", {"r": 4}, TypeError, "r: expected an option of 'ssf'"),
        ("bitfit", {"dropout": 0.1}, TypeError, "dropout: expected an option of 'bitfit'"),
        ("parallel", {"act": "linear"}, ValueError, "act: expected one of"),
        ("parallel", {"bias": True}, ValueError, "bias: expected one of"),
        ("series", {"r": 2.0}, ValueError, "r: expected a positive integer, got 2.0"),
        ("series", {"scaling": None}, ValueError, "scaling: expected a finite number, got None"),
    ],
)
def test_a_bad_option_is_named_and_the_base_is_left_as_it_was(method, options, error, said):
    base = make_base("dense")
    with pytest.raises(error, match=f"^{said}"):
        AdapterLinear.from_linear(base, method, **options)
    assert base.weight.requires_grad
    assert base.bias.requires_grad


def test_shared_factors_that_do_not_fit_are_refused():
    base, vera = make_base("dense"), SharedFactors("vera", K, N, r=8)
    with pytest.raises(ValueError, match=r"^shared: expected factors of method 'ia3', got those of 'vera'"):
        AdapterLinear.from_linear(base, "ia3", shared=vera)
    with pytest.raises(ValueError, match=r"^r: expected 8, as in the shared factors, got 4"):
        AdapterLinear.from_linear(base, "vera", shared=vera, r=4)
    with pytest.raises(
        ValueError, match=r"at least \[out_features, in_features\] = \[48, 65\], got \[48, 64\]"
    ):
        AdapterLinear.from_linear(nn.Linear(65, 48), "vera", shared=vera, r=8)
    with pytest.raises(ValueError, match=r"^method: expected one of \['vera', 's2lora', 'kadaptation'\]"):
        SharedFactors("ssf", K, N)
    with pytest.raises(UnsupportedLayer, match="got Conv1d"):
        AdapterLinear.from_linear(nn.Conv1d(K, N, 1), "vera")


def test_every_method_is_tested_here():
    assert {method for method, _ in CASES} == set(METHODS)


@pytest.mark.parametrize(
    "wrap", [LoRALinear.from_linear, lambda base: AdapterLinear.from_linear(base, "ia3")]
)
def test_a_layer_of_ours_is_left_alone_with_its_base(kind, wrap):
    """And explained, beside a layer of PEFT's."""
    net = to_kind(Net(), kind)
    net.up = wrap(net.up)
    model = accelerated(unpacked(get_peft_model(net, lora_config(["down"]))))
    assert [type(m) for m in model.base_model.model.up.modules()] == [type(m) for m in net.up.modules()]
    assert not any(isinstance(module, FusedBase) for module in model.modules())
    text = explain(model)
    assert text.count("lora_linear over") == 2
    assert f"base_model.model.up: {explain(net.up).splitlines()[0]}" in text
    assert explain(net.up).startswith(("LoRALinear: r=16", "AdapterLinear: ia3, feedforward=False\n"))
    before = fused_calls()
    model(inputs())
    assert fused_calls() - before == 2
    assert restore(model) == 1


@pytest.mark.parametrize("change", [quantize, convert])
def test_quantize_and_convert_refuse_a_layer_of_ours(change):
    net = Net()
    net.up = AdapterLinear.from_linear(net.up, "ia3")
    with pytest.raises(UnsupportedLayer, match="without adapters, got a AdapterLinear at 'up'"):
        change(net)
    assert type(net.up.base_layer) is type(net.down) is nn.Linear
