"""From any model to a fused, quantized, adapted one in one call: `convert`; its first step alone: `quantize`.

`convert` is three things in a row: 4-bit base layers, an adapter (PEFT's, or a LoReFT edit), and the swap of
`accelerate`. What it returns is an ordinary `PeftModel` (or `ReftModel`), saved and loaded as such.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import nn

from .base_models import HEADS
from .errors import UnsupportedLayer
from .formats import BLOCK_SIZES, CODES, DENSE_DTYPES, from_linear, is_conv1d
from .functional import check_choice
from .modules import is_linear4bit
from .reft import LoReFTConfig, get_reft_model
from .swap import accelerate, reader_reason

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from .reft import ReftModel

METHODS = ("lora", "dora", "loreft")
OUTPUT_LAYERS = ("lm_head", *HEADS)
"""How the names of output layers end in transformers; they stay as they are."""


def convert(
    model: nn.Module,
    *,
    method: str = "lora",
    target_modules: str | list[str] = "all-linear",
    quant: str | None = "nf4",
    r: int = 16,
    skip_modules: Iterable[str] = (),
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
    **options: Any,
) -> PeftModel | ReftModel:
    """Quantizes the linear layers of `model` in place, adds a fresh adapter, and swaps in the fused layers.

    For models that are not loaded in 4 bits: any `nn.Module` with linear layers. One that is, or with
    `quant=None`, keeps its weights. Everything but the adapter is frozen.

    Args:
        model: changed in place, as PEFT does.
        method: "lora", "dora", or "loreft", which edits hidden states and needs a transformers model.
        target_modules: as in PEFT's `LoraConfig`. "all-linear" passes over layers whose weight the model
            reads without calling them, where an adapter would do nothing. Not for "loreft", see its
            `component`.
        quant, skip_modules, double_quant, compute_dtype: as in `quantize`; None does not quantize.
        r: rank.
        backend: "auto" or a name of `backends.BACKENDS`.
        options: others of `LoraConfig` (`lora_alpha`, 2·r by default, `lora_dropout`, `modules_to_save`, …),
            or of `LoReFTConfig`.

    Returns:
        `PeftModel`, whose `save_pretrained` writes an adapter that stock PEFT loads, or `ReftModel`.

    Raises:
        UnsupportedLayer: a layer cannot be quantized or adapted.
        TypeError, ValueError: an option is unknown or does not fit; the message names it.
        BackendUnavailable: the named backend cannot run a layer.
        In each of these cases but the last one, which is found at the end, `model` was not changed.
    """
    check_choice("method", method, METHODS)
    config = _config(model, method, target_modules, r, backend, options)
    if quant is not None and not any(map(is_linear4bit, model.modules())):
        storage = _Storage(quant, double_quant, 64, compute_dtype).check()
        chosen = _quantizable(
            model, (*_names(skip_modules), *(getattr(config, "modules_to_save", None) or ()))
        )
        _adapt(_skeleton(model), copy.deepcopy(config))  # raises what the real one would
        _quantize(model, chosen, storage)
    adapted = _adapt(model, config)
    swapped = ("base",) if method == "loreft" else (method, "base")
    if method != "loreft" or any(map(is_linear4bit, adapted.modules())):
        accelerate(adapted, methods=swapped, backend=backend)
    return adapted


def quantize(
    model: nn.Module,
    quant: str = "nf4",
    *,
    skip_modules: Iterable[str] = (),
    double_quant: bool = True,
    blocksize: int = 64,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Replaces linear layers of `model`, one after the other, by bitsandbytes' `Linear4bit`.

    These are `nn.Linear` and `Conv1D`. Left as they are: output layers (`get_output_embeddings`, names ending
    in one of `OUTPUT_LAYERS`), subclasses, and layers whose weight has another owner too or is read without
    calling the layer. A transformers model is marked as quantized, so that it saves and loads as one that
    was loaded in 4 bits.

    Args:
        model: on any device but meta.
        quant: "nf4" or "fp4".
        skip_modules: ends of the names of further layers to leave.
        double_quant: quantizes the scales of the blocks, too.
        blocksize: weights that share a scale, one of `formats.BLOCK_SIZES`.
        compute_dtype: what a layer computes in; by default the dtype of its weight.

    Returns:
        The names of the layers that were replaced.

    Raises:
        UnsupportedLayer: no layer can be replaced, or one is on the meta device; nothing was changed.
        ValueError: `quant` or `blocksize` is not one of these.
    """
    storage = _Storage(quant, double_quant, blocksize, compute_dtype).check()
    chosen = _quantizable(model, _names(skip_modules))
    _quantize(model, chosen, storage)
    return chosen


# ------------------------------------------------------------------------------------------------ the adapter


def _config(
    model: nn.Module,
    method: str,
    target_modules: str | list[str],
    r: int,
    backend: str,
    options: dict[str, Any],
) -> LoraConfig | LoReFTConfig:
    if method == "loreft":
        if target_modules != "all-linear":
            raise ValueError(f"target_modules: expected none for 'loreft', got {target_modules!r}")
        return _made(LoReFTConfig, r=r, backend=backend, **options)
    from peft import LoraConfig

    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r: expected a positive integer, got {r!r}")
    options = {"lora_alpha": 2 * r, **options}
    if target_modules == "all-linear":
        modules = dict(model.named_modules())
        read = [n for n, m in modules.items() if isinstance(m, nn.Linear) and reader_reason(n, modules)]
        options["exclude_modules"] = options.get("exclude_modules") or read or None
    return _made(LoraConfig, r=r, target_modules=target_modules, use_dora=method == "dora", **options)


def _made(cls: type, **options: Any) -> Any:
    try:
        return cls(**options)
    except TypeError as error:
        raise TypeError(f"options: expected those of {cls.__name__}, got {error}") from None


def _adapt(model: nn.Module, config: LoraConfig | LoReFTConfig) -> Any:
    if isinstance(config, LoReFTConfig):
        return get_reft_model(model, config)
    from peft import get_peft_model

    return get_peft_model(model, config)


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy without data, on the meta device."""
    empty: dict[int, Any] = {}
    for p in model.parameters():
        empty[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        empty[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, empty)


# --------------------------------------------------------------------------------------------------- the base


class _Storage(NamedTuple):
    """How weights are stored in 4 bits: the options of `quantize`."""

    quant: str
    double_quant: bool
    blocksize: int
    compute_dtype: torch.dtype | None

    def check(self) -> _Storage:
        check_choice("quant", self.quant, tuple(CODES))
        if self.blocksize not in BLOCK_SIZES:
            raise ValueError(f"blocksize: expected one of {BLOCK_SIZES}, got {self.blocksize!r}")
        if self.compute_dtype not in (None, *DENSE_DTYPES):
            expected = f"None or one of {DENSE_DTYPES}"
            raise ValueError(f"compute_dtype: expected {expected}, got {self.compute_dtype!r}")
        return self


def _names(skip_modules: Iterable[str]) -> tuple[str, ...]:
    if isinstance(skip_modules, str):
        raise TypeError(f"skip_modules: expected a collection of names, got {skip_modules!r}")
    return tuple(skip_modules)


def _quantizable(model: nn.Module, skip_modules: tuple[str, ...]) -> list[str]:
    """The names of the layers to replace."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = collections.Counter(id(p) for m in modules.values() for p in m._parameters.values())
    output = model.get_output_embeddings() if _is_transformers(model) else None
    layer: Any
    chosen, reasons = [], []
    for name, layer in modules.items():
        if type(layer) is not nn.Linear and not is_conv1d(layer):
            continue
        reason = _keep_reason(name, layer, modules, skip_modules, owners)
        if layer is output or reason is not None:
            reasons.append(f"{name}: {reason or 'the output layer'}")
        elif layer.weight.is_meta:
            raise UnsupportedLayer(f"model: expected layers with data, got {name!r} on the meta device")
        else:
            chosen.append(name)
    if not chosen:
        found = "; ".join(reasons) or f"none in {type(model).__name__}"
        raise UnsupportedLayer(f"model: expected linear layers to quantize, got {found}")
    return chosen


def _keep_reason(
    name: str,
    layer: Any,
    modules: dict[str, nn.Module],
    skip_modules: tuple[str, ...],
    owners: Mapping[int, int],
) -> str | None:
    """Why a layer stays as it is."""
    if f".{name}".endswith(tuple(f".{end}" for end in OUTPUT_LAYERS)):
        return "the output layer"
    if f".{name}".endswith(tuple(f".{end}" for end in skip_modules)):
        return "skipped"
    if layer.weight.dtype not in DENSE_DTYPES or layer.weight.numel() == 0:
        return f"a weight {list(layer.weight.shape)} of {layer.weight.dtype}"
    if owners[id(layer.weight)] > 1:
        return "its weight has another owner"
    return reader_reason(name, modules)


def _quantize(model: nn.Module, names: list[str], storage: _Storage) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        new = _linear4bit(model.get_submodule(name), storage)
        setattr(model.get_submodule(parent), child, new)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # by which PEFT knows
    if _is_transformers(model):
        _mark_quantized(model, set(names), storage)


def _linear4bit(layer: Any, storage: _Storage) -> nn.Module:
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


def _mark_quantized(model: Any, names: set[str], storage: _Storage) -> None:
    """Says of a transformers model what loading it in 4 bits says, so that it saves and loads as such."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    linear = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=storage.quant,
        bnb_4bit_use_double_quant=storage.double_quant,
        bnb_4bit_compute_dtype=storage.compute_dtype or model.dtype,
        llm_int8_skip_modules=[name for name in linear if name not in names],
    )
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
