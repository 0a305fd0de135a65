"""`AdapterConfig`: which method of `methods.METHODS` goes on which linear layers of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from .backends import BACKENDS
from .functional import check_choice
from .methods import resolve_options

ALL_LINEAR = "all-linear"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Options(dict[str, Any]):
    """Options that cannot be changed; their copies are plain, and can."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("options: expected none to be changed, got a write; see dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


@dataclasses.dataclass(frozen=True, init=False)
class AdapterConfig:
    """How `get_adapter_model` adapts a model.

    Names of modules are ends of dotted names, as in PEFT: "v_proj" is every `….v_proj`.

    Args:
        method: a key of `methods.METHODS`; None adds nothing to a layer, and trains `modules_to_save` alone.
        target_modules: the linear layers to adapt, or "all-linear": every one but output layers, those in
            `modules_to_save`, and those whose weight the model reads without calling them.
        exclude_modules: layers to leave as they are.
        modules_to_save: modules to train and save whole; if None, the head of a classification.
        adapter_dtype: dtype of the method's parameters; float32 when None.
        backend: "auto" or a name of `backends.BACKENDS`.
        **options: of the method, see docs/methods.md.

    Raises:
        ValueError: a value does not fit; the message names it.
        TypeError: an option that the method does not have.
    """

    method: str | None
    target_modules: str | tuple[str, ...]
    exclude_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...] | None
    adapter_dtype: torch.dtype | None
    backend: str
    options: Mapping[str, Any]

    def __init__(
        self,
        method: str | None,
        *,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        exclude_modules: Sequence[str] = (),
        modules_to_save: Sequence[str] | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        options = {**options.pop("options", {}), **options}  # as `dataclasses.replace` gives them
        if target_modules != ALL_LINEAR:
            target_modules = _names("target_modules", target_modules, f"{ALL_LINEAR!r} or names")
        if not target_modules:
            raise ValueError("target_modules: expected at least one name, got none")
        if adapter_dtype not in (None, *DTYPES.values()):
            expected = f"None or one of {list(DTYPES.values())}"
            raise ValueError(f"adapter_dtype: expected {expected}, got {adapter_dtype!r}")
        check_choice("backend", backend, ("auto", *BACKENDS))
        if method is not None:
            options = resolve_options(method, options, 0, 0)  # every number divides these sizes
        elif options:
            raise TypeError(f"{next(iter(options))}: expected no option without a method, got one")
        if modules_to_save is not None:
            modules_to_save = _names("modules_to_save", modules_to_save)
        values = {
            "method": method,
            "target_modules": target_modules,
            "exclude_modules": _names("exclude_modules", exclude_modules),
            "modules_to_save": modules_to_save,
            "adapter_dtype": adapter_dtype,
            "backend": backend,
            "options": Options(options),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, the method's options beside the others."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options = values.pop("options")
        dtype = next((name for name, dtype in DTYPES.items() if dtype is self.adapter_dtype), None)
        return {**values, "adapter_dtype": dtype, **options}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """The inverse of `to_dict`; an option left out takes its default.

        Raises:
            ValueError, TypeError: an option is unknown or does not fit; the message names it.
        """
        values = dict(values)
        if "method" not in values:
            raise ValueError("method: expected one, got none")
        if (dtype := values.get("adapter_dtype")) is not None:
            check_choice("adapter_dtype", dtype, tuple(DTYPES))
            values["adapter_dtype"] = DTYPES[dtype]
        return cls(**values)

    def __reduce__(self) -> Any:
        return _from_dict, (self.to_dict(),)

    def __hash__(self) -> int:
        return hash((self.method, self.target_modules, tuple(self.options.items())))


def _from_dict(values: dict[str, Any]) -> AdapterConfig:
    return AdapterConfig.from_dict(values)


def _names(argument: str, names: Any, expected: str = "names") -> tuple[str, ...]:
    listed = isinstance(names, Sequence | set | frozenset) and not isinstance(names, str | bytes)
    if not listed or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{argument}: expected {expected} of modules in a list, got {names!r}")
    return tuple(names)
