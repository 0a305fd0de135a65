"""Training jobs with LoReFT: that they learn, what they save, and that it loads to the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_jobs import WORDS, adapter, run, save_bert, save_llama, save_rows, tiny
from transformers import XLNetConfig, XLNetModel

import peft_fast
from peft_fast import LoReFTConfig, ReftModel, base_models, tasks
from peft_fast.config import TrainConfig


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data") / "rows.csv")


def tiny_loreft(bert, csv_file, output, **options):
    return tiny(bert, csv_file, output, **{"method": "loreft", "dropout": 0.0, **options})


def edits(metrics):
    return sum(metrics["layers"]["edits"].values())


def test_a_classification_learns_and_its_adapter_gives_the_same_logits(bert, csv_file, tmp_path, monkeypatch):
    saved = []
    save = ReftModel.save_pretrained
    monkeypatch.setattr(
        ReftModel, "save_pretrained", lambda model, *a, **k: (saved.append(model), save(model, *a, **k))
    )
    options = tiny_loreft(bert, csv_file, tmp_path, steps=60, eval_every=20, positions="f2+l2")
    metrics = run(options)
    assert metrics["accuracy"] > 0.9
    assert (metrics["layers"]["fused"], edits(metrics)) == (13, 2)
    r, d = 8, 64
    assert metrics["trainable_parameters"] == 2 * (2 * r * d + r) + 2 * d + 2
    described = json.loads((tmp_path / "adapter" / "reft_config.json").read_text())
    assert LoReFTConfig.from_dict(described) == LoReFTConfig(r=8, positions="f2+l2")

    base = base_models.load_base(options, bert, ["no", "yes"], torch.device("cpu"))
    peft_fast.accelerate(base, methods=("base",))
    model = ReftModel.from_pretrained(base, tmp_path / "adapter").eval()
    base_models.load_head(model, tmp_path / "adapter")
    tokenizer = base_models.load_tokenizer(options, bert)
    batch = tokenizer.pad(tasks.build(options, tokenizer).eval, return_tensors="pt")
    with torch.no_grad():
        expected, loaded = saved[-1].eval()(**batch), model(**batch)
    assert torch.equal(loaded.logits, expected.logits)
    assert loaded.loss.item() == pytest.approx(metrics["eval_loss"], abs=1e-5)


def test_fused_and_stock_take_the_same_path(bert, csv_file, tmp_path):
    fused, stock = (
        run(tiny_loreft(bert, csv_file, tmp_path / str(stock), stock=stock, dropout=0.1))
        for stock in (False, True)
    )
    assert (fused["layers"]["fused"], stock["layers"]["fused"]) == (13, 0)
    assert edits(fused) == edits(stock) == 2
    assert fused["loss"] == pytest.approx(stock["loss"], abs=2e-5)
    assert fused["eval_loss"] == pytest.approx(stock["eval_loss"], abs=2e-5)


@pytest.mark.parametrize(
    ("options", "fused", "edited"),
    [
        ({"component": "intermediate.dense", "positions": "all"}, 13, 2),
        ({"layers": "1", "share_weights": False}, 13, 2),
        ({"quant": "none", "init": "identity"}, 0, 2),
        ({"dtype": "bf16", "layers": "0"}, 13, 1),
    ],
)
def test_other_edits_formats_and_dtypes_train(bert, csv_file, tmp_path, options, fused, edited):
    metrics = run(tiny_loreft(bert, csv_file, tmp_path, **options))
    assert (metrics["layers"]["fused"], edits(metrics)) == (fused, edited)
    assert metrics["layers"]["left"] == {}
    assert {t.dtype for t in adapter(tmp_path).values()} == {torch.float32, torch.int8}
    head = load_file(tmp_path / "adapter" / "head.safetensors")
    assert {name: t.dtype for name, t in head.items()} == dict.fromkeys(
        ("classifier.weight", "classifier.bias"), torch.float32
    )
    assert min(metrics["loss"]) < metrics["loss"][0]


def test_a_causal_lm_learns_a_text_and_saves_no_head(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[:12]) for _ in range(60)))
    model = save_llama(tmp_path / "llama")
    places = {"model": model, "data": tmp_path / "text.txt", "output": tmp_path / "run"}
    options = {"steps": 30, "batch_size": 8, "lr": 2e-2, "eval_every": 10, "block_size": 24}
    metrics = run(TrainConfig(task="causal-lm", method="loreft", positions="all", **places, **options))
    losses = [e["loss"] for e in metrics["evaluations"]]
    assert losses[-1] < 0.6 * losses[0]
    assert {p.name for p in (tmp_path / "run" / "adapter").glob("*.safetensors")} == {
        "adapter_model.safetensors"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "g3"}, "positions: expected 'f7+l7'"),
        ({"layers": "0,x"}, "layers: expected 'all' or block indices as in '0,2', got '0,x'"),
        ({"layers": "1,1"}, "layers: expected different indices from 0 on, got [1, 1]"),
        ({"layers": "2"}, "layers: expected indices below 2, got 2"),
        ({"component": "dense"}, "component: expected the end of one path of"),
        ({"r": 65}, "r: expected at most the hidden size 64, got 65"),
        ({"backend": "abacus"}, "backend: expected 'auto' or one of ['cpu', "),
    ],
)
def test_bad_options_are_named(bert, csv_file, tmp_path, options, message):
    with pytest.raises((ValueError, peft_fast.UnsupportedLayer)) as error:
        run(tiny_loreft(bert, csv_file, tmp_path / "run", **options))
    assert message in str(error.value)


def test_an_option_that_does_not_parse_leaves_the_folder_alone(bert, csv_file, tmp_path):
    with pytest.raises(ValueError, match="positions: expected"):
        run(tiny_loreft(bert, csv_file, tmp_path / "run", positions="f0"))
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_head_is_refused(bert, csv_file, tmp_path):
    sizes = {"vocab_size": 62, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    XLNetModel(XLNetConfig(**sizes)).save_pretrained(tmp_path / "xlnet")
    base_models.load_tokenizer(TrainConfig(), bert).save_pretrained(tmp_path / "xlnet")
    with pytest.raises(ValueError, match=r"model: expected a head .* got \['transformer', .*'logits_proj'\]"):
        run(tiny_loreft(tmp_path / "xlnet", csv_file, tmp_path / "run"))


# --------------------------------------------------------------------------------------------------- head


@pytest.fixture
def model_with_head():
    model = torch.nn.Sequential()
    model.classifier = torch.nn.Linear(4, 2)
    return model


def test_a_head_is_saved_and_loaded_in_the_dtype_of_the_model(model_with_head, tmp_path):
    weight = model_with_head.classifier.weight.detach().clone()
    base_models.save_head(model_with_head, tmp_path)
    torch.nn.init.zeros_(model_with_head.classifier.weight)
    base_models.load_head(model_with_head.bfloat16(), tmp_path)
    assert torch.equal(model_with_head.classifier.weight, weight.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier.bias"), "classifier.bias: expected a tensor, got none"),
        (lambda t: t.update(score=torch.ones(1)), r"score: expected no such tensor, got \[1\]"),
        (lambda t: t.update({"classifier.bias": torch.ones(3)}), r"expected \[2\], got \[3\]"),
    ],
)
def test_a_head_that_does_not_fit_changes_nothing(model_with_head, tmp_path, change, message):
    before = {name: t.clone() for name, t in model_with_head.state_dict().items()}
    tensors = {name: torch.zeros_like(t) for name, t in before.items()}
    change(tensors)
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=message):
        base_models.load_head(model_with_head, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in model_with_head.state_dict().items())


def test_a_missing_or_broken_head_is_named(model_with_head, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"head\.safetensors: expected the head of a model"):
        base_models.load_head(model_with_head, tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"head\.safetensors: expected a safetensors file"):
        base_models.load_head(model_with_head, tmp_path)
