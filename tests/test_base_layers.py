"""4-bit layers without an adapter: the fused forward and dX, beside every way to train around them."""

from __future__ import annotations

import copy
import pickle

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft_models import fused_calls, lora_config, lora_layers, tiny_bert, to_4bit, to_kind, unpacked
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fast import accelerate, explain, restore
from peft_fast.base_layers import FUSED_BASES, FusedBase
from peft_fast.formats import from_linear


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    head = model.lm_head
    to_kind(model.model, "nf4")
    model.lm_head = head
    return model


def exact(model: nn.Module) -> nn.Module:
    """The same model in fp64, each packed weight at its exact value."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                dense = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                dense.weight = nn.Parameter(from_linear(child).decode(torch.float64))
                if child.bias is not None:
                    dense.bias = nn.Parameter(child.bias.data)
                setattr(parent, name, dense)
    return model.double()


def weight_bytes(model: nn.Module) -> list[bytes]:
    return [m.weight.data.numpy().tobytes() for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def test_every_4bit_layer_runs_fused_forward_and_backward():
    stock = unpacked(tiny_llama())
    model = copy.deepcopy(stock)
    report = accelerate(model, strict=True)
    assert {row.method for row in report} == {"base"}
    assert len(report.fused) == 14
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    grads = []
    for net, dtype in ((model, torch.float32), (stock, torch.float32), (exact(stock), torch.float64)):
        x = net.get_input_embeddings()(tokens).detach().to(dtype).requires_grad_()
        before = fused_calls()
        logits = net(inputs_embeds=x).logits
        assert fused_calls() - before == (14 if net is model else 0)
        logits.square().mean().backward()
        grads.append((logits.detach().double(), x.grad.double()))
    for ours, theirs, truth in zip(*grads, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("kind", [bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4])
@pytest.mark.parametrize("bias", [True, False])
def test_each_class_of_bitsandbytes(kind, bias):
    torch.manual_seed(0)
    options = {"quant_type": "nf4"} if kind is bnb.nn.Linear4bit else {}
    layer = unpacked(kind(64, 48, bias=bias, compute_dtype=torch.float32, **options).to("cpu"))
    x, grad = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 48)
    expected = layer(x)
    (expected_dx,) = torch.autograd.grad(expected, x, grad)
    accelerate(nn.Sequential(layer))
    assert type(layer) is FUSED_BASES[kind]
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=1e-5)


def test_untargeted_layers_of_a_lora_model_run_fused_too():
    model = peft.get_peft_model(to_kind(tiny_bert(), "nf4"), lora_config(targets=("query", "value")))
    report = accelerate(model, strict=True)
    assert {row.method for row in report} == {"lora", "base"}
    assert len([row for row in report if row.method == "base"]) == 8
    assert all(type(layer.base_layer) is bnb.nn.Linear4bit for layer in lora_layers(model))
    assert restore(model) == 12
    assert not any(isinstance(module, FusedBase) for module in model.modules())
    assert not any("backend" in vars(module) for module in model.modules())


def test_without_the_method_they_are_left_alone():
    model = tiny_llama()
    with pytest.warns(UserWarning, match="0 layers fused"):
        accelerate(model, methods=("lora",))
    assert not any(isinstance(module, FusedBase) for module in model.modules())


def test_evaluation_training_and_saving_change_no_weight():
    """Where stock bitsandbytes repacks at the first eval forward, loses gradients and saves other weights."""
    model = tiny_llama()
    accelerate(model)
    before, keys = weight_bytes(model), {k: v.clone() for k, v in model.state_dict().items()}
    tokens = torch.arange(8)[None]
    for training in (False, True, False):
        model.train(training)
        x = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=x).logits.sum().backward()
        assert x.grad is not None
        assert x.grad.norm() > 0
    assert weight_bytes(model) == before
    after = model.state_dict()
    assert after.keys() == keys.keys()
    assert all(torch.equal(after[k], v) for k, v in keys.items())


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_methods_of_peft_train_on_the_fused_base(config):
    base = unpacked(tiny_llama())
    stock = peft.get_peft_model(copy.deepcopy(base), config)
    model = copy.deepcopy(stock)
    assert len(accelerate(model, strict=True).fused) == 14
    tokens = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))
    for net in (stock, model):
        net(input_ids=tokens, labels=tokens).loss.backward()
    theirs, ours = (
        {n: p.grad for n, p in net.named_parameters() if p.requires_grad} for net in (stock, model)
    )
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad.norm() > 0
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-6)


def test_an_adapter_added_later_is_fused_over_a_swapped_base():
    model = to_kind(tiny_bert(), "nf4")
    accelerate(model)
    model = peft.get_peft_model(model, lora_config(targets=("query",)))
    report = accelerate(model, strict=True)
    assert sum(row.method == "lora" for row in report) == 2
    before = fused_calls()
    model(input_ids=torch.arange(6)[None])
    assert fused_calls() - before == 12


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_stay_fused(copied):
    layer = to_4bit(nn.Linear(64, 32))
    accelerate(nn.Sequential(layer), backend="reference")
    other = copied(layer)
    x = torch.randn(3, 64)
    assert type(other) is type(layer)
    assert torch.equal(other(x), layer(x))


def test_explain_and_compile():
    model = nn.Sequential(to_4bit(nn.Linear(64, 32)))
    accelerate(model)
    assert "FusedBase4bit: no adapter, the base alone" in explain(model)
    assert "lora_linear over nf4 [32, 64], nested absmax" in explain(model[0])
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_what_cannot_be_swapped_is_left_with_the_reason():
    unquantized = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    offloaded = to_4bit(nn.Linear(64, 32))
    offloaded.forward = offloaded.forward
    model = nn.ModuleList([unquantized, offloaded, to_4bit(nn.Linear(64, 32))])
    report = accelerate(model)
    assert [row.status for row in report] == ["left", "left", "fused"]
    assert "a forward of its own" in report.rows[1].detail
    assert type(unquantized) is type(offloaded) is bnb.nn.Linear4bit
