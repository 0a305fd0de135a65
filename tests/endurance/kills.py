"""Kills training jobs at random, resumes them with the command line, and compares what they write in the end.

    PYTHONPATH=tests python -m endurance.kills FOLDER --kills 50

Each job is a fork of this process, which has imported everything. A fork dies

    tick    at a random one of the points between its file operations and its steps,
    write   halfway through a file: from a random tick on, no file may grow beyond a random size,
    time    after a random time, wherever that is.

Up to four of these follow each other before the job may end. One line of JSON is printed for each job.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import io
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from train_jobs import save_bert, save_rows, tiny

from peft_fast import cli, config, train

METHODS = ("lora", "dora", "loreft")
KINDS = ("tick", "write", "time")
MOST_KILLS = 4
"""Of one job."""
FILE_EVENTS = frozenset(
    ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree")
)
DEADLINE = 240.0
"""Seconds after which a job that neither ends nor dies is a failure."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(n_bytes: int) -> None:
    """The next write that makes a file longer than that ends the process, and leaves so much of it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


class Ticks:
    """Counts the points at which a job can be interrupted: file operations below `folder`, and steps.

    Runs `action` at tick `at`: a number, or a part of the name of a file that was just opened, still empty.
    """

    def __init__(self, folder: Path, at: int | str | None = None, action: Callable[[], None] = die) -> None:
        self.folder, self.at, self.action = str(folder), at, action
        self.count = 0

    def tick(self, opened: str = "") -> None:
        self.count += 1
        if self.count == self.at or (isinstance(self.at, str) and self.at in opened):
            self.action()

    def install(self) -> None:
        sys.addaudithook(self._audit)
        builtins.open, io.open = self._counted(builtins.open), self._counted(io.open)  # type: ignore[assignment]
        report = train.ProgressReport
        on_step_end = report.on_step_end

        def step_ends(*args: Any, **kwargs: Any) -> None:
            on_step_end(*args, **kwargs)
            self.tick()

        report.on_step_end = step_ends  # type: ignore[method-assign]

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and args and self._below(args[0]):
            self.tick()

    def _below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Audit events come before what they tell of."""

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            opened = function(path, *args, **kwargs)
            if self._below(path):
                self.tick(opened=Path(path).name)
            return opened

        return call


class Fork:
    """`peft-fast train` in a fork, with what it printed in a file beside its folder."""

    def __init__(self, job: Path, folder: Path, *, resume: bool, ticks: Ticks) -> None:
        self.log = folder.with_suffix(".log")
        self.ticks_file = folder.with_suffix(".ticks")
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._run(job, folder, resume, ticks)
        self.pid, self.started = pid, started

    def _run(self, job: Path, folder: Path, resume: bool, ticks: Ticks) -> None:
        status = 1
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            torch.set_num_threads(1)  # after a fork PyTorch hangs with more
            where = ["--output", str(folder)]
            sys.argv = ["peft-fast", "train", *(["--resume"] if resume else ["--config", str(job)]), *where]
            ticks.install()
            with contextlib.suppress(SystemExit):
                cli.main()
                raise AssertionError("typer ends by SystemExit")
            status = 0 if (folder / "metrics.json").is_file() else 2
            self.ticks_file.write_text(str(ticks.count))
        finally:
            os._exit(status)

    def wait(self, kill_after: float | None = None) -> int:
        """The exit code, or minus the signal; a job is killed after some seconds, in which it may end."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            passed = time.monotonic() - self.started
            if kill_after is not None and passed > kill_after:
                os.kill(self.pid, signal.SIGKILL)
                kill_after = None
            if passed > DEADLINE:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"no end within {DEADLINE} s: {self.log.read_text()}")
            time.sleep(0.005)


def finished(job: Path, folder: Path, *, resume: bool = False) -> int:
    """Runs a job to its end; returns how many ticks it took."""
    fork = Fork(job, folder, resume=resume, ticks=Ticks(folder))
    code = fork.wait()
    if code:
        raise AssertionError(f"exit code {code}: {fork.log.read_text()}")
    return int(fork.ticks_file.read_text())


def result(folder: Path) -> dict[str, Any]:
    """What a run found, in comparable form; the tensors by their bytes."""
    metrics = json.loads((folder / "metrics.json").read_text())
    files = sorted((folder / "adapter").glob("*.safetensors"))
    tensors = {(f.name, name): t for f in files for name, t in load_file(f).items()}
    return {
        **{name: metrics[name] for name in ("loss", "evaluations", "steps", "trainable_parameters")},
        "step_seconds": len(metrics["step_seconds"]),
        "adapter": {key: bytes(t.contiguous().view(torch.uint8).flatten()) for key, t in tensors.items()},
        # Files are written aside, and a kill leaves what was: hidden by safetensors, as .part by us.
        "files": sorted(p.name for p in (folder / "adapter").glob("[!.]*") if p.suffix != ".part"),
        "checkpoints": sorted(p.name for p in (folder / "checkpoints").iterdir()),
    }


def interrupted(
    job: Path, folder: Path, kinds: Iterator[str], kills: int, rng: random.Random, ticks: int, seconds: float
) -> list[str]:
    """Runs a job that is killed up to `kills` times; returns how it was."""
    happened = []
    for _ in range(kills):
        kind, at, size = next(kinds), rng.randrange(1, ticks + 1), rng.randrange(1, 40_000)
        action = {"tick": die, "write": lambda size=size: limit_files(size)}.get(kind, lambda: None)
        resume = (folder / "config.yaml").is_file()
        fork = Fork(job, folder, resume=resume, ticks=Ticks(folder, at, action))
        code = fork.wait(rng.uniform(0, seconds) if kind == "time" else None)
        if code == 0:
            break
        if code not in (-signal.SIGKILL, -signal.SIGXFSZ):
            raise AssertionError(f"{happened}, then {kind} {at}: exit code {code}: {fork.log.read_text()}")
        happened.append(f"{kind} {at}" if kind != "time" else kind)
    finished(job, folder, resume=(folder / "config.yaml").is_file())
    return happened


def jobs(folder: Path, methods: tuple[str, ...], kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Interrupts jobs, one method after the other, until `kills` in all."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    bert, rows = save_bert(folder / "bert"), save_rows(folder / "rows.csv")
    whole: dict[str, tuple[Path, dict[str, Any], int, float]] = {}
    kinds = itertools.cycle(KINDS)
    done = 0
    for number, method in enumerate(itertools.cycle(methods)):
        if done >= kills:
            return
        if method not in whole:
            job = folder / f"{method}.yaml"
            config.save(tiny(bert, rows, folder / method, method=method, steps=7, save_every=2), job)
            started = time.monotonic()
            ticks = finished(job, folder / method)
            whole[method] = (job, result(folder / method), ticks, time.monotonic() - started)
        job, expected, ticks, seconds = whole[method]
        place = folder / f"{method}-{number}"
        count = min(rng.randrange(1, MOST_KILLS + 1), kills - done)
        happened = interrupted(job, place, kinds, count, rng, ticks, seconds)
        done += len(happened)
        got = result(place)
        differ = [name for name in expected if got[name] != expected[name]]
        yield {"method": method, "kills": happened, "differ": differ, "ticks": ticks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the jobs; a new one")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    given = parser.parse_args()
    for row in jobs(given.folder, tuple(given.methods), given.kills, given.seed):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
