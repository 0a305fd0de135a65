"""Row norms of a DoRA layer, kept until what they were made from changes: no norm is computed twice.

=====================  ==================  =====================================================
kept                   made from           computed
=====================  ==================  =====================================================
‖ŵ_i‖² [N] fp64        the base weight     once, and again when the weight is another one
‖ŵ_i + s·b_i·A‖ [N]    and A, B and s      once per optimizer step, however many forwards use it
=====================  ==================  =====================================================

Accumulation, evaluation and the recomputation of checkpoints reuse it. How a change is noticed:

- A, B on the CPU: by content, against copies of them, so every write is seen, through `.data` too.
- A, B elsewhere: by storage and version, without waiting for the device. A write through `.data` leaves no
  trace there; optimizers write so, therefore a step of any `torch.optim` optimizer counts as a change, by a
  hook that the first norm kept on such a device registers. After other writes of that kind call `reset`;
  a write to a shard of FSDP is one, since gathering it leaves the version of the whole tensor as it was.
- s: by value; a tensor as A and B.
- The base weight and its statistics: by storage and version; on the CPU also by a few elements spread over
  it. Other writes through `.data` to a frozen weight need `reset`.

Storages are known by weak references: nothing is kept alive, and an address used again is not mistaken.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import dora, ops
from .formats import QuantizedWeight, stored_weight
from .reference import accumulation_dtype

COMPARED_BY_CONTENT = frozenset({"cpu"})
"""Device types whose memory Python reads without waiting."""

SAMPLES = 8
"""Elements of a base weight that are compared, along each of its dimensions."""

_TENSORS = QuantizedWeight._fields.index("format")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps  # noqa: PLW0603
    _optimizer_steps += 1


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_count_step)


class NormCache:
    """The norms of one layer; see the module docstring. A copy of it, or a pickled one, is empty.

    Threads may share it: an entry is replaced whole, and a norm belongs to the values it was made from.
    """

    def __init__(self) -> None:
        self.reset()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()

    def reset(self) -> None:
        """Forgets all norms; the next forward computes them."""
        self._squares: _Kept | None = None
        self._norm: _Kept | None = None

    def norms_squared(
        self, base: nn.Linear, weight: QuantizedWeight, lora_A: Tensor, backend: str = "auto"
    ) -> Tensor | None:
        """`dora.row_norms_squared` [N] in the accumulation dtype of lora_A; None as for `norm`."""
        if not _keepable(weight, (lora_A,)):
            return None
        dtype = accumulation_dtype(lora_A.dtype)
        constants, placed, compared = _describe(base, weight)
        constants += (dtype, backend)
        kept = self._squares
        if kept is None or not kept.made_from(constants, placed, compared):
            with torch.inference_mode(False), torch.no_grad():
                kept = _Kept(constants, placed, compared)
                kept.value = dora.row_norms_squared(weight, dtype=dtype, backend=backend)
            self._squares = kept
        return kept.value

    def norm(
        self,
        base: nn.Linear,
        weight: QuantizedWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float | Tensor,
        backend: str = "auto",
    ) -> Tensor | None:
        """`dora.lora_weight_norm` [N], detached; None where nothing may be kept.

        That is under a compiler, tracer, mode or functorch transform: what such a one sees may not depend on
        what ran before.

        Args:
            base: the layer that owns the weight.
            weight: `from_linear(base)`.
            lora_A: [R, K].
            lora_B: [N, R].
            scaling: a number, or a tensor of one element.
            backend: "auto" or a name of `backends.BACKENDS`.
        """
        operands = [lora_A, lora_B, scaling] if isinstance(scaling, Tensor) else [lora_A, lora_B]
        if not _keepable(weight, operands):
            return None
        constants, placed, compared = _describe(base, weight)
        constants += (backend, None if isinstance(scaling, Tensor) else scaling)
        if lora_A.device.type in COMPARED_BY_CONTENT:
            compared += operands
        else:
            _watch_optimizers()
            constants += (_optimizer_steps,)
            placed += operands
        kept = self._norm
        if kept is None or not kept.made_from(constants, placed, compared):
            squares = self.norms_squared(base, weight, lora_A, backend)
            with torch.inference_mode(False), torch.no_grad():
                kept = _Kept(constants, placed, compared)
                # From the copies, so that a norm is that of what it is known by.
                A, B, *factor = kept.compared[1:] or operands
                if factor:
                    B = fold_scaling(B, factor[0])
                number = 1.0 if isinstance(scaling, Tensor) else scaling
                kept.value = dora.lora_weight_norm(
                    weight, A, B, number, norms_squared=squares, backend=backend
                )
            self._norm = kept
        return kept.value


def fold_scaling(factor: Tensor, scaling: float | Tensor) -> Tensor:
    """`scaling` times an adapter's tensor, in fp32 at least: for where it cannot be an op's number."""
    return factor.to(torch.promote_types(factor.dtype, torch.float32)) * scaling


def _keepable(weight: QuantizedWeight, operands: Sequence[Tensor]) -> bool:
    return ops.runs_directly(operands, weight[:_TENSORS])  # type: ignore[arg-type]


def _describe(base: nn.Linear, weight: QuantizedWeight) -> tuple[tuple[Any, ...], list[Tensor], list[Tensor]]:
    """The constants of a weight, its tensors known by their place, and what of it is known by content."""
    constants: tuple[Any, ...] = weight[_TENSORS:]
    rest: tuple[Any, ...] = weight[1:_TENSORS]
    # The owner's parameter, since a view of it may have a version of its own.
    placed = [stored_weight(base), *(t for t in rest if t is not None)]
    packed = weight.weight
    if packed.device.type not in COMPARED_BY_CONTENT:
        return constants, placed, []
    steps = tuple(slice(None, None, max(1, size // SAMPLES)) for size in packed.shape)
    return constants, placed, [packed[steps]]


class _Kept:
    """A norm, and what it was made from."""

    value: Tensor

    def __init__(
        self, constants: tuple[Any, ...], placed: Sequence[Tensor], compared: Sequence[Tensor]
    ) -> None:
        self.constants = constants
        self.places = _places(placed)
        with torch._C.DisableTorchFunctionSubclass():
            self.storages = [StorageWeakRef(t.untyped_storage()) for t in placed]
        self.compared = [t.detach().clone() for t in compared]

    def made_from(
        self, constants: tuple[Any, ...], placed: Sequence[Tensor], compared: Sequence[Tensor]
    ) -> bool:
        return (
            self.constants == constants
            and self.places == _places(placed)
            and len(self.compared) == len(compared)
            and all(map(_same_content, self.compared, compared))
        )


def _places(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Where each tensor lies, how, and how often it was written; equal only while nothing was changed."""
    with torch._C.DisableTorchFunctionSubclass():  # Params4bit's override costs more than all of this
        return [
            (
                t.untyped_storage()._cdata,
                t.data_ptr(),
                0 if t.is_inference() else t._version,
                t.dtype,
                t.shape,
                t.stride(),
            )
            for t in tensors
        ]


def _same_content(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return _memcmp()(a.data_ptr(), b.data_ptr(), a.nbytes) == 0
    a, b = (t.detach().view(_INTEGERS[t.element_size()]) for t in (a, b))  # bits: a NaN is itself
    return torch.equal(a, b)


@functools.cache
def _memcmp() -> Any:
    """The C library's: a comparison by torch may wait for its other threads longer than it takes."""
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return memcmp
