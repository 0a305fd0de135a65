"""Times what writes a decoded weight, Triton's kernel and that of CUDA C++: as it is, and merged and scaled.

At each shape and rank (0 is the weight as it is) results are compared first: bit for bit with the definition,
merged ones as `measure.exactness` has it. Then the writers take turns, caches overwritten before each. A row
has the median time and the bytes per second of packed weight read and result written; `wrong` is why there is
no time. The exit code is 1 when anything was wrong.

    python bench/writers.py --shape 4096 4096 --rank 0 16 64 --csv writers.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft_fast.bench import layers, measure
from peft_fast.bench.layers import DTYPES, Shape
from peft_fast.triton_kernels.dequantize import write as write_by_triton
from torch import Tensor

from peft_fast import cuda
from peft_fast.formats import QuantizedWeight, from_linear
from peft_fast.info import device_name

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
SCALING = 2.0
LEAST = 5
Writer = Callable[[], object]


class Row(NamedTuple):
    device: str
    dtype: str
    K: int
    N: int
    R: int
    writer: str
    ms: float | None
    gigabytes_per_second: float | None
    wrong: str | None


class Operands(NamedTuple):
    """Ŵ [N, K] nested NF4, and where there is a rank A [R, K], B [N, R] and out_scale [N], all fp32."""

    weight: QuantizedWeight
    adapter: dict[str, Tensor]

    def definition(self, dtype: torch.dtype) -> Tensor:
        if not self.adapter:
            return self.weight.decode(dtype)
        A, B, scale = (self.adapter[name].to(dtype) for name in ("lora_A", "lora_B", "out_scale"))
        return scale[:, None] * (self.weight.decode(dtype) + SCALING * (B @ A))


def make(shape: Shape, dtype: torch.dtype) -> Operands:
    base = layers.make_operands(shape)
    weight = from_linear(layers.linear4bit(base, dtype))
    names = ("lora_A", "lora_B", "magnitude")
    A, B, scale = (getattr(base, name).detach().float() for name in names)
    return Operands(weight, {"lora_A": A, "lora_B": B, "out_scale": scale} if shape.R else {})


def writers(operands: Operands, out: Tensor) -> dict[str, Writer]:
    """Those that are here; each fills `out`."""
    weight, dtype = operands.weight, out.dtype
    found: dict[str, Writer] = {
        "triton": lambda: write_by_triton(weight, out, dtype, scaling=SCALING, **operands.adapter)
    }
    if cuda.unavailable(weight.format, out.device.type, dtype) is None:
        found["cuda"] = lambda: cuda.write(weight, out, scaling=SCALING, **operands.adapter)
    return found


def fault(write: Writer, operands: Operands, out: Tensor) -> str | None:
    """What is wrong with a writer; None when nothing is."""
    try:
        out.fill_(torch.nan)
        write()
        if not operands.adapter:
            return None if torch.equal(out, operands.definition(out.dtype)) else "other bits than defined"
        plain = operands.definition(torch.float32).to(out.dtype)
        measure.exactness("out", out, plain, operands.definition(torch.float64))
    except Exception as error:  # a kernel that does not compile, say; the other still runs
        return f"{type(error).__name__}: {error}"
    return None


def timed(found: dict[str, Writer], seconds: float, device: str, flush: Writer) -> dict[str, float]:
    """Median seconds of each, in turns for about `seconds`: on a GPU by its own clock."""
    samples: dict[str, list[float]] = {name: [] for name in found}
    end = time.perf_counter() + seconds
    while found and (len(min(samples.values(), key=len)) < LEAST or time.perf_counter() < end):
        for name, write in found.items():
            flush()
            if device == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                write()
                last.record()
                torch.cuda.synchronize()
                samples[name].append(first.elapsed_time(last) / 1e3)
            else:
                start = time.perf_counter()
                write()
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}


def rows_of(shape: Shape, dtype: str, seconds: float, flush: Writer) -> list[Row]:
    operands = make(shape, DTYPES[dtype])
    out = torch.empty(shape.N, shape.K, dtype=DTYPES[dtype], device=shape.device)
    found = writers(operands, out)
    faults = {name: fault(write, operands, out) for name, write in found.items()}
    right = {name: write for name, write in found.items() if faults[name] is None}
    times = timed(right, seconds, shape.device, flush)
    moved = operands.weight.weight.numel() + out.numel() * out.element_size()
    where = (device_name(shape.device), dtype, shape.K, shape.N, shape.R)
    return [
        Row(
            *where, name,
            round(1e3 * times[name], 4) if name in times else None,
            round(moved / times[name] / 1e9, 1) if name in times else None,
            faults[name],
        )
        for name in found
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--shape", type=int, nargs=2, action="append", metavar=("K", "N"), help=f"default: {SHAPES}")
    add("--rank", type=int, nargs="+", default=[0, 16, 64], metavar="R", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the result (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=0.3, help="of timing a shape and rank (default: %(default)s)")
    add("--csv", type=Path, help="file to write the rows to")
    # fmt: on
    args = parser.parse_args(argv)
    flush = measure.cache_flush(args.device, measure.last_level_cache(args.device))
    found: list[Row] = []
    for K, N in args.shape or SHAPES:
        for R in args.rank:
            rows = rows_of(Shape(K, N, R, args.device), args.dtype, args.seconds, flush)
            print(*(" ".join(map(str, row)) for row in rows), sep="\n", flush=True)
            found += rows
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([Row._fields, *found])
    return int(any(row.wrong for row in found))


if __name__ == "__main__":
    sys.exit(main())
