"""loreft: backends × variants × dtypes against fp64, its manners as an op, and the formula of the paper."""

import pytest
import torch
from cases import HALF, ReftCase, assert_same_outputs, backends_of, check
from tolerances import assert_as_exact
from torch.nn import functional as F

from peft_fast import BackendUnavailable, backends, loreft, reference
from peft_fast.reference import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("poisoned")

op = torch.ops.peft_fast.loreft
ROWS = [7, -1, 0, 12, 3, -2]
"""Of 13 or more: the borders, out of order, with two that are skipped."""


@pytest.fixture(params=backends_of("loreft", "dense"))
def backend(request):
    return request.param


@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_variant(backend, terms, act):
    check(ReftCase.make((13,), 48, 5, terms=terms, act=act, rows=ROWS), backend)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("residual", [False, True])
def test_every_dtype(backend, dtype, rows, residual):
    case = ReftCase.make((2, 9), 96, 4, terms=2, act="gelu", rows=rows, dtype=dtype, residual=residual)
    check(case, backend)


@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("drop_state", [False, True])
@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_dropout(backend, terms, drop_state, p, rows):
    options = {"terms": terms, "rows": rows, "dropout_p": p, "drop_state": drop_state}
    check(ReftCase.make((13,), 43, 3, act="silu", **options), backend)


@pytest.mark.parametrize(
    ("shape", "d", "r", "rows"),
    [
        ((1,), 1, 1, None),
        ((2,), 1, 1, [1]),
        ((5,), 37, 7, [4, 0, -1]),
        ((3,), 5, 12, None),  # r > d
        ((2, 3, 1, 2), 65, 9, [11, 5, 6]),
        ((), 16, 2, None),
    ],
)
@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_awkward_shapes(backend, shape, d, r, rows, terms, p):
    case = ReftCase.make(shape, d, r, terms=terms, rows=rows, residual=True, act="relu", dropout_p=p)
    check(case, backend)


@pytest.mark.parametrize(
    ("M", "d", "r", "rows"), [(33, 320, 20, list(range(32, 0, -1))), (70, 136, 33, None)]
)
def test_several_tiles(backend, M, d, r, rows):
    case = ReftCase.make((M,), d, r, terms=2, rows=rows, residual=True, act="relu", dropout_p=0.2)
    check(case, backend)


@pytest.mark.parametrize("terms", [1, 2])
def test_without_a_bias(backend, terms):
    check(ReftCase.make((13,), 32, 4, terms=terms, rows=ROWS, bias=False), backend)


@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("rows", [None, [], [-1, -1], [2]])
@pytest.mark.parametrize(("shape", "r"), [((0,), 3), ((3, 0, 2), 0), ((4,), 3), ((4,), 0)])
def test_nothing_to_edit(backend, terms, rows, shape, r):
    if rows == [2] and 0 in shape:
        rows = [-3]
    case = ReftCase.make(shape, 24, r, terms=terms, rows=rows, residual=True)
    check(case, backend)
    got = case.run(backend)
    if not r or rows in ([], [-1, -1]):
        assert torch.equal(got["y"], case.h + case.residual)
        assert torch.equal(got["dh"], case.grad)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("residual", [False, True])
def test_the_other_rows_pass_bit_by_bit_and_the_edited_ones_are_kept(backend, dtype, residual):
    case = ReftCase.make((13,), 40, 4, terms=2, rows=ROWS, dtype=dtype, residual=residual).on(backend)
    out, z, kept = op(*case.args({}, backend))
    states = case.h + case.residual if residual else case.h
    selected = [row for row in ROWS if row >= 0]
    others = [i for i in range(13) if i not in selected]
    assert torch.equal(out[others], states[others])
    assert torch.equal(case.run(backend)["dh"][others], case.grad[others].cpu())
    for i, row in enumerate(ROWS):
        if row < 0:
            assert torch.count_nonzero(kept[i]) == torch.count_nonzero(z[i]) == 0
        else:
            assert torch.equal(kept[i], states[row])
            assert not torch.equal(out[row], states[row])
    _, z, kept = op(*case.args({"rows": None, "residual": None}, backend))
    assert z.shape == (13, 8)
    assert kept.shape == (0, 40)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_special_values_stay_in_their_rows(backend):
    case = ReftCase.make((13,), 40, 4, rows=[1, 5]).on(backend)
    case.h[2], case.h[5, 3] = float("nan"), float("inf")
    out, _, _ = op(*case.args({}, backend))
    assert out[2].isnan().all()
    assert out[[i for i in range(13) if i not in (2, 5)]].isfinite().all()
    assert not out[5].isfinite().all()


def test_strided_operands(backend):
    case = ReftCase.make((2, 9), 32, 4, terms=2, rows=ROWS, residual=True, dropout_p=0.3)
    strided = ReftCase(**case.__dict__)
    for name in ("h", "residual", "rows", "bias", "mask"):
        setattr(strided, name, getattr(case, name).repeat_interleave(2, dim=0)[::2])
    for name in ("projection", "basis"):
        setattr(strided, name, getattr(case, name).t().contiguous().t())
    strided.grad = case.grad[:1].expand_as(case.grad)
    case.grad = strided.grad.contiguous()
    got = strided.run(backend)
    for name, expected in case.run(backend).items():
        assert torch.equal(got[name], expected), name


@pytest.mark.parametrize("one", ReftCase.leaves)
@pytest.mark.parametrize("alone", [False, True])
def test_subsets_of_gradients(backend, one, alone):
    """Each alone, and all but each."""
    case = ReftCase.make((13,), 24, 3, terms=2, act="relu", rows=ROWS, residual=True).on(backend)
    names = [name for name in case.leaves if (name == one) == alone]
    leaves = {n: getattr(case, n).clone().requires_grad_(n in names) for n in case.leaves}
    full = case.run(backend)
    op(*case.args(leaves, backend))[0].backward(case.grad)
    for name, leaf in leaves.items():
        if name in names:
            torch.testing.assert_close(leaf.grad.cpu(), full[f"d{name}"], rtol=1e-6, atol=1e-6)
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("rows", [None, ROWS])
def test_backward_leaves_its_inputs_alone_and_repeats(backend, rows):
    case = ReftCase.make((13,), 24, 3, terms=2, act="gelu", rows=rows, dropout_p=0.3).on(backend)
    leaves = {n: t.clone().requires_grad_() for n, t in case._leaves().items()}
    inputs = [t for t in (*case.args(leaves, backend), case.grad) if torch.is_tensor(t)]
    before = [(t.clone(), t._version) for t in inputs]
    y = op(*case.args(leaves, backend))[0]
    first = torch.autograd.grad(y, list(leaves.values()), case.grad, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), case.grad)
    assert all(map(torch.equal, first, second))
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


class NoGradient(torch.autograd.Function):
    """Its input, which gets none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_an_output_without_a_gradient_gives_none(backend):
    case = ReftCase.make((5,), 24, 3, terms=2).on(backend)
    leaves = case._leaves()
    NoGradient.apply(op(*case.args(leaves, backend))[0]).sum().backward()
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("terms", "drop_state"), [(0, False), (1, True), (2, False), (2, True)])
def test_gradcheck_of_the_formula(act, terms, drop_state):
    options = {"terms": terms, "act": act, "dropout_p": 0.3, "drop_state": drop_state}
    case = ReftCase.make((2, 2), 3, 2, rows=[3, -1, 1], residual=True, dtype=torch.float64, **options)
    leaves = case._leaves()

    def of(*values):
        return op(*case.args(dict(zip(leaves, values, strict=True)), "reference"))[0]

    assert torch.autograd.gradcheck(of, list(leaves.values()))


@pytest.mark.parametrize(("rows", "residual"), [(None, False), (ROWS, True)])
def test_opcheck(backend, rows, residual):
    case = ReftCase.make((2, 9), 24, 3, terms=2, rows=rows, residual=residual, dropout_p=0.3).on(backend)
    leaves = case._leaves()
    torch.library.opcheck(op.default, case.args(leaves, backend))
    assert_same_outputs(op, case.args(leaves, backend))
    h, _, rows, *operands, mask, p, drop_state, act, _ = case.args({}, backend)
    _, z, kept = op(*case.args({}, backend))
    args = (case.grad, kept if rows is not None or residual else h, rows, *operands, z, mask, p, drop_state)
    for needs in ((True,) * 4, (False, True, False, True)):
        torch.library.opcheck(torch.ops.peft_fast.loreft_backward.default, (*args, act, *needs, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph(compiler, dynamic):
    torch._dynamo.reset()

    def step(h, residual, V, b, R, rows):
        return loreft(h.relu(), R, V, b, rows=rows, residual=residual, act="gelu").sin()

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=dynamic)
    for M, rows in ((13, ROWS), (21, [20, 4, 9])):
        operands = [torch.randn(*s) for s in ((M, 24), (M, 24), (3, 24), (3,), (3, 24))]
        results = []
        for run in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in operands]
            y = run(*leaves, torch.tensor(rows))
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)


def test_a_compiled_dropout_is_drawn_anew():
    torch._dynamo.reset()
    h, R, V = torch.randn(13, 24), torch.randn(3, 24), torch.randn(3, 24)
    drop = torch.compile(lambda h: loreft(h, R, V, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(drop(h), drop(h))


@pytest.mark.parametrize(("rows", "residual"), [(None, False), (None, True), (ROWS, False), (ROWS, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_the_edited_rows_and_small_things(rows, residual, dtype):
    M, d, r = 48, 128, 4
    case = ReftCase.make((M,), d, r, terms=2, rows=rows, residual=residual, dtype=dtype, dropout_p=0.1)
    saved, leaves = {}, case._leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        op(*case.args(leaves, "auto"))
    owned = {t.data_ptr() for t in case.args(leaves, "auto") if torch.is_tensor(t)}
    extra = sum(t.numel() * t.element_size() for p, t in saved.items() if p not in owned)
    m = M if rows is None else len(rows)
    kept = m * d * dtype.itemsize if rows or residual else 0
    assert extra == kept + 4 * m * 2 * r
    assert (leaves["h"].data_ptr() in saved) == (rows is None and not residual)


def test_a_call_is_counted(backend):
    names = ("loreft", backend), ("loreft_backward", backend)
    before = [backends.calls[name] for name in names]
    ReftCase.make((3,), 16, 2).run(backend)
    assert [backends.calls[name] for name in names] == [count + 1 for count in before]


def test_a_backend_without_the_op_says_so(monkeypatch):
    class Bare:
        lora_linear = staticmethod(reference.lora_linear)

    row = backends.Backend(lambda: Bare, lambda *_: None)
    monkeypatch.setattr(backends, "BACKENDS", {"bare": row, "reference": backends.BACKENDS["reference"]})
    assert backends.availability("loreft", "dense", "cpu", torch.float32) == {
        "bare": "it has no loreft",
        "reference": None,
    }
    assert backends.resolve("loreft", "dense", "cpu", torch.float32) == "reference"
    assert backends.resolve("lora_linear", "dense", "cpu", torch.float32) == "bare"
    with pytest.raises(BackendUnavailable, match=r"'bare' cannot run loreft .*: it has no loreft"):
        loreft(torch.randn(3, 16), torch.randn(2, 16), backend="bare")


VARIANTS = {
    "loreft": {},
    "direft": {"subtract": False},
    "consreft": {"source": False},
    "lobireft": {"source": False, "subtract": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("act", ["linear", "gelu", "sigmoid"])
@pytest.mark.parametrize("dropout_on", ["edit", "state"])
@pytest.mark.parametrize("rows", [None, [12, -1, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_of_the_paper(variant, act, dropout_on, rows, dtype):
    """And the dropout of `F.dropout` on the edited rows; parameters in the dtype of h."""
    options = {"source": True, "subtract": True} | VARIANTS[variant]
    R, V = torch.linalg.qr(torch.randn(24, 3))[0].t(), torch.randn(3, 24) / 24**0.5
    operands = [torch.randn(2, 9, 24), torch.randn(2, 9, 24), R, torch.randn(3), V]
    operands = [t.to(dtype) for t in operands[: 4 + options["source"]]]
    grad = torch.randn(2, 9, 24, dtype=dtype)
    rows = None if rows is None else torch.tensor(rows)

    def fused(h, residual, R, b, V=None):
        return loreft(
            h, R, V, b, subtract=options["subtract"], rows=rows, residual=residual, act=act,
            dropout_p=0.4, dropout_on=dropout_on,
        )  # fmt: skip

    def plain(h, residual, R, b, V=None):
        states = (h + residual).view(-1, 24)
        edited = torch.arange(18) if rows is None else rows
        keep = F.dropout(torch.ones(len(edited), 24), 0.4)[edited >= 0].to(R.dtype)
        edited = edited[edited >= 0]
        selected = states[edited].to(R.dtype)
        learned = b.expand(len(edited), 3) if V is None else F.linear(selected, V, b)
        learned = learned if act == "linear" else getattr(F, act)(learned)
        edit = (learned - selected @ R.t() if options["subtract"] else learned) @ R
        new = selected + edit * keep if dropout_on == "edit" else (selected + edit) * keep
        return states.index_put((edited,), new.to(states.dtype)).view(2, 9, 24)

    def results(run, to):
        leaves = [t.to(to, copy=True).requires_grad_() for t in operands]
        torch.manual_seed(1)
        y = run(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(to))]

    by = zip(results(fused, dtype), results(plain, dtype), results(plain, torch.float64), strict=True)
    for name, (got, expected, truth) in zip(("y", "dh", "dresidual", "dR", "db", "dV"), by, strict=False):
        assert_as_exact(name, got, expected, truth)


def test_without_training_nothing_is_dropped_and_nothing_drawn():
    h, R, V = torch.randn(5, 16), torch.randn(2, 16), torch.randn(2, 16)
    state = torch.get_rng_state()
    assert torch.equal(loreft(h, R, V, dropout_p=0.9, training=False), loreft(h, R, V))
    assert torch.equal(torch.get_rng_state(), state)


def test_dtypes_promote_as_in_a_sum_and_autocast_changes_none():
    h, residual = torch.randn(5, 16, dtype=torch.bfloat16), torch.randn(5, 16)
    R, V = torch.randn(2, 16, dtype=torch.float16), torch.randn(2, 16, dtype=torch.float64)
    y = loreft(h, R, V, residual=residual)
    assert torch.equal(y, loreft(h.float() + residual, R.float(), V.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loreft(h, R, V, residual=residual), y)


@pytest.mark.parametrize(
    ("argument", "error", "change"),
    [
        ("h", ValueError, {"h": torch.randn(())}),
        ("h", TypeError, {"h": torch.ones(3, 16, dtype=torch.int64)}),
        ("basis", ValueError, {"basis": torch.randn(2, 15), "source": None}),
        ("basis", ValueError, {"basis": torch.randn(16)}),
        ("basis", TypeError, {"basis": torch.ones(2, 16, dtype=torch.int8)}),
        ("source", ValueError, {"source": torch.randn(3, 16)}),
        ("source", TypeError, {"source": torch.ones(2, 16, dtype=torch.int64)}),
        ("source", ValueError, {"source": torch.empty(2, 16, device="meta")}),
        ("bias", ValueError, {"bias": torch.randn(3)}),
        ("bias", ValueError, {"bias": torch.randn(1, 2)}),
        ("rows", ValueError, {"rows": torch.tensor([[0]])}),
        ("rows", TypeError, {"rows": torch.tensor([0], dtype=torch.int32)}),
        ("rows", ValueError, {"rows": torch.tensor([0, 3])}),
        ("residual", ValueError, {"residual": torch.randn(16)}),
        ("residual", ValueError, {"residual": torch.empty(3, 16, device="meta")}),
        ("act", ValueError, {"act": "swish"}),
        ("dropout_p", ValueError, {"dropout_p": 1.5}),
        ("dropout_on", ValueError, {"dropout_on": "both"}),
        ("backend", ValueError, {"backend": "cuda-magic"}),
    ],
)
def test_bad_input_names_the_argument(argument, error, change):
    good = {"h": torch.randn(3, 16), "basis": torch.randn(2, 16), "source": torch.randn(2, 16)}
    with pytest.raises(error, match=rf"^{argument}: expected .*, got "):
        loreft(**(good | change))


@pytest.mark.parametrize(
    ("argument", "error", "value"),
    [
        ("projection", ValueError, torch.randn(3, 16)),
        ("projection", ValueError, torch.randn(2, 15)),
        ("projection", TypeError, torch.randn(2, 16).double()),
        ("basis", TypeError, torch.randn(2, 16).half()),
        ("bias", TypeError, torch.randn(2).half()),
        ("residual", TypeError, torch.randn(13, 16).half()),
        ("mask", ValueError, torch.zeros(13, 2, dtype=torch.uint8)),
        ("mask", TypeError, torch.zeros(6, 2, dtype=torch.bool)),
        ("act", ValueError, "swish"),
        ("dropout_p", ValueError, -0.1),
    ],
)
def test_bad_operands_of_the_op_are_named(argument, error, value):
    case = ReftCase.make((13,), 16, 2, rows=ROWS, dropout_p=0.5)
    said = "dropout_mask" if argument == "mask" else argument
    with pytest.raises(error, match=rf"^{said}: expected .*, got "):
        op(*case.args({argument: value}, "auto"))


def test_a_projection_without_rows_needs_the_bias():
    case = ReftCase.make((3,), 16, 2, terms=0, bias=False)
    with pytest.raises(ValueError, match=r"^bias: expected \[r\] = \[2\], .*got None"):
        op(*case.args({}, "auto"))
