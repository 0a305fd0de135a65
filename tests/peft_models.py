"""Small PEFT models for the swap tests: stock, accelerated, and the same in fp64 as the truth."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import torch
from peft import IA3Config, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from peft.tuners.ia3 import bnb as ia3_bnb
from peft.tuners.ia3 import layer as ia3_layer
from peft.tuners.lora.layer import LoraLayer
from tolerances import assert_as_exact
from torch import nn
from transformers import BertConfig, BertModel

from peft_fast import accelerate, backends
from peft_fast.formats import from_linear
from peft_fast.peft_layers import PEFT_LAYERS

KINDS = ("dense", "nf4")

# Multiples of the block size: for other widths bitsandbytes' compiled CPU decode reads wrong scales.
WIDTH, HIDDEN = 64, 128


class Net(nn.Module):
    """x + down(silu(up(x))), x [..., WIDTH]; smooth, so that a rounding moves a gradient by a rounding."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(x)))


def to_kind(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`model` in `dtype`, its linear layers in "nf4", nested, in "nf4-flat", not nested, or in "int8"."""
    model = model.to(dtype)
    if kind != "dense":
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    packed = to_8bit(child) if kind == "int8" else to_4bit(child, nested=kind == "nf4")
                    setattr(parent, name, packed)
        setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return model.requires_grad_(False)


def to_4bit(linear: nn.Linear, nested: bool = True) -> bnb.nn.Linear4bit:
    dtype = linear.weight.dtype
    new = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=nested,
        quant_type="nf4",
    )
    new.load_state_dict(linear.state_dict())
    new = new.to(dtype).to("cpu")  # the move quantizes
    assert new.weight.quant_state is not None
    return new


def to_8bit(linear: nn.Linear) -> bnb.nn.Linear8bitLt:
    new = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    new.load_state_dict(linear.state_dict())
    new = new.to(linear.weight.dtype).to("cpu")  # the move quantizes
    assert new.weight.dtype is torch.int8
    return new


def lora_config(targets=("up", "down"), **options) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, **options}
    return LoraConfig(target_modules=list(targets), **options)


def stock_net(kind: str, dtype=torch.float32, *, adapter_dtype=None, **options) -> nn.Module:
    """`Net` under PEFT's own LoRA, safe from bitsandbytes' repacking."""
    model = get_peft_model(to_kind(Net(), kind, dtype), lora_config(**options), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or torch.float32)
    return unpacked(model)


def dora_net(kind: str, dtype=torch.float32, **options) -> nn.Module:
    """`stock_net` under PEFT's DoRA, its magnitudes away from the norms."""
    model = stock_net(kind, dtype, use_dora=True, **options)
    for layer in lora_layers(model):
        rescale(layer)
    return model


def vector_config(method: str, targets=("up", "down"), **options) -> PeftConfig:
    """Of VeRA or IA3, with those of LoRA's options that they have; IA3 is on the input of `down`."""
    if method == "ia3":
        return IA3Config(
            target_modules=list(targets), feedforward_modules=[t for t in targets if t == "down"]
        )
    kept = {"vera_dropout": options.get("lora_dropout", 0.0), "bias": options.get("bias", "none")}
    return VeraConfig(target_modules=list(targets), r=16, projection_prng_key=7, **kept)


def vector_net(kind: str, method: str, dtype=torch.float32, *, adapter_dtype=None, **options) -> nn.Module:
    """`Net` under PEFT's VeRA or IA3, its vectors moved, safe from bitsandbytes' repacking."""
    model = get_peft_model(to_kind(Net(), kind, dtype), vector_config(method, **options))
    move_vectors(model)
    for layer in adapted_layers(model):
        for name in layer.adapter_layer_names:
            for vector in getattr(layer, name).values():
                vector.data = vector.data.to(adapter_dtype or torch.float32)
    for name in ("vera_A", "vera_B") if method == "vera" else ():
        shared = getattr(model.base_model, name)
        shared["default"] = shared["default"].to(adapter_dtype or torch.float32)
    return unpacked(model)


def move_vectors(model: nn.Module, adapter: str = "default") -> None:
    """VeRA's and IA3's away from their initialisation, where layers equal their bases."""
    for layer in adapted_layers(model):
        for name in layer.adapter_layer_names:
            if name.startswith(("vera_lambda", "ia3")) and adapter in getattr(layer, name):
                getattr(layer, name)[adapter].data += torch.rand_like(getattr(layer, name)[adapter]) - 0.5


def rescale(layer: LoraLayer, adapter: str = "default") -> None:
    magnitude = layer.lora_magnitude_vector[adapter].weight
    magnitude.data *= torch.rand_like(magnitude) + 0.5


def unpacked(model: nn.Module) -> nn.Module:
    """Keeps bitsandbytes from repacking 4-bit weights in place at an eval forward on this CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def tiny_bert(**options) -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32, **options,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapted_layers(model: nn.Module) -> list:
    """Those that `accelerate` looks at: of PEFT's LoRA, VeRA and IA3."""
    return [module for module in model.modules() if isinstance(module, PEFT_LAYERS)]


def accelerated(stock: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(stock)
    accelerate(model, strict=True, **options)
    return model


def truth_of(stock: nn.Module) -> nn.Module:
    """PEFT's own forward with everything in fp64, each base weight at its exact value."""
    return decoded(stock, torch.float64).double()


def decoded(stock: nn.Module, dtype: torch.dtype) -> nn.Module:
    """PEFT's own forward over dense base layers in `dtype`."""
    model = copy.deepcopy(stock)
    for layer in adapted_layers(model):
        base = layer.base_layer
        exact = nn.Linear(base.in_features, base.out_features, base.bias is not None)
        exact.weight = nn.Parameter(from_linear(base).decode(dtype), requires_grad=False)
        if base.bias is not None:
            exact.bias = nn.Parameter(base.bias.data.to(dtype), requires_grad=base.bias.requires_grad)
        layer.base_layer = exact
        if type(layer) in (ia3_bnb.Linear4bit, ia3_bnb.Linear8bitLt):  # whose forward computes in float32
            layer.__class__ = ia3_layer.Linear
    return model


def fused_calls() -> int:
    return sum(count for (op, _), count in backends.calls.items() if op == "lora_linear")


def run(
    model: nn.Module, x: torch.Tensor, seed: int = 1, *, frozen_input: bool = False
) -> dict[str, torch.Tensor]:
    """Output, dX and the gradient of each parameter that requires one, for a non-uniform grad_output."""
    x = x.detach().requires_grad_(not frozen_input)
    torch.manual_seed(seed)
    y = model(x)
    torch.manual_seed(seed + 1)
    # Drawn in fp32 and rounded to half, so that every dtype sees the same values.
    grad = torch.randn(y.shape).bfloat16().to(y.dtype)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not frozen_input:
        leaves["dx"] = x
    grads = torch.autograd.grad(y, list(leaves.values()), grad, allow_unused=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same_model(
    stock: nn.Module,
    fast: nn.Module,
    x: torch.Tensor,
    *,
    calls: int | None = None,
    autocast: bool = False,
    peer: nn.Module | None = None,
    **kwargs,
) -> None:
    """Output and every gradient of `fast` are as exact as those of `stock`, under the same dropout masks.

    Args:
        stock, fast: PEFT's model, and the accelerated one in the same state.
        x: [..., WIDTH].
        calls: how many fused forward calls `fast` has to make; not checked when None.
        autocast: run `stock` and `fast` inside bfloat16 autocast.
        peer: what `fast` has to be as exact as, where that is not `stock`.
    """
    truth = run(truth_of(stock), x.double(), **kwargs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = run(peer or stock, x, **kwargs)
        before = fused_calls()
        got = run(fast, x, **kwargs)
    assert calls is None or fused_calls() - before == calls
    assert got.keys() == plain.keys() == truth.keys()
    for name, value in truth.items():
        if value is None:
            assert got[name] is None, name
            assert plain[name] is None, name
        else:
            assert_as_exact(name, got[name], plain[name], value)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random activations [*shape, WIDTH]; [3, 5, WIDTH] for no shape."""
    return torch.randn(*(shape or (3, 5)), WIDTH).to(dtype)


def one_layer(kind: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """An accelerated LoRA layer [HIDDEN, WIDTH] alone."""
    return lora_layers(accelerated(stock_net(kind, dtype, **options)))[0]


def repacking(model: nn.Module) -> nn.Module:
    """Lets bitsandbytes repack, as it does by default on a CPU with AVX512_BF16."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    return model
