"""Layers of every method for the tests, their equations in plain PyTorch, and the comparison of the two."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import torch
from cases import device_of
from tolerances import assert_as_exact
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast import AdapterLinear, formats

K, N = 64, 48
DTYPES = (torch.float32, torch.bfloat16)

# method, options: each method and each branch of its equation, at ranks large enough for the error of a
# vector of that size not to be chance.
CASES = [
    ("vera", {"r": 16}),
    ("s2lora", {"r": 16, "lora_alpha": 24}),
    ("kadaptation", {"n": 4, "terms": 3, "scaling": 0.5}),
    ("ia3", {}),
    ("ia3", {"feedforward": True}),
    ("ssf", {}),
    ("bitfit", {}),
    ("parallel", {"r": 16, "act": "relu", "scaling": 4}),
    ("parallel", {"r": 16, "act": "silu", "bias": "none"}),
    ("series", {"r": 64, "act": "gelu"}),
    ("series", {"r": 64, "act": "tanh", "bias": "down", "scaling": 0.5}),
]


def make_base(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    if kind == "dense":
        return nn.Linear(K, N, bias=bias, dtype=dtype)
    return bnb.nn.Linear4bit(K, N, bias=bias, quant_type=kind, compute_dtype=dtype).to("cpu").to(dtype)


def moved(layer: AdapterLinear) -> AdapterLinear:
    """The layer away from its initialisation, where some gradients are zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
        if layer.method == "s2lora":
            layer.s2_lambda[0] = 0.05  # below the threshold
    return layer


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def cut(layer: AdapterLinear) -> dict[str, Tensor]:
    """The leading part of the shared factors that a layer uses."""
    tensors = {**dict(layer.shared.named_parameters()), **dict(layer.shared.named_buffers())}
    sizes = {"A": (slice(None), slice(layer.in_features)), "B": (slice(layer.out_features),)}
    return {name: t if name == "kron_A" else t[sizes[name[-1]]] for name, t in tensors.items()}


def equation(layer: AdapterLinear, x: Tensor, p: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The paper's equation: the base in the dtype of x, what is added in `dtype`, as PEFT does it."""
    o, base = layer.options, layer.base_layer
    W = formats.from_linear(base).decode(x.dtype)
    b = None if base.bias is None else base.bias.detach().to(x.dtype)
    y, h = F.linear(x, W, b), x.to(dtype)
    match layer.method:
        case "vera":
            factors = cut(layer)
            A, B = factors["vera_A"].to(dtype), factors["vera_B"].to(dtype)
            y = y + p["vera_lambda_b"] * (p["vera_lambda_d"] * (h @ A.t()) @ B.t())
        case "s2lora":
            raw, A, B = p["s2_lambda"], p["shared.s2_A"], p["shared.s2_B"]
            sparse = raw.sign() * (raw.abs() - o["threshold"]).clamp(min=0)
            y = y + o["lora_alpha"] / o["r"] * (h @ A.t() @ torch.diag(sparse) @ B.t())
        case "kadaptation":
            terms = zip(p["shared.kron_A"], p["kron_u"], p["kron_v"], strict=True)
            y = y + o["scaling"] * h @ sum(torch.kron(A, torch.outer(u, v)) for A, u, v in terms).t()
        case "ia3" if o["feedforward"]:
            y = F.linear((h * p["ia3_l"].flatten()).to(x.dtype), W, b)
        case "ia3":
            y = y * p["ia3_l"].flatten()
        case "ssf":
            y = y * p["ssf_scale"] + p["ssf_shift"]
        case "bitfit":
            y = F.linear(x, W) + (p["bias_shift"] if b is None else b + p["bias_shift"])
        case "parallel" | "series":
            act = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "silu": F.silu}[o["act"]]
            h = h if layer.method == "parallel" else y.to(dtype)
            z = h @ p["down"].t() + p.get("down_bias", 0)
            y = y + o["scaling"] * (act(z) @ p["up"].t() + p.get("up_bias", 0))
    return y.to(x.dtype)


def gradients(forward, x: Tensor, p: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Output and the gradient of x and of each parameter, on the CPU."""
    y = forward(x, p)
    found = torch.autograd.grad(y, [x, *p.values()], grad.to(y))
    named = zip(("y", "dx", *(f"d{name}" for name in p)), (y.detach(), *found), strict=True)
    return {name: tensor.cpu() for name, tensor in named}


def check(layer: AdapterLinear, dtype: torch.dtype, backend: str = "auto") -> None:
    """Output and every gradient are as exact as the equation in plain PyTorch."""
    x, grad = torch.randn(2, 19, K, dtype=dtype), torch.randn(2, 19, N, dtype=dtype)

    def plain(to: torch.dtype | None):
        leaves = {n: t.detach().to(to or t.dtype).requires_grad_() for n, t in trained(layer).items()}
        x_leaf = x.to(to or dtype).requires_grad_()
        return gradients(lambda x, p: equation(layer, x, p, to or torch.float32), x_leaf, leaves, grad)

    expected, truth = plain(None), plain(torch.float64)
    there = copy.deepcopy(layer).to(device_of(backend))
    there.backend = backend
    x_there = x.to(device_of(backend)).requires_grad_()
    got = gradients(lambda x, _: there(x), x_there, trained(there), grad)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_as_exact(f"{layer.method} {name}", got[name], expected[name], truth[name])
