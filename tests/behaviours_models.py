"""Behaviours by how a model got its adapters: options of a config, other targets, tied weights."""

from __future__ import annotations

import functools

import torch
from behaviours import BASE, FUSED, STOCK_LAYER, Run, behaviour
from peft import LoraConfig, PeftMixedModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from peft_models import WIDTH, Net, adapted_layers, lora_config, rescale, tiny_bert, to_kind, unpacked
from torch import Tensor, nn

from peft_fast import accelerate

TOKENS = torch.arange(12).view(2, 6)


def adapted(model: nn.Module, method: str, **options) -> nn.Module:
    """`model` under PEFT's LoRA or DoRA, safe from bitsandbytes' repacking."""
    config = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, "use_dora": method == "dora", **options}
    return prepared(get_peft_model(model, LoraConfig(**config)))


def prepared(model: nn.Module) -> nn.Module:
    for layer in adapted_layers(model):
        for name in getattr(layer, "lora_magnitude_vector", ()):
            rescale(layer, name)
    return unpacked(model)


# ------------------------------------------------------------------------------------ options of the config


@behaviour(rank_pattern={"up": 9}, alpha_pattern={"down": 1})
def patterns(run: Run) -> None:
    run.show("ranks", [dict(layer.r) for layer in adapted_layers(run.model)])
    run.step()
    run.add("other", rank_pattern={"down": 1}, alpha_pattern={"up": 40})
    run.model.set_adapter("other")
    run.step()


@behaviour(use_rslora=True, r=7, lora_alpha=3)
def rslora(run: Run) -> None:
    run.step()


@behaviour(init_lora_weights=True)
def fresh(run: Run) -> None:
    """B is zero."""
    run.step()


@behaviour()
def initializations(run: Run) -> None:
    """Those that write the base weight too, and those that PEFT refuses over bitsandbytes' layers."""
    for name in ("gaussian", "orthogonal", "olora", "pissa"):
        if run.tried(lambda name=name: run.add(name, init_lora_weights=name, r=4)):
            run.model.set_adapter(name)
            run.step()
        else:
            adapted_layers(run.model)[0].delete_adapter(name)
            run.model.set_adapter("default")


@behaviour()
def lora_bias(run: Run) -> None:
    run.refused(lambda: run.add("both", lora_bias=True, use_dora=True))
    run.add("biased", use_dora=False, lora_bias=True, lora_dropout=0.1)
    run.model.set_adapter("biased")
    run.step()
    with torch.no_grad():
        for layer in adapted_layers(run.model):
            layer.lora_B["biased"].bias += 1.0
    run.step()


@behaviour(bias="lora_only")
def bias_lora_only(run: Run) -> None:
    run.step()


# ------------------------------------------------------------------------------------------- other modules


class Classifier(Net):
    """`Net` with a norm and a head after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(super().forward(x)))


def with_modules_to_save(kind: str, method: str) -> nn.Module:
    model = Classifier()
    head, model.head = model.head, nn.Identity()
    model = to_kind(model, kind)
    model.head = head.requires_grad_(False)
    return adapted(model, method, target_modules=["up", "down"], modules_to_save=["norm", "head"])


@behaviour(with_modules_to_save)
def modules_to_save(run: Run) -> None:
    run.step()
    run.add("other", modules_to_save=["head"])
    run.model.set_adapter("other")
    run.step()
    with run.model.disable_adapter():
        run.step(BASE)
    run.model.set_adapter("default")
    run.model.delete_adapter("other")
    run.step()
    run.model = run.model.eval().merge_and_unload()
    run.show("y", run.model(torch.ones(2, WIDTH)))


def with_a_parameter(kind: str, method: str) -> nn.Module:
    """Where stock PEFT targets a parameter, of a layer that stays dense: LoRA on `down.weight`."""
    model = adapted(to_kind(Net(), "dense"), "lora", target_parameters=["down.weight"], target_modules=[])
    up = model.base_model.model.up
    model.base_model.model.up = to_kind(nn.Sequential(up), kind)[0]
    return unpacked(model)


@behaviour(with_a_parameter, left="ParamWrapper has no fused counterpart")
def target_parameters(run: Run) -> None:
    assert isinstance(adapted_layers(run.model)[0], ParamWrapper)
    run.step("ParamWrapper has no fused counterpart")
    run.refused(lambda: run.add("more", target_parameters=["up.weight"], targets=[]))
    run.model.merge_adapter()
    run.step("ParamWrapper has no fused counterpart")
    run.model.unmerge_adapter()
    run.step("ParamWrapper has no fused counterpart")


@behaviour()
def target_parameters_of_an_adapted_layer(run: Run) -> None:
    run.refused(lambda: run.add("more", target_parameters=["up.weight"], targets=[], use_dora=False))
    run.step()


class Mixture(nn.Module):
    """An embedding, a convolution and a linear layer, from token ids to [..., WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed.weight.mean() + x
        h = h + self.embed(torch.arange(3))[:, None]
        return self.up(self.conv(h.permute(2, 0, 1)[None])[0].permute(1, 2, 0))


OTHERS = {"embed": "lora.layer.Embedding has no fused", "conv": "lora.layer.Conv2d has no fused"}


def with_others(kind: str, method: str) -> nn.Module:
    return adapted(to_kind(Mixture(), kind), method, target_modules=["embed", "conv", "up"])


@behaviour(with_others, left="lora.layer.Embedding has no fused counterpart")
def embedding_and_convolution(run: Run) -> None:
    run.step((*OTHERS.values(), FUSED))
    run.model.merge_adapter()
    run.step((*OTHERS.values(), BASE))
    run.model.unmerge_adapter()
    run.step((*OTHERS.values(), FUSED))


class Tied(nn.Module):
    """Token ids in, logits out, by one weight; x [..., WIDTH] is added to the embedding's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 20, bias=False)
        self.head.weight = self.embed.weight
        self.config = {"model_type": "custom", "tie_word_embeddings": True}
        self._tied_weights_keys = {"head.weight": "embed.weight"}

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.embed(torch.arange(x.shape[-2])) + x))


def tied(kind: str, method: str, **options) -> nn.Module:
    model = Tied()
    model.up = to_kind(nn.Sequential(model.up), kind)[0]
    model.is_loaded_in_4bit = kind == "nf4"
    return adapted(model.requires_grad_(False), method, target_modules=["embed", "up", "head"], **options)


@behaviour(tied, left="lora.layer.Embedding has no fused counterpart")
def double_adapters_on_a_tied_weight(run: Run) -> None:
    """The embedding and the head share their weight and have adapters of their own."""
    run.step((OTHERS["embed"], FUSED, FUSED))
    head, embed = run.model.base_model.model.head, run.model.base_model.model.embed
    run.show("tied", head.base_layer.weight is embed.base_layer.weight)
    run.add("other", targets=["head"])
    run.model.set_adapter("other")
    run.step((OTHERS["embed"], BASE, FUSED))
    run.model.merge_adapter()
    run.show("tied", head.base_layer.weight is embed.base_layer.weight)
    run.step((OTHERS["embed"], BASE, "merged adapters: ['other']"))
    run.model.unmerge_adapter()
    run.step((OTHERS["embed"], BASE, FUSED))


@behaviour(functools.partial(tied, ensure_weight_tying=True), left="Embedding has no fused counterpart")
def tied_adapters(run: Run) -> None:
    """ensure_weight_tying: the head's A and B are transposed views of the embedding's."""
    head, embed = run.model.base_model.model.head, run.model.base_model.model.embed
    a, b = head.lora_A["default"].weight, embed.lora_embedding_B["default"]
    run.show("tied", [a.data_ptr() == b.data_ptr(), a.is_contiguous()])
    run.step((OTHERS["embed"], FUSED, FUSED))
    b.data.mul_(2.0)
    run.step((OTHERS["embed"], FUSED, FUSED))


# ------------------------------------------------------------------------------------- other ways to a model


def injected(kind: str, method: str) -> nn.Module:
    model = inject_adapter_in_model(lora_config(use_dora=method == "dora"), to_kind(Net(), kind))
    return prepared(model)


@behaviour(injected)
def inject_adapter(run: Run) -> None:
    run.step()
    torch.manual_seed(2)
    inject_adapter_in_model(run.config(r=2), run.model, "other")
    for layer in adapted_layers(run.model):
        layer.set_adapter("other")
    run.step()
    for layer in adapted_layers(run.model):
        layer.enable_adapters(False)
    run.step(BASE)


def transformers_bert(kind: str, method: str) -> nn.Module:
    model = to_kind(tiny_bert(), kind)
    config = lora_config(["query", "value", "dense"], use_dora=method == "dora", lora_dropout=0.1)
    model.add_adapter(config)
    return prepared(model)


def of_tokens(run: Run):
    """Calls a transformer on embeddings x [3, 5, WIDTH]."""
    return lambda x: run.model(inputs_embeds=x).last_hidden_state


@behaviour(transformers_bert)
def transformers_add_adapter(run: Run) -> None:
    run.step(call=of_tokens(run))
    torch.manual_seed(2)
    run.model.add_adapter(lora_config(["query"], use_dora=run.method == "dora"), "other")
    run.model.set_adapter("other")
    run.show("active", run.model.active_adapters())
    reached = tuple(FUSED if "other" in layer.lora_A else BASE for layer in adapted_layers(run.model))
    run.step(reached, call=of_tokens(run))
    run.model.disable_adapters()
    run.step(BASE, call=of_tokens(run))
    run.model.enable_adapters()
    run.step(reached, call=of_tokens(run))
    run.show("saved", run.model.get_adapter_state_dict("default"))
    run.model.set_adapter("default")
    run.model.delete_adapter("other")
    run.step(call=of_tokens(run))


def peft_bert(kind: str, method: str) -> nn.Module:
    return adapted(to_kind(tiny_bert(), kind), method, target_modules=["query", "value"], lora_dropout=0.1)


def checkpointed(run: Run, use_reentrant: bool) -> None:
    run.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    run.model.enable_input_require_grads()
    for name in ("default", "other"):
        if name == "other":
            run.add(name, targets=["query", "dense"])
            run.model.set_adapter(name)
            accelerate(run.model) if run.fast else None
        torch.manual_seed(5)
        h = run.model.train()(TOKENS).last_hidden_state
        (h * torch.linspace(-1, 1, WIDTH).sin()).square().sum().backward()
        run.show("gradients", {n: p.grad for n, p in run.model.named_parameters()})


@behaviour(peft_bert)
def transformers_checkpointing(run: Run) -> None:
    checkpointed(run, use_reentrant=False)


@behaviour(peft_bert)
def transformers_checkpointing_reentrant(run: Run) -> None:
    checkpointed(run, use_reentrant=True)


def replicated(kind: str, method: str) -> nn.Module:
    model = to_kind(tiny_bert(), kind)
    return adapted(model, method, target_modules=["query"], layer_replication=[[0, 2], [0, 2]])


@behaviour(replicated)
def layer_replication(run: Run) -> None:
    """Four layers by the weights of two, each with adapters of its own."""
    queries = [layer.base_layer.weight.data_ptr() for layer in adapted_layers(run.model)]
    run.show("shared", [queries[0] == queries[2], queries[1] == queries[3], len(queries)])
    run.step(call=of_tokens(run))


@behaviour()
def mixed_model(run: Run) -> None:
    """PeftMixedModel, which PEFT has over dense layers alone."""
    net, config = to_kind(Net(), run.kind), run.config()
    if run.kind == "nf4":
        run.refused(lambda: PeftMixedModel(net, config, "default"))
        return
    run.model = prepared(PeftMixedModel(net, config, "default"))
    if run.fast:
        accelerate(run.model, strict=True)
    run.step()
    torch.manual_seed(2)
    run.model.add_adapter("other", run.config())
    run.model.set_adapter("other")
    run.step()
    run.model.set_adapter(["default", "other"])
    run.step("several active adapters")


@behaviour(targets=["up"])
def accelerate_again(run: Run) -> None:
    """A second call takes in the layers that PEFT added since the first."""
    run.add("other", targets=["up", "down"])
    run.model.set_adapter("other")
    run.step((FUSED, STOCK_LAYER))
    if run.fast:
        accelerate(run.model, strict=True)
    run.step()
