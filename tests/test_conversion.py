"""convert and quantize: from a model of nn.Linear layers to a fused, quantized, adapted one."""

import copy
import threading
from functools import partial

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.vera.layer import VeraLayer
from peft_models import fused_calls, lora_layers, tiny_bert, unpacked
from torch import nn
from transformers import (
    BertForSequenceClassification,
    EsmForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_fast import ReftModel, UnsupportedLayer, convert, dequantize, explain, quantize
from peft_fast.adapter_model import AdapterModel
from peft_fast.conversion import METHODS, PROMPTS_OF_PEFT
from peft_fast.formats import from_linear
from peft_fast.packed_linear import PackedLinear
from peft_fast.quantization import to_packed
from peft_fast.training_methods import TRAINING_METHODS

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


EVERY_METHOD = {
    **{method: {} for method in METHODS},
    **{method: {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3} for method in PROMPTS_OF_PEFT},
    "freeze": {"modules_to_save": ["layers.1"]},
    "loreft": {"positions": "f1+l1", "r": 4},
    "vera": {"r": 32},
}


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("quant", ["nf4", "fp8"])
def test_every_method_over_a_quantized_base(method, quant, tmp_path):
    base = llama()
    model = convert(copy.deepcopy(base), method=method, quant=quant, **EVERY_METHOD[method])
    kind = Linear4bit if quant == "nf4" else PackedLinear
    layers = 7 if method == "freeze" else 14
    assert sum(isinstance(m, kind) for m in model.modules()) == layers
    before = fused_calls()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert fused_calls() - before == (2 if method == "dora" else 1) * layers  # with the norms'
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p += 0.02 * torch.randn_like(p)
    model.eval().save_pretrained(tmp_path)
    frozen = EVERY_METHOD[method].get("modules_to_save", ())
    quantize(base, quant, skip_modules=frozen)
    cls = next(c for c in (AdapterModel, ReftModel, PeftModel) if isinstance(model, c))
    loaded = unpacked(cls.from_pretrained(base, tmp_path)).eval()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_methods_are_named_as_those_of_train():
    assert sorted(METHODS) == sorted(TRAINING_METHODS)


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
        ({"method": "ia3", "r": 4}, TypeError, "options: expected those of IA3Config, got .*'r'"),
        ({"method": "ssf", "r": 4}, TypeError, "r: expected an option of 'ssf'"),
        (
            {"method": "prompt"},
            ValueError,
            "task_type: expected one of PEFT's task types for 'prompt', got N",
        ),
        ({"method": "prefix", "target_modules": ["q"]}, ValueError, "target_modules: expected none for 'pre"),
        ({"method": "freeze", "modules_to_save": ["nowhere"]}, ValueError, "modules_to_save: expected the"),
        ({"method": "freeze"}, UnsupportedLayer, "expected something to train"),
        ({"method": "bitfit", "target_modules": ["nowhere"]}, UnsupportedLayer, "target_modules: expected"),
        ({"r": 10**12}, ValueError, "r: expected at most 65536, got 1000000000000"),
        ({"r": True}, ValueError, "r: expected a positive integer, got True"),
        ({"backend": "warp"}, ValueError, "backend: expected 'auto' or one of"),
    ],
)
@pytest.mark.parametrize("start", ["dense", "4 bits"])
def test_bad_options_change_nothing(options, error, message, start):
    model = llama()
    if start == "4 bits":
        quantize(model)
    before, marked = state(model), hasattr(model, "is_loaded_in_4bit")
    with pytest.raises(error, match=message):
        convert(model, **options)
    assert state(model) == before
    assert hasattr(model, "is_loaded_in_4bit") == marked


def test_a_target_that_cannot_be_adapted_changes_nothing_of_a_dense_base_either():
    model = llama()
    before = state(model)
    with pytest.raises(ValueError, match="not supported"):
        convert(model, quant=None, target_modules=["q_proj", "input_layernorm"])
    assert state(model) == before


def test_a_model_that_cannot_be_copied_is_converted():
    model = plain()
    model.lock = threading.Lock()
    assert len(lora_layers(convert(model, r=2))) == 2


def test_a_tensor_that_is_no_parameter_is_not_copied():
    model = plain()
    model.table = model[0].weight * 2.0  # not a leaf, so deepcopy would raise
    assert convert(model, r=2).base_model.model.table is model.table


def test_models_with_adapters_are_refused():
    model = convert(plain(), r=2)
    before = state(model)
    for change in (convert, quantize):
        with pytest.raises(UnsupportedLayer, match="expected one without adapters, got a FusedLinear4bit"):
            change(model)
    assert state(model) == before


@pytest.mark.parametrize("exclude", [["projector"], r".*projector"])
def test_what_users_exclude_is_excluded_beside_what_is_read(exclude):
    given = [*exclude, "kept"] if isinstance(exclude, list) else f"{exclude}|kept"
    model = convert(Odd(), quant=None, r=2, exclude_modules=given)
    adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert adapted.isdisjoint({"kept", "read", "out_proj"})
    assert "first" in adapted


def test_vera_passes_over_what_is_read_without_a_config_that_excludes():
    model = convert(Odd(), method="vera", quant=None, r=2)
    adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, VeraLayer)}
    assert "kept" in adapted
    assert adapted.isdisjoint({"read", "out_proj"})


def test_layers_that_cannot_be_fused_are_told():
    with pytest.warns(UserWarning, match=r"convert: (.*\n)*.*Embedding has no fused"):
        convert(llama(), target_modules=["q_proj", "embed_tokens"], r=2)


@pytest.mark.parametrize("method", ["lora", "loreft"])
@pytest.mark.parametrize("make", [RobertaForSequenceClassification, EsmForSequenceClassification])
def test_a_head_of_several_layers_is_trained_and_not_quantized(make, method):
    config = make.config_class(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        pad_token_id=1, mask_token_id=4,
    )  # fmt: skip
    base = make(config)
    model = convert(base, method=method, r=2, **({"task_type": "SEQ_CLS"} if method == "lora" else {}))
    heads = [m for n, m in model.named_modules() if "classifier" in n and isinstance(m, nn.Linear)]
    assert heads
    assert {type(m) for m in heads} == {nn.Linear}
    logits = model(input_ids=TOKENS).logits
    logits.square().sum().backward()
    if method == "lora":
        trained = [m for name, m in model.named_modules() if name.endswith("default.out_proj")]
        assert trained[0].weight.grad is not None


def test_a_module_that_is_trained_whole_is_not_quantized():
    model = convert(llama(), r=2, modules_to_save=["mlp"])
    mlp = model.base_model.model.model.layers[0].mlp.modules_to_save["default"]
    assert type(mlp.up_proj) is nn.Linear
    assert mlp.up_proj.weight.requires_grad
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


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


@pytest.mark.parametrize("pack", [partial(quantize, quant="int8"), lambda m: (quantize(m), to_packed(m))])
def test_a_model_that_transformers_would_load_wrong_is_not_saved(pack, tmp_path):
    """Packed bytes would be taken for values."""
    model = llama()
    pack(model)
    with pytest.raises(ValueError, match="quantized with PackedLinear, whose weights are kept by state_dict"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    other = llama()
    pack(other)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.absmax.zero_()
    other.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def test_what_transformers_keeps_in_fp32_is_kept(tmp_path):
    """T5 casts to the dtype of `wo`, which would be uint8."""
    dense = t5()
    model = copy.deepcopy(dense)
    assert not any(name.endswith("wo") for name in quantize(model))
    model.save_pretrained(tmp_path)
    loaded = unpacked(T5ForConditionalGeneration.from_pretrained(tmp_path)).eval()
    logits = [unpacked(m).eval()(input_ids=TOKENS, labels=TOKENS).logits for m in (dense, model, loaded)]
    assert (logits[1] - logits[0]).norm() < 0.3 * logits[0].norm()
    torch.testing.assert_close(logits[2], logits[1])
    convert(t5(), r=2).train()(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_a_second_call_takes_the_rest_and_both_are_saved(tmp_path):
    model = llama().eval()
    first = quantize(model, skip_modules=["down_proj"])
    assert not any("down_proj" in name for name in first)
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_type: expected nf4, .*, got fp4"):
        quantize(model, "fp4")
    assert quantize(model) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(unpacked(model)(TOKENS).logits, unpacked(loaded)(TOKENS).logits)


def test_layers_with_hooks_or_a_forward_of_their_own_are_left():
    model = plain()
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 2.0,))
    model.append(nn.Linear(64, 64))
    model[3].forward = lambda x: x
    assert quantize(model) == ["2.0"]
