"""Edits of a linear layer's output: both ways to them, merging, and as a component of whole models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft_models import to_4bit, to_kind, unpacked
from reft_models import (
    MODELS,
    by_hand,
    columns_of,
    gradients,
    ragged,
    reft_llama,
    same,
    tiny_llama,
    train_tensors,
)
from tolerances import assert_as_exact
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_fast import LoReFTConfig, LoReFTLinear, UnsupportedLayer, accelerate, get_reft_model, quantize
from peft_fast.formats import from_linear
from peft_fast.reft import linear as reft_linear

K, N, R = 64, 48, 4
VARIANTS = ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")
pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind: str, bias: bool = True, strategy: str = "auto", N: int = N, **options) -> LoReFTLinear:
    torch.manual_seed(0)
    base = nn.Linear(K, N, bias=bias)
    base = to_4bit(base) if kind == "nf4" else base
    layer = LoReFTLinear.from_linear(base, LoReFTConfig(r=R, **options), strategy=strategy)
    if layer.edit.source is not None:
        nn.init.normal_(layer.edit.source, std=0.3)
    nn.init.normal_(layer.edit.bias)
    return layer


def by_formula(layer: LoReFTLinear, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The paper's equation on the decoded weight, in one dtype."""
    edit, kind = layer.edit, reft_linear.VARIANTS[layer.edit.variant]
    h = x.to(dtype) @ from_linear(layer.base_layer).decode(dtype).T
    if layer.base_layer.bias is not None:
        h = h + layer.base_layer.bias.to(dtype)
    basis = edit.rows().to(dtype)
    u = edit.bias.to(dtype) + (h @ edit.source.to(dtype).T if kind.source else 0.0)
    u = u - h @ basis.T if kind.subtract else u.expand(*h.shape[:-1], R)
    return h + u @ basis


def results(layer: LoReFTLinear, x: torch.Tensor, grad: torch.Tensor, compute) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = compute(x)
    tensors = train_tensors(layer)
    grads = torch.autograd.grad(y, [x, *tensors.values()], grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["x", *tensors], grads, strict=True))}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("strategy", ["fold", "project"])
def test_both_ways_are_the_formula(strategy, kind, variant, bias):
    layer = make(kind, bias, strategy, variant=variant)
    x, grad = torch.randn(2, 5, K), torch.randn(2, 5, N)
    ours = results(layer, x, grad, layer)
    exact = results(layer, x, grad, lambda x: by_formula(layer, x, torch.float64))
    plain = results(layer, x, grad, lambda x: by_formula(layer, x, torch.float32))
    for name, truth in exact.items():
        assert_as_exact(name, ours[name], plain[name], truth)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folds_with_one_rounding(kind, dtype):
    torch.manual_seed(0)
    base = nn.Linear(K, N).to(dtype)
    layer = LoReFTLinear.from_linear(
        to_4bit(base) if kind == "nf4" else base, LoReFTConfig(r=R), strategy="fold"
    )
    x = torch.randn(7, K, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    truth = by_formula(layer, x, torch.float64)
    assert (y.double() - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()


def test_the_strategy_follows_the_shape(monkeypatch):
    monkeypatch.setattr(reft_linear, "FOLD_FROM", 6)
    folds = []
    fold_edit = reft_linear.fold_edit
    monkeypatch.setattr(reft_linear, "fold_edit", lambda *a, **k: (folds.append(1), fold_edit(*a, **k))[1])
    narrow, wide, rows = make("nf4"), make("nf4", N=2 * K), torch.tensor([0, 3])
    for layer, x, given, folded in (
        (wide, torch.randn(5, K), None, False),
        (wide, torch.randn(2, 3, K), None, True),
        (wide, torch.randn(8, K), rows, False),
        (narrow, torch.randn(8, K), None, False),
    ):
        folds.clear()
        layer(x, given)
        assert bool(folds) is folded
    for options in ({"act_fn": "relu"}, {"dropout": 0.5}):
        folds.clear()
        make("nf4", N=2 * K, **options)(torch.randn(8, K))
        assert not folds


def test_rows_that_are_not_given_are_the_base():
    layer = make("nf4")
    x, rows = torch.randn(2, 4, K), torch.tensor([1, -1, 6])
    y, h = layer(x, rows).reshape(-1, N), layer.base_layer(x).reshape(-1, N)
    others = [i for i in range(8) if i not in (1, 6)]
    torch.testing.assert_close(y[others], h[others], rtol=1e-5, atol=1e-5)
    expected = by_formula(layer, x, torch.float32).reshape(-1, N)
    torch.testing.assert_close(y[[1, 6]], expected[[1, 6]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_merged_layers_compute_the_edited_output(kind, variant, bias):
    layer = make(kind, bias, variant=variant)
    merged = layer.merged()
    x = torch.randn(5, K)
    assert type(merged) is nn.Linear
    assert not any(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-4, atol=1e-5)
    assert merged.weight.data_ptr() != layer.base_layer.weight.data_ptr()
    assert layer.merged(torch.bfloat16).weight.dtype == torch.bfloat16


def test_folding_saves_no_activation_beside_x():
    layer, x = make("nf4", strategy="fold"), torch.randn(512, K, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(x)
    assert not any(t.numel() >= 512 * min(K, N) and t.data_ptr() != x.data_ptr() for t in saved)


def test_bad_arguments_are_named_and_the_base_is_left_as_it_was():
    base = nn.Linear(K, N)
    for message, arguments in (
        ("strategy: expected one of", {"strategy": "merge"}),
        ("strategy: expected 'project'", {"config": LoReFTConfig(act_fn="relu"), "strategy": "fold"}),
        ("r: expected at most", {"config": LoReFTConfig(r=N + 1)}),
    ):
        with pytest.raises(ValueError, match=message):
            LoReFTLinear.from_linear(base, **arguments)
    with pytest.raises(UnsupportedLayer, match="base: expected"):
        LoReFTLinear.from_linear(nn.Conv1d(4, 4, 1))
    assert base.weight.requires_grad
    with pytest.raises(ValueError, match="rows: expected None"):
        make("dense", strategy="fold")(torch.randn(3, K), torch.tensor([0]))
    with pytest.raises(ValueError, match="merged: expected an edit without act_fn"):
        make("dense", act_fn="tanh").merged()


# ------------------------------------------------------------------------------------------- in whole models


COMPONENTS = {"llama": ("down_proj", "q_proj"), "bert": ("attention.output.dense", "intermediate.dense")}
CASES = [(name, component) for name, components in COMPONENTS.items() for component in components]


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("name", "component"), CASES)
def test_a_model_equals_the_edits_by_hand(name, component, share, positions):
    base = MODELS[name]()
    config = LoReFTConfig(r=4, positions=positions, component=component, share_weights=share)
    model = get_reft_model(copy.deepcopy(base), config)
    inputs = ragged()
    plain = base(**inputs).logits
    with by_hand(base, model, columns_of(inputs["attention_mask"])):
        expected = base(**inputs).logits
    assert not torch.allclose(plain, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert type(model.unload()) is type(base)
    assert torch.equal(model(**inputs).logits, plain)
    assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    model, inputs = reft_llama(component="down_proj").train(), ragged()
    expected = gradients(model, model(**inputs, labels=inputs["input_ids"]).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_input_embeddings().weight.requires_grad_(reentrant)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    got = {name: p.grad for name, p in train_tensors(model).items() if name in expected}
    assert same(got, expected)


def test_compiles_generates_copies_and_saves(tmp_path):
    model, inputs = reft_llama(component="o_proj"), ragged()
    expected = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, expected)
    with_cache, without = (model.generate(**inputs, max_new_tokens=4, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    fresh = tiny_llama()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".reft." not in k})
    again = type(model).from_pretrained(fresh, tmp_path)
    assert torch.equal(again(**inputs).logits, expected)


def test_a_quantized_model_trains():
    torch.manual_seed(0)
    base = unpacked(to_kind(tiny_llama(), "nf4"))
    inputs = ragged()
    accelerate(base)
    model = get_reft_model(base, LoReFTConfig(r=4, component="down_proj", positions="all"))
    optimizer = torch.optim.AdamW(train_tensors(model).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("component", ["proj", "nothing", "mlp"])
def test_a_component_that_is_not_one_layer_is_refused(component):
    model = tiny_llama()
    with pytest.raises(UnsupportedLayer, match="component: expected the end of one path"):
        get_reft_model(model, LoReFTConfig(component=component))
    assert all(p.requires_grad for p in model.parameters())


def test_a_conv1d_is_refused_by_name_until_it_is_quantized():
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    model, config = GPT2LMHeadModel(GPT2Config(**sizes)), LoReFTConfig(r=2, component="mlp.c_proj")
    with pytest.raises(UnsupportedLayer, match=r"LoReFT expects .* got Conv1D"):
        LoReFTLinear.from_linear(model.transformer.h[0].mlp.c_proj, LoReFTConfig(r=2))
    with pytest.raises(UnsupportedLayer, match=r"LoReFT expects .* got Conv1D"):
        get_reft_model(model, config)
    assert all(p.requires_grad for p in model.parameters())
    quantize(model)
    assert get_reft_model(model, config)(input_ids=torch.arange(8)[None]).logits.isfinite().all()
