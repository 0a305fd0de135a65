"""Stock transformers trainers with `TrainerCheckpoints` go on from, and go back to, what they wrote."""

from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from peft_fast import (
    AdapterConfig,
    LoReFTConfig,
    TrainerCheckpoints,
    get_adapter_model,
    get_reft_model,
    quantize,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Tuner(TrainerCheckpoints, Trainer):
    pass


def make_model(method):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(vocab_size=99, **sizes))
    quantize(base)
    if method in PROMPTS:
        return get_peft_model(base, PROMPTS[method]())
    if method == "loreft":
        model = get_reft_model(base, LoReFTConfig(r=4))
        model.classifier.requires_grad_(True)
        return model
    return get_adapter_model(base, AdapterConfig(method, target_modules=["query", "value"]))


PROMPTS = {
    "p-tuning": lambda: PromptEncoderConfig("SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=32),
    "projected prefix": lambda: PrefixTuningConfig(
        "SEQ_CLS", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=32
    ),
}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def make_tuner(method, folder, **options):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(99, (8, 12), generator=generator)
    data = [{"input_ids": row, "labels": int(row[0] > row[1])} for row in ids]
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, **{"learning_rate": 0.01, **options},
    )  # fmt: skip
    return Tuner(make_model(method), arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("method", ["loreft", "s2lora", "p-tuning", "projected prefix"])
def test_training_goes_on_to_the_same_bits(method, tmp_path):
    whole = make_tuner(method, tmp_path)
    before = trained(whole.model)
    whole.train()
    expected = trained(whole.model)
    assert any(not torch.equal(before[name], expected[name]) for name in expected)
    again = make_tuner(method, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    got = trained(again.model)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("method", ["loreft", "ssf", "p-tuning", "projected prefix"])
def test_the_best_model_comes_back_at_the_end(method, tmp_path):
    """Of two checkpoints the one of the smaller loss, and, asked for, of the larger."""
    best = set()
    for larger in (False, True):
        tuner = make_tuner(
            method, tmp_path / str(larger), load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
            greater_is_better=larger,
        )  # fmt: skip
        tuner.train()
        checkpoint = tuner.state.best_model_checkpoint
        best.add(Path(checkpoint).name)
        expected = make_tuner(method, tmp_path)
        expected._load_from_checkpoint(checkpoint)
        got = trained(tuner.model)
        assert all(torch.equal(got[name], tensor) for name, tensor in trained(expected.model).items())
    assert best == {"checkpoint-2", "checkpoint-4"}
