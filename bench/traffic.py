"""The traffic model of bench/roofline.py: bytes, FLOPs and launches of lora_linear, and predicted times.

Nothing here is measured. The time of a launch is

    max(bytes / bandwidth, FLOPs / rate) + LAUNCH

and a pass is the sum of its launches, beside the frozen dense layer by the same rule (two GEMMs). Assumed:

- Bytes go to and come from DRAM, once for each operand of a launch: caches hold what a launch reads again,
  and nothing that another launch read, so that X of the Z pass is counted again in the GEMM. What fits into
  half of L2 costs nothing as a temporary of one launch for the next (decoded scratch, partial sums).
- The host is ahead of the device, as in a training step or a CUDA graph; LAUNCH is start, ramp and tail.
- Rates are parts of the public peaks: what cuBLAS and a copy reach at M = N = K = 4096 on an H200. A product
  in Triton reaches TRITON of the library's, or NARROW where its result is as narrow as the rank.
- Adapters are fp32. A bf16 × fp32 product costs three bf16 products; fp16 × fp32 and fp32 × fp32 cost three
  TF32 products, or one where the result is rounded to half precision, and an fp32 GEMM of the library runs
  on the FP32 units. Ranks are padded to 16; programs for further ranks run beside those that read the same.
- Decoding a weight costs DECODE operations of the FP32 units, once for each block of rows that decodes it,
  and does not overlap with the tensor cores of its main loop. DECODE is calibrated: fused and split are then
  even at M ≈ 500 on Hopper.
- A GEMM in Triton with fewer programs than multiprocessors uses that part of the device; splitk and the
  library share the reduction instead. Waves that are partly full are in the achieved rate.
- gemv decodes as the others do, and multiplies on the FP32 units, up to GEMV_SPLITS partial sums of dX.
- The scratch is in one panel. Drawing the dropout mask and DoRA's norm, once a step, are not counted.

Peers are counted from their source: PEFT's layer (clone, casts, scale and add as passes of their own) and
Unsloth's LoRA_W, both on bitsandbytes' three-launch nested dequantization in both directions (not its fused
kernel for few rows). Their thin products are taken to reach the full rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft_fast.triton_kernels.strategies import GEMV, Direction, Problem

LAUNCH = 2e-6
ACHIEVED_FLOPS, ACHIEVED_BANDWIDTH = 0.8, 0.9  # 790 of 989 TFLOP/s and 4.3 of 4.8 TB/s on an H200
TRITON, NARROW = 0.9, 0.5
DECODE = 5.0

# As in kernels/triton_kernels/configs.py: blocks of rows of a GEMM with the narrowest of columns, ranks and
# rows of a thin product, partial sums of dZ, and the programs that other reductions are split for. Not
# imported from there, which takes Triton: tests/traffic_sizes.py compares them.
TILES = ((16, 32), (64, 64), (128, 64))
RANKS, THIN_ROWS = 32, 32
CHUNKS, PROGRAMS, SPLITK_PROGRAMS = 8, 128, 512

# As in csrc/cuda/backward.cu: columns and least rows of a partial sum of dX, blocks, and most partial sums.
GEMV_COLUMNS, GEMV_ROWS, GEMV_BLOCKS, GEMV_SPLITS, GEMV_CHUNKS = 256, 64, 512, 64, 32


class Device(NamedTuple):
    """Public dense peaks: FLOP/s of half and TF32 tensor cores and of the FP32 units, bytes/s, L2 bytes.

    `half` accumulates in fp32. `tf32` is 0 where there is none; fp32 products then run on the FP32 units.
    """

    half: float
    tf32: float
    single: float
    bandwidth: float
    l2: float
    multiprocessors: int


# From the vendors' data sheets, without sparsity.
DEVICES = {
    "H200": Device(989e12, 495e12, 67e12, 4.8e12, 50e6, 132),
    "H100": Device(989e12, 495e12, 67e12, 3.35e12, 50e6, 132),  # SXM, HBM3
    "A100": Device(312e12, 156e12, 19.5e12, 2.04e12, 40e6, 108),  # SXM, 80 GB
    "B200": Device(2250e12, 1125e12, 75e12, 7.7e12, 126e6, 148),
    "L40S": Device(362e12, 183e12, 91.6e12, 0.864e12, 96e6, 142),
    "L4": Device(121e12, 60e12, 30.3e12, 0.3e12, 48e6, 58),  # its 72 W allow less
    "RTX 4090": Device(165e12, 82.6e12, 82.6e12, 1.008e12, 72e6, 128),
    "RTX 5090": Device(209e12, 105e12, 105e12, 1.792e12, 96e6, 170),
    "T4": Device(65e12, 0, 8.1e12, 0.32e12, 4e6, 40),  # half is fp16 alone
    # L2 is 4 MB for each of eight dies; the 256 MB of Infinity Cache behind it are not counted. The matrix
    # units take fp32 operands as they are, which the peak of the FP32 units stands for.
    "MI300X": Device(1307e12, 0, 163e12, 5.3e12, 4e6, 304),
}


class Layout(NamedTuple):
    """Of a packed weight: bytes of an element, elements that share a scale, None for a row's, bytes of it."""

    element: float
    block: int | None
    scale: float


# Blocks of 64 are bitsandbytes' default. Nested scales have a byte each, and scales of groups of 256.
PLAIN, NESTED = Layout(0.5, 64, 4), Layout(0.5, 64, 1 + 4 / 256)
LAYOUTS = {
    ("nf4", False): PLAIN, ("nf4", True): NESTED, ("fp4", False): PLAIN, ("fp4", True): NESTED,
    ("mxfp4", True): Layout(0.5, 32, 1), ("int8", False): Layout(1, None, 4),
    ("fp8", False): Layout(1, None, 4),
}  # fmt: skip
"""By the format and whether its scales are coded."""


class Product(NamedTuple):
    """FLOPs on "half", "tf32", "tf32x3" (three TF32 products) or "fp32" units, at a part of their peak."""

    flops: float
    units: str
    rate: float

    def seconds(self, device: Device) -> float:
        tf32 = max(device.tf32, device.single)
        peak = {
            "half": device.half, "tf32": tf32, "tf32x3": max(device.tf32 / 3, device.single),
            "fp32": device.single,
        }  # fmt: skip
        return self.flops / (peak[self.units] * ACHIEVED_FLOPS * self.rate)


class Launch(NamedTuple):
    """What one launch moves to and from DRAM, multiplies and decodes, and how many programs share it."""

    name: str
    bytes: float
    products: tuple[Product, ...] = ()
    decodes: float = 0.0
    programs: float = math.inf

    @property
    def flops(self) -> float:
        return sum(product.flops for product in self.products)

    def seconds(self, device: Device) -> tuple[float, float]:
        """(memory, compute), of which the longer counts."""
        compute = sum(product.seconds(device) for product in self.products)
        compute += self.decodes * DECODE / (device.single / 2)
        used = min(1.0, self.programs / device.multiprocessors)
        return self.bytes / (device.bandwidth * ACHIEVED_BANDWIDTH) / used, compute / used

    def union(self, other: Launch) -> Launch:
        """Programs of both in one launch."""
        return Launch(
            f"{self.name} ∪ {other.name}",
            self.bytes + other.bytes,
            self.products + other.products,
            self.decodes + other.decodes,
        )


def seconds(launches: Sequence[Launch], device: Device) -> float:
    return sum(max(launch.seconds(device)) + LAUNCH for launch in launches)


def _parts(programs: float, wanted: int, steps: float = math.inf) -> int:
    """Into how many partial sums a reduction of `steps` steps is split: a power of two up to 16."""
    parts = 1
    while parts < 16 and parts * programs < wanted and 2 * parts <= steps:
        parts *= 2
    return parts


class Sizes:
    """The operands of a problem in bytes, and the launches that strategies have in common."""

    def __init__(self, problem: Problem, device: Device):
        self.problem, self.device = problem, device
        M, N, K, R = problem[:4]
        self.half = problem.dtype != torch.float32
        element = 2 if self.half else 4
        self.x, self.y, self.w = M * K * element, M * N * element, N * K * element
        self.rank = math.ceil(R / 16) * 16
        self.rank_blocks = math.ceil(R / RANKS)
        self.a, self.b, self.z = 4 * R * K, 4 * N * R, 4 * M * R
        self.mask = M * K / 8 if problem.dropout else 0.0
        self.packed = problem.format != "dense"
        self.base = self.w
        if self.packed:
            element, block, scale = LAYOUTS[problem.format, problem.nested]
            self.base = N * K * element + N * K / (block or K) * scale
        # What a GEMM of the library or of split reads: the scratch, or a dense weight itself.
        self.decoded = self.temporary(self.w) if self.packed else self.w
        self.rows, self.columns = next((tile for tile in TILES if tile[0] >= M), TILES[-1])
        self.row_blocks = math.ceil(M / self.rows)

    def temporary(self, size: float) -> float:
        """DRAM bytes of writing it, or of reading it again."""
        return 0.0 if size <= self.device.l2 / 2 else size

    def thin(self, name: str, wide: float, size: float, flops: float) -> Launch:
        """Products of X or dY, `wide` bytes, with fp32 rank columns; `size` bytes beside it."""
        if self.rank == 0:
            return Launch(name, 0.0)
        bf16 = self.problem.dtype == torch.bfloat16
        product = Product(3 * flops if bf16 else flops, "half" if bf16 else "tf32x3", NARROW)
        return Launch(name, wide + size, (product,))

    def through_rank(self, rows: int, columns: int) -> Product:
        """A product of fp32 operands [rows, R] and [R, columns], rounded to the dtype of X."""
        return Product(2.0 * rows * columns * self.rank, "tf32" if self.half else "tf32x3", TRITON)

    def gemm(self, name: str, size: float) -> Launch:
        """The library's."""
        M, N, K = self.problem[:3]
        return Launch(name, size, (Product(2.0 * M * N * K, "half" if self.half else "fp32", 1.0),))

    def main_loop(self, name: str, size: float, columns: int, *low_rank: Product, decodes: bool) -> Launch:
        """A GEMM in Triton, with the low-rank term as further steps."""
        M, N, K = self.problem[:3]
        product = Product(2.0 * M * N * K, "half" if self.half else "tf32x3", TRITON)
        weights = float(self.row_blocks * N * K) if decodes else 0.0
        return Launch(name, size, (product, *low_rank), weights, self._programs(columns))

    def split_k(self, size: float, columns: int) -> tuple[Launch, float]:
        """(the partial sums of X·Ŵᵀ or dY·Ŵ, their bytes)."""
        parts = _parts(self._programs(columns), SPLITK_PROGRAMS)
        sums = self.temporary(4.0 * parts * self.problem.M * columns)
        base = self.main_loop("base", self.base + size + sums, columns, decodes=self.packed)
        return base._replace(programs=math.inf), sums

    def gemv(self, name: str, size: float) -> Launch:
        """The base product of a few rows by CUDA C++, `size` bytes beside the weight."""
        M, N, K = self.problem[:3]
        return Launch(name, self.base + size, (Product(2.0 * M * N * K, "fp32", 1.0),), float(N * K))

    def _programs(self, columns: int) -> int:
        return self.row_blocks * math.ceil(columns / self.columns)

    def decode(self) -> Launch:
        N, K = self.problem[1:3]
        return Launch("decode", self.base + self.temporary(self.w), decodes=float(N * K))

    def merge(self) -> Launch:
        """The decode with s·B·A added to it."""
        launch, update = self.decode(), self.through_rank(*self.problem[1:3])
        return launch._replace(name="merge", bytes=launch.bytes + self.a + self.b, products=(update,))


def launches(strategy: str, direction: Direction, problem: Problem, device: Device) -> list[Launch]:
    """What a strategy launches; without a rank, passes for it alone are left out."""
    found = (_forward if direction == "forward" else _backward)(strategy, problem, device)
    return [launch for launch in found if launch.bytes]


def _forward(strategy: str, problem: Problem, device: Device) -> list[Launch]:
    """The launches of Y and Z."""
    s = Sizes(problem, device)
    M, N, K = problem[:3]
    z = s.thin("Z", s.x, s.mask + s.a + s.z, 2.0 * M * K * s.rank)
    up = s.through_rank(M, N)
    ends = s.x + s.z + s.b + s.y
    if strategy == GEMV:
        return [z, s.gemv("Y", ends)]
    if strategy == "splitk":
        base, sums = s.split_k(s.x, N)
        return [z.union(base), Launch("finish", sums + s.z + s.b + s.y, (up,))]
    if strategy == "fused" or (strategy == "split" and not s.packed):
        return [z, s.main_loop("linear", s.base + ends, N, up, decodes=s.packed)]
    if strategy == "split":
        return [z.union(s.decode()), s.main_loop("linear", s.decoded + ends, N, up, decodes=False)]
    if strategy == "merge":
        return [z.union(s.merge()), s.gemm("GEMM", s.decoded + s.x + s.y)]
    first = z._replace(name="Z and Y0", bytes=z.bytes + s.b + s.y, products=(*z.products, up))
    first = first.union(s.decode()) if s.packed else first
    return [first, s.gemm("GEMM", s.decoded + s.x + 2 * s.y)]


def _backward(strategy: str, problem: Problem, device: Device) -> list[Launch]:
    """The launches of dX, dA and dB, and of the gradient of out_scale, which reads Y beside dY."""
    s = Sizes(problem, device)
    M, N, K = problem[:3]
    parts = _parts(CHUNKS * s.rank_blocks, PROGRAMS, math.ceil(M / THIN_ROWS))
    sums_read = s.temporary(CHUNKS * s.z + parts * s.b)
    beside = s.b + s.z + sums_read + (s.y if problem.out_scale else 0)
    dy = s.thin("dY pass", s.y, beside, 4.0 * M * N * s.rank)
    sums = Launch("sums", sums_read + s.z + s.b)
    d_a = s.thin("dA", s.x, s.mask + s.z + s.a, 2.0 * M * K * s.rank)
    down = s.through_rank(M, K)
    ends = s.y + s.a + s.z + s.mask + s.x
    if strategy == GEMV:
        splits = max(1, GEMV_BLOCKS // math.ceil(K / GEMV_COLUMNS))
        splits = min(math.ceil(N / GEMV_ROWS), splits, GEMV_SPLITS)
        sums = s.temporary(4.0 * splits * M * K + GEMV_CHUNKS * s.z)
        base = s.gemv("base ∪ dY pass", s.y + sums)
        first = base._replace(bytes=base.bytes + 2 * s.b + s.z + (s.y if problem.out_scale else 0))
        return [first, Launch("finish", sums + 2 * s.a + s.mask + 2 * s.x, (down,))]
    if strategy == "splitk":
        base, shared = s.split_k(s.y, K)
        finish = Launch("finish", shared + s.a + s.z + s.mask + s.x, (down,))
        return [dy, sums.union(base), finish.union(d_a)]
    if strategy == "fused" or (strategy == "split" and not s.packed):
        return [dy, sums, s.main_loop("dX", s.base + ends, K, down, decodes=s.packed), d_a]
    if strategy == "split":
        linear = s.main_loop("dX", s.decoded + ends, K, down, decodes=False)
        return [dy, sums.union(s.decode()), linear, d_a]
    if strategy == "merge":
        return [dy, sums.union(s.merge()), d_a, s.gemm("GEMM", s.decoded + s.y + s.x)]
    sums = sums.union(s.decode()) if s.packed else sums
    both = d_a._replace(name="dA and dX0", bytes=d_a.bytes + s.a + s.x, products=(*d_a.products, down))
    return [dy, sums, both, s.gemm("GEMM", s.decoded + s.y + 2 * s.x)]


def frozen(problem: Problem, device: Device) -> list[Launch]:
    """The frozen dense layer in the same dtype: Y and dX, two GEMMs of the library."""
    s = Sizes(problem, device)
    return [s.gemm(name, s.w + s.x + s.y) for name in ("Y", "dX")]


# ---------------------------------------------------------------------------------------------------- peers


def _dequantized(s: Sizes, name: str, problem: Problem) -> list[Launch]:
    """bitsandbytes: the absmax of each block, plus its offset, then the weight, then a GEMM reads that."""
    blocks = problem.N * problem.K / 64
    found = [Launch("weight", problem.N * problem.K / 2 + 4 * blocks + s.temporary(s.w))]
    if problem.nested:
        found = [Launch("absmax", 5 * blocks), Launch("offset", 8 * blocks), *found]
    return [*found, s.gemm(name, s.temporary(s.w) + s.x + s.y)]


def peft(problem: Problem, device: Device, adapters: torch.dtype) -> tuple[list[Launch], list[Launch]]:
    """(forward, backward) of PEFT's LoRA layer with adapters in this dtype, outside of autocast."""
    s = Sizes(problem, device)
    M, N, K, R = problem[:4]
    element = adapters.itemsize
    x, y, z, a, b = (element * n for n in (M * K, M * N, M * R, R * K, N * R))
    cast = adapters != problem.dtype

    def product(name: str, size: float, wide: int) -> Launch:
        units = "fp32" if adapters == torch.float32 else "half"
        return Launch(name, size, (Product(2.0 * M * wide * R, units, 1.0),))

    first = [*_dequantized(s, "Y", problem), Launch("clone", 2 * s.y)]
    first += [Launch("X cast", s.x + x)] if cast else []
    first += [product("Z", x + a + z, K), product("Z·Bᵀ", z + b + y, N), Launch("scale", 2 * y)]
    first += [Launch("cast", y + s.y)] if cast else []
    first += [Launch("add", 3 * s.y)]
    then = [Launch("dY cast", s.y + y)] if cast else []
    then += [Launch("scale", 2 * y), product("dB", y + z + b, N), product("dZ", y + b + z, N)]
    then += [product("dA", x + z + a, K), product("dZ·A", z + a + x, K)]
    then += [Launch("dX cast", x + s.x)] if cast else []
    return first, [*then, *_dequantized(s, "dX", problem), Launch("add", 3 * s.x)]


def unsloth(problem: Problem, device: Device) -> tuple[list[Launch], list[Launch]]:
    """(forward, backward) of Unsloth's LoRA_W; it rounds A and B to the dtype of X first."""
    s = Sizes(problem, device)
    M, N, K, R = problem[:4]
    z, a, b = (s.x / K * R, s.w / N * R, s.w / K * R)
    casts = [Launch("A cast", 4 * R * K + a), Launch("B cast", 4 * R * N + b)]

    def product(name: str, size: float, wide: int) -> Launch:
        return Launch(name, size, (Product(2.0 * M * wide * R, "half", 1.0),))

    first = [*_dequantized(s, "Y", problem), *casts, product("X·A", s.x + a + z, K)]
    first += [product("Y += Z·B", 2 * s.y + z + b, N)]
    then = [*casts, product("dY·B", s.y + b + z, N), product("dA", s.x + z + a, K)]
    then += [product("A·X", s.x + a + z, K), product("dB", s.y + z + b, N)]
    then += [*_dequantized(s, "dX", problem), product("dY·B", s.y + b + z, N)]
    return first, [*then, product("dX += dZ·A", 2 * s.x + z + a, K)]
