"""Adapters as files: tensors and options read with errors that name the file, and written whole.

Tensors carry their SHA-256 in the metadata of the safetensors file, where other readers pass over it: a
flipped bit, which the format does not notice, is an error. So does the SHA-256 of the options beside them: of
two files, each of them whole, one may be from another save. Files of other writers are read without them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"

Config = TypeVar("Config")


def read_tensors(file: Path, what: str = "the tensors of an adapter") -> dict[str, Tensor]:
    """Raises FileNotFoundError, or ValueError for a file that is no safetensors file, or has changed."""
    return _read_tensors(file, what)[0]


def _read_tensors(file: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """And the metadata."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected {what}, got no such file")
    try:
        # Not `load_file`, which maps a file that may change, and keeps two objects of Python for each tensor.
        data = file.read_bytes()
        tensors = load(data)
        header = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header]).get("__metadata__", {})
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from None
    written = metadata.get(_DIGEST)
    if written is not None and written != (found := _digest(tensors)):
        raise ValueError(f"{file}: expected tensors with the SHA-256 {written}, got {found}: it has changed")
    return tensors, metadata


_DIGEST, _OPTIONS_DIGEST = "sha256", "options_sha256"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _options_digest(options: Mapping[str, Any]) -> str:
    """Of names and values, in whichever order and layout they are written."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def read_adapter(
    directory: Path, config: str, make: Callable[[dict[str, Any]], Config], what: str = "an adapter"
) -> tuple[dict[str, Tensor], Config]:
    """The tensors in a directory, and what `make` makes of the options in the file `config` there.

    Raises FileNotFoundError, or ValueError or TypeError naming the file; ValueError, too, where the options
    are not those that the tensors were written with.
    """
    tensors, metadata = _read_tensors(directory / WEIGHTS, f"the tensors of {what}")
    options = _read_options(directory / config, what)
    made = _make(directory / config, make, options)
    written = metadata.get(_OPTIONS_DIGEST)
    if written is not None and written != (found := _options_digest(options)):
        raise ValueError(
            f"{directory / config}: expected the options that {WEIGHTS} was saved with, of the SHA-256 "
            f"{written}, got {found}: one of the files has changed, or a save was broken off between them"
        )
    return tensors, made


def write_adapter(
    directory: Path, tensors: Mapping[str, Tensor], config: str, options: Mapping[str, Any]
) -> None:
    """Both files, for `read_adapter`; the folder is made if it is missing."""
    _write_tensors(directory / WEIGHTS, tensors, {_OPTIONS_DIGEST: _options_digest(options)})
    write_json(directory / config, options)


def read_config(file: Path, make: Callable[[dict[str, Any]], Config], what: str = "an adapter") -> Config:
    """What `make` makes of the JSON object in a file.

    Raises FileNotFoundError, or ValueError or TypeError naming the file and the option.
    """
    return _make(file, make, _read_options(file, what))


def _read_options(file: Path, what: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected the options of {what}, got no such file")
    try:
        options = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(options).__name__}")
    return options


def _make(file: Path, make: Callable[[dict[str, Any]], Config], options: dict[str, Any]) -> Config:
    try:
        return make(options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{file}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself takes the last of two values under one key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{twice} more than once")
    return found


def check_tensors(file: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError or TypeError naming the first tensor that is missing, unknown or does not fit."""
    for name in own:
        if name not in stored:
            raise ValueError(f"{file}: {name}: expected a tensor, got none")
    for name, tensor in stored.items():
        if name not in own:
            raise ValueError(f"{file}: {name}: expected no such tensor, got {list(tensor.shape)}")
        expected = own[name]
        if tensor.shape != expected.shape:
            raise ValueError(f"{file}: {name}: expected {list(expected.shape)}, got {list(tensor.shape)}")
        if tensor.is_floating_point() != expected.is_floating_point() or (
            not tensor.is_floating_point() and tensor.dtype != expected.dtype
        ):
            raise TypeError(f"{file}: {name}: expected a dtype like {expected.dtype}, got {tensor.dtype}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{file}: {name}: expected finite numbers, got some that are not")


def copy_tensors(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Into the tensors that are there, which an optimizer may hold; both were checked to be alike."""
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def from_state_dict(
    state_dict: Mapping[str, Tensor], keys: Mapping[str, str], what: str
) -> dict[str, Tensor]:
    """The tensors of a model's state dict by their names in a file; `keys` are those in the state dict."""
    for key in keys.values():
        if key not in state_dict:
            raise ValueError(f"state_dict: expected {key!r}, {what} of the model, got none")
    return {name: state_dict[key] for name, key in keys.items()}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """In a folder that is made if it is missing."""
    _write_tensors(file, tensors, {})


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", _DIGEST: _digest(stored), **about}
    replace_file(file, lambda part: save_file(stored, part, metadata=metadata))


def write_json(file: Path, options: Mapping[str, Any]) -> None:
    text = json.dumps(options, indent=2) + "\n"
    replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file that is either the old one or the whole new one, after a loss of power, too."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- whole folders


def seal(file: Path, **facts: Any) -> None:
    """Writes the SHA-256 of every other file in the folder, and what else is to be known of it, as JSON."""
    others = [path for path in sorted(file.parent.rglob("*")) if path.is_file() and path != file]
    sums = {path.relative_to(file.parent).as_posix(): _sum(path) for path in others}
    write_json(file, {**facts, "sha256": sums})


def check_seal(file: Path) -> dict[str, Any]:
    """What `seal` wrote; files that came later are passed over.

    Raises FileNotFoundError or ValueError naming a file that is missing or has changed since.
    """
    sealed = read_config(file, dict, "what was written")
    sums = sealed.get("sha256")
    if not isinstance(sums, dict) or not sums:
        raise ValueError(f"{file}: sha256: expected the sums of the files beside it, got {sums!r}")
    for name, written in sums.items():
        path = file.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{file}: sha256: expected names of files beside it, got {name!r}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a file with the SHA-256 {written}, got none")
        if (found := _sum(path)) != written:
            raise ValueError(f"{path}: expected the SHA-256 {written}, got {found}: it has changed")
    return sealed


def _sum(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        for part in iter(lambda: opened.read(1 << 20), b""):
            found.update(part)
    return found.hexdigest()
