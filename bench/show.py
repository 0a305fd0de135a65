"""What `peft-fast bench` prints: progress, a table for each case, and whether the figures may be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft_fast.bench import peaks, registry, suite
from peft_fast.bench.lora_linear import append
from peft_fast.bench.providers import PEERS, PROVIDERS, entry
from peft_fast.bench.suite import Block, Options, Outcome
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from peft_fast.info import device_name, versions

STEP = "forward+backward"
QUICK_SECONDS = 1.0
WIDE = 130
IMPLIED = ("p20-p80", "GB/s", "GFLOP/s")


def table(block: Block, device: str, wide: bool = True) -> Table:
    """A row for each provider: milliseconds of a step, ratios, memory, and what share of the device was used.

    Ratios are medians over those of the fastest dense layer, then over a peer; below 1 is faster than that.
    Without `wide`, columns that others imply are left out.
    """
    peers = [peer for peer in PEERS if any(o.provider == peer for o in block.timed)]
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    found = Table(title=str(block.case), title_justify="left", title_style="bold", **style)
    found.add_column("provider", no_wrap=True)
    for i, outcome in enumerate(block.timed):
        cells = row(block, outcome, peers, device)
        if not wide:
            cells = {title: text for title, text in cells.items() if title not in IMPLIED}
        if i == 0:
            for title in cells:
                found.add_column(title, justify="right", no_wrap=True)
        weight = "bold" if outcome.provider.startswith("ours") else None
        found.add_row(escape(name(outcome)), *cells.values(), style=weight)
    return found


def row(block: Block, outcome: Outcome, peers: Sequence[str], device: str) -> dict[str, str]:
    """The cells of a provider by their titles."""
    spread, memory = outcome.spreads[STEP], outcome.memory
    speeds = suite.speeds(block.case, outcome, STEP, device)
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
    return f"{outcome.provider} ({outcome.backend})" if outcome.provider == "ours" else outcome.provider


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def show(console: Console, block: Block, options: Options, known: set[tuple[str, str]]) -> None:
    """The table of a block, why others are not in it unless that is `known` already, and its A/A test."""
    if block.timed:
        console.print(table(block, options.device, console.width >= WIDE))
    else:
        console.print(f"[bold]{block.case}[/bold]: nothing was timed")
    for outcome in block.outcomes:
        if outcome.red:
            console.print(f"RED {outcome.provider}: {outcome.reason}", style="bold red", markup=False)
        elif outcome.reason and (outcome.provider, outcome.reason) not in known:
            known.add((outcome.provider, outcome.reason))
            console.print(f"{outcome.provider} not run: {outcome.reason}", style="dim", markup=False)
        if outcome.control:
            p20, p50, p80 = outcome.control
            verdict = "too noisy to say" if outcome.control.noisy else "1.00 is within"
            itself = f"{outcome.provider} over itself: {p50:.2f} ({p20:.2f}-{p80:.2f}), {verdict}"
            console.print(itself, style="dim", markup=False)
    if block.noisy:
        load = "" if block.load is None else f" (load {block.load:.1f})"
        console.print(f"too noisy{load} to say: ratios of this case are not to be quoted", style="yellow")
    console.print()


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
) -> bool:
    """Runs `peft-fast bench`: whether nothing was red.

    Raises:
        ValueError: an option does not fit; the message names it.
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
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: expected cpu, or cuda where torch sees a GPU, got {device!r}")
    names = named_providers(providers)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    if seconds is None:
        seconds = QUICK_SECONDS if quick else 4.0
    options = Options(device, seconds, again, compiled=not quick)
    warnings.filterwarnings("ignore", category=UserWarning)
    packages = ", ".join(f"{package} {version}" for package, version in versions().items() if version)
    console.print(f"{device_name(device)}, {torch.get_num_threads()} threads; {packages}", highlight=False)
    best = peaks.peak(device, cases[0].dtype)
    if best:
        console.print(
            f"at best, by {best.source}: {1e-9 * best.flops:.0f} GFLOP/s, {1e-9 * best.bandwidth:.1f} GB/s\n",
            highlight=False,
        )
    done: list[Block] = []
    known: set[tuple[str, str]] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(str(cases[0]), total=len(cases))
        for block in suite.blocks(cases, names, options):
            done.append(block)
            show(console, block, options, known)
            if csv is not None:
                append(csv, list(suite.records(block, options)))
            if len(done) < len(cases):
                progress.update(task, description=str(cases[len(done)]))
            progress.advance(task)
    red = [f"{block.case}: {o.provider}" for block in done for o in block.outcomes if o.red]
    noisy = sum(block.noisy for block in done)
    if noisy:
        console.print(f"{noisy} of {len(done)} cases were too noisy to say", style="yellow")
    for line in red:
        console.print(f"RED {line}", style="bold red", markup=False)
    return not red
