"""Weight formats: how a frozen base weight Ŵ [N, K] is packed, and what its exact value is.

A `QuantizedWeight` is a view of somebody else's weight: it aliases the owner's storage and is never
written. Its fields are, in this order, the weight arguments of every op schema (`ops.WEIGHT_SCHEMA`).

==========  =======================  ===============================================================
format      `weight`                 value of element i = n·K + k
==========  =======================  ===============================================================
dense       [N, K] fp32/fp16/bf16    the element itself; may be the transpose of a contiguous [K, N]
nf4, fp4    [⌈N·K/2⌉] uint8          code[nibble_i] · absmax[i // blocksize], in fp32
mxfp4       [N·K/2] uint8            the same, with blocks of 32 and nested scales 2^(absmax − 127)
int8        [N, K] int8              byte_i · (absmax[n] · (1/127)), in fp32
fp8         [N, K] uint8, of e4m3fn  e4m3(byte_i) · absmax[n], in fp32
==========  =======================  ===============================================================

4-bit layout (bitsandbytes'): flat row-major, byte = even element << 4 | odd element, blocks contiguous in
flat order. With nested (double) quantization `absmax` is itself uint8 and stands for
`nested_code[absmax] · nested_absmax[block // nested_blocksize] + nested_offset`, in fp32, multiply then
add. The 8-bit formats have one block a row (blocksize = K) and no code. The value is rounded once, to nearest
even, to the dtype it is decoded to. Sizes are positive.

Constructors from a checkpoint's tensors are in `packing.py`; CONTRIBUTING.md has the steps for a new format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import UnsupportedWeight

DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STORED_DTYPES = (*DENSE_DTYPES, torch.float64)
_INT = frozenset((int,))
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# The bit patterns are the specification (bitsandbytes' get_4bit_type); a test compares them bit for bit.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_CODE = (*(v / 12.0 for v in _FP4_MAGNITUDES), 0.0, *(-v / 12.0 for v in _FP4_MAGNITUDES[1:]))
# OCP's e2m1, and its e8m0: powers of two, and NaN (OCP Microscaling Formats Specification 1.0, 5.3, 5.4).
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_CODE = (*_E2M1_MAGNITUDES, *(-v for v in _E2M1_MAGNITUDES))
E8M0_CODE = (*(2.0**e for e in range(-127, 128)), math.nan)
MX_BLOCKSIZE = 32
INT8_STEP = 1.0 / 127.0


class QuantizedWeight(NamedTuple):
    """A frozen base weight Ŵ [out_features, in_features] in packed form; see the module docstring."""

    weight: Tensor
    absmax: Tensor | None
    code: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    format: str
    out_features: int
    in_features: int
    blocksize: int
    nested_blocksize: int

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The exact value [N, K], rounded once to `dtype` (float64 holds the fp32 value exactly)."""
        return FORMATS[self.format].decode(self, dtype)

    def check(self) -> QuantizedWeight:
        """Returns self, or raises `UnsupportedWeight` naming the field that contradicts the layout."""
        if not isinstance(self.weight, Tensor):
            raise UnsupportedWeight(f"weight: expected a tensor, got {type(self.weight).__name__}")
        if not isinstance(self.format, str) or self.format not in FORMATS:
            raise UnsupportedWeight(f"format: expected one of {sorted(FORMATS)}, got {self.format!r}")
        sizes = self[-4:]
        if not _INT.issuperset(map(type, sizes)):
            for name, size in zip(self._fields[-4:], sizes, strict=True):
                if not isinstance(size, int | torch.SymInt):
                    raise UnsupportedWeight(f"{name}: expected an integer, got {size!r}")
        FORMATS[self.format].check(self)
        return self


class Format(NamedTuple):
    check: Callable[[QuantizedWeight], None]
    decode: Callable[[QuantizedWeight, torch.dtype], Tensor]
    decode_rows: Callable[[QuantizedWeight, Tensor], Tensor]


def _expect(argument: str, expected: object, got: object) -> None:
    if expected != got:
        raise UnsupportedWeight(f"{argument}: expected {expected}, got {got}")


def _check_dense(w: QuantizedWeight) -> None:
    _check_dense_tensor(w.weight)
    _expect("weight shape", (w.out_features, w.in_features), tuple(w.weight.shape))


def _check_dense_tensor(weight: Tensor) -> None:
    if not weight.numel():
        _expect("weight shape", "positive sizes", tuple(weight.shape))
    if weight.dtype not in _STORED_DTYPES:
        raise UnsupportedWeight(f"weight: expected a floating dtype of {_STORED_DTYPES}, got {weight.dtype}")


def _decode_dense(w: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return w.weight.to(dtype)


def _decode_dense_rows(w: QuantizedWeight, rows: Tensor) -> Tensor:
    chosen = w.weight[rows]
    return chosen if chosen.dtype == torch.float64 else chosen.float()


def _check_4bit(w: QuantizedWeight) -> None:
    packed, absmax, code, nested_absmax, nested_code, nested_offset, _, N, K, blocksize, nested_blocksize = w
    if blocksize not in BLOCK_SIZES:
        raise UnsupportedWeight(f"blocksize: expected one of {BLOCK_SIZES}, got {blocksize}")
    blocks = -(-N * K // blocksize)
    parts: tuple[Any, ...] = (("weight", packed, _UINT8, (N * K + 1) // 2), ("code", code, _FLOAT, 16))
    if nested_absmax is None:
        parts += (("absmax", absmax, _FLOAT, blocks),)
    elif nested_blocksize not in BLOCK_SIZES:
        raise UnsupportedWeight(f"nested_blocksize: expected one of {BLOCK_SIZES}, got {nested_blocksize}")
    else:
        parts += (
            ("absmax", absmax, _UINT8, blocks),
            ("nested_absmax", nested_absmax, _FLOAT, -(-blocks // nested_blocksize)),
            ("nested_code", nested_code, _FLOAT, 256),
            ("nested_offset", nested_offset, _FLOAT, 1),
        )
    _check_parts(w, parts)


def _check_mxfp4(w: QuantizedWeight) -> None:
    _check_4bit(w)
    _expect("blocksize", MX_BLOCKSIZE, w.blocksize)
    if w.nested_absmax is None:
        raise UnsupportedWeight("nested_absmax: expected a tensor, got None; scales of mxfp4 are nested")


def _check_8bit(w: QuantizedWeight) -> None:
    N, K = w.out_features, w.in_features
    _expect("blocksize, the length of a row", K, w.blocksize)
    stored = torch.int8 if w.format == "int8" else _UINT8
    _check_parts(w, (("weight", w.weight, stored, N * K), ("absmax", w.absmax, _FLOAT, N)))
    _expect("weight shape", (N, K), tuple(w.weight.shape))
    for name in QuantizedWeight._fields[2:6]:
        if getattr(w, name) is not None:
            raise UnsupportedWeight(f"{name}: expected None, got a tensor")


_UINT8, _FLOAT = torch.uint8, torch.float32


def _check_parts(w: QuantizedWeight, parts: tuple[Any, ...]) -> None:
    """Each part is (name, tensor, dtype, numel). Runs at every forward: one condition where all is well."""
    N, K, device = w.out_features, w.in_features, w.weight.device
    if N < 1 or K < 1:
        _expect("shape", "positive sizes", (N, K))
    for name, tensor, dtype, numel in parts:
        if tensor is None:
            raise UnsupportedWeight(f"{name}: expected a tensor, got None")
        if tensor.dtype is dtype and tensor.numel() == numel and tensor.device == device:
            if tensor.is_contiguous():
                continue
            raise UnsupportedWeight(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
        _expect(f"{name} dtype", dtype, tensor.dtype)
        _expect(f"{name} numel, for a shape ({N}, {K}) in blocks of {w.blocksize}", numel, tensor.numel())
        _expect(f"{name} device", device, tensor.device)


def decode_absmax(w: QuantizedWeight) -> Tensor:
    """The fp32 scale of each block [⌈N·K/blocksize⌉], nested quantization undone."""
    assert w.absmax is not None
    absmax = w.absmax.view(-1)
    if w.nested_absmax is None:
        return absmax
    assert w.nested_code is not None
    assert w.nested_offset is not None
    group = torch.arange(absmax.numel(), device=absmax.device) // w.nested_blocksize
    return w.nested_code.view(-1)[absmax.int()] * w.nested_absmax.view(-1)[group] + w.nested_offset.view(-1)


def _decode_4bit(w: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    assert w.code is not None
    numel = w.out_features * w.in_features
    nibbles = torch.stack((w.weight >> 4, w.weight & 0xF), dim=-1).reshape(-1)[:numel]
    scale = decode_absmax(w).repeat_interleave(w.blocksize)[:numel]
    return (w.code.view(-1)[nibbles.int()] * scale).to(dtype).view(w.out_features, w.in_features)


def _decode_4bit_rows(w: QuantizedWeight, rows: Tensor) -> Tensor:
    assert w.absmax is not None
    assert w.code is not None
    i = rows.unsqueeze(1) * w.in_features + torch.arange(w.in_features, device=rows.device)
    byte = w.weight.view(-1)[i >> 1]
    nibble = torch.where(i & 1 == 0, byte >> 4, byte & 0xF)
    block = i // w.blocksize
    scale = w.absmax.view(-1)[block]
    if w.nested_absmax is not None:
        assert w.nested_code is not None
        assert w.nested_offset is not None
        nested_scale = w.nested_absmax.view(-1)[block // w.nested_blocksize]
        scale = w.nested_code.view(-1)[scale.int()] * nested_scale + w.nested_offset.view(-1)
    return w.code.view(-1)[nibble.int()] * scale


def _decode_8bit_rows(w: QuantizedWeight, rows: Tensor | slice) -> Tensor:
    """The fp32 values of some rows, or of a slice of all."""
    assert w.absmax is not None
    absmax = w.absmax.view(-1)[rows].unsqueeze(1)
    if w.format == "int8":
        return w.weight[rows].float() * (absmax * INT8_STEP)
    return w.weight[rows].view(torch.float8_e4m3fn).float() * absmax


def _decode_8bit(w: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return _decode_8bit_rows(w, slice(None)).to(dtype)


FORMATS: dict[str, Format] = {
    "dense": Format(_check_dense, _decode_dense, _decode_dense_rows),
    "nf4": Format(_check_4bit, _decode_4bit, _decode_4bit_rows),
    "fp4": Format(_check_4bit, _decode_4bit, _decode_4bit_rows),
    "mxfp4": Format(_check_mxfp4, _decode_4bit, _decode_4bit_rows),
    "int8": Format(_check_8bit, _decode_8bit, _decode_8bit_rows),
    "fp8": Format(_check_8bit, _decode_8bit, _decode_8bit_rows),
}
CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE, "mxfp4": E2M1_CODE}


def decode_rows(w: QuantizedWeight, rows: Tensor) -> Tensor:
    """The exact values [len(rows), K] of the rows with these numbers, int64; float32, or float64 as stored.

    Gathers element by element, so that rows may lie anywhere and in any order: for few of them.
    """
    return FORMATS[w.format].decode_rows(w, rows)


def rows_per_slice(w: QuantizedWeight) -> int:
    """`slice_rows` cuts at multiples of this many rows: where a block, and a group of blocks, begins."""
    if w.code is None:
        return 1
    group = w.blocksize * (w.nested_blocksize or 1)
    return group // math.gcd(group, w.in_features)


def slice_rows(w: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Rows start..stop as a weight that aliases `w`; both multiples of `rows_per_slice(w)`, or stop is N."""
    if w.code is None:
        absmax = None if w.absmax is None else w.absmax.view(-1)[start:stop]
        return w._replace(weight=w.weight[start:stop], absmax=absmax, out_features=stop - start)
    first, last = start * w.in_features, stop * w.in_features

    def cut(t: Tensor | None, elements: int) -> Tensor | None:
        return None if t is None else t.view(-1)[first // elements : -(-last // elements)]

    return w._replace(
        weight=w.weight.view(-1)[first // 2 : -(-last // 2)],
        absmax=cut(w.absmax, w.blocksize),
        nested_absmax=cut(w.nested_absmax, w.blocksize * w.nested_blocksize),
        out_features=stop - start,
    )


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is transformers' `Conv1D`, GPT-2's linear layer, whose weight is stored as [K, N]."""
    cls = type(layer)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def from_dense(weight: Tensor) -> QuantizedWeight:
    """A dense weight [N, K] as it is, or the transposed view of one stored as [K, N].

    Raises:
        TypeError: no tensor.
        UnsupportedWeight: another dtype or shape.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a QuantizedWeight or a tensor [N, K], got {type(weight).__name__}")
    if weight.dim() != 2:
        raise UnsupportedWeight(f"weight: expected [N, K], got shape {tuple(weight.shape)}")
    _check_dense_tensor(weight)
    n, k = weight.shape
    return QuantizedWeight(weight.detach(), None, None, None, None, None, "dense", n, k, 0, 0)


def from_bitsandbytes(weight: Tensor, quant_state: Any) -> QuantizedWeight:
    """The 4-bit weight of a bitsandbytes `Params4bit`/`Linear4bit`, aliasing its bytes.

    Args:
        weight: packed bytes in any `quant_storage` dtype.
        quant_state: bitsandbytes' `QuantState` (read from the layer, since FSDP strips it from the weight).

    Raises:
        UnsupportedWeight: not quantized yet, or repacked for CPU inference: bitsandbytes then rounds absmax
            to bfloat16 in place and drops the nested statistics, so the trained-on value is gone.
    """
    if quant_state is None:
        raise UnsupportedWeight(
            "quant_state: expected a QuantState, got None (moving the layer quantizes it: layer.to(device))"
        )
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise UnsupportedWeight(
            "quant_state: repacked in place by a bitsandbytes CPU inference forward, which rounded absmax to "
            "bfloat16 and dropped nested statistics; they cannot be restored. Reload the weight, and "
            "convert the model before its first eval forward"
        )
    try:
        nested, (n, k) = quant_state.state2, quant_state.shape
    except (AttributeError, TypeError, ValueError):
        got = getattr(quant_state, "shape", type(quant_state).__name__)
        raise UnsupportedWeight(f"quant_state: expected a QuantState of shape [N, K], got {got}") from None
    with torch._C.DisableTorchFunctionSubclass():  # Params4bit's override costs more than these views
        packed = weight.data.view(torch.uint8).reshape(-1)
    return QuantizedWeight(
        packed,
        quant_state.absmax,
        quant_state.code,
        nested.absmax if nested is not None else None,
        nested.code if nested is not None else None,
        quant_state.offset if nested is not None else None,
        quant_state.quant_type,
        n,
        k,
        quant_state.blocksize,
        nested.blocksize if nested is not None else 0,
    )


def _from_linear8bit(weight: Any, state: Any) -> QuantizedWeight:
    """CB and SCB where `Linear8bitLt` has them: before its first forward on the weight, then in the state."""
    if weight.dtype is not torch.int8:
        raise UnsupportedWeight(
            f"weight: expected int8, got {weight.dtype}: a Linear8bitLt with has_fp16_weights=False is "
            "quantized by moving it (layer.to(device)), one with True is not a frozen weight"
        )
    scale = getattr(weight, "SCB", None)
    scale = state.SCB if scale is None else scale
    if scale is None:
        raise UnsupportedWeight("SCB: expected the scales of a Linear8bitLt on its weight or state, got None")
    n, k = weight.shape
    return QuantizedWeight(weight.data, scale, None, None, None, None, "int8", n, k, k, 0)


def from_linear(layer: nn.Module) -> QuantizedWeight:
    """The base weight of an `nn.Linear`, a `Conv1D`, a bitsandbytes layer or a `PackedLinear`.

    Cheap enough for every forward: attributes are read, nothing is copied, cached or checked. Call
    `.check()` on the result once where the layer is adopted.
    """
    attributes = vars(layer)  # nn.Module's getattr is slow where nothing is found
    if "packing" in attributes:
        return layer.packed  # type: ignore[return-value]
    weight: Any = layer.weight
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is None:
        quant_state = attributes.get("quant_state")
    if quant_state is not None or "quant_state" in attributes:
        storage = attributes.get("quant_storage")
        if storage is not None and storage.is_floating_point:
            _check_storage(weight.dtype, storage)
        return from_bitsandbytes(weight, quant_state)
    state = attributes.get("state")
    if hasattr(state, "SCB"):
        return _from_linear8bit(weight, state)
    return from_dense(weight.t() if is_conv1d(layer) else weight)


def stored_weight(layer: nn.Module) -> Any:
    """The tensor that holds the weight of `layer`: `.weight`, or the bytes that a `PackedLinear`'s reads."""
    return layer._buffers["weight"] if "packing" in vars(layer) else layer.weight


def _check_storage(dtype: torch.dtype, storage: torch.dtype) -> None:
    """Where the bytes lie in a floating dtype, FSDP's mixed precision may have cast them as if numbers."""
    if dtype.is_floating_point and dtype is not storage:
        raise UnsupportedWeight(
            f"weight: expected packed bytes in {storage}, its quant_storage, got them cast to {dtype}; set "
            f"param_dtype={storage} in FSDP's MixedPrecisionPolicy, or bnb_4bit_quant_storage to uint8"
        )


def code_table(format: str, device: torch.device | str | None = None) -> Tensor:
    """The sixteen fp32 values of a 4-bit format, by nibble [16]."""
    return torch.tensor(CODES[format], dtype=torch.float32, device=device)
