"""The examples of other fields: each method learns on a vision, a protein and a speech model over NF4."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import adaptation
import protein
import speech
import vision

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = {**protein.EXAMPLES, **speech.EXAMPLES, "vit": vision.EXAMPLES["vit"]}
CASES = [
    (name, method)
    for name in FIELDS
    for method in adaptation.METHODS
    if (name, method) != ("whisper", "loreft")
]
STEPS = 40


@pytest.fixture(scope="module")
def bases():
    """Each field's example, and its model when it has learned the first kind of data, made once."""
    made = {}

    def base(name):
        if name not in made:
            example = FIELDS[name]()
            torch.manual_seed(0)
            model = example.model()
            adaptation.fit(model, example.source[0], 150, 2e-3, batch_size=32)
            made[name] = example, model
        example, model = made[name]
        return example, copy.deepcopy(model)

    return base


def first_examples(example, count=48):
    """A batch that is the same in every step, so that its loss may only fall."""
    (inputs, labels), _ = example.target
    return {name: tensor[:count] for name, tensor in inputs.items()}, labels[:count]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_method_learns(bases, name, method):
    """From its own parameters alone: the head stays as it is."""
    example, model = bases(name)
    adaptation.quantize(model, "nf4")
    adapted = adaptation.attach(model, method, example.exclude)
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    lr = adaptation.LEARNING_RATES.get(method, 2e-2)
    losses = adaptation.fit(adapted, first_examples(example), STEPS, lr)
    assert losses[-1] < 0.9 * losses[0], losses
    for n, p in adapted.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n]), n


@pytest.mark.parametrize("model", ["convnext", "resnet"])
def test_lora_learns_on_convolutional_networks(model):
    """ResNet's convolutions by PEFT's own layers, ConvNeXt's pointwise ones by fused ones."""
    example = vision.EXAMPLES[model]()
    network = example.model()
    adaptation.fit(network, example.source[0], 20, 2e-3, batch_size=32)
    adapted = adaptation.attach(network, "lora")
    losses = adaptation.fit(adapted, first_examples(example), STEPS, 1e-2)
    assert losses[-1] < 0.9 * losses[0], losses


def test_command_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vision.py", "--model", "vit", "--method", "lora", "--steps", "30"])
    quick = vision.EXAMPLES["vit"]()._replace(pretraining_steps=20)
    adaptation.main({"vit": lambda: quick}, "")
    words = capsys.readouterr().out.split()
    assert words[:2] == ["vit", "lora"]
    before, after = float(words[words.index("->") - 1]), float(words[words.index("->") + 1])
    assert after > before
