"""Every op × backend × format × dtype × layout × option at random: output and every gradient, against fp64.

The same 500 cases each time; `make fuzz` draws 10,000 others. A case is run on every backend that takes it.
What failed once is kept in `REGRESSIONS`.
"""

import os
from collections import Counter

import pytest
import torch
from cases import device_of
from fuzz import Dequantize, Dora, Lora, Loreft, ReftLinear, Sizes, Spec, Weight, specs
from fuzz_cases import REPEATING
from hypothesis import HealthCheck, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from tolerances import IN_ORDER, REPEATED, assert_as_exact
from torch import Tensor

from peft_fast import BackendUnavailable, backends

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

CASES = int(os.environ.get("FUZZ_CASES", "0"))
SHARES = {Lora: 0.4, Loreft: 0.2, Dora: 0.184, ReftLinear: 0.1, Dequantize: 0.1}
TRITON_SHARES = {Lora: 0.008, Loreft: 0.004, Dequantize: 0.004}  # the interpreter is slow


@pytest.fixture(scope="module", autouse=True)
def _counts(request):
    """Prints how many results were judged, after a run that was asked for."""
    yield
    if not CASES:
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for field, name in enumerate(("op", "backend", "format", "dtype")):
            counts = Counter()
            for key, count in COUNTS.items():
                counts[key[field]] += count
            print(f"\n{name}:", ", ".join(f"{key} {count}" for key, count in sorted(counts.items())), end="")
        print(f"\nresults: {COUNTS.total()}")


COUNTS: Counter[tuple[str, str, str, str]] = Counter()
"""How many results were judged, by op, backend, format and dtype of the activations."""


def backends_here(spec: Spec, triton: bool = False) -> list[str]:
    """Those of the table that run a spec here: the Triton ones, or the others."""
    return [
        name
        for name, row in backends.BACKENDS.items()
        if name.startswith("triton") == triton
        and not name.startswith("cuda")
        and name != "cpu"  # the first of its levels
        and row.reason(spec.kernel, spec.format, device_of(name), spec.dtype) is None
    ]


def check(spec: Spec, triton: bool = False) -> None:
    """Holds every backend that takes a spec to the criterion."""
    results: dict = {}
    for backend in backends_here(spec, triton):
        try:
            if isinstance(spec, Dequantize):
                spec.check(backend)
            else:
                judge(spec, backend, results, DRAWS[:2] if triton else DRAWS)
        except BackendUnavailable:
            assert backend.startswith("triton-")  # a strategy names what it cannot run
            continue
        COUNTS[spec.op, backend, spec.format, str(spec.dtype).removeprefix("torch.")] += 1


DRAWS = (1, 16, 256)
"""Few numbers, or many made of few, may be hit exactly by luck: what fails is judged by all of more draws, of
fewer in Triton's slow interpreter."""


def judge(spec: Spec, backend: str, results: dict, draws: tuple[int, ...]) -> None:
    """Output and every gradient are as exact as plain PyTorch. `results` keeps those of all backends."""

    def of(draw: int) -> dict[str, list[Tensor]]:
        if draw not in results:
            case = spec.make(draw)
            results[draw] = case, case.plain(), case.plain(torch.float64), spec.magnitudes(case)
        case, plain, truth, magnitudes = results[draw]
        got = case.run(backend)
        assert got.keys() == truth.keys()
        return {n: [some[n] for some in (got, plain, truth, magnitudes) if some] for n in got}

    in_order = REPEATED if REPEATING.intersection(spec.layouts) else IN_ORDER
    for name in of(0):
        for count in draws:
            tensors = of(0)[name]
            assert len({t.shape for t in tensors}) == 1, f"{backend} {name}: {[t.shape for t in tensors]}"
            parts = zip(*([t.flatten() for t in of(draw)[name]] for draw in range(count)), strict=True)
            try:
                assert_as_exact(f"{backend} {name}", *map(torch.cat, parts), in_order=in_order)
                break
            except AssertionError:
                if count == draws[-1]:
                    raise


def draw(op: type, share: float, triton: bool) -> None:
    """Checks this share of the cases, of one op."""

    @settings(
        max_examples=round(share * (CASES or 500)),
        derandomize=not CASES,
        database=DirectoryBasedExampleDatabase("runs/fuzz") if CASES else None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(specs(op, small=triton))
    def cases(spec):
        check(spec, triton)

    cases()


@pytest.mark.parametrize("op", SHARES)
def test_random_calls(op):
    draw(op, SHARES[op], triton=False)


@pytest.mark.parametrize("op", TRITON_SHARES)
def test_random_calls_of_triton(op):
    draw(op, TRITON_SHARES[op], triton=True)


PLAIN, F32 = ("contiguous",) * 5, torch.float32


SAME = ("contiguous", "expanded", "ones", "contiguous", "contiguous")


def strided(N: int, layout: str) -> Lora:
    """A dense weight that is neither contiguous nor the transpose of one."""
    weight = Weight("dense", {"dtype": F32}, layout)
    return Lora(Sizes(3, 8, N, 2), weight, "M", F32, F32, True, True, 0.1, 0.5, PLAIN, 0)


REGRESSIONS = {
    "rows apart": strided(6, "columns"),
    "elements of one row apart": strided(1, "every other"),
    "a row repeated": strided(6, "expanded"),
    "a sum of 257 terms that are the same": Lora(
        Sizes(1, 1, 1, 257),
        Weight("int8", {}, "contiguous"),
        "2 M",
        F32,
        F32,
        False,
        False,
        0.0,
        0.5,
        SAME,
        0,
    ),
    "few operands that plain PyTorch rounds luckily": Dora(
        Sizes(1, 33, 32, 33),
        Weight("mxfp4", {}, "contiguous"),
        "",
        torch.bfloat16,
        False,
        0.0,
        1.0,
        "paper",
        "full",
        ("expanded", "contiguous", "expanded", "contiguous", "expanded"),
        1839,
    ),
    "gradients that fp16 cannot hold": ReftLinear(
        Sizes(1, 1, 255, 257),
        Weight("mxfp4", {}, "contiguous"),
        "M",
        torch.float16,
        False,
        False,
        False,
        True,
        ("contiguous", "ones", "contiguous", "ones"),
        0,
    ),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_failed_once(name):
    check(REGRESSIONS[name])
