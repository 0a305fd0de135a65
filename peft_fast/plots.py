"""Pictures of a run, and the canvas that all pictures are drawn on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import Row


def canvas(count: int, columns: int, *, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure that needs no display, with `count` axes in rows of `columns`, each `size` inches.

    Raises:
        ImportError: matplotlib is missing; the message has the command that installs it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install matplotlib") from error
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def plot_curves(metrics: dict[str, Any], path: Path) -> None:
    """Training and evaluation loss, and accuracy where the task has one, over the steps, as a PNG."""
    evaluations = metrics["evaluations"]
    steps = [e["step"] for e in evaluations]
    panels = 1 if metrics["accuracy"] is None else 2
    figure, axes = canvas(panels, panels, size=(5, 3.5))
    losses = metrics["loss"]
    axes[0].plot(range(1, len(losses) + 1), losses, color="0.7", linewidth=0.8, label="training, each step")
    axes[0].plot(steps, [e["loss"] for e in evaluations], "o-", label="evaluation")
    axes[0].set(xlabel="step", ylabel="loss")
    axes[0].legend()
    if metrics["accuracy"] is not None:
        axes[1].plot(steps, [e["accuracy"] for e in evaluations], "o-", color="C2")
        axes[1].set(xlabel="step", ylabel="evaluation accuracy")
        axes[1].grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_comparison(rows: Sequence[Row], path: Path) -> None:
    """Accuracy (or the evaluation loss) over trained parameters; time of a step and peak memory, as a PNG."""
    figure, axes = canvas(3, 3, size=(5, 4))
    accurate = all(row.accuracy is not None for row in rows)
    for i, row in enumerate(rows):
        y = row.accuracy if accurate else row.eval_loss
        x, spread = row.trained_parameters, row.accuracy_spread
        axes[0].errorbar(x, y, yerr=spread, fmt="o", color=f"C{i}", capsize=3)
        axes[0].annotate(row.method, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes[0].set(xscale="log", xlabel="trained parameters")
    axes[0].set_ylabel("evaluation accuracy" if accurate else "evaluation loss")
    axes[0].grid(alpha=0.3)
    names, places = [row.method for row in rows], range(len(rows))
    colours = [f"C{i}" for i in places]
    axes[1].barh(places, [row.ms_per_step for row in rows], color=colours)
    axes[1].set_xlabel("milliseconds a step")
    axes[2].barh(places, [(row.peak_memory or 0) / 2**20 for row in rows], color=colours)
    axes[2].set_xlabel("peak memory of the process, MiB")
    for bars in axes[1:]:
        bars.set_yticks(places, names)
        bars.invert_yaxis()
    figure.savefig(path, dpi=120)
