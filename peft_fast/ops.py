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
from collections.abc import Callable
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
    "Tensor? dropout_mask, float scaling, float dropout_p, str backend) -> (Tensor, Tensor)"
)
_library.define(
    f"lora_linear_backward(Tensor grad, Tensor x, {WEIGHT_SCHEMA}, Tensor lora_A, Tensor lora_B, Tensor z, "
    "Tensor? dropout_mask, float scaling, float dropout_p, bool needs_x, bool needs_A, bool needs_B, "
    "bool needs_bias, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
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


def _native(level: str) -> Backend:
    backend = native.Level(level)
    return Backend(lambda: backend, backend.unavailable, automatic=level == "")


# In order of preference; `reference` is last and runs everything.
BACKENDS: dict[str, Backend] = {
    "cpu": _native(""),
    "triton": Backend(_load_triton, _triton_unavailable),
    **{f"cpu-{level}": _native(level) for level in native.LEVELS},
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


def check_probability(argument: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{argument}: expected a probability in [0, 1], got {p}")


def check_lora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
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
    for name, tensor in (("x", x), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != weight.weight.device:
            raise ValueError(
                f"{name}: expected device {weight.weight.device} (the weight's), got {tensor.device}"
            )


# ------------------------------------------------------------------------------- implementations and fakes


def _as_given(op: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an op's implementation with autocast off: casting is decided before the op, not inside it."""

    @functools.wraps(op)
    def run(x: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return op(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args)

    return run


@_as_given
def _lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, rest = QuantizedWeight(*args[:WEIGHT_FIELDS]), args[WEIGHT_FIELDS:]
    bias, lora_A, lora_B, dropout_mask, scaling, dropout_p, backend = rest
    check_lora_linear(x, weight, bias, lora_A, lora_B, dropout_p)
    rows = x.reshape(-1, weight.in_features).contiguous()
    y, z = _backend("lora_linear", weight, x, backend).lora_linear(
        rows, weight, bias, lora_A.contiguous(), lora_B.contiguous(), dropout_mask, scaling, dropout_p
    )
    return y.view(*x.shape[:-1], weight.out_features), z


@_as_given
def _lora_linear_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, rest = QuantizedWeight(*args[:WEIGHT_FIELDS]), args[WEIGHT_FIELDS:]
    lora_A, lora_B, z, dropout_mask, scaling, dropout_p, *needs, backend = rest
    grads = _backend("lora_linear_backward", weight, x, backend).lora_linear_backward(
        grad.reshape(-1, weight.out_features).contiguous(),
        x.reshape(-1, weight.in_features).contiguous(),
        weight,
        lora_A.contiguous(),
        lora_B.contiguous(),
        z,
        dropout_mask,
        scaling,
        dropout_p,
        Needs(*needs),
    )
    dx = grads.x.view(x.shape) if grads.x is not None else None
    return tuple(_or_empty(g, x) for g in (dx, *grads[1:]))


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    """Ops return tensors, each its own: an empty one stands for a gradient that nobody needs."""
    return like.new_empty(0) if grad is None else grad


def _fake_lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, rest = QuantizedWeight(*args[:WEIGHT_FIELDS]), args[WEIGHT_FIELDS:]
    bias, lora_A, lora_B, _, _, dropout_p, _ = rest
    check_lora_linear(x, weight, bias, lora_A, lora_B, dropout_p)
    M = x.numel() // weight.in_features
    z = x.new_empty((M, lora_A.shape[0]), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], weight.out_features)), z


def _fake_lora_linear_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    lora_A, lora_B, z, _, _, _, *needs, _ = args[WEIGHT_FIELDS:]
    grads = Gradients(
        x.new_empty(x.shape),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
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


_library.impl("lora_linear", _lora_linear, "CompositeExplicitAutograd")
_library.impl("lora_linear_backward", _lora_linear_backward, "CompositeExplicitAutograd")
_library.impl("dropout_mask", _dropout_mask, "CompositeExplicitAutograd")
torch.library.register_fake("peft_fast::lora_linear", _fake_lora_linear, lib=_library)
torch.library.register_fake("peft_fast::lora_linear_backward", _fake_lora_linear_backward, lib=_library)
torch.library.register_fake("peft_fast::dropout_mask", _fake_dropout_mask, lib=_library)
