"""The table of PEFT's layers that have a fused counterpart; `swap.accelerate` swaps those in."""

from __future__ import annotations

from typing import Any

from peft.tuners.ia3 import bnb as ia3_bnb
from peft.tuners.ia3 import layer as ia3_layer
from peft.tuners.lora import bnb as lora_bnb
from peft.tuners.lora import layer as lora_layer
from peft.tuners.vera import layer as vera_layer

from . import peft_ia3, peft_lora, peft_vera
from .fused_layer import METHODS, FusedLayer, method_reason

PEFT_LAYERS = (lora_layer.LoraLayer, vera_layer.VeraLayer, ia3_layer.IA3Layer)
"""The layers of PEFT's tuners for these methods, of which some have a fused counterpart."""

FUSED: dict[type, type[FusedLayer]] = {
    lora_layer.Linear: peft_lora.FusedLinear,
    lora_bnb.Linear4bit: peft_lora.FusedLinear4bit,
    lora_bnb.Linear8bitLt: peft_lora.FusedLinear8bitLt,
    vera_layer.Linear: peft_vera.FusedLinear,
    ia3_layer.Linear: peft_ia3.FusedLinear,
    ia3_bnb.Linear4bit: peft_ia3.FusedLinear4bit,
    ia3_bnb.Linear8bitLt: peft_ia3.FusedLinear8bitLt,
}
STOCK: dict[type, type] = {fused: stock for stock, fused in FUSED.items()}


def fused_kind(layer: Any) -> type[FusedLayer] | None:
    """The fused class of one of PEFT's layers, swapped or not; None where it has none."""
    cls: Any = type(layer)
    return cls if cls in STOCK else FUSED.get(cls)


def methods_of(layer: Any, methods: tuple[str, ...]) -> tuple[list[str], str | None]:
    """Those of `methods` that the adapters of a layer have, in the order of `METHODS`.

    And where it has adapters and none of them, the reason of the first; the layer has a fused counterpart.
    """
    kind: Any = fused_kind(layer)
    of = {adapter: kind.method(layer, adapter) for adapter in getattr(layer, kind.adapters)}
    found = [name for name in METHODS if name in methods and name in of.values()]
    if found or not of:
        return found, None
    return [], next(method_reason(adapter, method, methods) for adapter, method in of.items())
