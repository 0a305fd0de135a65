"""The rows of a CSV file of `peft-fast bench` that a figure is drawn from, and what tells them apart.

Of rows that the file holds twice, the newest counts: that of the latest date, or the last in the file.
A setting that is more than one among the rows of one pair of axes varies: it is part of their labels.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from peft_fast.bench.providers import PROVIDERS, is_dense

Row = dict[str, str]
Name = TypeVar("Name", bound="str | tuple[str, ...]")
Style = TypeVar("Style")

MACHINE = ("device", "threads", "cold")
SETTINGS = ("format", "R", "dtype", "dropout", *MACHINE)
IDENTITY = ("op", "method", "K", "N", "M", *SETTINGS, "provider", "measure")
FIGURES = ("p20", "p50", "p80", "over_dense", "gb_per_s", "tflop_per_s", "roofline_percent")
NEEDED = (*IDENTITY, *FIGURES, "layers", "noisy", "date", "commit", "saved_bytes", "peak_bytes")
ALIASES = {"rank": "R", "rows": "M"}


# ------------------------------------------------------------------------------------------------- the rows


def read(path: Path) -> list[Row]:
    """The rows with figures; of those of one identity the newest, and on stderr how many others there were.

    Raises:
        ValueError: the file has other columns, or no figures.
        OSError: it cannot be read.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        if missing := set(NEEDED) - set(reader.fieldnames or ()):
            raise ValueError(f"--csv: expected a file of `peft-fast bench`, {path} has no {sorted(missing)}")
    timed = [row for row in rows if row["p50"]]
    if not timed:
        raise ValueError(f"--csv: expected rows with figures, got none in {path}")
    ordered = sorted(timed, key=lambda row: row["date"])  # which keeps the order of the file within a date
    newest = list({tuple(row[name] for name in IDENTITY): row for row in ordered}.values())
    if older := len(timed) - len(newest):
        print(f"{path}: left out {older} rows of earlier runs, the newest of each counts", file=sys.stderr)
    return newest


def chosen(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """The rows that the options name. Raises ValueError where there are none."""
    wanted = [_condition(text, rows[0]) for text in args.where]
    found = [
        row
        for row in rows
        if (args.layer is None or args.layer in row["layers"].split())
        and (args.method is None or row["method"] in args.method)
        and (args.dtype is None or row["dtype"] == args.dtype)
        and (args.rows is None or int(row["M"]) in args.rows)
        and all(any(_is(row[name], value) for value in values) for name, values in wanted)
        and row["measure"] == args.measure
    ]
    if not found:
        raise ValueError(f"{args.csv}: expected rows for the options, got none of {len(rows)}")
    return found


def _condition(text: str, row: Row) -> tuple[str, list[str]]:
    """A column and the values it may have, of "R=16,64"."""
    name, _, values = text.partition("=")
    name = ALIASES.get(name, name)
    if name not in row or not values:
        raise ValueError(f"--where: expected COLUMN=VALUE with one of {[*row, *ALIASES]}, got {text!r}")
    return name, values.split(",")


def _is(value: str, wanted: str) -> bool:
    """Equal as text or as a number, or matched by a pattern with "*"."""
    try:
        return float(value) == float(wanted)
    except ValueError:
        return value == wanted or fnmatch.fnmatchcase(value, wanted)


# --------------------------------------------------------------------------------- what a figure tells apart


def by(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(found)


def varying(groups: Iterable[list[Row]]) -> tuple[str, ...]:
    """The settings that are more than one within a group."""
    groups = list(groups)
    return tuple(name for name in SETTINGS if any(len({row[name] for row in group}) > 1 for group in groups))


def told(name: str, value: str) -> str:
    match name:
        case "R":
            return f"R={value}"
        case "threads":
            return f"{value} threads" if value != "1" else "1 thread"
        case "dropout":
            return f"dropout {float(value):g}"
        case "cold":
            return "cold caches" if value == "True" else "warm caches"
        case _:
            return value


def variant(row: Row, varying: Sequence[str]) -> tuple[str, ...]:
    """A row's values of what varies; the frozen layer knows those of the machine alone."""
    names = [name for name in varying if name in MACHINE or not is_dense(row["provider"])]
    return tuple(told(name, row[name]) for name in names)


def assigned(
    kind: str, names: Iterable[Name], styles: Sequence[Style], columns: Sequence[str]
) -> dict[Name, Style]:
    """A style for each name, in order. Raises ValueError where there are more names, told by `columns`."""
    found = list(dict.fromkeys(names))
    if len(found) > len(styles):
        told = ["/".join(name) if isinstance(name, tuple) else name for name in found]
        raise ValueError(
            f"{kind}: expected at most {len(styles)} that can be told apart by {' and '.join(columns)}, got "
            f"{len(found)} ({', '.join(told)}): choose with --where"
        )
    return dict(zip(found, styles, strict=False))


def order(name: str) -> tuple[int, str]:
    """Ours first, then as in the table of providers, then named backends of ours."""
    names = ["ours", *PROVIDERS]
    return (names.index(name) if name in names else len(names)), name


def size(row: Row) -> tuple[float, ...]:
    """Orders variants as numbers."""
    return float(row["R"]), float(row["dropout"]), float(row["threads"]), float(row["M"])
