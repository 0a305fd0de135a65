"""Op schemas, shape checks and fakes: of `lora_linear` and `dropout_mask`; `loreft` has its in `reft_ops.py`.

`peft_fast::lora_linear` and its backward are dispatcher ops: `torch.compile` sees one opaque node, and the
backend is resolved inside it (`backends.resolve`).

To add an op: its definition in `reference.py`, a schema and a fake here or in a file beside this one, a
formula in `autograd.py`, and a function of the same name in each backend that carries it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, native, reference
from .formats import QuantizedWeight
from .reference import Gradients, Needs

WEIGHT_SCHEMA = (
    "Tensor weight, Tensor? absmax, Tensor? code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, str format, int out_features, int in_features, int blocksize, "
    "int nested_blocksize"
)
WEIGHT_FIELDS = len(QuantizedWeight._fields)

_library = torch.library.Library("peft_fast", "DEF")
_library.define(
    f"lora_linear(Tensor x, {WEIGHT_SCHEMA}, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "Tensor? dropout_mask, Tensor? out_scale, float scaling, float dropout_p, str backend) "
    "-> (Tensor, Tensor)"
)
_library.define(
    f"lora_linear_backward(Tensor grad, Tensor x, {WEIGHT_SCHEMA}, Tensor lora_A, Tensor lora_B, Tensor z, "
    "Tensor? dropout_mask, Tensor? out_scale, Tensor? bias, Tensor? y, float scaling, float dropout_p, "
    "bool needs_x, bool needs_A, bool needs_B, bool needs_bias, bool needs_out_scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("dropout_mask(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


# ------------------------------------------------------------------------------------------------ checks


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}


def runs_directly(operands: Sequence[Tensor], frozen: Sequence[Tensor | None]) -> bool:
    """Whether an op may be called as a plain function, since nothing has to see it in the dispatcher.

    True in eager mode on plain tensors: a small layer is then spared round trips that cost more than its
    arithmetic. False under a compiler, tracer, mode or functorch transform, for tensor subclasses, and for
    operands that the dispatcher would unwrap (left behind by a transform) or materialize (lazily negated).
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, operands))
        or not _PLAIN_OR_NONE.issuperset(map(type, frozen))
        or any(map(torch._C._functorch.is_functorch_wrapped_tensor, operands))
        or any(map(Tensor.is_neg, operands))
    )


def check_probability(argument: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{argument}: expected a probability in [0, 1], got {p}")


def check_lora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    out_scale: Tensor | None,
    dropout_p: float,
) -> None:
    """Raises ValueError or TypeError naming the argument, the expected and the received."""
    N, K = weight.out_features, weight.in_features
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x: expected [..., K] = [..., {K}], got {list(x.shape)}")
    if lora_A.dim() != 2 or lora_A.shape[1] != K:
        raise ValueError(f"lora_A: expected [R, K] = [*, {K}], got {list(lora_A.shape)}")
    R = lora_A.shape[0]
    if lora_B.dim() != 2 or lora_B.shape[0] != N or lora_B.shape[1] != R:
        raise ValueError(f"lora_B: expected [N, R] = [{N}, {R}], got {list(lora_B.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(f"bias: expected [N] = [{N}], got {list(bias.shape)}")
    check_probability("dropout_p", dropout_p)
    device = weight.weight.device
    for name, tensor in (("x", x), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device} (the weight's), got {tensor.device}")
    if out_scale is not None:
        check_vector("out_scale", out_scale, N, device)
        if out_scale.dtype != (dtype := reference.accumulation_dtype(x.dtype)):
            raise TypeError(f"out_scale: expected {dtype} for x in {x.dtype}, got {out_scale.dtype}")


def check_vector(argument: str, tensor: Tensor, N: int, device: torch.device) -> None:
    if tensor.dim() != 1 or tensor.shape[0] != N:
        raise ValueError(f"{argument}: expected [N] = [{N}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{argument}: expected device {device} (the weight's), got {tensor.device}")


# ------------------------------------------------------------------------------- implementations and fakes


def _as_given(op: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an implementation with autocast off: casting is decided before the op, not inside it."""

    @functools.wraps(op)
    def run(x: Tensor, *args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return op(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args)

    return run


_unsafe_view = torch.ops.aten._unsafe_view.default  # as `F.linear` reshapes its result


@_as_given
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
) -> tuple[Tensor, Tensor]:
    """Checks, picks a backend and runs it: (Y [..., N], Z [M, R] fp32) of x [..., K]; not differentiable."""
    check_lora_linear(x, weight, bias, lora_A, lora_B, out_scale, dropout_p)
    y, z = backends.implementation("lora_linear", weight.format, x, backend)(
        _rows(x, weight.in_features),
        weight,
        bias if bias is None else bias.contiguous(),
        lora_A.contiguous(),
        lora_B.contiguous(),
        dropout_mask,
        out_scale if out_scale is None else out_scale.contiguous(),
        scaling,
        dropout_p,
    )
    return _unflatten_rows(y, x), z


@_as_given
def lora_linear_backward(
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
    backend: str,
) -> Gradients:
    """The gradients that `needs` names, dX in the shape of x; grad [..., N], and z of `lora_linear`.

    Only for d_out_scale, the bias and the y [..., N] of `lora_linear`.
    """
    grads = backends.implementation("lora_linear_backward", weight.format, x, backend)(
        _rows(grad, weight.out_features),
        _rows(x, weight.in_features),
        weight,
        lora_A.contiguous(),
        lora_B.contiguous(),
        z,
        dropout_mask,
        out_scale if out_scale is None else out_scale.contiguous(),
        bias if bias is None else bias.contiguous(),
        y if y is None else _rows(y, weight.out_features),
        scaling,
        dropout_p,
        needs,
    )
    return grads if grads.x is None else grads._replace(x=_unflatten_rows(grads.x, x))


def _rows(x: Tensor, features: int) -> Tensor:
    """x [..., features] as a contiguous matrix [M, features]."""
    return (x if x.dim() == 2 else x.reshape(-1, features)).contiguous()


def _unflatten_rows(y: Tensor, x: Tensor) -> Tensor:
    """y [M, features] with the leading dimensions of x; no view, which autograd would not let be written."""
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _lora_linear_op(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return lora_linear(x, QuantizedWeight(*args[:WEIGHT_FIELDS]), *args[WEIGHT_FIELDS:])


def _lora_linear_backward_op(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, rest = QuantizedWeight(*args[:WEIGHT_FIELDS]), args[WEIGHT_FIELDS:]
    *operands, needs_x, needs_A, needs_B, needs_bias, needs_out_scale, backend = rest
    needs = Needs(needs_x, needs_A, needs_B, needs_bias, needs_out_scale)
    grads = lora_linear_backward(grad, x, weight, *operands, needs, backend)
    return tuple(_or_empty(g, x) for g in grads)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    """Ops return tensors, each its own: an empty one stands for a gradient that nobody needs."""
    return like.new_empty(0) if grad is None else grad


def _fake_lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, rest = QuantizedWeight(*args[:WEIGHT_FIELDS]), args[WEIGHT_FIELDS:]
    bias, lora_A, lora_B, _, out_scale, _, dropout_p, _ = rest
    check_lora_linear(x, weight, bias, lora_A, lora_B, out_scale, dropout_p)
    M = x.numel() // weight.in_features
    z = x.new_empty((M, lora_A.shape[0]), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], weight.out_features)), z


def _fake_lora_linear_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    lora_A, lora_B, z, _, _, _, _, _, _, *needs, _ = args[WEIGHT_FIELDS:]
    grads = Gradients(
        x.new_empty(x.shape),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
        z.new_empty(lora_B.shape[0]),
        z.new_empty(lora_B.shape[0]),
    )
    return tuple(_or_empty(g if needed else None, x) for g, needed in zip(grads, needs, strict=True))


def _dropout_mask(x: Tensor, p: float) -> Tensor:
    keep = reference.draw_mask(x, p)
    pack = native.pack_mask if x.device.type == "cpu" and native.load_error() is None else reference.pack_mask
    return pack(keep.contiguous())


def _fake_dropout_mask(x: Tensor, p: float) -> Tensor:
    K = x.shape[-1]
    return x.new_empty((x.numel() // K, (K + 7) // 8), dtype=torch.uint8)


_library.impl("lora_linear", _lora_linear_op, "CompositeExplicitAutograd")
_library.impl("lora_linear_backward", _lora_linear_backward_op, "CompositeExplicitAutograd")
_library.impl("dropout_mask", _dropout_mask, "CompositeExplicitAutograd")
torch.library.register_fake("peft_fast::lora_linear", _fake_lora_linear, lib=_library)
torch.library.register_fake("peft_fast::lora_linear_backward", _fake_lora_linear_backward, lib=_library)
torch.library.register_fake("peft_fast::dropout_mask", _fake_dropout_mask, lib=_library)
