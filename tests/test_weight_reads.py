"""Layers whose weight the model reads behind their back are found and left alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_fast import accelerate
from peft_fast.weight_reads import ANY, reads_weight, weight_reads


def test_multihead_attention_reads_the_weight_of_its_projection():
    assert weight_reads(nn.MultiheadAttention) == {("out_proj",)}
    model = get_peft_model(
        nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)}), LoraConfig(target_modules=["out_proj"])
    )
    with pytest.warns(UserWarning, match="0 layers fused"):
        report = accelerate(model)
    assert len(report.left) == 1


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))
        self.inner = nn.ModuleDict({"f": nn.Linear(4, 4)})
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    @property
    def of_d(self):
        return self.d.weight

    def helper(self, x):
        return x @ self.b.weight.t()

    def never(self):
        return self.c.weight

    def forward(self, x):
        assert self.a.weight.dtype == x.dtype
        assert isinstance(self.a.weight, torch.Tensor)
        assert self.a.weight is not None
        return self.helper(self.a(x)) @ self.of_d + self.inner.f.weight.sum() + self.layers[0].weight.sum()


class Child(Reader):
    def forward(self, x):
        return super().forward(x) + self.e.weight.norm()


class Overridden(Reader):
    def forward(self, x):
        return self.a(x)


def test_reads_are_found_through_methods_properties_and_super():
    read = {("b",), ("d",), ("inner", "f"), ("layers", ANY)}
    assert weight_reads(Reader) == read
    assert weight_reads(Child) == read | {("e",)}
    assert weight_reads(Overridden) == frozenset()
    assert reads_weight(Reader, "layers.1")
    assert not reads_weight(Reader, "layers")
    assert not reads_weight(Reader, "a")
    assert weight_reads(type("NoSource", (nn.Module,), {"forward": eval("lambda self, x: x")})) == frozenset()


def test_a_read_layer_is_left_and_its_neighbours_are_fused():
    model = get_peft_model(nn.ModuleDict({"reader": Reader()}), LoraConfig(target_modules="all-linear"))
    report = accelerate(model)
    assert [row.name.rpartition("reader.")[2] for row in report.fused] == ["a", "c", "e"]
    for row in report.left:
        assert row.reason == "Reader uses its .weight without calling it, so an adapter on it has no effect"
