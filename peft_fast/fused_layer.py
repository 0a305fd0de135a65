"""What the fused subclasses of PEFT's layers share: which forward runs next, and why.

Only `forward` is overridden; modules, parameters, state-dict keys, merging and adapter switching are PEFT's.
The fused op carries the active adapter and the bare packed base. Whatever else PEFT's forward does at that
moment, and whatever is attached to the call of a submodule that fusing would skip, goes through PEFT's own
forward: `choose` says which, and why.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .base_layers import FUSED_BASES, STOCK_BASES
from .formats import stored_weight
from .modules import fused_base_forward

METHODS = ("lora", "dora", "vera", "ia3")

_DENSE_BASES = frozenset((nn.Linear, Conv1D))
_PACKED_BASES = frozenset((*FUSED_BASES, *STOCK_BASES))
_ADAPTER_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
_PLAIN_TENSORS: frozenset[type] = frozenset((Tensor, nn.Parameter, Params4bit, Int8Params, FakeTensor))


class FusedLayer(nn.Module):
    """A layer of PEFT with the fused forward; what has to be said for a method is below `forward`.

    The static methods answer for PEFT's own layer too.
    """

    # Set by `accelerate` on each layer.
    backend: str
    methods: tuple[str, ...]

    adapters: ClassVar[str]
    """The submodule whose keys are the names of the adapters on a layer."""
    several: ClassVar[bool] = False
    """Whether the fused op carries several active adapters."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # PEFT hands mixed batches (adapter_names) and aLoRA offsets over as keyword arguments.
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        active, reason = choose(self)
        if reason is not None:
            return super().forward(x)
        if not active:
            base: Any = self._modules["base_layer"]
            return fused_base_forward(base, x, self.backend)
        return self.fused(x, active)

    def fused(self, x: Tensor, active: list[str]) -> Tensor:
        """The layer's output with these adapters, by the fused op."""
        raise NotImplementedError

    def describe(self, active: list[str]) -> str:
        """What `fused` applies, for `explain`."""
        raise NotImplementedError

    @staticmethod
    def method(layer: Any, adapter: str) -> str:
        """The method of an adapter, one of `METHODS`, or else what it is."""
        raise NotImplementedError

    @staticmethod
    def part_reason(layer: Any, adapter: str) -> str | None:
        """Why the parts of an adapter are not for the fused op; None when they are."""
        raise NotImplementedError


def choose(layer: Any) -> tuple[list[str], str | None]:
    """What the next forward of a fused layer computes; runs at every forward, so it only reads attributes.

    Returns:
        (adapters, None): base and these adapters, fused; the packed base alone where there are none.
        ([], reason): PEFT's own forward, and why.
    """
    modules = layer._modules
    base = modules["base_layer"]
    reason = base_reason(base) or observed("base_layer", base)
    if reason is not None:
        return [], reason
    if _has_any_global_hook():
        return [], "a hook for all modules is registered"
    if (reason := _transformed()) is not None:
        return [], reason
    if layer._disable_adapters:
        if layer.merged_adapters:
            return [], "the adapters are disabled, and PEFT unmerges them first"
        return _base_alone(base, "the adapters are disabled")
    if layer.merged_adapters:
        return _base_alone(base, f"merged adapters: {layer.merged_adapters}")
    present = modules[layer.adapters]
    active = [name for name in layer.active_adapters if name in present]
    if not active:
        return _base_alone(base, "no active adapter")
    if len(active) > 1 and not layer.several:
        return [], f"several active adapters: {active}"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return [], "casting of the input is disabled"
    for adapter in active:
        reason = method_reason(adapter, layer.method(layer, adapter), layer.methods)
        reason = reason or layer.part_reason(layer, adapter)
        if reason is not None:
            return [], reason
    return active, None


def method_reason(adapter: str, method: str, methods: tuple[str, ...]) -> str | None:
    """Why an adapter is not for the fused op, by its method alone; None when it is."""
    if method in methods:
        return None
    asked = f", and asked for was {methods}" if method in METHODS else ""
    return f"adapter {adapter!r} is {method}{asked}"


def base_reason(base: Any) -> str | None:
    """Why `base` cannot be under a fused layer; None when it can."""
    if type(base) in _DENSE_BASES:
        weight = base.weight
        if weight.requires_grad:
            return "the weight of base_layer is trained, and the fused op gives it no gradient"
    elif type(base) in _PACKED_BASES:
        weight = stored_weight(base)
    else:
        expected = "nn.Linear, Conv1D, bitsandbytes Linear4bit or Linear8bitLt, or PackedLinear"
        return f"base_layer is a {type(base).__name__}, not exactly {expected}"
    if type(weight) not in _PLAIN_TENSORS:
        sharded = "; accelerate has to come before fully_shard" if type(weight).__name__ == "DTensor" else ""
        return f"the weight of base_layer is a {type(weight).__name__}, not a plain tensor{sharded}"
    if weight.is_meta:
        return "the weight of base_layer is on the meta device"
    if type(weight) is Int8Params and weight.dtype is not torch.int8:
        return "the weight of base_layer is not in int8: has_fp16_weights is True, or the layer was not moved"
    return None


def _base_alone(base: nn.Module, reason: str) -> tuple[list[str], str | None]:
    """A dense base is called by PEFT's forward; a packed one runs in the fused op."""
    return [], reason if type(base) in _DENSE_BASES else None


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


def module_reason(name: str, module: Any, expected: type) -> str | None:
    """Why a part that PEFT calls, with a weight, is not for the fused op; None when it is."""
    kind: type = type(module)
    if kind is not expected:
        return f"{name} is a {kind.__name__}, not a plain {expected.__name__}"
    weight = module._parameters.get("weight")
    if type(weight) in _PLAIN_TENSORS and weight.dtype in _ADAPTER_DTYPES:
        return observed(name, module)
    return tensor_reason(f"the weight of {name}", module.weight) or observed(name, module)


def tensor_reason(name: str, tensor: Any) -> str | None:
    """Why a tensor of an adapter is not for the fused op; None when it is."""
    if type(tensor) not in _PLAIN_TENSORS:
        return f"{name} is a {type(tensor).__name__}, not a plain tensor"
    return None if tensor.dtype in _ADAPTER_DTYPES else f"{name} is {tensor.dtype}"


def vector_reason(name: str, vectors: Any, adapter: str) -> str | None:
    """Why the entry of an adapter in PEFT's `ParameterDict` is not for the fused op; None when it is."""
    if type(vectors) is not nn.ParameterDict:
        return f"{name} is a {type(vectors).__name__}, not a plain ParameterDict"
    return tensor_reason(name, vectors._parameters.get(adapter))


def dropout_reason(name: str, dropout: nn.Module) -> str | None:
    """Why a dropout module is not for the fused op; None when it is."""
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"{name} is a {type(dropout).__name__}, not nn.Dropout or nn.Identity"
    return observed(name, dropout)


def dropout_p(dropout: Any) -> float:
    """The probability of an `nn.Dropout`, 0 of an `nn.Identity`."""
    return dropout.p if type(dropout) is nn.Dropout else 0.0
