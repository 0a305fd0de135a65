"""A fused layer does what PEFT's does at that moment, for dense and NF4 bases alike."""

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import (
    accelerated,
    assert_same_model,
    fused_calls,
    inputs,
    lora_config,
    lora_layers,
    run,
    stock_net,
)
from torch import nn

from peft_fast import explain

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ the forward


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_peft_in_every_dtype(kind, dtype, adapter_dtype):
    stock = stock_net(kind, dtype, adapter_dtype=adapter_dtype, lora_dropout=0.3)
    assert_same_model(stock, accelerated(stock), inputs(dtype=dtype), calls=2)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.5},
        {"use_rslora": True},
        {"lora_bias": True, "lora_dropout": 0.1},
        {"bias": "all"},
        {"bias": "lora_only", "lora_bias": True},
        {"r": 7, "lora_alpha": 3},
        {"init_lora_weights": True},
        {"rank_pattern": {"up": 9}, "alpha_pattern": {"down": 1}},
    ],
    ids=str,
)
def test_equals_peft_with_every_option(kind, options):
    stock = stock_net(kind, **options)
    fast = accelerated(stock)
    assert_same_model(stock, fast, inputs(), calls=2)
    assert_same_model(stock.eval(), fast.eval(), inputs(), calls=2)


@pytest.mark.parametrize("shape", [(7,), (1, 1), (0,), (2, 3, 4)])
def test_equals_peft_for_every_batch_shape(kind, shape):
    stock = stock_net(kind)
    assert_same_model(stock, accelerated(stock), inputs(*shape), calls=2)


def test_equals_peft_under_no_grad(kind):
    stock = stock_net(kind).eval()
    fast, x = accelerated(stock), inputs()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_peft_under_autocast(kind, dtype):
    stock = stock_net(kind, dtype, lora_dropout=0.2)
    assert_same_model(stock, accelerated(stock), inputs(dtype=dtype), calls=2, autocast=True)


def test_dropout_follows_its_own_training_flag(kind):
    stock = stock_net(kind, lora_dropout=0.5)
    for layer in lora_layers(stock):
        layer.lora_dropout["default"].eval()
    fast = accelerated(stock)
    assert_same_model(stock, fast, inputs(), calls=2)
    x = inputs()
    assert torch.equal(run(fast, x, seed=1)["y"], run(fast, x, seed=2)["y"])


def test_frozen_input(kind):
    stock = stock_net(kind, lora_dropout=0.1)
    assert_same_model(stock, accelerated(stock), inputs(), calls=2, frozen_input=True)


# ------------------------------------------------------------------------------------------ states of a layer


def two_adapters(kind, **second):
    stock = stock_net(kind, lora_dropout=0.1)
    stock.add_adapter("other", lora_config(**{"r": 3, "lora_alpha": 5, **second}))
    return stock


def base_calls(kind):
    """How often the fused op runs where both layers are their base alone: PEFT calls a dense base itself."""
    return {"dense": 0, "nf4": 2}[kind]


def test_disable_adapter(kind):
    stock = stock_net(kind)
    fast = accelerated(stock)
    with stock.disable_adapter(), fast.disable_adapter():
        assert_same_model(stock, fast, inputs(), calls=base_calls(kind))
    assert_same_model(stock, fast, inputs(), calls=2)


def test_switching_adapters(kind):
    stock = two_adapters(kind)
    fast = accelerated(stock)
    for name in ("other", "default"):
        stock.set_adapter(name)
        fast.set_adapter(name)
        assert f"adapter {name!r}" in explain(lora_layers(fast)[0])
        assert_same_model(stock, fast, inputs(), calls=2)


def test_several_active_adapters(kind):
    stock = two_adapters(kind)
    fast = accelerated(stock)
    for model in (stock, fast):
        model.base_model.set_adapter(["default", "other"])
    assert_same_model(stock, fast, inputs(), calls=0)
    assert "several active adapters: ['default', 'other']" in explain(lora_layers(fast)[0])


def test_active_adapter_that_a_layer_lacks(kind):
    stock = stock_net(kind)
    stock.add_adapter("other", lora_config(targets=["up"]))
    stock.set_adapter("other")
    fast = accelerated(stock)
    assert_same_model(stock, fast, inputs(), calls=1 + base_calls(kind) // 2)


def test_merged_and_unmerged(kind):
    stock = stock_net(kind, lora_bias=kind == "dense")
    fast = accelerated(stock)
    for model in (stock, fast):
        model.merge_adapter()
    assert_same_model(stock, fast, inputs(), calls=base_calls(kind))
    for model in (stock, fast):
        model.unmerge_adapter()
    assert_same_model(stock, fast, inputs(), calls=2)


def test_disabling_a_merged_adapter_unmerges_it(kind):
    stock = stock_net(kind)
    fast = accelerated(stock)
    for model in (stock, fast):
        model.merge_adapter()
    with stock.disable_adapter(), fast.disable_adapter():
        x = inputs()
        torch.testing.assert_close(fast(x), stock(x))
    assert not any(layer.merged for layer in lora_layers(fast))
    assert_same_model(stock, fast, inputs(), calls=2)


def test_mixed_batch(kind):
    stock = two_adapters(kind).eval()
    fast = accelerated(stock)
    names, x, before = ["default", "__base__", "other"], inputs(3, 5), fused_calls()
    with torch.no_grad():
        assert torch.equal(fast(x, adapter_names=names), stock(x, adapter_names=names))
    assert fused_calls() == before
    with pytest.raises(ValueError, match="same as the number of inputs"):
        lora_layers(fast)[0](inputs(2), adapter_names=names)


def test_adapter_added_after_the_swap(kind):
    stock = stock_net(kind)
    fast = accelerated(stock)
    torch.manual_seed(5)
    stock.add_adapter("later", lora_config(r=5, lora_dropout=0.2))
    torch.manual_seed(5)
    fast.add_adapter("later", lora_config(r=5, lora_dropout=0.2))
    stock.set_adapter("later")
    fast.set_adapter("later")
    assert_same_model(stock, fast, inputs(), calls=2)


def test_deleting_the_active_adapter(kind):
    stock = two_adapters(kind)
    fast = accelerated(stock)
    for model in (stock, fast):
        model.delete_adapter("default")
        model.set_adapter("other")
    assert_same_model(stock, fast, inputs(), calls=2)


def test_no_active_adapter(kind):
    stock = stock_net(kind)
    fast = accelerated(stock)
    for model in (stock, fast):
        model.base_model.set_adapter([])
    assert_same_model(stock, fast, inputs(), calls=base_calls(kind))


def test_changed_scaling(kind):
    stock = stock_net(kind)
    fast = accelerated(stock)
    for model in (stock, fast):
        for layer in lora_layers(model):
            layer.scale_layer(0.25)
    assert_same_model(stock, fast, inputs(), calls=2)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_hotswap_with_a_tensor_scaling(kind, lora_bias, tmp_path):
    new = stock_net(kind, r=2, lora_alpha=9, lora_bias=lora_bias)
    new.save_pretrained(tmp_path)
    stock = stock_net(kind, lora_bias=lora_bias)
    fast = accelerated(stock)
    for model in (stock, fast):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.is_tensor(lora_layers(fast)[0].scaling["default"])
    assert_same_model(stock, fast, inputs(), calls=2)
    assert "scaling=4.5" in explain(lora_layers(fast)[0])


def test_casting_of_the_input_can_be_disabled(kind):
    stock = stock_net(kind)
    for layer in lora_layers(stock):
        layer.cast_input_dtype_enabled = False
    assert_same_model(stock, accelerated(stock), inputs(), calls=2)


def test_other_variants_run_in_pefts_forward(kind):
    stock = stock_net(kind)
    stock.add_adapter("other", lora_config(alora_invocation_tokens=[1]))
    fast = accelerated(stock)
    for model in (stock, fast):
        model.set_adapter("other")
    assert "adapter 'other' is a LoRA variant, ALoraLinearVariant" in explain(fast)
    before, x = fused_calls(), inputs()
    torch.testing.assert_close(fast(x), stock(x))
    assert fused_calls() == before


# ------------------------------------------------------------- what is attached to the call of a submodule


def submodule(layer, name):
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]


@pytest.mark.parametrize("name", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_on_submodules_are_called(kind, name, register):
    stock = stock_net(kind, lora_dropout=0.1)
    fast, seen = accelerated(stock), []
    layer = lora_layers(fast)[0]
    handle = getattr(submodule(layer, name), register)(lambda *_: seen.append(1))
    assert f"{name} has hooks" in explain(layer)
    assert_same_model(stock, fast, inputs(), calls=1)
    assert seen
    handle.remove()
    assert_same_model(stock, fast, inputs(), calls=2)


def test_global_hooks_are_called(kind):
    fast, seen = accelerated(stock_net(kind)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        fast(inputs())
    finally:
        handle.remove()
    assert set(seen) >= {
        submodule(layer, part) for layer in lora_layers(fast) for part in ("base_layer", "lora_A")
    }


def test_hooks_on_the_layer_stay(kind):
    fast = accelerated(stock_net(kind))
    layer, seen = lora_layers(fast)[0], []
    layer.register_forward_hook(lambda *_: seen.append(1))
    before = fused_calls()
    fast(inputs())
    assert seen == [1]
    assert fused_calls() == before + 2


def test_a_forward_set_on_a_submodule_is_called(kind):
    fast = accelerated(stock_net(kind))
    layer, seen = lora_layers(fast)[0], []
    base = layer.base_layer
    call = base.forward
    base.forward = lambda x: seen.append(1) or call(x)
    assert "base_layer has a forward of its own" in explain(layer)
    fast(inputs())
    assert seen == [1]


def test_parametrized_adapter(kind):
    stock = stock_net(kind)
    fast = accelerated(stock)
    for model in (stock, fast):
        for layer in lora_layers(model):
            nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", nn.Tanh())
    assert "ParametrizedLinear" in explain(lora_layers(fast)[0])
    x = inputs()
    torch.testing.assert_close(fast(x), stock(x))


def test_replaced_dropout(kind):
    stock = stock_net(kind)
    fast = accelerated(stock)
    for model in (stock, fast):
        for layer in lora_layers(model):
            layer.lora_dropout["default"] = nn.Tanh()
    assert_same_model(stock, fast, inputs(), calls=0)


def test_a_base_weight_unfrozen_later_is_trained():
    stock = stock_net("dense")
    fast = accelerated(stock)
    for model in (stock, fast):
        model.base_model.model.up.base_layer.weight.requires_grad_()
    assert "the weight of base_layer is trained" in explain(lora_layers(fast)[0])
    x = inputs()
    got, expected = run(fast, x), run(stock, x)
    name = "base_model.model.up.base_layer.weight"
    torch.testing.assert_close(got[name], expected[name])
