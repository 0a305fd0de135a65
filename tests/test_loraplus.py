"""LoRA+ (arXiv 2402.12354): PEFT's optimizer finds the same groups in an accelerated model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft_models import tiny_bert, to_kind, unpacked
from torch import nn

from peft_fast import accelerate

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}


def models(kind: str, use_dora: bool) -> tuple[nn.Module, nn.Module]:
    """Stock and accelerated, with embeddings and the norms' biases among what is trained."""
    config = LoraConfig(
        r=4, target_modules=["query", "value", "word_embeddings"], bias="lora_only", use_dora=use_dora
    )
    base = tiny_bert()
    to_kind(base.encoder, kind)
    base.is_loaded_in_4bit = kind == "nf4"
    torch.manual_seed(1)
    stock = unpacked(get_peft_model(base, config)).train()
    fast = copy.deepcopy(stock)
    accelerate(fast)
    return stock, fast


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[list[str], float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        ([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("use_dora", [False, True])
def test_groups_and_steps_are_those_of_stock(kind, use_dora):
    stock, fast = models(kind, use_dora)
    made = [create_loraplus_optimizer(m, torch.optim.AdamW, **OPTIONS) for m in (stock, fast)]
    expected, got = groups(stock, made[0]), groups(fast, made[1])
    assert got == expected
    rates = {name: lr for names, lr, _ in got for name in names}
    assert set(rates) == {name for name, p in fast.named_parameters() if p.requires_grad}
    assert {rates[n] for n in rates if "lora_B" in n} == {16e-3}
    assert {rates[n] for n in rates if "lora_A" in n} == {1e-3}
    assert {rates[n] for n in rates if "lora_embedding" in n} == {1e-5}
    tokens = torch.arange(12).view(2, 6)
    start = {name: p.detach().clone() for name, p in fast.named_parameters() if p.requires_grad}
    for _ in range(4):
        losses = []
        for model, optimizer in zip((stock, fast), made, strict=True):
            optimizer.zero_grad()
            loss = (model(input_ids=tokens).last_hidden_state[..., :8] - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, theirs), (_, ours) in zip(stock.named_parameters(), fast.named_parameters(), strict=True):
        if name in start:
            moved = (theirs - start[name]).norm()
            assert moved > 0
            assert (ours - theirs).norm() < 1e-2 * moved, name
