"""lora_linear in Triton, on the packed weight: two launches forward, at most four backward.

    forward   1  Z = drop(X)·Aᵀ                        fp32, in partial sums over K when M is small
              2  Y = X·Ŵᵀ + s·Z·Bᵀ + bias              Ŵ decoded in the main loop, one fp32 accumulator
    backward  1  dZ = s·G·B, dB = s·Gᵀ·Z, dbias = Σ G  one read of G = dY, partial sums
              2  the partial sums added, in a fixed order
              3  dX = G·Ŵ + drop(dZ·A)
              4  dA = dZᵀ·drop(X)

With out_scale [N], Y = out_scale ⊙ (X·Ŵᵀ + s·Z·Bᵀ) + bias, scaled in the accumulator. G ⊙ out_scale, which
takes the place of G in dZ, dB and dX, is not formed: out_scale multiplies the rows of B, dB and Ŵ instead, so
that G reaches the tensor cores as it is, unrounded and without a pass through registers. d_out_scale =
Σ G ⊙ (Y − bias) / out_scale joins the first launch, which then reads Y beside G. No launch is added.

Shapes: X [M, K], Ŵ [N, K], A [R, K], B [N, R], any R ≥ 0. Nothing of size [N, K] or a second [M, N] is
written; the largest temporaries are up to 16 partial sums of dB and, for training-size M, 8 of dZ. No
atomics: results are the same bits on every run with the same tiles. Dropout multiplies by 1/(1−p) after the
products, so that half-precision operands reach the tensor cores unrounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.formats import QuantizedWeight
from peft_fast.reference import Gradients, Needs, dropout_scale

from . import configs
from .decode import decode_tile
from .launch import empty, launch, precision, weight_args
from .tiles import cast, dot, drop_tile, grouped_order, load_tile, load_vector, store_tile


@triton.jit
def down_kernel(
    p_x, p_a, p_mask, p_z,
    M, K, R,
    drop_scale,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial sums [SPLIT, M, R] of Z; program (row block, rank block, split) strides over K by SPLIT."""
    i_m, i_r, i_split = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_R, tl.program_id(2)
    b_z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i_k in range(i_split * BLOCK_K, K, SPLIT * BLOCK_K):
        b_x = load_tile(p_x, i_m, i_k, M, K, BLOCK_M, BLOCK_K)
        b_x = drop_tile(b_x, p_mask, i_m, i_k, M, K)
        b_a = load_tile(p_a, i_r, i_k, R, K, BLOCK_R, BLOCK_K)
        b_z = dot(b_x, tl.trans(b_a), b_z, PRECISION)
    p_partial = p_z + tl.cast(i_split, tl.int64) * M * R
    store_tile(p_partial, b_z * drop_scale, i_m, i_r, M, R)


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
    if p_out_scale is not None:
        b_y *= load_vector(p_out_scale, i_n, N, 0.0, BLOCK_N)[None, :]
    if p_bias is not None:
        b_y += load_vector(p_bias, i_n, N, 0.0, BLOCK_N)[None, :]
    store_tile(p_y, b_y, i_m, i_n, M, N)


@triton.jit
def up_backward_kernel(
    p_g, p_b, p_z, p_out_scale, p_bias, p_y, p_dz, p_db, p_dbias, p_d_out_scale,
    M, N, R, columns,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums of dZ [chunks, M, R], dB [SPLIT, N, R], dbias and d_out_scale [SPLIT, N], before scaling.

    Program (chunk, rank block, split) reads `columns` column blocks of G, every SPLIT-th row block. Its sums
    of dB stay in registers; those of dZ grow in its own slice of the result, which L2 holds. Results that are
    not asked for are None.
    """
    i_chunk, i_rank, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
def sum_kernel(
    p_dz_partial, p_db_partial, p_dbias_partial, p_d_out_scale_partial, p_dz, p_db, p_dbias, p_d_out_scale,
    M, N, R, n_chunks,
    scaling,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dZ, dB, dbias and d_out_scale (None: left out) from partial sums, each in its share of the programs."""
    i_block = tl.program_id(0)
    if p_dz is not None:
        n_blocks = tl.cdiv(tl.cast(M, tl.int64) * R, BLOCK)
        if i_block < n_blocks:
            sum_partials(p_dz_partial, p_dz, i_block, n_chunks, tl.cast(M, tl.int64) * R, scaling, BLOCK)
        i_block -= n_blocks
    if p_db is not None:
        n_blocks = tl.cdiv(tl.cast(N, tl.int64) * R, BLOCK)
        if i_block >= 0 and i_block < n_blocks:
            sum_partials(p_db_partial, p_db, i_block, SPLIT, tl.cast(N, tl.int64) * R, scaling, BLOCK)
        i_block -= n_blocks
    if p_d_out_scale is not None:
        n_blocks = tl.cdiv(N, BLOCK)
        if i_block >= 0 and i_block < n_blocks:
            sum_partials(p_d_out_scale_partial, p_d_out_scale, i_block, SPLIT, N, 1.0, BLOCK)
        i_block -= n_blocks
    if p_dbias is not None and i_block >= 0:
        sum_partials(p_dbias_partial, p_dbias, i_block, SPLIT, N, 1.0, BLOCK)


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
def da_kernel(
    p_dz, p_x, p_mask, p_da,
    M, K, R,
    drop_scale,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dA, summed over all rows in one program; narrow tiles make up for the missing split."""
    i_k, i_r = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_R
    b_da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for i_m in range(0, M, BLOCK_M):
        b_dz = load_tile(p_dz, i_m, i_r, M, R, BLOCK_M, BLOCK_R)
        b_x = load_tile(p_x, i_m, i_k, M, K, BLOCK_M, BLOCK_K)
        b_x = drop_tile(b_x, p_mask, i_m, i_k, M, K)
        b_da = dot(tl.trans(b_dz), b_x, b_da, PRECISION)
    store_tile(p_da, b_da * drop_scale, i_r, i_k, R, K)


def lora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_mask: Tensor | None,
    out_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.lora_linear`: (Y [M, N] in x.dtype, Z [M, R] fp32), for contiguous operands."""
    (M, K), (N, R), device = x.shape, lora_B.shape, x.device
    tensors, strides, decoding = weight_args(weight)
    block_r, tile = configs.rank_block(R), configs.by_rows(configs.DOWN, M, x.dtype)
    rows, ranks = triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(R, block_r)
    split = configs.split(rows * ranks, triton.cdiv(K, tile["BLOCK_K"])) if N and R else 1
    y, z = empty((M, N), x.dtype, device), empty((M, R), torch.float32, device)
    partial = z if split == 1 else empty((split, M, R), torch.float32, device)
    launch(
        down_kernel, (rows, ranks, split), device,
        x, lora_A, dropout_mask, partial,
        M, K, R,
        1.0 if dropout_mask is None else dropout_scale(dropout_p),
        SPLIT=split, PRECISION=precision(device), BLOCK_R=block_r, **tile,
    )  # fmt: skip
    if y.numel():
        block_m = configs.row_block(M, x.dtype, decoding["ALIGNED"])
        rows = triton.cdiv(M, block_m)
        launch(
            linear_kernel, lambda meta: (rows * triton.cdiv(N, meta["BLOCK_N"]),), device,
            x, *tensors, bias, lora_B, out_scale, partial, z, y,
            M, N, K, R, *strides,
            scaling,
            SPLIT=split, PRECISION=precision(device), BLOCK_M=block_m, BLOCK_R=configs.RANK_STEP, **decoding,
        )  # fmt: skip
    return y.to(x.dtype), z


def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor,
    dropout_mask: Tensor | None,
    out_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: Needs,
) -> Gradients:
    """As `reference.lora_linear_backward`, for contiguous operands."""
    (M, K), (N, R), device = x.shape, lora_B.shape, x.device
    drop_scale = 1.0 if dropout_mask is None else dropout_scale(dropout_p)
    block_r = configs.rank_block(R)
    dz = empty((M, R), torch.float32, device) if needs.x or needs.lora_A else None
    d_B = empty((N, R), lora_B.dtype, device) if needs.lora_B else None
    dbias = empty((N,), torch.float32, device) if needs.bias else None
    d_out_scale = empty((N,), torch.float32, device) if needs.out_scale else None
    _up_backward(grad, lora_B, z, out_scale, bias, y, dz, d_B, dbias, d_out_scale, scaling, block_r)

    dx = d_A = None
    if needs.x:
        dx = empty((M, K), x.dtype, device)
    if dx is not None and dx.numel():
        tensors, strides, decoding = weight_args(weight)
        block_m = configs.row_block(M, x.dtype, decoding["ALIGNED"])
        rows = triton.cdiv(M, block_m)
        launch(
            dx_kernel, lambda meta: (rows * triton.cdiv(K, meta["BLOCK_K"]),), device,
            grad, *tensors, lora_A, dz, dropout_mask, out_scale, dx,
            M, N, K, R, *strides,
            drop_scale,
            PRECISION=precision(device), BLOCK_M=block_m, BLOCK_R=configs.RANK_STEP, **decoding,
        )  # fmt: skip
    if needs.lora_A:
        d_A = empty((R, K), lora_A.dtype, device)
        tile = configs.by_rows(configs.DA, M, x.dtype)
        launch(
            da_kernel, (triton.cdiv(K, tile["BLOCK_K"]), triton.cdiv(R, block_r)), device,
            dz, x, dropout_mask, d_A,
            M, K, R,
            drop_scale,
            PRECISION=precision(device), BLOCK_R=block_r, **tile,
        )  # fmt: skip
    return Gradients(
        None if dx is None else dx.to(x.dtype),
        None if d_A is None else d_A.to(lora_A.dtype),
        None if d_B is None else d_B.to(lora_B.dtype),
        dbias,
        d_out_scale,
    )


def _up_backward(
    grad: Tensor,
    lora_B: Tensor,
    z: Tensor,
    out_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    dz: Tensor | None,
    d_B: Tensor | None,
    dbias: Tensor | None,
    d_out_scale: Tensor | None,
    scaling: float,
    block_r: int,
) -> None:
    """Fills dZ [M, R], dB [N, R], dbias and d_out_scale [N], where not None, from one read of grad [M, N]."""
    (M, N), R, device = grad.shape, lora_B.shape[1], grad.device
    if R == 0:
        dz = d_B = None
    results = [t for t in (dz, d_B, dbias, d_out_scale) if t is not None]
    if not results:
        return
    tiles = configs.UP_BACKWARD if out_scale is None else configs.UP_BACKWARD_OUT_SCALE
    tile = configs.by_rows(tiles, M, grad.dtype)
    ranks = 1 if dz is None and d_B is None else triton.cdiv(R, block_r)
    chunks, columns, split = configs.chunks(
        triton.cdiv(N, tile["BLOCK_N"]), ranks, triton.cdiv(M, tile["BLOCK_M"])
    )
    partials = [
        None if result is None else empty((n, *result.shape), torch.float32, device)
        for result, n in ((dz, chunks), (d_B, split), (dbias, split), (d_out_scale, split))
    ]
    launch(
        up_backward_kernel, (chunks, ranks, split), device,
        grad, lora_B, z, out_scale, bias, y, *partials,
        M, N, R, columns,
        SPLIT=split, PRECISION=precision(device), BLOCK_R=block_r, **tile,
    )  # fmt: skip
    launch(
        sum_kernel, (sum(triton.cdiv(t.numel(), configs.SUM["BLOCK"]) for t in results),), device,
        *partials, dz, d_B, dbias, d_out_scale,
        M, N, R, chunks,
        scaling,
        SPLIT=split, **configs.SUM,
    )  # fmt: skip
