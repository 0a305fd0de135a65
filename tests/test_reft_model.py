"""Edits on whole models: against the edits by hand, under checkpointing, compilation, copies and threads."""

import copy
import inspect
import io
import pickle
import threading

import pytest
import torch
from peft_models import to_kind, unpacked
from reft_models import (
    MODELS,
    by_hand,
    columns_of,
    gradients,
    ragged,
    reft_llama,
    same,
    tiny_bert,
    tiny_llama,
    train_tensors,
)
from torch import nn
from transformers import BertForTokenClassification, PreTrainedModel

from peft_fast import LoReFTConfig, ReftModel, UnsupportedLayer, get_reft_model

LAYOUTS = {
    "shared": {"positions": "f2+l2"},
    "separate": {"positions": "f2+l3", "share_weights": False},
    "first": {"positions": "f3"},
    "all": {"positions": "all"},
    "noreft": {"positions": "f2+l2", "variant": "noreft"},
    "one layer": {"positions": "f2+l2", "layers": [1]},
}

CHECKPOINTING = [
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(PreTrainedModel, name)
]
"""The new name and the old one; a version of transformers has one or both."""

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model, **inputs):
    return model(**inputs).logits.detach()


def causal(inputs):
    """Labels of every token that is not padding."""
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_the_edits_by_hand(name, layout, side):
    base = MODELS[name]()
    model = get_reft_model(copy.deepcopy(base), LoReFTConfig(r=4, **LAYOUTS[layout]))
    inputs = ragged(side=side)
    with by_hand(base, model, columns_of(inputs["attention_mask"])):
        expected = logits(base, **inputs)
    assert not torch.allclose(logits(base, **inputs), expected, atol=1e-3)
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_the_edits_by_hand():
    base = tiny_llama()
    model = get_reft_model(copy.deepcopy(base), LoReFTConfig(r=4, positions="f2+l2", share_weights=False))
    inputs = ragged()
    torch.manual_seed(1)
    weights = torch.randn(3, 9, 64)
    got = gradients(model, (model(**inputs).logits * weights).sum())
    with by_hand(base, model, columns_of(inputs["attention_mask"])):
        loss = (base(**inputs).logits * weights).sum()
        wanted = dict(zip(got, torch.autograd.grad(loss, list(train_tensors(model).values())), strict=True))
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4, msg=name)
        assert gradient.abs().max() > 0, name


class TupleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h):
        return h + self.linear(h), "more"


class TupleModel(nn.Module):
    """A model that is none of transformers', whose blocks return tuples."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 8})()
        self.embed, self.stack = nn.Embedding(10, 8), nn.ModuleList(TupleBlock() for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        for block in self.stack:
            h, more = block(h)
            assert more == "more"
        return h


def test_blocks_that_return_tuples():
    base = TupleModel()
    model = get_reft_model(copy.deepcopy(base), LoReFTConfig(r=2, positions="f1+l1"))
    ids, mask = torch.randint(0, 10, (2, 6)), torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with by_hand(base, model, columns_of(mask)):
        expected = base(ids, mask)
    torch.testing.assert_close(model(ids, mask), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"share_weights": False},
        *({"variant": v} for v in ("loreft", "noreft", "direft", "nodireft", "lobireft")),
    ],
)
def test_identity_starts_as_the_base_bit_for_bit(options):
    base, inputs = tiny_llama(), ragged()
    expected = logits(base, **inputs)
    model = get_reft_model(base, LoReFTConfig(r=4, positions="f2+l2", init="identity", **options))
    assert torch.equal(logits(model, **inputs), expected)
    assert any(g.abs().max() > 0 for g in gradients(model, model(**inputs).logits.square().sum()).values())


def test_the_class_changes_and_nothing_else():
    base = tiny_llama()
    stock, block, signature = type(base), type(base.model.layers[0]), inspect.signature(base.forward)
    keys, text = set(base.state_dict()), repr(base)
    model = get_reft_model(base, LoReFTConfig(r=4))
    assert model is base
    assert isinstance(model, stock) and isinstance(model, ReftModel) and type(model) is not stock  # noqa: PT018
    assert str(type(model)) == str(stock)
    assert isinstance(model.model.layers[0], block)
    assert inspect.signature(model.forward) == signature
    assert inspect.signature(model.generate) == inspect.signature(stock.generate.__get__(base))
    assert {k for k in model.state_dict() if ".reft." not in k} == keys
    assert set(train_tensors(model)) == {k for k in set(model.state_dict()) - keys if "base" not in k}
    assert model.can_generate()
    with pytest.raises(UnsupportedLayer, match="model: expected one without edits"):
        get_reft_model(model, LoReFTConfig(r=4))
    assert model.unload() is base
    assert type(base) is stock and type(base.model.layers[0]) is block  # noqa: PT018
    assert repr(base) == text
    assert set(base.state_dict()) == keys
    get_reft_model(base, LoReFTConfig(r=4))  # and again


def test_unload_gives_back_the_bits():
    base, inputs = tiny_llama(), ragged()
    before, expected = copy.deepcopy(base.state_dict()), logits(base, **inputs)
    model = get_reft_model(base, LoReFTConfig(r=4))
    model(**inputs).logits.sum().backward()
    model.unload()
    assert same(before, base.state_dict())
    assert torch.equal(logits(base, **inputs), expected)
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())


def test_copies_and_pickles_are_models_of_their_own():
    model, inputs = reft_llama(), ragged()
    expected = logits(model, **inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert type(other) is type(model)
        assert torch.equal(logits(other, **inputs), expected)
    copies[0].edits["0.all"].bias.data.add_(1.0)
    assert not torch.equal(logits(copies[0], **inputs), expected)
    assert torch.equal(logits(model, **inputs), expected)
    assert torch.equal(logits(copies[1].unload(), **inputs), logits(copies[2].unload(), **inputs))


def test_state_dicts_load_strictly():
    torch.manual_seed(1)
    model, other, inputs = reft_llama(), reft_llama(), ragged()
    assert not torch.equal(logits(model, **inputs), logits(other, **inputs))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(model, **inputs), logits(other, **inputs))


# ------------------------------------------------------------------------------------------ checkpointing &c.


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("partly", [True, False])
@pytest.mark.parametrize("enable", CHECKPOINTING)
def test_checkpointing_changes_no_gradient(enable, partly, reentrant, share_weights):
    model = reft_llama(share_weights=share_weights, dropout=0.3).train()
    inputs = ragged()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            getattr(model, enable)({"use_reentrant": reentrant})
            assert all(block.gradient_checkpointing for block in model.reft_blocks.values())
            model.reft_blocks[1].gradient_checkpointing = not partly
        torch.manual_seed(5)
        loss = model(**inputs, labels=causal(inputs)).loss
        loss.backward()
        results.append({"loss": loss.detach(), **{n: p.grad for n, p in train_tensors(model).items()}})
        model.zero_grad(set_to_none=True)
    assert same(*results)
    assert all(tensor.abs().max() > 0 for tensor in results[0].values())


def test_each_backward_recomputes_the_rows_of_its_own_forward():
    model = reft_llama().train()
    one, two = ragged(side="left"), ragged(side="right")
    expected = [gradients(model, model(**x, labels=causal(x)).loss) for x in (one, two)]
    assert not same(*expected)
    getattr(model, CHECKPOINTING[0])({"use_reentrant": False})
    losses = [model(**x, labels=causal(x)).loss for x in (one, two)]
    assert same(gradients(model, losses[0]), expected[0])
    assert same(gradients(model, losses[1]), expected[1])


def test_a_block_called_from_outside_raises():
    model = reft_llama()
    with pytest.raises(RuntimeError, match=r"block 0: .*activation_checkpointing_enable"):
        model.model(**ragged())


@pytest.mark.parametrize("options", [{}, {"share_weights": False}, {"positions": "all"}])
def test_the_whole_model_compiles_to_one_graph(options):
    model, inputs = reft_llama(**options), ragged()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []

    def run(model_or_compiled):
        loss = model_or_compiled(**inputs, labels=causal(inputs)).loss
        results.append({"loss": loss.detach(), **gradients(model, loss)})

    fresh = threading.Thread(target=run, args=(compiled,))  # where no forward has run before
    fresh.start()
    fresh.join()
    run(model)
    got, expected = results
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    again = ragged(side="right")  # other rows, same graph
    torch.testing.assert_close(logits(compiled, **again), logits(model, **again), rtol=1e-5, atol=1e-6)


def test_threads_do_not_see_each_other():
    model = reft_llama()
    batches = [ragged(side="left"), ragged(side="right")]
    expected = [logits(model, **x) for x in batches]
    assert not torch.equal(*expected)
    barrier, wrong = threading.Barrier(2), []

    def work(i):
        barrier.wait()
        wrong.extend(i for _ in range(50) if not torch.equal(logits(model, **batches[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_hidden_states_are_the_edited_ones():
    base = tiny_llama()
    model = get_reft_model(copy.deepcopy(base), LoReFTConfig(r=4, positions="f2+l2"))
    inputs = ragged()
    with by_hand(base, model, columns_of(inputs["attention_mask"])):
        expected = base(**inputs, output_hidden_states=True).hidden_states
    got = model(**inputs, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- dtypes and bases


@pytest.mark.parametrize("whole", [False, True])
def test_a_bfloat16_model(whole):
    base = tiny_llama().to(torch.bfloat16)
    model = get_reft_model(copy.deepcopy(base), LoReFTConfig(r=4, positions="f2+l2"))
    assert all(p.dtype == torch.float32 for p in train_tensors(model).values())
    if whole:
        model.to(torch.bfloat16)
        assert all(p.dtype == torch.bfloat16 for p in train_tensors(model).values())
    R = model.edits["0.all"].rows()
    assert R.dtype == torch.float32
    torch.testing.assert_close(R @ R.T, torch.eye(4), rtol=0, atol=1e-6)
    inputs = ragged()
    with by_hand(base, model, columns_of(inputs["attention_mask"])):
        expected = logits(base, **inputs)
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=2**-6, atol=2**-6)
    grads = gradients(model, model(**inputs, labels=causal(inputs)).loss)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads.values())


def test_an_nf4_base():
    base = unpacked(to_kind(tiny_llama(), "nf4"))
    model = get_reft_model(copy.deepcopy(base), LoReFTConfig(r=4, positions="f2+l2"))
    inputs = ragged()
    with by_hand(base, model, columns_of(inputs["attention_mask"])):
        expected = logits(base, **inputs)
    torch.testing.assert_close(logits(model, **inputs), expected, rtol=1e-5, atol=1e-5)
    grads = gradients(model.train(), model(**inputs, labels=causal(inputs)).loss)
    assert all(g.abs().max() > 0 for g in grads.values())
    trainable, total = model.get_nb_trainable_parameters()
    assert total - trainable == sum(p.numel() for p in tiny_llama().parameters())


# ------------------------------------------------------------------------------------------- what is a prompt


def test_labels_and_prompt_lengths_mark_the_prompt():
    model, inputs = reft_llama(), ragged(side="left")
    n = inputs["attention_mask"].sum(1)
    lengths = torch.tensor([6, 4, 2])
    labels = inputs["input_ids"].clone()
    for b in range(3):
        labels[b, : 9 - n[b] + lengths[b]] = -100
    by_labels = logits(model, **inputs, labels=labels)
    by_lengths = logits(model, **inputs, prompt_lengths=lengths)
    whole = logits(model, **inputs)
    assert torch.equal(by_labels, by_lengths)
    assert not torch.equal(by_labels, whole)
    assert torch.equal(logits(model, **inputs, labels=causal(inputs)), whole)
    assert torch.equal(logits(model, **inputs, labels=labels, prompt_lengths=n), whole)
    expected = tiny_llama().to(torch.float32)
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if ".reft." not in k})
    prompts = [c[:length] for c, length in zip(columns_of(inputs["attention_mask"]), lengths, strict=True)]
    with by_hand(expected, model, prompts):
        torch.testing.assert_close(by_lengths, logits(expected, **inputs), rtol=1e-5, atol=1e-5)


def test_labels_of_a_model_that_does_not_generate_mark_nothing():
    """Those of a classifier of tokens begin behind its first token, and those of a masked model anywhere."""
    config = LoReFTConfig(r=4, positions="f2+l2")
    model, inputs = get_reft_model(BertForTokenClassification(tiny_bert().config).eval(), config), ragged()
    labels = torch.full((3, 9), -100)
    labels[:, 7:] = 1
    assert torch.equal(logits(model, **inputs, labels=labels), logits(model, **inputs))
    assert not hasattr(model, "generate")


def test_positional_arguments_and_embeddings_are_understood():
    model, inputs = reft_llama(), ragged()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = logits(model, **inputs)
    assert torch.equal(model(ids, mask).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)
    assert not torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            {"attention_mask": torch.ones(3, 1, 9, 9)},
            r"attention_mask: expected \[B, S\] = \[3, 9\], got \[3, 1",
        ),
        ({"attention_mask": torch.ones(3, 8)}, r"attention_mask: expected .* got \[3, 8\]"),
        ({"attention_mask": {"full": None}}, "attention_mask: expected .* got dict"),
        (
            {"prompt_lengths": torch.ones(2, dtype=torch.int64)},
            r"prompt_lengths: expected integers \[B\] = \[3\]",
        ),
        ({"prompt_lengths": torch.ones(3)}, "prompt_lengths: expected integers"),
        ({"prompt_lengths": [1, 2, 3]}, "prompt_lengths: expected integers"),
        ({"input_ids": None, "attention_mask": None}, "input_ids: expected them"),
    ],
)
def test_inputs_that_do_not_fit_raise(wrong, match):
    model = reft_llama()
    with pytest.raises(ValueError, match=match):
        model(**{**ragged(), **wrong})
    logits(model, **ragged())  # nothing is left behind
