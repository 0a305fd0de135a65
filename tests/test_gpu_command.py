"""`make gpu` without a GPU: how its sections end and go on, its report, and what it does without peers."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from blocked import without
from torch import nn

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def load():
    """Imports a script of bench/."""
    return lambda name: importlib.import_module(f"peft_fast.bench.{name}")


@pytest.fixture
def gpu(load, monkeypatch):
    """bench/gpu.py without its sections; signals are as they were afterwards."""
    module = load("gpu")
    monkeypatch.setattr(module, "SECTIONS", {})
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


def section(gpu, script: str, name: str = "one", needs: tuple[str, ...] = (), least: float = 0) -> None:
    """Adds a section that runs a line of Python, twice."""
    command = [sys.executable, "-c", script]
    gpu.SECTIONS[name] = gpu.Section(lambda plan, seconds: [command, command], 10, least, needs)


def outcomes(out: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads((out / "sections.json").read_text())}


def test_what_passed_is_not_repeated_unless_told_so(gpu, tmp_path, capsys):
    section(gpu, "open('runs', 'a').write('x'); print('a figure')")
    options = ["--out", str(tmp_path), "--device", "cpu"]
    assert gpu.main(options) == 0
    assert (tmp_path / "runs").read_text() == "xx"
    done = json.loads((tmp_path / "one.done").read_text())
    assert (done["returncode"], done["out_of_time"], len(done["commands"])) == (0, False, 2)
    assert done["versions"]["torch"] == torch.__version__
    assert (tmp_path / "one.log").read_text().splitlines().count("a figure") == 2
    assert gpu.main(options) == 0
    assert (tmp_path / "runs").read_text() == "xx"
    assert outcomes(tmp_path)["one"]["status"] == "passed"
    assert gpu.main([*options, "--redo"]) == 0
    assert (tmp_path / "runs").read_text() == "xxxx"
    assert "one: passed, a figure" in capsys.readouterr().out


def test_what_failed_is_shown_and_repeated(gpu, tmp_path, capsys):
    section(gpu, "open('runs', 'a').write('x'); print(*range(100), sep='\\n'); raise SystemExit(3)")
    section(gpu, "print('goes on')", "two")
    options = ["--out", str(tmp_path), "--device", "cpu"]
    for runs in ("xx", "xxxx"):
        assert gpu.main(options) == 1
        assert (tmp_path / "runs").read_text() == runs
    assert json.loads((tmp_path / "one.done").read_text())["returncode"] == 3
    assert {name: row["status"] for name, row in outcomes(tmp_path).items()} == {
        "one": "failed", "two": "passed"
    }  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("  | 99\n") == 2
    assert "  | 39\n" not in out


def test_what_takes_too_long_is_ended_with_its_children(gpu, tmp_path):
    sleeper = "import time; time.sleep(60)"
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {sleeper!r}])\n"
        "open('child', 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(60)"
    )
    section(gpu, script)
    start = time.monotonic()
    minutes = str((gpu.REPORT_SECONDS + 3) / 60)
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", minutes]) == 1
    assert time.monotonic() - start < 30
    assert outcomes(tmp_path)["one"]["status"] == "out of time"
    assert not running(int((tmp_path / "child").read_text()))
    assert json.loads((tmp_path / "one.done").read_text())["out_of_time"]


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_cannot_run_is_said(gpu, tmp_path, capsys):
    section(gpu, "raise AssertionError", "lacking", ("no_such_package", "torch"))
    section(gpu, "raise AssertionError", "late", least=1000)
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    found = outcomes(tmp_path)
    assert found["lacking"]["detail"] == "no_such_package: not installed"
    assert (found["lacking"]["status"], found["late"]["status"]) == ("skipped", "not started")
    report = (tmp_path / "report.md").read_text()
    assert "no_such_package: not installed" in report
    assert "not started" in report
    assert "lacking: skipped" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.done"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_run_without_a_gpu_unless_told_so(gpu, tmp_path, capsys):
    section(gpu, "raise AssertionError")
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert "--device: expected a GPU that torch sees, got none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_run_did_is_in_the_report(gpu, tmp_path):
    section(gpu, "print('a figure')")
    section(gpu, "print('another')", "two")
    for name in ("one", "two"):
        assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--sections", name]) == 0
    assert list(outcomes(tmp_path)) == ["one", "two"]


def test_a_run_that_was_ended_goes_on(tmp_path):
    """Real sections, ended in the third of them, then continued, where several packages are missing."""
    env = without(tmp_path, "bitsandbytes", "peft", "rich", "typer", "matplotlib", "pytest")
    sections = ["install", "tests", "lora_linear", "dora_norm", "roofline"]
    options = ["--out", str(tmp_path / "out"), "--device", "cpu", "--quick", "--sections", *sections]
    command = [sys.executable, str(BENCH / "gpu.py"), *options]
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "lora_linear.log"
    while first.poll() is None and not log.exists():
        time.sleep(0.05)
    first.terminate()
    out, _ = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM
    assert "lora_linear ..." in out
    assert (tmp_path / "out" / "install.done").exists()
    assert not (tmp_path / "out" / "lora_linear.done").exists()
    installed = (tmp_path / "out" / "install.log").stat().st_mtime_ns

    second = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout
    assert (tmp_path / "out" / "install.log").stat().st_mtime_ns == installed
    assert "tests: skipped, pytest: not installed, bitsandbytes: not installed" in second.stdout
    assert "dora_norm: skipped, peft: not installed" in second.stdout
    assert "left out peft: peft: not installed" in log.read_text()
    with (tmp_path / "out" / "lora_linear.csv").open(newline="") as file:
        assert {(row["provider"], row["method"]) for row in csv.DictReader(file)} == {
            ("dense", ""), ("ours", "lora"), ("ours", "dora")
        }  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text()
    assert "matplotlib: not installed, no plot" in report
    assert second.stdout.rstrip().endswith("report.md")
    assert "| 64 → 64 | ours lora |" in second.stdout


# ----------------------------------------------------------------------------------------------------- report


def layer_rows(**ratios: float) -> list[dict[str, object]]:
    """Rows as of bench/lora_linear.py at one shape, of "<provider>_<method>_<backend>" and a ratio."""
    rows = []
    for name, ratio in ratios.items():
        provider, method, backend = name.split("_")
        rows.append({
            "K": 4096, "N": 4096, "R": 16, "M": 8192, "dtype": "bfloat16", "provider": provider,
            "method": method, "backend": backend.replace("0", "-"), "p50": 10 * ratio, "forward": 4 * ratio,
            "backward": 6 / ratio, "ratio": ratio, "peak_bytes": 2**20,
        })  # fmt: skip
    return rows


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_report_judges_goals_by_the_latest_rows(load, tmp_path, capsys):
    report = load("report")
    stale = layer_rows(ours_lora_triton=3.0)
    rows = layer_rows(
        ours_lora_triton=1.08, ours_lora_triton0merge=1.05, ours_lora_triton0split=1.2, peft_lora_=1.35,
        ours_dora_triton=1.3, peft_dora_=3.9,
    )  # fmt: skip
    write_csv(tmp_path / "lora_linear.csv", [*stale, *rows])
    report.main(["--out", str(tmp_path)])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in
             (tmp_path / "report.md").read_text().splitlines()]  # fmt: skip
    where = "4096→4096, M ≥ 4096"
    assert [f"QLoRA over the frozen layer, {where}", "≤ 1.10", "1.08", "yes"] in lines
    assert [f"QDoRA over the frozen layer, {where}", "≤ 1.10", "1.30", "no"] in lines
    assert [line[1:] for line in lines if line[0].startswith("PEFT LoRA")] == [["≥ 1.30", "1.25", "no"]]
    assert [line[1:] for line in lines if line[0].startswith("PEFT DoRA")] == [["≥ 2.50", "3.00", "yes"]]
    assert ["4096 → 4096", "forward", f"merge {1.05 / 1.08:.2f}"] in lines
    assert ["4096 → 4096", "backward", f"split {1.08 / 1.2:.2f}"] in lines
    assert (tmp_path / "ratio.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 4096 → 4096 | ours lora | 1.08" in capsys.readouterr().out


def test_the_report_of_nothing_is_a_report(load, tmp_path):
    (tmp_path / "info.json").write_text('{"versions": ')  # cut short
    load("report").main(["--out", str(tmp_path)])
    assert "tests: not run" in (tmp_path / "report.md").read_text()


# ------------------------------------------------------------------------------------------------ environment


def test_links_stand_in_for_an_installation(load, tmp_path):
    load("environment").link(tmp_path)
    script = (
        "import peft_fast, peft_fast.bench.measure as m, peft_fast.triton_kernels as t\n"
        "print(peft_fast.__file__, m.__file__, t.__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(Path(path).is_relative_to(tmp_path) for path in found.stdout.split())


# ------------------------------------------------------------------------------------------------------ peers


def test_a_weight_packed_without_bitsandbytes_is_as_exact(load):
    layers = load("layers")
    from peft_fast.formats import from_linear

    dense = torch.randn(96, 160) * torch.rand(96, 1)
    errors = []
    for packed in (layers.pack(dense), layers._pack_alone(dense)):
        weight = from_linear(layers.nf4_linear(packed, 160, 96, torch.float32)).check()
        assert weight.nested
        errors.append(((weight.decode(torch.float32) - dense).norm() / dense.norm()).item())
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_unsloth_runs_alone_or_says_why_not(load, monkeypatch):
    bench = load("lora_linear")
    with pytest.raises(SystemExit):
        bench.parse(["--providers", "unsloth", "ours"])
    monkeypatch.setitem(sys.modules, "unsloth", None)
    bench.layers.missing.cache_clear()
    args = bench.parse(["--providers", "dense", "unsloth", "--device", "cpu"])
    with pytest.raises(ValueError, match="--providers: unsloth cannot run here: unsloth: not installed"):
        bench.selected(args)
    bench.layers.missing.cache_clear()


@pytest.mark.parametrize("off", [0.0, 0.05])
def test_results_of_unsloth_are_checked(load, monkeypatch, tmp_path, off):
    """Its function stands for itself here: it takes a block with `o_proj`, and x [batch, tokens, K]."""
    bench = load("lora_linear")

    def apply_lora_o(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (1, 5, 64)
        return block.o_proj(x) * (1 + off)

    kernels = types.SimpleNamespace(apply_lora_o=apply_lora_o)
    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(kernels=kernels))
    monkeypatch.setitem(sys.modules, "unsloth.kernels", kernels)
    bench.layers.missing.cache_clear()
    path = tmp_path / "rows.csv"
    options = ["--shape", "64", "64", "--rank", "4", "--rows", "5", "--dtype", "bfloat16", "--no-cold"]
    run = [*options, "--device", "cpu", "--seconds", "0", "--threads", "1", "--providers", "dense", "unsloth"]
    threads = torch.get_num_threads()
    try:
        if off:
            with pytest.raises(bench.measure.Inexact, match="unsloth lora bfloat16 M=5"):
                bench.main([*run, "--csv", str(path)])
            assert not path.exists()
        else:
            bench.main([*run, "--csv", str(path)])
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["provider"] == "unsloth"]
            assert len(rows) == 1
            assert 0 < float(rows[0]["error_dX"]) < 0.02
    finally:
        torch.set_num_threads(threads)
        bench.layers.missing.cache_clear()


def test_a_backend_has_no_row_where_it_cannot_run(load, tmp_path, capsys, monkeypatch):
    from peft_fast import backends, reference

    class Few:
        lora_linear_backward = staticmethod(reference.lora_linear_backward)

        @staticmethod
        def lora_linear(x, *args):
            if len(x) > 5:
                raise backends.BackendUnavailable(f"takes 5 rows, got {len(x)}")
            return reference.lora_linear(x, *args)

    row = backends.BACKENDS["reference"]
    monkeypatch.setitem(backends.BACKENDS, "few", row._replace(load=lambda: Few))
    bench = load("lora_linear")
    path = tmp_path / "rows.csv"
    options = ["--shape", "64", "64", "--rank", "4", "--rows", "5", "6", "--dtype", "float32", "--no-cold"]
    run = [*options, "--device", "cpu", "--seconds", "0", "--threads", "1", "--providers", "dense", "ours"]
    threads = torch.get_num_threads()
    bench.main([*run, "--backend", "few", "--csv", str(path)])
    torch.set_num_threads(threads)
    with path.open(newline="") as file:
        rows = [(row["provider"], row["M"]) for row in csv.DictReader(file)]
    assert rows == [("dense", "5"), ("dense", "5"), ("ours", "5"), ("dense", "6"), ("dense", "6")]
    assert "left out ours lora[few] float32 M=6 threads=1: takes 5 rows, got 6" in capsys.readouterr().out


def test_sanity_tells_sound_backends_from_wrong_ones(load, tmp_path, monkeypatch, capsys):
    from peft_fast import backends, reference

    class Corrupt:
        dequantize = staticmethod(reference.dequantize)
        lora_linear = staticmethod(reference.lora_linear)

        @staticmethod
        def lora_linear_backward(*args):
            grads = reference.lora_linear_backward(*args)
            return grads._replace(lora_B=1.01 * grads.lora_B)

    row = backends.BACKENDS["reference"]
    monkeypatch.setitem(backends.BACKENDS, "reference-off", row._replace(load=lambda: Corrupt))
    path = tmp_path / "sanity.json"
    options = ["--shape", "64", "64", "--rank", "4", "--rows", "5", "--dtype", "float32", "--device", "cpu"]
    assert load("sanity").main([*options, "--prefix", "reference", "--json", str(path)]) == 1
    content = json.loads(path.read_text())
    assert content["sound"] == ["reference"]
    assert {cell["wrong"] for cell in content["cells"] if cell["backend"] == "reference-off"} == {True}
    assert "reference-off lora float32 M=5: dB has" in capsys.readouterr().out
