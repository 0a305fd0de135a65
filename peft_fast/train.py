"""The training job: `train(config)` is a thin layer over `transformers.Trainer`.

A run is a folder:

    config.yaml     its options (what --resume reads)
    checkpoints/    adapter, optimizer, schedule and random states, every --save-every steps; the last two
    adapter/        the trained adapter in PEFT's format, with the tokenizer
    metrics.json    what was run, where, how long, and how well
    curves.png      loss and accuracy over the steps
"""

from __future__ import annotations

import collections
import json
import math
import shutil
import statistics
import time
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging as transformers_logging

from . import base_models, tasks
from . import config as options
from .config import TrainConfig
from .errors import UnsupportedLayer
from .info import cpu_name, versions

COMPLETE = "complete"
"""A file that a checkpoint gets last: without it the job was killed while writing."""


def train(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """Runs the job and returns what it wrote to metrics.json.

    Raises:
        ValueError: an option does not fit its data, its model or its folder; the message names it.
        UnsupportedLayer: a layer of the model cannot be made fast.
    """
    console = console or Console()
    _silence_libraries()
    cuda = torch.cuda.is_available()
    if config.dtype == "fp16" and not cuda:
        raise ValueError(
            "dtype: expected fp32 or bf16 on a CPU (fp16 training scales its loss on CUDA), got 'fp16'"
        )
    folder = base_models.model_folder(config)
    tokenizer = base_models.load_tokenizer(config, folder)
    task = tasks.build(config, tokenizer)
    checkpoint = _prepare_folder(config, console)
    steps = config.steps or math.ceil(config.epochs * math.ceil(len(task.train) / config.batch_size))
    arguments = _training_arguments(config, steps, label_names=task.label_names, use_cpu=not cuda)

    set_seed(config.seed)
    base = base_models.load_base(config, folder, task.label_names, arguments.device)
    if task.label_names is not None:
        base.config.pad_token_id = tokenizer.pad_token_id
    model = base_models.add_adapter(config, base, "CAUSAL_LM" if task.label_names is None else "SEQ_CLS")
    layers = _make_fast(config, model, console)

    progress = ProgressReport(steps, console, checkpoint)
    trainer = _LengthGroupedTrainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=sorted(task.eval, key=_length),
        data_collator=DataCollatorWithPadding(tokenizer) if tokenizer.pad_token_id is not None else None,
        compute_metrics=_accuracy if task.label_names is not None else None,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.stop()
    seconds = time.perf_counter() - started

    metrics = _metrics(config, model, trainer, progress)
    metrics |= {
        "seconds": seconds,
        "layers": layers,
        "examples": {"train": len(task.train), "eval": len(task.eval)},
    }
    model.save_pretrained(config.folder / "adapter")
    tokenizer.save_pretrained(config.folder / "adapter")
    _write(config.folder, metrics)
    _summarize(metrics, config, console)
    return metrics


# ------------------------------------------------------------------------------------------- preparation


def _silence_libraries() -> None:
    """The progress bar and the summary say what transformers' logs and bars would."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


def _prepare_folder(config: TrainConfig, console: Console) -> Path | None:
    """Makes the run's folder ready, and returns the checkpoint to resume from, if any.

    Raises:
        ValueError: the folder holds an unfinished run and neither --resume nor --overwrite was given.
    """
    folder = config.folder
    checkpoints = folder / "checkpoints"
    if config.resume:
        complete = [p.parent for p in checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
        if not complete:
            console.print(f"No complete checkpoint in {checkpoints}: starting from the beginning.")
            return None
        last = max(complete, key=lambda p: int(p.name.rpartition("-")[2]))
        console.print(f"Resuming from {last}.")
        return last
    if checkpoints.is_dir() and not (folder / "metrics.json").is_file() and not config.overwrite:
        raise ValueError(
            f"output: expected a folder without an unfinished run, got {str(folder)!r} "
            "(--resume continues it, --overwrite starts again)"
        )
    shutil.rmtree(checkpoints, ignore_errors=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    options.save(config, folder / "config.yaml")
    return None


def _training_arguments(
    config: TrainConfig, steps: int, *, label_names: list[str] | None, use_cpu: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(config.folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=round(config.warmup * steps),
        lr_scheduler_type="linear",
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=1,
        seed=config.seed,
        bf16=config.dtype == "bf16",
        fp16=config.dtype == "fp16",
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        label_names=["labels"],
        prediction_loss_only=label_names is None,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # torch's DataParallel cannot copy packed weights
    return arguments


def _make_fast(config: TrainConfig, model: Any, console: Console) -> dict[str, Any]:
    """Swaps in the fused layers, unless --stock, and returns how many layers run on what.

    Raises:
        UnsupportedLayer: no layer can be fused; the message says why.
    """
    if config.stock:
        if switched_off := base_models.protect_from_repacking(model):
            console.print(
                f"Stock: bitsandbytes' CPU repacking is switched off in {switched_off} layers; the first "
                "evaluation would repack their weights in place, and training would get no gradient after it."
            )
        return {"fused": 0, "backends": {}, "left": {}}
    from .convert import accelerate

    report = accelerate(model, methods=(config.method,), backend=config.backend)
    left = {row.name: row.reason for row in report.left}
    if not report.fused:
        reasons = "; ".join(sorted({str(reason) for reason in left.values()}))
        raise UnsupportedLayer(
            f"model: expected at least one layer to fuse, got none ({reasons}); see --stock"
        )
    for name, reason in left.items():
        console.print(f"Left to PEFT: {name}: {reason}")
    return {
        "fused": len(report.fused),
        "backends": dict(collections.Counter(row.backend for row in report.fused)),
        "left": left,
    }


# ---------------------------------------------------------------------------------------------- training


def _length(features: tasks.Features) -> int:
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


class _LengthGroupedTrainer(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = [_length(features) for features in typing.cast(list[tasks.Features], self.train_dataset)]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
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
        Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE).touch()

    def stop(self) -> None:
        self._bar.stop()


# --------------------------------------------------------------------------------------------- reporting


def _metrics(config: TrainConfig, model: Any, trainer: Trainer, progress: ProgressReport) -> dict[str, Any]:
    history = trainer.state.log_history
    evaluations = [
        {"step": row["step"], "loss": row["eval_loss"]}
        | ({"accuracy": row["eval_accuracy"]} if "eval_accuracy" in row else {})
        for row in history
        if "eval_loss" in row
    ]
    last = evaluations[-1]
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "accuracy": last.get("accuracy"),
        "eval_loss": last["loss"],
        "perplexity": math.exp(last["loss"]) if config.task == "causal-lm" else None,
        "steps": trainer.state.global_step,
        "ms_per_step": 1000 * statistics.median(progress.step_seconds),
        "step_seconds": progress.step_seconds,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "device": str(trainer.args.device),
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": config.as_dict(),
        "loss": [row["loss"] for row in history if "loss" in row],
        "evaluations": evaluations,
    }


def _write(folder: Path, metrics: dict[str, Any]) -> None:
    from .plots import plot_curves

    plot_curves(metrics, folder / "curves.png")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def _summarize(metrics: dict[str, Any], config: TrainConfig, console: Console) -> None:
    layers = metrics["layers"]
    kernels = "stock" if config.stock else f"{layers['fused']} layers on {', '.join(layers['backends'])}"
    table = Table(show_header=False, title=f"{config.task}: {config.method} on {config.quant}, {kernels}")
    if metrics["accuracy"] is not None:
        table.add_row("accuracy", f"{metrics['accuracy']:.3f}")
    if metrics["perplexity"] is not None:
        table.add_row("perplexity", f"{metrics['perplexity']:.2f}")
    table.add_row("evaluation loss", f"{metrics['eval_loss']:.4f}")
    table.add_row("steps", f"{metrics['steps']} at {metrics['ms_per_step']:.0f} ms")
    table.add_row("seconds", f"{metrics['seconds']:.1f} ({sum(metrics['step_seconds']):.1f} in steps)")
    trainable, total = metrics["trainable_parameters"], metrics["total_parameters"]
    table.add_row("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})")
    table.add_row("written to", str(config.folder))
    console.print(table)
