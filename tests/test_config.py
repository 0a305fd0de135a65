"""The options of a job: types, ranges, YAML files and what wins over what."""

import pytest

from peft_fast import config
from peft_fast.config import TrainConfig


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
        ({"method": "vera"}, "method: expected one of lora, dora, got 'vera'"),
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


def test_yaml_reads_exponents_and_dashes(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("lr: 2e-3\nbatch-size: 4\n")
    resolved = config.resolve({"batch_size": None, "seed": 3}, path)
    assert (resolved.lr, resolved.batch_size, resolved.seed) == (2e-3, 4, 3)


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
