"""The parts of a training job that run in its loop: batches, the trainer, and the progress report."""

from __future__ import annotations

import json
import statistics
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalPrediction

from . import base_models, tasks
from .reft import ReftModel

COMPLETE = "complete"
"""A file that a checkpoint gets last: without it the job was killed while writing."""


def length(features: tasks.Features) -> int:
    """The number of tokens of an example."""
    ids = features["input_ids"]
    assert isinstance(ids, list)
    return len(ids)


class LengthGroupedSampler(Sampler[int]):
    """Shuffled batches of texts of about the same length, in an order that follows from (seed, epoch) alone.

    Every `POOL` batches of a random permutation are sorted by length and cut; the batches are then shuffled.
    A batch smaller than the others comes last.
    """

    POOL = 50

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.POOL * self.batch_size
        for i in range(0, len(order), pool):
            order[i : i + pool] = sorted(order[i : i + pool], key=self.lengths.__getitem__)
        full = len(order) // self.batch_size
        for i in torch.randperm(full, generator=generator).tolist():
            yield from order[i * self.batch_size : (i + 1) * self.batch_size]
        yield from order[full * self.batch_size :]


class AdapterTrainer(Trainer):
    """A `Trainer` with batches of one length, whose checkpoints hold a model's edits and head, too.

    transformers knows adapters of PEFT alone; those it saves and loads by itself.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = [length(features) for features in typing.cast(list[tasks.Features], self.train_dataset)]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.model, ReftModel) and self.args.should_save:
            directory = self.args.output_dir if output_dir is None else output_dir
            assert directory is not None
            base_models.save_head(self.model, Path(directory))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if isinstance(model, ReftModel):
            model.load_edits(resume_from_checkpoint)
            base_models.load_head(model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of examples whose largest logit is their label's."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


class ProgressReport(TrainerCallback, ExportableState):
    """The progress bar, the time of every step, and the mark of a complete checkpoint.

    The times are part of the checkpoints, so those of a resumed run cover all of its steps.
    """

    def __init__(self, steps: int, console: Console, checkpoint: Path | None) -> None:
        self.step_seconds: list[float] = []
        if checkpoint is not None:
            saved = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            self.step_seconds += saved["stateful_callbacks"][type(self).__name__]["attributes"]["seconds"]
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[ms]} ms/step"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=steps, loss="-", ms="-")

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.step_seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.step_seconds.append(time.perf_counter() - self._started)
        if state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            ms = f"{1000 * statistics.median(self.step_seconds[-50:]):.0f}"
            self._bar.update(self._task, completed=state.global_step, loss=f"{logs['loss']:.4f}", ms=ms)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs["metrics"]
        accuracy = f"  accuracy {metrics['eval_accuracy']:.3f}" if "eval_accuracy" in metrics else ""
        self._bar.console.print(
            f"step {state.global_step:5d}  evaluation loss {metrics['eval_loss']:.4f}{accuracy}"
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.distributed_state.wait_for_everyone()  # each process writes its random state
        if args.should_save:
            Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE).touch()

    def stop(self) -> None:
        self._bar.stop()
