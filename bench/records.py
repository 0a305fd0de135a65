"""The lines that `peft-fast bench --csv` appends: figures, and machine, versions and commit behind them."""

from __future__ import annotations

import csv
import datetime
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from peft_fast.bench import peaks, registry
from peft_fast.bench.providers import PEERS, entry, is_dense, versions
from peft_fast.bench.registry import MEASURES, Case
from peft_fast.bench.suite import Block, Options, Outcome

from peft_fast.info import device_name

RESULTS = "bench/results"
"""Of the checkout; what a run appends there does not make it dirty."""


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this file is in, None outside of one.

    "-dirty" where a tracked file was changed, those in RESULTS apart.
    """
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "measure.py")
        changed = git("status", "--porcelain", "--untracked-files=no", ":/", f":(top,exclude){RESULTS}")
        return git("describe", "--always", "--exclude=*") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_file(path: Path) -> None:
    """Tells before anything is timed whether rows can be appended.

    Raises:
        ValueError: there is no such folder, it cannot be written, or a file with other columns is there.
    """
    # Before the file is written: the commit, which is looked up once.
    nothing = Block(next(registry.cases()), [Outcome("ours")])
    columns = list(next(records(nothing, Options())))
    if not path.parent.is_dir():
        raise ValueError(f"--csv: expected a file in a folder that exists, got {path}")
    try:
        if not path.exists():
            path.touch()
            path.unlink()
            return
        with path.open("r+", newline="") as file:
            found = next(csv.reader(file), [])
    except OSError as error:
        raise ValueError(
            f"--csv: expected a file that can be written, got {path}: {error.strerror}"
        ) from error
    if found != columns:
        wrong = sorted({*columns} ^ {*found}) or "another order"
        raise ValueError(f"--csv: expected a new file or one with the suite's columns, got {path}: {wrong}")


def records(block: Block, options: Options) -> Iterator[dict[str, object]]:
    """The lines of the CSV file: one for each provider and measure, one for a provider without figures.

    Times in milliseconds, memory in bytes; empty where not known.
    """
    case = block.case
    machine = {
        "date": datetime.date.today(), "commit": commit(), "device": device_name(options.device),
        **versions(), "threads": torch.get_num_threads(), "cold": options.cold,
        **case._asdict(), "layers": " ".join(case.layers), "load": block.load,
    }  # fmt: skip
    for outcome in block.outcomes:
        for measured in MEASURES if outcome.spreads else ("",):
            yield {**machine, **_figures(block, outcome, measured, options)}


def _figures(block: Block, outcome: Outcome, measured: str, options: Options) -> dict[str, object]:
    step = measured == "forward+backward"
    spread = outcome.spreads.get(measured)
    memory = outcome.memory if step else None
    worst = outcome.errors
    rates = speeds(block.case, outcome, measured, options) if spread else Speeds()
    numbers = {
        **dict.fromkeys(("p20", "p50", "p80"), None),
        **({name: getattr(spread, name) for name in ("p20", "p50", "p80")} if spread else {}),
        "over_dense": block.over(outcome, "dense", measured) if spread else None,
        **{f"over_{peer}": block.over(outcome, peer, measured) if spread else None for peer in PEERS},
        "again": outcome.controls[measured].p50 if measured in outcome.controls else None,
        "error": worst.error if worst else None,
        "allowed_error": worst.allowed if worst else None,
        "plain_error": worst.plain if worst else None,
        **rates._asdict(),
    }
    return {
        "provider": outcome.provider,
        "backend": outcome.backend,
        "measure": measured,
        "red": outcome.red,
        "reason": outcome.reason,
        "samples": spread.samples if spread else None,
        "noisy": measured in block.noisy if spread else None,
        "worst_result": worst.result if worst else None,
        **{name: None if value is None else f"{value:.6g}" for name, value in numbers.items()},
        "saved_bytes": memory.saved if memory else None,
        "peak_bytes": memory.peak if memory else None,
        "launches": outcome.launches if step else None,
    }


class Speeds(NamedTuple):
    """Of the least work of a case (`registry.work`): what was reached, and the device's best (`peaks`)."""

    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    roofline_percent: float | None = None
    best_gb_per_s: float | None = None
    best_tflop_per_s: float | None = None


def speeds(case: Case, outcome: Outcome, measured: str, options: Options) -> Speeds:
    dense = is_dense(outcome.provider)
    dtype = (entry(outcome.provider).dtype if dense else None) or case.dtype
    work = (registry.dense_work(case, dtype) if dense else registry.work(case))[measured]
    milliseconds = outcome.spreads[measured].p50
    best = peaks.peak(options.device, dtype, options.cache)
    reached = Speeds(1e-6 * work.bytes / milliseconds, 1e-9 * work.flops / milliseconds)
    if best is None:
        return reached
    return Speeds(*reached[:2], best.percent(work, milliseconds), 1e-9 * best.bandwidth, 1e-12 * best.flops)
