"""PEFT's prompts and prefixes on an accelerated NF4 base: equal to stock, trained, evaluated and saved."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from peft_models import fused_calls, repacking, unpacked
from test_base_layers import exact, weight_bytes
from tolerances import assert_as_exact
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from peft_fast import accelerate, quantize, restore

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 64

MANY = 16
"""Elements of a gradient; the error of one of fewer, such as a gate's, is chance."""

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def bert() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZES, **dropout))


class Family(NamedTuple):
    make: Any
    task: TaskType
    layers: int
    """In 4 bits."""


FAMILIES = {
    "llama": Family(llama, TaskType.CAUSAL_LM, 14),
    "bert": Family(bert, TaskType.SEQ_CLS, 13),
}


class Method(NamedTuple):
    config: type
    options: dict[str, Any]
    families: tuple[str, ...]
    inputs: dict[str, Any]


BOTH, DECODER = ("llama", "bert"), ("llama",)
METHODS = {
    "prefix": Method(peft.PrefixTuningConfig, {}, BOTH, {}),
    "prefix-projected": Method(
        peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 32}, BOTH, {}
    ),
    "prompt": Method(peft.PromptTuningConfig, {}, BOTH, {}),
    "p-tuning-mlp": Method(
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 32, "encoder_reparameterization_type": "MLP"},
        BOTH,
        {},
    ),
    "p-tuning-lstm": Method(
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 32, "encoder_reparameterization_type": "LSTM"},
        BOTH,
        {},
    ),
    "multitask": Method(
        peft.MultitaskPromptTuningConfig,
        {"num_tasks": 2, "num_ranks": 2},
        BOTH,
        {"task_ids": torch.tensor([0, 1])},
    ),
    "cpt": Method(
        peft.CPTConfig,
        {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
        DECODER,
        {"input_type_mask": torch.tensor([[1, 2, 2, 3, 3, 4, 4]] * 2)},
    ),
    "adaption-prompt": Method(
        peft.AdaptionPromptConfig, {"adapter_len": 3, "adapter_layers": 2}, DECODER, {}
    ),
}
CASES = [(method, family) for method, row in METHODS.items() for family in row.families]


def base_of(family: str, nested: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family].make()
    quantize(model, "nf4", double_quant=nested)
    assert sum(len(weight) > 0 for weight in weight_bytes(model)) == FAMILIES[family].layers
    return model.requires_grad_(False)


def tuned(method: str, family: str, base: nn.Module) -> nn.Module:
    """Stock PEFT, away from its initialization, where gates and some gradients are zero."""
    row = METHODS[method]
    torch.manual_seed(1)
    length = {} if "adapter_len" in row.options else {"num_virtual_tokens": 3}
    model = get_peft_model(base, row.config(task_type=FAMILIES[family].task, **length, **row.options))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return repacking(model).train()


def inputs_of(method: str, family: str) -> dict[str, Tensor]:
    tokens = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
    labels = tokens if family == "llama" else torch.tensor([0, 1])
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask, **METHODS[method].inputs}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, logits and the gradient of every trained parameter, and of all as one vector."""
    torch.manual_seed(4)
    output = model(**inputs)
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output.loss, list(leaves.values()))
    return {
        "loss": output.loss.detach(),
        "logits": output.logits.detach(),
        "gradient": torch.cat([grad.flatten() for grad in grads]),
        **dict(zip(leaves, grads, strict=True)),
    }


def evaluated(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    model.train()
    return logits


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(("method", "family"), CASES)
def test_training_and_evaluation_in_turns(method, family, nested):
    """Against a stock model that was never evaluated: on some CPUs its gradients are lost after that."""
    stock, inputs = tuned(method, family, base_of(family, nested)), inputs_of(method, family)
    truth, fast = exact(stock), copy.deepcopy(stock)
    for theirs, parameter in zip(stock.parameters(), truth.parameters(), strict=True):
        parameter.requires_grad_(theirs.requires_grad)
    layers = FAMILIES[family].layers
    assert len(accelerate(fast, strict=True).fused) == layers
    before = weight_bytes(fast)
    expected, true = step(stock, inputs), step(truth, inputs)
    true_logits, logits = evaluated(truth, inputs), evaluated(unpacked(copy.deepcopy(stock)), inputs)
    for _ in range(2):
        calls = fused_calls()
        got = step(fast, inputs)
        assert fused_calls() - calls >= layers  # LLaMA-Adapter calls q_proj once more
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            assert expected[name].count_nonzero(), name
            if name == "loss" or tensor.numel() >= MANY:
                assert_as_exact(name, tensor, expected[name], true[name])
            else:
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
        assert_as_exact("eval", evaluated(fast, inputs), logits, true_logits)
    assert weight_bytes(fast) == before
    assert restore(fast) == layers


@pytest.mark.parametrize(("method", "family"), CASES)
def test_files_are_pefts(tmp_path, method, family):
    """Saved by an accelerated model, loaded by stock PEFT and over an accelerated base."""
    base, inputs = base_of(family), inputs_of(method, family)
    fast = tuned(method, family, copy.deepcopy(base))
    accelerate(fast)
    expected = evaluated(fast, inputs)
    fast.save_pretrained(tmp_path)
    swapped = copy.deepcopy(base)
    accelerate(swapped)
    for other in (unpacked(copy.deepcopy(base)), swapped):
        loaded = PeftModel.from_pretrained(other, tmp_path)
        torch.testing.assert_close(evaluated(loaded, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [method for method, family in CASES if family == "llama"])
def test_generation(method):
    stock = unpacked(tuned(method, "llama", base_of("llama"))).eval()
    fast = copy.deepcopy(stock)
    accelerate(fast)
    given = {name: t for name, t in METHODS[method].inputs.items() if name == "task_ids"}
    prompt = torch.arange(10).view(2, 5)
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    theirs, ours = (
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **given,
            **options,
        )
        for model in (stock, fast)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.sequences.shape[1] > 5
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
