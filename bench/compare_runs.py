"""Two runs of `peft-fast train` side by side: seconds, accuracy, and the largest difference of the losses.

peft-fast train --method dora --output runs/dora
peft-fast train --method dora --output runs/dora-stock --stock
python bench/compare_runs.py runs/dora runs/dora-stock --plot dora.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FIRST = 20


def largest_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """The training losses on one pair of axes, and their difference below."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for (name, metrics), style in zip(runs.items(), ("-", "--"), strict=True):
        above.plot(range(1, len(metrics["loss"]) + 1), metrics["loss"], style, label=name, linewidth=1)
    losses, others = (metrics["loss"] for metrics in runs.values())
    differences = [abs(a - b) for a, b in zip(losses, others, strict=True)]
    below.semilogy(range(1, len(differences) + 1), differences, linewidth=1, color="C3")
    above.set(ylabel="training loss")
    above.legend()
    below.set(xlabel="step", ylabel="difference")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs=2, help="folders with a metrics.json")
    parser.add_argument("--plot", type=Path, help="PNG of both loss curves")
    args = parser.parse_args(argv)
    runs = {str(path): json.loads((path / "metrics.json").read_text(encoding="utf-8")) for path in args.runs}
    for name, metrics in runs.items():
        seconds, accuracy = metrics["seconds"], metrics["accuracy"]
        print(f"{name}: {seconds:.1f} s, accuracy {accuracy}, last loss {metrics['loss'][-1]:.6f}")
    losses, others = (metrics["loss"] for metrics in runs.values())
    first = largest_difference(losses[:FIRST], others[:FIRST])
    print(f"largest difference of the loss: {first:.1e} in the first {FIRST} steps, "
          f"{largest_difference(losses, others):.1e} in all {len(losses)}")  # fmt: skip
    if args.plot is not None:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
