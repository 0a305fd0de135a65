"""The parts of a training job that run in its loop: batches, the trainer, and the progress report."""

from __future__ import annotations

import json
import math
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
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import EvalPrediction, TrainOutput

from . import tasks
from .files import check_seal, seal
from .trainer_checkpoints import TrainerCheckpoints

COMPLETE = "complete"
"""A file that a checkpoint gets last, with the sums of the others: without it the job was killed before."""


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in a folder; None where there is none.

    Raises:
        FileNotFoundError, ValueError: a file of it is missing, or is not as it was written.
    """
    steps = {path.parent.name.rpartition("-")[2]: path for path in folder.glob(f"checkpoint-*/{COMPLETE}")}
    numbers = [step for step in steps if step.isdecimal()]
    if not numbers:
        return None
    last = max(numbers, key=int)
    written = check_seal(steps[last]).get("step")
    if written != int(last):
        raise ValueError(
            f"{steps[last]}: step: expected {last}, as in the name of the folder, got {written!r}"
        )
    return steps[last].parent


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


class AdapterTrainer(TrainerCheckpoints, Trainer):
    """A `Trainer` with batches of one length, whose checkpoints hold all that is trained, bit for bit.

    Args:
        lora_plus_ratio: the learning rate of lora_B over that of lora_A, as in LoRA+ (arXiv 2402.12354).
    """

    def __init__(self, *args: Any, lora_plus_ratio: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_plus_ratio = lora_plus_ratio

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As `Trainer.train`, which takes one step more where the checkpoint is that of the last step."""
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, "trainer_state.json")))
            if state.global_step >= self.args.max_steps > 0:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, math.nan, {})
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.lora_plus_ratio not in (None, 1):
            from peft.optimizers import create_loraplus_optimizer

            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            options |= {
                "loraplus_lr_ratio": self.lora_plus_ratio,
                "loraplus_weight_decay": self.args.weight_decay,
            }
            self.optimizer = create_loraplus_optimizer(model, kind, **options)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = [length(features) for features in typing.cast(list[tasks.Features], self.train_dataset)]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of examples whose largest logit is their label's."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """What the `ProgressReport` of a run had of it in a checkpoint."""
    saved = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    attributes: dict[str, Any] = saved["stateful_callbacks"][ProgressReport.__name__]["attributes"]
    return attributes


def _peak_memory(device: torch.device) -> int | None:
    """Of this process; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


class ProgressReport(TrainerCallback, ExportableState):
    """The progress bar, the time of every step, and the mark of a complete checkpoint.

    The times and the peak of the memory are part of the checkpoints, so that those of a resumed run cover all
    of it, and so are the digests of its data (`tasks.digests`), which has to be the same.
    """

    def __init__(
        self,
        steps: int,
        console: Console,
        checkpoint: Path | None,
        device: torch.device,
        data: dict[str, str],
    ) -> None:
        self.step_seconds: list[float] = []
        self._device, self._data = device, data
        self._before, self._began, self._peak_before = 0.0, time.perf_counter(), None
        if checkpoint is not None:
            saved = progress_of(checkpoint)
            self.step_seconds += saved["seconds"]
            self._before, self._peak_before = saved["elapsed"], saved.get("peak_memory")
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
        reached = {"seconds": self.step_seconds, "elapsed": self.elapsed(), "peak_memory": self.peak_memory()}
        return {"args": {}, "attributes": {**reached, "data_sha256": self._data}}

    def elapsed(self) -> float:
        """Seconds of training, evaluations included, in this process and in those it goes on from."""
        return self._before + time.perf_counter() - self._began

    def peak_memory(self) -> int | None:
        """The most bytes that one of those processes has held, of a GPU's memory or the CPU's, if known."""
        known = [size for size in (self._peak_before, _peak_memory(self._device)) if size is not None]
        return max(known, default=None)

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
            step = state.global_step
            seal(Path(args.output_dir, f"checkpoint-{step}", COMPLETE), step=step)

    def stop(self) -> None:
        self._bar.stop()
