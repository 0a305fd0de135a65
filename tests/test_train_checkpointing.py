"""`peft-fast train --checkpointing`: blocks run again in the backward pass, and nothing else changes."""

import json
import sys

import pytest
from torch.utils import checkpoint
from train_jobs import run, save_bert, save_rows, tiny
from transformers.models.bert.modeling_bert import BertOutput

from peft_fast import cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data") / "rows.csv")


@pytest.mark.parametrize(("method", "quant"), [("lora", "nf4"), ("dora", "none"), ("loreft", "nf4")])
def test_losses_are_the_same_and_blocks_run_twice(tmp_path, bert, csv_file, monkeypatch, method, quant):
    """With dropout, whose masks have to be drawn again."""
    losses, blocks = [], []
    for checkpointing in (False, True):
        calls = []
        with monkeypatch.context() as patch:
            forward = BertOutput.forward
            patch.setattr(
                BertOutput, "forward", lambda *a, f=forward, c=calls, **k: c.append(1) or f(*a, **k)
            )
            output = tmp_path / str(checkpointing)
            every = {"steps": 3, "eval_every": 3, "dropout": 0.2, "checkpointing": checkpointing}
            metrics = run(tiny(bert, csv_file, output, method=method, quant=quant, **every))
        losses.append([*metrics["loss"], metrics["eval_loss"]])
        blocks.append(len(calls))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 4
    layers, steps = 2, 3
    assert blocks[1] - blocks[0] == layers * steps


def test_blocks_are_checkpointed_without_reentering(tmp_path, bert, csv_file, monkeypatch):
    """The reentrant kind would need inputs that take a gradient, which a frozen model has not."""
    entered = []
    function = checkpoint.CheckpointFunction
    monkeypatch.setattr(function, "apply", lambda *args: entered.append(args) or pytest.fail("reentrant"))
    metrics = run(tiny(bert, csv_file, tmp_path / "run", steps=1, checkpointing=True))
    assert metrics["config"]["checkpointing"]
    assert not entered


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["peft-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0


def test_the_command_trains_with_it_when_asked(bert, csv_file, monkeypatch):
    jobs = []
    monkeypatch.setattr("peft_fast.train.train", jobs.append)
    for options in ([], ["--checkpointing"]):
        call(monkeypatch, "train", "--task", "classification", "--model", bert, "--data", csv_file, *options)
    assert [job.checkpointing for job in jobs] == [False, True]


def test_the_command_estimates_with_it_when_asked(bert, monkeypatch, capsys):
    """A block keeps its input instead of what it computes."""
    saved = []
    for options in ([], ["--checkpointing"]):
        call(monkeypatch, "estimate", "--model", bert, "--batch", 8, "--seq", 32, "--json", *options)
        saved.append(json.loads(capsys.readouterr().out)["saved_by_forward"])
    assert 0 < saved[1] < saved[0] / 2
