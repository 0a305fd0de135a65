"""loreft in Triton: at most two launches forward, at most four backward.

    forward   1  out = H = h + residual                    only where rows are given: a copy, or PyTorch's add
              2  Z = H_S·Pᵀ + [b; 0], U = act(Z₁) − Z₂,    a program takes a block of rows and goes over d
                 out_S = H_S + drop(U·R), or               twice; without rows it forms H itself
                 drop(H_S + U·R)
    backward  1  dH = G                                    a copy, only where rows are given
              2  dU = drop(G_S)·Rᵀ, dZ = [dU ⊙ act'(Z₁); −dU], dH_S = G_S or drop(G_S), plus dZ·P
              3  dP = dZᵀ·H_S, dR = Uᵀ·drop(G_S), db = Σ dZ₁   a program takes a stripe of columns
              4  their partial sums added, where d is too small for one program each to fill a device

Shapes: H [M, d], rows [m], P [q, d] with q = TERMS·r, b [r], R [r, d], any r ≥ 0; U is computed again from Z
in the backward. A program reads its rows twice, once for Z and once for out (dU and dH), the second time from
L2 where it holds them. Of size [m, d] are written only the result and, where it is not h itself, H_S; the
largest temporaries are up to 16 partial sums of dP and dR. Given rows are edited in the copy, of which a
program touches its own only. A row below 0 or not below M is loaded as zeros and not stored.

No atomics: results are the same bits on every run. Dropout multiplies by 1/(1−p) after the products, so that
half-precision operands reach the tensor cores unrounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.reference import ReftGradients, ReftNeeds, dropout_scale

from . import configs
from .launch import empty, launch, precision, storable
from .low_rank import sum_kernel
from .tiles import (
    activation,
    activation_slope,
    cast,
    dot,
    drop_tile,
    load_rows,
    load_tile,
    load_vector,
    selected_rows,
    store_rows,
    store_tile,
)


@triton.jit
def load_edit(
    p_z, p_bias, i_m, i_r, m, R,
    TERMS: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(U, Z₁) [BLOCK_M, BLOCK_R] of a rank block."""
    o_m = i_m + tl.arange(0, BLOCK_M)
    p_z += tl.cast(o_m, tl.int64) * (TERMS * R)
    if TERMS == 0:
        b_z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32) + load_vector(p_bias, i_r, R, 0.0, BLOCK_R)[None, :]
    else:
        b_z = load_rows(p_z, o_m < m, i_r, R, BLOCK_R)
    b_u = activation(b_z, ACT)
    if TERMS == 2:
        b_u -= load_rows(p_z + R, o_m < m, i_r, R, BLOCK_R)
    return b_u, b_z


@triton.jit
def loreft_kernel(
    p_h, p_residual, p_rows, p_projection, p_bias, p_basis, p_mask, p_out, p_z, p_kept,
    M, m, D, R,
    drop_scale,
    TERMS: tl.constexpr, ACT: tl.constexpr, DROP_STATE: tl.constexpr, MORE_RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Z, H_S (None: it is h) and the edited rows of out, a block of rows a program.

    With rows given, p_h is p_out: a copy of H that is edited in place. MORE_RANKS: R is more than BLOCK_R.
    """
    i_m = tl.program_id(0) * BLOCK_M
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_row, m_valid = selected_rows(p_rows, i_m, m, M, BLOCK_M)
    p_h += o_row * D
    p_out += o_row * D
    if p_residual is not None:
        p_residual += o_row * D
    if p_kept is not None:
        p_kept += tl.cast(o_m, tl.int64) * D

    # Without columns of Z there is still H_S to write.
    for i_q in range(0, tl.maximum(TERMS * R, 1), BLOCK_R):
        b_z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i_d in range(0, D, BLOCK_D):
            b_h = load_rows(p_h, m_valid, i_d, D, BLOCK_D)
            if p_residual is not None:
                b_residual = load_rows(p_residual, m_valid, i_d, D, BLOCK_D)
                b_h = cast(b_h.to(tl.float32) + b_residual.to(tl.float32), p_h.dtype.element_ty)
            if p_kept is not None:
                store_rows(p_kept, b_h, (o_m < m) & (i_q == 0), i_d, D)
            if TERMS > 0:
                b_p = load_tile(p_projection, i_q, i_d, TERMS * R, D, BLOCK_R, BLOCK_D)
                b_z = dot(b_h, tl.trans(b_p), b_z, PRECISION)
        if TERMS > 0:
            if p_bias is not None:
                b_z += load_vector(p_bias, i_q, R, 0.0, BLOCK_R)[None, :]
            store_tile(p_z, tl.where(m_valid[:, None], b_z, 0.0), i_m, i_q, m, TERMS * R)
    # H_S and Z are read below by other threads of this program than wrote them.
    tl.debug_barrier()

    if p_kept is not None:
        p_h = p_kept
    b_first_u, _ = load_edit(p_z, p_bias, i_m, 0, m, R, TERMS, ACT, BLOCK_M, BLOCK_R)
    for i_d in range(0, D, BLOCK_D):
        b_basis = load_tile(p_basis, 0, i_d, R, D, BLOCK_R, BLOCK_D)
        b_edit = dot(b_first_u, b_basis, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), PRECISION)
        if MORE_RANKS:
            for i_r in range(BLOCK_R, R, BLOCK_R):
                b_u, _ = load_edit(p_z, p_bias, i_m, i_r, m, R, TERMS, ACT, BLOCK_M, BLOCK_R)
                b_basis = load_tile(p_basis, i_r, i_d, R, D, BLOCK_R, BLOCK_D)
                b_edit = dot(b_u, b_basis, b_edit, PRECISION)
        b_h = load_rows(p_h, m_valid, i_d, D, BLOCK_D).to(tl.float32)
        if DROP_STATE:
            b_out = drop_tile((b_h + b_edit) * drop_scale, p_mask, i_m, i_d, m, D)
        else:
            b_out = b_h + drop_tile(b_edit * drop_scale, p_mask, i_m, i_d, m, D)
        store_rows(p_out, b_out, m_valid, i_d, D)


@triton.jit
def loreft_rows_backward_kernel(
    p_g, p_rows, p_projection, p_bias, p_basis, p_z, p_mask, p_dz, p_dh,
    M, m, D, R,
    drop_scale,
    TERMS: tl.constexpr, ACT: tl.constexpr, DROP_STATE: tl.constexpr, MORE_RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dZ [m, max(TERMS, 1)·r] and the edited rows of dH (None: left out), a block of rows a program.

    With rows given and dH asked for, p_g is p_dh: a copy of G that is changed in place. MORE_RANKS: Z has
    more columns than BLOCK_R.
    """
    i_m = tl.program_id(0) * BLOCK_M
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_row, m_valid = selected_rows(p_rows, i_m, m, M, BLOCK_M)
    p_g += o_row * D
    p_dz_row = p_dz + tl.cast(o_m, tl.int64) * (max(TERMS, 1) * R)
    for i_r in range(0, R, BLOCK_R):
        b_du = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i_d in range(0, D, BLOCK_D):
            b_g = drop_tile(load_rows(p_g, m_valid, i_d, D, BLOCK_D), p_mask, i_m, i_d, m, D)
            b_basis = load_tile(p_basis, i_r, i_d, R, D, BLOCK_R, BLOCK_D)
            b_du = dot(b_g, tl.trans(b_basis), b_du, PRECISION)
        b_du *= drop_scale
        _, b_z = load_edit(p_z, p_bias, i_m, i_r, m, R, TERMS, ACT, BLOCK_M, BLOCK_R)
        store_rows(p_dz_row, b_du * activation_slope(b_z, ACT), o_m < m, i_r, R)
        if TERMS == 2:
            store_rows(p_dz_row + R, -b_du, o_m < m, i_r, R)

    if p_dh is not None:
        # dZ was written by other threads of this program.
        tl.debug_barrier()
        p_dh += o_row * D
        if TERMS > 0:
            b_first_dz = load_tile(p_dz, i_m, 0, m, TERMS * R, BLOCK_M, BLOCK_R)
        for i_d in range(0, D, BLOCK_D):
            b_dh = load_rows(p_g, m_valid, i_d, D, BLOCK_D).to(tl.float32)
            if DROP_STATE:
                b_dh = drop_tile(b_dh * drop_scale, p_mask, i_m, i_d, m, D)
            if TERMS > 0:
                b_p = load_tile(p_projection, 0, i_d, TERMS * R, D, BLOCK_R, BLOCK_D)
                b_dh = dot(b_first_dz, b_p, b_dh, PRECISION)
                if MORE_RANKS:
                    for i_q in range(BLOCK_R, TERMS * R, BLOCK_R):
                        b_dz = load_tile(p_dz, i_m, i_q, m, TERMS * R, BLOCK_M, BLOCK_R)
                        b_p = load_tile(p_projection, i_q, i_d, TERMS * R, D, BLOCK_R, BLOCK_D)
                        b_dh = dot(b_dz, b_p, b_dh, PRECISION)
            store_rows(p_dh, b_dh, m_valid, i_d, D)


@triton.jit
def loreft_columns_backward_kernel(
    p_g, p_kept, p_rows, p_bias, p_z, p_dz, p_mask, p_dp, p_dbias, p_dbasis,
    M, m, D, R,
    drop_scale,
    SPLIT: tl.constexpr, TERMS: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums over the rows of dP [SPLIT, q, d], db [SPLIT, r] and dR [SPLIT, r, d].

    Program (stripe of columns, block, split) takes every SPLIT-th block of rows, in order. The first blocks
    are those of the columns of dZ, for dP and db, the others are rank blocks of dR. Results that are not
    asked for are None, and then their blocks are left out.
    """
    i_d, i_block, i_split = tl.program_id(0) * BLOCK_D, tl.program_id(1), tl.program_id(2)
    b_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    n_blocks = 0
    if p_dp is not None or p_dbias is not None:
        columns = max(TERMS, 1) * R
        n_blocks = tl.cdiv(columns, BLOCK_R)
        if i_block < n_blocks:
            i_q = i_block * BLOCK_R
            b_dbias = tl.zeros((BLOCK_R,), tl.float32)
            for i_m in range(i_split * BLOCK_M, m, SPLIT * BLOCK_M):
                b_dz = load_tile(p_dz, i_m, i_q, m, columns, BLOCK_M, BLOCK_R)
                if p_dp is not None:
                    b_h = load_tile(p_kept, i_m, i_d, m, D, BLOCK_M, BLOCK_D)
                    b_sum = dot(tl.trans(b_dz), b_h, b_sum, PRECISION)
                if p_dbias is not None:
                    b_dbias += tl.sum(b_dz, 0)
            if p_dp is not None:
                p_dp += tl.cast(i_split, tl.int64) * columns * D
                store_tile(p_dp, b_sum, i_q, i_d, columns, D)
            if p_dbias is not None and i_d == 0:
                o_r = i_q + tl.arange(0, BLOCK_R)
                tl.store(p_dbias + tl.cast(i_split, tl.int64) * R + o_r, b_dbias, mask=o_r < R)
    if p_dbasis is not None and i_block >= n_blocks:
        i_r = (i_block - n_blocks) * BLOCK_R
        for i_m in range(i_split * BLOCK_M, m, SPLIT * BLOCK_M):
            o_row, m_valid = selected_rows(p_rows, i_m, m, M, BLOCK_M)
            b_g = load_rows(p_g + o_row * D, m_valid, i_d, D, BLOCK_D)
            b_g = drop_tile(b_g, p_mask, i_m, i_d, m, D)
            b_u, _ = load_edit(p_z, p_bias, i_m, i_r, m, R, TERMS, ACT, BLOCK_M, BLOCK_R)
            b_sum = dot(tl.trans(b_u), b_g, b_sum, PRECISION)
        p_dbasis += tl.cast(i_split, tl.int64) * R * D
        store_tile(p_dbasis, b_sum * drop_scale, i_r, i_d, R, D)


def loreft(
    h: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    projection: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    dropout_mask: Tensor | None,
    dropout_p: float,
    drop_state: bool,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.loreft`, for contiguous operands, but a row not below M is skipped, not an error."""
    (M, D), R, device = h.shape, len(basis), h.device
    m = M if rows is None else len(rows)
    kept = None if rows is None and residual is None else empty((m, D), h.dtype, device)
    if rows is None:
        states, out = h, empty((M, D), h.dtype, device)
    else:
        states = out = storable(h.clone() if residual is None else torch.add(h, residual))
        residual = None
    z = empty((m, len(projection)), torch.float32, device)
    tile, block_r = configs.reft_rows(m, h), configs.rank_block(max(R, len(projection)), h)
    launch(
        loreft_kernel, (triton.cdiv(m, tile["BLOCK_M"]),), device,
        states, residual, rows, projection, bias, basis, dropout_mask, out, z, kept,
        M, m, D, R,
        1.0 if dropout_mask is None else dropout_scale(dropout_p),
        TERMS=_terms(projection, basis), ACT=act, DROP_STATE=drop_state, MORE_RANKS=block_r < R,
        PRECISION=precision(device), BLOCK_R=block_r, **tile,
    )  # fmt: skip
    return out.to(h.dtype), z, h.new_empty((0, D)) if kept is None else kept.to(h.dtype)


def loreft_backward(
    grad: Tensor,
    kept: Tensor,
    rows: Tensor | None,
    projection: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    z: Tensor,
    dropout_mask: Tensor | None,
    dropout_p: float,
    drop_state: bool,
    act: str,
    needs: ReftNeeds,
) -> ReftGradients:
    """As `reference.loreft_backward`, for contiguous operands."""
    (M, D), R, m, device = grad.shape, len(basis), len(z), grad.device
    terms, block_r = _terms(projection, basis), configs.rank_block(max(R, len(projection)), grad)
    drop_scale = 1.0 if dropout_mask is None else dropout_scale(dropout_p)
    dh = dz = None
    if needs.h:
        dh = empty((M, D), grad.dtype, device) if rows is None else storable(grad.clone())
    if needs.h or needs.projection or needs.bias:
        dz = empty((m, max(terms, 1) * R), torch.float32, device)
        tile = configs.reft_rows(m, grad)
        launch(
            loreft_rows_backward_kernel, (triton.cdiv(m, tile["BLOCK_M"]),), device,
            grad if rows is None or dh is None else dh,
            rows, projection, bias, basis, z, dropout_mask, dz, dh,
            M, m, D, R,
            drop_scale,
            TERMS=terms, ACT=act, DROP_STATE=drop_state, MORE_RANKS=block_r < len(projection),
            PRECISION=precision(device), BLOCK_R=block_r, **tile,
        )  # fmt: skip

    tile = configs.by_rows(configs.REFT_COLUMNS, m, grad)
    stripes = triton.cdiv(D, tile["BLOCK_D"])
    dz_blocks, basis_blocks = triton.cdiv(max(terms, 1) * R, block_r), triton.cdiv(R, block_r)
    # Whatever is needed, so that a gradient's bits do not depend on the others.
    split = configs.split(stripes * (dz_blocks + basis_blocks), triton.cdiv(m, tile["BLOCK_M"]))
    blocks = dz_blocks * (needs.projection or needs.bias) + basis_blocks * needs.basis
    stripes = stripes if needs.projection or needs.basis else 1
    results = [
        empty(shape, torch.float32, device) if needed else None
        for shape, needed in (
            (projection.shape, needs.projection), ((R,), needs.bias), (basis.shape, needs.basis)
        )
    ]  # fmt: skip
    d_P, d_bias, d_basis = results
    written = [t for t in results if t is not None and t.numel()]
    if written:
        partials = [
            t if t is None or split == 1 else empty((split, *t.shape), torch.float32, device) for t in results
        ]
        p_dp, p_dbias, p_dbasis = partials
        launch(
            loreft_columns_backward_kernel, (stripes, blocks, split), device,
            grad, kept, rows, bias, z, dz, dropout_mask, p_dp if terms else None, p_dbias, p_dbasis,
            M, m, D, R,
            drop_scale,
            SPLIT=split, TERMS=terms, ACT=act, PRECISION=precision(device), BLOCK_R=block_r, **tile,
        )  # fmt: skip
        if split > 1:
            # In the places of dZ [M, R], dB [N, R] and dbias [N]: dP [q, d], dR [r, d] and db [r].
            launch(
                sum_kernel, (sum(triton.cdiv(t.numel(), configs.SUM["BLOCK"]) for t in written),), device,
                p_dp, p_dbasis, p_dbias, None, d_P, d_basis, d_bias, None,
                len(projection), R, D, split,
                1.0,
                SPLIT=split, **configs.SUM,
            )  # fmt: skip
    return ReftGradients(None if dh is None else dh.to(grad.dtype), d_P, d_bias, d_basis)


def _terms(projection: Tensor, basis: Tensor) -> int:
    """How many columns Z has for each rank: 0, 1 or 2; 1 where there is no rank."""
    return len(projection) // len(basis) if len(basis) else 1
