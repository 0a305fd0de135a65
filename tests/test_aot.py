"""The checks of bench/aot.py, without a compiler: what counts as broken, and that the rows cover the kernels.

`test_triton.py` compiles a few of the rows; `make aot` compiles them all.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

# Changes of a row that breaks nothing: fields, (products, unrolled ones), the assembly; and what that breaks.
OKAY = {"target": "sm_86", "instruction": "mma.sync", "spill_bytes": 0, "shared_bytes": 99 * 1024}
SM_75 = {"target": "sm_75", "instruction": "-", "shared_bytes": 0}
CONTRACTION = "a multiply-add of one rounding, where the format has two"
CASES = [
    ({}, (2, 0), "mma.sync.aligned; add.f32", []),
    ({"spill_bytes": 33}, (2, 0), "", ["33 bytes spilled with 100 registers"]),
    ({"spill_bytes": 8, "registers": 255}, (2, 0), "", ["8 bytes spilled with 255 registers"]),
    # A few values put aside for occupancy, with registers left.
    ({"spill_bytes": 8}, (2, 0), "", []),
    ({"shared_bytes": 101377}, (2, 0), "", ["101377 bytes of shared memory, the limit is 101376"]),
    ({"target": "sm_80", "shared_bytes": 163 * 1024}, (2, 0), "", []),
    (
        {"target": "gfx1100", "shared_bytes": 65537},
        (2, 0),
        "",
        ["65537 bytes of shared memory, the limit is 65536"],
    ),
    ({"instruction": "-"}, (2, 0), "", ["no tensor-core instruction"]),
    ({}, (2, 1), "", ["1 products without tensor cores"]),
    # Triton has no tensor cores there: products are multiply-adds. A spill is still a spill.
    (SM_75, (2, 2), "fma.rn.f32", []),
    (SM_75 | {"spill_bytes": 40}, (2, 2), "fma.rn.f32", ["40 bytes spilled with 100 registers"]),
    # A decode without a product has no contraction; a product's multiply-adds are none.
    ({"instruction": "-"}, (0, 0), "mul.rn.f32", []),
    ({"instruction": "-"}, (0, 0), "fma.rn.f32", [CONTRACTION]),
    ({"instruction": "-", "target": "gfx942", "shared_bytes": 0}, (0, 0), "v_fmac_f32_e32 v0", [CONTRACTION]),
    ({}, (2, 0), "add.f64 %fd1", ["64-bit floating point"]),
    ({"target": "gfx942", "shared_bytes": 0}, (2, 0), "v_add_f64 v[0:1]", ["64-bit floating point"]),
]
# bench/aot.py takes the interpreter's variable out of the environment, so it gets a process of its own.
PROGRAM = """
import json, sys
from peft_fast.bench.aot import Products, Row, broken
from peft_fast.bench.aot_cases import TARGETS, cases

okay, changes = json.load(sys.stdin)
row = Row("kernel", "M=16", "", "bf16/fp32/nf4", "merge M=4096", "", 100, 0, 0)._replace(**okay)
reasons = [broken(row._replace(**fields), Products(*products), text) for fields, products, text in changes]
rows = cases(["sm_75", "sm_90"])
keys = [(case.kernel, case.config, case.target, case.operands, case.launch) for case in rows]
kernels = sorted({case.kernel for case in rows})
small = {case.config for case in rows if case.kernel == "linear_kernel" and case.target == "sm_75"}
json.dump([reasons, len(keys), len(set(keys)), kernels, list(TARGETS), sorted(small)], sys.stdout)
"""


def test_broken_invariants_are_named_and_every_kernel_has_rows():
    bench = Path(__file__).parents[1] / "bench"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([OKAY, [case[:3] for case in CASES]]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    reasons, rows, named, kernels, targets, small = json.loads(result.stdout)
    for case, got in zip(CASES, reasons, strict=True):
        assert got == case[3], case
    assert named == rows > 200  # no two rows have one name
    assert targets == ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]
    sources = (bench.parent / "kernels" / "triton_kernels").glob("*.py")
    defined = {
        name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert set(kernels) == defined
    assert small == ["K=16 M=16 N=32 R=16 stages=1 warps=4"]  # the autotuner's list is pruned for the target
