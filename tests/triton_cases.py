"""What the tests of the Triton kernels share; importing it skips a module where Triton does not run."""

import mmap
import sys

import pytest
import torch
from cases import device_of
from tolerances import assert_as_exact
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peft_fast import backends, reference
from peft_fast.formats import QuantizedWeight
from peft_fast.reference import Needs

DEVICE = device_of("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if (reason := backends.BACKENDS["triton"].unavailable("dense", DEVICE, torch.float32)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)

from peft_fast.triton_kernels import launch  # noqa: E402

from peft_fast import triton_kernels  # noqa: E402, needs Triton

NO_KERNEL = {"empty", "new_empty", "view", "_unsafe_view", "slice", "t", "detach", "select", "alias"}


def on_device(value):
    if isinstance(value, QuantizedWeight):
        return QuantizedWeight(*map(on_device, value))
    return value.to(DEVICE) if torch.is_tensor(value) else value


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16).cpu()


def sparse_bytes(numel: int) -> torch.Tensor:
    """Zeros on the device; on the CPU, memory that is not resident until it is touched."""
    if DEVICE == "cpu":
        return torch.frombuffer(mmap.mmap(-1, numel), dtype=torch.uint8)
    return torch.zeros(numel, dtype=torch.uint8, device=DEVICE)


class Launches(TorchDispatchMode):
    """Records the kernels that are started and, where entered, the ops of PyTorch that start one."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self._start = launch.launch
        for name, module in list(sys.modules.items()):
            if (
                name.startswith("peft_fast.triton_kernels.")
                and getattr(module, "launch", None) is self._start
            ):
                monkeypatch.setattr(module, "launch", self._launch)

    def _launch(self, kernel, grid, *args, **meta):
        function = kernel
        while hasattr(function, "fn"):  # autotuner, kernel, Python function
            function = function.fn
        if callable(grid) or 0 not in grid:
            self.names.append(function.__name__)
        with _disable_current_modes():
            self._start(kernel, grid, *args, **meta)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        if name not in NO_KERNEL:
            self.names.append(name)
        return op(*args, **(kwargs or {}))


def operands(M, N, K, R, dtype, adapter_dtypes, weight, p=0.0, out_scale=False):
    """The arguments of the forward, and grad; lora_A, lora_B and bias in `adapter_dtypes`."""
    a, b, c = adapter_dtypes
    x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    lora_A, lora_B = (torch.randn(R, K) / K**0.5).to(a), torch.randn(N, R).to(b)
    mask = torch.ops.peft_fast.dropout_mask(x, p) if p else None
    scale = torch.randn(N).sign() * (torch.rand(N) + 0.5) if out_scale else None
    return [x, weight, torch.randn(N).to(c), lora_A, lora_B, mask, scale, 0.7, p], grad


def widened(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def run(module, arguments, grad, needs=None):
    """{name: result} of one backend's forward and backward, by default with every gradient that there is."""
    x, weight, bias, lora_A, lora_B, mask, out_scale, scaling, p = arguments
    if needs is None:
        needs = Needs(True, True, True, True, out_scale is not None)
    y, z = module.lora_linear(x, weight, bias, lora_A, lora_B, mask, out_scale, scaling, p)
    saved = (bias, y) if needs.out_scale else (None, None)
    grads = module.lora_linear_backward(
        grad, x, weight, lora_A, lora_B, z, mask, out_scale, *saved, scaling, p, needs
    )
    return {"y": y, "z": z, **grads._asdict()}


def check(arguments, grad, strategy="fused"):
    """Every result of a strategy within the criterion."""
    got = run(triton_kernels.Strategy(strategy), [on_device(a) for a in arguments], on_device(grad))
    plain = run(reference, arguments, grad)
    truth = run(reference, [widened(a) for a in arguments], widened(grad))
    for name, exact in truth.items():
        if exact is None:
            assert got[name] is None, name
            continue
        assert_as_exact(name, got[name].cpu(), plain[name], exact)
