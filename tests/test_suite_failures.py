"""Providers that raise in the suite, before or after their check: what is left, and what is written."""

from __future__ import annotations

import math
import warnings

import pytest
from peft_fast.bench import providers, records, registry, suite
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture(scope="module")
def options():
    return suite.Options(seconds=0.0, compiled=False, cold=False)


@pytest.fixture(scope="module")
def case():
    return registry.Case("lora_linear", "nf4-nested", "lora", 128, 64, 4, 5, "bfloat16", 0.0)


def patched(monkeypatch, name, layer):
    monkeypatch.setitem(providers.PROVIDERS, name, providers.PROVIDERS[name]._replace(layer=layer))


def test_a_peer_that_fails_is_left_out_with_its_error(case, options, monkeypatch):
    def broken(case, operands):
        raise RuntimeError("no such kernel\nand more")

    patched(monkeypatch, "peft", broken)
    (block,) = suite.blocks([case], ["peft", "ours"], options)
    assert [o.reason for o in block.outcomes] == ["RuntimeError: no such kernel", None]
    assert not any(o.red for o in block.outcomes)
    patched(monkeypatch, "ours", broken)
    (block,) = suite.blocks([case], ["ours"], options)
    assert [(o.reason, o.red) for o in block.outcomes] == [("RuntimeError: no such kernel", True)]


class Fragile(nn.Module):
    """A layer that runs `calls` times."""

    def __init__(self, layer, calls):
        super().__init__()
        self.inner, self.calls = layer, calls

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("out of luck")
        return self.inner(x)


def fragile(monkeypatch, case, name, calls):
    """Makes a provider's layer of this case one that fails; the small one that warms its code up is not."""
    build = providers.PROVIDERS[name].layer

    def layer(of, operands):
        return Fragile(build(of, operands), calls if of == case else math.inf)

    patched(monkeypatch, name, layer)


CALLS = {"first run": 1, "samples": 4, "memory": 7}
"""One is the check's, one the first of all, five are samples."""


@pytest.mark.parametrize("name", ["peft", "ours"])
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_a_provider_that_fails_after_its_check_is_dropped(case, options, monkeypatch, name, calls):
    fragile(monkeypatch, case, name, calls)
    names = ["dense-float32", "peft", "ours"]
    first, second = suite.blocks([case, case._replace(M=3)], names, options)
    reasons = {o.provider: o.reason for o in first.outcomes}
    assert reasons == {**dict.fromkeys(names), name: "RuntimeError: out of luck"}
    assert {o.provider for o in first.timed} == {*names} - {name}
    assert {o.provider for o in first.outcomes if o.red} == ({"ours"} if name == "ours" else set())
    assert all(o.memory is not None and len(o.spreads) == 3 for o in first.timed)
    (row,) = (r for r in records.records(first, options) if r["provider"] == name)
    assert (row["reason"], row["p50"], row["over_dense"]) == ("RuntimeError: out of luck", None, None)
    assert len(second.timed) == 3


@pytest.mark.parametrize("calls", [0, 1, 4, 13])
def test_without_the_dense_layer_a_case_has_no_figure(case, options, monkeypatch, calls):
    """In its check, then as above; its second turns run the same layer."""
    fragile(monkeypatch, case, "dense-float32", calls)
    names = ["ours", "dense-float32", "dense-bfloat16", "liger"]
    (block,) = suite.blocks([case], names, options)
    assert not block.timed
    assert not block.noisy
    ours, dense, other, liger = block.outcomes
    assert (dense.reason, dense.red) == ("RuntimeError: out of luck", True)
    assert ours.reason == other.reason == "dense-float32 failed, which ratios are over"
    assert not ours.red
    assert liger.reason.startswith("liger_kernel")


def test_a_weight_that_cannot_be_made_ends_its_case_alone(case, options, monkeypatch):
    def make(of, device, make=suite._operands):
        if of.format == "fp4":
            raise ValueError("format: expected nf4")
        return make(of, device)

    monkeypatch.setattr(suite, "_operands", make)
    cases = [case._replace(format="fp4"), case]
    first, second = suite.blocks(cases, ["dense-float32", "ours"], options)
    assert {o.reason for o in first.outcomes} == {"ValueError: format: expected nf4"}
    assert len(second.timed) == 2
