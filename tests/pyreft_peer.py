"""pyreft itself, to compare with, where it is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Iterator

import pytest
import torch

INSTALL = "pip install --no-deps pyreft==0.1.0 pyvene==0.1.8"


@contextlib.contextmanager
def imported() -> Iterator[types.ModuleType]:
    """The package with its modules `interventions`, `reft_model` and `config`, or a loud skip without it.

    Its trainers, which want packages of their own, are left out. What importing it prints, warns and draws is
    undone at once, what it registers on leaving.
    """
    others = _taken_out()
    found = importlib.util.find_spec("pyreft")
    if found is None or importlib.util.find_spec("pyvene") is None:
        reason = f"pyreft or pyvene is missing, so nothing was compared with them: {INSTALL}"
        warnings.warn(pytest.PytestWarning(reason), stacklevel=1)
        pytest.skip(reason)
    package = types.ModuleType("pyreft")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["pyreft"] = package
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.simplefilter("ignore")
            for name in ("interventions", "reft_model", "config"):
                importlib.import_module(f"pyreft.{name}")
        yield package
    finally:
        _taken_out()
        sys.modules.update(others)


def _taken_out() -> dict[str, types.ModuleType]:
    """The modules of both packages, such as a benchmark's, which are no longer found as imported."""
    names = [name for name in sys.modules if name.partition(".")[0] in ("pyreft", "pyvene")]
    return {name: sys.modules.pop(name) for name in names}
