"""`loreft` of the C++ backend: every instruction-set level against fp64, its bits, and what it refuses."""

import pytest
import torch
from test_cpu import assert_same_bits, bits
from tolerances import assert_as_exact

from peft_fast import native, reference
from peft_fast.reference import ACTIVATIONS, ReftNeeds

pytestmark = pytest.mark.usefixtures("poisoned")

ALL = ReftNeeds(True, True, True, True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "z", "kept", "dH", "dP", "dbias", "dbasis")


@pytest.fixture(params=native.levels() or ("not built",))
def level(request):
    assert native.load_error() is None, native.load_error()
    return native.Level(request.param)


def spread(*shape):
    """Random values around 1: sums that cancel would tell more of the data than of how they were summed."""
    return torch.randn(*shape) * 0.3 + 1.0


class Case:
    """Random operands of one call, and its results from a backend."""

    def __init__(
        self, M, d, r, m=None, columns=1, dtype=torch.float32, residual=False, act="linear", dropout_p=0.0,
        drop_state=False, skipped=0,
    ):  # fmt: skip
        self.act, self.dropout_p, self.drop_state = act, dropout_p, drop_state
        self.h, self.grad = spread(M, d).to(dtype), spread(M, d).to(dtype)
        self.residual = torch.randn(M, d).to(dtype) if residual else None
        self.rows = None if m is None else torch.randperm(M)[:m]
        if skipped:
            self.rows[torch.randperm(m)[:skipped]] = -1 - torch.arange(skipped)
        self.projection, self.basis = spread(columns * r, d) / d**0.5, spread(r, d) / d**0.5
        self.bias = torch.randn(r)
        keep = torch.rand(M if m is None else m, d) >= dropout_p
        self.mask = reference.pack_mask(keep) if dropout_p else None

    def results(self, backend, double=False):
        def of(tensor):
            return tensor.double() if double and tensor is not None else tensor

        h, basis = of(self.h), of(self.basis)
        edit = (self.rows, of(self.projection), of(self.bias), basis)
        how = (self.mask, self.dropout_p, self.drop_state, self.act)
        out, z, kept = backend.loreft(h, of(self.residual), *edit, *how)
        saved = h if self.rows is None and self.residual is None else kept
        grads = backend.loreft_backward(of(self.grad), saved, *edit, z, *how, ALL)
        return dict(zip(NAMES, (out, z, kept, *grads), strict=True))

    def check(self, backend):
        got, plain, truth = (
            self.results(backend),
            self.results(reference),
            self.results(reference, double=True),
        )
        for name in NAMES:
            assert_as_exact(name, got[name], plain[name], truth[name])
        if self.rows is not None:
            other = torch.ones(len(self.h), dtype=torch.bool)
            other[self.rows[self.rows >= 0]] = False
            for name in ("out", "dH"):
                assert torch.equal(bits(got[name][other]), bits(plain[name][other])), name
            assert torch.equal(bits(got["kept"]), bits(plain["kept"]))


# ------------------------------------------------------------------------------------------ against fp64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [0, 1, 3, 4, 19, 300])
@pytest.mark.parametrize("d", [1, 7, 33, 129, 384])
def test_shapes(level, dtype, M, d):
    for r in (0, 1, 5, 17):
        for m in (None, 0, M // 2, M):
            Case(M, d, r, m, dtype=dtype).check(level)


@pytest.mark.parametrize("columns", [0, 1, 2])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("m", [None, 50])
def test_every_kind_of_edit(level, columns, act, m):
    for dtype in DTYPES:
        Case(90, 96, 4, m, columns, dtype, act=act, skipped=0 if m is None else 3).check(level)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop_state", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
def test_dropout_and_residual(level, dtype, drop_state, dropout_p):
    for d in (64, 301):
        for m, skipped in ((None, 0), (9, 2)):
            for residual in (False, True):
                how = (2, dtype, residual, "silu", dropout_p, drop_state, skipped)
                Case(21, d, 6, m, *how).check(level)


def test_long_reductions(level):
    Case(700, 520, 8).check(level)
    Case(2100, 130, 8, 1500).check(level)
    Case(20, 4099, 16, 11, 2).check(level)


def test_without_bias(level):
    case = Case(20, 70, 5, 12, 2, act="gelu")
    case.bias.zero_()
    with_zeros = case.results(level)
    case.bias = None
    assert_same_bits(case.results(level), with_zeros)


def test_misaligned_operands(level):
    case = Case(9, 47, 3, 5, residual=True)
    expected = case.results(level)
    for name in ("h", "grad", "residual", "projection", "bias", "basis"):
        tensor = getattr(case, name)
        moved = torch.cat([torch.zeros(1), tensor.flatten()])[1:].view_as(tensor)
        assert moved.data_ptr() % 16
        setattr(case, name, moved)
    assert_same_bits(case.results(level), expected)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 30.0, -30.0, 200.0, -200.0, float("inf"), float("nan")])
def test_special_values_of_an_activation(act, value):
    case = Case(1, 1, 1, None, 0, act=act)
    case.h, case.grad, case.basis = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    case.bias = torch.tensor([value])
    got, plain = case.results(native.Level("")), case.results(reference)
    for name in ("out", "dbias"):
        torch.testing.assert_close(got[name], plain[name], rtol=2e-6, atol=1e-7, equal_nan=True)


# ----------------------------------------------------------------------------------------------- its bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(level, dtype):
    cases = [
        Case(600, 544, 9, 201, 2, dtype, True, "gelu", 0.25, skipped=11),
        Case(500, 300, 8, dtype=dtype),
        Case(64, 384, 4, 14, dtype=dtype),
    ]
    before = torch.get_num_threads()
    try:
        for case in cases:
            torch.set_num_threads(1)
            one = case.results(level)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                assert_same_bits(case.results(level), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(level, dtype):
    case = Case(50, 301, 7, None, 2, dtype, True, "tanh")
    whole = case.results(level)
    operands = {name: getattr(case, name) for name in ("h", "grad", "residual")}
    for first, stop in ((0, 1), (7, 9), (10, 13), (20, 47)):
        for name, tensor in operands.items():
            setattr(case, name, tensor[first:stop].contiguous())
        part = case.results(level)
        for name in ("out", "z", "kept", "dH"):
            assert torch.equal(bits(part[name]), bits(whole[name][first:stop])), name


def test_nonfinite_row_stays_in_its_row(level):
    case = Case(30, 96, 6, 20, skipped=2)
    clean = case.results(level)
    row = case.rows[case.rows >= 0][3]
    case.h[row, 5], case.grad[row, 7] = float("nan"), float("inf")
    dirty = case.results(level)
    others = torch.arange(30) != row
    for name in ("out", "dH"):
        assert not dirty[name][row].isfinite().all()
        assert torch.equal(dirty[name][others], clean[name][others]), name


def test_skipped_rows_contribute_nothing(level):
    case = Case(30, 96, 6, 20, 2, residual=True, act="silu", dropout_p=0.2)
    case.rows[[0, 7, 19]] = torch.tensor([-1, -9, -(2**62)])
    got = case.results(level)
    assert not got["z"][[0, 7, 19]].any()
    assert not got["kept"][[0, 7, 19]].any()
    case.mask = case.mask[case.rows >= 0]
    case.rows = case.rows[case.rows >= 0]
    for name, tensor in case.results(level).items():
        if name in ("out", "dH"):
            assert torch.equal(tensor, got[name])
        elif name in ("dP", "dbias", "dbasis"):
            torch.testing.assert_close(tensor, got[name])


def test_only_the_needed_gradients(level):
    for m, dropout_p in ((None, 0.0), (13, 0.3)):
        case = Case(30, 96, 6, m, 2, act="gelu", dropout_p=dropout_p)
        how = (case.mask, dropout_p, False, "gelu")
        args = (case.grad, case.h[: m or 30], case.rows, case.projection, case.bias, case.basis)
        z = torch.randn(m or 30, 12)
        full = level.loreft_backward(*args, z, *how, ALL)
        for i in range(4):
            needs = ReftNeeds(*(j == i for j in range(4)))
            some = level.loreft_backward(*args, z, *how, needs)
            assert [g is not None for g in some] == list(needs)
            assert torch.equal(some[i], full[i])


# ---------------------------------------------------------------------------------------- hostile inputs

WRONG = {
    "h": lambda c: {"h": c.h.double()},
    "residual": lambda c: {"residual": c.h[1:]},
    "residual ": lambda c: {"residual": c.h.half()},
    "rows": lambda c: {"rows": torch.tensor([0, 20])},
    "rows ": lambda c: {"rows": c.rows.int()},
    "rows  ": lambda c: {"rows": torch.arange(20)[::2]},
    "projection": lambda c: {"projection": c.projection[1:]},
    "projection ": lambda c: {"projection": c.projection.half()},
    "projection  ": lambda c: {"projection": c.projection[:, 1:].contiguous()},
    "basis": lambda c: {"basis": c.basis[:, 1:].contiguous()},
    "basis ": lambda c: {"basis": c.basis.t().contiguous().t()},
    "bias": lambda c: {"bias": c.bias[1:]},
    "bias ": lambda c: {"bias": None, "projection": c.projection[:0]},
    "dropout_mask": lambda c: {"mask": torch.zeros(5, 8, dtype=torch.uint8)},
    "dropout_p": lambda c: {"dropout_p": -0.1},
    "act": lambda c: {"act": "relu6"},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operand_raises(name):
    case = Case(20, 64, 4, 7)
    for attribute, value in WRONG[name](case).items():
        setattr(case, attribute, value)
    with pytest.raises(RuntimeError, match=f"{name.strip()}: expected .*, got"):
        case.results(native.Level(""))


WRONG_IN_BACKWARD = {
    "grad": lambda a: {"grad": a["grad"].double()},
    "kept": lambda a: {"kept": a["kept"][1:]},
    "kept ": lambda a: {"kept": a["kept"].half()},
    "z": lambda a: {"z": a["z"][:, 1:].contiguous()},
    "z ": lambda a: {"z": a["z"].half()},
    "rows": lambda a: {"rows": a["rows"] + 20},
}


@pytest.mark.parametrize("name", WRONG_IN_BACKWARD)
def test_wrong_operand_of_the_backward_raises(name):
    case = Case(20, 64, 4, 7)
    arguments = {
        "grad": case.grad,
        "kept": case.h[:7],
        "rows": case.rows,
        "projection": case.projection,
        "bias": case.bias,
        "basis": case.basis,
        "z": torch.zeros(7, 4),
    }
    arguments.update(WRONG_IN_BACKWARD[name](arguments))
    with pytest.raises(RuntimeError, match=f"{name.strip()}: expected .*, got"):
        native.Level("").loreft_backward(*arguments.values(), None, 0.0, False, "linear", ALL)
