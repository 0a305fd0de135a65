"""PEFT's VeRA and IA3 layers, fused, against float64 and in files; see test_behaviours for all else."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft_models import (
    KINDS,
    Net,
    accelerated,
    adapted_layers,
    assert_same_model,
    fused_calls,
    inputs,
    move_vectors,
    run,
    stock_net,
    to_kind,
    unpacked,
    vector_config,
    vector_net,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fast import UnsupportedLayer, accelerate, explain, restore
from peft_fast.base_layers import FusedBase

METHODS = ("vera", "ia3")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def returning_what_came(stock: nn.Module) -> nn.Module:
    """PEFT's IA3 on a `Linear4bit` returns float32 for half x; made to return the dtype of x, as ours do."""
    for layer in adapted_layers(stock):
        layer.register_forward_hook(lambda _, x, y: y.to(x[0].dtype))
    return stock


# ------------------------------------------------------------------------------------------- against float64


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [*KINDS, "nf4-flat"])
def test_equals_peft_in_every_dtype(stored, method, dtype, adapter_dtype):
    stock = vector_net(stored, method, dtype, adapter_dtype=adapter_dtype, lora_dropout=0.3)
    fast = accelerated(stock)
    assert_same_model(returning_what_came(stock), fast, inputs(dtype=dtype), calls=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_peft_under_autocast(kind, method, dtype):
    stock = vector_net(kind, method, dtype, lora_dropout=0.2)
    fast = accelerated(stock)
    assert_same_model(returning_what_came(stock), fast, inputs(dtype=dtype), calls=2, autocast=True)


def test_equals_peft_with_trained_biases(kind):
    stock = vector_net(kind, "vera", bias="all")
    assert_same_model(stock, accelerated(stock), inputs(), calls=2)


@pytest.mark.parametrize("names", [("default", "other"), ("other", "default", "other")])
def test_vectors_of_several_ia3_adapters_are_multiplied(kind, names):
    stock = vector_net(kind, "ia3")
    stock.add_adapter("other", vector_config("ia3"))
    move_vectors(stock, "other")
    stock.base_model.set_adapter(list(names))
    fast = accelerated(stock)
    assert_same_model(stock, fast, inputs(), calls=2)
    assert f"ia3 adapters {list(names)} on the output" in explain(adapted_layers(fast)[0])
    assert f"ia3 adapters {list(names)} on the input" in explain(adapted_layers(fast)[1])


def test_frozen_input_and_no_gradients(kind, method):
    stock = vector_net(kind, method)
    fast, x = accelerated(stock), inputs()
    assert_same_model(stock, fast, x, calls=2, frozen_input=True)
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x), stock.eval()(x))


def test_compiles_into_one_graph(kind, method):
    torch._dynamo.reset()
    fast, x = accelerated(vector_net(kind, method)), inputs()
    expected = run(fast, x)
    before = fused_calls()
    got = run(torch.compile(fast, backend="aot_eager", fullgraph=True), x)
    torch._dynamo.reset()
    assert fused_calls() == before + 2
    for (name, value), other in zip(expected.items(), got.values(), strict=True):
        torch.testing.assert_close(other, value, msg=name, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ half 4-bit models


def test_ia3_of_a_half_4bit_model_trains_where_pefts_cannot():
    """PEFT's layers return float32, which the model's attention refuses beside a half query."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    base = to_kind(LlamaForCausalLM(config), "nf4", torch.bfloat16)
    stock = unpacked(get_peft_model(base, IA3Config(task_type="CAUSAL_LM")))
    tokens = torch.arange(12).view(2, 6)
    with pytest.raises(RuntimeError, match="same dtype"):
        stock(input_ids=tokens)
    fast = accelerated(stock)
    fast(input_ids=tokens, labels=tokens).loss.backward()
    grads = [p.grad for p in fast.parameters() if p.requires_grad]
    assert len(grads) == 3
    assert all(g.isfinite().all() and g.norm() > 0 for g in grads)


def test_the_dtype_does_not_depend_on_which_forward_runs():
    layer = adapted_layers(accelerated(vector_net("nf4", "ia3", torch.bfloat16)))[0]
    x = inputs(dtype=torch.bfloat16)
    fused = layer(x)
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert "base_layer has hooks" in explain(layer)
    assert layer(x).dtype == fused.dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), fused, rtol=2**-7, atol=2**-7)


# ------------------------------------------------------------------------------------------------- fallbacks


def parametrize(layer):
    part = {"vera": "vera_lambda_d", "ia3": "ia3_l"}[layer_method(layer)]
    nn.utils.parametrize.register_parametrization(getattr(layer, part), "default", nn.Tanh())


def layer_method(layer) -> str:
    return "ia3" if hasattr(layer, "ia3_l") else "vera"


def drop_otherwise(layer):
    layer.vera_dropout["default"] = nn.Tanh()


def hook_dropout(layer):
    layer.vera_dropout["default"].register_forward_hook(lambda _, x, y: y * 2)


def double_vectors(layer):
    """Vectors and projections, which PEFT multiplies with an x of their dtype."""
    for name in layer.adapter_layer_names:
        getattr(layer, name).double()
    for name in ("vera_A", "vera_B"):
        if hasattr(layer, name):
            getattr(layer, name).double()


@pytest.mark.parametrize(
    ("method", "change", "reason"),
    [
        ("vera", parametrize, "vera_lambda_d is a ParametrizedParameterDict, not a plain ParameterDict"),
        ("ia3", parametrize, "ia3_l is a ParametrizedParameterDict, not a plain ParameterDict"),
        ("vera", double_vectors, "vera_lambda_b is torch.float64"),
        ("ia3", double_vectors, "ia3_l is torch.float64"),
        ("vera", drop_otherwise, "vera_dropout is a Tanh, not nn.Dropout or nn.Identity"),
        ("vera", hook_dropout, "vera_dropout has hooks"),
    ],
)
def test_what_the_op_does_not_carry_runs_pefts_forward(kind, method, change, reason):
    stock = vector_net(kind, method)
    fast = accelerated(stock)
    for model in (stock, fast):
        for layer in adapted_layers(model):
            change(layer)
    returning_what_came(stock)
    before, x = fused_calls(), inputs()
    expected, got = run(stock, x), run(fast, x)
    assert fused_calls() == before
    assert explain(fast).count(f"PEFT's own forward: {reason}") == 2
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_projections_that_do_not_fit_are_pefts_to_refuse(kind):
    stock = vector_net(kind, "vera")
    fast = accelerated(stock)
    for model in (stock, fast):
        model.base_model.vera_A["default"] = model.base_model.vera_A["default"][:, :-1]
    said = []
    for model in (stock, fast):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
            model(inputs())
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert "vera_A is [16, 127], for rank 16 and 128 features of the layer" in explain(fast)


# ----------------------------------------------------------------------------------------- what is swapped


def test_the_report_restore_and_copies(kind, method):
    stock = vector_net(kind, method)
    fast = copy.deepcopy(stock)
    report = accelerate(fast, strict=True)
    assert [row.detail for row in report] == [f"{method} on cpu"] * 2
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert [type(layer) for layer in adapted_layers(other)] == [type(x) for x in adapted_layers(fast)]
        x = inputs()
        assert torch.equal(other(x), fast(x))
    assert restore(fast) == 2
    assert [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]
    assert [vars(m).keys() for m in fast.modules()] == [vars(m).keys() for m in stock.modules()]


@pytest.mark.filterwarnings("ignore:accelerate")
def test_a_method_not_asked_for_is_left_over_a_fused_base(kind, method):
    model = vector_net(kind, method)
    report = accelerate(model, methods=("lora", "base"))
    reason = f"adapter 'default' is {method}, and asked for was ('lora', 'base')"
    assert [row.reason for row in report.left] == [reason] * 2
    assert sum(isinstance(m, FusedBase) for m in model.modules()) == (2 if kind == "nf4" else 0)
    accelerate(model, strict=True)
    assert "lora_linear over" in explain(adapted_layers(model)[0])


def test_convolutions_have_no_fused_counterpart():
    config = IA3Config(target_modules=["0", "1"], feedforward_modules=[])
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(5, 6)), config)
    assert [row.detail for row in accelerate(model)] == [
        "peft.tuners.ia3.layer.Conv2d has no fused counterpart",
        "ia3 on cpu",
    ]
    with pytest.raises(UnsupportedLayer, match="Conv2d has no fused counterpart"):
        accelerate(model, strict=True)


def test_lora_and_vera_of_one_model_are_each_fused():
    """One model inside another, each with its tuner."""
    model = nn.ModuleList([stock_net("nf4"), vector_net("nf4", "vera"), vector_net("nf4", "ia3")])
    assert [row.method for row in accelerate(model, strict=True)] == ["lora"] * 2 + ["vera"] * 2 + ["ia3"] * 2


# ------------------------------------------------------------------------------------------------------ files


def described(folder: Path) -> dict[str, object]:
    """PEFT's configuration; its sets of names are written in no particular order."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}


def test_files_are_pefts_in_both_directions(kind, method, tmp_path):
    stock = vector_net(kind, method)
    stock.save_pretrained(tmp_path / "stock")
    accelerated(stock).save_pretrained(tmp_path / "fast")
    ours, theirs = (tmp_path / folder for folder in ("fast", "stock"))
    tensors = "adapter_model.safetensors"
    assert (ours / tensors).read_bytes() == (theirs / tensors).read_bytes()
    assert described(ours) == described(theirs)

    def base() -> nn.Module:
        return to_kind(copy.deepcopy(net), kind)

    torch.manual_seed(0)
    net, x = Net(), inputs()
    expected = unpacked(PeftModel.from_pretrained(base(), tmp_path / "fast")).eval()(x)
    fast = unpacked(PeftModel.from_pretrained(base(), tmp_path / "stock"))
    accelerate(fast, strict=True)
    torch.testing.assert_close(fast.eval()(x), expected)
    fast.load_adapter(tmp_path / "stock", "again")  # into an accelerated model
    fast.set_adapter("again")
    before = fused_calls()
    torch.testing.assert_close(fast.eval()(x), expected)
    assert fused_calls() == before + 2
    fast.save_pretrained(Path(tmp_path, "third"), selected_adapters=["again"])
    assert (tmp_path / "third/again" / tensors).read_bytes() == (tmp_path / "stock" / tensors).read_bytes()
