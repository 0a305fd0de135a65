"""Shared fixtures. Without a GPU, Triton kernels run in its interpreter, chosen before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyreft_peer
import pytest
from cases import backends_of


def pytest_addoption(parser):
    parser.addoption(
        "--endurance", action="store_true", help="run the long tests alone: many kills, steps and cases"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "endurance: takes minutes; runs with --endurance alone")


def pytest_collection_modifyitems(config, items):
    """`make endurance` runs the long tests, `make test` all others."""
    long = config.getoption("endurance")
    chosen = [item for item in items if (item.get_closest_marker("endurance") is not None) == long]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fills every uninitialized buffer with NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=backends_of("lora_linear", "nf4"))
def backend(request):
    return request.param


@pytest.fixture(params=["dense", "nf4"])
def kind(request):
    """The base of a model from `peft_models`."""
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """For tiny models: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pyreft():
    """pyreft without its trainers; skips loudly where it is not installed."""
    with pyreft_peer.imported() as package:
        yield package
