"""Models with LoRA over every kind of base, and their parts, for the tests of initializations."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from peft_models import lora_layers, unpacked
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_fast import LoRALinear, accelerate
from peft_fast.formats import from_linear

METHODS = [("pissa", None), ("pissa", 4), ("olora", None)]
OPTIONS = {"r": 4, "lora_alpha": 12, "target_modules": ["up", "down"]}


def spectral(module: nn.Module) -> nn.Module:
    """Weights whose singular values fall as those of trained ones do."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | Conv1D):
            U, S, Vh = torch.linalg.svd(torch.randn_like(layer.weight), full_matrices=False)
            layer.weight.data = U * (S / torch.arange(1, len(S) + 1)) @ Vh
    return module


def packed(layer: nn.Linear, quant: str, nested: bool, blocksize: int, storage=torch.uint8) -> nn.Linear:
    dtype = layer.weight.dtype
    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, compute_dtype=dtype, quant_type=quant, quant_storage=storage
    )
    new.weight = bnb.nn.Params4bit(
        layer.weight.data.clone(),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=quant,
        quant_storage=storage,
        module=new,
    )
    new.bias = layer.bias
    return unpacked(new.to("cpu"))


BASES = {
    "fp32": lambda layer: layer,
    "bf16": lambda layer: layer.to(torch.bfloat16),
    "nf4": lambda layer: packed(layer, "nf4", True, 64),
    "nf4-bf16": lambda layer: packed(layer.to(torch.bfloat16), "nf4", True, 64, torch.bfloat16),
    "nf4-plain-128": lambda layer: packed(layer, "nf4", False, 128),
    "fp4": lambda layer: packed(layer, "fp4", True, 256),
}


def adapted(net: nn.Module, owner: str, **options) -> nn.Module:
    """`net` with LoRA on up and down: PEFT's layers, stock or accelerated, or our own."""
    if owner == "ours":
        for name in ("up", "down"):
            setattr(net, name, LoRALinear.from_linear(getattr(net, name), r=4, lora_alpha=12, **options))
        return net
    net.is_loaded_in_4bit = isinstance(net.up, bnb.nn.Linear4bit)
    model = get_peft_model(net, LoraConfig(**{**OPTIONS, **options}))
    if owner == "accelerated":
        accelerate(model, strict=True)
    return model


def parts(model: nn.Module) -> list[tuple[nn.Module, torch.Tensor, torch.Tensor, float]]:
    """(base, A, B, s) of each layer."""
    ours = [m for m in model.modules() if isinstance(m, LoRALinear)]
    return [(m.base_layer, m.lora_A, m.lora_B, m.scaling) for m in ours] + [
        (m.base_layer, m.lora_A.default.weight, m.lora_B.default.weight, m.scaling["default"])
        for m in lora_layers(model)
    ]


def stored(base: nn.Module) -> torch.Tensor:
    return from_linear(base).decode(torch.float64)


def effective(model: nn.Module) -> list[torch.Tensor]:
    """Ŵ + s·B·A of each layer, in fp64."""
    return [stored(base) + s * B.detach().double() @ A.detach().double() for base, A, B, s in parts(model)]
