"""bitsandbytes' frozen `Linear4bit` without an adapter, with a fused forward: Y = X·Ŵᵀ + bias.

`swap.accelerate` swaps them in, so that layers without an adapter, prefix and prompt tuning, and adapters
around a layer or beside it run on the fused op too: forward, and dX in the backward pass.
"""

from __future__ import annotations

from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4
from torch import Tensor, nn

from .modules import fused_base_forward


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


FUSED_BASES: dict[type, type] = {
    Linear4bit: FusedBase4bit,
    LinearNF4: FusedBaseNF4,
    LinearFP4: FusedBaseFP4,
}
STOCK_BASES: dict[type, type] = {fused: stock for stock, fused in FUSED_BASES.items()}
