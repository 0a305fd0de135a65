"""One page about a run of bench/gpu.py, from the files in its folder: DIR/report.md, and DIR/ratio.png.

Whatever is there is told, and what is not: sections that failed, ran out of time or were not started,
packages that are missing. Ratios are to the frozen dense layer, or model, of the same run; of rows that a
folder holds twice, the later counts. The last thing printed is a short table.

    python bench/report.py --out DIR
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __package__:
    from peft_fast.bench.environment import installed
    from peft_fast.bench.gpu import ALONE, TESTS
else:  # before peft_fast is installed
    from environment import installed
    from gpu import ALONE, TESTS

Table = list[dict[str, str]]
PEERS = ("peft", "unsloth")


class Goal(NamedTuple):
    """A bound on ours over the frozen layer, or with `over` on that peer over ours, at training size."""

    what: str
    method: str
    shapes: tuple[tuple[int, int], ...]
    bound: float
    over: str = ""


WIDE = ((4096, 14336), (14336, 4096))
TRAINING_ROWS = 4096
GOALS = (
    Goal("QLoRA over the frozen layer", "lora", ((4096, 4096),), 1.10),
    Goal("QDoRA over the frozen layer", "dora", ((4096, 4096),), 1.10),
    Goal("QLoRA over the frozen layer", "lora", WIDE, 1.05),
    Goal("QDoRA over the frozen layer", "dora", WIDE, 1.05),
    Goal("PEFT LoRA over ours", "lora", ((4096, 4096), *WIDE), 1.3, "peft"),
    Goal("PEFT DoRA over ours", "dora", ((4096, 4096), *WIDE), 2.5, "peft"),
    Goal("Unsloth LoRA over ours", "lora", ((4096, 4096), *WIDE), 1.0, "unsloth"),
)


def read(path: Path) -> Table:
    """The rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> Any:
    """The content of a JSON file; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown, aligned so that it can be read as text."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


# ---------------------------------------------------------------------------------------------- lora_linear


class Layers:
    """Rows of bench/lora_linear.py in half precision, or of the dtype there is, by who ran and what."""

    def __init__(self, rows: Table) -> None:
        halves = [row for row in rows if row["dtype"] == "bfloat16" or row["provider"] == "dense"]
        rows = halves if any(row["provider"] == "ours" for row in halves) else rows
        self.shapes = list(dict.fromkeys((int(row["K"]), int(row["N"])) for row in rows))
        self.rows = sorted({int(row["M"]) for row in rows})
        adapted = [row for row in rows if row["provider"] != "dense"]
        self.by = {
            (row["provider"], row["method"], row["backend"], int(row["K"]), int(row["N"]), int(row["M"])): row
            for row in adapted
        }
        # "auto" is asked for first, and recorded as the backend that it stands for.
        self.auto = next((row["backend"] for row in adapted if row["provider"] == "ours"), "")
        self.providers = list(dict.fromkeys(key[:3] for key in self.by if key[2] in ("", self.auto)))

    def value(self, who: tuple[str, str, str], shape: tuple[int, int], M: int, column: str) -> float | None:
        row = self.by.get((*who, *shape, M))
        return float(row[column]) if row and row[column] else None

    def ours(self, method: str) -> tuple[str, str, str]:
        return "ours", method, self.auto

    def ratios(self) -> list[str]:
        rows = []
        for shape in self.shapes:
            for who in sorted(self.providers, key=lambda who: (who[1] != "lora", who[0] != "ours")):
                values = [self.value(who, shape, M, "ratio") for M in self.rows]
                if any(values):
                    cells = ["" if value is None else f"{value:.2f}" for value in values]
                    rows.append([f"{shape[0]} → {shape[1]}", " ".join(who[:2]), *cells])
        return table(["K → N", "", *(f"M={M}" for M in self.rows)], rows)

    def memory(self) -> list[str]:
        """The peak MiB at the largest M."""
        rows = []
        for shape in self.shapes:
            sizes = [(who, self.value(who, shape, self.rows[-1], "peak_bytes")) for who in self.providers]
            cells = [f"{' '.join(who[:2])} {size / 2**20:.1f}" for who, size in sizes if size is not None]
            rows.append([f"{shape[0]} → {shape[1]}", self.rows[-1], ", ".join(cells)])
        return table(["K → N", "M", "peak MiB"], rows)

    def winners(self, method: str) -> list[str]:
        """The fastest strategy of each direction, with its time as a share of that which was chosen."""
        names = [key[2] for key in self.by if key[2].startswith(("triton-", "cuda-"))]
        rows = []
        for shape in self.shapes:
            for direction in ("forward", "backward"):
                cells = []
                for M in self.rows:
                    times = {name: self.value(("ours", method, name), shape, M, direction) for name in names}
                    known = {name: time for name, time in times.items() if time is not None}
                    chosen = self.value(self.ours(method), shape, M, direction)
                    best = min(known, key=lambda name: known[name], default=None)
                    text = "" if best is None else best.removeprefix("triton-").removeprefix("cuda-")
                    cells.append(f"{text} {known[best] / chosen:.2f}" if best and chosen else text)
                rows.append([f"{shape[0]} → {shape[1]}", direction, *cells])
        return table(["K → N", method, *(f"M={M}" for M in self.rows)], rows) if names else []

    def goals(self) -> list[list[str]]:
        """Of each goal that was measured, the worst value beside its bound."""
        rows = []
        for goal in GOALS:
            found = []
            for shape in goal.shapes:
                for M in (M for M in self.rows if M >= TRAINING_ROWS):
                    ours = self.value(self.ours(goal.method), shape, M, "ratio")
                    peer = self.value((goal.over, goal.method, ""), shape, M, "ratio") if goal.over else 1.0
                    if ours and peer:
                        found.append(peer / ours if goal.over else ours)
            if found:
                worst = min(found) if goal.over else max(found)
                met = worst >= goal.bound if goal.over else worst <= goal.bound
                sign = "≥" if goal.over else "≤"
                where = ", ".join(f"{K}→{N}" for K, N in goal.shapes)
                what = f"{goal.what}, {where}, M ≥ {TRAINING_ROWS}"
                rows.append([what, f"{sign} {goal.bound:.2f}", f"{worst:.2f}", "yes" if met else "no"])
        return rows

    def plot(self, path: Path) -> bool:
        """The ratios over M, a field for each shape; False where matplotlib is missing."""
        try:
            figure_module = importlib.import_module("matplotlib.figure")
        except ImportError:
            return False
        figure = figure_module.Figure(figsize=(5 * len(self.shapes), 4), layout="constrained")
        fields = figure.subplots(1, len(self.shapes), sharey=True, squeeze=False)[0]
        for field, shape in zip(fields, self.shapes, strict=True):
            for who in self.providers:
                points = [(M, self.value(who, shape, M, "ratio")) for M in self.rows]
                known = [(M, ratio) for M, ratio in points if ratio is not None]
                field.plot(*zip(*known, strict=True), marker="o", label=" ".join(who[:2])) if known else None
            field.axhline(1, color="gray", linewidth=1)
            field.set(xscale="log", yscale="log", xlabel="tokens M", title=f"{shape[0]} → {shape[1]}")
            field.grid(alpha=0.3)
        fields[0].set_ylabel("forward + backward over the frozen dense layer")
        fields[0].legend()
        figure.savefig(path, dpi=120)
        return True


# ------------------------------------------------------------------------------------------------- the page


def tests(path: Path) -> str:
    """What pytest counted, and what was not run."""
    if not path.exists():
        return "not run"
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except ElementTree.ParseError as error:
        return f"{path.name} is unfinished ({error})"
    names = ("tests", "failures", "errors", "skipped")
    ran, *others = (sum(int(suite.get(name, 0)) for suite in suites) for name in names)
    counts = ", ".join(f"{count} {name}" for count, name in zip(others, names[1:], strict=True))
    left_out = [] if installed("bitsandbytes") else [name for name in TESTS if name not in ALONE]
    why = f"; left out, for bitsandbytes is not installed: {', '.join(left_out)}" if left_out else ""
    return f"{ran - sum(others)} passed, {counts}{why}"


def sanity(content: Any) -> list[str]:
    """By dtype the backends that bench/sanity.py found sound, and each that was wrong; nothing of None."""
    if content is None:
        return []
    found = [f"- sound in {dtype}: {', '.join(names) or 'none'}" for dtype, names in content["sound"].items()]
    wrong = dict.fromkeys((cell["backend"], cell["dtype"]) for cell in content["cells"] if cell["wrong"])
    return [*found, *(f"- WRONG in {dtype}: {backend}" for backend, dtype in wrong)]


def liger() -> str:
    """Whether Liger-Kernel, if it is there, has something to compare with: an adapted linear layer."""
    if not installed("liger_kernel"):
        return "Liger-Kernel: not installed"
    try:
        names = [name for name in dir(importlib.import_module("liger_kernel.ops")) if "lora" in name.lower()]
    except Exception as error:  # whatever a package does when it is imported
        return f"Liger-Kernel: {type(error).__name__}: {error}"
    return f"Liger-Kernel: operations with an adapter in liger_kernel.ops: {', '.join(names) or 'none'}"


def models(rows: Table) -> list[str]:
    """The rows of bench/end_to_end.py."""
    latest = {tuple(row[name] for name in ("width", "layers", "checkpointing", "method", "provider")): row
              for row in rows}  # fmt: skip
    cells = [
        [
            f"{row['layers']} layers of {row['width']}, checkpointing {row['checkpointing']}",
            f"{row['method']} {row['provider']}".strip(), f"{float(row['p50']):.1f}",
            f"{float(row['tokens_per_second']):.0f}", f"{float(row['ratio']):.3f}",
            f"{int(row['peak_bytes']) / 2**20:.0f}" if row["peak_bytes"] else "", row["loss_difference"],
        ]
        for row in latest.values()
    ]  # fmt: skip
    return table(["model", "", "ms a step", "tokens/s", "ratio", "peak MiB", "loss differs by"], cells)


def edits(rows: Table) -> list[str]:
    """The rows of bench/loreft.py."""
    latest = {(row["width"], row["quant"], row["provider"]): row for row in rows}
    cells = [[*key, f"{float(row['p50']):.2f}", f"{float(row['ratio']):.3f}"] for key, row in latest.items()]
    return table(["width", "base", "provider", "ms", "ratio"], cells)


def page(out: Path) -> tuple[list[str], list[str]]:
    """The lines of the report, and of the short table."""
    sections, info = load(out / "sections.json") or [], load(out / "info.json") or {}
    rows = read(out / "lora_linear.csv")
    layers = Layers(rows) if rows else None
    devices = info.get("devices", {})
    packages = (f"{name} {version or 'not installed'}" for name, version in info.get("versions", {}).items())
    outcomes = [
        [s["name"], s["status"], f"{s['seconds']:.0f}", s["detail"].replace("|", "/")[:100]] for s in sections
    ]
    status = table(["section", "result", "seconds", ""], outcomes)
    goals = layers.goals() if layers else []
    aims = table(["goal", "bound", "measured", "met"], goals) if goals else []
    lines = ["# GPU report", "", *(f"- {name}: {what}" for name, what in devices.items())]
    lines += [f"- {', '.join(packages) or 'versions: the self-test has not run'}", f"- {liger()}"]
    lines += [f"- tests: {tests(out / 'tests.xml')}", *sanity(load(out / "sanity.json")), "", *status]
    if aims:
        lines += ["", "## Goals", "", *aims]
    if layers:
        title = f"Forward + backward over the frozen dense layer (nested NF4, R = {rows[-1]['R']})"
        lines += ["", f"## {title}", "", *layers.ratios()]
        if layers.plot(out / "ratio.png"):
            lines += ["", "![ratio over M](ratio.png)"]
        else:
            lines += ["", "matplotlib: not installed, no plot"]
        for method in ("lora", "dora"):
            if won := layers.winners(method):
                title = f"Fastest strategy, {method}, and its time over that of `{layers.auto}`:"
                lines += ["", title, "", *won]
        lines += ["", "## Memory of a step beyond layer and operands", "", *layers.memory()]
    if found := read(out / "end_to_end.csv"):
        lines += ["", "## A training step of a Llama-shaped model, over the frozen model", "", *models(found)]
    if found := read(out / "loreft.csv"):
        lines += ["", "## LoReFT over the frozen model", "", *edits(found)]
    if found := read(out / "dora_norm.csv"):
        last = found[-1]
        sizes = f"K={last['K']} N={last['N']}"
        lines += ["", f"DoRA's norm on the CPU, {sizes}: {float(last['cold_ms']):.2f} ms, "
                  f"PEFT's {float(last['peft_ms']):.2f} ms"]  # fmt: skip
    short = [*status, *(["", *aims] if aims else []), *(["", *layers.ratios()] if layers else [])]
    return lines, short


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of a run of bench/gpu.py")
    out = parser.parse_args(argv).out
    lines, short = page(out)
    (out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(short))
    print(f"\n{out / 'report.md'}")


if __name__ == "__main__":
    main()
