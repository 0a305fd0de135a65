"""The one decode of a packed weight Ŵ in Triton; every kernel that reads a weight calls `decode_tile`.

A weight comes as the fields of `QuantizedWeight`: `weight, absmax, code, nested_absmax, nested_code,
nested_offset` (None where the format has none, which is a compile-time branch). Its 4-bit layout is defined
in `peft_fast.formats`: byte = even element << 4 | odd element of the flat row-major matrix, blocks
contiguous in flat order, value = code[nibble] · absmax in fp32.

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
    """The tile Ŵ[i_n : i_n + ROWS, i_k : i_k + COLS]: fp32 for 4-bit formats, as stored for dense ones.

    `i_k` is a multiple of COLS. Elements outside [N, K] have no defined value, only a finite one. Strides
    are those of a dense weight.
    """
    o_n = tl.arange(0, ROWS)
    o_k = tl.arange(0, COLS)
    m_n = i_n + o_n < N
    if code is None:
        p_weight = weight + tl.cast(i_n, tl.int64) * stride_n + tl.cast(i_k, tl.int64) * stride_k
        mask = m_n[:, None] & (i_k + o_k < K)[None, :]
        return tl.load(p_weight + o_n[:, None] * stride_n + o_k[None, :] * stride_k, mask=mask, other=0.0)
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
