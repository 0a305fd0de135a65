"""Row norms of a base weight and of its low-rank update, for DoRA (arXiv 2402.09353): never a dense [N, K].

    ‖ŵ_i + s·b_i·A‖² = ‖ŵ_i‖² + 2s·b_i·(A·ŵ_i) + s²·b_i·(A·Aᵀ)·b_iᵀ

‖ŵ_i‖² depends on the frozen weight alone (`row_norms_squared`, once per weight). A·Ŵᵀ is `lora_linear` itself
with X = A and no adapters, so every backend has it, as a thin pass over the packed weight. What has R·N or R²
elements is combined in fp64.

Where the update nearly cancels a row the three terms are large and their sum is small, which amplifies the
fp32 roundings of the first two. Such rows are decoded and their norms taken directly. Reading which they are
depends on data, so these steps are dispatcher ops, opaque to `torch.compile`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd, backends, ops
from .formats import QuantizedWeight, decode_rows, rows_per_slice, slice_rows
from .reference import accumulation_dtype

NORM_MIN = 2.0**-60
"""Norms are at least this: below, squares leave the range of fp32. A zero row has it, so m/norm is finite."""

CANCELLATION = 2.0**-5
"""Rows with norm² below this share of ‖ŵ_i‖² + ‖s·b_i·A‖² are taken directly: roundings count 32-fold."""

CHUNK = 2**19
"""Elements decoded at a time: 2 MiB, which stays in cache."""

GATHER_CHUNK = 2**17
"""Elements gathered at a time; each takes some 40 bytes of indices on the way."""

ops._library.define(f"row_norms_squared({ops.WEIGHT_SCHEMA}, ScalarType dtype, str backend) -> Tensor")
ops._library.define(
    f"lora_norm(Tensor norm_squared, Tensor terms, {ops.WEIGHT_SCHEMA}, Tensor lora_A, Tensor lora_B, "
    "float scaling) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for which rows cancel
)


def row_norms_squared(
    weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> Tensor:
    """‖ŵ_i‖² of every row [N], float64, of the values decoded to `dtype` and summed in it.

    One pass over the packed weight in chunks of rows.

    Raises:
        BackendUnavailable: the named backend cannot decode this weight here.
    """
    backends.check_name(backend)
    return torch.ops.peft_fast.row_norms_squared(*weight, dtype, backend)


def lora_weight_norm(
    weight: QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    norms_squared: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """‖Ŵ + s·B·A‖ of every row [N], at least `NORM_MIN`: the denominator of DoRA (arXiv 2402.09353, eq. 5).

    Differentiable in lora_A and lora_B, for which nothing larger than the operands is kept; call it under
    `torch.no_grad()` for the detached norm of §4.3. The gradient of a zero row is zero.

    Args:
        weight: the base weight Ŵ [N, K].
        lora_A: [R, K], any floating dtype.
        lora_B: [N, R].
        scaling: s.
        norms_squared: `row_norms_squared(weight)` if known, else computed here.
        backend: "auto" or a name of `backends.BACKENDS`; an explicit one runs or raises.

    Returns:
        [N] float32 (float64 for a float64 lora_A or weight).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailable: the named backend cannot run this case.
    """
    N, K = weight.out_features, weight.in_features
    backends.check_name(backend)
    weight.check()
    ops.check_tensor("lora_A", lora_A)
    dtype = accumulation_dtype(lora_A.dtype)
    if weight.weight.dtype == torch.float64:
        dtype = torch.float64
    no_A, no_B = (weight.weight.new_empty(shape, dtype=dtype) for shape in ((0, K), (N, 0)))
    ops.check_lora_linear(no_A, weight, None, lora_A, lora_B, None, 0.0)
    if norms_squared is None:
        norms_squared = row_norms_squared(weight, dtype=dtype, backend=backend)
    ops.check_vector("norms_squared", norms_squared, N, weight.weight.device)
    A = lora_A.to(dtype)
    projected = autograd.lora_linear(A, weight, None, no_A, no_B, None, None, 1.0, 0.0, backend).double()
    A64, B64 = A.double(), scaling * lora_B.double()
    update = (B64 @ (A64 @ A64.t()) * B64).sum(1)
    norm_squared = norms_squared + 2 * (B64 * projected.t()).sum(1) + update
    norm = torch.ops.peft_fast.lora_norm(
        norm_squared.detach(),
        (norms_squared + update).detach(),
        *weight,
        A.detach(),
        lora_B.detach(),
        scaling,
    )
    if norm_squared.requires_grad:
        slope = (0.5 / norm).masked_fill(norm <= NORM_MIN, 0.0)
        norm = norm + (slope * (norm_squared - norm_squared.detach())).to(norm.dtype)
    return norm


# ------------------------------------------------------------------------------- implementations and fakes


def _row_norms_squared_op(*args: Any) -> Tensor:
    *fields, dtype, backend = args
    weight = QuantizedWeight(*fields).check()
    ops.check_dtype(dtype)
    name = backends.resolve("dequantize", weight.format, weight.weight.device.type, dtype, backend)
    # A dense slice needs no copy, which backends make.
    dequantize = backends.BACKENDS["reference" if weight.format == "dense" else name].load().dequantize
    N, K = weight.out_features, weight.in_features
    step = rows_per_slice(weight)
    rows = max(step, CHUNK // K // step * step)
    sliceable = rows * K <= 4 * CHUNK
    if not sliceable:
        rows = max(1, GATHER_CHUNK // K)
    result = torch.empty(N, dtype=torch.float64, device=weight.weight.device)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        if sliceable:
            values = dequantize(slice_rows(weight, start, stop), dtype)
        else:
            values = decode_rows(weight, torch.arange(start, stop, device=result.device)).to(dtype)
        result[start:stop] = values.square().sum(1)
    return result


@ops._as_given
def _lora_norm_op(norm_squared: Tensor, terms: Tensor, *args: Any) -> Tensor:
    """√norm², but taken from the rows themselves where norm² is a small remainder of its `terms` [N]."""
    *fields, A, B, scaling = args
    weight = QuantizedWeight(*fields)
    norm = norm_squared.clamp(min=0).sqrt().to(A.dtype)
    direct = (norm_squared < CANCELLATION * terms).nonzero().squeeze(1)
    for rows in direct.split(max(1, GATHER_CHUNK // weight.in_features)):
        values = decode_rows(weight, rows).to(A.dtype) + scaling * B[rows].to(A.dtype) @ A
        norm[rows] = torch.linalg.vector_norm(values, dim=1)
    return norm.clamp_(min=NORM_MIN)


def _fake_row_norms_squared(weight: Tensor, *args: Any) -> Tensor:
    return weight.new_empty(QuantizedWeight(weight, *args[:-2]).out_features, dtype=torch.float64)


def _fake_lora_norm(norm_squared: Tensor, terms: Tensor, *args: Any) -> Tensor:
    *_, A, _, _ = args
    return norm_squared.new_empty(norm_squared.shape, dtype=A.dtype)


for _name, _op, _fake in (
    ("row_norms_squared", _row_norms_squared_op, _fake_row_norms_squared),
    ("lora_norm", _lora_norm_op, _fake_lora_norm),
):
    ops._library.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peft_fast::{_name}", _fake, lib=ops._library)
