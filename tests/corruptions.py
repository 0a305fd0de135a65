"""Ways to spoil any file, one of safetensors, and one of JSON: functions of the file, by what they do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Spoil = Callable[[Path], object]


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
