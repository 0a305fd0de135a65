"""Times the cases of bench/registry.py by the providers of bench/providers.py, for `peft-fast bench`.

A block is one case by all providers that run it. Each is checked against fp64 first (bench/checks.py): one
that is not exact is red and has no figure. The others are then timed in turns, with cold caches: on a CPU by
the host's monotonic clock, on a GPU between events while the host is ahead. Measures are the forward of a
training step, forward + backward with every gradient, and dX, a backward to X alone with frozen adapters.

`over_dense` is the median over that of the fastest frozen dense layer of the block, `over_PEER` over that
peer's. A/A: one dense layer, or with `again` each provider, is timed a second time as if it were another.
The machine is too noisy to say, and the block is marked, where 1.00 is not within the p20 to p80 of the
second over the median of the first, where p80/p20 is above SPREAD, or where more runs than it has cores.
"""

from __future__ import annotations

import datetime
import functools
import gc
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft_fast.bench import measure, peaks, registry
from peft_fast.bench.checks import Checker
from peft_fast.bench.layers import Operands, Provider, Shape, make_operands, make_step
from peft_fast.bench.measure import Exactness, Memory, Step
from peft_fast.bench.providers import ALONE, PEERS, Entry, backend_of, entry, is_dense
from peft_fast.bench.registry import FORMATS, MEASURES, Case
from torch import Tensor, nn

from peft_fast.errors import BackendUnavailable
from peft_fast.info import device_name, versions

SPREAD = 1.5
SMALL = 128
"""Of the layer whose run, after a flush, brings a provider's code back into the caches, but no operand."""


class Options(NamedTuple):
    """`seconds` of timing for each block; `again` times every provider twice; `compiled` ones take long."""

    device: str = "cpu"
    seconds: float = 4.0
    again: bool = False
    compiled: bool = True
    cold: bool = True


class Spread(NamedTuple):
    """Milliseconds."""

    p20: float
    p50: float
    p80: float
    samples: int


class Control(NamedTuple):
    """A provider against itself: p20, p50 and p80 of the second over the median of the first."""

    p20: float
    p50: float
    p80: float

    @property
    def noisy(self) -> bool:
        return not (self.p20 <= 1 <= self.p80 and self.p80 <= SPREAD * self.p20)


class Outcome(NamedTuple):
    """A provider in a block; without figures there is a `reason`, and `red` where its results are wrong."""

    provider: str
    backend: str = ""
    reason: str | None = None
    red: bool = False
    errors: Exactness | None = None
    spreads: dict[str, Spread] = {}  # noqa: RUF012, never written
    memory: Memory | None = None
    launches: int | None = None
    control: Control | None = None


class Block(NamedTuple):
    """A case by its providers; `load` is how many tasks wanted a core, None where not known."""

    case: Case
    outcomes: list[Outcome]
    load: float | None = None

    @property
    def timed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.spreads]

    @property
    def noisy(self) -> bool:
        """Whether a provider that was timed twice differs from itself, or the cores are shared."""
        shared = self.load is not None and self.load > (os.cpu_count() or 1) + 0.5
        return shared or any(outcome.control.noisy for outcome in self.outcomes if outcome.control)

    def dense(self, measured: str) -> float | None:
        """Milliseconds of the fastest dense layer; None without one."""
        return min((o.spreads[measured].p50 for o in self.timed if is_dense(o.provider)), default=None)

    def over(self, outcome: Outcome, other: str, measured: str = "forward+backward") -> float | None:
        """An outcome's median over that of "dense" or of another provider; None where either is missing."""
        peer = {o.provider: o.spreads[measured].p50 for o in self.timed}
        below = self.dense(measured) if other == "dense" else peer.get(other)
        return outcome.spreads[measured].p50 / below if outcome.spreads and below else None


# ------------------------------------------------------------------------------------------------- one block


class Ready(NamedTuple):
    """A provider that has been found exact: all gradients, dX alone, and the same code on a small layer."""

    step: Step
    only_x: Step
    small: Step | None
    errors: Exactness


def reason_against(name: str, case: Case, names: Sequence[str], options: Options) -> str | None:
    """Why a provider is left out of a block."""
    others = [other for other in names if other != ALONE and not is_dense(other)]
    if name == ALONE and others:
        return "it changes other packages when it is imported: name it with dense providers alone"
    if entry(name).compiled and not options.compiled:
        return "compiling takes longer than --quick allows"
    return entry(name).cannot(case, options.device)


def prepare(name: str, case: Case, operands: Operands, checker: Checker, device: str) -> Ready:
    """Builds and checks a provider. Raises `measure.Inexact`, and what the provider raises."""
    row = entry(name)
    if row.compiled:
        torch.compiler.reset()  # there is a limit of compilations per function, and then eager code runs
    step = _step(row, case, operands, device)
    only_x = step
    if not is_dense(name):
        only_x = _step(row, case, operands, device)
        only_x.layer.requires_grad_(False)
    errors = checker.check(name, step, only_x)
    step = step._replace(factors=_factors(step.layer))
    small = None
    if device == "cpu" and not row.compiled:
        tiny = case._replace(K=SMALL, N=SMALL, R=min(case.R, SMALL))
        small = _step(row, tiny, _operands(tiny, device), device)
    return Ready(step, only_x, small, errors)


def _step(row: Entry, case: Case, operands: Operands, device: str) -> Step:
    assert row.layer is not None, "a provider that runs nothing has a reason"
    provider = Provider("", row.dtype or case.dtype)
    shape = Shape(case.K, case.N, case.R, device)
    return make_step(provider, row.layer(case, operands), shape, case.M)


def _factors(layer: nn.Module) -> tuple[Tensor, ...]:
    """The trained A and B of LoRA and DoRA: an optimizer writes them between steps."""
    named = layer.named_parameters()
    found = tuple(p for name, p in named if p.requires_grad and ("lora_A" in name or "lora_B" in name))
    assert len(found) in (0, 2), "the signs of two factors cancel"
    return found


def _operands(case: Case, device: str) -> Operands:
    return make_operands(Shape(case.K, case.N, case.R, device), *FORMATS[case.format])


def run(
    case: Case, names: Sequence[str], operands: Operands, options: Options, flush: Callable[[], object] | None
) -> Block:
    """Checks and times the providers of a case."""
    checker, ready, outcomes = Checker(case, operands), {}, {}
    for name in names:
        outcomes[name] = Outcome(name, _backend(name, case, options.device))
        reason, red = reason_against(name, case, names, options), False
        if reason is None:
            try:
                ready[name] = prepare(name, case, operands, checker, options.device)
            except measure.Inexact as error:
                reason, red = str(error), True
            except Exception as error:  # a peer's failure is its result
                if not entry(name).peer and not isinstance(error, BackendUnavailable):
                    raise
                reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        outcomes[name] = outcomes[name]._replace(reason=reason, red=red)
    del checker
    if not ready:
        return Block(case, list(outcomes.values()))
    first = next((name for name in ready if is_dense(name)), next(iter(ready)))
    twice = list(ready) if options.again else [first]
    samples = _samples(ready, twice, options, flush)
    for name, found in ready.items():
        forward, both, only_x = samples[name]
        again = samples.get(f"{name} again")
        outcomes[name] = outcomes[name]._replace(
            errors=found.errors,
            spreads=dict(zip(MEASURES, map(_spread, (forward, both, only_x)), strict=True)),
            memory=measure.memory(found.step, options.device),
            launches=measure.launches(found.step, options.device),
            control=_control(both, again[1]) if again else None,
        )
    load = os.getloadavg()[0] if options.device == "cpu" else None
    return Block(case, list(outcomes.values()), load)


def _samples(
    ready: dict[str, Ready], twice: Sequence[str], options: Options, flush: Callable[[], object] | None
) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """By provider, "again" ones included: milliseconds of each measure."""
    steps: dict[tuple[str, str], Step] = {}
    for name, found in ready.items():
        steps[name, "all"] = found.step
        if found.only_x is not found.step:
            steps[name, "dX"] = found.only_x
    steps.update({(f"{name} again", "all"): ready[name].step for name in twice})
    small = {name: found.small for name, found in ready.items()}

    def cold(key: tuple[str, str]) -> None:
        if flush is not None:
            flush()
        if (step := small[key[0].removesuffix(" again")]) is not None:
            step.run()

    if options.device == "cuda":
        taken = measure.device_samples(steps, options.seconds, flush or (lambda: None))
    else:
        taken = measure.host_samples(steps, options.seconds, options.device, cold)
    return {
        name: (
            [forward for forward, _ in values],
            [forward + backward for forward, backward in values],
            [backward for _, backward in taken.get((name, "dX"), values)],
        )
        for (name, kind), values in taken.items()
        if kind == "all"
    }


def _spread(values: list[float]) -> Spread:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(fifths[0], statistics.median(values), fifths[3], len(values))


def _control(first: list[float], second: list[float]) -> Control:
    p20, p50, p80, _ = _spread(second)
    unit = statistics.median(first)
    return Control(p20 / unit, p50 / unit, p80 / unit)


def _backend(name: str, case: Case, device: str) -> str:
    """Which backend of ours stands behind a name; "" for others, and where it cannot run."""
    if not name.startswith("ours"):
        return ""
    try:
        return backend_of(case, device, name[5:-1] or "auto")
    except BackendUnavailable:
        return ""


# ------------------------------------------------------------------------------------------------ all blocks


def blocks(cases: Sequence[Case], names: Sequence[str], options: Options) -> Iterator[Block]:
    """One after the other; cases on one weight share its operands.

    Raises:
        ValueError: a provider is not known.
    """
    for name in names:
        entry(name)
    flush = None
    if options.cold:
        flush = measure.cache_flush(options.device, measure.last_level_cache(options.device))
    made: tuple[tuple[Any, ...], Operands] | None = None
    for case in cases:
        key = (case.K, case.N, case.R, case.format)
        if made is None or made[0] != key:
            made = None  # so that two do not live at once
            made = key, _operands(case, options.device)
        yield run(case, names, made[1], options, flush)
        gc.collect()


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this file is in, "-dirty" where it was changed; None outside of one."""
    folder = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "measure.py")
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def records(block: Block, options: Options) -> Iterator[dict[str, object]]:
    """The lines of the CSV file: one for each provider and measure, one for a provider without figures.

    Times in milliseconds, memory in bytes; empty where not known.
    """
    case = block.case
    machine = {
        "date": datetime.date.today(), "commit": commit(), "device": device_name(options.device),
        **versions(), "threads": torch.get_num_threads(), "cold": options.cold,
        **case._asdict(), "layers": " ".join(case.layers), "load": block.load, "noisy": block.noisy,
    }  # fmt: skip
    for outcome in block.outcomes:
        for measured in MEASURES if outcome.spreads else ("",):
            yield {**machine, **_figures(block, outcome, measured, options.device)}


def _figures(block: Block, outcome: Outcome, measured: str, device: str) -> dict[str, object]:
    step = measured == "forward+backward"
    spread = outcome.spreads.get(measured)
    memory = outcome.memory if step else None
    rates = speeds(block.case, outcome, measured, device) if spread else Speeds()
    numbers = {
        **dict.fromkeys(("p20", "p50", "p80"), None),
        **({name: getattr(spread, name) for name in ("p20", "p50", "p80")} if spread else {}),
        "over_dense": block.over(outcome, "dense", measured) if spread else None,
        **{f"over_{peer}": block.over(outcome, peer, measured) if spread else None for peer in PEERS},
        "again": outcome.control.p50 if outcome.control and step else None,
        "error": outcome.errors.error if outcome.errors else None,
        "plain_error": outcome.errors.plain if outcome.errors else None,
        **rates._asdict(),
    }
    return {
        "provider": outcome.provider,
        "backend": outcome.backend,
        "measure": measured,
        "red": outcome.red,
        "reason": outcome.reason,
        "samples": spread.samples if spread else None,
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


def speeds(case: Case, outcome: Outcome, measured: str, device: str) -> Speeds:
    dense = is_dense(outcome.provider)
    dtype = (entry(outcome.provider).dtype if dense else None) or case.dtype
    work = (registry.dense_work(case, dtype) if dense else registry.work(case))[measured]
    milliseconds, best = outcome.spreads[measured].p50, peaks.peak(device, dtype)
    reached = Speeds(1e-6 * work.bytes / milliseconds, 1e-9 * work.flops / milliseconds)
    if best is None:
        return reached
    return Speeds(*reached[:2], best.percent(work, milliseconds), 1e-9 * best.bandwidth, 1e-12 * best.flops)
