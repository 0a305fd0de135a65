"""Second derivatives: plain PyTorch's for lora_linear and DoRA, an error for loreft; never a wrong number."""

import pytest
import torch
from cases import Case, ReftCase
from peft_models import accelerated, inputs, stock_net, truth_of
from tolerances import assert_as_exact

from peft_fast.autograd import times_weight

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("out_scale", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_of_the_op(format, p, out_scale):
    """gradgradcheck in float64, over the exact values of a weight."""
    case = Case.make(format, (2, 3), 8, 6, 2, dropout_p=p, out_scale=out_scale, dtype=torch.float32)
    weight = case.weight
    if format == "dense":
        weight = weight._replace(weight=weight.weight.double())
    leaves = [t.detach().double().requires_grad_() for t in (case.x, case.bias, case.lora_A, case.lora_B)]
    if out_scale:
        leaves.append(case.out_scale.detach().double().requires_grad_())

    def op(x, bias, A, B, scale=None):
        rest = (bias, A, B, case.mask, scale, 0.5, p, "reference")
        return torch.ops.peft_fast.lora_linear(x, *weight, *rest)[0]

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


def penalty(model, x):
    """Gradients of ‖∂L/∂θ‖² + ‖∂L/∂x‖², by every leaf."""
    x = x.detach().requires_grad_()
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, [x, *leaves.values()], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))
    return dict(zip(leaves, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}])
def test_a_gradient_penalty_is_stock_pefts(kind, options):
    stock, x = stock_net(kind, **options), inputs(4)
    truth = penalty(truth_of(stock), x.double())
    plain, got = (penalty(model, x) for model in (stock, accelerated(stock)))
    for name, value in truth.items():
        assert_as_exact(name, got[name], plain[name], value)


@pytest.mark.parametrize("trained", ["x", "lora_B", "out_scale"])
def test_without_a_gradient_of_lora_a(trained):
    """X is not kept: what takes it raises, and what does not is exact."""
    case = Case.make("nf4", (3,), 8, 6, 2, out_scale=True, dtype=torch.float32)
    given = {"x": case.x, "lora_B": case.lora_B, "out_scale": case.out_scale}
    leaves = [t.detach().double().requires_grad_(name == trained) for name, t in given.items()]
    lora_A = case.lora_A.double()

    def op(x, B, scale):
        rest = (None, lora_A, B, None, scale, 0.5, 0.0, "reference")
        return torch.ops.peft_fast.lora_linear(x, *case.weight, *rest)[0]

    if trained == "x":
        assert torch.autograd.gradgradcheck(op, leaves)
    else:
        wanted = next(t for t in leaves if t.requires_grad)
        with pytest.raises(NotImplementedError, match="take X, which is kept only where lora_A requires"):
            torch.autograd.grad(op(*leaves).square().sum(), wanted, create_graph=True)


def test_times_weight():
    case = Case.make("dense", (3,), 5, 4, 1)
    weight = case.weight._replace(weight=case.weight.weight.double())
    p = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: times_weight(p, weight, "reference"), p)
    assert torch.autograd.gradgradcheck(lambda p: times_weight(p, weight, "reference").square(), p)


@pytest.mark.parametrize("rows", [None, [0, 2]])
@pytest.mark.parametrize("by", ["h", "projection", "basis"])
def test_loreft_raises(rows, by):
    case = ReftCase.make((4,), 6, 2, terms=2, rows=rows)
    leaves = case._leaves()
    y = torch.ops.peft_fast.loreft(*case.args(leaves, "auto"))[0]
    first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match="loreft: second derivatives are not implemented"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves[by])
