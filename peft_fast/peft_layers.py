"""PEFT's LoRA layers with a fused forward: the subclasses that `convert.accelerate` swaps in.

    Y = X·Ŵᵀ + s·(drop(X)·Aᵀ·Bᵀ + lora_bias) + bias        X [..., K], Ŵ [N, K], A [R, K], B [N, R]

Only `forward` is overridden; modules, parameters, state-dict keys, merging and adapter switching are PEFT's.
The fused op carries one active adapter, and the bare 4-bit base. Whatever else PEFT's forward does at that
moment, and whatever is attached to the call of a submodule that fusing would skip, goes through PEFT's own
forward: `choose` says which, and why.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from peft.tuners.lora import bnb as peft_bnb
from peft.tuners.lora import layer as peft_lora
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from .modules import fused_lora_forward

_DENSE_BASES = frozenset((nn.Linear,))
_4BIT_BASES = frozenset((Linear4bit, LinearNF4, LinearFP4))
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter, Params4bit, FakeTensor))


class _FusedForward(nn.Module):
    backend: str = "auto"
    scaling: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # PEFT hands mixed batches (adapter_names) and aLoRA offsets over as keyword arguments.
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        adapter, reason = choose(self)
        if reason is not None:
            return super().forward(x)
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        if adapter is None:
            no_A, no_B = x.new_empty(0, base.in_features), x.new_empty(base.out_features, 0)
            return fused_lora_forward(base, x, no_A, no_B, scaling=1.0, backend=self.backend)
        linear_B, dropout = modules["lora_B"]._modules[adapter], modules["lora_dropout"]._modules[adapter]
        lora_B, lora_bias, scaling = linear_B.weight, linear_B.bias, self.scaling[adapter]
        if isinstance(scaling, Tensor) or torch.compiler.is_compiling():
            # Folded into B: as the op's float, a tensor is waited for and a number compiled in.
            acc = torch.promote_types(lora_B.dtype, torch.float32)
            lora_B = lora_B.to(acc) * scaling
            lora_bias = lora_bias.to(acc) * scaling if lora_bias is not None else None
            scaling = 1.0
        return fused_lora_forward(
            base,
            x,
            modules["lora_A"]._modules[adapter].weight,
            lora_B,
            scaling=scaling,
            lora_bias=lora_bias,
            dropout_p=dropout.p if type(dropout) is nn.Dropout else 0.0,
            training=dropout.training,
            backend=self.backend,
        )


class FusedLinear(_FusedForward, peft_lora.Linear):
    """PEFT's LoRA layer on a dense `nn.Linear`, with the fused forward."""


class FusedLinear4bit(_FusedForward, peft_bnb.Linear4bit):
    """PEFT's LoRA layer on a bitsandbytes `Linear4bit`, with the fused forward."""


FUSED: dict[type, type] = {peft_lora.Linear: FusedLinear, peft_bnb.Linear4bit: FusedLinear4bit}
STOCK: dict[type, type] = {fused: stock for stock, fused in FUSED.items()}


def choose(layer: Any) -> tuple[str | None, str | None]:
    """What the next forward of a fused layer computes; runs at every forward, so it only reads attributes.

    Returns:
        (adapter, None): base and adapter, fused. (None, None): the 4-bit base alone, by the fused op.
        (None, reason): PEFT's own forward, and why.
    """
    modules = layer._modules
    base, lora_A = modules["base_layer"], modules["lora_A"]._modules
    reason = base_reason(base) or _observed("base_layer", base)
    if reason is not None:
        return None, reason
    if _has_any_global_hook():
        return None, "a hook for all modules is registered"
    if layer._disable_adapters:
        if layer.merged_adapters:
            return None, "the adapters are disabled, and PEFT unmerges them first"
        return _base_alone(base, "the adapters are disabled")
    if layer.merged_adapters:
        return _base_alone(base, f"merged adapters: {layer.merged_adapters}")
    active = [name for name in layer.active_adapters if name in lora_A]
    if not active:
        return _base_alone(base, "no active adapter")
    if len(active) > 1:
        return None, f"several active adapters: {active}"
    adapter = active[0]
    if adapter in layer.lora_variant:
        return None, f"adapter {adapter!r} is a LoRA variant, {type(layer.lora_variant[adapter]).__name__}"
    for name in ("lora_A", "lora_B"):
        linear = modules[name]._modules[adapter]
        if type(linear) is not nn.Linear:
            return None, f"{name} is a {type(linear).__name__}, not a plain nn.Linear"
        if type(linear.weight) not in _PLAIN_TENSORS:
            return None, f"the weight of {name} is a {type(linear.weight).__name__}, not a plain tensor"
        if (reason := _observed(name, linear)) is not None:
            return None, reason
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return None, f"lora_dropout is a {type(dropout).__name__}, not nn.Dropout or nn.Identity"
    reason = _observed("lora_dropout", dropout)
    return (adapter, None) if reason is None else (None, reason)


def base_reason(base: Any) -> str | None:
    """Why `base` cannot be under a fused layer; None when it can."""
    if type(base) in _DENSE_BASES:
        weight = base.weight
        if weight.requires_grad:
            return "the weight of base_layer is trained, and the fused op gives it no gradient"
    elif type(base) in _4BIT_BASES:
        weight = base.weight
    else:
        return f"base_layer is a {type(base).__name__}, not exactly nn.Linear or bitsandbytes Linear4bit"
    if type(weight) not in _PLAIN_TENSORS:
        return f"the weight of base_layer is a {type(weight).__name__}, not a plain tensor"
    return None


def _base_alone(base: nn.Module, reason: str) -> tuple[None, str | None]:
    """A dense base is called by PEFT's forward; a 4-bit one runs in the fused op."""
    return None, reason if type(base) in _DENSE_BASES else None


def _observed(name: str, module: nn.Module) -> str | None:
    """What is attached to the call of `module`, which fusing would skip."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own, as device_map offloading sets"
    return None
