"""dora_linear against PEFT's own layer, the formulas of the paper and of PEFT, and autograd through them."""

import pytest
import torch
from cases import EVERY_FORMAT, HALF, adapters, dense_norm, device_of, make_weight, on
from peft import LoraConfig, get_peft_model
from peft_models import to_kind
from tolerances import assert_as_exact, relative_error
from torch import nn
from torch.nn import functional as F

from peft_fast import dora, dora_linear, formats, lora_linear

pytestmark = pytest.mark.usefixtures("poisoned")

N, K, R = 40, 96, 5


def operands(dtype=torch.float32, shape=(2, 7), n=N, k=K, r=R):
    """x, lora_A, lora_B, magnitude and bias, which take gradients."""
    A, B = adapters(n, k, r, dtype)
    rest = torch.randn(*shape, k, dtype=dtype), torch.randn(n, dtype=dtype) + 2, torch.randn(n, dtype=dtype)
    return [t.requires_grad_() for t in (rest[0], A, B, *rest[1:])]


def results(function, leaves, grad):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    torch.manual_seed(3)
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


NAMES = ("y", "dx", "dA", "dB", "dm", "dbias")


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dropout", ["paper", "peft"])
@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_against_the_formula_in_fp64(format, p, dropout, norm_grad):
    weight, leaves, scaling = make_weight(format, N, K), operands(torch.float64), 0.7

    def formula(x, A, B, m, bias):
        W = weight.decode(torch.float64)
        norm = dense_norm(weight, A, B, scaling, torch.float64)
        c = m / (norm.detach() if norm_grad == "detached" else norm)
        x_d = F.dropout(x, p)
        if dropout == "peft":
            return F.linear(x, W, bias) + (c - 1) * F.linear(x_d, W) + c * scaling * (x_d @ A.t() @ B.t())
        return c * (F.linear(x, W) + scaling * (x_d @ A.t() @ B.t())) + bias

    def ours(x, A, B, m, bias):
        how = {"dropout_p": p, "dropout": dropout, "norm_grad": norm_grad}
        return dora_linear(x, weight, A, B, m, bias, scaling=scaling, **how)

    grad = torch.randn(2, 7, N, dtype=torch.float64)
    for name, a, b in zip(NAMES, *(results(f, leaves, grad) for f in (ours, formula)), strict=True):
        assert relative_error(a, b) < 1e-12, name


@pytest.mark.parametrize("norm_grad", ["given", "full"])
@pytest.mark.parametrize("dropout", ["paper", "peft"])
def test_gradcheck(norm_grad, dropout):
    weight, leaves = make_weight("nf4", 12, 10), operands(torch.float64, (3,), 12, 10, 2)
    norm = dora.lora_weight_norm(weight, *leaves[1:3], 0.7) if norm_grad == "given" else None

    def function(x, A, B, m, bias):
        torch.manual_seed(3)
        how = {"dropout_p": 0.3, "dropout": dropout, "norm": norm}
        if norm is None:
            how["norm_grad"] = "full"
        return dora_linear(x, weight, A, B, m, bias, scaling=0.7, **how)

    assert torch.autograd.gradcheck(function, leaves)


def peft_layer(kind, dropout_p, bias=True):
    """PEFT's own DoRA layer over a linear layer, its parameters random."""
    net = to_kind(nn.Sequential(nn.Linear(64, 128, bias=bias)), kind)
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"], lora_dropout=dropout_p)
    layer = get_peft_model(net, config).base_model.model[0].train()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.mul_(torch.rand_like(magnitude) + 0.5)
    if bias:
        layer.get_base_layer().bias.requires_grad_()
    return layer


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9,), (2, 3)])
def test_against_the_layer_of_peft(kind, dropout_p, bias, shape):
    layer = peft_layer(kind, dropout_p, bias)
    base, scaling = layer.get_base_layer(), layer.scaling["default"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    leaves = [torch.randn(*shape, 64, requires_grad=True), A, B, magnitude, *([base.bias] if bias else [])]
    grad = torch.randn(*shape, 128)
    torch.manual_seed(3)
    theirs = layer(leaves[0])
    expected = [theirs.detach(), *torch.autograd.grad(theirs, leaves, grad)]
    torch.manual_seed(3)
    how = {"scaling": scaling, "dropout_p": dropout_p, "dropout": "peft"}
    ours = dora_linear(leaves[0], formats.from_linear(base), A, B, magnitude, base.bias, **how)
    got = [ours.detach(), *torch.autograd.grad(ours, leaves, grad)]
    for name, a, b in zip(NAMES, got, expected, strict=False):
        assert relative_error(a, b) < 1e-5, name
    assert len(got) == 5 + bias


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("M", [1, 16])
def test_every_backend_and_dtype(backend, dtype, M):
    """Adapters, magnitude and bias in fp32, as PEFT keeps them."""
    device, scaling = device_of(backend), 0.7
    weight = make_weight("nf4", N, K)
    leaves, grad = operands(shape=(M,)), torch.randn(M, N).to(dtype)
    leaves[0] = leaves[0].to(dtype)
    norm = dense_norm(weight, *leaves[1:3], scaling, torch.float64).detach()

    def formula(x, A, B, m, bias):
        c = m / norm.to(m.dtype)
        return (c * (F.linear(x, weight.decode(x.dtype)) + scaling * (x.to(A) @ A.t() @ B.t())) + bias).to(
            x.dtype
        )

    def ours(*leaves):
        here = [t.to(device) for t in leaves]
        return dora_linear(here[0], on(device, weight), *here[1:], scaling=scaling, backend=backend).cpu()

    truth = results(formula, [t.double() for t in leaves], grad.double())
    plain, got = results(formula, leaves, grad), results(ours, leaves, grad)
    kept = plain[0].float() - leaves[4].detach()  # the gradient of m is read out of the rounded output
    c = leaves[3].detach() / norm.float()
    plain[4] = (grad * kept / c).sum(0) / norm.float()
    for name, *three in zip(NAMES, got, plain, truth, strict=True):
        assert_as_exact(name, *three)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_zero_magnitude_keeps_its_gradient(dtype):
    weight, (x, A, B, m, bias) = make_weight("nf4", N, K), operands(shape=(6,))
    with torch.no_grad():
        m[::4], m[1::4] = 0, -m[1::4]
    x, scaling, grad = x.detach().to(dtype), 0.7, torch.randn(6, N)
    norm = dense_norm(weight, A, B, scaling, torch.float64).detach()
    V = x.double() @ (weight.decode(torch.float64) + scaling * B.double() @ A.double()).t()
    y = dora_linear(x, weight, A, B, m, scaling=scaling)
    assert y[:, ::4].abs().max() < 2.0**-15
    (dm,) = torch.autograd.grad(y, m, grad.to(dtype))
    expected = (grad.to(dtype).double() * V).sum(0) / norm
    assert (
        relative_error(dm, expected) < {torch.float32: 1e-6, torch.float16: 0.03, torch.bfloat16: 0.02}[dtype]
    )
    y = dora_linear(x, weight, A, B, m, bias, scaling=scaling)
    assert torch.equal(y[:, ::4], bias[::4].to(dtype).expand(6, -1))
    assert torch.autograd.grad(y, m, grad.to(dtype))[0].isfinite().all()


@pytest.mark.parametrize("magnitude", [0.0, 1.0, -3.0])
def test_a_zero_row_gives_numbers(magnitude):
    W = torch.randn(N, K)
    leaves = operands(shape=(6,))
    with torch.no_grad():
        W[3], leaves[2][3], leaves[3][3] = 0, 0, magnitude

    def function(x, A, B, m, bias):
        return dora_linear(x, W, A, B, m, bias, scaling=0.7, norm_grad="full")

    y, *grads = results(function, leaves, torch.randn(6, N))
    assert torch.equal(y[:, 3], leaves[4][3].expand(6))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dropout", ["paper", "peft"])
def test_without_dropout_the_semantics_are_one_call(dropout):
    weight, (x, A, B, m, bias) = make_weight("nf4", N, K), operands()
    expected = dora_linear(x, weight, A, B, m, bias, scaling=0.7)
    evaluated = {"dropout_p": 0.5, "training": False, "dropout": dropout}
    assert torch.equal(dora_linear(x, weight, A, B, m, bias, scaling=0.7, **evaluated), expected)
    assert torch.equal(dora_linear(x, weight, A, B, m, bias, scaling=0.7, dropout=dropout), expected)


def test_the_initial_magnitude_is_plain_lora():
    weight, (x, A, B, _, bias) = make_weight("nf4", N, K), operands()
    m = dora.lora_weight_norm(weight, A, B, 0.7).detach()
    y = dora_linear(x, weight, A, B, m, bias, scaling=0.7)
    assert torch.equal(y, lora_linear(x, weight, A, B, bias, scaling=0.7))


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_a_given_norm_is_used(norm_grad):
    weight, leaves = make_weight("nf4", N, K), operands()
    known = dora.row_norms_squared(weight)

    def function(x, A, B, m, bias, given):
        norm = dora.lora_weight_norm(weight, A, B, 0.7, norms_squared=known) if given else None
        return dora_linear(x, weight, A, B, m, bias, scaling=0.7, norm=norm, norm_grad=norm_grad)

    grad = torch.randn(2, 7, N)
    given, computed = (results(lambda *a, g=g: function(*a, g), leaves, grad) for g in (True, False))
    assert all(map(torch.equal, given, computed))
    doubled = dora_linear(*leaves[:1], weight, *leaves[1:4], scaling=0.7, norm=torch.full((N,), 2.0))
    assert torch.equal(
        doubled, 0.5 * dora_linear(*leaves[:1], weight, *leaves[1:4], scaling=0.7, norm=torch.ones(N))
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dropout", ["paper", "peft"])
def test_autocast_casts_the_activations_only(dtype, dropout):
    weight, (x, A, B, m, bias) = make_weight("nf4", N, K), operands()
    how = {"scaling": 0.7, "dropout_p": 0.3, "dropout": dropout}
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype):
        y = dora_linear(x, weight, A, B, m, bias, **how)
    torch.manual_seed(3)
    assert torch.equal(y, dora_linear(x.to(dtype), weight, A, B, m, bias, **how))
    assert y.dtype == dtype


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("how", [{}, {"dropout": "peft"}, {"norm_grad": "full"}])
def test_compiles_into_one_graph(compiler, how):
    weight, leaves = make_weight("nf4", N, K), operands()
    torch._dynamo.reset()

    def step(x, A, B, m, bias):
        return dora_linear(x.relu(), weight, A, B, m, bias, scaling=0.7, dropout_p=1e-12, **how).sin()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    grad = torch.randn(2, 7, N)
    for a, b in zip(*(results(f, leaves, grad) for f in (compiled, step)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": torch.randn(3, K + 1)}),
        ("lora_A", {"lora_A": torch.randn(R, K + 1)}),
        ("lora_A", {"lora_A": torch.ones(R, K, dtype=torch.int8)}),
        ("lora_B", {"lora_B": torch.randn(N, R + 1)}),
        ("magnitude", {"magnitude": torch.randn(N - 1)}),
        ("magnitude", {"magnitude": torch.randn(1, N)}),
        ("magnitude", {"magnitude": torch.empty(N, device="meta")}),
        ("norm", {"norm": torch.ones(1)}),
        ("dropout_p", {"dropout_p": 1.5}),
        ("dropout", {"dropout": "mine"}),
        ("norm_grad", {"norm_grad": "half"}),
        ("backend", {"backend": "cuda-magic"}),
    ],
)
def test_bad_input_names_the_argument(argument, change):
    x, A, B, m, bias = operands(shape=(3,))
    call = {"x": x, "lora_A": A, "lora_B": B, "magnitude": m, "bias": bias} | change
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: expected"):
        dora_linear(weight=make_weight("nf4", N, K), scaling=0.7, **call)
