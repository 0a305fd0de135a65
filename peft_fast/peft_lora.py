"""PEFT's LoRA layers with a fused forward.

    LoRA   Y = X·Ŵᵀ + s·(drop(X)·Aᵀ·Bᵀ + lora_bias) + bias        X [..., K], Ŵ [N, K], A [R, K], B [N, R]
    DoRA   Y = c ⊙ (X_d·Ŵᵀ + s·X_d·Aᵀ·Bᵀ) + (X − X_d)·Ŵᵀ + bias   c = m / ‖Ŵ + s·B·A‖, X_d = drop(X), m [N]

The fused op carries one active adapter, LoRA or DoRA. Merging is PEFT's, but for packed weights, which it
quantizes anew each time: unmerging gives back the bytes that were there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import bnb as peft_bnb
from peft.tuners.lora import layer as peft_lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from .fused_layer import FusedLayer, dropout_p, dropout_reason, module_reason
from .modules import fused_dora_forward, fused_lora_forward
from .norm_cache import NormCache, fold_scaling

_LORA_PARTS: dict[str, type] = {"lora_A": nn.Linear, "lora_B": nn.Linear}
_DORA_PARTS: dict[str, type] = {**_LORA_PARTS, "lora_magnitude_vector": DoraLinearLayer}


class FusedLora(FusedLayer):
    """What the fused LoRA layers share."""

    norms: NormCache  # set by `accelerate` on each layer

    adapters = "lora_A"

    scaling: dict[str, Any]
    lora_variant: dict[str, Any]
    r: dict[str, int]

    def fused(self, x: Tensor, active: list[str]) -> Tensor:
        adapter = active[0]
        modules: dict[str, Any] = self._modules
        base, linear_B = modules["base_layer"], modules["lora_B"]._modules[adapter]
        lora_A, lora_B, lora_bias = modules["lora_A"]._modules[adapter].weight, linear_B.weight, linear_B.bias
        scaling, dropout = self.scaling[adapter], modules["lora_dropout"]._modules[adapter]
        p = dropout_p(dropout)
        if adapter in self.lora_variant:
            return fused_dora_forward(
                base,
                x,
                lora_A,
                lora_B,
                modules["lora_magnitude_vector"]._modules[adapter].weight,
                self.norms,
                scaling=scaling,
                dropout_p=p,
                training=self.training and dropout.training,  # PEFT looks at both
                dropout="peft",
                backend=self.backend,
            )
        if isinstance(scaling, Tensor) or torch.compiler.is_compiling():
            # As the op's number, a tensor is waited for and a number compiled in.
            lora_B = fold_scaling(lora_B, scaling)
            lora_bias = fold_scaling(lora_bias, scaling) if lora_bias is not None else None
            scaling = 1.0
        return fused_lora_forward(
            base,
            x,
            lora_A,
            lora_B,
            scaling=scaling,
            lora_bias=lora_bias,
            dropout_p=p,
            training=dropout.training,
            backend=self.backend,
        )

    def describe(self, active: list[str]) -> str:
        adapter = active[0]
        r, scaling = self.r[adapter], float(self.scaling[adapter])
        return f"{self.method(self, adapter)} adapter {adapter!r}, r={r}, scaling={scaling:g}"

    @staticmethod
    def method(layer: Any, adapter: str) -> str:
        variant = layer.lora_variant.get(adapter)
        if variant is None:
            return "lora"
        return "dora" if type(variant) is DoraLinearVariant else f"a LoRA variant, {type(variant).__name__}"

    @staticmethod
    def part_reason(layer: Any, adapter: str) -> str | None:
        modules, dora = layer._modules, adapter in layer.lora_variant
        for name, expected in (_DORA_PARTS if dora else _LORA_PARTS).items():
            reason = module_reason(name, modules[name]._modules[adapter], expected)
            if reason is not None:
                return reason
        if dora and modules["lora_B"]._modules[adapter].bias is not None:
            return "lora_B has a bias, under DoRA"
        return dropout_reason("lora_dropout", modules["lora_dropout"]._modules[adapter])

    def unmerge(self) -> None:
        super().unmerge()  # type: ignore[misc]  # PEFT's
        self.reset_norm()  # PEFT writes a dense weight through `.data`

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.reset_norm()  # under FSDP what is loaded goes into shards

    def reset_norm(self) -> None:
        """Has the next DoRA forward compute its norm: after writes that `norm_cache` does not notice."""
        self.norms.reset()


class FusedLinear(FusedLora, peft_lora.Linear):
    """PEFT's LoRA layer on a dense `nn.Linear` or `Conv1D`, with the fused forward."""


class Unmerged(NamedTuple):
    """The packed weight of a layer with merged adapters, before they were."""

    weight: Any
    attributes: dict[str, Any]  # of `weight`: PEFT's merge takes some from it
    scales: tuple[Any, ...]  # of an 8-bit layer's state
    merged: Any
    """The weight that merging put in its place; None while it does."""


_SCALES = ("CB", "SCB")


class _Packed(FusedLora):
    """What the layers on packed weights share. A merged one holds both weights, until it is unmerged."""

    unmerged: Unmerged | None = None

    # PEFT's.
    get_base_layer: Callable[[], Any]
    merged: bool

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        kept = self._kept(base)
        if kept is None and not self.merged:
            scales = tuple(getattr(base.state, name) for name in _SCALES) if hasattr(base, "state") else ()
            kept = Unmerged(base.weight, dict(vars(base.weight)), scales, None)
        if kept is None:
            return super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        # PEFT's merge of a second DoRA adapter takes the first one out, and merges it again.
        self.unmerged = kept._replace(merged=None)
        try:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        finally:  # of several adapters the first may be merged already
            self.unmerged = kept._replace(merged=base.weight)
            if not self.merged:
                del self.unmerged

    def unmerge(self) -> None:
        base = self.get_base_layer()
        kept = self._kept(base)
        super().unmerge()
        self.__dict__.pop("unmerged", None)
        if kept is None:
            return
        device = base.weight.device
        vars(kept.weight).update(kept.attributes)
        base.weight = kept.weight if kept.weight.device == device else kept.weight.to(device)
        if "quant_state" in vars(base):
            base.quant_state = base.weight.quant_state
        for name, scale in zip(_SCALES, kept.scales, strict=False):
            setattr(base.state, name, None if scale is None else scale.to(device))

    def _kept(self, base: Any) -> Unmerged | None:
        """What to give back; None where nothing is merged, or another weight was set since."""
        kept = self.unmerged
        return kept if kept is not None and (kept.merged is None or kept.merged is base.weight) else None


class FusedLinear4bit(_Packed, peft_bnb.Linear4bit):
    """PEFT's LoRA layer on a bitsandbytes `Linear4bit`, with the fused forward."""


class FusedLinear8bitLt(_Packed, peft_bnb.Linear8bitLt):
    """PEFT's LoRA layer on a bitsandbytes `Linear8bitLt`, with the fused forward."""
