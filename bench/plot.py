"""Figures of a CSV file of `peft-fast bench`: ratios over M, memory, and the share of the roofline.

    python bench/plot.py ratio    --csv bench/results/suite.csv --layer Llama-3-8B.q --out ratio.png
    python bench/plot.py memory   --layer Llama-3-8B.q --rows 512 --out memory.png
    python bench/plot.py roofline --method lora --out roofline.png

Of rows that the file holds twice, the later counts. A band is p20 to p80 of a provider; cases that were too
noisy to say are drawn faint. The file is by default suite.csv in bench/results of the current folder.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_fast.bench.providers import PEERS, PROVIDERS
from peft_fast.bench.registry import MEASURES

Row = dict[str, str]
RESULTS = Path("bench/results/suite.csv")
STEP = "forward+backward"
COLOURS = dict(zip(("ours", *PEERS), ("C0", "C1", "C2", "C3", "C4", "C5"), strict=True))
MARKERS = {"lora": "o", "dora": "s", "loreft": "^"}
DENSE = "0.6"
CASE = ("op", "format", "method", "K", "N", "R", "M", "dtype", "dropout")
FAINT = 0.25


def read(path: Path) -> list[Row]:
    """The rows with figures, each case, provider, thread count, device and measure once: the latest.

    Raises:
        ValueError: the file has other columns, or no figures.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        wanted = {*CASE, "provider", "measure", "p50", "over_dense", "device", "threads"}
        if missing := wanted - set(reader.fieldnames or ()):
            raise ValueError(f"--csv: expected a file of `peft-fast bench`, {path} has no {sorted(missing)}")
    latest = {
        tuple(row[name] for name in (*CASE, "provider", "measure", "device", "threads")): row
        for row in rows
        if row["p50"]
    }
    if not latest:
        raise ValueError(f"--csv: expected rows with figures, got none in {path}")
    return list(latest.values())


def chosen(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """The rows that the options name. Raises ValueError where there are none."""
    found = [
        row
        for row in rows
        if (args.layer is None or args.layer in row["layers"].split())
        and (args.method is None or row["method"] in args.method)
        and (args.dtype is None or row["dtype"] == args.dtype)
        and (args.rows is None or int(row["M"]) in args.rows)
        and row["measure"] == args.measure
    ]
    if not found:
        raise ValueError(f"{args.csv}: expected rows for the options, got none of {len(rows)}")
    return found


def place(row: Row) -> str:
    """Where the figures are from."""
    threads = "" if row["device"].startswith(("NVIDIA", "AMD Instinct")) else f", {row['threads']} threads"
    return f"{row['device']}{threads}, {row['date']}, {row['commit'] or 'no commit'}"


def canvas(columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure with a row of axes. Raises ImportError with the command that installs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install matplotlib") from error
    figure = Figure(figsize=(4.6 * columns + 0.8, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _by(rows: list[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(found)


def _title(row: Row) -> str:
    return f"{row['method']}, {' '.join(row['layers'].split()[:1])} {row['K']} → {row['N']}"


def _order(name: str) -> int:
    """Ours first, then as in the table of providers, then named backends of ours."""
    names = ["ours", *PROVIDERS]
    return names.index(name) if name in names else len(names)


def ratio(rows: list[Row]) -> Any:
    """The ratio to the fastest dense layer over M, axes for each method and shape."""
    groups = _by(rows, "method", "K", "N")
    figure, axes = canvas(len(groups), 4.2)
    for axis, group in zip(axes, groups.values(), strict=True):
        adapted = [row for row in group if not row["provider"].startswith("dense-")]
        for (name,), line in sorted(_by(adapted, "provider").items(), key=lambda item: _order(item[0][0])):
            line.sort(key=lambda row: int(row["M"]))
            M = [int(row["M"]) for row in line]
            middle = [float(row["over_dense"]) for row in line]
            below, above = (
                [float(row["over_dense"]) * float(row[p]) / float(row["p50"]) for row in line]
                for p in ("p20", "p80")
            )
            colour = COLOURS.get(name, "C6")
            axis.plot(M, middle, color=colour, label=name, linewidth=1.5)
            axis.fill_between(M, below, above, color=colour, alpha=0.15, linewidth=0)
            for row, m, value in zip(line, M, middle, strict=True):
                alpha = FAINT if row["noisy"] == "True" else 1.0
                axis.plot([m], [value], MARKERS[row["method"]], color=colour, alpha=alpha, markersize=5)
        axis.axhline(1, color=DENSE, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="tokens M", title=_title(group[0]))
        _plain(axis.yaxis, [float(row["over_dense"]) for row in adapted])
        ticks = sorted({int(row["M"]) for row in group})
        axis.set_xticks(ticks, [str(m) for m in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{rows[0]['measure']} over the frozen dense layer")
    axes[0].legend()
    return figure


def _plain(axis: Any, values: Sequence[float]) -> None:
    """Round numbers on a logarithmic axis, as many as the values need."""
    steps = [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500]
    low, high = min(*values, 1.0) / 1.3, max(*values, 1.0) * 1.3
    ticks = [step for step in steps if low <= step <= high]
    axis.axes.set_ylim(low, high)
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def memory(rows: list[Row]) -> Any:
    """What a step saves for backward and allocates at most, axes for each case."""
    groups = _by(rows, "method", "K", "N", "M")
    figure, axes = canvas(len(groups), 3.6)
    for axis, group in zip(axes, groups.values(), strict=True):
        group.sort(key=lambda row: -_order(row["provider"]))
        y = range(len(group))
        peak = [int(row["peak_bytes"]) / 2**20 for row in group]
        saved = [int(row["saved_bytes"]) / 2**20 for row in group]
        colours = [COLOURS.get(row["provider"], DENSE) for row in group]
        axis.barh(y, peak, color=colours, alpha=0.5)
        axis.barh(y, saved, color=colours, height=0.4)
        for i, (total, kept) in enumerate(zip(peak, saved, strict=True)):
            axis.annotate(f" {total:.3g} ({kept:.2g})", (total, i), va="center", fontsize=8)
        axis.set_yticks(list(y), [row["provider"] for row in group])
        axis.set(xlabel="MiB: peak (saved for backward)", title=f"{_title(group[0])}, M = {group[0]['M']}")
        axis.set_xlim(0, 1.3 * max(peak))
        axis.grid(alpha=0.3, axis="x")
    return figure


def roofline(rows: list[Row]) -> Any:
    """What was reached of the device's best over the intensity of the work, FLOPs for each byte."""
    rows = [row for row in rows if row["roofline_percent"]]
    if not rows:
        raise ValueError("roofline: expected rows of a device whose peak is known, got none")
    figure, (axis,) = canvas(1, 4.6)
    for (name,), group in sorted(_by(rows, "provider").items(), key=lambda item: _order(item[0][0])):
        for (method,), alike in _by(group, "method").items():
            intensity = [1e3 * float(row["tflop_per_s"]) / float(row["gb_per_s"]) for row in alike]
            reached = [float(row["roofline_percent"]) for row in alike]
            dense = name.startswith("dense-")
            style = {"facecolors": "none"} if name == "dense-float32" else {}
            axis.scatter(
                intensity, reached, marker=MARKERS[method], color=DENSE if dense else COLOURS.get(name, "C6"),
                label=f"{name}, {method}", s=22, **style,
            )  # fmt: skip
    axis.axhline(100, color=DENSE, linewidth=1)
    axis.set(xscale="log", xlabel="FLOPs per byte", ylabel=f"{rows[0]['measure']}, % of the roofline")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


KINDS: dict[str, Callable[[list[Row]], Any]] = {"ratio": ratio, "memory": memory, "roofline": roofline}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("kind", choices=KINDS)
    add("--csv", type=Path, default=RESULTS, help="of peft-fast bench (default: %(default)s)")
    add("--out", type=Path, required=True, help="PNG, SVG or PDF")
    add("--layer", help="as in bench/registry.py, such as Llama-3-8B.q (default: all in the file)")
    add("--method", nargs="+", choices=MARKERS, help="default: all in the file")
    add("--dtype", help="default: all in the file")
    add("--rows", type=int, nargs="+", metavar="M", help="default: all in the file")
    add("--measure", choices=MEASURES, default=STEP, help="default: %(default)s; memory is known of that")
    args = parser.parse_args(argv)
    rows = chosen(read(args.csv), args)
    figure = KINDS[args.kind](rows)
    figure.suptitle("; ".join(sorted({place(row) for row in rows})), fontsize=8, color="0.4")
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
