"""lora_linear with an out_scale: what it adds to test_ops.py, on every backend against fp64."""

import pytest
import torch
from cases import FORMATS, HALF, Case, check
from tolerances import assert_as_exact

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 9), (33,)])
@pytest.mark.parametrize("bias", [True, False])
def test_out_scale_in_every_dtype(backend, format, dtype, shape, bias):
    check(Case.make(format, shape, 96, 40, 5, dtype=dtype, bias=bias, out_scale=True), backend)


@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("M", [2, 19])
def test_out_scale_with_dropout(backend, p, M):
    check(Case.make("nf4", (M,), 72, 24, 3, dropout_p=p, out_scale=True), backend)


@pytest.mark.parametrize("M", [1, 16, 65])
def test_out_scale_at_size(backend, M):
    """Several tiles in each direction."""
    check(Case.make("nf4", (M,), 320, 200, 20, out_scale=True), backend)


@pytest.mark.parametrize("tiny", [2.0**-100, -(2.0**-40)])
def test_a_tiny_out_scale_loses_nothing_without_a_bias(backend, tiny):
    """Y carries it, so the gradient of out_scale is as exact as any."""
    case = Case.make("nf4", (6,), 96, 40, 5, bias=False, out_scale=True)
    case.out_scale[::3] = tiny
    check(case, backend)
    got, truth = case.run(backend), case.plain(torch.float64)
    assert_as_exact("y", got["y"][:, ::3], got["y"][:, ::3], truth["y"][:, ::3])


def test_the_gradient_of_out_scale_alone(backend):
    case = Case.make("nf4", (6,), 96, 40, 5, dropout_p=0.2, out_scale=True)
    full, here = case.run(backend), case.on(backend)
    scale = here.out_scale.requires_grad_()
    y, _ = torch.ops.peft_fast.lora_linear(
        here.x, *here.weight, here.bias, here.lora_A, here.lora_B, here.mask, scale, 0.5, 0.2, backend
    )
    (got,) = torch.autograd.grad(y, scale, here.grad)
    torch.testing.assert_close(got.cpu(), full["dout_scale"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_of_the_formula_with_out_scale(bias):
    case = Case.make(
        "nf4", (2, 3), 10, 12, 4, dtype=torch.float64, adapter_dtype=torch.float64, dropout_p=0.3
    )
    leaves = [case.x, case.lora_A, case.lora_B, torch.randn(12).double() + 2, case.bias][: 4 + bias]

    def op(x, A, B, scale, bias=None):
        args = (bias, A, B, case.mask, scale, 0.7, 0.3, "reference")
        return torch.ops.peft_fast.lora_linear(x, *case.weight, *args)[0]

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_into_one_graph_with_out_scale(compiler):
    case = Case.make("nf4", (7,), 64, 32, 4, out_scale=True)
    torch._dynamo.reset()

    def step(x, A, B, scale):
        args = (case.bias, A, B, None, scale.exp(), 0.5, 0.0, "auto")
        return torch.ops.peft_fast.lora_linear(x.relu(), *case.weight, *args)[0].sin()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        operands = (case.x, case.lora_A, case.lora_B, case.out_scale)
        leaves = [t.clone().requires_grad_() for t in operands]
        y = run(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, case.grad)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: t[1:], ValueError, r"expected \[N\] = \[32\], got \[31\]"),
        (lambda t: t[None], ValueError, r"expected \[N\] = \[32\], got \[1, 32\]"),
        (lambda t: t.half(), TypeError, "expected torch.float32 for x in torch.float32, got torch.float16"),
        (lambda t: t.double(), TypeError, "expected torch.float32 for x in torch.float32, got torch.float64"),
        (lambda t: t.to("meta"), ValueError, r"expected device cpu \(the weight's\), got meta"),
    ],
)
def test_bad_out_scale_is_named(change, error, said):
    case = Case.make("nf4", (3,), 64, 32, 4, out_scale=True)
    args = (case.bias, case.lora_A, case.lora_B, None, change(case.out_scale), 0.5, 0.0, "auto")
    with pytest.raises(error, match=f"^out_scale: {said}"):
        torch.ops.peft_fast.lora_linear(case.x, *case.weight, *args)
