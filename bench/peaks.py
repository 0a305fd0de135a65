"""What a device can do at best: from its data sheet for known GPUs, measured by a short probe on a CPU."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from peft_fast.bench import measure
from peft_fast.bench.layers import DTYPES
from peft_fast.bench.registry import Work
from peft_fast.bench.roofline import device_named
from peft_fast.bench.traffic import DEVICES

SIZES, SECONDS = (512, 1024), 0.3


class Peak(NamedTuple):
    """FLOP/s of products, bytes/s of memory, and where they are from."""

    flops: float
    bandwidth: float
    source: str

    def percent(self, work: Work, milliseconds: float) -> float:
        """The least time of `work` on this device, in percent of the time taken."""
        return 100 * max(work.flops / self.flops, work.bytes / self.bandwidth) / (1e-3 * milliseconds)


def peak(device: str, dtype: str, cache: int | None = None) -> Peak | None:
    """For products of activations in a dtype; None for a GPU that bench/traffic.py does not know.

    `cache` is the size of a CPU's last level in bytes, None for what the system tells.
    """
    if device == "cuda":
        return _of_gpu(dtype)
    return _of_cpu(dtype, torch.get_num_threads(), cache or measure.last_level_cache(device))


def _of_gpu(dtype: str) -> Peak | None:
    try:
        found = DEVICES[device_named(torch.cuda.get_device_name())]
    except ValueError:
        return None
    # As bench/traffic.py counts an exact fp32 product: three TF32 ones, or the FP32 units.
    flops = max(found.tf32 / 3, found.single) if dtype == "float32" else found.half
    return Peak(flops, found.bandwidth, "data sheet")


@functools.cache
def _of_cpu(dtype: str, threads: int, cache: int) -> Peak:
    """The faster of a product in fp32 and in `dtype`, either of which may be used; and a sum over memory."""
    dtypes = {"float32", dtype} - {"float16"}
    tried = itertools.product(SIZES, dtypes)
    flops = max(2 * n**3 / _seconds(_product(n, name)) for n, name in tried)
    size = 4 * cache
    numbers = torch.ones(size // 4)
    return Peak(flops, size / _seconds(numbers.sum), "probe")


def _product(n: int, dtype: str) -> Callable[[], object]:
    a = torch.ones(n, n, dtype=DTYPES[dtype])
    return functools.partial(torch.mm, a, a)


def _seconds(call: Callable[[], object]) -> float:
    """Of the fastest of the calls that fit into SECONDS, so that others on the machine matter less."""
    call()
    fastest, deadline = math.inf, time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
