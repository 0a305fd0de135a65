"""PEFT's layers on bitsandbytes' `Linear8bitLt`, fused, against float64 over the weight CB·SCB/127.

In eval mode, and on a GPU always, bitsandbytes rounds the activations to int8 too; the fused op does not, so
the bound is what plain PyTorch reaches over the decoded weight.
"""

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft_models import (
    HIDDEN,
    WIDTH,
    Net,
    accelerated,
    adapted_layers,
    assert_same_model,
    decoded,
    dora_net,
    fused_calls,
    inputs,
    lora_layers,
    run,
    stock_net,
    to_8bit,
    to_kind,
    truth_of,
    vector_net,
)
from tolerances import relative_error
from torch import nn

from peft_fast import UnsupportedLayer, accelerate, explain, restore
from peft_fast.base_layers import FusedBase8bit
from peft_fast.formats import from_linear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*lora module to 8-bit linear may get different"),
]

NETS = {
    "lora": stock_net,
    "dora": dora_net,
    "vera": lambda *args, **options: vector_net(args[0], "vera", *args[1:], **options),
    "ia3": lambda *args, **options: vector_net(args[0], "ia3", *args[1:], **options),
}


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    got = model.state_dict()
    return got.keys() == expected.keys() and all(torch.equal(got[name], t) for name, t in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", NETS)
def test_every_gradient_is_that_of_the_decoded_weight(method, training, dtype):
    stock = NETS[method]("int8", dtype, lora_dropout=0.3).train(training)
    fast, state = accelerated(stock), saved(stock)
    x = inputs(dtype=dtype)
    # DoRA adds two norms, and with dropout a call a layer.
    calls = 2 if method != "dora" else 6 if training else 4
    assert_same_model(stock, fast, x, calls=calls, peer=decoded(stock, dtype))
    assert same_state(fast, state)
    assert f"int8 [{HIDDEN}, {WIDTH}]" in explain(adapted_layers(fast)[0])
    assert restore(fast) == 2
    assert [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]
    assert same_state(fast, state)


def test_the_weight_is_what_bitsandbytes_defines():
    base = lora_layers(stock_net("int8"))[0].base_layer
    defined = base.weight.data.double() * base.weight.SCB.double()[:, None] / 127
    torch.testing.assert_close(from_linear(base).decode(torch.float64), defined, rtol=3e-7, atol=0)


def test_the_fused_output_is_nearer_to_float64_than_bitsandbytes_own():
    stock = stock_net("int8").eval()
    x = inputs()
    truth = run(truth_of(stock), x.double())["y"]
    ours = relative_error(run(accelerated(stock), x)["y"], truth)
    theirs = relative_error(run(stock, x)["y"], truth)
    assert ours < theirs / 100


def test_before_and_after_the_first_forward_of_bitsandbytes():
    """Which moves the scales from the weight to the state of the layer."""
    stock, x = stock_net("int8"), inputs()
    expected = run(accelerated(stock), x)
    stock(x)
    assert lora_layers(stock)[0].base_layer.weight.SCB is None
    for name, value in run(accelerated(stock), x).items():
        assert torch.equal(value, expected[name]), name


def test_merged_and_disabled_adapters_leave_the_base_fused():
    fast, x = accelerated(stock_net("int8")), inputs()
    before = fused_calls()
    with fast.disable_adapter(), torch.no_grad():
        base_alone = fast(x)
    fast.merge_adapter()
    with torch.no_grad():
        merged = fast(x)
    assert fused_calls() == before + 4
    exact = to_8bit_truth(fast)
    assert relative_error(merged, exact(x.double())) < 1e-5
    fast.unmerge_adapter()
    with torch.no_grad():
        adapted = fast(x)
    assert relative_error(adapted, merged.double()) < 0.05  # two roundings to int8
    assert relative_error(base_alone, merged.double()) > 0.05


def to_8bit_truth(model: nn.Module) -> nn.Module:
    """`Net` in fp64 over the base weights as they are now."""
    net = Net().double()
    for name in ("up", "down"):
        base = getattr(model.base_model.model, name).base_layer
        getattr(net, name).weight.data = from_linear(base).decode(torch.float64)
        getattr(net, name).bias.data = base.bias.data.double()
    return net


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_an_adapter(bias, dtype):
    stock = to_8bit(nn.Linear(WIDTH, HIDDEN, bias=bias).to(dtype)).requires_grad_(False)
    weight = from_linear(stock)
    exact, plain = nn.Linear(WIDTH, HIDDEN, bias=bias).double(), nn.Linear(WIDTH, HIDDEN, bias=bias).to(dtype)
    for dense in (exact, plain):
        dense.weight.data = weight.decode(dense.weight.dtype)
        if bias:
            dense.bias.data = stock.bias.data.to(dense.weight.dtype)
        dense.requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(stock))
    assert [row.method for row in accelerate(model, strict=True)] == ["base"]
    assert type(model[0]) is FusedBase8bit
    x, state = inputs(dtype=dtype), saved(model)
    truth, theirs, ours = run(exact, x.double()), run(plain, x), run(model, x)
    for name, value in truth.items():
        assert relative_error(ours[name], value) <= 2 * relative_error(theirs[name], value) + 1e-7, name
    assert same_state(model, state)
    restore(model)
    assert type(model[0]) is bnb.nn.Linear8bitLt
    assert "backend" not in vars(model[0])


def test_a_layer_that_trains_its_weight_is_left():
    model = nn.Sequential(bnb.nn.Linear8bitLt(WIDTH, HIDDEN), *to_kind(Net(), "int8").children())
    report = accelerate(model)
    assert [row.name for row in report.left] == ["0"]
    assert "not in int8" in report.left[0].reason
    with pytest.raises(UnsupportedLayer, match="not in int8"):
        accelerate(model, strict=True)
