"""A model's edits as files: `adapter_model.safetensors` and `reft_config.json`.

Tensors are named "<block>.<group>.<tensor>", such as 3.all.source, with no trace of where the model keeps its
blocks. They hold the bases that the rotations start from, so training goes on in the same bits. Files are
replaced whole; a model is changed once everything in them has been checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..files import (
    WEIGHTS,
    check_tensors,
    copy_tensors,
    from_state_dict,
    read_adapter,
    write_adapter,
)
from ..tuned_model import build as build_model
from .config import LoReFTConfig

if TYPE_CHECKING:
    from .model import ReftModel

CONFIG = "reft_config.json"
_WHAT = "the edits of a model"


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
        keys = {name: _in_model(model, name) for name in tensors}
        tensors = from_state_dict(state_dict, keys, "an edit")
    described = model.reft_config.to_dict()
    del described["backend"]  # which is this machine's
    write_adapter(directory, tensors, CONFIG, described)


def load(model: ReftModel, directory: Path) -> None:
    """Copies the edits in `directory` into those of `model`, which have to be alike; see `load_edits`."""
    stored, config = read_adapter(directory, CONFIG, LoReFTConfig.from_dict, _WHAT)
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
    copy_tensors(stored, own)


def from_pretrained(base_model: nn.Module, directory: Path, backend: str) -> ReftModel:
    """See `ReftModel.from_pretrained`."""
    stored, config = read_adapter(directory, CONFIG, LoReFTConfig.from_dict, _WHAT)
    config = dataclasses.replace(config, backend=backend)

    def fill(model: ReftModel) -> None:
        own = tensors_of(model)
        _check(directory / WEIGHTS, stored, own)
        adopt_dtypes(model, stored)
        copy_tensors(stored, tensors_of(model))

    return build(base_model, config, fill)


def build(base_model: nn.Module, config: LoReFTConfig, fill: Callable[[ReftModel], None]) -> ReftModel:
    """`get_reft_model`, then `fill`; an error in either leaves the model as it was."""
    from .model import get_reft_model

    return build_model(base_model, lambda: get_reft_model(base_model, config), fill)


def adopt_dtypes(model: ReftModel, stored: Mapping[str, Tensor]) -> None:
    """Gives the tensors of the edits the dtypes of those stored."""
    for place, edit in model.edits.items():
        for name, tensor in [*edit.named_parameters(), *edit.named_buffers()]:
            tensor.data = tensor.data.to(stored[f"{place}.{name}"].dtype)


def _check(file: Path, stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """As `check_tensors`; what are integers are signs."""
    check_tensors(file, stored, own)
    for name, tensor in stored.items():
        if not tensor.is_floating_point() and not bool((tensor.abs() == 1).all()):
            raise ValueError(f"{file}: {name}: expected signs, 1 and -1, got other numbers")


def _in_model(model: ReftModel, name: str) -> str:
    """The state-dict key of a tensor of the file."""
    layer, rest = name.split(".", 1)
    component = model.reft_blocks[int(layer)].reft_component
    return ".".join(part for part in (model.reft_targets.path, layer, component, "reft", rest) if part)
