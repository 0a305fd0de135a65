"""Pictures of a run, and the canvas that all pictures are drawn on."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
