"""`PackedWeight`: a packed weight in the place of the dense tensor [N, K] that it stands for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .errors import UnsupportedWeight
from .formats import QuantizedWeight
from .functional import dequantize


class PackedWeight(Tensor):
    """Ŵ [N, K], or a view of it, for code that reads the weight of a layer: ops that need values decode them.

    Shape, dtype, device and views cost nothing. Autograd saves it as it is, so that no decoded weight lives
    until the backward pass, unless an op saves what it made of one. Frozen, and cannot be written: what is
    written would be lost, as the merge of an adapter would.
    """

    packed: QuantizedWeight
    decode: Callable[[QuantizedWeight], Tensor]
    """The values that such a packed weight stands for here."""

    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, packed: QuantizedWeight, like: Tensor, decode: Callable[[QuantizedWeight], Tensor]
    ) -> PackedWeight:
        place: dict[str, Any] = {"dtype": like.dtype, "device": packed.weight.device}
        self = Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), **place)
        self.packed, self.decode = packed, decode
        return self

    @classmethod
    def of(cls, packed: QuantizedWeight, dtype: torch.dtype) -> PackedWeight:
        """All of `packed` in the floating `dtype`."""
        like = torch.empty(packed.out_features, packed.in_features, dtype=dtype, device="meta")
        return cls(packed, like, functools.partial(dequantize, dtype=dtype))

    def read(self) -> Tensor:
        """The values, as a new tensor."""
        return self.decode(self.packed)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        if id(self) not in memo:
            memo[id(self)] = type(self)(copy.deepcopy(self.packed, memo), self, self.decode)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = dict(enumerate(args)) | kwargs
        for i, argument in enumerate(func._schema.arguments):
            written = given.get(argument.name, given.get(i))
            if argument.is_write and isinstance(written, cls):
                written._refuse(f"a write by {func}")
        if isinstance(args[0], cls) and _is_view(func):
            return args[0]._view(functools.partial(func, **kwargs), args[1:])
        args, kwargs = tree_map_only(cls, lambda weight: weight.read(), (args, kwargs))
        return func(*args, **kwargs)

    def _view(self, func: Callable[..., Tensor], args: Any) -> PackedWeight:
        like = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        decode = self.decode
        return type(self)(self.packed, func(like, *args), lambda packed: func(decode(packed), *args))

    @property  # type: ignore[override]
    def data(self) -> PackedWeight:
        return self

    @data.setter
    def data(self, value: Any) -> None:
        self._refuse("a write to .data")

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        if requires_grad:
            self._refuse("requires_grad_()")
        return self

    # PyTorch would take these to the memory behind the tensor, where there is none.

    def numpy(self, *, force: bool = False) -> Any:
        return self.read().numpy(force=force)

    def tolist(self) -> list[Any]:
        return self.read().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        return self.read().__dlpack__(**options)

    def apply_(self, function: Any) -> NoReturn:
        self._refuse("apply_()")

    def share_memory_(self) -> NoReturn:
        self._refuse("share_memory_(), which its layer has for the packed bytes")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({self.packed.format} {list(self.shape)}, {self.dtype}, {self.device})"

    def _refuse(self, got: str) -> NoReturn:
        raise UnsupportedWeight(
            f"weight: expected reads of a packed {self.packed.format} weight, got {got}; it is frozen, and "
            "no adapter can be merged into it"
        )


def _is_view(func: Any) -> bool:
    """Whether an op returns a tensor that shares the memory of its first argument."""
    returns = func._schema.returns
    return [str(result.type) for result in returns] == ["Tensor"] and returns[0].alias_info is not None
