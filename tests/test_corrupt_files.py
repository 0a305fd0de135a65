"""Spoiled files are typed errors that name the file, and load nothing: edits, heads, configs, tables."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_fast.triton_kernels import strategies
from reft_models import reft_llama, same, tiny_bert, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from peft_fast import ReftModel, UnsupportedLayer, UnsupportedWeight, base_models, config
from peft_fast.reft.files import CONFIG, tensors_of

WEIGHTS, HEAD = "adapter_model.safetensors", base_models.HEAD_FILE
TYPED = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, UnsupportedLayer, UnsupportedWeight)

pytestmark = pytest.mark.usefixtures("one_thread")

Spoil = Callable[[Path], object]


def digest(model: nn.Module) -> str:
    found = hashlib.sha256(repr([(n, type(m), m.training) for n, m in model.named_modules()]).encode())
    for name, t in model.state_dict(keep_vars=True).items():
        found.update(repr((name, t.dtype, t.shape, t.requires_grad)).encode())
        found.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def edited(change: Callable[[bytearray], object]) -> Spoil:
    def spoil(file: Path) -> None:
        content = bytearray(file.read_bytes())
        change(content)
        file.write_bytes(content)

    return spoil


def flipped(at: int, bit: int = 0) -> Spoil:
    """One bit of the byte at this place, from the end where it is negative."""
    return edited(lambda content: content.__setitem__(at, content[at] ^ (1 << bit)))


def truncated(share: float) -> Spoil:
    return edited(lambda content: content.__delitem__(slice(int(share * len(content)), None)))


def written(content: bytes) -> Spoil:
    return lambda file: file.write_bytes(content)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


# ------------------------------------------------------------------------------------------------ safetensors


def header(change: Callable[[dict], object]) -> Spoil:
    """The header of a safetensors file rewritten, its length with it, its data as they are."""

    def spoil(file: Path) -> None:
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        described = json.loads(content[8 : 8 + length])
        change(described)
        text = json.dumps(described).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(file: Path) -> None:
        stored = load_file(file)
        change(stored)
        save_file(stored, file)

    return spoil


def first(described: dict) -> dict:
    return next(value for name, value in sorted(described.items()) if name != "__metadata__")


def rename_first(stored: dict[str, torch.Tensor], name: str) -> None:
    key = sorted(stored)[0]
    stored[name] = stored.pop(key)


def replace_float(stored: dict[str, torch.Tensor], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    key = next(name for name in sorted(stored) if stored[name].is_floating_point())
    stored[key] = make(stored[key]).contiguous()


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.flatten().index_fill(0, torch.tensor([0]), value).view_as(t)


ANY_FILE: dict[str, Spoil] = {
    "emptied": written(b""),
    "one byte": written(b"\0"),
    "noise": written(bytes(range(256)) * 8),
    "a folder": as_folder,
    "missing": Path.unlink,
    "a link to nowhere": dangling,
    **{f"cut at {share}": truncated(share) for share in (0.02, 0.5, 0.9, 0.999)},
}
TENSOR_FILE: dict[str, Spoil] = {
    **ANY_FILE,
    "a pickle": lambda file: torch.save({"x": torch.ones(2)}, file),
    **{f"length, byte {i}": flipped(i) for i in range(8)},
    **{f"header, byte {i}": flipped(i, 3) for i in (8, 9, 12, 20)},
    "a huge header": edited(lambda c: c.__setitem__(slice(0, 8), struct.pack("<Q", 2**62))),
    "a negative header": edited(lambda c: c.__setitem__(slice(0, 8), b"\xff" * 8)),
    "bytes behind the end": edited(lambda c: c.extend(b"more")),
    "offsets beyond the end": header(lambda d: first(d)["data_offsets"].__setitem__(1, 2**40)),
    "offsets in reverse": header(lambda d: first(d)["data_offsets"].reverse()),
    "overlapping tensors": header(
        lambda d: [v.update(data_offsets=[0, 4]) for v in d.values() if "dtype" in v]
    ),
    "an unknown dtype": header(lambda d: first(d).update(dtype="F7")),
    "a shape that lies": header(lambda d: first(d).update(shape=[3, 3])),
    "a negative shape": header(lambda d: first(d).update(shape=[-1, 4])),
    "a shape that overflows": header(lambda d: first(d).update(shape=[2**33, 2**33])),
    "a header that is a list": written(struct.pack("<Q", 2) + b"[]"),
    "no tensors": tensors(dict.clear),
    "one missing": tensors(lambda t: t.pop(sorted(t)[0])),
    "one too many": tensors(lambda t: t.update(extra=torch.ones(2))),
    "a path as a name": tensors(lambda t: rename_first(t, "../../../etc/passwd")),
    "an empty name": tensors(lambda t: rename_first(t, "")),
    "another shape": tensors(lambda t: replace_float(t, lambda x: x.flatten()[:-1])),
    "transposed": tensors(lambda t: replace_float(t, lambda x: x[None])),
    "integers": tensors(lambda t: replace_float(t, lambda x: x.to(torch.int32))),
    "not a number": tensors(lambda t: replace_float(t, with_value(float("nan")))),
    **{f"payload, byte {i}": flipped(i) for i in (-1, -64, -200)},
    "infinite": tensors(lambda t: replace_float(t, with_value(float("inf")))),
}


@pytest.fixture(scope="module")
def edits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edits")
    torch.manual_seed(1)
    reft_llama().save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("spoiled", TENSOR_FILE)
def test_edits(tmp_path, edits, spoiled):
    folder = copied(edits, tmp_path)
    TENSOR_FILE[spoiled](folder / WEIGHTS)
    model, base = reft_llama(), tiny_llama()
    refused(lambda: model.load_edits(folder), model, folder / WEIGHTS)
    refused(lambda: ReftModel.from_pretrained(base, folder), base, folder / WEIGHTS)
    assert not isinstance(base, ReftModel)


@pytest.mark.parametrize("spoiled", TENSOR_FILE)
def test_heads(tmp_path, spoiled):
    model = tiny_bert()
    base_models.save_head(model, tmp_path)
    TENSOR_FILE[spoiled](tmp_path / HEAD)
    refused(lambda: base_models.load_head(model, tmp_path), model, tmp_path / HEAD)


# ------------------------------------------------------------------------------------------------------- JSON


def options(**changes: object) -> Spoil:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(option: str) -> Spoil:
    def spoil(file: Path) -> None:
        content = json.loads(file.read_text())
        del content[option]
        file.write_text(json.dumps(content))

    return spoil


JSON_FILE: dict[str, Spoil] = {
    **{name: spoil for name, spoil in ANY_FILE.items() if name != "cut at 0.999"},
    "nested deeply": written(b"[" * 100_000),
    "an object nested deeply": written(b'{"r":' * 100_000),
    "a list": written(b"[]"),
    "a number": written(b"1e999"),
    "null": written(b"null"),
    "text": written(b'"r"'),
    "not UTF-8": written(b'{"r": "\xff\xfe"}'),
    "two objects": edited(lambda c: c.extend(b"{}")),
}
REFT_JSON: dict[str, Spoil] = {
    **JSON_FILE,
    "an unknown option": options(rank=4),
    "a path": options(blocks="../../etc"),
    **{f"r = {value!r}": options(r=value) for value in (0, -1, 1.5, "4", None, True, 10**30, [4])},
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


@pytest.mark.parametrize("spoiled", REFT_JSON)
def test_configs_of_edits(tmp_path, edits, spoiled):
    folder, base = copied(edits, tmp_path), tiny_llama()
    REFT_JSON[spoiled](folder / CONFIG)
    before = digest(base)
    with pytest.raises(TYPED):
        ReftModel.from_pretrained(base, folder)
    assert digest(base) == before
    assert not isinstance(base, ReftModel)


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
