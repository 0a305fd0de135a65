"""`PackedLinear`: a frozen linear layer on a packed weight, for adapters to be put on, of any library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedWeight
from .formats import QuantizedWeight, from_linear
from .modules import check_base, fused_base_forward
from .ops import check_dtype
from .packed_weight import PackedWeight
from .packing import PACKINGS, pack

_TENSORS = QuantizedWeight._fields[:6]
_SAVED = ("weight", "absmax")


class PackedLinear(nn.Linear):
    """Y = X·Ŵᵀ + bias, in the dtype of X, over a frozen packed weight; differentiable in X and the bias.

    The packed bytes and `absmax` (the scales) are buffers, as is what else the format needs; casts of the
    model leave them as they are. State-dict keys: `weight`, `absmax`, for nf4 and fp4 those of their code and
    nested scales, and `bias` where there is one. A base layer for `LoRALinear`, `DoRALinear`, `AdapterLinear`
    and PEFT's tuners: `layer.weight` is a `PackedWeight`, which they read as a frozen [N, K] in `dtype`.
    """

    backend = "auto"  # `accelerate` sets another
    packing: tuple[Any, ...]
    dtype: torch.dtype
    """Of the layer as others see it; casts of the model change it."""

    def __init__(
        self, packed: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            packed: of any format but "dense", aliased.
            bias: [N], which becomes a frozen parameter.
            dtype: floating; by default that of the bias, or PyTorch's default dtype.

        Raises:
            UnsupportedWeight: a dense weight, or one that is not what its format says.
            ValueError: a bias of another shape; TypeError: a dtype that is not floating.
        """
        nn.Module.__init__(self)
        if not isinstance(packed, QuantizedWeight):
            raise UnsupportedWeight(f"packed: expected a QuantizedWeight, got {type(packed).__name__}")
        packed.check()
        if packed.format == "dense":
            raise UnsupportedWeight("packed: expected a packed weight, got a dense one")
        if bias is not None and list(bias.shape) != [packed.out_features]:
            raise ValueError(f"bias: expected [N] = [{packed.out_features}], got {list(bias.shape)}")
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.packing = packed[len(_TENSORS) :]
        self.dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        check_dtype(self.dtype)
        for name in _TENSORS:
            saved = name in _SAVED or packed.format not in PACKINGS  # in which the rest is constant
            self.register_buffer(name, getattr(packed, name), persistent=saved)
        parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", parameter)

    @classmethod
    def from_linear(cls, layer: nn.Linear, format: str) -> PackedLinear:
        """The quantized copy of an `nn.Linear` or a `Conv1D`, which shares its bias; `format` as in `pack`.

        Layers of bitsandbytes: `quantization.to_packed`.

        Raises:
            UnsupportedLayer, UnsupportedWeight: another layer, or a weight that cannot be quantized.
            ValueError: another format.
        """
        check_base(layer)
        weight = from_linear(layer)
        if weight.format != "dense":
            raise UnsupportedWeight(f"layer: expected a dense weight, got {weight.format}")
        return cls(pack(weight.weight, format), layer.bias, weight.weight.dtype).train(layer.training)

    @property
    def packed(self) -> QuantizedWeight:
        """The weight, aliased."""
        buffers = self._buffers
        return QuantizedWeight(*(buffers[name] for name in _TENSORS), *self.packing)  # type: ignore[arg-type]

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """The same for others to read: Ŵ [N, K]; the name of the packed bytes as a buffer."""
        if "weight" not in self._buffers:
            raise AttributeError("weight")
        return PackedWeight.of(self.packed, self.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # loading with assign=True sets it
            stored: Any = self._buffers["weight"]
            if isinstance(value, nn.Parameter | PackedWeight) or not isinstance(value, Tensor):
                got = type(value).__name__
            else:
                got = f"{value.dtype} {list(value.shape)}"
            expected = f"{stored.dtype} {list(stored.shape)}"
            if got != expected:
                raise UnsupportedWeight(f"weight: expected packed bytes, {expected}, got {got}")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return fused_base_forward(self, x, self.backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        kept = {name: tensor for name in _TENSORS if (tensor := self._buffers[name]) is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=kept["weight"].device)).dtype
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved: Any = self._buffers[name]
            if moved.dtype != tensor.dtype:  # a cast, which would change the values
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Packed bytes alone: PyTorch would convert the numbers of a dense weight to them."""
        for name in _TENSORS:
            given, own = state_dict.get(prefix + name), self._buffers[name]
            if given is None or own is None or given.dtype == own.dtype:
                continue
            if given.dtype != torch.float8_e4m3fn or self.packing[0] != "fp8" or name != "weight":
                errors.append(f"{prefix}{name}: expected {own.dtype} of a packed weight, got {given.dtype}")
                return
            state_dict = {**state_dict, prefix + name: given.view(own.dtype)}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, format={self.packing[0]!r}, bias={bias}"
