"""What representation edits refuse rather than get wrong, and how they live beside `accelerate`."""

from __future__ import annotations

import copy
import re

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft_models import to_4bit, to_kind
from reft_models import ragged, reft_llama, tiny_llama, train_tensors
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel, MambaConfig, MambaForCausalLM

from peft_fast import (
    LoReFTConfig,
    LoReFTLinear,
    UnsupportedLayer,
    accelerate,
    explain,
    get_reft_model,
    restore,
)
from peft_fast.base_layers import FusedBase
from peft_fast.functional import loreft, loreft_linear

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_component_recomputed_outside_its_model_raises(reentrant):
    """Its edits would be skipped, and never trained."""
    model, inputs = reft_llama(component="down_proj").train(), ragged()
    for block in model.model.layers:
        mlp = block.mlp
        mlp.forward = lambda x, f=mlp.forward: checkpoint(f, x, use_reentrant=reentrant)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="component: expected a call by its model's forward"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_models_whose_prompt_cannot_be_told_are_refused():
    lora = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    mamba = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4))
    albert = AlbertModel(
        AlbertConfig(
            vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64,
        )
    )  # fmt: skip
    for model, message in (
        (lora, "got a PeftModel; see its get_base_model"),
        (mamba, "expected one that generates with past_key_values"),
        (albert, "blocks: expected the path of the list of blocks"),
    ):
        trained = [p.requires_grad for p in model.parameters()]
        with pytest.raises(UnsupportedLayer, match=message):
            get_reft_model(model, LoReFTConfig(r=4))
        assert [p.requires_grad for p in model.parameters()] == trained


def test_guidance_and_old_caches_are_refused():
    model, inputs = reft_llama(), ragged()
    with pytest.raises(ValueError, match="guidance_scale: expected none"):
        model.generate(**inputs, guidance_scale=1.5, max_new_tokens=2)
    cache = model(**inputs, use_cache=True).past_key_values
    old = tuple((layer.keys, layer.values) for layer in cache.layers)
    with pytest.raises(TypeError, match="past_key_values: expected a transformers Cache, got tuple"):
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=old)


@pytest.mark.parametrize(
    ("option", "other"),
    [
        ("act_fn", {"act_fn": "gelu"}),
        ("positions", {"positions": "f2"}),
        ("component", {"component": "o_proj"}),
        ("dropout_on", {"dropout_on": "state"}),
    ],
)
def test_edits_of_another_kind_are_not_loaded(tmp_path, option, other):
    reft_llama(**other).save_pretrained(tmp_path, max_shard_size="5GB")
    model = reft_llama()
    before = {name: p.detach().clone() for name, p in train_tensors(model).items()}
    with pytest.raises(ValueError, match=f"reft_config.json: {option}: expected"):
        model.load_edits(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in train_tensors(model).items())


@pytest.mark.parametrize("strategy", ["fold", "project"])
def test_a_float64_layer_is_edited_in_float64(strategy):
    torch.manual_seed(0)
    base = nn.Linear(16, 32).double()
    layer = LoReFTLinear.from_linear(base, LoReFTConfig(r=4), strategy=strategy).double()
    x = torch.randn(600, 16, dtype=torch.float64)
    h, R = base(x), layer.edit.rows()
    expected = h + (h @ layer.edit.source.T + layer.edit.bias - h @ R.T) @ R
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    merged = layer.merged()
    assert merged.weight.dtype == torch.float64
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)


def test_folding_inside_autocast_rounds_once():
    torch.manual_seed(0)
    layer = LoReFTLinear.from_linear(nn.Linear(16, 32), LoReFTConfig(r=4), strategy="fold")
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.normal_(layer.edit.bias, std=3)
    x = torch.randn(5, 16)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())


def test_operands_that_do_not_fit_are_named():
    R, x, weight, h = torch.randn(3, 32), torch.randn(5, 16), torch.randn(32, 16), torch.ones(5, 32)
    row = torch.tensor(1)
    for message, op, args, options in (
        (
            r"edit_bias: expected \[r\] = \[3\], got \[1\]",
            loreft_linear,
            (x, weight, R, R, torch.ones(1)),
            {},
        ),
        (
            r"edit_bias: expected \[r\] = \[3\], got \[3, 4\]",
            loreft_linear,
            (x, weight, R, R, torch.ones(3, 4)),
            {},
        ),
        (r"bias: expected \[N\] = \[32\], got \[7\]", loreft_linear, (x, weight, R), {"bias": torch.ones(7)}),
        (r"rows: expected \[m\], got \[\]", loreft, (h, R, R), {"rows": row, "dropout_p": 0.5}),
    ):
        with pytest.raises(ValueError, match=message):
            op(*args, **options)
    with pytest.raises(TypeError, match="edit_bias: expected a floating dtype"):
        loreft_linear(x, weight, R, edit_bias=torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="h: expected a floating dtype"):
        loreft(torch.ones(5, 32, dtype=torch.int64), R, R, residual=torch.ones(5, 32))


def quantized_llama() -> nn.Module:
    model = tiny_llama()
    to_kind(model.model, "nf4")
    return model.requires_grad_(False)


@pytest.mark.parametrize("first", ["accelerate", "edit"])
def test_edits_of_4bit_layers_and_accelerate_in_either_order(first):
    torch.manual_seed(0)
    model, inputs = quantized_llama(), ragged()
    config = LoReFTConfig(r=4, component="down_proj", init="identity")
    switches = {n: vars(m).get("support_avx512bf16_for_cpu") for n, m in model.named_modules()}
    with torch.no_grad():
        if first == "accelerate":
            assert len(accelerate(model, strict=True).fused) == 14
            get_reft_model(model, config)
        else:
            get_reft_model(model, config)
            assert len(accelerate(model, strict=True).fused) == 14
        linear = model.model.layers[0].mlp.down_proj
        assert isinstance(linear, FusedBase)
        expected = model(**inputs).logits
        if first == "accelerate":
            assert restore(model) == 14
            model.unload()
        else:
            model.unload()
            assert restore(model) == 14
        assert type(linear) is bnb.nn.Linear4bit
        assert "backend" not in vars(linear)
        assert {n: vars(m).get("support_avx512bf16_for_cpu") for n, m in model.named_modules()} == switches
        accelerate(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_explain_names_the_edits():
    model = reft_llama()
    model(**ragged())
    text = explain(model)
    assert "model.layers.0.reft.all: LoReFT: d=32, r=4" in text
    assert re.search(
        r"\n    loreft\n    backend \S+ \(asked for: auto\), run [1-9]\d* times in this process", text
    )
    layer = LoReFTLinear.from_linear(to_4bit(nn.Linear(64, 32)), LoReFTConfig(r=4))
    assert "variant='loreft'" in explain(copy.deepcopy(layer))


def test_explain_says_what_would_raise():
    layer = LoReFTLinear.from_linear(nn.Linear(8, 8), LoReFTConfig(r=2, backend="cuda-gemv"))
    assert "the next forward raises BackendUnavailable: " in explain(layer)
