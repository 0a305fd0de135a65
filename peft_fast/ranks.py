"""What can be the rank of an adapter, or the width of its bottleneck, whatever the method."""

from __future__ import annotations

from typing import Any

MOST_RANK = 2**16
"""More than the width of any model's hidden states. A larger number is a slip or a hostile file, and its
factors could take all memory before they fail."""


def check_rank(argument: str, r: Any) -> None:
    """Raises ValueError unless `r` is an integer from 1 to `MOST_RANK`."""
    if type(r) is not int or r < 1:
        raise ValueError(f"{argument}: expected a positive integer, got {r!r}")
    if r > MOST_RANK:
        raise ValueError(f"{argument}: expected at most {MOST_RANK}, got {r!r}")
