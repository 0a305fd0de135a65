"""The thin products of lora_linear, bound by memory: Z and its Y0, one read of dY, dA and its dX0, sums.

A pass over X or over partial sums leaves the tensor cores idle and needs nothing of the decoded weight, so
`down_kernel` and `sum_kernel` take the tiles of a scratch along, in programs of their own: with p_scratch,
the programs after their own write them (`dequantize.write_tile`). One launch less, and both keep the memory
busy.
"""

import triton
import triton.language as tl

from .dequantize import write_tile
from .tiles import dot, drop_tile, load_tile, load_vector, store_tile


@triton.jit
def down_tile(
    p_x, p_a, p_mask, p_z, i_row, i_rank, i_split,
    M, K, R,
    drop_scale,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i_row, i_rank) of partial sum i_split of Z [SPLIT, M, R]; it takes every SPLIT-th step of K."""
    i_m, i_r = i_row * BLOCK_M, i_rank * BLOCK_R
    b_z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(i_split * BLOCK_K, K, SPLIT * BLOCK_K):
        b_x = load_tile(p_x, i_m, i_k, M, K, BLOCK_M, BLOCK_K)
        b_x = drop_tile(b_x, p_mask, i_m, i_k, M, K)
        b_a = load_tile(p_a, i_r, i_k, R, K, BLOCK_R, BLOCK_K)
        b_z = dot(b_x, tl.trans(b_a), b_z, PRECISION)
    p_partial = p_z + tl.cast(i_split, tl.int64) * M * R
    store_tile(p_partial, b_z * drop_scale, i_m, i_r, M, R)


@triton.jit
def add_low_rank(
    b_y, p_partial, p_z, p_b, i_m, i_n, M, N, R,
    scaling,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """b_y + s·Z·Bᵀ; Z is the sum of SPLIT partial sums, and where there are several is written to p_z."""
    for i_r in range(0, R, BLOCK_R):
        b_z = load_tile(p_partial, i_m, i_r, M, R, BLOCK_M, BLOCK_R)
        if SPLIT > 1:
            for i_split in range(1, SPLIT):
                p_next = p_partial + tl.cast(i_split, tl.int64) * M * R
                b_z += load_tile(p_next, i_m, i_r, M, R, BLOCK_M, BLOCK_R)
            if i_n == 0:
                store_tile(p_z, b_z, i_m, i_r, M, R)
        b_b = load_tile(p_b, i_n, i_r, N, R, BLOCK_N, BLOCK_R)
        b_y = dot(b_z * scaling, tl.trans(b_b), b_y, PRECISION)
    return b_y


@triton.jit
def store_output(p_y, b_y, p_out_scale, p_bias, i_m, i_n, M, N, BLOCK_N: tl.constexpr):
    """Y = out_scale ⊙ b_y + bias."""
    if p_out_scale is not None:
        b_y *= load_vector(p_out_scale, i_n, N, 0.0, BLOCK_N)[None, :]
    if p_bias is not None:
        b_y += load_vector(p_bias, i_n, N, 0.0, BLOCK_N)[None, :]
    store_tile(p_y, b_y, i_m, i_n, M, N)


@triton.jit
def up_rows(
    p_z, p_b, p_bias, p_out_scale, p_y, i_m,
    M, N, R,
    scaling,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of Y0 = out_scale ⊙ s·Z·Bᵀ + bias, onto which a GEMM accumulates."""
    for i_n in range(0, N, BLOCK_N):
        b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        b_y = add_low_rank(
            b_y, p_z, p_z, p_b, i_m, i_n, M, N, R, scaling, 1, PRECISION, BLOCK_M, BLOCK_R, BLOCK_N
        )  # fmt: skip
        store_output(p_y, b_y, p_out_scale, p_bias, i_m, i_n, M, N, BLOCK_N)


@triton.jit
def down_kernel(
    p_x, p_a, p_mask, p_z,
    M, K, R,
    drop_scale,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, Y_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    p_b=None, p_bias=None, p_out_scale=None, p_y=None, N=0, scaling=1.0,
    weight=None, absmax=None, code=None, nested_absmax=None, nested_code=None, nested_offset=None,
    p_scratch=None, stride_n=0, stride_k=0, first_row=0, first_column=0, rows=0, columns=0,
    BLOCKSIZE: tl.constexpr = 0, NESTED_BLOCKSIZE: tl.constexpr = 0, ALIGNED: tl.constexpr = True,
    MERGE: tl.constexpr = False, ROWS: tl.constexpr = 0, COLS: tl.constexpr = 0,
):  # fmt: skip
    """Z, in partial sums; with p_y (SPLIT is 1 then) its Y0 too, with p_scratch a panel of the weight.

    Y0 takes whole rows of Z: a program then makes all of its rank blocks. Y_PRECISION is for products whose
    result is rounded to the dtype of X. Rank blocks of the same rows come together, to find X in L2.
    """
    i = tl.program_id(0)
    n_rows = tl.cdiv(M, BLOCK_M)
    n_ranks = tl.cdiv(R, BLOCK_R) if p_y is None else 1
    n_programs = n_rows * n_ranks * SPLIT
    if i < n_programs:
        i_row = i // n_ranks % n_rows
        if p_y is None:
            down_tile(
                p_x, p_a, p_mask, p_z, i_row, i % n_ranks, i // n_ranks // n_rows,
                M, K, R, drop_scale, SPLIT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        else:
            for i_rank in range(tl.cdiv(R, BLOCK_R)):
                down_tile(
                    p_x, p_a, p_mask, p_z, i_row, i_rank, 0,
                    M, K, R, drop_scale, 1, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
                )  # fmt: skip
            # Other threads of this program have written the rows of Z that come next.
            tl.debug_barrier()
            up_rows(
                p_z, p_b, p_bias, p_out_scale, p_y, i_row * BLOCK_M,
                M, N, R, scaling, Y_PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
    elif p_scratch is not None:
        write_tile(
            i - n_programs,
            weight, absmax, code, nested_absmax, nested_code, nested_offset,
            p_a if MERGE else None, p_b if MERGE else None, p_out_scale, p_scratch,
            N, K, R, stride_n, stride_k, first_row, first_column, rows, columns,
            scaling,
            BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, p_x.dtype.element_ty, Y_PRECISION, ROWS, COLS, BLOCK_R,
        )  # fmt: skip


@triton.jit
def up_backward_kernel(
    p_g, p_b, p_z, p_out_scale, p_bias, p_y, p_dz, p_db, p_dbias, p_d_out_scale,
    M, N, R, columns,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums of dZ [chunks, M, R], dB [SPLIT, N, R], dbias and d_out_scale [SPLIT, N], before scaling.

    Program (rank block, chunk, split) reads `columns` column blocks of G, every SPLIT-th row block. Its sums
    of dB stay in registers; those of dZ grow in its own slice of the result, which L2 holds. Results that are
    not asked for are None.
    """
    i_rank, i_chunk, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_r = i_rank * BLOCK_R
    if p_dz is not None:
        p_dz += tl.cast(i_chunk, tl.int64) * M * R
    for i_column in range(columns):
        i_n = (i_chunk * columns + i_column) * BLOCK_N
        if p_dz is not None:
            b_b = load_tile(p_b, i_n, i_r, N, R, BLOCK_N, BLOCK_R)
            if p_out_scale is not None:
                b_b *= load_vector(p_out_scale, i_n, N, 1.0, BLOCK_N)[:, None]
        if p_d_out_scale is not None and p_bias is not None:
            b_bias = load_vector(p_bias, i_n, N, 0.0, BLOCK_N)
        b_db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        b_dbias = tl.zeros((BLOCK_N,), tl.float32)
        b_d_out_scale = tl.zeros((BLOCK_N,), tl.float32)
        for i_m in range(i_split * BLOCK_M, M, SPLIT * BLOCK_M):
            b_g = load_tile(p_g, i_m, i_n, M, N, BLOCK_M, BLOCK_N)
            if p_dz is not None:
                # No rows to load before the first column block: the sum starts at zero.
                b_dz = load_tile(p_dz, i_m, i_r, tl.where(i_column == 0, 0, M), R, BLOCK_M, BLOCK_R)
                store_tile(p_dz, dot(b_g, b_b, b_dz, PRECISION), i_m, i_r, M, R)
            if p_db is not None:
                b_z = load_tile(p_z, i_m, i_r, M, R, BLOCK_M, BLOCK_R)
                b_db = dot(tl.trans(b_g), b_z, b_db, PRECISION)
            if p_dbias is not None:
                b_dbias += tl.sum(b_g.to(tl.float32), 0)
            if p_d_out_scale is not None:
                # One rank block stores the sum: the others load no rows of Y.
                b_y = load_tile(p_y, i_m, i_n, tl.where(i_rank == 0, M, 0), N, BLOCK_M, BLOCK_N)
                b_y = b_y.to(tl.float32)
                if p_bias is not None:
                    b_y -= b_bias[None, :]
                b_d_out_scale += tl.sum(b_g.to(tl.float32) * b_y, 0)
        if p_db is not None:
            if p_out_scale is not None:
                b_db *= load_vector(p_out_scale, i_n, N, 1.0, BLOCK_N)[:, None]
            store_tile(p_db + tl.cast(i_split, tl.int64) * N * R, b_db, i_n, i_r, N, R)
        if p_dbias is not None and i_rank == 0:
            o_n = i_n + tl.arange(0, BLOCK_N)
            tl.store(p_dbias + tl.cast(i_split, tl.int64) * N + o_n, b_dbias, mask=o_n < N)
        if p_d_out_scale is not None and i_rank == 0:
            o_n = i_n + tl.arange(0, BLOCK_N)
            b_d_out_scale /= load_vector(p_out_scale, i_n, N, 1.0, BLOCK_N)
            tl.store(p_d_out_scale + tl.cast(i_split, tl.int64) * N + o_n, b_d_out_scale, mask=o_n < N)
        # The next column block reads the sums of dZ that other threads of this program have written.
        tl.debug_barrier()


@triton.jit
def sum_partials(p_partial, p_out, i_block, n_partials, numel, scale, BLOCK: tl.constexpr):
    """out[i] = scale · Σ_p partial[p, i] in fp32, in the order of p, rounded once to the dtype of out."""
    o = tl.cast(i_block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < numel
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i in range(n_partials):
        b_sum += tl.load(p_partial + tl.cast(i, tl.int64) * numel + o, mask=mask, other=0.0)
    tl.store(p_out + o, (b_sum * scale).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def sum_block(
    i_block,
    p_dz_partial, p_db_partial, p_dbias_partial, p_d_out_scale_partial, p_dz, p_db, p_dbias, p_d_out_scale,
    M, N, R, n_chunks,
    scaling,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Block i_block of dZ, dB, d_out_scale and dbias, one after the other; returns its number after them."""
    i_block = tl.cast(i_block, tl.int64)
    if p_dz is not None:
        n_blocks = tl.cdiv(tl.cast(M, tl.int64) * R, BLOCK)
        if i_block >= 0 and i_block < n_blocks:
            sum_partials(p_dz_partial, p_dz, i_block, n_chunks, tl.cast(M, tl.int64) * R, scaling, BLOCK)
        i_block -= n_blocks
    if p_db is not None:
        n_blocks = tl.cdiv(tl.cast(N, tl.int64) * R, BLOCK)
        if i_block >= 0 and i_block < n_blocks:
            sum_partials(p_db_partial, p_db, i_block, SPLIT, tl.cast(N, tl.int64) * R, scaling, BLOCK)
        i_block -= n_blocks
    if p_d_out_scale is not None:
        n_blocks = tl.cdiv(tl.cast(N, tl.int64), BLOCK)
        if i_block >= 0 and i_block < n_blocks:
            sum_partials(p_d_out_scale_partial, p_d_out_scale, i_block, SPLIT, N, 1.0, BLOCK)
        i_block -= n_blocks
    if p_dbias is not None:
        n_blocks = tl.cdiv(tl.cast(N, tl.int64), BLOCK)
        if i_block >= 0 and i_block < n_blocks:
            sum_partials(p_dbias_partial, p_dbias, i_block, SPLIT, N, 1.0, BLOCK)
        i_block -= n_blocks
    return i_block


@triton.jit
def sum_kernel(
    p_dz_partial, p_db_partial, p_dbias_partial, p_d_out_scale_partial, p_dz, p_db, p_dbias, p_d_out_scale,
    M, N, R, n_chunks,
    scaling,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    weight=None, absmax=None, code=None, nested_absmax=None, nested_code=None, nested_offset=None,
    p_a=None, p_b=None, p_out_scale=None, p_scratch=None,
    K=0, stride_n=0, stride_k=0, first_row=0, first_column=0, rows=0, columns=0,
    BLOCKSIZE: tl.constexpr = 0, NESTED_BLOCKSIZE: tl.constexpr = 0, ALIGNED: tl.constexpr = True,
    DTYPE: tl.constexpr = tl.float32, PRECISION: tl.constexpr = "ieee",
    ROWS: tl.constexpr = 0, COLS: tl.constexpr = 0, BLOCK_R: tl.constexpr = 16,
):  # fmt: skip
    """dZ, dB, dbias and d_out_scale (None: left out) from partial sums, each in its share of the programs.

    With p_scratch, the programs after theirs write a panel of the weight.
    """
    i = sum_block(
        tl.program_id(0),
        p_dz_partial, p_db_partial, p_dbias_partial, p_d_out_scale_partial,
        p_dz, p_db, p_dbias, p_d_out_scale,
        M, N, R, n_chunks, scaling, SPLIT, BLOCK,
    )  # fmt: skip
    if p_scratch is not None:  # noqa: SIM102, when compiling, not when running
        if i >= 0:
            write_tile(
                i.to(tl.int32), weight, absmax, code, nested_absmax, nested_code, nested_offset,
                p_a, p_b, p_out_scale, p_scratch,
                N, K, R, stride_n, stride_k, first_row, first_column, rows, columns,
                scaling,
                BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, DTYPE, PRECISION, ROWS, COLS, BLOCK_R,
            )  # fmt: skip


@triton.jit
def da_kernel(
    p_dz, p_x, p_a, p_mask, p_partial, p_da, p_dx,
    M, K, R,
    drop_scale,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, Y_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dA, summed over all rows in one program; narrow tiles make up for the missing split.

    With p_dx, the programs of the first rank block write drop(dZ·A) + Σ partial [SPLIT, M, K] there as well:
    dX of a base term in partial sums, or, without any (SPLIT 0), dX0, onto which a GEMM accumulates.
    """
    i_rank, i_k = tl.program_id(0), tl.program_id(1) * BLOCK_K
    b_da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for i_m in range(0, M, BLOCK_M):
        if p_da is not None:
            b_dz = load_tile(p_dz, i_m, i_rank * BLOCK_R, M, R, BLOCK_M, BLOCK_R)
            b_x = load_tile(p_x, i_m, i_k, M, K, BLOCK_M, BLOCK_K)
            b_x = drop_tile(b_x, p_mask, i_m, i_k, M, K)
            b_da = dot(tl.trans(b_dz), b_x, b_da, PRECISION)
        if p_dx is not None:
            # Only the first rank block has rows to write.
            rows = tl.where(i_rank == 0, M, 0)
            b_dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            if p_dz is not None:
                for i_r in range(0, tl.where(i_rank == 0, R, 0), BLOCK_R):
                    b_z = load_tile(p_dz, i_m, i_r, M, R, BLOCK_M, BLOCK_R)
                    b_a = load_tile(p_a, i_r, i_k, R, K, BLOCK_R, BLOCK_K)
                    b_dx = dot(b_z, b_a, b_dx, Y_PRECISION)
                b_dx = drop_tile(b_dx * drop_scale, p_mask, i_m, i_k, rows, K)
            if p_partial is not None:
                for i_split in range(SPLIT):
                    p_next = p_partial + tl.cast(i_split, tl.int64) * M * K
                    b_dx += load_tile(p_next, i_m, i_k, rows, K, BLOCK_M, BLOCK_K)
            store_tile(p_dx, b_dx, i_m, i_k, rows, K)
    if p_da is not None:
        store_tile(p_da, b_da * drop_scale, i_rank * BLOCK_R, i_k, R, K)
