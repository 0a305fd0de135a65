"""Adapters on the linear layers of a model: `get_adapter_model(model, config)`, undone by `model.unload()`.

The model stays the object it was, and its class becomes a subclass of the same name. Each target is replaced
by an `AdapterLinear` around it, so the base is in the state dict as `<layer>.base_layer.*`.

On disk: `adapter_config.json`, and `adapter_model.safetensors` with what was added or is trained, under its
state-dict keys; factors that layers share are there once, under the first layer's. Files are replaced whole.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter_config import ALL_LINEAR, AdapterConfig
from .adapter_linear import AdapterLinear, SharedFactors
from .base_models import heads
from .errors import UnsupportedLayer
from .files import (
    WEIGHTS,
    check_tensors,
    copy_tensors,
    from_state_dict,
    read_adapter,
    write_adapter,
)
from .formats import from_linear, is_conv1d
from .fused_layer import observed
from .methods import METHODS, resolve_options
from .modules import allow_repacking, check_base, is_linear4bit, protect_from_repacking
from .packed_linear import PackedLinear
from .quantization import OUTPUT_LAYERS, check_container, check_unadapted, is_within
from .swap import check_module, reader_reason
from .swapped import subclass
from .tuned_model import TunedModel, build

CONFIG = "adapter_config.json"


def get_adapter_model(model: nn.Module, config: AdapterConfig) -> AdapterModel:
    """Puts adapters on linear layers of `model`, in place, and freezes all else but `modules_to_save`.

    Targets are `nn.Linear`, transformers' `Conv1D` and bitsandbytes' `Linear4bit`, fused or not. Where the
    method shares factors, all layers share one `SharedFactors`. bitsandbytes is kept from repacking 4-bit
    weights of `model` in place, as in `accelerate`.

    Returns:
        `model`.

    Raises:
        UnsupportedLayer, UnsupportedWeight: the model, or a layer of it, cannot be adapted.
        ValueError: an option of config does not fit the model.
        MemoryError: what is added does not fit into memory.
        In each case the model is left as it was.
    """
    return _adapt(model, config, lambda tensors: None)


def _adapt(
    model: nn.Module, config: AdapterConfig, check: Callable[[dict[str, Tensor]], None]
) -> AdapterModel:
    """`get_adapter_model`; `check` gets `tensors_of` the result, without values, before any is allocated."""
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"config: expected an AdapterConfig, got {type(config).__name__}")
    check_module(model)
    if any(isinstance(module, TunedModel | AdapterLinear) for module in model.modules()):
        raise UnsupportedLayer("model: expected one without adapters, got one that has some; see unload()")
    check_unadapted(model)
    check_container(model)
    saved = _saved(model, config)
    targets = _targets(model, config, saved) if config.method is not None else []
    if not targets and not saved:
        raise UnsupportedLayer("model: expected something to train, got no target and no modules_to_save")
    layers: list[Any] = [model.get_submodule(name) for name in targets]
    for name, layer in zip(targets, layers, strict=True):
        _check_layer(name, layer, config)
    own = {name: _created(layer, config) for name, layer in zip(targets, layers, strict=True)}
    check(_stored(model, own, _shared(layers, config, "meta"), saved))

    whole: list[Any] = [model.get_submodule(name) for name in saved]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    protected = tuple(name for name, module in model.named_modules() if protect_from_repacking(module))
    try:
        originals = [{key: tensor.clone() for key, tensor in module.state_dict().items()} for module in whole]
        rest = (_shared(layers, config), config.adapter_dtype, config.backend, config.options)
        adapted = [AdapterLinear(layer, config.method or "", *rest).train(layer.training) for layer in layers]
    except BaseException as error:
        for parameter in trained:
            parameter.requires_grad_(True)
        for name in protected:
            allow_repacking(model.get_submodule(name))
        if type(error) is not RuntimeError:
            raise
        got = f"{config.method!r} with {dict(config.options)}: {error}"
        raise MemoryError(f"config: expected an adapter that fits into memory, got {got}") from error
    model.requires_grad_(False)
    for name, layer in zip(targets, adapted, strict=True):
        _set(model, name, layer)
    for module in whole:
        module.requires_grad_(True)
    made: Any = model
    made.adapter_config = config
    made.adapter_targets = Targets(tuple(targets), saved, originals, protected)
    made.__class__ = model_class(made.__class__)
    return made


class Targets(NamedTuple):
    """What was done to a model, by the names of its modules."""

    layers: tuple[str, ...]
    saved: tuple[str, ...]
    originals: list[dict[str, Tensor]]  # of each saved module, as `unload` leaves it
    protected: tuple[str, ...]  # the layers that `unload` lets bitsandbytes repack again


class AdapterModel(TunedModel):
    """Mixin: a model with adapters, made by `get_adapter_model` or `AdapterModel.from_pretrained`."""

    adapter_config: AdapterConfig
    adapter_targets: Targets

    @property
    def adapters(self) -> dict[str, AdapterLinear]:
        """Every adapted layer, by its name."""
        layers: Any = {name: self.get_submodule(name) for name in self.adapter_targets.layers}
        return layers

    def unload(self) -> nn.Module:
        """Puts back the very layers that were there: the model, still frozen, as it was. Returns it.

        What was trained whole is set to what it was.
        """
        targets = self.adapter_targets
        for name, layer in self.adapters.items():
            _set(self, name, layer.base_layer.train(layer.training))
        for name, original in zip(targets.saved, targets.originals, strict=True):
            module = self.get_submodule(name).requires_grad_(False)
            copy_tensors(original, module.state_dict())
        for name in targets.protected:
            allow_repacking(self.get_submodule(name))
        self.__class__ = type(self)._stock
        del self.adapter_config, self.adapter_targets
        return self

    def _write(self, directory: Path, state_dict: dict[str, Tensor] | None) -> None:
        tensors = tensors_of(self)
        if state_dict is not None:
            tensors = from_state_dict(state_dict, {key: key for key in tensors}, "an adapter's")
        described = self.adapter_config.to_dict()
        del described["backend"]  # which is this machine's
        write_adapter(directory, tensors, CONFIG, described)

    @classmethod
    def from_pretrained(
        cls, base_model: nn.Module, directory: str | Path, *, backend: str = "auto"
    ) -> AdapterModel:
        """`base_model`, adapted as the model that `save_pretrained` wrote to `directory`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError, TypeError: a file, or `backend`, does not fit; the message names it, and the model is
                left as it was.
            UnsupportedLayer: as `get_adapter_model`.
        """
        directory = Path(directory)
        stored, config = read_adapter(directory, CONFIG, AdapterConfig.from_dict)
        config = dataclasses.replace(config, backend=backend)
        check = functools.partial(check_tensors, directory / WEIGHTS, stored)
        return build(
            base_model,
            lambda: _adapt(base_model, config, check),
            lambda model: copy_tensors(stored, tensors_of(model)),
        )

    def load_adapter(self, directory: str | Path) -> None:
        """Sets the adapters to those in `directory`, in the parameters that an optimizer may hold already.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError, TypeError: a file does not fit; the message names it, and nothing was changed.
        """
        directory = Path(directory)
        stored, config = read_adapter(directory, CONFIG, AdapterConfig.from_dict)
        mine, theirs = self.adapter_config.to_dict(), config.to_dict()
        for option in ("method", *self.adapter_config.options):
            if option != "dropout" and mine[option] != theirs.get(option):
                raise ValueError(
                    f"{directory / CONFIG}: {option}: expected {mine[option]!r}, got {theirs.get(option)!r}"
                )
        own = tensors_of(self)
        check_tensors(directory / WEIGHTS, stored, own)
        copy_tensors(stored, own)


@functools.cache
def model_class(stock: Any) -> type:
    """The class of an adapted model."""
    return subclass(AdapterModel, model_class, stock)


def tensors_of(model: AdapterModel) -> dict[str, Tensor]:
    """What the files hold, by its state-dict keys; a tensor with several keys is there under the first."""
    layers = model.adapters
    own = {name: {key: getattr(layer, key) for key in layer.adapter_names} for name, layer in layers.items()}
    shared = next((layer.shared for layer in layers.values()), None)
    return _stored(model, own, shared, model.adapter_targets.saved)


def _stored(
    model: nn.Module,
    own: Mapping[str, Mapping[str, Tensor]],
    shared: SharedFactors | None,
    saved: Sequence[str],
) -> dict[str, Tensor]:
    """As `tensors_of`, of each layer's own tensors, the factors that they share, and modules saved whole."""
    found = {f"{name}.{key}": tensor for name, tensors in own.items() for key, tensor in tensors.items()}
    modules = [(name, model.get_submodule(name)) for name in saved]
    if shared is not None:
        modules.insert(0, (f"{next(iter(own))}.shared", shared))
    for name, module in modules:
        found |= {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    first: dict[int, str] = {}
    return {key: tensor for key, tensor in found.items() if first.setdefault(id(tensor), key) == key}


# ------------------------------------------------------------------------------------------------- choosing


def _saved(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """The modules that are trained whole, the outermost of those that are named."""
    if config.modules_to_save is None:
        found = list(heads(model))
    else:
        found = []
        for end in config.modules_to_save:
            named = [name for name, _ in model.named_modules() if _ends(name, end)]
            if not named:
                raise ValueError(f"modules_to_save: expected the end of a module's name, got {end!r}")
            found += [name for name in named if name not in found]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    for name in outer:
        module = model.get_submodule(name)
        stored = {key: p.dtype for key, p in module.named_parameters() if not p.is_floating_point()}
        stored |= {key: m.packing[0] for key, m in module.named_modules() if isinstance(m, PackedLinear)}
        if stored:
            key, kind = next(iter(stored.items()))
            raise UnsupportedLayer(
                f"modules_to_save: expected modules that can be trained, got {name!r}, where {key or name} "
                f"is {kind}"
            )
    return tuple(outer)


def _targets(model: nn.Module, config: AdapterConfig, saved: Sequence[str]) -> list[str]:
    """The names of the layers to adapt.

    Raises:
        UnsupportedLayer: there are none, or one has another owner, hooks, or a weight that is read directly.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = collections.Counter(id(p) for m in modules.values() for p in m._parameters.values())
    outputs: Any = getattr(model, "get_output_embeddings", None)
    output = outputs() if outputs is not None else None
    chosen = []
    for name, layer in _linear(modules):
        if any(f"{name}.".startswith(f"{whole}.") for whole in saved):
            continue
        if any(_ends(name, end) for end in config.exclude_modules):
            continue
        reason = reader_reason(name, modules)
        if config.target_modules == ALL_LINEAR:
            if reason is not None or layer is output or is_within(name, OUTPUT_LAYERS):
                continue
        elif not any(_ends(name, end) for end in config.target_modules):
            continue
        if owners[id(layer.weight)] > 1:
            reason = "its weight has another owner"
        reason = reason or observed("it", layer)
        if reason is not None:
            raise UnsupportedLayer(f"{name}: expected a layer that can be adapted, got one where {reason}")
        chosen.append(name)
    if not chosen:
        expected = f"linear layers that end in one of {list(config.target_modules)}"
        if config.target_modules == ALL_LINEAR:
            expected = "linear layers"
        names = [name for name, _ in _linear(modules)]
        raise UnsupportedLayer(f"target_modules: expected {expected}, got none among {names}")
    targets = () if config.target_modules == ALL_LINEAR else config.target_modules
    for argument, ends in (("target_modules", targets), ("exclude_modules", config.exclude_modules)):
        for end in ends:
            if not any(_ends(name, end) for name, _ in _linear(modules)):
                raise ValueError(f"{argument}: expected the end of a linear layer's name, got {end!r}")
    return chosen


def _linear(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    for name, module in modules.items():
        if isinstance(module, nn.Linear) or is_linear4bit(module) or is_conv1d(module):
            yield name, module


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _check_layer(name: str, layer: Any, config: AdapterConfig) -> None:
    """Raises UnsupportedLayer, UnsupportedWeight or ValueError, naming the layer."""
    try:
        check_base(layer)
        N, K = _sizes(layer)
        resolve_options(config.method or "", config.options, N, K)
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from None


def _sizes(layer: Any) -> tuple[int, int]:
    """[N, K] of a linear layer."""
    weight = from_linear(layer)
    return weight.out_features, weight.in_features


def _created(layer: Any, config: AdapterConfig) -> dict[str, Tensor]:
    """A layer's own tensors, without values."""
    empty = functools.partial(torch.empty, dtype=config.adapter_dtype or torch.float32, device="meta")
    return METHODS[config.method or ""].create(config.options, *_sizes(layer), empty)


def _shared(
    layers: Sequence[Any], config: AdapterConfig, device: torch.device | str | None = None
) -> SharedFactors | None:
    """The factors that the layers share, if any, on their device where none is given."""
    if config.method is None or not METHODS[config.method].shared_options:
        return None
    devices = {layer.weight.device for layer in layers}
    if len(devices) > 1:
        raise UnsupportedLayer(
            f"model: expected the layers that share factors on one device, got {sorted(map(str, devices))}"
        )
    sizes = [_sizes(layer) for layer in layers]
    return SharedFactors(
        config.method,
        max(K for _, K in sizes),
        max(N for N, _ in sizes),
        adapter_dtype=config.adapter_dtype,
        device=device or devices.pop(),
        **config.options,
    )


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
