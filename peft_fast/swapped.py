"""Objects whose class was replaced, in place, by a subclass of the same name: no hooks, no wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import UnsupportedLayer


class Swapped:
    """An object whose `__class__` was replaced by `_make(_stock)`; copies and pickles as such."""

    _stock: type
    _make: Callable[[type], type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (type(self)._make, type(self)._stock), *reduced[2:])


def subclass(
    mixin: type, make: Callable[[type], type], stock: type, methods: dict[str, Any] | None = None
) -> type:
    """A subclass of `stock` that only `isinstance` tells from it: the mixin first, the same names."""
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    attributes = {**names, "_stock": stock, "_make": staticmethod(make), **(methods or {})}
    return type(stock.__name__, (mixin, stock), attributes)


def _new(make: Callable[[type], type], stock: type) -> Any:
    cls: Any = make(stock)
    return cls.__new__(cls)


def check_swappable(argument: str, module: nn.Module) -> None:
    """Raises `UnsupportedLayer` when `module` would not run a forward of its class."""
    if "forward" in module.__dict__:
        raise UnsupportedLayer(
            f"{argument}: expected the forward of its class, {type(module).__name__}, got one of its own, as "
            "device_map offloading sets"
        )
