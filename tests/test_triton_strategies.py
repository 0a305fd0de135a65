"""Each strategy of lora_linear on its own: numbers, launches, panels, and what it refuses."""

import itertools

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from cases import Case, make_weight
from tolerances import assert_as_exact
from triton_cases import DEVICE, DTYPES, Launches, on_device, operands, run

# isort: split
from peft_fast.triton_kernels import configs, strategies

from peft_fast import DoRALinear, LoRALinear, backends, scratch, triton_kernels
from peft_fast.errors import BackendUnavailable
from peft_fast.reference import Needs

pytestmark = pytest.mark.usefixtures("poisoned")
STRATEGIES = strategies.NAMES


@pytest.fixture
def small_limit(monkeypatch):
    """The least panels: 128 rows or columns."""
    monkeypatch.setitem(scratch._options, "limit", 1)


def admitted(case: Case, strategy: str) -> bool:
    w, (N, R) = case.weight, case.lora_B.shape
    problem = strategies.Problem(
        case.x.numel() // w.in_features, N, w.in_features, R, case.x.dtype, w.format,
        w.nested_absmax is not None, case.mask is not None, case.out_scale is not None,
    )  # fmt: skip
    return strategies.inadmissible(strategy, problem) is None


def check(case: Case, strategy: str) -> None:
    """Every result within the criterion, or the refusal that the strategy owes."""
    if not admitted(case, strategy):
        with pytest.raises(BackendUnavailable, match=strategy):
            case.run(f"triton-{strategy}")
        return
    got, plain, truth = case.run(f"triton-{strategy}"), case.plain(), case.plain(torch.float64)
    for name, exact in truth.items():
        assert_as_exact(name, got[name], plain[name], exact)


# --------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "p", "out_scale"),
    [
        ("nf4", 0.0, True),
        ("fp4", 0.0, False),
        ("fp4", 0.3, True),
        ("dense", 0.3, False),
        ("int8", 0.0, True),
        ("fp8", 0.3, False),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_result(strategy, format, p, out_scale, dtype):
    check(Case.make(format, (9,), 64, 33, 5, dtype=dtype, dropout_p=p, out_scale=out_scale), strategy)


@pytest.mark.parametrize(
    ("M", "N", "K", "R", "options"),
    [
        (70, 40, 64, 3, {}),  # several row blocks
        (3, 33, 70, 40, {"dropout_p": 0.4}),  # blocks that straddle rows, two rank blocks
        (17, 45, 128, 70, {"out_scale": True, "blocksize": 128, "nested": False}),  # three rank blocks
        (5, 20, 64, 0, {"out_scale": True}),
        (0, 33, 64, 3, {}),
        (2, 40, 192, 4, {"bias": False, "adapter_dtype": torch.bfloat16}),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_odd_shapes(strategy, M, N, K, R, options):
    if strategy == "merge" and options.get("adapter_dtype") == torch.bfloat16:
        # The plain computation rounds the branch to bfloat16, merging does not: compare with its fp32.
        options = options | {"adapter_dtype": torch.float32}
    check(Case.make("nf4", (M,), K, N, R, **options), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mixed_dtypes(strategy):
    """Half-precision adapters beside bfloat16 activations, a dense weight of a third dtype."""
    case = Case.make("dense", (9,), 64, 40, 6, dtype=torch.bfloat16, adapter_dtype=torch.float16)
    weight = case.weight._replace(weight=case.weight.weight.float())
    case.weight = weight
    if not admitted(case, strategy):
        return
    got = case.run(f"triton-{strategy}")
    assert got["dlora_A"].dtype == torch.float16
    fp32 = case.run("triton-fused")
    for name in got:
        torch.testing.assert_close(got[name], fp32[name], rtol=2e-2, atol=2e-2)


def test_strategies_keep_the_same_z():
    """Forward and backward are chosen apart, so each can continue what another began."""
    arguments, grad = operands(20, 40, 64, 5, torch.float32, [torch.float32] * 3, make_weight("nf4", 40, 64))
    arguments, grad = [on_device(a) for a in arguments], on_device(grad)
    forward = {name: triton_kernels.lora_linear(*arguments, strategy=name)[1] for name in STRATEGIES}
    for z in forward.values():
        torch.testing.assert_close(z, forward["fused"], rtol=1e-5, atol=1e-6)
    assert all(z.dtype == torch.float32 for z in forward.values())


# ----------------------------------------------------------------------------------------------------- panels


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(("N", "K"), [(140, 32), (33, 192)])
@pytest.mark.parametrize("strategy", ["library", "merge"])
def test_panels(strategy, N, K):
    """The last of two panels is not whole: 12 rows of Ŵ forward, or 64 columns backward."""
    assert [len(scratch.panels(size, 4)) for size in (N, K)] == [1 + (N > 128), 1 + (K > 128)]
    check(Case.make("nf4", (6,), K, N, 4, out_scale=True), strategy)


@pytest.mark.parametrize("direction", [0, 1])
def test_panels_take_two_more_launches_each(direction, monkeypatch):
    case = on_device_case(M=2, N=(140, 20)[direction], K=(32, 160)[direction])
    counts = []
    for limit in (scratch.DEFAULT, 1):
        monkeypatch.setitem(scratch._options, "limit", limit)
        counts.append(len(launches(monkeypatch, *case, "merge")[direction]))
    assert counts[1] - counts[0] == 2


def test_split_needs_the_whole_weight_in_its_scratch(small_limit):
    with pytest.raises(BackendUnavailable, match="scratch"):
        Case.make("nf4", (2,), 64, 140, 4).run("triton-split")
    Case.make("nf4", (2,), 64, 100, 4).run("triton-split")  # one panel, which may exceed the limit


@pytest.mark.parametrize("n_bytes", [0, -1, (1 << 20) - 1])
def test_a_limit_too_small_is_refused(n_bytes):
    before = scratch.limit()
    with pytest.raises(ValueError, match="n_bytes: expected at least 1048576"):
        scratch.set_limit(n_bytes)
    assert scratch.limit() == before


def test_the_limit_bounds_panels(monkeypatch):
    monkeypatch.setitem(scratch._options, "limit", scratch.DEFAULT)
    scratch.set_limit(2 << 20)
    assert scratch.panels(1000, 4096) == [(0, 512), (512, 488)]
    assert scratch.panels(300, 1 << 30) == [(0, 128), (128, 128), (256, 44)]
    assert scratch.panels(0, 4096) == []


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are a GPU's")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_graph_replays(strategy):
    layer = LoRALinear.from_linear(
        Linear4bit(512, 256, bias=False, quant_type="nf4").to(DEVICE), r=8, backend=f"triton-{strategy}"
    )
    x = torch.randn(32, 512, device=DEVICE)
    expected = layer(x).detach().clone()  # compiles and tunes
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    torch.randn(1 << 22, device=DEVICE)
    graph.replay()
    torch.testing.assert_close(y, expected)


# --------------------------------------------------------------------------------------------------- launches


def on_device_case(M=9, N=40, K=64, R=5, format="nf4", p=0.0, out_scale=False):
    arguments, grad = operands(
        M, N, K, R, torch.float32, [torch.float32] * 3, make_weight(format, N, K), p, out_scale
    )
    return [on_device(a) for a in arguments], on_device(grad)


def launches(monkeypatch, arguments, grad, strategy, needs=None):
    """What forward and backward launch, kernels and ops of PyTorch, and the gradients."""
    x, weight, bias, lora_A, lora_B, mask, out_scale, scaling, p = arguments
    needs = needs or Needs(True, True, True, True, out_scale is not None)
    torch.use_deterministic_algorithms(False)  # it fills buffers, by launches of its own
    with monkeypatch.context() as patch, Launches(patch) as recorded:
        y, z = triton_kernels.lora_linear(*arguments, strategy=strategy)
        forward = list(recorded.names)
        saved = (bias, y) if needs.out_scale else (None, None)
        grads = triton_kernels.lora_linear_backward(
            grad, x, weight, lora_A, lora_B, z, mask, out_scale, *saved, scaling, p, needs, strategy
        )
    return forward, recorded.names[len(forward) :], grads


BACKWARD = ["up_backward_kernel", "sum_kernel"]
LAUNCHES = {
    "splitk": (
        ["splitk_linear_kernel", "splitk_finish_kernel"],
        ["up_backward_kernel", "splitk_dx_kernel", "da_kernel"],
    ),
    "fused": (["down_kernel", "linear_kernel"], [*BACKWARD, "dx_kernel", "da_kernel"]),
    "split": (["down_kernel", "linear_kernel"], [*BACKWARD, "dx_kernel", "da_kernel"]),
    "library": (["down_kernel", "addmm_"], [*BACKWARD, "da_kernel", "addmm_"]),
    "merge": (["down_kernel", "addmm"], [*BACKWARD, "da_kernel", "mm"]),
}


@pytest.mark.parametrize("out_scale", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_launch_budget(strategy, out_scale, monkeypatch):
    """At most two launches forward and four backward, decoding, sums and GEMMs of the library included."""
    forward, backward, _ = launches(monkeypatch, *on_device_case(out_scale=out_scale), strategy)
    assert len(forward) <= 2
    assert len(backward) <= 4
    assert (forward, backward) == LAUNCHES[strategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_is_needed_is_launched_and_computed(strategy, monkeypatch):
    arguments, grad = on_device_case(3, 17, 32, 2, out_scale=True)
    complete = run(triton_kernels.Strategy(strategy), arguments, grad)
    for flags in itertools.product(*[[False, True]] * 5):
        if strategy not in ("fused", "merge") and sum(flags) not in (1, 4):
            continue
        needs = Needs(*flags)
        _, started, got = launches(monkeypatch, arguments, grad, strategy, needs)
        expected = [name for name in LAUNCHES[strategy][1] if wanted(name, needs, strategy)]
        if strategy == "splitk" and not needs.x:
            expected.insert(1, "sum_kernel")
        if strategy == "merge" and needs == Needs(True, False, False, False, False):
            expected[0] = "dequantize_kernel"  # no sums that the decoding could join
        assert started == (expected if any(needs) else []), needs
        for name, needed in needs._asdict().items():
            grad_of = getattr(got, name)
            assert (grad_of is not None) == needed, (name, needs)
            assert not needed or torch.equal(grad_of, complete[name]), (name, needs)


def wanted(kernel: str, needs: Needs, strategy: str) -> bool:
    parts = any(needs[1:]) or (needs.x and strategy != "merge")
    da = needs.lora_A or (needs.x and strategy in ("splitk", "library"))
    return {"up_backward_kernel": parts, "sum_kernel": any(needs), "da_kernel": da}.get(kernel, needs.x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rank_zero_launches_the_base_alone(strategy, monkeypatch):
    arguments, grad = on_device_case(5, 40, 64, 0)
    needs = Needs(True, True, True, False, False)
    forward, backward, _ = launches(monkeypatch, arguments, grad, strategy, needs)
    expected = {
        "splitk": (["splitk_linear_kernel", "splitk_finish_kernel"], ["splitk_dx_kernel", "da_kernel"]),
        "fused": (["linear_kernel"], ["dx_kernel"]),
        "split": (["down_kernel", "linear_kernel"], ["dequantize_kernel", "dx_kernel"]),
        "library": (["down_kernel", "addmm"], ["dequantize_kernel", "mm"]),
        "merge": (["down_kernel", "addmm"], ["dequantize_kernel", "mm"]),
    }
    assert (forward, backward) == expected[strategy]


# ----------------------------------------------------------------------------------------- choice and refusal


def test_the_table_decides_without_a_name(monkeypatch):
    for forward, backward in (("splitk", "merge"), ("library", "fused")):
        chosen = {"forward": forward, "backward": backward}
        monkeypatch.setattr(
            strategies, "choose", lambda direction, problem, device, chosen=chosen: chosen[direction]
        )
        assert launches(monkeypatch, *on_device_case(), None)[:2] == (
            LAUNCHES[forward][0], LAUNCHES[backward][1]
        )  # fmt: skip


def test_the_problem_describes_the_call(monkeypatch):
    seen = []
    monkeypatch.setattr(
        strategies, "choose", lambda direction, problem, device: seen.append(problem) or "fused"
    )
    arguments, _ = on_device_case(9, 40, 64, 5, p=0.2, out_scale=True)
    triton_kernels.lora_linear(*arguments)
    assert seen == [strategies.Problem(9, 40, 64, 5, torch.float32, "nf4", True, True, True)]


def test_an_explicit_strategy_runs_or_raises():
    dense = LoRALinear.from_linear(torch.nn.Linear(32, 16, device=DEVICE), r=2, backend="triton-merge")
    with pytest.raises(BackendUnavailable, match=r"triton-merge.*dense"):
        dense(torch.randn(3, 32, device=DEVICE))
    with pytest.raises(BackendUnavailable, match="splitk takes up to 128 rows, got 129"):
        Case.make("nf4", (129,), 64, 20, 2).run("triton-splitk")
    assert backends.resolve("lora_linear", "nf4", DEVICE, torch.float32, "triton-split") == "triton-split"
    with pytest.raises(BackendUnavailable, match="it has no loreft"):
        backends.resolve("loreft", "dense", DEVICE, torch.float32, "triton-split")


def test_the_backend_table_names_every_strategy():
    named = [name.removeprefix("triton-") for name in backends.BACKENDS if name.startswith("triton-")]
    assert tuple(named) == STRATEGIES


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_dora_layer_runs_by_name(strategy):
    base = Linear4bit(64, 40, bias=False, quant_type="nf4").to(DEVICE)
    x, results = torch.randn(9, 64, device=DEVICE), []
    for backend in (f"triton-{strategy}", "reference"):
        torch.manual_seed(0)
        layer = DoRALinear.from_linear(base, r=3, backend=backend)
        torch.nn.init.normal_(layer.lora_B)
        y = layer(x)
        y.sum().backward()
        results.append([y.detach(), *(p.grad for p in (layer.lora_A, layer.lora_B, layer.magnitude))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_splitk_shares_the_reduction():
    for M, columns, depth in ((1, 4096, 4096), (16, 20, 64), (64, 100, 1000), (0, 5, 5)):
        tile, parts = configs.splitk(M, columns, depth, torch.empty(0, dtype=torch.bfloat16))
        assert 1 <= parts <= max(1, depth // tile.depth)
