"""`explain(module)`: what its next forward runs, with which backend, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import backends
from .adapter_linear import AdapterLinear
from .base_layers import FusedBase
from .errors import BackendUnavailable, UnsupportedWeight
from .formats import QuantizedWeight, from_linear
from .fused_layer import choose
from .modules import DoRALinear, LowRankLinear, compute_dtype
from .packed_linear import PackedLinear
from .peft_layers import METHODS, PEFT_LAYERS, STOCK
from .reft.edit import LoReFT
from .swap import reader_reason, swap_reason

EXPLAINED = (LowRankLinear, AdapterLinear, *PEFT_LAYERS, FusedBase, PackedLinear, LoReFT)


def explain(module: nn.Module) -> str:
    """What the next forward of `module` runs: op, weight format, backend, adapter; or PEFT's own, and why.

    For a fused layer, a LoRA, VeRA or IA3 layer of PEFT, a `LoRALinear`, `DoRALinear`, `AdapterLinear` or
    `LoReFT`; for a model, for each, with the reasons why other backends are unavailable once, at the end.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if isinstance(module, EXPLAINED):
        text, unavailable = _explain_layer(module)
        lines = [f"backend {name} is unavailable: {reason}" for name, reason in unavailable.items()]
        return "\n    ".join((text, *lines))
    modules = dict(module.named_modules())
    layers = {name: m for name, m in modules.items() if isinstance(m, EXPLAINED)}
    if not layers:
        return f"{type(module).__name__}: its own forward runs; nothing in it is adapted or fused"
    explained = {name: _explain_layer(m, reader_reason(name, modules)) for name, m in layers.items()}
    lines = [f"{name}: {text}" for name, (text, _) in explained.items()]
    names: dict[str, dict[str, None]] = {}
    for _, unavailable in explained.values():
        for name, reason in unavailable.items():
            names.setdefault(reason, {})[name] = None
    lines += [f"unavailable: {', '.join(found)}: {reason}" for reason, found in names.items()]
    return "\n".join(lines)


def _explain_layer(layer: Any, reader_reason: str | None = None) -> tuple[str, dict[str, str]]:
    """What runs, and why other backends are unavailable to its op, by backend."""
    kind = type(layer).__name__
    if isinstance(layer, LoReFT):
        dtype, device = layer.bias.dtype, layer.bias.device.type
        lines = ["loreft", *_explain_backend("loreft", "dense", device, dtype, layer.backend)]
        return "\n    ".join((f"{kind}: {layer.extra_repr()}", *lines)), {}
    reason: str | None
    base = layer if isinstance(layer, FusedBase | PackedLinear) else layer.base_layer
    if layer is base:
        applied = "no adapter, the base alone"
    elif isinstance(layer, LowRankLinear):
        applied = f"r={layer.r}, scaling={layer.scaling:g}"
        if isinstance(layer, DoRALinear):
            applied += f", dropout={layer.dropout!r}, norm_grad={layer.norm_grad!r}"
    elif isinstance(layer, AdapterLinear):
        options = "".join(f", {name}={value!r}" for name, value in layer.options.items())
        applied = f"{layer.method}{options}"
    elif type(layer) not in STOCK:
        reason = (
            swap_reason(layer, METHODS) or reader_reason or "not swapped, accelerate(model) would fuse it"
        )
        return f"{kind}: PEFT's own forward: {reason}", {}
    else:
        active, reason = choose(layer)
        if reason is not None:
            return f"{kind}: PEFT's own forward: {reason}", {}
        applied = layer.describe(active) if active else "no adapter, the base alone"
    try:
        weight = from_linear(base)
    except UnsupportedWeight as error:
        return f"{kind}: the next forward raises UnsupportedWeight: {error}", {}
    lines, unavailable = _explain_op(layer, base, weight)
    return "\n    ".join((f"{kind}: {applied}", *lines)), unavailable


def _explain_op(layer: Any, base: Any, weight: QuantizedWeight) -> tuple[list[str], dict[str, str]]:
    nested = ", nested absmax" if weight.nested else ""
    dtype, device = compute_dtype(base), weight.weight.device.type
    case = f"{weight.format} [{weight.out_features}, {weight.in_features}]{nested}, {dtype} on {device}"
    lines = [f"lora_linear over {case}"]
    lines += _explain_backend("lora_linear", weight.format, device, dtype, layer.backend)
    available = backends.availability("lora_linear", weight.format, device, dtype)
    return lines, {name: reason for name, reason in available.items() if reason is not None}


def _explain_backend(op: str, format: str, device: str, dtype: torch.dtype, asked: str) -> list[str]:
    try:
        backend = backends.resolve(op, format, device, dtype, asked)
    except BackendUnavailable as error:
        return [f"the next forward raises BackendUnavailable: {error}"]
    ran = backends.calls[op, backend]
    return [f"backend {backend} (asked for: {asked}), run {ran} times in this process"]
