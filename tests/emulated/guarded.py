"""Runs the emulated CUDA kernels on operands that end where memory does; test_cuda.py starts it."""

import ctypes
import mmap
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import emulated_cuda
import torch
from cases import make_scale, make_weight

from peft_fast import cuda
from peft_fast.formats import QuantizedWeight
from peft_fast.reference import Needs

CASES = [(8, 66, 96, 5, torch.float16), (3, 37, 97, 7, torch.bfloat16), (1, 9, 1056, 1, torch.float32),
         (5, 130, 40, 64, torch.bfloat16)]  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


def guarded(value):
    """A copy of a tensor, or of those of a weight, right before a page without access."""
    if isinstance(value, QuantizedWeight):
        return QuantizedWeight(*map(guarded, value))
    if not torch.is_tensor(value):
        return value
    size, page = value.numel() * value.element_size(), mmap.PAGESIZE
    room = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + room), page, 0) == 0, ctypes.get_errno()
    if size == 0:
        return value
    at = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=room - size)
    return at.copy_(value.flatten()).view(value.shape)


def dies() -> bool:
    """Whether a process ends that reads the byte after a guarded tensor."""
    child = os.fork()
    if child == 0:
        ctypes.string_at(guarded(torch.zeros(5, dtype=torch.uint8)).data_ptr(), 6)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def main() -> None:
    assert dies()
    torch.ops.load_library(str(emulated_cuda.build()))
    cuda.LIBRARY = emulated_cuda.LIBRARY
    for M, N, K, R, dtype in CASES:
        weight, scale, bias = (
            guarded(t) for t in (make_weight("nf4", N, K), make_scale(N, torch.float32), torch.randn(N))
        )
        x, grad = guarded(torch.randn(M, K).to(dtype)), guarded(torch.randn(M, N).to(dtype))
        A, B = guarded(torch.randn(R, K)), guarded(torch.randn(N, R))
        mask = guarded(torch.ops.peft_fast.dropout_mask(x, 0.5))
        y, z = cuda.Gemv.lora_linear(x, weight, bias, A, B, mask, scale, 0.5, 0.5)
        cuda.Gemv.lora_linear_backward(
            grad, x, weight, A, B, guarded(z), mask, scale, bias, guarded(y), 0.5, 0.5, Needs(*[True] * 5)
        )
        out = guarded(torch.zeros(N, K, dtype=dtype))
        cuda.write(weight, out, lora_A=A, lora_B=B, out_scale=scale)
    print(f"a read beyond ends a process; {len(CASES)} cases passed")


if __name__ == "__main__":
    main()
