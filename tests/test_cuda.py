"""The CUDA kernels: on a GPU where there is one, and everywhere the same source in an emulator.

In the emulator threads run in turns, in either order: results that depend on the order are a race.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest
import torch
from cases import Case, make_scale, make_weight, on
from peft_fast.triton_kernels import strategies
from tolerances import FACTOR, FLOOR, assert_as_exact, relative_error

from peft_fast import BackendUnavailable, backends, cuda, formats
from peft_fast.formats import QuantizedWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["emulated", "cuda"])
def device(request, monkeypatch):
    """The device type whose tensors the ops take."""
    if request.param == "emulated":
        emulated_cuda.load()
        monkeypatch.setattr(cuda, "LIBRARY", emulated_cuda.LIBRARY)
        strategies.clear_cache()
        yield "cpu"
        strategies.clear_cache()
    else:
        reason = cuda.unavailable("nf4", "cuda", torch.float32)
        if reason is not None or not torch.cuda.is_available():
            pytest.skip(f"cuda-gemv: {reason}")
        yield "cuda"


@pytest.fixture(params=["ascending", "descending"])
def order(request, monkeypatch):
    monkeypatch.setenv("PEFT_FAST_EMULATED_ORDER", request.param)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def run(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Output and every gradient through the op and its autograd formula."""
    return case._run("cuda-gemv") if device == "cpu" else case.run("cuda-gemv")


# -------------------------------------------------------------------------------------- lora_linear, few rows

# M, N, K, R and options: aligned and odd K, several steps and parts of K, tiles of N, and ranks.
CASES = [
    (1, 37, 64, 5, {}),
    (8, 130, 288, 7, {"dropout_p": 0.3, "out_scale": True}),
    (3, 70, 1056, 64, {"out_scale": True, "blocksize": 32}),
    (2, 65, 2080, 33, {"dropout_p": 0.5, "blocksize": 4096, "adapter_dtype": torch.bfloat16}),
    (1, 9, 5120, 16, {"nested": False, "bias": False}),
    (7, 1100, 320, 16, {"blocksize": 128, "dropout_p": 1.0}),
    (4, 9, 4096, 0, {"out_scale": True}),
    (8, 33, 97, 1, {"dropout_p": 0.5, "out_scale": True}),
    (5, 129, 40, 70, {"nested": False, "adapter_dtype": torch.float16}),
    (6, 200, 1000, 3, {"blocksize": 256, "bias": False, "dropout_p": 0.2}),
    (1, 1, 1, 1, {}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K", "R", "options"), CASES)
def test_every_result(device, M, N, K, R, options, dtype):
    format = "fp4" if K == 320 else "nf4"
    case = Case.make(format, (M,), K, N, R, dtype=dtype, **options)
    got, plain, truth = run(case, device), case.plain(), case.plain(torch.float64)
    assert got.keys() == truth.keys()
    for name in truth:
        assert_as_exact(name, got[name], plain[name], truth[name])


@pytest.mark.parametrize(("M", "N", "K", "R", "options"), CASES)
def test_no_race(device, M, N, K, R, options, monkeypatch):
    case = Case.make("nf4", (M,), K, N, R, **options)
    monkeypatch.setenv("PEFT_FAST_EMULATED_ORDER", "ascending")
    first = run(case, device)
    monkeypatch.setenv("PEFT_FAST_EMULATED_ORDER", "descending")
    second = run(case, device)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_only_what_is_needed_is_computed(device):
    x, A, B = torch.randn(3, 96), torch.randn(4, 96), torch.randn(50, 4)
    operands = [t.to(device) for t in (torch.randn(3, 50), x, A, B, x @ A.t(), torch.randn(50).exp())]
    grad, x, A, B, z, scale = operands
    weight = on(device, make_weight("nf4", 50, 96))
    y = torch.randn(3, 50).to(device)

    def backward(needs):
        needs = cuda.Needs(*needs)
        return cuda.Gemv.lora_linear_backward(grad, x, weight, A, B, z, None, scale, None, y, 0.5, 0.0, needs)

    whole = backward([True] * 5)
    for i in range(5):
        alone = backward([j == i for j in range(5)])
        assert [g is None for g in alone] == [j != i for j in range(5)]
        assert torch.equal(alone[i], whole[i])


@pytest.mark.parametrize(("packed", "xs"), [(1, 0), (0, 1), (4, 0)])
def test_operands_may_lie_anywhere(device, packed, xs):
    """A weight and an X that begin off the boundaries of wide loads."""
    case = Case.make("nf4", (3,), 64, 40, 4, dtype=torch.float16)
    case = case.on("cuda-gemv") if device == "cuda" else case
    expected = run(case, device)
    case.weight = case.weight._replace(weight=shifted(case.weight.weight, packed))
    case.x = shifted(case.x, xs)
    for name, value in run(case, device).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-3)


def shifted(t: torch.Tensor, elements: int) -> torch.Tensor:
    """The values of t in memory that begins so many elements after an allocation."""
    room = torch.empty(t.numel() + elements, dtype=t.dtype, device=t.device)
    return room[elements:].copy_(t.flatten()).view(t.shape)


def test_no_rows(device):
    """An empty batch, which a strategy for few rows is chosen for too."""
    case = Case.make("nf4", (0,), 64, 40, 4, out_scale=True)
    got, plain = run(case, device), case.plain()
    assert got.keys() == plain.keys()
    for name, value in got.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(("M", "K"), [(1, 1056), (5, 1056), (3, 97)])
def test_what_is_not_finite_stays_where_it_belongs(device, M, K):
    """In X, dY, A, B and a scale, each alone: results are finite where plain PyTorch's are."""
    for operand in ("x", "grad", "lora_A", "lora_B", "out_scale"):
        for value in (torch.inf, -torch.inf, torch.nan):
            case = Case.make("nf4", (M,), K, 70, 9, out_scale=True)
            getattr(case, operand).view(-1)[-2] = value
            got, plain = run(case, device), case.plain()
            for name, expected in plain.items():
                assert torch.equal(got[name].isfinite(), expected.isfinite()), (operand, value, name)


def test_what_it_cannot_run_is_refused(device):
    with pytest.raises(BackendUnavailable, match="it takes up to 8 rows, got 9"):
        run(Case.make("nf4", (9,), 64, 32, 2), device)
    assert "dense" in cuda.gemv_unavailable("dense", device, torch.float32)
    assert "float64" in cuda.gemv_unavailable("nf4", device, torch.float64)
    assert "got meta" in cuda.gemv_unavailable("nf4", "meta", torch.float32)
    op = getattr(torch.ops, cuda.LIBRARY.namespace).lora_linear
    weight = on(device, make_weight("nf4", 32, 64))
    x, A, B = (torch.randn(*s, device=device) for s in ((2, 64), (4, 64), (32, 4)))
    for wrong, message in (
        ((x[:, :32], weight, A, B), r"x: expected shape \[2, 64\], got \[2, 32\]"),
        ((x.double(), weight, A, B), "x: expected Float, Half or BFloat16"),
        ((x, weight, A, B.t()), r"lora_B: expected shape \[32, 4\], got \[4, 32\]"),
        ((x, weight._replace(absmax=weight.absmax[:1]), A, B), "absmax: expected 32 elements, got shape"),
        ((x, weight._replace(format="int8"), A, B), "format: expected nf4 or fp4, got int8"),
        ((x, weight._replace(blocksize=48), A, B), "blocksize: expected a power of two in"),
    ):
        x_, w_, A_, B_ = wrong
        with pytest.raises(RuntimeError, match=message):
            op(x_, *w_, None, A_, B_, None, None, 1.0, 0.0)


# ---------------------------------------------------------------------------------------------------- decode

CORNERS = (1e-45, 2.0**-126, 2.0**-24, 0.0, -0.0, 0.1, 1.0, 3.7, -2.5, 65504.0, 1e30, 3e38)


def every_byte(format: str, nested: bool) -> QuantizedWeight:
    """Every byte with every scale, [blocks, 512]: the corners, or all 256 codes in groups of some corners."""
    blocks = 256 if nested else len(CORNERS)
    packed = torch.arange(256, dtype=torch.uint8).repeat(blocks)
    code = formats.code_table(format)
    if not nested:
        absmax = torch.tensor(CORNERS)
        return QuantizedWeight(packed, absmax, code, None, None, None, format, blocks, 512, 512, 0).check()
    return QuantizedWeight(
        packed, torch.arange(256, dtype=torch.uint8), code, torch.tensor(CORNERS[4:12]),
        torch.linspace(-1, 1, 256), torch.tensor(0.05), format, blocks, 512, 512, 32,
    ).check()  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_every_byte_decodes_to_the_bits_of_the_definition(device, format, nested, dtype):
    weight = every_byte(format, nested)
    assert torch.equal(
        bits(cuda.Dequantize.dequantize(on(device, weight), dtype)), bits(weight.decode(dtype))
    )
    # As one row of odd length, which is read an element at a time.
    numel = weight.out_features * weight.in_features
    odd = weight._replace(out_features=1, in_features=numel - 1)
    assert torch.equal(bits(cuda.Dequantize.dequantize(on(device, odd), dtype)), bits(odd.decode(dtype)))
    # With an activation that picks single weights; plus 0, for sums begin with it.
    some = weight._replace(out_features=8, in_features=numel // 8)
    columns = torch.tensor([0, 1, 34, 255, 500, numel // 16 + 5, numel // 8 - 2, numel // 8 - 1])
    x = torch.nn.functional.one_hot(columns, numel // 8).to(dtype)
    empty = torch.zeros(0, numel // 8), torch.zeros(8, 0)
    y, _ = cuda.Gemv.lora_linear(
        x.to(device), on(device, some), None, *(t.to(device) for t in empty), None, None, 1.0, 0.0
    )
    assert torch.equal(bits(y.t() + 0.0), bits(some.decode(dtype)[:, columns] + 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "options"),
    [
        (130, 64, {}),
        (33, 65, {"nested": False}),
        (257, 200, {"blocksize": 32}),
        (3, 1000, {"blocksize": 4096}),
    ],
)
@pytest.mark.usefixtures("order")
def test_dequantize(device, N, K, options, dtype):
    weight = make_weight("nf4", N, K, **options)
    expected = bits(weight.decode(dtype))
    room = torch.full((N * K + 1,), torch.nan, dtype=dtype, device=device)
    for out in (room[:-1].view(N, K), room[1:].view(N, K)):
        room.fill_(torch.nan)
        assert cuda.Dequantize.dequantize(on(device, weight), dtype, out) is out
        assert torch.equal(bits(out), expected)
        assert room.isnan().sum() == 1  # nothing beside it
    dense = make_weight("dense", N, K)
    assert torch.equal(cuda.Dequantize.dequantize(on(device, dense), dtype).cpu(), dense.weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 7, 64, 70])
@pytest.mark.parametrize(("N", "K"), [(150, 72), (20, 97)])
@pytest.mark.usefixtures("order")
def test_an_update_is_merged_and_scaled_before_the_rounding(device, N, K, R, dtype):
    weight, scale = make_weight("nf4", N, K), make_scale(N, torch.float32)
    A, B = torch.randn(R, K) / K**0.5, torch.randn(N, R)
    out = torch.full((N, K), torch.nan, dtype=dtype, device=device)
    operands = {"lora_A": A.to(device), "lora_B": B.to(device), "out_scale": scale.to(device)}
    cuda.write(on(device, weight), out, **operands, scaling=0.7)

    def definition(compute: torch.dtype) -> torch.Tensor:
        update = 0.7 * (B.to(compute) @ A.to(compute))
        return scale.to(compute)[:, None] * (weight.decode(compute) + update)

    assert_as_exact("merged", out.cpu(), definition(torch.float32).to(dtype), definition(torch.float64))
    # Of the update alone, what eleven bits of A and of B, or 22, leave.
    alone = torch.empty(N, K, device=device)
    nothing = weight._replace(code=torch.zeros(16))
    cuda.write(on(device, nothing), alone, **operands, scaling=0.7)
    exact = 0.7 * scale.double()[:, None] * (B.double() @ A.double())
    plain = 0.7 * scale[:, None] * (B @ A)
    allowed = max(FACTOR * relative_error(plain, exact), FLOOR[torch.float32])
    assert relative_error(alone.cpu(), exact) <= allowed


# ------------------------------------------------------------------------------------------------- selection


def test_it_is_chosen_only_where_it_is(device, tmp_path, monkeypatch):
    monkeypatch.setattr(strategies, "MEASURED", tmp_path)
    rows = tuple(
        strategies.Row(
            strategies.Case(direction, format, "fp32", False, False), 64, 32, 4,
            (strategies.Choice(16, ("gemv", "splitk")), strategies.Choice(float("inf"), ("fused",))),
        )
        for direction in ("forward", "backward")
        for format in ("packed", "dense")
    )  # fmt: skip
    table = strategies.Table("some", "measured", {}, None, rows)
    (tmp_path / strategies.DEFAULT).write_text(strategies.text(table))
    strategies.clear_cache()
    where = torch.device(device)
    problem = strategies.Problem(8, 32, 64, 4, torch.float32, "nf4", True, False, False)
    for direction in ("forward", "backward"):
        chosen = {M: strategies.choose(direction, problem._replace(M=M), where) for M in (1, 8, 9, 16, 17)}
        assert chosen == {1: "gemv", 8: "gemv", 9: "splitk", 16: "splitk", 17: "fused"}
        dense = problem._replace(format="dense", nested=False)
        assert strategies.choose(direction, dense, where) == "splitk"
    case = Case.make("nf4", (5,), 64, 32, 4)
    automatic = case._run("triton") if device == "cpu" else case.run("triton")
    for name, value in run(case, device).items():
        assert torch.equal(automatic[name], value)
    monkeypatch.setattr(cuda, "LIBRARY", cuda.Library("peft_fast_no_such_library", device))
    strategies.clear_cache()
    assert strategies.choose("forward", problem, where) == "splitk"


def test_what_it_can_be_told_by_name():
    problem = strategies.Problem(8, 64, 64, 4, torch.float32, "nf4", True, False, False)
    assert strategies.candidates(problem, gemv=True)[0] == "gemv"
    assert "gemv" not in strategies.candidates(problem)
    assert strategies.inadmissible("gemv", problem._replace(M=9)) == "gemv takes up to 8 rows, got 9"
    assert "dense" in strategies.inadmissible("gemv", problem._replace(format="dense"))
    assert strategies.backend_of("gemv") in backends.BACKENDS
    assert strategies.backend_of("splitk") == "triton-splitk"
    times = {1: {"gemv": 1.0, "merge": 2.0, "splitk": 3.0, "fused": 4.0}, 64: {"fused": 1.0, "splitk": 2.0}}
    assert [choice.names for choice in strategies.fastest(times)] == [("gemv", "merge", "splitk"), ("fused",)]


def test_machine_code_runs_on_its_major_version():
    for architectures, capability, runs in (
        ("80 90 100 120", (8, 0), True), ("80 90 100 120", (8, 9), True), ("80 90 100 120", (9, 0), True),
        ("80 90 100 120", (10, 3), True), ("80 90 100 120", (12, 1), True), ("80 90 100 120", (13, 0), True),
        ("80 90 100 120", (7, 5), False), ("90", (8, 9), False), ("90", (10, 0), True), ("86", (8, 0), False),
        ("90a", (9, 0), True), ("90a", (10, 0), False), ("80 100a", (10, 3), False),
    ):  # fmt: skip
        assert cuda.runs_on(architectures, capability) is runs, (architectures, capability)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_library_with_cuda_says_that_there_is_no_gpu(monkeypatch):
    emulated_cuda.load()
    monkeypatch.setattr(cuda, "LIBRARY", emulated_cuda.LIBRARY._replace(device="cuda"))
    for name in ("cuda-gemv", "cuda-dequant"):
        op = "dequantize" if name == "cuda-dequant" else "lora_linear"
        assert backends.availability(op, "nf4", "cuda", torch.bfloat16)[name] == "torch sees no GPU"
    assert "got cpu" in cuda.unavailable("nf4", "cpu", torch.float32)
    assert "got int8" in cuda.unavailable("int8", cuda.LIBRARY.device, torch.float32)


# -------------------------------------------------------------------------------------------- memory, streams


def test_nothing_is_read_beyond_an_operand():
    """With every operand at the end of a page whose next one may not be read."""
    emulated_cuda.load()
    script = Path(__file__).parent / "emulated" / "guarded.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a read beyond ends a process; 4 cases passed" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_replays_on_a_stream_of_its_own():
    if (reason := cuda.unavailable("nf4", "cuda", torch.float32)) is not None:
        pytest.skip(f"cuda-gemv: {reason}")
    case = Case.make("nf4", (4,), 256, 128, 8).on("cuda-gemv")
    arguments = (case.x, case.weight, case.bias, case.lora_A, case.lora_B, None, None, 0.5, 0.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected, _ = cuda.Gemv.lora_linear(*arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = cuda.Gemv.lora_linear(*arguments)
    y.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
