"""PeftFastCallback in a transformers Trainer: the same training as stock PEFT's, by fused layers."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import fused_calls, lora_layers, tiny_bert, to_kind, unpacked
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_fast import PeftFastCallback, UnsupportedLayer, restore
from peft_fast.peft_layers import STOCK

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows(Dataset):
    """Eight rows of tokens, and hidden states to come near."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        torch.manual_seed(i)
        return {"input_ids": torch.randint(50, (6,)), "labels": torch.randn(6, 64)}


class MeanSquares(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        states = model(**inputs).last_hidden_state
        loss = torch.nn.functional.mse_loss(states, labels)
        return (loss, {"states": states}) if return_outputs else loss


def adapted(kind):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["query", "value", "dense"], lora_dropout=0.1)
    return unpacked(get_peft_model(to_kind(tiny_bert(), kind), config))


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, seed=0,
        logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        label_names=["labels"],
    )  # fmt: skip
    return MeanSquares(args=arguments, train_dataset=Rows(), eval_dataset=Rows(), model=model, **options)


def train(it):
    evaluated = it.evaluate()["eval_loss"]  # before training, where bitsandbytes would repack
    it.train()
    losses = [row["loss"] for row in it.state.log_history if "loss" in row]
    return [evaluated, *losses, it.evaluate()["eval_loss"]]


def test_training_is_stock_pefts(kind, tmp_path):
    stock = adapted(kind)
    fast = copy.deepcopy(stock)
    expected = train(trainer(stock, tmp_path / "stock"))
    callback, before = PeftFastCallback(strict=True), fused_calls()
    it = trainer(fast, tmp_path / "fast", callbacks=[callback])
    fused = 10 if kind == "dense" else 12  # and the 4-bit layers without an adapter
    assert len(callback.report.fused) == fused
    assert train(it) == pytest.approx(expected, rel=1e-5)
    assert fused_calls() > before
    assert restore(fast) == fused
    for (name, a), b in zip(stock.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_a_model_made_for_each_training_is_swapped(tmp_path):
    callback = PeftFastCallback(backend="cpu-scalar")
    it = trainer(None, tmp_path, callbacks=[callback], model_init=lambda: adapted("nf4"))
    first = it.model
    it.train()
    assert it.model is not first
    assert {layer.backend for layer in lora_layers(it.model)} == {"cpu-scalar"}


def test_what_came_after_the_trainer_was_made_is_swapped_at_the_start_of_training(tmp_path):
    callback = PeftFastCallback()
    model = adapted("dense")
    it = trainer(model, tmp_path, callbacks=[callback])
    assert len(callback.report.fused) == 10
    restore(model)
    model.add_adapter("more", LoraConfig(r=2, target_modules=["key"]))
    it.train()
    assert len(callback.report.fused) == 12
    assert all(type(layer) in STOCK for layer in lora_layers(model))


def test_layers_swapped_before_they_are_sharded_stay_fused(tmp_path, monkeypatch):
    model = adapted("dense")
    it = trainer(model, tmp_path, callbacks=[PeftFastCallback()])
    monkeypatch.setattr("peft_fast.callback._is_sharded", lambda of: of is model)
    monkeypatch.setattr("peft_fast.callback.accelerate", lambda *_, **__: pytest.fail("swapped again"))
    it.train()
    assert all(type(layer) in STOCK for layer in lora_layers(model))


def test_what_is_left_is_a_warning(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("peft_fast.callback.logger.warning", told.append)
    config = LoraConfig(r=2, target_modules=["query", "word_embeddings"])
    trainer(get_peft_model(tiny_bert(), config), tmp_path, callbacks=[PeftFastCallback()])
    assert len(told) == 1
    assert "Embedding has no fused counterpart" in told[0]


def test_added_later_it_swaps_at_the_start_of_training(tmp_path):
    it = trainer(adapted("dense"), tmp_path)
    callback = PeftFastCallback()
    it.add_callback(callback)
    assert callback.report is None
    it.train()
    assert callback.report.fused


def test_options_are_those_of_accelerate(tmp_path):
    with pytest.raises(UnsupportedLayer):
        trainer(tiny_bert(), tmp_path, callbacks=[PeftFastCallback(strict=True)])
    with pytest.raises(ValueError, match="backend: expected"):
        trainer(adapted("dense"), tmp_path, callbacks=[PeftFastCallback(backend="warp")])
