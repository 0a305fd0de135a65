"""The gradients of lora_linear by each strategy; lora_linear.py has the overview."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from peft_fast.formats import from_dense

from . import configs
from .dequantize import write_args
from .launch import TL_DTYPES, empty, launch, precision, weight_args
from .linear import dx_kernel, splitk_dx_kernel
from .low_rank import da_kernel, sum_kernel, up_backward_kernel
from .operands import Operands, panel, panels, scratch_for, write_panel


class Sums(NamedTuple):
    """dZ [M, R], dB [N, R], dbias [N] and d_out_scale [N], where asked for."""

    dz: Tensor | None
    d_B: Tensor | None
    dbias: Tensor | None
    d_out_scale: Tensor | None


class Partials(NamedTuple):
    """Their partial sums, how many there are of dZ and of the others, and the sums that they belong to."""

    tensors: tuple[Tensor | None, ...]
    chunks: int
    split: int
    results: Sums

    @property
    def programs(self) -> int:
        return sum(triton.cdiv(t.numel(), configs.SUM["BLOCK"]) for t in self.results if t is not None)


def up_backward(
    o: Operands, grad: Tensor, z: Tensor, bias: Tensor | None, y: Tensor | None, sums: Sums
) -> Partials:
    """One read of grad [M, N]."""
    (M, N, _, R), device = o.sizes, grad.device
    if R == 0:
        sums = sums._replace(dz=None, d_B=None)
    tiles = configs.UP_BACKWARD if o.out_scale is None else configs.UP_BACKWARD_OUT_SCALE
    tile, block_r = configs.by_rows(tiles, M, grad), configs.rank_block(R, grad)
    ranks = 1 if sums.dz is None and sums.d_B is None else triton.cdiv(R, block_r)
    chunks, columns, split = configs.chunks(
        triton.cdiv(N, tile["BLOCK_N"]), ranks, triton.cdiv(M, tile["BLOCK_M"])
    )
    partials = tuple(
        None if result is None else empty((n, *result.shape), torch.float32, device)
        for result, n in zip(sums, (chunks, split, split, split), strict=True)
    )
    if any(partial is not None for partial in partials):
        launch(
            up_backward_kernel, (ranks, chunks, split), device,
            grad, o.lora_B, z, o.out_scale, bias, y, *partials,
            M, N, R, columns,
            SPLIT=split, PRECISION=precision(device), BLOCK_R=block_r, **tile,
        )  # fmt: skip
    return Partials(partials, chunks, split, sums)


def add_partials(o: Operands, partials: Partials, buffer: Tensor | None = None, merge: bool = False) -> None:
    """The sums, and beside them the first panel of the scaled weight in `buffer`."""
    (M, N, K, R), device = o.sizes, o.x.device
    programs = partials.programs
    if programs == 0 and buffer is not None:
        write_panel(o, buffer, merge)
        return
    arguments: dict[str, Any] = {}
    if buffer is not None:
        tiles, arguments = write_args(o.weight, 0, 0, buffer)
        programs += tiles
        arguments |= {
            "p_scratch": buffer, "p_out_scale": o.out_scale, "K": K, "DTYPE": TL_DTYPES[o.x.dtype],
            "BLOCK_R": configs.rank_block(R, o.x), **({"p_a": o.lora_A, "p_b": o.lora_B} if merge else {}),
        }  # fmt: skip
    launch(
        sum_kernel, (programs,), device,
        *partials.tensors, *partials.results,
        M, N, R, partials.chunks,
        o.scaling,
        SPLIT=partials.split, PRECISION=precision(device, o.x.dtype), **configs.SUM, **arguments,
    )  # fmt: skip


def splitk(o: Operands, grad: Tensor, partials: Partials, d_A: Tensor | None, dx: Tensor) -> None:
    (M, N, K, R), device = o.sizes, grad.device
    tensors, strides, decoding = weight_args(o.weight)
    tile, split = configs.splitk(M, K, N, o.x)
    dx_partial = empty((split, M, K), torch.float32, device)
    programs = triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.columns) * split + partials.programs
    launch(
        splitk_dx_kernel, (programs,), device,
        grad, *tensors, o.out_scale, dx_partial, *partials.tensors, *partials.results,
        M, N, K, R, *strides, partials.chunks,
        o.scaling,
        SPLIT=split, UP_SPLIT=partials.split, PRECISION=precision(device),
        BLOCK_M=tile.rows, BLOCK_N=tile.depth, BLOCK_K=tile.columns, BLOCK=configs.SUM["BLOCK"],
        num_warps=tile.warps, num_stages=tile.stages, **decoding,
    )  # fmt: skip
    da(o, partials.results.dz, d_A, dx, dx_partial)


def main_loop(
    o: Operands, grad: Tensor, partials: Partials, d_A: Tensor | None, dx: Tensor, from_scratch: bool
) -> None:
    (M, N, K, R), device, dz = o.sizes, grad.device, partials.results.dz
    buffer = panel(scratch_for(o, N * K), N, K) if from_scratch else None
    add_partials(o, partials, buffer)
    tensors, strides, decoding = weight_args(o.weight if buffer is None else from_dense(buffer))
    block_m = configs.row_block(M, o.x, decoding["ALIGNED"])
    rows = triton.cdiv(M, block_m)
    launch(
        dx_kernel, lambda meta: (rows * triton.cdiv(K, meta["BLOCK_K"]),), device,
        grad, *tensors, o.lora_A, dz, o.dropout_mask, o.out_scale if buffer is None else None, dx,
        M, N, K, R, *strides,
        o.drop_scale,
        PRECISION=precision(device, o.x.dtype), BLOCK_M=block_m, BLOCK_R=configs.RANK_STEP, **decoding,
    )  # fmt: skip
    da(o, dz, d_A)


def library(
    o: Operands, grad: Tensor, partials: Partials, d_A: Tensor | None, dx: Tensor, merge: bool
) -> Tensor:
    (_, N, K, R), dz = o.sizes, partials.results.dz
    accumulate = not merge and R > 0
    parts = panels(o, K, N)
    space = scratch_for(o, parts[0][1] * N)
    for first, columns in parts:
        buffer = panel(space, N, columns)
        if first == 0:
            add_partials(o, partials, buffer, merge)
            da(o, dz, d_A, dx if accumulate else None)
            dx = dx.to(o.x.dtype)
        else:
            write_panel(o, buffer, merge, first_column=first)
        w = o.weight.weight if buffer is None else buffer.to(o.x.dtype)
        part = dx[:, first : first + columns]
        if accumulate:
            part.addmm_(grad, w)
        else:
            torch.mm(grad, w, out=part)
    return dx


def da(
    o: Operands,
    dz: Tensor | None,
    d_A: Tensor | None,
    dx: Tensor | None = None,
    dx_partial: Tensor | None = None,
) -> None:
    """dA [R, K]; in `dx` [M, K] the partial sums dx_partial [split, M, K] and drop(dZ·A)."""
    (M, _, K, R), device = o.sizes, o.x.device
    block_r = configs.rank_block(R, o.x)
    tile = configs.by_rows(configs.DA if dx is None else configs.DA_DX, M, o.x)
    if R == 0:
        d_A = None
    if d_A is None and dx is None:
        return
    ranks = 1 if d_A is None else triton.cdiv(R, block_r)
    launch(
        da_kernel, (ranks, triton.cdiv(K, tile["BLOCK_K"])), device,
        dz, o.x, o.lora_A, o.dropout_mask, dx_partial, d_A, dx,
        M, K, R,
        o.drop_scale,
        SPLIT=0 if dx_partial is None else len(dx_partial),
        PRECISION=precision(device), Y_PRECISION=precision(device, o.x.dtype), BLOCK_R=block_r, **tile,
    )  # fmt: skip
