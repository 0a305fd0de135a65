"""PiSSA and OLoRA as plain LoRA, and as files that PEFT loads."""

from __future__ import annotations

import copy

import pytest
import torch
from initialization_models import BASES, adapted, effective, parts, spectral
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import Net, tiny_bert, to_kind, unpacked
from tolerances import relative_error
from torch import nn

from peft_fast import accelerate
from peft_fast.initialization import initialize, plain_lora

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(5))
    for _ in range(5):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("owner", ["accelerated", "ours"])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_plain_lora_is_the_training_on_the_original_base(method, base, owner):
    net = spectral(Net())
    net.up, net.down = BASES[base](net.up), BASES[base](net.down)
    model = adapted(net, owner)
    original = effective(model)
    initial = initialize(model, method)
    start = effective(model)
    update = plain_lora(trained(model), initial)
    assert list(update) == list(initial)
    for (A, B), first, then, now, (_, _, _, s) in zip(
        update.values(), original, start, effective(model), parts(model), strict=True
    ):
        assert A.shape[0] == B.shape[1] == 8
        there = first + s * B.double() @ A.double()
        # All that is missing is what the rounding of the base changed.
        torch.testing.assert_close(there - now, first - then, rtol=0, atol=1e-6)
        if base == "fp32":
            assert relative_error(there, now) < 1e-6
        assert relative_error(now, then) > 1e-3


def test_plain_lora_checks_the_factors():
    model = adapted(Net(), "ours")
    initial = initialize(model, "pissa")
    with pytest.raises(ValueError, match="initial: expected lora_A and lora_B of shapes"):
        plain_lora(model, {"up": initial["up"]})
    with pytest.raises(ValueError, match="initial: expected lora_A and lora_B of shapes"):
        plain_lora(model, {"up": initial["down"], "down": initial["up"]})


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
def test_files_for_a_dense_base_are_pefts(tmp_path, method):
    """Its own derivation of the base at loading, and its conversion to a LoRA of twice the rank."""
    net = spectral(Net())
    model = adapted(copy.deepcopy(net), "accelerated", use_rslora=True)
    initialize(model, method)
    model.save_pretrained(tmp_path / "initial")
    trained(model).save_pretrained(tmp_path / "derived")
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    x = torch.randn(3, 64)
    for folder, rank in (("derived", 4), ("plain", 8)):
        loaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / folder)
        assert loaded.peft_config["default"].r == rank
        assert relative_error(loaded(x), model(x)) < 1e-5
    assert relative_error(model(x), net(x)) > 1e-3


def test_over_nf4_the_base_and_a_plain_adapter_are_the_whole_model(tmp_path):
    """PEFT refuses to derive a 4-bit base for PiSSA, so nothing wrong is loaded."""
    net = to_kind(spectral(tiny_bert()), "nf4")
    unpacked(net)
    config = LoraConfig(r=4, target_modules=["query", "value"])
    model = get_peft_model(copy.deepcopy(net), config)
    accelerate(model)
    initialize(model, "pissa")
    with torch.no_grad():
        for _, A, B, _ in parts(model):
            A.add_(0.1 * torch.randn_like(A))
            B.add_(0.1 * torch.randn_like(B))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TypeError, match="Please initialize PiSSA under float32"):
        PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "adapter")
    ids = torch.arange(12).view(2, 6)
    expected = model(input_ids=ids).last_hidden_state
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "adapter")
    base = unpacked(model.unload())
    torch.save(base, tmp_path / "base.pt")
    again = torch.load(tmp_path / "base.pt", weights_only=False)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
