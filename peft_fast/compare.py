"""`peft-fast compare`: the same job with every method and seed, and what each cost and reached, as one table.

Each run is `peft-fast train` in a process of its own, so that its peak memory is its own, one after another.
The folder:

    <method>-seed<seed>/    the runs, as `train` writes them; those that are finished are kept
    compare.csv, .md        a row for each method: means over its seeds, medians of the times, and how far the
                            accuracies spread
    compare.png             accuracy over trained parameters; time and memory of each method
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import config, tasks
from .config import TrainConfig
from .files import replace_file
from .plots import plot_comparison
from .training_methods import TRAINING_METHODS, methods_with

_ONCE = {"eval_every": 10**9, "save_every": 10**9}
"""Past the end: what follows the last step is all."""


class Row(NamedTuple):
    """A method: over its seeds the mean of accuracy, loss and memory, and the median of the times."""

    method: str
    seeds: int
    trained_parameters: int
    accuracy: float | None
    accuracy_spread: float | None
    """Standard deviation over the seeds; None of one seed."""
    eval_loss: float
    steps: int
    ms_per_step: float
    seconds: float
    peak_memory: int | None
    adapter_bytes: int


def jobs(
    methods: Sequence[str], seeds: Sequence[int], output: Path, options: Mapping[str, Any]
) -> list[TrainConfig]:
    """The job of every method and seed; an option that only some methods have goes to those.

    Evaluates and saves once, at the end, unless `options` say otherwise.

    Raises:
        ValueError, TypeError: an option does not fit, or none of the methods has it; the message names it.
    """
    for argument, given in (("methods", methods), ("seeds", seeds)):
        if not given or len(set(given)) != len(given):
            raise ValueError(f"{argument}: expected different ones, at least one, got {list(given)}")
    for name in options:
        if name in config.SPECIFIC and not set(methods_with(name)) & set(methods):
            raise ValueError(f"{name}: expected an option of one of {list(methods)}, got one of none")
    takers = {name: [m for m in methods if _takes(m, name, value)] for name, value in options.items()}
    for name, value in options.items():
        if not takers[name]:
            raise ValueError(f"{name}: expected a value that one of {list(methods)} has, got {value!r}")
    made = []
    for method in methods:
        own = {name: value for name, value in options.items() if method in takers[name]}
        for seed in seeds:
            folder = str(output / f"{method}-seed{seed}")
            made.append(
                TrainConfig(**{**_ONCE, **own}, method=method, seed=seed, output=folder, overwrite=True)
            )
    return made


def _takes(method: str, option: str, value: Any) -> bool:
    if option not in config.SPECIFIC:
        return True
    choices = TRAINING_METHODS[method].choices.get(option)
    return method in methods_with(option) and (choices is None or value in choices)


def compare(todo: Sequence[TrainConfig], output: Path, console: Console | None = None) -> list[Row]:
    """Runs what is not finished yet, and writes the table and the plot.

    Raises:
        ValueError: a data file is not what it was when a finished run read it, and nothing was run; or it
            has changed since the first run did.
        ChildProcessError: a run failed; the message has the end of what it said. The finished ones are kept.
    """
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    kept = [finished(job) for job in todo]
    for i, (job, metrics) in enumerate(zip(todo, kept, strict=True), start=1):
        if metrics is None:
            console.print(f"{i} of {len(todo)}: {job.method}, seed {job.seed}")
            metrics = _run(job)
        else:
            console.print(f"{i} of {len(todo)}: {job.method}, seed {job.seed}: finished before")
        found.setdefault(job.method, []).append(metrics)
        data = found[todo[0].method][0]["data_sha256"]
        if metrics["data_sha256"] != data:  # it was written while they ran
            got = f"{metrics['data_sha256']} in {str(job.folder)!r}"
            raise ValueError(f"data: expected that of the first run in each, of SHA-256 {data}, got {got}")
    rows = [_row(method, runs) for method, runs in found.items()]
    write(rows, output)
    console.print(_table(rows, title=f"{todo[0].task}, {todo[0].quant}, {rows[0].steps} steps"))
    return rows


def finished(job: TrainConfig) -> dict[str, Any] | None:
    """The metrics of a finished run of this very job, if there is one.

    Raises:
        ValueError: it was given other data, under the same names.
    """
    file = job.folder / "metrics.json"
    if not file.is_file():
        return None
    try:
        metrics: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # damaged: to be made anew
        return None
    options = {**job.as_dict(), **dict.fromkeys(config.NOT_OF_THE_RUN)}
    if not isinstance(metrics, dict) or not {"config", "data_sha256"} <= metrics.keys():
        return None
    if {**metrics["config"], **dict.fromkeys(config.NOT_OF_THE_RUN)} != options:
        return None
    tasks.check_digests(job, metrics["data_sha256"], f"the run in {str(job.folder)!r}")
    return metrics


def _run(job: TrainConfig) -> dict[str, Any]:
    """Carries out a job in a process of its own."""
    job.folder.mkdir(parents=True, exist_ok=True)
    file = job.folder / "job.yaml"
    config.save(job, file)
    command = [sys.executable, "-m", "peft_fast.cli", "train", "--config", str(file)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    metrics = finished(job)
    if ran.returncode or metrics is None:
        said = ((ran.stderr or ran.stdout).strip().splitlines() or ["nothing"])[-1][:500]
        raise ChildProcessError(f"{job.method}, seed {job.seed}: exit code {ran.returncode}: {said}")
    return metrics


def _row(method: str, runs: Sequence[Mapping[str, Any]]) -> Row:
    def mean(name: str) -> float:
        return statistics.fmean(run[name] for run in runs)

    accurate = runs[0]["accuracy"] is not None
    measured = runs[0]["peak_memory"] is not None
    spread = statistics.stdev(run["accuracy"] for run in runs) if accurate and len(runs) > 1 else None
    return Row(
        method=method,
        seeds=len(runs),
        trained_parameters=runs[0]["trainable_parameters"],
        accuracy=mean("accuracy") if accurate else None,
        accuracy_spread=spread,
        eval_loss=mean("eval_loss"),
        steps=runs[0]["steps"],
        ms_per_step=statistics.median(run["ms_per_step"] for run in runs),
        seconds=statistics.median(run["seconds"] for run in runs),
        peak_memory=round(mean("peak_memory")) if measured else None,
        adapter_bytes=round(mean("adapter_bytes")),
    )


# ----------------------------------------------------------------------------------------------- reporting

COLUMNS = (
    "method", "trained parameters", "accuracy", "evaluation loss", "ms a step", "seconds", "peak MiB",
    "saved KiB",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    accuracy = "" if row.accuracy is None else f"{row.accuracy:.3f}"
    if row.accuracy_spread is not None:
        accuracy += f" ± {row.accuracy_spread:.3f}"
    return (
        row.method,
        f"{row.trained_parameters:,}",
        accuracy,
        f"{row.eval_loss:.4f}",
        f"{row.ms_per_step:.0f}",
        f"{row.seconds:.1f}",
        "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}",
        f"{math.ceil(row.adapter_bytes / 1024):,}",
    )


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def write(rows: Sequence[Row], output: Path) -> None:
    """compare.csv, compare.md and compare.png, each replaced whole."""

    def as_csv(part: Path) -> None:
        with part.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, Row._fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row._asdict() for row in rows)

    lines = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:])), *map(_cells, rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    replace_file(output / "compare.csv", as_csv)
    replace_file(output / "compare.md", lambda part: part.write_text(text, encoding="utf-8"))
    plot_comparison(rows, output / "compare.png")
