"""What nvcc makes of every CUDA kernel, without a GPU: registers, spills, shared memory, loads, instructions.

    python bench/cuda_table.py            compile everything, write bench/results/cuda.csv
    python bench/cuda_table.py --check    compile everything, fail on a spill or a changed table

Instructions are counted in the machine code: per decoded weight and thread those of the loop that decodes, of
the kernels for few tokens, or, of `write_kernel`, which has none, those of all the kernel; of the
multiply-adds among them, a column of its own. Branches count as if all were taken, so the counts are upper
bounds. A kernel for up to eight tokens does the work of all of them in its loop.

The table is compared only when it was made with the running nvcc. What was compiled is kept in build/cuda,
where a build for the same architectures finds it.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench" / "results" / "cuda.csv"
BUILD = ROOT / "build" / "cuda"
# Weights that a thread of a kernel without a loop decodes.
WRITTEN = 32
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


def _nvcc() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvcc", ROOT / "csrc" / "cuda" / "nvcc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = _nvcc()


class Row(NamedTuple):
    """Bytes and counts of one kernel; `loads` and `stores` by width in bytes, "16x4" for four of 16."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions_per_weight: float | None
    fma_per_weight: float | None
    loads: str
    stores: str


class Step(NamedTuple):
    """An instruction of machine code at an address."""

    address: int
    name: str
    operands: str


# --------------------------------------------------------------------------------------------------- compile


def cuobjdump() -> str | None:
    """Beside nvcc, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(beside) if beside.exists() else None


def missing() -> str | None:
    """What of the toolchain is not here; None when all of it is."""
    if nvcc.find() is None:
        return "nvcc: not found on the PATH, in $CUDA_HOME or in /usr/local/cuda"
    known = nvcc.run(["--list-gpu-arch"]).split()
    if new := [f"sm_{arch}" for arch in nvcc.ALL if f"compute_{arch}" not in known]:
        return f"nvcc: expected one that compiles for {', '.join(new)}, got {version()}"
    return None if cuobjdump() else "cuobjdump: not found on the PATH or in Triton"


def version() -> str:
    said = nvcc.run(["--version"])
    return f"nvcc {re.search(r'release .*V([0-9.]+)', said).group(1)}"


def machine_code(compiled: Path) -> str:
    """As text, of all architectures in an object."""
    command = [cuobjdump() or "cuobjdump", "-sass", str(compiled)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def short(name: str) -> str:
    """`forward_kernel<bfloat16, 8>` of a mangled name."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    found = re.search(r"(\w+_kernel)(?:<(.*)>)?\(", plain)
    assert found is not None, plain
    arguments = found[2] or ""
    for number, dtype in enumerate(("float32", "float16", "bfloat16")):
        arguments = arguments.replace(f"(peft_fast::DType){number}", dtype)
    arguments = re.sub(r"\((?:int|bool)\)", "", arguments)
    return f"{found[1]}<{arguments}>" if arguments else found[1]


# ---------------------------------------------------------------------------------------------- machine code


def functions(code: str) -> Iterator[tuple[str, str, list[Step]]]:
    """(mangled name, architecture, instructions) of each kernel."""
    for of_arch in re.split(r"^arch = (?=sm_)", code, flags=re.M)[1:]:
        arch = of_arch.split()[0]
        for part in of_arch.split("Function : ")[1:]:
            name, _, body = part.partition("\n")
            steps = [Step(int(at, 16), op, rest.strip()) for at, op, rest in INSTRUCTION.findall(body)]
            # The last branch, to itself, and what pads after it are never reached.
            end = max(i for i, step in enumerate(steps) if step.name.startswith("EXIT"))
            yield name.strip(), arch, steps[: end + 1]


def decoding_loop(steps: list[Step]) -> list[Step]:
    """The innermost loop that looks most pairs of codes up; empty without one."""
    loops = []
    for step in steps:
        target = re.search(r"0x([0-9a-f]+)", step.operands) if step.name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < step.address:
            inside = [s for s in steps if int(target[1], 16) <= s.address <= step.address]
            loops.append(inside)
    return min(loops, key=lambda loop: (-lookups(loop), len(loop)), default=[])


def lookups(steps: list[Step]) -> int:
    return sum(step.name.startswith("LDS.64") for step in steps)


def widths(steps: list[Step], kind: str) -> str:
    """By width in bytes, widest first, how many instructions LDG or STG there are."""
    counts: Counter[int] = Counter()
    for step in steps:
        if step.name.startswith(kind):
            bits = re.search(r"\.(?:[US]?(8|16|64|128))\b", step.name.removeprefix(kind))
            counts[int(bits[1]) // 8 if bits else 4] += 1
    return " ".join(f"{width}x{count}" for width, count in sorted(counts.items(), reverse=True))


def per_weight(kernel: str, steps: list[Step]) -> tuple[float | None, float | None]:
    """(instructions, multiply-adds) of a thread for a weight that it decodes."""
    loop = decoding_loop(steps) if kernel.startswith(("forward_kernel", "backward_kernel")) else []
    if pairs := lookups(loop):
        steps, weights = loop, 2 * pairs
    elif kernel.startswith("write_kernel"):
        weights = WRITTEN
    else:
        return None, None
    fma = sum(step.name.startswith("FFMA") for step in steps)
    return round(len(steps) / weights, 2), round(fma / weights, 2)


def rows_of(compiled: Path) -> list[Row]:
    used: dict[tuple[str, str], tuple[int, int, int]] = {}
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n[^\n]*Used (\d+) registers([^\n]*)"
    )
    said = compiled.with_suffix(".txt").read_text()
    for name, arch, *spilled, registers, rest in re.findall(pattern, said, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        used[name, arch] = int(registers), max(map(int, spilled)), int(shared[1]) if shared else 0
    found = []
    for name, arch, steps in functions(machine_code(compiled)):
        kernel = short(name)
        counts = per_weight(kernel, steps)
        found.append(
            Row(kernel, arch, *used[name, arch], *counts, widths(steps, "LDG"), widths(steps, "STG"))
        )
    return found


def rows() -> list[Row]:
    """Of every kernel for every architecture, sorted."""
    parts = [rows_of(compiled) for compiled in nvcc.objects(BUILD, nvcc.ALL)]
    return sorted((row for part in parts for row in part), key=lambda row: (row.kernel, int(row.target[3:])))


# ------------------------------------------------------------------------------------------------------ table


def text(found: list[Row]) -> str:
    lines = [f"# {version()}", ",".join(Row._fields)]
    lines += [",".join("" if value is None else str(value) for value in row) for row in found]
    return "\n".join(lines) + "\n"


def changes(found: list[Row]) -> list[str]:
    """How the table differs from the committed one; nothing when another nvcc made that."""
    if not TABLE.exists():
        return [f"{TABLE}: missing"]
    committed, now = TABLE.read_text().splitlines(), text(found).splitlines()
    if committed[0] != now[0]:
        print(f"the table was made with {committed[0][2:]}, this is {now[0][2:]}: only spills are checked")
        return []
    new, old = set(now) - set(committed), set(committed) - set(now)
    return [*(f"now {line}" for line in sorted(new)), *(f"was {line}" for line in sorted(old))]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    found = rows()
    problems = [
        f"{row.kernel} {row.target}: {row.spill_bytes} bytes spilled" for row in found if row.spill_bytes
    ]
    if arguments.check:
        problems += changes(found)
    else:
        TABLE.write_text(text(found))
    print(*problems, f"{len(found)} kernels compiled, {len(problems)} problems", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
