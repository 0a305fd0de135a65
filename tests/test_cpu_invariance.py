"""What the bits of the C++ backend do not depend on: the batch and the blocking (threads are in test_cpu)."""

import os
import subprocess
import sys

import pytest
import torch
from test_cpu import Case, bits, random_weight

from peft_fast import native
from peft_fast.formats import from_dense

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=native.levels() or ("not built",))
def level_name(request):
    assert native.load_error() is None, native.load_error()
    return request.param


def part_of(case, rows):
    """`case` with these rows alone."""
    part = object.__new__(Case)
    vars(part).update(vars(case))
    part.x, part.grad = case.x[rows].contiguous(), case.grad[rows].contiguous()
    part.mask = case.mask[rows].contiguous() if case.mask is not None else None
    return part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_rows_do_not_depend_on_the_batch(level_name, dtype, dropout_p):
    invariant, fast = native.Level(level_name, batch_invariant=True), native.Level(level_name)
    weights = (random_weight(70, 96), random_weight(130, 353, blocksize=32), from_dense(torch.randn(50, 70)))
    for weight in weights:
        case = Case(600, weight, 7, dtype, dropout_p=dropout_p)
        whole = case.results(invariant)
        for rows in (
            slice(0, 1),
            slice(5, 6),
            slice(599, 600),
            slice(30, 33),
            slice(40, 57),
            slice(100, 420),
        ):
            alone = part_of(case, rows)
            for name in ("y", "dX"):
                assert torch.equal(bits(alone.results(invariant)[name]), bits(whole[name][rows])), (
                    name,
                    rows,
                )
            assert torch.equal(alone.results(invariant)["z"], whole["z"][rows])
        assert torch.equal(bits(part_of(case, slice(5, 6)).results(fast)["dX"]), bits(whole["dX"][5:6]))


@pytest.mark.parametrize("M", [1, 2, 4])
def test_few_rows_against_fp64(level_name, M):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        Case(M, random_weight(70, 96), 9, dtype, dropout_p=0.3).check(
            native.Level(level_name, batch_invariant=True)
        )


def test_the_fast_way_sums_in_another_order():
    case = Case(1, random_weight(300, 512), 4)
    fast, invariant = (case.results(native.Level(batch_invariant=b)) for b in (False, True))
    assert not torch.equal(fast["y"], invariant["y"])


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__), **environment},
    )


BITS = """
import torch
from test_cpu import Case, bits, random_weight
from peft_fast import native
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    results = Case(90, random_weight(200, 320), 8, dtype).results(native.Level(batch_invariant=True))
    print([bits(results[name]).long().sum().item() for name in ("y", "dX")])
"""


def test_bits_do_not_depend_on_the_strategy():
    expected = run(BITS)
    assert expected.returncode == 0, expected.stderr
    for strategy in ("0 0 24 100 32 64 32", "4 4 7 1000 128 32 64"):
        assert run(BITS, PEFT_FAST_CPU_STRATEGY=strategy).stdout == expected.stdout


@pytest.mark.parametrize("strategy", ["", "1 2 3", "4 3 48 1024 64 128 512 9", "9 0 48 1024 64 128 512", "x"])
def test_a_wrong_strategy_raises(strategy):
    result = run(BITS, PEFT_FAST_CPU_STRATEGY=strategy)
    assert "PEFT_FAST_CPU_STRATEGY: expected" in result.stderr
    assert result.returncode != 0


def test_the_level_is_limited_by_the_environment():
    levels = "from peft_fast import native; print(*native.levels())"
    assert run(levels, PEFT_FAST_CPU_LEVEL="scalar").stdout.split() == ["scalar"]
    assert run(levels, PEFT_FAST_CPU_LEVEL="").stdout.split() == list(native.levels())
    wrong = run(levels, PEFT_FAST_CPU_LEVEL="sse9")
    assert "PEFT_FAST_CPU_LEVEL: expected one of" in wrong.stderr
