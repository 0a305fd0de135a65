"""What each method puts on the frozen layer: what it trains, its definition, our layer, PEFT's configuration.

The definition is in the terms of the fused op, Y = out_scale ⊙ (X'·Ŵᵀ + s·drop(X')·Aᵀ·Bᵀ), as differentiable
functions of the trained tensors and of X, and not by the library's own table of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_fast import AdapterLinear
from peft_fast.modules import DoRALinear, LoRALinear

SCALING = 2.0
LOW_RANK: dict[str, type[LoRALinear] | type[DoRALinear]] = {"lora": LoRALinear, "dora": DoRALinear}
"""Those that benchmarks outside of the suite time, and their layers."""

Tensors = Mapping[str, Tensor]


class Terms(NamedTuple):
    """X' [M, K], and in the dtype of the adapters A [R, K], B [N, R], out_scale [N]; None for nothing."""

    x: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    out_scale: Tensor | None = None
    scaling: float = 1.0


class Method(NamedTuple):
    """A row; names of tensors are those of the fields of `layers.Operands`.

    `trained` are they by the names of their gradients, in the order in which layers have them as parameters;
    `fixed` are those of buffers, by a part of their names.
    """

    trained: dict[str, str]
    terms: Callable[[Tensor, Tensor, Tensors], Terms]
    """From X [M, K], Ŵ [N, K] and the operands."""
    ours: Callable[[nn.Linear, int, float, str], nn.Module]
    """Our layer on a base, of a rank, a dropout and a backend."""
    peft: Callable[[int, float], Any]
    """PEFT's configuration for the layer "0", of a rank and a dropout."""
    fixed: dict[str, str] = {}  # noqa: RUF012, never written

    def fill(self, layer: nn.Module, operands: Any) -> None:
        """Gives a layer, ours or PEFT's, the adapters of the operands."""
        parameters = [p for p in layer.parameters() if p.requires_grad]
        for parameter, name in zip(parameters, self.trained.values(), strict=True):
            parameter.data.copy_(getattr(operands, name))
        for part, name in self.fixed.items():
            (buffer,) = (b for of, b in layer.named_buffers() if part in of)
            buffer.copy_(getattr(operands, name))


def _lora_terms(x: Tensor, weight: Tensor, t: Tensors) -> Terms:
    return Terms(x, t["lora_A"], t["lora_B"], scaling=SCALING)


def _dora_terms(x: Tensor, weight: Tensor, t: Tensors) -> Terms:
    A, B, m = (t[name].detach() for name in ("lora_A", "lora_B", "magnitude"))
    norm = torch.linalg.vector_norm(weight.to(m.dtype) + SCALING * B @ A, dim=1)
    return _lora_terms(x, weight, t)._replace(out_scale=t["magnitude"] / norm)


def _vera_terms(x: Tensor, weight: Tensor, t: Tensors) -> Terms:
    return Terms(x, t["lambda_d"][:, None] * t["lora_A"], t["lambda_b"][:, None] * t["lora_B"])


def _ia3_terms(x: Tensor, weight: Tensor, t: Tensors) -> Terms:
    return Terms(x, out_scale=t["gamma_out"].flatten())


def _ia3_in_terms(x: Tensor, weight: Tensor, t: Tensors) -> Terms:
    return Terms((x * t["gamma_in"]).to(x.dtype))


def _low_rank(method: str) -> Callable[[nn.Linear, int, float, str], nn.Module]:
    def ours(base: nn.Linear, R: int, dropout: float, backend: str) -> nn.Module:
        make = LOW_RANK[method].from_linear
        return make(base, r=R, lora_alpha=SCALING * R, lora_dropout=dropout, backend=backend)

    return ours


def _vera(base: nn.Linear, R: int, dropout: float, backend: str) -> nn.Module:
    return AdapterLinear.from_linear(base, "vera", r=R, dropout=dropout, backend=backend)


def _ia3(feedforward: bool) -> Callable[[nn.Linear, int, float, str], nn.Module]:
    def ours(base: nn.Linear, R: int, dropout: float, backend: str) -> nn.Module:
        return AdapterLinear.from_linear(base, "ia3", feedforward=feedforward, backend=backend)

    return ours


def _lora_config(dora: bool) -> Callable[[int, float], Any]:
    def config(R: int, dropout: float) -> Any:
        import peft

        alpha = SCALING * R
        return peft.LoraConfig(
            r=R, lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"], use_dora=dora
        )

    return config


def _vera_config(R: int, dropout: float) -> Any:
    import peft

    return peft.VeraConfig(r=R, vera_dropout=dropout, target_modules=["0"])


def _ia3_config(feedforward: bool) -> Callable[[int, float], Any]:
    def config(R: int, dropout: float) -> Any:
        import peft

        return peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])

    return config


_FACTORS = {"dA": "lora_A", "dB": "lora_B"}
METHODS = {
    "lora": Method(_FACTORS, _lora_terms, _low_rank("lora"), _lora_config(False)),
    "dora": Method({**_FACTORS, "dm": "magnitude"}, _dora_terms, _low_rank("dora"), _lora_config(True)),
    "vera": Method(
        {"db": "lambda_b", "dd": "lambda_d"},
        _vera_terms,
        _vera,
        _vera_config,
        {"vera_A": "lora_A", "vera_B": "lora_B"},
    ),
    "ia3": Method({"dgamma": "gamma_out"}, _ia3_terms, _ia3(False), _ia3_config(False)),
    "ia3-in": Method({"dgamma": "gamma_in"}, _ia3_in_terms, _ia3(True), _ia3_config(True)),
}
