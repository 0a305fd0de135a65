"""Ŵ [N, K] written out from its packed form in one launch, plain or with an adapter merged into it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.formats import QuantizedWeight

from . import configs
from .decode import decode_tile
from .launch import TL_DTYPES, empty, launch, precision, storable, weight_args
from .tiles import cast, dot, load_tile, load_vector, store_tile


@triton.jit
def write_tile(
    i_tile, weight, absmax, code, nested_absmax, nested_code, nested_offset, p_a, p_b, p_out_scale, p_out,
    N, K, R, stride_n, stride_k, first_row, first_column, rows, columns,
    scaling,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Tile i_tile of the panel [rows, columns] of out_scale ⊙ (Ŵ + s·B·A) at (first_row, first_column).

    Summed and scaled in fp32, rounded once to DTYPE. Without p_a and p_b nothing is merged, without
    p_out_scale nothing scaled. `first_column` is a multiple of COLS.
    """
    per_row = tl.cdiv(columns, COLS)
    i_row, i_column = i_tile // per_row * ROWS, i_tile % per_row * COLS
    i_n, i_k = first_row + i_row, first_column + i_column
    b_w = decode_tile(
        weight, absmax, code, nested_absmax, nested_code, nested_offset,
        i_n, i_k, N, K, stride_n, stride_k,
        BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, ROWS, COLS,
    )  # fmt: skip
    if p_a is not None:
        b_update = tl.zeros((ROWS, COLS), tl.float32)
        for i_r in range(0, R, RANKS):
            b_b = load_tile(p_b, i_n, i_r, N, R, ROWS, RANKS)
            b_a = load_tile(p_a, i_r, i_k, R, K, RANKS, COLS)
            b_update = dot(b_b, b_a, b_update, PRECISION)
        b_w = b_w.to(tl.float32) + b_update * scaling
    if p_out_scale is not None:
        b_w = b_w.to(tl.float32) * load_vector(p_out_scale, i_n, N, 0.0, ROWS)[:, None]
    store_tile(p_out, cast(b_w, DTYPE), i_row, i_column, rows, columns)


@triton.jit
def dequantize_kernel(
    weight, absmax, code, nested_absmax, nested_code, nested_offset, p_a, p_b, p_out_scale, p_out,
    N, K, R, stride_n, stride_k, first_row, first_column, rows, columns,
    scaling,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One tile a program."""
    write_tile(
        tl.program_id(0),
        weight, absmax, code, nested_absmax, nested_code, nested_offset, p_a, p_b, p_out_scale, p_out,
        N, K, R, stride_n, stride_k, first_row, first_column, rows, columns,
        scaling,
        BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, DTYPE, PRECISION, ROWS, COLS, RANKS,
    )  # fmt: skip


def write_args(
    weight: QuantizedWeight, first_row: int, first_column: int, out: Tensor
) -> tuple[int, dict[str, Any]]:
    """How many programs write the panel `out` [rows, columns] of a weight, and what `write_tile` takes."""
    tensors, (stride_n, stride_k), decoding = weight_args(weight)
    tile, (rows, columns) = configs.write_tile(out, decoding["ALIGNED"]), out.shape
    names = ("weight", "absmax", "code", "nested_absmax", "nested_code", "nested_offset")
    arguments = dict(zip(names, tensors, strict=True)) | {
        "stride_n": stride_n, "stride_k": stride_k,
        "first_row": first_row, "first_column": first_column, "rows": rows, "columns": columns,
    }  # fmt: skip
    return triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLS"]), arguments | decoding | tile


def write(
    weight: QuantizedWeight,
    out: Tensor,
    dtype: torch.dtype,
    *,
    first_row: int = 0,
    first_column: int = 0,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    out_scale: Tensor | None = None,
    scaling: float = 1.0,
) -> None:
    """The panel of out_scale ⊙ (Ŵ + s·B·A) at (first_row, first_column), rounded once, in one launch."""
    programs, arguments = write_args(weight, first_row, first_column, out)
    R = 0 if lora_A is None else len(lora_A)
    launch(
        dequantize_kernel, (programs,), out.device,
        p_a=lora_A, p_b=lora_B, p_out_scale=out_scale, p_out=out,
        N=weight.out_features, K=weight.in_features, R=R, scaling=scaling,
        DTYPE=TL_DTYPES[dtype], PRECISION=precision(out.device, dtype), RANKS=configs.rank_block(R, out),
        num_warps=configs.WRITE_WARPS, **arguments,
    )  # fmt: skip


def dequantize(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """As `reference.dequantize`, for a contiguous `out`."""
    if out is None:
        target = empty((weight.out_features, weight.in_features), dtype, weight.weight.device)
    else:
        target = storable(out)
    write(weight, target, dtype)
    if out is None:
        return target.to(dtype)
    return out if target is out else out.copy_(target)
