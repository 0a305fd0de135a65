"""`lora_linear` with its update merged into a half-precision weight, as plain PyTorch on the CPU.

    merge        W̃ = round(c ⊙ (Ŵ + s·B·A)), Y = X·W̃ᵀ + bias, dX = dY·W̃
    stochastic   the same, W̃ rounded up or down at random, right on average

c is DoRA's out_scale [N], 1 for LoRA. One library GEMM, with sums in fp32 and one rounding, makes Y and
dX. The gradients of A, B, c and the bias do not depend on the form.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_fast import backends, reference
from peft_fast.formats import QuantizedWeight
from peft_fast.reference import Gradients, Needs

FORMS = ("split", "merge", "stochastic")


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """fp32 values in a half dtype: one of the two neighbours, the nearer one more often, right on average."""
    nearest = values.to(dtype)
    rest = values - nearest.float()
    start = torch.where(nearest == 0, torch.copysign(nearest, rest.to(dtype)), nearest)
    outward = (rest.signbit() == start.signbit()).to(torch.int16)  # bit patterns count up, away from zero
    other = (start.view(torch.int16) + (2 * outward - 1)).view(dtype)
    probability = rest / (other.float() - nearest.float())
    return torch.where(torch.rand(values.shape, generator=generator) < probability, other, nearest)


def merged(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, out_scale: Tensor | None
) -> Tensor:
    """c ⊙ (Ŵ + s·B·A) [N, K] in fp32, before it is rounded."""
    total = torch.addmm(weight, lora_B.float(), lora_A.float(), alpha=scaling)
    return total if out_scale is None else total.mul_(out_scale.unsqueeze(1))


class Merge:
    """A backend that carries `lora_linear` out in merged form, with the signatures of `reference.py`."""

    def __init__(self, stochastic: bool = False) -> None:
        # A seed of its own: the same stream as the weights' would not be independent of them.
        self.generator = torch.Generator().manual_seed(20_000) if stochastic else None

    def scratch(
        self,
        weight: QuantizedWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        out_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """W̃ [N, K] in `dtype`."""
        total = merged(self.dequantize(weight, torch.float32), lora_A, lora_B, scaling, out_scale)
        if self.generator is None or dtype == torch.float32:
            return total.to(dtype)
        return round_stochastically(total, dtype, self.generator)

    def dequantize(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        name = backends.resolve("dequantize", weight.format, weight.weight.device.type, dtype)
        return backends.BACKENDS[name].load().dequantize(weight, dtype)

    def lora_linear(
        self,
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        dropout_mask: Tensor | None,
        out_scale: Tensor | None,
        scaling: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        if dropout_mask is not None:
            raise ValueError("dropout_mask: expected None, as the merged form has no dropout, got a mask")
        scratch = self.scratch(weight, lora_A, lora_B, scaling, out_scale, x.dtype)
        y = F.linear(x, scratch, None if bias is None else bias.to(x.dtype))
        return y, x.float() @ lora_A.float().t()

    def lora_linear_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: QuantizedWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        z: Tensor,
        dropout_mask: Tensor | None,
        out_scale: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        scaling: float,
        dropout_p: float,
        needs: Needs,
    ) -> Gradients:
        others = reference.lora_linear_backward(
            grad, x, weight, lora_A, lora_B, z, dropout_mask, out_scale, bias, y, scaling, dropout_p,
            needs._replace(x=False),
        )  # fmt: skip
        if not needs.x:
            return others
        return others._replace(x=grad @ self.scratch(weight, lora_A, lora_B, scaling, out_scale, x.dtype))
