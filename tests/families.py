"""Tiny models of many families, trained for three steps by stock PEFT and by the fused layers, and compared.

    python tests/families.py        # writes the table in docs/compatibility.md

`outcome` is one comparison. The table names the bounds and not the differences, so it is the same on every
machine; `test_families.py` holds the differences to the bounds, and the table to what runs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft_models import KINDS, to_4bit, unpacked
from tolerances import relative_error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_fast import accelerate
from peft_fast.swap import reader_reason

METHODS = ("lora", "dora")
STEPS = 3
# Of a loss, relative; of what training has added to an adapter's tensor, relative to that.
LOSS_BOUND, UPDATE_BOUND = 1e-5, 1e-3
# Adam's own 1e-8 moves an element whose gradient is all rounding by the learning rate.
EPSILON = 1e-4
DOCUMENT = Path(__file__).parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: python tests/families.py -->", "<!-- end of table -->"

# Blocks of 64 weights end with a row: for others bitsandbytes' compiled CPU decode reads wrong scales.
BLOCK = 64

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = {**SIZES, "vocab_size": 99, "num_key_value_heads": 1, "head_dim": 32, "use_cache": False}
IMAGES = {"image_size": 32, "patch_size": 16}
# One head of 64: WavLM has a linear layer on a head. SpecAugment draws from NumPy, layerdrop skips layers.
SPEECH = {
    **SIZES, "num_attention_heads": 1, "conv_dim": (64, 64), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 64, "apply_spec_augment": False, "layerdrop": 0.0,
}  # fmt: skip


class Family(NamedTuple):
    """A model class of transformers, a config for it, and what it is trained on."""

    model: type[Any]
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"


class Outcome(NamedTuple):
    """What the swap did to one model, and how far its training was from stock PEFT's.

    `fused`, `bare`: how many adapted layers, and 4-bit layers without an adapter, are fused. `left`: names
    and reasons of the others. `own`: names of layers of the accelerated model that ran PEFT's own forward.
    `loss`, `update`: the largest relative differences, after each step, of the loss and of what training has
    added to a tensor of an adapter. `untrained`: names of layers of which some adapter tensor did not move.
    `random`: whether both drew the same random numbers.
    """

    fused: int
    bare: int
    left: list[tuple[str, str]]
    own: list[str]
    loss: float
    update: float
    untrained: list[str]
    random: bool

    @property
    def equal(self) -> bool:
        return self.loss <= LOSS_BOUND and self.update <= UPDATE_BOUND and self.random


def text(vocabulary: int = 99) -> dict[str, Tensor]:
    tokens = torch.randint(3, vocabulary, (2, 12))
    return {"input_ids": tokens, "labels": tokens}


def classes(**inputs: Tensor) -> dict[str, Tensor]:
    return {**inputs, "labels": torch.tensor([0, 1])}


def sentences() -> dict[str, Tensor]:
    return classes(input_ids=torch.randint(3, 99, (2, 12)))


def pictures() -> dict[str, Tensor]:
    return classes(pixel_values=torch.randn(2, 3, 32, 32))


def sounds() -> dict[str, Tensor]:
    return classes(input_values=torch.randn(2, 400))


FAMILIES = {
    "Llama": Family(tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**DECODER), text, 0.1),
    "Mistral": Family(
        tf.MistralForCausalLM, lambda: tf.MistralConfig(**DECODER, sliding_window=8), text
    ),
    "Qwen3": Family(tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**DECODER), text, 0.1),
    "Gemma 3": Family(tf.Gemma3ForCausalLM, lambda: tf.Gemma3TextConfig(**DECODER), text),
    "GPT-2": Family(
        tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2),
        text,
    ),
    "T5": Family(
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(
            vocab_size=99, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, decoder_start_token_id=0,
            use_cache=False,
        ),
        text,
        0.1,
    ),
    "BERT": Family(
        tf.BertForSequenceClassification, lambda: tf.BertConfig(**SIZES, vocab_size=99), sentences, 0.1
    ),
    "RoBERTa": Family(
        tf.RobertaForSequenceClassification, lambda: tf.RobertaConfig(**SIZES, vocab_size=99), sentences
    ),
    "ESM-2": Family(
        tf.EsmForMaskedLM,
        lambda: tf.EsmConfig(
            **SIZES, vocab_size=33, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary",
            token_dropout=True,
        ),
        lambda: text(32),
        0.1,
        # Not its contact head, which training does not call.
        ["query", "key", "value", "dense"],
    ),
    "ViT": Family(
        tf.ViTForImageClassification, lambda: tf.ViTConfig(**SIZES, **IMAGES), pictures
    ),
    "CLIP": Family(
        tf.CLIPModel,
        lambda: tf.CLIPConfig(
            text_config={**SIZES, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**SIZES, **IMAGES},
            projection_dim=64,
        ),
        lambda: {
            "input_ids": text()["input_ids"], "pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True
        },
        0.1,
    ),
    "Wav2Vec2": Family(
        tf.Wav2Vec2ForSequenceClassification, lambda: tf.Wav2Vec2Config(**SPEECH), sounds
    ),
    "WavLM": Family(tf.WavLMForSequenceClassification, lambda: tf.WavLMConfig(**SPEECH), sounds, 0.1),
    "Whisper": Family(
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(
            vocab_size=99, num_mel_bins=16, d_model=64, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
            max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, use_cache=False,
        ),
        lambda: {"input_features": torch.randn(2, 16, 32), "labels": text()["labels"]},
    ),
    "ResNet": Family(
        tf.ResNetForImageClassification,
        lambda: tf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic"),
        pictures,
        0.1,
        ["convolution", "classifier.1"],
    ),
}  # fmt: skip


def stock_model(family: Family, kind: str, method: str) -> nn.Module:
    """The model under PEFT's own LoRA or DoRA, with seeded weights."""
    torch.manual_seed(0)
    model = family.model(family.config()).requires_grad_(False)
    if kind == "nf4":
        quantize(model)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=family.targets,
        lora_dropout=family.dropout,
        use_dora=method == "dora",
        init_lora_weights=False,
    )
    return unpacked(get_peft_model(model, config))


def quantize(model: Any) -> None:
    """Puts every linear layer into NF4 that a quantized checkpoint would have so, in place.

    Left dense: weights tied to an embedding, those the model reads itself, those it wants in fp32 (T5 casts
    to the dtype of `wo.weight`), and rows that are no whole number of blocks.
    """
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    fp32 = set(model._keep_in_fp32_modules or ())
    modules = dict(model.named_modules())
    for name, layer in modules.items():
        parent, _, leaf = name.rpartition(".")
        linear = as_linear(layer)
        if (
            linear is not None
            and id(linear.weight) not in tied
            and leaf not in fp32
            and linear.in_features % BLOCK == 0
            and reader_reason(name, modules) is None
        ):
            setattr(modules[parent], leaf, to_4bit(linear))
    model.is_loaded_in_4bit = True


def as_linear(layer: nn.Module) -> nn.Linear | None:
    """`layer` as an `nn.Linear`, GPT-2's Conv1D transposed; None for another module."""
    if type(layer) is not Conv1D:
        return layer if type(layer) is nn.Linear else None
    linear = nn.Linear(layer.nx, layer.nf)
    linear.weight.data, linear.bias.data = layer.weight.data.t().contiguous(), layer.bias.data
    return linear


def train(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The loss of each step, and what the steps up to it have added to each trained tensor, in fp64."""
    torch.manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().double() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=1e-2, eps=EPSILON)
    losses, updates = [], []
    model.train()
    for _ in range(STEPS):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        updates.append({name: p.detach().double() - start[name] for name, p in trained.items()})
    return losses, updates


@contextlib.contextmanager
def pefts_forwards(model: nn.Module) -> Iterator[set[str]]:
    """Collects the names of those LoRA layers of `model` that run PEFT's own forward meanwhile."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: set[str] = set()
    bases = {cls for m in model.modules() if isinstance(m, LoraLayer) for cls in type(m).__mro__}
    originals = {
        cls: vars(cls)["forward"]
        for cls in bases
        if cls.__module__.startswith("peft.tuners.lora") and "forward" in vars(cls)
    }

    def noting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.add(names[id(self)])
            return forward(self, *args, **kwargs)

        return noted

    try:
        for cls, forward in originals.items():
            cls.forward = noting(forward)
        yield seen
    finally:
        for cls, forward in originals.items():
            cls.forward = forward


@functools.cache
def outcome(name: str, kind: str, method: str) -> Outcome:
    """Trains a family both ways, on the same inputs and seeds."""
    family = FAMILIES[name]
    stock = stock_model(family, kind, method)
    fast = copy.deepcopy(stock)
    report = accelerate(fast)
    inputs = family.inputs()
    losses, updates = train(stock, inputs)
    state = torch.get_rng_state()
    with pefts_forwards(fast) as own:
        fast_losses, fast_updates = train(fast, inputs)
    bare = sum(row.method == "base" for row in report.fused)
    return Outcome(
        fused=len(report.fused) - bare,
        bare=bare,
        left=[(row.name, row.reason or "") for row in report.left],
        own=sorted(own),
        loss=max(map(relative_error, fast_losses, losses)),
        update=max(
            relative_error(got[key], value)
            for got, expected in zip(fast_updates, updates, strict=True)
            for key, value in expected.items()
        ),
        untrained=sorted(
            {key.partition(".lora_")[0] for key, value in updates[-1].items() if not value.any()}
        ),
        random=torch.equal(state, torch.get_rng_state()),
    )


def table() -> str:
    """The table of docs/compatibility.md, from a run of every family."""
    modes = [(kind, method) for kind in KINDS for method in METHODS]
    names = {"dense": "dense", "nf4": "NF4", "lora": "LoRA", "dora": "DoRA"}
    lines = [
        row(
            "family", "model", "dropout", "fused", "left: PEFT's forward runs", "left: never called",
            *(f"{names[kind]} {names[method]}" for kind, method in modes),
        )
    ]  # fmt: skip
    lines.append("|---" * (6 + len(modes)) + "|")
    for name, family in FAMILIES.items():
        outcomes = [outcome(name, *mode) for mode in modes]
        first, last = outcomes[0], outcomes[-1]
        lines.append(
            row(
                name,
                f"`{family.model.__name__}`",
                f"{family.dropout:g}",
                f"{first.fused} + {last.bare}" if last.bare else f"{first.fused}",
                summary([layer for layer in first.left if layer[0] in first.own]),
                summary([layer for layer in first.left if layer[0] not in first.own]),
                *("equal" if result.equal else "**differs**" for result in outcomes),
            )
        )
    return "\n".join(lines)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def summary(left: list[tuple[str, str]]) -> str:
    """Layers by reason: "6 (`a`, `b`): why"."""
    groups: dict[str, list[str]] = {}
    for name, reason in left:
        groups.setdefault(reason, []).append(name.rpartition(".")[2])
    return "; ".join(
        f"{len(names)} ({', '.join(f'`{leaf}`' for leaf in dict.fromkeys(names))}): {reason}"
        for reason, names in groups.items()
    )


def parts(document: str) -> tuple[str, str, str]:
    """The document before its table, the table, and what follows."""
    before, _, rest = document.partition(BEGIN)
    between, _, after = rest.partition(END)
    return before, between.strip(), after


def main() -> None:
    tf.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before, _, after = parts(DOCUMENT.read_text())
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
