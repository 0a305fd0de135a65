"""LoRALinear: equal to the written-out layer over nn.Linear and Linear4bit, and well-behaved as a module."""

import copy
import io
import math

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_fast import LoRALinear, UnsupportedLayer, UnsupportedWeight, formats
from peft_fast.modules import warn_slow_compute_dtype

K, N = 64, 48


def make_base(kind: str, bias: bool = True, **options) -> nn.Linear:
    if kind == "dense":
        return nn.Linear(K, N, bias=bias)
    return bnb.nn.Linear4bit(K, N, bias=bias, quant_type=kind, **options).to("cpu")


def trained(base: nn.Linear, **options) -> LoRALinear:
    """A layer whose lora_B is not zero any more."""
    layer = LoRALinear.from_linear(base, **options)
    nn.init.normal_(layer.lora_B)
    if layer.lora_bias is not None:
        nn.init.normal_(layer.lora_bias)
    return layer


def written_out(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    weight = formats.from_linear(layer.base_layer).decode(x.dtype)
    low_rank = F.dropout(x, layer.lora_dropout, layer.training) @ layer.lora_A.t() @ layer.lora_B.t()
    if layer.lora_bias is not None:
        low_rank = low_rank + layer.lora_bias
    return F.linear(x, weight, layer.base_layer.bias) + layer.scaling * low_rank


@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_bias": True}, {"bias": "all"}, {"lora_dropout": 0.3}]
)
def test_equals_the_written_out_layer(kind, options):
    layer = trained(make_base(kind), r=5, lora_alpha=7, **options)
    x = torch.randn(2, 9, K, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grad = torch.randn(2, 9, N)
    results = []
    for forward in (layer, lambda x: written_out(layer, x)):
        torch.manual_seed(3)
        y = forward(x)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_new_layer_equals_its_base_and_trains_only_the_adapter():
    base = make_base("nf4")
    x = torch.randn(3, K)
    expected = F.linear(x, formats.from_linear(base).decode(torch.float32), base.bias)
    layer = LoRALinear.from_linear(base)
    torch.testing.assert_close(layer(x), expected)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert layer.base_layer is base
    assert layer.scaling == 32 / 16
    assert LoRALinear.from_linear(
        make_base("dense"), r=9, lora_alpha=6, use_rslora=True
    ).scaling == 6 / math.sqrt(9)


def test_an_eval_forward_leaves_the_packed_weight_alone():
    """bitsandbytes repacks it at an eval forward on AVX512_BF16 CPUs; training and saving then break."""
    layer = trained(make_base("nf4"), r=4).eval()
    packed = layer.base_layer.weight
    before = packed.data.clone()
    with torch.no_grad():
        layer(torch.randn(3, K))
        layer.base_layer(torch.randn(3, K))
    assert torch.equal(packed.data, before)
    layer.train()
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_state_dict_deepcopy_and_pickle_round_trips(kind):
    layer = trained(make_base(kind), r=4, lora_bias=True)
    x = torch.randn(3, K)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), y)
    other = trained(make_base("dense"), r=4, lora_bias=True) if kind == "dense" else copy.deepcopy(layer)
    with torch.no_grad():
        other.lora_A.zero_()
    keys = other.load_state_dict(layer.state_dict(), strict=kind == "dense")
    assert not keys.missing_keys
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear4bit_compute_dtype_is_honoured(compute, dtype):
    base = make_base("nf4", compute_dtype=compute)
    layer = trained(base, r=4)
    x = torch.randn(5, K, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    nn.init.zeros_(layer.lora_B)
    torch.testing.assert_close(layer(x), base(x), rtol=2e-2, atol=2e-2)


def test_autocast_keeps_the_output_dtype_of_the_base():
    x = torch.randn(5, K)
    for kind in ("dense", "nf4"):
        layer = LoRALinear.from_linear(make_base(kind), r=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == layer.base_layer(x).dtype


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_compiles_into_one_graph(kind):
    layer = trained(make_base(kind), r=4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_redraws_the_mask(reentrant):
    layer = trained(make_base("nf4"), r=4, lora_dropout=0.5)
    x = torch.randn(6, K, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B)
    results = []
    for forward in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        for leaf in leaves:
            leaf.grad = None
        forward(x).square().sum().backward()
        results.append([leaf.grad.clone() for leaf in leaves])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_moves_and_casts_like_any_module():
    layer = trained(make_base("dense"), r=4)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer.double()(x.double()), written_out(layer, x.double()))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_weight_that_was_replaced_is_seen_at_the_next_forward():
    x = torch.randn(3, K)
    layer = trained(make_base("dense"), r=4)
    layer(x)
    for swap in (
        lambda base: setattr(base, "weight", nn.Parameter(torch.randn(N, K), requires_grad=False)),
        lambda base: setattr(base.weight, "data", torch.randn(N, K)),
        lambda base: setattr(base, "bias", None),
        lambda base: base.bfloat16(),
    ):
        swap(layer.base_layer)
        torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-4, atol=1e-4)

    layer = trained(make_base("nf4"), r=4)
    layer(x)
    for other in (make_base("nf4"), make_base("fp4"), make_base("nf4", compress_statistics=False)):
        layer.base_layer.weight, layer.base_layer.quant_state = other.weight, other.quant_state
        torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-4, atol=1e-4)
    layer.base_layer.weight.quant_state = None  # as FSDP leaves it; the layer's own still holds
    torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("r", {"r": 0}),
        ("r", {"r": 2.0}),
        ("lora_dropout", {"lora_dropout": 1.1}),
        ("bias", {"bias": "some"}),
    ],
)
def test_bad_options_are_named_and_the_base_is_left_as_it_was(named, options):
    base = make_base("dense")
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        LoRALinear.from_linear(base, **options)
    assert base.weight.requires_grad
    with pytest.raises(ValueError, match=r"^bias: expected a base layer with a bias"):
        LoRALinear.from_linear(make_base("dense", bias=False), bias="all")


def test_unfusable_bases_are_refused():
    class Other(nn.Linear):
        pass

    for base in (Other(K, N), nn.Conv1d(K, N, 1), nn.Embedding(K, N)):
        with pytest.raises(UnsupportedLayer, match=f"got {type(base).__name__}"):
            LoRALinear.from_linear(base)
    with pytest.raises(UnsupportedWeight, match="moving the layer quantizes it"):
        LoRALinear.from_linear(bnb.nn.Linear4bit(K, N))


def test_float32_compute_under_half_activations_warns():
    base = make_base("nf4", compute_dtype=torch.float32)
    with pytest.warns(UserWarning, match="bnb_4bit_compute_dtype is float32"):
        warn_slow_compute_dtype(base, torch.bfloat16)
