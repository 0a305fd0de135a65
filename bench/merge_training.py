"""The default fine-tuning job with its layers carried out in merged and in split form: how its losses differ.

The base is the default model with its weights rounded to bf16, as most checkpoints have them, so that runs in
bf16 and fp32 start from the same 4-bit weights. The split form is the C++ backend. Runs of one seed have the
same initial adapters and the same batches.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft_fast.bench.lora_linear import append
from peft_fast.bench.merge_forms import FORMS, Merge
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from peft_fast import backends
from peft_fast.base_models import minilm_folder
from peft_fast.config import TrainConfig

FIRST = 20


class Run(NamedTuple):
    """A fine-tuning job; `dtype` is that of the activations."""

    quant: str
    nested: bool
    method: str
    dtype: str
    lr: float
    steps: int
    form: str
    seed: int


def base_in_bf16(folder: Path) -> Path:
    """A copy of the default model in `folder`, with its weights rounded to bf16."""
    shutil.copytree(minilm_folder(), folder)
    file = folder / "model.safetensors"
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def simulated(backend: Merge) -> backends.Backend:
    """A row of the backend table, for bases of every format."""
    return backends.Backend(lambda: backend, lambda format, device, dtype: None, automatic=False)


def trained(run: Run, model: Path, output: Path) -> dict[str, Any]:
    """The metrics of a run, its layers carried out by a backend that is in the table for its time only."""
    from peft_fast.train import train

    def quantization(**options: Any) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(**{**options, "bnb_4bit_use_double_quant": run.nested})

    rows = {name: simulated(Merge(stochastic=name == "stochastic")) for name in FORMS[1:]}
    config = TrainConfig(
        model=str(model), output=str(output), quant=run.quant, dtype=run.dtype, method=run.method, lr=run.lr,
        steps=run.steps, seed=run.seed, eval_every=run.steps, save_every=run.steps,
        backend="cpu" if run.form == "split" else run.form,
    )  # fmt: skip
    with (
        mock.patch(
            "transformers.BitsAndBytesConfig", quantization
        ),  # by name: the lazy module may be replaced
        mock.patch.dict(backends.BACKENDS, rows),
    ):
        return train(config)


def train_runs(args: argparse.Namespace) -> None:
    """Runs what is not in the CSV file yet."""
    done = {run for run, _ in read_runs(args.csv)} if args.csv is not None and args.csv.exists() else set()
    with tempfile.TemporaryDirectory() as scratch:
        model = base_in_bf16(Path(scratch, "base"))
        for seed, nested, method, dtype, lr, form in itertools.product(
            args.seed, args.nested, args.method, args.dtype, args.lr, args.form
        ):
            run = Run(args.quant, nested and args.quant != "none", method, dtype, lr, args.steps, form, seed)
            if run in done:
                continue
            done.add(run)
            metrics = trained(run, model, Path(scratch, f"run{len(done)}"))
            row = {name: metrics[name] for name in ("eval_loss", "accuracy", "seconds")}
            print(*run, row, flush=True)
            losses = " ".join(f"{loss:.9g}" for loss in metrics["loss"])
            if args.csv is not None:
                append(args.csv, [{**run._asdict(), **row, "losses": losses}])


class Trained(NamedTuple):
    eval_loss: float
    accuracy: float
    losses: list[float]


def read_runs(path: Path) -> list[tuple[Run, Trained]]:
    """The runs that `train` wrote."""
    with path.open(newline="") as file:
        return [
            (
                Run(
                    row["quant"], row["nested"] == "True", row["method"], row["dtype"], float(row["lr"]),
                    int(row["steps"]), row["form"], int(row["seed"]),
                ),
                Trained(
                    float(row["eval_loss"]), float(row["accuracy"]), [float(v) for v in row["losses"].split()]
                ),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def differences(run: Trained, other: Trained) -> list[float]:
    return [abs(a - b) for a, b in zip(run.losses, other.losses, strict=True)]


def summary(runs: dict[Run, Trained]) -> list[str]:
    """A Markdown row for each run: its result, and how its losses differ from those of split in bf16."""
    rows = [
        f"| job | form | seed | evaluation loss | accuracy | difference, first {FIRST} steps | all steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for run, result in runs.items():
        nested = "" if run.quant == "none" else " nested" if run.nested else " un-nested"
        form = run.form if run.dtype == "bf16" else f"{run.form}, {run.dtype}"
        row = [f"{run.quant}{nested}, {run.method}, {run.lr:g}, {run.steps} steps", form, str(run.seed)]
        row += [f"{result.eval_loss:.5f}", f"{result.accuracy:.3f}"]
        beside = run._replace(form="split", dtype="bf16")
        if beside in runs and beside != run:
            found = differences(result, runs[beside])
            row += [f"{max(some):.1e} / {statistics.mean(some):.1e}" for some in (found[:FIRST], found)]
        else:
            row += ["", ""]
        rows.append(f"| {' | '.join(row)} |")
    return rows


def plot_losses(runs: dict[Run, Trained], path: Path) -> None:
    """Losses of the default job on nested NF4, with LoRA; and how far each run is from split in bf16."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    chosen = {run: result for run, result in runs.items() if run[:2] == ("nf4", True) and run.lr == 1e-3}
    for run, result in chosen.items():
        steps = range(1, run.steps + 1)
        name = f"{run.method}, {run.form}, {run.dtype}, seed {run.seed}"
        beside = run._replace(form="split", dtype="bf16")
        if run.method == "lora" and run.seed == 0 and run.dtype == "bf16":
            left.plot(steps, result.losses, "-" if run == beside else "--", label=name, linewidth=0.8)
        if run != beside and beside in chosen:
            style = "-" if run.method == "lora" else ":"
            right.semilogy(steps, differences(result, chosen[beside]), style, label=name, linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="difference from split, bf16")
    for ax in (left, right):
        if ax.has_data():
            ax.legend(fontsize="small")
    figure.savefig(path, dpi=100)
