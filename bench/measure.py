"""How a benchmark measures one forward and backward of a layer: exactness, time, and memory.

Steps are timed in turns. `cache_flush` makes the caches cold, so that no step finds its weight where the one
before, or its own forward pass, left it: in a model every other layer runs in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peft_fast.formats import from_linear

Key = TypeVar("Key", bound=Hashable)

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MIN_SAMPLES = 5
FACTOR = 2.0
PEER_ERROR = 0.02
# For results that plain PyTorch hits exactly: one rounding of a half result, a few of an fp32 sum.
FLOOR = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Step(NamedTuple):
    """One forward and backward: `layer` on x [M, K], with dY `grad` [M, N].

    `factors` are those of a product, such as A and B, that a step is to find written anew.
    """

    layer: nn.Module
    x: Tensor
    grad: Tensor
    factors: tuple[Tensor, ...] = ()

    def drop_gradients(self) -> None:
        """Forgets gradients, as an optimizer would, so that none is accumulated.

        The factors change their signs: their product stays, and nothing kept from the last step fits them.
        """
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        with torch.no_grad():
            for factor in self.factors:
                factor.neg_()

    def run(self) -> Tensor:
        """The output; x and the trainable parameters have their gradients."""
        self.drop_gradients()
        y = self.layer(self.x)
        y.backward(self.grad)
        return y


class Inexact(AssertionError):
    """A result is further from fp64 than the criterion allows, so nothing about it may be timed."""


class Exactness(NamedTuple):
    """Relative errors against fp64: of the result, and of plain PyTorch at the same dtypes."""

    error: float
    plain: float


def relative_error(got: Tensor, truth: Tensor) -> float:
    """‖got - truth‖ / ‖truth‖ in fp64; the numerator alone for a zero truth."""
    difference = (got.double() - truth.double()).norm().item()
    scale = truth.double().norm().item()
    return difference / scale if scale else difference


def exactness(name: str, got: Tensor, plain: Tensor, truth: Tensor) -> Exactness:
    """The errors of a result, at most FACTOR times plain PyTorch's or FLOOR of its dtype.

    Raises:
        Inexact: the error is larger, or the dtype or the shape is another than plain PyTorch's.
    """
    if (got.shape, got.dtype) != (plain.shape, plain.dtype):
        raise Inexact(
            f"{name}: expected {plain.dtype} {list(plain.shape)}, got {got.dtype} {list(got.shape)}"
        )
    errors = Exactness(relative_error(got, truth), relative_error(plain, truth))
    allowed = max(FACTOR * errors.plain, FLOOR[got.dtype])
    if not errors.error <= allowed:  # so that NaN fails
        raise Inexact(f"{name}: relative error {errors.error:.2e} against fp64, allowed {allowed:.2e}")
    return errors


def peer_exactness(name: str, got: Tensor, plain: Tensor, truth: Tensor) -> Exactness:
    """The errors of a peer's result, which may be PEER_ERROR. Raises `Inexact`."""
    errors = Exactness(relative_error(got, truth), relative_error(plain, truth))
    if got.shape != truth.shape or not errors.error <= PEER_ERROR:
        raise Inexact(f"{name}: relative error {errors.error:.2e} against fp64, allowed {PEER_ERROR}")
    return errors


class Timing(NamedTuple):
    """Milliseconds of a step: percentiles of forward + backward, and the median of each alone."""

    p20: float
    p50: float
    p80: float
    forward: float
    backward: float
    samples: int


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache of a device: L2 of a GPU, the last level of a CPU as Linux tells it.

    Raises:
        OSError: the system does not tell.
    """
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    caches = [
        (int((index / "level").read_text()), (index / "size").read_text().strip())
        for index in CACHES.glob("index*")
    ]
    if not caches:
        raise OSError(f"{CACHES} lists no cache: name the size of the last level with --cache-mib")
    return int(max(caches)[1].removesuffix("K")) * 1024


def cache_flush(device: str, cache_bytes: int) -> Callable[[], object]:
    """A function that streams through twice `cache_bytes`.

    A CPU reads, so that no dirty line is left for the timed call to write back; ones, because zeros may all
    be one page.
    """
    buffer = torch.ones(2 * cache_bytes // 4, device=device)
    return buffer.zero_ if device == "cuda" else buffer.sum


def interleaved(
    steps: Mapping[Key, Step], seconds: float, device: str, prepare: Callable[[Key], object]
) -> dict[Key, Timing]:
    """The time of each step; see `host_samples`."""
    taken = host_samples(steps, seconds, device, prepare)
    return {key: _summary(values) for key, values in taken.items()}


def host_samples(
    steps: Mapping[Key, Step], seconds: float, device: str, prepare: Callable[[Key], object]
) -> dict[Key, list[tuple[float, float]]]:
    """Milliseconds of (forward, backward) on the host's clock, in turns, at least MIN_SAMPLES of each step.

    Args:
        steps: each runs once before anything is timed.
        seconds: for all steps together, `prepare` included.
        device: "cpu", or "cuda" to wait for the device before and after each timed call.
        prepare: called with the key before each forward and each backward, outside the timed span.
    """
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    samples: dict[Key, list[tuple[float, float]]] = {key: [] for key in steps}
    for step in steps.values():
        step.run()
    with _no_garbage_collection():
        deadline = time.perf_counter() + seconds
        for taken in itertools.count():
            if taken >= MIN_SAMPLES and time.perf_counter() >= deadline:
                break
            for key, step in steps.items():
                samples[key].append(_sample(step, functools.partial(prepare, key), wait))
    return samples


def device_samples(
    steps: Mapping[Key, Step], seconds: float, flush: Callable[[], object]
) -> dict[Key, list[tuple[float, float]]]:
    """As `host_samples`, on a GPU's clock, between two events.

    What the device is given before them lasts longer than the host needs to start a pass, as in training.
    """
    samples: dict[Key, list[tuple[float, float]]] = {key: [] for key in steps}
    ahead = _flushes(max(_host_seconds(step) for step in steps.values()), flush)
    deadline = time.perf_counter() + seconds
    for taken in itertools.count():
        if taken >= MIN_SAMPLES and time.perf_counter() >= deadline:
            break
        for key, step in steps.items():
            step.drop_gradients()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            ahead()
            marks[0].record()
            y = step.layer(step.x)
            marks[1].record()
            ahead()
            marks[2].record()
            y.backward(step.grad)
            marks[3].record()
            torch.cuda.synchronize()
            samples[key].append((marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3])))
    return samples


def _host_seconds(step: Step) -> float:
    """What the host takes to start forward and backward, the device idle and kernels compiled."""
    step.run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step.run()
    return time.perf_counter() - start


def _flushes(seconds: float, flush: Callable[[], object]) -> Callable[[], None]:
    """As many flushes as keep the device busy for `seconds`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    flush()
    end.record()
    torch.cuda.synchronize()
    count = 1 + math.ceil(seconds / (1e-3 * start.elapsed_time(end)))

    def ahead() -> None:
        for _ in range(count):
            flush()

    return ahead


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sample(step: Step, prepare: Callable[[], object], wait: Callable[[], None]) -> tuple[float, float]:
    step.drop_gradients()
    y, forward = _timed(functools.partial(step.layer, step.x), prepare, wait)
    _, backward = _timed(functools.partial(y.backward, step.grad), prepare, wait)
    return forward, backward


def _timed(
    call: Callable[[], Any], prepare: Callable[[], object], wait: Callable[[], None]
) -> tuple[Any, float]:
    prepare()
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return result, 1e3 * (time.perf_counter() - start)


def _summary(samples: list[tuple[float, float]]) -> Timing:
    forward, backward = zip(*samples, strict=True)
    both = [sum(sample) for sample in samples]
    fifths = statistics.quantiles(both, n=5, method="inclusive")
    p50, *parts = (statistics.median(values) for values in (both, forward, backward))
    return Timing(fifths[0], p50, fifths[3], *parts, len(samples))


class Memory(NamedTuple):
    """Bytes of one step: saved for backward, and the peak and largest buffer of torch's allocator.

    `saved` is what autograd's hooks see beyond x and the tensors that the layer holds anyway. `peak` counts
    from before the forward pass to the end of the backward pass, with Y and every gradient; `largest` is
    known on the CPU only.
    """

    saved: int
    peak: int
    largest: int | None


def memory(step: Step, device: str) -> Memory:
    """What `step` allocates; scratch that a kernel gets elsewhere shows in `resident_growth` alone."""
    allocated = _cuda_allocations if device == "cuda" else _cpu_allocations
    return Memory(_saved_bytes(step), *allocated(step))


def _saved_bytes(step: Step) -> int:
    step.drop_gradients()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.update((storage.data_ptr(), storage.nbytes()) for storage in _storages(tensor))
        return tensor

    # The graph of y keeps what is saved alive, so that no address comes twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step.layer(step.x)
    held = (storage for tensor in (step.x, *_held(step.layer)) for storage in _storages(tensor))
    owned = {storage.data_ptr() for storage in held}
    del y
    return sum(size for address, size in saved.items() if address not in owned)


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory of a tensor; of the tensors that a subclass, such as torchao's, is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _storages(getattr(tensor, name))


def _held(layer: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the scales and tables of quantized weights."""
    yield from layer.parameters()
    yield from layer.buffers()
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            yield from (field for field in from_linear(module) if isinstance(field, Tensor))


def _cpu_allocations(step: Step) -> tuple[int, int]:
    """(peak, largest), from every allocation and release in the profiler's trace."""
    step.drop_gradients()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in trace if event["name"] == "[memory]"), key=lambda e: e["ts"])
    sizes = [event["args"]["Bytes"] for event in events]
    return max(itertools.accumulate(sizes)), max(sizes)


def _cuda_allocations(step: Step) -> tuple[int, None]:
    step.drop_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, None


def launches(step: Step, device: str) -> int | None:
    """What a GPU is given to run in one forward and backward: kernels, copies and fills; None on a CPU."""
    if device != "cuda":
        return None
    step.run()
    step.drop_gradients()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step.run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def resident_growth(step: Step) -> int:
    """Bytes by which one step raises the peak resident memory of the process (Linux), to some 100 KiB.

    It sees every buffer, whoever allocated it, but only what the process has not kept from before: call it
    once, in a process of its own (`in_fresh_process`).
    """
    step.drop_gradients()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before = _status("VmRSS")
    step.run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}"
    return 1024 * int(found[1])


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What an importable `function` returns in a new interpreter."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
