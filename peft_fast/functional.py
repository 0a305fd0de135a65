"""The ops as functions, the way `torch.nn.functional` offers its own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import autograd, backends, dora, ops
from .formats import QuantizedWeight, from_dense
from .reference import ACTIVATIONS, accumulation_dtype, dropout_scale

DROPOUTS = ("paper", "peft")
NORM_GRADS = ("detached", "full")
DROPOUT_ON = ("edit", "state")

_SMALLEST_SCALE = {torch.float16: 2.0**-20}
_SMALLEST_SCALE_ELSE = 2.0**-100


def lora_linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    lora_bias: Tensor | None = None,
    out_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Y = out_scale ⊙ (X·Ŵᵀ + s·drop(X)·Aᵀ·Bᵀ) + s·lora_bias + bias, in one fused op.

    LoRA (arXiv 2106.09685, eq. 3) without an out_scale. Gradients flow to x, lora_A, lora_B, bias, lora_bias
    and out_scale; the weight is frozen. Inside autocast, x is cast to the autocast dtype, as `F.linear` does;
    the low-rank factors are used as they are, accumulated in fp32.

    Args:
        x: activations [..., K], float32, float16 or bfloat16.
        weight: the frozen base weight Ŵ [N, K]; a plain tensor is taken as dense.
        lora_A: [R, K], any floating dtype, any R ≥ 0.
        lora_B: [N, R].
        bias: [N] or None.
        scaling: s, lora_alpha / r (LoRA) or lora_alpha / √r (rsLoRA).
        lora_bias: bias of the low-rank branch [N], scaled by s as in PEFT, or None.
        out_scale: [N], any floating dtype, or None for one; as c of `dora_linear` while it takes gradients.
        dropout_p: dropout probability on the input of the low-rank branch; draws the mask that
            `F.dropout(x, p)` would draw, and only when `training`.
        training: as in `F.dropout`.
        backend: "auto" or a name of `backends.BACKENDS`; an explicit one runs or raises.

    Returns:
        Y [..., N] in the dtype of x (inside autocast, the autocast dtype).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailable: the named backend cannot run this case.
    """
    weight = _as_weight(weight)
    ops.check_tensors(x, weight, lora_A, lora_B, bias)
    ops.check_number("scaling", scaling)
    ops.check_probability("dropout_p", dropout_p)
    x = _as_autocast(x)
    if lora_bias is not None:
        ops.check_vector("lora_bias", lora_bias, weight.out_features, weight.weight.device)
        scaled = scaling * lora_bias
        bias = scaled if bias is None else bias + scaled
    mask = None
    if training and dropout_p > 0.0:
        mask = torch.ops.peft_fast.dropout_mask(x, dropout_p)
    p = dropout_p if mask is not None else 0.0
    if out_scale is not None:
        ops.check_vector("out_scale", out_scale, weight.out_features, weight.weight.device)
        return _scaled(x, weight, bias, out_scale, (lora_A, lora_B, mask), scaling, p, backend)
    return autograd.lora_linear(x, weight, bias, lora_A, lora_B, mask, None, scaling, p, backend)


def dora_linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    training: bool = True,
    dropout: str = "paper",
    norm: Tensor | None = None,
    norm_grad: str = "detached",
    backend: str = "auto",
) -> Tensor:
    """Y = c ⊙ (X·Ŵᵀ + s·drop(X)·Aᵀ·Bᵀ) + bias, c = magnitude / ‖Ŵ + s·B·A‖ (DoRA, arXiv 2402.09353, eq. 5).

    One fused op, with the conventions of `lora_linear` on dtypes and autocast. Gradients flow to x, lora_A,
    lora_B, magnitude and bias. While magnitude takes gradients the op keeps a reference to Y for them, so
    writing Y in place before the backward pass raises.

    An element of c nearer to 0 than 2⁻¹⁰⁰ (float16: 2⁻²⁰) counts as that, since Y/c is what the gradient of
    magnitude is made of. For the same reason the bias is then added after the op, not inside it.

    Args:
        x: activations [..., K], float32, float16 or bfloat16.
        weight: the frozen base weight Ŵ [N, K]; a plain tensor is taken as dense.
        lora_A: [R, K], any floating dtype, any R ≥ 0.
        lora_B: [N, R].
        magnitude: m [N], any floating dtype.
        bias: [N] or None.
        scaling: s, lora_alpha / r or lora_alpha / √r.
        dropout_p: dropout probability; draws the mask of `F.dropout(x, p)`, and only when `training`.
        training: as in `F.dropout`.
        dropout: "paper" drops the input of the low-rank branch, as above. "peft" computes what PEFT does,
            which scales the base's dropped input too: c ⊙ (X_d·Ŵᵀ + s·X_d·Aᵀ·Bᵀ) + (X − X_d)·Ŵᵀ + bias with
            X_d = drop(X), in two fused calls. Without dropout they are the same.
        norm: ‖Ŵ + s·B·A‖ [N] if known (`dora.lora_weight_norm`), else computed here.
        norm_grad: "detached" takes the norm as a constant (§4.3); "full" differentiates through it.
        backend: "auto" or a name of `backends.BACKENDS`; an explicit one runs or raises.

    Returns:
        Y [..., N] in the dtype of x (inside autocast, the autocast dtype).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailable: the named backend cannot run this case.
    """
    weight = _as_weight(weight)
    check_choice("dropout", dropout, DROPOUTS)
    check_choice("norm_grad", norm_grad, NORM_GRADS)
    ops.check_tensors(x, weight, lora_A, lora_B, bias)
    ops.check_number("scaling", scaling)
    ops.check_probability("dropout_p", dropout_p)
    ops.check_vector("magnitude", magnitude, weight.out_features, weight.weight.device)
    x = _as_autocast(x)
    if norm is None:
        with torch.no_grad() if norm_grad == "detached" else nullcontext():
            norm = dora.lora_weight_norm(weight, lora_A, lora_B, scaling, backend=backend)
    ops.check_vector("norm", norm, weight.out_features, weight.weight.device)
    if norm_grad == "detached":
        norm = norm.detach()
    dtype = accumulation_dtype(x.dtype)
    scale = magnitude.to(dtype) / norm.to(dtype)
    dropping = training and dropout_p > 0.0
    if not dropping or dropout == "paper":
        mask = torch.ops.peft_fast.dropout_mask(x, dropout_p) if dropping else None
        p = dropout_p if dropping else 0.0
        return _scaled(x, weight, bias, scale, (lora_A, lora_B, mask), scaling, p, backend)
    # X_d = grown·kept: kept loses no bits in half precision, and the scale takes the factor.
    keep = F.dropout(torch.ones_like(x), dropout_p) != 0
    grown = dropout_scale(dropout_p)
    kept, scale = x * keep, _nonzero(grown * scale, x.dtype)
    adapted = autograd.lora_linear(kept, weight, None, lora_A, lora_B, None, scale, scaling, 0.0, backend)
    no_A, no_B = x.new_empty(0, weight.in_features), x.new_empty(weight.out_features, 0)
    other = torch.where(keep, x * (1.0 - grown), x)
    rest = autograd.lora_linear(other, weight, bias, no_A, no_B, None, None, 1.0, 0.0, backend)
    # Into an op's output only where nobody else, such as selective checkpointing, may have kept it.
    return rest.add_(adapted) if ops.runs_directly((rest, adapted), ()) else rest + adapted


def loreft(
    h: Tensor,
    basis: Tensor,
    source: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    subtract: bool = True,
    rows: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "linear",
    dropout_p: float = 0.0,
    dropout_on: str = "edit",
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """H + (act(H·Vᵀ + b) − H·Rᵀ)·R in the given rows of H = h + residual (LoReFT, arXiv 2404.03592, eq. 2).

    One fused op; rows that are not given pass through bit by bit. Gradients flow to h, residual, basis,
    source and bias. Computed in fp32 (fp64 for fp64 h) whatever the dtypes, inside autocast too, and rounded
    once. Nothing but the edited rows is saved for the backward pass, h itself, by reference, without `rows`.

    The paper's W is V here. LoReFT, and NoReFT with any basis, are the formula as it stands; DiReFT and
    NodiReFT do not `subtract`; ConsReFT has no `source`; LobiReFT has neither.

    Args:
        h: hidden states [..., d], float32, float16 or bfloat16.
        basis: R [r, d], any floating dtype, any r ≥ 0; LoReFT's has orthonormal rows, which is not checked.
        source: V [r, d], or None for zero.
        bias: b [r], or None for zero.
        subtract: whether H·Rᵀ is subtracted.
        rows: int64 [m], which rows of H to edit: unique indices into its leading dimensions, flattened. A
            negative one is skipped, which leaves room for batches of ragged positions. None edits every row.
        residual: [..., d] as h, added to it first as `h + residual` would, or None.
        act: activation on H·Vᵀ + b, a key of `reference.ACTIVATIONS`; "linear" is none.
        dropout_p: dropout probability; draws the mask of `F.dropout` on the edited rows [m, d], and only when
            `training`.
        dropout_on: "edit" drops what is added to H; "state" drops the sum, as pyreft does.
        training: as in `F.dropout`.
        backend: "auto" or a name of `backends.BACKENDS`; an explicit one runs or raises.

    Returns:
        The edited H [..., d], in the dtype of h, or the one that `h + residual` promotes to.

    Raises:
        NotImplementedError: its gradients are differentiated in turn.
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailable: the named backend cannot run this case.
    """
    check_choice("act", act, tuple(ACTIVATIONS))
    check_choice("dropout_on", dropout_on, DROPOUT_ON)
    ops.check_probability("dropout_p", dropout_p)
    ops.check_tensor("h", h)
    ops.check_operand("h", h, h.device)
    ops.check_subspace(basis, source, bias, h.device)
    if rows is not None:
        ops.check_tensor("rows", rows)
        if rows.dim() != 1:
            raise ValueError(f"rows: expected [m], got {list(rows.shape)}")
    if residual is not None:
        ops.check_operand("residual", residual, h.device)
        dtype = torch.promote_types(h.dtype, residual.dtype)
        h, residual = h.to(dtype), residual.to(dtype)
    projection, bias, act = _subspace(basis, source, bias, subtract, act, accumulation_dtype(h.dtype))
    basis = basis.to(projection.dtype)
    mask = None
    if training and dropout_p > 0.0:
        like = h if rows is None else h.new_empty(rows.shape[0], h.shape[-1])
        mask = torch.ops.peft_fast.dropout_mask(like, dropout_p)
    p, on_state = dropout_p if mask is not None else 0.0, dropout_on == "state"
    return autograd.loreft(h, residual, rows, projection, bias, basis, mask, p, on_state, act, backend)


def loreft_linear(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    basis: Tensor,
    source: Tensor | None = None,
    edit_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    subtract: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Every row of H = X·Ŵᵀ + bias edited as by `loreft`, H + (H·Vᵀ + b − H·Rᵀ)·R, without H in between.

    With P = V − R it is `lora_linear` with A = P·Ŵ, B = Rᵀ and (P·bias + b)·R more of a bias: a thin
    pass over the packed weight forward, another one backward, and no pass over an [M, N]. So it gains over
    `loreft` of the layer's output where M is large. Gradients flow to x, basis, source, edit_bias and bias.

    Args:
        x: activations [..., K], float32, float16 or bfloat16; inside autocast, cast to its dtype.
        weight: the frozen base weight Ŵ [N, K]; a plain tensor is taken as dense.
        basis: R [r, N], any floating dtype.
        source: V [r, N], or None for zero.
        edit_bias: b [r], or None for zero.
        bias: of the layer, [N], or None.
        subtract: whether H·Rᵀ is subtracted.
        backend: "auto" or a name of `backends.BACKENDS`.

    Returns:
        [..., N] in the dtype of x, rounded once.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailable: the named backend cannot run this case.
    """
    weight = _as_weight(weight)
    ops.check_tensor("x", x)
    folded = fold_edit(
        weight, basis, source, edit_bias, bias, subtract=subtract, dtype=x.dtype, backend=backend
    )
    lora_A, lora_B, increment = folded
    return lora_linear(x, weight, lora_A, lora_B, bias, lora_bias=increment, backend=backend)


def fold_edit(
    weight: QuantizedWeight,
    basis: Tensor,
    source: Tensor | None,
    edit_bias: Tensor | None,
    bias: Tensor | None,
    *,
    subtract: bool,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(A [r, K], B [N, r], lora_bias [N]) with which `lora_linear` is `loreft_linear`, for x of `dtype`.

    They are float32 (float64 for that dtype), and differentiable as `loreft_linear` is.
    """
    N, device = weight.check().out_features, weight.weight.device
    ops.check_subspace(basis, source, edit_bias, device, bias_name="edit_bias")
    if basis.shape[1] != N:
        raise ValueError(f"basis: expected [r, N] = [*, {N}], got {list(basis.shape)}")
    if bias is not None:
        ops.check_vector("bias", bias, N, device)
    acc = accumulation_dtype(dtype)
    with torch.autocast(device.type, enabled=False):
        projection, constant, _ = _subspace(basis, source, edit_bias, subtract, "linear", acc)
        basis = basis.to(acc)
        if constant is None:
            constant = basis.new_zeros(len(basis))
        if bias is not None and len(projection):
            constant = constant + projection @ bias.to(acc)
        lora_A = autograd.times_weight(projection, weight, backend)
        return lora_A, basis[: len(projection)].t(), constant @ basis


def dequantize(
    weight: QuantizedWeight, dtype: torch.dtype, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The exact value of `weight` [N, K], rounded once to `dtype`; nested scales are undone in the same pass.

    Bit for bit what bitsandbytes' `dequantize_4bit` gives, without its temporaries. Not differentiable.

    Args:
        weight: of any format.
        dtype: of the result, floating.
        out: contiguous [N, K] of that dtype on the device of `weight`, which is filled and returned.
        backend: "auto" or a name of `backends.BACKENDS`; an explicit one runs or raises.

    Raises:
        ValueError, TypeError: `out` is something else; it keeps its values.
        BackendUnavailable: the named backend cannot run this case.
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
    ops.check_dtype(dtype)
    weight.check()
    shape, device = (weight.out_features, weight.in_features), weight.weight.device
    if out is not None:
        ops.check_tensor("out", out)
        if out.shape != shape or not out.is_contiguous() or out.device != device:
            raise ValueError(
                f"out: expected contiguous {list(shape)} on {device}, got {list(out.shape)} with strides "
                f"{list(out.stride())} on {out.device}"
            )
        if out.dtype != dtype:
            raise TypeError(f"out: expected {dtype}, got {out.dtype}")
    name = backends.resolve("dequantize", weight.format, device.type, dtype, backend)
    run = backends.BACKENDS[name].load().dequantize
    with torch.no_grad():
        return run(weight, dtype) if out is None else run(weight, dtype, out)


def _subspace(
    basis: Tensor, source: Tensor | None, bias: Tensor | None, subtract: bool, act: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, str]:
    """(P, b, act) of the op `loreft` for (R, V, b, act) of the edit, in `dtype`."""
    basis = basis.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    if source is None:
        bias = ACTIVATIONS[act](basis.new_zeros(len(basis)) if bias is None else bias)
        return (-basis if subtract else basis[:0]), bias, "linear"
    source = source.to(dtype)
    if not subtract:
        return source, bias, act
    return (source - basis if act == "linear" else torch.cat((source, basis))), bias, act


def _as_weight(weight: QuantizedWeight | Tensor) -> QuantizedWeight:
    return weight if isinstance(weight, QuantizedWeight) else from_dense(weight)


def _as_autocast(x: Tensor) -> Tensor:
    device_type = x.device.type
    known = torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device_type)
    if known and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _scaled(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, scale: Tensor, factors: Any, *scalars: Any
) -> Tensor:
    """`autograd.lora_linear` with any out_scale; where that takes a gradient, bias is added after it."""
    scale = _nonzero(scale.to(accumulation_dtype(x.dtype)), x.dtype)
    # Y/out_scale, of which the gradient is made, is precise only without the bias.
    after = bias if torch.is_grad_enabled() and scale.requires_grad else None
    inside = bias if after is None else None
    y = autograd.lora_linear(x, weight, inside, *(*factors, scale, *scalars))
    return y if after is None else (y + after).to(x.dtype)


def _nonzero(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` with elements too near to zero moved away from it, in value alone: their gradients are kept."""
    smallest = _SMALLEST_SCALE.get(dtype, _SMALLEST_SCALE_ELSE)
    with torch.no_grad():
        shift = (smallest - scale).masked_fill(scale.abs() >= smallest, 0.0)
    return scale + shift


def check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument}: expected one of {list(choices)}, got {value!r}")
