"""Memory that decoded weights pass through on a GPU, reused by every layer.

Some strategies write a weight out, in the dtype of the activations, for the one GEMM that reads it. They
borrow the space here: one buffer for each device and stream, as large as the largest panel so far and at most
`limit()` bytes, beyond which weights are decoded and multiplied panel by panel. What a stream does with its
buffer is in order on that stream; host threads that share a stream take turns. While a CUDA graph is captured
the space comes from the graph's own memory, which lives as long as the graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

LEAST = 1 << 20
DEFAULT = 1 << 30
_lock = threading.Lock()


class _Buffer:
    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.bytes: Tensor | None = None


_buffers: dict[tuple[torch.device, int], _Buffer] = {}
_options = {"limit": DEFAULT}


def limit() -> int:
    """The most bytes that a buffer may have."""
    return _options["limit"]


def set_limit(n_bytes: int) -> None:
    """Bounds each buffer to `n_bytes`, from the next call on, and frees larger ones.

    A small bound costs launches: a decoded weight of w bytes takes ⌈w / n_bytes⌉ panels of two launches each.
    Panels have at least 128 rows or columns, even where these are more bytes than the bound.

    Raises:
        ValueError: less than 1 MiB.
    """
    if n_bytes < LEAST:
        raise ValueError(f"n_bytes: expected at least {LEAST} (1 MiB), got {n_bytes}")
    _options["limit"] = n_bytes
    for buffer in _all():
        with buffer.turn:
            if buffer.bytes is not None and buffer.bytes.numel() > n_bytes:
                buffer.bytes = None


def allocated() -> int:
    """Bytes of all buffers together."""
    return sum(buffer.bytes.numel() for buffer in _all() if buffer.bytes is not None)


def free() -> None:
    """Gives all buffers back to PyTorch's allocator; the next call that needs one takes it anew."""
    for buffer in _all():
        with buffer.turn:
            buffer.bytes = None


def _all() -> list[_Buffer]:
    with _lock:
        return list(_buffers.values())


@contextlib.contextmanager
def borrow(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialized matrix, for work that is enqueued on the current stream within the block."""
    n_bytes = shape[0] * shape[1] * dtype.itemsize
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            capturing = torch.cuda.is_current_stream_capturing()
        key = (stream.device, stream.cuda_stream)
    else:
        key, capturing = (device, 0), False
    if capturing:
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    with _lock:
        buffer = _buffers.setdefault(key, _Buffer())
    with buffer.turn:
        if buffer.bytes is None or buffer.bytes.numel() < n_bytes:
            buffer.bytes = None  # the smaller one goes back first
            buffer.bytes = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        yield buffer.bytes[:n_bytes].view(dtype).view(shape)


def panels(size: int, row_bytes: int) -> list[tuple[int, int]]:
    """(first, count) of the panels in which `size` rows or columns of `row_bytes` pass through a buffer.

    Counts are multiples of 128, except the last.
    """
    count = max(limit() // max(row_bytes, 1) // 128, 1) * 128
    return [(first, min(count, size - first)) for first in range(0, size, count)]
