"""Op schemas, shape checks, fakes, and THE backend table.

`peft_fast::lora_linear` and its backward are dispatcher ops: `torch.compile` sees one opaque node, and the
backend is resolved inside it. Only this file knows which backends exist; `resolve` picks one.

To add an op: its definition in `reference.py`, a schema and a fake here, a formula in `autograd.py`, and a
function of the same name in each backend that carries it.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, reference
from .errors import BackendUnavailable
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


# ---------------------------------------------------------------------------------------------- backends


class Backend(NamedTuple):
    """A row of the table: `load()` gives the object with the ops, `unavailable` why a case cannot run."""

    load: Callable[[], Any]
    unavailable: Callable[[str, str, torch.dtype], str | None]
    automatic: bool = True


def _load_triton() -> Any:
    from . import triton_kernels

    return triton_kernels


@functools.cache
def _triton_import_error() -> str | None:
    try:
        _load_triton()
    except ImportError as error:
        return f"triton does not import ({error}): pip install triton"
    return None


def _triton_unavailable(format: str, device: str, dtype: torch.dtype) -> str | None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU tensor (on CPU tensors, set TRITON_INTERPRET=1 before triton is imported)"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 or bfloat16 activations, got {dtype}"
    return _triton_import_error()


def _native(level: str, batch_invariant: bool = False) -> Backend:
    backend = native.Level(level, batch_invariant)
    return Backend(lambda: backend, backend.unavailable, automatic=not level and not batch_invariant)


# In order of preference; `reference` is last and runs everything.
BACKENDS: dict[str, Backend] = {
    "cpu": _native(""),
    "triton": Backend(_load_triton, _triton_unavailable),
    **{f"cpu-{level}": _native(level) for level in native.LEVELS},
    "cpu-batch-invariant": _native("", batch_invariant=True),
    "reference": Backend(lambda: reference, lambda format, device, dtype: None),
}


def availability(format: str, device: str, dtype: torch.dtype) -> dict[str, str | None]:
    """For each backend, None when it can run the case, else the reason why not."""
    return {name: row.unavailable(format, device, dtype) for name, row in BACKENDS.items()}


def resolve(format: str, device: str, dtype: torch.dtype, backend: str = "auto") -> str:
    """The name of the backend that runs a case.

    Args:
        format: weight format, a key of `formats.FORMATS`.
        device: device type of the activations, such as "cpu" or "cuda".
        dtype: dtype of the activations.
        backend: "auto", or the name of a backend, which then runs the case or raises.

    Raises:
        ValueError: `backend` is not in the table.
        BackendUnavailable: the named backend cannot run the case; the message says why.
    """
    if backend == "auto":
        return next(
            name
            for name, row in BACKENDS.items()
            if row.automatic
            and not (name == "triton" and device == "cpu")
            and row.unavailable(format, device, dtype) is None
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {list(BACKENDS)}, got {backend!r}")
    reason = BACKENDS[backend].unavailable(format, device, dtype)
    if reason is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot run {format} weights here: {reason}")
    return backend


calls: collections.Counter[tuple[str, str]] = collections.Counter()
"""How often each (op, backend) ran in this process; read by `explain` and the tests."""


def _backend(op: str, weight: QuantizedWeight, x: Tensor, backend: str) -> Any:
    name = resolve(weight.format, x.device.type, x.dtype, backend)
    calls[op, name] += 1
    return BACKENDS[name].load()


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
    y, z = _backend("lora_linear", weight, x, backend).lora_linear(
        _rows(x, weight.in_features),
        weight,
        bias,
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
    grads = _backend("lora_linear_backward", weight, x, backend).lora_linear_backward(
        _rows(grad, weight.out_features),
        _rows(x, weight.in_features),
        weight,
        lora_A.contiguous(),
        lora_B.contiguous(),
        z,
        dropout_mask,
        out_scale if out_scale is None else out_scale.contiguous(),
        bias,
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
