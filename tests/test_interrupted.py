"""Training jobs killed at any moment: `peft-fast train --resume` ends with the same bits."""

import os
import signal

import pytest
import yaml
from endurance.kills import METHODS, Fork, Ticks, jobs, result
from train_jobs import save_bert, save_rows, tiny

from peft_fast import config

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its jobs"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def check(folder, methods, kills, seed):
    """At random: between file operations and steps, halfway through a write, after some time."""
    rows = list(jobs(folder, methods, kills, seed))
    assert sum(len(row["kills"]) for row in rows) == kills
    assert not [row for row in rows if row["differ"]]
    return rows


def test_killed_jobs_end_in_the_same_bits(tmp_path):
    check(tmp_path, ("dora",), 3, seed=0)


@pytest.mark.endurance
@pytest.mark.timeout(3600)
def test_fifty_kills(tmp_path):
    rows = check(tmp_path, METHODS, 50, seed=1)
    assert {row["method"] for row in rows} == set(METHODS)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json"])
def test_a_kill_leaves_no_empty_file(tmp_path, name):
    """An empty config.yaml would resume as another job, an empty metrics.json end an unfinished one."""
    options = tiny(save_bert(tmp_path / "bert"), save_rows(tmp_path / "rows.csv"), tmp_path / "run", steps=2)
    config.save(options, tmp_path / "job.yaml")
    fork = Fork(tmp_path / "job.yaml", tmp_path / "run", resume=False, ticks=Ticks(tmp_path / "run", name))
    assert fork.wait() == -signal.SIGKILL, fork.log.read_text()
    assert not (tmp_path / "run" / name).exists()
    assert list((tmp_path / "run").glob(f"{name}*")), "it was killed before the file was opened"
    if name == "metrics.json":
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 2
        fork = Fork(tmp_path / "job.yaml", tmp_path / "run", resume=True, ticks=Ticks(tmp_path / "run"))
        assert fork.wait() == 0, fork.log.read_text()
        assert result(tmp_path / "run")["steps"] == 2
