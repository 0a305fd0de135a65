"""Builds the C++ extension `peft_fast._C` on torch's stable ABI: one abi3 library for torch >= 2.11.

Nothing of torch's Python bindings. Instruction sets of the CPU are chosen at run time, so the flags name
none. CUDA kernels are part of it where `csrc/cuda/nvcc.py` says so; such a library loads without CUDA too.
"""

import os
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "cuda"))
import nvcc

TORCH = Path(torch.__file__).parent
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",  # the decode multiplies, then adds: csrc/decode.h
    "-Wall",
    "-Wextra",
    "-isystem",
    str(TORCH / "include"),
]
ARCHS = nvcc.wanted()
SOURCES = sorted(str(p) for p in Path("csrc").rglob("*.cpp") if ARCHS or p.parent.name != "cuda")
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x03090000")]


class Build(build_ext):
    def build_extension(self, extension: Extension) -> None:
        self.force = True  # what is there may be for other architectures
        if ARCHS:
            print(f"CUDA: {nvcc.find()} for {' '.join(ARCHS)}", flush=True)
            try:
                kernels = [*nvcc.objects(Path("build", "cuda"), ARCHS), nvcc.library()]
            except RuntimeError as error:
                if "PEFT_FAST_CUDA_ARCHS" in os.environ:
                    raise
                # Nobody asked for it: a toolkit that does not fit the compiler costs no kernel of the CPU's.
                print(f"CUDA: left out, because {error}", flush=True)
                extension.sources = [s for s in extension.sources if Path(s).parent.name != "cuda"]
                extension.define_macros = MACROS
            else:
                # The runtime is linked in, so that the library needs no other, and its names stay inside.
                extension.extra_objects = list(map(str, kernels))
                extension.extra_link_args = ["-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        super().build_extension(extension)


setup(
    ext_modules=[
        Extension(
            "peft_fast._C",
            SOURCES,
            depends=sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".cu")),
            define_macros=[
                *MACROS,
                *([("PEFT_FAST_CUDA_ARCHITECTURES", f'"{" ".join(ARCHS)}"')] if ARCHS else []),
            ],
            extra_compile_args=FLAGS,
            library_dirs=[str(TORCH / "lib")],
            libraries=["torch_cpu", "c10"],
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
)
