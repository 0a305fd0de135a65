"""The ops as functions, the way `torch.nn.functional` offers its own."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, ops
from .formats import QuantizedWeight, from_dense


def lora_linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Y = X·Ŵᵀ + s·(drop(X)·Aᵀ·Bᵀ + lora_bias) + bias, in one fused op (LoRA, arXiv 2106.09685, eq. 3).

    Gradients flow to x, lora_A, lora_B, bias and lora_bias; the weight is frozen. Inside autocast, x is cast
    to the autocast dtype, as `F.linear` does; the low-rank factors are used as they are, accumulated in fp32.

    Args:
        x: activations [..., K], float32, float16 or bfloat16.
        weight: the frozen base weight Ŵ [N, K]; a plain tensor is taken as dense.
        lora_A: [R, K], any floating dtype, any R ≥ 0.
        lora_B: [N, R].
        bias: [N] or None.
        scaling: s, lora_alpha / r (LoRA) or lora_alpha / √r (rsLoRA).
        lora_bias: bias of the low-rank branch [N], scaled by s as in PEFT, or None.
        dropout_p: dropout probability on the input of the low-rank branch; draws the mask that
            `F.dropout(x, p)` would draw, and only when `training`.
        training: as in `F.dropout`.
        backend: "auto" or a name of `ops.BACKENDS`; an explicit one runs or raises.

    Returns:
        Y [..., N] in the dtype of x (inside autocast, the autocast dtype).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailable: the named backend cannot run this case.
    """
    if not isinstance(weight, QuantizedWeight):
        weight = from_dense(weight)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    if lora_bias is not None:
        scaled = scaling * lora_bias
        bias = scaled if bias is None else bias + scaled
    ops.check_probability("dropout_p", dropout_p)
    mask = None
    if training and dropout_p > 0.0:
        mask = torch.ops.peft_fast.dropout_mask(x, dropout_p)
    return autograd.lora_linear(
        x, weight, bias, lora_A, lora_B, mask, scaling, dropout_p if mask is not None else 0.0, backend
    )
