"""bench/registry.py: real widths, cases that are there once, filters, and work as PyTorch counts it."""

from __future__ import annotations

import importlib
import itertools
import json

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peft_fast.base_models import minilm_folder

LORA = "lora nf4-nested MiniLM-L6.up R=16 M=16 bfloat16 dropout=0"


@pytest.fixture(scope="module")
def registry():
    return importlib.import_module("peft_fast.bench.registry")


def test_widths_are_those_of_the_models(registry):
    from transformers import MistralConfig, ViTConfig

    found = json.loads((minilm_folder() / "config.json").read_text())
    minilm = (found["hidden_size"], found["intermediate_size"])
    vit = ViTConfig()
    assert registry.MODELS["MiniLM-L6"]["up"] == minilm
    assert registry.MODELS["ViT-B"]["up"] == (vit.hidden_size, vit.intermediate_size)
    mistral = MistralConfig()
    layers = registry.MODELS["Mistral-7B"]
    assert layers["down"] == (mistral.intermediate_size, mistral.hidden_size)
    head = mistral.hidden_size // mistral.num_attention_heads
    assert layers["k"] == layers["v"] == (mistral.hidden_size, head * mistral.num_key_value_heads)


def test_cases_are_unique_and_shared_shapes_have_all_their_names(registry):
    cases = list(registry.cases())
    assert len(cases) == len(set(cases))
    shapes = {shape for layers in registry.MODELS.values() for shape in layers.values()}
    assert {(case.K, case.N) for case in cases} == shapes
    (case,) = registry.select(["lora fp4 Llama-3-8B.gate R=8 M=16 float16 dropout=0.1"])
    assert case.layers == ("Llama-3-8B.gate", "Llama-3-8B.up", "Mistral-7B.gate", "Mistral-7B.up")
    assert registry.select(["lora fp4 Mistral-7B.up R=8 M=16 float16 dropout=0.1"]) == [case]
    everywhere = {"lora", "dora", "vera", "ia3"}
    assert {case.method for case in registry.select(["MiniLM-L6.q"])} == {*everywhere, "loreft"}
    assert {case.method for case in registry.select(["MiniLM-L6.up"])} == everywhere
    assert {case.method for case in registry.select(["MiniLM-L6.down"])} == {*everywhere, "loreft", "ia3-in"}
    assert {case.R for case in registry.select(["ia3,ia3-in"])} == {0}


def test_filters_pick_by_whole_labels(registry):
    (case,) = registry.select([LORA])
    assert case == ("lora_linear", "nf4-nested", "lora", 384, 1536, 16, 16, "bfloat16", 0.0)
    wider = registry.select([LORA.replace("M=16", "M=1*").replace("lora ", "lora,dora ").upper()])
    assert {(c.method, c.M) for c in wider} == set(itertools.product(("lora", "dora"), (1, 16, 128)))
    both = registry.select([LORA, LORA.replace("bfloat16", "float32"), LORA])
    assert [c.dtype for c in both] == ["float32", "bfloat16"]
    assert len(registry.select(registry.QUICK)) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a label, got ''"),
        ("lora MiniLM-L6.gate", "got 'minilm-l6.gate'"),
        ("loreft fp4", "that one case has together"),
    ],
)
def test_a_filter_that_picks_nothing_is_refused(registry, text, message):
    with pytest.raises(ValueError, match=f"--filter: expected .*{message}"):
        registry.select([text])


def flops(function) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", ["lora", "vera", "loreft"])
def test_flops_are_what_pytorch_counts(registry, method):
    """Of the definition with adapters that are trained, and with frozen ones for dX."""
    M, K, N, R = 5, 96, 64, 8
    op = "loreft" if method == "loreft" else "lora_linear"
    work = registry.work(registry.Case(op, "dense", method, K, N, R, M, "float32", 0.0))
    W, A, B, P, b = (torch.randn(shape) for shape in ((N, K), (R, K), (N, R), (R, N), (R,)))
    trained_by = {"lora": (A, B), "vera": (B,), "loreft": (P, B, b)}  # VeRA's b by the gradient of b ⊙ B
    x, grad = torch.randn(M, K, requires_grad=True), torch.randn(M, N)

    def forward() -> torch.Tensor:
        h = F.linear(x, W)
        if method != "loreft":
            return h + F.linear(F.linear(x, A), B)
        return h + F.linear(h, P, b) @ B.t()

    for trained in (True, False):
        for t in trained_by[method]:
            t.requires_grad_(trained)
        y = forward()
        first, then = flops(forward), flops(lambda y=y: y.backward(grad))
        assert work["forward"].flops == first
        assert then == (work["forward+backward"].flops - first if trained else work["dX"].flops)


def test_bytes_move_each_operand_once(registry):
    (case,) = registry.select([LORA])
    M, K, N, R = case.M, case.K, case.N, case.R
    packed = N * K / 2 + N * K / 64 * (1 + 4 / 256)
    adapters, z, x, y = 4 * R * (N + K), 4 * M * R, 2 * M * K, 2 * M * N
    work = registry.work(case)
    assert work["forward"].bytes == packed + x + y + adapters + z
    assert work["dX"].bytes == packed + x + y + adapters
    assert work["forward+backward"].bytes == 2 * (packed + x + y + adapters) + z + x + z + adapters
    masked = registry.work(case._replace(dropout=0.1))["dX"]
    assert masked.bytes - work["dX"].bytes == M * K / 8
    dora = registry.work(case._replace(method="dora"))["forward+backward"]
    assert dora.bytes - work["forward+backward"].bytes == y
    dense = registry.dense_work(case, "float32")
    assert dense["forward+backward"] == (4 * M * N * K, 2 * 4 * (N * K + M * K + M * N))
