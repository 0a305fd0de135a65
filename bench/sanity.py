"""Every backend of a kind at a real shape against fp64: what may be timed, in a minute.

LoRA and DoRA, forward and every gradient, each dtype and number of tokens M, by the criterion of
bench/lora_linear.py: at most twice the error of plain PyTorch at the same dtypes, or a rounding. A cell is
the largest share of what is allowed, "wrong" where it is above 1 or an error was raised, "-" where the
backend does not run that case. The exit code is 1 when anything was wrong.

    python bench/sanity.py --shape 4096 4096 --rows 16 512 4096 --json sanity.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft_fast.bench import layers, measure
from peft_fast.bench.environment import write
from peft_fast.bench.layers import (
    DTYPES,
    METHODS,
    Provider,
    Shape,
    by_layer,
    by_reference,
    make_layer,
    make_step,
)
from torch import Tensor

from peft_fast import backends
from peft_fast.errors import BackendUnavailable


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


def cells(names: Sequence[str], shape: Shape, dtypes: Sequence[str], rows: Sequence[int]) -> list[Cell]:
    operands = layers.make_operands(shape)
    exact = layers.exact_weight(operands)
    found = []
    for method, dtype, M in itertools.product(METHODS, dtypes, rows):
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
        for name in names:
            case = name, method, dtype, M
            try:
                layer = make_layer(plainly._replace(backend=name), operands)
                got = by_layer(method, step._replace(layer=layer))
            except BackendUnavailable as error:
                found.append(Cell(*case, None, False, str(error)))
            except Exception as error:  # a kernel that does not compile, say; the others still run
                found.append(Cell(*case, None, True, f"{type(error).__name__}: {error}"))
            else:
                found.append(Cell(*case, *judged(got, truth, allowed)))
    return found


def judged(
    got: dict[str, Tensor], truth: dict[str, Tensor], allowed: dict[str, float]
) -> tuple[float, bool, str | None]:
    """The largest share of what is allowed, whether it is too much, and the result that is off."""
    shares = {name: measure.relative_error(value, truth[name]) / allowed[name] for name, value in got.items()}
    off = [name for name, share in shares.items() if not share <= 1]  # so that NaN is
    reason = ", ".join(f"{name} has {shares[name]:.3g} times the allowed error" for name in off)
    return max(shares.values()), bool(off), reason or None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("K", "N"))
    add("--rank", type=int, default=16, metavar="R")
    add("--rows", type=int, nargs="+", default=[16, 512, 4096], metavar="M")
    add("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    add("--prefix", default="triton", help="the backends with names that begin so (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="file to write the cells to, and which backends are sound")
    args = parser.parse_args(argv)
    names = [name for name in backends.BACKENDS if name.startswith(args.prefix)]
    found = cells(names, Shape(*args.shape, args.rank, args.device), args.dtype, args.rows)
    cases = list(dict.fromkeys(cell[1:4] for cell in found))
    print(f"K={args.shape[0]} N={args.shape[1]} R={args.rank} on {args.device}, nested NF4")
    print(f"{'':<16}" + "".join(f"{f'{method} {dtype[:4]} {M}':>16}" for method, dtype, M in cases))
    for name in names:
        print(f"{name:<16}" + "".join(f"{cell.text:>16}" for cell in found if cell.backend == name))
    wrong = [cell for cell in found if cell.wrong]
    for cell in wrong:
        print(f"{cell.backend} {cell.method} {cell.dtype} M={cell.M}: {cell.reason}")
    left_out = {(cell.backend, cell.reason) for cell in found if cell.share is None and not cell.wrong}
    print("".join(f"left out {name}: {reason}\n" for name, reason in sorted(left_out)), end="")
    ran = {cell.backend for cell in found if cell.share is not None}
    sound = [name for name in names if name in ran and name not in {cell.backend for cell in wrong}]
    print(f"sound: {', '.join(sound) or 'none'}")
    if args.json is not None:
        content = {"sound": sound, "cells": [cell._asdict() for cell in found]}
        write(args.json, json.dumps(content, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    sys.exit(main())
