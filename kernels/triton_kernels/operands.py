"""What the launchers of lora_linear share: its operands, and the scratch for a decoded weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from peft_fast import scratch
from peft_fast.formats import QuantizedWeight
from peft_fast.reference import dropout_scale

from . import strategies
from .dequantize import write
from .launch import empty, held


class Operands(NamedTuple):
    """What both directions take, contiguous: X [M, K] and the operands of `reference.lora_linear`."""

    x: Tensor
    weight: QuantizedWeight
    lora_A: Tensor
    lora_B: Tensor
    dropout_mask: Tensor | None
    out_scale: Tensor | None
    scaling: float
    dropout_p: float

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, K, R."""
        return len(self.x), self.weight.out_features, self.weight.in_features, len(self.lora_A)

    @property
    def drop_scale(self) -> float:
        return 1.0 if self.dropout_mask is None else dropout_scale(self.dropout_p)

    def problem(self) -> strategies.Problem:
        w, (M, N, K, R) = self.weight, self.sizes
        return strategies.Problem(
            M, N, K, R, self.x.dtype, w.format, w.nested_absmax is not None,
            self.dropout_mask is not None, self.out_scale is not None,
        )  # fmt: skip


def is_operand(o: Operands) -> bool:
    """Whether a GEMM can read the weight as it is stored."""
    return o.weight.format == "dense" and o.weight.weight.dtype == o.x.dtype


def panels(o: Operands, size: int, width: int) -> list[tuple[int, int]]:
    """(first, count) of the rows or columns that are decoded at a time, each of `width` values."""
    if is_operand(o):
        return [(0, size)] if size else []
    return scratch.panels(size, width * held(o.x.dtype).itemsize)


def scratch_for(o: Operands, size: int) -> Tensor | None:
    """Room for `size` values of a decoded weight; None where a GEMM reads it as it is stored."""
    return None if is_operand(o) else empty((size,), o.x.dtype, o.x.device)


def panel(space: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """The first values of a scratch as a matrix."""
    return None if space is None else space[: rows * columns].view(rows, columns)


def write_panel(o: Operands, out: Tensor, merge: bool, **first: int) -> None:
    """A panel of the scaled weight by a launch of its own."""
    adapter = {"lora_A": o.lora_A, "lora_B": o.lora_B} if merge else {}
    write(o.weight, out, o.x.dtype, out_scale=o.out_scale, scaling=o.scaling, **first, **adapter)
