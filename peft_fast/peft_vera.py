"""PEFT's VeRA layer with a fused forward, on a dense or a 4-bit layer.

    Y = X·Ŵᵀ + b ⊙ (B·(d ⊙ (A·drop(X)))) + bias        X [..., K], Ŵ [N, K], A [R, K], B [N, R], b [N], d [R]

A and B are the leading parts of what all layers of the model share; the equation is that of `methods.py`.
"""

from __future__ import annotations

from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.vera import layer as peft_vera
from torch import Tensor

from .adapter_linear import fused_method_forward
from .formats import stored_weight
from .fused_layer import FusedLayer, dropout_p, dropout_reason, tensor_reason, vector_reason

_VECTORS = ("vera_lambda_b", "vera_lambda_d")
_PROJECTIONS = {"vera_A": 0, "vera_B": 1}
"""The shared matrices, with the axis that is the rank."""


class FusedLinear(FusedLayer, peft_vera.Linear):
    """PEFT's VeRA layer, with the fused forward. As PEFT's, it returns the dtype of x, under autocast too."""

    adapters = "vera_lambda_d"

    def fused(self, x: Tensor, active: list[str]) -> Tensor:
        modules: dict[str, Any] = self._modules
        adapter, base = active[0], modules["base_layer"]
        p = {name: modules[name]._parameters[adapter] for name in _VECTORS}
        p["vera_A"] = modules["vera_A"]._buffers[adapter][:, : self.in_features]
        p["vera_B"] = modules["vera_B"]._buffers[adapter][: self.out_features]
        dropout = modules["vera_dropout"]._modules[adapter]
        y = fused_method_forward(
            "vera",
            base,
            x,
            p,
            {},
            dropout_p=dropout_p(dropout),
            training=dropout.training,
            backend=self.backend,
        )
        return y.to(x.dtype)

    def describe(self, active: list[str]) -> str:
        return f"vera adapter {active[0]!r}, r={self.r[active[0]]}"

    @staticmethod
    def method(layer: Any, adapter: str) -> str:
        return "vera"

    @staticmethod
    def part_reason(layer: Any, adapter: str) -> str | None:
        modules = layer._modules
        for name in _VECTORS:
            if (reason := vector_reason(name, modules[name], adapter)) is not None:
                return reason
        r = modules["vera_lambda_d"]._parameters[adapter].shape[0]
        for name, axis in _PROJECTIONS.items():
            held = modules[name]
            if type(held) is not BufferDict:
                return f"{name} is a {type(held).__name__}, not a BufferDict"
            shared: Any = held._buffers.get(adapter)
            if (reason := tensor_reason(name, shared)) is not None:
                return reason
            if shared.device != stored_weight(layer.base_layer).device:
                return f"{name} is on {shared.device}, and the layer on another device"
            needed = layer.in_features if axis == 0 else layer.out_features
            if shared.shape[axis] != r or shared.shape[1 - axis] < needed:
                return f"{name} is {list(shared.shape)}, for rank {r} and {needed} features of the layer"
        return dropout_reason("vera_dropout", modules["vera_dropout"]._modules[adapter])
