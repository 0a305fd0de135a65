"""bench/end_to_end.py on a tiny model: a coherent table, and none of a model that learns something else."""

from __future__ import annotations

import csv
import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocked import without

BENCH = Path(__file__).parents[1] / "bench"
TINY = ["--device", "cpu", "--dtype", "float32", "--width", "tiny", "--layers", "1", "--tokens", "16",
        "--rank", "4", "--seconds", "0"]  # fmt: skip
MODELS = [("", "frozen"), *itertools.product(("lora", "dora"), ("stock", "ours")), ("loreft", "ours")]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench():
    return importlib.import_module("peft_fast.bench.end_to_end")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_model_has_a_row_with_and_without_checkpointing(bench, tmp_path):
    path = tmp_path / "rows.csv"
    bench.main([*TINY, "--checkpointing", "off", "on", "--csv", str(path)])
    rows = read(path)
    got = [(row["checkpointing"], row["method"], row["provider"]) for row in rows]
    assert got == [(checkpointing, *model) for checkpointing in ("off", "on") for model in MODELS]
    for block in (rows[: len(MODELS)], rows[len(MODELS) :]):
        frozen = float(block[0]["p50"])
        for row in block:
            assert float(row["ratio"]) == pytest.approx(float(row["p50"]) / frozen, rel=1e-4)
            assert float(row["tokens_per_second"]) == pytest.approx(2 * 16e3 / float(row["p50"]), rel=1e-4)
            assert int(row["samples"]) >= 5
            if row["provider"] == "ours":
                assert float(row["loss_last"]) < float(row["loss_first"])
                assert float(row["loss_difference"]) <= float(row["loss_allowed"])
            if row["provider"] != "frozen":
                assert int(row["held_bytes"]) < int(block[0]["held_bytes"])


def test_models_share_frozen_weights_and_nothing_else(bench):
    args = bench.parse([*TINY, "--methods", "lora"])
    models = bench.make_models(args, False)
    stock, ours = (dict(models[bench.Key("lora", who)].named_parameters()) for who in ("stock", "ours"))
    assert stock.keys() == ours.keys()
    for name, parameter in stock.items():
        same = parameter.data_ptr() == ours[name].data_ptr()
        assert same != parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, ours[name], rtol=0, atol=0)
            assert parameter.abs().sum() > 0


@pytest.mark.parametrize("change", [1.05, float("nan")])
def test_a_model_that_learns_something_else_is_not_timed(bench, change):
    args = bench.parse([*TINY, "--methods", "lora"])
    models = bench.make_models(args, False)
    key = bench.Key("lora", "ours")
    ids = torch.randint(256, (2, 16))
    x = models[key].get_input_embeddings()(ids).detach()
    wrong = bench.share(models[key])
    for name, parameter in wrong.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(change)
    right = bench.expected_of(key, models)
    with pytest.raises(bench.measure.Inexact, match="lora ours: losses differ by"):
        bench.agreement(key, *(bench.Training(model, x, ids, args) for model in (wrong, right)))


def test_the_head_keeps_its_share_of_the_work(bench):
    config = bench.make_dense(bench.parse([*TINY, "--layers", "1"])).config
    assert (config.vocab_size, config.hidden_size, config.num_key_value_heads) == (256, 128, 2)


def test_without_peft_and_bitsandbytes_our_own_layers_run(tmp_path):
    path = tmp_path / "rows.csv"
    command = [sys.executable, str(BENCH / "end_to_end.py"), *TINY, "--csv", str(path)]
    env = without(tmp_path, "peft", "bitsandbytes")
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "left out stock: peft: not installed" in run.stdout
    assert [(row["method"], row["provider"]) for row in read(path)] == [
        ("", "frozen"), ("lora", "ours"), ("dora", "ours"), ("loreft", "ours")
    ]  # fmt: skip
