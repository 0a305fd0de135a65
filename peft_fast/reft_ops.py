"""Schemas, shape checks and fakes of `loreft` and its backward, the edit of hidden states in a subspace.

As `ops.py` for `lora_linear`; the op has no base weight, so its backend is resolved for "dense".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import backends, ops, reference
from .reference import ReftGradients, ReftNeeds

ops._library.define(
    "loreft(Tensor h, Tensor? residual, Tensor? rows, Tensor projection, Tensor? bias, Tensor basis, "
    "Tensor? dropout_mask, float dropout_p, bool drop_state, str act, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
ops._library.define(
    "loreft_backward(Tensor grad, Tensor kept, Tensor? rows, Tensor projection, Tensor? bias, Tensor basis, "
    "Tensor z, Tensor? dropout_mask, float dropout_p, bool drop_state, str act, bool needs_h, "
    "bool needs_projection, bool needs_bias, bool needs_basis, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def check_loreft(
    h: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    projection: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    dropout_mask: Tensor | None,
    dropout_p: float,
    act: str,
) -> None:
    """Raises ValueError or TypeError naming the argument, the expected and the received."""
    if h.dim() < 1:
        raise ValueError(f"h: expected [..., d], got {list(h.shape)}")
    d = h.shape[-1]
    if basis.dim() != 2 or basis.shape[1] != d:
        raise ValueError(f"basis: expected [r, d] = [*, {d}], got {list(basis.shape)}")
    r = basis.shape[0]
    sizes = (0, r, 2 * r)
    if projection.dim() != 2 or projection.shape[1] != d or projection.shape[0] not in sizes:
        raise ValueError(
            f"projection: expected [q, d] = [q, {d}] with q one of {sizes}, got {list(projection.shape)}"
        )
    if bias is None and projection.shape[0] < r:
        raise ValueError(f"bias: expected [r] = [{r}], for a projection without rows, got None")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != r):
        raise ValueError(f"bias: expected [r] = [{r}], got {list(bias.shape)}")
    if residual is not None and residual.shape != h.shape:
        raise ValueError(f"residual: expected the shape of h, {list(h.shape)}, got {list(residual.shape)}")
    if rows is not None and rows.dim() != 1:
        raise ValueError(f"rows: expected [m], got {list(rows.shape)}")
    if dropout_mask is not None:
        shape = [math.prod(h.shape[:-1]) if rows is None else rows.shape[0], (d + 7) // 8]
        if list(dropout_mask.shape) != shape:
            raise ValueError(f"dropout_mask: expected [m, ⌈d/8⌉] = {shape}, got {list(dropout_mask.shape)}")
    ops.check_probability("dropout_p", dropout_p)
    if act not in reference.ACTIVATIONS:
        raise ValueError(f"act: expected one of {list(reference.ACTIVATIONS)}, got {act!r}")
    if not h.is_floating_point():
        raise TypeError(f"h: expected a floating dtype, got {h.dtype}")
    acc = reference.accumulation_dtype(h.dtype)
    for name, tensor, dtype in (
        ("residual", residual, h.dtype),
        ("rows", rows, torch.int64),
        ("projection", projection, acc),
        ("bias", bias, acc),
        ("basis", basis, acc),
        ("dropout_mask", dropout_mask, torch.uint8),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} for h in {h.dtype}, got {tensor.dtype}")
        if tensor.device != h.device:
            raise ValueError(f"{name}: expected device {h.device} (h's), got {tensor.device}")


def check_loreft_backward(
    grad: Tensor,
    kept: Tensor,
    rows: Tensor | None,
    projection: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    z: Tensor,
    dropout_mask: Tensor | None,
    dropout_p: float,
    _drop_state: bool,
    act: str,
) -> None:
    """As `check_loreft`, of what the op is given by others than the formula."""
    check_loreft(grad, None, rows, projection, bias, basis, dropout_mask, dropout_p, act)
    _check_rows(rows, math.prod(grad.shape[:-1]))
    m = math.prod(grad.shape[:-1]) if rows is None else rows.shape[0]
    for name, tensor, width, dtype in (
        ("kept", kept, grad.shape[-1], grad.dtype),
        ("z", z, projection.shape[0], projection.dtype),
    ):
        ops.check_operand(name, tensor, grad.device, (dtype,))
        if math.prod(tensor.shape[:-1]) != m or tensor.shape[-1:] != (width,):
            raise ValueError(f"{name}: expected [m, {width}] = {[m, width]}, got {list(tensor.shape)}")


def _check_rows(rows: Tensor | None, M: int) -> None:
    # Where it needs no wait for a GPU.
    if rows is not None and rows.device.type == "cpu" and rows.numel() and (top := rows.max()) >= M:
        raise ValueError(f"rows: expected indices below M = {M}, got {int(top)}")


@ops._as_given
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, picks a backend and runs it: (out [..., d], Z [m, q] fp32, H_S [m, d]) of h [..., d].

    H_S is empty, [0, d], where it is h itself: without rows and residual. Not differentiable.
    """
    check_loreft(h, residual, rows, projection, bias, basis, dropout_mask, dropout_p, act)
    states = ops._rows(h, h.shape[-1])
    _check_rows(rows, len(states))
    out, z, kept = backends.implementation("loreft", "dense", h, backend)(
        states,
        residual if residual is None else ops._rows(residual, h.shape[-1]),
        rows if rows is None else rows.contiguous(),
        projection.contiguous(),
        bias if bias is None else bias.contiguous(),
        basis.contiguous(),
        dropout_mask if dropout_mask is None else dropout_mask.contiguous(),
        dropout_p,
        drop_state,
        act,
    )
    return ops._unflatten_rows(out, h), z, kept


@ops._as_given
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
    backend: str,
) -> ReftGradients:
    """The gradients that `needs` names, dH in the shape of grad [..., d]; z of `loreft`.

    `kept` is the H_S [m, d] of `loreft`, or h [..., d] where that is empty.
    """
    grads = backends.implementation("loreft_backward", "dense", grad, backend)(
        ops._rows(grad, grad.shape[-1]),
        ops._rows(kept, grad.shape[-1]),
        rows if rows is None else rows.contiguous(),
        projection.contiguous(),
        bias if bias is None else bias.contiguous(),
        basis.contiguous(),
        z,
        dropout_mask if dropout_mask is None else dropout_mask.contiguous(),
        dropout_p,
        drop_state,
        act,
        needs,
    )
    return grads if grads.h is None else grads._replace(h=ops._unflatten_rows(grads.h, grad))


def _loreft_backward_op(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *operands, needs_h, needs_projection, needs_bias, needs_basis, backend = args
    needs = ReftNeeds(needs_h, needs_projection, needs_bias, needs_basis)
    check_loreft_backward(grad, *operands)
    return tuple(ops._or_empty(g, grad) for g in loreft_backward(grad, *operands, needs, backend))


def _fake_loreft(
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
) -> tuple[Tensor, Tensor, Tensor]:
    check_loreft(h, residual, rows, projection, bias, basis, dropout_mask, dropout_p, act)
    m = math.prod(h.shape[:-1]) if rows is None else rows.shape[0]
    kept = h.new_empty((0 if rows is None and residual is None else m, h.shape[-1]))
    return h.new_empty(h.shape), projection.new_empty((m, projection.shape[0])), kept


def _fake_loreft_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, _, projection, bias, basis, *_, needs_h, needs_projection, needs_bias, needs_basis, _ = args
    grads = (grad, projection, basis[:, 0] if bias is None else bias, basis)
    needs = (needs_h, needs_projection, needs_bias, needs_basis)
    return tuple(
        ops._or_empty(t.new_empty(t.shape) if needed else None, grad)
        for t, needed in zip(grads, needs, strict=True)
    )


ops._library.impl("loreft", loreft, "CompositeExplicitAutograd")
ops._library.impl("loreft_backward", _loreft_backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("peft_fast::loreft", _fake_loreft, lib=ops._library)
torch.library.register_fake("peft_fast::loreft_backward", _fake_loreft_backward, lib=ops._library)
