"""Which strategy runs: what each can do, tables, and how a row is found in them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft_fast.triton_kernels import strategies
from peft_fast.triton_kernels.strategies import Case, Choice, Problem, Row, Table

from peft_fast import scratch

CPU = torch.device("cpu")
NF4 = Problem(4096, 4096, 4096, 16, torch.bfloat16, "nf4", True, False, False)
DENSE = NF4._replace(format="dense", nested=False)


def row(
    *choices, direction="forward", format="packed", dtype="half", dropout=False, out_scale=False, **sizes
):
    """A row at K = N = 4096 and R = 16 but for `sizes`, with choices (up to M, names…)."""
    found = tuple(Choice(math.inf if end is None else end, tuple(names)) for end, *names in choices)
    at = {"K": 4096, "N": 4096, "R": 16, **sizes}
    return Row(Case(direction, format, dtype, dropout, out_scale), **at, choices=found)


def table(*rows: Row) -> Table:
    return Table("NVIDIA Test", "measured", {"torch": "2"}, "2026-11-22", rows)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables in place of the installed one."""
    monkeypatch.setattr(strategies, "MEASURED", tmp_path)
    strategies.clear_cache()
    yield tmp_path
    strategies.clear_cache()


def write(folder: Path, *rows: Row, name: str = strategies.DEFAULT) -> None:
    (folder / name).write_text(strategies.text(table(*rows)))
    strategies.clear_cache()


# ------------------------------------------------------------------------------------------------- strategies


def test_what_each_strategy_cannot_run():
    refused = {
        (NF4, "splitk"): "128 rows, got 4096",
        (DENSE, "splitk"): "128 rows",
        (DENSE, "merge"): "dense",
        (NF4._replace(dropout=True), "merge"): "dropout",
        (NF4._replace(dropout=True), "splitk"): "128 rows",
        (DENSE._replace(out_scale=True), "library"): "out_scale",
        (DENSE._replace(out_scale=True), "merge"): "dense",
        (DENSE._replace(out_scale=True), "splitk"): "128 rows",
    }
    for problem in (NF4, DENSE, NF4._replace(dropout=True), DENSE._replace(out_scale=True)):
        for name in strategies.NAMES:
            reason = strategies.inadmissible(name, problem)
            expected = refused.get((problem, name))
            assert reason is None if expected is None else expected in reason
    assert strategies.inadmissible("splitk", NF4._replace(M=64)) is None
    assert strategies.inadmissible("merge", NF4._replace(format="fp4", nested=False)) is None
    with pytest.raises(ValueError, match=r"strategy: expected one of .* got 'fastest'"):
        strategies.inadmissible("fastest", NF4)


def test_merge_runs_unnamed_only_where_it_may(folder):
    write(folder, row((None, "merge", "library")))
    assert strategies.choose("forward", NF4, CPU) == "merge"
    for change in ({"format": "fp4"}, {"nested": False}):
        assert not strategies.may_run("merge", NF4._replace(**change))
        assert strategies.choose("forward", NF4._replace(**change), CPU) == "library"


def test_split_needs_room_for_the_whole_weight(folder):
    write(folder, row((None, "split")))
    limit = scratch.limit()
    assert strategies.choose("forward", NF4, CPU) == "split"
    scratch.set_limit(2**20)
    try:
        assert "limited to 1048576 bytes" in strategies.inadmissible("split", NF4)
        assert strategies.inadmissible("split", DENSE) is None
        assert strategies.choose("forward", NF4, CPU) == "merge"
    finally:
        scratch.set_limit(limit)
    assert strategies.choose("forward", NF4, CPU) == "split"


def test_candidates_leave_out_what_is_the_same():
    assert strategies.candidates(NF4._replace(M=64)) == strategies.NAMES
    assert strategies.candidates(DENSE) == ("fused", "library")
    assert strategies.candidates(DENSE._replace(out_scale=True, M=1)) == ("splitk", "fused")


# ----------------------------------------------------------------------------------------------------- choice


def test_the_nearest_row_of_the_class_is_taken(folder):
    write(
        folder,
        row((None, "fused")),
        row((None, "split"), N=14336),
        row((None, "library"), R=256),
        row((None, "split"), direction="backward"),
        row((None, "library"), dropout=True),
    )
    expected = {
        (4096, 4096, 16): "fused",
        (5792, 4096, 8): "fused",
        (11008, 4096, 16): "split",
        (14336, 2048, 16): "split",
        (4096, 4096, 128): "library",
        (28672, 8192, 16): "split",
        (4096, 4096, 0): "fused",
    }
    for (N, K, R), name in expected.items():
        assert strategies.choose("forward", NF4._replace(N=N, K=K, R=R), CPU) == name, (N, K, R)
    assert strategies.choose("backward", NF4, CPU) == "split"
    assert strategies.choose("forward", NF4._replace(dropout=True), CPU) == "library"
    assert strategies.choose("forward", NF4._replace(dtype=torch.float16), CPU) == "fused"


def test_rows_are_bounded_and_splitk_ends_where_it_must(folder):
    write(folder, row((16, "fused"), (512, "splitk"), (2048, "split"), (None, "library")))
    chosen = {
        M: strategies.choose("forward", NF4._replace(M=M), CPU) for M in (1, 16, 17, 128, 129, 512, 513)
    }
    assert chosen == {
        1: "fused", 16: "fused", 17: "splitk", 128: "splitk", 129: "merge", 512: "merge", 513: "split",
    }  # fmt: skip
    assert strategies.choose("forward", NF4._replace(M=10**6), CPU) == "library"


def test_fallbacks_where_a_row_names_nothing_that_may_run(folder):
    write(
        folder,
        row((None, "merge")),
        row((None, "merge"), dropout=True),
        row((None, "library"), format="dense", out_scale=True),
    )
    assert strategies.choose("forward", NF4._replace(format="fp4"), CPU) == "library"
    assert strategies.choose("forward", NF4._replace(dropout=True), CPU) == "library"
    assert strategies.choose("forward", DENSE._replace(out_scale=True), CPU) == "split"


def test_without_any_table_fallbacks_run(folder):
    assert strategies.choose("forward", NF4, CPU) == "merge"
    assert strategies.choose("backward", NF4._replace(dropout=True), CPU) == "library"
    assert strategies.choose("forward", DENSE._replace(out_scale=True, M=1), CPU) == "split"


def test_a_device_has_its_own_table_before_the_default(folder, monkeypatch):
    write(folder, row((None, "split")), row((None, "split"), dropout=True))
    write(folder, row((None, "fused")), name="nvidia-h100-80gb-hbm3.json")
    names = {0: "NVIDIA H100 80GB HBM3", 1: "Some other GPU"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.get)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(strategies.target, "arch", lambda device: "sm_90")
    first, second = (torch.device("cuda", i) for i in (0, 1))
    assert strategies.choose("forward", NF4, first) == "fused"
    assert strategies.choose("forward", NF4, torch.device("cuda")) == "fused"
    assert strategies.choose("forward", NF4, second) == "split"
    assert (
        strategies.choose("forward", NF4._replace(dropout=True), first) == "split"
    )  # no such row of its own
    assert strategies.choose("forward", NF4, CPU) == "split"


def test_what_is_predicted_nearby_goes_before_what_is_measured_far_away(folder, monkeypatch):
    write(folder, row((None, "split")), row((None, "library"), K=512, N=512, R=256))
    write(folder, row((None, "fused")), name="some-gpu.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(strategies.target, "arch", lambda device: "sm_90")
    device, small = torch.device("cuda", 0), NF4._replace(K=512, N=512, R=256)
    assert strategies.choose("forward", small, device) == "library"
    assert strategies.choose("forward", small._replace(K=4096, R=16), device) == "fused"


def test_small_architectures_leave_main_loops_to_the_library(folder, monkeypatch):
    write(folder, row((512, "fused"), (None, "split")))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(strategies.target, "arch", lambda device: "sm_75")
    t4 = torch.device("cuda", 0)
    assert strategies.choose("forward", NF4._replace(M=512), t4) == "merge"
    assert strategies.choose("forward", NF4._replace(dropout=True), t4) == "library"
    assert strategies.choose("forward", DENSE._replace(out_scale=True), t4) in strategies.MAIN_LOOPS


def test_a_choice_is_made_once_for_all_numbers_of_rows(folder, monkeypatch):
    write(folder, row((None, "split")))
    read = []
    load = strategies.load
    monkeypatch.setattr(strategies, "load", lambda path: read.append(path) or load(path))
    for M in range(1, 200):
        strategies.choose("forward", NF4._replace(M=M), CPU)
    assert read == [folder / strategies.DEFAULT]
    assert strategies._ranges.cache_info().misses == 1
    (folder / strategies.DEFAULT).write_text(strategies.text(table(row((None, "fused")))))
    assert strategies.choose("forward", NF4, CPU) == "split"
    strategies.clear_cache()
    assert strategies.choose("forward", NF4, CPU) == "fused"


# ------------------------------------------------------------------------------------------------------ files


def test_a_file_is_read_as_it_was_written(tmp_path):
    rows = (row((64, "splitk"), (None, "merge", "library")), row((None, "fused"), direction="backward", R=0))
    (tmp_path / "t.json").write_text(strategies.text(table(*rows)))
    assert strategies.load(tmp_path / "t.json") == table(*rows)


GOOD = json.loads(strategies.text(table(row((64, "splitk"), (None, "library")))))


def changed(**row_changes) -> dict:
    return {**GOOD, "rows": [{**GOOD["rows"][0], **row_changes}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"expected the keys \['device'"),
        ({**GOOD, "source": "guessed"}, "source: expected measured or predicted, got 'guessed'"),
        ({**GOOD, "date": 3}, "date: expected str or NoneType, got 3"),
        ({**GOOD, "rows": [{"K": 1}]}, r"rows\[0\]: expected the keys .* got \['K'\]"),
        (changed(direction="up"), "direction: expected forward or backward, got 'up'"),
        (changed(dropout=1), "dropout: expected bool, got 1"),
        (changed(K=True), "K: expected int, got True"),
        (changed(N=0), "N: expected at least 1, got 0"),
        (changed(R=-1), "R: expected at least 0, got -1"),
        (changed(choices=[]), r"choices: expected at least \[null, name\]"),
        (changed(choices=[[None]]), r"choices\[0\]: expected \[up_to_M, name, ...\], got \[None\]"),
        (changed(choices=[[64, "fused"]]), "up_to_M: expected null, being the last, got 64"),
        (changed(choices=[[None, "fused"], [None, "split"]]), "up_to_M: expected a number of rows, got None"),
        (changed(choices=[[8.0, "fused"], [None, "split"]]), "up_to_M: expected a number of rows, got 8.0"),
        (changed(choices=[[8, "fused"], [8, "split"], [None, "split"]]), "expected more than before.* got 8"),
        (changed(choices=[[None, "quick"]]), r"expected names of .* got \['quick'\]"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        strategies.load(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ValueError, match=r"t\.json: expected JSON, got"):
        strategies.load(tmp_path / "t.json")


def test_fastest_joins_neighbours_and_names_what_follows_merge():
    times = {
        1: {"splitk": 1.0, "fused": 2.0, "library": 9.0},
        64: {"splitk": 2.0, "fused": 3.0, "library": 9.0},
        128: {"fused": 4.0, "library": 9.0, "merge": 8.0},
        4096: {"fused": 99.0, "library": 30.0, "merge": 20.0},
    }
    assert strategies.fastest(times) == (
        Choice(64, ("splitk",)), Choice(128, ("fused",)), Choice(math.inf, ("merge", "library")),
    )  # fmt: skip
