"""The same bits again: in another process, on any number of threads, and for a row in any batch.

docs/determinism.md says what is promised; this holds it to that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft_models import KINDS, WIDTH
from state_models import MODELS, digest, set_backend, wrapped
from torch import Tensor, nn

from peft_fast import LoReFTConfig, LoReFTLinear

INVARIANT = "cpu-batch-invariant"
WITH_GEMMS_OF_PYTORCH = ("parallel", "series", "loreft-model")
"""Bottlenecks, and the rest of a whole model, are PyTorch's own, which promises nothing for other batches."""
THREADS = (1, 2, 3, 8)
ROWS = 513


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def after_training(method: str, kind: str) -> dict[str, str]:
    """Digests of outputs, gradients and parameters of three steps with dropout from one seed."""
    torch.manual_seed(0)
    model = MODELS[method](kind).train()
    x = torch.randn(1, 60 if method == "loreft-model" else 300, WIDTH)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    seen = {}
    for step in range(3):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(torch.randn_like(y))
        seen |= {f"{step} y": y, f"{step} dx": leaf.grad}
        seen |= {f"{step} {name}": p.grad for name, p in trained(model).items()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return digest(seen) | digest(trained(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", MODELS)
def test_bits_do_not_depend_on_the_number_of_threads(method, kind):
    threads = torch.get_num_threads()
    found = {}
    try:
        for n in THREADS:
            torch.set_num_threads(n)
            found[n] = after_training(method, kind)
    finally:
        torch.set_num_threads(threads)
    for n in THREADS:
        differ = [name for name, value in found[n].items() if value != found[1][name]]
        assert not differ, f"{n} threads: {differ}"


PROCESS = """
import json, sys
from test_determinism import after_training
methods = json.loads(sys.argv[1])
print(json.dumps({f"{m} {k}": after_training(m, k) for m, k in methods}))
"""


def test_another_process_gives_the_same_bits():
    cases = [(m, k) for m in ("peft-lora", "dora", "loreft-model", "kadaptation") for k in KINDS]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", PROCESS, json.dumps(cases)]
    found = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    got = json.loads(found.stdout.splitlines()[-1])
    assert got == {f"{m} {k}": after_training(m, k) for m, k in cases}


# ------------------------------------------------------------------------------------------------- batches


def row_bits(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    (dx,) = torch.autograd.grad(y, leaf, grad)
    return {"y": y.detach(), "dx": dx}


PARTS = (slice(0, 1), slice(512, 513), slice(9, 11), slice(20, 27), slice(100, 164))
"""Rows alone, at both ends, two, seven and 64, of a batch of 513."""


def foldable(kind: str) -> nn.Module:
    """Edits without dropout, which other backends fold into the weight from some number of rows on."""
    return wrapped(kind, lambda base: LoReFTLinear.from_linear(base, LoReFTConfig(r=4)))


LAYERS = {**{m: make for m, make in MODELS.items() if m not in WITH_GEMMS_OF_PYTORCH}, "foldable": foldable}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", LAYERS)
def test_a_row_has_the_same_bits_in_any_batch(method, kind):
    model = set_backend(LAYERS[method](kind).eval(), INVARIANT)
    x, grad = torch.randn(2, ROWS, WIDTH)
    whole = row_bits(model, x, grad)
    for rows in PARTS:
        part = row_bits(model, x[rows], grad[rows])
        for name, value in part.items():
            assert torch.equal(value, whole[name][rows]), f"{name} of rows {rows}"
