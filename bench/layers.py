"""The layers that benchmarks time, all made of the same operands, and what they must compute.

`dense` is a frozen `nn.Linear`, `peft` PEFT's own layer on a bitsandbytes `Linear4bit` or `Linear8bitLt` (its
generic one on a dense weight), `accelerated` that layer after `peft_fast.accelerate`, `unsloth` it run by
Unsloth's function for one adapted linear layer, `ours` this library's layer over the same bytes, by default
nested NF4; adapters are equal, in fp32, without bias. bench/methods.py has what each method makes of them.

Peers are optional: `missing` says why one cannot run. Without bitsandbytes a weight is packed here.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import types
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from peft_fast.bench.measure import Step
from peft_fast.bench.methods import METHODS
from torch import Tensor, nn
from torch.nn import functional as F

import peft_fast
from peft_fast import packing, reference
from peft_fast.formats import QuantizedWeight, code_table, from_dense, from_linear
from peft_fast.packed_linear import PackedLinear

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

NEEDS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "peft": ("peft", "bitsandbytes"),
    "accelerated": ("peft", "bitsandbytes"),
    "unsloth": ("unsloth", "peft", "bitsandbytes"),
    "ours": (),
}
"""The packages that each kind of provider is made of."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OURS_ALONE = ("fp8", "mxfp4")
"""The packed formats that bitsandbytes has no layer for."""


class Provider(NamedTuple):
    """Who computes, in which activation dtype; `method` of adapted layers only, `backend` of ours only."""

    kind: str
    dtype: str
    method: str = ""
    backend: str = ""

    def __str__(self) -> str:
        name = f"{self.kind} {self.method}".rstrip()
        return f"{name}[{self.backend}]" if self.backend else name


class Shape(NamedTuple):
    """A layer: K in-features, N out-features, rank R, on a device."""

    K: int
    N: int
    R: int
    device: str


class Operands(NamedTuple):
    """What every layer is made of: W [N, K] fp32, its packed form, and the adapters of all methods in fp32.

    `packed` is None where the frozen weight is W itself, in the dtype of the activations. A [R, K] and
    B [N, R] are VeRA's frozen ones too; DoRA's magnitude is [N], VeRA's b [N] and d [R], IA3's γ [N, 1] or
    [1, K].
    """

    dense: Tensor
    packed: Tensor | QuantizedWeight | None
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    lambda_b: Tensor
    lambda_d: Tensor
    gamma_out: Tensor
    gamma_in: Tensor


def make_operands(shape: Shape, format: str = "nf4", nested: bool = True) -> Operands:
    """The same random operands at every call; the magnitude is not the norm of any weight.

    `format` is one of `formats.FORMATS`; without bitsandbytes, of 4-bit ones nested NF4 or mxfp4.
    """
    K, N, R, device = shape
    generator = torch.Generator().manual_seed(0)
    dense = (torch.randn(N, K, generator=generator) / K**0.5).to(device)
    lora_A = torch.randn(R, K, generator=generator) / K**0.5
    lora_B = torch.randn(N, R, generator=generator) / max(R, 1) ** 0.5
    sizes = (N,), (N,), (R,), (N, 1), (1, K)
    vectors = [0.5 + torch.rand(size, generator=generator) for size in sizes]
    packed: Tensor | QuantizedWeight | None = None
    if format in packing.PACKINGS:
        packed = packing.pack(dense, format)
    elif format != "dense":
        packed = pack(dense, format, nested)
    return Operands(dense, packed, *(t.to(device) for t in (lora_A, lora_B, *vectors)))


@functools.cache
def missing(kind: str) -> str | None:
    """Why providers of a kind cannot run here; None when they can."""
    for package in NEEDS[kind]:
        try:
            importlib.import_module(package)
        except Exception as error:  # Unsloth raises several kinds, without a GPU for one
            return absent(package, error)
    return None


def absent(package: str, error: Exception) -> str:
    """Why a package cannot be used, by what importing it raised, which may be about one that it needs."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"{package}: not installed"
    return f"{package}: {said(error)}"


def said(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def make_layer(provider: Provider, operands: Operands, dropout: float = 0.0) -> nn.Module:
    """The provider's layer, in training mode; only the adapters are its own."""
    dtype = DTYPES[provider.dtype]
    if provider.kind == "dense":
        return dense_linear(operands, dtype)
    base, R, row = base_linear(operands, dtype), operands.lora_A.shape[0], METHODS[provider.method]
    if provider.kind == "ours":
        layer = row.ours(base, R, dropout, provider.backend)
    else:
        layer = peft_layer(base, row.peft(R, dropout), accelerated=provider.kind == "accelerated")
    row.fill(layer, operands)
    return Unsloth(layer) if provider.kind == "unsloth" else layer


LOADED = {"Linear4bit": "is_loaded_in_4bit", "Linear8bitLt": "is_loaded_in_8bit"}
"""What transformers sets on models of these layers; without it PEFT takes its generic layer."""


def peft_layer(base: nn.Linear, config: Any, accelerated: bool = False) -> nn.Module:
    """The layer that PEFT makes for `base` in a model that was loaded as `base` is, in 4 or 8 bits or dense.

    `accelerated` after `peft_fast.accelerate`.

    Raises:
        TypeError: PEFT made another one.
    """
    import peft

    model, kind = nn.Sequential(base), type(base).__name__
    home, quantized = f"peft.tuners.{config.peft_type.value.lower()}", kind in LOADED
    if quantized:
        setattr(model, LOADED[kind], True)
    # PEFT asks the first parameter of a model for its device, and a packed layer of ours has none.
    model.register_parameter("other", nn.Parameter(torch.empty(0, device=base.weight.device)))
    layer = peft.get_peft_model(model, config).base_model.model[0]
    if quantized and importlib.util.find_spec(f"{home}.bnb"):
        expected = getattr(importlib.import_module(f"{home}.bnb"), kind)
    else:
        expected = importlib.import_module(f"{home}.layer").Linear
    if type(layer) is not expected:
        raise TypeError(f"peft: expected it to make {expected.__name__}, got {type(layer).__name__}")
    if accelerated:
        peft_fast.accelerate(model, strict=True)
    return layer


class Unsloth(nn.Module):
    """PEFT's LoRA layer run by Unsloth's function for one linear layer, which takes [batch, tokens, K]."""

    def __init__(self, layer: nn.Module) -> None:
        from unsloth.kernels import apply_lora_o

        super().__init__()
        self.o_proj, self.kernels = layer, apply_lora_o

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels(self, x[None])[0]


def dense_linear(operands: Operands, dtype: torch.dtype) -> nn.Linear:
    """A frozen layer on W in `dtype`."""
    N, K = operands.dense.shape
    layer = nn.Linear(K, N, bias=False, device="meta")
    layer.weight = nn.Parameter(operands.dense.to(dtype), requires_grad=False)
    return layer


def base_linear(operands: Operands, dtype: torch.dtype) -> nn.Linear:
    """The frozen layer that adapters are put on."""
    if operands.packed is None:
        return dense_linear(operands, dtype)
    if isinstance(operands.packed, QuantizedWeight):
        return packed_linear(operands.packed, dtype)
    return linear4bit(operands, dtype)


def packed_linear(weight: QuantizedWeight, dtype: torch.dtype) -> nn.Linear:
    """A view of a packed weight: a `Linear8bitLt` for int8, where bitsandbytes is; else a `PackedLinear`."""
    if bnb is None or weight.format != "int8":
        return PackedLinear(weight, dtype=dtype)
    N, K = weight.weight.shape
    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, device="meta")
    scales = {"CB": weight.weight, "SCB": weight.absmax}
    layer.weight = bnb.nn.Int8Params(weight.weight, requires_grad=False, **scales)
    return layer


def linear4bit(operands: Operands, dtype: torch.dtype) -> nn.Linear:
    """A view of the packed weight, with the state that a model loaded in `dtype` has."""
    assert isinstance(operands.packed, Tensor), "the operands are not in 4 bits of bitsandbytes"
    N, K = operands.dense.shape
    return nf4_linear(operands.packed, K, N, dtype)


def nf4_linear(packed: Tensor, K: int, N: int, dtype: torch.dtype, bias: Tensor | None = None) -> nn.Linear:
    """A layer on `pack(weight)`: a `Linear4bit`; without bitsandbytes an `nn.Linear` only ours runs."""
    state = copy.copy(packed.quant_state)
    state.dtype = dtype
    if bnb is None:
        layer = nn.Linear(K, N, bias=False, device="meta")
        layer.weight = nn.Parameter(packed.data, requires_grad=False)
        layer.weight.quant_state = state
    else:
        kind = state.quant_type
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type=kind, device="meta")
        layer.weight = bnb.nn.Params4bit(packed.data, quant_state=state, quant_type=kind, bnb_quantized=True)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def pack(weight: Tensor, format: str = "nf4", nested: bool = True) -> Tensor:
    """A weight [N, K] in 4 bits on its device, with a `quant_state`; by bitsandbytes if installed.

    Raises:
        ValueError: without bitsandbytes, another layout than nested NF4.
    """
    if bnb is None:
        if (format, nested) != ("nf4", True):
            raise ValueError(f"format: expected nested nf4 without bitsandbytes, got {format}, {nested=}")
        return _pack_alone(weight)
    options = {"requires_grad": False, "quant_type": format, "compress_statistics": nested}
    return bnb.nn.Params4bit(weight.detach(), **options).to(weight.device)


def _pack_alone(weight: Tensor) -> Tensor:
    """The same layout from PyTorch alone: scales in 8 bits of a linear code, so not bitsandbytes' own bytes.

    N·K is divisible by 64.
    """
    code = code_table("nf4", weight.device)
    blocks = weight.detach().float().view(-1, 64)
    scales = blocks.abs().amax(1)
    offset, levels = scales.mean(), torch.linspace(-1, 1, 256, device=weight.device)
    groups = F.pad(scales - offset, (0, -len(scales) % 256)).view(-1, 256)
    group_scales = groups.abs().amax(1).clamp(min=2.0**-126)
    small = ((groups / group_scales[:, None] + 1) * 127.5).round().to(torch.uint8)
    rounded = (levels[small.int()] * group_scales[:, None] + offset).view(-1)[: len(scales), None]
    nibbles = torch.bucketize(blocks / rounded, (code[1:] + code[:-1]) / 2).to(torch.uint8).view(-1, 2)
    packed = nn.Parameter(nibbles[:, :1] << 4 | nibbles[:, 1:], requires_grad=False)
    packed.quant_state = types.SimpleNamespace(
        absmax=small.view(-1)[: len(scales)].contiguous(), code=code, quant_type="nf4", blocksize=64,
        shape=weight.shape, offset=offset, dtype=weight.dtype,
        state2=types.SimpleNamespace(absmax=group_scales, code=levels, blocksize=256),
    )  # fmt: skip
    return packed


def to_nf4(model: nn.Module, keep: Collection[str] = ()) -> None:
    """Packs the linear layers of a model in place, one after the other, but not those named in `keep`."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and name not in keep:
                N, K = linear.weight.shape
                new = nf4_linear(pack(linear.weight), K, N, linear.weight.dtype, linear.bias)
                setattr(parent, name, new)


def make_step(provider: Provider, layer: nn.Module, shape: Shape, M: int) -> Step:
    """`layer` on the inputs of (M, dtype), which are the same for all providers."""
    generator = torch.Generator().manual_seed(M)
    x, grad = (torch.randn(M, width, generator=generator) for width in (shape.K, shape.N))
    x, grad = (t.to(shape.device, DTYPES[provider.dtype]) for t in (x, grad))
    return Step(layer, x.requires_grad_(), grad)


# --------------------------------------------------------------------------------------------------- results


def results(method: str) -> tuple[str, ...]:
    """What a step of a method computes: the output, and the gradients of X and of what it trains."""
    return ("y", "dX", *METHODS[method].trained)


def exact_weight(operands: Operands, dtype: torch.dtype = torch.float32) -> Tensor:
    """The decoded weight [N, K] in fp64; of a dense one, its values in `dtype`."""
    return from_linear(base_linear(operands, dtype)).decode(torch.float64)


def by_reference(
    method: str,
    step: Step,
    operands: Operands,
    weight: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> dict[str, Tensor]:
    """The definition in the dtype of `weight` [N, K]: all in fp64, or with fp32 adapters, norms and sums.

    The gradients of the op's operands are those of `reference`, autograd takes them on to what is trained.

    `mask` is that of the op `dropout_mask`, for the probability `dropout`.
    """
    dtype, row = weight.dtype, METHODS[method]
    acc = reference.accumulation_dtype(dtype)
    x, grad = step.x.detach().to(dtype).requires_grad_(), step.grad.to(dtype)
    tensors = {name: t.detach().to(acc) for name, t in zip(Operands._fields[2:], operands[2:], strict=True)}
    trained = [tensors[name].requires_grad_() for name in row.trained.values()]
    terms = row.terms(x, weight, tensors)
    N, K = weight.shape
    A = x.new_empty(0, K, dtype=acc) if terms.lora_A is None else terms.lora_A
    B = x.new_empty(N, 0, dtype=acc) if terms.lora_B is None else terms.lora_B
    given, scale, s, dense = terms.x, terms.out_scale, terms.scaling, from_dense(weight)
    parts = (given, A, B, None, scale)
    needs = reference.Needs(*(part is not None and part.requires_grad for part in parts))
    with torch.no_grad():
        y, z = reference.lora_linear(given, dense, None, A, B, mask, scale, s, dropout)
        grads = reference.lora_linear_backward(
            grad, given, dense, A, B, z, mask, scale, None, y, s, dropout, needs
        )
    chained = [(part, of) for part, of, needed in zip(parts, grads, needs, strict=True) if needed]
    outputs, cotangents = zip(*chained, strict=True)
    values = torch.autograd.grad(outputs, (x, *trained), cotangents)
    return dict(zip(results(method), (y, *values), strict=True))


def by_layer(method: str, step: Step) -> dict[str, Tensor]:
    """The same of an adapted layer, whose trained parameters are in the order of its row in METHODS."""
    y = step.run().detach()
    grads = [parameter.grad for parameter in step.layer.parameters() if parameter.requires_grad]
    return dict(zip(results(method), (y, step.x.grad, *grads), strict=True))
