"""Builds the C++ extension `peft_fast._C` on torch's stable ABI: one abi3 library for torch >= 2.11.

No GPU toolchain is needed. Instruction sets are chosen at run time, so the flags name none.
"""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

sources = sorted(str(p) for p in Path("csrc").rglob("*.cpp"))
headers = sorted(str(p) for p in Path("csrc").rglob("*.h"))

setup(
    ext_modules=[
        CppExtension(
            "peft_fast._C",
            sources,
            depends=headers,
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-Wall",
                "-Wextra",
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
                "-DPy_LIMITED_API=0x03090000",
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False, no_python_abi_suffix=True)},
    options={"bdist_wheel": {"py_limited_api": "cp39"}},
)
