"""The training job: `train(config)` is a thin layer over `transformers.Trainer`.

A run is a folder:

    config.yaml     its options (what --resume reads)
    checkpoints/    adapter, optimizer, schedule and random states, every --save-every steps; the last two
    adapter/        the trained adapter with the tokenizer, in PEFT's format; what PEFT lacks, as
                    `AdapterModel.from_pretrained` or `ReftModel.from_pretrained` reads it, the latter
                    with the head as `base_models.load_head` does
    metrics.json    what was run, where, how long, and how well
    curves.png      loss and accuracy over the steps
"""

from __future__ import annotations

import collections
import json
import math
import shutil
import statistics
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from . import backends, base_models, initialization, tasks
from . import config as options
from .adapter_config import AdapterConfig
from .config import TrainConfig
from .errors import UnsupportedLayer
from .files import replace_file
from .formats import from_linear
from .info import cpu_name, versions
from .initialization import Factors
from .reft import LoReFTConfig, ReftModel
from .trainer import AdapterTrainer, ProgressReport, accuracy, last_checkpoint, length, progress_of
from .tuned_model import count_parameters


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
    data = tasks.digests(config)
    task = tasks.build(config, tokenizer)
    adapter = base_models.adapter_config(config, "CAUSAL_LM" if task.label_names is None else "SEQ_CLS")
    arguments = _training_arguments(config, len(task.train), label_names=task.label_names, use_cpu=not cuda)
    if not arguments.should_save:
        console = Console(quiet=True)
    checkpoint = _find_checkpoint(config, console)

    set_seed(config.seed)
    initial: dict[str, Factors] = {}
    dense = base_models.trained_whole(adapter)
    base = base_models.load_base(config, folder, task.label_names, arguments.device, dense)
    if task.label_names is not None:
        base.config.pad_token_id = tokenizer.pad_token_id
    _check_length(config, base, task)
    if isinstance(adapter, AdapterConfig | LoReFTConfig):  # they go around layers that are fused already
        layers = _make_fast(config, base, console)
        model = base_models.add_adapter(adapter, base)
        layers |= _adapted(config, model, arguments.device)
    else:
        model = base_models.add_adapter(adapter, base)
        if config.init in initialization.METHODS:
            initial = initialization.initialize(model, config.init)
        layers = _make_fast(config, model, console)

    progress = ProgressReport(arguments.max_steps, console, checkpoint, arguments.device, data)
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=sorted(task.eval, key=length),
        data_collator=DataCollatorWithPadding(tokenizer) if tokenizer.pad_token_id is not None else None,
        compute_metrics=accuracy if task.label_names is not None else None,
        lora_plus_ratio=config.lora_plus_ratio,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    if arguments.should_save and checkpoint is None:
        _empty_folder(config)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.stop()
    seconds = progress.elapsed()

    metrics = _metrics(config, model, trainer, progress)
    metrics |= {
        "seconds": seconds,
        "layers": layers,
        "examples": {"train": len(task.train), "eval": len(task.eval)},
        "data_sha256": data,
    }
    if arguments.should_save:
        metrics["adapter_bytes"] = _save(model, initial, config.folder / "adapter")
        tokenizer.save_pretrained(config.folder / "adapter")
        _write(config.folder, metrics)
    _summarize(metrics, config, console)
    return metrics


def _save(model: Any, initial: Mapping[str, Factors], folder: Path) -> int:
    """Writes the adapter; returns the bytes of its tensors' files."""
    model.save_pretrained(folder)
    if isinstance(model, ReftModel):
        base_models.save_head(model, folder)
    if initial:
        base_models.make_plain(folder, initialization.plain_lora(model, initial))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------- preparation


def _silence_libraries() -> None:
    """The progress bar and the summary say what transformers' logs and bars would."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


def _find_checkpoint(config: TrainConfig, console: Console) -> Path | None:
    """The checkpoint to resume from, if any; changes nothing.

    Raises:
        ValueError: the folder holds an unfinished run and neither --resume nor --overwrite was given, or a
            file of the checkpoint is not as it was written, or a data file not as the run read it.
        FileNotFoundError: a file of the checkpoint is missing.
    """
    folder = config.folder
    checkpoints = folder / "checkpoints"
    if config.resume:
        last = last_checkpoint(checkpoints)
        if last is None:
            console.print(f"No complete checkpoint in {checkpoints}: starting from the beginning.")
        else:
            tasks.check_digests(config, progress_of(last).get("data_sha256", {}), "the resumed run")
            console.print(f"Resuming from {last}.")
        return last
    if checkpoints.is_dir() and not (folder / "metrics.json").is_file() and not config.overwrite:
        raise ValueError(
            f"output: expected a folder without an unfinished run, got {str(folder)!r} "
            "(--resume continues it, --overwrite starts again)"
        )
    return None


def _empty_folder(config: TrainConfig) -> None:
    """Removes what an earlier run left, and writes the options of this one."""
    folder = config.folder
    for old in ("checkpoints", "adapter"):
        shutil.rmtree(folder / old, ignore_errors=True)
    for old in ("metrics.json", "curves.png"):
        (folder / old).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    options.save(config, folder / "config.yaml")


def _check_length(config: TrainConfig, base: Any, task: tasks.Task) -> None:
    """Raises ValueError where an example is longer than a table of positions in a model of texts alone."""
    if base.config.get_text_config() is not base.config:
        return  # a tower for something else may have a table of its own
    longest, more = max(map(length, (*task.train, *task.eval))), config.virtual_tokens or 0
    option = "block_size" if task.label_names is None else "max_length"
    for name, positions in base_models.position_tables(base, base.config).items():
        if longest + more > positions:
            raise ValueError(
                f"{option}: expected at most {positions - more} tokens in an example, since {name} has "
                f"{positions} positions{f' and {more} tokens are added' if more else ''}, got {longest}"
            )


def _training_arguments(
    config: TrainConfig, examples: int, *, label_names: list[str] | None, use_cpu: bool
) -> TrainingArguments:
    """The options in transformers' words; of several processes each takes a batch at every step."""
    assert config.lr is not None, "TrainConfig sets the default of its method"
    arguments = TrainingArguments(
        output_dir=str(config.folder / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
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
        gradient_checkpointing=config.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
        label_names=["labels"],
        prediction_loss_only=label_names is None,
        remove_unused_columns=False,
        # Every process has as many labels in a batch; a classifier's loss, a mean already, would be scaled.
        average_tokens_across_devices=False,
        disable_tqdm=True,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # torch's DataParallel cannot copy packed weights
    batches = math.ceil(examples / (config.batch_size * arguments.world_size))
    arguments.max_steps = config.steps or math.ceil(config.epochs * batches)
    arguments.warmup_steps = round(config.warmup * arguments.max_steps)
    return arguments


def _make_fast(config: TrainConfig, model: Any, console: Console) -> dict[str, Any]:
    """Swaps in the fused layers, unless --stock, and returns how many layers run on what.

    Without quantization, some methods have no layer to swap: those without an adapter are PyTorch's own.

    Raises:
        UnsupportedLayer: no layer can be fused; the message says why.
    """
    if config.stock:
        if switched_off := base_models.protect_from_repacking(model):
            console.print(
                f"Stock: bitsandbytes' CPU repacking is switched off in {switched_off} layers; the first "
                "evaluation would repack their weights in place, and training would get no gradient after it."
            )
        if config.method == "loreft":
            edited = "" if config.component == "block_output" else ", and the layers that they edit"
            console.print(
                f"Stock: the edits{edited} are this library's; neither PEFT nor bitsandbytes has any."
            )
        return {"fused": 0, "backends": {}, "left": {}}
    from .swap import accelerate

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="accelerate: ")  # said below
        report = accelerate(model, backend=config.backend)
    left = {row.name: row.reason for row in report.left}
    if left and not report.fused:
        reasons = "; ".join(sorted({str(reason) for reason in left.values()}))
        raise UnsupportedLayer(
            f"model: expected at least one layer to fuse, got none ({reasons}); see --stock"
        )
    for name, reason in left.items():
        console.print(f"Left as it is: {name}: {reason}")
    return {
        "fused": len(report.fused),
        "backends": dict(collections.Counter(row.backend for row in report.fused)),
        "left": left,
    }


def _adapted(config: TrainConfig, model: Any, device: torch.device) -> dict[str, dict[str, int]]:
    """How many edits, or layers with an adapter, run on which backend."""
    dtype = base_models.DTYPES[config.dtype]
    if isinstance(model, ReftModel):
        return {
            "edits": {
                backends.resolve("loreft", "dense", device.type, dtype, config.backend): len(model.edits)
            }
        }
    formats = (from_linear(layer.base_layer).format for layer in model.adapters.values())
    names = (backends.resolve("lora_linear", f, device.type, dtype, config.backend) for f in formats)
    return {"adapters": dict(collections.Counter(names))}


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
    trainable, total = count_parameters(model)
    return {
        "accuracy": last.get("accuracy"),
        "eval_loss": last["loss"],
        "perplexity": math.exp(last["loss"]) if config.task == "causal-lm" else None,
        "steps": trainer.state.global_step,
        "ms_per_step": 1000 * statistics.median(progress.step_seconds),
        "step_seconds": progress.step_seconds,
        "peak_memory": progress.peak_memory(),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "device": str(trainer.args.device),
        "processes": trainer.args.world_size,
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
    text = json.dumps(metrics, indent=1) + "\n"
    replace_file(folder / "metrics.json", lambda part: part.write_text(text, encoding="utf-8"))


def _summarize(metrics: dict[str, Any], config: TrainConfig, console: Console) -> None:
    layers = metrics["layers"]
    parts = ["stock"] if config.stock else []
    parts += [f"{count} layers on {backend}" for backend, count in layers["backends"].items()]
    for kind in ("edits", "adapters"):
        parts += [f"{count} {kind} on {backend}" for backend, count in layers.get(kind, {}).items()]
    title = f"{config.task}: {config.method} on {config.quant}, {', '.join(parts)}"
    table = Table(show_header=False, title=title)
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
