"""The CUDA C++ backend (csrc/cuda): lora_linear for few tokens, and the decode of a packed weight.

Its ops are part of `peft_fast._C` where that was built with CUDA; `forward.cu`, `backward.cu` and
`dequantize.cu` have the maths.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .errors import BackendUnavailable
from .formats import QuantizedWeight
from .reference import Gradients, Needs

FORMATS = ("dense", "nf4", "fp4")
MOST_ROWS = 8
BUILD_HINT = (
    'build it with `PEFT_FAST_CUDA_ARCHS="80 90 100 120" pip install --no-build-isolation -e .` (needs nvcc)'
)


class Library(NamedTuple):
    """The namespace of the ops, and the type of the devices whose tensors they take."""

    namespace: str
    device: str


LIBRARY = Library("peft_fast_cuda", "cuda")


@functools.cache
def _load_error(library: Library) -> str | None:
    if (error := native.load_error()) is not None:
        return error
    if not hasattr(getattr(torch.ops, library.namespace), "architectures"):
        return f"the C++ extension was built without CUDA: {BUILD_HINT}"
    return None


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for "80 90" and so on, the last as PTX too, runs on a GPU of this compute capability.

    Machine code runs on its own major version from its own minor version on, with a letter on nothing else.
    """
    for arch in architectures.split():
        major, minor, letter = re.fullmatch(r"(\d+)(\d)([af]?)", arch).groups()  # type: ignore[union-attr]
        compiled = (int(major), int(minor))
        if compiled == capability or (not letter and compiled[0] == capability[0] and compiled <= capability):
            return True
    return not letter and compiled <= capability


@functools.cache
def _device_error(library: Library, index: int) -> str | None:
    architectures = getattr(torch.ops, library.namespace).architectures()
    major, minor = torch.cuda.get_device_capability(index)
    if runs_on(architectures, (major, minor)):
        return None
    return f"was compiled for {architectures}, which an sm_{major}{minor} does not run"


@functools.cache
def _missing(library: Library) -> str | None:
    """Why no kernel starts whatever the GPU: a torch without CUDA, or a driver older than the build."""
    return str(getattr(torch.ops, library.namespace).missing()) or None


def _gpu_error(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if (error := _missing(LIBRARY)) is not None:
        return error
    return _device_error(LIBRARY, torch.cuda.current_device() if index is None else index)


def unavailable(format: str, device: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Why the kernels cannot take activations of `dtype` there (by default on the current GPU); or None."""
    if device != LIBRARY.device:
        return f"runs on {LIBRARY.device} tensors, got {device}"
    if format not in FORMATS:
        return f"it decodes nf4 and fp4 weights, got {format}"
    if (error := _load_error(LIBRARY)) is not None:
        return error
    if device == "cuda" and (error := _gpu_error(index)) is not None:
        return error
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes float32, float16 or bfloat16 activations, got {dtype}"
    return None


def _op(name: str) -> Any:
    return getattr(getattr(torch.ops, LIBRARY.namespace), name).default


def gemv_unavailable(format: str, device: str, dtype: torch.dtype) -> str | None:
    if format == "dense":
        return "it decodes 4-bit weights, got a dense one"
    return unavailable(format, device, dtype)


class Gemv:
    """lora_linear of up to MOST_ROWS tokens on a 4-bit weight: two launches forward, two backward.

    Ŵ is decoded in fp32 and not rounded; sums are fp32, in an order that the shape alone decides.
    """

    @staticmethod
    def lora_linear(
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        dropout_mask: Tensor | None,
        out_scale: Tensor | None,
        scaling: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        """As `reference.lora_linear`, for contiguous operands."""
        _check_rows(x)
        return _op("lora_linear")(
            x, *weight, bias, lora_A, lora_B, dropout_mask, out_scale, scaling, dropout_p
        )

    @staticmethod
    def lora_linear_backward(
        grad: Tensor,
        x: Tensor,
        weight: QuantizedWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        z: Tensor,
        dropout_mask: Tensor | None,
        out_scale: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        scaling: float,
        dropout_p: float,
        needs: Needs,
    ) -> Gradients:
        """As `reference.lora_linear_backward`, for contiguous operands."""
        _check_rows(x)
        grads = _op("lora_linear_backward")(
            grad, x, *weight, lora_A, lora_B, z, dropout_mask, out_scale, bias, y, scaling, dropout_p, *needs
        )
        return Gradients(*(g if needed else None for g, needed in zip(grads, needs, strict=True)))


def _check_rows(x: Tensor) -> None:
    if len(x) > MOST_ROWS:
        raise BackendUnavailable(
            f"backend 'cuda-gemv' cannot run lora_linear here: it takes up to {MOST_ROWS} rows, got {len(x)}"
        )


class Dequantize:
    """The decode in one launch, nested scales undone in the same pass."""

    @staticmethod
    def dequantize(weight: QuantizedWeight, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """As `reference.dequantize`, for a contiguous `out`."""
        if out is None:
            shape = weight.out_features, weight.in_features
            out = torch.empty(shape, dtype=dtype, device=weight.weight.device)
        if weight.format == "dense":
            return out.copy_(weight.weight)
        return write(weight, out)


def write(
    weight: QuantizedWeight,
    out: Tensor,
    *,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    out_scale: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """out [N, K] = out_scale ⊙ (Ŵ + s·B·A), rounded once; contiguous operands, out_scale [N] fp32.

    B·A is summed in fp32 from operands of eleven bits, where `out` is fp32 of 22: as the strategy `merge`.
    """
    return _op("write")(*weight, lora_A, lora_B, out_scale, scaling, out)
