"""One small model of every method, [..., WIDTH] in, and what of a model nothing may ever change: its base."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import torch
from bitsandbytes.functional import QuantState
from method_cases import CASES, moved
from peft_models import WIDTH, Net, accelerated, dora_net, inputs, stock_net, to_kind
from reft_models import WIDTH as REFT_WIDTH
from reft_models import tiny_llama
from torch import Tensor, nn

from peft_fast import AdapterLinear, DoRALinear, LoRALinear, LoReFTConfig, LoReFTLinear, get_reft_model
from peft_fast.methods import METHODS

DROPOUT = 0.2


def wrapped(kind: str, wrap: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float32) -> Net:
    """`Net` in a `kind`, each linear layer in `wrap`, and what is trained away from its start."""
    net = to_kind(Net(), kind, dtype)
    net.up, net.down = wrap(net.up), wrap(net.down)
    return disturb(net)


def disturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class OfStates(nn.Module):
    """A language model's logits of states [B, S, WIDTH], each cut into two that are as wide as its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x.reshape(x.shape[0], -1, REFT_WIDTH)).logits


def reft_model(kind: str) -> nn.Module:
    config = LoReFTConfig(r=4, positions="f2+l2", dropout=DROPOUT)
    llama = to_kind(tiny_llama(), kind)
    llama.is_loaded_in_4bit = False
    return disturb(OfStates(get_reft_model(llama, config)))


def adapter_layers(kind: str, method: str, options: dict) -> nn.Module:
    dropout = {"dropout": DROPOUT} if "dropout" in METHODS[method].options else {}
    return wrapped(
        kind, lambda base: moved(AdapterLinear.from_linear(base, method, **{**options, **dropout}))
    )


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "peft-lora": lambda kind: accelerated(stock_net(kind, lora_dropout=DROPOUT)),
    "peft-dora": lambda kind: accelerated(dora_net(kind, lora_dropout=DROPOUT)),
    "lora": functools.partial(wrapped, wrap=lambda b: LoRALinear.from_linear(b, r=4, lora_dropout=DROPOUT)),
    "dora": functools.partial(wrapped, wrap=lambda b: DoRALinear.from_linear(b, r=4, lora_dropout=DROPOUT)),
    "loreft-linear": functools.partial(
        wrapped, wrap=lambda b: LoReFTLinear.from_linear(b, LoReFTConfig(r=4, dropout=DROPOUT))
    ),
    "loreft-model": reft_model,
    **{
        method: functools.partial(adapter_layers, method=method, options=options)
        for method, options in {name: case for name, case in CASES if case != {"feedforward": True}}.items()
    },
}
"""By method, from a kind of `peft_models.KINDS`."""


def model_inputs(rows: int = 15) -> Tensor:
    """[3, rows / 3, WIDTH], or [1, rows, WIDTH] where three do not divide."""
    batch = 3 if rows % 3 == 0 else 1
    return inputs(batch, rows // batch)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that is not trained: packed or dense weights, their statistics, biases, buffers."""
    found = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    found |= dict(model.named_buffers())
    for name, parameter in list(found.items()):
        state = getattr(parameter, "quant_state", None)
        while isinstance(state, QuantState):
            name += ".state"
            tensors = {key: value for key, value in vars(state).items() if isinstance(value, Tensor)}
            assert {"absmax", "code"} <= tensors.keys()
            found |= {f"{name}.{key}": value for key, value in tensors.items()}
            state = state.state2
    return found


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of each tensor's dtype, shape and bytes."""
    return {name: f"{t.dtype} {list(t.shape)} {hash_of(t)}" for name, t in tensors.items()}


def hash_of(t: Tensor) -> str:
    return hashlib.sha256(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Every layer on one backend."""
    changed = [m for m in model.modules() if "backend" in vars(m)]
    assert changed
    for module in changed:
        module.backend = backend
    return model


assert WIDTH == 2 * REFT_WIDTH
