"""How lora_linear is carried out for a problem on a device: the names, what each can run, and which one runs.

    splitk    up to SPLITK_ROWS rows: Ŵ decoded in the loop, the reduction split between programs
    fused     Ŵ decoded in the main loop of a Triton GEMM, the low-rank term as more steps of it
    split     Ŵ decoded once a call to a reused scratch [N, K], which the same GEMM reads
    library   the scratch of split; the low-rank term is written first, in the dtype of X, and the library's
              GEMM adds to it: in float16 that term alone must stay below 65504
    merge     scratch = out_scale ⊙ (Ŵ + s·B·A), rounded once; the library's GEMM is all that is left
    gemv      up to 8 rows of a 4-bit weight, by CUDA C++ (`peft_fast.cuda`, backend "cuda-gemv"), where built

Forward and backward are chosen apart: Z [M, R] fp32, all that one hands to the other, is the same for each.

`choose` reads `measured/<device>.json`, which bench/tune.py writes, and for devices, classes of problems and
sizes without a row near there `measured/default.json`, which bench/roofline.py predicts. A file is

    {"device": name, "source": "measured" | "predicted", "versions": {package: version}, "date": day or null,
     "rows": [{"direction": "forward" | "backward", "format": "packed" | "dense", "dtype": "half" | "fp32",
               "dropout": bool, "out_scale": bool, "K": int, "N": int, "R": int,
               "choices": [[up_to_M, name, ...], ..., [null, name, ...]]}, ...]}

A problem takes the nearest row of its class (the first five keys, exactly), by |log2| of K, N and R. There
the first choice with M ≤ up_to_M holds; of its names, fastest first, the first that may run runs, else the
first such of `FALLBACKS`. New files are seen after `clear_cache()`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from peft_fast import cuda, scratch

from . import target

NAMES = ("splitk", "fused", "split", "library", "merge")
GEMV = "gemv"  # of the names that a table may have, the one that is not carried out by Triton
GEMV_FORMATS = ("nf4", "fp4")
FALLBACKS = ("merge", "library", "split", "fused")  # the last runs everything
MAIN_LOOPS = ("fused", "split")
SPLITK_ROWS = 128
FAR = 4.0
MEASURED = Path(__file__).parent / "measured"
DEFAULT = "default.json"

Direction = Literal["forward", "backward"]


class Problem(NamedTuple):
    """X [M, K] in `dtype` on a weight [N, K] of `format`, with adapters of rank R."""

    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    format: str
    nested: bool
    dropout: bool
    out_scale: bool


def inadmissible(strategy: str, problem: Problem) -> str | None:
    """Why a strategy cannot run a problem, in either direction; None when it can.

    Raises:
        ValueError: no such strategy.
    """
    if strategy not in (GEMV, *NAMES):
        raise ValueError(f"strategy: expected one of {(GEMV, *NAMES)}, got {strategy!r}")
    if strategy == GEMV and problem.M > cuda.MOST_ROWS:
        return f"gemv takes up to {cuda.MOST_ROWS} rows, got {problem.M}"
    if strategy == GEMV and problem.format not in GEMV_FORMATS:
        return f"gemv decodes {' and '.join(GEMV_FORMATS)} weights, got a {problem.format} one"
    if strategy == "splitk" and problem.M > SPLITK_ROWS:
        return f"splitk takes up to {SPLITK_ROWS} rows, got {problem.M}"
    if strategy == "split" and problem.format != "dense":
        panels = len(scratch.panels(problem.N, problem.K * problem.dtype.itemsize))
        if panels > 1:
            return (
                f"split reads the whole weight from its scratch, which is limited to {scratch.limit()} bytes"
            )
    if strategy == "merge" and problem.format == "dense":
        return "merge would round the update to the grid of a dense weight, on which the weight itself lies"
    if strategy == "merge" and problem.dropout:
        return "merge multiplies X by Ŵ and by the update at once, which dropout tells apart"
    if strategy == "library" and problem.format == "dense" and problem.out_scale:
        return "library has no place for out_scale over a dense weight, which it reads as it is"
    return None


def merge_by_default(problem: Problem) -> bool:
    """Whether merge may run without being named.

    The merged weight is rounded to the dtype of X once, update included. That is as exact as rounding Ŵ alone
    where decoded weights do not lie on the grid of that dtype, so that the rounding does not swallow small
    updates: for nested NF4 (docs/merge.md).
    """
    half = problem.dtype in (torch.float16, torch.bfloat16)
    return problem.format == "nf4" and problem.nested and half and not problem.dropout


def may_run(strategy: str, problem: Problem) -> bool:
    """Whether `choose` may take a strategy for a problem."""
    return inadmissible(strategy, problem) is None and (strategy != "merge" or merge_by_default(problem))


def candidates(problem: Problem, gemv: bool = False) -> tuple[str, ...]:
    """The strategies that can run a problem and differ: over a dense weight, split is fused.

    `gemv` says whether that is among them; predictions leave it out, so that it runs where it was measured.
    """
    wanted = (GEMV, *NAMES) if gemv else NAMES
    names = (name for name in wanted if inadmissible(name, problem) is None)
    return tuple(name for name in names if not (name == "split" and problem.format == "dense"))


def backend_of(strategy: str) -> str:
    """The backend that runs a strategy by name."""
    return f"cuda-{strategy}" if strategy == GEMV else f"triton-{strategy}"


# --------------------------------------------------------------------------------------------------- tables


class Choice(NamedTuple):
    """Strategies for up to this many rows, fastest first; `up_to` is infinite in the last choice of a row."""

    up_to: float
    names: tuple[str, ...]


class Case(NamedTuple):
    """A class of problems: `format` "packed" or "dense", `dtype` "half" or "fp32"."""

    direction: str
    format: str
    dtype: str
    dropout: bool
    out_scale: bool


class Row(NamedTuple):
    """What is fastest at this K, N and R, by M."""

    case: Case
    K: int
    N: int
    R: int
    choices: tuple[Choice, ...]


class Table(NamedTuple):
    """A file of `measured/`; `date` is None in a predicted one."""

    device: str
    source: str
    versions: dict[str, Any]
    date: str | None
    rows: tuple[Row, ...]


def case_of(direction: str, problem: Problem) -> Case:
    return Case(
        direction,
        "dense" if problem.format == "dense" else "packed",
        "fp32" if problem.dtype == torch.float32 else "half",
        problem.dropout,
        problem.out_scale,
    )


def distance(row: Row, N: int, K: int, R: int) -> float:
    """|log2| from N, K and R together."""
    pairs = ((row.N, N), (row.K, K), (row.R, R))
    return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


def nearest(table: Table, case: Case, N: int, K: int, R: int) -> Row | None:
    """The row of this class with the least distance; None where the class has none."""
    rows = (row for row in table.rows if row.case == case)
    return min(rows, key=lambda row: distance(row, N, K, R), default=None)


def path_of(device: str) -> Path:
    """The file of a device with this name, such as "NVIDIA H200" → measured/nvidia-h200.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return MEASURED / f"{slug}.json"


# Of each key of a file and of a row, the types or the words that it may hold.
_KEYS: dict[str, tuple[type | str, ...]] = {
    "direction": ("forward", "backward"),
    "format": ("packed", "dense"),
    "dtype": ("half", "fp32"),
    "dropout": (bool,),
    "out_scale": (bool,),
    "K": (int,),
    "N": (int,),
    "R": (int,),
    "choices": (list,),
}
_HEAD: dict[str, tuple[type | str, ...]] = {
    "device": (str,),
    "source": ("measured", "predicted"),
    "versions": (dict,),
    "date": (str, type(None)),
    "rows": (list,),
}


def load(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: the file, the key, what was expected and what it holds.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    _check(f"{path}", content, _HEAD)
    rows = tuple(_row(f"{path}: rows[{i}]", row) for i, row in enumerate(content.pop("rows")))
    return Table(**content, rows=rows)


def _row(where: str, row: Any) -> Row:
    _check(where, row, _KEYS)
    for key, least in (("K", 1), ("N", 1), ("R", 0)):
        if row[key] < least:
            raise ValueError(f"{where}: {key}: expected at least {least}, got {row[key]}")
    choices: list[Choice] = []
    for i, choice in enumerate(row["choices"]):
        where_choice = f"{where}: choices[{i}]"
        if not isinstance(choice, list) or len(choice) < 2:
            raise ValueError(f"{where_choice}: expected [up_to_M, name, ...], got {choice!r}")
        up_to, *names = choice
        last = i == len(row["choices"]) - 1
        if last != (up_to is None) or not (last or type(up_to) is int):
            expected = "null, being the last" if last else "a number of rows"
            raise ValueError(f"{where_choice}: up_to_M: expected {expected}, got {up_to!r}")
        up_to = math.inf if last else up_to
        if up_to <= (choices[-1].up_to if choices else 0):
            raise ValueError(f"{where_choice}: up_to_M: expected more than before, from 1, got {up_to}")
        if not all(isinstance(name, str) and name in (GEMV, *NAMES) for name in names):
            raise ValueError(f"{where_choice}: expected names of {(GEMV, *NAMES)}, got {names}")
        choices.append(Choice(up_to, tuple(names)))
    if not choices:
        raise ValueError(f"{where}: choices: expected at least [null, name], got []")
    case = Case(*(row[field] for field in Case._fields))
    return Row(case, row["K"], row["N"], row["R"], tuple(choices))


def _check(where: str, value: Any, keys: dict[str, tuple[type | str, ...]]) -> None:
    """`value` is an object of exactly these keys, each of one of the types, or one of the words, named."""
    if not isinstance(value, dict) or value.keys() != keys.keys():
        got = list(value) if isinstance(value, dict) else value
        raise ValueError(f"{where}: expected the keys {list(keys)}, got {got}")
    for key, allowed in keys.items():
        # bool is a subclass of int, so types are compared as they are.
        if type(value[key]) not in allowed and not (type(value[key]) is str and value[key] in allowed):
            expected = [a if isinstance(a, str) else a.__name__ for a in allowed]
            raise ValueError(f"{where}: {key}: expected {' or '.join(expected)}, got {value[key]!r}")


def text(table: Table) -> str:
    """What `load` reads, one row a line, so that a change shows in review."""
    head = {key: value for key, value in table._asdict().items() if key != "rows"}
    rows = [
        {
            **row.case._asdict(), "K": row.K, "N": row.N, "R": row.R,
            "choices": [[None if c.up_to == math.inf else c.up_to, *c.names] for c in row.choices],
        }
        for row in table.rows
    ]  # fmt: skip
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n'


def fastest(times: Mapping[int, Mapping[str, float]]) -> tuple[Choice, ...]:
    """The choices of a row, from the time of each strategy at some numbers of rows M.

    A choice holds up to the last M measured before another is better. It names what is fastest, and after
    merge and gemv, which are not always allowed or built, what is fastest without them.
    """
    choices: list[Choice] = []
    for M, seconds in sorted(times.items()):
        ranked = sorted(seconds, key=lambda name: seconds[name])
        sure = next((i for i, name in enumerate(ranked) if name not in ("merge", GEMV)), len(ranked))
        names = tuple(ranked[: sure + 1])
        if choices and choices[-1].names == names:
            choices.pop()
        choices.append(Choice(M, names))
    return (*choices[:-1], choices[-1]._replace(up_to=math.inf))


# --------------------------------------------------------------------------------------------------- choice


def choose(direction: Direction, problem: Problem, device: torch.device) -> str:
    """The strategy that runs a problem on a device; cheap enough for every call.

    Raises:
        ValueError: the table of the device is not what `load` reads.
    """
    index = device.index
    if index is None and device.type == "cuda":
        index = torch.cuda.current_device()
    # Whatever the number of rows: lengths of sequences vary from call to call.
    for up_to, name in _ranges(direction, problem._replace(M=1), device.type, index, scratch.limit()):
        if up_to >= problem.M:
            return name
    raise AssertionError("the last range of a row has no end")


def clear_cache() -> None:
    """Forgets tables that were read and choices that were made."""
    _table.cache_clear()
    _ranges.cache_clear()


@functools.cache
def _table(path: Path) -> Table | None:
    return load(path) if path.exists() else None


@functools.cache
def _ranges(
    direction: str, problem: Problem, device_type: str, index: int | None, limit: int
) -> tuple[tuple[float, str], ...]:
    """(up to how many rows, strategy) for any M, in ascending order."""
    files = [MEASURED / DEFAULT]
    if device_type == "cuda":
        files.insert(0, path_of(torch.cuda.get_device_name(index)))
    tables = [table for table in map(_table, files) if table is not None]
    case = case_of(direction, problem)
    sizes = problem.N, problem.K, problem.R
    found = [nearest(table, case, *sizes) for table in tables]
    rows = [row for row in found if row is not None]
    row = rows[0] if rows else None
    # What was measured far away says less than what is predicted nearby.
    if len(rows) > 1 and distance(rows[0], *sizes) > distance(rows[1], *sizes) + FAR:
        row = rows[1]
    small = device_type == "cuda" and target.is_small(target.arch(torch.device(device_type, index)))
    gemv = cuda.unavailable(problem.format, device_type, problem.dtype, index) is None
    return ranges(row, problem, small, gemv)


def ranges(
    row: Row | None, problem: Problem, small: bool = False, gemv: bool = False
) -> tuple[tuple[float, str], ...]:
    """(up to how many rows, strategy) for a problem of any M, by a row, or without one by `FALLBACKS`.

    `small` architectures (`target.is_small`) take a main loop in Triton only where nothing else can run;
    `gemv` says whether that is there.
    """
    choices = row.choices if row is not None else (Choice(math.inf, ()),)
    limits = (cuda.MOST_ROWS, SPLITK_ROWS)
    ends = sorted({choice.up_to for choice in choices} | set(limits))
    found: list[tuple[float, str]] = []
    for end in ends:
        choice = next(choice for choice in choices if end <= choice.up_to)
        # Between two ends all M may run the same strategies: those of any M between stand for them.
        M = next((limit for limit in limits if end <= limit), SPLITK_ROWS + 1)
        at = problem._replace(M=M)
        names = (*choice.names, *FALLBACKS)
        if small:
            names = sorted(names, key=lambda name: name in MAIN_LOOPS)
        name = next(name for name in names if may_run(name, at) and (gemv or name != GEMV))
        if found and found[-1][1] == name:
            found.pop()
        found.append((end, name))
    return tuple(found)
