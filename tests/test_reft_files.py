"""Edits on disk: the same bits and the same training after a load, errors for what does not fit."""

import copy
import json
import os

import pytest
import torch
from reft_models import (
    VOCAB,
    copy_edits,
    gradients,
    ragged,
    reft_llama,
    same,
    tiny_llama,
    train_tensors,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaModel,
    Trainer,
    TrainingArguments,
)

from peft_fast import LoReFTConfig, ReftModel, UnsupportedWeight
from peft_fast.reft import export_pyreft, files, import_pyreft

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")
FILES = ("adapter_model.safetensors", "reft_config.json")


def base_of(model) -> nn.Module:
    return copy.deepcopy(model).unload()


def logits(model, inputs) -> torch.Tensor:
    return model(**inputs).logits.detach()


def train(model, optimizer, steps, seed=0) -> list[torch.Tensor]:
    losses = []
    for step in range(steps):
        torch.manual_seed(100 * seed + step)
        inputs = ragged()
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model.train()(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    return losses


def adamw(model, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(train_tensors(model).values(), lr=0.02, **options)


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_has_the_same_bits(tmp_path, variant, share_weights):
    options = {"variant": variant, "share_weights": share_weights, "layers": [1], "dropout": 0.2}
    model, inputs = reft_llama(**options), ragged()
    base = base_of(model)
    train(model, adamw(model), 2)
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted(FILES)
    loaded = ReftModel.from_pretrained(base, str(tmp_path / "a" / "b"))
    assert loaded is base
    assert loaded.reft_config == model.reft_config
    assert same(copy_edits(loaded), copy_edits(model))
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path, dtype):
    model = reft_llama().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = ReftModel.from_pretrained(base_of(model), tmp_path)
    assert {t.dtype for t in train_tensors(loaded).values()} == {dtype}
    assert same(copy_edits(loaded), copy_edits(model))
    with pytest.raises(TypeError, match=r"0\.all\.source: expected torch.float32, got"):
        reft_llama().load_edits(tmp_path)


def test_a_file_does_not_know_where_the_blocks_are(tmp_path):
    model = reft_llama()
    model.save_pretrained(tmp_path)
    assert "0.all.basis.rotation" in load_file(tmp_path / FILES[0])
    inner = LlamaModel(model.config)
    inner.load_state_dict(base_of(model).model.state_dict())
    loaded = ReftModel.from_pretrained(inner.eval(), tmp_path)
    inputs = ragged()
    expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(loaded(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("variant", ["loreft", "nodireft"])
def test_training_goes_on_in_the_same_bits(tmp_path, variant, in_place):
    model = reft_llama(variant=variant, dropout=0.1, share_weights=False)
    fresh = copy.deepcopy(model) if in_place else base_of(model)
    optimizer = adamw(model, weight_decay=0.1)
    train(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, 10, seed=1)

    if in_place:
        again, before = adamw(fresh, weight_decay=0.1), list(train_tensors(fresh).values())
        fresh.load_edits(tmp_path)
        assert all(a is b for a, b in zip(before, train_tensors(fresh).values(), strict=True))
    else:
        fresh = ReftModel.from_pretrained(fresh, tmp_path)
        again = adamw(fresh, weight_decay=0.1)
    again.load_state_dict(state)
    assert torch.equal(torch.stack(train(fresh, again, 10, seed=1)), torch.stack(expected))
    assert same(copy_edits(fresh), copy_edits(model))


def test_weight_decay_keeps_rows_orthonormal(tmp_path):
    model = reft_llama()
    start = {place: edit.rows().detach() for place, edit in model.edits.items()}
    optimizer = adamw(model, weight_decay=0.1)
    losses = train(model, optimizer, 30)
    model.save_pretrained(tmp_path)
    loaded = ReftModel.from_pretrained(base_of(model), tmp_path)
    train(loaded, adamw(loaded, weight_decay=0.1), 20)
    assert losses[-1] < losses[0]
    for place, edit in loaded.edits.items():
        R = edit.rows().detach()
        torch.testing.assert_close(R @ R.T, torch.eye(4), rtol=0, atol=1e-6)
        assert (R - start[place]).abs().max() > 0.05


# --------------------------------------------------------------------------------------------- what is wrong


def changed(change):
    """A way to spoil the tensors of a file."""

    def spoil(directory):
        tensors = load_file(directory / FILES[0])
        change(tensors)
        save_file(tensors, directory / FILES[0])

    return spoil


def reconfigured(**options):
    def spoil(directory):
        config = json.loads((directory / FILES[1]).read_text())
        (directory / FILES[1]).write_text(json.dumps({**config, **options}))

    return spoil


def cut(name):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-9])


NAN = torch.tensor(float("nan"))
SPOILED = {
    "missing": (
        changed(lambda t: t.pop("1.all.bias")),
        ValueError,
        r"1\.all\.bias: expected a tensor, got none",
    ),
    "extra": (
        changed(lambda t: t.update(x=torch.ones(2))),
        ValueError,
        r"x: expected no such tensor, got \[2\]",
    ),
    "shape": (
        changed(lambda t: t.update({"0.all.source": torch.ones(4, 31)})),
        ValueError,
        r"0\.all\.source: expected \[4, 32\], got \[4, 31\]",
    ),
    "dtype": (
        changed(lambda t: t.update({"0.all.bias": torch.ones(4, dtype=torch.int8)})),
        TypeError,
        r"0\.all\.bias: expected .*float32, got torch.int8",
    ),
    "nan": (
        changed(lambda t: t["0.all.basis.rotation"][1].fill_(NAN)),
        ValueError,
        "rotation: expected finite",
    ),
    "signs": (changed(lambda t: t["0.all.basis.base_sign"].zero_()), ValueError, "base_sign: expected signs"),
    "cut weights": (cut(FILES[0]), ValueError, "adapter_model.safetensors: expected a safetensors file"),
    "cut config": (cut(FILES[1]), ValueError, "reft_config.json: expected JSON"),
    "no weights": (lambda d: (d / FILES[0]).unlink(), FileNotFoundError, "adapter_model.safetensors"),
    "no config": (lambda d: (d / FILES[1]).unlink(), FileNotFoundError, "reft_config.json"),
    "option": (reconfigured(rank=3), ValueError, "reft_config.json: rank: expected an option of"),
    "value": (reconfigured(positions="x"), ValueError, "reft_config.json: positions: expected"),
    "variant": (reconfigured(variant="noreft"), ValueError, "reft_config.json: expected the options that"),
    "variant, without sums": (
        lambda d: (reconfigured(variant="noreft")(d), changed(len)(d)),
        ValueError,
        "variant: expected|basis: expected a tensor",
    ),
    "list": (lambda d: (d / FILES[1]).write_text("[]"), ValueError, "expected a JSON object, got list"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_files_that_do_not_fit_change_nothing(tmp_path, spoiled):
    spoil, error, match = SPOILED[spoiled]
    reft_llama().save_pretrained(tmp_path)
    spoil(tmp_path)
    model = reft_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        model.load_edits(tmp_path)
    assert same(before, model.state_dict())
    base = tiny_llama()
    base.model.embed_tokens.requires_grad_(False)
    trained, text = list(train_tensors(base)), repr(base)
    with pytest.raises(error, match=match):
        ReftModel.from_pretrained(base, tmp_path)
    assert not isinstance(base, ReftModel)
    assert (list(train_tensors(base)), repr(base)) == (trained, text)


@pytest.mark.parametrize("failing", FILES)
def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch, failing):
    reft_llama().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replace = os.replace

    def full_disk(part, file):
        if file.name == failing:
            raise OSError("no space left")
        replace(part, file)

    monkeypatch.setattr(os, "replace", full_disk)
    torch.manual_seed(5)
    with pytest.raises(OSError, match="no space left"):
        reft_llama().save_pretrained(tmp_path)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[failing] == before[failing]


def test_a_state_dict_is_saved_in_place_of_the_parameters(tmp_path):
    model = reft_llama()
    state = {name: tensor + 1 if "bias" in name else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(load_file(tmp_path / FILES[0])["0.all.bias"], model.edits["0.all"].bias + 1)
    del state["model.layers.1.reft.all.bias"]
    with pytest.raises(ValueError, match=r"state_dict: expected 'model.layers.1.reft.all.bias'"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize("quantized", [False, True])
def test_trainer_trains_and_saves_the_edits(tmp_path, quantized):
    options = {}
    if quantized:
        options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    model = files.build(base, LoReFTConfig(r=4), lambda model: None)
    before = copy_edits(model)
    ids = torch.randint(0, VOCAB, (4, 16))
    data = [{"input_ids": row, "labels": row, "prompt_lengths": torch.tensor(8)} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_steps=2, disable_tqdm=True, remove_unused_columns=False, gradient_checkpointing=True,
        learning_rate=0.01,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    after = copy_edits(model)
    assert all(not torch.equal(before[n], after[n]) for n in train_tensors(model))
    saved = tmp_path / "run" / "checkpoint-2"
    assert not (saved / "model.safetensors").exists()
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    assert same(copy_edits(ReftModel.from_pretrained(fresh, saved)), after)


# ---------------------------------------------------------------------------------------------------- pyreft


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pyreft_files_round_trip(tmp_path, variant, share_weights):
    model, inputs = reft_llama(variant=variant, share_weights=share_weights), ragged()
    base = base_of(model)
    train(model, adamw(model), 2)
    for edit in model.edits.values():  # pyreft's own dtypes
        if edit.source is not None:
            edit.source.data, edit.bias.data = edit.source.data.bfloat16(), edit.bias.data.bfloat16()
    export_pyreft(model, tmp_path)
    loaded = import_pyreft(base, tmp_path, positions="f2+l2")
    for place, edit in model.edits.items():
        other = loaded.edits[place]
        assert torch.equal(other.bias, edit.bias)
        assert other.bias.dtype == edit.bias.dtype
        if edit.source is not None:
            assert torch.equal(other.source, edit.source)
            assert other.source.dtype == edit.source.dtype
        torch.testing.assert_close(other.rows(), edit.rows(), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)
    grads = gradients(loaded, loaded(**inputs).logits.square().sum())
    assert all(g.abs().max() > 0 for g in grads.values())


def intervention(directory, layer=0, k=0):
    return directory / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#{k}.bin"


def rewritten(change):
    def spoil(directory):
        state = torch.load(intervention(directory))
        change(state)
        torch.save(state, intervention(directory))

    return spoil


def redescribed(change):
    def spoil(directory):
        config = json.loads((directory / "config.json").read_text())
        change(config)
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


FIELD = {"component": 1, "rank": 4, "block": 0}


def represented(i, field, value):
    return redescribed(lambda config: config["representations"][i].__setitem__(FIELD[field], value))


ORTHONORMAL = "rotate_layer: .*orthonormal"
PYREFT_SPOILED = {
    "not orthonormal": (rewritten(lambda s: s["rotate_layer"].mul_(0.9)), ValueError, ORTHONORMAL),
    "zeroed": (rewritten(lambda s: s["rotate_layer"].zero_()), ValueError, ORTHONORMAL),
    "missing": (rewritten(lambda s: s.pop("bias")), ValueError, "bias: expected a tensor, got none"),
    "extra": (rewritten(lambda s: s.update(x=torch.ones(1))), ValueError, "x: expected no such tensor"),
    "shape": (rewritten(lambda s: s.update(weight=torch.ones(4, 8))), ValueError, r"weight: .*\[4, 8\]"),
    "nan": (rewritten(lambda s: s["weight"].fill_(NAN)), ValueError, "weight: expected finite"),
    "no file": (lambda d: intervention(d).unlink(), FileNotFoundError, "#0.bin"),
    "cut": (lambda d: intervention(d).write_bytes(b"PK\x03\x04 cut"), ValueError, "expected tensors"),
    "config": (lambda d: (d / "config.json").write_text("{}"), ValueError, "expected what pyreft saves"),
    "type": (
        redescribed(lambda c: c.update(intervention_types=["<class 'mine.Own'>"] * 4)),
        UnsupportedWeight,
        "intervention_types: expected",
    ),
    "component": (represented(1, "component", "mlp_output"), UnsupportedWeight, "expected outputs of blocks"),
    "rank": (represented(1, "rank", 5), UnsupportedWeight, "low_rank_dimension: expected one"),
    "block": (represented(3, "block", 0), UnsupportedWeight, "expected one intervention in each block"),
}


@pytest.mark.parametrize("spoiled", PYREFT_SPOILED)
def test_pyreft_files_that_do_not_fit_change_nothing(tmp_path, spoiled):
    spoil, error, match = PYREFT_SPOILED[spoiled]
    export_pyreft(reft_llama(share_weights=False), tmp_path)
    spoil(tmp_path)
    base = tiny_llama()
    text, trained = repr(base), list(train_tensors(base))
    with pytest.raises(error, match=match):
        import_pyreft(base, tmp_path, positions="f2+l2")
    assert (repr(base), list(train_tensors(base))) == (text, trained)


def test_weights_for_both_ends_need_both_ends(tmp_path):
    export_pyreft(reft_llama(share_weights=False), tmp_path)
    with pytest.raises(ValueError, match="positions: expected first and last ones"):
        import_pyreft(tiny_llama(), tmp_path, positions="f2")
