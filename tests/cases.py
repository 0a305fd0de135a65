"""Inputs for the op tests: weights in every format, and the three computations that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from tolerances import assert_as_exact
from torch import Tensor

import peft_fast.autograd  # noqa: F401, registers the formula of the op
from peft_fast import backends, formats, packing, reference
from peft_fast.formats import QuantizedWeight


def make_weight(
    format: str, N: int, K: int, *, blocksize: int = 64, nested: bool = True, storage=torch.uint8, dtype=None
) -> QuantizedWeight:
    """A random weight [N, K] of any format; dense in `dtype` (float32 when None).

    Of mxfp4, K is rounded up to whole blocks.
    """
    if format == "mxfp4":
        K = -(-K // 32) * 32
        blocks = torch.randint(256, (N, K // 2), dtype=torch.uint8)
        return packing.from_mxfp4(blocks, torch.randint(116, 124, (N, K // 32), dtype=torch.uint8))
    dense = torch.randn(N, K) / K**0.5
    if format == "dense":
        return formats.from_dense(dense.to(dtype or torch.float32)).check()
    scale = dense.abs().amax(1)
    if format == "int8":
        return packing.from_int8((dense / scale[:, None] * 127).round().to(torch.int8), scale)
    if format == "fp8":
        return packing.from_fp8((dense / scale[:, None] * 448).to(torch.float8_e4m3fn), scale / 448)
    import bitsandbytes.functional as bnb  # only these weights need it

    packed, state = bnb.quantize_4bit(
        dense, blocksize=blocksize, compress_statistics=nested, quant_type=format, quant_storage=storage
    )
    return formats.from_bitsandbytes(packed, state).check()


def device_of(backend: str) -> str:
    """Where a backend is tested: the native ones on the CPU, the others on a GPU when there is one."""
    return "cuda" if torch.cuda.is_available() and not backend.startswith("cpu") else "cpu"


def backends_of(op: str, format: str) -> list[str]:
    """Every backend that runs an op here; the native ones by level, in their usual way,
    the Triton kernels by whichever strategy `choose` picks: test_triton_strategies.py has each, and
    test_cuda.py those of CUDA C++ that take few rows alone.
    """
    return [
        name
        for name, row in backends.BACKENDS.items()
        if name not in ("cpu", "cpu-batch-invariant", "cuda-gemv")
        and not name.startswith("triton-")
        and row.reason(op, format, device_of(name), torch.float32) is None
    ]


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
EVERY_FORMAT = tuple(formats.FORMATS)
HALF = (torch.float16, torch.bfloat16)


class _Operands:
    """What the cases of all ops can do; `leaves` names the operands that take gradients."""

    leaves: ClassVar[tuple[str, ...]]

    def on(self, backend: str) -> _Operands:
        """The same case where `backend` runs."""
        device = device_of(backend)

        def move(value):
            if isinstance(value, QuantizedWeight):
                return on(device, value)
            return value.to(device) if torch.is_tensor(value) else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def run(self, backend: str) -> dict[str, Tensor]:
        """Output and every gradient through the op and its autograd formula, on the CPU."""
        return {name: t.cpu() for name, t in self.on(backend)._run(backend).items()}

    def _leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        given = {name: getattr(self, name) for name in self.leaves if getattr(self, name) is not None}
        return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items()}


@dataclass
class Case(_Operands):
    """Operands of one `lora_linear` call."""

    leaves = ("x", "lora_A", "lora_B", "bias", "out_scale")

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

    def _run(self, backend: str) -> dict[str, Tensor]:
        leaves = self._leaves()
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
        leaves = self._leaves(dtype)
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
        y.backward(self.grad.to(dtype or y.dtype))
        grads = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
        if scale is not None and dtype is None:
            kept = y.detach().to(scale.dtype) - (0 if bias is None else bias.detach())
            grads["dout_scale"] = (self.grad * kept / scale.detach()).reshape(-1, len(scale)).sum(0)
        return {"y": y.detach(), **grads}


@dataclass
class ReftCase(_Operands):
    """Operands of one `loreft` call."""

    leaves = ("h", "residual", "projection", "bias", "basis")

    h: Tensor
    residual: Tensor | None
    rows: Tensor | None
    projection: Tensor
    bias: Tensor | None
    basis: Tensor
    mask: Tensor | None
    dropout_p: float
    drop_state: bool
    act: str
    grad: Tensor

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        d: int,
        r: int,
        *,
        terms: int = 1,
        rows: list[int] | None = None,
        act: str = "linear",
        dtype: torch.dtype = torch.float32,
        residual: bool = False,
        bias: bool = True,
        dropout_p: float = 0.0,
        drop_state: bool = False,
    ) -> ReftCase:
        """With a projection of `terms` times r rows."""
        acc = reference.accumulation_dtype(dtype)
        h = torch.randn(*shape, d, dtype=dtype)
        m = h.numel() // d if rows is None else len(rows)
        return cls(
            h,
            torch.randn_like(h) if residual else None,
            None if rows is None else torch.tensor(rows, dtype=torch.int64),
            torch.randn(terms * r, d, dtype=acc) / d**0.5,
            torch.randn(r, dtype=acc) if bias else None,
            torch.randn(r, d, dtype=acc),
            torch.ops.peft_fast.dropout_mask(torch.empty(m, d), dropout_p) if dropout_p else None,
            dropout_p,
            drop_state,
            act,
            torch.randn_like(h),
        )

    def args(self, leaves: dict[str, Tensor], backend: str) -> tuple:
        """The arguments of the op, with `leaves` for the operands of these names."""
        given = {f.name: leaves.get(f.name, getattr(self, f.name)) for f in fields(self)}
        return (*list(given.values())[:-1], backend)

    def _run(self, backend: str) -> dict[str, Tensor]:
        leaves = self._leaves()
        y, _, _ = torch.ops.peft_fast.loreft(*self.args(leaves, backend))
        y.backward(self.grad)
        return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The same in ordinary PyTorch, differentiated by autograd: in `dtype`, or with the edit in fp32."""
        leaves = self._leaves(dtype)
        P, R, bias = leaves["projection"], leaves["basis"], leaves.get("bias")
        d, r = self.h.shape[-1], len(R)
        states = leaves["h"] + leaves["residual"] if "residual" in leaves else leaves["h"]
        flat = states.reshape(-1, d)
        rows = torch.arange(len(flat)) if self.rows is None else self.rows
        keep = torch.ones(len(rows), d)
        if self.mask is not None:
            keep = reference.unpack_mask(self.mask, d) * reference.dropout_scale(self.dropout_p)
        rows, keep = rows[rows >= 0], keep[rows >= 0].to(P.dtype)
        selected = flat[rows].to(P.dtype)
        activation = getattr(torch.nn.functional, self.act) if self.act != "linear" else torch.clone
        if len(P) == 0:
            edit = (torch.zeros(len(rows), r, dtype=P.dtype) if bias is None else activation(bias)) @ R
            edit = edit.expand(len(rows), d)
        else:
            first = selected @ P[:r].t()
            edit = activation(first if bias is None else first + bias)
            edit = (edit if len(P) == r else edit - selected @ P[r:].t()) @ R
        edited = (selected + edit) * keep if self.drop_state else selected + edit * keep
        y = flat.index_put((rows,), edited.to(flat.dtype)).view(self.h.shape)
        y.backward(self.grad.to(y.dtype))
        grads = {f"d{n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}
        return {"y": y.detach(), **grads}


def check(case: Case | ReftCase, backend: str) -> None:
    """Output and every gradient are as exact as plain PyTorch."""
    got, plain, truth = case.run(backend), case.plain(), case.plain(torch.float64)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_as_exact(name, got[name], plain[name], truth[name])


def assert_same_outputs(op: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...]) -> None:
    """Of an op of several outputs, with gradients as without."""
    with torch.no_grad():
        expected = op(*args)
    assert all(map(torch.equal, op(*args), expected))
