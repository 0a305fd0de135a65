"""Times the cases of bench/registry.py by the providers of bench/providers.py, for `peft-fast bench`.

A block is one case by all providers that run it. Each is checked against fp64 first (bench/checks.py): one
that is not exact is red and has no figure. The others are then timed in turns, with cold caches: on a CPU by
the host's monotonic clock, on a GPU between events while the host is ahead. Measures are the forward of a
training step, forward + backward with every gradient, and dX, a backward to X alone with frozen adapters.
A peer that raises, before or after its check, is left out with its error, and the others are timed anew; one
of ours is red then, and without a frozen dense layer the whole case has no figure.

`over_dense` is the median over that of the fastest frozen dense layer of the block, `over_PEER` over that
peer's. A/A: one dense layer, or with `again` each provider, is timed a second time as if it were another.
A measure is too noisy to say, and marked, where 1.00 is not within the p20 to p80 of the second over the
median of the first, where p80/p20 is above SPREAD, or where more runs than the machine has cores.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft_fast.bench import measure
from peft_fast.bench.checks import Checker, Worst
from peft_fast.bench.layers import Operands, Provider, Shape, make_operands, make_step, said
from peft_fast.bench.measure import Memory, Step
from peft_fast.bench.providers import ALONE, Entry, backend_of, entry, is_dense
from peft_fast.bench.registry import FORMATS, MEASURES, Case
from torch import Tensor, nn

from peft_fast.errors import BackendUnavailable

SPREAD = 1.5
SMALL = 128
"""Of the layer whose run, after a flush, brings a provider's code back into the caches, but no operand."""

Key = tuple[str, str]
"""A provider, with " again" for its second turn, and whether it takes "all" gradients or "dX"."""


class Options(NamedTuple):
    """`seconds` of timing for each block; `again` times every provider twice; `compiled` ones take long.

    `cache` is the size of the last-level cache in bytes, None for what the system tells.
    """

    device: str = "cpu"
    seconds: float = 4.0
    again: bool = False
    compiled: bool = True
    cold: bool = True
    cache: int | None = None

    def flush(self) -> Callable[[], object] | None:
        """What makes caches cold. Raises OSError where their size is not known."""
        if not self.cold:
            return None
        return measure.cache_flush(self.device, self.cache or measure.last_level_cache(self.device))


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
    def noise(self) -> str | None:
        """Why it does not equal itself; None where it does."""
        if not self.p20 <= 1 <= self.p80:
            return f"1.00 is not within {self.p20:.2f}-{self.p80:.2f}"
        if not self.p80 <= SPREAD * self.p20:
            return f"p80/p20 is {self.p80 / self.p20:.2f}, above {SPREAD}"
        return None


class Outcome(NamedTuple):
    """A provider in a block; without figures there is a `reason`, and `red` where results are wrong.

    Spreads, and controls of a provider that was timed twice, are by measure.
    """

    provider: str
    backend: str = ""
    reason: str | None = None
    red: bool = False
    errors: Worst | None = None
    spreads: dict[str, Spread] = {}  # noqa: RUF012, never written
    memory: Memory | None = None
    launches: int | None = None
    controls: dict[str, Control] = {}  # noqa: RUF012, never written


class Block(NamedTuple):
    """A case by its providers; `load` is how many tasks wanted a core, None where not known."""

    case: Case
    outcomes: list[Outcome]
    load: float | None = None

    @property
    def timed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.spreads]

    def noise(self, measured: str) -> list[str]:
        """What makes the ratios of a measure too noisy to say: providers unlike themselves, shared cores."""
        controls = ((o.provider, o.controls[measured]) for o in self.timed if measured in o.controls)
        found = [f"{name} over itself: {control.noise}" for name, control in controls if control.noise]
        cores = os.cpu_count() or 1
        if self.load is not None and self.load > cores + 0.5:
            found.append(f"{self.load:.1f} tasks wanted {cores} cores")
        return found

    @property
    def noisy(self) -> list[str]:
        """The measures that are too noisy to say."""
        return [measured for measured in MEASURES if self.timed and self.noise(measured)]

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
    errors: Worst


def reason_against(name: str, case: Case, names: Sequence[str], options: Options) -> str | None:
    """Why a provider is left out of a block."""
    others = [other for other in names if other != ALONE and not is_dense(other)]
    if name == ALONE and others:
        return "it changes other packages when it is imported: name it with dense providers alone"
    if entry(name).compiled and not options.compiled:
        return "compiling takes seconds: not with --quick, and with `pytest bench --compiled` alone"
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
    if not is_dense(name):
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


def failure(outcome: Outcome, error: Exception) -> Outcome:
    """Of a provider that raised: a peer's error is its result; one of ours is red, as a wrong result is."""
    if isinstance(error, measure.Inexact):
        return outcome._replace(reason=str(error), red=True)
    expected = entry(outcome.provider).peer or isinstance(error, BackendUnavailable | torch.OutOfMemoryError)
    return outcome._replace(reason=said(error), red=not expected)


def run(
    case: Case, names: Sequence[str], operands: Operands, options: Options, flush: Callable[[], object] | None
) -> Block:
    """Checks and times the providers of a case."""
    checker = Checker(case, operands)
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, Ready] = {}
    lost: list[str] = []  # dense layers that failed

    def fail(name: str, error: Exception) -> None:
        outcomes[name] = failure(outcomes[name], error)
        ready.pop(name, None)
        lost.extend([name] if is_dense(name) else [])

    for name in names:
        reason = reason_against(name, case, names, options)
        outcomes[name] = Outcome(name, _backend(name, case, options.device), reason)
        if reason is None:
            try:
                ready[name] = prepare(name, case, operands, checker, options.device)
            except Exception as error:
                fail(name, error)
    del checker
    samples: Samples = {}
    while ready and not lost and not samples:
        turns = _turns(ready, options.again)
        try:
            samples = _samples(turns, ready, options, flush)
        except Exception as error:
            fail(turns.provider, error)
    for name in [] if lost else list(ready):
        try:
            outcomes[name] = _measured(outcomes[name], ready[name], samples, options.device)
        except Exception as error:
            fail(name, error)
    if lost:
        reason = f"{lost[0]} failed, which ratios are over"
        for name, outcome in outcomes.items():
            if outcome.reason is None:
                outcomes[name] = Outcome(name, outcome.backend, reason)
    load = os.getloadavg()[0] if options.device == "cpu" and samples else None
    return Block(case, list(outcomes.values()), load)


class _Turns(Mapping[Key, Step]):
    """Steps that know whose turn it is: an error is that provider's."""

    def __init__(self, steps: dict[Key, Step]) -> None:
        self._steps = steps
        self.provider = ""

    def __getitem__(self, key: Key) -> Step:
        self.provider = key[0].removesuffix(" again")
        return self._steps[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def _turns(ready: dict[str, Ready], again: bool) -> _Turns:
    """Each provider once, then the first dense layer, or with `again` each, once more."""
    first = next((name for name in ready if is_dense(name)), next(iter(ready)))
    steps: dict[Key, Step] = {}
    for suffix, names in (("", list(ready)), (" again", list(ready) if again else [first])):
        for name in names:
            steps[name + suffix, "all"] = ready[name].step
            if ready[name].only_x is not ready[name].step:
                steps[name + suffix, "dX"] = ready[name].only_x
    return _Turns(steps)


Samples = dict[str, dict[str, list[float]]]
"""Milliseconds by provider, "again" ones included, and by measure."""


def _samples(
    turns: _Turns, ready: dict[str, Ready], options: Options, flush: Callable[[], object] | None
) -> Samples:
    def cold(key: Key) -> None:
        make_cold(flush, ready[key[0].removesuffix(" again")].small)

    if options.device == "cuda":
        taken = measure.device_samples(turns, options.seconds, flush or (lambda: None))
    else:
        taken = measure.host_samples(turns, options.seconds, options.device, cold)
    found: Samples = {}
    for (name, kind), values in taken.items():
        if kind == "all":
            only_x = taken.get((name, "dX"), values)
            forward, both = [f for f, _ in values], [f + b for f, b in values]
            found[name] = dict(zip(MEASURES, (forward, both, [b for _, b in only_x]), strict=True))
    return found


def make_cold(flush: Callable[[], object] | None, small: Step | None) -> None:
    """Flushes the caches, then runs a provider's code once on other operands."""
    if flush is not None:
        flush()
    if small is not None:
        small.run()


def _measured(outcome: Outcome, ready: Ready, samples: Samples, device: str) -> Outcome:
    """With its times and memory."""
    first, again = samples[outcome.provider], samples.get(f"{outcome.provider} again", {})
    return outcome._replace(
        errors=ready.errors,
        spreads={measured: _spread(values) for measured, values in first.items()},
        memory=measure.memory(ready.step, device),
        launches=measure.launches(ready.step, device),
        controls={measured: _control(first[measured], values) for measured, values in again.items()},
    )


def _spread(values: list[float]) -> Spread:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(fifths[0], statistics.median(values), fifths[3], len(values))


def _control(first: list[float], second: list[float]) -> Control:
    p20, p50, p80, _ = _spread(second)
    unit = statistics.median(first)
    return Control(p20 / unit, p50 / unit, p80 / unit)


def _backend(name: str, case: Case, device: str) -> str:
    """Which backend of ours stands behind a name; "" for others, and where it cannot run."""
    asked = entry(name).backend
    if asked is None:
        return ""
    try:
        return backend_of(case, device, asked)
    except BackendUnavailable:
        return ""


# ------------------------------------------------------------------------------------------------ all blocks


def blocks(cases: Sequence[Case], names: Sequence[str], options: Options) -> Iterator[Block]:
    """One after the other; cases on one weight share its operands.

    Raises:
        ValueError: a provider is not known.
        OSError: the size of the caches is not known.
    """
    for name in names:
        entry(name)
    flush = options.flush()
    made: tuple[tuple[Any, ...], Operands] | None = None
    for case in cases:
        key = (case.K, case.N, case.R, case.format)
        if made is None or made[0] != key:
            made = None  # so that two do not live at once
            try:
                made = key, _operands(case, options.device)
            except (ValueError, torch.OutOfMemoryError) as error:  # not without bitsandbytes, not on this GPU
                yield Block(case, [Outcome(name, reason=said(error)) for name in names])
                continue
        yield run(case, names, made[1], options, flush)
        gc.collect()
