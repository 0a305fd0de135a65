"""Long training of tiny models: what grows with the steps, and whether the loss stays a number.

    PYTHONPATH=tests python -m endurance.soak FOLDER --steps 10000

Every 10 steps there is an evaluation, every 50 an adapter is added, trained and deleted, or the edits are
taken off and put on again from their file, every 100 a checkpoint that is read back. A line of JSON for each
method.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from peft_models import lora_config
from state_models import MODELS, model_inputs
from torch import nn

from peft_fast import ReftModel, backends
from peft_fast.files import read_tensors
from peft_fast.norm_cache import NormCache

METHODS = {"qlora": "peft-lora", "qdora": "peft-dora", "loreft": "loreft-model"}
EVALUATE, CHURN, CHECKPOINT = 10, 50, 100
SAMPLES = 50
WARM_UP = 0.2
"""The part of the steps before anything is measured: allocators and lazily made state settle there."""


class Job:
    """A model of `state_models` over NF4, and its optimizer."""

    def __init__(self, method: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.method, self.folder = method, folder / method
        self.model: Any = MODELS[METHODS[method]]("nf4").train()
        self.x = model_inputs(15)
        self.target = torch.tanh(self.model(self.x).detach() + 1.0)
        self.make_optimizer()

    def make_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> float:
        loss = (self.model(self.x) - self.target).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def run(self, steps: int) -> Iterator[tuple[int, float]]:
        for i in range(1, steps + 1):
            loss = self.step()
            if i % EVALUATE == 0:
                self.evaluate()
            if i % CHECKPOINT == 0:
                self.checkpoint()
            if i % CHURN == 0:
                self.churn()
            yield i, loss

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(self.x)
        self.model.train()

    @property
    def owner(self) -> Any:
        return self.model.model if self.method == "loreft" else self.model

    def checkpoint(self) -> None:
        self.owner.save_pretrained(self.folder)
        torch.save(self.optimizer.state_dict(), self.folder / "optimizer.pt")
        if self.method == "loreft":
            self.owner.load_edits(self.folder)
        else:
            stored = read_tensors(self.folder / "adapter_model.safetensors")
            set_peft_model_state_dict(self.model, stored)
        self.optimizer.load_state_dict(torch.load(self.folder / "optimizer.pt", weights_only=True))

    def churn(self) -> None:
        if self.method == "loreft":
            self.owner.save_pretrained(self.folder)
            self.model.model = ReftModel.from_pretrained(self.owner.unload(), self.folder)
            self.model.train()
            self.make_optimizer()
            return
        self.model.add_adapter("other", lora_config(r=3, use_dora=self.method == "qdora"))
        self.model.set_adapter("other")
        self.model(self.x).square().mean().backward()
        self.model.zero_grad()
        self.model.set_adapter("default")
        self.model.delete_adapter("other")


# ---------------------------------------------------------------------------------------------- what may grow


def resident() -> int:
    """Bytes of this process in memory, once what is free was given back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def caches(model: nn.Module) -> dict[str, int]:
    """How many entries each of the places has in which something could pile up."""
    ours = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "peft_fast"]
    cached = {
        f"{value.__module__}.{value.__qualname__}": value.cache_info().currsize
        for module in ours
        for value in vars(module).values()
        if isinstance(value, functools._lru_cache_wrapper) and value.__module__.startswith("peft_fast")
    }
    collections = {
        f"{module.__name__}.{name}": len(value)
        for module in ours
        for name, value in vars(module).items()
        if isinstance(value, dict | list | set) and not name.startswith("__")
    }
    gc.collect()
    alive = gc.get_objects()
    return {
        **cached,
        **collections,
        "attributes of modules": sum(len(vars(m)) for m in model.modules()),
        "hooks": sum(
            len(value) for m in model.modules() for name, value in vars(m).items() if name.endswith("_hooks")
        ),
        "modules": sum(issubclass(type(value), nn.Module) for value in alive),
        "norm caches": sum(type(value) is NormCache for value in alive),
        "tensors": sum(issubclass(type(value), torch.Tensor) for value in alive),
        "modules of Python": len(sys.modules),
    }


def slope(points: list[tuple[int, int]]) -> float:
    """By least squares, in MiB for 1,000 steps."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    over = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return over / sum((x - mean_x) ** 2 for x, _ in points) / 2**20 * 1000


def soak(method: str, folder: Path, steps: int) -> dict[str, Any]:
    """Runs a job; its losses, the growth of memory for 1,000 steps, and the caches that have grown."""
    job = Job(method, folder)
    first, every = max(int(WARM_UP * steps), 2 * CHECKPOINT), max(1, steps // SAMPLES)
    before: dict[str, int] = {}
    memory, blocks = [], []
    finite, first_loss, loss = True, math.nan, math.nan
    for i, loss in job.run(steps):
        finite &= math.isfinite(loss)
        first_loss = loss if i == 1 else first_loss
        if i >= first and i % every == 0:
            memory.append((i, resident()))
            blocks.append((i, sys.getallocatedblocks()))
            if not before:
                before = caches(job.model)
    after = caches(job.model)
    return {
        "method": method,
        "steps": steps,
        "finite": finite,
        "first_loss": first_loss,
        "last_loss": loss,
        "resident_mib": memory[-1][1] / 2**20,
        "mib_per_1000_steps": slope(memory),
        "blocks_per_step": (blocks[-1][1] - blocks[0][1]) / (blocks[-1][0] - blocks[0][0]),
        "grown": {name: (before.get(name, 0), n) for name, n in after.items() if n > before.get(name, 0)},
        "calls": sum(backends.calls.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="for checkpoints")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for method in given.methods:
        print(json.dumps(soak(method, given.folder, given.steps)), flush=True)


if __name__ == "__main__":
    main()
