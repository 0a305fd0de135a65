"""The loreft kernels in Triton: launches, tiles, indices that only they take, 64-bit offsets, activations.

The numbers of every variant and dtype are tested for all backends in test_loreft.py.
"""

import itertools

import pytest
import torch
from tolerances import assert_as_exact
from triton_cases import DEVICE, DTYPES, Launches, bits, on_device, sparse_bytes

# isort: split
import triton
import triton.language as tl
from peft_fast.triton_kernels import configs, tiles

from peft_fast import reference, triton_kernels
from peft_fast.reference import ReftNeeds

pytestmark = pytest.mark.usefixtures("poisoned")

ALL = ReftNeeds(True, True, True, True)


def operands(M, d, r, rows=None, *, terms=2, act="gelu", dtype=torch.float32, residual=False, p=0.3):
    """The arguments of the forward, and grad."""
    h, grad = torch.randn(M, d).to(dtype), torch.randn(M, d).to(dtype)
    rows = rows if rows is None else torch.tensor(rows)
    m = M if rows is None else len(rows)
    projection, bias, basis = torch.randn(terms * r, d) / d**0.5, torch.randn(r), torch.randn(r, d)
    mask = torch.ops.peft_fast.dropout_mask(torch.empty(m, d), p) if p else None
    return [
        h,
        torch.randn_like(h) if residual else None,
        rows,
        projection,
        bias,
        basis,
        mask,
        p,
        False,
        act,
    ], grad


def backward(module, arguments, grad, z, kept, needs=ALL):
    h, _, rows, projection, bias, basis, mask, p, drop_state, act = arguments
    kept = kept if len(kept) == len(z) else h
    return module.loreft_backward(
        grad, kept, rows, projection, bias, basis, z, mask, p, drop_state, act, needs
    )._asdict()


def run(module, arguments, grad):
    """{name: result} of one backend's forward and backward, on the CPU."""
    out, z, kept = module.loreft(*arguments)
    gradients = backward(module, arguments, grad, z, kept)
    results = {"out": out, "z": z, "kept": kept, **{f"d_{name}": t for name, t in gradients.items()}}
    return {name: t.cpu() for name, t in results.items()}


def widened(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def check(arguments, grad):
    got = run(triton_kernels, [on_device(a) for a in arguments], on_device(grad))
    plain = run(reference, arguments, grad)
    truth = run(reference, [widened(a) for a in arguments], widened(grad))
    for name in truth:
        assert_as_exact(name, got[name], plain[name], truth[name])


# ------------------------------------------------------------------------------------------- tiles and rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("r", [20, 40])
def test_every_tile(monkeypatch, dtype, which, r):
    """Blocks of rows, steps over d and rank blocks that end inside a tile, at each tile of the list."""
    choices = configs.REFT_ROWS[dtype == torch.bfloat16]
    monkeypatch.setattr(configs, "reft_rows", lambda m, dtype: choices[which % len(choices)])
    check(*operands(43, 150, r, dtype=dtype, residual=True))
    check(*operands(50, 150, r, [*range(49, 10, -1), -1, 3], dtype=dtype))


def test_the_tile_grows_with_the_rows():
    small, large = configs.REFT_ROWS[True]
    bf16, fp16 = (torch.empty(0, dtype=dtype, device=DEVICE) for dtype in (torch.bfloat16, torch.float16))
    assert configs.reft_rows(1, bf16) == small
    assert configs.reft_rows(configs.PROGRAMS * large["BLOCK_M"], bf16) == large
    assert configs.reft_rows(10**6, fp16) == configs.REFT_ROWS[False][-1]


@pytest.mark.parametrize("residual", [False, True])
def test_a_row_that_does_not_exist_is_skipped(residual):
    """An index at or past M, as a negative one: no way to raise without waiting for the device."""
    arguments, grad = operands(21, 40, 5, [4, -1, 0, -1, 20, -7, -1], residual=residual)
    expected = run(reference, arguments, grad)
    arguments[2][torch.tensor([1, 3, 6])] = torch.tensor([21, 2**40, 2**63 - 1])
    got = run(triton_kernels, [on_device(a) for a in arguments], on_device(grad))
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-5), name
    assert not got["z"][[1, 3, 5, 6]].any()
    assert not got["kept"][[1, 3, 5, 6]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_the_other_rows_keep_their_bits(dtype, residual):
    arguments, grad = operands(40, 70, 3, [3, 39, -1, 17], dtype=dtype, residual=residual)
    special = torch.tensor([torch.inf, -torch.inf, -0.0, 0.0, torch.finfo(dtype).tiny])
    others = [i for i in range(40) if i not in (3, 17, 39)]
    arguments[0][others, :5], grad[others, 5:10] = special.to(dtype), special.to(dtype)
    states = arguments[0] + arguments[1] if residual else arguments[0]
    got = run(triton_kernels, [on_device(a) for a in arguments], on_device(grad))
    assert torch.equal(bits(got["out"][others]), bits(states[others]))
    assert torch.equal(bits(got["d_h"][others]), bits(grad[others]))
    assert all(t.isfinite().all() for t in (got["z"], got["kept"], got["d_projection"], got["d_basis"]))


# -------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize("rows", [None, range(69, -1, -1)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("programs", [1, 128])
def test_launches(monkeypatch, rows, residual, programs):
    """Two forward, four backward, one less each without rows; none of what nobody needs; the same bits."""
    monkeypatch.setattr(configs, "PROGRAMS", programs)
    arguments, grad = operands(70, 20, 3, rows and list(rows), residual=residual)
    arguments, grad = [on_device(a) for a in arguments], on_device(grad)
    with Launches(monkeypatch) as launches:
        _, z, kept = triton_kernels.loreft(*arguments)
        assert launches.names == [
            *([] if rows is None else ["add" if residual else "clone"]),
            "loreft_kernel",
        ]
        complete = None
        for needs in (ALL, *itertools.starmap(ReftNeeds, itertools.product(*[[False, True]] * 4))):
            del launches.names[:]
            got = backward(triton_kernels, arguments, grad, z, kept, needs)
            expected = ["clone"] if needs.h and rows is not None else []
            expected += ["loreft_rows_backward_kernel"] if any(needs[:3]) else []
            expected += ["loreft_columns_backward_kernel"] if any(needs[1:]) else []
            # Where a stripe each does not fill the device, the sum over the rows is split.
            expected += ["sum_kernel"] if any(needs[1:]) and programs > 1 else []
            assert launches.names == expected, needs
            complete = complete or got
            for name, needed in needs._asdict().items():
                assert (got[name] is not None) == needed, (name, needs)
                if needed:
                    with torch.utils._python_dispatch._disable_current_modes():
                        assert torch.equal(bits(got[name]), bits(complete[name])), (name, needs)


@pytest.mark.parametrize(("terms", "act"), [(0, "tanh"), (1, "linear"), (2, "silu")])
def test_no_projection_rows_no_launch_for_them(monkeypatch, terms, act):
    arguments, grad = operands(9, 20, 3, [1, 2], terms=terms, act=act)
    arguments, grad = [on_device(a) for a in arguments], on_device(grad)
    _, z, kept = triton_kernels.loreft(*arguments)
    launches = Launches(monkeypatch)
    got = backward(triton_kernels, arguments, grad, z, kept, ReftNeeds(False, True, False, False))
    assert got["projection"].shape == (3 * terms, 20)
    names = ["loreft_rows_backward_kernel", "loreft_columns_backward_kernel"]
    assert launches.names == (names if terms else names[:1])


# ----------------------------------------------------------------------------------------------- 64-bit sizes


def test_rows_past_2_to_the_31():
    """The last row begins past element 2³¹, in the gathers and scatters of every kernel."""
    d, last = 64, 2**25
    h = sparse_bytes((last + 1) * d * 2).view(torch.float16).view(last + 1, d)
    arguments, _ = operands(2, d, 3, [1, 0], p=0.0)
    small = [on_device(a) for a in arguments]
    small[0] = small[0].half()
    h[last], h[0] = small[0][1], small[0][0]
    rows = on_device(torch.tensor([last, 0]))
    out, z, kept = triton_kernels.loreft(*small)

    # The gradients of the parameters, for which nothing of the size of h is written.
    needs = ReftNeeds(False, True, True, True)
    expected = backward(triton_kernels, small, small[0], z, kept, needs)
    big = [h, None, rows, *small[3:]]
    for name, gradient in backward(triton_kernels, big, h, z, kept, needs).items():
        assert gradient is None or torch.equal(gradient, expected[name]), name

    # In place of a copy of so large a matrix, the matrix itself.
    kernels = triton_kernels.loreft.__globals__
    edited, z_again, kept_again = small[0].clone(), torch.zeros_like(z), torch.zeros_like(kept)
    meta = {"TERMS": 2, "ACT": "gelu", "DROP_STATE": False, "MORE_RANKS": False}
    meta |= configs.reft_rows(2, h)
    meta |= {"BLOCK_R": 16, "PRECISION": kernels["precision"](h.device)}
    projection, bias, basis = small[3:6]
    kernels["launch"](
        kernels["loreft_kernel"], (1,), h.device,
        h, None, rows, projection, bias, basis, None, h, z_again, kept_again, last + 1, 2, d, 3, 1.0, **meta,
    )  # fmt: skip
    edited[0], edited[1] = h[0], h[last]
    assert torch.equal(edited, out)
    assert torch.equal(z_again, z)
    assert torch.equal(kept_again, kept)
    assert not h[1].any()
    assert not h[last - 1].any()


# ------------------------------------------------------------------------------------------------ activations


@triton.jit
def _activate(p_in, p_value, p_slope, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b = tl.load(p_in + o, mask=o < n, other=0.0)
    tl.store(p_value + o, tiles.activation(b, ACT), mask=o < n)
    tl.store(p_slope + o, tiles.activation_slope(b, ACT), mask=o < n)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, e^−x on the way to 0
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_activations(act):
    """Against autograd in fp64, from tiny values to those where e^x overflows."""
    tiny = torch.logspace(-30, 2, 120)
    x = torch.cat((torch.zeros(1), tiny, -tiny, torch.linspace(-10, 10, 200)))
    exact = x.double().requires_grad_()
    truth = reference.ACTIVATIONS[act](exact)
    truth.sum().backward()
    value, slope = on_device(torch.empty_like(x)), on_device(torch.empty_like(x))
    _activate[(1,)](on_device(x), value, slope, len(x), ACT=act, BLOCK=512)
    # gelu and the slopes are sums that cancel.
    atol = 1e-6 if act == "gelu" else 1e-36
    assert torch.allclose(value.cpu().double(), truth.detach(), rtol=1e-5, atol=atol)
    assert torch.allclose(slope.cpu().double(), exact.grad, rtol=1e-5, atol=1e-6)
