"""int8, fp8 and mxfp4: constructors against the libraries that define them, `pack`, layers over them."""

import copy
import math

import bitsandbytes as bnb
import pytest
import torch
from cases import Case, device_of, make_weight
from method_cases import DTYPES
from tolerances import assert_as_exact
from torch import nn
from transformers import Conv1D
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from peft_fast import (
    AdapterLinear,
    DoRALinear,
    LoRALinear,
    UnsupportedLayer,
    UnsupportedWeight,
    dequantize,
    formats,
    quantize,
)
from peft_fast.functional import lora_linear
from peft_fast.packed_linear import PackedLinear
from peft_fast.packing import PACKINGS, from_fp8, from_int8, from_mxfp4, pack

N, K = 40, 96


def bits(t):
    """With one NaN."""
    t = torch.where(t.isnan(), math.nan, t).contiguous()
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def linear8bit(has_bias=True, threshold=0.0, **options):
    layer = bnb.nn.Linear8bitLt(K, N, bias=has_bias, has_fp16_weights=False, threshold=threshold, **options)
    return layer.to("cpu")


# -------------------------------------------------------------------------------------------------- decodes


def all_codes(format):
    """A weight that holds every code under scales small and large: 256 bytes a row."""
    scale = torch.tensor([1.0, 0.1, 3.7e-30, 2.0**-126, 1e30, 0.0, -2.5])
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scale), 1)
    if format == "int8":
        return from_int8(codes.view(torch.int8), scale.abs())
    if format == "fp8":
        return from_fp8(codes.view(torch.float8_e4m3fn), scale)
    exponents = torch.tensor([0, 1, 100, 127, 128, 200, 254, 255], dtype=torch.uint8)
    return from_mxfp4(codes.repeat(16, 1)[:8], exponents[:, None].repeat(1, 16))


@pytest.mark.filterwarnings("ignore:overflow")  # 6 * 2^127
@pytest.mark.parametrize("format", PACKINGS)
def test_every_code_on_every_backend(backend, format):
    weight = all_codes(format)
    device = device_of(backend)
    on_device = formats.QuantizedWeight(*(t.to(device) if torch.is_tensor(t) else t for t in weight))
    for dtype in DTYPES:
        got = dequantize(on_device, dtype, backend=backend).cpu()
        assert torch.equal(bits(got), bits(weight.decode(dtype)))


def test_e4m3_is_that_of_pytorch():
    weight = all_codes("fp8")
    row = weight.decode(torch.float32)[0]
    assert row.isnan().nonzero().flatten().tolist() == [127, 255]
    assert row[[1, 7, 8, 126, 129, 254]].tolist() == [2**-9, 7 * 2**-9, 2**-6, 448.0, -(2**-9), -448.0]


def test_mxfp4_is_that_of_gpt_oss():
    blocks = torch.randint(256, (1, 6, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (1, 6, 4), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)[0]
    for given in (blocks[0], blocks[0].flatten(1)):
        ours = from_mxfp4(given, scales[0]).decode(torch.bfloat16)
        assert torch.equal(ours, theirs if theirs.shape == ours.shape else theirs.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_what_bitsandbytes_multiplies_with(dtype):
    """Its forward in training on the CPU, and its backward anywhere, of an identity matrix."""
    layer = linear8bit(has_bias=False)
    weight = formats.from_linear(layer)
    eye = torch.eye(K, dtype=dtype, requires_grad=True)
    y = layer(eye)
    assert torch.equal(y.t(), weight.decode(dtype))
    assert torch.equal(torch.autograd.grad(y, eye, torch.eye(K, N, dtype=dtype))[0][:N], weight.decode(dtype))


# ----------------------------------------------------------------------------------------------------- pack


@pytest.mark.parametrize("format", PACKINGS)
def test_pack_takes_the_nearest_value(format):
    dense = torch.randn(N, K)
    dense[3] = 0.0
    weight = pack(dense, format).check()
    got = weight.decode(torch.float32)
    assert torch.equal(got[3], torch.zeros(K))
    if format == "mxfp4":
        exponents = weight.absmax.view(N, -1).float() - 127
        grid = formats.code_table("mxfp4") * torch.exp2(exponents).repeat_interleave(32, 1)[..., None]
    elif format == "int8":
        grid = torch.arange(-127, 128) / 127 * weight.absmax[:, None, None]
    else:
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        grid = codes[codes.isfinite()] * weight.absmax[:, None, None]
    nearest = (dense[..., None] - grid).abs().amin(-1)
    torch.testing.assert_close((dense - got).abs(), nearest, rtol=0, atol=1e-6)
    if format == "mxfp4":  # the scale of a block follows from its values alone
        assert torch.equal(pack(got, format).decode(torch.float32), got)


def test_int8_has_the_bytes_of_bitsandbytes():
    dense = torch.randn(N, K).half().float()
    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    layer.weight.data = dense
    weight, theirs = pack(dense, "int8"), formats.from_linear(layer.to("cpu"))
    assert torch.equal(weight.absmax, theirs.absmax)
    assert (weight.weight.int() - theirs.weight.int()).abs().max() <= 1  # theirs rounds another product
    assert (weight.weight != theirs.weight).float().mean() < 0.01


REFUSED = {
    "format": (ValueError, lambda: pack(torch.randn(4, 32), "nf4")),
    "weight: expected finite": (UnsupportedWeight, lambda: pack(torch.full((4, 32), math.inf), "fp8")),
    "weight: expected floating": (UnsupportedWeight, lambda: pack(torch.randn(4), "int8")),
    "weight: expected K": (UnsupportedWeight, lambda: pack(torch.randn(4, 40), "mxfp4")),
    "weight: expected torch.float8": (UnsupportedWeight, lambda: from_fp8(torch.randn(4, 8), torch.ones(4))),
    "scale": (UnsupportedWeight, lambda: from_fp8(torch.ones(4, 8).to(torch.float8_e4m3fn), torch.ones(3))),
    "CB": (UnsupportedWeight, lambda: from_int8(torch.ones(8, dtype=torch.int8), torch.ones(8))),
    "CB: expected a tensor": (TypeError, lambda: from_int8(None, torch.ones(8))),
    "SCB: expected a tensor": (TypeError, lambda: from_int8(torch.ones(4, 8, dtype=torch.int8), None)),
    "weight: expected a tensor": (TypeError, lambda: from_fp8(None, torch.ones(8))),
    "blocks: expected a tensor": (TypeError, lambda: from_mxfp4(None, None)),
    "weight: expected floating .N, K.*4, 0": (UnsupportedWeight, lambda: pack(torch.randn(4, 0), "int8")),
    "packed: expected a QuantizedWeight": (UnsupportedWeight, lambda: PackedLinear(torch.randn(3, 3))),
    "weight dtype": (UnsupportedWeight, lambda: from_int8(torch.ones(4, 8), torch.ones(4))),
    "absmax numel": (UnsupportedWeight, lambda: from_int8(torch.ones(4, 8, dtype=torch.int8), torch.ones(8))),
    "absmax dtype": (UnsupportedWeight, lambda: _changed("int8", absmax=torch.ones(4).half())),
    "blocksize": (UnsupportedWeight, lambda: _changed("fp8", blocksize=4)),
    "code: expected None": (UnsupportedWeight, lambda: _changed("fp8", code=torch.ones(256))),
    "nested_absmax": (UnsupportedWeight, lambda: _changed("mxfp4", absmax=torch.ones(4), nested_absmax=None)),
    "blocks": (UnsupportedWeight, lambda: from_mxfp4(torch.ones(4, 15, dtype=torch.uint8), torch.ones(4, 1))),
    "scales": (UnsupportedWeight, lambda: from_mxfp4(torch.ones(4, 16, dtype=torch.uint8), torch.ones(4, 1))),
}  # fmt: skip


def _changed(format, **fields):
    return make_weight(format, 4, 8)._replace(**fields).check()


@pytest.mark.parametrize("named", REFUSED)
def test_what_does_not_fit_is_refused_by_name(named):
    error, call = REFUSED[named]
    with pytest.raises(error, match=f"^{named}"):
        call()


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(0.5), torch.tensor([0.5]), torch.rand(N, 1).bfloat16()],
    ids=["number", "tensor", "rows"],
)
def test_fp8_scales_of_rows_and_of_the_tensor(scale):
    data = torch.randn(N, K).to(torch.float8_e4m3fn)
    weight = from_fp8(data, scale)
    assert torch.equal(weight.decode(torch.float32), data.float() * scale.float())
    assert weight.weight.data_ptr() == data.data_ptr()


# --------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_linear8bit_before_and_after_its_first_forward(threshold):
    layer = linear8bit(threshold=threshold)
    before = formats.from_linear(layer).check()
    assert before.weight.data_ptr() == layer.weight.data_ptr()
    x = torch.randn(3, K)
    for training in (True, False):
        layer.train(training)(x)
        after = formats.from_linear(layer).check()
        assert layer.weight.SCB is None
        assert after.absmax.data_ptr() == before.absmax.data_ptr()
        assert torch.equal(after.decode(torch.float32), before.decode(torch.float32))


def test_linear8bit_that_is_not_quantized_is_refused():
    for kept in (True, False):
        layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=kept)
        with pytest.raises(UnsupportedWeight, match=r"weight: expected int8, got torch\.float32"):
            LoRALinear.from_linear(layer)
        assert layer.weight.requires_grad == kept


def bases():
    yield linear8bit()
    for format in PACKINGS:
        yield PackedLinear.from_linear(nn.Linear(K, N), format)


WRAPPERS = {
    "lora": lambda base: LoRALinear.from_linear(base, r=4),
    "dora": lambda base: DoRALinear.from_linear(base, r=4),
    "vera": lambda base: AdapterLinear.from_linear(base, "vera", r=4),
    "bitfit": lambda base: AdapterLinear.from_linear(base, "bitfit"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("base", [0, 1, 2, 3], ids=["linear8bit", *PACKINGS])
def test_layers_take_it_as_a_base(wrapper, base):
    """As over a dense layer of the same values: output, dX and the gradients of what is trained."""
    base = list(bases())[base]
    dense = nn.Linear(K, N)
    dense.weight.data = formats.from_linear(base).decode(torch.float32)
    dense.bias.data = base.bias.data.clone()
    torch.manual_seed(0)
    ours = WRAPPERS[wrapper](base)
    torch.manual_seed(0)
    theirs = WRAPPERS[wrapper](dense)
    x, grad = torch.randn(7, K), torch.randn(7, N)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        y = layer(leaf)
        gradients = torch.autograd.grad(y, [leaf, *trained.values()], grad)
        results.append({"y": y.detach(), "dx": gradients[0]} | dict(zip(trained, gradients[1:], strict=True)))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", PACKINGS)
def test_packed_linear_keeps_its_values(format):
    layer = PackedLinear.from_linear(nn.Linear(K, N), format)
    expected, x = layer.packed.decode(torch.float32), torch.randn(5, K)
    y = layer(x)
    truth = nn.functional.linear(x.double(), expected.double(), layer.bias.double())
    assert_as_exact("y", y, nn.functional.linear(x, expected, layer.bias), truth)
    for move in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to("meta").to_empty(device="cpu")):
        assert move(copy.deepcopy(layer)).packed.check().absmax.dtype == layer.absmax.dtype
    assert torch.equal(copy.deepcopy(layer).bfloat16().packed.decode(torch.float32), expected)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert set(layer.state_dict()) == {"weight", "absmax", "bias"}
    other = PackedLinear.from_linear(nn.Linear(K, N), format)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.packed.decode(torch.float32), expected)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("format", PACKINGS)
def test_quantize_packs_the_layers_of_a_model(format):
    model = nn.Sequential(nn.Linear(K, K), nn.GELU(), nn.ModuleDict({"lm_head": nn.Linear(K, N)}))
    dense = model[0].weight.detach()
    assert quantize(model, format) == ["0"]
    assert type(model[0]) is PackedLinear
    assert torch.equal(model[0].packed.decode(torch.float32), pack(dense, format).decode(torch.float32))
    adapted = LoRALinear.from_linear(model[0], r=2)
    assert adapted(torch.randn(3, K)).shape == (3, K)


def test_a_model_that_cannot_be_packed_is_left():
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, 40), nn.Linear(40, 32))
    with pytest.raises(UnsupportedWeight, match="weight: expected K to be a multiple of 32, got 40"):
        quantize(model, "mxfp4")
    assert [type(layer) for layer in model] == [nn.Linear] * 3
    with pytest.raises(ValueError, match=r"quant: expected one of .*'mxfp4'"):
        quantize(model, "int4")


def test_packed_linear_takes_what_it_can():
    with pytest.raises(UnsupportedWeight, match="packed: expected a packed weight"):
        PackedLinear(make_weight("dense", N, K))
    with pytest.raises(ValueError, match="bias: expected"):
        PackedLinear(make_weight("fp8", N, K), torch.zeros(K))
    with pytest.raises(UnsupportedWeight, match="layer: expected a dense weight, got int8"):
        PackedLinear.from_linear(linear8bit(), "fp8")
    with pytest.raises(UnsupportedLayer, match="base: expected"):
        PackedLinear.from_linear(nn.Conv1d(1, 1, 1), "fp8")


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 37, 5), (2, 33, 1), (5, 1, 3), (19, 70, 45), (3, 300, 70)])
def test_rows_of_any_length(backend, format, M, K, N):
    """Rows that are no whole vectors, and start anywhere."""
    case = Case.make(format, (M,), K, N, 3, out_scale=True)
    got, plain, truth = case.run(backend), case.plain(), case.plain(torch.float64)
    for name in truth:
        assert_as_exact(name, got[name], plain[name], truth[name])


def test_autograd_keeps_no_decoded_weight():
    weight = make_weight("int8", 512, 512)
    x, A, B = torch.randn(4, 512, requires_grad=True), torch.randn(2, 512), torch.zeros(512, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, weight, A, B)
    assert sum(t.nbytes for t in {t.data_ptr(): t for t in kept}.values()) < 1.1 * weight.weight.nbytes


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_dense_state_dict_is_not_converted_to_packed_bytes(format, strict):
    """It has the shape of the bytes, which PyTorch would fill with its numbers."""
    dense = torch.nn.Linear(K, N)
    layer = PackedLinear.from_linear(dense, format)
    before = layer.packed.weight.clone()
    with pytest.raises(
        RuntimeError, match=r"weight: expected torch\.\w+ of a packed weight, got torch.float32"
    ):
        layer.load_state_dict(dense.state_dict(), strict=strict)
    assert torch.equal(layer.packed.weight, before)


def test_an_fp8_state_dict_may_hold_fp8_numbers():
    layer = PackedLinear.from_linear(torch.nn.Linear(K, N), "fp8")
    other = PackedLinear.from_linear(torch.nn.Linear(K, N), "fp8")
    state = other.state_dict()
    state["weight"] = state["weight"].view(torch.float8_e4m3fn)
    layer.load_state_dict(state)
    assert torch.equal(layer.packed.decode(torch.float32), other.packed.decode(torch.float32))


@pytest.mark.parametrize("format", PACKINGS)
def test_a_transposed_weight_is_packed_as_its_copy(format):
    """The weight of a `Conv1D` is one."""
    stored = torch.randn(K, N)
    packed, expected = pack(stored.t(), format), pack(stored.t().contiguous(), format)
    for name in ("weight", "absmax"):
        assert torch.equal(getattr(packed, name).view(torch.uint8), getattr(expected, name).view(torch.uint8))
    layer = Conv1D(N, K)
    x = torch.randn(3, K)
    torch.testing.assert_close(PackedLinear.from_linear(layer, format)(x), layer(x), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_layer_that_no_module_holds_is_refused(quant):
    layer = nn.Linear(64, 64)
    with pytest.raises(
        UnsupportedLayer, match="expected a module with layers in it, got a layer, Linear, itself"
    ):
        quantize(layer, quant)
    assert dict(layer.named_children()) == {}
