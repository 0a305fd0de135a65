"""Figures of a CSV file of `peft-fast bench`: ratios over M, memory, and the share of the roofline.

    python bench/plot.py ratio    --csv bench/results/suite.csv --layer Llama-3-8B.q --out ratio.png
    python bench/plot.py ratio    --where rank=16,64 dropout=0 "device=*EPYC*" --out ratio.png
    python bench/plot.py memory   --layer Llama-3-8B.q --rows 512 --out memory.png
    python bench/plot.py roofline --method lora --out roofline.png

Of rows that the file holds twice, the newest counts: that of the latest date, or the last in the file; how
many others there were is told on stderr. Format, rank, dtype, dropout, device, threads and state of the
caches are in the legend where a figure has several, else in its titles. More than can be told apart is an
error, and --where chooses. A band is p20 to p80 of a provider; cases that were too noisy to say are drawn
faint. The file is by default suite.csv in bench/results of the current folder.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_fast.bench import plot_rows
from peft_fast.bench.plot_rows import MACHINE, SETTINGS, Row, read
from peft_fast.bench.providers import PEERS, is_dense
from peft_fast.bench.registry import MEASURES, METHODS

from peft_fast import plots

RESULTS = Path("bench/results/suite.csv")
STEP = "forward+backward"
COLOURS = dict(zip(("ours", *PEERS, "accelerated"), (f"C{i}" for i in range(7)), strict=True))
MORE_COLOURS = ("C8", "C9", "black", "navy")
METHOD_MARKERS = dict(zip(METHODS, "osDvP^", strict=True))
MARKERS = (*METHOD_MARKERS.values(), *"*X")
LINES = ("-", "--", ":", "-.")
DENSE = "0.6"
FAINT, BAND_ALPHA = 0.25, 0.15
COLUMNS, AXES, BARS = 4, 12, 16
"""Axes side by side; axes, and bars of one, at most in a figure."""


def canvas(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure with `count` axes, each `height` inches high. Raises ImportError as `plots.canvas`."""
    return plots.canvas(count, min(count, COLUMNS), size=(4.6, height))


def _panels(kind: str, groups: dict[tuple[str, ...], list[Row]], height: float) -> tuple[Any, list[Any]]:
    """A figure with axes for each group. Raises ValueError for more than fit."""
    if len(groups) > AXES:
        raise ValueError(
            f"{kind}: expected at most {AXES} cases with axes of their own, got {len(groups)}: choose with "
            "--layer, --method, --rows or --where"
        )
    return canvas(len(groups), height)


def _colours(kind: str, rows: list[Row]) -> dict[str, str]:
    """By provider, ours first. Raises ValueError for more backends of ours than there are colours."""
    names = sorted({row["provider"] for row in rows}, key=plot_rows.order)
    known = COLOURS | {name: DENSE for name in names if is_dense(name)}
    more = [name for name in names if name not in known]
    known |= plot_rows.assigned(f"{kind}: backends of ours", more, MORE_COLOURS, ["provider"])
    return {name: known[name] for name in names}


def _settings(group: list[Row], varying: Sequence[str]) -> str:
    """Those of a case that the legend does not tell; those of the machine are in the heading."""
    alike = [name for name in SETTINGS if name not in (*varying, *MACHINE)]
    return ", ".join(plot_rows.told(name, group[0][name]) for name in alike)


def _title(group: list[Row], varying: Sequence[str], first: str = "") -> str:
    row = group[0]
    shape = f"{' '.join(row['layers'].split()[:1])} {row['K']} → {row['N']}".strip()
    return f"{first}{row['method']}, {shape}\n{_settings(group, varying)}"


def place(row: Row) -> str:
    """Where and when the figures were taken."""
    gpu = row["device"].startswith(("NVIDIA", "AMD Instinct"))
    threads = "" if gpu else f", {plot_rows.told('threads', row['threads'])}"
    return f"{row['device']}{threads}, {row['date']}, {row['commit'] or 'no commit'}"


def _heading(kind: str, rows: list[Row]) -> str:
    places = sorted({place(row) for row in rows})
    more = [f"and {len(places) - 3} more runs"] if len(places) > 4 else places[3:]
    faint = kind != "memory" and any(row["noisy"] == "True" for row in rows)
    return "\n".join([*places[:3], *more, *(["faint: too noisy to say"] if faint else [])])


def _alpha(row: Row) -> float:
    return FAINT if row["noisy"] == "True" else 1.0


def _legend(figure: Any, axes: Iterable[Any], labels: Iterable[str], **more: Any) -> None:
    """One for all axes, beside them, in the order of `labels`; `more` has further handles by label."""
    handles: dict[str, Any] = {}
    for axis in axes:
        found, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    handles |= more
    ordered = [label for label in (*labels, *more) if label in handles]
    figure.set_figwidth(figure.get_figwidth() + 2.2)
    figure.legend([handles[label] for label in ordered], ordered, loc="outside right upper", fontsize=8)


# ------------------------------------------------------------------------------------------------- the kinds


def ratio(rows: list[Row]) -> Any:
    """The ratio to the fastest dense layer over M, axes for each method and shape.

    Raises:
        ValueError: there is no ratio, or more lines than can be told apart.
    """
    drawn = [row for row in rows if row["over_dense"] and not is_dense(row["provider"])]
    if not drawn:
        raise ValueError(
            f"ratio: expected rows of adapted layers beside a dense one (over_dense), got none of {len(rows)}"
        )
    drawn.sort(key=plot_rows.size)
    groups = plot_rows.by(drawn, "method", "K", "N")
    varying = plot_rows.varying(groups.values())
    variants = [plot_rows.variant(row, varying) for row in drawn]
    styles = plot_rows.assigned("ratio: lines of a provider", variants, LINES, varying)
    colours = _colours("ratio", drawn)
    keys = [(name, variant) for name in colours for variant in styles]
    figure, axes = _panels("ratio", groups, 4.2)
    for axis, group in zip(axes, groups.values(), strict=True):
        for name, variant in keys:
            key = name, variant
            line = [row for row in group if (row["provider"], plot_rows.variant(row, varying)) == key]
            if line:
                _draw(axis, line, ", ".join((name, *variant)), colours[name], styles[variant])
        unit = axis.axhline(1, color=DENSE, linewidth=1.5)
        axis.set(xscale="log", yscale="log", xlabel="tokens M")
        axis.set_title(_title(group, varying), fontsize=10)
        _plain(axis.yaxis, [float(row["over_dense"]) for row in group])
        ticks = sorted({int(row["M"]) for row in group})
        axis.set_xticks(ticks, [str(m) for m in ticks], rotation=45 if len(ticks) > 6 else 0)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[::COLUMNS]:
        axis.set_ylabel(f"{drawn[0]['measure']} over the frozen dense layer", fontsize=9)
    labels = [", ".join((name, *variant)) for name, variant in keys]
    _legend(figure, axes, labels, **{"frozen dense layer": unit})
    return figure


def _draw(axis: Any, line: list[Row], label: str, colour: str, style: str) -> None:
    """A provider over M: p50 with a band of p20 to p80, faint where the block at either end was noisy."""
    M = [int(row["M"]) for row in line]
    middle = [float(row["over_dense"]) for row in line]
    below, above = (
        [float(row["over_dense"]) * float(row[p]) / float(row["p50"]) for row in line] for p in ("p20", "p80")
    )
    axis.plot([], [], style, color=colour, label=label, linewidth=1.5)
    for alpha, run in itertools.groupby(range(len(line) - 1), lambda i: min(map(_alpha, line[i : i + 2]))):
        first, *rest = run
        part = slice(first, first + len(rest) + 2)
        axis.plot(M[part], middle[part], style, color=colour, alpha=alpha, linewidth=1.5)
        axis.fill_between(
            M[part], below[part], above[part], color=colour, alpha=BAND_ALPHA * alpha, linewidth=0
        )
    for row, m, value in zip(line, M, middle, strict=True):
        marker = METHOD_MARKERS[row["method"]]
        axis.plot([m], [value], marker, color=colour, alpha=_alpha(row), markersize=5, label=f"_{label}")


def _plain(axis: Any, values: Sequence[float]) -> None:
    """Round numbers on a logarithmic axis, as many as the values need."""
    steps = [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500]
    low, high = min(*values, 1.0) / 1.3, max(*values, 1.0) * 1.3
    ticks = [step for step in steps if low <= step <= high]
    axis.axes.set_ylim(low, high)
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def memory(rows: list[Row]) -> Any:
    """What a step saves for backward and allocates at most, axes for each case.

    Raises:
        ValueError: the rows have no memory, or more bars than can be read.
    """
    known = [row for row in rows if row["peak_bytes"] and row["saved_bytes"]]
    if not known:
        raise ValueError(f"memory: expected --measure {STEP}, which it is known of, got {rows[0]['measure']}")
    known.sort(key=lambda row: (plot_rows.order(row["provider"]), plot_rows.size(row)))
    groups = plot_rows.by(known, "method", "K", "N", "M")
    varying = plot_rows.varying(groups.values())
    colours = _colours("memory", known)
    charts = []
    for group in groups.values():
        bars = {", ".join((row["provider"], *plot_rows.variant(row, varying))): row for row in group}
        plot_rows.assigned("memory: bars of a case", bars, range(BARS), varying)
        charts.append(bars)
    figure, axes = _panels("memory", groups, 1.6 + 0.25 * max(map(len, charts)))
    for axis, bars in zip(axes, charts, strict=True):
        y, group = range(len(bars) - 1, -1, -1), list(bars.values())
        peak = [int(row["peak_bytes"]) / 2**20 for row in group]
        saved = [int(row["saved_bytes"]) / 2**20 for row in group]
        colour = [colours[row["provider"]] for row in group]
        axis.barh(y, peak, color=colour, alpha=0.5)
        axis.barh(y, saved, color=colour, height=0.4)
        for i, total, kept in zip(y, peak, saved, strict=True):
            axis.annotate(f" {total:.3g} ({kept:.2g})", (total, i), va="center", fontsize=8)
        axis.set_yticks(y, list(bars))
        axis.set(xlabel="MiB: peak (saved for backward)")
        axis.set_title(_title(group, varying, f"M = {group[0]['M']}, "), fontsize=10)
        axis.set_xlim(0, 1.3 * max(peak))
        axis.grid(alpha=0.3, axis="x")
    return figure


def roofline(rows: list[Row]) -> Any:
    """What was reached of the device's best over the intensity of the work, FLOPs for each byte.

    Raises:
        ValueError: the peak of the device is not known, or there are more kinds of points than markers.
    """
    drawn = [row for row in rows if row["roofline_percent"]]
    if not drawn:
        raise ValueError("roofline: expected rows of a device whose peak is known, got none")
    drawn.sort(key=lambda row: (is_dense(row["provider"]), *plot_rows.size(row)))
    groups = plot_rows.by(drawn, "method")
    varying = plot_rows.varying(groups.values())
    colours = _colours("roofline", drawn)

    def kind(row: Row) -> tuple[str, ...]:
        return (*(() if is_dense(row["provider"]) else (row["method"],)), *plot_rows.variant(row, varying))

    markers = plot_rows.assigned("roofline: points", map(kind, drawn), MARKERS, ("method", *varying))
    figure, (axis,) = canvas(1, 4.6)
    labels = []
    for name in colours:
        for found, marker in markers.items():
            alike = [row for row in drawn if (row["provider"], kind(row)) == (name, found)]
            if not alike:
                continue
            intensity = [1e3 * float(row["tflop_per_s"]) / float(row["gb_per_s"]) for row in alike]
            reached = [float(row["roofline_percent"]) for row in alike]
            alpha = [_alpha(row) for row in alike]
            labels.append(", ".join((name, *found)))
            points = axis.scatter(intensity, reached, s=22, color=colours[name], marker=marker, alpha=alpha)
            points.set_label(labels[-1])
            if name == "dense-float32":
                points.set_facecolor("none")
    axis.axhline(100, color=DENSE, linewidth=1)
    axis.set(xscale="log", xlabel="FLOPs per byte", ylabel=f"{drawn[0]['measure']}, % of the roofline")
    titles = [f"{method}: {_settings(group, varying)}" for (method,), group in groups.items()]
    axis.set_title("\n".join(titles), fontsize=9)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    _legend(figure, [axis], labels)
    return figure


KINDS: dict[str, Callable[[list[Row]], Any]] = {"ratio": ratio, "memory": memory, "roofline": roofline}


# ----------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    """Draws a figure. Raises ValueError, OSError or ImportError, whose message names what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("kind", choices=KINDS)
    add("--csv", type=Path, default=RESULTS, help="of peft-fast bench (default: %(default)s)")
    add("--out", type=Path, required=True, help="PNG, SVG or PDF")
    add("--layer", help="as in bench/registry.py, such as Llama-3-8B.q (default: all in the file)")
    add("--method", nargs="+", choices=METHOD_MARKERS, help="default: all in the file")
    add("--dtype", help="default: all in the file")
    add("--rows", type=int, nargs="+", metavar="M", help="default: all in the file")
    add("--where", nargs="+", default=[], action="extend", metavar="COLUMN=VALUE",
        help='of any column of the file, as in "R=16,64 threads=2"; "*" stands for anything')  # fmt: skip
    add("--measure", choices=MEASURES, default=STEP, help="default: %(default)s; memory is known of that")
    args = parser.parse_args(argv)
    rows = plot_rows.chosen(read(args.csv), args)
    figure = KINDS[args.kind](rows)
    figure.suptitle(_heading(args.kind, rows), fontsize=8, color="0.4")
    figure.savefig(args.out, dpi=120)


def command(argv: Sequence[str] | None = None) -> int:
    """As `main`, with errors as a line on stderr; returns the exit code, 0 or 2."""
    try:
        main(argv)
    except (ValueError, OSError, ImportError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
