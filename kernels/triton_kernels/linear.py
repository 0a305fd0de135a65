"""The main loops of lora_linear: a GEMM over the packed weight, or over a dense one, with the low-rank term.

Ŵ is decoded in the loop; the low-rank term is further steps of the same accumulator. For few rows the
reduction is split between programs (`splitk_*`), which keeps the memory of a large device busy; the sums of
their fp32 partial results come in a fixed order.
"""

import triton
import triton.language as tl

from . import configs
from .decode import decode_tile
from .low_rank import add_low_rank, down_tile, store_output, sum_block
from .tiles import cast, dot, drop_tile, grouped_order, load_tile, load_vector, store_tile


@configs.tuned(configs.LINEAR)
@triton.jit
def linear_kernel(
    p_x, weight, absmax, code, nested_absmax, nested_code, nested_offset, p_bias, p_b, p_out_scale,
    p_partial, p_z, p_y,
    M, N, K, R, stride_n, stride_k,
    scaling,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of Y; the first column of programs also writes Z, the sum of its SPLIT partial sums."""
    i_row, i_col = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    i_m, i_n = i_row * BLOCK_M, i_col * BLOCK_N
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_k in tl.range(0, K, BLOCK_K, num_stages=None if ALIGNED else 1):
        b_x = load_tile(p_x, i_m, i_k, M, K, BLOCK_M, BLOCK_K)
        b_w = decode_tile(
            weight, absmax, code, nested_absmax, nested_code, nested_offset,
            i_n, i_k, N, K, stride_n, stride_k,
            BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        b_y = dot(b_x, tl.trans(cast(b_w, p_x.dtype.element_ty)), b_y, PRECISION)
    b_y = add_low_rank(
        b_y, p_partial, p_z, p_b, i_m, i_n, M, N, R, scaling, SPLIT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_N
    )  # fmt: skip
    store_output(p_y, b_y, p_out_scale, p_bias, i_m, i_n, M, N, BLOCK_N)


@configs.tuned(configs.DX)
@triton.jit
def dx_kernel(
    p_g, weight, absmax, code, nested_absmax, nested_code, nested_offset, p_a, p_dz, p_mask, p_out_scale,
    p_dx,
    M, N, K, R, stride_n, stride_k,
    drop_scale,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of dX. The low-rank term comes first, so that dropping it needs no second accumulator."""
    i_row, i_col = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    i_m, i_k = i_row * BLOCK_M, i_col * BLOCK_K
    b_dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if p_dz is not None:
        for i_r in range(0, R, BLOCK_R):
            b_dz = load_tile(p_dz, i_m, i_r, M, R, BLOCK_M, BLOCK_R)
            b_a = load_tile(p_a, i_r, i_k, R, K, BLOCK_R, BLOCK_K)
            b_dx = dot(b_dz, b_a, b_dx, PRECISION)
        b_dx = drop_tile(b_dx * drop_scale, p_mask, i_m, i_k, M, K)
    for i_n in tl.range(0, N, BLOCK_N, num_stages=None if ALIGNED else 1):
        b_g = load_tile(p_g, i_m, i_n, M, N, BLOCK_M, BLOCK_N)
        b_w = decode_tile(
            weight, absmax, code, nested_absmax, nested_code, nested_offset,
            i_n, i_k, N, K, stride_n, stride_k,
            BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if p_out_scale is not None:
            b_w = b_w.to(tl.float32) * load_vector(p_out_scale, i_n, N, 0.0, BLOCK_N)[:, None]
        b_dx = dot(b_g, cast(b_w, p_g.dtype.element_ty), b_dx, PRECISION)
    store_tile(p_dx, b_dx, i_m, i_k, M, K)


@triton.jit
def splitk_linear_kernel(
    p_x, weight, absmax, code, nested_absmax, nested_code, nested_offset, p_a, p_mask, p_partial, p_y_partial,
    M, N, K, R, stride_n, stride_k,
    drop_scale,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, DOWN_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial sums of X·Ŵᵀ [SPLIT, M, N]; the programs after those make the ones of Z [DOWN_SPLIT, M, R].

    A program takes every SPLIT-th step of K, so that neighbours read neighbouring bytes of a row.
    """
    i = tl.program_id(0)
    n_rows, n_columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    n_programs = n_rows * n_columns * SPLIT
    if i < n_programs:
        i_split, i_m, i_n = i % SPLIT, i // SPLIT % n_rows * BLOCK_M, i // SPLIT // n_rows * BLOCK_N
        b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in tl.range(i_split * BLOCK_K, K, SPLIT * BLOCK_K, num_stages=None if ALIGNED else 1):
            b_x = load_tile(p_x, i_m, i_k, M, K, BLOCK_M, BLOCK_K)
            b_w = decode_tile(
                weight, absmax, code, nested_absmax, nested_code, nested_offset,
                i_n, i_k, N, K, stride_n, stride_k,
                BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            b_y = dot(b_x, tl.trans(cast(b_w, p_x.dtype.element_ty)), b_y, PRECISION)
        store_tile(p_y_partial + tl.cast(i_split, tl.int64) * M * N, b_y, i_m, i_n, M, N)
    else:
        i -= n_programs
        n_ranks = tl.cdiv(R, BLOCK_R)
        down_tile(
            p_x, p_a, p_mask, p_partial, i // n_ranks % n_rows, i % n_ranks, i // n_ranks // n_rows,
            M, K, R, drop_scale, DOWN_SPLIT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
        )  # fmt: skip


@triton.jit
def splitk_finish_kernel(
    p_y_partial, p_partial, p_b, p_bias, p_out_scale, p_z, p_y,
    M, N, R,
    scaling,
    SPLIT: tl.constexpr, DOWN_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of Y from partial sums; the first column of programs also writes Z."""
    n_rows = tl.cdiv(M, BLOCK_M)
    i_m, i_n = tl.program_id(0) % n_rows * BLOCK_M, tl.program_id(0) // n_rows * BLOCK_N
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_split in range(SPLIT):
        p_next = p_y_partial + tl.cast(i_split, tl.int64) * M * N
        b_y += load_tile(p_next, i_m, i_n, M, N, BLOCK_M, BLOCK_N)
    b_y = add_low_rank(
        b_y, p_partial, p_z, p_b, i_m, i_n, M, N, R, scaling, DOWN_SPLIT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_N
    )  # fmt: skip
    store_output(p_y, b_y, p_out_scale, p_bias, i_m, i_n, M, N, BLOCK_N)


@triton.jit
def splitk_dx_kernel(
    p_g, weight, absmax, code, nested_absmax, nested_code, nested_offset, p_out_scale, p_dx_partial,
    p_dz_partial, p_db_partial, p_dbias_partial, p_d_out_scale_partial, p_dz, p_db, p_dbias, p_d_out_scale,
    M, N, K, R, stride_n, stride_k, n_chunks,
    scaling,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, UP_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of G'·Ŵ [SPLIT, M, K]; the programs after those are `sum_kernel`'s."""
    i = tl.program_id(0)
    n_rows, n_columns = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    n_programs = n_rows * n_columns * SPLIT
    if i < n_programs:
        i_split = i // n_columns // n_rows
        i_k, i_m = i % n_columns * BLOCK_K, i // n_columns % n_rows * BLOCK_M
        b_dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i_n in tl.range(i_split * BLOCK_N, N, SPLIT * BLOCK_N, num_stages=None if ALIGNED else 1):
            b_g = load_tile(p_g, i_m, i_n, M, N, BLOCK_M, BLOCK_N)
            b_w = decode_tile(
                weight, absmax, code, nested_absmax, nested_code, nested_offset,
                i_n, i_k, N, K, stride_n, stride_k,
                BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if p_out_scale is not None:
                b_w = b_w.to(tl.float32) * load_vector(p_out_scale, i_n, N, 0.0, BLOCK_N)[:, None]
            b_dx = dot(b_g, cast(b_w, p_g.dtype.element_ty), b_dx, PRECISION)
        store_tile(p_dx_partial + tl.cast(i_split, tl.int64) * M * K, b_dx, i_m, i_k, M, K)
    else:
        sum_block(
            i - n_programs,
            p_dz_partial, p_db_partial, p_dbias_partial, p_d_out_scale_partial,
            p_dz, p_db, p_dbias, p_d_out_scale,
            M, N, R, n_chunks, scaling, UP_SPLIT, BLOCK,
        )  # fmt: skip
