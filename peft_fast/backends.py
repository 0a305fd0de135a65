"""THE backend table: only this file knows which backends exist, and `resolve` picks one.

A backend is an object that has an op as a function with the signature of `reference.py`. It may lack ops: it
is then unavailable for them.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda, native, reference
from .errors import BackendUnavailable
from .formats import QuantizedWeight


class Backend(NamedTuple):
    """A row of the table: `load()` gives the object with the ops, `unavailable` why a case cannot run.

    `checks` says that its ops check a weight before they touch memory, in words of their own.
    """

    load: Callable[[], Any]
    unavailable: Callable[[str, str, torch.dtype], str | None]
    automatic: bool = True
    checks: bool = False

    def reason(self, op: str, format: str, device: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run an op on a case; None when it can."""
        reason = self.unavailable(format, device, dtype)
        if reason is None and not hasattr(self.load(), op):
            return f"it has no {op}"
        return reason


def _load_triton() -> Any:
    from . import triton_kernels

    return triton_kernels


@functools.cache
def _triton_import_error() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import ({error}): pip install triton"
    return None


def _triton_unavailable(format: str, device: str, dtype: torch.dtype) -> str | None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU tensor (on CPU tensors, set TRITON_INTERPRET=1 before triton is imported)"
    if device == "meta":
        return "runs on a GPU, got meta tensors"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 or bfloat16 activations, got {dtype}"
    return _triton_import_error()


def _triton_strategy(name: str) -> Backend:
    @functools.cache
    def load() -> Any:
        return _load_triton().Strategy(name)

    def unavailable(format: str, device: str, dtype: torch.dtype) -> str | None:
        reason = _triton_unavailable(format, device, dtype)
        if reason is None and name == "merge" and format == "dense":
            reason = "it merges into quantized weights, got a dense one"
        return reason

    return Backend(load, unavailable, automatic=False)


def _native(level: str, batch_invariant: bool = False) -> Backend:
    backend = native.Level(level, batch_invariant)
    automatic = not level and not batch_invariant
    return Backend(lambda: backend, backend.unavailable, automatic, checks=True)


# In order of preference; `reference` is last and runs everything.
BACKENDS: dict[str, Backend] = {
    "cpu": _native(""),
    "triton": Backend(_load_triton, _triton_unavailable),
    **{f"triton-{name}": _triton_strategy(name) for name in ("splitk", "fused", "split", "library", "merge")},
    "cuda-gemv": Backend(cuda.Gemv, cuda.gemv_unavailable, automatic=False, checks=True),
    "cuda-dequant": Backend(cuda.Dequantize, cuda.unavailable, automatic=False),
    **{f"cpu-{level}": _native(level) for level in native.LEVELS},
    "cpu-batch-invariant": _native("", batch_invariant=True),
    "reference": Backend(lambda: reference, lambda format, device, dtype: None),
}


def check_name(backend: str) -> None:
    """Raises ValueError for a name that is not known."""
    if backend != "auto" and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"backend: expected 'auto' or one of {list(BACKENDS)}, got {backend!r}")


def availability(op: str, format: str, device: str, dtype: torch.dtype) -> dict[str, str | None]:
    """For each backend, None when it can run the case, else the reason why not."""
    return {name: row.reason(op, format, device, dtype) for name, row in BACKENDS.items()}


def resolve(op: str, format: str, device: str, dtype: torch.dtype, backend: str = "auto") -> str:
    """The name of the backend that runs a case.

    Args:
        op: name of a function of `reference.py`.
        format: weight format, a key of `formats.FORMATS`; "dense" for ops without a base weight.
        device: device type of the activations, such as "cpu" or "cuda".
        dtype: dtype of the activations.
        backend: "auto", or the name of a backend, which then runs the case or raises.

    Raises:
        ValueError: `backend` is not in the table.
        BackendUnavailable: the named backend cannot run the case; the message says why.
    """
    check_name(backend)
    if backend == "auto":
        return next(
            name
            for name, row in BACKENDS.items()
            if row.automatic
            and not (name == "triton" and device == "cpu")
            and row.reason(op, format, device, dtype) is None
        )
    reason = BACKENDS[backend].reason(op, format, device, dtype)
    if reason is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot run {op} over {format} here: {reason}")
    return backend


calls: collections.Counter[tuple[str, str]] = collections.Counter()
"""How often each (op, backend) ran in this process; read by `explain` and the tests."""


def implementation(op: str, format: str, x: Tensor, backend: str) -> Callable[..., Any]:
    """The function that runs an op on activations like x; the call that follows is counted."""
    return getattr(_counted(op, format, x, backend).load(), op)


def over_weight(op: str, weight: QuantizedWeight, x: Tensor, backend: str, *args: Any) -> Any:
    """Runs an op on activations like x, over a weight that is what it says of itself: none reads past it.

    Raises:
        UnsupportedWeight: the field of the weight that contradicts the others.
    """
    row = _counted(op, weight.format, x, backend)
    run = getattr(row.load(), op)
    if not row.checks:
        weight.check()
        return run(*args)
    try:
        return run(*args)
    except RuntimeError:
        weight.check()
        raise


def _counted(op: str, format: str, x: Tensor, backend: str) -> Backend:
    name = resolve(op, format, x.device.type, x.dtype, backend)
    calls[op, name] += 1
    return BACKENDS[name]
