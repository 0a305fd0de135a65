"""What an architecture can do that tiles and products depend on, by the name that Triton compiles for.

Triton emits matrix instructions from sm_80 on, on AMD's CDNA (gfx908, gfx90a, gfx94x, gfx950) for every
dtype, and on RDNA 3 and 4 (gfx11xx, gfx12xx) for half precision. Elsewhere, sm_75 among them, every product
is multiply-adds, which the compiler unrolls: correct, slow, and only small tiles fit the registers.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def arch(device: torch.device) -> str:
    """Such as "sm_90" or "gfx942"; "" where no compiler runs, as under the interpreter."""
    if device.type != "cuda":
        return ""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def is_rdna(arch: str) -> bool:
    """RDNA 3 or 4: 32 lanes a warp, 256 registers each, operands of a product held twice."""
    return arch.startswith(("gfx11", "gfx12"))


def has_matrix_instructions(arch: str) -> bool:
    """Whether products of any dtype of ours, fp32 by way of `precision`, become matrix instructions."""
    if arch.startswith("sm_"):
        return int(arch.removeprefix("sm_")) >= 80
    return arch == "" or is_rdna(arch) or arch in ("gfx908", "gfx90a", "gfx950") or arch.startswith("gfx94")


def is_small(arch: str) -> bool:
    """Whether only small tiles fit the registers: products are unrolled, or their operands held twice."""
    return not has_matrix_instructions(arch) or is_rdna(arch)


def precision(arch: str) -> str:
    """How fp32 operands are multiplied, with fp32-class accuracy, as `tl.dot` names it.

    Three TF32 products on NVIDIA, six bfloat16 ones where matrix instructions take only half precision, fp32
    itself elsewhere.
    """
    if arch.startswith("sm_") and has_matrix_instructions(arch):
        return "tf32x3"
    return "bf16x6" if is_rdna(arch) else "ieee"
