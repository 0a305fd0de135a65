"""Defects that others had, one test each: accelerated LoRA layers do not have them."""

import copy
import gc
import itertools
import threading

import bitsandbytes as bnb
import pytest
import torch
from cases import make_weight
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft_models import (
    HIDDEN,
    KINDS,
    WIDTH,
    Net,
    accelerated,
    assert_same_model,
    fused_calls,
    lora_config,
    lora_layers,
    run,
    stock_net,
    tiny_bert,
    to_4bit,
    to_kind,
    truth_of,
    unpacked,
)
from tolerances import FACTOR, assert_as_exact, relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import WavLMConfig, WavLMModel

from peft_fast import UnsupportedLayer, UnsupportedWeight, accelerate, lora_linear
from peft_fast.formats import BLOCK_SIZES, from_linear

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module to 4-bit",
    "ignore:Unmerge lora module to 4-bit",
    "ignore:.*was active which is now deleted",
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The models are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (3, 5)), WIDTH).to(dtype)


def one_layer(kind, dtype=torch.float32, **options):
    """An accelerated LoRA layer [HIDDEN, WIDTH] alone."""
    return lora_layers(accelerated(stock_net(kind, dtype, **options)))[0]


# ------------------------------------------------------------------------------------------ adapter semantics


def test_dx_includes_the_dropout_mask(kind):
    """fms-acceleration #97: the low-rank part of dX has to pass through the mask of the forward."""
    layer, x = one_layer(kind, lora_dropout=0.5), inputs().requires_grad_()
    A, B = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.5).double()
    grad = torch.randn_like(y)
    y.backward(grad)
    W = from_linear(layer.base_layer).decode(torch.float64)
    exact = grad.double() @ W + 3.0 * (grad.double() @ B @ A) * mask
    assert relative_error(x.grad, exact) < 1e-6


def test_dx_is_the_base_alone_when_everything_is_dropped(kind):
    """fms-acceleration #97, in the limit: p = 1 leaves nothing of the low-rank branch."""
    layer, x = one_layer(kind, lora_dropout=1.0), inputs().requires_grad_()
    y = layer(x)
    y.sum().backward()
    W = from_linear(layer.base_layer).decode(torch.float64)
    assert relative_error(y, x.double() @ W.t() + layer.base_layer.bias.double()) < 1e-6
    assert relative_error(x.grad, W.sum(0).expand_as(x)) < 1e-6


def test_dropout_does_not_skip_the_fused_op(kind):
    """axolotl #3806, unsloth #2319: with dropout > 0 their kernel is silently not used."""
    model, before = accelerated(stock_net(kind, lora_dropout=0.1)), fused_calls()
    model(inputs())
    assert fused_calls() == before + 2


def test_strict_raises_when_nothing_was_swapped():
    """unsloth #5865, #803: "0 layers patched" and training goes on unaccelerated."""
    with pytest.raises(UnsupportedLayer, match="0 layers fused"):
        accelerate(Net(), strict=True)
    with pytest.warns(UserWarning, match="0 layers fused"):
        accelerate(Net())


def test_two_active_adapters_add_up():
    """peft #2122: the second of two active adapters replaced the first."""
    stock = stock_net("dense")
    stock.add_adapter("other", lora_config(r=3))
    model, x = accelerated(stock), inputs()
    model.base_model.set_adapter(["default", "other"])
    active = model(x)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(model(x), active, rtol=1e-4, atol=1e-4)


def test_merged_lora_bias_is_scaled():
    """peft #2489: the bias of lora_B was merged without the scaling."""
    model, x = accelerated(stock_net("dense", lora_bias=True, r=4, lora_alpha=12)), inputs()
    unmerged = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-4)


def test_rounding_does_not_build_up_over_layers(kind):
    """peft #2238: a cast before instead of after the add accumulates over a deep bfloat16 model."""
    names = [str(i) for i in range(32)]
    stack = to_kind(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in names)), kind, torch.bfloat16)
    stock = unpacked(get_peft_model(stack, LoraConfig(r=4, lora_alpha=4, target_modules=names)))
    for layer in lora_layers(stock):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    x = inputs(dtype=torch.bfloat16)
    truth, plain, got = run(truth_of(stock), x.double()), run(stock, x), run(accelerated(stock), x)
    assert_as_exact("y", got["y"], plain["y"], truth["y"])
    # The error of one small gradient deep in the stack is a random walk: compare their mean.
    errors = [
        [relative_error(result[name], value) for name, value in truth.items()] for result in (got, plain)
    ]
    assert sum(errors[0]) <= FACTOR * sum(errors[1])


def test_another_alpha_needs_no_new_graph_each_time():
    """peft #2416: compiled code was traced again for every value of the scaling."""
    torch._dynamo.reset()
    graphs = []
    model, x = accelerated(stock_net("dense")), inputs()
    compiled = torch.compile(
        model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True
    )
    outputs = []
    for alpha in (12, 4, 2, 1, 8, 3):
        for layer in lora_layers(model):
            layer.scaling["default"] = alpha / 4
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], model(x))
    torch._dynamo.reset()
    assert len(graphs) == 2  # the first value is compiled in, the second makes it an input


def test_set_scale_keeps_rslora(kind):
    """peft #2775: set_scale forgot that an adapter is rank-stabilised."""
    stock = stock_net(kind, use_rslora=True, r=4, lora_alpha=12)
    model = accelerated(stock)
    for layer in (*lora_layers(stock), *lora_layers(model)):
        layer.set_scale("default", 0.5)
        assert layer.scaling["default"] == 0.5 * 12 / 4**0.5
    assert_same_model(stock, model, inputs(), calls=2)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapter_dtype_on_a_half_base(kind, autocast_adapter_dtype):
    """peft #2893: autocast_adapter_dtype was ignored on a quantized base."""
    model = get_peft_model(
        to_kind(Net(), kind, torch.bfloat16), lora_config(), autocast_adapter_dtype=autocast_adapter_dtype
    )
    accelerate(model, strict=True)
    expected = model.base_model.model.up.lora_A["default"].weight.dtype
    got = run(model, inputs(dtype=torch.bfloat16))
    assert {value.dtype for name, value in got.items() if "lora_" in name} == {expected}
    assert got["y"].dtype == got["dx"].dtype == torch.bfloat16
    assert autocast_adapter_dtype is False or kind == "nf4" or expected == torch.float32


def test_disable_adapter_ends_with_its_block(kind):
    """peft #367, #3507, #3555: after an exception, or nested, adapters stayed disabled."""
    model, x = accelerated(stock_net(kind)), inputs()
    expected = model(x)

    def fails():
        with model.disable_adapter(), model.disable_adapter():
            model(inputs(7)[..., :3])

    with pytest.raises((ValueError, RuntimeError)):
        fails()
    assert torch.equal(model(x), expected)


def test_deleting_a_merged_adapter(kind):
    """peft #3504: it stayed active. PEFT refuses now; after unmerging, the other adapter is applied alone."""
    stock = stock_net(kind)
    stock.add_adapter("other", lora_config(r=3))
    fast = accelerated(stock)
    for model in (stock, fast):
        model.merge_adapter(["default"])
        with pytest.raises(ValueError, match="while they are merged"):
            model.delete_adapter("default")
        model.unmerge_adapter()
        model.delete_adapter("default")
        model.set_adapter("other")
    assert_same_model(stock, fast, inputs(), calls=2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_sees_the_adapter_of_the_forward(kind, reentrant):
    """peft #2826, #2832: hooks under checkpointing gave zero gradients, for the wrong adapter."""
    stock = stock_net(kind, lora_dropout=0.2)
    stock.add_adapter("other", lora_config(r=3))
    model = accelerated(stock)
    for name in ("default", "other"):
        model.set_adapter(name)
        grads = []
        for forward in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
            model.zero_grad()
            torch.manual_seed(1)
            x = inputs().requires_grad_()
            forward(x).square().sum().backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert {n.split(".")[-2] for n in grads[0]} == {name}
        assert grads[0].keys() == grads[1].keys()
        assert all(torch.equal(grads[1][n], g) for n, g in grads[0].items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_frozen_inputs_trains_every_adapter(kind, reentrant):
    """transformers #26221: a reentrant checkpoint whose inputs are frozen left LoRA untrained."""
    bert = to_kind(tiny_bert(), kind)
    model = get_peft_model(bert, LoraConfig(target_modules=["query", "value"], init_lora_weights=True))
    accelerate(model, strict=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(torch.arange(12).view(2, 6)).last_hidden_state.square().sum().backward()
    optimizer.step()
    assert all(layer.lora_B["default"].weight.abs().max() > 0 for layer in lora_layers(model))


def test_a_tied_weight_stays_tied_and_untouched():
    """peft #2018, #2777, transformers #45127: an adapter corrupted the embedding tied to its base."""
    model = nn.ModuleDict({"embed": nn.Embedding(20, WIDTH), "head": nn.Linear(WIDTH, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    model.config = {"model_type": "custom"}
    peft_model = get_peft_model(model, LoraConfig(target_modules=["head"], init_lora_weights=False))
    accelerate(peft_model, strict=True)
    before = model["embed"].weight.clone()
    layer = lora_layers(peft_model)[0]
    layer(inputs()).sum().backward()
    assert layer.base_layer.weight is model["embed"].weight
    assert torch.equal(model["embed"].weight, before)


def test_accumulated_gradients_equal_those_of_the_batch(kind):
    """unsloth #1146, axolotl #2262: eight batches of one did not add up to one batch of eight."""
    model, x = accelerated(stock_net(kind)), inputs(8, 5)
    whole = torch.autograd.grad(model(x).square().mean(), [p for p in model.parameters() if p.requires_grad])
    for row in x:
        (model(row).square().mean() / 8).backward()
    parts = [p.grad for p in model.parameters() if p.requires_grad]
    for part, grad in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, grad, rtol=1e-4, atol=1e-5)


def test_wavlm_attention_is_refused():
    """WavLM hands `.weight` of its projections to F.multi_head_attention_forward: LoRA there does nothing."""
    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(8,),
        conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense"]
    model = get_peft_model(WavLMModel(config), LoraConfig(target_modules=targets))
    report = accelerate(model)
    assert {row.name.split(".")[-1] for row in report.left} == set(targets[:4])
    assert {row.name.split(".")[-1] for row in report.fused} == {"intermediate_dense"}
    assert all("WavLMAttention uses its .weight without calling it" in row.reason for row in report.left)


# --------------------------------------------------------------------------------------- layout, quantization


def test_strided_inputs(kind):
    """bitsandbytes #1342, #1690, #1995: a non-contiguous input was silently read as contiguous."""
    layer = one_layer(kind)
    for view in (
        inputs(6)[::2],
        inputs(4, 3).transpose(0, 1),
        torch.randn(WIDTH, 5).t(),
        inputs(1).expand(4, -1),
    ):
        assert not view.is_contiguous()
        strided, contiguous = view.detach().requires_grad_(), view.contiguous().requires_grad_()
        y, expected = layer(strided), layer(contiguous)
        assert torch.equal(y, expected)
        grad = torch.randn_like(y).transpose(0, -1).contiguous().transpose(0, -1)
        y.backward(grad)
        expected.backward(grad.contiguous())
        assert torch.equal(strided.grad, contiguous.grad)


def test_a_transposed_4bit_weight_is_refused():
    """bitsandbytes #1862: a weight quantized as [K, N] gave silently wrong results in gemv."""
    model = stock_net("nf4")
    base = lora_layers(model)[0].base_layer
    base.weight.quant_state.shape = torch.Size((WIDTH, HIDDEN))
    assert f"= [{HIDDEN}, {WIDTH}], got [{WIDTH}, {HIDDEN}]" in accelerate(model).left[0].reason


@pytest.mark.parametrize(("N", "K"), [(3, 5), (1, 1), (7, 9), (33, 65), (31, 64)])
def test_sizes_that_no_block_divides(backend, N, K):
    """bitsandbytes #1884: numel that no block divides; eval with N % 32 ≠ 0 or an odd K asserted."""
    layer = unpacked(nn.ModuleList([to_4bit(nn.Linear(K, N))]))[0].eval()
    weight, x = from_linear(layer).check(), torch.randn(4, K)
    y = lora_linear(x, weight, x.new_empty(0, K), x.new_empty(N, 0), layer.bias, backend=backend)
    exact = x.double() @ weight.decode(torch.float64).t() + layer.bias.double()
    assert relative_error(y, exact) < 1e-6


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_every_block_size_decodes_exactly(backend, format, blocksize):
    """bitsandbytes #1160, #1828, #2026: a wrong index type at 4096, AVX-512 inaccurate at large blocks, an
    FP4 constant truncated in one backend. An identity activation gives the weight itself, bit for bit."""
    weight = make_weight(format, 40, 128, blocksize=blocksize)
    eye = torch.eye(128)
    y = lora_linear(eye, weight, eye.new_empty(0, 128), eye.new_empty(40, 0), backend=backend)
    assert torch.equal(y.t(), weight.decode(torch.float32))


@pytest.mark.parametrize("blocksize", [0, -64, 1, 48, 2**31, 2**63, 2**64])
def test_hostile_block_sizes_are_refused(blocksize):
    """bitsandbytes #1071: a block size of 2**64 from a file raised SIGFPE."""
    with pytest.raises(UnsupportedWeight, match="blocksize: expected one of"):
        make_weight("nf4", 8, 64)._replace(blocksize=blocksize).check()
    model = stock_net("nf4")
    lora_layers(model)[0].base_layer.weight.quant_state.blocksize = blocksize
    assert "blocksize: expected one of" in accelerate(model).left[0].reason


def test_models_of_two_dtypes_do_not_share_a_buffer(kind):
    """axolotl #3799, unsloth #4026: a global dequantization buffer, of the dtype of whoever came first."""
    models = [accelerated(stock_net(kind, dtype)) for dtype in (torch.float32, torch.bfloat16)]
    xs = [inputs().requires_grad_(), inputs(dtype=torch.bfloat16).requires_grad_()]
    alone = []
    for model, x in zip(models, xs, strict=True):
        y = model(x)
        alone.append((y, torch.autograd.grad(y.sum(), x)[0]))
    ys = [model(x) for model, x in zip(models, xs, strict=True)]
    grads = [torch.autograd.grad(y.sum(), x)[0] for y, x in reversed(list(zip(ys, xs, strict=True)))][::-1]
    for (y, grad), got_y, got_grad in zip(alone, ys, grads, strict=True):
        assert torch.equal(got_y, y)
        assert torch.equal(got_grad, grad)


def test_nan_stays_in_its_row(kind):
    """One NaN must not spread over a block of rows."""
    layer, x = one_layer(kind), inputs(6)
    clean = layer(x)
    x[2, 7] = torch.nan
    y = layer(x)
    assert y[2].isnan().all()
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(y[rows], clean[rows])


def test_corrupted_statistics_are_refused():
    """A truncated absmax loads silently in bitsandbytes, an empty one crashes it."""
    for corrupt in (
        lambda s: setattr(s, "absmax", s.absmax[:-1]),
        lambda s: setattr(s, "absmax", s.absmax[:0]),
        lambda s: setattr(s, "absmax", s.absmax.float()),
        lambda s: setattr(s, "code", s.code[:15]),
        lambda s: setattr(s.state2, "absmax", s.state2.absmax[:0]),
        lambda s: setattr(s.state2, "code", s.state2.code[:-1]),
        lambda s: setattr(s, "shape", torch.Size((HIDDEN, WIDTH + 1))),
        lambda s: setattr(s, "quant_type", "nf3"),
    ):
        model = stock_net("nf4")
        corrupt(lora_layers(model)[0].base_layer.weight.quant_state)
        report = accelerate(model)
        assert [row.status for row in report] == ["left", "fused"]
        assert "expected" in report.left[0].reason


def test_eval_in_eight_threads_leaves_the_weights_alone():
    """bitsandbytes repacks at the first eval forward; eight threads at once corrupt most modules."""
    stock = stock_net("nf4")
    for layer in lora_layers(stock):
        layer.base_layer.support_avx512bf16_for_cpu = True
    model, x = accelerated(stock).eval(), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = []

    def forward():
        with torch.no_grad():
            outputs.append(model(x))

    threads = [threading.Thread(target=forward) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 8
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_quant_storage_is_only_a_view():
    """peft #1737: FSDP needs the packed bytes stored as bfloat16."""
    torch.manual_seed(0)
    stock = stock_net("nf4")
    fast = copy.deepcopy(stock)
    for layer in lora_layers(fast):
        base = layer.base_layer
        data = base.weight.data.view(1, -1).view(torch.bfloat16).view(-1, 1)
        base.weight = bnb.nn.Params4bit(
            data, requires_grad=False, quant_state=base.weight.quant_state, bnb_quantized=True
        )
    accelerate(fast, strict=True)
    assert lora_layers(fast)[0].base_layer.weight.dtype == torch.bfloat16
    assert_same_model(stock, fast, inputs(), calls=2)


# --------------------------------------------------------------------------- autograd, compile, concurrency


def test_backward_twice_and_x_unchanged(kind):
    """axolotl #3800: dX was written into the saved X."""
    model, x = accelerated(stock_net(kind, lora_dropout=0.1)), inputs().requires_grad_()
    before, version = x.detach().clone(), x._version
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = model(x)
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(x, before)
    assert x._version == version


def test_upstream_and_downstream_tensors_are_not_written(kind):
    """Liger #272, #1251, #1305: a write past the version counter, into a saved output or grad_output."""
    layer, h = one_layer(kind), inputs().requires_grad_()
    p = h.softmax(-1)
    y = layer(p)
    grad = torch.randn_like(y)
    saved, grad_before = p.detach().clone(), grad.clone()
    y.backward(grad)
    assert torch.equal(p, saved)
    assert torch.equal(grad, grad_before)
    A, B = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    W = from_linear(layer.base_layer).decode(torch.float64) + 3.0 * B @ A
    exact = h.detach().double().requires_grad_()
    (exact.softmax(-1) @ W.t()).backward(grad.double())
    assert relative_error(h.grad, exact.grad) < 1e-5


def test_each_row_has_its_own_gradient(kind):
    """Liger #1298: grad_output was taken for a scalar."""
    layer, x = one_layer(kind), inputs(4).requires_grad_()
    grad = torch.zeros(4, HIDDEN)
    grad[2, 5] = 3.0
    layer(x).backward(grad)
    A, B = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    W = from_linear(layer.base_layer).decode(torch.float64) + 3.0 * B @ A
    assert relative_error(x.grad[2], 3.0 * W[5]) < 1e-6
    assert x.grad[[0, 1, 3]].abs().max() == 0


def test_weight_gradients_accumulate_in_fp32(kind):
    """Liger #950: dW was reduced in bfloat16 over many rows."""
    stock = stock_net(kind, torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert_same_model(stock, accelerated(stock), inputs(8192, dtype=torch.bfloat16), calls=2)


def test_autocast_decides_the_output_dtype():
    """Liger #1283: the output's dtype ignored autocast."""
    layer = one_layer("dense")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs()).dtype == torch.bfloat16
    assert layer(inputs()).dtype == torch.float32


def test_every_subset_of_gradients(kind):
    """Liger #1157: what was saved, and whether, depended on the wrong tensor's requires_grad."""
    stock = lora_layers(stock_net(kind))[0]
    fast = lora_layers(accelerated(nn.ModuleList([stock])))[0]
    x = inputs()
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        results = []
        for layer in (stock, fast):
            leaf = x.clone()
            operands = (
                leaf,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.base_layer.bias,
            )
            for operand, needed in zip(operands, wanted, strict=True):
                operand.requires_grad_(needed)
            leaves = [operand for operand, needed in zip(operands, wanted, strict=True) if needed]
            results.append(torch.autograd.grad(layer(leaf).square().sum(), leaves))
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_no_graph_break(kind):
    """bitsandbytes #1904: `__getattr__` on the module broke the graph."""
    torch._dynamo.reset()
    model, x = accelerated(stock_net(kind, lora_dropout=0.1)), inputs()
    found = torch._dynamo.explain(model)(x)
    torch._dynamo.reset()
    assert found.graph_break_count == 0
    assert found.graph_count == 1
    assert sum("lora_linear" in str(node.target) for node in found.graphs[0].graph.nodes) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_steps_keep_nothing(kind, reentrant):
    """bitsandbytes #1999: a cache grew with each checkpointed step."""
    model = accelerated(stock_net(kind, lora_dropout=0.1))

    def live_tensors_after(steps):
        for _ in range(steps):
            model.zero_grad()
            checkpoint(model, inputs().requires_grad_(), use_reentrant=reentrant).sum().backward()
        gc.collect()
        return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())

    live_tensors_after(1)  # lazily made state, and what earlier tests left to collect
    assert live_tensors_after(1) == live_tensors_after(8)


def test_copying_changes_nothing_and_loses_nothing(kind):
    """bitsandbytes #1230, #1231: `__getstate__` mutated the original, deepcopy lost attributes."""
    layer = one_layer(kind)
    before = {name: dict(module.__dict__) for name, module in layer.named_modules()}
    twin = copy.deepcopy(layer)
    assert {name: module.__dict__ for name, module in layer.named_modules()} == before
    for name, module in twin.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    assert isinstance(twin, LoraLayer)
    original, copied = from_linear(layer.base_layer), from_linear(twin.base_layer)
    for field, a, b in zip(original._fields, original, copied, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field
