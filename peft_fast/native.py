"""The C++ backend: loads `peft_fast._C` (csrc/) on first use and adapts its ops to the backend signature.

The library is built on torch's stable ABI and registers the ops of namespace `peft_fast_cpu`, whose weight
arguments are the fields of `QuantizedWeight`. The instruction-set level is chosen at run time; naming one
(`cpu-avx512bf16`, `cpu-avx512`, `cpu-avx2`, `cpu-scalar`) forces it, and the environment variable
PEFT_FAST_CPU_LEVEL, read when the library loads, hides the better ones.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .formats import QuantizedWeight
from .reference import Gradients, Needs, ReftGradients, ReftNeeds

LEVELS = ("avx512bf16", "avx512", "avx2", "scalar")
BUILD_HINT = "build it with `pip install --no-build-isolation -e .` (needs a C++20 compiler)"


@functools.cache
def load_error() -> str | None:
    """Loads the library once; None when its ops are registered, else the reason."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return f"the C++ extension peft_fast._C is not built: {BUILD_HINT}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"the C++ extension {libraries[0].name} does not load ({error}): {BUILD_HINT}"
    return None


@functools.cache
def levels() -> tuple[str, ...]:
    """The instruction-set levels that this machine runs, best first; () without the library.

    Raises:
        ValueError: PEFT_FAST_CPU_LEVEL names no level.
    """
    if load_error() is not None:
        return ()
    best = os.environ.get("PEFT_FAST_CPU_LEVEL") or LEVELS[0]
    if best not in LEVELS:
        raise ValueError(f"PEFT_FAST_CPU_LEVEL: expected one of {list(LEVELS)}, got {best!r}")
    allowed = LEVELS[LEVELS.index(best) :]
    return tuple(level for level in allowed if torch.ops.peft_fast_cpu.level_available(level))


@functools.cache
def _op(name: str) -> Any:
    """An op of the library; naming the overload spares its resolution, a third of the cost of a call."""
    return getattr(torch.ops.peft_fast_cpu, name).default


def pack_mask(keep: Tensor) -> Tensor:
    """As `reference.pack_mask`, on the CPU."""
    return _op("pack_mask")(keep)


def _readable(weight: QuantizedWeight) -> QuantizedWeight:
    """`weight`; a dense one that is neither contiguous nor the transpose of such a matrix, copied."""
    stored = weight.weight
    if stored.is_contiguous() or weight.format != "dense" or stored.t().is_contiguous():
        return weight
    return weight._replace(weight=stored.contiguous())


class Level:
    """One instruction-set level as a backend; "" is the best one of this machine.

    The bits of a row of dX depend neither on the other rows nor on their number; with `batch_invariant` those
    of Y and Z do not either. Else a forward of few rows takes a faster way, which sums in another order.
    """

    def __init__(self, level: str = "", batch_invariant: bool = False) -> None:
        self.level = level
        self.batch_invariant = batch_invariant

    @functools.cached_property
    def _level(self) -> str:
        return self.level or levels()[0]

    def unavailable(self, format: str, device: str, dtype: torch.dtype) -> str | None:
        if device != "cpu":
            return f"runs on cpu tensors, got {device}"
        if (error := load_error()) is not None:
            return error
        if self.level and self.level not in levels():
            return f"this CPU lacks {self.level}, it has {', '.join(levels())}"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"takes float32, float16 or bfloat16 activations, got {dtype}"
        return None

    def lora_linear(
        self,
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
        return _op("lora_linear")(
            x, *_readable(weight), bias, lora_A, lora_B, dropout_mask, out_scale, scaling, dropout_p,
            self._level, self.batch_invariant,
        )  # fmt: skip

    def lora_linear_backward(
        self,
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
        grads = _op("lora_linear_backward")(
            grad, x, *_readable(weight), lora_A, lora_B, z, dropout_mask, out_scale, bias, y, scaling,
            dropout_p, *needs, self._level,
        )  # fmt: skip
        return Gradients(*(g if needed else None for g, needed in zip(grads, needs, strict=True)))

    def loreft(
        self,
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
        return _op("loreft")(
            h, residual, rows, projection, bias, basis, dropout_mask, dropout_p, drop_state, act, self._level
        )

    def loreft_backward(
        self,
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
        grads = _op("loreft_backward")(
            grad, kept, rows, projection, bias, basis, z, dropout_mask, dropout_p, drop_state, act, *needs,
            self._level,
        )  # fmt: skip
        return ReftGradients(*(g if needed else None for g, needed in zip(grads, needs, strict=True)))

    def dequantize(self, weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        decoded = _op("dequantize")(*_readable(weight), dtype, self._level)
        return decoded if out is None else out.copy_(decoded)
