"""The shares of trained parameters in the survey's Table 1 (arXiv 2404.13506), counted from our modules.

Models of LLaMA's sizes are built on the meta device, the layers replaced by ours, and what trains is counted:
percent of base + new parameters, as the table gives them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, WavLMConfig, WavLMModel

from peft_fast import AdapterLinear, DoRALinear, LoRALinear

SIZES = {
    "7B": ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6_738_415_616),
    "13B": ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}, 13_015_864_320),
}
QKVUD = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

Wrap = Callable[[nn.Linear], nn.Module]


def llama(size: str) -> tuple[nn.Module, int]:
    """The model on the meta device, frozen, and its number of parameters."""
    sizes, parameters = SIZES[size]
    heads = sizes["hidden_size"] // 128
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).requires_grad_(False)
    assert sum(p.numel() for p in model.parameters()) == parameters
    return model, parameters


def replace(model: nn.Module, names: tuple[str, ...], wrap: Wrap) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names:
                setattr(parent, name, wrap(child))


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def percent(new: int, base: int) -> float:
    return round(100 * new / (base + new), 3)


ROWS: dict[str, tuple[tuple[str, ...], Wrap, dict[str, float]]] = {
    "LoRA r=32": (QKVUD, lambda base: LoRALinear.from_linear(base, r=32), {"7B": 0.826, "13B": 0.670}),
    "DoRA r=32": (QKVUD, lambda base: DoRALinear.from_linear(base, r=32), {"7B": 0.838, "13B": 0.681}),
    "DoRA r=16": (QKVUD, lambda base: DoRALinear.from_linear(base, r=16), {"7B": 0.427, "13B": 0.347}),
    "AdapterS 256": (
        ("down_proj",),
        lambda base: AdapterLinear.from_linear(base, "series", r=256, bias="none"),
        {"7B": 0.986, "13B": 0.799},
    ),
    "AdapterP 256": (
        ("up_proj", "down_proj"),
        lambda base: AdapterLinear.from_linear(base, "parallel", r=256, bias="none"),
        {"7B": 3.542, "13B": 2.894},
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS)
def test_table_1_of_the_survey(row, size):
    names, wrap, expected = ROWS[row]
    model, parameters = llama(size)
    replace(model, names, wrap)
    assert percent(trained(model), parameters) == expected[size]


def test_an_adapter_with_biases_would_not_be_the_tables():
    """The table's bottlenecks are the two matrices alone."""
    model, parameters = llama("7B")
    replace(model, ("down_proj",), lambda base: AdapterLinear.from_linear(base, "series", r=256))
    assert trained(model) == 32 * (2 * 256 * 4096 + 256 + 4096)
    assert percent(trained(model), parameters) == 0.988


def frozen(build: Callable[[], nn.Module]) -> tuple[nn.Module, int]:
    with torch.device("meta"):
        model = build().requires_grad_(False)
    return model, sum(p.numel() for p in model.parameters())


def test_lora_on_wavlm_in_the_surveys_text():
    """0.781 % of the base model: rank 8 on both feed-forward layers of WavLM-base."""
    model, parameters = frozen(lambda: WavLMModel(WavLMConfig()))
    replace(model, ("intermediate_dense", "output_dense"), lambda base: LoRALinear.from_linear(base, r=8))
    assert round(100 * trained(model) / parameters, 3) == 0.781


class PerformerBlock(nn.Module):
    """A block of scBERT's encoder: width 200, ten heads of 64, feed-forward of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(200) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(200, 640, bias=False) for _ in range(3))
        self.to_out = nn.Linear(640, 200)
        self.up, self.down = nn.Linear(200, 800), nn.Linear(800, 200)


@pytest.mark.parametrize(
    ("names", "wrap", "expected"),
    [
        (("5",), lambda block: block.requires_grad_(True), 16.67),
        (("to_q", "to_v"), lambda base: LoRALinear.from_linear(base, r=4), 0.806),
        (("down",), lambda base: AdapterLinear.from_linear(base, "series", r=24), 1.178),
    ],
    ids=["the last of six blocks", "LoRA r=4", "a bottleneck of 24"],
)
def test_scbert_in_the_survey(names, wrap, expected):
    """Of the six blocks' parameters, no embeddings. Rank, width and place are those that give the figures."""
    model, parameters = frozen(lambda: nn.Sequential(*(PerformerBlock() for _ in range(6))))
    replace(model, names, wrap)
    assert round(100 * trained(model) / parameters, len(str(expected).partition(".")[2])) == expected


N, K = 48, 64


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("vera", {"r": 8}, N + 8),
        ("s2lora", {"r": 8}, 8 + 8 * (N + K)),
        ("kadaptation", {"n": 4, "terms": 3}, 3 * (N // 4 + K // 4) + 3 * 16),
        ("ia3", {}, N),
        ("ia3", {"feedforward": True}, K),
        ("ssf", {}, 2 * N),
        ("bitfit", {}, N),
        ("parallel", {"r": 8, "bias": "down"}, 8 * (N + K) + 8),
        ("series", {"r": 8, "bias": "both"}, 8 * 2 * N + 8 + N),
    ],
)
def test_what_a_layer_trains(method, options, count):
    base = nn.Linear(K, N, device="meta")
    assert trained(AdapterLinear.from_linear(base, method, **options)) == count
