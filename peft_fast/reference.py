"""The definition of right: each op in straight-line PyTorch, for any device and dtype.

Every backend is compared with this file, and this file with PEFT, pyreft and bitsandbytes. Backends share
these signatures. Shapes: M tokens, K in-features, N out-features, R rank.

The low-rank terms accumulate in fp32 (fp64 for fp64 activations), whatever the dtypes of their operands; the
base term is one library GEMM in the dtype of X.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


class ReftNeeds(NamedTuple):
    """Which gradients of `loreft` to compute; h stands for the residual too."""

    h: bool
    projection: bool
    bias: bool
    basis: bool


class ReftGradients(NamedTuple):
    """Gradients of `loreft`: dH [M, d] in the dtype of h, the others in their operands' shapes in fp32.

    None where not needed.
    """

    h: Tensor | None
    projection: Tensor | None
    bias: Tensor | None
    basis: Tensor | None


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.ones_like,
    "relu": lambda z: (z > 0).to(z.dtype),
    "gelu": lambda z: 0.5 * (1 + torch.erf(z / 2**0.5)) + z * torch.exp(-0.5 * z * z) / (2 * math.pi) ** 0.5,
    "tanh": lambda z: 1 - torch.tanh(z) ** 2,
    "silu": lambda z: torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z))),
    "sigmoid": lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z)),
}


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


def dequantize(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Ŵ [N, K], each value rounded once to `dtype`, in `out` where given."""
    return weight.decode(dtype) if out is None else out.copy_(weight.decode(dtype))


def loreft(
    h: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    projection: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    dropout_mask: Tensor | None,
    dropout_p: float,
    drop_state: bool,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Edits m rows S of H = h + residual in the subspace of the r rows of the basis, leaving the others.

    Z = H_S·Pᵀ + [bias; 0], U = act(Z₁) − Z₂ with Z₁ the first r columns and Z₂ the others, if any; without
    any column U = act(bias) in every row. E = U·basis, and out_S = H_S + drop(E), or drop(H_S + E) where
    `drop_state`. H is rounded once to h.dtype, as is out.

    h, residual [M, d]; rows [m] in [0, M), unique, a negative one is skipped, None is every row;
    P = projection [q, d] with q of 0, r, 2r, bias [r] and basis [r, d] in fp32; the packed mask is of [m, d].
    Returns out [M, d], Z [m, q] fp32 and H_S [m, d] (both zero in skipped rows), but H_S empty, [0, d], where
    it is h itself.
    """
    acc = accumulation_dtype(h.dtype)
    states = h if residual is None else h + residual
    kept = states if rows is None else _taken(states, rows)
    z = kept.to(acc) @ projection.t()
    if bias is not None and z.shape[1]:
        z[:, : len(bias)] += bias
    if rows is not None:
        z[rows < 0] = 0
    edit = _subspace_edit(z, bias, len(basis), act) @ basis
    if drop_state:
        edited = _dropped(kept + edit, dropout_mask, dropout_p)
    else:
        edited = kept + _dropped(edit, dropout_mask, dropout_p)
    out = _with_rows(states, rows, edited)
    return out, z, h[:0].clone() if states is h and rows is None else kept


def loreft_backward(
    grad: Tensor,
    kept: Tensor,
    rows: Tensor | None,
    projection: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    z: Tensor,
    dropout_mask: Tensor | None,
    dropout_p: float,
    drop_state: bool,
    act: str,
    needs: ReftNeeds,
) -> ReftGradients:
    """With G the rows S of d_out [M, d] and `kept` H_S [m, d], whichever tensor the forward left it in:

    dE = drop(G), dU = dE·basisᵀ, dZ₁ = dU ⊙ act'(Z₁), dZ₂ = −dU; dP = dZᵀ·H_S, dbias = Σ_m dZ₁,
    d_basis = Uᵀ·dE, dH_S = (dE where `drop_state`, else G) + dZ·P, and dH = d_out in the other rows.
    """
    g = (grad if rows is None else _taken(grad, rows)).to(z.dtype)
    d_edit = _dropped(g, dropout_mask, dropout_p)
    d_u = d_edit @ basis.t()
    d_first = d_u * _SLOPES[act](_first(z, bias, len(basis)))
    d_z = torch.cat((d_first, -d_u), 1)[:, : z.shape[1]]
    dh = d_projection = dbias = d_basis = None
    if needs.h:
        dh = _with_rows(grad, rows, (d_edit if drop_state else g) + d_z @ projection)
    if needs.projection:
        d_projection = d_z.t() @ kept.to(z.dtype)
    if needs.bias:
        dbias = d_first.sum(0)
    if needs.basis:
        d_basis = _subspace_edit(z, bias, len(basis), act).t() @ d_edit
    return ReftGradients(dh, d_projection, dbias, d_basis)


def _first(z: Tensor, bias: Tensor | None, r: int) -> Tensor:
    """Z₁ [m, r]: what the activation of `loreft` is applied to."""
    return z[:, :r] if bias is None or z.shape[1] else bias.expand(len(z), r)


def _subspace_edit(z: Tensor, bias: Tensor | None, r: int, act: str) -> Tensor:
    """U [m, r] of `loreft`."""
    u = ACTIVATIONS[act](_first(z, bias, r))
    return u - z[:, r:] if z.shape[1] > r else u


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], zero where the index is negative."""
    taken = x.new_zeros(len(rows), x.shape[1])
    taken[rows >= 0] = x[rows[rows >= 0]]
    return taken


def _with_rows(x: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    """A copy of x with the rows that are not negative replaced, all of them for None."""
    if rows is None:
        return values.to(x.dtype)
    return x.index_copy(0, rows[rows >= 0], values[rows >= 0].to(x.dtype))


def _dropped(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    if mask is None:
        return x
    keep = unpack_mask(mask, x.shape[-1])
    return torch.where(keep, x.to(accumulation_dtype(x.dtype)) * dropout_scale(dropout_p), 0.0)
