"""Accelerated models do what stock PEFT does: every behaviour × {dense, NF4} × its methods."""

import copy
import importlib

import pytest
from behaviours import BEHAVIOURS, Run, assert_same, go_through
from peft.tuners.lora import bnb as lora_bnb
from peft_models import KINDS, adapted_layers

from peft_fast import accelerate, restore
from peft_fast.peft_layers import STOCK

THEMES = ("adapters", "attached", "autograd", "libraries", "merging", "models", "saving", "training")
for theme in THEMES:
    importlib.import_module(f"behaviours_{theme}")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True)
def _stock_unmerges_exactly(monkeypatch):
    """PEFT's own 4-bit layers get their weight back, as accelerated ones do, for the comparison."""
    stock, merge, unmerge = lora_bnb.Linear4bit, lora_bnb.Linear4bit.merge, lora_bnb.Linear4bit.unmerge

    def merge_from_a_copy(layer, *args, **kwargs):
        if type(layer) is stock and not layer.merged:
            vars(layer)["before"] = copy.deepcopy(layer.base_layer.weight)
        merge(layer, *args, **kwargs)

    def unmerge_to_it(layer):
        unmerge(layer)
        if "before" in vars(layer):
            layer.base_layer.weight = copy.deepcopy(vars(layer)["before"])

    monkeypatch.setattr(stock, "merge", merge_from_a_copy)
    monkeypatch.setattr(stock, "unmerge", unmerge_to_it)


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        pytest.param(name, kind, method, id=f"{name}-{kind}-{method}")
        for name, behaviour in BEHAVIOURS.items()
        for kind in KINDS
        for method in behaviour.methods
    ],
)
def test_as_stock_peft(name, kind, method):
    behaviour = BEHAVIOURS[name]
    stock = behaviour.build(kind, method)
    fast = copy.deepcopy(stock)
    report = accelerate(fast)
    assert {type(layer) for layer in adapted_layers(stock)}.isdisjoint(STOCK)
    if behaviour.left is None:
        assert not report.left, report
    else:
        assert {row.reason for row in report.left if behaviour.left in row.reason}, report
    runs = [Run(model, kind, method, fast=model is fast) for model in (stock, fast)]
    raised = [go_through(behaviour, run) for run in runs]
    shown, expected = runs[1].shown, runs[0].shown
    failure, refusal = (behaviour.of(texts, kind, method) for texts in (behaviour.fails, behaviour.raises))
    if failure is not None:
        assert failure in raised[0]
        assert raised[1] is None
        shown = {what: shown[what] for what in expected}  # up to where stock PEFT broke
    else:
        assert raised[1] == raised[0]
        assert (raised[0] is None) == (refusal is None), raised[0]
        assert refusal is None or refusal in raised[0]
    assert list(shown) == list(expected)
    for what, (value, rounding) in expected.items():
        assert_same(f"{name}: {what}", shown[what][0], value, rounding)
    restore(runs[1].model)
    assert [type(m) for m in runs[1].model.modules()] == [type(m) for m in runs[0].model.modules()]
