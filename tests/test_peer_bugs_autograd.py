"""Defects that others had in autograd, compilation and concurrency, one test each."""

import copy
import gc
import itertools
import threading

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from peft_models import (
    HIDDEN,
    accelerated,
    assert_same_model,
    inputs,
    lora_layers,
    one_layer,
    stock_net,
)
from tolerances import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_fast.formats import from_linear

pytestmark = pytest.mark.usefixtures("one_thread")


def test_backward_twice_and_x_unchanged(kind):
    """axolotl #3800: dX was written into the saved X."""
    model, x = accelerated(stock_net(kind, lora_dropout=0.1)), inputs().requires_grad_()
    before, version = x.detach().clone(), x._version
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = model(x)
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(x, before)
    assert x._version == version


def test_upstream_and_downstream_tensors_are_not_written(kind):
    """Liger #272, #1251, #1305: a write past the version counter, into a saved output or grad_output."""
    layer, h = one_layer(kind), inputs().requires_grad_()
    p = h.softmax(-1)
    y = layer(p)
    grad = torch.randn_like(y)
    saved, grad_before = p.detach().clone(), grad.clone()
    y.backward(grad)
    assert torch.equal(p, saved)
    assert torch.equal(grad, grad_before)
    A, B = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    W = from_linear(layer.base_layer).decode(torch.float64) + 3.0 * B @ A
    exact = h.detach().double().requires_grad_()
    (exact.softmax(-1) @ W.t()).backward(grad.double())
    assert relative_error(h.grad, exact.grad) < 1e-5


def test_each_row_has_its_own_gradient(kind):
    """Liger #1298: grad_output was taken for a scalar."""
    layer, x = one_layer(kind), inputs(4).requires_grad_()
    grad = torch.zeros(4, HIDDEN)
    grad[2, 5] = 3.0
    layer(x).backward(grad)
    A, B = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    W = from_linear(layer.base_layer).decode(torch.float64) + 3.0 * B @ A
    assert relative_error(x.grad[2], 3.0 * W[5]) < 1e-6
    assert x.grad[[0, 1, 3]].abs().max() == 0


def test_weight_gradients_accumulate_in_fp32(kind):
    """Liger #950: dW was reduced in bfloat16 over many rows."""
    stock = stock_net(kind, torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert_same_model(stock, accelerated(stock), inputs(8192, dtype=torch.bfloat16), calls=2)


def test_autocast_decides_the_output_dtype():
    """Liger #1283: the output's dtype ignored autocast."""
    layer = one_layer("dense")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs()).dtype == torch.bfloat16
    assert layer(inputs()).dtype == torch.float32


def test_every_subset_of_gradients(kind):
    """Liger #1157: what was saved, and whether, depended on the wrong tensor's requires_grad."""
    stock = lora_layers(stock_net(kind))[0]
    fast = lora_layers(accelerated(nn.ModuleList([stock])))[0]
    x = inputs()
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        results = []
        for layer in (stock, fast):
            leaf = x.clone()
            operands = (
                leaf,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.base_layer.bias,
            )
            for operand, needed in zip(operands, wanted, strict=True):
                operand.requires_grad_(needed)
            leaves = [operand for operand, needed in zip(operands, wanted, strict=True) if needed]
            results.append(torch.autograd.grad(layer(leaf).square().sum(), leaves))
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_no_graph_break(kind):
    """bitsandbytes #1904: `__getattr__` on the module broke the graph."""
    torch._dynamo.reset()
    model, x = accelerated(stock_net(kind, lora_dropout=0.1)), inputs()
    found = torch._dynamo.explain(model)(x)
    torch._dynamo.reset()
    assert found.graph_break_count == 0
    assert found.graph_count == 1
    assert sum("lora_linear" in str(node.target) for node in found.graphs[0].graph.nodes) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_steps_keep_nothing(kind, reentrant):
    """bitsandbytes #1999: a cache grew with each checkpointed step."""
    model = accelerated(stock_net(kind, lora_dropout=0.1))

    def live_tensors_after(steps):
        for _ in range(steps):
            model.zero_grad()
            checkpoint(model, inputs().requires_grad_(), use_reentrant=reentrant).sum().backward()
        gc.collect()
        return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())

    for _ in range(3):
        live_tensors_after(1)  # lazily made state, and what earlier tests left to collect, in several rounds
    before = live_tensors_after(1)
    assert live_tensors_after(8) <= before


def test_copying_changes_nothing_and_loses_nothing(kind):
    """bitsandbytes #1230, #1231: `__getstate__` mutated the original, deepcopy lost attributes."""
    layer = one_layer(kind)
    before = {name: dict(module.__dict__) for name, module in layer.named_modules()}
    twin = copy.deepcopy(layer)
    assert {name: module.__dict__ for name, module in layer.named_modules()} == before
    for name, module in twin.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    assert isinstance(twin, LoraLayer)
    original, copied = from_linear(layer.base_layer), from_linear(twin.base_layer)
    for field, a, b in zip(original._fields, original, copied, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field


def test_a_forward_beside_another_thread_that_toggles_adapters(kind):
    """The switch is the layer's, for all threads: a forward has the adapter or has not, and is never half."""
    layer, x = one_layer(kind), inputs()
    with torch.no_grad():
        adapted = layer(x)
        layer.enable_adapters(False)
        base = layer(x)
        stop = threading.Event()

        def toggle():
            enabled = True
            while not stop.is_set():
                layer.enable_adapters(enabled)
                enabled = not enabled

        toggling = threading.Thread(target=toggle)
        toggling.start()
        try:
            outputs = [layer(x) for _ in range(200)]
        finally:
            stop.set()
            toggling.join()
    assert not torch.allclose(base, adapted)
    assert all(torch.equal(y, base) or torch.equal(y, adapted) for y in outputs)
