"""A job does not go on from a checkpoint of which a file was spoiled: a typed error names that file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from corruptions import ANY_FILE, JSON_FILE, edited, flipped, options, without
from train_jobs import adapter, run, save_bert, save_rows, tiny

from peft_fast.config import TrainConfig
from peft_fast.trainer import COMPLETE, last_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = "checkpoint-4"
SPOILED_FILE = {
    **ANY_FILE,
    **{f"flipped at {at}": flipped(at) for at in (0, 70, -1, -400)},
    "bytes behind the end": edited(lambda content: content.extend(b"\0")),
}
FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin",
)  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainConfig:
    """Two checkpoints, of which the second is the last."""
    root = tmp_path_factory.mktemp("job")
    bert, rows = save_bert(root / "bert"), save_rows(root / "rows.csv")
    job = tiny(bert, rows, root / "run", steps=4, save_every=2, eval_every=4)
    run(job)
    return job


@pytest.fixture
def checkpoints(job, tmp_path) -> Path:
    return Path(shutil.copytree(job.folder / "checkpoints", tmp_path / "checkpoints"))


def test_every_file_of_a_checkpoint_is_summed(checkpoints):
    assert last_checkpoint(checkpoints) == checkpoints / LAST
    sealed = json.loads((checkpoints / LAST / COMPLETE).read_text())
    present = {file.name for file in (checkpoints / LAST).iterdir()}
    assert present == {COMPLETE, *sealed["sha256"]}
    assert present >= set(FILES)
    assert sealed["step"] == 4
    found = hashlib.sha256((checkpoints / LAST / "optimizer.pt").read_bytes()).hexdigest()
    assert sealed["sha256"]["optimizer.pt"] == found


@pytest.mark.parametrize("name", FILES)
def test_spoiled_files(checkpoints, name):
    file = checkpoints / LAST / name
    content = file.read_bytes()
    for spoiled, spoil in SPOILED_FILE.items():
        spoil(file)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            last_checkpoint(checkpoints)
        assert str(file) in str(caught.value), spoiled
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(content)
    assert last_checkpoint(checkpoints) == checkpoints / LAST


def of_the_step_before(file: Path) -> None:
    shutil.copy(file.parent.parent / "checkpoint-2" / COMPLETE, file)


def sums(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def spoil(file: Path) -> None:
        sealed = json.loads(file.read_text())
        change(sealed["sha256"])
        file.write_text(json.dumps(sealed))

    return spoil


MARK = {
    **{
        what: spoil
        for what, spoil in JSON_FILE.items()
        if what not in ("missing", "a link to nowhere", "a folder")
    },
    "without sums": without("sha256"),
    "no sums": sums(dict.clear),
    "sums in a list": options(sha256=["optimizer.pt"]),
    "without a step": without("step"),
    "another step": options(step=2),
    "a step in words": options(step="4"),
    "of the step before": of_the_step_before,
    "of a file elsewhere": sums(lambda found: found.update({"../../../rows.csv": "0" * 64})),
    "of a path from the root": sums(lambda found: found.update({"/etc/hostname": "0" * 64})),
    "of a file that is not there": sums(lambda found: found.update({"more.pt": "0" * 64})),
    "sums that are numbers": sums(lambda found: found.update({"optimizer.pt": 7})),
}


@pytest.mark.parametrize("spoiled", MARK)
def test_spoiled_marks(checkpoints, spoiled):
    MARK[spoiled](checkpoints / LAST / COMPLETE)
    with pytest.raises((ValueError, FileNotFoundError), match=LAST):
        last_checkpoint(checkpoints)


def test_folders_of_other_steps(checkpoints):
    (checkpoints / LAST).rename(checkpoints / "checkpoint-9")
    with pytest.raises(ValueError, match="step: expected 9"):
        last_checkpoint(checkpoints)
    (checkpoints / "checkpoint-9").rename(checkpoints / "checkpoint-last")
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    (checkpoints / "checkpoint-2" / COMPLETE).unlink()
    assert last_checkpoint(checkpoints) is None


def test_a_job_does_not_go_on_from_it(job):
    """And leaves all files as they are; without that checkpoint it goes on from the one before."""
    written, resumed = adapter(job.folder), TrainConfig(**{**job.as_dict(), "resume": True})
    (job.folder / "metrics.json").unlink()
    flipped(-400)(job.folder / "checkpoints" / LAST / "optimizer.pt")
    before = {file: file.read_bytes() for file in job.folder.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"optimizer\.pt: expected the SHA-256"):
        run(resumed)
    assert {file: file.read_bytes() for file in job.folder.rglob("*") if file.is_file()} == before
    shutil.rmtree(job.folder / "checkpoints" / LAST)
    run(resumed)
    assert all((tensor == written[name]).all() for name, tensor in adapter(job.folder).items())
