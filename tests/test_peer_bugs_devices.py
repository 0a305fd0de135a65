"""Defects that others had in launches of kernels, from several threads or on several devices."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
import torch
from cases import Case
from peft_fast.triton_kernels import launch
from triton_cases import bits


def in_threads(calls: list[Any]) -> None:
    """Each call in a thread of its own, all at once; an error in one is raised."""
    start, errors = threading.Barrier(len(calls)), []

    def run(call):
        start.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Kernel:
    """In place of an autotuned one: holds the arguments of the running call on itself."""

    def __init__(self) -> None:
        self.held: Any = None
        self.launches: list[tuple[bool, int]] = []
        self.device = -1

    def __getitem__(self, grid):
        def run(*args, **meta):
            self.held = args
            time.sleep(0.001)
            self.launches.append((self.held is args, self.device))

        return run

    @contextlib.contextmanager
    def on(self, device: torch.device):
        """In place of `torch.cuda.device`."""
        self.device = device.index
        yield
        self.device = -1


def test_launches_take_turns():
    """triton #11494: the autotuner holds the arguments of a call on itself, where another thread's get in."""
    kernel = Kernel()
    in_threads([lambda i=i: launch.launch(kernel, (1,), torch.device("cpu"), i) for i in range(32)])
    assert kernel.launches == [(True, -1)] * 32


def test_threads_launch_with_their_own_arguments():
    """The same with the kernels, tuned or not: the bits of one call after the other, whatever the shapes."""
    cases = [Case.make("nf4", (1 + i,), 64, 16, 2 + i) for i in range(2)]
    expected = [case.run("triton") for case in cases]
    got: list[Any] = [None] * len(cases)
    in_threads([lambda i=i: got.__setitem__(i, cases[i].run("triton")) for i in range(len(cases))])
    for results, alone in zip(got, expected, strict=True):
        assert all(torch.equal(bits(results[name]), bits(value)) for name, value in alone.items())


def test_launches_are_on_the_device_of_their_tensors(monkeypatch):
    """Liger #1304, bitsandbytes #1952: a kernel ran on the current device instead of that of its tensors."""
    kernel = Kernel()
    module = type("", (), {"device": staticmethod(kernel.on)})
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for index in (1, 0, 3):
        launch.launch(kernel, (1,), torch.device("cuda", index))
    assert kernel.launches == [(True, 1), (True, 0), (True, 3)]
    assert kernel.device == -1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "cuda-gemv"])
def test_another_device_than_the_current_one(backend):
    """The same where there are two."""
    case = Case.make("nf4", (4,), 256, 128, 8)
    expected, moved = case.run(backend), case.on(backend)
    with torch.cuda.device(1):
        got = moved._run(backend)
    for name, value in expected.items():
        assert got[name].device == torch.device("cuda", 0)
        assert torch.equal(bits(got[name]), bits(value)), name
