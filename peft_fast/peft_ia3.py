"""PEFT's IA3 layers with a fused forward.

    Y = γ ⊙ (X·Ŵᵀ + bias)        X [..., K], Ŵ [N, K], γ [N]
    Y = (γ ⊙ X)·Ŵᵀ + bias        γ [K], where `is_feedforward`

γ is the product of the vectors of all active adapters; the equations are those of `methods.py`.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from peft.tuners.ia3 import bnb as peft_bnb
from peft.tuners.ia3 import layer as peft_ia3
from torch import Tensor

from .adapter_linear import fused_method_forward
from .fused_layer import FusedLayer, vector_reason


class FusedIA3(FusedLayer):
    """What the fused IA3 layers share."""

    adapters = "ia3_l"
    several = True

    is_feedforward: bool

    def fused(self, x: Tensor, active: list[str]) -> Tensor:
        modules: dict[str, Any] = self._modules
        vectors = modules["ia3_l"]._parameters
        gamma = functools.reduce(operator.mul, [vectors[adapter] for adapter in active])
        options = {"feedforward": self.is_feedforward}
        return fused_method_forward(
            "ia3", modules["base_layer"], x, {"ia3_l": gamma}, options, backend=self.backend
        )

    def describe(self, active: list[str]) -> str:
        names = f"adapter {active[0]!r}" if len(active) == 1 else f"adapters {active}"
        return f"ia3 {names} on the {'input' if self.is_feedforward else 'output'}"

    @staticmethod
    def method(layer: Any, adapter: str) -> str:
        return "ia3"

    @staticmethod
    def part_reason(layer: Any, adapter: str) -> str | None:
        return vector_reason("ia3_l", layer._modules["ia3_l"], adapter)


class FusedLinear(FusedIA3, peft_ia3.Linear):
    """PEFT's IA3 layer on a dense `nn.Linear` or `Conv1D`, with the fused forward."""


class FusedIA3InDtype(FusedIA3):
    """Returns the dtype of x, as the base and PEFT's dense layer do, whichever forward runs.

    PEFT's own on a layer of bitsandbytes returns float32 for half x, which the attention of a half model then
    refuses.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs).to(x.dtype)


class FusedLinear4bit(FusedIA3InDtype, peft_bnb.Linear4bit):
    """PEFT's IA3 layer on a bitsandbytes `Linear4bit`, with the fused forward."""


class FusedLinear8bitLt(FusedIA3InDtype, peft_bnb.Linear8bitLt):
    """PEFT's IA3 layer on a bitsandbytes `Linear8bitLt`, with the fused forward."""
