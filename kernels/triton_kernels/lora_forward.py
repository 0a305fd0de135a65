"""Y and Z of lora_linear by each strategy; lora_linear.py has the overview."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from peft_fast.formats import from_dense

from . import configs
from .dequantize import write_args
from .launch import empty, launch, precision, weight_args
from .linear import linear_kernel, splitk_finish_kernel, splitk_linear_kernel
from .low_rank import down_kernel
from .operands import Operands, panel, panels, scratch_for, write_panel


def splitk(o: Operands, bias: Tensor | None, y: Tensor, z: Tensor) -> None:
    (M, N, K, R), device = o.sizes, o.x.device
    tensors, strides, decoding = weight_args(o.weight)
    tile, split = configs.splitk(M, N, K, o.x)
    block_r = configs.rank_block(R, o.x)
    rows, columns, ranks = triton.cdiv(M, tile.rows), triton.cdiv(N, tile.columns), triton.cdiv(R, block_r)
    down_split = configs.split(rows * ranks, triton.cdiv(K, tile.depth)) if N and R else 1
    partial = z if down_split == 1 else empty((down_split, M, R), torch.float32, device)
    y_partial = empty((split, M, N), torch.float32, device)
    shared = {"SPLIT": split, "DOWN_SPLIT": down_split, "BLOCK_R": block_r}
    launch(
        splitk_linear_kernel, (rows * (columns * split + ranks * down_split),), device,
        o.x, *tensors, o.lora_A, o.dropout_mask, partial, y_partial,
        M, N, K, R, *strides,
        o.drop_scale,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
        PRECISION=precision(device), num_warps=tile.warps, num_stages=tile.stages, **shared, **decoding,
    )  # fmt: skip
    finish = configs.FINISH
    programs = triton.cdiv(M, finish["BLOCK_M"]) * triton.cdiv(N, finish["BLOCK_N"])
    launch(
        splitk_finish_kernel, (programs,), device,
        y_partial, partial, o.lora_B, bias, o.out_scale, z, y,
        M, N, R,
        o.scaling,
        PRECISION=precision(device, o.x.dtype), **shared, **finish,
    )  # fmt: skip


def main_loop(o: Operands, bias: Tensor | None, y: Tensor, z: Tensor, from_scratch: bool) -> None:
    (M, N, K, R), device = o.sizes, o.x.device
    block_r, tile = configs.rank_block(R, o.x), configs.by_rows(configs.DOWN, M, o.x)
    rows, ranks = triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(R, block_r)
    split = configs.split(rows * ranks, triton.cdiv(K, tile["BLOCK_K"])) if N and R else 1
    partial = z if split == 1 else empty((split, M, R), torch.float32, device)
    buffer = panel(scratch_for(o, N * K), N, K) if from_scratch and y.numel() else None
    down(o, partial, tile, split, buffer, scaled=False)
    if y.numel() == 0:
        return
    tensors, strides, decoding = weight_args(o.weight if buffer is None else from_dense(buffer))
    block_m = configs.row_block(M, o.x, decoding["ALIGNED"])
    rows = triton.cdiv(M, block_m)
    launch(
        linear_kernel, lambda meta: (rows * triton.cdiv(N, meta["BLOCK_N"]),), device,
        o.x, *tensors, bias, o.lora_B, o.out_scale, partial, z, y,
        M, N, K, R, *strides,
        o.scaling,
        SPLIT=split, PRECISION=precision(device, o.x.dtype), BLOCK_M=block_m, BLOCK_R=configs.RANK_STEP,
        **decoding,
    )  # fmt: skip


def library(o: Operands, bias: Tensor | None, y: Tensor, z: Tensor, merge: bool) -> Tensor:
    (_, N, K, R), tile = o.sizes, configs.whole_rows(len(o.x), o.x)
    accumulate = not merge and R > 0
    parts = panels(o, N, K)
    space = scratch_for(o, parts[0][1] * K)
    for first, rows in parts:
        buffer = panel(space, rows, K)
        if first == 0:
            down(o, z, tile, 1, buffer, scaled=True, merge=merge, y=y if accumulate else None, bias=bias)
            y = y.to(o.x.dtype)
        else:
            write_panel(o, buffer, merge, first_row=first)
        w = o.weight.weight if buffer is None else buffer.to(o.x.dtype)
        part = y[:, first : first + rows]
        if accumulate:
            part.addmm_(o.x, w.t())
        elif bias is None:
            torch.mm(o.x, w.t(), out=part)
        else:
            torch.addmm(bias[first : first + rows].to(y.dtype), o.x, w.t(), out=part)
    return y


def down(
    o: Operands,
    z: Tensor,
    tile: dict[str, int],
    split: int,
    buffer: Tensor | None,
    scaled: bool,
    merge: bool = False,
    y: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Z [M, R], or its partial sums; Y0 in `y` [M, N] and the first panel of the weight in `buffer`."""
    (M, N, K, R), device = o.sizes, o.x.device
    block_r = configs.rank_block(R, o.x)
    programs = triton.cdiv(M, tile["BLOCK_M"]) * (1 if y is not None else triton.cdiv(R, block_r) * split)
    arguments: dict[str, Any] = {}
    if y is not None or buffer is not None:
        arguments = {
            "p_b": o.lora_B,
            "p_out_scale": o.out_scale if scaled else None,
            "N": N,
            "scaling": o.scaling,
        }
    if y is not None:
        arguments |= {"p_y": y, "p_bias": bias}
    if buffer is not None:
        tiles, write = write_args(o.weight, 0, 0, buffer)
        programs += tiles
        arguments |= {"p_scratch": buffer, "MERGE": merge, **write}
    launch(
        down_kernel, (programs,), device,
        o.x, o.lora_A, o.dropout_mask, z,
        M, K, R,
        o.drop_scale,
        SPLIT=split, PRECISION=precision(device), Y_PRECISION=precision(device, o.x.dtype), BLOCK_R=block_r,
        **tile, **arguments,
    )  # fmt: skip
