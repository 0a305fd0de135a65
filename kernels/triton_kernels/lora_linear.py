"""lora_linear in Triton: at most two launches forward and four backward, whichever way the weight is read.

    forward   1  Z = drop(X)·Aᵀ                        fp32, in partial sums over K when M is small
              2  Y = X·Ŵᵀ + s·Z·Bᵀ + bias              one fp32 accumulator
    backward  1  dZ = s·G·B, dB = s·Gᵀ·Z, dbias = Σ G  one read of G = dY, partial sums
              2  the partial sums added, in a fixed order
              3  dX = G·Ŵ + drop(dZ·A)
              4  dA = dZᵀ·drop(X)

`strategies.py` names the ways and picks one for a problem, forward and backward apart:

    splitk    the base term in partial sums, made beside Z resp. beside sum 2, and added up with the low-rank
              term; 2 launches forward, 3 backward: dX's sum and dA come from one
    fused     Ŵ decoded in the main loop of 2 resp. 3
    split     Ŵ decoded to a reused scratch beside Z resp. beside sum 2; 2 and 3 read it from there
    library   the scratch of split; the launch of Z also writes Y0 = s·Z·Bᵀ + bias, that of dA also
              dX0 = drop(dZ·A), and a GEMM of the library accumulates onto them
    merge     Ŵ + s·B·A in the scratch; a GEMM of the library is all of 2 resp. 3
    gemv      no kernel of Triton's: `peft_fast.cuda`, for a handful of rows

A scratch has a bound (`peft_fast.scratch`); a larger weight takes two more launches for each further panel,
and a bias in another dtype than X one more, which rounds it, where the library adds it.

With out_scale [N], Y = out_scale ⊙ (X·Ŵᵀ + s·Z·Bᵀ) + bias, scaled in the accumulator or in the scratch.
G ⊙ out_scale, which takes the place of G in dZ, dB and dX, is not formed: out_scale multiplies the rows of B,
dB and Ŵ instead, so that G reaches the tensor cores as it is, unrounded and without a pass through registers.
d_out_scale = Σ G ⊙ (Y − bias) / out_scale joins the first launch of the backward pass, which then reads Y
beside G. No launch is added.

Shapes: X [M, K], Ŵ [N, K], A [R, K], B [N, R], any R ≥ 0. No second [M, N] is written; the largest
temporaries are the scratch, up to 16 partial sums of dB and of splitk's few rows, and, for training-size M,
8 of dZ. No atomics: results are the same bits on every run with the same tiles. Dropout multiplies by 1/(1−p)
after the products, so that half-precision operands reach the tensor cores unrounded.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_fast import cuda
from peft_fast.errors import BackendUnavailable
from peft_fast.formats import QuantizedWeight
from peft_fast.reference import Gradients, Needs

from . import lora_backward, lora_forward, strategies
from .dequantize import dequantize
from .launch import empty
from .operands import Operands


def _strategy(direction: strategies.Direction, operands: Operands, name: str | None) -> str:
    problem = operands.problem()
    if name is None:
        return strategies.choose(direction, problem, operands.x.device)
    if (reason := strategies.inadmissible(name, problem)) is not None:
        raise BackendUnavailable(f"backend 'triton-{name}' cannot run lora_linear here: {reason}")
    return name


class Strategy:
    """The op by one named strategy, as a backend; raises BackendUnavailable for what it cannot run."""

    dequantize = staticmethod(dequantize)

    def __init__(self, name: str) -> None:
        self.lora_linear = functools.partial(lora_linear, strategy=name)
        self.lora_linear_backward = functools.partial(lora_linear_backward, strategy=name)


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
    strategy: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.lora_linear`: (Y [M, N] in x.dtype, Z [M, R] fp32), for contiguous operands."""
    o = Operands(x, weight, lora_A, lora_B, dropout_mask, out_scale, scaling, dropout_p)
    strategy = _strategy("forward", o, strategy)
    if strategy == strategies.GEMV:
        return cuda.Gemv.lora_linear(
            x, weight, bias, lora_A, lora_B, dropout_mask, out_scale, scaling, dropout_p
        )
    M, N, _, R = o.sizes
    y, z = empty((M, N), x.dtype, x.device), empty((M, R), torch.float32, x.device)
    if strategy == "splitk":
        lora_forward.splitk(o, bias, y, z)
    elif strategy in ("fused", "split") or y.numel() == 0:
        lora_forward.main_loop(o, bias, y, z, from_scratch=strategy == "split")
    else:
        y = lora_forward.library(o, bias, y, z, merge=strategy == "merge")
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
    strategy: str | None = None,
) -> Gradients:
    """As `reference.lora_linear_backward`, for contiguous operands."""
    o = Operands(x, weight, lora_A, lora_B, dropout_mask, out_scale, scaling, dropout_p)
    strategy = _strategy("backward", o, strategy)
    if strategy == strategies.GEMV:
        return cuda.Gemv.lora_linear_backward(
            grad, x, weight, lora_A, lora_B, z, dropout_mask, out_scale, bias, y, scaling, dropout_p, needs
        )
    (M, N, K, R), device = o.sizes, x.device
    needs_dz = needs.lora_A or (needs.x and strategy != "merge")
    sums = lora_backward.Sums(
        empty((M, R), torch.float32, device) if needs_dz else None,
        empty((N, R), lora_B.dtype, device) if needs.lora_B else None,
        empty((N,), torch.float32, device) if needs.bias else None,
        empty((N,), torch.float32, device) if needs.out_scale else None,
    )
    d_A = empty((R, K), lora_A.dtype, device) if needs.lora_A else None
    dx = empty((M, K), x.dtype, device) if needs.x else None
    partials = lora_backward.up_backward(o, grad, z, bias, y, sums)
    if dx is None or dx.numel() == 0:
        lora_backward.add_partials(o, partials)
        lora_backward.da(o, partials.results.dz, d_A)
    elif strategy == "splitk":
        lora_backward.splitk(o, grad, partials, d_A, dx)
    elif strategy in ("fused", "split"):
        lora_backward.main_loop(o, grad, partials, d_A, dx, from_scratch=strategy == "split")
    else:
        dx = lora_backward.library(o, grad, partials, d_A, dx, merge=strategy == "merge")
    return Gradients(
        None if dx is None else dx.to(x.dtype),
        None if d_A is None else d_A.to(lora_A.dtype),
        None if sums.d_B is None else sums.d_B.to(lora_B.dtype),
        sums.dbias,
        sums.d_out_scale,
    )
