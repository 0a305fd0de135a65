"""A model's edits as files: `adapter_model.safetensors` and `reft_config.json`.

Tensors are named "<block>.<group>.<tensor>", such as 3.all.source, with no trace of where the model keeps its
blocks. They hold the bases that the rotations start from, so training goes on in the same bits. Files are
replaced whole; a model is changed once everything in them has been checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import LoReFTConfig

if TYPE_CHECKING:
    from .model import ReftModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "reft_config.json"


def tensors_of(model: ReftModel) -> dict[str, Tensor]:
    """Every parameter and buffer of the edits, by its name in the file."""
    return {
        f"{place}.{name}": tensor
        for place, edit in model.edits.items()
        for name, tensor in edit.state_dict().items()
    }


def save(model: ReftModel, directory: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Writes the edits of `model`, or those in a state dict of it, and their config."""
    tensors = tensors_of(model)
    if state_dict is not None:
        names = {name: _in_model(model, name) for name in tensors}
        missing = [name for name in names.values() if name not in state_dict]
        if missing:
            raise ValueError(f"state_dict: expected {missing[0]!r}, an edit of the model, got none")
        tensors = {name: state_dict[key] for name, key in names.items()}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / WEIGHTS, lambda part: save_file(stored, part, metadata={"format": "pt"}))
    text = json.dumps(model.reft_config.to_dict(), indent=2) + "\n"
    replace_file(directory / CONFIG, lambda part: part.write_text(text, encoding="utf-8"))


def load(model: ReftModel, directory: Path) -> None:
    """Copies the edits in `directory` into those of `model`, which have to be alike; see `load_edits`."""
    stored = _read_tensors(directory / WEIGHTS)
    config = read_config(directory / CONFIG)
    for option in ("variant", "act_fn", "component", "positions", "dropout_on"):
        expected, got = getattr(model.reft_config, option), getattr(config, option)
        if got != expected:
            raise ValueError(f"{directory / CONFIG}: {option}: expected {expected!r}, got {got!r}")
    own = tensors_of(model)
    _check(directory / WEIGHTS, stored, own)
    for name, tensor in own.items():
        if stored[name].dtype != tensor.dtype:
            raise TypeError(
                f"{directory / WEIGHTS}: {name}: expected {tensor.dtype}, got {stored[name].dtype}"
            )
    _copy(stored, own)


def from_pretrained(base_model: nn.Module, directory: Path) -> ReftModel:
    """See `ReftModel.from_pretrained`."""
    stored = _read_tensors(directory / WEIGHTS)
    config = read_config(directory / CONFIG)

    def fill(model: ReftModel) -> None:
        own = tensors_of(model)
        _check(directory / WEIGHTS, stored, own)
        adopt_dtypes(model, stored)
        _copy(stored, tensors_of(model))

    return build(base_model, config, fill)


def build(base_model: nn.Module, config: LoReFTConfig, fill: Callable[[ReftModel], None]) -> ReftModel:
    """`get_reft_model`, then `fill`; an error in either leaves the model as it was."""
    from .model import get_reft_model

    trained = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
    model = get_reft_model(base_model, config)
    try:
        fill(model)
    except BaseException:
        model.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return model


def adopt_dtypes(model: ReftModel, stored: Mapping[str, Tensor]) -> None:
    """Gives the tensors of the edits the dtypes of those stored."""
    for place, edit in model.edits.items():
        for name, tensor in [*edit.named_parameters(), *edit.named_buffers()]:
            tensor.data = tensor.data.to(stored[f"{place}.{name}"].dtype)


def read_config(file: Path) -> LoReFTConfig:
    """Raises FileNotFoundError, or ValueError or TypeError naming the file and the option."""
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(options).__name__}")
    try:
        return LoReFTConfig.from_dict(options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{file}: {error}") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected the edits of a model, got no such file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from None


def _check(file: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
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
        if not tensor.is_floating_point() and not bool((tensor.abs() == 1).all()):
            raise ValueError(f"{file}: {name}: expected signs, 1 and -1, got other numbers")


def _copy(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def _in_model(model: ReftModel, name: str) -> str:
    """The state-dict key of a tensor of the file."""
    layer, rest = name.split(".", 1)
    component = model.reft_blocks[int(layer)].reft_component
    return ".".join(part for part in (model.reft_targets.path, layer, component, "reft", rest) if part)


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file that is either the old one or the whole new one."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
