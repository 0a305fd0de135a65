"""convert and quantize: from a model of nn.Linear layers to a fused, quantized, adapted one."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft_models import fused_calls, lora_layers, tiny_bert, unpacked
from torch import nn
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_fast import ReftModel, UnsupportedLayer, convert, dequantize, explain, quantize
from peft_fast.formats import from_linear

TOKENS = torch.arange(18).view(2, 9)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Sequential(nn.Linear(128, 64, bias=False)))


def state(model):
    return {name: (type(module), *map(id, module.parameters())) for name, module in model.named_modules()}


def moved(model):
    """With adapters away from their start."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


# ---------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("quant", ["nf4", "fp4", None])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_plain_model_trains_fused_and_stock_peft_loads_it(quant, method, tmp_path):
    base = plain()
    model = convert(copy.deepcopy(base), method=method, quant=quant, r=4)
    before, x = fused_calls(), torch.randn(5, 64)
    model(x).square().sum().backward()
    assert fused_calls() > before
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    moved(model).eval().save_pretrained(tmp_path)
    if quant is not None:
        quantize(base, quant)
    stock = unpacked(PeftModel.from_pretrained(base, tmp_path)).eval()
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_transformers_model(method):
    model = convert(llama(), method=method, r=4, lora_dropout=0.1)
    assert {type(layer.base_layer) for layer in lora_layers(model)} == {Linear4bit}
    assert len(lora_layers(model)) == 14
    assert type(model.base_model.model.lm_head) is nn.Linear
    assert "PEFT's own forward" not in explain(model)
    assert lora_layers(model)[0].scaling["default"] == 2.0
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_loreft_over_4bit_layers():
    model = convert(llama(), method="loreft", r=4, positions="f1+l1")
    assert isinstance(model, ReftModel)
    before = fused_calls()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert fused_calls() - before == 14
    assert all("reft" in name for name, p in model.named_parameters() if p.requires_grad)


def test_gpt2s_conv1d_is_quantized_as_its_transpose():
    base = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    weight = base.transformer.h[0].attn.c_attn.weight.detach().t()
    layer = convert(base, r=4).base_model.model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (64, 192)
    decoded = dequantize(from_linear(layer.base_layer), torch.float32)
    assert (decoded - weight).abs().max() < 0.2 * weight.abs().max()


def test_the_head_of_a_classifier_is_trained_and_not_quantized():
    base = BertForSequenceClassification(tiny_bert().config)
    model = convert(base, r=2, task_type="SEQ_CLS")
    head = model.base_model.model.classifier
    assert head.modules_to_save["default"].weight.requires_grad
    assert type(head.original_module) is nn.Linear


def test_a_model_loaded_in_4_bits_keeps_its_weights():
    base = plain()
    quantize(base, "fp4", double_quant=False)
    packed = base[0].weight
    model = convert(base, r=2)
    assert model.base_model.model[0].base_layer.weight is packed
    assert packed.quant_state.quant_type == "fp4"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "lokr"}, ValueError, "method: expected one of"),
        ({"quant": "nf3"}, ValueError, "quant: expected one of"),
        ({"r": 0}, ValueError, "r: expected a positive integer, got 0"),
        ({"lora_aplha": 2}, TypeError, "options: expected those of LoraConfig, got .*lora_aplha"),
        ({"method": "loreft", "ranks": 2}, TypeError, "options: expected those of LoReFTConfig"),
        ({"method": "loreft", "target_modules": ["q"]}, ValueError, "target_modules: expected none"),
        ({"method": "loreft", "positions": "x9"}, ValueError, "positions"),
        ({"target_modules": ["nowhere"]}, ValueError, "nowhere"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, ValueError, "not supported"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype: expected None or one of"),
        ({"skip_modules": "q_proj"}, TypeError, "skip_modules: expected a collection of names"),
    ],
)
def test_bad_options_change_nothing(options, error, message):
    model = llama()
    before = state(model)
    with pytest.raises(error, match=message):
        convert(model, **options)
    assert state(model) == before
    assert not hasattr(model, "is_loaded_in_4bit")


# --------------------------------------------------------------------------------------------------- quantize


def test_quantized_weights_are_bitsandbytes_own():
    model = plain()
    dense = model[0].weight.detach().clone()
    assert quantize(model, "nf4", blocksize=128, compute_dtype=torch.bfloat16) == ["0", "2.0"]
    layer = model[0]
    assert layer.weight.quant_state.blocksize == 128
    assert layer.compute_dtype == torch.bfloat16
    import bitsandbytes.functional as bnb

    packed, quant_state = bnb.quantize_4bit(
        dense, blocksize=128, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    assert torch.equal(layer.weight.data, packed)
    assert torch.equal(layer.weight.quant_state.absmax, quant_state.absmax)


class Odd(nn.Module):
    """Every kind of linear layer that stays as it is, and one that does not."""

    def __init__(self):
        super().__init__()
        self.kept, self.tied, self.first, self.twice, self.read = (nn.Linear(8, 8) for _ in range(5))
        self.tied.weight = self.first.weight
        self.again = self.twice
        self.empty, self.wide = nn.Linear(0, 8), nn.Linear(8, 8).double()
        self.score, self.skipped = nn.Linear(8, 2), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return nn.functional.linear(self.kept(x), self.read.weight)


def test_what_is_left():
    model = Odd()
    assert quantize(model, skip_modules=["skipped"]) == ["kept"]
    assert type(model.again) is nn.Linear
    with pytest.raises(UnsupportedLayer, match=r"read: Odd uses its \.weight without calling it"):
        quantize(model, skip_modules=["skipped"])


def test_meta_is_refused_before_anything_is_changed():
    model = plain()
    model[2][0].to("meta")
    before = state(model)
    with pytest.raises(UnsupportedLayer, match=r"expected layers with data, got '2\.0' on the meta device"):
        quantize(model)
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_transformers_model_saves_and_loads_as_one(dtype, tmp_path):
    model = llama(dtype).eval()
    quantize(model)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.is_loaded_in_4bit
    results = [unpacked(m)(TOKENS).logits for m in (model, loaded)]
    assert torch.equal(*results)
