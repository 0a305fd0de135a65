"""What each field of the CPU strategy table (csrc/cpu/strategy.cpp) is worth on this machine.

For a level, every candidate changes one field of its row. Each runs in a process of its own, which takes the
row from PEFT_FAST_CPU_STRATEGY; the processes take turns, and the median of forward + backward is printed as
a ratio to the row as it is, so below 1 the candidate is better. Nested NF4, R = 16.

    python bench/cpu_strategies.py --level avx512bf16 --dtype bfloat16 --shape 4096 4096 --rows 1 4 16 512
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

FIELDS = (
    "few_rows",
    "few_rows_of_pairs",
    "out_block",
    "narrow",
    "narrow_block",
    "wide_block",
    "superblock",
)
CANDIDATES = {
    "few_rows": (0, 1, 2, 3, 4),
    "few_rows_of_pairs": (0, 1, 2, 3, 4),
    "out_block": (24, 48, 96),
    "narrow_block": (32, 64, 96, 128, 192),
    "wide_block": (64, 128, 192, 256),
    "superblock": (128, 256, 512, 1024),
}
TABLE = Path(__file__).parent.parent / "csrc" / "cpu" / "strategy.cpp"


def row_of(level: str) -> tuple[int, ...]:
    """The row of `level` in the table."""
    match = re.search(rf"/\* {level} +\*/ {{([\d, ]+)}}", TABLE.read_text())
    assert match is not None, f"no row for {level} in {TABLE}"
    return tuple(int(number) for number in match[1].split(","))


def candidates(row: tuple[int, ...], fields: list[str]) -> dict[str, tuple[int, ...]]:
    """`row` itself, and each change of one field."""
    changed = {"as it is": row}
    for field in fields:
        i = FIELDS.index(field)
        for value in CANDIDATES[field]:
            if value != row[i]:
                changed[f"{field}={value}"] = (*row[:i], value, *row[i + 1 :])
    return changed


def serve(level: str, dtype_name: str, threads: int, N: int, K: int, rows: list[int]) -> None:
    """Answers each number i on stdin with the milliseconds of one forward + backward of rows[i]."""
    import torch

    from peft_fast import native
    from peft_fast.formats import QuantizedWeight, code_table
    from peft_fast.reference import Needs

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    dtype, blocks, R = getattr(torch, dtype_name), N * K // 64, 16
    weight = QuantizedWeight(
        torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        code_table("nf4"),
        torch.rand(-(-blocks // 256)),
        torch.rand(256) - 0.5,
        torch.tensor(0.1),
        "nf4", N, K, 64, 256,
    )  # fmt: skip
    assert native.load_error() is None, native.load_error()
    backend, A, B = native.Level(level), torch.randn(R, K), torch.randn(N, R)
    inputs = [(torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)) for M in rows]

    def step(x: torch.Tensor, grad: torch.Tensor) -> None:
        _, z = backend.lora_linear(x, weight, None, A, B, None, None, 1.0, 0.0)
        needs = Needs(True, True, True, False, False)
        backend.lora_linear_backward(grad, x, weight, A, B, z, None, None, None, None, 1.0, 0.0, needs)

    for pair in inputs:
        step(*pair)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        step(*inputs[int(line)])
        print(1e3 * (time.perf_counter() - start), flush=True)


def worker(row: tuple[int, ...], arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PEFT_FAST_CPU_STRATEGY": " ".join(map(str, row))}
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", "a worker did not start; its error is above"
    return process


def ask(process: subprocess.Popen[str], i: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{i}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", default="avx512bf16", help="a row of the table")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of x")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("K", "N"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 16, 128, 512], metavar="M")
    parser.add_argument("--fields", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--threads", type=int, default=1, help="idle threads of other candidates disturb")
    parser.add_argument("--turns", type=int, default=9, help="timings of each candidate and number of rows")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    K, N = args.shape
    if args.serve:
        return serve(args.level, args.dtype, args.threads, N, K, args.rows)
    arguments = ["--level", args.level, "--dtype", args.dtype, "--threads", str(args.threads)]
    arguments += ["--shape", str(K), str(N), "--rows"]
    arguments += map(str, args.rows)
    workers = {
        name: worker(row, arguments) for name, row in candidates(row_of(args.level), args.fields).items()
    }
    print(
        f"{args.level}, {args.dtype}, K={K} N={N}, threads={args.threads}: "
        "time relative to the row as it is (its ms first)"
    )
    print(f"{'':24}" + "".join(f"{f'M={M}':>10}" for M in args.rows))
    times: dict[str, list[list[float]]] = {name: [[] for _ in args.rows] for name in workers}
    for _ in range(args.turns):
        for i in range(len(args.rows)):
            for name, process in workers.items():
                ask(process, i)  # the caches are another process's
                times[name][i].append(ask(process, i))
    base = [statistics.median(values) for values in times["as it is"]]
    for name, columns in times.items():
        medians = [statistics.median(values) for values in columns]
        ratios = medians if name == "as it is" else [m / b for m, b in zip(medians, base, strict=True)]
        print(f"{name:24}" + "".join(f"{value:10.3f}" for value in ratios))
    for process in workers.values():
        process.communicate()


if __name__ == "__main__":
    main()
