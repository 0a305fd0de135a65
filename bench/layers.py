"""The layers that bench/lora_linear.py times, all made of the same operands, and what they must compute.

`dense` is a frozen `nn.Linear`, `peft` PEFT's layer on a bitsandbytes `Linear4bit`, `ours` a `LoRALinear` or
`DoRALinear` over the same nested NF4 bytes; adapters are equal, in fp32, without bias and dropout.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import bitsandbytes as bnb
import peft
import torch
from measure import Step
from torch import Tensor, nn

from peft_fast import reference
from peft_fast.formats import from_dense, from_linear
from peft_fast.modules import DoRALinear, LoRALinear

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
METHODS = {"lora": LoRALinear, "dora": DoRALinear}
SCALING = 2.0


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
    """What every layer is made of: W [N, K] fp32, its NF4, A [R, K], B [N, R] and magnitude [N] fp32."""

    dense: Tensor
    packed: bnb.nn.Params4bit
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor


def make_operands(shape: Shape) -> Operands:
    """The same random operands at every call; the magnitude is not the norm of any weight."""
    K, N, R, device = shape
    generator = torch.Generator().manual_seed(0)
    dense = (torch.randn(N, K, generator=generator) / K**0.5).to(device)
    packed = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", compress_statistics=True)
    lora_A = torch.randn(R, K, generator=generator) / K**0.5
    lora_B = torch.randn(N, R, generator=generator) / R**0.5
    magnitude = 0.5 + torch.rand(N, generator=generator)
    return Operands(dense, packed.to(device), *(t.to(device) for t in (lora_A, lora_B, magnitude)))


def make_layer(provider: Provider, operands: Operands) -> nn.Module:
    """The provider's layer; only the adapters are its own."""
    dtype = DTYPES[provider.dtype]
    if provider.kind == "dense":
        N, K = operands.dense.shape
        layer = nn.Linear(K, N, bias=False, device="meta")
        layer.weight = nn.Parameter(operands.dense.to(dtype), requires_grad=False)
        return layer
    base, R = linear4bit(operands, dtype), operands.lora_A.shape[0]
    dora = provider.method == "dora"
    trained: tuple[Any, ...]
    if provider.kind == "ours":
        make = METHODS[provider.method].from_linear
        layer = make(base, r=R, lora_alpha=SCALING * R, backend=provider.backend)
        trained = layer.lora_A, layer.lora_B, *([layer.magnitude] if dora else [])
    else:
        config = peft.LoraConfig(r=R, lora_alpha=SCALING * R, target_modules=["0"], use_dora=dora)
        layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
        trained = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        trained += (layer.lora_magnitude_vector["default"].weight,) if dora else ()
    for parameter, value in zip(trained, operands[2:], strict=False):
        parameter.data.copy_(value)
    return layer


def linear4bit(operands: Operands, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A view of the packed weight, with the state that a model loaded in `dtype` has."""
    N, K = operands.dense.shape
    state = copy.copy(operands.packed.quant_state)
    state.dtype = dtype
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(
        operands.packed.data, quant_state=state, quant_type="nf4", bnb_quantized=True
    )
    return layer


def to_nf4(model: nn.Module) -> None:
    """Replaces every linear layer of a model by a `Linear4bit` of its weights, nested NF4, in place."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                new = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, linear.bias is not None,
                    compute_dtype=linear.weight.dtype, quant_type="nf4",
                )  # fmt: skip
                new.load_state_dict(linear.state_dict())
                setattr(
                    parent, name, new.to(linear.weight.dtype).to(linear.weight.device).requires_grad_(False)
                )


def make_step(provider: Provider, layer: nn.Module, shape: Shape, M: int) -> Step:
    """`layer` on the inputs of (M, dtype), which are the same for all providers."""
    generator = torch.Generator().manual_seed(M)
    x, grad = (torch.randn(M, width, generator=generator) for width in (shape.K, shape.N))
    x, grad = (t.to(shape.device, DTYPES[provider.dtype]) for t in (x, grad))
    return Step(layer, x.requires_grad_(), grad)


# --------------------------------------------------------------------------------------------------- results


def results(method: str) -> tuple[str, ...]:
    """What a step of a method computes: the output, and the gradients of X, A, B and of the magnitude m."""
    return ("y", "dX", "dA", "dB", *(["dm"] if method == "dora" else []))


def exact_weight(operands: Operands) -> Tensor:
    """The decoded weight [N, K] in fp64."""
    return from_linear(linear4bit(operands, torch.float32)).decode(torch.float64)


def by_reference(method: str, step: Step, operands: Operands, weight: Tensor) -> dict[str, Tensor]:
    """The definition in the dtype of `weight` [N, K]: all in fp64, or with fp32 adapters, norms and sums."""
    dtype = weight.dtype
    acc = reference.accumulation_dtype(dtype)
    x, grad = step.x.detach().to(dtype), step.grad.to(dtype)
    A, B, m = (t.to(acc) for t in operands[2:])
    norm = scale = None
    if method == "dora":
        norm = torch.linalg.vector_norm(weight.to(acc) + SCALING * B @ A, dim=1)
        scale = m / norm
    dense = from_dense(weight)
    y, z = reference.lora_linear(x, dense, None, A, B, None, scale, SCALING, 0.0)
    needs = reference.Needs(x=True, lora_A=True, lora_B=True, bias=False, out_scale=norm is not None)
    grads = reference.lora_linear_backward(grad, x, dense, A, B, z, None, scale, None, y, SCALING, 0.0, needs)
    values = [y, grads.x, grads.lora_A, grads.lora_B]
    if norm is not None:
        values.append(grads.out_scale / norm)
    return dict(zip(results(method), values, strict=True))


def by_layer(method: str, step: Step) -> dict[str, Tensor]:
    """The same of a layer of ours."""
    y = step.run().detach()
    trained = (step.layer.lora_A, step.layer.lora_B, getattr(step.layer, "magnitude", None))
    grads = [parameter.grad for parameter in trained if parameter is not None]
    return dict(zip(results(method), (y, step.x.grad, *grads), strict=True))
