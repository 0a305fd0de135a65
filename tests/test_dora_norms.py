"""The row norms of DoRA against fp64: any cancellation, any layout, no dense copy, and their gradient."""

import subprocess
import sys

import pytest
import torch
from cases import EVERY_FORMAT, FORMATS, HALF, adapters, dense_norm, device_of, make_weight, on

from peft_fast import dora, formats

pytestmark = pytest.mark.usefixtures("poisoned")

N, K, R = 40, 96, 5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"),
    [
        (1, 1, 64),
        (33, 65, 64),
        (7, 128, 32),
        (600, 64, 64),
        (3, 4096, 128),
        (5, 4097, 4096),
        (130, 96, 1024),
        (130, 96, 64),
    ],
)
def test_row_norms(backend, monkeypatch, format, nested, n, k, blocksize):
    """Small chunks: whole slices, and rows gathered where slices would be large."""
    monkeypatch.setattr(dora, "CHUNK", 2**12)
    monkeypatch.setattr(dora, "GATHER_CHUNK", 2**10)
    weight = make_weight(format, n, k, blocksize=blocksize, nested=nested)
    got = dora.row_norms_squared(on(device_of(backend), weight), backend=backend).cpu()
    truth = weight.decode(torch.float64).square().sum(1)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, truth, rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_row_norms_of_half_weights(backend, dtype):
    weight = make_weight("dense", N, K, dtype=dtype)
    got = dora.row_norms_squared(on(device_of(backend), weight), backend=backend).cpu()
    torch.testing.assert_close(got, weight.decode(torch.float64).square().sum(1), rtol=5e-7, atol=0)


UPDATES = {
    "nothing": torch.zeros_like,
    "far below W": lambda W: torch.randn_like(W) * W.norm() * 1e-5,
    "like W": lambda W: torch.randn_like(W) * W.std(),
    "far above W": lambda W: torch.randn_like(W) * W.norm() * 1e3,
    "-W to 10%": lambda W: -W * (1 + 0.1 * torch.randn_like(W)),
    "-W to 0.1%": lambda W: -W * (1 + 1e-3 * torch.randn_like(W)),
    "-W to 1e-6": lambda W: -W * (1 + 1e-6 * torch.randn_like(W)),
    "-W": lambda W: -W,
    "-W in every third row": lambda W: torch.where(torch.arange(len(W))[:, None] % 3 == 0, -W, 0.3 * W),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("update", UPDATES)
def test_norm_against_fp64(backend, format, update):
    """Each row; to a few roundings, or as the dense computation in fp32 where the update cancels the row."""
    n, k, scaling = 70, 64, 0.5
    weight = make_weight(format, n, k)
    A, B = torch.eye(k), UPDATES[update](weight.decode(torch.float32)) / scaling
    device = device_of(backend)
    got = dora.lora_weight_norm(
        on(device, weight), A.to(device), B.to(device), scaling, backend=backend
    ).cpu()
    truth = dense_norm(weight, A, B, scaling, torch.float64)
    zero = truth == 0
    assert (zero.sum() > 0) == update.startswith(("-W in", "-W")) or update not in (
        "-W",
        "-W in every third row",
    )
    assert torch.equal(got[zero], torch.full_like(got[zero], dora.NORM_MIN))
    plain = dense_norm(weight, A, B, scaling, torch.float32)

    def worst(norm):
        return ((norm.double() - truth) / truth)[~zero].abs().max().item() if not zero.all() else 0.0

    assert worst(got) <= max(2 * worst(plain), 4e-6)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("update", ["like W", "-W to 0.1%"])
@pytest.mark.parametrize("power", [-24, 24])
def test_what_cancels_is_relative(update, power):
    """By a power of two, a layer has the same bits."""
    W, unit = torch.randn(70, 64), 2.0**power
    A, B = torch.eye(64), UPDATES[update](W)
    norm = dora.lora_weight_norm(formats.from_dense(W), A, B, 1.0)
    assert torch.equal(dora.lora_weight_norm(formats.from_dense(unit * W), A, unit * B, 1.0), unit * norm)


@pytest.mark.parametrize("update", ["far below W", "like W", "far above W"])
def test_only_rows_that_cancel_are_read_again(monkeypatch, update):
    W, read, decode_rows = torch.randn(70, 64), [], dora.decode_rows
    monkeypatch.setattr(dora, "decode_rows", lambda w, rows: (read.extend(rows), decode_rows(w, rows))[1])
    dora.lora_weight_norm(formats.from_dense(W), torch.eye(64), UPDATES[update](W), 1.0)
    assert not read
    dora.lora_weight_norm(formats.from_dense(W), torch.eye(64), -W, 1.0)
    assert len(read) == 70


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_norm_of_random_adapters(backend, format, dtype):
    weight, (A, B) = make_weight(format, 130, 320), adapters(130, 320, 16, dtype)
    device = device_of(backend)
    got = dora.lora_weight_norm(on(device, weight), A.to(device), B.to(device), 1.3, backend=backend).cpu()
    torch.testing.assert_close(got.double(), dense_norm(weight, A, B, 1.3, torch.float64), rtol=1e-6, atol=0)


def test_a_zero_row_has_the_smallest_norm_and_no_gradient():
    W = torch.randn(N, K)
    A, B = (t.requires_grad_() for t in adapters(N, K, R))
    with torch.no_grad():
        W[3], B[3] = 0, 0
    norm = dora.lora_weight_norm(formats.from_dense(W), A, B, 2.0)
    assert norm[3] == dora.NORM_MIN
    dA, dB = torch.autograd.grad(norm.sum(), (A, B))
    assert dA.isfinite().all()
    assert torch.count_nonzero(dB[3]) == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cancelling", [False, True])
def test_gradient_of_the_norm(format, cancelling):
    weight = make_weight(format, 64, 64)
    A, B = adapters(64, 64, 64, torch.float64)
    if cancelling:
        A, B = torch.eye(64).double(), -weight.decode(torch.float64) * (1 + 0.01 * torch.randn(64, 64)) / 0.7
    leaves, grad = (A.requires_grad_(), B.requires_grad_()), torch.randn(64).double()
    got = dora.lora_weight_norm(weight, *leaves, 0.7)
    expected = dense_norm(weight, *leaves, 0.7, torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12 if not cancelling else 1e-10, atol=0)
    for a, b in zip(*(torch.autograd.grad(norm, leaves, grad) for norm in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_autocast_does_not_lower_the_norm():
    weight = make_weight("nf4", N, K)
    A, B = torch.eye(K), -2 * weight.decode(torch.float32) * (1 + 0.01 * torch.randn(N, K))
    expected = dora.lora_weight_norm(weight, A, B, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dora.lora_weight_norm(weight, A, B, 0.5), expected)


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_opcheck_of_the_norms(backend, format):
    weight, (A, B) = on(device_of(backend), make_weight(format, N, K)), adapters(N, K, R)
    A, B = A.to(weight.weight.device), B.to(weight.weight.device)
    squares = dora.row_norms_squared(weight)
    torch.library.opcheck(torch.ops.peft_fast.row_norms_squared.default, (*weight, torch.float32, backend))
    torch.library.opcheck(torch.ops.peft_fast.lora_norm.default, (squares, 100 * squares, *weight, A, B, 0.5))


MEMORY_SCRIPT = """
import sys, torch
sys.path.insert(0, "tests")
from test_cpu import random_weight
from peft_fast import dora
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
A, B = torch.randn(8, 4096), torch.randn(4096, 8)
dora.lora_weight_norm(random_weight(64, 4096), A, B[:64], 1.0)
weight = random_weight(4096, 4096)
before = peak()
dora.lora_weight_norm(weight, A, B, 1.0)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_no_dense_copy_of_the_weight():
    out = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    grown = int(out.stdout)
    assert grown < 24 * 1024, f"peak memory grew by {grown} KiB; the weight is 65536 KiB in fp32"


def test_norms_squared_are_checked():
    with pytest.raises(ValueError, match=r"^norms_squared: expected \[N\] = \[40\], got \[39\]"):
        dora.lora_weight_norm(make_weight("nf4", N, K), *adapters(N, K, R), 1.0, norms_squared=torch.ones(39))
