"""`torch.compile` of a whole accelerated model: one graph, for every batch and scaling, equal to eager."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import KINDS, fused_calls, lora_layers, to_kind, unpacked
from tolerances import relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fast import accelerate

pytestmark = pytest.mark.usefixtures("one_thread")

# Batches and lengths; one and zero, which the compiler specializes on, are left out.
SHAPES = ((2, 8), (3, 12), (4, 17), (2, 8))
SCALINGS = (1.0, 2.0, 0.5, 7.0)
LAYERS = 7
MODES = [(kind, method) for kind in KINDS for method in ("lora", "dora")]


def tiny_llama(kind, method):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=99, use_cache=False,
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules="all-linear", use_dora=method == "dora", init_lora_weights=False)
    model = get_peft_model(to_kind(LlamaForCausalLM(config), kind), adapter)
    assert len(accelerate(unpacked(model), strict=True).fused) == LAYERS + (kind == "nf4")  # its head
    return model


@pytest.fixture(params=MODES, ids="-".join)
def model(request):
    torch._dynamo.reset()
    counters.clear()
    yield tiny_llama(*request.param)
    torch._dynamo.reset()


def step(model, tokens):
    """The loss, and the gradient of each adapter."""
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) >= 2 * LAYERS
    return {"loss": loss.detach(), **grads}


def assert_equals_eager(compiled, model, shape):
    tokens = torch.randint(99, shape)
    expected = step(model, tokens)
    before = fused_calls()
    got = step(compiled, tokens)
    assert fused_calls() - before >= LAYERS
    for (name, value), result in zip(expected.items(), got.values(), strict=True):
        assert relative_error(result, value) < 1e-5, name


def set_scaling(model, scaling):
    for layer in lora_layers(model):
        layer.scaling["default"] = scaling


def test_one_graph_for_all_batches_and_scalings(model):
    """peft #2416: a graph was compiled for each value of the scaling."""
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for shape in SHAPES:
        assert_equals_eager(compiled, model, shape)
    for scaling in SCALINGS:
        set_scaling(model, scaling)
        assert_equals_eager(compiled, model, SHAPES[0])
    assert backend.frame_count == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "model", [mode for mode in MODES if mode != ("nf4", "lora")], ids="-".join, indirect=True
)
def test_aot_autograd(model):
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert_equals_eager(compiled, model, SHAPES[0])
    assert backend.frame_count == 1


@pytest.mark.parametrize("model", [("nf4", "lora")], ids="-".join, indirect=True)
def test_by_default_the_first_change_of_a_kind_compiles_once_more(model):
    """Without `dynamic`, sizes and numbers are compiled in until they are seen to change."""
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    graphs = []
    for shape in SHAPES:
        assert_equals_eager(compiled, model, shape)
        graphs.append(backend.frame_count)
    for scaling in SCALINGS:
        set_scaling(model, scaling)
        assert_equals_eager(compiled, model, SHAPES[0])
        graphs.append(backend.frame_count)
    assert graphs == [1, 2, 2, 2, 3, 3, 3, 3]
    assert not counters["graph_break"]


@pytest.mark.parametrize("model", [("nf4", "lora")], ids="-".join, indirect=True)
def test_inductor(model):
    """A part of the model: every kernel of the rest costs a run of the C++ compiler."""
    mlp = model.base_model.model.model.layers[0].mlp
    compiled = torch.compile(mlp, backend="inductor", fullgraph=True)
    x, grad = torch.randn(2, 8, 64), torch.randn(2, 8, 64)
    results = []
    for module in (mlp, compiled):
        leaves = [x.clone().requires_grad_(), *(p for p in mlp.parameters() if p.requires_grad)]
        before = fused_calls()
        y = module(leaves[0])
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
        assert fused_calls() - before >= 3
    assert len(results[0]) == 2 + 2 * 3
    for got, expected in zip(results[1], results[0], strict=True):
        assert relative_error(got, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
