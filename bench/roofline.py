"""What the traffic model predicts for lora_linear on a GPU, as a percentage over the frozen dense layer.

For each shape, number of rows M and rank: forward + backward of each strategy in both directions, the best
pair of strategies and its launches, peers, and the launch that adds most. Every figure is predicted, under
the assumptions of bench/traffic.py, except the column "measured": those come from bench/lora_linear.py.
The best pair is of Triton's strategies: gemv, of CUDA C++, is beside them and runs where it was measured.

    python bench/roofline.py --device H200
    python bench/roofline.py --device H100 --dora --csv predicted.csv --measured bench/results/lora_linear.csv
    python bench/roofline.py --budget
    python bench/roofline.py --write-default
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft_fast.bench import traffic
from peft_fast.bench.traffic import DEVICES, Device, Launch
from peft_fast.triton_kernels import strategies
from peft_fast.triton_kernels.strategies import GEMV, NAMES, Case, Choice, Direction, Problem, Row, Table

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 128, 512, 2048, 4096, 8192)
RANKS = (16, 64, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

# The default table: of which device the predictions are, and the problems that have a row where they differ.
DEFAULT_DEVICE = "H100"
DEFAULT_SHAPES = ((4096, 4096), (1024, 1024), (4096, 14336), (14336, 4096))
DEFAULT_RANKS = (16, 64, 256)
DEFAULT_ROWS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384)


def device_named(name: str) -> str:
    """The key of `DEVICES` in a name such as "NVIDIA H100 80GB HBM3". Raises ValueError without one."""
    found = [key for key in DEVICES if f" {key} " in f" {name} ".replace("-", " ")]
    if not found:
        raise ValueError(f"device: expected a name with one of {list(DEVICES)} in it, got {name!r}")
    return found[0]


def _known(name: str) -> str | None:
    try:
        return device_named(name)
    except ValueError:
        return None


def budget() -> dict[tuple[str, Direction], int]:
    """Launches of each strategy over NF4 in one panel, for a rank of at least 1."""
    problem = Problem(16, 4096, 4096, 16, torch.bfloat16, "nf4", True, False, False)
    return {
        (name, direction): len(traffic.launches(name, direction, problem, DEVICES["H200"]))
        for name, direction in itertools.product(NAMES, DIRECTIONS)
    }


class Prediction(NamedTuple):
    """Seconds of the frozen layer, and of each strategy in each direction, with the launches."""

    frozen: float
    launches: dict[Direction, dict[str, list[Launch]]]
    seconds: dict[Direction, dict[str, float]]

    def over(self, seconds: float) -> float:
        """Percent over the frozen layer, forward and backward."""
        return 100 * (seconds / self.frozen - 1)

    def best(self, direction: Direction) -> str:
        return min(self.seconds[direction], key=lambda name: self.seconds[direction][name])


def predict(problem: Problem, device: Device) -> Prediction:
    launches: dict[Direction, dict[str, list[Launch]]] = {
        direction: {
            name: traffic.launches(name, direction, problem, device)
            for name in strategies.candidates(problem)
        }
        for direction in DIRECTIONS
    }
    seconds = {
        direction: {name: traffic.seconds(found, device) for name, found in by_name.items()}
        for direction, by_name in launches.items()
    }
    return Prediction(traffic.seconds(traffic.frozen(problem, device), device), launches, seconds)


# -------------------------------------------------------------------------------------------- default table


def default_table() -> Table:
    """What `measured/default.json` holds: in each class, the rows for which no nearer one stands already."""
    rows: list[Row] = []
    for direction, format, dtype, dropout, out_scale in itertools.product(
        DIRECTIONS, ("packed", "dense"), ("half", "fp32"), (False, True), (False, True)
    ):
        case = Case(direction, format, dtype, dropout, out_scale)
        found = [
            Row(case, K, N, R, _predicted(case, N, K, R))
            for (K, N), R in itertools.product(DEFAULT_SHAPES, DEFAULT_RANKS)
        ]
        kept = found
        for row in reversed(found):
            fewer = [other for other in kept if other is not row]
            if fewer and all(_stands_for(fewer, other) for other in found):
                kept = fewer
        rows += kept
    return Table(f"{DEFAULT_DEVICE}-class", "predicted", {}, None, tuple(rows))


def _stands_for(rows: list[Row], row: Row) -> bool:
    """Whether the nearest of `rows` says what `row` does."""
    near = strategies.nearest(Table("", "", {}, None, tuple(rows)), row.case, row.N, row.K, row.R)
    return near is not None and near.choices == row.choices


def _predicted(case: Case, N: int, K: int, R: int) -> tuple[Choice, ...]:
    dtype = torch.bfloat16 if case.dtype == "half" else torch.float32
    format = "nf4" if case.format == "packed" else "dense"
    device, times = DEVICES[DEFAULT_DEVICE], {}
    for M in DEFAULT_ROWS:
        problem = Problem(M, N, K, R, dtype, format, format == "nf4", case.dropout, case.out_scale)
        direction: Direction = "forward" if case.direction == "forward" else "backward"
        times[M] = predict(problem, device).seconds[direction]
    return strategies.fastest(times)


# ------------------------------------------------------------------------------------------------ reporting


def lines(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Lines of the table and of the CSV file; percentages over the frozen layer, "" where not known."""
    device, dtype = DEVICES[args.device], DTYPES[args.dtype]
    method = "dora" if args.dora else "lora"
    measured = read_measured(args.measured, args.device, args.dtype, method) if args.measured else {}
    for (K, N), M, R in itertools.product(args.shape or SHAPES, args.rows, args.rank):
        problem = Problem(M, N, K, R, dtype, args.format, args.nested, args.dropout, args.dora)
        found = predict(problem, device)
        both = {
            name: sum(found.seconds[direction][name] for direction in DIRECTIONS)
            for name in strategies.candidates(problem)
        }
        if strategies.inadmissible(GEMV, problem) is None:
            both[GEMV] = sum(
                traffic.seconds(traffic.launches(GEMV, direction, problem, device), device)
                for direction in DIRECTIONS
            )
        best = {direction: found.best(direction) for direction in DIRECTIONS}
        launches = [launch for d in DIRECTIONS for launch in found.launches[d][best[d]]]
        # Of each GEMM, what it takes longer than the frozen one.
        gemm = found.frozen / 2
        added = {
            launch.name: time - (gemm if launch.flops >= 2 * M * N * K else 0)
            for launch in launches
            for time in [max(launch.seconds(device)) + traffic.LAUNCH]
        }
        most = max(added, key=lambda name: added[name])
        peers = _peers(problem, device)

        def over(seconds: float | None, found: Prediction = found) -> str:
            return "" if seconds is None else f"{found.over(seconds):.1f}"

        yield {
            "device": args.device, "dtype": args.dtype, "K": K, "N": N, "R": R, "M": M,
            "frozen_us": f"{1e6 * found.frozen:.1f}",
            **{name: over(both.get(name)) for name in (*NAMES, GEMV)},
            **best,
            "best": over(sum(found.seconds[direction][best[direction]] for direction in DIRECTIONS)),
            "launches": len(launches),
            **{name: over(peers.get(name)) for name in ("peft_fp32", "peft_half", "unsloth")},
            "adds_most": most, "adds": f"{100 * added[most] / found.frozen:.1f}",
            "measured": measured.get((K, N, R, M), ""),
        }  # fmt: skip


def _peers(problem: Problem, device: Device) -> dict[str, float]:
    """Seconds of the peers that run a problem: LoRA over 4-bit weights without dropout, in half precision."""
    if problem.out_scale or problem.dropout or problem.format == "dense" or problem.dtype == torch.float32:
        return {}
    passes = {
        "peft_fp32": traffic.peft(problem, device, torch.float32),
        "peft_half": traffic.peft(problem, device, problem.dtype),
        "unsloth": traffic.unsloth(problem, device),
    }
    return {name: sum(traffic.seconds(p, device) for p in pair) for name, pair in passes.items()}


def read_measured(path: Path, device: str, dtype: str, method: str) -> dict[tuple[int, int, int, int], str]:
    """By (K, N, R, M), backend: measured percent over the frozen layer, of Triton backends on this device."""
    found: dict[tuple[int, int, int, int], dict[str, str]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            wanted = (row["dtype"], row["method"], row["provider"]) == (dtype, method, "ours")
            ours = wanted and row["backend"].startswith("triton")
            if ours and row["ratio"] and _known(row["device"]) == device:
                K, N, R, M = (int(row[name]) for name in "KNRM")
                found[K, N, R, M][row["backend"]] = f"{100 * (float(row['ratio']) - 1):.1f}"
    return {key: " ".join(f"{b}:{percent}" for b, percent in by.items()) for key, by in found.items()}


def show(found: list[dict[str, object]], args: argparse.Namespace) -> None:
    print(__doc__.split("\n\n")[1] if __doc__ else "")
    assumptions = (traffic.__doc__ or "").partition("Assumed:\n\n")[2]
    print(f"\nAssumptions (bench/traffic.py):\n\n{assumptions}")
    what = "DoRA" if args.dora else "LoRA"
    dropout = ", dropout" if args.dropout else ""
    print(
        f"PREDICTED, {args.device}, {what} over {args.format}, {args.dtype}{dropout}: % over the frozen layer"
    )
    names = list(found[0])[2:]
    table = [names, *([str(line[name]) for name in names] for line in found)]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--device", default="H200", help=f"a name with one of {list(DEVICES)} in it (default: H200)")
    add("--or-default", action="store_true", help=f"of any other, predict for {DEFAULT_DEVICE} and say so")
    add("--shape", type=int, nargs=2, action="append", metavar=("K", "N"), help=f"default: {SHAPES}")
    add("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="tokens (default: %(default)s)")
    add("--rank", type=int, nargs="+", default=RANKS, metavar="R", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of X (default: bfloat16)")
    add("--format", choices=("nf4", "fp4", "dense"), default="nf4", help="of the weight (default: nf4)")
    add("--nested", action=argparse.BooleanOptionalAction, default=True, help="block scales in 8 bits")
    add("--dropout", action="store_true", help="with a mask")
    add("--dora", action="store_true", help="with out_scale and its gradient")
    add("--csv", type=Path, help="file to write the table to")
    add("--measured", type=Path, help="CSV file of bench/lora_linear.py with measured ratios")
    add("--budget", action="store_true", help="print the launches of each strategy, and nothing else")
    add("--write-default", action="store_true", help=f"write {strategies.DEFAULT}, and nothing else")
    # fmt: on
    args = parser.parse_args(argv)
    try:
        args.device = device_named(args.device)
    except ValueError as error:
        if not args.or_default:
            parser.error(f"--{error}")
        print(f"{args.device}: its peaks are not known here; predicted for {DEFAULT_DEVICE} instead")
        args.device = DEFAULT_DEVICE
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.write_default:
        path = strategies.MEASURED / strategies.DEFAULT
        path.write_text(strategies.text(default_table()))
        print(f"wrote {path}")
        return
    if args.budget:
        counted = budget()
        print(f"{'':10}" + "".join(f"{direction:>10}" for direction in DIRECTIONS))
        for name in NAMES:
            print(f"{name:10}" + "".join(f"{counted[name, direction]:>10}" for direction in DIRECTIONS))
        return
    found = list(lines(args))
    show(found, args)
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
