"""A fused layer does what PEFT's DoRA does, in every state of a layer, and saves what PEFT saves."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_models import (
    accelerated,
    assert_same_model,
    dora_net,
    inputs,
    lora_config,
    lora_layers,
    run,
    tiny_bert,
    to_kind,
    unpacked,
)
from tolerances import relative_error
from torch.utils.checkpoint import checkpoint

from peft_fast import UnsupportedLayer, accelerate, dora, explain, restore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def norms(monkeypatch):
    """The arguments of every norm computed."""
    calls, compute = [], dora.lora_weight_norm

    def counting(*args, **kwargs):
        calls.append(args)
        return compute(*args, **kwargs)

    monkeypatch.setattr(dora, "lora_weight_norm", counting)
    return calls


# ------------------------------------------------------------------------------------------------ the forward


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_equals_peft_in_fp32(kind, p, bias):
    stock, x = dora_net(kind, lora_dropout=p, bias=bias), inputs()
    expected, got = run(stock, x), run(accelerated(stock), x)
    assert len(got) == (8 if bias == "none" else 10)
    for name, value in expected.items():
        assert relative_error(got[name], value) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_peft_in_every_dtype(kind, dtype, p):
    stock = dora_net(kind, dtype, lora_dropout=p)
    calls = 2 + (2 if p == 0 else 4)  # two norms; with dropout two calls a layer
    assert_same_model(stock, accelerated(stock), inputs(dtype=dtype), calls=calls)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"r": 7, "lora_alpha": 3},
        {"init_lora_weights": True},
        {"rank_pattern": {"up": 9}},
    ],
    ids=str,
)
def test_equals_peft_with_every_option(kind, options):
    stock = dora_net(kind, lora_dropout=0.5, **options)
    fast = accelerated(stock)
    assert_same_model(stock, fast, inputs())
    assert_same_model(stock.eval(), fast.eval(), inputs(), calls=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_equals_peft_under_autocast(kind, dtype, p):
    stock = dora_net(kind, dtype, lora_dropout=p)
    assert_same_model(stock, accelerated(stock), inputs(dtype=dtype), autocast=True)


def test_under_no_grad_and_with_a_frozen_input(kind):
    stock = dora_net(kind, lora_dropout=0.1)
    fast, x = accelerated(stock), inputs()
    assert_same_model(stock, fast, x, frozen_input=True)
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x), stock.eval()(x))


def test_training_follows_peft(kind, norms):
    stock = dora_net(kind, lora_dropout=0.1)
    fast, x = accelerated(stock), inputs(16)
    losses = []
    for model in (stock, fast):
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(8):
            for _ in range(2):
                loss = model(x).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[8:] == pytest.approx(losses[:8], rel=1e-5)
    assert losses[-1] < 0.9 * losses[8]
    assert len(norms) == 2 * 8


# ------------------------------------------------------------------------------------------ states of a layer


def lora_and_dora(kind):
    """A DoRA adapter "default" and a LoRA adapter "other"."""
    stock = dora_net(kind, lora_dropout=0.1)
    stock.add_adapter("other", lora_config(r=3))
    return stock


def test_unmerging_forgets_the_norms_of_the_weight(norms):
    """PEFT adds the LoRA update to a dense weight through `.data`, and takes it off again."""
    fast, x = accelerated(lora_and_dora("dense")), inputs()
    fast(x)
    for layer in lora_layers(fast):
        layer.merge(adapter_names=["other"])
        layer.unmerge()
    fast(x)
    assert len(norms) == 4


# ---------------------------------------------------------------------------- accelerate, saving and copying


def test_methods_choose_what_runs_in_the_fused_op(kind):
    model = lora_and_dora(kind)
    report = accelerate(model, methods=("lora", "dora"))
    assert [(row.method, row.status) for row in report] == [("lora, dora", "fused")] * 2
    assert "lora, dora on cpu" in str(report)
    for methods, adapter, other in ((("lora",), "other", "default"), (("dora",), "default", "other")):
        report = accelerate(model, methods=methods, strict=True)
        assert [row.method for row in report] == [*methods] * 2
        model.set_adapter(other)
        assert f"adapter {other!r} is" in explain(model)
        assert "PEFT's own forward" in explain(model)
        model.set_adapter(adapter)
        assert "PEFT's own forward" not in explain(model)


def test_layers_without_the_method_are_left(kind):
    model = dora_net(kind)
    accelerate(model)
    with pytest.raises(UnsupportedLayer, match=r"adapter 'default' is dora, and asked for was \('lora',\)"):
        accelerate(model, methods=("lora",), strict=True)
    assert "dora adapter 'default'" in explain(model)
    with pytest.warns(UserWarning, match="0 layers fused, 2 left"):
        report = accelerate(model, methods=("lora",))
    assert [row.status for row in report] == ["left"] * 2
    assert restore(model) == 0


def test_restore_undoes_everything(kind):
    model = dora_net(kind)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    expected, fast = run(model, inputs()), accelerate(model, strict=True)
    model(inputs())
    assert restore(model) == len(fast.fused) == 2
    for name, module in model.named_modules():
        assert module.__dict__ == before[name], name
    assert expected.keys() == run(model, inputs()).keys()


def test_saved_adapter_loads_in_stock_peft(kind, tmp_path):
    base = unpacked(to_kind(tiny_bert(), kind))
    config = lora_config(["query", "value", "dense"], lora_dropout=0.1, use_dora=True)
    model = get_peft_model(copy.deepcopy(base), config)
    accelerate(model, strict=True)
    tokens = torch.arange(12).view(2, 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(tokens).last_hidden_state.square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    expected = model.eval()(tokens).last_hidden_state
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(stock(tokens).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert stock.peft_config["default"].use_dora
    fast = PeftModel.from_pretrained(base, tmp_path).eval()
    accelerate(fast, strict=True)
    assert torch.equal(fast(tokens).last_hidden_state, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(kind, copied):
    fast, x = accelerated(dora_net(kind)).eval(), inputs()
    expected = fast(x)
    twin = copied(fast)
    assert torch.equal(twin(x), expected)
    lora_layers(twin)[0].lora_B["default"].weight.data += 1
    assert not torch.equal(twin(x), expected)
    assert torch.equal(fast(x), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant, norms):
    fast, x = accelerated(dora_net(kind, lora_dropout=0.3)), inputs()
    grads = []
    for checkpointed in (False, True):
        leaf = x.detach().requires_grad_()
        fast.zero_grad()
        torch.manual_seed(1)
        y = checkpoint(fast, leaf, use_reentrant=reentrant) if checkpointed else fast(leaf)
        y.square().sum().backward()
        grads.append([y.detach(), leaf.grad, *(p.grad for p in fast.parameters() if p.requires_grad)])
    assert len(grads[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(norms) == 2


@pytest.mark.parametrize(
    ("kind", "compiler"), [("dense", "aot_eager"), ("nf4", "aot_eager"), ("nf4", "inductor")]
)
def test_compiles_into_one_graph(kind, compiler):
    torch._dynamo.reset()
    fast, x = accelerated(dora_net(kind)), inputs()
    compiled = torch.compile(fast, backend=compiler, fullgraph=True)
    for _ in range(2):
        expected, got = run(fast, x), run(compiled, x)
        for (name, value), other in zip(expected.items(), got.values(), strict=True):
            torch.testing.assert_close(other, value, msg=name, rtol=1e-4, atol=1e-5)
        for layer in lora_layers(fast):
            layer.lora_A["default"].weight.data += 0.1
    torch._dynamo.reset()
