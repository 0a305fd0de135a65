"""Builds the C++ extension `peft_fast._C` on torch's stable ABI: one abi3 library for torch >= 2.11.

A plain extension: no GPU toolchain, nothing of torch's Python bindings. Instruction sets are chosen at run
time, so the flags name none.
"""

from pathlib import Path

import torch
from setuptools import Extension, setup

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

setup(
    ext_modules=[
        Extension(
            "peft_fast._C",
            sorted(str(p) for p in Path("csrc").rglob("*.cpp")),
            depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x03090000")],
            extra_compile_args=FLAGS,
            library_dirs=[str(TORCH / "lib")],
            libraries=["torch_cpu", "c10"],
            language="c++",
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
)
