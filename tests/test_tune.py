"""What bench/tune.py measures, leaves out and writes."""

from __future__ import annotations

import importlib
import math
import time

import pytest
import torch
from peft_fast.triton_kernels import strategies
from peft_fast.triton_kernels.strategies import Case, Choice, Problem

from peft_fast import backends, reference

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables in place of the installed one."""
    monkeypatch.setattr(strategies, "MEASURED", tmp_path)
    strategies.clear_cache()
    yield tmp_path
    strategies.clear_cache()


class Slow:
    """The op of the reference, after `delay` seconds."""

    def __init__(self, delay: float, wrong: float = 0.0):
        self.delay, self.wrong = delay, wrong

    def lora_linear(self, *args):
        time.sleep(self.delay)
        y, z = reference.lora_linear(*args)
        return y * (1 + self.wrong), z

    def lora_linear_backward(self, *args):
        time.sleep(self.delay)
        return reference.lora_linear_backward(*args)


@pytest.fixture
def tune(monkeypatch):
    """bench/tune.py, with `library` by far the fastest strategy and `fused` wrong."""
    # Not the fixture of conftest.py: these tests also run where that does not import.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    delays = {"splitk": 0.02, "fused": 0.0, "split": 0.02, "library": 0.0, "merge": 0.02}
    for name, delay in delays.items():
        backend = Slow(delay, wrong=0.5 if name == "fused" else 0.0)
        stand_in = backends.Backend(lambda backend=backend: backend, lambda *case: None, automatic=False)
        monkeypatch.setitem(backends.BACKENDS, f"triton-{name}", stand_in)
    yield importlib.import_module("peft_fast.bench.tune")
    torch.set_num_threads(threads)


TINY = [
    *("--device", "cpu", "--shape", "128", "64", "--rank", "4", "--rows", "1", "5"),
    *("--per-row", "0", "--cache-mib", "1"),
]


def test_a_tuned_table_is_followed_and_added_to(tune, folder, capsys):
    out = folder / strategies.DEFAULT
    command = [*TINY, "--out", str(out), "--case", "packed-half-out_scale"]
    with pytest.raises(SystemExit, match=r"left out:\n.*fused: y: relative error"):
        tune.main(command)
    problem = Problem(3, 64, 128, 4, torch.bfloat16, "nf4", True, False, True)
    for direction in ("forward", "backward"):
        assert strategies.choose(direction, problem, CPU) == "library"
    written = strategies.load(out)
    assert (written.source, len(written.rows)) == ("measured", 2)
    assert "splitk" in capsys.readouterr().out

    tune.main(command)  # all rows are there
    assert "ms" not in capsys.readouterr().out
    tune.main([*command[:-1], "packed-half-dropout", "--seconds", "0"])  # no time for more
    assert "2 times M left" in capsys.readouterr().out
    assert strategies.load(out) == written

    with pytest.raises(SystemExit):
        tune.main([*command[:-1], "packed-half-dropout"])
    both = strategies.load(out).rows
    assert both[:2] == written.rows
    assert [found.case for found in both[2:]] == [
        Case(direction, "packed", "half", True, False) for direction in ("forward", "backward")
    ]
    with pytest.raises(SystemExit):
        tune.main([*command, "--redo"])
    assert {r.case for r in strategies.load(out).rows} == {r.case for r in both}


def timed_at(text: str) -> list[str]:
    """The M that a run of bench/tune.py timed."""
    return [line.partition(" M=")[2].partition(":")[0] for line in text.splitlines() if " + " in line]


def test_a_row_that_was_cut_short_is_used_and_completed(tune, folder, monkeypatch, capsys):
    out, copy = folder / strategies.DEFAULT, folder / "copy.json"
    command = [*TINY, "--case", "packed-half", "--out", str(out), "--copy", str(copy)]

    def timed(*args):
        first.setattr(time, "perf_counter", lambda: math.inf)  # the first M took all the time
        return {"split": (1.0, 1.0), "library": (2.0, 0.5)}

    with monkeypatch.context() as first:
        first.setattr(tune, "timed", timed)
        with pytest.raises(SystemExit, match="left out"):
            tune.main([*command, "--rows", "5", "1"])
    printed = capsys.readouterr().out
    assert timed_at(printed) == ["5"]
    assert "1 times M left" in printed
    problem = Problem(5, 64, 128, 4, torch.bfloat16, "nf4", True, False, False)
    assert strategies.choose("forward", problem, CPU) == "split"
    assert strategies.choose("backward", problem, CPU) == "library"

    with pytest.raises(SystemExit, match="left out"):
        tune.main(command)
    assert timed_at(capsys.readouterr().out) == ["1"]
    both = strategies.load(out)
    assert [row.choices for row in both.rows] == [
        (Choice(1, ("library",)), Choice(math.inf, ("split",))), (Choice(math.inf, ("library",)),),
    ]  # fmt: skip
    assert strategies.load(copy) == both
    copy.unlink()
    tune.main(command)
    assert timed_at(capsys.readouterr().out) == []
    assert strategies.load(copy) == both

    out.unlink()  # to start anew
    with pytest.raises(SystemExit, match="left out"):
        tune.main(command)
    assert timed_at(capsys.readouterr().out) == ["1", "5"]


def test_a_strategy_that_does_not_compile_leaves_the_others(tune, folder, monkeypatch, capsys):
    class Broken:
        @staticmethod
        def lora_linear(*args):
            raise RuntimeError("out of resource: shared memory")

    stand_in = backends.Backend(Broken, lambda *case: None, automatic=False)
    monkeypatch.setitem(backends.BACKENDS, "triton-fused", stand_in)
    out = folder / strategies.DEFAULT
    with pytest.raises(SystemExit) as ended:
        tune.main([*TINY, "--case", "packed-half", "--out", str(out)])
    fault = "packed-half K=128 N=64 R=4 M=1: fused: RuntimeError: out of resource: shared memory"
    assert fault in ended.value.code.splitlines()
    assert f"left out {fault}" in capsys.readouterr().out.splitlines()
    assert {name for row in strategies.load(out).rows for c in row.choices for name in c.names} == {"library"}


def test_a_gpu_is_not_tuned_in_the_interpreter(tune, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--device", "cuda"])
    assert "--device: expected kernels that are compiled for cuda, got TRITON_INTERPRET=1" in (
        capsys.readouterr().err
    )


class Clock:
    """An event of a device that is done when the host has asked, but for `busy` seconds that it took more."""

    busy = 0.0

    def __init__(self, enable_timing: bool):
        self.seconds = math.nan

    def record(self) -> None:
        self.seconds = time.perf_counter() + Clock.busy

    def elapsed_time(self, end: Clock) -> float:
        return 1e3 * (end.seconds - self.seconds)


def test_on_a_gpu_the_device_is_kept_busy_while_the_host_starts_a_step(tune, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Clock, "busy", 0.0)
    base = tune.make_operands(tune.Shape(128, 64, 4, "cpu"))
    fixed = tune.make(tune.KINDS["packed-half"], tune.Shape(128, 64, 4, "cpu"), 3, base)
    steps = {name: fixed.step(name) for name in ("splitk", "library")}

    def flush() -> None:
        Clock.busy += 1e-3

    times = tune.timed(steps, 0.0, "cuda", flush)
    for direction in (0, 1):
        assert times["splitk"][direction] > 2 * times["library"][direction] > 0
    # A flush takes a millisecond, and each of two steps is flushed for before both of its directions.
    flushes = (1e3 * Clock.busy - 1) / (2 * 2 * tune.measure.MIN_SAMPLES)
    assert flushes >= 1 + sum(times["splitk"]) / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times of a GPU")
def test_a_gpu_is_tuned(monkeypatch, folder):
    tune = importlib.import_module("peft_fast.bench.tune")
    tune.main(["--shape", "256", "512", "--rank", "16", "--rows", "1", "80", "--per-row", "0.1"])
    written = strategies.load(strategies.path_of(torch.cuda.get_device_name()))
    assert {row.case.direction for row in written.rows} == {"forward", "backward"}
    assert len(written.rows) == 2 * len(tune.DEFAULT_KINDS)


def test_tuning_on_a_cpu_writes_no_device_table(tune, capsys):
    with pytest.raises(SystemExit):
        tune.main(TINY)
    assert "--out: expected a file" in capsys.readouterr().err
