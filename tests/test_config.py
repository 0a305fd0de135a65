"""The options of a job: types, ranges, YAML files and what wins over what."""

import dataclasses

import pytest

from peft_fast import LoReFTConfig, config
from peft_fast.base_models import adapter_config
from peft_fast.config import TrainConfig
from peft_fast.reft.config import INITS
from peft_fast.training_methods import TRAINING_METHODS, default_text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected at least 1 and at most 65536, got 0"),
        ({"r": 2.5}, "r: expected int, got 2.5"),
        ({"r": True}, "r: expected int, got True"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"lr": float("nan")}, "lr: expected more than 0"),
        ({"lr": float("inf")}, "lr: expected more than 0 and a finite number"),
        ({"dropout": 1.5}, "dropout: expected at least 0 and at most 1"),
        ({"quant": "int3"}, "quant: expected one of nf4, fp4, int8, fp8, mxfp4, none, got 'int3'"),
        ({"method": "galore"}, "method: expected one of lora, dora, loreft, adapter-parallel, "),
        ({"init": "zero"}, "init: expected one of default, pissa, olora, pyreft, identity, got 'zero'"),
        ({"method": "loreft", "init": "pissa"}, "init: expected one of pyreft, identity, got 'pissa'"),
        ({"method": "ssf", "stock": True}, "stock: expected none for method 'ssf', which PEFT lacks"),
        ({"method": "prefix", "checkpointing": True}, "checkpointing: expected False for method 'prefix'"),
        ({"method": "ia3", "r": 8}, "r: expected none for method 'ia3', got 8"),
        ({"method": "prompt", "dropout": 0.0}, "dropout: expected none for method 'prompt', got 0.0"),
        ({"method": "vera", "lora_plus_ratio": 4}, "lora_plus_ratio: expected none for method 'vera'"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio: expected more than 0"),
        ({"share_weights": 1}, "share_weights: expected bool, got 1"),
        ({"method": "loreft", "alpha": 32}, "alpha: expected none for method 'loreft', got 32.0"),
        ({"method": "loreft", "target_modules": "q"}, "target_modules: expected none for method 'loreft'"),
        ({"positions": "all"}, "positions: expected none for method 'lora', got 'all'"),
        ({"method": "dora", "layers": "0"}, "layers: expected none for method 'dora', got '0'"),
        ({"component": "dense"}, "component: expected none for method 'lora', got 'dense'"),
        ({"share_weights": False}, "share_weights: expected none for method 'lora', got False"),
        ({"init": "identity"}, "init: expected one of default, pissa, olora, got 'identity'"),
        ({"method": "dora", "init": "pissa"}, "init: expected none for method 'dora', got 'pissa'"),
        ({"method": 3}, "method: expected str, got 3"),
        ({"stock": "yes"}, "stock: expected bool, got 'yes'"),
        ({"task": "causal-lm", "model": "x"}, "data: expected a file for task 'causal-lm'"),
        ({"task": "causal-lm", "data": "x"}, "model: expected a folder"),
        ({"data": "x.csv"}, "data: expected none for task 'docstring-swap'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        TrainConfig(**options)
    assert message in str(error.value)


def test_options_of_edits_are_those_of_their_config():
    row = TRAINING_METHODS["loreft"]
    shared = {f.name: f.default for f in dataclasses.fields(LoReFTConfig) if f.name in row.options}
    assert {"positions", "layers", "component", "share_weights", "init"} < set(shared)
    assert {name: row.options[name] for name in shared} == shared
    assert set(row.options) - set(shared) == {"lr"}
    assert row.choices["init"] == INITS
    options = {"positions": "f3", "component": "up_proj", "share_weights": False, "init": "identity"}
    made = adapter_config(
        TrainConfig(method="loreft", r=4, layers="2, 0", dropout=0.1, backend="reference", **options),
        "SEQ_CLS",
    )
    assert made == LoReFTConfig(r=4, layers=[0, 2], dropout=0.1, backend="reference", **options)


def test_yaml_reads_exponents_and_dashes(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("lr: 2e-3\nbatch-size: 4\n")
    resolved = config.resolve({"batch_size": None, "seed": 3}, path)
    assert (resolved.lr, resolved.batch_size, resolved.seed) == (2e-3, 4, 3)


def test_the_default_learning_rate_is_the_methods():
    for method, row in TRAINING_METHODS.items():
        job = TrainConfig(method=method)
        assert job.own == row.options
        assert job.lr == row.options["lr"]
        assert all(getattr(job, name) is None for name in config.SPECIFIC if name not in row.options)
    assert default_text("r") == "8; 256 for vera; 32 for s2lora"
    assert default_text("lr").startswith("0.001; 0.003 for loreft")
    assert TrainConfig(method="loreft", lr=3e-4).lr == 3e-4


def test_the_method_names_the_folder_of_the_run(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("method: dora\n")
    assert config.resolve({}, path).folder.name == "docstring-swap-dora-nf4-seed0"
    assert config.resolve({"method": "lora"}, path).method == "lora"


@pytest.mark.parametrize(
    ("text", "message"), [("rank: 8", "got ['rank']"), ("- a", "got list"), ("a: [", "expected YAML")]
)
def test_bad_yaml_is_named(tmp_path, text, message):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="config: expected") as error:
        config.resolve({}, path)
    assert message in str(error.value)


def test_an_empty_file_of_options_is_no_run_to_resume(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="resume: expected the options of a run in"):
        config.resolve({"resume": True, "output": str(tmp_path)})


def test_a_failed_save_leaves_the_old_options(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    config.save(TrainConfig(seed=1), path)
    before = path.read_bytes()
    monkeypatch.setattr(config.Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        config.save(TrainConfig(seed=2), path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"config.yaml": before}


def test_saved_options_are_those_given(tmp_path):
    options = TrainConfig(lr=3e-4, steps=7, output="x")
    config.save(options, tmp_path / "config.yaml")
    assert TrainConfig(**config.load(tmp_path / "config.yaml")) == options
