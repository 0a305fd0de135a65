"""One QLoRA or QDoRA linear layer against the frozen dense layer and PEFT on bitsandbytes.

Timed is a forward and a backward, the sum of both: for `dense`, Y = X·Wᵀ and dX of a frozen `nn.Linear`; for
`peft` (PEFT's layer on a bitsandbytes `Linear4bit`) and `ours`, Y, dX, dA, dB, and with DoRA d_magnitude,
over the same nested NF4 bytes with equal fp32 adapters, no bias and no dropout. The steps of a row share A
and B, so ours takes DoRA's norm from its cache, as all forwards of an optimizer step but the first do; what
the first pays more is timed by bench/dora_norm.py. Times are host milliseconds, p20/p50/p80 of samples that
all providers take in turns. With `--cold`, before each forward and each backward the caches are overwritten,
then a 64 by 64 layer of the same provider runs: operands come from memory, code does not. `ratio` is p50 over
the p50 of the faster dense dtype in the same block of rows; where it is 1.00, adapter and quantization cost
nothing.

Before a shape is timed, all results of each `ours` are compared with fp64 at every M and thread count: a
relative error may be twice that of plain PyTorch at the same dtypes (the decoded weight in the dtype of X,
the low-rank branch in fp32), or a rounding where that is more. What is further off is not timed: its row has
the errors and no figure, the others are timed without it, and the exit code is 1. A named backend that
cannot run some M has no row there. `unsloth`, Unsloth's kernels on the layer of `peft`, may be off by 2 %; it
changes other packages when it is imported, so it runs beside `dense` alone. Peers that are not installed are
left out.

Memory: `saved` is what autograd holds for backward beyond X and the layer's own tensors; `peak` what torch's
allocator holds at most on top of layer and operands, Y and the gradients included. `--memory` adds
`resident`, the growth of peak resident memory over a process' first step: scratch of kernels and libraries
shows there alone.

    python bench/lora_linear.py --csv bench/results/lora_linear.csv
    python bench/lora_linear.py --method lora dora --shape 4096 4096 --rows 1 16 --threads 1 2
    python bench/lora_linear.py --shape 384 1536 --backend cpu-avx512 cpu-avx2 cpu-scalar --dtype float32
    python bench/lora_linear.py --device cuda --backend auto triton-fused triton-split --rows 1 512 8192
    python bench/lora_linear.py --device cuda --providers dense unsloth
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft_fast.bench import layers, measure
from peft_fast.bench.layers import (
    DTYPES,
    Operands,
    Provider,
    Shape,
    make_layer,
    make_operands,
    make_step,
)
from peft_fast.bench.measure import Exactness, Memory, Step, Timing
from peft_fast.bench.methods import LOW_RANK
from torch import Tensor, nn

from peft_fast import backends
from peft_fast.errors import BackendUnavailable
from peft_fast.info import device_name, versions

PROVIDERS = ("dense", "peft", "ours")
ALONE = "unsloth"
CHECKED = ("ours", ALONE)
DENSE_DTYPES = ("float32", "bfloat16")
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (384, 1536))
ROWS = (1, 16, 128, 512, 2048)
RESULTS = layers.results("dora")


class Checked(NamedTuple):
    """The errors of a provider's results; `inexact` says which is larger than allowed, None where none is."""

    errors: dict[str, Exactness] = {}  # noqa: RUF012, never written
    inexact: str | None = None


class Row(NamedTuple):
    """A provider; one that is inexact has no figures. `ratio` is None without a dense provider too."""

    provider: Provider
    checked: Checked
    timing: Timing | None = None
    ratio: float | None = None
    memory: Memory | None = None
    resident: int | None = None


def check(
    made: dict[Provider, nn.Module], operands: Operands, shape: Shape, rows: list[int], threads: list[int]
) -> dict[tuple[int, int], dict[Provider, Checked]]:
    """By (threads, M), how exact each provider in CHECKED is that runs it."""
    checked = [provider for provider in made if provider.kind in CHECKED]
    exact = layers.exact_weight(operands) if checked else None
    found: dict[tuple[int, int], dict[Provider, Checked]] = {
        key: {} for key in itertools.product(threads, rows)
    }
    cases = dict.fromkeys((provider.method, provider.dtype) for provider in checked)
    for M, (method, dtype) in itertools.product(rows, cases):
        alike = [provider for provider in checked if (provider.method, provider.dtype) == (method, dtype)]
        step = make_step(alike[0], made[alike[0]], shape, M)
        truth = layers.by_reference(method, step, operands, exact)
        plain = layers.by_reference(method, step, operands, exact.to(DTYPES[dtype]))
        for count, provider in itertools.product(threads, alike):
            torch.set_num_threads(count)
            where = f"{provider} {dtype} M={M} threads={count}"
            try:
                got = layers.by_layer(method, step._replace(layer=made[provider]))
            except BackendUnavailable as error:
                print(f"left out {where}: {error}", flush=True)
                continue
            outcome = compared(provider, got, plain, truth)
            found[count, M][provider] = outcome
            word = "checked" if outcome.inexact is None else "not timed"
            print(f"{word} {where}: {outcome.inexact or describe(outcome.errors)}", flush=True)
    return found


def compared(
    provider: Provider, got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> Checked:
    """The errors of a provider's results against fp64, beside those of plain PyTorch."""
    compare = measure.exactness if provider.kind == "ours" else measure.peer_exactness
    errors, wrong = {}, []
    for name, value in got.items():
        try:
            errors[name] = compare(name, value, plain[name], truth[name])
        except measure.Inexact as error:
            wrong.append(str(error))
            if value.shape == truth[name].shape:
                errors[name] = Exactness(
                    *(measure.relative_error(result, truth[name]) for result in (value, plain[name]))
                )
    return Checked(errors, "; ".join(wrong) or None)


def describe(errors: dict[str, Exactness]) -> str:
    return ", ".join(f"{name} {e.error:.1e} (plain {e.plain:.1e})" for name, e in errors.items())


def measured(
    made: dict[Provider, nn.Module],
    checked: dict[Provider, Checked],
    shape: Shape,
    M: int,
    seconds: float,
    flush: Callable[[], object] | None,
) -> list[Row]:
    """A row for each layer, timed together on the current number of threads."""
    steps = {provider: make_step(provider, layer, shape, M) for provider, layer in made.items()}
    small = {provider: small_step(provider, shape, M) for provider in made}

    def cold(provider: Provider) -> None:
        flush()
        small[provider].run()

    timings = measure.interleaved(steps, seconds, shape.device, cold if flush else lambda provider: None)
    dense = min((t.p50 for provider, t in timings.items() if provider.kind == "dense"), default=None)
    return [
        Row(
            provider,
            checked.get(provider, Checked()),
            timing,
            timing.p50 / dense if dense else None,
            measure.memory(steps[provider], shape.device),
        )
        for provider, timing in timings.items()
    ]


def small_step(provider: Provider, shape: Shape, M: int) -> Step:
    """The same code on a layer [64, 64]: a run of it loads what is no operand of the real layer."""
    small = shape._replace(K=64, N=64)
    return make_step(provider, make_layer(provider, make_operands(small)), small, M)


def resident(provider: Provider, shape: Shape, M: int, threads: int) -> int:
    """The growth of the peak resident memory over a process' first step, code and threads apart."""
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(threads)
    small_step(provider, shape, 16).run()
    return measure.resident_growth(make_step(provider, make_layer(provider, make_operands(shape)), shape, M))


def bench(
    shape: Shape, providers: list[Provider], args: argparse.Namespace
) -> Iterator[tuple[int, int, list[Row]]]:
    """(threads, M, rows) of each block of a shape; everything is checked before the first."""
    operands = make_operands(shape)
    made = {provider: make_layer(provider, operands) for provider in providers}
    found = check(made, operands, shape, args.rows, args.threads)
    del operands
    flush = None
    if args.cold:
        size = args.cache_mib * 2**20 if args.cache_mib else measure.last_level_cache(shape.device)
        flush = measure.cache_flush(shape.device, size)
    for threads, M in itertools.product(args.threads, args.rows):
        torch.set_num_threads(threads)
        checked = found[threads, M]
        exact = {p for p, outcome in checked.items() if outcome.inexact is None}
        running = {p: layer for p, layer in made.items() if p.kind not in CHECKED or p in exact}
        rows = measured(running, checked, shape, M, args.seconds, flush) if running else []
        if args.memory:
            rows = [
                row._replace(resident=measure.in_fresh_process(resident, row.provider, shape, M, threads))
                for row in rows
            ]
        yield threads, M, rows + [Row(p, outcome) for p, outcome in checked.items() if p not in exact]


HEADER = (
    f"{'M':>6} {'provider':<23} {'dtype':<9}{'ms':>10}{'p20':>10}{'p80':>10}{'forward':>10}{'backward':>10}"
    f"{'ratio':>8}{'saved KiB':>11}{'peak MiB':>10}{'resident MiB':>14}"
)


def line(M: int, row: Row) -> str:
    t, m = row.timing, row.memory
    start = f"{M:6d} {row.provider!s:<23} {row.provider.dtype:<9}"
    if t is None or m is None:
        return f"{start} not timed: {row.checked.inexact}"
    ms = "".join(f"{value:10.3f}" for value in (t.p50, t.p20, t.p80, t.forward, t.backward))
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    grown = "" if row.resident is None else f"{row.resident / 2**20:.1f}"
    sizes = f"{m.saved / 2**10:11.1f}{m.peak / 2**20:10.2f}{grown:>14}"
    return f"{start}{ms}{ratio:>8}{sizes}"


def record(case: dict[str, object], M: int, threads: int, row: Row) -> dict[str, object]:
    """`row` as a line of the CSV file: milliseconds, bytes and relative errors; empty where not known."""
    timing = {
        name: f"{getattr(row.timing, name):.6g}" if row.timing is not None else None
        for name in Timing._fields
    }
    found = row.checked.errors
    errors = {
        f"{what}_{name}": f"{getattr(found[name], what):.3g}" if name in found else None
        for name, what in itertools.product(RESULTS, Exactness._fields)
    }
    memory = {f"{name}_bytes": getattr(row.memory, name, None) for name in Memory._fields}
    return {
        **case,
        "M": M,
        "threads": threads,
        "dtype": row.provider.dtype,
        "provider": row.provider.kind,
        "method": row.provider.method,
        "backend": row.provider.backend,
        **timing,
        "ratio": None if row.ratio is None else f"{row.ratio:.6g}",
        **errors,
        **memory,
        "resident_bytes": row.resident,
    }


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Adds rows to a CSV file, which gets its header when it is new. Raises ValueError for other columns."""
    columns = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(
                f"--csv: expected a new file or one with columns {columns}, got {found} in {path}"
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--shape", type=int, nargs=2, action="append", metavar=("K", "N"),
        help=f"in- and out-features; may be given several times (default: {SHAPES})")
    add("--rows", type=int, nargs="+", default=ROWS, metavar="M", help="tokens (default: %(default)s)")
    add("--rank", type=int, default=16, metavar="R")
    add("--method", choices=LOW_RANK, nargs="+", default=["lora"], help="of peft and ours (default: lora)")
    add("--providers", choices=(*PROVIDERS, ALONE), nargs="+", help=f"default: those of {PROVIDERS} that run")
    add("--dtype", choices=DTYPES, nargs="+", default=DENSE_DTYPES,
        help="activations of peft and ours; dense always runs in both of the default: %(default)s")
    add("--backend", nargs="+", default=["auto"], help=f"of ours: auto or {list(backends.BACKENDS)}")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="a block of rows each")
    add("--seconds", type=float, default=4.0,
        help=f"of timing per block of M and threads; at least {measure.MIN_SAMPLES} samples are taken")
    add("--cold", action=argparse.BooleanOptionalAction, default=True, help="flush caches (default: yes)")
    add("--cache-mib", type=int, help="size of the last-level cache (default: as the system tells)")
    add("--memory", action="store_true", help="also the growth of resident memory, a process per row")
    add("--csv", type=Path, help="file to append the rows to")
    # fmt: on
    args = parser.parse_args(argv)
    if args.providers is None:
        reasons = {kind: layers.missing(kind) for kind in PROVIDERS}
        args.providers = [kind for kind, reason in reasons.items() if reason is None]
        print("".join(f"left out {kind}: {reason}\n" for kind, reason in reasons.items() if reason), end="")
    if ALONE in args.providers and not set(args.providers) <= {ALONE, "dense"}:
        parser.error(f"--providers: expected {ALONE} alone or beside dense, got {args.providers}")
    if args.memory and args.device != "cpu":
        parser.error(f"--memory: expected --device cpu, got {args.device}; a GPU's peak is always measured")
    return args


def selected(args: argparse.Namespace) -> list[Provider]:
    """The providers that the options name, each once, "auto" as the backend that it stands for.

    Raises:
        ValueError: a backend is not known, or a provider cannot run here.
        BackendUnavailable: a backend cannot run the case.
    """
    for kind in args.providers:
        if (reason := layers.missing(kind)) is not None:
            raise ValueError(f"--providers: {kind} cannot run here: {reason}")
    adapted = list(itertools.product(args.method, args.dtype))
    found = {
        "dense": [Provider("dense", dtype) for dtype in DENSE_DTYPES],
        "peft": [Provider("peft", dtype, method) for method, dtype in adapted],
        "unsloth": [Provider("unsloth", dtype, method) for method, dtype in adapted if method == "lora"],
        "ours": [
            Provider(
                "ours",
                dtype,
                method,
                backends.resolve("lora_linear", "nf4", args.device, DTYPES[dtype], backend),
            )
            for backend, (method, dtype) in itertools.product(args.backend, adapted)
        ],
    }
    return list(dict.fromkeys(itertools.chain.from_iterable(found[kind] for kind in args.providers)))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    providers = selected(args)
    device = device_name(args.device)
    print(f"{device}; {', '.join(f'{package} {version}' for package, version in versions().items())}")
    wrong: list[str] = []
    for K, N in args.shape or SHAPES:
        case = {
            "date": datetime.date.today(), "device": device, **versions(), "format": "nf4 nested",
            "K": K, "N": N, "R": args.rank, "cold": args.cold,
        }  # fmt: skip
        for threads, M, rows in bench(Shape(K, N, args.rank, args.device), providers, args):
            if args.rows[0] == M:
                print(f"\nK={K} N={N} R={args.rank} threads={threads}, nested NF4, fp32 adapters\n{HEADER}")
            print("\n".join(line(M, row) for row in rows), flush=True)
            if args.csv is not None and rows:
                append(args.csv, [record(case, M, threads, row) for row in rows])
            wrong += [f"{row.provider} {row.provider.dtype}" for row in rows if row.checked.inexact]
    if wrong:
        sys.exit(f"not timed, for it is not exact: {', '.join(dict.fromkeys(wrong))}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
