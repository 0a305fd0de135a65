"""`quantize(model)`: linear layers in place by `Linear4bit` or `PackedLinear`, after the model was made.

`to_packed(model)`: bitsandbytes' layers by `PackedLinear`, for tuners that need a weight [N, K].
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import nn

from .adapter_linear import AdapterLinear
from .base_models import BITSANDBYTES, HEADS
from .errors import UnsupportedLayer, UnsupportedWeight
from .formats import BLOCK_SIZES, DENSE_DTYPES, from_linear, is_conv1d
from .functional import check_choice
from .fused_layer import observed
from .modules import LowRankLinear, check_base, is_linear4bit, is_linear8bit
from .packed_linear import PackedLinear
from .packing import PACKINGS
from .swap import check_module, reader_reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUT_LAYERS = ("lm_head", *HEADS)
"""How the names of output layers, or of the modules that hold them, end in transformers."""


def quantize(
    model: nn.Module,
    quant: str = "nf4",
    *,
    skip_modules: Iterable[str] = (),
    double_quant: bool = True,
    blocksize: int = 64,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Replaces linear layers of `model`: by bitsandbytes' `Linear4bit`, for other formats by `PackedLinear`.

    These are `nn.Linear` and `Conv1D`. Left as they are: output layers (`get_output_embeddings`, and whatever
    is in a module with a name that ends in one of `OUTPUT_LAYERS`), what transformers keeps in fp32,
    subclasses, layers with hooks, and layers whose weight has another owner too or is read without calling
    the layer. With `Linear4bit`, a transformers model is marked as quantized, so that it saves and loads as
    one that was loaded in 4 bits; with `PackedLinear` its `save_pretrained` raises, and `state_dict` has it.

    Args:
        model: on any device but meta, and without adapters.
        quant: "nf4" or "fp4", or of `packing.PACKINGS`, which the options below do not concern.
        skip_modules: names, or ends or parts of dotted names, of further layers to leave, or of modules
            around them.
        double_quant: quantizes the scales of the blocks, too.
        blocksize: weights that share a scale, one of `formats.BLOCK_SIZES`.
        compute_dtype: what a layer computes in; by default the dtype of its weight.

    Returns:
        The names of the layers that were replaced.

    Raises:
        UnsupportedLayer: no layer can be replaced, one is on the meta device, or `model` has adapters.
        UnsupportedWeight: a weight has NaN or infinity, or for mxfp4 a K that is no multiple of 32.
        ValueError: `quant`, `blocksize` or `compute_dtype` is none of these, or another than that of the
            layers of a transformers model which are in 4 bits already.
        In each case nothing was changed.
    """
    check_choice("quant", quant, (*BITSANDBYTES, *PACKINGS))
    if quant in PACKINGS:
        chosen = quantizable(model, names_of(skip_modules))
        replace_by_packed(model, chosen, quant)
        return chosen
    storage = Storage(quant, double_quant, blocksize, compute_dtype).check().check_against(model)
    chosen = quantizable(model, names_of(skip_modules))
    replace(model, chosen, storage)
    return chosen


def to_packed(model: nn.Module) -> list[str]:
    """Replaces bitsandbytes' layers by `PackedLinear`, in place; bytes, scales and biases are aliased.

    PEFT's tuners then find dense layers: those run, too, that cannot read bitsandbytes' bytes. A layer
    computes in the dtype of its input, whatever `compute_dtype` was. A transformers model is no longer marked
    as quantized, and its `save_pretrained` raises: `state_dict` has its weights; adapters are saved as ever.

    Returns:
        The names of the layers that were replaced.

    Raises:
        UnsupportedLayer: there is no such layer, one has hooks or a forward of its own, or a weight of other
            sizes than it says, or `model` has adapters.
        UnsupportedWeight: a weight is not quantized yet, was repacked, or contradicts itself.
        In each case nothing was changed.
    """
    check_unadapted(model)
    check_container(model)
    layers: dict[str, Any] = {
        name: m
        for name, m in model.named_modules(remove_duplicate=False)
        if is_linear4bit(m) or is_linear8bit(m)
    }
    if not layers:
        raise UnsupportedLayer(f"model: expected layers of bitsandbytes, got none in {type(model).__name__}")
    for name, layer in layers.items():
        if reason := observed(repr(name), layer):
            raise UnsupportedLayer(f"model: expected layers that are only called, got one where {reason}")
    packed = {layer: _packed(layer) for layer in layers.values()}
    for name, layer in layers.items():
        model.set_submodule(name, packed[layer])
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False  # type: ignore[assignment]
    if _is_transformers(model) and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    _refuse_to_save(model)
    return list(layers)


def _packed(layer: Any) -> PackedLinear:
    check_base(layer)
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    return PackedLinear(from_linear(layer), layer.bias, getattr(state, "dtype", None)).train(layer.training)


class Storage(NamedTuple):
    """How weights are stored in 4 bits: the options of `quantize`."""

    quant: str
    double_quant: bool
    blocksize: int
    compute_dtype: torch.dtype | None

    def check(self) -> Storage:
        """Returns self; raises `ValueError` or `TypeError` for what is not known."""
        check_choice("quant", self.quant, BITSANDBYTES)
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"double_quant: expected True or False, got {self.double_quant!r}")
        if self.blocksize not in BLOCK_SIZES:
            raise ValueError(f"blocksize: expected one of {BLOCK_SIZES}, got {self.blocksize!r}")
        if self.compute_dtype not in (None, *DENSE_DTYPES):
            expected = f"None or one of {DENSE_DTYPES}"
            raise ValueError(f"compute_dtype: expected {expected}, got {self.compute_dtype!r}")
        return self

    def check_against(self, model: nn.Module) -> Storage:
        """Returns self; raises `ValueError` where transformers has another one written down for `model`."""
        present = getattr(getattr(model, "config", None), "quantization_config", None)
        if present is not None and _is_transformers(model):
            ours = vars(self.config(model.dtype))
            for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"):
                if ours[name] != (theirs := getattr(present, name, None)):
                    expected = f"{theirs}, as in config.quantization_config"
                    raise ValueError(f"{name}: expected {expected}, got {ours[name]}")
        return self

    def config(self, dtype: torch.dtype, skip_modules: list[str] | None = None) -> Any:
        """The same for transformers, of a model in `dtype`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype or dtype,
            llm_int8_skip_modules=skip_modules,
        )


def names_of(skip_modules: Iterable[str]) -> tuple[str, ...]:
    if isinstance(skip_modules, str):
        raise TypeError(f"skip_modules: expected a collection of names, got {skip_modules!r}")
    return tuple(skip_modules)


def check_unadapted(model: nn.Module) -> None:
    """Raises `UnsupportedLayer` where `model` has adapters, of PEFT or of this library."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_module(model)
    for name, module in model.named_modules():
        of_peft = isinstance(module, BaseTunerLayer)
        if of_peft or isinstance(module, LowRankLinear | AdapterLinear):
            found = f"{type(module).__name__}{' of PEFT' if of_peft else ''} at {name!r}"
            also = ", or see unload() and merge_and_unload()" if of_peft else ""
            raise UnsupportedLayer(
                f"model: expected one without adapters, got a {found}; "
                f"quantize before adapters are added{also}"
            )


def check_container(model: nn.Module) -> None:
    """Raises `UnsupportedLayer` for a layer that no module holds, so that nothing can take its place."""
    if isinstance(model, nn.Linear) or is_conv1d(model) or is_linear4bit(model) or is_linear8bit(model):
        raise UnsupportedLayer(
            f"model: expected a module with layers in it, got a layer, {type(model).__name__}, itself; "
            "AdapterLinear.from_linear and PackedLinear.from_linear take one"
        )


def is_within(name: str, ends: Iterable[str]) -> bool:
    """Whether the dotted `name` ends in one of `ends`, or that of a module around it does."""
    ends, parts = tuple(ends), name.split(".")
    return any(".".join(parts[:depth]).endswith(ends) for depth in range(1, len(parts) + 1))


def quantizable(
    model: nn.Module, skip_modules: tuple[str, ...], saved_modules: tuple[str, ...] = ()
) -> list[str]:
    """As `choose`, of layers that have data, which is finite."""
    chosen = choose(model, skip_modules, saved_modules)
    for name in chosen:
        weight: Any = model.get_submodule(name).weight
        if weight.is_meta:
            raise UnsupportedLayer(f"model: expected layers with data, got {name!r} on the meta device")
        if not weight.isfinite().all():  # double quantization would make all of it NaN
            raise UnsupportedWeight(f"{name}.weight: expected finite values, got NaN or infinity")
    return chosen


def choose(model: nn.Module, skip_modules: tuple[str, ...], saved_modules: tuple[str, ...] = ()) -> list[str]:
    """The names of the layers to replace; changes nothing.

    Args:
        model, skip_modules: as in `quantize`.
        saved_modules: ends of names of modules that are trained whole, beside the output layers.
    """
    check_unadapted(model)
    check_container(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = collections.Counter(id(p) for m in modules.values() for p in m._parameters.values())
    skipped = (*skip_modules, *_kept_in_fp32(model))
    output = model.get_output_embeddings() if _is_transformers(model) else None
    layer: Any
    chosen, reasons = [], []
    for name, layer in modules.items():
        if type(layer) is not nn.Linear and not is_conv1d(layer):
            continue
        reason = _keep_reason(name, layer, modules, owners)
        if layer is output or is_within(name, (*OUTPUT_LAYERS, *saved_modules)):
            reason = "an output layer, or trained"
        elif any(f".{part}." in f".{name}." for part in skipped):
            reason = "skipped, or kept in fp32"
        if reason is not None:
            reasons.append(f"{name}: {reason}")
        else:
            chosen.append(name)
    if not chosen:
        found = "; ".join(reasons) or f"none in {type(model).__name__}"
        raise UnsupportedLayer(f"model: expected linear layers to quantize, got {found}")
    return chosen


def _kept_in_fp32(model: nn.Module) -> set[str]:
    """As transformers names them: T5 casts its activations to the dtype of such a layer's weight."""
    lists = (getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    return {name for names in lists for name in names or ()}


def _keep_reason(
    name: str, layer: Any, modules: dict[str, nn.Module], owners: Mapping[int, int]
) -> str | None:
    """Why a layer stays as it is, whatever its name."""
    if layer.weight.dtype not in DENSE_DTYPES or layer.weight.numel() == 0:
        return f"a weight {list(layer.weight.shape)} of {layer.weight.dtype}"
    if owners[id(layer.weight)] > 1:
        return "its weight has another owner"
    return observed("it", layer) or reader_reason(name, modules)


def replace(model: nn.Module, names: list[str], storage: Storage) -> None:
    """Replaces the layers with these names."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _linear4bit(model.get_submodule(name), storage))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # by which PEFT knows
    if _is_transformers(model):
        _mark_quantized(model, storage)


def replace_by_packed(model: nn.Module, names: list[str], format: str) -> None:
    """The same by `PackedLinear`; none is replaced unless all can be."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    packed = {name: PackedLinear.from_linear(layer, format) for name, layer in layers.items()}
    for name, layer in packed.items():
        model.set_submodule(name, layer)
    _refuse_to_save(model)


def _refuse_to_save(model: nn.Module) -> None:
    """Lets transformers raise in `save_pretrained`: loading would take the packed bytes for values."""
    marked: Any = model
    if _is_transformers(model):
        method = "PackedLinear, whose weights are kept by state_dict() alone,"
        marked.hf_quantizer = SimpleNamespace(
            quantization_config=SimpleNamespace(quant_method=method), is_trainable=True
        )


def _linear4bit(layer: Any, storage: Storage) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = from_linear(layer)
    new = Linear4bit(
        weight.in_features,
        weight.out_features,
        bias=layer.bias is not None,
        compute_dtype=storage.compute_dtype or layer.weight.dtype,
        compress_statistics=storage.double_quant,
        quant_type=storage.quant,
        device="meta",
    )
    new.weight = Params4bit(
        weight.weight.contiguous(),
        requires_grad=False,
        blocksize=storage.blocksize,
        compress_statistics=storage.double_quant,
        quant_type=storage.quant,
        module=new,
    )
    new.bias = layer.bias
    new.train(layer.training)
    return new.to(layer.weight.device)


def _is_transformers(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _mark_quantized(model: Any, storage: Storage) -> None:
    """Says of a transformers model what loading it in 4 bits says, so that it saves and loads as such."""
    from transformers.quantizers import AutoHfQuantizer

    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m))
    config = storage.config(model.dtype, [name for name, module in linear if not is_linear4bit(module)])
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
