"""bench/merge_study.py: the simulated merge is the op where updates are large; a control loses small ones."""

from __future__ import annotations

import csv

import pytest
import torch
from cases import Case
from peft_fast.bench import merge_study as study
from peft_fast.bench import merge_training as training
from tolerances import assert_as_exact

from peft_fast import backends

pytestmark = pytest.mark.usefixtures("one_thread")


def gain(size: float, form: str = "merge", **changed) -> float:
    fields = {
        **{"N": 256, "K": 256, "R": 4, "format": "nf4", "nested": True, "blocksize": 64, "origin": "bf16"},
        **{"dtype": "bf16", "method": "lora", "update": "random", "seed": 0},
    }
    return study.measured(study.Case(**{**fields, **changed}, size=size), rows=2)[f"gain_{form}"]


DENSE = {"format": "dense", "nested": False, "blocksize": 0}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_dense_half_weight_loses_small_updates_and_nested_nf4_keeps_them(dtype, method):
    size = {"bf16": 1e-4, "fp16": 1e-5}[dtype]
    assert gain(size, dtype=dtype, method=method, **DENSE) < 0.15
    assert gain(size, dtype=dtype, method=method) == pytest.approx(1, abs=0.25)
    assert gain(0.1, dtype=dtype, method=method, **DENSE) == pytest.approx(1, abs=1e-2)


def test_unnested_scales_of_a_bf16_checkpoint_lie_on_the_grid():
    assert gain(1e-4, format="fp4", nested=False) < 0.3
    assert gain(1e-4, format="fp4", nested=False, origin="fp32") == pytest.approx(1, abs=0.25)


def test_stochastic_rounding_keeps_what_nearest_loses():
    """The noise of the gain is about 2 / 256 here."""
    assert gain(1e-3, "stochastic", **DENSE) == pytest.approx(1, abs=0.1)
    assert gain(1e-3, **DENSE) < 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype):
    grid = torch.tensor([1.0, -3.5, 0.0, 2.0**-24 if dtype == torch.float16 else 2.0**-100]).to(dtype)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(study.round_stochastically(grid.float(), dtype, generator), grid)
    for value in (1 + 2.0**-13, -1 + 2.0**-14, 0.3, -0.3, 1e-7, -1e-7):
        many = study.round_stochastically(torch.full((20000,), value), dtype, generator).double()
        low, high = many.min().item(), many.max().item()
        assert low < value < high
        assert len(many.unique()) == 2
        spread = ((value - low) * (high - value) / len(many)) ** 0.5
        assert many.mean().item() == pytest.approx(value, abs=5 * spread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_scale", [False, True])
def test_merge_is_the_op_where_updates_are_large(monkeypatch, dtype, out_scale):
    monkeypatch.setitem(backends.BACKENDS, "merge", training.simulated(training.Merge()))
    case = Case.make("nf4", (9,), 64, 48, 4, dtype=dtype, out_scale=out_scale)
    got, plain, truth = case.run("merge"), case.plain(), case.plain(torch.float64)
    assert got.keys() == plain.keys()
    for name, tensor in got.items():
        assert_as_exact(name, tensor, plain[name], truth[name])


def test_merge_refuses_dropout(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "merge", training.simulated(training.Merge()))
    with pytest.raises(ValueError, match="dropout_mask: expected None"):
        Case.make("nf4", (2,), 64, 48, 4, dropout_p=0.5).run("merge")


def test_error_writes_a_row_for_each_case_and_plot_draws_them(tmp_path):
    path, picture = tmp_path / "rows.csv", tmp_path / "gain.png"
    options = ["--shape", "128", "64", "--rank", "2", "--origin", "bf16", "zeros", "--size", "1e-3", "0.1"]
    study.main(["--threads", "1", "error", *options, "--rows", "4", "--csv", str(path)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    weights = [("nf4", "True"), ("nf4", "False"), ("fp4", "True"), ("fp4", "False")]
    expected = {(*weight, origin) for weight in weights for origin in ("bf16", "zeros")}
    expected.add(("dense", "False", "bf16"))
    assert {(row["format"], row["nested"], row["origin"]) for row in rows} == expected
    assert len(rows) == len(expected) * 2 * 2  # dtypes and sizes
    for row in rows:
        plain = {"bf16": 2.0**-8, "fp16": 2.0**-11}[row["dtype"]]
        for name in ("y_split", "y_merge", "y_stochastic", "dx_split", "dx_merge", "dx_stochastic"):
            assert 0.1 * plain < float(row[name]) < 1.5 * plain, name
        if row["size"] == "0.1":
            assert float(row["gain_y_merge"]) == pytest.approx(1, abs=0.05)
    study.main(["plot", "--gains", str(path), str(picture)])
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_grid_is_counted(capsys):
    """A bf16 weight is on the grid; of a block of un-nested NF4 at least the largest weight is."""
    study.main(["grid", "--shape", "64", "64", "--origin", "bf16", "--dtype", "bf16", "--nested", "False"])
    rows = {line.split()[2]: line.split("on_grid=")[1] for line in capsys.readouterr().out.splitlines()}
    share = {format: float(row.split()[0]) for format, row in rows.items()}
    assert share["dense"] > 0.99
    assert 1 / 64 <= share["nf4"] < 0.1 < share["fp4"] < 0.9
    assert int(rows["nf4"].split("mantissas=")[1]) <= 14 * 128


def test_losses_are_compared_run_by_run(tmp_path, monkeypatch, capsys):
    """Runs that are in the file are not repeated; merge is set beside the split run of its seed."""
    started = []

    def trained(run, model, output):
        started.append(run)
        moved = {"split": 0.0, "merge": 1e-3}[run.form]
        losses = [1.0 / (step + 1) + moved * (step > 2) for step in range(run.steps)]
        return {"eval_loss": 0.5, "accuracy": 0.75, "seconds": 1.0, "loss": losses}

    monkeypatch.setattr(training, "trained", trained)
    monkeypatch.setattr(training, "base_in_bf16", lambda folder: folder)
    path, picture = tmp_path / "runs.csv", tmp_path / "losses.png"
    for seeds in (["0"], ["0", "1"]):
        study.main(["train", "--steps", "30", "--seed", *seeds, "--csv", str(path)])
    assert [(run.form, run.seed) for run in started] == [
        ("split", 0), ("merge", 0), ("split", 1), ("merge", 1),
    ]  # fmt: skip
    capsys.readouterr()
    study.main(["plot", "--losses", str(path), str(picture)])
    table = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[1] for row in table] == ["split", "merge"] * 2
    assert table[1].split(" | ")[-2:] == ["1.0e-03 / 8.5e-04", "1.0e-03 / 9.0e-04 |"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
