"""What the compiler makes of every Triton kernel, on every target, without a GPU.

    python bench/aot.py            compile everything, write bench/results/aot.csv
    python bench/aot.py --check    compile everything, fail on a broken invariant or a changed table
    python bench/aot.py --check --only dx_kernel sm_90    the rows that contain all of these words
    python bench/aot.py --only dx_kernel                  the same, their rows of the table replaced

Invariants of each row: no register spills, tensor-core instructions where the kernel multiplies matrices,
shared memory within the device's limit, no 64-bit floating point, no contraction in the decode. The table is
compared only when it was made with the running Triton version. Each row is compiled with a dropout mask, the
sizes divisible by 16 except in the `odd` rows, and the launch options of `triton_kernels/launch.py`.
Rows with out_scale are the training tiles on nf4. Kernels of loreft name the selection in place of a weight;
their rank is not divisible by 16.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here, not interpreted

import torch
import triton
from peft_fast.triton_kernels import configs
from peft_fast.triton_kernels.dequantize import dequantize_kernel
from peft_fast.triton_kernels.launch import OPTIONS
from peft_fast.triton_kernels.lora_linear import (
    da_kernel,
    down_kernel,
    dx_kernel,
    linear_kernel,
    sum_kernel,
    up_backward_kernel,
)
from peft_fast.triton_kernels.loreft import (
    loreft_columns_backward_kernel,
    loreft_kernel,
    loreft_rows_backward_kernel,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

TABLE = Path(__file__).parent / "results" / "aot.csv"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VERSIONS = f"triton {triton.__version__}, torch {torch.__version__.split('+')[0]}"
KERNELS = {
    kernel.fn.__name__: kernel.fn if isinstance(kernel, Autotuner) else kernel
    for kernel in (
        linear_kernel, dx_kernel, down_kernel, up_backward_kernel, da_kernel, sum_kernel, dequantize_kernel,
        loreft_kernel, loreft_rows_backward_kernel, loreft_columns_backward_kernel,
    )
}  # fmt: skip
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # a program's limit
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)\b|\b(v_mfma)_")


class Variant(NamedTuple):
    """The operands of a case: dtypes of the activations and of the adapters, and the weight's storage.

    For loreft, which has no weight, a key of `REFT` in its place.
    """

    x: str
    adapter: str
    weight: str
    out_scale: bool = False

    def __str__(self) -> str:
        return f"{self.x}/{self.adapter}/{self.weight}" + "/out_scale" * self.out_scale


# nf4 is nested, the longest decode; `odd` is nf4 with K not a multiple of the block size. Adapters in the
# dtype of the activations take fewer registers than fp32 ones: the dense rows alone show them.
VARIANTS = (
    Variant("bf16", "fp32", "nf4"),
    Variant("bf16", "bf16", "odd"),
    Variant("bf16", "bf16", "dense"),
    Variant("fp16", "fp32", "nf4"),
    Variant("fp32", "fp32", "nf4"),
    Variant("fp32", "fp32", "odd"),
)
# With out_scale, the kernels that take it, on the tiles with the most rows.
OUT_SCALE_VARIANTS = (Variant("bf16", "fp32", "nf4", True), Variant("fp32", "fp32", "nf4", True))

# By kernel, the pointers that are None without out_scale.
OUT_SCALE = {
    "linear_kernel": ("p_out_scale",),
    "dx_kernel": ("p_out_scale",),
    "up_backward_kernel": ("p_out_scale", "p_bias", "p_y", "p_d_out_scale"),
    "sum_kernel": ("p_d_out_scale_partial", "p_d_out_scale"),
}

# Which rows loreft edits, and constexprs. With `ranks`, the selected rows and more than one rank block.
REFT: dict[str, dict[str, Any]] = {
    "all": {"TERMS": 1, "ACT": "linear", "DROP_STATE": False, "MORE_RANKS": False, "p_rows": None},
    "rows": {"TERMS": 2, "ACT": "gelu", "DROP_STATE": True, "MORE_RANKS": False, "p_residual": None},
    "ranks": {"TERMS": 2, "ACT": "gelu", "DROP_STATE": True, "MORE_RANKS": True, "p_residual": None},
}


class Case(NamedTuple):
    kernel: str
    tile: tuple[tuple[str, int], ...]  # constexprs, num_warps and num_stages
    target: str
    variant: Variant

    @property
    def config(self) -> str:
        short, hidden = {"num_warps": "warps", "num_stages": "stages"}, ("GROUP", "num_ctas")
        return " ".join(
            f"{short.get(k, k.removeprefix('BLOCK_'))}={v}" for k, v in self.tile if k not in hidden
        )

    def __str__(self) -> str:
        return f"{self.kernel} {self.config} {self.target} {self.variant}"


class Row(NamedTuple):
    kernel: str
    config: str
    target: str
    operands: str
    instruction: str
    registers: int
    spill_bytes: int
    shared_bytes: int


# ----------------------------------------------------------------------------------------------------- cases


def cases() -> Iterator[Case]:
    """Every kernel × tile × target × variant that a launcher can ask for."""
    fixed = {"down_kernel": configs.DOWN, "up_backward_kernel": configs.UP_BACKWARD, "da_kernel": configs.DA}
    out_scale = {"up_backward_kernel": configs.UP_BACKWARD_OUT_SCALE}
    most_rows = max(tile.rows for tile in configs.MAIN_LOOP)
    for target, variant in itertools.product(TARGETS, VARIANTS + OUT_SCALE_VARIANTS):
        for tile, linear, dx in zip(configs.MAIN_LOOP, configs.LINEAR, configs.DX, strict=True):
            if variant.out_scale and tile.rows < most_rows:
                continue
            if tile.takes(DTYPES[variant.x], aligned=variant.weight != "odd"):
                yield _case(
                    "linear_kernel",
                    {"BLOCK_M": tile.rows, "BLOCK_R": configs.RANK_STEP} | linear.all_kwargs(),
                    target,
                    variant,
                )
                yield _case(
                    "dx_kernel",
                    {"BLOCK_M": tile.rows, "BLOCK_R": configs.RANK_STEP} | dx.all_kwargs(),
                    target,
                    variant,
                )
        if not variant.out_scale:
            yield _case("dequantize_kernel", configs.DEQUANTIZE, target, variant)
        if variant.weight == "nf4":
            for kernel, tiles in (out_scale if variant.out_scale else fixed).items():
                for tile in tiles[variant.x == "bf16"]:
                    yield _case(kernel, tile | {"BLOCK_R": max(configs.RANKS)}, target, variant)
            yield _case("sum_kernel", configs.SUM, target, variant)
    for target, dtype, form in itertools.product(TARGETS, DTYPES, REFT):
        half, variant = dtype == "bf16", Variant(dtype, "fp32", form)
        for tile in configs.REFT_ROWS[half]:
            for kernel in ("loreft_kernel", "loreft_rows_backward_kernel"):
                yield _case(kernel, tile | {"BLOCK_R": max(configs.RANKS)}, target, variant)
        if form != "ranks":
            for tile in configs.REFT_COLUMNS[half]:
                columns = tile | {"BLOCK_R": max(configs.RANKS)}
                yield _case("loreft_columns_backward_kernel", columns, target, variant)


def _case(kernel: str, tile: dict[str, int], target: str, variant: Variant) -> Case:
    return Case(kernel, tuple(sorted(tile.items())), target, variant)


def source(case: Case) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel's signature as its launcher specializes it, and the compiler's options."""
    tile = dict(case.tile)
    options = OPTIONS | {k: tile.pop(k) for k in ("num_warps", "num_stages") if k in tile}
    kernel, variant, dense = KERNELS[case.kernel], case.variant, case.variant.weight == "dense"
    pointers = dict.fromkeys(
        ("p_x", "p_g", "p_y", "p_dx", "p_out", "p_h", "p_residual", "p_kept", "p_dh"), variant.x
    )
    pointers |= dict.fromkeys(("p_a", "p_b", "p_da", "p_db", "p_bias"), variant.adapter)
    pointers |= {"p_mask": "u8", "weight": variant.x if dense else "u8", "absmax": "u8", "p_rows": "i64"}
    constants = tile | {
        "BLOCKSIZE": 64,
        "NESTED_BLOCKSIZE": 256,
        "ALIGNED": variant.weight != "odd",
        "SPLIT": 16 if tile.get("BLOCK_M") == 16 else 1,
        "PRECISION": "ieee" if TARGETS[case.target].backend == "hip" else "tf32x3",
    }
    constants |= REFT.get(variant.weight, {})
    if not variant.out_scale:
        constants |= dict.fromkeys(OUT_SCALE.get(case.kernel, ()))
    if dense:
        constants |= {"stride_k": 1} | dict.fromkeys(
            ("absmax", "code", "nested_absmax", "nested_code", "nested_offset")
        )
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        divisible = True
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
            continue
        if name in ("scaling", "drop_scale"):
            signature[name], divisible = "fp32", False
        elif name in ("M", "m", "N", "K", "D", "R", "columns", "n_chunks", "stride_n", "stride_k"):
            signature[name] = "i32"
            divisible = name == "D" if variant.weight in REFT else variant.weight != "odd"
        else:
            signature[name] = "*" + pointers.get(name, "fp32")
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes), options


# --------------------------------------------------------------------------------------------------- compile


def compile_case(case: Case) -> tuple[Row, list[str]]:
    """The row of a case, and the invariants that it breaks."""
    src, options = source(case)
    target = TARGETS[case.target]
    compiled = triton.compile(src, target=target, options=options)
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    instructions = sorted({a or b for a, b in TENSOR_CORE.findall(assembly)})
    registers, spills = _resources(compiled.asm, target.backend)
    row = Row(
        case.kernel,
        case.config,
        case.target,
        str(case.variant),
        "+".join(instructions) or "-",
        registers,
        spills,
        compiled.metadata.shared,
    )
    limit = SHARED_KIB[case.target] * 1024
    broken = []
    if spills:
        broken.append(f"{spills} bytes of registers spilled")
    if not instructions and case.kernel not in ("sum_kernel", "dequantize_kernel"):
        broken.append("no tensor-core instruction")
    if row.shared_bytes > limit:
        broken.append(f"{row.shared_bytes} bytes of shared memory, the limit is {limit}")
    if re.search(r"\.f64\b|_f64\b", assembly):
        broken.append("64-bit floating point")
    if case.kernel == "dequantize_kernel" and re.search(
        r"\bfma\.|\bv_(pk_)?(fma|fmac|mad|mac)_f32", assembly
    ):
        broken.append("a multiply-add of one rounding, where the format has two")
    return row, [f"{case}: {reason}" for reason in broken]


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


# ------------------------------------------------------------------------------------------------------ table


def read_table() -> tuple[str, list[Row]]:
    """(versions, rows) of the committed table."""
    with TABLE.open(newline="") as file:
        versions = file.readline().removeprefix("#").strip()
        rows = [
            Row(*fields[:5], *map(int, fields[5:])) for fields in itertools.islice(csv.reader(file), 1, None)
        ]
    return versions, rows


def write_table(rows: list[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# {VERSIONS}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


def left_out(words: list[str]) -> list[Row]:
    """The rows of the committed table that do not contain all of `words`; none without words."""
    return [row for row in read_table()[1] if not all(word in " ".join(row[:4]) for word in words)]


def changes(rows: list[Row], complete: bool) -> list[str]:
    """How `rows` differ from the committed table; nothing when another Triton made it."""
    versions, table = read_table()
    if versions.split(",")[0] != VERSIONS.split(",")[0]:
        print(f"the table was made with {versions}, this is {VERSIONS}: only the invariants are checked")
        return []
    ours, theirs = {row[:4]: row for row in rows}, {row[:4]: row for row in table}
    found = [f"new {' '.join(key)}" for key in ours.keys() - theirs.keys()]
    if complete:
        found += [f"gone {' '.join(key)}" for key in theirs.keys() - ours.keys()]
    found += [
        f"changed {' '.join(key)}: {theirs[key][4:]} is now {ours[key][4:]}"
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
    selected = [case for case in cases() if all(word in str(case) for word in arguments.only)]
    results = []
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for row, broken in pool.map(compile_case, selected):
            results.append((row, broken))
            print(*broken, sep="\n", end="\n" if broken else "", flush=True)
    rows = sorted(row for row, _ in results)
    problems = [problem for _, broken in results for problem in broken]
    if arguments.check:
        problems += changes(rows, complete=not arguments.only)
    else:
        write_table(sorted(rows + left_out(arguments.only)))
    print(f"{len(rows)} kernels compiled, {len(problems)} problems", *problems, sep="\n")
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
