"""`make gpu` without a GPU: how its sections end and go on, its report, and its environment."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from blocked import without

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
    assert "tests: skipped, pytest: not installed" in second.stdout
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


def test_results_of_an_earlier_run_are_deleted_first(gpu, tmp_path):
    section(gpu, "import os; print(os.path.exists('old.xml'))")
    gpu.SECTIONS["one"] = gpu.SECTIONS["one"]._replace(anew=("old.xml", "none.json"))
    (tmp_path / "old.xml").write_text("<testsuites/>")
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    assert (tmp_path / "one.log").read_text().splitlines().count("False") == 2


def test_a_gpu_does_not_inherit_the_interpreter(load, monkeypatch, tmp_path):
    gpu = load("gpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in gpu.environment(gpu.Plan(tmp_path, "cuda", False))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert gpu.environment(gpu.Plan(tmp_path, "cpu", True))["TRITON_INTERPRET"] == "1"


def test_a_report_that_hangs_is_one_line(gpu, tmp_path, monkeypatch, capsys):
    section(gpu, "print('a figure')")
    monkeypatch.setattr(gpu, "REPORT_SECONDS", 0.2)
    monkeypatch.setattr(
        gpu.Plan, "script", lambda *args: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "report.py: not done after 0 s"


def test_what_needs_no_bitsandbytes_is_tested_without(load, monkeypatch, tmp_path):
    """Every fixture is found, and the report names what was left out."""
    gpu, report = load("gpu"), load("report")
    assert all((BENCH.parent / "tests" / f"{name}.py").exists() for name in (*gpu.TESTS, *gpu.ALONE))
    for module in (gpu, report):
        monkeypatch.setattr(module, "installed", lambda package: package != "bitsandbytes")
    (command,) = gpu.tests(gpu.Plan(tmp_path, "cpu", False), 100)
    env = without(tmp_path, "bitsandbytes")
    run = [part for part in command if not part.isdigit() and part != "-n"]
    found = subprocess.run([*run, "--setup-plan"], env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    text = report.tests(tmp_path / "tests.xml")
    assert "0 failures, 0 errors" in text
    left_out = text.partition("not installed: ")[2].split(", ")
    assert {"test_ops", "test_triton"} <= set(left_out)
    assert not {"test_strategies", "test_roofline"} & set(left_out)


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


def test_the_report_survives_tests_that_were_ended_and_says_what_was_wrong(load, tmp_path):
    (tmp_path / "tests.xml").write_text('<testsuites><testsuite tests="3"')
    cell = {"backend": "triton-split", "dtype": "bfloat16", "wrong": True}
    sanity = {"sound": {"bfloat16": ["triton"], "float16": []}, "cells": [cell, cell]}
    (tmp_path / "sanity.json").write_text(json.dumps(sanity))
    load("report").main(["--out", str(tmp_path)])
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert any(line.startswith("- tests: tests.xml is unfinished") for line in lines)
    assert {"- sound in bfloat16: triton", "- sound in float16: none"} <= set(lines)
    assert lines.count("- WRONG in bfloat16: triton-split") == 1


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


def test_an_installation_that_takes_too_long_is_ended_with_its_children(load, monkeypatch, tmp_path, capsys):
    environment, pid = load("environment"), tmp_path / "child"
    script = tmp_path / "pip"
    script.write_text(
        "#!/bin/sh\n"
        "(trap '' INT TERM; sleep 60) &\n"  # a compiler that does not listen
        f"echo $! > {pid}\n"
        "sleep 60\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert not environment.pip("anything", seconds=1.0)
    assert "not done after 1 s" in capsys.readouterr().out
    for _ in range(50):
        if not running(int(pid.read_text())):
            break
        time.sleep(0.1)
    assert not running(int(pid.read_text()))
