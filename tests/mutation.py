"""Does a wrong formula fail a test? Changes one term or sign at a time and runs the tests that should notice.

    python tests/mutation.py [--module reference ...] [--csv FILE]

Every sum, difference, product, quotient and minus sign of the modules in `SUITES` is mutated, a sign flipped,
a term or a factor dropped, and every tuple that is returned has one element dropped or two swapped. A mutant
is caught by the first test that fails; one that passes them all survived; of one whose tests do not end it is
not known, so it is counted apart. Those in `EQUIVALENT` change no result, for the reason that stands there;
when a test fails for one of them, that reason is wrong. Exit code 1 where another one survives.

Mutants live in memory: a forked process compiles the changed module in place of the one on disk.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import csv
import importlib.abc
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
TIMEOUT = 300
"""Seconds after which the tests of a mutant are ended."""
ENDLESS = f"no end within {TIMEOUT} s"

OPS = ("test_ops.py", "test_out_scale.py", "test_loreft.py", "test_second_order.py", "test_dora_norms.py")
SUITES: dict[str, tuple[str, ...]] = {
    "reference": (*OPS, "-k", "reference or order"),
    "autograd": (*OPS, "-k", "reference or order or norm"),
    "dora": ("test_dora_norms.py", "test_dora.py"),
    "orthonormal": ("test_orthonormal.py",),
    "methods": ("test_methods.py", "test_adapter_linear.py"),
    "formats": ("test_formats.py", "test_dora_norms.py"),
}
"""Modules of peft_fast, and the arguments of pytest for the tests that hold their formulas."""

TWO = "what comes here has two dimensions"
ONE = "it is one number"
HALVES = "of terms that cancel each is about half of the sum: 2 ** -5 of which is no edge"
SLICES = "how many rows are decoded at a time, and in which of two ways that give the same values"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("reference", "pack_mask", "keep.shape[-1]  →  keep.shape[1]"): TWO,
    (
        "reference",
        "pack_mask",
        "F.pad(keep.to(torch.uint8), (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8))  →  "
        "F.pad(keep.to(torch.uint8), (0, -keep.shape[-1] % 8)).unflatten(1, (-1, 8))",
    ): TWO,
    ("reference", "_dropped", "x.shape[-1]  →  x.shape[1]"): TWO,
    ("formats", "decode_absmax", "w.nested_offset.view(-1)  →  w.nested_offset.view(1)"): ONE,
    ("formats", "_decode_4bit_rows", "w.nested_offset.view(-1)  →  w.nested_offset.view(1)"): ONE,
    ("dora", "lora_weight_norm", "norms_squared + update  →  norms_squared"): HALVES,
    ("dora", "lora_weight_norm", "norms_squared + update  →  update"): HALVES,
    ("dora", "_row_norms_squared_op", "CHUNK // K // step * step  →  step"): SLICES,
    ("dora", "_row_norms_squared_op", "rows * K  →  rows"): SLICES,
    ("dora", "_row_norms_squared_op", "rows * K  →  K"): SLICES,
    ("dora", "_row_norms_squared_op", "4 * CHUNK  →  CHUNK"): SLICES,
}
"""(module, function, mutation): why it changes nothing that a user could see."""


class Mutant(NamedTuple):
    module: str
    line: int
    function: str
    mutation: str
    tree: ast.Module

    @property
    def key(self) -> tuple[str, str, str]:
        return self.module, self.function, self.mutation


class Outcome(NamedTuple):
    module: str
    line: int
    function: str
    mutation: str
    outcome: str
    """ "caught", "endless", "survived" or "equivalent"."""
    by: str
    """The first test that failed, or the reason why none did."""
    seconds: float


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    tree = ast.parse((ROOT / "peft_fast" / f"{module}.py").read_text(encoding="utf-8"))
    for function, path, node in _expressions(tree, "", ()):
        for replacement in _replacements(node):
            changed = _replaced(tree, path, replacement)
            around = path[:-1] if isinstance(node, ast.UnaryOp) else path  # -1 alone says little
            mutation = f"{ast.unparse(_at(tree, around))}  →  {ast.unparse(_at(changed, around))}"
            yield Mutant(module, node.lineno, function, mutation, changed)


Step = tuple[str, int | None]


def _expressions(
    node: ast.AST, function: str, path: tuple[Step, ...]
) -> Iterator[tuple[str, tuple[Step, ...], ast.AST]]:
    """The nodes that can be mutated, with the function around and the way to them; no error messages."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.arguments | ast.AnnAssign):
        return
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    if function and isinstance(node, ast.BinOp | ast.UnaryOp | ast.AugAssign):
        yield function, path, node
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        yield function, (*path, ("value", None)), node.value
    for field, value in ast.iter_fields(node):
        if field in ("decorator_list", "returns", "annotation"):
            continue
        if isinstance(value, ast.AST):
            yield from _expressions(value, function, (*path, (field, None)))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, ast.AST):
                    yield from _expressions(item, function, (*path, (field, i)))


def _replacements(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.AugAssign):
        return [ast.copy_location(ast.Pass(), node)]
    if isinstance(node, ast.UnaryOp):
        return [node.operand] if isinstance(node.op, ast.USub) else []
    if isinstance(node, ast.Tuple):
        return list(_changed_tuples(node))
    assert isinstance(node, ast.BinOp)
    if isinstance(node.op, ast.Mult | ast.Div):
        return [node.left, node.right] if isinstance(node.op, ast.Mult) else [node.left]
    if isinstance(node.op, ast.Add | ast.Sub):
        flipped = copy.copy(node)
        flipped.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        return [flipped, node.left, node.right]
    return []


def _changed_tuples(node: ast.Tuple) -> Iterator[ast.Tuple]:
    for i, element in enumerate(node.elts):
        if isinstance(element, ast.Constant | ast.Starred):
            continue
        dropped = [*node.elts[:i], ast.Constant(None), *node.elts[i + 1 :]]
        yield ast.copy_location(ast.Tuple(dropped, ast.Load()), node)
        if i + 1 < len(node.elts) and not isinstance(node.elts[i + 1], ast.Starred):
            swapped = [*node.elts[:i], node.elts[i + 1], element, *node.elts[i + 2 :]]
            yield ast.copy_location(ast.Tuple(swapped, ast.Load()), node)


def _replaced(tree: ast.Module, path: tuple[Step, ...], replacement: ast.AST) -> ast.Module:
    changed = copy.deepcopy(tree)
    place = _at(changed, path[:-1])
    field, index = path[-1]
    if index is None:
        setattr(place, field, copy.deepcopy(replacement))
    else:
        getattr(place, field)[index] = copy.deepcopy(replacement)
    return ast.fix_missing_locations(changed)


def _at(tree: ast.AST, path: tuple[Step, ...]) -> ast.AST:
    for field, index in path:
        tree = getattr(tree, field) if index is None else getattr(tree, field)[index]
    return tree


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the package from a tree."""

    def __init__(self, mutant: Mutant) -> None:
        self.name, self.tree = f"peft_fast.{mutant.module}", mutant.tree
        self.file = str(ROOT / "peft_fast" / f"{mutant.module}.py")

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.file, loader=self)

    def exec_module(self, module) -> None:
        exec(compile(self.tree, self.file, "exec"), module.__dict__)


class _FirstFailure:
    """A pytest plugin."""

    failed: str | None = None

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report) -> None:
        self.pytest_runtest_logreport(report)


def _run(mutant: Mutant | None, arguments: tuple[str, ...], sender) -> None:
    import pytest

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if mutant is not None:
        sys.meta_path.insert(0, _Importer(mutant))
    os.chdir(ROOT)
    failure = _FirstFailure()
    files = [str(TESTS / a) if a.endswith(".py") else a for a in arguments]
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[failure])
    sender.send(None if code == 0 else failure.failed or f"pytest ended with {code!s}")
    sender.close()
    os._exit(0)


def caught_by(mutant: Mutant | None, arguments: tuple[str, ...]) -> str | None:
    """The first test that fails with `mutant` in place, None where all pass."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(mutant, arguments, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT):
            return ENDLESS
        return receiver.recv()
    except EOFError:
        return "the process died"
    finally:
        process.kill()
        process.join()


def judge(mutant: Mutant) -> Outcome:
    start = time.monotonic()
    test = caught_by(mutant, SUITES[mutant.module])
    reason = EQUIVALENT.get(mutant.key)
    if test is not None:
        outcome = "endless" if test == ENDLESS else "caught"
    else:
        outcome = "survived" if reason is None else "equivalent"
    by = test if test is not None else reason or ""
    return Outcome(*mutant[:4], outcome, by, round(time.monotonic() - start, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--module", action="append", choices=list(SUITES), help="repeatable; default all")
    parser.add_argument("--only", default="", help="mutants whose function or text contains this")
    parser.add_argument("--csv", type=Path, help="write every outcome to this file")
    options = parser.parse_args()
    _import_libraries()
    wrong, rows = 0, []
    for module in options.module or SUITES:
        if (failed := caught_by(None, SUITES[module])) is not None:
            raise SystemExit(f"{module}: expected tests that pass without a mutation, got {failed} failing")
        found = [m for m in mutants(module) if options.only in f"{m.function} {m.mutation}"]
        for mutant in found:
            row = judge(mutant)
            rows.append(row)
            unexpected = row.outcome == "survived" or (row.outcome == "caught" and mutant.key in EQUIVALENT)
            wrong += unexpected
            mark = "!!" if unexpected else "  "
            print(f"{mark} {row.outcome:10} {module}.py:{row.line} {row.mutation}  [{row.by}]", flush=True)
        counts = collections.Counter(row.outcome for row in rows if row.module == module)
        print(f"{module}: {len(found)} mutants, {dict(counts)}", flush=True)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Outcome._fields)
            writer.writerows(rows)
    return 1 if wrong else 0


def _import_libraries() -> None:
    """What every mutant's process would import first, but nothing of the package."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(TESTS))
    import bitsandbytes  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401


if __name__ == "__main__":
    raise SystemExit(main())
