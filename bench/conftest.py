"""`pytest bench` takes the filters of `peft-fast bench`, and tells why a provider is skipped."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.addoption
    add(
        "--filter",
        action="append",
        default=[],
        help="cases of bench/registry.py by labels, repeatable (default: those of peft-fast bench --quick)",
    )
    add("--compiled", action="store_true", help="also providers that compile, seconds for each case")
    add("--cache-mib", type=int, help="size of the last-level cache (default: as the system tells)")


def pytest_configure(config: pytest.Config) -> None:
    mib = config.getoption("--cache-mib")
    if mib is not None and mib < 1:
        raise pytest.UsageError(f"--cache-mib: expected at least 1, got {mib}")
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"
