"""Times every strategy of lora_linear on this device and writes the table by which `strategies.choose` picks.

For each class of problems, shape and rank, at each number of rows M, the op runs with backend
"triton-<strategy>", and "cuda-gemv" where that is built. Results are compared with fp64 first
(`measure.exactness`, of Y and dX up to CHECKED rows). Then forward and backward are timed apart, strategies
in turns, with caches overwritten before each. On a GPU the times are the device's: the host is ahead of it,
as in a training step. A strategy that is not exact, does not compile or cannot run is left out, named at the
end, and makes the exit status 1.

The table is written after each M, and the times beside it, to <table>.times.json: a row holds the choices for
the M timed so far. Rows that are complete, and M that were timed, are kept, so a run that was cut short goes
on where it stopped; the classes that matter most come first, and no M is begun after --seconds. Without a
GPU, set TRITON_INTERPRET=1 and name --out: such times say nothing about any GPU.

    python bench/tune.py --seconds 120
    python bench/tune.py --shape 4096 4096 --rank 16 64 --case packed-half dense-half-out_scale --redo
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft_fast.bench import layers, measure
from peft_fast.bench.environment import write
from peft_fast.bench.layers import Shape
from peft_fast.bench.measure import Step
from peft_fast.triton_kernels import strategies
from peft_fast.triton_kernels.strategies import Case, Problem, Row, Table
from torch import Tensor, nn

import peft_fast.autograd  # noqa: F401, registers the formula of the op
from peft_fast import cuda, reference
from peft_fast.formats import QuantizedWeight, from_dense, from_linear
from peft_fast.info import device_name, versions
from peft_fast.reference import Needs

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 1024))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
RANKS = (16, 64)
SCALING, DROPOUT = 2.0, 0.1
CHECKED = 256


class Kind(NamedTuple):
    """A class of problems in both directions."""

    format: str
    dtype: str
    dropout: bool
    out_scale: bool

    def __str__(self) -> str:
        extras = [name for name in ("dropout", "out_scale") if getattr(self, name)]
        return "-".join((self.format, self.dtype, *extras))

    def case(self, direction: str) -> Case:
        return Case(direction, *self)

    def problem(self, M: int, shape: Shape) -> Problem:
        dtype = torch.bfloat16 if self.dtype == "half" else torch.float32
        packed = self.format == "packed"
        format = "nf4" if packed else "dense"
        return Problem(M, shape.N, shape.K, shape.R, dtype, format, packed, self.dropout, self.out_scale)


# In order of importance.
KINDS = {
    str(kind): kind
    for kind in (
        Kind(format, dtype, dropout, out_scale)
        for dtype, format, dropout, out_scale in itertools.product(
            ("half", "fp32"), ("packed", "dense"), (False, True), (False, True)
        )
    )
}
DEFAULT_KINDS = [name for name, kind in KINDS.items() if kind.dtype == "half"]


class Layer(nn.Module):
    """The op over fixed operands by one strategy, with a mask that is drawn already."""

    def __init__(self, operands: Fixed, strategy: str):
        super().__init__()
        self.operands, self.strategy = operands, strategy
        self.lora_A, self.lora_B = nn.Parameter(operands.lora_A), nn.Parameter(operands.lora_B)
        self.out_scale = None if operands.out_scale is None else nn.Parameter(operands.out_scale)

    def forward(self, x: Tensor) -> Tensor:
        fixed = self.operands
        y, _ = torch.ops.peft_fast.lora_linear(
            x, *fixed.weight, None, self.lora_A, self.lora_B, fixed.mask, self.out_scale,
            SCALING, fixed.dropout_p, strategies.backend_of(self.strategy),
        )  # fmt: skip
        return y


class Fixed(NamedTuple):
    """Operands of one problem: Ŵ [N, K], A [R, K], B [N, R] and out_scale [N] fp32, X [M, K], dY [M, N]."""

    weight: QuantizedWeight
    lora_A: Tensor
    lora_B: Tensor
    mask: Tensor | None
    out_scale: Tensor | None
    x: Tensor
    grad: Tensor

    @property
    def dropout_p(self) -> float:
        return 0.0 if self.mask is None else DROPOUT

    def definition(self, dtype: torch.dtype, dense: Tensor) -> dict[str, Tensor]:
        """By `reference` in `dtype`, with the decoded weight `dense`: dA, dB, and rows of Y and dX."""
        acc = reference.accumulation_dtype(dtype)
        x, grad, weight = self.x.to(dtype), self.grad.to(dtype), from_dense(dense)
        A, B = self.lora_A.to(acc), self.lora_B.to(acc)
        scale = None if self.out_scale is None else self.out_scale.to(acc)
        rows = self.checked_rows()
        mask = None if self.mask is None else self.mask[rows]
        rest = (SCALING, self.dropout_p)
        _, z = reference.lora_linear(x, from_dense(dense[:1]), None, A, B[:1], self.mask, None, *rest)
        y, _ = reference.lora_linear(x[rows], weight, None, A, B, mask, scale, *rest)
        thin = reference.lora_linear_backward(
            grad, x, weight, A, B, z, self.mask, scale, None, None, *rest,
            Needs(x=False, lora_A=True, lora_B=True, bias=False, out_scale=False),
        )  # fmt: skip
        wide = reference.lora_linear_backward(
            grad[rows], x[rows], weight, A, B, z[rows], mask, scale, None, None, *rest,
            Needs(x=True, lora_A=False, lora_B=False, bias=False, out_scale=False),
        )  # fmt: skip
        found = {"y": y, "dX": wide.x, "dA": thin.lora_A, "dB": thin.lora_B}
        return {name: t for name, t in found.items() if t is not None}

    def checked_rows(self) -> Tensor:
        M = len(self.x)
        return torch.linspace(0, M - 1, min(M, CHECKED), device=self.x.device).long()

    def step(self, strategy: str) -> Step:
        return Step(Layer(self, strategy), self.x.detach().requires_grad_(), self.grad)


def make(kind: Kind, shape: Shape, M: int, base: layers.Operands) -> Fixed:
    """The operands of `base` [N, K] for M rows; random, and the same at every call."""
    problem = kind.problem(M, shape)
    generator = torch.Generator(shape.device).manual_seed(M)
    x, grad = (
        torch.randn(M, width, generator=generator, device=shape.device).to(problem.dtype)
        for width in (shape.K, shape.N)
    )
    if problem.format == "dense":
        weight = from_dense(base.dense.to(problem.dtype))
    else:
        weight = from_linear(layers.linear4bit(base, problem.dtype))
    mask = torch.ops.peft_fast.dropout_mask(x, DROPOUT) if kind.dropout else None
    scale = base.magnitude if kind.out_scale else None
    return Fixed(weight, base.lora_A, base.lora_B, mask, scale, x, grad)


def check(fixed: Fixed, names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(strategy, None when it is as exact as plain PyTorch, else what is wrong with it)."""
    truth = fixed.definition(torch.float64, fixed.weight.decode(torch.float64))
    plain = fixed.definition(fixed.x.dtype, fixed.weight.decode(fixed.x.dtype))
    rows = fixed.checked_rows()
    for name in names:
        step = fixed.step(name)
        try:
            y = step.run().detach()
            got = {
                "y": y[rows], "dX": step.x.grad[rows],
                "dA": step.layer.lora_A.grad, "dB": step.layer.lora_B.grad,
            }  # fmt: skip
            for what, value in got.items():
                measure.exactness(f"{name}: {what}", value, plain[what], truth[what])
            if fixed.out_scale is not None:
                _check_scale(f"{name}: dout_scale", step.layer.out_scale.grad, fixed.out_scale, fixed.grad, y)
        except Exception as error:  # a kernel that does not compile, say; the other strategies still run
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, None


def _check_scale(name: str, got: Tensor, out_scale: Tensor, grad: Tensor, y: Tensor) -> None:
    """The gradient of out_scale is a sum over the rounded Y, which is all that backward has."""

    def definition(dtype: torch.dtype) -> Tensor:
        return (grad.to(dtype) * y.to(dtype)).sum(0) / out_scale.to(dtype)

    measure.exactness(name, got, definition(torch.float32), definition(torch.float64))


# -------------------------------------------------------------------------------------------------- timing


def timed(
    steps: dict[str, Step], seconds: float, device: str, flush: Callable[[], object]
) -> dict[str, tuple[float, float]]:
    """Median milliseconds of (forward, backward) of each step, in turns for about `seconds`."""
    if device == "cuda":
        samples = measure.device_samples(steps, seconds, flush)
    else:
        samples = measure.host_samples(steps, seconds, device, lambda name: flush())
    return {
        name: (statistics.median(f for f, _ in values), statistics.median(b for _, b in values))
        for name, values in samples.items()
    }


# -------------------------------------------------------------------------------------------------- tables


make_operands = functools.lru_cache(maxsize=len(SHAPES))(layers.make_operands)


Times = dict[str, dict[str, tuple[float, float]]]
"""By M, as JSON has keys, and strategy: milliseconds of forward and of backward."""


def tune(
    kind: Kind, shape: Shape, M: int, seconds: float, flush: Callable[[], object]
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """(milliseconds of forward and backward of what ran; what was left out and why)."""
    fixed = make(kind, shape, M, make_operands(shape))
    problem = kind.problem(M, shape)
    gemv = cuda.unavailable(problem.format, shape.device, problem.dtype) is None
    names = strategies.candidates(problem, gemv)
    outcomes = dict(check(fixed, names))
    where = f"{label(kind, shape)} M={M}"
    faults = [f"{where}: {name}: {fault}" for name, fault in outcomes.items() if fault is not None]
    steps = {name: fixed.step(name) for name, fault in outcomes.items() if fault is None}
    found = timed(steps, seconds, shape.device, flush) if steps else {}
    line = ", ".join(f"{name} {f:.4f} + {b:.4f} ms" for name, (f, b) in found.items())
    print(
        "\n".join([f"{where}: {line or 'nothing ran'}", *(f"left out {fault}" for fault in faults)]),
        flush=True,
    )
    return found, faults


def label(kind: Kind, shape: Shape) -> str:
    return f"{kind} K={shape.K} N={shape.N} R={shape.R}"


def rows_of(kind: Kind, shape: Shape, times: Times) -> list[Row]:
    """The rows of both directions, for the M that were timed."""
    return [
        Row(
            kind.case(direction), shape.K, shape.N, shape.R,
            strategies.fastest({int(M): {name: ms[i] for name, ms in by.items()} for M, by in times.items()}),
        )
        for i, direction in enumerate(("forward", "backward"))
    ]  # fmt: skip


def merged(table: Table | None, rows: list[Row], device: str) -> Table:
    """`table` with `rows` in place of those of the same case, K, N and R, of today."""
    new = {row[:4] for row in rows}
    old = [row for row in table.rows if row[:4] not in new] if table is not None else []
    return Table(device, "measured", versions(), str(datetime.date.today()), (*old, *rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--shape", type=int, nargs=2, action="append", metavar=("K", "N"), help=f"default: {SHAPES}")
    add("--rank", type=int, nargs="+", default=RANKS, metavar="R", help="default: %(default)s")
    add("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="tokens (default: %(default)s)")
    add("--case", nargs="+", choices=KINDS, default=DEFAULT_KINDS, help="default: all of half")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=300.0, help="no M is begun later (default: %(default)s)")
    add("--per-row", type=float, default=3.0, help="seconds of timing of a row (default: %(default)s)")
    add("--cache-mib", type=int, help="size of the last-level cache (default: as the system tells)")
    add("--redo", action="store_true", help="time again what the file has")
    add("--out", type=Path, help="file to write (on a GPU, default: that in measured/ which is used)")
    add("--copy", type=Path, help="file to write the same table to")
    # fmt: on
    args = parser.parse_args(argv)
    if args.device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error(
            "--device: expected kernels that are compiled for cuda, got TRITON_INTERPRET=1; unset it"
        )
    if args.device == "cpu" and args.out is None:
        parser.error("--out: expected a file, for times in the interpreter stand for no device; got none")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    name = device_name(args.device)
    path = args.out or strategies.path_of(name)
    beside = path.with_suffix(".times.json")
    table = strategies.load(path) if path.exists() else None
    times: dict[str, Times] = {}
    if table is not None and beside.exists():
        times = json.loads(beside.read_text())
    done = {row[:4] for row in table.rows} if table is not None else set()
    size = args.cache_mib * 2**20 if args.cache_mib else measure.last_level_cache(args.device)
    flush = measure.cache_flush(args.device, size)
    faults: list[str] = []

    def save(table: Table) -> None:
        for target in filter(None, (path, args.copy)):
            write(target, strategies.text(table))

    if table is not None:
        save(table)
    left, deadline = 0, time.perf_counter() + args.seconds
    kinds = [KINDS[case] for case in args.case]
    for R, kind, (K, N) in itertools.product(args.rank, kinds, args.shape or SHAPES):
        shape = Shape(K, N, R, args.device)
        known = times.get(label(kind, shape), {})
        whole = not known and all((kind.case(d), K, N, R) in done for d in ("forward", "backward"))
        for M in args.rows:
            if (whole or str(M) in known) and not args.redo:
                continue
            if time.perf_counter() > deadline:
                left += 1
                continue
            found, wrong = tune(kind, shape, M, args.per_row / len(args.rows), flush)
            faults += wrong
            if found:
                known[str(M)] = found
                times[label(kind, shape)] = known
                table = merged(table, rows_of(kind, shape, known), name)
                save(table)
                write(beside, json.dumps(times))  # last, so that what it says is in the table
    strategies.clear_cache()
    print(f"{path}: {len(table.rows) if table else 0} rows, {left} times M left for another run")
    if faults:
        sys.exit("left out:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
