"""`pytest bench` takes the filters of `peft-fast bench`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--filter",
        action="append",
        default=[],
        help="cases of bench/registry.py by labels, repeatable (default: those of peft-fast bench --quick)",
    )
