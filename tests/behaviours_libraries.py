"""Behaviours of what comes with PEFT and transformers: preparation, optimizers, helpers, other methods."""

from __future__ import annotations

import copy

import torch
from behaviours import BASE, METHODS, STOCK_LAYER, Run, behaviour
from behaviours_models import WIDTH, adapted, of_tokens, prepared
from behaviours_training import fixed_inputs
from peft import LoHaConfig, PeftMixedModel, get_peft_model, prepare_model_for_kbit_training
from peft.helpers import DoraCaching
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft_models import Net, adapted_layers, tiny_bert, to_kind
from torch import nn

from peft_fast import accelerate


def kbit_bert(kind: str, method: str) -> nn.Module:
    model = tiny_bert()
    model = to_kind(model, kind, torch.bfloat16)
    model.is_loaded_in_4bit = kind == "nf4"
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted(model, method, target_modules=["query", "value"], lora_dropout=0.1)


def same_biases(run: Run) -> None:
    """bitsandbytes' forward casts a layer's bias in place; the fused one changes nothing."""
    for name, parameter in run.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data.float()


@behaviour(kbit_bert)
def kbit_training(run: Run) -> None:
    """prepare_model_for_kbit_training: fp32 norms and a bfloat16 compute dtype below, checkpointed."""
    run.rounding = torch.bfloat16
    run.step(call=of_tokens(run))
    with torch.autocast("cpu", torch.bfloat16):
        run.step(call=of_tokens(run))
    same_biases(run)


@behaviour()
def other_compute_dtype(run: Run) -> None:
    """fp32 activations over a 4-bit layer that computes in bfloat16."""
    run.rounding = torch.bfloat16 if run.kind == "nf4" else torch.float32
    for layer in adapted_layers(run.model):
        layer.base_layer.compute_dtype = torch.bfloat16 if run.kind == "nf4" else torch.float32
    run.step()
    same_biases(run)


def trained_by(run: Run, create) -> None:
    optimizer = create(run.model)
    for _ in range(4):
        run.model(fixed_inputs(3, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    run.step()


@behaviour()
def loraplus_optimizer(run: Run) -> None:
    trained_by(run, lambda m: create_loraplus_optimizer(m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16))


@behaviour(raises={"dora": "unsupported operand type(s) for @: 'NoneType' and 'Tensor'"})
def lorafa_optimizer(run: Run) -> None:
    trained_by(run, lambda m: create_lorafa_optimizer(m, r=4, lora_alpha=12, lr=1e-3))


@behaviour()
def dora_caching(run: Run) -> None:
    run.model.eval()
    with DoraCaching():
        run.step(grad=False)
        run.step(grad=False)
    run.model.train()
    run.step()


@behaviour(targets=["up"])
def loha_beside(run: Run) -> None:
    """Another method on the same layer, around the LoRA layer: the inner one goes on."""
    if run.kind == "nf4":
        run.refused(lambda: PeftMixedModel(to_kind(Net(), "nf4"), run.config(), "default"))
        return
    run.model = prepared(PeftMixedModel(to_kind(Net(), "dense"), run.config(targets=["up"]), "default"))
    if run.fast:
        accelerate(run.model, strict=True)
    torch.manual_seed(2)
    run.model.add_adapter("loha", LoHaConfig(r=2, target_modules=["up"], init_weights=False))
    run.model.set_adapter(["default", "loha"])
    run.step()


@behaviour()
def layers_chosen(run: Run) -> None:
    base = to_kind(tiny_bert(), run.kind)
    config = run.config(
        targets=["query", "value", "dense"], exclude_modules=["value"], layers_to_transform=[1]
    )
    run.model = prepared(get_peft_model(base, config))
    if run.fast:
        accelerate(run.model, strict=True)
    run.show("names", [name for name, m in run.model.named_modules() if hasattr(m, "lora_A")])
    run.step(call=of_tokens(run))


@behaviour(methods=METHODS, raises={"nf4-ia3": "NotImplementedError"})
def adapt_an_accelerated_base(run: Run) -> None:
    """accelerate first, PEFT second: the bare 4-bit layers are fused under PEFT's own."""
    base = to_kind(Net(), run.kind)
    base_fast = copy.deepcopy(base)
    if run.fast:
        if run.kind == "nf4":
            accelerate(base_fast, strict=True)
        base = base_fast
    torch.manual_seed(2)
    run.model = prepared(get_peft_model(base, run.config()))
    run.step(STOCK_LAYER)
    if run.fast:
        accelerate(run.model, strict=True)
    run.step()
    run.model.merge_adapter()
    run.step(BASE)
    run.model.unmerge_adapter()
    run.step()


@behaviour()
def weights_read_by_name(run: Run) -> None:
    """`.weight` and `.bias` of a layer are its base's, as transformers' T5 reads them."""
    layer = adapted_layers(run.model)[0]
    run.show("read", [layer.weight is layer.base_layer.weight, layer.bias is layer.base_layer.bias])
    run.show("features", [layer.in_features, layer.out_features, isinstance(layer, nn.Module)])
    run.show("delta", layer.get_delta_weight("default"))


@behaviour()
def transformers_generation(run: Run) -> None:
    """Greedy decoding, with a cache: prompts of many tokens, then one at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    model = to_kind(LlamaForCausalLM(config), run.kind)
    run.model = adapted(model, run.method, target_modules="all-linear", task_type="CAUSAL_LM").eval()
    if run.fast:
        accelerate(run.model)
    tokens = torch.arange(10).view(2, 5)
    run.show("tokens", run.model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False))
    run.show("logits", run.model(input_ids=tokens).logits)
    run.add("other", targets=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    run.model.eval()
    if run.method == "lora":
        with torch.no_grad():
            names = ["other", "__base__"]
            run.show("mixed", run.model(input_ids=tokens, adapter_names=names).logits)
