"""The options of a job: types, ranges, YAML files and what wins over what."""

import dataclasses

import pytest

from peft_fast import LoReFTConfig, config
from peft_fast.base_models import adapter_config
from peft_fast.config import TrainConfig
from peft_fast.reft.config import INITS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: expected at least 1, got 0"),
        ({"r": 2.5}, "r: expected int, got 2.5"),
        ({"r": True}, "r: expected int, got True"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"lr": float("nan")}, "lr: expected more than 0"),
        ({"lr": float("inf")}, "lr: expected more than 0 and a finite number"),
        ({"dropout": 1.5}, "dropout: expected at least 0 and at most 1"),
        ({"quant": "int3"}, "quant: expected one of nf4, fp4, none, got 'int3'"),
        ({"method": "vera"}, "method: expected one of lora, dora, loreft, got 'vera'"),
        ({"init": "zero"}, "init: expected one of pyreft, identity, got 'zero'"),
        ({"share_weights": 1}, "share_weights: expected bool, got 1"),
        ({"method": "loreft", "alpha": 32}, "alpha: expected none for method 'loreft', got 32.0"),
        ({"method": "loreft", "target_modules": "q"}, "target_modules: expected none for method 'loreft'"),
        ({"positions": "all"}, "positions: expected none for method 'lora', got 'all'"),
        ({"method": "dora", "layers": "0"}, "layers: expected none for method 'dora', got '0'"),
        ({"component": "dense"}, "component: expected none for method 'lora', got 'dense'"),
        ({"share_weights": False}, "share_weights: expected none for method 'lora', got False"),
        ({"init": "identity"}, "init: expected none for method 'lora', got 'identity'"),
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
    shared = {f.name: f.default for f in dataclasses.fields(LoReFTConfig) if f.name in config.OPTIONS}
    assert {"positions", "layers", "component", "share_weights", "init"} < set(shared)
    assert {name: config.OPTIONS[name].default for name in shared} == shared
    assert config.OPTIONS["init"].metadata["choices"] == INITS
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
    assert set(config.LEARNING_RATES) == set(config.METHODS)
    for method, rate in config.LEARNING_RATES.items():
        assert TrainConfig(method=method).lr == rate
        assert f"{rate:.0e}".replace("e-0", "e-") in config.OPTIONS["lr"].metadata["help"]
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


def test_saved_options_are_those_given(tmp_path):
    options = TrainConfig(lr=3e-4, steps=7, output="x")
    config.save(options, tmp_path / "config.yaml")
    assert TrainConfig(**config.load(tmp_path / "config.yaml")) == options
