"""The cases of bench/registry.py under pytest-benchmark: a group for each case and measure.

    pytest bench --benchmark-json before.json
    pytest bench --filter "lora MiniLM-L6.* nf4-nested R=16 M=1,M=512 float32" --benchmark-autosave
    pytest-benchmark compare 0001 0002 --group-by fullname

Providers are checked against fp64 first, and caches are cold, as in `peft-fast bench`; but here one provider
is timed after the other, so take ratios on a busy machine from there. Plain `pytest` collects nothing here.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft_fast.bench import measure, registry, suite
from peft_fast.bench.checks import Checker
from peft_fast.bench.measure import Step
from peft_fast.bench.providers import PROVIDERS, backend_of
from peft_fast.bench.registry import MEASURES, Case
from peft_fast.bench.suite import Options, Ready

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = Options(DEVICE, compiled=False)
ROUNDS = 20


def forward(step: Step, y: None) -> None:
    step.layer(step.x)
    _wait()


def both(step: Step, y: None) -> None:
    step.layer(step.x).backward(step.grad)
    _wait()


def backward(step: Step, y: torch.Tensor) -> None:
    y.backward(step.grad)
    _wait()


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


CALLS = dict(zip(MEASURES, (forward, both, backward), strict=True))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = registry.select(metafunc.config.getoption("--filter") or registry.QUICK)
    found = [
        (case, name)
        for case in cases
        for name in PROVIDERS
        if suite.reason_against(name, case, list(PROVIDERS), OPTIONS) is None
    ]
    metafunc.parametrize(
        "case,provider", found, ids=[f"{case}-{name}" for case, name in found], scope="module"
    )
    metafunc.parametrize("measured", MEASURES)


@functools.lru_cache(maxsize=1)
def operands(K: int, N: int, R: int, format: str) -> Any:
    return suite.make_operands(suite.Shape(K, N, R, DEVICE), *registry.FORMATS[format])


@pytest.fixture(scope="module")
def ready(case: Case, provider: str) -> Iterator[Ready]:
    """The provider, found exact."""
    made = operands(case.K, case.N, case.R, case.format)
    yield suite.prepare(provider, case, made, Checker(case, made), DEVICE)
    gc.collect()


@pytest.fixture(scope="session")
def flush() -> Callable[[], object]:
    return measure.cache_flush(DEVICE, measure.last_level_cache(DEVICE))


def test_time(
    benchmark: Any, ready: Ready, case: Case, provider: str, measured: str, flush: Callable[[], object]
) -> None:
    benchmark.group = f"{case} {measured}"
    benchmark.extra_info.update(case._asdict(), provider=provider, measure=measured, device=DEVICE)
    if provider == "ours":
        benchmark.extra_info["backend"] = backend_of(case, DEVICE, "auto")
    step = ready.only_x if measured == "dX" else ready.step

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        step.drop_gradients()
        y = step.layer(step.x) if measured == "dX" else None
        flush()
        if ready.small is not None:
            ready.small.run()
        _wait()
        return (step, y), {}

    benchmark.pedantic(CALLS[measured], setup=setup, rounds=ROUNDS, warmup_rounds=1)
