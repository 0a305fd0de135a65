"""One autograd formula per op: what is saved for the backward pass, and what is recomputed there.

lora_linear saves X (alive in the graph anyway), Z [M, R] fp32, the bit-packed dropout mask and references to
the packed weight and the adapters: beyond X that is 4·M·R bytes plus M·K/8 with dropout. Nothing of size
[M, N] or [N, K], and no copy of X in another dtype. Only where out_scale takes a gradient, the bias and the
output Y are kept, by reference: no copy is made, but writing Y in place before the backward pass raises.

The formula is an `autograd.Function`. In plain eager it is applied as it is; whatever has to see a
dispatcher op (`ops.runs_directly` decides) finds it registered at the op's Autograd key, where
`torch.library.register_autograd` would walk the schema at every call, which costs more than a small layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .formats import QuantizedWeight
from .ops import WEIGHT_FIELDS
from .reference import Gradients, Needs

_WEIGHT_TENSORS = sum(t == "Tensor" or t == "Tensor | None" for t in QuantizedWeight.__annotations__.values())

Run = Callable[..., tuple[Tensor, Tensor]]


class _LoraLinear(torch.autograd.Function):
    """Arguments of `ops.lora_linear` after the function that runs it; differentiable in Y alone."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        dropout_mask: Tensor | None,
        out_scale: Tensor | None,
        *scalars: Any,
    ) -> tuple[Tensor, Tensor]:
        y, z = run(x, weight, bias, lora_A, lora_B, dropout_mask, out_scale, *scalars)
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        bias_and_y = (bias, y) if out_scale is not None and out_scale.requires_grad else (None, None)
        ctx.save_for_backward(x, lora_A, lora_B, z, dropout_mask, out_scale, *bias_and_y, *_tensors(weight))
        ctx.weight_meta = weight[_WEIGHT_TENSORS:]
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.scalars = scalars
        return y, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _grad_z: None) -> tuple[Tensor | None, ...]:
        _, needs_x, _, needs_bias, needs_A, needs_B, _, needs_out_scale, *_ = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, lora_A, lora_B, z, dropout_mask, out_scale, bias, y, *weight = ctx.saved_tensors
        dx, d_A, d_B, dbias, d_out_scale = _lora_linear_backward(
            grad, x, QuantizedWeight(*weight, *ctx.weight_meta), lora_A, lora_B, z, dropout_mask, out_scale,
            bias, y, Needs(needs_x, needs_A, needs_B, needs_bias, needs_out_scale), *ctx.scalars,
        )  # fmt: skip
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return None, dx, None, dbias, d_A, d_B, None, d_out_scale, None, None, None


def _lora_linear_backward(
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
    needs: Needs,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> Gradients:
    operands = [t for t in (grad, x, lora_A, lora_B, out_scale, bias, y) if t is not None]
    rest = (lora_A, lora_B, z, dropout_mask, out_scale, bias, y, scaling, dropout_p)
    if ops.runs_directly(operands, (z, dropout_mask, *_tensors(weight))):
        with torch._C._AutoDispatchBelowAutograd():
            return ops.lora_linear_backward(grad, x, weight, *rest, needs, backend)
    grads = torch.ops.peft_fast.lora_linear_backward(grad, x, *weight, *rest, *needs, backend)
    return Gradients(*(g if needed else None for g, needed in zip(grads, needs, strict=True)))


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
    backend: str,
) -> Tensor:
    """Y of `ops.lora_linear`, differentiable: by plain calls, or as a dispatcher op where it must be one."""
    operands = [t for t in (x, lora_A, lora_B, bias, out_scale) if t is not None]
    rest = (bias, lora_A, lora_B, dropout_mask, out_scale)
    if not ops.runs_directly(operands, (dropout_mask, *_tensors(weight))):
        return torch.ops.peft_fast.lora_linear(x, *weight, *rest, scaling, dropout_p, backend)[0]
    args = (x, weight, *rest, float(scaling), float(dropout_p), backend)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        return _apply_directly(_directly, *args)[0]
    return _directly(*args)[0]


# `Function.apply` searches the arguments for functorch's wrappers, which `runs_directly` has excluded.
_apply_directly = super(torch.autograd.Function, _LoraLinear).apply


def _tensors(weight: QuantizedWeight) -> Any:
    return weight[:_WEIGHT_TENSORS]


def _directly(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return ops.lora_linear(*args)


def _redispatch(x: Tensor, weight: QuantizedWeight, *rest: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peft_fast.lora_linear(x, *weight, *rest)


def _lora_linear_op(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, rest = QuantizedWeight(*args[:WEIGHT_FIELDS]), args[WEIGHT_FIELDS:]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *rest):
        return _LoraLinear.apply(_redispatch, x, weight, *rest)
    return _redispatch(x, weight, *rest)


ops._library.impl("lora_linear", _lora_linear_op, "Autograd")
