"""Weight formats: decoded bits equal bitsandbytes', bytes are aliased, lies about the layout are refused."""

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from cases import Case, device_of, make_weight

from peft_fast import UnsupportedWeight, formats, functional, ops, reference

# The definition that bitsandbytes gives for any shape; its compiled CPU kernel reads the wrong scale where a
# row is not a whole number of blocks. Called without its torch.compile wrapper, so that it runs op by op.
bitsandbytes_decode = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


def quantized(N, K, **options):
    return bnb_functional.quantize_4bit(torch.randn(N, K), **options)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_table_has_the_bits_of_bitsandbytes(format):
    theirs = bnb_functional.get_4bit_type(format, device="cpu")
    assert torch.equal(bits(formats.code_table(format)), bits(theirs))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", formats.BLOCK_SIZES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (33, 65), (1, 37), (5, 8192)])
def test_decode_is_bit_identical(format, blocksize, nested, shape):
    packed, state = quantized(*shape, blocksize=blocksize, compress_statistics=nested, quant_type=format)
    weight = formats.from_bitsandbytes(packed, state).check()
    absmax = state.absmax
    if nested:
        absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    for dtype in DTYPES:
        expected = bitsandbytes_decode(packed.view(-1), absmax, state.code, blocksize, shape, dtype)
        assert torch.equal(bits(weight.decode(dtype)), bits(expected))
        if shape[1] % blocksize == 0 and blocksize < 2048:
            state.dtype = dtype
            assert torch.equal(
                bits(weight.decode(dtype)), bits(bnb_functional.dequantize_4bit(packed, state))
            )


def test_every_value_decodes_through_every_backend(backend):
    """The output of an identity activation is the weight itself: all bytes, tiny and huge scales."""
    K = 64
    for format in ("nf4", "fp4"):
        packed = torch.arange(256, dtype=torch.uint8).repeat(K * K // 512)
        absmax = torch.tensor([1e-30, 3.7, 1.0, 2.0**-126, 65504.0, 0.0, 0.1, 1e30]).repeat(K * K // 512)
        weight = formats.QuantizedWeight(
            packed, absmax, formats.code_table(format), None, None, None, format, K, K, 64, 0
        ).check()
        # A GPU multiplies float32 as pairs of TF32 numbers, which hold 22 of its 24 bits.
        dtype = torch.float32 if device_of(backend) == "cpu" else torch.bfloat16
        eye = torch.eye(K, dtype=dtype)
        case = Case(eye, weight, torch.zeros(0, K), torch.zeros(K, 0), None, eye)
        expected = bits(weight.decode(dtype) + 0.0)
        got = case.run(backend)
        assert torch.equal(bits(got["y"].t()), expected)
        assert torch.equal(bits(got["dx"]), expected)


LAYOUTS = [(96, 128, 64), (33, 65, 32), (1, 37, 64), (5, 4096, 128), (40, 97, 4096), (600, 64, 64)]


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize(("n", "k", "blocksize"), LAYOUTS)
@pytest.mark.parametrize("nested", [False, True])
def test_rows_have_the_bits_of_the_whole(format, n, k, blocksize, nested):
    weight = make_weight(format, n, k, blocksize=blocksize, nested=nested)
    whole = weight.decode(torch.float32)
    for rows in (torch.randint(n, (7,)), torch.arange(n), torch.arange(0)):
        assert torch.equal(bits(formats.decode_rows(weight, rows)), bits(whole[rows]))


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize(("n", "k", "blocksize"), LAYOUTS)
@pytest.mark.parametrize("nested", [False, True])
def test_slices_are_weights_that_alias_the_whole(format, n, k, blocksize, nested):
    weight = make_weight(format, n, k, blocksize=blocksize, nested=nested)
    whole, step = weight.decode(torch.float32), formats.rows_per_slice(weight)
    for start in range(0, n, step):
        for stop in {min(start + step, n), n}:
            part = formats.slice_rows(weight, start, stop).check()
            assert torch.equal(bits(part.decode(torch.float32)), bits(whole[start:stop]))
            assert part.weight.untyped_storage().data_ptr() == weight.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("format", [name for name in formats.FORMATS if name != "dense"])
def test_the_parts_of_a_weight_may_have_any_shape(format):
    """What is checked of them is their number of elements: every definition takes them as flat."""
    weight, rows = make_weight(format, 6, 64), torch.tensor([5, 0])
    expected = weight.decode(torch.float32)
    parts = ("absmax",) if weight.code is None else ("weight", *weight._fields[1:6])
    for part in parts:
        for shape in ((1, -1), (-1, 1), (6, -1)):
            flat = getattr(weight, part).view(-1)
            if shape[0] == 6 and flat.numel() % 6:
                continue
            other = weight._replace(**{part: flat.view(shape)}).check()
            assert torch.equal(other.decode(torch.float32), expected), (part, shape)
            assert torch.equal(formats.decode_rows(other, rows), expected[rows]), (part, shape)
            assert torch.equal(functional.dequantize(other, torch.float32), expected), (part, shape)
            whole = formats.slice_rows(other, 0, 6)
            assert torch.equal(whole.decode(torch.float32), expected), (part, shape)


def test_rows_of_dense_weights_keep_float64():
    W = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(formats.decode_rows(formats.from_dense(W), torch.tensor([4, 0])), W[[4, 0]])
    rows = formats.decode_rows(formats.from_dense(W.half()), torch.tensor([2]))
    assert torch.equal(rows, W[[2]].half().float())


@pytest.mark.parametrize("storage", STORAGES)
def test_any_storage_dtype_aliases_the_owners_bytes(storage):
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=storage).to("cpu")
    weight = formats.from_linear(layer).check()
    assert weight.weight.data_ptr() == layer.weight.data_ptr()
    assert weight.absmax.data_ptr() == layer.weight.quant_state.absmax.data_ptr()
    reference_layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    assert weight.weight.shape == formats.from_linear(reference_layer).weight.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_weight_is_aliased(dtype):
    layer = torch.nn.Linear(8, 4, dtype=dtype)
    weight = formats.from_linear(layer).check()
    assert weight.weight.data_ptr() == layer.weight.data_ptr()
    assert torch.equal(weight.decode(torch.float64), layer.weight.double())


def test_the_quant_state_is_found_where_fsdp_leaves_it():
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    expected = formats.from_linear(layer).decode(torch.float32)
    layer.weight.quant_state = None
    assert torch.equal(formats.from_linear(layer).decode(torch.float32), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_repacked_for_cpu_inference_is_refused_unchanged(nested):
    packed, state = quantized(64, 128, quant_type="nf4", compress_statistics=nested)
    repacked, state = bnb_functional._convert_weight_packed_for_cpu(packed, state)
    before = repacked.clone()
    with pytest.raises(UnsupportedWeight, match="rounded absmax to bfloat16"):
        formats.from_bitsandbytes(repacked, state)
    assert torch.equal(repacked, before)
    assert state.packing_format_for_cpu


def test_an_unquantized_layer_is_refused():
    with pytest.raises(UnsupportedWeight, match="quant_state: expected a QuantState, got None"):
        formats.from_linear(bnb.nn.Linear4bit(64, 32))


LIES = {
    "format": {"format": "nf5"},
    "blocksize": {"blocksize": 2**62},
    "blocksize: zero": {"blocksize": 0},
    "shape": {"out_features": -32},
    "weight numel": {"out_features": 33},
    "weight dtype": {"weight": torch.zeros(1024, dtype=torch.float16)},
    "code: expected a tensor": {"code": None},
    "code numel": {"code": torch.zeros(15)},
    "code dtype": {"code": torch.zeros(16, dtype=torch.float64)},
    "absmax numel": {"absmax": torch.zeros(31, dtype=torch.uint8)},
    "absmax dtype": {"absmax": torch.zeros(32, dtype=torch.float32)},
    "absmax: expected a contiguous": {"absmax": torch.zeros(64, dtype=torch.uint8)[::2]},
    "nested_offset: expected a tensor": {"nested_offset": None},
    "nested_code numel": {"nested_code": torch.zeros(255)},
    "nested_absmax numel": {"nested_absmax": torch.zeros(2)},
    "nested_absmax dtype": {"nested_absmax": torch.zeros(1, dtype=torch.float16)},
    "nested_offset numel": {"nested_offset": torch.zeros(2)},
    "nested_offset dtype": {"nested_offset": torch.zeros(1, dtype=torch.float64)},
    "nested_blocksize": {"nested_blocksize": 7},
    "out_features: expected an integer": {"out_features": 32.0},
    "in_features: expected an integer": {"in_features": "64"},
    "nested_blocksize: expected an integer": {"nested_blocksize": None},
    "code device": {"code": torch.zeros(16, device="meta")},
}


@pytest.mark.parametrize("named", LIES)
def test_a_lying_layout_is_refused_by_name(named):
    weight = make_weight("nf4", 32, 64)
    with pytest.raises(UnsupportedWeight, match=f"^{named.split(': zero')[0]}"):
        weight._replace(**LIES[named]).check()


@pytest.mark.parametrize(
    ("named", "absmax"),
    [("absmax numel", torch.zeros(31)), ("absmax dtype", torch.zeros(32).byte()), ("absmax", None)],
)
def test_scales_that_are_not_nested_are_checked(named, absmax):
    weight = make_weight("nf4", 32, 64, nested=False)
    with pytest.raises(UnsupportedWeight, match=f"^{named}"):
        weight._replace(absmax=absmax).check()


def test_dense_weights_are_checked():
    with pytest.raises(UnsupportedWeight, match=r"weight: expected \[N, K\]"):
        formats.from_dense(torch.randn(3))
    with pytest.raises(UnsupportedWeight, match="weight: expected a floating dtype"):
        formats.from_dense(torch.ones(3, 4, dtype=torch.int8))


def test_the_schema_carries_the_fields_in_order():
    names = [argument.split()[-1] for argument in ops.WEIGHT_SCHEMA.split(", ")]
    assert tuple(names) == formats.QuantizedWeight._fields


def test_mask_bits_are_lsb_first():
    mask = torch.tensor([[0b00000101, 0b1]], dtype=torch.uint8)
    assert reference.unpack_mask(mask, 9)[0].tolist() == [True, False, True, *[False] * 5, True]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_packed_bytes_that_were_cast_as_numbers_are_refused(storage):
    """As FSDP's mixed precision does to a weight whose bytes lie in a floating dtype."""
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=storage).to("cpu")
    assert formats.from_linear(layer).check().format == "nf4"
    layer.weight.data = layer.weight.data.to(torch.float16)
    with pytest.raises(UnsupportedWeight, match=rf"bytes in {storage}, .*, got them cast to torch.float16"):
        formats.from_linear(layer)
