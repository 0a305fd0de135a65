"""Operands of the ops that `cases.py` has not, and the ways in which any operand may lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import _Operands, dense_norm
from torch import Tensor
from torch.nn import functional as F

from peft_fast import dora_linear, formats, reference
from peft_fast.dora import NORM_MIN
from peft_fast.functional import loreft_linear


def _room(t: Tensor, *shape: int) -> Tensor:
    """NaN all around what is laid out in it, so that a read outside shows."""
    return t.new_full(shape, float("nan"))


LAYOUTS = {
    "contiguous": lambda t: t,
    "offset": lambda t: _room(t, t.numel() + 5)[3 : 3 + t.numel()].view(t.shape).copy_(t),
    "columns": lambda t: _room(t, *t.shape[:-1], t.shape[-1] + 7)[..., 3:-4].copy_(t),
    "every other": lambda t: _room(t, *t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand_as(t),
    "ones": lambda t: t.new_ones(()).expand_as(t),  # as the gradient of a sum
}
"""Ways to lie in memory; the last two repeat a value, along the first dimension or everywhere."""
REPEATING = {"expanded", "ones"}


def laid_out(t: Tensor | None, layout: str) -> Tensor | None:
    return t if t is None or t.dim() == 0 else LAYOUTS[layout](t)


@dataclass
class DoraCase(_Operands):
    """Operands of one `dora_linear` call; `seed` is that of its dropout mask."""

    leaves = ("x", "lora_A", "lora_B", "magnitude", "bias")

    x: Tensor
    weight: formats.QuantizedWeight
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    bias: Tensor | None
    grad: Tensor
    scaling: float
    dropout_p: float
    dropout: str
    norm_grad: str
    seed: int
    # For sums without signs: a norm [N] whose gradient grows everything, and the sign of PEFT's difference.
    norm: Tensor | None = None
    sign: float = -1.0

    def _run(self, backend: str) -> dict[str, Tensor]:
        leaves = self._leaves()
        torch.manual_seed(self.seed)
        y = dora_linear(
            leaves["x"], self.weight, leaves["lora_A"], leaves["lora_B"], leaves["magnitude"],
            leaves.get("bias"), scaling=self.scaling, dropout_p=self.dropout_p, dropout=self.dropout,
            norm_grad=self.norm_grad, backend=backend,
        )  # fmt: skip
        y.backward(self.grad)
        return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """As the paper or PEFT writes it: in `dtype`, or the base in that of x, the rest in the adapters'.

        In the latter the scale's gradient is taken from rounded outputs, all that a backend is given.
        """
        leaves = self._leaves(dtype)
        x, A, B, m = (leaves[name] for name in self.leaves[:4])
        torch.manual_seed(self.seed)
        keep = F.dropout(torch.ones_like(self.x), self.dropout_p) != 0 if self.dropout_p else 1
        x_d = x * keep * (reference.dropout_scale(self.dropout_p) if self.dropout_p else 1)
        if self.norm is None:
            norm = dense_norm(self.weight, A, B, self.scaling, m.dtype).clamp(min=NORM_MIN)
            c = m / (norm.detach() if self.norm_grad == "detached" else norm)
        else:
            grown = (self.weight.decode(m.dtype) + self.scaling * B @ A).square().sum(1) / (2 * self.norm)
            c = m / self.norm
            c = c if self.norm_grad == "detached" else c + c.detach() / self.norm * (grown - grown.detach())
        W = self.weight.decode(x.dtype)
        base, rest = F.linear(x, W), 0
        if self.dropout == "peft":
            dropped = F.linear(x_d, W)
            base, rest = dropped, base + self.sign * dropped
        adapted = base + self.scaling * (x_d.to(A.dtype) @ A.t() @ B.t())
        if dtype is None:
            adapted = adapted + ((c * adapted).to(x.dtype) / c - adapted).detach()
        y = c * adapted + rest + leaves.get("bias", 0)
        y = y.to(x.dtype)
        y.backward(self.grad.to(y.dtype))
        return {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


@dataclass
class ReftLinearCase(_Operands):
    """Operands of one `loreft_linear` call."""

    leaves = ("x", "basis", "source", "edit_bias", "bias")

    x: Tensor
    weight: formats.QuantizedWeight
    basis: Tensor
    source: Tensor | None
    edit_bias: Tensor | None
    bias: Tensor | None
    subtract: bool
    grad: Tensor
    sign: float = -1.0  # of what is subtracted

    def _run(self, backend: str) -> dict[str, Tensor]:
        leaves = self._leaves()
        names = ("basis", "source", "edit_bias", "bias")
        y = loreft_linear(
            leaves["x"], self.weight, *map(leaves.get, names), subtract=self.subtract, backend=backend
        )
        y.backward(self.grad)
        return {"y": y.detach(), **_gradients(leaves)}

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The edit of the layer's output, in `dtype`, or in fp32 of an output in the dtype of x."""
        leaves = self._leaves(dtype)
        x, R = leaves["x"], leaves["basis"]
        bias = leaves["bias"].to(x.dtype) if "bias" in leaves else None
        H = F.linear(x, self.weight.decode(x.dtype), bias).to(R.dtype)
        edit = H @ leaves["source"].t() if "source" in leaves else 0
        edit = edit + leaves.get("edit_bias", 0) + (self.sign * H @ R.t() if self.subtract else 0)
        y = (H + (edit @ R if torch.is_tensor(edit) else 0)).to(x.dtype)
        y.backward(self.grad.to(y.dtype))
        return {"y": y.detach(), **_gradients(leaves)}


def _gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"d{n}": torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}
