"""NaN, infinities, overflow, denormals and zeros in every operand of every op, on every backend.

What is not finite appears where it does in the reference, and nowhere else: where the reference keeps the
bits of a result, so does the backend.
"""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cases import HALF, Case, ReftCase, backends_of, check
from fuzz import Dora, Sizes, Weight
from tolerances import assert_as_exact

from peft_fast import dora, reference

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

R = 5
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
FAST = [name for name in backends_of("lora_linear", "nf4") if name != "triton"]

# (dtype, format, M, K, N): few rows, which the CPU takes in another way than many, and many.
KINDS = [
    (torch.float32, "nf4", 3, 96, 40),
    (torch.float32, "dense", 20, 96, 40),
    (torch.bfloat16, "nf4", 20, 96, 40),
    (torch.bfloat16, "dense", 3, 96, 40),
    (torch.float16, "nf4", 20, 96, 40),
]
FEW = [(torch.float32, "nf4", 3, 40, 20)]  # for Triton's interpreter, which is slow


def lora_case(dtype, format, M, K, N, **options):
    packing = {} if format == "dense" else {"nested": False}
    return Case.make(format, (M,), K, N, R, dtype=dtype, **packing, **options)


def dora_case(dtype, format, M, K, N):
    weight = Weight(format, {} if format == "dense" else {"nested": False})
    layouts = ("contiguous",) * 5
    spec = Dora(Sizes(M, K, N, R), weight, "M", dtype, True, 0.0, 0.5, "paper", "full", layouts, 0)
    return spec.make(0)


def with_element(t, value):
    """A copy of t with one element, in its second row where it has one, of another value."""
    changed = t.clone()
    changed.view(-1)[min(t.numel() - 1, t.shape[-1] + 5 if t.dim() > 1 else 5)] = value
    return changed


def spoilt(case, operand, value):
    if operand == "weight":
        weight = case.weight
        field = "weight" if weight.format == "dense" else "absmax"
        changed = weight._replace(**{field: with_element(getattr(weight, field), value)})
        return replace(case, weight=changed)
    return replace(case, **{operand: with_element(getattr(case, operand), value)})


def check_spread(case, operands, backends):
    """One element of each operand in turn."""
    spread: Counter[str] = Counter()
    clean, before = case.run("reference"), {backend: case.run(backend) for backend in backends}
    for operand, value in itertools.product(operands, NOT_FINITE):
        bad = spoilt(case, operand, value)
        expected = bad.run("reference")
        # Not always: an activation may saturate, and an element may be dropped out.
        spread[operand] += not all(t.isfinite().all() for t in expected.values())
        for backend in backends:
            got = bad.run(backend)
            for name, right in expected.items():
                said = (backend, operand, value, name)
                assert torch.equal(got[name].isfinite(), right.isfinite()), said
                kept = right == clean[name]
                assert torch.equal(got[name][kept], before[backend][name][kept]), said
    assert sum(count > 0 for count in spread.values()) >= len(operands) - 1, spread


LORA = ("x", "lora_A", "lora_B", "bias", "out_scale", "grad", "weight")
LOREFT = ("h", "residual", "projection", "bias", "basis", "grad")
DORA = ("x", "lora_A", "lora_B", "magnitude", "bias", "grad", "weight")


@pytest.mark.parametrize("kind", KINDS)
def test_lora_linear(kind):
    check_spread(lora_case(*kind, out_scale=True, dropout_p=0.3), LORA, FAST)


@pytest.mark.parametrize("kind", KINDS)
def test_dora_linear(kind):
    check_spread(dora_case(*kind), DORA, FAST)


def reft_case(act, dtype, rows):
    return ReftCase.make(
        (9,), 70, R, terms=2, rows=rows, act=act, dtype=dtype, residual=True, dropout_p=0.3,
        drop_state=act == "tanh",
    )  # fmt: skip


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("rows", [None, [7, 1, -1, 4]])
def test_loreft(act, rows):
    dtype = (torch.float32, *HALF)[len(act) % 3]
    check_spread(reft_case(act, dtype, rows), LOREFT, FAST)


@pytest.mark.skipif("triton" not in backends_of("lora_linear", "nf4"), reason="needs Triton")
def test_triton():
    check_spread(lora_case(*FEW[0], out_scale=True, dropout_p=0.3), LORA, ["triton"])
    check_spread(dora_case(*FEW[0]), DORA[3:4], ["triton"])
    check_spread(reft_case("gelu", torch.float32, [7, 1, -1, 4]), LOREFT, ["triton"])


# --------------------------------------------------------------------------------- zeros, denormals, overflow


def kinds(backend):
    return FEW if backend == "triton" else KINDS


def zero_row(name):
    def change(case):
        tensor = getattr(case, name).clone()
        tensor[1] = 0
        return replace(case, **{name: tensor})

    return change


def scaled(name, factor):
    return lambda case: replace(case, **{name: getattr(case, name) * factor})


def zero_weight_rows(case):
    dense = case.weight.decode(torch.float32).clone()
    dense[::3] = 0
    return replace(case, weight=case.weight._replace(weight=dense, format="dense"))


def absmax(value):
    return lambda case: replace(
        case,
        weight=case.weight._replace(
            absmax=case.weight.absmax.clone().index_fill_(
                0, torch.arange(0, len(case.weight.absmax), 2), value
            )
        ),
    )


EXACT = {
    "a zero row of x": zero_row("x"),
    "a zero row of lora_A": zero_row("lora_A"),
    "a zero row of lora_B": zero_row("lora_B"),
    "a zero row of dY": zero_row("grad"),
    "no x": scaled("x", 0.0),
    "no dY": scaled("grad", 0.0),
    "no adapter": scaled("lora_B", 0.0),
    "zero rows of the weight": zero_weight_rows,
    "zero blocks": absmax(0.0),
    "negative blocks": absmax(-0.01),
    "denormal blocks": absmax(1e-40),
    "tiny x": scaled("x", 2.0**-120),
    "tiny dY": scaled("grad", 2.0**-120),
    "tiny lora_A": scaled("lora_A", 2.0**-120),
    "denormal x": scaled("x", 2.0**-133),
    "denormal dY": scaled("grad", 2.0**-133),
    "large x": scaled("x", 2.0**100),
}


@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("kind", [KINDS[0], (torch.float32, "nf4", 20, 96, 40), KINDS[2]])
def test_as_exact_as_plain_pytorch(how, kind):
    for out_scale in (False, True):
        case = EXACT[how](lora_case(*kind, out_scale=out_scale, bias=False))
        plain, truth = case.plain(), case.plain(torch.float64)
        for backend in FAST:
            for name, got in case.run(backend).items():
                assert_as_exact(f"{backend} {name}", got, plain[name], truth[name])


@pytest.mark.skipif("triton" not in backends_of("lora_linear", "nf4"), reason="needs Triton")
@pytest.mark.parametrize("how", ["zero blocks", "denormal blocks", "tiny x", "no dY"])
def test_triton_is_as_exact(how):
    check(EXACT[how](lora_case(*FEW[0], out_scale=True, bias=False)), "triton")


@pytest.mark.parametrize("name", ["x", "grad"])
def test_float16_overflows_where_the_true_value_does(backend, name):
    for M in (3,) if backend == "triton" else (3, 20):
        case = lora_case(torch.float16, "nf4", M, 96, 40, bias=False)
        # A little of the result is the low-rank part: the reference rounds the base alone, too.
        weight = case.weight._replace(absmax=6 * case.weight.absmax)
        case = scaled(name, 2.0**13)(replace(case, weight=weight, lora_B=case.lora_B / 64))
        assert getattr(case, name).isfinite().all()
        got, truth = case.run(backend), case.plain(torch.float64)
        result = {"x": "y", "grad": "dx"}[name]
        over, below = truth[result].abs() > 65520 * 1.02, truth[result].abs() < 65504 * 0.98
        assert over.any()
        assert below.any()
        assert torch.equal(got[result][over], truth[result][over].sign().half() * float("inf"))
        assert got[result][below].isfinite().all()
        torch.testing.assert_close(got[result][below].double(), truth[result][below], rtol=2e-3, atol=64)


@pytest.mark.parametrize("magnitude", [0.0, -0.0, 1e-40])
@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_magnitudes_at_zero(backend, magnitude, norm_grad):
    """The output of such a row is the bias, and its gradients are those of the formula."""
    for kind in kinds(backend)[:2]:
        case = replace(dora_case(*kind), norm_grad=norm_grad)
        case.magnitude[::4] = magnitude
        got, truth = case.run(backend), case.plain(torch.float64)
        assert torch.equal(got["y"][:, ::4], case.bias[::4].expand_as(got["y"][:, ::4]))
        for name, exact in truth.items():
            torch.testing.assert_close(got[name].double(), exact, rtol=1e-4, atol=1e-4, msg=name)


def test_rows_without_a_norm(backend):
    """‖Ŵ + s·B·A‖ of 0 counts as NORM_MIN: the output is the bias, every gradient a number."""
    for M in (3,) if backend == "triton" else (3, 20):
        case = dora_case(torch.float32, "dense", M, 96, 40)
        case.weight.weight[::4] = 0
        case.lora_B[::4] = 0
        got = case.run(backend)
        assert torch.equal(got["y"][:, ::4], case.bias[::4].expand_as(got["y"][:, ::4]))
        assert all(t.isfinite().all() for t in got.values())
        assert not got["dmagnitude"][::4].any()
        norm = dora.lora_weight_norm(case.weight, case.lora_A, case.lora_B, case.scaling)
        assert (norm[::4] == dora.NORM_MIN).all()


def test_zero_by_zero(backend):
    """Neither tokens nor ranks."""
    got = Case.make("nf4", (0,), 96, 40, 0, out_scale=True).run(backend)
    shapes = {"y": (0, 40), "dx": (0, 96), "dlora_A": (0, 96), "dlora_B": (40, 0), "dbias": (40,)}
    assert {name: tuple(t.shape) for name, t in got.items()} == shapes | {"dout_scale": (40,)}
    assert not got["dbias"].any()
    assert not got["dout_scale"].any()
