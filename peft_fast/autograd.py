"""One autograd formula per op: what is saved for the backward pass, and what is recomputed there.

lora_linear saves Z [M, R] fp32, the bit-packed dropout mask and references to the packed weight and the
adapters: 4·M·R bytes plus M·K/8 with dropout. X is kept where A takes a gradient, and only there: a frozen
layer, VeRA and IA3 hold none. Nothing of size [M, N] or [N, K], and no copy of X in another dtype. Only
where out_scale takes a gradient, the bias and the output Y are kept, by reference: no copy is made, but
writing Y in place before the backward pass raises.

loreft saves the m edited rows of its input [m, d], Z [m, q] fp32, the packed mask [m, d]/8 and references to
the row indices and the small operands; the input itself, by reference, where it is edited whole. With a
residual the rows are those of the sum, which is all that is kept of either.

Second derivatives of lora_linear are those of the reference, in plain PyTorch, of B and out_scale only where
X is kept; of loreft there are none.

A formula is an `autograd.Function`. In plain eager it is applied as it is; whatever has to see a
dispatcher op (`ops.runs_directly` decides) finds it registered at the op's Autograd key, where
`torch.library.register_autograd` would walk the schema at every call, which costs more than a small layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, reft_ops
from .formats import QuantizedWeight
from .ops import WEIGHT_FIELDS
from .reference import Gradients, Needs, ReftGradients, ReftNeeds, accumulation_dtype

_WEIGHT_TENSORS = sum(t == "Tensor" or t == "Tensor | None" for t in QuantizedWeight.__annotations__.values())

Run = Callable[..., tuple[Tensor, Tensor]]
RunReft = Callable[..., tuple[Tensor, Tensor, Tensor]]


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
        kept_x = x if lora_A.requires_grad else None
        ctx.save_for_backward(
            kept_x, lora_A, lora_B, z, dropout_mask, out_scale, *bias_and_y, *_tensors(weight)
        )
        ctx.weight_meta = weight[_WEIGHT_TENSORS:]
        ctx.bias_dtype = bias.dtype if bias is not None else None
        ctx.scalars = scalars
        return y, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _grad_z: None) -> tuple[Tensor | None, ...]:
        _, needs_x, _, needs_bias, needs_A, needs_B, _, needs_out_scale, *_ = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, lora_A, lora_B, z, dropout_mask, out_scale, bias, y, *tensors = ctx.saved_tensors
        weight = QuantizedWeight(*tensors, *ctx.weight_meta)
        formula = _differentiable_backward if torch.is_grad_enabled() else _lora_linear_backward
        if x is None:
            if torch.is_grad_enabled() and (needs_B or needs_out_scale):
                raise NotImplementedError(
                    "lora_linear: second derivatives of lora_B and out_scale take X, which is kept only "
                    "where lora_A requires gradients"
                )
            x = grad.new_empty((*grad.shape[:-1], weight.in_features))  # of which nothing is read
        dx, d_A, d_B, dbias, d_out_scale = formula(
            grad, x, weight, lora_A, lora_B, z, dropout_mask, out_scale, bias, y,
            Needs(needs_x, needs_A, needs_B, needs_bias, needs_out_scale), *ctx.scalars,
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


def _differentiable_backward(
    grad: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    _z: Tensor,
    dropout_mask: Tensor | None,
    out_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    needs: Needs,
    scaling: float,
    dropout_p: float,
    _backend: str,
) -> Gradients:
    """As `_lora_linear_backward`, for `create_graph`: by the reference, from Y and Z computed again."""
    grad, rows = grad.reshape(-1, weight.out_features), x.reshape(-1, weight.in_features)
    operands = (lora_A, lora_B, dropout_mask, out_scale, scaling, dropout_p)
    again, z = reference.lora_linear(rows, weight, bias, *operands)
    grads = reference.lora_linear_backward(
        grad, rows, weight, lora_A, lora_B, z, dropout_mask, out_scale, bias, again, scaling, dropout_p, needs
    )
    return grads if grads.x is None else grads._replace(x=grads.x.reshape(x.shape))


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


class _LoReFT(torch.autograd.Function):
    """Arguments of `reft_ops.loreft` after the function that runs it; differentiable in the first output."""

    @staticmethod
    def forward(
        ctx: Any,
        run: RunReft,
        h: Tensor,
        residual: Tensor | None,
        rows: Tensor | None,
        projection: Tensor,
        bias: Tensor | None,
        basis: Tensor,
        dropout_mask: Tensor | None,
        *scalars: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, z, kept = run(h, residual, rows, projection, bias, basis, dropout_mask, *scalars)
        ctx.mark_non_differentiable(z, kept)
        ctx.set_materialize_grads(False)
        states = h if rows is None and residual is None else kept
        ctx.save_for_backward(states, rows, projection, bias, basis, z, dropout_mask)
        ctx.scalars = scalars
        return out, z, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        _, needs_h, needs_residual, _, *needs_operands = ctx.needs_input_grad[:7]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ReftNeeds(needs_h or needs_residual, *needs_operands)
        kept, rows, projection, bias, basis, z, dropout_mask = ctx.saved_tensors
        with torch.no_grad():
            grads = _loreft_backward(
                grad, kept, rows, projection, bias, basis, z, dropout_mask, needs, *ctx.scalars
            )
        dh, *d_operands = _FirstOrder.link(grads, (grad, kept, projection, bias, basis))
        return (
            None, dh if needs_h else None, dh if needs_residual else None, None, *d_operands,
            None, None, None, None, None,
        )  # fmt: skip


class _FirstOrder(torch.autograd.Function):
    """Gradients as they are; raises where they are differentiated in turn.

    torch's `once_differentiable` raises in a node of its own, which leads to no leaf, so that
    `torch.autograd.grad` with respect to some leaves passes over it and is silently wrong.
    """

    @classmethod
    def link(cls, grads: ReftGradients, sources: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """`grads`, as functions of `sources` that cannot be differentiated."""
        if not torch.is_grad_enabled():
            return grads
        present = [grad for grad in grads if grad is not None]
        linked = iter(cls.apply(len(present), *present, *sources))
        return tuple(None if grad is None else next(linked) for grad in grads)

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[:count] if grad is not None)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError("loreft: second derivatives are not implemented")


def _loreft_backward(
    grad: Tensor,
    kept: Tensor,
    rows: Tensor | None,
    projection: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    z: Tensor,
    dropout_mask: Tensor | None,
    needs: ReftNeeds,
    dropout_p: float,
    drop_state: bool,
    act: str,
    backend: str,
) -> ReftGradients:
    operands = [t for t in (grad, kept, projection, bias, basis) if t is not None]
    args = (
        grad, kept, rows, projection, bias, basis, z, dropout_mask, dropout_p, drop_state, act,
    )  # fmt: skip
    if ops.runs_directly(operands, (rows, z, dropout_mask)):
        with torch._C._AutoDispatchBelowAutograd():
            return reft_ops.loreft_backward(*args, needs, backend)
    grads = torch.ops.peft_fast.loreft_backward(*args, *needs, backend)
    return ReftGradients(*(g if needed else None for g, needed in zip(grads, needs, strict=True)))


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
    backend: str,
) -> Tensor:
    """The first output of `reft_ops.loreft`, differentiable, and called as `lora_linear` is."""
    operands = [t for t in (h, residual, projection, bias, basis) if t is not None]
    args = (
        h, residual, rows, projection, bias, basis, dropout_mask, float(dropout_p), drop_state, act, backend,
    )  # fmt: skip
    if not ops.runs_directly(operands, (rows, dropout_mask)):
        return torch.ops.peft_fast.loreft(*args)[0]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        return _apply_reft_directly(_reft_directly, *args)[0]
    return _reft_directly(*args)[0]


_apply_reft_directly = super(torch.autograd.Function, _LoReFT).apply


def _reft_directly(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return reft_ops.loreft(*args)


def _redispatch_reft(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.peft_fast.loreft(*args)


def _loreft_op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return _LoReFT.apply(_redispatch_reft, *args)
    return _redispatch_reft(*args)


ops._library.impl("loreft", _loreft_op, "Autograd")


class _TimesWeight(torch.autograd.Function):
    """P·Ŵ; differentiable in P."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, weight: QuantizedWeight, backend: str) -> Tensor:
        ctx.save_for_backward(*_tensors(weight))
        ctx.weight_meta, ctx.backend = weight[_WEIGHT_TENSORS:], backend
        no_A, no_B = p.new_empty(0, weight.in_features), p.new_empty(weight.out_features, 0)
        x = p.new_empty(len(p), weight.in_features)
        z = p.new_empty(len(p), 0, dtype=accumulation_dtype(p.dtype))
        needs = Needs(x=True, lora_A=False, lora_B=False, bias=False, out_scale=False)
        product = _lora_linear_backward(
            p, x, weight, no_A, no_B, z, None, None, None, None, needs, 1.0, 0.0, backend
        ).x
        assert product is not None
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = QuantizedWeight(*ctx.saved_tensors, *ctx.weight_meta)
        no_A, no_B = grad.new_empty(0, weight.in_features), grad.new_empty(weight.out_features, 0)
        return lora_linear(grad, weight, None, no_A, no_B, None, None, 1.0, 0.0, ctx.backend), None, None


def times_weight(p: Tensor, weight: QuantizedWeight, backend: str = "auto") -> Tensor:
    """P·Ŵ [r, K] of P [r, N], in its dtype: a thin pass over the packed weight, as dX of `lora_linear` is."""
    return _TimesWeight.apply(p, weight, backend)
