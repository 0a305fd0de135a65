"""What the tests of the Triton kernels share; importing it skips a module where Triton does not run."""

import mmap
import sys

import pytest
import torch
from cases import device_of
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peft_fast import backends
from peft_fast.formats import QuantizedWeight

DEVICE = device_of("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if (reason := backends.BACKENDS["triton"].unavailable("dense", DEVICE, torch.float32)) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)


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
    """Records the kernels that `module` starts and, where entered, the ops of PyTorch that start one."""

    def __init__(self, monkeypatch, module: str) -> None:
        super().__init__()
        self.names: list[str] = []
        namespace = sys.modules[f"peft_fast.triton_kernels.{module}"]
        self._start = namespace.launch
        monkeypatch.setattr(namespace, "launch", self._launch)

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
        if name not in ("empty", "new_empty"):
            self.names.append(name)
        return op(*args, **(kwargs or {}))
