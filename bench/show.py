"""What `peft-fast bench` prints: progress, a table for each case, and whether the figures may be trusted."""

from __future__ import annotations

import datetime
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft_fast.bench import peaks, records, registry, suite
from peft_fast.bench.lora_linear import append
from peft_fast.bench.providers import PEERS, PROVIDERS, entry, versions
from peft_fast.bench.suite import Block, Options, Outcome
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from peft_fast.info import device_name

STEP = "forward+backward"
QUICK_SECONDS = 1.0
WIDE = 130
MOST_MIB = 2**14
SPARE = ("p20-p80", "GB/s", "GFLOP/s", "launches", "roof %", "peak MiB", "saved KiB", "dX", "forward")
"""Columns in the order in which a narrow terminal drops them; those over peers follow."""


def table(block: Block, options: Options, width: int = WIDE) -> Table:
    """A row for each provider: milliseconds of a step, ratios, memory, and what share of the device was used.

    Ratios are medians over those of the fastest dense layer, then over a peer; below 1 is faster than that.
    Columns of SPARE are left out until the others fit into `width` characters, so that none is cut.
    """
    peers = [peer for peer in PEERS if any(o.provider == peer for o in block.timed)]
    rows = {name(outcome): row(block, outcome, peers, options) for outcome in block.timed}
    spare = [*SPARE, *(f"/ {peer}" for peer in reversed(peers))]
    console = Console(width=10 * WIDE)
    for dropped in range(len(spare) + 1):
        found = _table(str(block.case), rows, set(spare[:dropped]))
        if Measurement.get(console, console.options, found).maximum <= width:
            break
    return found


def _table(title: str, rows: Mapping[str, Mapping[str, str]], without: Collection[str]) -> Table:
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    found = Table(title=title, title_justify="left", title_style="bold", **style)
    found.add_column("provider", no_wrap=True)
    titles = [title for title in next(iter(rows.values())) if title not in without]
    for title in titles:
        found.add_column(title, justify="right", no_wrap=True)
    for provider, cells in rows.items():
        weight = "bold" if provider.startswith("ours") else None
        found.add_row(escape(provider), *(cells[title] for title in titles), style=weight)
    return found


def row(block: Block, outcome: Outcome, peers: Sequence[str], options: Options) -> dict[str, str]:
    """The cells of a provider by their titles."""
    spread, memory = outcome.spreads[STEP], outcome.memory
    speeds = records.speeds(block.case, outcome, STEP, options)
    assert memory is not None
    return {
        "ms": f"{spread.p50:.3f}",
        "p20-p80": f"{spread.p20:.3f}-{spread.p80:.3f}",
        "/ dense": ratio(block.over(outcome, "dense")),
        "forward": ratio(block.over(outcome, "dense", "forward")),
        "dX": ratio(block.over(outcome, "dense", "dX")),
        **{f"/ {peer}": ratio(block.over(outcome, peer)) for peer in peers},
        "saved KiB": f"{memory.saved / 2**10:.1f}",
        "peak MiB": f"{memory.peak / 2**20:.2f}",
        **({} if outcome.launches is None else {"launches": str(outcome.launches)}),
        "GB/s": f"{speeds.gb_per_s:.1f}",
        "GFLOP/s": f"{1e3 * (speeds.tflop_per_s or 0):.1f}",
        "roof %": "" if speeds.roofline_percent is None else f"{speeds.roofline_percent:.0f}",
    }


def name(outcome: Outcome) -> str:
    asked = entry(outcome.provider).backend
    return f"{outcome.provider} ({outcome.backend})" if asked == "auto" else outcome.provider


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def show(console: Console, block: Block, options: Options, known: set[tuple[str, str]]) -> None:
    """The table of a block, why others are not in it unless that is `known` already, and its A/A test."""
    if block.timed:
        console.print(table(block, options, console.width))
    else:
        console.print(f"[bold]{block.case}[/bold]: nothing was timed")
    for outcome in block.outcomes:
        if outcome.red:
            console.print(f"RED {outcome.provider}: {outcome.reason}", style="bold red", markup=False)
        elif outcome.reason and (outcome.provider, outcome.reason) not in known:
            known.add((outcome.provider, outcome.reason))
            console.print(f"{outcome.provider} not run: {outcome.reason}", style="dim", markup=False)
        if outcome.controls:
            console.print(against_itself(outcome), style="dim", markup=False)
    for line in noise(block):
        console.print(line, style="yellow", markup=False)
    console.print()


def against_itself(outcome: Outcome) -> str:
    """The A/A test of a provider, each measure."""
    parts = [f"{m} {c.p50:.2f} ({c.p20:.2f}-{c.p80:.2f})" for m, c in outcome.controls.items()]
    return f"{outcome.provider} over itself: {', '.join(parts)}"


def noise(block: Block) -> list[str]:
    """For each cause, the measures that are too noisy to say."""
    causes: dict[str, list[str]] = {}
    for measured in block.noisy:
        for cause in block.noise(measured):
            causes.setdefault(cause, []).append(measured)
    return [
        f"too noisy to say: {', '.join(measures)} ({cause}); not to be quoted"
        for cause, measures in causes.items()
    ]


def named_providers(text: str | None) -> list[str]:
    """Those of a list with commas, in this order; by default all. Raises ValueError for another name."""
    names = [word.strip() for word in text.split(",")] if text else list(PROVIDERS)
    for provider in names:
        entry(provider)
    return list(dict.fromkeys(names))


def command(
    filters: Sequence[str],
    quick: bool,
    providers: str | None,
    device: str | None,
    threads: int | None,
    seconds: float | None,
    again: bool,
    csv: Path | None,
    listed: bool,
    cache_mib: int | None,
) -> bool:
    """Runs `peft-fast bench`: whether nothing was red.

    Raises:
        ValueError: an option does not fit; the message names it.
        OSError: the system does not tell the size of the caches.
    """
    cases = registry.select(filters or (registry.QUICK if quick else registry.DEFAULT))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    if listed:
        for case in cases:
            console.print(f"{case}  ({' '.join(case.layers)})", soft_wrap=True, highlight=False)
        console.print(f"{len(cases)} of {sum(1 for _ in registry.cases())} cases")
        return True
    if seconds is None:
        seconds = QUICK_SECONDS if quick else 4.0
    cache = None if cache_mib is None else cache_mib * 2**20
    options = Options(checked_device(device), seconds, again, compiled=not quick, cache=cache)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"--seconds: expected a number that is at least 0, got {seconds}")
    if cache_mib is not None and not 1 <= cache_mib <= MOST_MIB:
        raise ValueError(f"--cache-mib: expected 1 to {MOST_MIB}, got {cache_mib}")
    names = named_providers(providers)
    if csv is not None:
        records.check_file(csv)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    packages = ", ".join(f"{package} {version}" for package, version in versions().items() if version)
    console.print(
        f"{device_name(options.device)}, {torch.get_num_threads()} threads; {packages}", highlight=False
    )
    best = peaks.peak(options.device, cases[0].dtype, cache)
    if best:
        console.print(
            f"at best, by {best.source}: {1e-9 * best.flops:.0f} GFLOP/s, {1e-9 * best.bandwidth:.1f} GB/s",
            highlight=False,
        )
    least = str(datetime.timedelta(seconds=round(len(cases) * seconds)))
    console.print(f"cases: {len(cases)}, to be timed for {least} h, and checked\n", highlight=False)
    done: list[Block] = []
    known: set[tuple[str, str]] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(str(cases[0]), total=len(cases))
        for block in suite.blocks(cases, names, options):
            done.append(block)
            show(console, block, options, known)
            if csv is not None:
                append(csv, list(records.records(block, options)))
            if len(done) < len(cases):
                progress.update(task, description=str(cases[len(done)]))
            progress.advance(task)
    red = [f"{block.case}: {o.provider}" for block in done for o in block.outcomes if o.red]
    noisy = [block for block in done if block.noisy]
    if noisy:
        console.print(f"{len(noisy)} of {len(done)} cases were too noisy to say:", style="yellow")
    for block in noisy:
        console.print(f"  {block.case}: {', '.join(block.noisy)}", style="yellow", markup=False)
    for line in red:
        console.print(f"RED {line}", style="bold red", markup=False)
    return not red


def checked_device(device: str | None) -> str:
    """By default a GPU if any. Raises ValueError for what torch does not see."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: expected cpu, or cuda where torch sees a GPU, got {device!r}")
    return device
