"""`peft-fast bench` and `pytest bench`: what they write and print, and options that do not fit."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import io
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from peft_fast.bench import bench_suite, measure, peaks, records, registry, show, suite
from rich.console import Console
from typer.testing import CliRunner

from peft_fast import cli

CASE = registry.Case("lora_linear", "nf4-nested", "lora", 128, 64, 4, 5, "bfloat16", 0.0)
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture(scope="module")
def options():
    return suite.Options(seconds=0.0, compiled=False, cold=False)


@pytest.fixture(scope="module")
def block(options):
    names = ["dense-float32", "dense-bfloat16", "dense-float16", "peft", "liger", "ours[reference]", "ours"]
    (found,) = suite.blocks([CASE], names, options)
    return found


def test_records_have_one_header_and_say_what_the_machine_is(block, options, tmp_path):
    from peft_fast.bench.lora_linear import append

    path = tmp_path / "rows.csv"
    for _ in range(2):
        append(path, list(records.records(block, options)))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 * len(block.timed) + 2)
    assert {row["reason"] for row in rows if row["provider"] == "liger"} != {""}
    (ours, *_) = (r for r in rows if r["provider"] == "ours" and r["measure"] == "forward+backward")
    work = registry.work(block.case)["forward+backward"]
    seconds = 1e-3 * float(ours["p50"])
    assert float(ours["gb_per_s"]) == pytest.approx(1e-9 * work.bytes / seconds, rel=1e-4)
    assert float(ours["tflop_per_s"]) == pytest.approx(1e-12 * work.flops / seconds, rel=1e-4)
    best = peaks.peak("cpu", "bfloat16")
    least = max(work.flops / best.flops, work.bytes / best.bandwidth)
    assert float(ours["roofline_percent"]) == pytest.approx(100 * least / seconds, rel=1e-4)
    assert (ours["torch"], ours["threads"], ours["M"], ours["saved_bytes"]) == (
        torch.__version__,
        "1",
        "5",
        "80",
    )
    assert 0 < float(ours["error"]) <= float(ours["allowed_error"]) < 1e-2
    assert ours["worst_result"] in ("y", "dX", "dA", "dB", "y, adapters frozen", "dX, adapters frozen")
    assert {row["noisy"] for row in rows if row["reason"]} == {""}


def test_versions_of_peers_are_written(block, options, monkeypatch):
    known = {"liger_kernel": "1.2", "torchao": "3.4"}

    def version(name, real=importlib.metadata.version):
        return known[name] if name in known else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    row = next(records.records(block, options))
    assert {name: row[name] for name in known} == known
    assert {"pyreft", "pyvene", "unsloth"} <= set(row)
    assert row["torch"] == torch.__version__


def test_commit_is_that_of_a_checkout_alone(monkeypatch, tmp_path):
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", records.commit())
    monkeypatch.setattr(records, "__file__", str(tmp_path / "records.py"))
    assert records.commit.__wrapped__() is None


def test_results_do_not_make_a_checkout_dirty(monkeypatch, tmp_path):
    for name in ("bench/measure.py", "bench/results/suite.csv", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n")
    who = ("-c", "user.name=me", "-c", "user.email=me@localhost")
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "__file__", str(tmp_path / "bench" / "records.py"))
    clean = records.commit.__wrapped__()
    assert re.fullmatch(r"[0-9a-f]{7,}", clean)
    with (tmp_path / "bench/results/suite.csv").open("a") as file:
        file.write("2\n")
    assert records.commit.__wrapped__() == clean
    (tmp_path / "README.md").write_text("2\n")
    assert records.commit.__wrapped__() == f"{clean}-dirty"


# ------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def command(monkeypatch):
    """`peft-fast bench` on the tiny case, cached sizes of this machine left alone."""
    monkeypatch.setattr(registry, "select", lambda filters: [CASE])
    monkeypatch.setattr(measure, "last_level_cache", lambda device: 2**20)

    def run(*options: str):
        command = ["bench", "--providers", "dense-float32,liger,ours", "--seconds", "0", *options]
        return CliRunner().invoke(cli.app, command)

    return run


def test_the_command_prints_a_table_and_appends_rows(command, tmp_path):
    path = tmp_path / "rows.csv"
    result = command("--csv", str(path), "--threads", "1")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "lora nf4-nested 128x64 R=4 M=5 bfloat16" in text
    assert "liger not run: liger_kernel" in text
    assert "dense-float32 over itself" in text
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["dense-float32"] * 3 + ["liger"] + ["ours"] * 3


def test_the_command_fails_when_something_is_red(command, monkeypatch):
    monkeypatch.setattr(measure, "FACTOR", 0.0)
    monkeypatch.setattr(measure, "FLOOR", dict.fromkeys(measure.FLOOR, 0.0))
    result = command()
    assert result.exit_code == 1
    assert "RED ours" in result.output


def test_cases_are_listed_and_bad_options_named():
    run = functools.partial(CliRunner().invoke, cli.app)
    result = run(["bench", "--list", "--filter", "dora fp4 ViT-B.down R=13 M=333 float16 dropout=0.1"])
    assert "dora fp4 ViT-B.down 3072x768 R=13 M=333 float16 dropout=0.1  (ViT-B.down)" in result.output
    assert "1 of" in result.output
    for option, value, message in (
        ("--filter", "lora M=17", "--filter: expected labels such as"),
        ("--providers", "theirs", "--providers: expected"),
        ("--threads", "0", "--threads: expected at least 1"),
        ("--device", "tpu", "--device: expected cpu"),
        ("--filter", " ", "--filter: expected words"),
        ("--seconds", "nan", "--seconds: expected a number that is at least 0, got nan"),
        ("--seconds", "inf", "--seconds: expected a number that is at least 0, got inf"),
        ("--seconds", "-1", "--seconds: expected a number that is at least 0, got -1"),
        ("--cache-mib", "0", "--cache-mib: expected 1 to 16384, got 0"),
        ("--cache-mib", "33554432", "--cache-mib: expected 1 to 16384"),
    ):
        assert message in str(run(["bench", option, value]).exception)


def test_a_file_that_cannot_be_appended_to_is_refused_before_anything_runs(command, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "blocks", lambda *args: pytest.fail("it was timed"))
    other = tmp_path / "other.csv"
    other.write_text("device,N\nx,1\n")
    for path, message in (
        (tmp_path / "no" / "rows.csv", "--csv: expected a file in a folder that exists, got "),
        (tmp_path, "--csv: expected a file that can be written, got "),
        (Path("/proc/rows.csv"), "--csv: expected a file "),
        (other, "--csv: expected a new file or one with the suite's columns, got "),
    ):
        result = command("--csv", str(path))
        assert isinstance(result.exception, ValueError)
        assert str(result.exception).startswith(f"{message}{path}" if message.endswith("got ") else message)
    assert other.read_text() == "device,N\nx,1\n"
    assert not (tmp_path / "no").exists()


def test_the_size_of_the_caches_can_be_named(command, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(registry, "select", lambda filters: [CASE])
    monkeypatch.setattr(measure, "CACHES", tmp_path)
    flushed = []
    make = measure.cache_flush
    monkeypatch.setattr(
        measure, "cache_flush", lambda device, size: flushed.append(size) or make(device, size)
    )
    result = command()
    assert isinstance(result.exception, OSError)
    assert "name the size of the last level with --cache-mib" in str(result.exception)
    result = command("--cache-mib", "3", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert flushed == [3 * 2**20]


@pytest.mark.parametrize("width", [45, 60, 80, 100, show.WIDE])
def test_a_narrow_terminal_loses_columns_and_no_digit(block, options, width):
    console = Console(width=width, file=io.StringIO())
    table = show.table(block, options, width)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in console.file.getvalue()
    titles = [column.header for column in table.columns]
    assert titles[:2] == ["provider", "ms"]
    assert ("p20-p80" in titles) == (width == show.WIDE)
    assert "/ dense" in titles


# ------------------------------------------------------------------------------------------ pytest-benchmark


def pytest_bench(*options):
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)


def test_pytest_benchmark_times_the_same_cases():
    """`pytest bench` finds them and says what it leaves out, plain `pytest` does not find them."""
    only = "lora nf4-nested MiniLM-L6.q R=8 M=1 float32 dropout=0"
    done = pytest_bench(
        "--filter", only, "-k", "ours or dense-float32 or peft-compile or pyreft", "--cache-mib", "1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed, 6 skipped" in done.stdout
    assert re.search(r"SKIPPED \[3\] .*: peft-compile: compiling takes seconds", done.stdout)
    assert re.search(r"SKIPPED \[3\] .*: pyreft: pyreft has no lora\n", done.stdout)
    config = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in config
    assert not list((ROOT / "tests").glob("bench_*.py"))


def test_pytest_benchmark_names_options_that_do_not_fit(pytestconfig):
    class Config:
        option = pytestconfig.option

        def __init__(self, **options):
            self.options = options

        def getoption(self, name):
            return self.options.get(name[2:].replace("-", "_"))

    filtered = types.SimpleNamespace(config=Config(filter=["lora M=17"]))
    with pytest.raises(pytest.Collector.CollectError, match="--filter: expected labels such as"):
        bench_suite.pytest_generate_tests(filtered)
    conftest = importlib.import_module("peft_fast.bench.conftest")
    with pytest.raises(pytest.UsageError, match="--cache-mib: expected at least 1, got 0"):
        conftest.pytest_configure(Config(cache_mib=0))


def test_each_pass_of_a_benchmark_finds_cold_caches(monkeypatch):
    """The backward pass too, and the clock leaves the flush out."""
    now = [0.0]
    monkeypatch.setattr(bench_suite.time, "perf_counter", lambda: now[0])

    def takes(seconds, name):
        now[0] += seconds
        order.append(name)

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            takes(1, "forward")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            takes(2, "backward")
            return grad

    order = []
    step = measure.Step(Layer.apply, torch.ones(2, requires_grad=True), torch.ones(2))
    start = bench_suite.CLOCK()
    bench_suite.CALLS["forward+backward"](step, None, lambda: takes(100, "flush"))
    assert order == ["forward", "flush", "backward"]
    assert bench_suite.CLOCK() - start == 3
