"""bench/traffic.py and bench/roofline.py: against counts by hand, identities, and the default table."""

from __future__ import annotations

import csv
import importlib
import itertools

import pytest
import torch
from peft_fast.triton_kernels import strategies
from peft_fast.triton_kernels.strategies import Case, Problem

SQUARE = Problem(4096, 4096, 4096, 16, torch.bfloat16, "nf4", True, False, False)
WIDE = SQUARE._replace(N=14336)
ROWS = (512, 1024, 2048, 4096, 8192)


@pytest.fixture
def roofline():
    return importlib.import_module("peft_fast.bench.roofline")


@pytest.fixture
def traffic(roofline):
    return importlib.import_module("peft_fast.bench.traffic")


@pytest.fixture
def h200(traffic):
    return traffic.DEVICES["H200"]


def both(traffic, strategy, problem, device):
    return [
        launch
        for direction in ("forward", "backward")
        for launch in traffic.launches(strategy, direction, problem, device)
    ]


def over(traffic, launches, problem, device) -> float:
    """Percent over the frozen layer."""
    return 100 * (
        traffic.seconds(launches, device) / traffic.seconds(traffic.frozen(problem, device), device) - 1
    )


# --------------------------------------------------------------------------------------------- counts by hand


def test_the_frozen_layer_is_two_library_gemms(traffic, h200):
    launches = traffic.frozen(SQUARE, h200)
    assert [launch.bytes for launch in launches] == [3 * 2 * 4096**2] * 2
    assert [launch.flops for launch in launches] == [2 * 4096**3] * 2
    # 790 TFLOP/s and two starts.
    seconds = 4 * 4096**3 / 790e12 + 2 * traffic.LAUNCH
    assert traffic.seconds(launches, h200) == pytest.approx(seconds, rel=2e-3)
    memory, compute = traffic.frozen(SQUARE._replace(M=1), h200)[0].seconds(h200)
    assert memory > 20 * compute


def test_merge_without_a_rank_is_decode_and_gemm(traffic, h200):
    problem = SQUARE._replace(R=0)
    M, N, K = problem[:3]
    packed = N * K / 2 + N * K / 64 * (1 + 4 / 256)
    for direction in ("forward", "backward"):
        decode, gemm = traffic.launches("merge", direction, problem, h200)
        assert decode.bytes == packed + 2 * N * K
        assert decode.flops == 0
        assert gemm.bytes == 2 * (M * K + N * K + M * N)
        assert gemm.flops == 2 * M * N * K
    # 84 MB beside 275 GFLOP.
    added = over(traffic, both(traffic, "merge", problem, h200), problem, h200)
    starts = 100 * 2 * traffic.LAUNCH / traffic.seconds(traffic.frozen(problem, h200), h200)
    assert added - starts == pytest.approx(5.6, abs=0.1)


def test_the_added_traffic_of_split(traffic, h200):
    """X for Z, dY for dZ and dB, X for dA; twice the scratch written and the codes read. Else little."""
    for problem in (SQUARE, WIDE):
        M, N, K = problem[:3]
        launches = both(traffic, "split", problem, h200)
        added = sum(launch.bytes for launch in launches) - sum(t.bytes for t in traffic.frozen(problem, h200))
        by_hand = 2 * (2 * M * K + M * N) + 2 * (2 * N * K + N * K / 2)
        assert 0 < added / by_hand - 1 < 0.06


def test_the_added_traffic_of_peft_is_that_of_its_source(traffic, h200):
    """With fp32 adapters 25 times Y and 15 times X, an fp32 tensor being twice; and the dequantization."""
    for problem in (SQUARE, WIDE):
        M, N, K = problem[:3]
        passes = itertools.chain(*traffic.peft(problem, h200, torch.float32))
        dequantization = ("absmax", "offset", "weight")
        added = sum(launch.bytes for launch in passes if launch.name not in dequantization)
        added -= sum(launch.bytes for launch in traffic.frozen(problem, h200))
        assert added == pytest.approx(2 * (25 * M * N + 15 * M * K), rel=5e-3)


def test_the_added_traffic_of_unsloth(traffic, h200):
    """X to X·A, dA and A·X, dX read and written; Y read and written, dY to dY·B twice and to dB."""
    M, N, K = WIDE[:3]
    launches = list(itertools.chain(*traffic.unsloth(WIDE, h200)))
    added = sum(launch.bytes for launch in launches if launch.name not in ("absmax", "offset", "weight"))
    added -= sum(launch.bytes for launch in traffic.frozen(WIDE, h200))
    assert added == pytest.approx(2 * (5 * M * N + 5 * M * K), rel=0.01)


def test_dora_reads_y_and_dropout_its_mask(traffic, h200):
    def total(problem):
        return sum(launch.bytes for launch in both(traffic, "library", problem, h200))

    M, N, K = WIDE[:3]
    assert total(WIDE._replace(out_scale=True)) - total(WIDE) == 2 * M * N
    assert total(WIDE._replace(dropout=True)) - total(WIDE) == 2 * M * K / 8  # to Z; to dA and dX0


def test_what_fits_l2_costs_no_traffic(traffic, h200):
    small = SQUARE._replace(N=1024, K=1024)
    decode, gemm = traffic.launches("merge", "forward", small._replace(R=0), h200)
    assert decode.bytes < 1024**2
    assert gemm.bytes == 2 * 2 * 4096 * 1024
    # Programs of further ranks run beside those that read the same X.
    z = [traffic.launches("fused", "forward", SQUARE._replace(R=R), h200)[0].bytes for R in (32, 64)]
    assert z[1] - z[0] == 4 * 32 * (SQUARE.M + SQUARE.K)


# ------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("strategy", ["split", "library", "merge"])
def test_percentages_fall_with_the_number_of_rows(traffic, strategy):
    for device in traffic.DEVICES.values():
        for problem in (SQUARE, WIDE):
            found = [
                over(traffic, both(traffic, strategy, at, device), at, device)
                for at in (problem._replace(M=M) for M in ROWS)
            ]
            assert found == sorted(found, reverse=True)
            assert found[-1] > 0


def test_every_strategy_moves_and_computes_what_it_must(traffic):
    shapes = ((1, 4096, 4096), (64, 1024, 4096), (64, 4096, 1024), (4096, 14336, 4096))
    formats = (("nf4", True), ("fp4", False), ("dense", False))
    for (M, N, K), (format, nested), dtype, dropout, out_scale, device in itertools.product(
        shapes,
        formats,
        (torch.bfloat16, torch.float32),
        (False, True),
        (False, True),
        traffic.DEVICES.values(),
    ):
        problem = Problem(M, N, K, 16, dtype, format, nested, dropout, out_scale)
        weight = N * K / 2 if format != "dense" else N * K * dtype.itemsize
        for name, direction in itertools.product(strategies.candidates(problem), ("forward", "backward")):
            launches = traffic.launches(name, direction, problem, device)
            assert sum(launch.bytes for launch in launches) >= weight + (M * K + M * N) * dtype.itemsize
            assert sum(launch.flops for launch in launches) >= 2 * M * N * K


def test_decoding_in_the_main_loop_pays_below_500_rows_on_hopper(traffic, h200):
    def gain(M):
        at = SQUARE._replace(M=M)
        times = [traffic.seconds(both(traffic, name, at, h200), h200) for name in ("split", "fused")]
        return times[0] - times[1]

    assert gain(256) > 0
    assert gain(768) < 0


def test_few_programs_leave_a_device_idle(traffic, h200):
    launch = traffic.Launch("some", 1e6, (traffic.Product(1e9, "half", 1.0),), programs=33)
    whole = launch._replace(programs=132)
    assert launch.seconds(h200) == tuple(4 * t for t in whole.seconds(h200))
    assert whole.seconds(h200) == whole._replace(programs=10**6).seconds(h200)


def test_a_union_costs_one_start_less(traffic, h200):
    first, second = traffic.launches("split", "forward", SQUARE, h200)
    union = first.union(second)
    assert union.bytes == first.bytes + second.bytes
    assert union.flops == first.flops + second.flops
    assert union.seconds(h200) == pytest.approx(
        tuple(a + b for a, b in zip(first.seconds(h200), second.seconds(h200), strict=True))
    )


def test_the_budget(roofline):
    assert roofline.budget() == {
        (name, direction): launches
        for name in strategies.NAMES
        for direction, launches in (("forward", 2), ("backward", 3 if name == "splitk" else 4))
    }


# --------------------------------------------------------------------------------------------- default table


def test_the_default_table_is_what_the_model_gives(roofline):
    written = (strategies.MEASURED / strategies.DEFAULT).read_text()
    assert written == strategies.text(roofline.default_table()), "run bench/roofline.py --write-default"


def test_the_default_table_has_every_class(roofline):
    table = strategies.load(strategies.MEASURED / strategies.DEFAULT)
    assert table.source == "predicted"
    classes = itertools.product(
        ("forward", "backward"), ("packed", "dense"), ("half", "fp32"), (False, True), (False, True)
    )
    assert {row.case for row in table.rows} == {Case(*case) for case in classes}


def test_the_default_table_gives_the_predicted_best(roofline, monkeypatch):
    """At the shapes that it was made for, also where the row is another's."""
    device = roofline.DEVICES[roofline.DEFAULT_DEVICE]
    for (K, N), R, M, dropout in itertools.product(
        roofline.DEFAULT_SHAPES, roofline.DEFAULT_RANKS, roofline.DEFAULT_ROWS, (False, True)
    ):
        problem = Problem(M, N, K, R, torch.bfloat16, "nf4", True, dropout, False)
        seconds = roofline.predict(problem, device).seconds
        for direction in ("forward", "backward"):
            chosen = strategies.choose(direction, problem, torch.device("cpu"))
            assert seconds[direction][chosen] == min(seconds[direction].values()), (direction, problem)


# -------------------------------------------------------------------------------------------------- commands


def test_the_table_is_written_with_measured_ratios_beside(roofline, tmp_path, capsys):
    measured, out = tmp_path / "measured.csv", tmp_path / "predicted.csv"
    columns = ("device", "dtype", "provider", "method", "backend", "K", "N", "R", "M", "ratio")
    rows = [
        ("NVIDIA H200", "bfloat16", "ours", "lora", "triton", 4096, 4096, 16, 512, 1.25),
        ("NVIDIA H200", "bfloat16", "ours", "lora", "triton-merge", 4096, 4096, 16, 512, 1.5),
        ("NVIDIA H200", "bfloat16", "ours", "dora", "triton", 4096, 4096, 16, 512, 9),
        ("NVIDIA H200", "bfloat16", "peft", "lora", "", 4096, 4096, 16, 512, 9),
        ("NVIDIA H100", "bfloat16", "ours", "lora", "triton", 4096, 4096, 16, 512, 9),
        ("NVIDIA-H200-141GB", "bfloat16", "ours", "lora", "triton-split", 4096, 4096, 16, 512, 1.75),
        ("NVIDIA GH200 480GB", "bfloat16", "ours", "lora", "triton-fused", 4096, 4096, 16, 512, 9),
        ("NVIDIA A10G", "bfloat16", "ours", "lora", "triton-library", 4096, 4096, 16, 512, 9),
        ("NVIDIA H200", "float32", "ours", "lora", "triton", 4096, 4096, 16, 512, 9),
    ]
    with measured.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    shape = ["--shape", "4096", "4096", "--rank", "16", "--rows", "512", "8192"]
    roofline.main([*shape, "--csv", str(out), "--measured", str(measured), "--device", "NVIDIA H200"])
    with out.open(newline="") as file:
        few, many = csv.DictReader(file)
    assert few["measured"] == "triton:25.0 triton-merge:50.0 triton-split:75.0"
    assert many["measured"] == ""
    assert float(many["best"]) < float(few["best"])
    assert (few["splitk"], few["device"]) == ("", "H200")
    assert min(float(many[name]) for name in ("fused", "split", "library", "merge")) == float(many["best"])
    printed = capsys.readouterr().out
    assert "PREDICTED, H200, LoRA over nf4" in printed
    assert "Rates are parts of the public peaks" in printed


def test_dora_has_no_peers_in_the_model(roofline, capsys):
    args = roofline.parse(["--dora", "--shape", "4096", "4096", "--rank", "16", "--rows", "4096"])
    (line,) = roofline.lines(args)
    assert (line["peft_fp32"], line["peft_half"], line["unsloth"]) == ("", "", "")
    (plain,) = roofline.lines(roofline.parse(["--shape", "4096", "4096", "--rank", "16", "--rows", "4096"]))
    order = [float(plain[name]) for name in ("peft_fp32", "peft_half", "unsloth", "best")]
    assert order == sorted(order, reverse=True)
    assert float(line["best"]) > order[-1] > 0


def test_budget_and_default_commands(roofline, tmp_path, monkeypatch, capsys):
    roofline.main(["--budget"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["splitk", "2", "3"]
    monkeypatch.setattr(strategies, "MEASURED", tmp_path)
    roofline.main(["--write-default"])
    assert strategies.load(tmp_path / strategies.DEFAULT) == roofline.default_table()


def test_devices_are_found_by_their_names(roofline, capsys):
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA L4": "L4",
        "NVIDIA L40S": "L40S",
        "Tesla T4": "T4",
        "AMD Instinct MI300X": "MI300X",
    }
    assert {name: roofline.device_named(name) for name in names} == names
    with pytest.raises(SystemExit):
        roofline.parse(["--device", "GTX 1080"])
    assert "--device: expected a name with one of" in capsys.readouterr().err
    assert roofline.parse(["--device", "NVIDIA A10G", "--or-default"]).device == roofline.DEFAULT_DEVICE
    assert "NVIDIA A10G: its peaks are not known here; predicted for H100" in capsys.readouterr().out
    assert roofline.parse(["--device", "NVIDIA L4", "--or-default"]).device == "L4"
