"""The Triton kernels themselves: bit-exact decode, tile borders, launches, 64-bit offsets, compiled code.

The numbers of every format, dtype and odd shape are tested for all backends in test_ops.py; here are the
cases that only these kernels can get wrong. Without a GPU they run in Triton's interpreter.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import make_weight
from triton_cases import DEVICE, DTYPES, bits, check, on_device, operands, run, sparse_bytes

# isort: split
import triton
import triton.language as tl
from peft_fast.triton_kernels import configs, decode, tiles

from peft_fast import formats, reference, triton_kernels
from peft_fast.reference import Needs

pytestmark = pytest.mark.usefixtures("poisoned")

# ---------------------------------------------------------------------------------------------------- decode


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", formats.BLOCK_SIZES)
def test_decode_is_bit_equal(blocksize, nested):
    shapes = [(3, blocksize), (2, 37), (5, 2 * blocksize // 64 + 1)]  # whole blocks in a row, and straddling
    for format, (N, K) in itertools.product(("nf4", "fp4"), shapes):
        weight = make_weight(format, N, K, blocksize=blocksize, nested=nested)
        for dtype in DTYPES if blocksize == 64 else (torch.float32,):
            got = triton_kernels.dequantize(on_device(weight), dtype)
            assert torch.equal(bits(got), bits(weight.decode(dtype))), (format, N, K, dtype)


def test_decode_of_dense_weights_follows_their_strides():
    stored = torch.randn(70, 90)
    for dense in (stored, stored.t(), stored[::2, 1::3], stored.half(), stored.bfloat16()):
        weight = formats.from_dense(dense)
        got = triton_kernels.dequantize(on_device(weight), torch.float32)
        assert torch.equal(got.cpu(), dense.float())


# On a GPU, float32 operands are split into two TF32 numbers, which hold 22 of their 24 bits.
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cpu" else DTYPES[1:])
@pytest.mark.parametrize(("N", "K"), [(40, 128), (33, 65)])
def test_decode_through_an_identity(N, K, dtype):
    """With X = I the output is Ŵᵀ, with dY = I the gradient of X is Ŵ, bit for bit: both only add zeros."""
    weight = make_weight("nf4", N, K)
    no_rank = [on_device(torch.empty(0, K)), on_device(torch.empty(N, 0))]
    eye_n, eye_k = (on_device(torch.eye(size, dtype=dtype)) for size in (N, K))
    y, z = triton_kernels.lora_linear(eye_k, on_device(weight), None, *no_rank, None, None, 1.0, 0.0)
    assert torch.equal(y.cpu(), weight.decode(dtype).t())
    x = on_device(torch.zeros(N, K, dtype=dtype))
    needs = Needs(True, False, False, False, False)
    no_rank += [z.new_empty(N, 0)]
    grads = triton_kernels.lora_linear_backward(
        eye_n, x, on_device(weight), *no_rank, None, None, None, None, 1.0, 0.0, needs
    )
    assert torch.equal(grads.x.cpu(), weight.decode(dtype))


# --------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("M", "N", "K", "R"),
    [
        (70, 40, 128, 5),  # several row blocks
        (2, 70, 320, 3),  # K split into partial sums
        (9, 160, 70, 20),  # chunks of several column blocks, blocks that straddle rows
        (7, 33, 64, 70),  # two rank blocks
    ],
)
def test_tile_borders(M, N, K, R, p):
    weight = make_weight("nf4", N, K)
    check(*operands(M, N, K, R, torch.float32, [torch.float32] * 3, weight, p))


@pytest.mark.parametrize(
    ("dtype", "adapter_dtypes"),
    [
        (torch.float16, (torch.float16, torch.bfloat16, torch.float32)),
        (torch.bfloat16, (torch.bfloat16, torch.bfloat16, torch.bfloat16)),
        (torch.float32, (torch.bfloat16, torch.float16, torch.float16)),
    ],
)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out_scale", [False, True])
def test_mixed_dtypes(dtype, adapter_dtypes, stored, out_scale):
    """Every operand has its own dtype, the dense weight too, and it is a transposed view."""
    weight = formats.from_dense((torch.randn(48, 36) / 7).to(stored).t())
    check(*operands(10, 36, 48, 6, dtype, adapter_dtypes, weight, 0.2, out_scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["dense", "nf4", "fp4"])
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "p", "bias"),
    [
        (70, 40, 128, 5, 0.0, True),  # several row blocks
        (9, 161, 70, 20, 0.4, False),  # chunks of several column blocks, blocks that straddle rows
        (7, 33, 64, 71, 0.4, True),  # three rank blocks, of which one sums d_out_scale
        (5, 41, 65, 0, 0.0, False),
        (0, 33, 64, 3, 0.3, True),
    ],
)
def test_out_scale(M, N, K, R, p, bias, format, dtype):
    weight = make_weight(format, N, K, dtype=dtype)
    arguments, grad = operands(M, N, K, R, dtype, [torch.float32] * 3, weight, p, out_scale=True)
    if not bias:
        arguments[2] = None
        arguments[6][::7] = 2.0 ** (-20 if dtype == torch.float16 else -100)  # what stands for zero
    check(arguments, grad)


def test_out_scale_of_ones_is_plain_lora():
    weight = make_weight("nf4", 70, 128)
    arguments, grad = operands(9, 70, 128, 5, torch.float32, [torch.float32] * 3, weight, 0.3, out_scale=True)
    arguments[6].fill_(1.0)
    arguments, grad = [on_device(a) for a in arguments], on_device(grad)
    ones = run(triton_kernels, arguments, grad)
    assert ones.pop("out_scale").isfinite().all()
    arguments[6] = None
    for name, plain in run(triton_kernels, arguments, grad).items():
        assert plain is None or torch.equal(bits(ones[name]), bits(plain)), name


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, on the base term
def test_large_dropped_values_do_not_leak():
    """A dropped infinity is not multiplied by zero."""
    arguments, grad = operands(
        6, 20, 64, 4, torch.float32, [torch.float32] * 3, make_weight("nf4", 20, 64), 0.5
    )
    keep = reference.unpack_mask(arguments[5], 64)
    arguments[0][:] = torch.where(keep, arguments[0], torch.inf)
    got = run(triton_kernels, [on_device(a) for a in arguments], on_device(grad))
    assert got["z"].isfinite().all()
    assert got["lora_A"].isfinite().all()


@triton.jit
def _cast_to_bfloat16(p_in, p_out, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b = tiles.cast(tl.load(p_in + o, mask=o < n, other=0.0), tl.bfloat16)
    tl.store(p_out + o, b.to(tl.float32), mask=o < n)


def test_cast_rounds_to_nearest_even():
    special = [
        0.0,
        -0.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
        -1 - 2**-8,
        3.4e38,
        2.0**-130,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    x = on_device(torch.cat((torch.tensor(special), torch.randn(200))))
    out = torch.empty_like(x)
    _cast_to_bfloat16[(1,)](x, out, len(x), BLOCK=256)
    assert torch.equal(out.nan_to_num(5.0), x.bfloat16().float().nan_to_num(5.0))
    assert torch.equal(out.signbit()[:-1], x.signbit()[:-1])


# ----------------------------------------------------------------------------------------------- 64-bit sizes


@triton.jit
def _copy_tile(p_in, p_out, i_row, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The last rows of a matrix, read, written back plus one, and copied out."""
    b = tiles.load_tile(p_in, i_row, 0, n_rows, n_cols, ROWS, COLS)
    tiles.store_tile(p_out, b, 0, 0, ROWS, COLS)
    tiles.store_tile(p_in, b + 1, i_row, 0, n_rows, n_cols)


@triton.jit
def _decode_row(
    weight, absmax, code, p_out, i_n, N, K, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    b = decode.decode_tile(
        weight, absmax, code, None, None, None, i_n, 0, N, K, 0, 0, 4096, 0, ALIGNED, ROWS, COLS
    )  # fmt: skip
    tiles.store_tile(p_out, b, 0, 0, ROWS, COLS)


def test_tiles_past_2_to_the_31():
    n_cols, row = 2**20, 2**11  # element (row, 0) has index 2³¹
    matrix = sparse_bytes((row + 1) * n_cols).view(row + 1, n_cols)
    matrix[row - 1, :3], matrix[row, :3] = 5, 9
    out = torch.zeros(4, 16, dtype=torch.uint8, device=DEVICE)
    _copy_tile[(1,)](matrix, out, row - 1, row + 1, n_cols, ROWS=4, COLS=16)
    assert out[:, :4].tolist() == [[5, 5, 5, 0], [9, 9, 9, 0], [0] * 4, [0] * 4]
    assert matrix[row - 1, :4].tolist() == [6, 6, 6, 1]
    assert matrix[row, :4].tolist() == [10, 10, 10, 1]


@pytest.mark.parametrize("aligned", [True, False])
def test_decode_past_2_to_the_32_elements(aligned):
    K = 2**20 if aligned else 2**20 - 2
    N = 2**12 + 2
    flat = (N - 1) * K  # the last row begins past byte 2³¹
    packed, absmax = sparse_bytes((N * K + 1) // 2), torch.zeros(-(-N * K // 4096), device=DEVICE)
    packed[flat // 2 : flat // 2 + 2] = torch.tensor([0x1F, 0xE2], dtype=torch.uint8, device=DEVICE)
    absmax[flat // 4096 : flat // 4096 + 2] = 2.0  # without alignment, a block ends inside these elements
    code = formats.code_table("nf4", DEVICE)
    out = torch.zeros(2, 32, device=DEVICE)
    _decode_row[(1,)](packed, absmax, code, out, N - 1, N, K, ALIGNED=aligned, ROWS=2, COLS=32)
    assert out[0, :4].tolist() == [2 * formats.NF4_CODE[i] for i in (0x1, 0xF, 0xE, 0x2)]


# --------------------------------------------------------------------------------------------------- compiler


def test_every_reduction_split_covers_its_work():
    for column_blocks, ranks, row_blocks in itertools.product((0, 1, 2, 5, 112), (1, 4), (0, 1, 3, 128)):
        chunks, columns, parts = configs.chunks(column_blocks, ranks, row_blocks)
        assert (chunks - 1) * columns < max(column_blocks, 1) <= max(chunks * columns, 1)
        assert parts <= max(row_blocks, 1)


@pytest.mark.parametrize(
    "words",
    [
        ("dx_kernel", "sm_90", "bf16/fp32/nf4"),
        ("up_backward_kernel", "sm_86", "bf16"),
        ("loreft", "sm_90", "bf16"),
        ("linear_kernel", "sm_75", "fp16"),
        ("down_kernel", "gfx942", "bf16", "merge"),
    ],
)
def test_compiled_code_keeps_its_invariants(words):
    """A part of `python bench/aot.py --check`: no spills, tensor cores, shared memory, no fp64, the table."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "bench" / "aot.py"
    command = [sys.executable, str(script), "--check", "--only", *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
