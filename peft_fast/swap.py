"""In-place swap of PEFT's layers for fused ones: `accelerate(model)`, undone by `restore(model)`.

A layer keeps its modules, parameters, hooks and state-dict keys; only its `__class__` becomes a subclass of
PEFT's own (see `peft_layers`), or of bitsandbytes' for one without a fused adapter (`base_layers`).
An `AdapterLinear`, `LoRALinear` or `DoRALinear` is fused as it is, and left alone with its base.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from . import backends
from .adapter_linear import AdapterLinear
from .base_layers import FUSED_BASES, STOCK_BASES
from .errors import UnsupportedLayer, UnsupportedWeight
from .formats import from_linear
from .fused_layer import base_reason
from .modules import (
    LowRankLinear,
    allow_repacking,
    check_base,
    compute_dtype,
    is_linear4bit,
    protect_from_repacking,
    warn_slow_compute_dtype,
)
from .norm_cache import NormCache
from .peft_layers import FUSED, METHODS, PEFT_LAYERS, STOCK, fused_kind, methods_of
from .peft_lora import FusedLora
from .report import Report, Row
from .swapped import Swapped
from .weight_reads import reads_weight

ALL = (*METHODS, "base")

# Marks a Linear4bit that `restore` lets bitsandbytes repack again.
_REPACKED_BEFORE = "_peft_fast_repacked_before"


_FUSED = {**FUSED, **FUSED_BASES}
_STOCK = {**STOCK, **STOCK_BASES}
_BASES = tuple(FUSED_BASES)


def accelerate(
    model: nn.Module, *, methods: tuple[str, ...] = ALL, strict: bool = False, backend: str = "auto"
) -> Report:
    """Swaps PEFT's LoRA, VeRA and IA3 layers and bitsandbytes' layers for fused ones, in place.

    A second call finds them swapped.

    Adapters added, switched, merged or deleted later need no further call. Warns when nothing was swapped.
    bitsandbytes is kept from repacking 4-bit weights of `model` in place at an eval forward on the CPU, which
    would lose gradients and change what is saved.

    Args:
        model: a `PeftModel`, or any module that contains layers of PEFT or bitsandbytes.
        methods: what runs in the fused op: adapters that are "lora", "dora", "vera" or "ia3", and as "base" a
            layer of bitsandbytes or a `PackedLinear` without such an adapter. Other adapters run in PEFT's
            forward, and layers without a fused one are left.
        strict: raise unless there is such a layer and every one can be swapped.
        backend: "auto" or a name of `backends.BACKENDS`, for every layer.

    Returns:
        The report: each layer with its methods and backend, or the reason why it was left.

    Raises:
        UnsupportedLayer: with `strict`; the message holds every reason, and nothing was changed.
        BackendUnavailable: the named backend cannot run a layer; nothing was changed.
        ValueError: `methods` or `backend` is not known.
    """
    known = isinstance(methods, Collection) and all(name in ALL for name in methods)
    if not known or isinstance(methods, str) or not methods:
        raise ValueError(f"methods: expected a tuple of {ALL}, got {methods!r}")
    backends.check_name(backend)
    check_module(model)
    modules = dict(model.named_modules())
    rows = []
    for name, module in modules.items():
        if isinstance(module, PEFT_LAYERS):
            reason = swap_reason(module, methods) or reader_reason(name, modules)
            if reason is not None:
                rows.append(Row(name, None, None, reason))
            else:
                named = ", ".join(methods_of(module, methods)[0]) or "no adapter"
                rows.append(Row(name, named, _resolve(module.base_layer, backend), None))
    if "base" in methods:
        rows += _bare_rows(modules, methods, backend)
    report = Report(rows)
    if strict and (report.left or not report.fused):
        raise UnsupportedLayer(f"model: expected only layers that can be fused, got {report}")
    if not report.fused:
        warnings.warn(f"accelerate: {report}", stacklevel=2)
    for row in report.left:
        _restore_layer(modules[row.name])
    for row in report.fused:
        layer: Any = modules[row.name]
        base: Any = layer.base_layer if isinstance(layer, PEFT_LAYERS) else layer
        if is_linear4bit(base):
            warn_slow_compute_dtype(base, base.weight.quant_state.dtype)
        layer.__class__ = _among(_FUSED, layer) or type(layer)
        layer.backend = backend
        if layer is not base:
            layer.methods = tuple(methods)
        if isinstance(layer, FusedLora):
            layer.norms = NormCache()
    if report.fused:
        _protect_from_repacking(modules.values())
    return report


def restore(model: nn.Module) -> int:
    """Undoes `accelerate`: every layer gets back its class. Returns how many were fused."""
    check_module(model)
    count = 0
    for module in model.modules():
        count += _restore_layer(module)
        if module.__dict__.pop(_REPACKED_BEFORE, False):
            allow_repacking(module)
    return count


def check_module(model: object) -> None:
    """Raises TypeError unless `model` is an `nn.Module`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _restore_layer(layer: Any) -> bool:
    stock = _among(_STOCK, layer)
    if stock is None:
        return False
    layer.__class__ = stock
    swapped = "backend" in layer.__dict__
    for name in ("backend", "methods", "norms", "unmerged"):
        layer.__dict__.pop(name, None)
    return swapped


def _among(classes: dict[type, type], layer: Any) -> type | None:
    """The class that a layer gets by a table of classes, its edits kept where its output is edited."""
    cls: Any = type(layer)
    if isinstance(layer, Swapped):
        return cls._make(classes[cls._stock]) if cls._stock in classes else None
    return classes.get(cls)


def _protect_from_repacking(modules: Iterable[nn.Module]) -> None:
    """For every `Linear4bit`, adapted or not: one that is repacked gives the layers before it no gradient."""
    for module in modules:
        if protect_from_repacking(module):
            setattr(module, _REPACKED_BEFORE, True)


def swap_reason(layer: Any, methods: tuple[str, ...]) -> str | None:
    """Why `layer` of PEFT cannot be swapped, whichever adapter is active; None when it can."""
    if fused_kind(layer) is None:
        return f"{type(layer).__module__}.{type(layer).__name__} has no fused counterpart"
    return _unfusable(layer, layer.base_layer) or methods_of(layer, methods)[1]


def _unfusable(layer: Any, base: Any) -> str | None:
    """Why no fused forward can stand in for that of `layer`, over `base`; None when one can."""
    if "forward" in layer.__dict__:
        return "the layer has a forward of its own, as device_map offloading sets"
    if not isinstance(base, Swapped) and (reason := base_reason(base)) is not None:
        return reason
    try:
        check_base(base)
    except (UnsupportedLayer, UnsupportedWeight) as error:
        return str(error)
    return None


def _bare_rows(modules: dict[str, nn.Module], methods: tuple[str, ...], backend: str) -> list[Row]:
    """A row for each packed layer that no row of its adapter's speaks for."""
    rows = []
    for name, layer in modules.items():
        above = modules.get(name.rpartition(".")[0])
        if isinstance(layer, _BASES) and not _speaks_for_its_base(above, methods):
            reason = _unfusable(layer, layer)
            method, runs_on = (None, None) if reason else ("base", _resolve(layer, backend))
            rows.append(Row(name, method, runs_on, reason))
    return rows


def _speaks_for_its_base(layer: Any, methods: tuple[str, ...]) -> bool:
    """Whether the base of `layer` is nothing to swap: it is fused with it, or cannot be for its own sake."""
    if fused_kind(layer) is None:
        return isinstance(layer, LowRankLinear | AdapterLinear)
    unasked = methods_of(layer, methods)[1]  # then PEFT's forward calls the base
    return not unasked or _unfusable(layer, layer.base_layer) is not None


def reader_reason(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Whether a module above uses the layer's `.weight` itself, so that an adapter on it does nothing."""
    parts = name.split(".")
    for depth in range(len(parts)):
        above = type(modules[".".join(parts[:depth])])
        if reads_weight(above, ".".join(parts[depth:])):
            return f"{above.__name__} uses its .weight without calling it, so an adapter on it has no effect"
    return None


def _resolve(base: Any, backend: str) -> str:
    weight = from_linear(base)
    return backends.resolve(
        "lora_linear", weight.format, weight.weight.device.type, compute_dtype(base), backend
    )
