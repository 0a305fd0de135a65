"""Generation with edits on the prompt alone: with and without a cache, in batches, beams and chunks."""

import copy
import threading

import pytest
import torch
from reft_models import by_hand, columns_of, ragged, reft_llama, tiny_gpt2, tiny_llama

from peft_fast import LoReFTConfig, get_reft_model

pytestmark = pytest.mark.usefixtures("one_thread")

NEW = 6
LAYOUTS = {
    "shared": {"positions": "f2+l2"},
    "separate": {"positions": "f3+l2", "share_weights": False},
    "all": {"positions": "all"},
}


@pytest.fixture(params=LAYOUTS)
def model(request):
    return reft_llama(**LAYOUTS[request.param])


def generated(model, inputs, **options) -> torch.Tensor:
    """[B, NEW] new tokens, greedy unless told otherwise; the end token does not end them."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **{**settings, **options})[:, inputs["input_ids"].shape[1] :]


def base_of(model):
    """A copy of the model without its edits."""
    return copy.deepcopy(model).unload()


def greedy_by_hand(model, inputs) -> torch.Tensor:
    """A loop without a cache, the prompt's columns edited in every step, by hooks on the bare base."""
    prompts = columns_of(inputs["attention_mask"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with by_hand(base_of(model), model, prompts) as base, torch.no_grad():
        for _ in range(NEW):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            scores = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
            scores[:, base.config.eos_token_id] = -torch.inf
            ids = torch.cat((ids, scores.argmax(1, keepdim=True)), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=["cache", "no cache", "static cache", "chunked prefill"],
)
def test_greedy_equals_a_loop_that_edits_the_prompt_alone(model, options):
    inputs = ragged(length=11)
    expected = greedy_by_hand(model, inputs)
    assert torch.equal(generated(model, inputs, **options), expected)
    assert not torch.equal(generated(base_of(model), inputs, **options), expected)


def test_without_padding_there_is_no_mask(model):
    inputs = ragged(batch=1)
    expected = greedy_by_hand(model, inputs)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        alone = {"input_ids": inputs["input_ids"]}
        assert torch.equal(generated(model, alone, **options), expected), options
    ids = model.generate(inputs["input_ids"], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(ids[:, 9:], expected)


def test_a_row_does_not_depend_on_its_batch(model):
    inputs = ragged(length=11)
    together = generated(model, inputs)
    for b, columns in enumerate(columns_of(inputs["attention_mask"])):
        single = {name: tensor[b : b + 1, columns] for name, tensor in inputs.items()}
        assert torch.equal(generated(model, single), together[b : b + 1])


def test_beams_with_and_without_a_cache(model):
    inputs = ragged(length=8)
    beams = generated(model, inputs, num_beams=3, num_return_sequences=3)
    assert torch.equal(generated(model, inputs, num_beams=3, num_return_sequences=3, use_cache=False), beams)
    assert len(beams) == 9
    assert not torch.equal(generated(base_of(model), inputs, num_beams=3, num_return_sequences=3), beams)
    for b, columns in enumerate(columns_of(inputs["attention_mask"])):
        single = {name: tensor[b : b + 1, columns] for name, tensor in inputs.items()}
        alone = generated(model, single, num_beams=3, num_return_sequences=3)
        assert torch.equal(alone, beams[3 * b : 3 * b + 3])


def test_sampling_with_and_without_a_cache(model):
    inputs, results = ragged(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generated(model, inputs, do_sample=True, num_return_sequences=2, use_cache=use_cache))
    assert torch.equal(*results)


def test_gpt2_and_embeddings():
    model = get_reft_model(tiny_gpt2(), LoReFTConfig(r=4, positions="f2+l2"))
    inputs = ragged()
    expected = greedy_by_hand(model, inputs)
    assert torch.equal(generated(model, inputs), expected)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    ids = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ids, expected)


def test_prompt_lookup_decoding_drafts_without_edits(model):
    """Candidates are part of the first forward already; they are no prompt."""
    inputs = ragged(batch=1)
    repeated = {name: torch.cat((t, t, t), 1) for name, t in inputs.items()}
    expected = greedy_by_hand(model, repeated)
    assert torch.equal(generated(model, repeated, prompt_lookup_num_tokens=3), expected)


def test_padding_that_generate_finds_itself():
    """It makes a mask of the pad tokens, which forward does not always see."""
    model, inputs = reft_llama(), ragged()
    alone = {"input_ids": inputs["input_ids"]}
    expected = greedy_by_hand(model, inputs)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        assert torch.equal(generated(model, alone, **options), expected), options


def test_steps_behind_a_cache_edit_nothing():
    model, inputs = reft_llama(), ragged(batch=1)
    with torch.no_grad():
        prompt = model(**inputs, use_cache=True)
        step = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "past_key_values": prompt.past_key_values}
        after = model(**step).logits
        with by_hand(base_of(model), model, [list(range(9))]) as base:
            ids = torch.cat((inputs["input_ids"], step["input_ids"]), 1)
            expected = base(input_ids=ids).logits
    torch.testing.assert_close(torch.cat((prompt.logits, after), 1), expected, rtol=1e-5, atol=1e-5)


def test_threads_generate_their_own_prompts():
    model = reft_llama()
    batches = [ragged(length=11), ragged(length=5)]
    expected = [generated(model, x, use_cache=False) for x in batches]
    got = {}

    def work(i):
        got[i] = [generated(model, batches[i], use_cache=False) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(tokens, expected[i]) for i in range(2) for tokens in got[i])


def test_an_error_leaves_nothing_behind():
    model, inputs = reft_llama(), ragged()
    expected = model(**inputs).logits
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**inputs, nonsense=1)
    longer = {name: torch.cat((t, torch.ones_like(t)), 1) for name, t in inputs.items()}
    assert torch.equal(model(**inputs).logits, expected)
    with by_hand(base_of(model), model, columns_of(longer["attention_mask"])) as base:
        torch.testing.assert_close(model(**longer).logits, base(**longer).logits, rtol=1e-5, atol=1e-5)


def test_the_identity_generates_as_its_base():
    base, inputs = tiny_llama(), ragged()
    expected = generated(base, inputs)
    model = get_reft_model(base, LoReFTConfig(r=4, init="identity"))
    assert torch.equal(generated(model, inputs), expected)
