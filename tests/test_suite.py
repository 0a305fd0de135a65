"""The benchmark suite on tiny layers: what is not exact has no figure, and a noisy machine is called one."""

from __future__ import annotations

import csv
import functools
import importlib
import importlib.util
import math
import re
import sys
import warnings

import pytest
import torch
from peft_fast.bench import checks, measure, peaks, records, registry, show, suite

from peft_fast import DoRALinear, backends, dora, reference

NAMES = ("dense-float32", "dense-float16", "dense-bfloat16", "peft", "liger", "ours[reference]", "ours")

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
def case():
    return registry.Case("lora_linear", "nf4-nested", "lora", 128, 64, 4, 5, "bfloat16", 0.0)


@pytest.fixture(scope="module")
def block(case, options):
    (found,) = suite.blocks([case], NAMES, options)
    return found


def ready(case, name):
    operands = suite._operands(case, "cpu")
    return suite.prepare(name, case, operands, suite.Checker(case, operands), "cpu")


def test_a_provider_has_figures_or_a_reason(block):
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
        assert list(outcome.controls) == (list(suite.MEASURES) if outcome.provider == "dense-float32" else [])
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


def test_what_is_not_exact_is_red_and_has_no_figure(case, options, monkeypatch, tmp_path):
    row = backends.BACKENDS["reference"]._replace(load=lambda: Wrong)
    monkeypatch.setitem(backends.BACKENDS, "reference", row)
    (block,) = suite.blocks([case], ["dense-float32", "ours[reference]", "ours"], options)
    red, *others = (o for name in ("ours[reference]", "ours", "dense-float32")
                    for o in block.outcomes if o.provider == name)  # fmt: skip
    assert red.red
    assert re.match(r"ours\[reference\]: dA: relative error .* allowed", red.reason)
    assert (red.spreads, red.memory) == ({}, None)
    assert all(o.spreads and not o.red for o in others)
    lines = [r for r in records.records(block, options) if r["provider"] == "ours[reference]"]
    assert [(r["red"], r["p50"], r["over_dense"]) for r in lines] == [(True, None, None)]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "dense"])
def test_frozen_adapters_give_the_same_dx_and_nothing_else(case, method, format):
    found = ready(case._replace(method=method, format=format), "ours")
    for step in (found.step, found.only_x):
        step.run()
    trained = [p.grad for p in found.step.layer.parameters() if p.requires_grad]
    assert len(trained) == (3 if method == "dora" else 2)
    assert all(grad is not None for grad in trained)
    assert all(p.grad is None for p in found.only_x.layer.parameters())
    torch.testing.assert_close(found.only_x.x.grad, found.step.x.grad)


@pytest.mark.parametrize("method", ["lora", "loreft"])
@pytest.mark.parametrize("wrong", ["y", "dX"])
def test_what_is_wrong_with_frozen_adapters_alone_is_found(case, method, wrong):
    if method == "loreft":
        case = registry.Case("loreft", "nf4-nested", "loreft", 128, 64, 4, 5, "bfloat16", 0.0)
    found = ready(case, "ours")
    step = found.step._replace(factors=())
    if wrong == "y":
        found.only_x.layer.register_forward_hook(lambda module, args, y: 1.1 * y.detach() + y - y.detach())
    else:
        found.only_x.layer.register_full_backward_hook(lambda module, dx, dy: (1.1 * dx[0],))
    checker = suite.Checker(case, suite._operands(case, "cpu"))
    message = f"ours: {wrong}, adapters frozen: relative error"
    with pytest.raises(measure.Inexact, match=message):
        checker.check("ours", step, found.only_x)
    checker.check("ours", step, step)


@pytest.mark.parametrize("name", ["ours", "peft"])
@pytest.mark.parametrize("plain", [0.0, 1e-3])
def test_what_is_written_as_allowed_is_what_is_judged(name, plain):
    truth = torch.ones(64, 64, dtype=torch.float64)

    def judge(error):
        got, compared = (torch.full((64, 64), 1 + e) for e in (error, plain))
        return checks.judge(name, "dX", got, compared, truth)

    allowed = judge(plain).allowed
    assert judge(0.95 * allowed).error == pytest.approx(0.95 * allowed, rel=0.05, abs=1e-7)
    with pytest.raises(measure.Inexact, match=f"{name}: dX: relative error"):
        judge(1.3 * allowed)


def test_the_result_nearest_to_what_is_allowed_is_told(case, monkeypatch):
    """Not the one furthest from plain PyTorch's error."""
    told = {"y": checks.Worst("y", 1e-6, 1e-12, 1e-3), "dX": checks.Worst("dX", 9e-4, 9e-4, 1e-3)}
    monkeypatch.setattr(checks, "judge", lambda name, result, *tensors: told[result])
    assert ready(case, "dense-float32").errors == told["dX"]


def test_dropout_is_checked_with_the_mask_that_was_drawn(case):
    dropped = case._replace(dropout=0.1)
    for name in ("ours", "peft"):
        assert ready(dropped, name).errors.error < 1e-2
    operands = suite._operands(dropped, "cpu")
    step = suite._step(suite.entry("ours"), case, operands, "cpu")  # without dropout
    with pytest.raises(measure.Inexact, match="ours: y: relative error"):
        suite.Checker(dropped, operands).check("ours", step, step)


def test_an_edit_is_checked_and_a_wrong_one_found():
    case = registry.Case("loreft", "nf4-nested", "loreft", 128, 64, 4, 6, "float32", 0.0)
    names = ["ours"]
    if importlib.util.find_spec("pyreft") and importlib.util.find_spec("pyvene"):
        names.append("pyreft")
    operands = suite._operands(case, "cpu")
    for name in names:
        assert ready(case, name).errors.error < 1e-5
        step = suite._step(suite.entry(name), case, operands, "cpu")
        edit = checks.edit_of(step.layer)
        edit.source.register_hook(lambda grad: 1.1 * grad)
        with pytest.raises(measure.Inexact, match=f"{name}: dV"):
            suite.Checker(case, operands).check(name, step, step)
    assert suite.entry("peft").cannot(case, "cpu") == "PEFT has no loreft"


def test_pefts_own_4_bit_layer_is_built(case, monkeypatch):
    from peft.tuners.lora import bnb, layer

    build = suite.entry("peft").layer
    packed = case, suite._operands(case, "cpu")
    assert type(build(*packed)) is bnb.Linear4bit
    dense = case._replace(format="dense")
    assert type(build(dense, suite._operands(dense, "cpu"))) is layer.Linear
    monkeypatch.setattr(bnb, "is_bnb_4bit_available", lambda: False)
    with pytest.raises(TypeError, match="expected it to make Linear4bit, got Linear"):
        build(*packed)


def test_a_compiled_peer_is_checked_as_the_eager_one_is(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert ready(case, "peft-compile").errors == ready(case, "peft").errors
    quick = suite.Options(compiled=False)
    assert "--quick" in suite.reason_against("peft-compile", case, ["peft-compile"], quick)
    dropped = case._replace(dropout=0.1)
    assert "mask of its own" in suite.reason_against("peft-compile", dropped, [], suite.Options())


def test_unsloth_runs_beside_dense_layers_alone(case, monkeypatch):
    layers = importlib.import_module("peft_fast.bench.layers")
    monkeypatch.setattr(layers, "missing", lambda kind: f"{kind} was imported")
    why = functools.partial(suite.reason_against, "unsloth", case, options=suite.Options())
    assert "other packages" in why(["dense-float32", "unsloth", "ours"])
    assert why(["dense-float32", "unsloth"]) == "unsloth was imported"


def test_names_of_providers_are_checked(case, options):
    for name in ("theirs", "ours[fastest]", "ours[cpu"):
        with pytest.raises(ValueError, match="--providers: expected .*got '" + re.escape(name)):
            list(suite.blocks([case], [name], options))


# ---------------------------------------------------------------------------------------------------- noise


def test_a_provider_equals_itself_within_its_spread():
    same = suite._control([2.0, 2.1, 1.9, 2.0, 2.2], [2.1, 1.9, 2.0, 2.1, 2.0])
    assert same.p50 == 1.0
    assert same.noise is None
    assert suite.Control(1.01, 1.02, 1.1).noise == "1.00 is not within 1.01-1.10"
    assert suite.Control(0.7, 0.9, 0.99).noise == "1.00 is not within 0.70-0.99"
    assert suite.Control(0.8, 1.0, 1.3).noise == "p80/p20 is 1.62, above 1.5"
    assert suite.Control(0.9, 1.05, 1.2).noise is None
    assert suite.Control(math.nan, 1.0, 1.1).noise


def test_a_shared_machine_is_noisy(block, monkeypatch):
    quiet = block._replace(outcomes=[o._replace(controls={}) for o in block.outcomes])
    monkeypatch.setattr(suite.os, "cpu_count", lambda: 2)
    assert quiet._replace(load=2.2).noisy == []
    shared = quiet._replace(load=3.0)
    assert shared.noisy == list(suite.MEASURES)
    assert show.noise(shared) == [
        "too noisy to say: forward, forward+backward, dX (3.0 tasks wanted 2 cores); not to be quoted"
    ]


@pytest.mark.parametrize("measured", suite.MEASURES)
def test_noise_is_of_the_measure_that_shows_it(block, options, measured):
    controls = {
        **dict.fromkeys(suite.MEASURES, suite.Control(0.99, 1.0, 1.01)),
        measured: suite.Control(1.2, 1.3, 1.4),
    }
    outcomes = [
        o._replace(controls=controls) if o.provider == "ours" else o._replace(controls={})
        for o in block.outcomes
    ]
    shaken = block._replace(outcomes=outcomes, load=None)
    assert shaken.noisy == [measured]
    assert show.noise(shaken) == [
        f"too noisy to say: {measured} (ours over itself: 1.00 is not within 1.20-1.40); not to be quoted"
    ]
    rows = list(records.records(shaken, options))
    assert {r["measure"] for r in rows if r["noisy"]} == {measured}
    assert {r["measure"]: r["again"] for r in rows if r["provider"] == "ours"}[measured] == "1.3"


def test_each_provider_is_timed_twice_on_request(case, options):
    """In every measure, frozen adapters for dX included."""
    found = {name: ready(case, name) for name in ("dense-float32", "ours")}
    turns = list(suite._turns(found, True))
    assert turns == [("dense-float32", "all"), ("ours", "all"), ("ours", "dX"),
                     ("dense-float32 again", "all"), ("ours again", "all"), ("ours again", "dX")]  # fmt: skip
    assert list(suite._turns({"ours": found["ours"]}, False))[2:] == [
        ("ours again", "all"),
        ("ours again", "dX"),
    ]
    (block,) = suite.blocks([case], ["dense-float32", "ours"], options._replace(again=True))
    for outcome in block.timed:
        assert list(outcome.controls) == list(suite.MEASURES)
        assert all(0 < control.p20 <= control.p80 for control in outcome.controls.values())


def test_share_of_the_roofline():
    peak = peaks.Peak(1e12, 1e11, "probe")
    assert peak.percent(registry.Work(1e9, 1e6), 2.0) == pytest.approx(50)
    assert peak.percent(registry.Work(1e6, 1e8), 2.0) == pytest.approx(50)


# ---------------------------------------------------------------------------------------------------- plots


@pytest.fixture
def results(block, options, tmp_path):
    """A file with the block at three numbers of rows."""
    from peft_fast.bench.lora_linear import append

    path = tmp_path / "suite.csv"
    for M in (1, 16, 128):
        append(path, list(records.records(block._replace(case=block.case._replace(M=M)), options)))
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
    drawn: dict[int, float] = {}
    for line in axis.lines:  # in pieces, of which the noisy ones are faint
        if line.get_color() == lines["ours"].get_color():
            drawn.update(zip(*line.get_data(), strict=True))
    assert drawn == ours


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


def test_every_sample_of_dora_computes_its_norm(monkeypatch):
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
