"""Tiny transformers models under representation edits, and the edits written out by hand as their oracle."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_fast import LoReFTConfig, get_reft_model
from peft_fast.reft.blocks import holder

VOCAB, WIDTH = 64, 32


def tiny_llama(**options) -> nn.Module:
    options = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **options}
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, **options)).eval()


def tiny_gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, bos_token_id=0,
            eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).eval()  # fmt: skip


def tiny_bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=64, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).eval()  # fmt: skip


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}


def reft_llama(**options) -> nn.Module:
    return get_reft_model(tiny_llama(), LoReFTConfig(**{"r": 4, "positions": "f2+l2", **options}))


def ragged(batch: int = 3, length: int = 9, side: str = "left") -> dict[str, torch.Tensor]:
    """Token ids and the mask of a batch whose rows have length, length − 3, … tokens."""
    ids = torch.randint(2, VOCAB, (batch, length))
    mask = torch.ones_like(ids)
    for b in range(batch):
        padding = min(3 * b, length - 1)
        columns = slice(0, padding) if side == "left" else slice(length - padding, length)
        mask[b, columns] = ids[b, columns] = 0
    return {"input_ids": ids, "attention_mask": mask}


def train_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = train_tensors(model)
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copy_edits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if ".reft." in name}


# ---------------------------------------------------------------------------------------------------- oracle


def selected(prompt: list[int], positions: str, group: str) -> list[int]:
    """The columns that a group of edits takes, of the prompt's columns in order."""
    if positions == "all":
        return prompt
    counts = {part[0]: int(part[1:]) for part in positions.split("+")}
    first = prompt[: min(counts.get("f", 0), len(prompt) // 2)]
    last = prompt[len(prompt) - min(counts.get("l", 0), len(prompt) // 2) :]
    return {"first": first, "last": last, "all": first + last}[group]


def edited(edit: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """Φ(h), as the paper writes it, in fp32; for the variants loreft and noreft without an activation."""
    x = h.float()
    R = edit.rows().float()
    return (x + (x @ edit.source.float().T + edit.bias.float() - x @ R.T) @ R).to(h.dtype)


@contextlib.contextmanager
def by_hand(base: nn.Module, model: nn.Module, prompts: list[list[int]]):
    """Edits `base` by forward hooks as `model`'s edits say, at the given columns of each row."""
    positions = model.reft_config.positions

    def hook(layer: int):
        def edit_output(module, args, output):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            for group, edit in holder(model.reft_blocks[layer]).reft.items():
                for b, prompt in enumerate(prompts):
                    columns = selected(prompt, positions, group)
                    h[b, columns] = edited(edit, h[b, columns])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return edit_output

    blocks = base.get_submodule(model.reft_targets.path)
    targets = {i: blocks[i].get_submodule(block.reft_component) for i, block in model.reft_blocks.items()}
    handles = [target.register_forward_hook(hook(i)) for i, target in targets.items()]
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()


def columns_of(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]
