"""The cases of bench/registry.py under pytest-benchmark: a group for each case and measure.

    pytest bench --benchmark-json before.json
    pytest bench --filter "lora MiniLM-L6.* nf4-nested R=16 M=1,M=512 float32" --benchmark-autosave
    pytest-benchmark compare 0001 0002 --group-by fullname

Providers are checked against fp64 first, and each pass finds cold caches, the backward pass of a step too:
the clock stands still while they are flushed. Other than in `peft-fast bench` one provider is timed after the
other, so take ratios on a busy machine from there; on a GPU the figure is of the host's clock, what it takes
to start kernels included. What does not run is skipped with the reason. Plain `pytest` collects nothing here.
"""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft_fast.bench import registry, suite
from peft_fast.bench.checks import Checker
from peft_fast.bench.measure import Step
from peft_fast.bench.providers import PROVIDERS, backend_of
from peft_fast.bench.registry import MEASURES, Case
from peft_fast.bench.suite import Options, Outcome, Ready

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 20
Cold = Callable[[], object]


class Clock:
    """Seconds of the host's clock, without those in `stopped`."""

    def __init__(self) -> None:
        self.out = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self.out

    def __repr__(self) -> str:
        return "time.perf_counter, stopped while caches are flushed"

    def stopped(self, call: Cold) -> None:
        start = time.perf_counter()
        call()
        self.out += time.perf_counter() - start


CLOCK = Clock()


def forward(step: Step, y: None, cold: Cold) -> None:
    step.layer(step.x)
    _wait()


def both(step: Step, y: None, cold: Cold) -> None:
    output = step.layer(step.x)
    _wait()
    CLOCK.stopped(cold)
    output.backward(step.grad)
    _wait()


def backward(step: Step, y: torch.Tensor, cold: Cold) -> None:
    y.backward(step.grad)
    _wait()


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


CALLS = dict(zip(MEASURES, (forward, both, backward), strict=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    try:
        cases = registry.select(option("--filter") or registry.QUICK)
    except ValueError as error:
        raise pytest.Collector.CollectError(str(error)) from error
    options = Options(DEVICE, compiled=option("--compiled"))
    found = []
    for case, name in itertools.product(cases, PROVIDERS):
        reason = suite.reason_against(name, case, list(PROVIDERS), options)
        marks = [] if reason is None else [pytest.mark.skip(f"{name}: {reason}")]
        found.append(pytest.param(case, name, marks=marks, id=f"{case}-{name}"))
    metafunc.parametrize("case,provider", found, scope="module")
    metafunc.parametrize("measured", MEASURES)


@functools.lru_cache(maxsize=1)
def operands(K: int, N: int, R: int, format: str) -> Any:
    return suite.make_operands(suite.Shape(K, N, R, DEVICE), *registry.FORMATS[format])


@pytest.fixture(scope="module")
def ready(case: Case, provider: str) -> Iterator[Ready]:
    """The provider, found exact; skipped where a peer raises something else."""
    made = operands(case.K, case.N, case.R, case.format)
    try:
        found = suite.prepare(provider, case, made, Checker(case, made), DEVICE)
    except Exception as error:
        outcome = suite.failure(Outcome(provider), error)
        if outcome.red:
            raise
        pytest.skip(f"{provider}: {outcome.reason}")
    yield found
    gc.collect()


@pytest.fixture(scope="session")
def flush(pytestconfig: pytest.Config) -> Cold | None:
    mib = pytestconfig.getoption("--cache-mib")
    return Options(DEVICE, cache=mib and mib * 2**20).flush()


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_time(
    benchmark: Any, ready: Ready, case: Case, provider: str, measured: str, flush: Cold | None
) -> None:
    benchmark.group = f"{case} {measured}"
    benchmark.extra_info.update(case._asdict(), provider=provider, measure=measured, device=DEVICE)
    if provider == "ours":
        benchmark.extra_info["backend"] = backend_of(case, DEVICE, "auto")
    step = ready.only_x if measured == "dX" else ready.step

    def cold() -> None:
        suite.make_cold(flush, ready.small)
        _wait()

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        step.drop_gradients()
        y = step.layer(step.x) if measured == "dX" else None
        cold()
        return (step, y, cold), {}

    benchmark.pedantic(CALLS[measured], setup=setup, rounds=ROUNDS, warmup_rounds=1)
