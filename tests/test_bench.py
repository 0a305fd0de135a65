"""bench/lora_linear.py on a tiny layer: a coherent table, and no figure from wrong results."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_fast import backends, reference
from peft_fast.errors import BackendUnavailable
from peft_fast.info import device_name, versions

K, N, R = 128, 64, 4
TINY = [
    *("--device", "cpu", "--shape", str(K), str(N), "--rank", str(R)),
    *("--seconds", "0", "--cache-mib", "1", "--threads", "1"),
]
BACKENDS = ("reference", "auto")
METHODS = ("lora", "dora")


@pytest.fixture(autouse=True)
def _process_state():
    """The thread count and the warning filters are the benchmark's own."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def bench():
    return importlib.import_module("peft_fast.bench.lora_linear")


def run(bench, tmp_path, *options: str) -> list[dict[str, str]]:
    """The rows that the benchmark writes for a tiny layer."""
    path = tmp_path / "rows.csv"
    bench.main([*TINY, "--csv", str(path), *options])
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def rows(bench, tmp_path):
    return run(bench, tmp_path, "--rows", "1", "5", "--backend", *BACKENDS, "--method", *METHODS)


def test_every_provider_has_one_row_per_m(rows):
    auto = backends.resolve("lora_linear", "nf4", "cpu", torch.float32)
    ours = [("ours", method, name) for method in METHODS for name in ("reference", auto)]
    expected = {("dense", "", ""), *(("peft", method, "") for method in METHODS), *ours}
    got = [(row["provider"], row["method"], row["backend"], row["dtype"], row["M"]) for row in rows]
    assert set(got) == {(*p, dtype, M) for p in expected for dtype in ("float32", "bfloat16") for M in "15"}
    assert len(got) == len(set(got))
    assert {(row["K"], row["N"], row["R"], row["threads"]) for row in rows} == {(str(K), str(N), str(R), "1")}
    assert {row["torch"] for row in rows} == {torch.__version__}


def test_ratio_is_to_the_faster_dense_dtype_of_the_same_m(rows):
    for M in "15":
        block = [row for row in rows if row["M"] == M]
        dense = min(float(row["p50"]) for row in block if row["provider"] == "dense")
        for row in block:
            assert float(row["ratio"]) == pytest.approx(float(row["p50"]) / dense, rel=1e-4)


def test_percentiles_are_of_at_least_five_samples(rows):
    for row in rows:
        p20, p50, p80, forward, backward = (
            float(row[name]) for name in ("p20", "p50", "p80", "forward", "backward")
        )
        assert 0 < p20 <= p50 <= p80
        assert min(forward, backward) > 0
        assert int(row["samples"]) >= 5


def test_errors_are_those_of_ours_beside_plain_pytorch(rows):
    for row in rows:
        for name in ("y", "dX", "dA", "dB", "dm"):
            error, plain = row[f"error_{name}"], row[f"plain_{name}"]
            if row["provider"] != "ours" or (name == "dm" and row["method"] != "dora"):
                assert error == plain == ""
            elif row["backend"] == "reference" and row["method"] == "lora":
                assert float(error) == pytest.approx(float(plain), rel=1e-6)
            else:
                half = row["dtype"] == "bfloat16" and (name in ("y", "dX") or row["method"] == "dora")
                assert 1e-9 < float(error) < (1e-2 if half else 1e-5)


def test_memory_is_what_the_formulas_save(rows):
    """Z [M, R] fp32; PEFT also saves its own fp32 copy of a bfloat16 X; dense nothing beyond its weight.

    DoRA keeps Y, which is there anyway, and two vectors [N] fp32; PEFT's DoRA far more.
    """
    for row in rows:
        M = int(row["M"])
        if (row["provider"], row["method"]) == ("peft", "dora"):
            assert int(row["saved_bytes"]) > 4 * K * N
            continue
        copy_of_x = 4 * M * K if (row["provider"], row["dtype"]) == ("peft", "bfloat16") else 0
        size = 4 if row["dtype"] == "float32" else 2
        y = size * M * N
        saved = 0 if row["provider"] == "dense" else 4 * M * R + copy_of_x
        saved_by_dora = y + 2 * 4 * N if row["method"] == "dora" else 0
        assert int(row["saved_bytes"]) == saved + saved_by_dora, row
        adapters = 0 if row["provider"] == "dense" else 4 * R * (K + N)
        assert int(row["peak_bytes"]) >= saved + size * M * K + y + adapters, row
        assert int(row["peak_bytes"]) >= int(row["largest_bytes"]) >= size * M * K
        assert row["resident_bytes"] == ""


def test_thread_counts_and_shapes_have_their_own_rows(bench, tmp_path):
    options = ("--shape", "64", "64", "--rows", "1", "--threads", "1", "2", "--providers", "ours")
    rows = run(bench, tmp_path, *options, "--dtype", "float32", "--no-cold")
    got = [(row["K"], row["N"], row["threads"], row["cold"]) for row in rows]
    assert got == [(k, "64", threads, "False") for k in (str(K), "64") for threads in "12"]
    assert {row["ratio"] for row in rows} == {""}


def test_resident_memory_is_measured_in_a_process_of_its_own(bench, tmp_path):
    options = ("--rows", "4096", "--providers", "ours", "--dtype", "float32", "--backend", "reference")
    (row,) = run(bench, tmp_path, *options, "--memory")
    resident, peak = int(row["resident_bytes"]), int(row["peak_bytes"])
    assert 0.9 * peak < resident < peak + 64 * 2**20


def test_resident_memory_sees_what_torch_does_not_allocate(bench):
    measure = importlib.import_module("peft_fast.bench.measure")
    growth = measure.in_fresh_process(growth_with_foreign_scratch)
    assert 30 * 2**20 < growth < 48 * 2**20


def growth_with_foreign_scratch() -> int:
    """Of a layer that fills 32 MiB of its own within the forward pass."""
    measure = importlib.import_module("peft_fast.bench.measure")
    layer = torch.nn.Identity()
    layer.register_forward_hook(lambda module, args, y: y * float(np.ones(2**23, np.float32)[0]))
    return measure.resident_growth(measure.Step(layer, torch.ones(4, requires_grad=True), torch.ones(4)))


@pytest.mark.parametrize("wrong", ["y", "dX", "dA", "dB", "nan"])
def test_what_is_inexact_is_not_timed_and_the_others_are(bench, tmp_path, monkeypatch, capsys, wrong):
    """One element of one result moves by a thousandth of the result's norm."""

    def corrupted(tensor, *names):
        if wrong in names:
            tensor = tensor.clone()
            tensor.view(-1)[3] += float("nan") if wrong == "nan" else 1e-3 * tensor.norm()
        return tensor

    class Corrupt:
        @staticmethod
        def lora_linear(*args):
            y, z = reference.lora_linear(*args)
            return corrupted(y, "y"), z

        @staticmethod
        def lora_linear_backward(*args):
            grads = reference.lora_linear_backward(*args)
            return grads._replace(
                x=corrupted(grads.x, "dX", "nan"),
                lora_A=corrupted(grads.lora_A, "dA"),
                lora_B=corrupted(grads.lora_B, "dB"),
            )

    measure = importlib.import_module("peft_fast.bench.measure")
    monkeypatch.setitem(
        backends.BACKENDS, "reference", backends.BACKENDS["reference"]._replace(load=lambda: Corrupt)
    )
    timed, interleaved = [], measure.interleaved
    monkeypatch.setattr(
        measure, "interleaved", lambda steps, *a: timed.extend(steps) or interleaved(steps, *a)
    )
    name = "dX" if wrong == "nan" else wrong
    options = ("--rows", "5", "--backend", "reference", "auto", "--dtype", "float32")
    with pytest.raises(SystemExit, match=r"not timed, for it is not exact: ours lora\[reference\] float32$"):
        run(bench, tmp_path, *options)
    with (tmp_path / "rows.csv").open(newline="") as file:
        *others, row = csv.DictReader(file)
    assert (row["backend"], row["p50"], row["ratio"], row["peak_bytes"]) == ("reference", "", "", "")
    assert not float(row[f"error_{name}"]) <= 100 * float(row[f"plain_{name}"])
    out = capsys.readouterr().out
    assert re.search(
        rf"^ +5 ours lora\[reference\] +float32 +not timed: {name}: relative error", out, re.MULTILINE
    )
    assert "reference" not in {provider.backend for provider in timed}
    auto = backends.resolve("lora_linear", "nf4", "cpu", torch.float32)
    assert {row["backend"] for row in others} == {auto, ""}
    assert all(float(row["p50"]) > 0 and float(row["ratio"]) > 0 for row in others)


def test_backends_that_cannot_run_are_refused(bench, tmp_path):
    with pytest.raises(ValueError, match="backend: expected"):
        run(bench, tmp_path, "--backend", "fastest")
    missing = [
        name
        for name, why in backends.availability("lora_linear", "nf4", "cuda", torch.float32).items()
        if why
    ]
    with pytest.raises(BackendUnavailable, match=missing[0]):
        run(bench, tmp_path, "--device", "cuda", "--backend", missing[0])


def test_rows_are_not_added_to_another_table(bench, tmp_path):
    (tmp_path / "rows.csv").write_text("device,N,K\nx,1,2\n")
    with pytest.raises(ValueError, match=r"--csv: expected .* got \['device', 'N', 'K'\]"):
        run(bench, tmp_path, "--rows", "1", "--providers", "dense")
    assert (tmp_path / "rows.csv").read_text() == "device,N,K\nx,1,2\n"


def test_rows_of_two_runs_share_one_header(bench, tmp_path):
    run(bench, tmp_path, "--rows", "1", "--providers", "dense")
    rows = run(bench, tmp_path, "--rows", "5", "--providers", "dense")
    assert [row["M"] for row in rows] == ["1", "1", "5", "5"]


@pytest.mark.parametrize("method", METHODS)
def test_adapted_providers_compute_the_same(bench, method):
    shape = bench.Shape(K, N, R, "cpu")
    operands = bench.make_operands(shape)
    results = []
    for provider in (
        bench.Provider("peft", "float32", method),
        bench.Provider("ours", "float32", method, "reference"),
    ):
        step = bench.make_step(provider, bench.make_layer(provider, operands), shape, 5)
        y = step.run()
        grads = [p.grad for p in step.layer.parameters() if p.requires_grad]
        results.append([y, step.x.grad, *grads])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    dense = bench.make_layer(bench.Provider("dense", "float32"), operands)
    y = bench.make_step(bench.Provider("dense", "float32"), dense, shape, 5).run()
    torch.testing.assert_close(y, step.x @ operands.dense.t())


def test_strategies_are_measured():
    script = Path(__file__).parents[1] / "bench" / "cpu_strategies.py"
    options = ["--level", "scalar", "--dtype", "float32", "--shape", str(K), str(N), "--rows", "1", "5"]
    command = [sys.executable, script, *options, "--fields", "out_block", "--turns", "1"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in out[2:]] == ["as", "out_block=24", "out_block=96"]
    assert all(float(number) > 0 for line in out[2:] for number in line.split()[-2:])


def test_runs_are_compared(bench, tmp_path, capsys):
    losses = [1.0 / (step + 1) for step in range(30)]
    for name, moved in (("a", 0.0), ("b", 1e-3)):
        metrics = {"seconds": 2.0, "accuracy": 0.5, "loss": [*losses[:25], *(x + moved for x in losses[25:])]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    folders = [str(tmp_path / name) for name in "ab"]
    importlib.import_module("peft_fast.bench.compare_runs").main(
        [*folders, "--plot", str(tmp_path / "both.png")]
    )
    assert "0.0e+00 in the first 20 steps, 1.0e-03 in all 30" in capsys.readouterr().out
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"


def test_the_norm_of_dora_is_measured(bench, tmp_path, capsys):
    norm = importlib.import_module("peft_fast.bench.dora_norm")
    path = tmp_path / "norm.csv"
    norm.main(["--shape", "128", "64", "--rank", "4", "--seconds", "0", "--threads", "1", "--csv", str(path)])
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    ways = ("dequantize", "cold", "first", "cached", "peft")
    assert all(float(row[name]) > 0 for name in (*(f"{way}_ms" for way in ways), "ratio"))
    assert float(row["ratio"]) == pytest.approx(float(row["cold_ms"]) / float(row["dequantize_ms"]), rel=1e-4)
    assert {name: row[name] for name in versions()} == {name: v or "" for name, v in versions().items()}
    assert row["device"] == device_name("cpu")
    errors = {row["case"]: row for row in norm.error_rows(bench.Shape(128, 64, 4, "cpu"))}
    assert len(errors) == 5
    for case, row in errors.items():
        cancelled = case.startswith("s·B·A = −")
        assert float(row["ours"]) <= max(4 * float(row["dense"]), 1e-6)
        assert (float(row["factored"]) > 1) == cancelled
    assert "cold / dequantize" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_norm_of_dora_is_not_measured_on_a_missing_gpu(capsys):
    norm = importlib.import_module("peft_fast.bench.dora_norm")
    with pytest.raises(SystemExit, match="2"):
        norm.main(["--device", "cuda", "--shape", "128", "64"])
    assert "--device: expected cpu, got cuda, which torch does not find here" in capsys.readouterr().err


@pytest.fixture
def modules_restored():
    """Without what a benchmark imported, such as its stand-in for the package pyreft."""
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in ("pyreft", "pyvene") or name == "peft_fast.bench.loreft":
            del sys.modules[name]


@pytest.mark.skipif(importlib.util.find_spec("pyreft") is None, reason="pyreft, which it is compared with")
def test_loreft_is_measured_beside_pyreft(bench, tmp_path, capsys, modules_restored):
    loreft = importlib.import_module("peft_fast.bench.loreft")
    tiny = ["--width", "64", "--blocks", "1", "--batch", "2", "--tokens", "24", "--rank", "4"]
    loreft.main([*tiny, "--seconds", "0", "--quant", "nf4", "--csv", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["frozen", "ours", "pyreft"]
    assert int(rows["ours"]["buffers_bytes"]) == 4 * 4 * 64 + 4
    assert int(rows["pyreft"]["buffers_bytes"]) >= 4 * 64 * 64
    loreft.main([*tiny, "--behaviour"])
    out = capsys.readouterr().out
    assert "checked: hidden states" in out
    assert "0.1: ours" in out
    assert "pyreft 1.0e+00" in out


WITHOUT_PEFT = """
import argparse, sys
sys.modules["peft"] = None
from peft_fast.bench import loreft
options = {"width": 64, "blocks": 1, "dtype": "float32", "device": "cpu"}
print(type(loreft.make_base(argparse.Namespace(**options, quant="none"))).__name__)
loreft.make_base(argparse.Namespace(**options, quant="nf4"))
"""


def test_loreft_needs_peft_for_4_bit_layers_alone():
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_PEFT]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "LlamaModel\n")
    *_, last = done.stderr.splitlines()
    assert last.startswith("--quant nf4: expected what peft_fast.accelerate needs, got none (")
    assert last.endswith("): pip install peft bitsandbytes")


def test_the_traffic_model_has_the_sizes_of_the_kernels():
    """In a process of its own: this one may hold the sizes of Triton's interpreter."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "traffic_sizes.py")]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
