"""The benchmark suite on tiny layers: what is not exact has no figure, and a noisy machine is called one."""

from __future__ import annotations

import csv
import functools
import importlib
import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft_fast.bench import measure
from typer.testing import CliRunner

from peft_fast import DoRALinear, backends, cli, dora, reference

NAMES = ("dense-float32", "dense-float16", "dense-bfloat16", "peft", "liger", "ours[reference]", "ours")
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture(scope="module")
def suite():
    return importlib.import_module("peft_fast.bench.suite")


@pytest.fixture(scope="module")
def registry(suite):
    return suite.registry


@pytest.fixture(scope="module")
def options(suite):
    return suite.Options(seconds=0.0, compiled=False, cold=False)


@pytest.fixture(scope="module")
def case(registry):
    return registry.Case("lora_linear", "nf4-nested", "lora", 128, 64, 4, 5, "bfloat16", 0.0)


@pytest.fixture(scope="module")
def block(suite, case, options):
    (found,) = suite.blocks([case], NAMES, options)
    return found


def ready(suite, case, name):
    operands = suite._operands(case, "cpu")
    return suite.prepare(name, case, operands, suite.Checker(case, operands), "cpu")


def test_a_provider_has_figures_or_a_reason(suite, block):
    reasons = {o.provider: o.reason for o in block.outcomes}
    assert list(reasons) == list(NAMES)
    assert reasons.pop("dense-float16") == "on a CPU it is timed beside float16 cases alone"
    assert reasons.pop("liger").startswith("liger_kernel")
    assert set(reasons.values()) == {None}
    assert {o.provider for o in block.timed} == set(reasons)
    for outcome in block.timed:
        assert list(outcome.spreads) == list(suite.MEASURES)
        for p20, p50, p80, samples in outcome.spreads.values():
            assert 0 < p20 <= p50 <= p80
            assert samples >= 5
        assert outcome.launches is None
        assert (outcome.control is not None) == (outcome.provider == "dense-float32")
    by_name = {o.provider: o for o in block.timed}
    assert by_name["ours"].backend == backends.resolve("lora_linear", "nf4", "cpu", torch.bfloat16)
    assert by_name["ours"].memory.saved == 4 * 5 * 4  # Z [M, R] fp32
    assert by_name["dense-float32"].memory.saved == 0


def test_ratios_are_to_the_fastest_dense_layer_and_to_peers(block):
    for measured in ("forward", "forward+backward", "dX"):
        p50 = {o.provider: o.spreads[measured].p50 for o in block.timed}
        dense = min(p50["dense-float32"], p50["dense-bfloat16"])
        for outcome in block.timed:
            assert block.over(outcome, "dense", measured) == p50[outcome.provider] / dense
            assert block.over(outcome, "peft", measured) == p50[outcome.provider] / p50["peft"]
            assert block.over(outcome, "unsloth", measured) is None


def test_records_have_one_header_and_say_what_the_machine_is(suite, block, options, tmp_path):
    from peft_fast.bench.lora_linear import append

    path = tmp_path / "rows.csv"
    for _ in range(2):
        append(path, list(suite.records(block, options)))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 * len(block.timed) + 2)
    assert {row["reason"] for row in rows if row["provider"] == "liger"} != {""}
    (ours, *_) = (r for r in rows if r["provider"] == "ours" and r["measure"] == "forward+backward")
    work = suite.registry.work(block.case)["forward+backward"]
    seconds = 1e-3 * float(ours["p50"])
    assert float(ours["gb_per_s"]) == pytest.approx(1e-9 * work.bytes / seconds, rel=1e-4)
    assert float(ours["tflop_per_s"]) == pytest.approx(1e-12 * work.flops / seconds, rel=1e-4)
    best = suite.peaks.peak("cpu", "bfloat16")
    least = max(work.flops / best.flops, work.bytes / best.bandwidth)
    assert float(ours["roofline_percent"]) == pytest.approx(100 * least / seconds, rel=1e-4)
    assert (ours["torch"], ours["threads"], ours["M"], ours["saved_bytes"]) == (
        torch.__version__,
        "1",
        "5",
        "80",
    )
    assert 0 < float(ours["error"]) < 1e-2


def test_commit_is_that_of_a_checkout_alone(suite, monkeypatch, tmp_path):
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", suite.commit())
    monkeypatch.setattr(suite, "__file__", str(tmp_path / "suite.py"))
    assert suite.commit.__wrapped__() is None


class Wrong:
    """The reference with one result off by a thousandth of its norm."""

    @staticmethod
    def lora_linear(*args):
        return reference.lora_linear(*args)

    @staticmethod
    def lora_linear_backward(*args):
        grads = reference.lora_linear_backward(*args)
        if grads.lora_A is not None:
            grads.lora_A.view(-1)[3] += 1e-3 * grads.lora_A.norm()
        return grads


def test_what_is_not_exact_is_red_and_has_no_figure(suite, case, options, monkeypatch, tmp_path):
    row = backends.BACKENDS["reference"]._replace(load=lambda: Wrong)
    monkeypatch.setitem(backends.BACKENDS, "reference", row)
    (block,) = suite.blocks([case], ["dense-float32", "ours[reference]", "ours"], options)
    red, *others = (o for name in ("ours[reference]", "ours", "dense-float32")
                    for o in block.outcomes if o.provider == name)  # fmt: skip
    assert red.red
    assert re.match(r"ours\[reference\]: dA: relative error .* allowed", red.reason)
    assert (red.spreads, red.memory) == ({}, None)
    assert all(o.spreads and not o.red for o in others)
    lines = [r for r in suite.records(block, options) if r["provider"] == "ours[reference]"]
    assert [(r["red"], r["p50"], r["over_dense"]) for r in lines] == [(True, None, None)]


def test_a_peer_that_fails_is_left_out_with_its_error(suite, case, options, monkeypatch):
    def broken(case, operands):
        raise RuntimeError("no such kernel\nand more")

    providers = importlib.import_module("peft_fast.bench.providers")
    monkeypatch.setitem(providers.PROVIDERS, "peft", providers.PROVIDERS["peft"]._replace(layer=broken))
    (block,) = suite.blocks([case], ["peft", "ours"], options)
    assert [o.reason for o in block.outcomes] == ["RuntimeError: no such kernel", None]
    monkeypatch.setitem(providers.PROVIDERS, "ours", providers.PROVIDERS["ours"]._replace(layer=broken))
    with pytest.raises(RuntimeError, match="no such kernel"):
        list(suite.blocks([case], ["ours"], options))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "dense"])
def test_frozen_adapters_give_the_same_dx_and_nothing_else(suite, case, method, format):
    found = ready(suite, case._replace(method=method, format=format), "ours")
    for step in (found.step, found.only_x):
        step.run()
    trained = [p.grad for p in found.step.layer.parameters() if p.requires_grad]
    assert len(trained) == (3 if method == "dora" else 2)
    assert all(grad is not None for grad in trained)
    assert all(p.grad is None for p in found.only_x.layer.parameters())
    torch.testing.assert_close(found.only_x.x.grad, found.step.x.grad)


def test_dropout_is_checked_with_the_mask_that_was_drawn(suite, case):
    dropped = case._replace(dropout=0.1)
    for name in ("ours", "peft"):
        assert ready(suite, dropped, name).errors.error < 1e-2
    operands = suite._operands(dropped, "cpu")
    step = suite._step(suite.entry("ours"), case, operands, "cpu")  # without dropout
    with pytest.raises(suite.measure.Inexact, match="ours: y: relative error"):
        suite.Checker(dropped, operands).check("ours", step, step)


def test_an_edit_is_checked_and_a_wrong_one_found(suite, registry):
    case = registry.Case("loreft", "nf4-nested", "loreft", 128, 64, 4, 6, "float32", 0.0)
    names = ["ours"]
    if importlib.util.find_spec("pyreft") and importlib.util.find_spec("pyvene"):
        names.append("pyreft")
    operands = suite._operands(case, "cpu")
    for name in names:
        assert ready(suite, case, name).errors.error < 1e-5
        step = suite._step(suite.entry(name), case, operands, "cpu")
        edit = importlib.import_module("peft_fast.bench.checks").edit_of(step.layer)
        edit.source.register_hook(lambda grad: 1.1 * grad)
        with pytest.raises(suite.measure.Inexact, match=f"{name}: dV"):
            suite.Checker(case, operands).check(name, step, step)
    assert suite.entry("peft").cannot(case, "cpu") == "PEFT has no loreft"


def test_pefts_own_4_bit_layer_is_built(suite, case, monkeypatch):
    from peft.tuners.lora import bnb, layer

    build = suite.entry("peft").layer
    packed = case, suite._operands(case, "cpu")
    assert type(build(*packed)) is bnb.Linear4bit
    dense = case._replace(format="dense")
    assert type(build(dense, suite._operands(dense, "cpu"))) is layer.Linear
    monkeypatch.setattr(bnb, "is_bnb_4bit_available", lambda: False)
    with pytest.raises(TypeError, match="expected it to make Linear4bit, got Linear"):
        build(*packed)


def test_a_compiled_peer_is_checked_as_the_eager_one_is(suite, case, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert ready(suite, case, "peft-compile").errors == ready(suite, case, "peft").errors
    quick = suite.Options(compiled=False)
    assert "--quick" in suite.reason_against("peft-compile", case, ["peft-compile"], quick)
    dropped = case._replace(dropout=0.1)
    assert "mask of its own" in suite.reason_against("peft-compile", dropped, [], suite.Options())


def test_unsloth_runs_beside_dense_layers_alone(suite, case, monkeypatch):
    layers = importlib.import_module("peft_fast.bench.layers")
    monkeypatch.setattr(layers, "missing", lambda kind: f"{kind} was imported")
    why = functools.partial(suite.reason_against, "unsloth", case, options=suite.Options())
    assert "other packages" in why(["dense-float32", "unsloth", "ours"])
    assert why(["dense-float32", "unsloth"]) == "unsloth was imported"


def test_names_of_providers_are_checked(suite, case, options):
    for name in ("theirs", "ours[fastest]", "ours[cpu"):
        with pytest.raises(ValueError, match="--providers: expected .*got '" + re.escape(name)):
            list(suite.blocks([case], [name], options))


# ---------------------------------------------------------------------------------------------------- noise


def test_a_provider_equals_itself_within_its_spread(suite):
    same = suite._control([2.0, 2.1, 1.9, 2.0, 2.2], [2.1, 1.9, 2.0, 2.1, 2.0])
    assert same.p50 == 1.0
    assert not same.noisy
    assert suite.Control(1.01, 1.02, 1.1).noisy  # 1.00 is outside
    assert suite.Control(0.7, 0.9, 0.99).noisy
    assert suite.Control(0.8, 1.0, 1.3).noisy  # a spread of 1.6
    assert not suite.Control(0.9, 1.05, 1.2).noisy


def test_a_shared_machine_is_noisy(suite, block, monkeypatch):
    quiet = suite.Outcome("dense-float32", control=suite.Control(0.99, 1.0, 1.01))
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 2)
    assert not suite.Block(block.case, [quiet], 2.2).noisy
    assert suite.Block(block.case, [quiet], 3.0).noisy
    shaken = quiet._replace(control=suite.Control(1.2, 1.3, 1.4))
    assert suite.Block(block.case, [shaken], None).noisy


def test_each_provider_is_timed_twice_on_request(suite, case, options):
    (block,) = suite.blocks([case], ["dense-float32", "ours"], options._replace(again=True))
    assert all(o.control is not None and 0 < o.control.p20 <= o.control.p80 for o in block.timed)


def test_share_of_the_roofline(suite, registry):
    peak = suite.peaks.Peak(1e12, 1e11, "probe")
    assert peak.percent(registry.Work(1e9, 1e6), 2.0) == pytest.approx(50)
    assert peak.percent(registry.Work(1e6, 1e8), 2.0) == pytest.approx(50)


# ------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def command(suite, registry, case, monkeypatch):
    """`peft-fast bench` on the tiny case, cached sizes of this machine left alone."""
    monkeypatch.setattr(registry, "select", lambda filters: [case])
    monkeypatch.setattr(suite.measure, "last_level_cache", lambda device: 2**20)

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
    measure = importlib.import_module("peft_fast.bench.measure")
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
    ):
        assert message in str(run(["bench", option, value]).exception)


def test_pytest_benchmark_times_the_same_cases(tmp_path):
    """`pytest bench` finds them, plain `pytest` does not."""
    only = "lora nf4-nested MiniLM-L6.q R=8 M=1 float32 dropout=0"
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable", "--filter", only]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", *options, "-k", "ours or dense-float32"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
    config = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in config
    assert not list((ROOT / "tests").glob("bench_*.py"))


# ---------------------------------------------------------------------------------------------------- plots


@pytest.fixture
def results(suite, block, options, tmp_path):
    """A file with the block at three numbers of rows."""
    from peft_fast.bench.lora_linear import append

    path = tmp_path / "suite.csv"
    for M in (1, 16, 128):
        append(path, list(suite.records(block._replace(case=block.case._replace(M=M)), options)))
    return path


def test_figures_are_drawn_from_a_file(results, tmp_path):
    plot = importlib.import_module("peft_fast.bench.plot")
    for kind, more in (("ratio", []), ("memory", ["--rows", "16"]), ("roofline", ["--measure", "dX"])):
        out = tmp_path / f"{kind}.png"
        plot.main([kind, "--csv", str(results), "--out", str(out), *more])
        assert out.read_bytes()[:4] == b"\x89PNG"
    rows = [row for row in plot.read(results) if row["measure"] == "forward+backward"]
    (axis,) = plot.ratio(rows).axes
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["ours", "peft", "ours[reference]"]
    ours = {int(row["M"]): float(row["over_dense"]) for row in rows if row["provider"] == "ours"}
    assert dict(zip(*lines["ours"].get_data(), strict=True)) == ours


def test_the_later_of_two_rows_is_drawn(results):
    plot = importlib.import_module("peft_fast.bench.plot")
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with results.open("a", newline="") as file:
        csv.DictWriter(file, list(rows[0])).writerow({**rows[0], "p50": "123"})
    assert [row["p50"] for row in plot.read(results)].count("123") == 1
    assert len(plot.read(results)) == sum(bool(row["p50"]) for row in rows)


def test_files_and_options_that_do_not_fit_are_named(results, tmp_path, monkeypatch):
    plot = importlib.import_module("peft_fast.bench.plot")
    (tmp_path / "other.csv").write_text("device,N\nx,1\n")
    with pytest.raises(ValueError, match=r"--csv: expected a file of `peft-fast bench`, .*other.csv has no"):
        plot.read(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="expected rows for the options, got none"):
        plot.main(["ratio", "--csv", str(results), "--out", "x.png", "--layer", "Llama-3-8B.q"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.canvas(1, 2.0)


def test_every_sample_of_dora_computes_its_norm(suite, monkeypatch):
    """As the first forward of an optimizer step does, which has written A and B."""
    layer = DoRALinear.from_linear(torch.nn.Linear(32, 16), r=2)
    torch.nn.init.normal_(layer.lora_B)
    step = measure.Step(layer, torch.randn(3, 32, requires_grad=True), torch.randn(3, 16))
    norms, compute = [], dora.lora_weight_norm
    monkeypatch.setattr(dora, "lora_weight_norm", lambda *a, **k: norms.append(1) or compute(*a, **k))
    for factors, expected in (((), 1), (suite._factors(layer), 3)):
        norms.clear()
        layer.reset_norm()
        outputs = [step._replace(factors=factors).run() for _ in range(3)]
        assert len(norms) == expected
        assert torch.equal(outputs[0], outputs[1])
