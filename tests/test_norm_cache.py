"""A norm is computed when, and only when, something it is made from has changed."""

import copy
import pickle
import threading

import pytest
import torch
from test_modules import K, N, make_base
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from peft_fast import DoRALinear, dora, norm_cache
from peft_fast.formats import from_linear
from peft_fast.norm_cache import NormCache

R = 4


def trained(kind: str = "dense", **options) -> DoRALinear:
    """A layer whose update is not zero, and whose magnitude is not the norm."""
    layer = DoRALinear.from_linear(make_base(kind), r=R, lora_alpha=6, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude.mul_(torch.rand(N) + 0.5)
    return layer


def fresh(layer: DoRALinear, x: torch.Tensor) -> torch.Tensor:
    """What a copy of the layer, which has no norms yet, computes."""
    return copy.deepcopy(layer)(x)


@pytest.fixture
def computed(monkeypatch):
    """How often norms and norms of base weights were computed."""
    counts = {"norm": 0, "squares": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(dora, "lora_weight_norm", counting("norm", dora.lora_weight_norm))
    monkeypatch.setattr(dora, "row_norms_squared", counting("squares", dora.row_norms_squared))
    return counts


@pytest.fixture(params=[True, False], ids=["by content", "by place"])
def by_content(request, monkeypatch):
    """The way of the CPU, and that of other devices."""
    if not request.param:
        monkeypatch.setattr(norm_cache, "COMPARED_BY_CONTENT", frozenset())
    return request.param


class ThroughData(torch.optim.Optimizer):
    """An optimizer that leaves no trace in `_version`."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.1)


def optimizing(make):
    def write(layer):
        optimizer = make([layer.lora_A, layer.lora_B, layer.magnitude])
        layer(torch.randn(3, K)).square().sum().backward()
        optimizer.step()

    return write


def adamw(**options):
    return optimizing(lambda params: torch.optim.AdamW(params, lr=0.1, **options))


def loading(layer):
    layer.load_state_dict({"lora_A": torch.randn(R, K), "lora_B": torch.randn(N, R)}, strict=False)


def swap(layer):
    torch.utils.swap_tensors(layer.lora_B, nn.Parameter(torch.randn(N, R)))


def to_bf16_and_back(layer):
    layer.lora_B.data = layer.lora_B.data.bfloat16()
    layer.lora_B.data = layer.lora_B.data.float()


TRACED = {
    "in place": lambda layer: layer.lora_A.detach().mul_(1.5),
    "load_state_dict": loading,
    "another parameter": lambda layer: setattr(layer, "lora_A", nn.Parameter(torch.randn(R, K))),
    "another data": lambda layer: setattr(layer.lora_A, "data", torch.randn(R, K)),
    "another rank": lambda layer: layer.__dict__["_parameters"].update(
        lora_A=nn.Parameter(torch.randn(2, K)), lora_B=nn.Parameter(torch.randn(N, 2))
    ),
    "swap_tensors": swap,
    "bfloat16 and back": to_bf16_and_back,
    "scaling": lambda layer: setattr(layer, "scaling", 0.25),
    "AdamW": adamw(foreach=False),
    "AdamW foreach": adamw(foreach=True),
    "AdamW fused": adamw(fused=True),
    "SGD": optimizing(lambda params: torch.optim.SGD(params, lr=0.1)),
    "optimizer through data": optimizing(ThroughData),
}
"""Writes to A, B or s that are noticed on every device."""

THROUGH_DATA = {
    "A.data": lambda layer: layer.lora_A.data.add_(0.1),
    "B.data": lambda layer: layer.lora_B.data.add_(0.1),
    "one element": lambda layer: layer.lora_B.data[3, 1].add_(1e-3),
    "numpy": lambda layer: layer.lora_A.detach().numpy().__setitem__((1, 2), 5.0),
    "B.data to NaN": lambda layer: layer.lora_B.data[3, 1].fill_(float("nan")),
}
"""Writes to A or B that leave no trace but the values."""


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("write", TRACED)
def test_a_change_of_the_adapter_is_noticed(computed, by_content, kind, write):
    layer, x = trained(kind), torch.randn(3, K)
    layer(x)
    layer(x)
    assert computed == {"norm": 1, "squares": 1}
    TRACED[write](layer)
    y = layer(x)
    layer(x)
    assert computed == {"norm": 2, "squares": 2 if write == "load_state_dict" else 1}
    assert torch.equal(y, fresh(layer, x))


@pytest.mark.parametrize("write", THROUGH_DATA)
def test_a_write_through_data_is_noticed_on_the_cpu(computed, write):
    layer, x = trained(), torch.randn(3, K)
    layer(x)
    THROUGH_DATA[write](layer)
    y = layer(x)
    assert computed["norm"] == 2
    layer(x)
    assert computed["norm"] == 2
    assert torch.equal(y.nan_to_num(7.0), fresh(layer, x).nan_to_num(7.0))


def test_reset_norm_is_for_what_other_devices_do_not_notice(computed, monkeypatch):
    monkeypatch.setattr(norm_cache, "COMPARED_BY_CONTENT", frozenset())
    layer, x = trained(), torch.randn(3, K)
    layer(x)
    layer.lora_A.data.add_(0.1)
    layer.reset_norm()
    assert torch.equal(layer(x), fresh(layer, x))


def another_weight(layer):
    layer.base_layer.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)


def requantized(layer):
    other = make_base("nf4")
    layer.base_layer.weight, layer.base_layer.quant_state = other.weight, other.quant_state


def other_format(layer):
    other = make_base("fp4", compress_statistics=False)
    layer.base_layer.weight, layer.base_layer.quant_state = other.weight, other.quant_state


def rounded_base(layer):
    """The address of the first weight may be used again by the last."""
    layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16()
    layer.base_layer.weight.data = layer.base_layer.weight.data.float()


WEIGHT_WRITES = {
    "another parameter": ("dense", another_weight),
    "another data": ("dense", lambda layer: setattr(layer.base_layer.weight, "data", torch.randn(N, K))),
    "in place": ("dense", lambda layer: layer.base_layer.weight.detach().mul_(2)),
    "load_state_dict": ("dense", lambda layer: layer.load_state_dict(trained().state_dict())),
    "bfloat16": ("dense", lambda layer: layer.base_layer.bfloat16().float()),
    "rounded": ("dense", rounded_base),
    "requantized": ("nf4", requantized),
    "other format": ("nf4", other_format),
    "absmax": ("nf4", lambda layer: layer.base_layer.weight.quant_state.offset.mul_(1.5)),
}


@pytest.mark.parametrize("write", WEIGHT_WRITES)
def test_a_change_of_the_base_weight_is_noticed(computed, by_content, write):
    kind, change = WEIGHT_WRITES[write]
    layer, x = trained(kind), torch.randn(3, K)
    layer(x)
    before = dict(computed)
    change(layer)
    initialised = computed["squares"] - before["squares"]  # by the change itself
    y = layer(x)
    layer(x)
    assert computed == {"norm": before["norm"] + 1, "squares": before["squares"] + initialised + 1}
    assert torch.equal(y, fresh(layer, x))


def test_a_base_weight_written_through_data_is_noticed_on_the_cpu():
    layer, x = trained(), torch.randn(3, K)
    layer(x)
    layer.base_layer.weight.data.mul_(2)
    assert torch.equal(layer(x), fresh(layer, x))


def test_addresses_used_again_are_not_mistaken(by_content):
    layer, x = trained(), torch.randn(3, K)
    for _ in range(20):
        layer(x)
        layer.base_layer.weight = None
        layer.base_layer.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
        layer.lora_A = None
        layer.lora_A = nn.Parameter(torch.randn(R, K))
        assert torch.equal(layer(x), fresh(layer, x))


def test_a_tensor_as_scaling(computed, by_content):
    layer, cache, scaling = trained(), NormCache(), torch.tensor(0.5)
    weight = from_linear(layer.base_layer)

    def norm(s):
        return cache.norm(layer.base_layer, weight, layer.lora_A, layer.lora_B, s)

    assert torch.equal(norm(scaling), norm(0.5))
    first = norm(scaling)
    assert norm(scaling) is first
    scaling.fill_(2.0)
    assert torch.equal(norm(scaling), dora.lora_weight_norm(weight, layer.lora_A, layer.lora_B, 2.0))


# ------------------------------------------------------------------------------------------- what is spared


def test_once_per_step_with_accumulation(computed, by_content):
    layer = trained(lora_dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        for _ in range(4):
            layer(torch.randn(3, K)).square().mean().backward()
        assert computed["norm"] == step + 1
        optimizer.step()
        optimizer.zero_grad()
    assert computed["squares"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_with_the_norm_of_its_forward(computed, by_content, reentrant):
    layer, x = trained(lora_dropout=0.3), torch.randn(3, K, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B, layer.magnitude)
    results = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(1)
        forward(x).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert computed["norm"] == 1
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_shares_the_norm_with_training(computed, by_content, context):
    layer, x = trained(), torch.randn(3, K, requires_grad=True)
    with context():
        layer.eval()(x)
    layer.train()(x).sum().backward()
    assert computed["norm"] == 1
    other = copy.deepcopy(layer)
    other.magnitude.grad = None
    other(x).sum().backward()
    assert torch.equal(layer.magnitude.grad, other.magnitude.grad)


def test_a_layer_made_in_inference_mode(computed, by_content):
    with torch.inference_mode():
        layer, x = trained(), torch.randn(3, K)
        layer(x)
        y = layer(x)
        assert computed["norm"] == 1
        assert torch.equal(y, fresh(layer, x))


def test_the_full_gradient_shares_the_norms_of_the_weight(computed, by_content):
    layer, x = trained(norm_grad="full"), torch.randn(3, K)
    for _ in range(3):
        layer(x).sum().backward()
    assert computed == {"norm": 3, "squares": 1}


def test_ddp_leaves_the_norm_alone(computed, by_content):
    layer = trained()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(layer)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        for step in range(2):
            for _ in range(2):
                parallel(torch.randn(3, K)).square().mean().backward()
            assert computed["norm"] == step + 1
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------- nothing kept


def test_selective_checkpointing_sees_the_same_ops_twice():
    layer, x = trained(), torch.randn(3, K, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B, layer.magnitude)
    saved = [torch.ops.aten.mm.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.mul.Tensor]

    def context():
        return create_selective_checkpoint_contexts(saved)

    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    y = checkpoint(lambda x: layer(x).square(), x, use_reentrant=False, context_fn=context)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_under_a_mode_nothing_is_kept(computed):
    layer, x = trained(), torch.randn(3, K)
    for count in (1, 2):
        with FlopCounterMode(display=False):
            layer(x)
        assert computed["norm"] == count


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_is_empty(copied):
    layer = trained()
    layer(torch.randn(3, K))
    assert layer.norms._norm is not None
    other = copied(layer.norms)
    assert other._norm is other._squares is None


def test_state_dict_and_buffers_hold_no_norm():
    layer = trained()
    layer(torch.randn(3, K))
    keys = {"lora_A", "lora_B", "magnitude", "base_layer.weight", "base_layer.bias"}
    assert set(layer.state_dict()) == keys
    assert not list(layer.buffers())


def test_nothing_is_kept_alive():
    layer = trained()
    layer(torch.randn(3, K))
    storages = [t.untyped_storage() for t in (layer.lora_A, layer.lora_B, layer.base_layer.weight)]
    weak = [StorageWeakRef(s) for s in storages]
    del storages
    layer.base_layer.weight = layer.lora_A = layer.lora_B = None
    assert all(w.expired() for w in weak)


# --------------------------------------------------------------------------------------------------- threads


def test_threads_share_a_layer():
    layer, x = trained("nf4"), torch.randn(3, K)
    expected, results = fresh(layer, x), []

    def work():
        for _ in range(20):
            layer.reset_norm()
            results.append(layer(x).detach())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(y, expected) for y in results)


def test_a_write_while_the_norm_is_computed_is_noticed(monkeypatch):
    layer, x, compute = trained(), torch.randn(3, K), dora.lora_weight_norm

    def disturbed(*args, **kwargs):
        layer.lora_A.data.add_(1)
        return compute(*args, **kwargs)

    monkeypatch.setattr(dora, "lora_weight_norm", disturbed)
    layer(x)
    monkeypatch.setattr(dora, "lora_weight_norm", compute)
    assert torch.equal(layer(x), fresh(layer, x))
