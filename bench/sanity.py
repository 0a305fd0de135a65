"""Every backend of a kind at a real shape against fp64: what may be timed, in a minute.

LoRA and DoRA, forward and every gradient, each dtype and number of tokens M, by the criterion of
bench/lora_linear.py: at most twice the error of plain PyTorch at the same dtypes, or a rounding. A cell is
the largest share of what is allowed, "wrong" where it is above 1 or an error was raised, "-" where the
backend does not run that case.

Each backend has a process of its own, some at a time, with an even part of --seconds: one that leaves the
GPU in error, dies or hangs does not hide the others. The file is written after each case. The exit code is 1
when anything was wrong or not done in time.

    python bench/sanity.py --shape 4096 4096 --rows 4096 16 512 --json sanity.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from peft_fast.bench import layers, measure
from peft_fast.bench.environment import write
from peft_fast.bench.layers import (
    DTYPES,
    Provider,
    Shape,
    by_layer,
    by_reference,
    make_layer,
    make_step,
)
from peft_fast.bench.methods import LOW_RANK
from torch import Tensor

from peft_fast import backends
from peft_fast.errors import BackendUnavailable

# At a time: compiling takes a core each, and each holds operands in fp64 on the GPU.
JOBS = 3


class Cell(NamedTuple):
    """One backend in one case: its share of the allowed error, or None, and why there is none or too much."""

    backend: str
    method: str
    dtype: str
    M: int
    share: float | None
    wrong: bool
    reason: str | None

    @property
    def text(self) -> str:
        return "wrong" if self.wrong else "-" if self.share is None else f"{self.share:.2f}"


Work = tuple[str, str, int]
"""A method, a dtype and a number of rows M."""


def cells(backend: str, shape: Shape, work: Sequence[Work]) -> Iterator[Cell]:
    operands = layers.make_operands(shape)
    exact = layers.exact_weight(operands)
    for method, dtype, M in work:
        case = backend, method, dtype, M
        try:
            plainly = Provider("ours", dtype, method, "reference")
            step = make_step(plainly, make_layer(plainly, operands), shape, M)
            truth = by_reference(method, step, operands, exact)
            plain = by_reference(method, step, operands, exact.to(DTYPES[dtype]))
            allowed = {
                result: max(
                    measure.FACTOR * measure.relative_error(value, truth[result]), measure.FLOOR[value.dtype]
                )
                for result, value in plain.items()
            }
            layer = make_layer(plainly._replace(backend=backend), operands)
            got = by_layer(method, step._replace(layer=layer))
            yield Cell(*case, *judged(got, truth, allowed))
        except BackendUnavailable as error:
            yield Cell(*case, None, False, str(error))
        except Exception as error:  # a kernel that does not compile, say; other cases still run
            yield Cell(*case, None, True, f"{type(error).__name__}: {error}")


def judged(
    got: dict[str, Tensor], truth: dict[str, Tensor], allowed: dict[str, float]
) -> tuple[float, bool, str | None]:
    """The largest share of what is allowed, whether it is too much, and the result that is off."""
    shares = {name: measure.relative_error(value, truth[name]) / allowed[name] for name, value in got.items()}
    off = [name for name, share in shares.items() if not share <= 1]  # so that NaN is
    reason = ", ".join(f"{name} has {shares[name]:.3g} times the allowed error" for name in off)
    return max(shares.values()), bool(off), reason or None


def serve(pipe: Connection, backend: str, shape: Shape, work: Sequence[Work]) -> None:
    """Sends the cells, from a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end's to answer
    warnings.filterwarnings("ignore", category=UserWarning)
    for cell in cells(backend, shape, work):
        pipe.send(tuple(cell))


def watch(backend: str, shape: Shape, work: Sequence[Work], seconds: float) -> Iterator[Cell]:
    """The cells that a process of its own sends in time; one that dies is wrong in the case it was at."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(sender, backend, shape, work), daemon=True)
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        for case in work:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                return
            try:
                yield Cell(*receiver.recv())
            except EOFError:
                process.join()
                yield Cell(backend, *case, None, True, f"its process ended with {process.exitcode}")
                return
    finally:
        process.kill()
        process.join(timeout=5)  # a GPU that hangs may hold it


def sound(found: Sequence[Cell], dtype: str) -> list[str]:
    """The backends that ran in a dtype and were never wrong, in the order of the backend table."""
    ran = {cell.backend for cell in found if cell.dtype == dtype and cell.share is not None}
    wrong = {cell.backend for cell in found if cell.dtype == dtype and cell.wrong}
    return [name for name in backends.BACKENDS if name in ran - wrong]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("K", "N"))
    add("--rank", type=int, default=16, metavar="R")
    add("--rows", type=int, nargs="+", default=[4096, 16, 512], metavar="M", help="default: %(default)s")
    add("--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "float16"], help="default: %(default)s")
    add("--prefix", nargs="+", default=["triton", "cuda-gemv"],
        help="the backends with names that begin so (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=300.0, help="for everything (default: %(default)s)")
    add("--jobs", type=int, default=max(1, min(JOBS, (os.cpu_count() or 1) // 2)),
        help="processes at a time (default here: %(default)s)")
    add("--json", type=Path, help="file to write the cells to, and which backends are sound in which dtype")
    # fmt: on
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    names = [name for name in backends.BACKENDS if name.startswith(tuple(args.prefix))]
    work = [(method, dtype, M) for dtype, M, method in itertools.product(args.dtype, args.rows, LOW_RANK)]
    shape = Shape(*args.shape, args.rank, args.device)
    limit = args.seconds / math.ceil(len(names) / args.jobs)
    found: list[Cell] = []
    lock = threading.Lock()

    def follow(name: str) -> None:
        for cell in watch(name, shape, work, limit):
            with lock:
                found.append(cell)
                if args.json is not None:
                    by_dtype = {dtype: sound(found, dtype) for dtype in args.dtype}
                    content = {"sound": by_dtype, "cells": [cell._asdict() for cell in found]}
                    write(args.json, json.dumps(content, indent=1))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(follow, names))
    return show(found, names, work, args, limit)


def show(
    found: Sequence[Cell], names: Sequence[str], work: Sequence[Work], args: argparse.Namespace, limit: float
) -> int:
    """Prints the cells and what is wrong or missing; the exit code."""
    print(f"K={args.shape[0]} N={args.shape[1]} R={args.rank} on {args.device}, nested NF4")
    print(f"{'':<16}" + "".join(f"{f'{method} {dtype[:4]} {M}':>16}" for method, dtype, M in work))
    late = []
    for name in names:
        mine = [cell for cell in found if cell.backend == name]
        print(f"{name:<16}" + "".join(f"{cell.text:>16}" for cell in mine))
        if len(mine) < len(work) and not any(cell.wrong for cell in mine):
            late.append(name)
            print(f"{name}: {len(mine)} of {len(work)} cases done after {limit:.0f} s")
    wrong = [cell for cell in found if cell.wrong]
    for cell in wrong:
        print(f"{cell.backend} {cell.method} {cell.dtype} M={cell.M}: {cell.reason}")
    left_out = {(cell.backend, cell.reason) for cell in found if cell.share is None and not cell.wrong}
    print("".join(f"left out {name}: {reason}\n" for name, reason in sorted(left_out)), end="")
    for dtype in args.dtype:
        print(f"sound in {dtype}: {', '.join(sound(found, dtype)) or 'none'}")
    return 1 if wrong or late else 0


if __name__ == "__main__":
    sys.exit(main())
