"""Models with adapters of `get_adapter_model`, and what of them may not change."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import peft_fast
from peft_fast import (
    AdapterConfig,
    get_adapter_model,
)

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
OPTIONS = {"vera": {"r": 4}, "s2lora": {"r": 4}, "parallel": {"r": 4}, "series": {"r": 4}}
TOKENS = torch.arange(14).view(2, 7)
LABELS = torch.tensor([0, 1])


def bert(quant=None):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES))
    if quant is not None:
        peft_fast.quantize(model, quant)
        peft_fast.accelerate(model)  # and so kept from repacking
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def train(model, steps=3):
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapted(method="ssf", quant=None, **options):
    return get_adapter_model(bert(quant), AdapterConfig(method, **{**OPTIONS.get(method, {}), **options}))


def state_of(model):
    """All that a refused call must leave alone."""
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    repacks = [getattr(module, "support_avx512bf16_for_cpu", None) for module in model.modules()]
    return modules, trained, repacks, tensors


def assert_unchanged(model, before):
    *rest, tensors = state_of(model)
    assert tuple(rest) == before[:3]
    assert tensors.keys() == before[3].keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[3].items())
