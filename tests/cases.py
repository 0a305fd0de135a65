"""Inputs for the op tests: weights in every format, and the three computations that are compared."""

from __future__ import annotations

from dataclasses import dataclass, fields

import bitsandbytes.functional as bnb
import torch
from tolerances import assert_as_exact
from torch import Tensor

import peft_fast.autograd  # noqa: F401, registers the formula of the op
from peft_fast import formats, reference
from peft_fast.formats import QuantizedWeight


def make_weight(
    format: str, N: int, K: int, *, blocksize: int = 64, nested: bool = True, storage=torch.uint8, dtype=None
) -> QuantizedWeight:
    """A random weight [N, K] of any format; dense in `dtype` (float32 when None)."""
    dense = torch.randn(N, K) / K**0.5
    if format == "dense":
        return formats.from_dense(dense.to(dtype or torch.float32)).check()
    packed, state = bnb.quantize_4bit(
        dense, blocksize=blocksize, compress_statistics=nested, quant_type=format, quant_storage=storage
    )
    return formats.from_bitsandbytes(packed, state).check()


def device_of(backend: str) -> str:
    """Where a backend is tested: the native ones on the CPU, the others on a GPU when there is one."""
    return "cuda" if torch.cuda.is_available() and not backend.startswith("cpu") else "cpu"


def on(device: str, weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(*(t.to(device) if torch.is_tensor(t) else t for t in weight))


def adapters(N: int, K: int, R: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random lora_A [R, K] and lora_B [N, R]."""
    return (torch.randn(R, K) / K**0.5).to(dtype), torch.randn(N, R).to(dtype)


def dense_norm(weight: QuantizedWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """‖Ŵ + s·B·A‖ of every row [N] as one would write it."""
    return torch.linalg.vector_norm(weight.decode(dtype) + scaling * (B.to(dtype) @ A.to(dtype)), dim=1)


def make_scale(N: int, dtype: torch.dtype) -> Tensor:
    """Random scales [N], a third of them negative, from 1/2 to 2 in magnitude, as far from zero as m/norm."""
    return torch.exp2(2 * torch.rand(N, dtype=dtype) - 1) * torch.where(torch.rand(N) < 1 / 3, -1, 1)


FORMATS = ("dense", "nf4", "fp4")
HALF = (torch.float16, torch.bfloat16)
LEAVES = ("x", "lora_A", "lora_B", "bias", "out_scale")
"""The operands of a `Case` that take gradients."""


@dataclass
class Case:
    """Operands of one `lora_linear` call."""

    x: Tensor
    weight: QuantizedWeight
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    grad: Tensor
    scaling: float = 0.5
    dropout_p: float = 0.0
    mask: Tensor | None = None
    out_scale: Tensor | None = None

    @classmethod
    def make(
        cls,
        format: str,
        shape: tuple[int, ...],
        K: int,
        N: int,
        R: int,
        *,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype = torch.float32,
        bias: bool = True,
        dropout_p: float = 0.0,
        out_scale: bool = False,
        **weight_options,
    ) -> Case:
        x = torch.randn(*shape, K, dtype=dtype)
        mask = torch.ops.peft_fast.dropout_mask(x, dropout_p) if dropout_p else None
        return cls(
            x,
            make_weight(format, N, K, dtype=dtype, **weight_options),
            *adapters(N, K, R, adapter_dtype),
            torch.randn(N, dtype=dtype) if bias else None,
            torch.randn(*shape, N, dtype=dtype),
            dropout_p=dropout_p,
            mask=mask,
            out_scale=make_scale(N, reference.accumulation_dtype(dtype)) if out_scale else None,
        )

    def on(self, backend: str) -> Case:
        """The same case where `backend` runs."""
        device = device_of(backend)

        def move(value):
            return value.to(device) if torch.is_tensor(value) else value

        moved = {f.name: move(getattr(self, f.name)) for f in fields(self) if f.name != "weight"}
        return Case(weight=on(device, self.weight), **moved)

    def run(self, backend: str) -> dict[str, Tensor]:
        """Output and every gradient through the op and its autograd formula, on the CPU."""
        return {name: t.cpu() for name, t in self.on(backend)._run(backend).items()}

    def _run(self, backend: str) -> dict[str, Tensor]:
        leaves = {
            name: getattr(self, name).detach().requires_grad_()
            for name in LEAVES
            if getattr(self, name) is not None
        }
        y, _ = torch.ops.peft_fast.lora_linear(
            leaves["x"], *self.weight, leaves.get("bias"), leaves["lora_A"], leaves["lora_B"],
            self.mask, leaves.get("out_scale"), self.scaling, self.dropout_p, backend,
        )  # fmt: skip
        y.backward(self.grad)
        return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The same in the ordinary PyTorch that one would write, differentiated by autograd.

        In `dtype`, or as PEFT does it: the base in the dtype of x, the low-rank branch in the adapters'. Then
        the gradient of out_scale is taken from the rounded output, which is all that a backend is given.
        """
        cast = (lambda t: t.to(dtype)) if dtype else (lambda t: t)
        leaves = {
            name: cast(getattr(self, name).detach()).requires_grad_()
            for name in LEAVES
            if getattr(self, name) is not None
        }
        x, lora_A, lora_B = leaves["x"], leaves["lora_A"], leaves["lora_B"]
        scale, bias = leaves.get("out_scale"), leaves.get("bias")
        base = torch.nn.functional.linear(x, self.weight.decode(x.dtype), bias if scale is None else None)
        x_d = x.to(lora_A.dtype)
        if self.mask is not None:
            keep = reference.unpack_mask(self.mask, x.shape[-1]).view(x.shape)
            x_d = x_d * keep * reference.dropout_scale(self.dropout_p)
        y = base + (x_d @ lora_A.t() @ lora_B.t()) * self.scaling
        if scale is not None:
            y = y * scale if bias is None else y * scale + bias
        y = y.to(x.dtype)
        y.backward(cast(self.grad))
        grads = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
        if scale is not None and dtype is None:
            kept = y.detach().to(scale.dtype) - (0 if bias is None else bias.detach())
            grads["dout_scale"] = (self.grad * kept / scale.detach()).flatten(0, -2).sum(0)
        return {"y": y.detach(), **grads}


def check(case: Case, backend: str) -> None:
    """Output and every gradient are as exact as plain PyTorch."""
    got, plain, truth = case.run(backend), case.plain(), case.plain(torch.float64)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_as_exact(name, got[name], plain[name], truth[name])
