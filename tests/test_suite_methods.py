"""The methods and formats of the suite on tiny layers: each provider is right, and a wrong one is found."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft_fast.bench import checks, layers, measure, registry, suite
from peft_fast.bench.methods import METHODS

K, N, R, M = 128, 64, 16, 5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def make(method: str, format: str, dtype: str = "bfloat16", dropout: float = 0.0) -> registry.Case:
    rank = R if R in registry.METHODS[method].ranks else 0
    return registry.Case("lora_linear", format, method, K, N, rank, M, dtype, dropout)


ROWS = [
    *((method, "nf4-nested", 0.0) for method in METHODS),
    *(("lora", format, 0.0) for format in ("int8", "fp8", "mxfp4", "dense")),
    ("vera", "int8", 0.1),
    ("ia3", "int8", 0.0),
    ("ia3-in", "dense", 0.0),
]


def test_each_method_and_format_has_a_row():
    fused = {name for name, row in registry.METHODS.items() if row.op == "lora_linear"}
    assert fused == set(METHODS) == set(registry.GRADIENTS)
    assert {format for _, format, _ in ROWS} >= set(registry.FORMATS) - {"nf4", "fp4"}


@pytest.mark.parametrize(("method", "format", "dropout"), ROWS)
def test_providers_compute_the_definition(method, format, dropout):
    """Ours, PEFT's layer after `accelerate`, and PEFT's own where bitsandbytes has a layer of the format."""
    case = make(method, format, dropout=dropout)
    operands = suite._operands(case, "cpu")
    checker = suite.Checker(case, operands)
    for name in ("ours", "accelerated", "peft"):
        reason = suite.entry(name).cannot(case, "cpu")
        if name == "peft" and format in layers.OURS_ALONE:
            assert reason == f"bitsandbytes has no {format} layer"
            continue
        assert reason is None
        found = suite.prepare(name, case, operands, checker, "cpu")
        assert found.errors.error <= found.errors.allowed
        expected = layers.results(method)
        got = layers.by_layer(method, found.step)
        assert tuple(got) == expected
        assert all(value.any() for value in got.values())


@pytest.mark.parametrize("method", ["vera", "ia3", "ia3-in"])
def test_a_wrong_gradient_of_a_vector_is_found(method):
    case = make(method, "nf4-nested", "float32")
    operands = suite._operands(case, "cpu")
    for i, name in enumerate(METHODS[method].trained):
        step = suite._step(suite.entry("ours"), case, operands, "cpu")
        trained = [p for p in step.layer.parameters() if p.requires_grad]
        trained[i].register_hook(lambda grad: 1.001 * grad)
        with pytest.raises(measure.Inexact, match=f"ours: {name}: relative error"):
            checks.Checker(case, operands).check("ours", step, step)


@pytest.mark.parametrize("format", registry.FORMATS)
def test_bytes_of_a_weight_are_those_that_it_has(format):
    case = make("lora", format)._replace(K=2**14 // N)  # whole groups of nested scales
    weight = layers.from_linear(layers.base_linear(suite._operands(case, "cpu"), torch.bfloat16))
    parts = [weight.weight, weight.absmax, weight.nested_absmax if weight.format == "nf4" else None]
    size = sum(part.nbytes for part in parts if part is not None)
    beside = 2 * M * (case.K + N) + 4 * R * (case.K + N) + 4 * M * R
    assert registry.work(case)["forward"].bytes == size + beside
