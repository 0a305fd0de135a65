"""`convert(model)`: from any model to a fused, quantized, adapted one in one call.

It is three things in a row: 4-bit base layers (`quantization`), an adapter (PEFT's, or a LoReFT edit), and
the swap of `accelerate`. The result is an ordinary `PeftModel` (or `ReftModel`), saved and loaded as one.
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
from .base_models import HEADS
from .functional import check_choice
from .modules import is_linear4bit
from .ops import check_number, check_probability
from .quantization import Storage, check_unadapted, is_within, names_of, quantizable, replace
from .reft import LoReFTConfig, get_reft_model
from .swap import accelerate, reader_reason

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from .reft import ReftModel

METHODS = ("lora", "dora", "loreft")


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
    `quant=None`, keeps its weights. Everything but the adapter is frozen. Warns of adapted layers that cannot
    be fused.

    Args:
        model: changed in place, as PEFT does; without adapters.
        method: "lora", "dora", or "loreft", which edits hidden states and needs a transformers model.
        target_modules: as in PEFT's `LoraConfig`. "all-linear" passes over layers whose weight the model
            reads without calling them, where an adapter would do nothing, and over modules that are trained
            whole. Not for "loreft", see its `component`.
        quant, skip_modules, double_quant, compute_dtype: as in `quantize`; None does not quantize.
        r: rank.
        backend: "auto" or a name of `backends.BACKENDS`.
        options: others of `LoraConfig` (`lora_alpha`, 2·r by default, `lora_dropout`, `modules_to_save`, …),
            or of `LoReFTConfig`.

    Returns:
        `PeftModel`, whose `save_pretrained` writes an adapter that stock PEFT loads, or `ReftModel`.

    Raises:
        UnsupportedLayer: a layer cannot be quantized or adapted.
        UnsupportedWeight: a weight has NaN or infinity.
        TypeError, ValueError: an option is unknown or does not fit; the message names it.
        BackendUnavailable: the named backend cannot run a layer.
        In each of these cases but the last one, which is found at the end, `model` was not changed: every
        step is first tried on a copy without data. A model that `copy.deepcopy` cannot copy is not tried.
    """
    check_choice("method", method, METHODS)
    backends.check_name(backend)
    check_unadapted(model)
    config = _config(model, method, target_modules, r, backend, options)
    chosen: list[str] = []
    storage = Storage(quant or "nf4", double_quant, 64, compute_dtype).check()
    skipped = names_of(skip_modules)
    if quant is not None and not any(map(is_linear4bit, model.modules())):
        storage.check_against(model)
        chosen = quantizable(model, skipped, _saved(config))
    if (skeleton := _skeleton(model)) is not None:
        _adapt(skeleton, copy.deepcopy(config))  # raises what the real one would
    if chosen:
        replace(model, chosen, storage)
    adapted = _adapt(model, config)
    swapped = ("base",) if method == "loreft" else (method, "base")
    if method != "loreft" or any(map(is_linear4bit, adapted.modules())):
        report = accelerate(adapted, methods=swapped, backend=backend)
        if report.left and report.fused:  # accelerate warns where nothing is fused
            warnings.warn(f"convert: {report}", stacklevel=2)
    return adapted


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

    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r: expected a positive integer, got {r!r}")
    options = {"lora_alpha": 2 * r, **options}
    config = _made(LoraConfig, r=r, target_modules=target_modules, use_dora=method == "dora", **options)
    check_number("lora_alpha", config.lora_alpha)
    check_probability("lora_dropout", config.lora_dropout)
    if target_modules == "all-linear":
        modules, saved = dict(model.named_modules()), _saved(config)
        linear = (name for name, module in modules.items() if isinstance(module, nn.Linear))
        useless = [name for name in linear if reader_reason(name, modules) or is_within(name, saved)]
        config.exclude_modules = _excluding(config.exclude_modules, useless)
    return config


def _excluding(given: str | Iterable[str] | None, names: list[str]) -> Any:
    """PEFT's `exclude_modules`, a pattern or names, with more names."""
    if isinstance(given, str):
        return "|".join(f"(?:{pattern})" for pattern in (given, *map(re.escape, names)))
    return {*(given or ()), *names} or None


def _saved(config: LoraConfig | LoReFTConfig) -> tuple[str, ...]:
    """Ends of names of the modules that PEFT trains and saves whole."""
    heads = HEADS if getattr(config, "task_type", None) in ("SEQ_CLS", "TOKEN_CLS") else ()
    return (*(getattr(config, "modules_to_save", None) or ()), *heads)


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
