"""The CUDA kernels on a CPU: csrc/cuda compiled by a C++ compiler with emulated/cuda.h, and loaded once.

The ops are those of `peft_fast_cuda` in a namespace of their own, for CPU tensors: the same kernels,
launchers and checks. Alignment and the bounds of arrays in shared memory are checked; a violation ends the
process.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from peft_fast import cuda

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
LIBRARY = cuda.Library("peft_fast_cuda_emulated", "cpu")
FLAGS = (
    "-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DPEFT_FAST_EMULATED",
)  # fmt: skip
CHECKED = ("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error", "-I", str(ROOT / "tests"))
BINDINGS = (
    '-DPEFT_FAST_CUDA_ARCHITECTURES="none"', "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-isystem", str(TORCH / "include"),
)  # fmt: skip


def missing() -> str | None:
    """Why the kernels cannot be emulated here; None where they can."""
    if platform.machine() != "x86_64":
        return "the emulator switches stacks in x86-64 assembly"
    return None if shutil.which("g++") else "g++ is not installed"


def build() -> Path:
    """The library, compiled where build/emulated has not got it."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.c*"))
    headers = [ROOT / "tests" / "emulated" / "cuda.h", *(ROOT / "csrc").rglob("*.h")]
    content = b"".join(path.read_bytes() for path in [*sources, *sorted(headers)])
    flags = " ".join((*FLAGS, *CHECKED, *BINDINGS, torch.__version__))
    folder = ROOT / "build" / "emulated" / hashlib.sha256(content + flags.encode()).hexdigest()[:16]
    library = folder / "emulated.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.{os.getpid()}.o"
        of_kind = BINDINGS if source.suffix == ".cpp" else CHECKED
        command = ["g++", *FLAGS, *of_kind, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    unfinished = folder / f"{os.getpid()}.so"
    link = ["g++", "-shared", *map(str, objects), "-L", str(TORCH / "lib"), "-ltorch_cpu", "-lc10"]
    subprocess.run([*link, "-o", str(unfinished)], check=True)
    unfinished.replace(library)
    return library


def load() -> None:
    """Registers the ops; skips the test where that cannot be."""
    if (reason := missing()) is not None:
        pytest.skip(f"emulated CUDA: {reason}")
    torch.ops.load_library(str(build()))
