"""Two processes under DistributedDataParallel train as one does; `peft-fast train` under torchrun."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import (
    BASES,
    METHODS,
    WORLD,
    Step,
    difference,
    make_model,
    results,
    rows_of,
    run_cases,
    train,
)
from peft_models import to_4bit
from reft_models import WIDTH, tiny_llama
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_jobs import adapter, run, save_bert, save_rows, tiny

from peft_fast import LoReFTConfig, get_reft_model
from peft_fast.modules import DoRALinear, LoRALinear

PER_PROCESS = 4
JOB = {"batch_size": 8, "steps": 8, "eval_every": 3, "save_every": 3, "lr": 1e-2, "dropout": 0.1}


# --------------------------------------------------------------------- modules of ours, AdamW, accumulation


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


MODULES = {
    "lora": functools.partial(make_linears, LoRALinear),
    "dora": functools.partial(make_linears, DoRALinear),
    "loreft": Edited,
}


def make_modules(method: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[method]()


def train_modules(model: nn.Module, rows: slice) -> list[torch.Tensor]:
    """The trained parameters after three steps of two accumulated forwards each, on `rows` of every batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, target = (torch.randn(WORLD * PER_PROCESS, 64, generator=generator) for _ in range(2))
        for half in (x, -x):
            nn.functional.mse_loss(model(half[rows]), target[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trained]


# ------------------------------------------------------------------------------------------------- processes


def modules_in_two(method: str, rank: int, folder: str) -> list[torch.Tensor]:
    rows = slice(rank * PER_PROCESS, (rank + 1) * PER_PROCESS)
    return train_modules(DistributedDataParallel(make_modules(method)), rows)


def model_in_two(method: str, kind: str, rank: int, folder: str) -> list[Step]:
    model = make_model(method, kind)
    return train(model, rows_of(rank), DistributedDataParallel(model))


def resumed(rank: int, folder: str) -> None:
    """The job of `torchrun`, continued from its first checkpoint by other processes."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    base = Path(folder)
    run(tiny(base / "bert", base / "rows.csv", base / "resumed", resume=True, **JOB))


def make_cases() -> dict[str, Any]:
    cases: dict[str, Any] = {f"modules-{m}": functools.partial(modules_in_two, m) for m in METHODS}
    for method in METHODS:
        for kind in BASES:
            cases[f"model-{method}-{kind}"] = functools.partial(model_in_two, method, kind)
    return {**cases, "resumed": resumed}


def run_process(rank: int, folder: str) -> None:
    run_cases(make_cases(), rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished job of torchrun in "job", then what two processes computed of every case."""
    folder = tmp_path_factory.mktemp("ddp")
    save_bert(folder / "bert")
    save_rows(folder / "rows.csv")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command += ["-m", "peft_fast.cli", "train", "--task", "classification", "--output", "job"]
    command += ["--model", "bert", "--data", "rows.csv"]
    for name, value in JOB.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    (folder / "output.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(folder / "job", folder / "resumed")
    for name in ("adapter", "checkpoints/checkpoint-8"):
        shutil.rmtree(folder / "resumed" / name)
    (folder / "resumed" / "metrics.json").unlink()
    torch.multiprocessing.spawn(run_process, (str(folder),), nprocs=WORLD)
    return folder


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(method, folder):
    alone = train_modules(make_modules(method), slice(None))
    first, second = results(folder, f"modules-{method}")
    start = [p for p in make_modules(method).parameters() if p.requires_grad]
    for ours, other, single, before in zip(first, second, alone, start, strict=True):
        assert torch.equal(ours, other)
        torch.testing.assert_close(ours, single, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(single, before, atol=1e-3)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_models_train_as_in_one_process(method, kind, folder):
    alone = train(make_model(method, kind), slice(None))
    found = difference(results(folder, f"model-{method}-{kind}"), alone)
    print(found)
    assert found.loss <= 1e-5, found
    assert found.trained <= 1e-5, found
    assert found.grads <= 5e-5, found


def test_train_under_torchrun(folder):
    found = metrics(folder / "job")
    assert found["processes"] == WORLD
    assert found["steps"] == len(found["loss"]) == 8
    assert [row["step"] for row in found["evaluations"]] == [3, 6, 8]
    assert abs(found["loss"][0] - math.log(2)) < 0.15  # of two labels, before anything is learnt
    assert found["eval_loss"] < 0.6 * found["loss"][0]
    text = (folder / "output.txt").read_text()
    assert text.count("step     3") == 1  # by one of the processes
    assert text.count("written to") == 1


def test_resume_with_two_processes(folder):
    results(folder, "resumed")
    whole, resumed = metrics(folder / "job"), metrics(folder / "resumed")
    assert resumed["step_seconds"][:6] == whole["step_seconds"][:6]  # it did go on from there
    assert resumed["step_seconds"][6:] != whole["step_seconds"][6:]
    assert resumed["loss"] == whole["loss"]
    assert resumed["evaluations"] == whole["evaluations"]
    first, second = adapter(folder / "job"), adapter(folder / "resumed")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
