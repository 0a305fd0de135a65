"""accelerate, restore and explain, and what an accelerated model saves, copies and compiles to."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import bnb as peft_bnb
from peft.tuners.lora import layer as peft_lora
from peft_models import (
    HIDDEN,
    WIDTH,
    Net,
    accelerated,
    assert_same_model,
    fused_calls,
    inputs,
    lora_config,
    lora_layers,
    repacking,
    run,
    stock_net,
    tiny_bert,
    to_kind,
    unpacked,
)
from torch import nn

from peft_fast import (
    BackendUnavailable,
    LoRALinear,
    UnsupportedLayer,
    accelerate,
    explain,
    restore,
)
from peft_fast.base_layers import FusedBase
from peft_fast.peft_layers import METHODS

STOCK_CLASS = {"dense": peft_lora.Linear, "nf4": peft_bnb.Linear4bit}

pytestmark = pytest.mark.usefixtures("one_thread")


# ----------------------------------------------------------------------------------------- saving and copying


def test_saved_adapter_loads_in_stock_peft(kind, tmp_path):
    base = unpacked(to_kind(tiny_bert(), kind))
    model = get_peft_model(copy.deepcopy(base), lora_config(["query", "value", "dense"], lora_dropout=0.1))
    accelerate(model, strict=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    tokens = torch.arange(12).view(2, 6)
    expected = model.eval()(tokens).last_hidden_state
    torch.testing.assert_close(loaded.eval()(tokens).last_hidden_state, expected)
    assert all(type(layer) is STOCK_CLASS[kind] for layer in lora_layers(loaded))


def test_eval_train_save_leaves_4bit_weights_alone():
    """Stock bitsandbytes repacks in place at the eval forward (where the CPU has AVX512_BF16)."""
    fast = accelerated(repacking(stock_net("nf4", targets=["up"])))
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    with torch.no_grad():
        fast.eval()(inputs())
        with fast.disable_adapter():
            fast(inputs())
    result = run(fast.train(), inputs())
    assert len(result) == 4
    assert all(value is not None and value.isfinite().all() for value in result.values())
    after = fast.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_merged_4bit_weights_are_not_repacked_either():
    fast = accelerated(repacking(stock_net("nf4")))
    fast.merge_adapter()
    with torch.no_grad():
        fast.eval()(inputs())
    fast.unmerge_adapter()
    assert_same_model(unpacked(copy.deepcopy(fast)), fast, inputs(), calls=2)


def test_a_repacked_weight_is_left_with_the_reason():
    stock = stock_net("nf4").eval()
    layer = lora_layers(stock)[0]
    repacking(layer)
    with torch.no_grad():
        stock(inputs())
    if not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512_BF16, where bitsandbytes repacks")
    report = accelerate(stock)
    assert [row.status for row in report] == ["left", "fused"]
    assert "repacked in place" in report.left[0].reason


@pytest.mark.parametrize(
    ("kind", "compiler"), [("dense", "aot_eager"), ("nf4", "aot_eager"), ("nf4", "inductor")]
)
def test_compiles_into_one_graph(kind, compiler):
    torch._dynamo.reset()
    fast, x = accelerated(stock_net(kind, lora_bias=True)), inputs()
    expected = run(fast, x)
    compiled = torch.compile(fast, backend=compiler, fullgraph=True)
    before = fused_calls()
    got = run(compiled, x)
    torch._dynamo.reset()
    assert fused_calls() == before + 2
    for (name, value), other in zip(expected.items(), got.values(), strict=True):
        torch.testing.assert_close(other, value, msg=name, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- accelerate and restore


def test_restore_undoes_everything(kind):
    model = repacking(stock_net(kind))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    accelerate(model)
    accelerate(model)
    assert restore(model) == 2
    assert [type(module) for module in model.modules()] == classes
    for name, module in model.named_modules():
        assert module.__dict__ == before[name], name
    assert restore(model) == 0


def test_restore_after_unloading():
    model = stock_net("nf4")
    repacking(model.base_model.model.up)
    accelerate(model)
    plain = model.unload()
    restore(plain)
    assert plain.up.support_avx512bf16_for_cpu is True
    assert plain.down.support_avx512bf16_for_cpu is False


def test_twice_is_once(kind):
    fast = accelerated(stock_net(kind))
    classes = [type(layer) for layer in lora_layers(fast)]
    report = accelerate(fast, strict=True)
    assert len(report.fused) == 2
    assert [type(layer) for layer in lora_layers(fast)] == classes
    assert isinstance(lora_layers(fast)[0], STOCK_CLASS[kind])


def test_report_lists_every_layer():
    model = get_peft_model(
        nn.Sequential(nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH)), LoraConfig(target_modules=["0", "1"])
    )
    report = accelerate(model, backend="reference")
    assert [(row.name, row.status) for row in report] == [
        ("base_model.model.0", "left"),
        ("base_model.model.1", "fused"),
    ]
    assert report.fused[0].backend == "reference"
    assert str(report).splitlines() == [
        "1 layers fused, 1 left as they were",
        "  base_model.model.0  left   peft.tuners.lora.layer.Embedding has no fused counterpart",
        "  base_model.model.1  fused  lora on reference",
    ]
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(width=200, file=io.StringIO())
    console.print(report)
    for text in ("1 layers fused", "base_model.model.0", "reference", "has no fused counterpart"):
        assert text in console.file.getvalue()


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(10, 8), "lora.layer.Embedding has no fused counterpart"),
        (nn.Conv2d(3, 8, 3), "lora.layer.Conv2d has no fused counterpart"),
        (nn.Conv1d(3, 8, 3), "lora.layer.Conv1d has no fused counterpart"),
        (nn.MultiheadAttention(8, 2), "lora.layer.MultiheadAttention has no fused counterpart"),
        (Subclass(8, 8), "base_layer is a Subclass"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "base_layer is a ParametrizedLinear"),
        (nn.Linear(8, 8).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:accelerate", "ignore:fan_in_fan_out")
def test_other_layers_are_left_with_the_reason(module, reason):
    model = get_peft_model(nn.ModuleDict({"m": module}), LoraConfig(target_modules=["m"]))
    classes = [type(m) for m in model.modules()]
    report = accelerate(model)
    assert not report.fused
    assert reason in report.left[0].reason
    assert reason in explain(model)
    with pytest.raises(UnsupportedLayer, match=r"has no fused counterpart|base_layer is a|float8"):
        accelerate(model, strict=True)
    assert [type(m) for m in model.modules()] == classes


def test_a_trained_base_is_left():
    model = stock_net("dense")
    model.base_model.model.up.base_layer.weight.requires_grad_()
    report = accelerate(model)
    assert [row.status for row in report] == ["left", "fused"]
    assert "the weight of base_layer is trained" in report.left[0].reason


def test_layers_with_other_variants_alone_are_left(kind):
    """A 4-bit base under one, which PEFT's forward calls, is fused for itself."""
    model = stock_net(kind, alora_invocation_tokens=[1])
    with pytest.warns(UserWarning, match="0 layers fused, 2 left as they were"):
        report = accelerate(model, methods=METHODS)
    reason = {"adapter 'default' is a LoRA variant, ALoraLinearVariant"}
    assert {row.reason for row in report} == reason
    if kind == "nf4":
        report = accelerate(model)
        assert {row.reason for row in report.left} == reason
        assert [row.detail for row in report.fused] == ["base on cpu"] * 2
    model.add_adapter("other", lora_config())
    assert [row.detail for row in accelerate(model)] == ["lora on cpu"] * 2
    restore(model)
    assert [type(layer) for layer in lora_layers(model)] == [STOCK_CLASS[kind]] * 2
    assert not any(isinstance(module, FusedBase) for module in model.modules())


def test_a_layer_with_its_own_forward_is_left():
    model = stock_net("dense")
    layer = lora_layers(model)[0]
    layer.forward = layer.forward
    assert "forward of its own" in accelerate(model).left[0].reason


def test_a_model_on_the_meta_device_is_left():
    model = stock_net("dense").to("meta")
    with pytest.warns(UserWarning, match="0 layers fused, 2 left"):
        report = accelerate(model)
    assert {row.reason for row in report} == {"the weight of base_layer is on the meta device"}
    assert accelerate(model.to_empty(device="cpu"), strict=True).fused


def test_an_unquantized_4bit_layer_is_left():
    model = stock_net("nf4")
    lora_layers(model)[0].base_layer.weight.quant_state = None
    lora_layers(model)[0].base_layer.quant_state = None
    assert "quant_state: expected a QuantState, got None" in accelerate(model).left[0].reason


def test_strict_changes_nothing_when_it_raises():
    model = repacking(stock_net("nf4"))
    model.base_model.model.down.forward = model.base_model.model.down.forward
    with pytest.raises(UnsupportedLayer, match=r"model\.down +left +the layer has a forward of its own"):
        accelerate(model, strict=True)
    assert all(type(layer) is peft_bnb.Linear4bit for layer in lora_layers(model))
    assert model.base_model.model.up.base_layer.support_avx512bf16_for_cpu is True


def test_arguments_are_checked():
    model = stock_net("dense")
    known = r"\('lora', 'dora', 'vera', 'ia3', 'base'\)"
    for methods in ((), "lora", ("lora", "loha"), ("LoRA",)):
        with pytest.raises(ValueError, match=f"methods: expected a tuple of {known}, got"):
            accelerate(model, methods=methods)
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        accelerate(model, backend="cuda")


def test_an_explicit_backend_runs_or_raises(monkeypatch):
    from peft_fast import backends

    model = stock_net("dense")
    unavailable = backends.BACKENDS["triton"]._replace(unavailable=lambda *_: "no such machine")
    monkeypatch.setitem(backends.BACKENDS, "triton", unavailable)
    with pytest.raises(BackendUnavailable, match="no such machine"):
        accelerate(model, backend="triton")
    assert all(type(layer) is peft_lora.Linear for layer in lora_layers(model))
    accelerate(model, backend="reference")
    before = backends.calls["lora_linear", "reference"]
    model(inputs())
    assert backends.calls["lora_linear", "reference"] == before + 2
    for layer in lora_layers(model):
        layer.backend = "triton"
    assert "the next forward raises BackendUnavailable" in explain(model)


def test_float32_compute_under_half_weights_warns():
    model = stock_net("nf4", torch.bfloat16)
    for layer in lora_layers(model):
        layer.base_layer.compute_dtype = torch.float32
    with pytest.warns(UserWarning, match="bnb_4bit_compute_dtype is float32") as record:
        accelerate(model)
    assert record[0].filename == __file__


# ---------------------------------------------------------------------------------------------------- explain


def test_explain_tells_op_format_backend_and_adapter(kind):
    fast = accelerated(stock_net(kind), backend="reference")
    text = explain(lora_layers(fast)[0])
    stored = {"dense": "dense", "nf4": "nf4"}[kind]
    assert f"lora_linear over {stored} [{HIDDEN}, {WIDTH}]" in text
    assert ("nested absmax" in text) == (kind == "nf4")
    assert "adapter 'default', r=4, scaling=3" in text
    assert "backend reference (asked for: reference)" in text
    assert explain(fast).count("lora_linear over") == 2


def test_explain_tells_why_pefts_forward_runs(kind):
    model = stock_net(kind)
    layer = lora_layers(model)[0]
    assert "accelerate(model) would fuse it" in explain(layer)
    accelerate(model)
    with model.disable_adapter():
        assert ("PEFT's own forward: the adapters are disabled" in explain(layer)) == (kind == "dense")
        assert ("the base alone" in explain(layer)) == (kind == "nf4")
    model.merge_adapter()
    assert ("merged adapters: ['default']" in explain(layer)) == (kind == "dense")


def test_explain_of_a_model_tells_each_reason_against_a_backend_once(monkeypatch):
    """Of a layer, it is told for each backend."""
    from peft_fast import backends

    reasons = {"triton": "no such machine", "triton-splitk": "no such machine", "cpu": "not built"}
    for name, reason in reasons.items():
        row = backends.BACKENDS[name]._replace(unavailable=lambda *_, reason=reason: reason)
        monkeypatch.setitem(backends.BACKENDS, name, row)
    fast = accelerated(stock_net("nf4"), backend="reference")
    text = explain(fast)
    assert text.count("lora_linear over") == 2
    assert [text.count(reason) for reason in set(reasons.values())] == [1, 1]
    lines = text.splitlines()
    assert "unavailable: triton, triton-splitk: no such machine" in lines
    assert "unavailable: cpu: not built" in lines
    of_a_layer = explain(lora_layers(fast)[0])
    for name, reason in reasons.items():
        assert f"\n    backend {name} is unavailable: {reason}" in of_a_layer


def test_explain_for_other_modules():
    assert explain(nn.ReLU()) == "ReLU: its own forward runs; nothing in it is adapted or fused"
    text = explain(LoRALinear.from_linear(nn.Linear(8, 4), r=2, lora_alpha=4))
    assert "LoRALinear: r=2, scaling=2" in text
    assert "lora_linear over dense [4, 8]" in text


def test_explain_follows_autocast():
    fast = accelerated(stock_net("dense"))
    with torch.autocast("cpu", torch.bfloat16):
        assert "torch.bfloat16 on cpu" in explain(fast)
    assert "torch.float32 on cpu" in explain(fast)


def test_importing_the_package_imports_neither_peft_nor_bitsandbytes():
    code = "import sys, peft_fast; assert not {'peft', 'bitsandbytes', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_warned_about_when_all_is_well(kind):
    model = stock_net(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model, strict=True)
        model(inputs())
    assert isinstance(model.base_model.model, Net)
