"""`dequantize`: the definition's bits on every backend, in a new matrix or in one that is given."""

import pytest
import torch
from cases import EVERY_FORMAT, backends_of, device_of, make_weight, on

from peft_fast import BackendUnavailable, dequantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = backends_of("dequantize", "nf4")


def bits(t):
    return t.cpu().contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_of_the_definition(backend, format, dtype):
    device = device_of(backend)
    for shape, options in (((40, 70), {}), ((33, 128), {"blocksize": 128, "nested": False})):
        weight = make_weight(format, *shape, **options)
        shape = (weight.out_features, weight.in_features)
        expected = bits(weight.decode(dtype))
        out = torch.full(shape, torch.nan, dtype=dtype, device=device)
        assert dequantize(on(device, weight), dtype, out=out, backend=backend) is out
        assert torch.equal(bits(out), expected)
        assert torch.equal(bits(dequantize(on(device, weight), dtype, backend=backend)), expected)


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.empty(40, 71), ValueError),
        (torch.empty(64, 40).t(), ValueError),
        (torch.empty(40, 64, device="meta"), ValueError),
        (torch.empty(40, 64, dtype=torch.float16), TypeError),
    ],
)
def test_another_buffer_is_refused(out, error):
    before = out.clone()
    with pytest.raises(error, match="out: expected"):
        dequantize(make_weight("nf4", 40, 64), torch.float32, out=out)
    assert out.is_meta or torch.equal(out.nan_to_num(), before.nan_to_num())


def test_an_explicit_backend_runs_or_raises():
    with pytest.raises(BackendUnavailable, match="meta"):
        dequantize(on("meta", make_weight("nf4", 40, 64)), torch.float32, backend="cpu")
