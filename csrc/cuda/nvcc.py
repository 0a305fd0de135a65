"""How the CUDA sources are compiled: for setup.py, and for bench/cuda_table.py and the tests.

PEFT_FAST_CUDA_ARCHS names the architectures that a build is for, such as "80 90"; empty or "0" is none.
Unset, a build is for the GPU that torch sees, and without CUDA where there is none or no nvcc. Kernels use
nothing that the successors of an architecture lack, so sm_80 runs on all of 8.x; the newest is PTX too.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = tuple(sorted(HERE.glob("*.cu")))
ALL = ("80", "90", "100", "120")
LEAST = 80  # the first with bfloat16 and TF32
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fmad=false",  # the decode multiplies, then adds: csrc/decode.h; sums call fmaf
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",  # registers and spills, kept beside the objects
)


def find() -> str | None:
    """The compiler, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(found)] if (found := shutil.which("nvcc")) else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in places if path.is_file()), None)


def wanted() -> tuple[str, ...]:
    """The architectures of a build here, ascending.

    Raises:
        RuntimeError: some are asked for, and there is no nvcc.
        ValueError: an architecture is not a number of at least LEAST with a letter at most.
    """
    asked = os.environ.get("PEFT_FAST_CUDA_ARCHS")
    if asked is None:
        import torch

        if find() is None or torch.version.cuda is None or not torch.cuda.is_available():
            return ()
        major, minor = torch.cuda.get_device_capability()
        return (f"{major}{minor}",) if 10 * major + minor >= LEAST else ()
    archs = [] if asked.strip() in ("", "0") else re.split(r"[\s,;]+", asked.strip())
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch) or number(arch) < LEAST]
    if wrong:
        raise ValueError(
            f"PEFT_FAST_CUDA_ARCHS: expected architectures from {LEAST} on such as '80 90a', "
            f"got {' '.join(wrong)}"
        )
    if archs and find() is None:
        raise RuntimeError("PEFT_FAST_CUDA_ARCHS: expected nvcc in $CUDA_HOME/bin or on the PATH, found none")
    return tuple(sorted(set(archs), key=number))


def number(arch: str) -> int:
    return int(arch.rstrip("af"))


def targets(archs: Sequence[str]) -> list[str]:
    """What nvcc is told of the architectures, with PTX of the last."""
    codes = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]


@functools.cache
def library() -> Path:
    """libcudart_static.a, wherever nvcc would link it from."""
    command = [find() or "nvcc", "--dryrun", "-o", "none", str(SOURCES[0])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    places = [Path(place) for place in re.findall(r'"?-L([^"\s]+)', said)]
    found = [path for place in places for path in [place / "libcudart_static.a"] if path.exists()]
    if not found:
        raise RuntimeError(
            f"libcudart_static.a: expected in one of {[str(p) for p in places]}, found nowhere"
        )
    return found[0]


def digest(*options: str) -> str:
    """Of everything that decides what a compilation gives."""
    compiler = subprocess.run([find() or "nvcc", "--version"], capture_output=True, check=True).stdout
    headers = [*HERE.glob("*.h"), HERE.parent / "decode.h", *(HERE.parent / "cpu").glob("*.h")]
    content = b"".join(path.read_bytes() for path in sorted([*SOURCES, *headers]))
    return hashlib.sha256(compiler + content + " ".join((*FLAGS, *options)).encode()).hexdigest()[:16]


def run(options: Sequence[str]) -> str:
    """What nvcc says. Raises RuntimeError with that when it fails."""
    done = subprocess.run([find() or "nvcc", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc {' '.join(options)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def objects(folder: Path, archs: Sequence[str]) -> list[Path]:
    """The objects of all sources for these architectures, compiled where `folder` has not got them yet.

    Beside each `name.o` is what the assembler said, `name.txt`.
    """
    options = [*FLAGS, *targets(archs)]
    into = folder / digest(*options)
    into.mkdir(parents=True, exist_ok=True)
    found = [into / f"{source.stem}.o" for source in SOURCES]

    def one(source: Path, target: Path) -> None:
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}.o")
            said = run([*options, "-c", str(source), "-o", str(unfinished)])
            target.with_suffix(".txt").write_text(said)
            unfinished.replace(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, SOURCES, found))
    return found
