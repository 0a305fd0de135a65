"""What `make gpu` times: peers that are there and right, and backends that are sound."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def load():
    """Imports a script of bench/."""
    return lambda name: importlib.import_module(f"peft_fast.bench.{name}")


def test_a_weight_packed_without_bitsandbytes_is_as_exact(load):
    layers = load("layers")
    from peft_fast.formats import from_linear

    dense = torch.randn(96, 160) * torch.rand(96, 1)
    errors = []
    for packed in (layers.pack(dense), layers._pack_alone(dense)):
        weight = from_linear(layers.nf4_linear(packed, 160, 96, torch.float32)).check()
        assert weight.nested
        errors.append(((weight.decode(torch.float32) - dense).norm() / dense.norm()).item())
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_unsloth_runs_alone_or_says_why_not(load, monkeypatch):
    bench = load("lora_linear")
    with pytest.raises(SystemExit):
        bench.parse(["--providers", "unsloth", "ours"])
    monkeypatch.setitem(sys.modules, "unsloth", None)
    bench.layers.missing.cache_clear()
    args = bench.parse(["--providers", "dense", "unsloth", "--device", "cpu"])
    with pytest.raises(ValueError, match="--providers: unsloth cannot run here: unsloth: not installed"):
        bench.selected(args)
    bench.layers.missing.cache_clear()


def test_why_a_package_cannot_be_used(load):
    absent = load("layers").absent
    for error, text in (
        (ModuleNotFoundError("No module named 'torchao'", name="torchao"), "torchao: not installed"),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            "torchao: ModuleNotFoundError: No module named 'x'",
        ),
        (RuntimeError("\n no GPU\nand more"), "torchao: RuntimeError: no GPU"),
        (AssertionError(), "torchao: AssertionError: no message"),
    ):
        assert absent("torchao", error) == text


@pytest.mark.parametrize("home", ["torchao.quantization", "torchao.dtypes"])
def test_torchao_is_found_where_its_releases_have_it(load, monkeypatch, home):
    providers = load("providers")
    if importlib.util.find_spec("torchao") is None:
        assert providers._no_torchao.__wrapped__() == "torchao: not installed"
    kind = type("NF4Tensor", (), {"__module__": "torchao.nf4"})
    for name in ("torchao", "torchao.quantization", "torchao.dtypes", "torchao.nf4"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert providers._no_torchao.__wrapped__() == (
        "torchao: ImportError: neither torchao.quantization nor torchao.dtypes has NF4Tensor"
    )
    sys.modules[home].NF4Tensor = kind
    assert providers._no_torchao.__wrapped__() is None
    assert providers._nf4_tensor() is sys.modules["torchao.nf4"]


@pytest.mark.parametrize("off", [0.0, 0.05])
def test_results_of_unsloth_are_checked(load, monkeypatch, tmp_path, off):
    """Its function stands for itself here: it takes a block with `o_proj`, and x [batch, tokens, K]."""
    bench = load("lora_linear")

    def apply_lora_o(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (1, 5, 64)
        return block.o_proj(x) * (1 + off)

    kernels = types.SimpleNamespace(apply_lora_o=apply_lora_o)
    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(kernels=kernels))
    monkeypatch.setitem(sys.modules, "unsloth.kernels", kernels)
    bench.layers.missing.cache_clear()
    path = tmp_path / "rows.csv"
    options = ["--shape", "64", "64", "--rank", "4", "--rows", "5", "--dtype", "bfloat16", "--no-cold"]
    run = [*options, "--device", "cpu", "--seconds", "0", "--threads", "1", "--providers", "dense", "unsloth"]
    threads = torch.get_num_threads()
    try:
        if off:
            with pytest.raises(SystemExit, match="not exact: unsloth lora bfloat16"):
                bench.main([*run, "--csv", str(path)])
            with path.open(newline="") as file:
                (row,) = (row for row in csv.DictReader(file) if row["provider"] == "unsloth")
            assert row["p50"] == ""
        else:
            bench.main([*run, "--csv", str(path)])
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["provider"] == "unsloth"]
            assert len(rows) == 1
            assert 0 < float(rows[0]["error_dX"]) < 0.02
    finally:
        torch.set_num_threads(threads)
        bench.layers.missing.cache_clear()


def test_a_backend_has_no_row_where_it_cannot_run(load, tmp_path, capsys, monkeypatch):
    from peft_fast import backends, reference

    class Few:
        lora_linear_backward = staticmethod(reference.lora_linear_backward)

        @staticmethod
        def lora_linear(x, *args):
            if len(x) > 5:
                raise backends.BackendUnavailable(f"takes 5 rows, got {len(x)}")
            return reference.lora_linear(x, *args)

    row = backends.BACKENDS["reference"]
    monkeypatch.setitem(backends.BACKENDS, "few", row._replace(load=lambda: Few))
    bench = load("lora_linear")
    path = tmp_path / "rows.csv"
    options = ["--shape", "64", "64", "--rank", "4", "--rows", "5", "6", "--dtype", "float32", "--no-cold"]
    run = [*options, "--device", "cpu", "--seconds", "0", "--threads", "1", "--providers", "dense", "ours"]
    threads = torch.get_num_threads()
    bench.main([*run, "--backend", "few", "--csv", str(path)])
    torch.set_num_threads(threads)
    with path.open(newline="") as file:
        rows = [(row["provider"], row["M"]) for row in csv.DictReader(file)]
    assert rows == [("dense", "5"), ("dense", "5"), ("ours", "5"), ("dense", "6"), ("dense", "6")]
    assert "left out ours lora[few] float32 M=6 threads=1: takes 5 rows, got 6" in capsys.readouterr().out


# Backends that are added to the table in each process: one exact, one inexact, one that dies, one that hangs.
STAND_INS = """
import os, time
from peft_fast import backends, reference

class Other:
    dequantize = staticmethod(reference.dequantize)
    lora_linear = staticmethod(reference.lora_linear)
    def __init__(self, backward):
        self.lora_linear_backward = backward

def off(*args):
    grads = reference.lora_linear_backward(*args)
    return grads._replace(lora_B=1.01 * grads.lora_B)

def dies(*args):
    if len(args[0]) == 6:
        os._exit(3)
    return reference.lora_linear_backward(*args)

row = backends.BACKENDS["reference"]
for name, backward in {
    "right": reference.lora_linear_backward, "off": off, "dies": dies, "hangs": lambda *args: time.sleep(600)
}.items():
    backends.BACKENDS[f"other-{name}"] = row._replace(load=lambda backward=backward: Other(backward))
"""


def test_sanity_tells_sound_backends_from_others(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STAND_INS)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    path = tmp_path / "sanity.json"
    options = ["--shape", "64", "64", "--rank", "4", "--rows", "5", "6", "--dtype", "float32", "bfloat16"]
    options += ["--device", "cpu", "--prefix", "other", "--seconds", "40", "--jobs", "4", "--json", str(path)]
    command = [sys.executable, str(BENCH / "sanity.py"), *options]
    start = time.monotonic()
    found = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    assert time.monotonic() - start < 100
    assert found.returncode == 1
    content = json.loads(path.read_text())
    assert content["sound"] == {"float32": ["other-right"], "bfloat16": ["other-right"]}
    cells = {
        name: [cell for cell in content["cells"] if cell["backend"] == f"other-{name}"]
        for name in ("right", "off", "dies", "hangs")
    }
    assert {name: len(of) for name, of in cells.items()} == {"right": 8, "off": 8, "dies": 3, "hangs": 0}
    assert [cell["wrong"] for cell in cells["dies"]] == [False, False, True]
    assert cells["dies"][2]["reason"] == "its process ended with 3"
    assert any(cell["wrong"] for cell in cells["off"])
    assert "other-off lora float32 M=5: dB has" in found.stdout
    assert "other-hangs: 0 of 8 cases done after 40 s" in found.stdout


@pytest.mark.parametrize(
    ("judged", "timed"),
    [
        (None, ["--backend", "auto"]),
        (["triton", "triton-merge"], ["--backend", "auto", "triton", "triton-merge"]),
        (["triton-merge"], ["--backend", "triton-merge"]),
        ([], ["--providers", "dense", "peft"]),
    ],
)
def test_only_sound_backends_are_timed(load, tmp_path, judged, timed):
    gpu = load("gpu")
    if judged is not None:
        (tmp_path / "sanity.json").write_text(json.dumps({"sound": {"bfloat16": judged}, "cells": []}))
    for command in gpu.lora_linear(gpu.Plan(tmp_path, "cuda", False), 180)[: len(gpu.SHAPES)]:
        where = command.index(timed[0])
        assert command[where : where + len(timed)] == timed
        assert command[where + len(timed)].startswith("--")
        assert ("--backend" in command) == bool(judged or judged is None)
