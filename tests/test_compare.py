"""`peft-fast compare`: one table of several methods, from runs that are each a process of their own."""

import csv
import json
import subprocess

import pytest
from rich.console import Console
from train_jobs import run, save_bert, save_rows

from peft_fast import compare as comparing
from peft_fast import tasks
from peft_fast.compare import compare, finished, jobs

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    sizes = {"steps": 2, "batch_size": 8, "lr": 1e-2}
    model, data = save_bert(folder / "bert"), save_rows(folder / "rows.csv")
    return {"task": "classification", "model": str(model), "data": str(data), **sizes}


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs jobs here, and notes them."""
    ran = []
    monkeypatch.setattr(comparing, "_run", lambda job: ran.append(job) or run(job))
    return ran


def test_a_run_is_a_process_of_its_own_and_is_kept(options, tmp_path, monkeypatch):
    todo = jobs(["bitfit"], [3], tmp_path, options)
    (row,) = compare(todo, tmp_path, QUIET)
    assert (row.method, row.seeds, row.steps, row.accuracy_spread) == ("bitfit", 1, 2, None)
    metrics = finished(todo[0])
    assert (row.accuracy, row.peak_memory) == (metrics["accuracy"], metrics["peak_memory"])
    assert 100 * 2**20 < row.peak_memory < 2**34
    monkeypatch.setattr(comparing.subprocess, "run", lambda *_, **__: pytest.fail("it had finished"))
    assert compare(todo, tmp_path, QUIET) == [row]


def test_the_table_has_means_and_spreads_and_goes_on_where_it_stopped(options, tmp_path, in_this_process):
    todo = jobs(["ssf", "prompt"], [0, 1], tmp_path, {**options, "virtual_tokens": 3})
    compare(todo[:1], tmp_path, QUIET)
    rows = compare(todo, tmp_path, QUIET)
    assert [(job.method, job.seed) for job in in_this_process] == [
        ("ssf", 0), ("ssf", 1), ("prompt", 0), ("prompt", 1),
    ]  # fmt: skip
    runs = [finished(job) for job in todo]
    assert all(len(metrics["evaluations"]) == 1 for metrics in runs)
    first, second = (metrics["accuracy"] for metrics in runs[:2])
    assert rows[0].accuracy == pytest.approx((first + second) / 2)
    assert rows[0].accuracy_spread == pytest.approx(abs(first - second) / 2**0.5)
    assert [row.trained_parameters for row in rows] == [2 * 960 + 130, 3 * 64 + 130]
    with (tmp_path / "compare.csv").open(newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [row["method"] for row in written] == ["ssf", "prompt"]
    assert float(written[1]["accuracy"]) == rows[1].accuracy
    table = (tmp_path / "compare.md").read_text().splitlines()
    assert table[0].startswith("| method | trained parameters | accuracy |")
    assert table[2].startswith(f"| ssf | 2,050 | {rows[0].accuracy:.3f} ± {rows[0].accuracy_spread:.3f} | ")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")

    compare(jobs(["ssf"], [0], tmp_path, {**options, "steps": 1}), tmp_path, QUIET)
    assert in_this_process[-1].steps == 1  # another job is not the one that had finished


def test_data_that_changed_is_refused_and_what_is_there_is_kept(options, tmp_path, monkeypatch):
    files = {name: save_rows(tmp_path / f"{name}.csv") for name in ("data", "eval_data")}
    text = files["data"].read_text()
    todo = jobs(["bitfit", "ssf"], [0], tmp_path, {**options, **{k: str(v) for k, v in files.items()}})
    ran = {"config": todo[1].as_dict(), "data_sha256": tasks.digests(todo[1])}
    todo[1].folder.mkdir()
    (todo[1].folder / "metrics.json").write_text(json.dumps(ran))
    monkeypatch.setattr(comparing, "_run", lambda job: pytest.fail("before all were checked"))
    for name, file in files.items():
        file.write_text(text + "w1 w2,yes\n")
        with pytest.raises(ValueError, match=f"^{name}: expected '{file}' with the text .*ssf-seed0.* chang"):
            compare(todo, tmp_path, QUIET)
        file.write_text(text)
    assert finished(todo[1]) == ran


def test_data_that_changes_between_two_runs_makes_no_table(options, tmp_path, monkeypatch):
    data = save_rows(tmp_path / "rows.csv")
    todo = jobs(["ssf", "bitfit"], [0], tmp_path, {**options, "data": str(data)})

    def run_and_write(job):
        read = tasks.digests(job)
        data.write_text(data.read_text() + "w1 w2,yes\n")
        return {"data_sha256": read}

    monkeypatch.setattr(comparing, "_run", run_and_write)
    with pytest.raises(ValueError, match=r"^data: expected that of the first run.* got .* in .*bitfit-seed0"):
        compare(todo, tmp_path, QUIET)
    assert not (tmp_path / "compare.csv").exists()


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"config": {"method"'])
def test_a_run_whose_metrics_are_damaged_is_not_finished(options, tmp_path, damage):
    (job,) = jobs(["ssf"], [0], tmp_path, options)
    job.folder.mkdir()
    (job.folder / "metrics.json").write_text(damage)
    assert finished(job) is None


def test_an_option_goes_to_the_methods_that_have_its_value(options, tmp_path):
    lora, loreft = jobs(["lora", "loreft"], [0], tmp_path, {**options, "init": "pissa"})
    assert (lora.init, loreft.init) == ("pissa", "pyreft")
    with pytest.raises(ValueError, match="init: expected a value that one of"):
        jobs(["lora", "loreft"], [0], tmp_path, {**options, "init": "nonsense"})


def test_a_run_that_fails_is_named_and_the_others_are_kept(options, tmp_path, monkeypatch):
    (job,) = jobs(["ssf"], [0], tmp_path, options)
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr="a warning\npeft-fast: model: expected\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ChildProcessError, match=r"exit code 2: peft-fast: model: expected$"):
        compare([job], tmp_path, QUIET)
    assert not (tmp_path / "compare.csv").exists()
