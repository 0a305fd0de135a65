"""One autograd formula per op: what is saved for the backward pass, and what is recomputed there.

lora_linear saves X (alive in the graph anyway), Z [M, R] fp32, the bit-packed dropout mask and references to
the packed weight and the adapters: beyond X that is 4·M·R bytes plus M·K/8 with dropout. Nothing of size
[M, N] or [N, K], and no copy of X in another dtype.

The formula is an `autograd.Function` registered at the op's Autograd key. `torch.library.register_autograd`
does the same, but walks the schema of the op at every call, which costs more than a small layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .formats import QuantizedWeight
from .ops import WEIGHT_FIELDS, _library

_WEIGHT_TENSORS = sum(t == "Tensor" or t == "Tensor | None" for t in QuantizedWeight.__annotations__.values())
_NO_WEIGHT_GRAD = (None,) * WEIGHT_FIELDS


class _LoraLinear(torch.autograd.Function):
    """Arguments and results of the op; differentiable in x, bias, lora_A and lora_B, and in Y alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        y, z = _below_autograd(x, *args)
        weight, rest = args[:WEIGHT_FIELDS], args[WEIGHT_FIELDS:]
        bias, lora_A, lora_B, dropout_mask, scaling, dropout_p, backend = rest
        ctx.mark_non_differentiable(z)
        ctx.save_for_backward(x, *weight[:_WEIGHT_TENSORS], lora_A, lora_B, z, dropout_mask)
        ctx.weight_meta = weight[_WEIGHT_TENSORS:]
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.scalars = (scaling, dropout_p)
        ctx.backend = backend
        return y, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_z: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        weight = (*saved[:_WEIGHT_TENSORS], *ctx.weight_meta)
        lora_A, lora_B, z, dropout_mask = saved[_WEIGHT_TENSORS:]
        needs = ctx.needs_input_grad
        needs_x, (needs_bias, needs_A, needs_B) = needs[0], needs[1 + WEIGHT_FIELDS : 4 + WEIGHT_FIELDS]
        dx, d_A, d_B, dbias = torch.ops.peft_fast.lora_linear_backward(
            grad, x, *weight, lora_A, lora_B, z, dropout_mask, *ctx.scalars,
            needs_x, needs_A, needs_B, needs_bias, ctx.backend,
        )  # fmt: skip
        return (
            dx if needs_x else None,
            *_NO_WEIGHT_GRAD,
            dbias.to(ctx.bias_dtype) if needs_bias else None,
            d_A if needs_A else None,
            d_B if needs_B else None,
            None,
            None,
            None,
            None,
        )


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peft_fast.lora_linear(*args)


def _lora_linear(*args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _LoraLinear.apply(*args)
    return _below_autograd(*args)


_library.impl("lora_linear", _lora_linear, "Autograd")
