"""What `bench/aot.py` compiles: every kernel as the launchers start it, recorded without a device.

The launchers run on tensors without storage ("meta"), their `launch` records instead of starting, and
`target.arch` gives the name of a target. So a case is exactly what a launcher asks for: its tiles and the
autotuner's pruned list for that target, which pointers are None, the dtypes. A kernel is covered as soon as a
launcher starts it; a launcher of another op needs a function in `OPS`, a new class of inputs a `Variant`.

Sizes are divisible by 16 except in the `odd` variants, pointers always are. Launches are one case where they
differ in counts alone: of rows, of chunks, of the parts of a reduction.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here, not interpreted

import torch
from peft_fast.triton_kernels import strategies, target
from peft_fast.triton_kernels.launch import OPTIONS
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from peft_fast import triton_kernels
from peft_fast.formats import QuantizedWeight, from_dense
from peft_fast.reference import Needs, ReftNeeds


class Target(NamedTuple):
    compiler: GPUTarget
    shared_kib: int  # the most shared memory that a program may have


TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64),
    "gfx1100": Target(GPUTarget("hip", "gfx1100", 32), 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int64: "i64",
}
# Constants that count the parts of a reduction: only whether there are several changes the code.
PARTS = ("SPLIT", "DOWN_SPLIT", "UP_SPLIT")
# The sizes that are the pitch of a matrix: whether they are divisible by 16 decides how it is read.
PITCHES = ("N", "K", "D", "R")


class Variant(NamedTuple):
    """The operands of a problem: dtypes of the activations and of the adapters, and the weight's storage."""

    x: str
    adapter: str
    weight: str
    out_scale: bool = False

    def __str__(self) -> str:
        return f"{self.x}/{self.adapter}/{self.weight}" + "/out_scale" * self.out_scale


# Weights are nested, the longest decode, in blocks of 64 (nf4) or 128 (nf4-128); `odd` is nf4 with a K that
# is not a multiple of the block size. fp4 is the same code, and mxfp4 but for its blocks of 32. Adapters in
# the dtype of the activations take fewer registers than fp32 ones: odd and dense variants alone show them.
VARIANTS = (
    Variant("bf16", "fp32", "nf4"),
    Variant("bf16", "bf16", "odd"),
    Variant("bf16", "bf16", "dense"),
    Variant("fp16", "fp32", "nf4-128"),
    Variant("fp32", "fp32", "nf4"),
    Variant("fp32", "fp32", "odd"),
    Variant("bf16", "fp32", "nf4", True),
    Variant("fp32", "fp32", "nf4", True),
    Variant("bf16", "fp32", "mxfp4"),
    Variant("bf16", "fp32", "int8"),
    Variant("bf16", "fp32", "fp8"),
)
# Rows of X, by strategy: one for each tile that a launcher picks by M. Odd sizes and out_scale are compiled
# where they change the decode or its place; the other strategies have the same in part. Formats that differ
# from nf4 in the decode alone are compiled in the tiles with the most of them.
ROWS = {
    "splitk": (16, 64), "fused": (16, 64, 4096), "split": (4096,), "library": (4096, 8192), "merge": (4096,)
}  # fmt: skip
SPECIAL = ("splitk", "fused", "merge")
DECODES = ("mxfp4", "int8", "fp8")


class Case(NamedTuple):
    """A specialized kernel: its parameters' types, constants and alignment, and the compiler's options."""

    module: str
    kernel: str
    tile: tuple[tuple[str, int], ...]  # block sizes, num_warps and num_stages
    target: str
    operands: str
    launch: str  # what starts it
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    divisible: tuple[int, ...]

    @property
    def config(self) -> str:
        short = {"num_warps": "warps", "num_stages": "stages"}
        return " ".join(f"{short.get(k, k.removeprefix('BLOCK_'))}={v}" for k, v in self.tile)

    def code(self) -> tuple[Any, ...]:
        """What of a case decides the code, as far as the table is to tell cases apart."""
        constants = {i: value for (i,), value in self.constants}
        kinds = []
        for i, (name, kind) in enumerate(self.signature):
            if kind in ("i32", "i64") or (name.islower() and constants.get(i) == 1):
                kinds.append(f"integer{name in PITCHES and i in self.divisible}")
            elif name in PARTS:
                kinds.append(f"parts{constants[i] > 1}")
            else:
                kinds.append(f"{kind}{constants.get(i)}")
        return (self.kernel, self.tile, self.target, *kinds)

    def __str__(self) -> str:
        return f"{self.kernel} {self.config} {self.target} {self.operands} {self.launch}"


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    meta: dict[str, Any]


# ---------------------------------------------------------------------------------------------------- record


@contextlib.contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """The launches made within the block, on a device of this architecture; nothing is started."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: Any, device: torch.device, *arguments: Any, **meta: Any) -> None:
        launches.append(Launch(kernel, arguments, meta))

    prefix = triton_kernels.__name__ + "."
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(target, "arch", return_value=arch))
        for name, module in list(sys.modules.items()):
            if name.startswith(prefix) and inspect.isfunction(getattr(module, "launch", None)):
                patches.enter_context(mock.patch.object(module, "launch", record))
        yield launches


def cases_of(launch: Launch, arch: str, operands: str, label: str) -> Iterator[Case]:
    """A launch by each config that the autotuner may take for it; one case for a kernel that is not tuned."""
    kernel, choices = launch.kernel, [{}]
    if isinstance(kernel, Autotuner):
        named = dict(zip(kernel.arg_names, launch.arguments, strict=False))
        configs = kernel.early_config_prune(kernel.configs, named, **launch.meta)
        if not configs:
            raise ValueError(f"{kernel.fn.__name__} for {operands} on {arch}: no config is left to tune")
        kernel, choices = kernel.fn, [config.all_kwargs() for config in configs]
    parameters = inspect.signature(kernel.fn)
    for choice in choices:
        meta = launch.meta | choice
        options = {k: v for k, v in meta.items() if k not in parameters.parameters}
        bound = parameters.bind(*launch.arguments, **{k: v for k, v in meta.items() if k not in options})
        bound.apply_defaults()
        signature, constants, divisible = {}, {}, []
        for i, (parameter, value) in enumerate(zip(kernel.params, bound.arguments.values(), strict=True)):
            kind, is_divisible = specialized(value, parameter.is_constexpr)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[i,] = value
            if is_divisible:
                divisible.append(i)
        sizes = ("BLOCK", "ROWS", "COLS")
        tile = {k: v for k, v in bound.arguments.items() if (k.startswith("BLOCK_") or k in sizes) and v}
        tile |= {k: v for k, v in options.items() if k.startswith("num_") and k != "num_ctas"}
        yield Case(
            kernel.fn.__module__, kernel.fn.__name__, tuple(sorted(tile.items())), arch, operands, label,
            tuple(signature.items()), tuple(constants.items()), tuple(divisible),
        )  # fmt: skip


def specialized(value: Any, is_constexpr: bool) -> tuple[str, bool]:
    """A parameter's type as Triton specializes it, and whether it is known to be divisible by 16."""
    if is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}", True
    if isinstance(value, float):
        return "fp32", False
    if value == 1:
        return "constexpr", False
    return "i32" if abs(value) < 2**31 else "i64", value % 16 == 0


# ------------------------------------------------------------------------------------------------------- ops


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight_of(storage: str, N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
    if storage == "dense":
        return from_dense(tensor(N, K, dtype=dtype))
    if storage in ("int8", "fp8"):
        data = tensor(N, K, dtype=torch.int8 if storage == "int8" else torch.uint8)
        return QuantizedWeight(data, tensor(N), None, None, None, None, storage, N, K, K, 0)
    blocksize = {"nf4-128": 128, "mxfp4": 32}.get(storage, 64)
    blocks = -(-N * K // blocksize)
    return QuantizedWeight(
        tensor((N * K + 1) // 2, dtype=torch.uint8), tensor(blocks, dtype=torch.uint8), tensor(16),
        tensor(-(-blocks // 256)), tensor(256), tensor(1), "nf4", N, K, blocksize, 256,
    )  # fmt: skip


def lora_linear() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(operands, label, call) of forward and backward by each strategy."""
    for variant, strategy in itertools.product(VARIANTS, strategies.NAMES):
        ranks = (32, 0) if variant == VARIANTS[0] else (32,)
        for M, rank in itertools.product(ROWS[strategy], ranks):
            odd, dtype, adapter = variant.weight == "odd", DTYPES[variant.x], DTYPES[variant.adapter]
            if (odd or variant.out_scale) and strategy not in SPECIAL:
                continue
            if variant.out_scale and strategy == "fused" and M < 4096:  # the tiles with the most registers
                continue
            if variant.weight in DECODES and (strategy, M) not in (("splitk", 16), ("fused", 4096)):
                continue
            M, N, K, R = (M - 1, 4095, 4090, 31) if odd else (M, 4096, 4096, rank)
            mask = None if strategy == "merge" or R == 0 else tensor(M, (K + 7) // 8, dtype=torch.uint8)
            out_scale = tensor(N) if variant.out_scale else None
            weight = weight_of(variant.weight, N, K, dtype)
            problem = strategies.Problem(
                M, N, K, R, dtype, weight.format, True, mask is not None, variant.out_scale
            )
            if strategy not in strategies.candidates(problem):
                continue

            def call(
                M=M, N=N, K=K, R=R, dtype=dtype, adapter=adapter, weight=weight, mask=mask,
                out_scale=out_scale, strategy=strategy,
            ) -> None:  # fmt: skip
                x, grad, bias = tensor(M, K, dtype=dtype), tensor(M, N, dtype=dtype), tensor(N, dtype=adapter)
                A, B = tensor(R, K, dtype=adapter), tensor(N, R, dtype=adapter)
                y, z = triton_kernels.lora_linear(
                    x, weight, bias, A, B, mask, out_scale, 0.5, 0.1, strategy=strategy
                )
                saved = (None, None) if out_scale is None else (bias, y)
                needs = Needs(True, True, True, True, out_scale is not None)
                triton_kernels.lora_linear_backward(
                    grad, x, weight, A, B, z, mask, out_scale, *saved, 0.5, 0.1, needs, strategy=strategy
                )

            yield str(variant), f"{strategy} M={M}" + " R=0" * (R == 0), call


def dequantize() -> Iterator[tuple[str, str, Callable[[], None]]]:
    for variant in VARIANTS:
        if not variant.out_scale:
            N, K = (4095, 4090) if variant.weight == "odd" else (4096, 4096)
            weight = weight_of(variant.weight, N, K, DTYPES[variant.x])
            yield (
                str(variant),
                "dequantize",
                lambda w=weight, v=variant: triton_kernels.dequantize(w, DTYPES[v.x]),
            )


def loreft() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """All rows and a residual; selected rows, gelu and dropout of the state; more than a rank block."""
    forms = {"all": (1, 15, False, "linear"), "rows": (2, 15, True, "gelu"), "ranks": (2, 41, True, "gelu")}
    for dtype, (form, (terms, r, selected, act)), m in itertools.product(DTYPES, forms.items(), (63, 8191)):
        if dtype == "fp16" and form != "rows":  # as fp32: both are multiplied in fp32
            continue

        def call(dtype=DTYPES[dtype], terms=terms, r=r, selected=selected, act=act, m=m) -> None:
            D, M = 4096, m
            h, grad = tensor(M, D, dtype=dtype), tensor(M, D, dtype=dtype)
            rows = tensor(m, dtype=torch.int64) if selected else None
            residual = None if selected else tensor(M, D, dtype=dtype)
            projection, bias, basis, mask = (
                tensor(terms * r, D), tensor(r), tensor(r, D), tensor(m, D // 8, dtype=torch.uint8)
            )  # fmt: skip
            _, z, kept = triton_kernels.loreft(
                h, residual, rows, projection, bias, basis, mask, 0.1, selected, act
            )
            needs = ReftNeeds(True, True, True, True)
            triton_kernels.loreft_backward(
                grad, kept, rows, projection, bias, basis, z, mask, 0.1, selected, act, needs
            )

        yield f"{dtype}/fp32/{form}", f"loreft m={m}", call


OPS: tuple[Callable[[], Iterable[tuple[str, str, Callable[[], None]]]], ...] = (
    lora_linear,
    dequantize,
    loreft,
)


def cases(targets: Iterable[str] = TARGETS) -> list[Case]:
    """Every kernel × tile × operands that a launcher can ask for on each of the targets, once."""
    found: dict[tuple[Any, ...], Case] = {}
    problems = [problem for op in OPS for problem in op()]
    for arch, (operands, label, call) in itertools.product(targets, problems):
        with recorded(arch) as launches:
            call()
            for launch in launches:  # here, where the autotuner's pruning finds this architecture too
                for case in cases_of(launch, arch, operands, label):
                    found.setdefault(case.code(), case)
    return list(found.values())


def source(case: Case) -> tuple[ASTSource, dict[str, Any]]:
    """What the compiler takes: the specialized kernel, and the options it is launched with."""
    kernel = getattr(importlib.import_module(case.module), case.kernel)
    kernel = kernel.fn if isinstance(kernel, Autotuner) else kernel
    attributes = {(i,): [["tt.divisibility", 16]] for i in case.divisible}
    options = {k: v for k, v in case.tile if k.startswith("num_")}
    return ASTSource(kernel, dict(case.signature), dict(case.constants), attributes), OPTIONS | options
