"""Options of the edits, which models they fit, and how many parameters they have."""

import json
import subprocess
import sys

import pytest
import torch
from reft_models import tiny_bert, tiny_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from peft_fast import LoReFT, LoReFTConfig, ReftModel, UnsupportedLayer, get_reft_model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "r": 4,
            "layers": [2, 0],
            "positions": "l3",
            "act_fn": "gelu",
            "dropout": 0.1,
            "dropout_on": "state",
        },
        {"component": "mlp.down_proj", "share_weights": False, "variant": "direft", "init": "identity"},
        {"blocks": "model.layers", "backend": "reference", "layers": (1,)},
    ],
)
def test_options_survive_json(options):
    config = LoReFTConfig(**options)
    assert LoReFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (
        config.layers == tuple(sorted(options["layers"])) if "layers" in options else config.layers == "all"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0}, {"r": 2.0}, {"r": True}, {"layers": "first"}, {"layers": []}, {"layers": [0, 0]},
        {"layers": [-1]}, {"layers": [1.0]}, {"layers": 3}, {"positions": "f0"}, {"positions": 7},
        {"component": ""}, {"component": None}, {"blocks": ""}, {"blocks": 3}, {"share_weights": 1},
        {"act_fn": "swish"}, {"dropout": 1.5}, {"dropout": "0"}, {"dropout": True}, {"dropout_on": "both"},
        {"variant": "reft"}, {"init": "zero"}, {"backend": "fast"}, {"act_fn": "relu", "variant": "lobireft"},
        {"act_fn": "relu", "variant": "consreft"}, {"init": "identity", "variant": "consreft"},
        {"init": "identity", "act_fn": "relu"}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_option_that_does_not_fit_is_named(wrong):
    name = next(iter(wrong))
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected .*got") as caught:
        LoReFTConfig.from_dict(wrong)
    assert str(next(iter(wrong.values()))) in str(caught.value) or name == "unknown"


def test_it_starts_as_pyreft_does():
    torch.manual_seed(3)
    edit = LoReFT(24, LoReFTConfig(r=4))
    torch.manual_seed(3)
    rotate, linear = nn.init.orthogonal_(torch.empty(24, 4)), nn.Linear(24, 4)
    torch.testing.assert_close(edit.rows(), rotate.T, rtol=0, atol=1e-6)
    assert torch.equal(edit.source, linear.weight)
    assert torch.equal(edit.bias, linear.bias)
    torch.manual_seed(3)
    edit = LoReFT(24, LoReFTConfig(r=4, variant="consreft"))
    torch.manual_seed(3)
    nn.init.orthogonal_(torch.empty(24, 4))
    assert torch.equal(edit.bias, torch.rand(4))


@pytest.mark.parametrize("variant", ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"])
def test_one_edit_alone(variant):
    edit = LoReFT(24, LoReFTConfig(r=4, variant=variant))
    h, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    x, R = h + residual, edit.rows()
    U = edit.bias if edit.source is None else x @ edit.source.T + edit.bias
    U = U - x @ R.T if variant in ("loreft", "noreft", "consreft") else U.expand(2, 5, 4)
    expected = (x + U @ R).flatten(0, 1)
    got = edit(h, residual=residual)
    assert got.shape == h.shape
    torch.testing.assert_close(got.flatten(0, 1), expected)
    rows = torch.tensor([7, -1, 2])
    got = edit(h, rows, residual).flatten(0, 1)
    torch.testing.assert_close(got[[2, 7]], expected[[2, 7]])
    others = [0, 1, 3, 4, 5, 6, 8, 9]
    assert torch.equal(got[others], x.flatten(0, 1)[others])
    assert torch.equal(edit(h, rows, residual, basis=R).flatten(0, 1), got)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = tiny_llama().config
        self.one, self.two = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

    def forward(self, input_ids):
        return input_ids


class Shared(Towers):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.ModuleList([nn.Linear(8, 8)] * 2), None


def offloaded():
    model = tiny_llama()
    model.model.layers[1].forward = model.model.layers[1].forward
    return model


def encoder_decoder():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize(
    ("make", "options", "error", "match"),
    [
        (Towers, {}, UnsupportedLayer, r"blocks: expected one of \['one', 'two'\]"),
        (Shared, {}, UnsupportedLayer, "blocks: expected different modules"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2)),
            {},
            UnsupportedLayer,
            "blocks: expected the path .*, got None",
        ),
        (tiny_llama, {"blocks": "model.blocks"}, UnsupportedLayer, "blocks: expected the path of a module"),
        (
            tiny_llama,
            {"blocks": "model.norm"},
            UnsupportedLayer,
            "blocks: expected the path of a list of blocks",
        ),
        (tiny_llama, {"layers": [0, 2]}, ValueError, "layers: expected indices below 2, got 2"),
        (tiny_llama, {"r": 33}, ValueError, "r: expected at most the hidden size 32, got 33"),
        (tiny_llama, {"component": "mlp"}, UnsupportedLayer, "component: expected the end of one path"),
        (offloaded, {}, UnsupportedLayer, "block 1: expected the forward of its class"),
        (encoder_decoder, {}, UnsupportedLayer, "model: expected one sequence of tokens"),
    ],
)
def test_a_model_that_does_not_fit_is_left_as_it_was(make, options, error, match):
    model = make()
    text, state = repr(model), [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(error, match=match):
        get_reft_model(model, LoReFTConfig(**options))
    assert not isinstance(model, ReftModel)
    assert (repr(model), [(n, p.requires_grad) for n, p in model.named_parameters()]) == (text, state)


def test_blocks_by_their_path():
    model = Towers()
    model = get_reft_model(model, LoReFTConfig(r=2, blocks="two", layers=[1]))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "two.1.reft.all.source", "two.1.reft.all.bias", "two.1.reft.all.basis.rotation",
    ]  # fmt: skip
    assert get_reft_model(tiny_bert(), LoReFTConfig()).reft_targets.path == "bert.encoder.layer"


def test_the_import_is_free():
    heavy = ("transformers", "peft", "bitsandbytes")
    code = f"import sys, peft_fast.reft; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# ------------------------------------------------------------------------------------------------- the survey


@pytest.mark.parametrize(
    ("sizes", "base", "share"),
    [((4096, 11008, 32, 32), 6_738_415_616, "0.031"), ((5120, 13824, 40, 40), 13_015_864_320, "0.025")],
)
def test_parameter_counts_of_the_survey(sizes, base, share, capsys):
    d, intermediate, layers, heads = sizes
    config = LlamaConfig(
        hidden_size=d, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = get_reft_model(model, LoReFTConfig())
    assert all(p.is_meta for p in model.parameters())
    trainable, total = model.get_nb_trainable_parameters()
    assert total - trainable == base
    assert trainable == layers * (2 * 8 * d + 8)
    assert f"{100 * trainable / total:.3f}" == share
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: "
        f"{100 * trainable / total:.4f}\n"
    )
