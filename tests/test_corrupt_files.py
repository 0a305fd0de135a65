"""Spoiled files are typed errors that name the file, and load nothing: adapters, heads, configs, tables.

Of training checkpoints: test_corrupt_checkpoints.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from corruptions import JSON_FILE, TENSOR_FILE, Spoil, edited, options, without
from peft import LoraConfig, PeftModel, get_peft_model
from peft_fast.triton_kernels import strategies
from reft_models import reft_llama, same, tiny_bert, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from peft_fast import (
    AdapterConfig,
    AdapterModel,
    ReftModel,
    UnsupportedLayer,
    UnsupportedWeight,
    adapter_model,
    base_models,
    config,
    files,
    get_adapter_model,
)
from peft_fast.reft.files import CONFIG, tensors_of

WEIGHTS, HEAD = "adapter_model.safetensors", base_models.HEAD_FILE
TYPED = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, UnsupportedLayer, UnsupportedWeight)

pytestmark = pytest.mark.usefixtures("one_thread")


def digest(model: nn.Module) -> str:
    found = hashlib.sha256(repr([(n, type(m), m.training) for n, m in model.named_modules()]).encode())
    for name, t in model.state_dict(keep_vars=True).items():
        found.update(repr((name, t.dtype, t.shape, t.requires_grad)).encode())
        found.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Saved(NamedTuple):
    """A kind of adapter, and how it is loaded."""

    make: Callable[..., Any]
    load: Callable[[Any, Path], Any]
    base: type
    config: str


def adapted_llama(**options: Any) -> nn.Module:
    """Layers that share factors, and a module that is trained whole."""
    torch.manual_seed(2)
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["norm"], **options}
    return get_adapter_model(tiny_llama(), AdapterConfig("vera", **options))


SAVED = {
    "edits": Saved(reft_llama, lambda model, folder: model.load_edits(folder), ReftModel, CONFIG),
    "adapters": Saved(
        adapted_llama,
        lambda model, folder: model.load_adapter(folder),
        AdapterModel,
        adapter_model.CONFIG,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(1)
    found = {name: tmp_path_factory.mktemp(name) for name in SAVED}
    for name, folder in found.items():
        SAVED[name].make().save_pretrained(folder)
    return found


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def refused(load: Callable[[], object], model: nn.Module, file: Path) -> None:
    before = digest(model)
    with pytest.raises(TYPED) as caught:
        load()
    assert file.name in str(caught.value)
    assert digest(model) == before


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("spoiled", TENSOR_FILE)
def test_tensors(tmp_path, folders, name, spoiled):
    kind, folder = SAVED[name], copied(folders[name], tmp_path)
    TENSOR_FILE[spoiled](folder / WEIGHTS)
    model, base = kind.make(), tiny_llama()
    refused(lambda: kind.load(model, folder), model, folder / WEIGHTS)
    refused(lambda: kind.base.from_pretrained(base, folder), base, folder / WEIGHTS)
    assert not isinstance(base, kind.base)


@pytest.mark.parametrize("name", SAVED)
def test_options_of_another_save(tmp_path, folders, name):
    """A save that was broken off between its two files, each of which is whole."""
    kind, folder = SAVED[name], copied(folders[name], tmp_path)
    file = folder / kind.config
    other = kind.make(dropout=0.25)
    other._write(tmp_path / "other", None)
    written = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(written.items()))))
    kind.load(kind.make(), folder)
    file.write_bytes((tmp_path / "other" / kind.config).read_bytes())
    model, base = kind.make(), tiny_llama()
    refused(lambda: kind.load(model, folder), model, file)
    refused(lambda: kind.base.from_pretrained(base, folder), base, file)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # as another program writes it: without sums
    kind.base.from_pretrained(base, folder)


def test_stock_peft_loads_what_has_a_sum(tmp_path):
    """Of the tensors and of the options, both of which it passes over."""
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    stock = get_peft_model(tiny_llama(), LoraConfig(r=2, **options))
    stock.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = files.read_tensors(tmp_path / WEIGHTS)
    files.write_adapter(tmp_path, tensors, "adapter_config.json", described)
    with safe_open(tmp_path / WEIGHTS, "pt") as opened:
        assert {"format", "sha256", "options_sha256"} == set(opened.metadata())
    stored, again = files.read_adapter(tmp_path, "adapter_config.json", dict)
    assert same(stored, tensors)
    assert again == described
    loaded = PeftModel.from_pretrained(stock.unload(), tmp_path)
    state = loaded.state_dict()
    assert all(
        torch.equal(state[name.replace(".weight", ".default.weight")], t) for name, t in tensors.items()
    )


@pytest.mark.parametrize("spoiled", TENSOR_FILE)
def test_heads(tmp_path, spoiled):
    model = tiny_bert()
    base_models.save_head(model, tmp_path)
    TENSOR_FILE[spoiled](tmp_path / HEAD)
    refused(lambda: base_models.load_head(model, tmp_path), model, tmp_path / HEAD)


# ------------------------------------------------------------------------------------------------------- JSON


REFT_JSON: dict[str, Spoil] = {
    **JSON_FILE,
    "an unknown option": options(rank=4),
    "a path": options(blocks="../../etc"),
    **{f"r = {value!r}": options(r=value) for value in (0, -1, 1.5, "4", None, True, 10**9, 10**30, [4])},
    "r = NaN": edited(lambda c: c.__setitem__(slice(0, None), c.replace(b'"r": 4', b'"r": NaN'))),
    "r = 1e999": edited(lambda c: c.__setitem__(slice(0, None), c.replace(b'"r": 4', b'"r": 1e999'))),
    **{
        f"dropout = {value!r}": options(dropout=value)
        for value in (float("nan"), float("inf"), -0.5, "0", None)
    },
    **{f"layers = {value!r}": options(layers=value) for value in ([], [9], [-1], ["0"], {}, 0, None)},
    **{f"positions = {value!r}": options(positions=value) for value in ("", "f0", 7, None, "f1" * 10_000)},
    **{
        f"{name} = 7": options(**{name: 7})
        for name in ("component", "share_weights", "act_fn", "init", "backend")
    },
    "variant = []": options(variant=[]),
    "r twice": edited(lambda c: c.__setitem__(slice(0, 1), b'{"r": 4,')),
}


ADAPTER_JSON: dict[str, Spoil] = {
    **JSON_FILE,
    "an unknown option": options(rank=4),
    "no method": without("method"),
    **{f"method = {value!r}": options(method=value) for value in ("../../etc", None, [], 4)},
    **{f"r = {value!r}": options(r=value) for value in (0, -1, 1.5, "4", None, True, 10**9, 10**30)},
    **{f"target_modules = {value!r}": options(target_modules=value) for value in ([], "q", [""], ["x"], 0)},
    **{f"{name} = 7": options(**{name: 7}) for name in ("modules_to_save", "adapter_dtype", "backend")},
    "adapter_dtype = int8": options(adapter_dtype="int8"),
    "r twice": edited(lambda c: c.__setitem__(slice(0, 1), b'{"r": 4,')),
    **{f"dropout = {value!r}": options(dropout=value) for value in (float("nan"), -0.5, "0")},
}
CONFIGS = {CONFIG: REFT_JSON, adapter_model.CONFIG: ADAPTER_JSON}


@pytest.mark.parametrize(
    ("name", "spoiled"), [(name, spoiled) for name, kind in SAVED.items() for spoiled in CONFIGS[kind.config]]
)
def test_configs(tmp_path, folders, name, spoiled):
    kind, folder, base = SAVED[name], copied(folders[name], tmp_path), tiny_llama()
    CONFIGS[kind.config][spoiled](folder / kind.config)
    before = digest(base)
    with pytest.raises(TYPED):
        kind.base.from_pretrained(base, folder)
    assert digest(base) == before
    assert not isinstance(base, kind.base)


def row(**changes: object) -> Spoil:
    def spoil(file: Path) -> None:
        table = json.loads(file.read_text())
        table["rows"][0] |= changes
        file.write_text(json.dumps(table))

    return spoil


TABLE: dict[str, Spoil] = {
    **JSON_FILE,
    "a head without rows": without("rows"),
    "rows of numbers": options(rows=[1]),
    "an unknown key": options(more=1),
    **{f"K = {value!r}": row(K=value) for value in (0, -1, 1.5, True, None, "64")},
    **{
        f"choices = {value!r}": row(choices=value)
        for value in ([], [[]], [[None]], [[1, "fused"]], [[None, "x"]])
    },
    "names that are lists": row(choices=[[None, ["fused"]]]),
    "a direction": row(direction="sideways"),
    "a bool that is a number": row(dropout=1),
}


@pytest.mark.parametrize("spoiled", TABLE)
def test_tables_of_strategies(tmp_path, spoiled):
    file = tmp_path / "table.json"
    file.write_bytes((strategies.MEASURED / strategies.DEFAULT).read_bytes())
    TABLE[spoiled](file)
    with pytest.raises((ValueError, OSError), match=r"table\.json"):
        strategies.load(file)


# ------------------------------------------------------------------------------------------------------- YAML

YAML: dict[str, bytes] = {
    "a list": b"- 1",
    "text": b"r",
    "an unknown option": b"rank: 4",
    "two documents": b"r: 4\n---\nr: 5",
    "an object of Python": b"r: !!python/object/apply:os.system ['true']",
    "a tab": b"r:\t- 4\n\tx",
    "not UTF-8": b"r: \xff\xfe",
    "a control character": b"task: \x00",
    "an anchor to itself": b"&a [*a]",
    "nested deeply": b"[" * 5_000,
    "r is a mapping": b"r: {a: 1}",
    "r is infinite": b"r: .inf",
    "lr is not a number": b"lr: .nan",
    "a date": b"seed: 2020-01-01",
    "r twice": b"r: 4\nr: 5",
    "an option in two spellings": b"batch-size: 4\nbatch_size: 5",
}


@pytest.mark.parametrize("spoiled", YAML)
def test_options_in_a_file(tmp_path, spoiled):
    file = tmp_path / "job.yaml"
    file.write_bytes(YAML[spoiled])
    with pytest.raises((ValueError, TypeError), match=r"config: expected|: expected .* got"):
        config.resolve({}, file)


# ------------------------------------------------------------------------------------------------------ kills


def test_a_kill_while_saving_leaves_whole_files(tmp_path):
    """SIGKILL at twenty moments of a process that saves two models in turns: each file is one of theirs."""
    models = [reft_llama(), reft_llama()]
    models[0].save_pretrained(tmp_path)
    written = [{name: t.clone() for name, t in tensors_of(model).items()} for model in models]
    for k in range(20):
        child = os.fork()
        if child == 0:
            while True:
                for model in models:
                    model.save_pretrained(tmp_path)
        time.sleep(0.003 + 0.0017 * k)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = tensors_of(ReftModel.from_pretrained(tiny_llama(), tmp_path))
        assert any(same(loaded, one) for one in written)
