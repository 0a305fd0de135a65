"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_curves(metrics: dict[str, Any], path: Path) -> None:
    """Training and evaluation loss, and accuracy where the task has one, over the steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluations = metrics["evaluations"]
    steps = [e["step"] for e in evaluations]
    has_accuracy = metrics["accuracy"] is not None
    figure = Figure(figsize=(10 if has_accuracy else 5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if has_accuracy else 1, squeeze=False)[0]
    losses = metrics["loss"]
    axes[0].plot(range(1, len(losses) + 1), losses, color="0.7", linewidth=0.8, label="training, each step")
    axes[0].plot(steps, [e["loss"] for e in evaluations], "o-", label="evaluation")
    axes[0].set(xlabel="step", ylabel="loss")
    axes[0].legend()
    if has_accuracy:
        axes[1].plot(steps, [e["accuracy"] for e in evaluations], "o-", color="C2")
        axes[1].set(xlabel="step", ylabel="evaluation accuracy")
        axes[1].grid(alpha=0.3)
    figure.savefig(path, dpi=120)
