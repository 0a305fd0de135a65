"""Ŵ [N, K] written out from its packed form in one launch; bit-equal to `QuantizedWeight.decode`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_fast.formats import QuantizedWeight

from . import configs
from .decode import decode_tile
from .launch import empty, launch, weight_args
from .tiles import store_tile, widen


@triton.jit
def dequantize_kernel(
    weight, absmax, code, nested_absmax, nested_code, nested_offset, p_out,
    N, K, stride_n, stride_k,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of Ŵ a program."""
    columns = tl.cdiv(K, BLOCK_K)
    i_n, i_k = tl.program_id(0) // columns * BLOCK_N, tl.program_id(0) % columns * BLOCK_K
    b_w = decode_tile(
        weight, absmax, code, nested_absmax, nested_code, nested_offset,
        i_n, i_k, N, K, stride_n, stride_k,
        BLOCKSIZE, NESTED_BLOCKSIZE, ALIGNED, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_tile(p_out, widen(b_w), i_n, i_k, N, K)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The exact value of `weight` [N, K], rounded once to `dtype` (float32, float16 or bfloat16)."""
    N, K, device = weight.out_features, weight.in_features, weight.weight.device
    out = empty((N, K), dtype, device)
    tensors, strides, decoding = weight_args(weight)
    tile = configs.DEQUANTIZE
    launch(
        dequantize_kernel, (triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(K, tile["BLOCK_K"]),), device,
        *tensors, out,
        N, K, *strides,
        **decoding, **tile,
    )  # fmt: skip
    return out.to(dtype)
