"""Models of many families train as under stock PEFT, and docs/compatibility.md says what they do."""

import families
import pytest
from families import DOCUMENT, FAMILIES, METHODS, outcome, parts, table
from peft_models import KINDS

from peft_fast import peft_lora

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # WavLM's q, k, v and out_proj, and the convolutions of ResNet, are meant to be left.
    pytest.mark.filterwarnings("ignore:accelerate"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_three_steps_equal_pefts(name, kind, method):
    result = outcome(name, kind, method)
    assert result.loss <= families.LOSS_BOUND
    assert result.update <= families.UPDATE_BOUND
    assert result.random
    assert result.fused
    # Fused layers never fall back; of the others, those that ran did so in PEFT's forward, and the rest the
    # model does not call at all, so that nothing trains there.
    left = {name for name, _ in result.left}
    assert set(result.own) <= left
    assert left - set(result.own) == set(result.untrained)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_scaling_is_noticed(kind, monkeypatch):
    fused = peft_lora.fused_lora_forward

    def wrong(*args, scaling, **kwargs):
        return fused(*args, scaling=1.01 * scaling, **kwargs)

    monkeypatch.setattr(peft_lora, "fused_lora_forward", wrong)
    result = outcome.__wrapped__("Llama", kind, "lora")
    assert result.update > 3 * families.UPDATE_BOUND
    assert not result.equal


def test_half_of_the_families_drop():
    dropping = [name for name, family in FAMILIES.items() if family.dropout]
    assert len(FAMILIES) >= 14
    assert abs(len(FAMILIES) - 2 * len(dropping)) <= 1


def test_the_documented_table_is_what_runs():
    """`python tests/families.py` writes it."""
    _, documented, _ = parts(DOCUMENT.read_text())
    assert documented == table()
