"""Defects that others had in adapter semantics, one test each."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import (
    WIDTH,
    Net,
    accelerated,
    assert_same_model,
    fused_calls,
    inputs,
    lora_config,
    lora_layers,
    one_layer,
    run,
    stock_net,
    tiny_bert,
    to_kind,
    truth_of,
    unpacked,
)
from tolerances import FACTOR, assert_as_exact, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import WavLMConfig, WavLMModel

from peft_fast import UnsupportedLayer, accelerate
from peft_fast.formats import from_linear

pytestmark = pytest.mark.usefixtures("one_thread")


def test_dx_includes_the_dropout_mask(kind):
    """fms-acceleration #97: the low-rank part of dX has to pass through the mask of the forward."""
    layer, x = one_layer(kind, lora_dropout=0.5), inputs().requires_grad_()
    A, B = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.5).double()
    grad = torch.randn_like(y)
    y.backward(grad)
    W = from_linear(layer.base_layer).decode(torch.float64)
    exact = grad.double() @ W + 3.0 * (grad.double() @ B @ A) * mask
    assert relative_error(x.grad, exact) < 1e-6


def test_dx_is_the_base_alone_when_everything_is_dropped(kind):
    """fms-acceleration #97, in the limit: p = 1 leaves nothing of the low-rank branch."""
    layer, x = one_layer(kind, lora_dropout=1.0), inputs().requires_grad_()
    y = layer(x)
    y.sum().backward()
    W = from_linear(layer.base_layer).decode(torch.float64)
    assert relative_error(y, x.double() @ W.t() + layer.base_layer.bias.double()) < 1e-6
    assert relative_error(x.grad, W.sum(0).expand_as(x)) < 1e-6


def test_dropout_does_not_skip_the_fused_op(kind):
    """axolotl #3806, unsloth #2319: with dropout > 0 their kernel is silently not used."""
    model, before = accelerated(stock_net(kind, lora_dropout=0.1)), fused_calls()
    model(inputs())
    assert fused_calls() == before + 2


def test_strict_raises_when_nothing_was_swapped():
    """unsloth #5865, #803: "0 layers patched" and training goes on unaccelerated."""
    with pytest.raises(UnsupportedLayer, match="0 layers fused"):
        accelerate(Net(), strict=True)
    with pytest.warns(UserWarning, match="0 layers fused"):
        accelerate(Net())


def test_two_active_adapters_add_up():
    """peft #2122: the second of two active adapters replaced the first."""
    stock = stock_net("dense")
    stock.add_adapter("other", lora_config(r=3))
    model, x = accelerated(stock), inputs()
    model.base_model.set_adapter(["default", "other"])
    active = model(x)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(model(x), active, rtol=1e-4, atol=1e-4)


def test_merged_lora_bias_is_scaled():
    """peft #2489: the bias of lora_B was merged without the scaling."""
    model, x = accelerated(stock_net("dense", lora_bias=True, r=4, lora_alpha=12)), inputs()
    unmerged = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-4)


def test_rounding_does_not_build_up_over_layers(kind):
    """peft #2238: a cast before instead of after the add accumulates over a deep bfloat16 model."""
    names = [str(i) for i in range(32)]
    stack = to_kind(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in names)), kind, torch.bfloat16)
    stock = unpacked(get_peft_model(stack, LoraConfig(r=4, lora_alpha=4, target_modules=names)))
    for layer in lora_layers(stock):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x = inputs(dtype=torch.bfloat16)
    truth, plain, got = run(truth_of(stock), x.double()), run(stock, x), run(accelerated(stock), x)
    assert_as_exact("y", got["y"], plain["y"], truth["y"])
    # The error of one small gradient deep in the stack is a random walk: compare their mean.
    errors = [
        [relative_error(result[name], value) for name, value in truth.items()] for result in (got, plain)
    ]
    assert sum(errors[0]) <= FACTOR * sum(errors[1])


def test_another_alpha_needs_no_new_graph_each_time():
    """peft #2416: compiled code was traced again for every value of the scaling."""
    torch._dynamo.reset()
    graphs = []
    model, x = accelerated(stock_net("dense")), inputs()
    compiled = torch.compile(
        model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True
    )
    outputs = []
    for alpha in (12, 4, 2, 1, 8, 3):
        for layer in lora_layers(model):
            layer.scaling["default"] = alpha / 4
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], model(x))
    torch._dynamo.reset()
    assert len(graphs) == 2  # the first value is compiled in, the second makes it an input


def test_set_scale_keeps_rslora(kind):
    """peft #2775: set_scale forgot that an adapter is rank-stabilised."""
    stock = stock_net(kind, use_rslora=True, r=4, lora_alpha=12)
    model = accelerated(stock)
    for layer in (*lora_layers(stock), *lora_layers(model)):
        layer.set_scale("default", 0.5)
        assert layer.scaling["default"] == 0.5 * 12 / 4**0.5
    assert_same_model(stock, model, inputs(), calls=2)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapter_dtype_on_a_half_base(kind, autocast_adapter_dtype):
    """peft #2893: autocast_adapter_dtype was ignored on a quantized base."""
    model = get_peft_model(
        to_kind(Net(), kind, torch.bfloat16), lora_config(), autocast_adapter_dtype=autocast_adapter_dtype
    )
    accelerate(model, strict=True)
    expected = model.base_model.model.up.lora_A["default"].weight.dtype
    got = run(model, inputs(dtype=torch.bfloat16))
    assert {value.dtype for name, value in got.items() if "lora_" in name} == {expected}
    assert got["y"].dtype == got["dx"].dtype == torch.bfloat16
    assert autocast_adapter_dtype is False or kind == "nf4" or expected == torch.float32


def test_disable_adapter_ends_with_its_block(kind):
    """peft #367, #3507, #3555: after an exception, or nested, adapters stayed disabled."""
    model, x = accelerated(stock_net(kind)), inputs()
    expected = model(x)

    def fails():
        with model.disable_adapter(), model.disable_adapter():
            model(inputs(7)[..., :3])

    with pytest.raises((ValueError, RuntimeError)):
        fails()
    assert torch.equal(model(x), expected)


def test_deleting_a_merged_adapter(kind):
    """peft #3504: it stayed active. PEFT refuses now; after unmerging, the other adapter is applied alone."""
    stock = stock_net(kind)
    stock.add_adapter("other", lora_config(r=3))
    fast, never_merged = accelerated(stock), copy.deepcopy(stock)
    for model in (stock, fast):
        model.merge_adapter(["default"])
        with pytest.raises(ValueError, match="while they are merged"):
            model.delete_adapter("default")
        model.unmerge_adapter()
    for model in (stock, fast, never_merged):
        model.delete_adapter("default")
        model.set_adapter("other")
    # PEFT's own unmerging leaves other packed weights behind.
    assert_same_model(stock if kind == "dense" else never_merged, fast, inputs(), calls=2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_sees_the_adapter_of_the_forward(kind, reentrant):
    """peft #2826, #2832: hooks under checkpointing gave zero gradients, for the wrong adapter."""
    stock = stock_net(kind, lora_dropout=0.2)
    stock.add_adapter("other", lora_config(r=3))
    model = accelerated(stock)
    for name in ("default", "other"):
        model.set_adapter(name)
        grads = []
        for forward in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
            model.zero_grad()
            torch.manual_seed(1)
            x = inputs().requires_grad_()
            forward(x).square().sum().backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert {n.split(".")[-2] for n in grads[0]} == {name}
        assert grads[0].keys() == grads[1].keys()
        assert all(torch.equal(grads[1][n], g) for n, g in grads[0].items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_frozen_inputs_trains_every_adapter(kind, reentrant):
    """transformers #26221: a reentrant checkpoint whose inputs are frozen left LoRA untrained."""
    bert = to_kind(tiny_bert(), kind)
    model = get_peft_model(bert, LoraConfig(target_modules=["query", "value"], init_lora_weights=True))
    accelerate(model, strict=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(torch.arange(12).view(2, 6)).last_hidden_state.square().sum().backward()
    optimizer.step()
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in lora_layers(model))


def test_a_tied_weight_stays_tied_and_untouched():
    """peft #2018, #2777, transformers #45127: an adapter corrupted the embedding tied to its base."""
    model = nn.ModuleDict({"embed": nn.Embedding(20, WIDTH), "head": nn.Linear(WIDTH, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    model.config = {"model_type": "custom"}
    peft_model = get_peft_model(model, LoraConfig(target_modules=["head"], init_lora_weights=False))
    accelerate(peft_model, strict=True)
    before = model["embed"].weight.clone()
    layer = lora_layers(peft_model)[0]
    layer(inputs()).sum().backward()
    assert layer.base_layer.weight is model["embed"].weight
    assert torch.equal(model["embed"].weight, before)


def test_accumulated_gradients_equal_those_of_the_batch(kind):
    """unsloth #1146, axolotl #2262: eight batches of one did not add up to one batch of eight."""
    model, x = accelerated(stock_net(kind)), inputs(8, 5)
    whole = torch.autograd.grad(model(x).square().mean(), [p for p in model.parameters() if p.requires_grad])
    for row in x:
        (model(row).square().mean() / 8).backward()
    parts = [p.grad for p in model.parameters() if p.requires_grad]
    for part, grad in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, grad, rtol=1e-4, atol=1e-5)


def test_wavlm_attention_is_refused():
    """WavLM hands `.weight` of its projections to F.multi_head_attention_forward: LoRA there does nothing."""
    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(8,),
        conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense"]
    model = get_peft_model(WavLMModel(config), LoraConfig(target_modules=targets))
    report = accelerate(model)
    assert {row.name.split(".")[-1] for row in report.left} == set(targets[:4])
    assert {row.name.split(".")[-1] for row in report.fused} == {"intermediate_dense"}
    assert all("WavLMAttention uses its .weight without calling it" in row.reason for row in report.left)
