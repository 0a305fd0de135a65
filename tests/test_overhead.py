"""Plain eager spares the dispatcher, with the same results; whatever has to see a dispatcher op sees it."""

import pytest
import torch
from cases import Case, make_weight
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peft_fast.formats import QuantizedWeight
from peft_fast.functional import dora_linear, lora_linear

K, N, R = 64, 32, 4
OPS = ("lora_linear", "lora_linear_backward")


class Seen(TorchDispatchMode):
    """Changes nothing, and remembers which of the ops came through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "peft_fast":
            self.ops.append(func._opname)
        return func(*args, **(kwargs or {}))


class Passive(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def dispatched(monkeypatch):
    """The names of the ops that are called through the dispatcher, in order."""
    names = []

    def recording(name):
        op = getattr(torch.ops.peft_fast, name)

        def call(*args):
            names.append(name)
            return op(*args)

        return call

    for name in OPS:
        monkeypatch.setattr(torch.ops.peft_fast, name, recording(name))
    return names


def operands(shape=(3,), dtype=torch.float32):
    """x, lora_A and lora_B, which take gradients, and a weight."""
    leaves = [torch.randn(*s, dtype=dtype) for s in ((*shape, K), (R, K), (N, R))]
    return *(t.requires_grad_() for t in leaves), make_weight("nf4", N, K)


def outcome(case: Case, backend: str, **options) -> list[torch.Tensor]:
    """Output and gradients by `lora_linear`, dropout drawn anew from the same seed.

    By `dora_linear` where the case has an out_scale, which then is the magnitude, over a norm of 1.
    """
    torch.manual_seed(5)
    given = (case.x, case.lora_A, case.lora_B, case.bias, case.out_scale)
    leaves = [t.detach().requires_grad_() for t in given if t is not None]
    x, lora_A, lora_B, bias, *magnitude = leaves
    if magnitude:
        options = {"scaling": 1.0, "norm": torch.ones_like(magnitude[0])} | options
        y = dora_linear(x, case.weight, lora_A, lora_B, *magnitude, bias, backend=backend, **options)
    else:
        y = lora_linear(x, case.weight, lora_A, lora_B, bias, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, case.grad.to(y.dtype))]


@pytest.mark.parametrize("format", ["dense", "nf4"])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (2, 0, 3), ()])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "scaling": 2}])
@pytest.mark.parametrize("out_scale", [False, True])
def test_both_paths_give_the_same_bits(backend, format, shape, options, out_scale):
    case = Case.make(format, shape, K, N, R, out_scale=out_scale).on(backend)
    direct = outcome(case, backend, **options)
    with Seen() as seen:
        through_dispatcher = outcome(case, backend, **options)
    assert [name for name in seen.ops if name in OPS] == list(OPS)
    for a, b in zip(direct, through_dispatcher, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape


@pytest.mark.parametrize("out_scale", [False, True])
def test_both_paths_under_autocast(out_scale):
    case = Case.make("nf4", (5,), K, N, R, out_scale=out_scale)
    with torch.autocast("cpu", torch.bfloat16):
        direct = outcome(case, "auto")
        with Seen():
            through_dispatcher = outcome(case, "auto")
    assert direct[0].dtype == torch.bfloat16
    for a, b in zip(direct, through_dispatcher, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(3, 63)},
        {"x": torch.ones(3, K, dtype=torch.int64)},
        {"lora_A": torch.randn(R, 63)},
        {"lora_B": torch.randn(N, 5)},
        {"bias": torch.randn(31)},
        {"backend": "cuda-magic"},
        {"backend": "cpu-scalar", "x": torch.randn(3, K, dtype=torch.float64)},
        {"lora_A": torch.empty(R, K, device="meta")},
    ],
)
def test_both_paths_raise_the_same_error(change, grad):
    call = {"x": torch.randn(3, K), "lora_A": torch.randn(R, K), "lora_B": torch.randn(N, R)} | change
    if grad:
        call["lora_B"] = call["lora_B"].requires_grad_()
    weight = make_weight("nf4", N, K)
    with pytest.raises(Exception, match=next(iter(change))) as direct:
        lora_linear(weight=weight, **call)
    with Seen(), pytest.raises(type(direct.value)) as through_dispatcher:
        lora_linear(weight=weight, **call)
    assert str(through_dispatcher.value) == str(direct.value)


def test_plain_eager_spares_the_dispatcher(dispatched):
    x, A, B, weight = operands()
    lora_linear(x, weight, A, B, dropout_p=0.5).sum().backward()
    lora_linear(torch.nn.Parameter(x), make_weight("dense", N, K), A, B).sum().backward()
    magnitude = torch.nn.Parameter(torch.ones(N))
    for norm_grad in ("detached", "full"):
        dora_linear(x, weight, A, B, magnitude, scaling=0.5, norm_grad=norm_grad).sum().backward()
    with torch.no_grad():
        lora_linear(x, weight, A, B)
    with torch.inference_mode():
        lora_linear(x.clone(), weight, A, B)
    with torch.autocast("cpu", torch.bfloat16):
        lora_linear(x, weight, A, B).sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        lora_linear(x, weight, A, B).sum().backward()
    for reentrant in (True, False):
        checkpoint(lora_linear, x, weight, A, B, use_reentrant=reentrant).sum().backward()
    assert dispatched == []


def left_behind_by_a_transform(x):
    leaked = []
    torch.func.grad(lambda x: (leaked.append(x * 1), x.sum())[1])(x)
    return leaked[0]


def inside(mode):
    def call(f, x):
        with mode():
            return f(x)

    return call


@pytest.mark.parametrize(
    "call",
    [
        inside(Seen),
        inside(Passive),
        lambda f, x: f(x.as_subclass(Subclass)),
        lambda f, x: torch.vmap(f)(x[None]),
        lambda f, x: torch.jit.trace(f, (x,), check_trace=False),
        lambda f, x: make_fx(f)(x),
        lambda f, x: f(left_behind_by_a_transform(x)),
        lambda f, x: f(torch._neg_view(x)),
    ],
    ids=[
        "dispatch mode",
        "function mode",
        "subclass",
        "vmap",
        "jit trace",
        "make_fx",
        "left behind",
        "negated",
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.trace")
def test_what_has_to_see_the_op_sees_it(dispatched, call):
    x, A, B, weight = operands()
    x, A, B = x.detach(), A.detach(), B.detach()
    call(lambda x: lora_linear(x, weight, A, B), x)
    assert "lora_linear" in dispatched


def test_a_negated_or_left_behind_operand_keeps_its_value():
    x, A, B, weight = operands()
    x = x.detach()
    assert torch.equal(lora_linear(torch._neg_view(x), weight, A, B), lora_linear(-x, weight, A, B))
    assert torch.equal(lora_linear(left_behind_by_a_transform(x), weight, A, B), lora_linear(x, weight, A, B))


@pytest.mark.parametrize("norm_grad", ["no DoRA", "detached", "full"])
def test_fake_tensors_get_fake_results(norm_grad):
    *real, weight = operands((2, 3))
    fake = FakeTensorMode().from_tensor
    leaves = [fake(t) for t in (*real, torch.ones(N, requires_grad=True))]
    x, A, B, magnitude = leaves
    weight = QuantizedWeight(*(fake(t) if torch.is_tensor(t) else t for t in weight))
    if norm_grad == "no DoRA":
        y = lora_linear(x, weight, A, B)
        del leaves[3]
    else:
        y = dora_linear(x, weight, A, B, magnitude, scaling=0.5, norm_grad=norm_grad)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert y.shape == (2, 3, N)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(type(t) is type(x) for t in (y, *grads))


def test_a_compiled_graph_holds_the_op():
    x, A, B, weight = operands()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    y = torch.compile(lora_linear, fullgraph=True, backend=backend)(x, weight, A, B)
    (graph,) = graphs
    assert [n.target for n in graph.graph.nodes if "peft_fast" in str(n.target)] == [
        torch.ops.peft_fast.lora_linear
    ]
    assert torch.equal(y, lora_linear(x, weight, A, B))


def test_each_pass_chooses_its_path(dispatched):
    x, A, B, weight = operands()
    y = lora_linear(x, weight, A, B)
    with Seen() as seen:
        through_dispatcher = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    assert seen.ops == dispatched == ["lora_linear_backward"]
    direct = torch.autograd.grad(y.sum(), (x, A, B))
    assert dispatched == ["lora_linear_backward"]
    for a, b in zip(direct, through_dispatcher, strict=True):
        assert torch.equal(a, b)


def test_batched_gradients_are_the_gradients_one_by_one():
    x, A, B, weight = operands()
    magnitude = torch.ones(N, requires_grad=True)
    y, grads = dora_linear(x, weight, A, B, magnitude, scaling=1.0), torch.randn(2, 3, N)
    batched = torch.autograd.grad(y, (x, magnitude), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(y, (x, magnitude), grad, retain_graph=True)
        for got, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(got[i], expected)


@pytest.mark.parametrize("path", [torch.enable_grad, Seen])
@pytest.mark.parametrize("grad", [True, False])
def test_the_output_may_be_written_in_place(path, grad):
    """It was a view made inside the op, and autograd refuses to have such views written."""
    x, A, B, weight = operands((2, 3))
    added = torch.ones(N, requires_grad=True)
    with path(), torch.set_grad_enabled(grad):
        y = lora_linear(x, weight, A, B)
    expected = y.detach() + 1
    y += added
    y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(added.grad, torch.full((N,), 6.0))


@pytest.mark.parametrize("path", [torch.enable_grad, Seen])
@pytest.mark.parametrize("written", ["x", "lora_A", "lora_B"])
def test_a_saved_operand_that_was_written_is_noticed(path, written):
    x, A, B, weight = operands()
    x = x * 1
    with path():
        y = lora_linear(x, weight, A, B)
    with torch.no_grad():
        {"x": x, "lora_A": A, "lora_B": B}[written].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("path", [torch.enable_grad, Seen])
@pytest.mark.parametrize("trained", [True, False])
def test_the_output_is_kept_for_a_trained_out_scale_alone(path, trained):
    x, A, B, weight = operands()
    magnitude = torch.ones(N, requires_grad=trained)
    with path():
        y = dora_linear(x, weight, A, B, magnitude, scaling=0.5)
    y += 1
    if trained:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        y.sum().backward()
        assert x.grad is not None


def test_no_gradient_gives_no_gradients():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x, A, B, weight = operands()
    Cut.apply(lora_linear(x, weight, A, B)).sum().backward()
    assert x.grad is A.grad is B.grad is None
