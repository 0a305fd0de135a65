"""PEFT's LoRA layers with a fused forward: the subclasses that `swap.accelerate` swaps in.

    LoRA   Y = X·Ŵᵀ + s·(drop(X)·Aᵀ·Bᵀ + lora_bias) + bias        X [..., K], Ŵ [N, K], A [R, K], B [N, R]
    DoRA   Y = c ⊙ (X_d·Ŵᵀ + s·X_d·Aᵀ·Bᵀ) + (X − X_d)·Ŵᵀ + bias   c = m / ‖Ŵ + s·B·A‖, X_d = drop(X), m [N]

Only `forward` is overridden; modules, parameters, state-dict keys, merging and adapter switching are PEFT's.
The fused op carries one active adapter, LoRA or DoRA, and the bare 4-bit base. Whatever else PEFT's forward
does at that moment, and whatever is attached to the call of a submodule that fusing would skip, goes through
PEFT's own forward: `choose` says which, and why.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import bnb as peft_bnb
from peft.tuners.lora import layer as peft_lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .base_layers import FUSED_BASES, STOCK_BASES
from .modules import fused_base_forward, fused_dora_forward, fused_lora_forward
from .norm_cache import NormCache, fold_scaling

METHODS = ("lora", "dora")

_DENSE_BASES = frozenset((nn.Linear, Conv1D))
_4BIT_BASES = frozenset((*FUSED_BASES, *STOCK_BASES))
_LORA_PARTS: dict[str, type] = {"lora_A": nn.Linear, "lora_B": nn.Linear}
_DORA_PARTS: dict[str, type] = {**_LORA_PARTS, "lora_magnitude_vector": DoraLinearLayer}
_ADAPTER_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
_PLAIN_TENSORS: frozenset[type] = frozenset((Tensor, nn.Parameter, Params4bit, FakeTensor))


class _FusedForward(nn.Module):
    # Set by `accelerate` on each layer.
    backend: str
    methods: tuple[str, ...]
    norms: NormCache

    scaling: dict[str, Any]
    lora_variant: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        # PEFT hands mixed batches (adapter_names) and aLoRA offsets over as keyword arguments.
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        adapter, reason = choose(self)
        if reason is not None:
            return super().forward(x)
        if adapter is None:
            return fused_base_forward(base, x, self.backend)
        lora_A, linear_B = modules["lora_A"]._modules[adapter].weight, modules["lora_B"]._modules[adapter]
        lora_B, lora_bias, scaling = linear_B.weight, linear_B.bias, self.scaling[adapter]
        dropout = modules["lora_dropout"]._modules[adapter]
        p = dropout.p if type(dropout) is nn.Dropout else 0.0
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

    def unmerge(self) -> None:
        super().unmerge()  # type: ignore[misc]  # PEFT's
        self.reset_norm()  # PEFT writes a dense weight through `.data`

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.reset_norm()  # under FSDP what is loaded goes into shards

    def reset_norm(self) -> None:
        """Has the next DoRA forward compute its norm: after writes that `norm_cache` does not notice."""
        self.norms.reset()


class FusedLinear(_FusedForward, peft_lora.Linear):
    """PEFT's LoRA layer on a dense `nn.Linear` or `Conv1D`, with the fused forward."""


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
    reason = base_reason(base) or observed("base_layer", base)
    if reason is not None:
        return None, reason
    if _has_any_global_hook():
        return None, "a hook for all modules is registered"
    if (reason := _transformed()) is not None:
        return None, reason
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
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return None, "casting of the input is disabled"
    adapter = active[0]
    if (reason := method_reason(layer, adapter, layer.methods)) is not None:
        return None, reason
    parts = _DORA_PARTS if adapter in layer.lora_variant else _LORA_PARTS
    for name, expected in parts.items():
        part = modules[name]._modules[adapter]
        kind: type = type(part)
        if kind is not expected:
            return None, f"{name} is a {kind.__name__}, not a plain {expected.__name__}"
        weight = part.weight
        if type(weight) not in _PLAIN_TENSORS:
            return None, f"the weight of {name} is a {type(weight).__name__}, not a plain tensor"
        if weight.dtype not in _ADAPTER_DTYPES:
            return None, f"the weight of {name} is {weight.dtype}"
        if (reason := observed(name, part)) is not None:
            return None, reason
    if adapter in layer.lora_variant and modules["lora_B"]._modules[adapter].bias is not None:
        return None, "lora_B has a bias, under DoRA"
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return None, f"lora_dropout is a {type(dropout).__name__}, not nn.Dropout or nn.Identity"
    reason = observed("lora_dropout", dropout)
    return (adapter, None) if reason is None else (None, reason)


def method(layer: Any, adapter: str) -> str | None:
    """The method of an adapter, of `METHODS`; None for another of PEFT's variants."""
    variant = layer.lora_variant.get(adapter)
    if variant is None:
        return "lora"
    return "dora" if type(variant) is DoraLinearVariant else None


def method_reason(layer: Any, adapter: str, methods: tuple[str, ...]) -> str | None:
    """Why an adapter is not for the fused op, by its method alone; None when it is."""
    name = method(layer, adapter)
    if name is None:
        return f"adapter {adapter!r} is a LoRA variant, {type(layer.lora_variant[adapter]).__name__}"
    return None if name in methods else f"adapter {adapter!r} is {name}, and asked for was {methods}"


def base_reason(base: Any) -> str | None:
    """Why `base` cannot be under a fused layer; None when it can."""
    if type(base) in _DENSE_BASES:
        weight = base.weight
        if weight.requires_grad:
            return "the weight of base_layer is trained, and the fused op gives it no gradient"
    elif type(base) in _4BIT_BASES:
        weight = base.weight
    else:
        expected = "nn.Linear, Conv1D or bitsandbytes Linear4bit"
        return f"base_layer is a {type(base).__name__}, not exactly {expected}"
    if type(weight) not in _PLAIN_TENSORS:
        sharded = "; accelerate has to come before fully_shard" if type(weight).__name__ == "DTensor" else ""
        return f"the weight of base_layer is a {type(weight).__name__}, not a plain tensor{sharded}"
    if weight.is_meta:
        return "the weight of base_layer is on the meta device"
    return None


def _base_alone(base: nn.Module, reason: str) -> tuple[None, str | None]:
    """A dense base is called by PEFT's forward; a 4-bit one runs in the fused op."""
    return None, reason if type(base) in _DENSE_BASES else None


def _transformed() -> str | None:
    """What transforms PyTorch's ops now and knows no rule for the fused one; a compiler does."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active, and the fused op has no rules for it"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on, and the fused op has no rule for it"
    if torch._C._is_tracing():
        return "TorchScript is tracing, and what it writes has to run without this package"
    return None


def observed(name: str, module: nn.Module) -> str | None:
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
