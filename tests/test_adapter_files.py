"""Files of an `AdapterModel`: those that do not fit change nothing, and the others run anywhere."""

import json

import pytest
import torch
from adapter_models import adapted, assert_unchanged, bert, state_of
from safetensors.torch import load_file, save_file
from torch import nn

from peft_fast import (
    AdapterConfig,
    AdapterModel,
    get_adapter_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def spoil(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def described(folder, **options):
    """Without the sums, which would say that the options have changed."""
    spoil(folder, lambda tensors: None)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "expected JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[" * 100_000), "expected JSON"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"no"), "expected a safetensors file"),
        (lambda d: described(d, method="galore"), "method: expected one of"),
        (lambda d: described(d, color="red"), "color: expected an option of 'ssf'"),
        (lambda d: described(d, target_modules=["query"]), "expected no such tensor"),
        (
            lambda d: spoil(d, lambda t: t.pop("classifier.bias")),
            "classifier.bias: expected a tensor, got none",
        ),
        (lambda d: spoil(d, lambda t: t["classifier.bias"].fill_(float("nan"))), "expected finite numbers"),
        (lambda d: spoil(d, lambda t: t.update({"classifier.bias": torch.ones(3)})), "expected [2], got [3]"),
    ],
)
def test_files_that_do_not_fit_change_nothing(tmp_path, change, message):
    adapted().save_pretrained(tmp_path)
    change(tmp_path)
    model = bert("nf4")
    before = state_of(model)
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        AdapterModel.from_pretrained(model, tmp_path)
    assert message in str(error.value)
    assert_unchanged(model, before)


def test_an_adapter_runs_where_its_backend_is_missing(tmp_path):
    adapted(backend="triton").save_pretrained(tmp_path)
    assert "backend" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert AdapterModel.from_pretrained(bert(), tmp_path).adapter_config.backend == "auto"
    model = AdapterModel.from_pretrained(bert(), tmp_path, backend="reference")
    assert {layer.backend for layer in model.adapters.values()} == {"reference"}
    with pytest.raises(ValueError, match="backend: expected one of"):
        AdapterModel.from_pretrained(bert(), tmp_path, backend="abacus")


def test_an_adapter_of_another_kind_is_not_loaded(tmp_path):
    adapted("parallel", act="gelu").save_pretrained(tmp_path)
    model = adapted("parallel", act="tanh")
    before = state_of(model)
    with pytest.raises(ValueError, match="act: expected 'tanh', got 'gelu'"):
        model.load_adapter(tmp_path)
    assert_unchanged(model, before)


def test_only_safetensors_are_written(tmp_path):
    model = get_adapter_model(nn.Sequential(nn.Linear(8, 8)), AdapterConfig("ia3"))
    model.save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="safe_serialization: expected True, got False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
