"""Long training, with evaluations, checkpoints and adapters that come and go, keeps nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from endurance.soak import METHODS, resident, soak

from peft_fast import formats, native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc"),
]

MIB_PER_1000_STEPS = 0.05
BLOCKS_PER_STEP = 0.5
"""Of Python's allocator; one object that stays at every step would be at least 1."""
BLOCKS_PER_EARLY_STEP = 5
"""In the first hundreds of steps, in which much is made once; one that stays for each layer would be 14."""


@pytest.mark.parametrize("method", METHODS)
def test_three_hundred_steps_keep_nothing(method, tmp_path):
    found = soak(method, tmp_path, 300)
    assert found["finite"]
    assert found["last_loss"] < found["first_loss"]
    assert found["calls"]
    assert not found["grown"]
    assert found["blocks_per_step"] < BLOCKS_PER_EARLY_STEP


@pytest.mark.endurance
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_ten_thousand_steps(method, tmp_path):
    """In a process of their own."""
    command = [sys.executable, "-m", "endurance.soak", str(tmp_path), "--methods", method]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    run = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["finite"]
    assert found["last_loss"] < found["first_loss"]
    assert not found["grown"]
    assert found["mib_per_1000_steps"] <= MIB_PER_1000_STEPS, found
    assert found["blocks_per_step"] < BLOCKS_PER_STEP


def test_calls_of_the_extension_keep_no_memory():
    """torch's own conversion of a `str` argument keeps a copy of it at every call."""
    assert native.load_error() is None
    weight = formats.from_dense(torch.zeros(4, 8))
    calls = {
        "level_available": lambda: torch.ops.peft_fast_cpu.level_available("avx2"),
        "dequantize": lambda: torch.ops.peft_fast_cpu.dequantize(*weight, torch.float32, "scalar"),
    }
    for name, call in calls.items():
        for _ in range(500):
            call()
        before = resident()
        for _ in range(20_000):
            call()
        assert resident() - before < 2 * 20_000, name
