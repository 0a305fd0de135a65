"""A fused LoRA layer against float64, for each option, dtype and shape; see test_behaviours for all else."""

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import (
    accelerated,
    assert_same_model,
    inputs,
    lora_layers,
    stock_net,
)

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


def test_frozen_input(kind):
    stock = stock_net(kind, lora_dropout=0.1)
    assert_same_model(stock, accelerated(stock), inputs(), calls=2, frozen_input=True)


# ------------------------------------------------------------------------------------------ states of a layer


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
