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
    dora_net,
    inputs,
    lora_config,
    lora_layers,
    one_layer,
    stock_net,
    to_4bit,
    unpacked,
)
from tolerances import relative_error
from torch import nn

from peft_fast import UnsupportedWeight, accelerate, formats, lora_linear, native, quantize, restore
from peft_fast.formats import BLOCK_SIZES, QuantizedWeight, from_linear

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


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.filterwarnings("ignore:.*due to rounding errors")
@pytest.mark.parametrize(("packed", "net"), [("nf4", stock_net), ("nf4-flat", dora_net), ("int8", stock_net)])
def test_merging_and_unmerging_does_not_drift(packed, net):
    """peft #2321, #2501, mlx-lm #1564: a base that is quantized anew by every merge and unmerge wanders off.

    Unmerging gives back its bytes: the hundredth merge of a small update has the error of one quantization.
    """
    model = accelerated(net(packed))
    for layer in lora_layers(model):
        layer.lora_B["default"].weight.data *= 1e-3
    before, merged = base_state(model), None
    for _ in range(100):
        model.merge_adapter()
        merged = merged or base_state(model)
        assert same(base_state(model), merged)
        assert not same(merged, before)
        model.unmerge_adapter()
        assert same(base_state(model), before)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_the_weight_before_a_merge_goes_where_the_layer_goes():
    """Into a copy, past a second merge, not past `restore`, and not over a weight that was set meanwhile."""
    model = accelerated(stock_net("nf4"))
    model.add_adapter("other", lora_config(r=3))
    before = base_state(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    copied, other = copy.deepcopy(model), copy.deepcopy(model)
    model.unmerge_adapter()
    copied.unmerge_adapter()
    assert same(base_state(model), before)
    assert same(base_state(copied), before)
    base = lora_layers(other)[0].base_layer
    base.weight = copy.deepcopy(lora_layers(stock_net("nf4"))[0].base_layer.weight)
    set_meanwhile = from_linear(base).decode(torch.float32)
    other.unmerge_adapter()
    assert relative_error(from_linear(base).decode(torch.float32), set_meanwhile) > 0.01  # PEFT subtracts
    model.merge_adapter()
    restore(model)
    assert all("unmerged" not in vars(layer) for layer in lora_layers(model))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_weight_that_is_not_finite_is_not_quantized(quant, value):
    """bitsandbytes: one NaN, and double quantization makes every row of the layer NaN, without a word."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[1].weight.data[3, 5] = value
    with pytest.raises(UnsupportedWeight, match=r"1\.weight: expected finite values"):
        quantize(model, quant)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


# ------------------------------------------------------------------------------------------- offsets past 2³¹

BEYOND, COLS = 2**31, 2**20
ROWS = BEYOND // COLS + 1
"""The last row of a weight begins at element 2³¹."""
AROUND = slice(BEYOND - 2, BEYOND + 2)


def nf4_weight() -> QuantizedWeight:
    """1, −1 | 2 · code 12, −2 around element 2³¹, else zeros, of which the untouched take no memory."""
    packed = torch.zeros(ROWS * COLS // 2, dtype=torch.uint8)
    packed[BEYOND // 2 - 1], packed[BEYOND // 2] = 0xF0, 0xC0
    absmax = torch.zeros(ROWS * COLS // 4096)
    absmax[BEYOND // 4096 - 1], absmax[BEYOND // 4096] = 1.0, 2.0
    code = formats.code_table("nf4")
    return QuantizedWeight(packed, absmax, code, None, None, None, "nf4", ROWS, COLS, 4096, 0)


def int8_weight() -> QuantizedWeight:
    """The same numbers to eight bits."""
    data, absmax = torch.zeros(ROWS, COLS, dtype=torch.int8), torch.ones(ROWS)
    data.view(-1)[AROUND] = torch.tensor([127, -127, 56, -127], dtype=torch.int8)
    absmax[-1] = 2.0
    return QuantizedWeight(data, absmax, None, None, None, None, "int8", ROWS, COLS, COLS, 0)


def dense_weight() -> QuantizedWeight:
    """The same numbers in fp16."""
    data = torch.zeros(ROWS, COLS, dtype=torch.float16)
    data.view(-1)[AROUND] = torch.tensor([1.0, -1.0, 0.88, -2.0], dtype=torch.float16)
    return formats.from_dense(data)


WEIGHTS = {"nf4": nf4_weight, "int8": int8_weight, "dense": dense_weight}
EVERY = [(format, level) for level in native.levels() for format in WEIGHTS]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("format", "level"),
    [EVERY[0], *(pytest.param(*case, marks=pytest.mark.endurance) for case in EVERY[1:])],
)
def test_weights_past_2_to_the_31_elements(format, level):
    """bitsandbytes #1784, fla #1080, unsloth #3614: offsets past 2³¹ wrapped."""
    weight = WEIGHTS[format]().check()
    last = formats.decode_rows(weight, torch.tensor([ROWS - 2, ROWS - 1]))
    expected = torch.tensor([[1.0, -1.0], [2 * formats.NF4_CODE[12], -2.0]])
    torch.testing.assert_close(torch.stack((last[0, -2:], last[1, :2])), expected, rtol=0, atol=0.01)
    x, grad = torch.zeros(1, COLS), torch.zeros(1, ROWS)
    x[0, :2], x[0, -2:] = torch.tensor([100.0, 1000.0]), torch.tensor([10.0, 1.0])
    grad[0, -2:] = torch.tensor([3.0, 5.0])
    x.requires_grad_()
    y = lora_linear(x, weight, x.new_empty(0, COLS), x.new_empty(ROWS, 0), backend=f"cpu-{level}")
    y.backward(grad)
    torch.testing.assert_close(y[:, -2:], x.detach() @ last.t())
    torch.testing.assert_close(x.grad, grad[:, -2:] @ last)
    assert not y[:, :-2].any()
