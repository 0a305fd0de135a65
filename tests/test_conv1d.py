"""transformers' Conv1D, whose weight is stored as [K, N]: read in place by each backend, fused under PEFT."""

import copy

import pytest
import torch
from cases import HALF, Case, check
from peft import LoraConfig, get_peft_model
from peft_models import fused_calls, lora_layers, rescale
from tolerances import assert_as_exact
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from peft_fast import DoRALinear, LoRALinear, accelerate, dequantize, explain, native, restore
from peft_fast.formats import from_linear

K, N = 24, 40


def transposed(case: Case) -> Case:
    """The same weight, stored as [K, N]."""
    case.weight = case.weight._replace(weight=case.weight.weight.t().contiguous().t())
    assert not case.weight.weight.is_contiguous()
    return case


# ---------------------------------------------------------------------------------------------------- the op


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("out_scale", [False, True])
def test_every_dtype(backend, dtype, out_scale):
    check(transposed(Case.make("dense", (2, 9), 96, 40, 5, dtype=dtype, out_scale=out_scale)), backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("M", "K", "N", "R"), [(1, 64, 16, 16), (3, 65, 33, 7), (50, 37, 130, 2)])
def test_awkward_shapes(backend, M, K, N, R):
    check(transposed(Case.make("dense", (M,), K, N, R, dropout_p=0.2)), backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [f"cpu-{level}" for level in native.levels()])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 601, 50), (4, 515, 47), (20, 601, 531), (33, 130, 1030)])
def test_several_panels_and_a_part_of_one(backend, dtype, M, K, N):
    check(transposed(Case.make("dense", (M,), K, N, 3, dtype=dtype)), backend)


@pytest.mark.parametrize("shape", [(33, 65), (300, 7), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_dequantized_is_the_weight(shape, dtype):
    layer = Conv1D(*shape).to(dtype)
    assert torch.equal(dequantize(from_linear(layer), dtype), layer.weight.t())


def test_other_strides_are_taken():
    layer = Conv1D(N, K)
    layer.weight = torch.nn.Parameter(torch.randn(K, 2 * N)[:, ::2])
    x = torch.randn(3, K)
    torch.testing.assert_close(LoRALinear.from_linear(layer)(x), x @ layer.weight + layer.bias)


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
def test_a_new_layer_equals_its_base(cls):
    base = Conv1D(N, K)
    layer = cls.from_linear(base, r=3)
    assert (layer.in_features, layer.out_features) == (K, N)
    x = torch.randn(2, 5, K)
    torch.testing.assert_close(layer(x), base(x))
    if cls is DoRALinear:
        torch.testing.assert_close(layer.magnitude.data, torch.linalg.vector_norm(base.weight, dim=0))


# --------------------------------------------------------------------------------------------------- in PEFT


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def stock(request):
    """A tiny GPT-2 whose four kinds of Conv1D have adapters; attention's c_proj is square."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    lora = LoraConfig(
        r=4, lora_alpha=12, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
        init_lora_weights=False, use_dora=request.param,
    )  # fmt: skip
    model = get_peft_model(GPT2LMHeadModel(config), lora)
    for layer in lora_layers(model):
        if request.param:
            rescale(layer)
    return model


TOKENS = torch.arange(24).view(2, 12) % 50


def results(model):
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


def test_gpt2_equals_peft(stock):
    fast = copy.deepcopy(stock)
    report = accelerate(fast, strict=True)
    assert len(report.fused) == 8
    assert "PEFT's own forward" not in explain(fast)
    plain, truth, before = results(stock), results(copy.deepcopy(stock).double()), fused_calls()
    got = results(fast)
    assert fused_calls() - before >= 8  # and DoRA's norms
    for name, value in truth.items():
        assert_as_exact(name, got[name], plain[name], value)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_is_undone_by_unmerging(stock, safe_merge):
    fast = copy.deepcopy(stock)
    accelerate(fast, strict=True)
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    logits = fast(input_ids=TOKENS).logits
    fast.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(fast(input_ids=TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    fast.unmerge_adapter()
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast(input_ids=TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


def test_it_trains_as_peft_and_restores(stock):
    fast = copy.deepcopy(stock)
    accelerate(fast, strict=True)
    for model in (stock, fast):
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for _ in range(3):
            results(model)
            optimizer.step()
    assert restore(fast) == 8
    ours = fast.state_dict()
    assert ours.keys() == stock.state_dict().keys()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_compiles_into_one_graph(stock):
    fast = copy.deepcopy(stock)
    accelerate(fast, strict=True)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=TOKENS).logits, fast(input_ids=TOKENS).logits)
