"""Every method of `peft-fast train`: it trains, its checkpoints resume to the same bits, its files load."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from train_jobs import run, save_bert, save_rows, tiny

from peft_fast import AdapterModel, base_models, config, tasks, train
from peft_fast.trainer import AdapterTrainer
from peft_fast.training_methods import TRAINING_METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"r": 4, "virtual_tokens": 4}
OLDER = ("lora", "dora", "loreft")
"""Tested with the recipe itself."""
LIKE_OTHERS = ("adapter-series", "kadaptation", "ssf", "bitfit", "prompt")
"""Whose checkpoints are those of another method's kind."""


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data") / "rows.csv")


@pytest.fixture
def job(bert, csv_file, tmp_path):
    """Makes the options of a job of four steps in two epochs, of which the second step is saved."""

    def make(method, folder="run", **options):
        has = TRAINING_METHODS[method].options
        small = {name: value for name, value in SMALL.items() if name in has}
        small["dropout"] = 0.1 if "dropout" in has else None
        short = {"steps": 4, "batch_size": 64, "eval_every": 2, "save_every": 2}
        return tiny(bert, csv_file, tmp_path / folder, **{**small, **short, "method": method, **options})

    return make


class Killed(Exception):
    """In the place of a signal."""


def killed_at(step, monkeypatch, options):
    on_step_end = train.ProgressReport.on_step_end

    def kill(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.ProgressReport, "on_step_end", kill)
        with pytest.raises(Killed):
            run(options)


def files(folder):
    return {f.name: load_file(f) for f in sorted((folder / "adapter").glob("*.safetensors"))}


def load_model(options, folder):
    """The evaluation loss of the model in these files: stock PEFT's, if they are of one of its methods."""
    described = json.loads((folder / "adapter_config.json").read_text())
    own = "peft_type" not in described
    dense = (described["modules_to_save"] or ()) if own else ()
    base = base_models.load_base(
        options, base_models.model_folder(options), ["no", "yes"], torch.device("cpu"), dense
    )
    base_models.protect_from_repacking(base)
    model = (AdapterModel if own else PeftModel).from_pretrained(base, folder).eval()
    tokenizer = base_models.load_tokenizer(options, base_models.model_folder(options))
    batch = tokenizer.pad(tasks.build(options, tokenizer).eval, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).loss.item()


@pytest.mark.parametrize(
    ("method", "options"),
    [(method, {}) for method in TRAINING_METHODS if method not in OLDER]
    + [("lora", {"init": "pissa", "lora_plus_ratio": 4.0, "rslora": True, "quant": "none"})],
)
def test_a_job_trains_loads_and_resumes_to_the_same_bits(job, tmp_path, monkeypatch, method, options):
    whole = run(job(method, "whole", **options))
    assert whole["layers"]["fused"] > 0
    assert whole["layers"]["left"] == {}
    early = load_file(tmp_path / "whole" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    late = files(tmp_path / "whole")["adapter_model.safetensors"]
    assert early.keys() == late.keys()
    still = [name for name in late if torch.equal(early[name], late[name])]
    assert all("vera_A" in name or "vera_B" in name for name in still), still
    assert whole["adapter_bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "whole" / "adapter").glob("*.safetensors")
    )
    assert whole["adapter_bytes"] > 0
    loaded = load_model(job(method, "whole", **options), tmp_path / "whole" / "adapter")
    assert loaded == pytest.approx(whole["eval_loss"], abs=1e-5)
    if method in LIKE_OTHERS:
        return
    killed_at(3, monkeypatch, job(method, "killed", **options))
    resumed = run(config.resolve({"resume": True, "output": str(tmp_path / "killed")}))
    assert resumed["loss"] == whole["loss"]
    assert resumed["evaluations"] == whole["evaluations"]
    ours, theirs = files(tmp_path / "killed"), files(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, tensors in theirs.items():
        assert ours[name].keys() == tensors.keys()
        assert all(torch.equal(ours[name][key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("method", ["vera", "ia3", "prefix", "freeze"])
def test_fused_and_stock_take_the_same_path(job, method):
    fused, stock = (run(job(method, str(stock), stock=stock)) for stock in (False, True))
    assert (fused["layers"]["fused"] > 0, stock["layers"]["fused"]) == (True, 0)
    assert fused["loss"] == pytest.approx(stock["loss"], abs=2e-5)
    assert fused["eval_loss"] == pytest.approx(stock["eval_loss"], abs=2e-5)


def test_an_initialized_lora_is_saved_for_the_base_that_it_began_from(job, tmp_path):
    """Of rank 2r, and with its head; what a second quantization would change is not in it."""
    options = job("lora", init="olora", quant="none")
    metrics = run(options)
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["init_lora_weights"]) == (8, 32, True)
    loaded = load_model(options, tmp_path / "run" / "adapter")
    assert loaded == pytest.approx(metrics["eval_loss"], abs=1e-5)


def test_lora_plus_gives_lora_b_its_own_rate(job, monkeypatch):
    optimizers = []
    create = AdapterTrainer.create_optimizer
    monkeypatch.setattr(
        AdapterTrainer,
        "create_optimizer",
        lambda self, *a: optimizers.append(create(self, *a)) or optimizers[-1],
    )
    run(job("lora", lora_plus_ratio=8.0, lr=1e-3, steps=1))
    run(job("lora", "plain", lr=1e-3, steps=1))
    (plus, plain) = ({g["initial_lr"] for g in o.param_groups if g["params"]} for o in optimizers)
    assert plain == {1e-3}
    assert plus == {1e-3, 8e-3}
    faster = [p for g in optimizers[0].param_groups if g["initial_lr"] == 8e-3 for p in g["params"]]
    assert len(faster) == 13 + 1  # lora_B of every layer, and the bias of the head
    assert sum(p.dim() == 2 for p in faster) == 13


def test_freeze_trains_the_last_blocks_dense_and_keeps_the_others_in_4_bits(job, tmp_path):
    metrics = run(job("freeze", steps=1))
    assert metrics["layers"]["fused"] == 7  # a block of two, and the pooler
    (tensors,) = files(tmp_path / "run").values()
    assert {name.rpartition(".layer.")[2].split(".")[0] for name in tensors} == {"1", "classifier"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    with pytest.raises(ValueError, match="last_layers: expected at most 2, the model's blocks, got 3"):
        run(job("freeze", "more", last_layers=3))


def test_a_write_of_metrics_that_fails_leaves_no_half(job, tmp_path, monkeypatch):
    """An empty metrics.json would make an unfinished run count as finished."""
    monkeypatch.setattr(train.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        train._write(tmp_path, {"evaluations": [], "loss": [], "accuracy": None})
    assert not (tmp_path / "metrics.json").exists()
