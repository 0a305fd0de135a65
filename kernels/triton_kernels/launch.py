"""Host side of every launch: the device guard, allocation, and the arguments that all kernels take.

`launch` is the only place that starts a kernel.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from peft_fast.formats import QuantizedWeight

from . import target
from .tiles import INTERPRET

# The decode of a weight is a product, then a sum, with two roundings: no contraction.
OPTIONS = {"enable_fp_fusion": False}

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Triton's autotuner keeps the arguments of the running call on itself, so launches take turns.
_lock = threading.Lock()


def launch(kernel: Any, grid: Any, device: torch.device, *args: Any, **meta: Any) -> None:
    """Starts `kernel` on the current stream of `device`; an empty grid starts nothing."""
    if not callable(grid) and 0 in grid:
        return
    on_cpu = device.type == "cpu"
    guard = contextlib.nullcontext() if on_cpu else torch.get_device_module(device).device(device)
    with guard, _lock:
        kernel[grid](*args, **meta, **OPTIONS)


def held(dtype: torch.dtype) -> torch.dtype:
    """What kernels hold such a result in: fp32 for bfloat16 under the interpreter, which lacks it."""
    return torch.float32 if INTERPRET.value and dtype == torch.bfloat16 else dtype


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized result, held as a kernel can store it."""
    return torch.empty(shape, dtype=held(dtype), device=device)


def storable(t: Tensor) -> Tensor:
    """`t`, which the caller owns, for kernels to write to; an fp32 copy of bfloat16 under the interpreter."""
    return t.to(held(t.dtype))


def precision(device: torch.device, result: torch.dtype = torch.float32) -> str:
    """How kernels multiply fp32 operands: as `target.precision`, but by one TF32 product for a half result.

    TF32 holds 11 bits, as float16 does, and `tiles.dot` rounds to it: what the low-rank term then lacks is no
    more than what rounding the result to half precision takes from the whole.
    """
    exact = target.precision(target.arch(device))
    return "tf32" if exact == "tf32x3" and result != torch.float32 else exact


def weight_args(weight: QuantizedWeight) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], dict[str, Any]]:
    """The tensors, the dense strides (n, k) and the constexprs that `decode_tile` takes."""
    strides = weight.weight.stride() if weight.format == "dense" else (0, 0)
    meta = {
        # Without a table the scale is the row's: no code for each length of a row.
        "BLOCKSIZE": 0 if weight.code is None else weight.blocksize,
        "NESTED_BLOCKSIZE": weight.nested_blocksize,
        "ALIGNED": weight.format == "dense" or weight.in_features % weight.blocksize == 0,
    }
    return weight[:6], strides, meta
