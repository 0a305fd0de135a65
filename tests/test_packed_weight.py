"""A packed weight read as a dense one: `PackedLinear.weight`, and `to_packed` for layers of bitsandbytes."""

from __future__ import annotations

import copy
import pickle

import bitsandbytes as bnb
import numpy as np
import peft
import pytest
import torch
from cases import make_weight
from peft_models import Net, inputs, lora_config, one_layer, repacking, run, stock_net, to_4bit, to_kind
from test_base_layers import tiny_llama
from tolerances import assert_as_exact
from torch import nn
from torch.nn import functional as F

from peft_fast import LoRALinear, UnsupportedLayer, UnsupportedWeight, accelerate, explain, quantize, restore
from peft_fast.formats import from_linear
from peft_fast.initialization import initialize
from peft_fast.packed_linear import PackedLinear
from peft_fast.packed_weight import PackedWeight
from peft_fast.quantization import to_packed

N, K = 40, 64
FORMATS = ("nf4", "fp4", "mxfp4", "int8", "fp8")


def packed_linear(format: str = "nf4", dtype: torch.dtype = torch.float32) -> PackedLinear:
    return PackedLinear(make_weight(format, N, K), torch.randn(N), dtype)


# ---------------------------------------------------------------------------------------------------- reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_weight_reads_as_the_decoded_tensor(format, dtype):
    layer = packed_linear(format, dtype)
    weight, dense = layer.weight, layer.packed.decode(dtype)
    described = (weight.shape, weight.stride(), weight.dtype, weight.device, weight.requires_grad)
    assert described == (dense.shape, dense.stride(), dtype, dense.device, False)
    for read in (
        lambda w: w.clone(),
        lambda w: w.data.t(),
        lambda w: w.detach()[3:9:2, 1:],
        lambda w: w.view(-1)[7:20].unsqueeze(1),
        lambda w: w.reshape(K, N).T[0],
        lambda w: w.to(torch.float32) + 1,
        lambda w: torch.cat([w, w], dim=1),
        lambda w: w.split(7)[2],
        lambda w: torch.empty_like(dense).copy_(w),
        lambda w: torch.linalg.vector_norm(w, dim=1),
    ):
        got, expected = read(weight), read(dense)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(got.clone(), expected)
        assert type(got.clone()) is torch.Tensor


def test_what_looks_at_its_memory_gets_the_values():
    """There is none behind it: PyTorch's own way to `from_dlpack` ends the process."""
    weight = packed_linear().weight
    for view in (weight, weight.t()[1:7]):
        expected = view.clone()
        for values in (np.asarray(view), view.numpy(), torch.from_dlpack(view), view.tolist()):
            assert torch.equal(torch.as_tensor(values), expected)


def test_a_copy_is_a_weight_of_its_own():
    layer = packed_linear()
    weight, view = layer.weight, layer.weight.t()[1:7]
    copies = copy.deepcopy({"layer": layer, "weight": weight, "again": weight, "view": view})
    assert copies["weight"] is copies["again"]
    assert copies["weight"].packed.weight is copies["layer"].packed.weight
    assert (copies["view"].shape, copies["view"].stride()) == (view.shape, view.stride())
    expected = [weight.clone(), view.clone()]
    layer.packed.weight.zero_()
    for name, values in zip(("weight", "view"), expected, strict=True):
        assert type(copies[name]) is PackedWeight
        assert torch.equal(copies[name].clone(), values)
    assert not torch.equal(weight.clone(), expected[0])


@pytest.mark.parametrize("format", FORMATS)
def test_autograd_saves_it_packed(format):
    """PyTorch's own products with it, as tuners make them: the gradients of a dense weight, none kept."""
    layer = packed_linear(format)
    x, other = torch.randn(5, K, requires_grad=True), torch.randn(K, 8, requires_grad=True)
    results, kept = [], []
    for weight in (layer.weight, layer.packed.decode(torch.float32)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t) or t, lambda t: t):
            y = F.linear(x, weight).square().sum() + torch.mm(weight, other).square().sum()
        results.append(torch.autograd.grad(y, (x, other)))
        kept.append(saved)
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert [type(t) for t in kept[0] if {*t.shape} == {N, K}] == [PackedWeight, PackedWeight]
    assert sum({*t.shape} == {N, K} for t in kept[1]) == 2


def test_compiled():
    layer, x = packed_linear(), torch.randn(3, K)
    compiled = torch.compile(lambda x: F.linear(x, layer.weight) + layer(x), backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight) + layer(x))


# --------------------------------------------------------------------------------------------------- writes

WRITES = {
    "add_": lambda layer: layer.weight.add_(1),
    "+=": lambda layer: layer.weight.data.__iadd__(1),
    "data": lambda layer: setattr(layer.weight, "data", torch.ones(N, K)),
    "copy_": lambda layer: layer.weight.data.copy_(torch.ones(N, K)),
    "out": lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "row": lambda layer: layer.weight[0].zero_(),
    "item": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "flat": lambda layer: layer.weight.data.reshape(-1).scatter_add_(0, torch.tensor([1]), torch.ones(1)),
    "apply_": lambda layer: layer.weight.apply_(abs),
    "share_memory_": lambda layer: layer.weight.share_memory_(),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(),
    "requires_grad": lambda layer: setattr(layer.weight, "requires_grad", True),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(N, K))),
    "tensor": lambda layer: setattr(layer, "weight", torch.ones(N, K)),
    "none": lambda layer: setattr(layer, "weight", None),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_refused_and_changes_nothing(write):
    layer = packed_linear()
    kept = {key: t.clone() for key, t in layer.state_dict().items()}
    with pytest.raises(UnsupportedWeight, match=r"^weight: expected"):
        WRITES[write](layer)
    assert list(layer.state_dict()) == list(kept)
    assert all(torch.equal(t, kept[key]) for key, t in layer.state_dict().items())


# ------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("format", FORMATS)
def test_its_state_is_copied_pickled_and_loaded(format):
    layer = packed_linear(format)
    x, expected = torch.randn(3, K), layer.packed.decode(torch.float32)
    saved = {"weight", "absmax", "bias"}
    if format in ("nf4", "fp4"):
        saved |= {"code", "nested_absmax", "nested_code", "nested_offset"}
    assert set(layer.state_dict()) == saved
    assert not any(isinstance(t, PackedWeight) for t in layer.state_dict().values())
    loaded = PackedLinear(make_weight(format, N, K), torch.zeros(N))
    assigned = copy.deepcopy(loaded)
    assert not torch.equal(loaded(x), layer(x))
    loaded.load_state_dict(layer.state_dict())
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert assigned.packed.weight.data_ptr() == layer.packed.weight.data_ptr()
    for other in (loaded, assigned, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight.clone(), expected)
        assert torch.equal(other(x), layer(x))


def test_casts_and_moves_change_what_others_see():
    layer = packed_linear()
    assert layer.weight.dtype == torch.float32
    assert layer.bfloat16().weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight.clone(), layer.packed.decode(torch.bfloat16))
    meta = copy.deepcopy(layer).to("meta")
    assert (meta.weight.device.type, meta.weight.shape) == ("meta", (N, K))
    with pytest.raises(TypeError, match="dtype"):
        PackedLinear(layer.packed, None, torch.int8)


def test_accelerate_sets_its_backend_and_restore_takes_it_back():
    model = nn.Sequential(packed_linear())
    x = torch.randn(3, K)
    expected = model(x)
    report = accelerate(model, strict=True, backend="reference")
    assert [(row.method, row.backend) for row in report] == [("base", "reference")]
    assert "asked for: reference" in explain(model)
    torch.testing.assert_close(model(x), expected)
    assert restore(model) == 1
    assert restore(model) == 0
    assert model[0].backend == "auto"


# ------------------------------------------------------------------------------------------------ to_packed


@pytest.mark.parametrize("kind", ["nf4", "nf4-flat", "int8"])
def test_to_packed_aliases_what_bitsandbytes_has(kind):
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")
    else:
        layer = to_4bit(nn.Linear(K, N), nested=kind == "nf4")
    model = nn.ModuleDict({"a": layer, "same": layer, "head": nn.Linear(K, N)}).eval()
    for module in model.values():
        repacking(module)
    expected = from_linear(layer)
    assert to_packed(model) == ["a", "same"]
    packed = model["a"]
    assert type(packed) is PackedLinear
    assert model["same"] is packed
    assert packed.bias.data_ptr() == layer.bias.data_ptr()
    assert not packed.training
    for got, tensor in zip(packed.packed, expected, strict=True):
        assert got.data_ptr() == tensor.data_ptr() if isinstance(tensor, torch.Tensor) else got == tensor
    x = inputs()
    truth = F.linear(x.double(), expected.decode(torch.float64), layer.bias.double())
    assert_as_exact("y", packed(x), F.linear(x, expected.decode(torch.float32), layer.bias), truth)


def test_to_packed_unmarks_a_model_of_transformers():
    model = tiny_llama().float()
    dense = type(model)(model.config)
    quantize(dense)
    assert dense.is_quantized
    assert len(to_packed(dense)) == 14
    assert not dense.is_quantized
    assert not dense.is_loaded_in_4bit
    assert not hasattr(dense.config, "quantization_config")
    assert dense.bfloat16()(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


def test_to_packed_refuses_and_changes_nothing():
    hooked = to_kind(Net(), "nf4")
    hooked.down.register_forward_hook(lambda *args: None)
    unquantized = nn.Sequential(to_4bit(nn.Linear(K, K)), bnb.nn.Linear4bit(K, K))
    for model, error, text in (
        (Net(), UnsupportedLayer, "got none in Net"),
        (hooked, UnsupportedLayer, "'down' has hooks"),
        (unquantized, UnsupportedWeight, "quant_state: expected a QuantState"),
        (stock_net("nf4"), UnsupportedLayer, "expected one without adapters"),
        (nn.Sequential(one_layer("nf4")), UnsupportedLayer, "expected one without adapters"),
    ):
        before = list(model.modules())
        with pytest.raises(error, match=text):
            to_packed(model)
        assert list(model.modules()) == before


def test_of_a_fused_layer_too():
    """`accelerate` first, then `to_packed`, then PEFT's LoRA: equal to stock's."""
    model = to_kind(Net(), "nf4")
    stock = copy.deepcopy(model)
    accelerate(model)
    to_packed(model)
    results = []
    for net in (model, stock):
        torch.manual_seed(0)
        results.append(run(peft.get_peft_model(net, lora_config()), inputs_of_seed()))
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-5, atol=1e-5)


def inputs_of_seed() -> torch.Tensor:
    torch.manual_seed(7)
    return inputs()


@pytest.mark.parametrize(
    "base", [packed_linear, lambda: bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")]
)
def test_what_would_rewrite_a_base_is_refused_before(base):
    layer = LoRALinear.from_linear(base(), r=2)
    kept = {key: t.clone() for key, t in layer.state_dict().items() if torch.is_tensor(t)}
    with pytest.raises(
        UnsupportedLayer, match=r"its base is a \w+, whose (nf4|int8) weight is not rewritten"
    ):
        initialize(layer, "pissa")
    assert all(torch.equal(layer.state_dict()[key], t) for key, t in kept.items())
