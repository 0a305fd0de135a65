"""Training beside the stock implementation, from the same start: the same loss at every step, to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from method_cases import CASES, equation, trained
from peft import IA3Config, VeraConfig, get_peft_model
from peft_models import HIDDEN, KINDS, WIDTH, Net, accelerated, lora_config, to_kind, unpacked
from torch import Tensor, nn

from peft_fast import AdapterLinear, LoReFTConfig, LoReFTLinear, SharedFactors
from peft_fast.orthonormal import OrthonormalRows, dense_base

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the relative difference of the losses, at every step."""
STEPS, SHORT = 200, 40
RATES = {"lora": 3e-3, "rslora": 1e-3, "dora": 3e-3, "loreft": 3e-3, "vera": 3e-2, "s2lora": 1e-3}
"""Learning rates, 1e-2 for others: at larger ones two runs of the stock model drift apart, too, when one of
them starts a rounding away."""
LEARNS = 0.99
"""The last loss of the first batch is below this part of its first."""
BATCHES = 4


class Pair(NamedTuple):
    """Two models with equal parameters."""

    stock: nn.Module
    ours: nn.Module


def stack(kind: str, dtype: torch.dtype) -> nn.Module:
    """Two blocks of two linear layers."""
    return to_kind(nn.Sequential(Net(), Net()), kind, dtype)


def with_fp32_adapters(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return unpacked(model)


def adapted(base: nn.Module, config) -> nn.Module:
    return with_fp32_adapters(get_peft_model(base, config, autocast_adapter_dtype=False))


def replace_linears(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy with each base layer, of PEFT's layers too, in `wrap`; dtypes and bits as they are."""
    model = copy.deepcopy(model)
    for block in model:
        for name in ("up", "down"):
            layer = getattr(block, name)
            setattr(block, name, wrap(getattr(layer, "base_layer", layer)))
    return model


# ------------------------------------------------------------------------------------------------ the pairs


def peft_lora(kind: str, dtype: torch.dtype, dropout: float, **options) -> Pair:
    config = lora_config(init_lora_weights=True, lora_dropout=dropout, **options)
    stock = adapted(stack(kind, dtype), config)
    return Pair(stock, accelerated(stock))


def peft_vera(kind: str, dtype: torch.dtype, dropout: float) -> Pair:
    options = {"r": 6, "projection_prng_key": 3}
    config = VeraConfig(target_modules=["up", "down"], vera_dropout=dropout, **options)
    stock = adapted(stack(kind, dtype), config)
    shared = SharedFactors("vera", HIDDEN, HIDDEN, **options)
    for name in ("vera_A", "vera_B"):  # PEFT rounds them to the dtype of the model
        getattr(stock.base_model, name)["default"] = getattr(shared, name)
    more = {**options, "dropout": dropout}
    ours = replace_linears(
        stock.base_model.model, lambda base: AdapterLinear.from_linear(base, "vera", shared=shared, **more)
    )
    return Pair(stock, ours)


def peft_ia3(kind: str, dtype: torch.dtype, dropout: float) -> Pair:
    config = IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    stock = adapted(stack(kind, dtype), config)
    ours = replace_linears(
        stock.base_model.model,
        lambda base: AdapterLinear.from_linear(base, "ia3", feedforward=base.out_features == WIDTH),
    )
    return Pair(stock, ours)


class Equation(nn.Module):
    """A layer's equation in plain PyTorch, over parameters of its own."""

    def __init__(self, layer: AdapterLinear) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        return equation(self.layer, x, trained(self.layer), torch.float32)


def written_out(kind: str, dtype: torch.dtype, dropout: float, *, method: str, options: dict) -> Pair:
    ours = replace_linears(
        stack(kind, dtype), lambda base: AdapterLinear.from_linear(base, method, **options)
    )
    stock = copy.deepcopy(ours)
    for block in stock:
        block.up, block.down = Equation(block.up), Equation(block.down)
    return Pair(stock, ours)


class Edited(nn.Module):
    """A layer, and pyreft's intervention on its output."""

    def __init__(self, base: nn.Module, intervention: nn.Module) -> None:
        super().__init__()
        self.base, self.intervention = base.requires_grad_(False), intervention

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        return self.intervention(h.float()).to(h.dtype)


def pyreft_loreft(kind: str, dtype: torch.dtype, dropout: float, *, pyreft) -> Pair:
    config = LoReFTConfig(r=4, dropout=dropout, dropout_on="state")

    def edit(base: nn.Module) -> nn.Module:
        return LoReFTLinear.from_linear(base, config)

    def intervene(layer: nn.Module) -> nn.Module:
        """The same start in pyreft's parametrization, bases included."""
        options = {"embed_dim": layer.out_features, "low_rank_dimension": 4, "dropout": dropout}
        theirs = pyreft.interventions.LoreftIntervention(
            **options, dtype=torch.float32, add_bias=False
        ).float()
        own = layer.edit
        own.basis = OrthonormalRows.from_rows(theirs.rotate_layer.weight.detach().mT)
        theirs.rotate_layer.parametrizations.weight[0].base.copy_(
            dense_base(own.basis.base, own.basis.base_sign)
        )
        with torch.no_grad():
            own.source.copy_(theirs.learned_source.weight)
            own.bias.copy_(theirs.learned_source.bias)
        return Edited(unpacked(copy.deepcopy(layer.base_layer)), theirs)

    ours = replace_linears(stack(kind, dtype), edit)
    stock = copy.deepcopy(ours)
    for block, twin in zip(ours, stock, strict=True):
        twin.up, twin.down = intervene(block.up), intervene(block.down)
    return Pair(stock, ours)


PEERS: dict[str, Callable[..., Pair]] = {
    "lora": peft_lora,
    "rslora": lambda *args: peft_lora(*args, use_rslora=True),
    "dora": lambda *args: peft_lora(*args, use_dora=True),
    "vera": peft_vera,
    "ia3": peft_ia3,
}
WITHOUT_DROPOUT = ("ia3",)
RUNS = [
    (name, dropout) for name in PEERS for dropout in (0.0, 0.1) if not (dropout and name in WITHOUT_DROPOUT)
]


# ------------------------------------------------------------------------------------------------- training


def losses(model: nn.Module, lr: float, steps: int, dtype: torch.dtype) -> list[float]:
    """Of Adam steps towards the outputs of another model, with the same batches and masks for everyone."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES, 3, 9, WIDTH, generator=generator).to(dtype)
    target = x.float() + torch.sin(3.0 * x.float().flip(-1))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = (model(x[step % BATCHES]).float() - target[step % BATCHES]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def worst(pair: Pair, method: str, steps: int, dtype: torch.dtype) -> float:
    """The largest relative difference of the losses of a step."""
    stock, ours = (losses(model, RATES.get(method, 1e-2), steps, dtype) for model in pair)
    for found in (stock, ours):
        assert found[-BATCHES] < LEARNS * found[0], f"it does not learn: {found[0]} to {found[-BATCHES]}"
    return max(abs(a - b) / a for a, b in zip(stock, ours, strict=True))


def check(pair: Pair, method: str, steps: int, dtype: torch.dtype) -> None:
    difference = worst(pair, method, steps, dtype)
    print(f"largest difference of a loss: {difference:.1e}")  # pytest -rP shows it
    assert difference <= TOLERANCE[dtype], f"losses differ by {difference:.1e}"


dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_forty_steps_beside_peft(name):
    check(PEERS[name]("nf4", torch.float32, 0.1), name, SHORT, torch.float32)


@pytest.mark.endurance
@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "dropout"), RUNS)
def test_beside_peft(name, dropout, kind, dtype):
    check(PEERS[name](kind, dtype, dropout), name, STEPS, dtype)


def test_forty_steps_beside_pyreft(pyreft):
    pair = pyreft_loreft("nf4", torch.float32, 0.1, pyreft=pyreft)
    check(pair, "loreft", SHORT, torch.float32)


@pytest.mark.endurance
@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_beside_pyreft(pyreft, kind, dtype, dropout):
    check(pyreft_loreft(kind, dtype, dropout, pyreft=pyreft), "loreft", STEPS, dtype)


@pytest.mark.parametrize("method", ["parallel", "kadaptation"])
def test_forty_steps_beside_the_equation(method):
    options = next(options for name, options in CASES if name == method)
    pair = written_out("nf4", torch.float32, 0.0, method=method, options=options)
    check(pair, method, SHORT, torch.float32)


@pytest.mark.endurance
@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_beside_the_equation(method, options, kind, dtype):
    check(written_out(kind, dtype, 0.0, method=method, options=options), method, STEPS, dtype)
