"""The CUDA kernels as nvcc compiles them, for every architecture, and a library with them, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_fast.bench import cuda_table

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
if (reason := cuda_table.missing()) is not None:
    pytest.skip(f"CUDA kernels are not compiled: {reason}", allow_module_level=True)
nvcc = cuda_table.nvcc


# Compiling takes about a minute of a core, and once: build/cuda keeps what it gives.
pytestmark = pytest.mark.timeout(900)


def test_nothing_spills_and_the_table_is_what_is_compiled():
    rows = cuda_table.rows()
    assert {row.target for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert [row for row in rows if row.spill_bytes] == []
    assert cuda_table.changes(rows) == [], "run `make cuda`"
    budget = [row for row in rows if row.kernel.startswith("forward_kernel") and row.kernel.endswith(" 1>")]
    assert len(budget) == 3 * 4
    for row in budget:
        assert row.instructions_per_weight <= 4.8, row
    wide = [row for row in rows if row.kernel.startswith("write_kernel<bfloat16")]
    assert {row.stores for row in wide} == {"16x4"}


def test_instructions_are_counted_in_the_loop_that_decodes():
    code = """
arch = sm_90
Function : kernel
        /*0000*/                   LDG.E.128 R0, desc[UR4][R2.64] ;   /* 0x0 */
        /*0010*/                   LDS.64 R4, [R6] ;                  /* 0x0 */
        /*0020*/              @!P0 FFMA R1, R4, R5, R1 ;              /* 0x0 */
        /*0030*/               @P1 BRA 0x10 ;                         /* 0x0 */
        /*0040*/                   STG.E.U16 desc[UR4][R2.64], R1 ;   /* 0x0 */
        /*0050*/                   STG.E desc[UR4][R2.64], R1 ;       /* 0x0 */
        /*0060*/                   EXIT ;                             /* 0x0 */
        /*0070*/                   BRA 0x70 ;                         /* 0x0 */
"""
    ((name, arch, steps),) = cuda_table.functions(code)
    assert (name, arch, len(steps)) == ("kernel", "sm_90", 7)
    assert cuda_table.per_weight("forward_kernel<float32, 1>", steps) == (1.5, 0.5)
    assert cuda_table.per_weight("finish_kernel", steps) == (None, None)
    assert cuda_table.widths(steps, "LDG") == "16x1"
    assert cuda_table.widths(steps, "STG") == "4x1 2x1"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The CUDA part of the extension, as setup.py builds it."""
    library = tmp_path_factory.mktemp("cuda") / "library.so"
    objects = [*nvcc.objects(cuda_table.BUILD, nvcc.ALL), nvcc.library()]
    flags = [
        "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DPEFT_FAST_CUDA_ARCHITECTURES=\"80 90\"", "-isystem", str(TORCH / "include"),
    ]  # fmt: skip
    link = [
        "-L",
        str(TORCH / "lib"),
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
        "-lrt",
        "-lpthread",
        "-Wl,--exclude-libs,ALL",
    ]
    source = str(ROOT / "csrc" / "cuda" / "ops.cpp")
    command = ["g++", "-shared", *flags, source, *map(str, objects), *link, "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def test_a_library_with_cuda_loads_without(library):
    """Beside this torch, whichever it is: nothing of CUDA's is asked of it, the runtime is inside."""
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    of_cuda = {line.split()[-1]: line.split()[-2] for line in symbols.splitlines() if "cuda" in line.lower()}
    assert of_cuda == {"aoti_torch_device_type_cuda": "U"}  # of torch's own CPU library
    script = (
        f"import torch; torch.ops.load_library({str(library)!r}); ops = torch.ops.peft_fast_cuda\n"
        "assert ops.architectures() == '80 90'\n"
        "t = torch.zeros(1)\n"
        "try: ops.write(t, *[None] * 5, 'nf4', 1, 1, 64, 0, None, None, None, 1.0, t)\n"
        "except NotImplementedError: print('no kernel for the CPU')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "no kernel for the CPU\n", done.stderr


# What torch's CUDA library exports, and a library that depends on it as torch's bindings do.
STREAM = "int aoti_torch_get_current_cuda_stream(int device, void **stream)"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_the_stream_is_found_where_torch_has_it(library, tmp_path):
    """In libtorch_cuda.so, which Python loads for torch alone: no other library sees its symbols unasked."""
    (tmp_path / "torch_cuda.c").write_text(f"{STREAM} {{ return *stream = 0, 0; }}")
    (tmp_path / "bindings.c").write_text(
        f"{STREAM}; int use(void) {{ void *s; return aoti_torch_get_current_cuda_stream(0, &s); }}"
    )
    for name, options in (("torch_cuda", ["-Wl,-soname,libtorch_cuda.so"]), ("bindings", ["-ltorch_cuda"])):
        out = ["-o", str(tmp_path / f"lib{name}.so"), "-L", str(tmp_path), f"-Wl,-rpath,{tmp_path}"]
        source = str(tmp_path / f"{name}.c")
        subprocess.run(["gcc", "-shared", "-fPIC", source, *out, *options], check=True)
    load = f"import ctypes; ctypes.CDLL({str(tmp_path / 'libbindings.so')!r}).use()"
    for first, wanting in (("", True), (load, False)):
        script = (
            f"import torch\n{first}\ntorch.ops.load_library({str(library)!r})\n"
            "print(torch.ops.peft_fast_cuda.missing())"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert (done.stdout == "needs a torch with CUDA, which this one is not\n") is wanting, done.stdout


def test_which_architectures_are_built(monkeypatch):
    for asked, archs in (("", ()), ("0", ()), ("90", ("90",)), ("120, 80;90a 80", ("80", "90a", "120"))):
        monkeypatch.setenv("PEFT_FAST_CUDA_ARCHS", asked)
        assert nvcc.wanted() == archs
    assert nvcc.targets(("80", "90")) == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]  # fmt: skip
    monkeypatch.setenv("PEFT_FAST_CUDA_ARCHS", "hopper")
    with pytest.raises(ValueError, match="expected architectures from 80 on such as '80 90a', got hopper"):
        nvcc.wanted()
    monkeypatch.setenv("PEFT_FAST_CUDA_ARCHS", "75 80")
    with pytest.raises(ValueError, match="got 75"):
        nvcc.wanted()
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setenv("PEFT_FAST_CUDA_ARCHS", "90")
    with pytest.raises(RuntimeError, match="expected nvcc"):
        nvcc.wanted()
    monkeypatch.delenv("PEFT_FAST_CUDA_ARCHS")
    assert nvcc.wanted() == ()
