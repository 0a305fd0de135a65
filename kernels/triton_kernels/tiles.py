"""What kernels share: how a tile is read, written and multiplied, dropout, activations, program order.

Matrices are contiguous and row-major. A tile is addressed from a scalar int64 base, so that only offsets
inside one tile are 32-bit.

Under Triton's interpreter (CPU tensors) bfloat16 values are opaque 16-bit patterns: `load_tile` and `cast`
keep fp32 there instead, and launchers allocate fp32 results (`launch.empty`).
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRET = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def widen(b):
    """fp32 for bfloat16 under the interpreter, else the value itself."""
    if INTERPRET and b.dtype == tl.bfloat16:
        return b.to(tl.float32)
    else:
        return b


@triton.jit
def cast(b, dtype: tl.constexpr):
    """Rounds to nearest even to `dtype`; under the interpreter a bfloat16 value is held in fp32."""
    if INTERPRET and dtype == tl.bfloat16:
        b = widen(b).to(tl.float32)
        b_bits = b.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + (b_bits >> 16 & 1)) & 0xFFFF0000
        return tl.where(b == b, b_bits.to(tl.float32, bitcast=True), b)
    else:
        return b.to(dtype)


@triton.jit
def load_tile(p, i_row, i_col, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile [ROWS, COLS] at (i_row, i_col) of a matrix [n_rows, n_cols], zero outside."""
    o_row = tl.arange(0, ROWS)
    o_col = tl.arange(0, COLS)
    mask = (i_row + o_row < n_rows)[:, None] & (i_col + o_col < n_cols)[None, :]
    p_tile = p + tl.cast(i_row, tl.int64) * n_cols + i_col
    return widen(tl.load(p_tile + o_row[:, None] * n_cols + o_col[None, :], mask=mask, other=0.0))


@triton.jit
def load_vector(p, i, n, other, BLOCK: tl.constexpr):
    """fp32 of the elements i : i + BLOCK of a vector [n], `other` outside."""
    o = i + tl.arange(0, BLOCK)
    return tl.load(p + o, mask=o < n, other=other).to(tl.float32)


@triton.jit
def store_tile(p, b, i_row, i_col, n_rows, n_cols):
    """Writes a tile to (i_row, i_col) of a matrix [n_rows, n_cols], rounded to its dtype."""
    o_row = tl.arange(0, b.shape[0])
    o_col = tl.arange(0, b.shape[1])
    mask = (i_row + o_row < n_rows)[:, None] & (i_col + o_col < n_cols)[None, :]
    p_tile = p + tl.cast(i_row, tl.int64) * n_cols + i_col
    tl.store(p_tile + o_row[:, None] * n_cols + o_col[None, :], b.to(p.dtype.element_ty), mask=mask)


@triton.jit
def selected_rows(p_rows, i_row, n_selected, n_rows, ROWS: tl.constexpr):
    """(index int64, valid) [ROWS] of the rows that p_rows [n_selected] names from i_row on.

    Without p_rows they are i_row : i_row + ROWS. An index outside of [0, n_rows) is 0 and not valid.
    """
    o_row = i_row + tl.arange(0, ROWS)
    valid = o_row < n_selected
    if p_rows is None:
        return o_row.to(tl.int64), valid
    else:
        b_row = tl.load(p_rows + o_row, mask=valid, other=-1)
        valid = (b_row >= 0) & (b_row < n_rows)
        return tl.where(valid, b_row, 0), valid


@triton.jit
def load_rows(p_row, valid, i_col, n_cols, COLS: tl.constexpr):
    """The tile [ROWS, COLS] at column i_col of the rows that p_row [ROWS] points to, zero where not valid."""
    o_col = i_col + tl.arange(0, COLS)
    mask = valid[:, None] & (o_col < n_cols)[None, :]
    return widen(tl.load(p_row[:, None] + o_col[None, :], mask=mask, other=0.0))


@triton.jit
def store_rows(p_row, b, valid, i_col, n_cols):
    """Writes a tile to column i_col of the valid rows that p_row points to, rounded to their dtype."""
    o_col = i_col + tl.arange(0, b.shape[1])
    mask = valid[:, None] & (o_col < n_cols)[None, :]
    tl.store(p_row[:, None] + o_col[None, :], b.to(p_row.dtype.element_ty), mask=mask)


@triton.jit
def drop_tile(b, p_mask, i_row, i_col, n_rows, n_cols):
    """`b`, a tile at (i_row, i_col), zeroed where the packed mask [n_rows, ⌈n_cols/8⌉] drops; not rescaled.

    `i_col` is a multiple of 8. Without a mask (None) returns `b`.
    """
    if p_mask is None:
        return b
    else:
        ROWS: tl.constexpr = b.shape[0]
        COLS: tl.constexpr = b.shape[1]
        n_bytes = (n_cols + 7) // 8
        b_byte = load_tile(p_mask, i_row, i_col // 8, n_rows, n_bytes, ROWS, COLS // 8)
        b_bit = (b_byte[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
        return tl.where(tl.reshape(b_bit, (ROWS, COLS)) != 0, b, 0.0)


@triton.jit
def bfloat16_terms(b):
    """Three bfloat16 tiles whose sum is the fp32 tile `b`, largest first."""
    high = b.to(tl.bfloat16)
    rest = b - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def round_to_tf32(b):
    """An fp32 tile whose dropped bits round: tensor cores cut them off, which shrinks every product."""
    b_bits = b.to(tl.uint32, bitcast=True) + 0x1000
    return tl.where(b == b, b_bits.to(tl.float32, bitcast=True), b)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b with fp32-class accuracy.

    Operands of one half dtype go to the tensor cores as they are. An fp32 operand beside a bfloat16 one is
    taken apart into three bfloat16 terms, which hold its 24 bits. Any other pair is multiplied as fp32, in
    the way of PRECISION: "tf32" holds 11 bits of an operand, all others (`target.precision`) its 24.
    """
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    elif a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high, middle, low = bfloat16_terms(b)
        return tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low, acc)))
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high, middle, low = bfloat16_terms(a)
        return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b, acc)))
    elif PRECISION == "tf32":
        a, b = round_to_tf32(a.to(tl.float32)), round_to_tf32(b.to(tl.float32))
        return tl.dot(a, b, acc, input_precision="tf32")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def tanh(b):
    """tanh in fp32: from e^(−2|b|), which cannot overflow, and near 0, where that cancels, its series."""
    b_square = b * b
    b_series = b * (1 - b_square * (1 / 3 - b_square * (2 / 15 - b_square * (17 / 315))))
    b_exp = tl.exp(-2 * tl.abs(b))
    b_tanh = (1 - b_exp) / (1 + b_exp)
    return tl.where(b_square < 1 / 64, b_series, tl.where(b < 0, -b_tanh, b_tanh))


@triton.jit
def activation(b, ACT: tl.constexpr):
    """The activation ACT, a name in `reference.ACTIVATIONS`, of fp32 values."""
    if ACT == "relu":
        return tl.where(b < 0, 0.0, b)
    elif ACT == "gelu":
        return 0.5 * b * (1 + tl.erf(b * 0.7071067811865476))
    elif ACT == "tanh":
        return tanh(b)
    elif ACT == "silu":
        return b * tl.sigmoid(b)
    elif ACT == "sigmoid":
        return tl.sigmoid(b)
    else:
        tl.static_assert(ACT == "linear")
        return b


@triton.jit
def activation_slope(b, ACT: tl.constexpr):
    """The derivative of `activation` at b."""
    if ACT == "relu":
        return tl.where(b > 0, 1.0, 0.0)
    elif ACT == "gelu":
        b_density = 0.3989422804014327 * tl.exp(-0.5 * b * b)
        return 0.5 * (1 + tl.erf(b * 0.7071067811865476)) + b * b_density
    elif ACT == "tanh":
        return 1 - tanh(b) * tanh(b)
    elif ACT == "silu":
        return tl.sigmoid(b) * (1 + b * (1 - tl.sigmoid(b)))
    elif ACT == "sigmoid":
        return tl.sigmoid(b) * (1 - tl.sigmoid(b))
    else:
        tl.static_assert(ACT == "linear")
        return tl.zeros_like(b) + 1.0


@triton.jit
def grouped_order(i, n_rows, n_cols, GROUP: tl.constexpr):
    """Program i of a grid of n_rows · n_cols tiles → (row, column), GROUP rows at a time, to stay in L2."""
    per_group = GROUP * n_cols
    first = i // per_group * GROUP
    height = tl.minimum(n_rows - first, GROUP)
    return first + i % per_group % height, i % per_group // height
