"""Whether a provider computes a case: output and every gradient against fp64, before anything is timed.

Ours may be off by twice what plain PyTorch is at the same dtypes (`measure.exactness`), peers by 2 %.
LoReFT's definition is differentiated by autograd in fp64, and the gradient of R taken through the provider's
own parametrization of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft_fast.bench import layers, measure
from peft_fast.bench.layers import DTYPES, Operands, by_layer, by_reference
from peft_fast.bench.measure import Step
from peft_fast.bench.providers import Pyreft, TorchAO, entry, is_dense
from peft_fast.bench.registry import Case
from torch import Tensor
from torch.nn import functional as F

ROWS = 256
"""Of a dense layer's results, rows that do not depend on each other, at most so many are checked."""

SEED = 7
Results = dict[str, Tensor]


class Worst(NamedTuple):
    """A result's relative error against fp64, that of plain PyTorch, and what it is judged by: `allowed`."""

    result: str
    error: float
    plain: float
    allowed: float


def judge(name: str, result: str, got: Tensor, plain: Tensor, truth: Tensor) -> Worst:
    """One result of a provider. Raises `measure.Inexact`."""
    if entry(name).peer:
        errors = measure.peer_exactness(f"{name}: {result}", got, plain, truth)
        return Worst(result, *errors, measure.PEER_ERROR)
    errors = measure.exactness(f"{name}: {result}", got, plain, truth)
    return Worst(result, *errors, max(measure.FACTOR * errors.plain, measure.FLOOR[got.dtype]))


class Checker:
    """The checks of one case; what providers have in common is computed once."""

    def __init__(self, case: Case, operands: Operands) -> None:
        self.case, self.operands = case, operands
        self._exact = functools.cache(functools.partial(layers.exact_weight, operands))
        self._defined: dict[torch.dtype, tuple[Results, Results]] = {}

    def check(self, name: str, step: Step, only_x: Step) -> Worst:
        """The result that is nearest to what is allowed, those of `only_x` included.

        `only_x` is the same layer with frozen adapters. Raises `measure.Inexact`.
        """
        method = self.case.method
        if is_dense(name):
            truth, plain = self._dense(step)
            got = _rows({"y": step.run().detach(), "dX": step.x.grad})
        elif method == "loreft":
            truth, plain, got = _loreft(step, self._exact(DTYPES[self.case.dtype]))
        else:
            truth, plain = self._low_rank(step, name)
            torch.manual_seed(SEED)
            got = by_layer(method, step)
        found = [judge(name, what, got[what], plain[what], truth[what]) for what in got]
        if only_x is not step:
            torch.manual_seed(SEED)
            y = only_x.run().detach()
            for what, value in (("y", y), ("dX", only_x.x.grad)):
                found.append(judge(name, f"{what}, adapters frozen", value, plain[what], truth[what]))
        return max(found, key=lambda worst: worst.error / worst.allowed)

    def _dense(self, step: Step) -> tuple[Results, Results]:
        x, grad = _rows({"x": step.x.detach(), "grad": step.grad}).values()
        weight = step.layer.weight.detach()

        def product(dtype: torch.dtype) -> Results:
            dense = weight.to(dtype)
            return {"y": F.linear(x.to(dtype), dense), "dX": grad.to(dtype) @ dense}

        return product(torch.float64), product(weight.dtype)

    def _low_rank(self, step: Step, name: str) -> tuple[Results, Results]:
        """By `reference`, with the mask that the provider draws; shared by those of one weight and mask."""
        p, dtype = self.case.dropout, DTYPES[self.case.dtype]
        # PEFT draws it on X in the adapters' dtype.
        drawn_on = torch.float32 if name.startswith("peft") else dtype
        own = step.layer.exact_weight() if isinstance(step.layer, TorchAO) else None
        if own is None and drawn_on in self._defined:
            return self._defined[drawn_on]
        mask = None
        if p:
            torch.manual_seed(SEED)
            mask = torch.ops.peft_fast.dropout_mask(step.x.detach().to(drawn_on), p)
        exact = self._exact(dtype) if own is None else own
        define = functools.partial(by_reference, self.case.method, step, self.operands, mask=mask, dropout=p)
        found = define(weight=exact), define(weight=exact.to(dtype))
        if own is None:
            self._defined[drawn_on] = found
        return found


def _rows(results: Results) -> Results:
    """At most ROWS rows of each, spread evenly."""
    return {
        name: t[torch.linspace(0, len(t) - 1, min(len(t), ROWS), device=t.device).long()]
        for name, t in results.items()
    }


class Edit(NamedTuple):
    """A provider's R [r, N] as a function of `rotation`, V [r, N] and b [r]."""

    rows: Callable[[], Tensor]
    rotation: Tensor
    source: Tensor
    bias: Tensor


def edit_of(layer: Any) -> Edit:
    edit = layer.edit
    if isinstance(layer, Pyreft):
        rotate, linear = edit.rotate_layer, edit.learned_source
        return Edit(
            lambda: rotate.weight.t(),  # noqa: PLW0108, computed anew
            rotate.parametrizations.weight.original,
            linear.weight,
            linear.bias,
        )
    return Edit(edit.rows, edit.basis.rotation, edit.source, edit.bias)


def _loreft(step: Step, weight: Tensor) -> tuple[Results, Results, Results]:
    """(in fp64, by plain PyTorch, by the layer): Y, dX, dV, db and the gradient of the rotation."""
    edit, dtype = edit_of(step.layer), step.x.dtype
    defined = []
    for kind in (torch.float64, dtype):
        acc = torch.float64 if kind == torch.float64 else torch.float32
        x = step.x.detach().to(kind).requires_grad_()
        R, V, b = (t.detach().to(acc).requires_grad_() for t in (edit.rows(), edit.source, edit.bias))
        h = F.linear(x, weight.to(kind)).to(acc)
        y = (h + (F.linear(h, V, b) - F.linear(h, R)) @ R).to(kind)
        dx, dv, db, dr = torch.autograd.grad(y, (x, V, b, R), step.grad.to(kind))
        rows = edit.rows()
        (rotation,) = torch.autograd.grad(rows, edit.rotation, dr.to(rows.dtype))
        values = (y.detach(), dx, dv, db, rotation)
        defined.append(dict(zip(("y", "dX", "dV", "db", "drotation"), values, strict=True)))
    y = step.run().detach()
    got = (y, step.x.grad, edit.source.grad, edit.bias.grad, edit.rotation.grad)
    return defined[0], defined[1], dict(zip(defined[0], got, strict=True))
