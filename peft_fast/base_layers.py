"""bitsandbytes' frozen layers without an adapter, with a fused forward: Y = X·Ŵᵀ + bias.

`swap.accelerate` swaps them in, so that layers without an adapter, prefix and prompt tuning, and adapters
around a layer or beside it run on the fused op too: forward, and dX in the backward pass.
"""

from __future__ import annotations

from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearFP4, LinearNF4
from torch import Tensor, nn

from .modules import fused_base_forward
from .packed_linear import PackedLinear


class FusedBase(nn.Linear):
    """What the fused subclasses of bitsandbytes' layers share."""

    backend: str  # set by `accelerate` on each layer

    def forward(self, x: Tensor) -> Tensor:
        return fused_base_forward(self, x, self.backend)


class FusedBase4bit(FusedBase, Linear4bit):
    """`Linear4bit` with the fused forward."""


class FusedBaseNF4(FusedBase, LinearNF4):
    """`LinearNF4` with the fused forward."""


class FusedBaseFP4(FusedBase, LinearFP4):
    """`LinearFP4` with the fused forward."""


class FusedBase8bit(FusedBase, Linear8bitLt):
    """`Linear8bitLt` with the fused forward, which rounds no activation to int8."""


FUSED_BASES: dict[type, type] = {
    PackedLinear: PackedLinear,
    Linear4bit: FusedBase4bit,
    LinearNF4: FusedBaseNF4,
    LinearFP4: FusedBaseFP4,
    Linear8bitLt: FusedBase8bit,
}
STOCK_BASES: dict[type, type] = {fused: stock for stock, fused in FUSED_BASES.items()}
