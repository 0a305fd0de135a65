"""The C++ backend: every instruction-set level of this machine against formats.py, and against fp64."""

import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch
from tolerances import assert_as_exact

from peft_fast import native, reference
from peft_fast.formats import BLOCK_SIZES, DENSE_DTYPES, QuantizedWeight, code_table, from_dense
from peft_fast.reference import Needs

pytestmark = pytest.mark.usefixtures("poisoned")

ALL = Needs(True, True, True, True, False)
SHAPES = [(1, 1), (48, 64), (100, 33), (35, 320), (131, 257)]  # (N, K)


@pytest.fixture(params=native.levels() or ("not built",))
def level(request):
    assert native.load_error() is None, native.load_error()
    return native.Level(request.param)


def random_weight(N, K, format="nf4", blocksize=64, nested=True, nested_blocksize=256, scale=0.05):
    numel = N * K
    blocks = -(-numel // blocksize)
    packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8)
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        groups = -(-blocks // nested_blocksize)
        extra = (torch.rand(groups) * scale, torch.rand(256) * 2 - 1, torch.tensor(scale))
    else:
        absmax = torch.rand(blocks) * scale
        extra = (None, None, None)
    return QuantizedWeight(
        packed, absmax, code_table(format), *extra, format, N, K, blocksize, nested_blocksize if nested else 0
    ).check()


class Case:
    """Random operands of one call, and its results from a backend, plain PyTorch and fp64."""

    def __init__(self, M, weight, R, dtype=torch.float32, adapter_dtypes=(torch.float32,) * 3, dropout_p=0.0):
        N, K = weight.out_features, weight.in_features
        a_dtype, b_dtype, bias_dtype = adapter_dtypes
        self.weight, self.dropout_p, self.scaling = weight, dropout_p, 1.7
        self.x, self.grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        self.A, self.B = (torch.randn(R, K) / K**0.5).to(a_dtype), (torch.randn(N, R) / 4).to(b_dtype)
        self.bias = torch.randn(N).to(bias_dtype)
        self.mask = torch.ops.peft_fast.dropout_mask(self.x, dropout_p) if dropout_p else None

    def results(self, backend, double=False):
        x, grad, bias, A, B = (
            t.double() if double else t for t in (self.x, self.grad, self.bias, self.A, self.B)
        )
        scalars = (self.scaling, self.dropout_p)
        y, z = backend.lora_linear(x, self.weight, bias, A, B, self.mask, None, *scalars)
        grads = backend.lora_linear_backward(
            grad, x, self.weight, A, B, z, self.mask, None, None, None, *scalars, ALL
        )
        return {"y": y, "z": z, "dX": grads.x, "dA": grads.lora_A, "dB": grads.lora_B, "dbias": grads.bias}

    def check(self, backend):
        got, plain, truth = (
            self.results(backend),
            self.results(reference),
            self.results(reference, double=True),
        )
        for name in got:
            assert_as_exact(name, got[name], plain[name], truth[name])


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(got, expected):
    for name in expected:
        assert torch.equal(bits(got[name]), bits(expected[name])), name


# ------------------------------------------------------------------------------------------------ decode


def test_scalar_is_always_there():
    assert native.load_error() is None
    assert native.levels()[-1] == "scalar"
    with pytest.raises(RuntimeError, match="level: expected"):
        native.Level("avx1024").dequantize(random_weight(4, 4), torch.float32)


@pytest.mark.parametrize("nested_blocksize", [None, 32, 256])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_decode_bits(level, blocksize, format, nested_blocksize):
    for N, K in [*SHAPES, (3, 4097), (130, 288)]:
        w = random_weight(N, K, format, blocksize, nested_blocksize is not None, nested_blocksize or 0)
        for dtype in DENSE_DTYPES:
            got = level.dequantize(w, dtype)
            assert got.shape == (N, K)
            assert torch.equal(bits(got), bits(w.decode(dtype))), (N, K, dtype)


@pytest.mark.parametrize("stored", DENSE_DTYPES)
def test_decode_dense(level, stored):
    w = from_dense(torch.cat([torch.randn(7, 33), torch.tensor([[1e-40, 65519.0, -0.0] * 11])]).to(stored))
    for dtype in DENSE_DTYPES:
        assert torch.equal(bits(level.dequantize(w, dtype)), bits(w.decode(dtype))), dtype


# ------------------------------------------------------------------------------------------ against fp64


@pytest.mark.parametrize("M", [0, 1, 3, 4, 5, 17, 65])
@pytest.mark.parametrize("R", [0, 1, 7, 16, 33])
def test_shapes(level, M, R):
    for N, K in SHAPES:
        Case(M, random_weight(N, K), R).check(level)


@pytest.mark.parametrize("M", [2, 70])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_blocks_straddling_rows(level, M, format, nested):
    for blocksize in (32, 64, 4096):
        for N, K in [(51, 96), (51, 97), (20, 610)]:
            Case(M, random_weight(N, K, format, blocksize, nested), 5).check(level)


@pytest.mark.parametrize("M", [1, 33, 600])
def test_long_reductions(level, M):
    Case(M, random_weight(60, 1100), 8).check(level)
    Case(M, random_weight(700, 160), 40).check(level)


@pytest.mark.parametrize("M", [3, 19])
@pytest.mark.parametrize("dtype", DENSE_DTYPES)
def test_dtypes(level, M, dtype):
    for w in (
        random_weight(70, 96),
        from_dense(torch.randn(70, 97).to(dtype)),
        from_dense(torch.randn(70, 96)),
    ):
        for a, b in [(0, 0), (1, 2), (2, 1)]:
            Case(M, w, 9, dtype, (DENSE_DTYPES[a], DENSE_DTYPES[b], DENSE_DTYPES[b])).check(level)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("M", [1, 4, 40])
def test_dropout(level, M, dropout_p):
    for dtype in DENSE_DTYPES:
        for K in (96, 301):
            Case(M, random_weight(70, K), 6, dtype, dropout_p=dropout_p).check(level)


@pytest.mark.parametrize("M", [1, 40])
def test_only_the_needed_gradients(level, M):
    case = Case(M, random_weight(70, 96), 6)
    scale, y = torch.rand(70) + 0.5, torch.randn(M, 70)
    args = (
        case.grad,
        case.x,
        case.weight,
        case.A,
        case.B,
        torch.randn(M, 6),
        None,
        scale,
        case.bias,
        y,
        1.0,
        0.0,
    )
    full = level.lora_linear_backward(*args, Needs(True, True, True, True, True))
    for i in range(5):
        needs = Needs(*(j == i for j in range(5)))
        some = level.lora_linear_backward(*args, needs)
        assert [g is not None for g in some] == list(needs)
        assert torch.equal(some[i], full[i])


@pytest.mark.parametrize("M", [3, 40])
def test_nonfinite_row_stays_in_its_row(level, M):
    case = Case(M, random_weight(70, 96), 6)
    clean = case.results(level)
    case.x[1, 5], case.grad[1, 7] = float("nan"), float("inf")
    dirty = case.results(level)
    others = torch.arange(M) != 1
    for name in ("y", "z", "dX"):
        assert not dirty[name][1].isfinite().all()
        assert torch.equal(dirty[name][others], clean[name][others]), name


# ---------------------------------------------------------------------------------- threads and processes


@pytest.mark.parametrize("M", [1, 3, 17, 600])
def test_bits_do_not_depend_on_threads(level, M):
    case = Case(M, random_weight(500, 544), 17, dropout_p=0.25)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.results(level)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert_same_bits(case.results(level), one)
    finally:
        torch.set_num_threads(before)


def test_two_python_threads(level):
    cases = [Case(M, random_weight(200, 256), 8) for M in (2, 90)]
    expected = [case.results(level) for case in cases]
    failures = []

    def work(case, results):
        try:
            for _ in range(20):
                assert_same_bits(case.results(level), results)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


def _forked(case, level, expected, queue):
    try:
        torch.set_num_threads(1)
        assert_same_bits(case.results(level), expected)
        queue.put("ok")
    except BaseException as error:
        queue.put(repr(error))


def test_forked_child(level):
    case = Case(20, random_weight(100, 128), 8)
    expected = case.results(level)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(case, level, expected, queue))
    child.start()
    assert queue.get(timeout=60) == "ok"
    child.join()


MEMORY_SCRIPT = """
import sys, torch
sys.path.insert(0, "tests")
from test_cpu import Case, random_weight
from peft_fast import native
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
level = native.Level("")
Case(64, random_weight(64, 64), 8).results(level)
case = Case(64, random_weight(4096, 4096), 8)
before = peak()
case.results(level)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_no_dense_copy_of_the_weight():
    out = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    grown = int(out.stdout)
    assert grown < 24 * 1024, f"peak memory grew by {grown} KiB; the weight is 65536 KiB in fp32"


# ---------------------------------------------------------------------------------------- hostile inputs

HOSTILE = {
    "short weight": (lambda w: w._replace(weight=w.weight[:-1]), "weight: expected"),
    "weight dtype": (lambda w: w._replace(weight=w.weight.float()), "weight: expected"),
    "strided weight": (lambda w: w._replace(weight=w.weight.repeat(2)[::2]), "weight: expected a contiguous"),
    "short absmax": (lambda w: w._replace(absmax=w.absmax[:-1]), "absmax: expected"),
    "fp32 absmax when nested": (lambda w: w._replace(absmax=w.absmax.float()), "absmax: expected"),
    "no absmax": (lambda w: w._replace(absmax=None), "absmax: expected a tensor, got None"),
    "empty absmax": (lambda w: w._replace(absmax=w.absmax[:0]), "absmax: expected"),
    "no code": (lambda w: w._replace(code=None), "code: expected"),
    "short code": (lambda w: w._replace(code=w.code[:15]), "code: expected 16"),
    "code dtype": (lambda w: w._replace(code=w.code.double()), "code: expected"),
    "short nested_absmax": (
        lambda w: w._replace(nested_absmax=w.nested_absmax[:-1]),
        "nested_absmax: expected",
    ),
    "short nested_code": (lambda w: w._replace(nested_code=w.nested_code[:255]), "nested_code: expected 256"),
    "no nested_offset": (lambda w: w._replace(nested_offset=None), "nested_offset: expected"),
    "format": (lambda w: w._replace(format="nf3"), "format: expected"),
    "zero blocksize": (lambda w: w._replace(blocksize=0), "blocksize: expected"),
    "negative blocksize": (lambda w: w._replace(blocksize=-64), "blocksize: expected"),
    "huge blocksize": (lambda w: w._replace(blocksize=2**62), "blocksize: expected"),
    "odd blocksize": (lambda w: w._replace(blocksize=48), "blocksize: expected"),
    "nested_blocksize": (lambda w: w._replace(nested_blocksize=0), "nested_blocksize: expected"),
    "more rows": (lambda w: w._replace(out_features=2 * w.out_features), "weight: expected"),
    "no rows": (lambda w: w._replace(out_features=0), "out_features, in_features: expected"),
    "negative columns": (lambda w: w._replace(in_features=-64), "out_features, in_features: expected"),
    "overflow": (lambda w: w._replace(out_features=2**40, in_features=2**40), "out_features, in_features"),
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_lying_weight_raises(lie):
    level, (tell, message) = native.Level(""), HOSTILE[lie]
    case = Case(5, random_weight(300, 64), 4)
    z = torch.zeros(5, 4)
    weight = tell(case.weight)
    with pytest.raises(RuntimeError, match=message):
        level.dequantize(weight, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        level.lora_linear(case.x, weight, case.bias, case.A, case.B, None, None, 1.0, 0.0)
    with pytest.raises(RuntimeError, match=message):
        level.lora_linear_backward(
            case.grad, case.x, weight, case.A, case.B, z, None, None, None, None, 1.0, 0.0, ALL
        )


WRONG = {
    "x": lambda c: {"x": c.x[:, 1:].contiguous()},
    "lora_A": lambda c: {"A": c.A.double()},
    "lora_B": lambda c: {"B": c.B[1:]},
    "bias": lambda c: {"bias": c.bias[1:]},
    "dropout_mask": lambda c: {"mask": torch.zeros(5, 7, dtype=torch.uint8)},
    "dropout_p": lambda c: {"dropout_p": 1.5},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operand_raises(name):
    case = Case(5, random_weight(30, 64), 4)
    for attribute, value in WRONG[name](case).items():
        setattr(case, attribute, value)
    with pytest.raises(RuntimeError, match=f"{name}: expected .*, got"):
        case.results(native.Level(""))


def test_wrong_z_raises():
    case = Case(5, random_weight(30, 64), 4)
    for z in (torch.zeros(5, 3), torch.zeros(5, 4, dtype=torch.float16)):
        with pytest.raises(RuntimeError, match="z: expected"):
            native.Level("").lora_linear_backward(
                case.grad, case.x, case.weight, case.A, case.B, z, None, None, None, None, 1.0, 0.0, ALL
            )


# -------------------------------------------------------------------------------------------------- mask


@pytest.mark.parametrize("K", [1, 7, 8, 9, 64, 131])
def test_pack_mask(K):
    native.load_error()
    keep = torch.rand(13, K) < 0.6
    mask = torch.ops.peft_fast_cpu.pack_mask(keep)
    assert mask.shape == (13, (K + 7) // 8)
    assert torch.equal(reference.unpack_mask(mask, K), keep)
    if K % 8:
        assert not (mask[:, -1] >> K % 8).any()
    loud = keep.to(torch.uint8) * torch.randint(1, 256, keep.shape, dtype=torch.uint8)
    assert torch.equal(torch.ops.peft_fast_cpu.pack_mask(loud), mask)
