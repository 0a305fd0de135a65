"""PEFT's other tuners on a 4-bit base: alike when accelerated; those that fail over bytes, `to_packed`."""

from __future__ import annotations

import copy
from typing import NamedTuple

import peft
import pytest
import torch
from peft_models import fused_calls, unpacked
from test_base_layers import exact, tiny_llama
from tolerances import relative_error
from torch import Tensor, nn

from peft_fast import UnsupportedWeight, accelerate, explain, restore
from peft_fast.packed_linear import PackedLinear
from peft_fast.quantization import to_packed

pytestmark = pytest.mark.usefixtures("one_thread")

T = ["q_proj", "down_proj"]

CLOSE = 1e-5
"""Relative difference of two computations in float32 through two layers."""


class Tuner(NamedTuple):
    """`fails`: what stock PEFT answers on bitsandbytes' NF4, where it runs on a dense base."""

    config: peft.PeftConfig
    fails: str | None = None


PACKED = "mat1 and mat2 shapes cannot be multiplied"
BYTES = "Only Tensors of floating point and complex dtype can require gradients"

TUNERS = {
    "AdaLoRA": Tuner(peft.AdaLoraConfig(target_modules=T, init_r=6, target_r=4, total_step=20)),
    "BEFT": Tuner(peft.BeftConfig(target_modules=T)),
    "BOFT": Tuner(peft.BOFTConfig(target_modules=T, boft_block_size=4)),
    "C3A": Tuner(peft.C3AConfig(target_modules=T, block_size=16)),
    "FourierFT": Tuner(peft.FourierFTConfig(target_modules=T, n_frequency=50)),
    "GraLoRA": Tuner(peft.GraloraConfig(target_modules=T, r=8, gralora_k=2)),
    "HiRA": Tuner(peft.HiraConfig(target_modules=T, r=4)),
    "IA3": Tuner(peft.IA3Config(target_modules=T, feedforward_modules=["down_proj"])),
    "Lily": Tuner(peft.LilyConfig(target_modules=T, r=4)),
    "LN tuning": Tuner(peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "MiSS": Tuner(peft.MissConfig(target_modules=T, r=4)),
    "OFT": Tuner(peft.OFTConfig(target_modules=T, oft_block_size=8, use_cayley_neumann=False)),
    "Poly": Tuner(peft.PolyConfig(target_modules=T, r=4, n_tasks=2, n_skills=2)),
    "PVeRA": Tuner(peft.PveraConfig(target_modules=T, r=16)),
    "RandLoRA": Tuner(peft.RandLoraConfig(target_modules=T, r=8)),
    "RoAd": Tuner(peft.RoadConfig(target_modules=T)),
    "SHiRA": Tuner(peft.ShiraConfig(target_modules=T, r=4)),
    "Trainable tokens": Tuner(
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2, 3])
    ),
    "VBLoRA": Tuner(
        peft.VBLoRAConfig(target_modules=T, r=4, num_vectors=8, vector_length=16, topk=2),
    ),
    "VeRA": Tuner(peft.VeraConfig(target_modules=T, r=16)),
    "WaveFT": Tuner(peft.WaveFTConfig(target_modules=T, n_frequency=50)),
    "DEFT": Tuner(peft.DeftConfig(target_modules=T, r=4), PACKED),
    "DeLoRA": Tuner(peft.DeloraConfig(target_modules=T, r=4), "Expected a floating point or complex tensor"),
    "FRoD": Tuner(peft.FrodConfig(target_modules=T, progressbar=False), BYTES),
    "GLoRA": Tuner(peft.GloraConfig(target_modules=T, r=4), "is not a plain torch.nn.Linear"),
    "HRA": Tuner(peft.HRAConfig(target_modules=T, r=4), PACKED),
    "LoHa": Tuner(peft.LoHaConfig(target_modules=T, r=4), PACKED),
    "LoKr": Tuner(peft.LoKrConfig(target_modules=T, r=4, decompose_factor=4), "is invalid for input of size"),
    "OSF": Tuner(peft.OSFConfig(target_modules=T, effective_rank=4), BYTES),
    "PEANuT": Tuner(peft.PeanutConfig(target_modules=T, r=4), PACKED),
    "PSOFT": Tuner(peft.PsoftConfig(target_modules=T, r=4), "PSOFT init requires float32/float16/bfloat16"),
    "Supertuning": Tuner(peft.SupertuningConfig(target_modules=T), PACKED),
    "TinyLoRA": Tuner(peft.TinyLoraConfig(target_modules=T), BYTES),
}
RUN = [name for name, row in TUNERS.items() if row.fails is None]
FAIL = [name for name, row in TUNERS.items() if row.fails is not None]
EXACT_CLASS = "GLoRA"  # which takes `nn.Linear`, and no subclass
ON_PACKED = [name for name in TUNERS if name != EXACT_CLASS]
COMPOSES = ("FRoD", "HRA", "SHiRA", "Supertuning")
"""Multiply with a weight that they make from that of the base, which is not called."""
BESIDE_WEIGHT = ("BEFT", "Lily", "LN tuning", "Poly", "Trainable tokens")
"""Do not merge, or not into a packed weight."""


def base_in_4bit() -> nn.Module:
    model = unpacked(tiny_llama().requires_grad_(False))
    model.is_loaded_in_4bit = True
    return model


def packed_base() -> nn.Module:
    model = base_in_4bit()
    assert len(to_packed(model)) == 14
    return model


def dense_base() -> nn.Module:
    return exact(unpacked(tiny_llama())).float().requires_grad_(False)


def tuned(base: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """Away from the initialization, where some gradients are zero."""
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config).train()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    tasks = (
        {"task_ids": torch.tensor([0, 1])} if "POLY" in str(model.peft_config["default"].peft_type) else {}
    )
    torch.manual_seed(3)
    output = model(input_ids=tokens, labels=tokens, **tasks)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output.loss, list(leaves.values()))
    return {"logits": output.logits.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_alike(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert len(got) > 1
    for name, tensor in expected.items():
        assert tensor.count_nonzero(), name
        assert relative_error(got[name], tensor) < CLOSE, name


@pytest.mark.parametrize("name", RUN)
def test_a_tuner_that_runs_on_nf4_runs_alike_on_an_accelerated_base(name):
    """Equal to stock on NF4, and to stock on the same values in a dense weight; swapped before or after."""
    config = TUNERS[name].config
    stock = step(tuned(base_in_4bit(), config))
    assert_alike(stock, step(tuned(dense_base(), config)))
    after = tuned(base_in_4bit(), config)
    accelerate(after)
    before = base_in_4bit()
    accelerate(before, strict=True)
    for model in (after, tuned(before, config)):
        calls = fused_calls()
        assert_alike(step(model), stock)
        assert fused_calls() - calls >= 10


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FAIL)
def test_a_tuner_that_needs_a_dense_weight_says_so_and_changes_nothing(name):
    """It runs on a dense base; over bitsandbytes' NF4 it fails with ours below as it does without."""
    config, text = TUNERS[name]
    assert text is not None
    assert len(step(tuned(dense_base(), config))) > 1
    swapped = base_in_4bit()
    accelerate(swapped, strict=True)
    for base in (base_in_4bit(), swapped):
        kept = {key: t.clone() for key, t in base.state_dict().items()}
        with pytest.raises((RuntimeError, ValueError, TypeError), match=text):
            step(tuned(copy.deepcopy(base), config))
        assert all(torch.equal(t, kept[key]) for key, t in base.state_dict().items())


@pytest.mark.parametrize("name", ON_PACKED)
def test_every_tuner_runs_over_to_packed_as_over_a_dense_base(name):
    """Loss and gradients; what calls the base does so on the packed kernel. A merge is refused, not lost."""
    config = TUNERS[name].config
    expected = step(tuned(dense_base(), config))
    model = tuned(packed_base(), config)
    accelerate(model, strict=name != "AdaLoRA")
    calls = fused_calls()
    assert_alike(step(model), expected)
    assert fused_calls() - calls == (10 if name in COMPOSES else 14)
    if name in BESIDE_WEIGHT:
        return
    kept = {key: t.clone() for key, t in model.state_dict().items()}
    for safe in (False, True):
        with pytest.raises(UnsupportedWeight, match="weight: expected reads of a packed nf4"):
            model.merge_adapter(safe_merge=safe)
    assert all(torch.equal(t, kept[key]) for key, t in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in FAIL if name != EXACT_CLASS])
def test_what_fails_over_bytes_is_trained_evaluated_and_saved_over_to_packed(name, tmp_path):
    """A few steps with evaluations between them reach the weights of a dense base; files load."""
    config = TUNERS[name].config
    packed, dense = tuned(packed_base(), config), tuned(dense_base(), config)
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    for model in (packed, dense):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            with torch.no_grad():
                model.eval()(input_ids=tokens)
            optimizer.zero_grad()
            model.train()(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    trained = {key: p for key, p in dense.named_parameters() if p.requires_grad}
    assert_alike({key: packed.get_parameter(key) for key in trained}, trained)
    packed.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = packed.eval()(input_ids=tokens).logits
        for base in (packed_base(), dense_base()):
            loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
            assert relative_error(loaded(input_ids=tokens).logits, expected) < CLOSE


def test_glora_takes_no_subclass_of_a_linear_layer():
    with pytest.raises(ValueError, match=r"PackedLinear.* is not a plain torch\.nn\.Linear"):
        tuned(packed_base(), TUNERS[EXACT_CLASS].config)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_over_to_packed_are_fused(dora):
    config = peft.LoraConfig(target_modules=T, r=4, use_dora=dora)
    model = tuned(packed_base(), config)
    stock = step(model)
    accelerate(model, strict=True)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert type(layer.base_layer) is PackedLinear
    assert explain(layer).startswith(f"FusedLinear: {'dora' if dora else 'lora'} adapter")
    assert_alike(step(model), stock)
    calls = fused_calls()
    assert_alike(step(model), stock)
    assert fused_calls() - calls == 14  # and the norms are those of before
    assert_alike(stock, step(tuned(dense_base(), config)))
    restore(model)
    assert_alike(step(model), stock)


UNILORA = peft.UniLoraConfig(target_modules=T, r=4, theta_d_length=64)


def test_unilora_trains_over_to_packed():
    assert_alike(step(tuned(packed_base(), UNILORA)), step(tuned(dense_base(), UNILORA)))


def test_unilora_trains_nothing_over_packed_bytes():
    """It casts its scales, all below one, to the dtype of the weight: over bytes they are zero."""
    config = UNILORA
    dense = step(tuned(dense_base(), config))
    swapped = base_in_4bit()
    accelerate(swapped, strict=True)
    for base in (base_in_4bit(), swapped):
        got = step(tuned(base, config))
        for name, tensor in got.items():
            if name != "logits":
                assert dense[name].count_nonzero() > 0
                assert tensor.count_nonzero() == 0
