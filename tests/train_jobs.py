"""Training jobs that take seconds: tiny models, texts that they can learn, and the options of a run."""

import random

import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_fast.config import TrainConfig
from peft_fast.train import train

WORDS = [f"w{i}" for i in range(60)]


def tiny_tokenizer():
    special = ["[PAD]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def save_bert(folder):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=62, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_llama(folder):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=62, num_key_value_heads=1, initializer_range=0.3, **sizes)
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def labelled_rows(count=120):
    """Texts whose label is whether they begin with w0: something a tiny model can learn."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        label = rng.randrange(2)
        rows.append(
            (
                " ".join([WORDS[0] if label else WORDS[1], *rng.choices(WORDS[2:], k=rng.randrange(3, 9))]),
                label,
            )
        )
    return rows


def save_rows(path):
    path.write_text(
        "text,label\n" + "".join(f'"{text}",{"yes" if label else "no"}\n' for text, label in labelled_rows())
    )
    return path


def tiny(bert, csv_file, output, **options):
    """The options of a job of eight steps in two epochs, so that it crosses one."""
    defaults = {"task": "classification", "model": bert, "data": csv_file, "batch_size": 32, "steps": 8}
    every = {"eval_every": 3, "save_every": 3, "lr": 1e-2, "dropout": 0.1, "output": output}
    return TrainConfig(**{**defaults, **every, **options})


def run(options):
    return train(options, Console(quiet=True))


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")
