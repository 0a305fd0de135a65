"""What `peft-fast info` tells: versions, devices, and which backend runs which weights; and a test of each.

The self-test runs a small forward and backward of every available backend over every weight format and
compares them with the same formula in fp64.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import __version__, backends, native
from .formats import DENSE_DTYPES, FORMATS, QuantizedWeight, code_table, from_dense
from .functional import lora_linear, loreft
from .packing import PACKINGS, pack

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OPS = {"lora_linear": tuple(FORMATS), "loreft": ("dense",)}
"""Each op, and the weight formats that it is run over."""

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")
_EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def versions() -> dict[str, str | None]:
    """The version of this library, of Python and of what it builds on; None where not installed."""

    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "peft_fast": __version__,
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
    }


def cpu_name() -> str:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        cpuinfo = ""
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"{name} with {torch.backends.cpu.get_cpu_capability()}"


def device_name(device: str) -> str:
    """Of "cpu" or "cuda", the current one."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def devices() -> dict[str, str]:
    """Device → its name, with the CPU's instruction-set levels and the GPU's compute capability."""
    levels = ", ".join(native.levels()) or native.load_error()
    found = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads, C++ kernels: {levels}"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        found[f"cuda:{i}"] = f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"
    return found


class Case(NamedTuple):
    """Whether a backend runs an op on a weight format with activations of a dtype; `reason` says why not."""

    op: str
    backend: str
    device: str
    format: str
    dtype: str
    reason: str | None


def cases() -> list[Case]:
    """Every op × device × format × dtype × backend."""
    return [
        Case(op, backend, device, format, _name(dtype), reason)
        for op in OPS
        for device in _device_types()
        for format in OPS[op]
        for dtype in DENSE_DTYPES
        for backend, reason in backends.availability(op, format, device, dtype).items()
    ]


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------- self-test


class Outcome(NamedTuple):
    """The worst error of a case against fp64, beside what is allowed; `failure` is None when it passed."""

    case: Case
    error: float
    allowed: float
    failure: str | None


def self_test() -> list[Outcome]:
    """Runs every available case."""
    return [_run(case) for case in cases() if case.reason is None]


class Problem(NamedTuple):
    """A small computation: by an op, the same in plain PyTorch, and what both take."""

    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    grad: Tensor
    inputs: dict[str, Tensor]


def _run(case: Case) -> Outcome:
    """Output and gradients may have twice plain PyTorch's error at the same dtype, plus a rounding."""
    dtype = getattr(torch, case.dtype)
    problem = _lora_linear_problem(case) if case.op == "lora_linear" else _loreft_problem(case)
    inputs = tuple(problem.inputs.values())
    try:
        got = _results(problem.fused, problem.grad, *inputs)
    except Exception as failure:  # a broken backend is what this is here to find, whatever it raises
        return Outcome(case, float("inf"), 0.0, f"{type(failure).__name__}: {failure}")
    expected = _results(problem.plain, problem.grad, *inputs)
    truth = _results(problem.plain, *(t.double() for t in (problem.grad, *inputs)))
    worst = Outcome(case, 0.0, 0.0, None)
    names = ("Y", *(f"d{name}" for name in problem.inputs))
    for name, ours, theirs, exact in zip(names, got, expected, truth, strict=True):
        error, allowed = _distance(ours, exact), 2 * _distance(theirs, exact) + _EPSILON[dtype]
        if not error <= allowed:  # so that NaN fails
            return Outcome(case, error, allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}")
        if error >= worst.error:
            worst = Outcome(case, error, allowed, None)
    return worst


def _random(case: Case) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, dtype)

    return random


def _lora_linear_problem(case: Case) -> Problem:
    dtype, random = getattr(torch, case.dtype), _random(case)
    M, N, K, R = 5, 96, 128, 4
    weight = _weight(case.format, N, K, dtype, torch.Generator().manual_seed(1), case.device)

    def fused(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return lora_linear(x, weight, A, B, bias, scaling=0.5, backend=case.backend)

    def plain(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        A, B, bias = (t.to(x.dtype) for t in (A, B, bias))
        return F.linear(x, weight.decode(x.dtype), bias) + 0.5 * F.linear(F.linear(x, A), B)

    x, grad = random(M, K, dtype=dtype), random(M, N, dtype=dtype)
    return Problem(fused, plain, grad, {"X": x, "A": random(R, K), "B": random(N, R), "bias": random(N)})


def _loreft_problem(case: Case) -> Problem:
    dtype, random = getattr(torch, case.dtype), _random(case)
    M, d, r = 6, 96, 4
    rows = torch.tensor([4, 0, -1, 3], device=case.device)
    chosen = rows[rows >= 0]

    def fused(h: Tensor, basis: Tensor, source: Tensor, bias: Tensor) -> Tensor:
        return loreft(h, basis, source, bias, rows=rows, act="tanh", backend=case.backend)

    def plain(h: Tensor, basis: Tensor, source: Tensor, bias: Tensor) -> Tensor:
        R, V, b = (t.to(h.dtype) for t in (basis, source, bias))
        edit = (torch.tanh(F.linear(h[chosen], V, b)) - F.linear(h[chosen], R)) @ R
        return h.index_add(0, chosen, edit)

    h, grad = random(M, d, dtype=dtype), random(M, d, dtype=dtype)
    inputs = {"H": h, "R": random(r, d) / d**0.5, "V": random(r, d) / d**0.5, "b": random(r)}
    return Problem(fused, plain, grad, inputs)


def _results(function: Any, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def _distance(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


def _weight(
    format: str, N: int, K: int, dtype: torch.dtype, generator: torch.Generator, device: str
) -> QuantizedWeight:
    """A random weight [N, K]; those of bitsandbytes' 4 bits in blocks of 64 and groups of 32 blocks."""
    if format == "dense":
        return from_dense(torch.randn(N, K, generator=generator).to(device, dtype))
    if format in PACKINGS:
        return pack(torch.randn(N, K, generator=generator).to(device), format)
    blocks = N * K // 64
    tensors = (
        torch.randint(256, (N * K // 2,), generator=generator, dtype=torch.uint8),
        torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8),
        code_table(format),
        torch.rand(blocks // 32, generator=generator) + 0.1,
        torch.linspace(-1, 1, 256),
        torch.tensor(1.5),
    )
    packed, absmax, code, nested_absmax, nested_code, offset = (t.to(device) for t in tensors)
    return QuantizedWeight(
        packed, absmax, code, nested_absmax, nested_code, offset, format, N, K, 64, 32
    ).check()


# --------------------------------------------------------------------------------------------- reporting


def report(outcomes: list[Outcome] | None = None) -> dict[str, Any]:
    """Everything as plain data for JSON."""
    found: dict[str, Any] = {
        "versions": versions(),
        "devices": devices(),
        "cpu_levels": list(native.levels()),
        "backends": [case._asdict() for case in cases()],
    }
    if outcomes is not None:
        found["self_test"] = [{**o._asdict(), "case": o.case._asdict()} for o in outcomes]
    return found


def show(console: Console, outcomes: list[Outcome] | None = None) -> None:
    """The report as tables."""
    from rich.table import Table

    table = Table("package", "version", title="versions")
    for package, version in versions().items():
        table.add_row(package, version or "not installed")
    console.print(table)
    table = Table("device", "what it is", title="devices")
    for device, description in devices().items():
        table.add_row(device, description)
    console.print(table)
    for op in OPS:
        for device in _device_types():
            console.print(_backend_table([c for c in cases() if (c.op, c.device) == (op, device)]))
    if outcomes is None:
        return
    failed = [o for o in outcomes if o.failure is not None]
    for outcome in failed:
        case = " ".join(str(field) for field in outcome.case[:-1])
        console.print(f"[red]failed[/red] {case}: {outcome.failure}")
    console.print(f"self-test: {len(outcomes) - len(failed)} of {len(outcomes)} cases passed")


def _backend_table(of_device: list[Case]) -> Table:
    """Backend × format → the dtypes it runs, and why it does not run the others."""
    from rich.table import Table

    op, _, device, *_ = of_device[0]
    formats = OPS[op]
    table = Table("backend", *formats, "why not", title=f"{op} on {device}, in order of preference")
    for backend in dict.fromkeys(case.backend for case in of_device):
        of_backend = [case for case in of_device if case.backend == backend]
        dtypes = [
            "\n".join(c.dtype for c in of_backend if c.format == format and c.reason is None) or "-"
            for format in formats
        ]
        reasons = dict.fromkeys(case.reason for case in of_backend if case.reason is not None)
        table.add_row(backend, *dtypes, "\n".join(reasons))
    return table
