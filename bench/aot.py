"""What the compiler makes of every Triton kernel, on every target, without a GPU.

    python bench/aot.py            compile everything, write bench/results/aot.csv
    python bench/aot.py --check    compile everything, fail on a broken invariant or a changed table
    python bench/aot.py --check --only dx_kernel sm_90    the rows that contain all of these words
    python bench/aot.py --only dx_kernel                  the same, their rows of the table replaced

`aot_cases.py` lists the rows. Invariants of each (`broken`): no spills for want of registers, shared memory
within the device's limit, no 64-bit floating point, every product a tensor-core instruction, and where there
is no product no contraction, since a decode is a product and a sum of two roundings. Exempt from tensor cores
are the architectures for which Triton emits none (`target.has_matrix_instructions`; sm_75 is one).

The table is compared only when it was made with the running Triton version. Triton caches what it has
compiled, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from peft_fast.bench.aot_cases import TARGETS, Case, cases, source

# isort: split
import torch
import triton
from peft_fast.triton_kernels import target

TABLE = Path(__file__).parent / "results" / "aot.csv"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VERSIONS = f"triton {triton.__version__}, torch {torch.__version__.split('+')[0]}"
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b|\b(v_mfma|v_wmma)_")
DOUBLE = re.compile(r"\.f64\b|_f64\b")
CONTRACTION = re.compile(r"\bfma\.|\bv_(pk_)?(fma|fmac|mad|mac)_f32")
# Of the intermediate code of a GPU program, a product that no tensor core takes.
UNROLLED = re.compile(r"\btt\.dot\b.*-> tensor<[^>]*#blocked")
REPORT_SECONDS = 15
# For occupancy the assembler keeps registers few, and puts a handful of values aside, around the loops. What
# a full set of registers spills, or more bytes than these, is in the way.
SPARED, FULL = 32, 250


class Row(NamedTuple):
    kernel: str
    config: str
    target: str
    operands: str
    launch: str
    instruction: str
    registers: int
    spill_bytes: int
    shared_bytes: int


KEY = Row._fields.index("instruction")  # the fields before it name a row


class Products(NamedTuple):
    """Matrix products in a kernel's source, and how many of the compiled ones are multiply-adds."""

    total: int
    unrolled: int


# --------------------------------------------------------------------------------------------------- compile


def broken(row: Row, products: Products, assembly: str) -> list[str]:
    """The invariants that compiled code breaks."""
    reasons = []
    if row.spill_bytes > SPARED or (row.spill_bytes and row.registers >= FULL):
        reasons.append(f"{row.spill_bytes} bytes spilled with {row.registers} registers")
    limit = TARGETS[row.target].shared_kib * 1024
    if row.shared_bytes > limit:
        reasons.append(f"{row.shared_bytes} bytes of shared memory, the limit is {limit}")
    if products.total and target.has_matrix_instructions(row.target):
        if row.instruction == "-":
            reasons.append("no tensor-core instruction")
        if products.unrolled:
            reasons.append(f"{products.unrolled} products without tensor cores")
    if DOUBLE.search(assembly):
        reasons.append("64-bit floating point")
    if not products.total and CONTRACTION.search(assembly):
        reasons.append("a multiply-add of one rounding, where the format has two")
    return reasons


def compile_case(case: Case) -> tuple[Row | None, list[str]]:
    """The row of a case, and what is wrong with it; no row where the compiler refuses it."""
    src, options = source(case)
    compiler = TARGETS[case.target].compiler
    try:
        compiled = triton.compile(src, target=compiler, options=options)
    except Exception as error:  # the front end, the passes and the assembler each have their own kinds
        return None, [f"{case}: does not compile: {error}"]
    asm = compiled.asm
    assembly = asm["ptx" if compiler.backend == "cuda" else "amdgcn"]
    instructions = sorted({a or b for a, b in TENSOR_CORE.findall(assembly)})
    row = Row(
        case.kernel,
        case.config,
        case.target,
        case.operands,
        case.launch,
        "+".join(instructions) or "-",
        *_resources(asm, compiler.backend),
        compiled.metadata.shared,
    )
    products = Products(len(re.findall(r"\btt\.dot\b", asm["ttir"])), len(UNROLLED.findall(asm["ttgir"])))
    return row, [f"{case}: {reason}" for reason in broken(row, products, assembly)]


def _resources(asm: dict[str, Any], backend: str) -> tuple[int, int]:
    """(registers per thread, bytes of stack per thread) as the assembler reports them."""
    if backend == "hip":
        text = asm["amdgcn"]
        patterns = (r"\.vgpr_count:\s*(\d+)", r"\.private_segment_fixed_size:\s*(\d+)")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        patterns = (r"\bREG:(\d+)", r"\bSTACK:(\d+)")
    registers, stack = (int(re.search(pattern, text).group(1)) for pattern in patterns)
    return registers, stack


def compile_all(selected: list[Case]) -> tuple[list[Row], list[str]]:
    """Rows, sorted, and problems, of which each is printed when it is found."""
    rows, problems = [], []
    start = reported = time.monotonic()
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for n, done in enumerate(as_completed([pool.submit(compile_case, case) for case in selected]), 1):
            row, found = done.result()
            rows += [] if row is None else [row]
            problems += found
            print(*found, sep="\n", end="\n" if found else "", flush=True)
            now = time.monotonic()
            if now - reported > REPORT_SECONDS:
                reported = now
                print(f"{n} of {len(selected)}, {now - start:.0f} s", file=sys.stderr, flush=True)
    return sorted(rows), sorted(problems)


# ------------------------------------------------------------------------------------------------------ table


def read_table() -> tuple[str, list[Row]]:
    """(versions, rows) of the committed table."""
    with TABLE.open(newline="") as file:
        versions = file.readline().removeprefix("#").strip()
        lines = csv.reader(file)
        columns = tuple(next(lines))
        if columns != Row._fields:
            sys.exit(f"{TABLE}: expected the columns {Row._fields}, got {columns}: write it whole")
        return versions, [Row(*fields[: KEY + 1], *map(int, fields[KEY + 1 :])) for fields in lines]


def write_table(rows: list[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# {VERSIONS}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


def left_out(words: list[str]) -> list[Row]:
    """The rows of the committed table that do not contain all of `words`; none without words."""
    if not words:
        return []
    return [row for row in read_table()[1] if not all(word in " ".join(row[:KEY]) for word in words)]


def changes(rows: list[Row], complete: bool) -> list[str]:
    """How `rows` differ from the committed table; nothing when another Triton made it."""
    versions, table = read_table()
    if versions.split(",")[0] != VERSIONS.split(",")[0]:
        print(f"the table was made with {versions}, this is {VERSIONS}: only the invariants are checked")
        return []
    ours, theirs = {row[:KEY]: row for row in rows}, {row[:KEY]: row for row in table}
    found = [f"new {' '.join(key)}" for key in ours.keys() - theirs.keys()]
    if complete:
        found += [f"gone {' '.join(key)}" for key in theirs.keys() - ours.keys()]
    found += [
        f"changed {' '.join(key)}: {theirs[key][KEY:]} is now {ours[key][KEY:]}"
        for key in ours.keys() & theirs.keys()
        if ours[key] != theirs[key]
    ]
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument(
        "--only", nargs="+", default=[], help="only cases whose name contains all these words"
    )
    arguments = parser.parse_args()
    if arguments.only and not arguments.check and read_table()[0] != VERSIONS:
        parser.error(f"--only: expected a table made with {VERSIONS}, got {read_table()[0]}: write it whole")
    targets = [name for name in TARGETS if name in arguments.only] or TARGETS
    selected = [case for case in cases(targets) if all(word in str(case) for word in arguments.only)]
    rows, problems = compile_all(selected)
    if arguments.check:
        differences = changes(rows, complete=not arguments.only)
        print(*differences, sep="\n", end="\n" if differences else "")
        problems += differences
    else:
        write_table(sorted(rows + left_out(arguments.only)))
    print(f"{len(rows)} kernels compiled, {len(problems)} problems")
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
