"""The one decode of a packed weight Ŵ in Triton; every kernel that reads a weight calls `decode_tile`.

A weight comes as the fields of `QuantizedWeight`: `weight, absmax, code, nested_absmax, nested_code,
nested_offset` (None where the format has none). What is there, and in what type, says at compile time how it
is packed: a dense weight has no absmax, an 8-bit one no code, and its bytes are int8 or, of e4m3, uint8. The
layouts are defined in `peft_fast.formats`; all of them are flat row-major. In 4 bits byte = even element << 4
| odd element, blocks are contiguous in flat order and value = code[nibble] · absmax in fp32; in 8 bits a row
has one scale.

`ALIGNED` says that blocks do not straddle rows (K % BLOCKSIZE == 0): a row is then whole bytes and whole
blocks, bytes are read once and scales once per block. Otherwise every element finds its own byte and block,
which is slow, and main loops do not prefetch it (`num_stages=1`), which would take most of a device's memory.

Multiply then add must stay two roundings, so kernels are launched with floating-point contraction off
(`launch.OPTIONS`).
"""

import triton
import triton.language as tl


@triton.jit
def look_up(code, b_nibble, ROWS: tl.constexpr, COLS: tl.constexpr):
    """code[b_nibble], [ROWS, COLS].

    A one-dimensional gather keeps the table in shared memory, one lookup an element. Of what was compiled it
    has the fewest instructions: loads through the pointer become asynchronous copies of 4 bytes each, a
    two-dimensional gather becomes warp shuffles, a select tree is 16 compares.
    """
    b_flat = tl.reshape(b_nibble.to(tl.int32), (ROWS * COLS,))
    return tl.reshape(tl.gather(tl.load(code + tl.arange(0, 16)), b_flat, 0), (ROWS, COLS))


@triton.jit
def byte_value(b_byte):
    """The fp32 values of integers, or of e4m3 numbers, which have the bits of a half number of 2^-8 the size.

    Exact, with denormals, on targets that have no such type too. NaN would be 480.
    """
    if b_byte.dtype == tl.int8:
        return b_byte.to(tl.float32)
    else:
        b_magnitude = (b_byte & 127).to(tl.uint16)
        b_half = (b_byte & 128).to(tl.uint16) << 8 | b_magnitude << 7
        b_value = b_half.to(tl.float16, bitcast=True).to(tl.float32) * 256
        return tl.where(b_magnitude == 127, float("nan"), b_value)


@triton.jit
def load_row_scale(weight, absmax, i_n, mask):
    """The fp32 scales of the 8-bit rows from i_n on."""
    b_scale = tl.load(absmax + i_n + tl.arange(0, mask.shape[0]), mask=mask, other=0.0)
    if weight.dtype.element_ty == tl.int8:
        b_scale *= 1 / 127
    return b_scale


@triton.jit
def load_absmax(
    absmax, nested_absmax, nested_code, nested_offset, i_block, o_block, mask, NESTED_BLOCKSIZE: tl.constexpr
):  # fmt: skip
    """The fp32 scales of the blocks i_block (a scalar int64) + o_block, nested quantization undone."""
    b_absmax = tl.load(absmax + i_block + o_block, mask=mask, other=0)
    if nested_absmax is not None:
        p_group = nested_absmax + i_block // NESTED_BLOCKSIZE
        o_group = ((i_block % NESTED_BLOCKSIZE).to(tl.int32) + o_block) // NESTED_BLOCKSIZE
        b_group = tl.load(p_group + o_group, mask=mask, other=0.0)
        b_absmax = tl.load(nested_code + b_absmax.to(tl.int32)) * b_group + tl.load(nested_offset)
    return b_absmax


@triton.jit
def decode_tile(
    weight, absmax, code, nested_absmax, nested_code, nested_offset,
    i_n, i_k, N, K, stride_n, stride_k,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The tile Ŵ[i_n : i_n + ROWS, i_k : i_k + COLS]: fp32, or as stored for a dense weight.

    `i_k` is a multiple of COLS. Elements outside [N, K] have no defined value, only a finite one. Strides
    are those of a dense weight.
    """
    o_n = tl.arange(0, ROWS)
    o_k = tl.arange(0, COLS)
    m_n = i_n + o_n < N
    if absmax is None:
        p_weight = weight + tl.cast(i_n, tl.int64) * stride_n + tl.cast(i_k, tl.int64) * stride_k
        mask = m_n[:, None] & (i_k + o_k < K)[None, :]
        return tl.load(p_weight + o_n[:, None] * stride_n + o_k[None, :] * stride_k, mask=mask, other=0.0)
    elif code is None:
        p_weight = weight + tl.cast(i_n, tl.int64) * K + i_k
        mask = m_n[:, None] & (i_k + o_k < K)[None, :]
        b_byte = tl.load(p_weight + o_n[:, None] * K + o_k[None, :], mask=mask, other=0)
        b_scale = load_row_scale(weight, absmax, i_n, m_n)
        # As blocks of half a row, so that a byte is decoded where it was loaded: the compiler else moves the
        # bytes to the registers of the product, of which several may hold a value, and runs out of them.
        b_value = tl.reshape(byte_value(b_byte), (ROWS, 2, COLS // 2)) * b_scale[:, None, None]
        return tl.reshape(b_value, (ROWS, COLS))
    elif ALIGNED:
        o_byte = tl.arange(0, COLS // 2)
        p_weight = weight + tl.cast(i_n, tl.int64) * (K // 2) + i_k // 2
        mask = m_n[:, None] & (i_k // 2 + o_byte < K // 2)[None, :]
        b_byte = tl.load(p_weight + o_n[:, None] * (K // 2) + o_byte[None, :], mask=mask, other=0)
        b_code = look_up(code, tl.interleave(b_byte >> 4, b_byte & 15), ROWS, COLS)

        GROUP: tl.constexpr = min(BLOCKSIZE, COLS)
        o_group = i_k + tl.arange(0, COLS // GROUP) * GROUP
        o_block = o_n[:, None] * (K // BLOCKSIZE) + (o_group // BLOCKSIZE)[None, :]
        b_scale = load_absmax(
            absmax, nested_absmax, nested_code, nested_offset,
            tl.cast(i_n, tl.int64) * (K // BLOCKSIZE), o_block,
            m_n[:, None] & (o_group < K)[None, :], NESTED_BLOCKSIZE,
        )  # fmt: skip
        b_value = tl.reshape(b_code, (ROWS, COLS // GROUP, GROUP)) * b_scale[:, :, None]
        return tl.reshape(b_value, (ROWS, COLS))
    else:
        i_flat = tl.cast(i_n, tl.int64) * K + i_k
        o_flat = (i_flat % BLOCKSIZE).to(tl.int32) + o_n[:, None] * K + o_k[None, :]
        i_block = i_flat // BLOCKSIZE
        mask = m_n[:, None] & (i_k + o_k < K)[None, :]
        b_byte = tl.load(weight + i_block * (BLOCKSIZE // 2) + o_flat // 2, mask=mask, other=0)
        b_nibble = tl.where(o_flat % 2 == 0, b_byte >> 4, b_byte & 15)
        b_code = look_up(code, b_nibble, ROWS, COLS)
        return b_code * load_absmax(
            absmax, nested_absmax, nested_code, nested_offset, i_block, o_flat // BLOCKSIZE, mask,
            NESTED_BLOCKSIZE,
        )  # fmt: skip
