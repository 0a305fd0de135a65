"""lora_linear: every backend × format × dtype against fp64, and the op's manners as a dispatcher op."""

import pytest
import torch
from cases import EVERY_FORMAT, FORMATS, HALF, Case, assert_same_outputs, check, make_weight
from tolerances import assert_as_exact

from peft_fast import BackendUnavailable, backends, formats, reference
from peft_fast.functional import lora_linear

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_every_dtype(backend, format, dtype):
    check(Case.make(format, (2, 9), 96, 40, 5, dtype=dtype), backend)


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("M", [1, 2, 4, 5, 15, 16, 48])
def test_every_number_of_rows(backend, format, M):
    check(Case.make(format, (M,), 128, 64, 4, dropout_p=0.2), backend)


@pytest.mark.parametrize("dtype", HALF)
def test_half_adapters(backend, dtype):
    check(Case.make("nf4", (17,), 64, 32, 4, dtype=dtype, adapter_dtype=dtype), backend)


@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
def test_dropout(backend, p):
    check(Case.make("nf4", (13,), 72, 24, 3, dropout_p=p), backend)


@pytest.mark.parametrize(
    ("M", "K", "N", "R", "blocksize"),
    [
        (1, 64, 16, 16, 64),
        (3, 65, 33, 7, 64),  # odd K: rows start in the middle of a byte, blocks straddle rows
        (5, 1, 1, 1, 64),
        (2, 37, 1, 2, 32),  # an odd number of weights
        (16, 128, 48, 33, 4096),  # one block spans several rows
        (33, 160, 130, 20, 128),
        (4, 8, 5, 12, 32),  # R > K
    ],
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("out_scale", [False, True])
def test_awkward_shapes(backend, M, K, N, R, blocksize, nested, out_scale):
    check(Case.make("nf4", (M,), K, N, R, blocksize=blocksize, nested=nested, out_scale=out_scale), backend)


@pytest.mark.parametrize("out_scale", [False, True])
def test_rank_zero_is_the_base_alone(backend, out_scale):
    case = Case.make("nf4", (6,), 64, 40, 0, out_scale=out_scale)
    got, truth = case.run(backend), case.plain(torch.float64)
    for name in got.keys() - {"dlora_A", "dlora_B"}:
        assert_as_exact(name, got[name], case.plain()[name], truth[name])
    assert got["dlora_A"].shape == (0, 64)
    assert got["dlora_B"].shape == (40, 0)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_empty_batch(backend, shape):
    got = Case.make("nf4", shape, 64, 32, 4, out_scale=True).run(backend)
    assert got["y"].shape == (*shape, 32)
    assert got["dx"].shape == (*shape, 64)
    for name in ("dlora_A", "dlora_B", "dbias", "dout_scale"):
        assert torch.count_nonzero(got[name]) == 0, name
        assert not got[name].isnan().any(), name


@pytest.mark.parametrize("out_scale", [False, True])
def test_non_contiguous_operands(backend, out_scale):
    case = Case.make("nf4", (12,), 64, 32, 4, out_scale=out_scale)
    strided = Case.make("nf4", (12,), 64, 32, 4)
    strided.__dict__.update(case.__dict__)
    strided.x = case.x.repeat_interleave(2, dim=0)[::2]
    strided.lora_A = case.lora_A.t().contiguous().t()
    strided.lora_B = case.lora_B.t().contiguous().t()
    strided.bias = case.bias.repeat_interleave(2)[::2]
    if out_scale:
        strided.out_scale = case.out_scale.repeat_interleave(2)[::2]
    strided.grad = case.grad[:1].expand_as(case.grad)
    case.grad = strided.grad.contiguous()
    for name, expected in case.run(backend).items():
        assert torch.equal(strided.run(backend)[name], expected), name


@pytest.mark.parametrize("wanted", range(1, 16))
def test_every_subset_of_gradients(backend, wanted):
    case = Case.make("nf4", (5,), 64, 32, 4).on(backend)
    names = [n for i, n in enumerate(("x", "lora_A", "lora_B", "bias")) if wanted >> i & 1]
    full = case.run(backend)
    leaves = {
        n: getattr(case, n).clone().requires_grad_(n in names) for n in ("x", "lora_A", "lora_B", "bias")
    }
    y = lora_linear(
        leaves["x"], case.weight, leaves["lora_A"], leaves["lora_B"], leaves["bias"],
        scaling=case.scaling, backend=backend,
    )  # fmt: skip
    y.backward(case.grad)
    for name, leaf in leaves.items():
        if name in names:
            torch.testing.assert_close(leaf.grad.cpu(), full[f"d{name}"], rtol=1e-6, atol=1e-6)
        else:
            assert leaf.grad is None, name


def test_backward_leaves_its_inputs_alone_and_repeats(backend):
    case = Case.make("nf4", (5,), 64, 32, 4, dropout_p=0.2).on(backend)
    x = case.x.clone().requires_grad_()
    lora_A, lora_B = case.lora_A.clone().requires_grad_(), case.lora_B.clone().requires_grad_()
    inputs = (x, case.grad, *filter(torch.is_tensor, case.weight))
    before = [(t.clone(), t._version) for t in inputs]
    y = lora_linear(x, case.weight, lora_A, lora_B, dropout_p=0.2, backend=backend)
    first = torch.autograd.grad(y, (x, lora_A, lora_B), case.grad, retain_graph=True)
    second = torch.autograd.grad(y, (x, lora_A, lora_B), case.grad)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def test_gradcheck_of_the_formula():
    weight = make_weight("nf4", 12, 10)
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 10), (4, 10), (12, 4), (12,), (12,))
    ]
    assert torch.autograd.gradcheck(
        lambda x, A, B, bias, lora_bias: lora_linear(x, weight, A, B, bias, scaling=0.7, lora_bias=lora_bias),
        leaves,
    )


@pytest.mark.parametrize("format", [*FORMATS, "int8"])
@pytest.mark.parametrize("out_scale", [False, True])
def test_opcheck(backend, format, out_scale):
    case = Case.make(format, (2, 3), 64, 32, 4, dropout_p=0.3, out_scale=out_scale).on(backend)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.bias, case.lora_A, case.lora_B)]
    scale = case.out_scale.clone().requires_grad_() if out_scale else None
    args = (leaves[0], *case.weight, *leaves[1:], case.mask, scale, 0.5, 0.3, backend)
    torch.library.opcheck(torch.ops.peft_fast.lora_linear.default, args)
    assert_same_outputs(torch.ops.peft_fast.lora_linear, args)
    of_scale = (case.out_scale, case.bias, case.grad) if out_scale else (None, None, None)
    z = torch.randn(6, 4, device=case.x.device)
    torch.library.opcheck(
        torch.ops.peft_fast.lora_linear_backward.default,
        (
            case.grad,
            case.x,
            *case.weight,
            case.lora_A,
            case.lora_B,
            z,
            case.mask,
            *of_scale,
            0.5,
            0.3,
            True,
            True,
            True,
            True,
            out_scale,
            backend,
        ),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(compiler):
    case = Case.make("nf4", (7,), 64, 32, 4)
    torch._dynamo.reset()

    def step(x, A, B, scaling):
        return lora_linear(x.relu(), case.weight, A, B, case.bias, scaling=scaling).sin()

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    results = []
    for run in (step, compiled):
        leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]
        y = run(*leaves, 0.5)
        y.backward(case.grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize("K", [0, 1, 7, 8, 9, 64, 65])
def test_the_reference_packs_a_mask(K):
    keep = torch.rand(5, K) < 0.5
    packed = reference.pack_mask(keep)
    assert packed.shape == (5, -(-K // 8))
    assert torch.equal(reference.unpack_mask(packed, K), keep)


def test_dropout_draws_the_mask_of_torch():
    x = torch.randn(3, 5, 21)
    for p in (0.1, 0.5, 1.0):
        torch.manual_seed(1)
        mask = torch.ops.peft_fast.dropout_mask(x, p)
        torch.manual_seed(1)
        kept = torch.nn.functional.dropout(torch.ones_like(x), p) != 0
        assert torch.equal(reference.unpack_mask(mask, 21), kept.view(-1, 21))
    torch.library.opcheck(
        torch.ops.peft_fast.dropout_mask.default, (x, 0.3), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_casts_the_activations_only(dtype):
    case = Case.make("nf4", (9,), 64, 32, 4)
    with torch.autocast("cpu", dtype=dtype):
        y = lora_linear(case.x, case.weight, case.lora_A, case.lora_B, case.bias)
    expected = lora_linear(case.x.to(dtype), case.weight, case.lora_A, case.lora_B, case.bias)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("scaled", ["not", "constant", "trained"])
def test_saves_only_x_and_small_things(scaled):
    """And, where out_scale is trained, the output itself: no copy of it."""
    case = Case.make("nf4", (48,), 256, 192, 4, dropout_p=0.1, out_scale=scaled != "not")
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t
        return t

    x = case.x.clone().requires_grad_()
    A, B = (t.clone().requires_grad_() for t in (case.lora_A, case.lora_B))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if scaled == "trained":
            case.out_scale.requires_grad_()
        args = (None, A, B, case.mask, case.out_scale, 0.5, 0.1, "auto")
        y, _ = torch.ops.peft_fast.lora_linear(x, *case.weight, *args)
    given = (x, A, B, case.out_scale, *case.weight)
    owned = {t.data_ptr() for t in given if torch.is_tensor(t)}
    assert (y.data_ptr() in saved) == (scaled == "trained")
    owned.add(y.data_ptr())
    extra = sum(t.numel() * t.element_size() for p, t in saved.items() if p not in owned)
    M, K, R = 48, 256, 4
    assert extra == 4 * M * R + M * K // 8


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("format", ["dense", "nf4"])
@pytest.mark.parametrize("trained", ["x", "x bias", "x lora_B", "lora_B", "x out_scale"])
def test_keeps_no_x_where_lora_a_is_frozen(backend, format, trained):
    """The gradients that are left are those that there are with that of lora_A."""
    case = Case.make(format, (3, 5), 64, 32, 4, dropout_p=0.3, out_scale=True)
    given = {"x": case.x, "bias": case.bias, "lora_B": case.lora_B, "out_scale": case.out_scale}
    leaves = {name: t.detach().clone().requires_grad_(name in trained.split()) for name, t in given.items()}
    wanted, grad, kept = [leaves[name] for name in trained.split()], torch.randn(3, 5, 32), []

    def run(lora_A):
        rest = (lora_A, leaves["lora_B"], case.mask, leaves["out_scale"], 0.5, 0.3, backend)
        return torch.ops.peft_fast.lora_linear(leaves["x"], *case.weight, leaves["bias"], *rest)[0]

    expected = torch.autograd.grad(run(case.lora_A.detach().clone().requires_grad_()), wanted, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = run(case.lora_A)
    assert leaves["x"].data_ptr() not in kept
    for got, truth in zip(torch.autograd.grad(y, wanted, grad), expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6)


def test_a_fused_call_is_counted(backend):
    case = Case.make("nf4", (3,), 64, 32, 4, dropout_p=0.1)
    before = backends.calls["lora_linear", backend], backends.calls["lora_linear_backward", backend]
    case.run(backend)
    after = backends.calls["lora_linear", backend], backends.calls["lora_linear_backward", backend]
    assert after == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": torch.randn(3, 63)}),
        ("x", {"x": torch.randn(())}),
        ("x", {"x": torch.ones(3, 64, dtype=torch.int64)}),
        ("lora_A", {"lora_A": torch.randn(4, 63)}),
        ("lora_A", {"lora_A": torch.randn(64)}),
        ("lora_A", {"lora_A": torch.ones(4, 64, dtype=torch.int8)}),
        ("lora_B", {"lora_B": torch.randn(4, 32)}),
        ("lora_B", {"lora_B": torch.randn(32, 5)}),
        ("bias", {"bias": torch.randn(31)}),
        ("bias", {"bias": torch.randn(1, 32)}),
        ("dropout_p", {"dropout_p": 1.5}),
        ("dropout_p", {"dropout_p": -0.1}),
        ("backend", {"backend": "cuda-magic"}),
        ("lora_A", {"lora_A": torch.empty(4, 64, device="meta")}),
    ],
)
def test_bad_input_names_the_argument(argument, change):
    good = {
        "x": torch.randn(3, 64),
        "lora_A": torch.randn(4, 64),
        "lora_B": torch.randn(32, 4),
        "bias": torch.randn(32),
    }
    call = good | change
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: expected"):
        lora_linear(weight=make_weight("nf4", 32, 64), **call)


def test_an_explicit_backend_runs_or_raises():
    with pytest.raises(BackendUnavailable, match="float64"):
        backends.resolve("lora_linear", "nf4", "cpu", torch.float64, "cpu")
    with pytest.raises(BackendUnavailable, match="got cuda"):
        backends.resolve("lora_linear", "nf4", "cuda", torch.float32, "cpu")
    assert backends.resolve("lora_linear", "nf4", "cpu", torch.float64) == "reference"
    assert backends.resolve("lora_linear", "nf4", "cpu", torch.float32) == "cpu"


def test_the_reference_is_last_and_runs_everything():
    assert list(backends.BACKENDS)[-1] == "reference"
    for format in formats.FORMATS:
        for dtype in (torch.float64, torch.float32, *HALF):
            assert backends.availability("lora_linear", format, "cpu", dtype)["reference"] is None
