"""Defects that others had in layout and quantization, one test each."""

import copy
import threading

import bitsandbytes as bnb
import pytest
import torch
from cases import make_weight
from peft_models import (
    HIDDEN,
    WIDTH,
    accelerated,
    assert_same_model,
    inputs,
    lora_layers,
    one_layer,
    stock_net,
    to_4bit,
    unpacked,
)
from tolerances import relative_error
from torch import nn

from peft_fast import UnsupportedWeight, accelerate, lora_linear
from peft_fast.formats import BLOCK_SIZES, from_linear

pytestmark = pytest.mark.usefixtures("one_thread")


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
