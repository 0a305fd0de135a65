"""`convert(model)`: from any model to a fused, quantized, adapted one in one call.

It is three things in a row: quantized base layers (`quantization`), an adapter (PEFT's, this library's, or a
LoReFT edit), and the swap of `accelerate`. The result is an ordinary `PeftModel` (or `AdapterModel`, or
`ReftModel`), saved and loaded as one.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Params4bit
from torch import nn

from . import backends
from .adapter_config import AdapterConfig
from .adapter_model import get_adapter_model
from .base_models import HEADS
from .formats import is_conv1d
from .functional import check_choice
from .modules import is_linear4bit, is_linear8bit
from .ops import check_number, check_probability
from .packed_linear import PackedLinear
from .packing import PACKINGS
from .quantization import (
    Storage,
    check_unadapted,
    is_within,
    names_of,
    quantizable,
    replace,
    replace_by_packed,
)
from .ranks import check_rank
from .reft import LoReFTConfig, get_reft_model
from .swap import accelerate, reader_reason

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from .adapter_model import AdapterModel
    from .reft import ReftModel

    Adapter = PeftConfig | AdapterConfig | LoReFTConfig

LAYERS_OF_PEFT = {"lora": "LoraConfig", "dora": "LoraConfig", "vera": "VeraConfig", "ia3": "IA3Config"}
PROMPTS_OF_PEFT = {
    "prefix": "PrefixTuningConfig",
    "prompt": "PromptTuningConfig",
    "p-tuning": "PromptEncoderConfig",
}
ADAPTERS = {
    "adapter-parallel": "parallel",
    "adapter-series": "series",
    "s2lora": "s2lora",
    "kadaptation": "kadaptation",
    "ssf": "ssf",
    "bitfit": "bitfit",
    "freeze": None,
}
"""Methods of this library: their names here and in `peft-fast train`, and those in `AdapterConfig`."""
METHODS = (*LAYERS_OF_PEFT, "loreft", *ADAPTERS, *PROMPTS_OF_PEFT)


def convert(
    model: nn.Module,
    *,
    method: str = "lora",
    target_modules: str | list[str] | None = None,
    quant: str | None = "nf4",
    r: int | None = None,
    skip_modules: Iterable[str] = (),
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
    **options: Any,
) -> PeftModel | AdapterModel | ReftModel:
    """Quantizes the linear layers of `model` in place, adds a fresh adapter, and swaps in the fused layers.

    For any `nn.Module` with linear layers; one with quantized layers keeps its weights, as with `quant=None`.
    Everything but the adapter is frozen. Warns of adapted layers that cannot be fused.

    Args:
        model: changed in place, as PEFT does; without adapters.
        method: of `METHODS`. "loreft" and those that learn a prompt need a transformers model, the latter a
            `task_type`, too; "freeze" trains the `modules_to_save`, which are not quantized.
        target_modules: as in PEFT's configs. "all-linear", the default, passes over layers whose weight the
            model reads without calling them, where an adapter would do nothing, and over modules that are
            trained whole. Not for methods without adapters on linear layers.
        quant: as in `quantize`; None does not quantize.
        skip_modules, double_quant, compute_dtype: as in `quantize`.
        r: rank, of methods that have one; by default 16 for "lora" and "dora", else as their config says.
        backend: "auto" or a name of `backends.BACKENDS`.
        options: others of the method's config, which is PEFT's (`lora_alpha`, 2·r by default,
            `lora_dropout`, `modules_to_save`, …), `AdapterConfig` or `LoReFTConfig`.

    Returns:
        `PeftModel`, whose `save_pretrained` writes an adapter that stock PEFT loads; `AdapterModel`; or
        `ReftModel`.

    Raises:
        UnsupportedLayer: a layer cannot be quantized or adapted.
        UnsupportedWeight: a weight has NaN or infinity, or does not fit the format.
        TypeError, ValueError: an option is unknown or does not fit; the message names it.
        BackendUnavailable: the named backend cannot run a layer.
        In each of these cases but the last one, which is found at the end, `model` was not changed: every
        step is first tried on a copy without data. A model that `copy.deepcopy` cannot copy is not tried.
    """
    check_choice("method", method, METHODS)
    backends.check_name(backend)
    check_unadapted(model)
    config = _config(model, method, target_modules, r, backend, options)
    packing = quant if quant in PACKINGS else None
    storage = Storage("nf4" if packing else quant or "nf4", double_quant, 64, compute_dtype).check()
    chosen: list[str] = []
    skipped = names_of(skip_modules)
    if quant is not None and not any(map(_is_quantized, model.modules())):
        if packing is None:
            storage.check_against(model)
        chosen = quantizable(model, skipped, _saved(config))
    if (skeleton := _skeleton(model)) is not None:
        _adapt(skeleton, copy.deepcopy(config))  # raises what the real one would
    if packing is not None:
        replace_by_packed(model, chosen, packing)
    elif chosen:
        replace(model, chosen, storage)
    adapted = _adapt(model, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="accelerate: ")  # said below
        report = accelerate(adapted, backend=backend)
    if report.left:
        warnings.warn(f"convert: {report}", stacklevel=2)
    return adapted


def _is_quantized(layer: nn.Module) -> bool:
    return is_linear4bit(layer) or is_linear8bit(layer) or isinstance(layer, PackedLinear)


def _config(
    model: nn.Module,
    method: str,
    target_modules: str | list[str] | None,
    r: int | None,
    backend: str,
    options: dict[str, Any],
) -> Adapter:
    if r is not None:
        check_rank("r", r)
    if target_modules is not None and (method in ("loreft", "freeze") or method in PROMPTS_OF_PEFT):
        raise ValueError(f"target_modules: expected none for {method!r}, got {target_modules!r}")
    targets = target_modules or "all-linear"
    if r is not None:
        options = {"r": r, **options}
    if method == "loreft":
        return _made(LoReFTConfig, backend=backend, **options)
    if method in ADAPTERS:
        if method != "freeze":
            options = {"target_modules": targets, **options}
        return AdapterConfig(ADAPTERS[method], backend=backend, **options)
    if method not in PROMPTS_OF_PEFT:
        return _config_of_layers(model, method, targets, options)
    import peft

    if options.get("task_type") is None:
        raise ValueError(f"task_type: expected one of PEFT's task types for {method!r}, got None")
    return _made(getattr(peft, PROMPTS_OF_PEFT[method]), **options)


def _config_of_layers(
    model: nn.Module, method: str, targets: str | list[str], options: dict[str, Any]
) -> PeftConfig:
    """PEFT's, of a method for linear layers."""
    import peft

    if method in ("lora", "dora"):
        options = {"r": 16, **options}
        options = {"lora_alpha": 2 * options["r"], "use_dora": method == "dora", **options}
        check_number("lora_alpha", options["lora_alpha"])
        check_probability("lora_dropout", options.get("lora_dropout", 0.0))
    elif method == "ia3":
        options = {"feedforward_modules": [], **options}
    config: Any = _made(getattr(peft, LAYERS_OF_PEFT[method]), target_modules=targets, **options)
    if targets == "all-linear":
        modules, saved = dict(model.named_modules()), _saved(config)
        linear = [name for name, m in modules.items() if isinstance(m, nn.Linear) or is_conv1d(m)]
        useless = [name for name in linear if reader_reason(name, modules) or is_within(name, saved)]
        if hasattr(config, "exclude_modules"):
            config.exclude_modules = _excluding(config.exclude_modules, useless)
        elif useless:  # VeRA's has none
            output = getattr(model, "get_output_embeddings", lambda: None)()
            config.target_modules = {n for n in linear if n not in useless and modules[n] is not output}
    return config


def _excluding(given: str | Iterable[str] | None, names: list[str]) -> Any:
    """PEFT's `exclude_modules`, a pattern or names, with more names."""
    if isinstance(given, str):
        return "|".join(f"(?:{pattern})" for pattern in (given, *map(re.escape, names)))
    return {*(given or ()), *names} or None


def _saved(config: Adapter) -> tuple[str, ...]:
    """Ends of names of the modules that PEFT trains and saves whole."""
    heads = HEADS if getattr(config, "task_type", None) in ("SEQ_CLS", "TOKEN_CLS") else ()
    return (*(getattr(config, "modules_to_save", None) or ()), *heads)


def _made(cls: type, **options: Any) -> Any:
    try:
        return cls(**options)
    except TypeError as error:
        raise TypeError(f"options: expected those of {cls.__name__}, got {error}") from None


def _adapt(model: nn.Module, config: Adapter) -> Any:
    if isinstance(config, LoReFTConfig):
        return get_reft_model(model, config)
    if isinstance(config, AdapterConfig):
        return get_adapter_model(model, config)
    from peft import get_peft_model

    return get_peft_model(model, config)


def _skeleton(model: nn.Module) -> nn.Module | None:
    """A copy without data, on the meta device; None of a model that cannot be copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # What else a layer holds is shared.
        memo.update((id(v), v) for v in vars(module).values() if isinstance(v, torch.Tensor))
        if state := getattr(module, "quant_state", None):
            memo[id(state)] = state
    memo.update((id(p), _without_data(p)) for p in model.parameters())
    memo.update((id(b), torch.empty_like(b, device="meta")) for b in model.buffers())
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError):
        return None


def _without_data(parameter: nn.Parameter) -> nn.Parameter:
    if isinstance(parameter, Params4bit):
        return Params4bit(
            torch.empty_like(parameter.data, device="meta"),
            requires_grad=False,
            quant_state=parameter.quant_state,
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
            bnb_quantized=True,
        )
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
