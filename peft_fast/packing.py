"""Weights in the formats of checkpoints, from their tensors or quantized here.

======  =======================================  ====================================================
format  from the tensors of a checkpoint         `pack(weight, format)`, to nearest, ties to even
======  =======================================  ====================================================
int8    `from_int8(CB, SCB)`, of bitsandbytes    rows to ±127
fp8     `from_fp8(weight, scale)`                rows to ±448
mxfp4   `from_mxfp4(blocks, scales)`             blocks of 32 by a power of two, the largest to ±4 … ±6
======  =======================================  ====================================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import UnsupportedWeight
from .formats import BLOCK_SIZES, E8M0_CODE, MX_BLOCKSIZE, QuantizedWeight, code_table
from .functional import check_choice
from .ops import check_tensor

PACKINGS = ("int8", "fp8", "mxfp4")
E4M3_MAX = 448.0
E2M1_EXPONENT = 2  # of its largest number, 6


def from_int8(CB: Tensor, SCB: Tensor) -> QuantizedWeight:
    """The weight of LLM.int8 (arXiv 2208.07339) as bitsandbytes keeps it, aliased: CB · SCB / 127.

    These are the values that bitsandbytes' own backward multiplies with, bit for bit.

    Args:
        CB: int8 [N, K].
        SCB: the largest magnitude of each row, float32 [N].

    Raises:
        UnsupportedWeight: another dtype, shape, device or layout. TypeError: no tensor.
    """
    check_tensor("CB", CB)
    check_tensor("SCB", SCB)
    if CB.dim() != 2:
        raise UnsupportedWeight(f"CB: expected int8 [N, K], got shape {tuple(CB.shape)}")
    n, k = CB.shape
    return QuantizedWeight(CB.detach(), SCB.detach(), None, None, None, None, "int8", n, k, k, 0).check()


def from_fp8(weight: Tensor, scale: Tensor) -> QuantizedWeight:
    """The weight of an FP8 checkpoint, aliased: weight · scale.

    Args:
        weight: torch.float8_e4m3fn [N, K].
        scale: of each row, [N] or [N, 1], or of all of them, [] or [1]; floating. What multiplies the weight:
            checkpoints call it `weight_scale`, and some `weight_scale_inv`.

    Raises:
        UnsupportedWeight: another dtype, shape, device or layout. TypeError: no tensor.
    """
    check_tensor("weight", weight)
    check_tensor("scale", scale)
    if weight.dim() != 2 or weight.dtype != torch.float8_e4m3fn:
        expected = "expected torch.float8_e4m3fn [N, K]"
        raise UnsupportedWeight(f"weight: {expected}, got {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    if tuple(scale.shape) not in ((), (1,), (1, 1), (n,), (n, 1)) or not scale.is_floating_point():
        expected = f"expected floating [{n}], [{n}, 1], [1] or []"
        raise UnsupportedWeight(f"scale: {expected}, got {scale.dtype} {list(scale.shape)}")
    rows = scale.detach().float().reshape(-1).expand(n).contiguous()
    data = weight.detach().view(torch.uint8)
    return QuantizedWeight(data, rows, None, None, None, None, "fp8", n, k, k, 0).check()


def from_mxfp4(blocks: Tensor, scales: Tensor) -> QuantizedWeight:
    """The weight of an OCP MXFP4 checkpoint, such as gpt-oss's: a copy with the nibbles of bytes swapped.

    There the low nibble of a byte comes first. The scales are aliased.

    Args:
        blocks: uint8 [N, K/32, 16] or [N, K/2], two e2m1 numbers a byte.
        scales: uint8 [N, K/32], e8m0.

    Raises:
        UnsupportedWeight: another dtype, shape, device or layout. TypeError: no tensor.
    """
    check_tensor("blocks", blocks)
    check_tensor("scales", scales)
    n, k = blocks.shape[0] if blocks.dim() else 0, 2 * math.prod(blocks.shape[1:])
    block_shapes = ((n, k // 2), (n, k // MX_BLOCKSIZE, MX_BLOCKSIZE // 2))
    if blocks.dtype != torch.uint8 or tuple(blocks.shape) not in block_shapes or k % MX_BLOCKSIZE:
        expected = "expected uint8 [N, K/32, 16] or [N, K/2]"
        raise UnsupportedWeight(f"blocks: {expected}, got {blocks.dtype} {list(blocks.shape)}")
    if scales.dtype != torch.uint8 or tuple(scales.shape) != (n, k // MX_BLOCKSIZE):
        expected = f"expected uint8 {[n, k // MX_BLOCKSIZE]}"
        raise UnsupportedWeight(f"scales: {expected}, got {scales.dtype} {list(scales.shape)}")
    packed, device, nested_blocksize = blocks.detach().reshape(-1), blocks.device, BLOCK_SIZES[-1]
    return QuantizedWeight(
        packed >> 4 | packed << 4,
        scales.detach().reshape(-1),
        code_table("mxfp4", device),
        torch.ones(-(-scales.numel() // nested_blocksize), device=device),
        torch.tensor(E8M0_CODE, device=device),
        torch.zeros(1, device=device),
        "mxfp4",
        n,
        k,
        MX_BLOCKSIZE,
        nested_blocksize,
    ).check()


def pack(weight: Tensor, format: str) -> QuantizedWeight:
    """A dense weight [N, K] quantized to one of `PACKINGS`: each row or block by its largest value.

    mxfp4 as its specification says (OCP Microscaling Formats 1.0, 6.3): the largest value of a block may lose
    up to a quarter.

    Raises:
        UnsupportedWeight: values that are not finite, no matrix, or for mxfp4 a K that is no multiple of 32.
        ValueError: another format.
    """
    check_choice("format", format, PACKINGS)
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.shape[1]:
        raise UnsupportedWeight(f"weight: expected floating [N, K], got {weight.dtype} {list(weight.shape)}")
    values = weight.detach().float().contiguous()
    if not values.is_meta and not values.isfinite().all():
        raise UnsupportedWeight("weight: expected finite values, got NaN or infinity")
    if format == "mxfp4":
        return _pack_mxfp4(values)
    largest = values.abs().amax(1, keepdim=True)
    scaled = values / largest.masked_fill(largest == 0, 1.0)
    if format == "int8":
        return from_int8((scaled * 127).round().to(torch.int8), largest.squeeze(1))
    return from_fp8((scaled * E4M3_MAX).to(torch.float8_e4m3fn), largest / E4M3_MAX)


def _pack_mxfp4(values: Tensor) -> QuantizedWeight:
    n, k = values.shape
    if k % MX_BLOCKSIZE:
        raise UnsupportedWeight(f"weight: expected K to be a multiple of {MX_BLOCKSIZE}, got {k}")
    blocks = values.view(n, -1, MX_BLOCKSIZE)
    exponent = torch.frexp(blocks.abs().amax(2)).exponent - 1 - E2M1_EXPONENT
    exponent = exponent.clamp(-127, 127)
    scaled = torch.ldexp(blocks, -exponent.unsqueeze(2))
    # Midpoints between magnitudes; a tie goes to the even code, the upper one where the lower is odd.
    magnitudes = code_table("mxfp4", values.device)[:8]
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    size = scaled.abs().unsqueeze(3)
    odd = torch.arange(7, device=values.device) % 2 == 1
    code = ((size > middles) | ((size == middles) & odd)).sum(3) | (scaled < 0).int() << 3
    code = code.to(torch.uint8).view(n, k // 2, 2)
    return from_mxfp4(code[..., 0] | code[..., 1] << 4, (exponent + 127).to(torch.uint8))
