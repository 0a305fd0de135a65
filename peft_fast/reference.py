"""The definition of right: each op in straight-line PyTorch, for any device and dtype.

Every backend is compared with this file, and this file with PEFT, pyreft and bitsandbytes. Backends share
these signatures. Shapes: M tokens, K in-features, N out-features, R rank.

The low-rank term accumulates in fp32 (fp64 for fp64 activations), whatever the dtypes of X, A and B; the base
term is one library GEMM in the dtype of X.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .formats import QuantizedWeight


class Needs(NamedTuple):
    """Which gradients of `lora_linear` to compute."""

    x: bool
    lora_A: bool
    lora_B: bool
    bias: bool
    out_scale: bool


class Gradients(NamedTuple):
    """Gradients of `lora_linear`: dX [M, K], dA [R, K], dB [N, R] in their operands' dtypes, the others fp32.

    dbias and d_out_scale are [N]. None where not needed.
    """

    x: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    out_scale: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropout_scale(dropout_p: float) -> float:
    """1/(1-p), and 0 where everything is dropped."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def draw_mask(x: Tensor, dropout_p: float) -> Tensor:
    """The keep mask, bool [M, K], that `F.dropout(x, dropout_p)` would draw from the same generator state."""
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p)
    return keep.reshape(-1, x.shape[-1])


def pack_mask(keep: Tensor) -> Tensor:
    """A bool mask [M, K] as uint8 [M, ⌈K/8⌉]: bit j of byte i keeps element 8i + j of its row."""
    keep = F.pad(keep.to(torch.uint8), (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = keep[..., 0].clone()
    for bit in range(1, 8):
        packed |= keep[..., bit] << bit
    return packed


def unpack_mask(mask: Tensor, K: int) -> Tensor:
    """The bool mask [M, K] that `pack_mask` packed."""
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) >> bits & 1).flatten(-2)[:, :K].bool()


def lora_linear(
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
    """Y = out_scale ⊙ (X·Ŵᵀ + s·Z·Bᵀ) + bias with Z = drop(X)·Aᵀ.

    x [M, K], lora_A [R, K], lora_B [N, R], bias [N], out_scale [N] fp32; returns (Y [M, N] in x.dtype,
    Z [M, R] fp32).
    """
    acc = accumulation_dtype(x.dtype)
    z = _dropped(x, dropout_mask, dropout_p).to(acc) @ lora_A.to(acc).t()
    y = F.linear(x, weight.decode(x.dtype)).to(acc) + scaling * z @ lora_B.to(acc).t()
    if out_scale is not None:
        y *= out_scale
    if bias is not None:
        y += bias.to(acc)
    return y.to(x.dtype), z


def lora_linear_backward(
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
    """With G = dY [M, N] and G' = G ⊙ out_scale:

    dbias = Σ_m G, dB = s·G'ᵀ·Z, dZ = s·G'·B, dA = dZᵀ·drop(X), dX = G'·Ŵ + drop(dZ·A), and
    d_out_scale = Σ_m G ⊙ (Y − bias) / out_scale, for which alone the forward's bias and Y [M, N] are given.
    """
    acc = accumulation_dtype(x.dtype)
    g = grad.to(acc)
    dx = d_A = d_B = dbias = d_out_scale = None
    if needs.bias:
        dbias = g.sum(0)
    if needs.out_scale:
        assert out_scale is not None
        assert y is not None
        scaled = y.to(acc) if bias is None else y.to(acc) - bias.to(acc)
        d_out_scale = (g * scaled).sum(0) / out_scale
    if out_scale is not None:
        g = g * out_scale
        grad = g.to(x.dtype)
    dz = scaling * g @ lora_B.to(acc)
    if needs.x:
        low_rank = _dropped(dz @ lora_A.to(acc), dropout_mask, dropout_p)
        dx = ((grad @ weight.decode(x.dtype)).to(acc) + low_rank).to(x.dtype)
    if needs.lora_A:
        d_A = (dz.t() @ _dropped(x, dropout_mask, dropout_p).to(acc)).to(lora_A.dtype)
    if needs.lora_B:
        d_B = (scaling * g.t() @ z).to(lora_B.dtype)
    return Gradients(dx, d_A, d_B, dbias, d_out_scale)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Ŵ [N, K], each value rounded once to `dtype`."""
    return weight.decode(dtype)


def _dropped(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    if mask is None:
        return x
    keep = unpack_mask(mask, x.shape[-1])
    return torch.where(keep, x.to(accumulation_dtype(x.dtype)) * dropout_scale(dropout_p), 0.0)
