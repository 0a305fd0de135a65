"""How much memory decoded weights may take on a GPU at a time.

Some strategies write a weight out, in the dtype of the activations, for the one GEMM that reads it. The space
is taken from PyTorch's allocator for that call and goes back with it: the next layer on the stream gets the
same block, other streams and CUDA graphs have their own, and nothing is held between calls. A weight of more
than `limit()` bytes is decoded and multiplied panel by panel.
"""

from __future__ import annotations

LEAST = 1 << 20
DEFAULT = 1 << 30
_options = {"limit": DEFAULT}


def limit() -> int:
    """The most bytes of a decoded weight at a time."""
    return _options["limit"]


def set_limit(n_bytes: int) -> None:
    """Bounds decoded weights to `n_bytes` at a time, from the next call on.

    A small bound costs launches: a decoded weight of w bytes takes ⌈w / n_bytes⌉ panels of two launches each.
    Panels have at least 128 rows or columns, even where these are more bytes than the bound.

    Raises:
        ValueError: less than 1 MiB.
    """
    if n_bytes < LEAST:
        raise ValueError(f"n_bytes: expected at least {LEAST} (1 MiB), got {n_bytes}")
    _options["limit"] = n_bytes


def panels(size: int, row_bytes: int) -> list[tuple[int, int]]:
    """(first, count) of the panels in which `size` rows or columns of `row_bytes` are decoded.

    Counts are multiples of 128, except the last.
    """
    count = max(limit() // max(row_bytes, 1) // 128, 1) * 128
    return [(first, min(count, size - first)) for first in range(0, size, count)]
