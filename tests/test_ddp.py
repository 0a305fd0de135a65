"""Two processes under DistributedDataParallel train as one does: LoRA, DoRA with its kept norms, LoReFT."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from peft_models import to_4bit
from reft_models import WIDTH, tiny_llama
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from peft_fast import LoReFTConfig, get_reft_model
from peft_fast.modules import DoRALinear, LoRALinear

WORLD = 2
STEPS = 3
PER_PROCESS = 4


class Edited(nn.Module):
    """A transformer with edits on rows [M, 64], taken as two tokens each."""

    def __init__(self) -> None:
        super().__init__()
        config = LoReFTConfig(r=4, positions="f1+l1", share_weights=False)
        self.model = get_reft_model(tiny_llama().model, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=x.unflatten(1, (2, WIDTH))).last_hidden_state.flatten(1)


def make_linears(method: type[LoRALinear] | type[DoRALinear]) -> nn.Sequential:
    layers = [method.from_linear(to_4bit(nn.Linear(64, 64)), r=4) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.05)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


METHODS = {
    "lora": functools.partial(make_linears, LoRALinear),
    "dora": functools.partial(make_linears, DoRALinear),
    "loreft": Edited,
}


def make_model(method: str) -> nn.Module:
    torch.manual_seed(0)
    return METHODS[method]()


def train(model: nn.Module, rows: slice) -> list[torch.Tensor]:
    """The trained parameters after STEPS of two accumulated forwards each, on `rows` of every batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, target = (torch.randn(WORLD * PER_PROCESS, 64, generator=generator) for _ in range(2))
        for half in (x, -x):
            nn.functional.mse_loss(model(half[rows]), target[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trained]


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    rows = slice(rank * PER_PROCESS, (rank + 1) * PER_PROCESS)
    for method in METHODS:
        trained = train(DistributedDataParallel(make_model(method)), rows)
        torch.save(trained, f"{folder}/{method}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(run_process, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method, trained_by_two):
    alone = train(make_model(method), slice(None))
    first, second = (torch.load(trained_by_two / f"{method}-{rank}.pt") for rank in range(WORLD))
    start = [p for p in make_model(method).parameters() if p.requires_grad]
    for ours, other, single, before in zip(first, second, alone, start, strict=True):
        assert torch.equal(ours, other)
        torch.testing.assert_close(ours, single, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(single, before, atol=1e-3)
