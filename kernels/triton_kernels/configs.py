"""Tile sizes: the lists that are tuned at run time, the tiles that are fixed, and the reason for each.

Tuned are the two main loops over the packed weight, `linear_kernel` and `dx_kernel` (`MAIN_LOOP`). The
launcher picks the row block from M, so it keys the tuning. The other kernels are bound by memory; their tiles
are fixed, which also fixes the order of their sums.

Every tile listed compiles without register spills and within the shared memory of every target, which
`bench/aot.py --check` proves without a GPU. One exception: with out_scale and a dense half-precision weight,
the largest tile of `dx_kernel` needs 256 bytes more than gfx942 has, and the tuner skips it there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import target
from .tiles import INTERPRET

# ------------------------------------------------------------------------------------------ tuned main loops


class Tile(NamedTuple):
    """An output tile [rows, columns] made in steps of `depth`.

    `single` tiles are for fp32 operands; `straddling` ones also take weights whose blocks straddle rows;
    `small` ones are for every operand of the architectures that `target.is_small` names, and for no others.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    single: bool = False
    straddling: bool = False
    small: bool = False

    def takes(self, dtype: torch.dtype, aligned: bool, arch: str) -> bool:
        if self.small or target.is_small(arch):
            return self.small and target.is_small(arch)
        return self.single == (dtype == torch.float32) and (aligned or self.straddling)

    def config(self, columns: str, depth: str) -> triton.Config:
        sizes = {columns: self.columns, depth: self.depth, "GROUP": 8}
        return triton.Config(sizes, num_warps=self.warps, num_stages=self.stages)


MAIN_LOOP: tuple[Tile, ...] = (
    # A few rows: bound by the weight's bytes. Narrow columns give every multiprocessor a program at
    # N = 4096, wide ones read longer runs of a row.
    Tile(16, 32, 128, 4, 4, straddling=True),
    Tile(16, 64, 64, 4, 4),
    # Tens of rows: the warpgroup instruction takes 64; eight warps share the decode where it is narrow.
    Tile(64, 64, 64, 8, 3, straddling=True),
    Tile(64, 128, 64, 8, 3),
    # Training: the more rows a program has, the fewer times a weight is decoded.
    Tile(128, 128, 64, 8, 3),
    # fp32 operands take three products and twice the shared memory: half the tile.
    Tile(16, 32, 64, 4, 3, single=True, straddling=True),
    Tile(64, 64, 32, 8, 2, single=True, straddling=True),
    Tile(128, 64, 32, 8, 2, single=True),
    # Products unrolled into multiply-adds, or with operands held twice.
    Tile(16, 32, 16, 4, 1, small=True),
)
if INTERPRET.value:
    MAIN_LOOP = (Tile(32, 32, 64, 1, 1),)

LINEAR = [tile.config("BLOCK_N", "BLOCK_K") for tile in MAIN_LOOP]
DX = [tile.config("BLOCK_K", "BLOCK_N") for tile in MAIN_LOOP]


def row_block(M: int, x: Tensor, aligned: bool) -> int:
    """The smallest row block of the main loops that holds M rows like those of x, else the largest."""
    if INTERPRET.value:
        return MAIN_LOOP[0].rows
    arch = target.arch(x.device)
    rows = sorted({tile.rows for tile in MAIN_LOOP if tile.takes(x.dtype, aligned, arch)})
    return next((r for r in rows if r >= M), rows[-1])


def admitted(configs: list[triton.Config], arguments: dict[str, Any], **meta: Any) -> list[triton.Config]:
    """The configs of a main loop for this row block, dtype and weight (Triton's `early_config_prune`)."""
    operand = arguments["p_x"] if "p_x" in arguments else arguments["p_g"]
    arch = target.arch(operand.device)
    return [
        config
        for config, tile in zip(configs, MAIN_LOOP, strict=True)
        if tile.rows == meta["BLOCK_M"] and tile.takes(operand.dtype, meta["ALIGNED"], arch)
    ]


def tuned(configs: list[triton.Config]) -> Any:
    return triton.autotune(
        configs, key=["N", "K", "R", "BLOCK_M", "ALIGNED"], prune_configs_by={"early_config_prune": admitted}
    )


# ----------------------------------------------------------------------------------------------- fixed tiles

# By `kind`, then ordered by BLOCK_M, for `by_rows` to take the first that holds all rows. The small
# ones load nothing ahead: without asynchronous copies that would take registers.
SMALL = "small"
Tiles = dict[bool | str, tuple[dict[str, int], ...]]
DOWN: Tiles = {
    # A few rows: K is split between programs. 64 rows keep several programs on each multiprocessor.
    True: (
        {"BLOCK_M": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ),
    # Three TF32 products hold three times the operands in registers: half the depth.
    False: (
        {"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    ),
    SMALL: ({"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},),
}
# 128 columns of G in a step: the running sums of dZ then pass through L2 once per 256 bytes of a row.
UP_BACKWARD: Tiles = {
    True: (
        {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
    ),
    False: (
        {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    ),
    SMALL: ({"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},),
}
# 32 columns: at K = 4096 one program for each multiprocessor, so that no partial sums are needed.
DA: Tiles = {
    True: (
        {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    ),
    False: ({"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},),
    SMALL: ({"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},),
}
# With a tile of dX beside it, half the rows: the other half would spill.
DA_DX: Tiles = {
    True: ({"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},),
    False: ({"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},),
    SMALL: DA[SMALL],
}
# The rows kernels of loreft. A program reads P and the basis whole, from L2, in steps of 4 KiB of rows.
REFT_ROWS: Tiles = {
    # 16 rows, the least that tensor cores take, spread a few edited positions over the device; three steps
    # ahead help so few programs to hide latency. 32 rows read P and the basis half as often, and leave
    # registers for half the depth.
    True: (
        {"BLOCK_M": 16, "BLOCK_D": 128, "num_warps": 8, "num_stages": 4},
        {"BLOCK_M": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
    ),
    # Three TF32 products take twice the registers: eight warps, and 32 rows would spill.
    False: ({"BLOCK_M": 16, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4},),
    SMALL: ({"BLOCK_M": 16, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1},),
}
# Its gradients of P and the basis: at d = 4096 at least one program for each multiprocessor, with loads ahead
# to hide latency. Stripes of a cache line; three TF32 products leave registers for half the rows.
REFT_COLUMNS: Tiles = {
    True: ({"BLOCK_M": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 5},),
    False: ({"BLOCK_M": 16, "BLOCK_D": 32, "num_warps": 4, "num_stages": 4},),
    SMALL: ({"BLOCK_M": 16, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1},),
}
# A tile of a decoded weight: 2 KiB of codes, enough in flight with the few programs that fit beside the
# stages of `down_kernel`. All kernels that write one have this many warps.
WRITE = {"ROWS": 32, "COLS": 128}
WRITE_SMALL = {"ROWS": 16, "COLS": 64}
WRITE_WARPS = 4
# The sums of splitk's partial results: a program for each multiprocessor at N = 4096 and 16 rows.
FINISH = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4}
SUM = {"BLOCK": 1024, "num_warps": 4}
if INTERPRET.value:
    DOWN = dict.fromkeys(DOWN, ({"BLOCK_M": 32, "BLOCK_K": 32},))
    UP_BACKWARD = dict.fromkeys(UP_BACKWARD, ({"BLOCK_M": 16, "BLOCK_N": 32},))
    DA = DA_DX = dict.fromkeys(DA, ({"BLOCK_M": 16, "BLOCK_K": 64},))
    WRITE = WRITE_SMALL = {"ROWS": 32, "COLS": 64}
    FINISH = {"BLOCK_M": 16, "BLOCK_N": 32}
    SUM = {"BLOCK": 256}
# With Y beside G, 32 rows of 128 columns would spill.
UP_BACKWARD_OUT_SCALE: Tiles = UP_BACKWARD | {True: UP_BACKWARD[True][:1]}


def kind(x: Tensor) -> bool | str:
    """SMALL, or whether operands are bfloat16, which the tensor cores take as they are."""
    return SMALL if target.is_small(target.arch(x.device)) else x.dtype == torch.bfloat16


def by_rows(tiles: Tiles, M: int, x: Tensor) -> dict[str, int]:
    """The first tile that holds M rows like those of x, else the last.

    Rows of x that do not begin on 16 elements are read one by one, which takes registers: the first, then.
    """
    choices = tiles[kind(x)]
    if x.shape[-1] % 16:
        return choices[0]
    return next((tile for tile in choices if tile["BLOCK_M"] >= M), choices[-1])


def write_tile(out: Tensor, aligned: bool) -> dict[str, int]:
    """The tile of a decoded weight; `aligned` as in decode.py."""
    return WRITE if aligned and kind(out) != SMALL else WRITE_SMALL


# A main loop adds the low-rank term in steps of 16; the other kernels take ranks up to 32 at once, which fits
# their registers on every target.
RANK_STEP = 16
RANKS = (16, 32)


def rank_block(R: int, x: Tensor) -> int:
    """The rank padded to one of `RANKS`; the kernels bound by memory give a larger one several programs."""
    ranks = RANKS[:1] if kind(x) == SMALL else RANKS
    return next((padded for padded in ranks if padded >= R), ranks[-1])


# Programs that occupy a large device, one for each multiprocessor, and how many partial sums of dZ they make.
# Numbers of the shape alone: the order of sums does not depend on the device.
PROGRAMS, CHUNKS = (4, 2) if INTERPRET.value else (128, 8)


def split(programs: int, steps: int, sharing: int = 1) -> int:
    """Into how many partial sums to split a reduction of `steps` steps, a power of two up to 16.

    `sharing` programs are to share a multiprocessor.
    """
    parts = 1
    while parts < 16 and parts * programs < sharing * PROGRAMS and 2 * parts <= steps:
        parts *= 2
    return parts


def whole_rows(m: int, x: Tensor) -> dict[str, int]:
    """The tile of `down_kernel` where K is not split: the most rows whose programs fill a device."""
    tiles = DOWN[kind(x)][: 1 if x.shape[-1] % 16 else None]
    return next((tile for tile in reversed(tiles) if m >= PROGRAMS * tile["BLOCK_M"]), tiles[0])


def splitk(M: int, columns: int, depth: int, x: Tensor) -> tuple[Tile, int]:
    """The tile and the number of partial sums for M rows of a product [M, columns] that sums over `depth`."""
    arch = target.arch(x.device)
    tiles = [tile for tile in MAIN_LOOP if tile.takes(x.dtype, False, arch) or INTERPRET.value]
    tile = next((tile for tile in tiles if tile.rows >= M), tiles[-1])
    programs = triton.cdiv(M, tile.rows) * triton.cdiv(columns, tile.columns)
    # Four warps of one program would leave the memory waiting.
    return tile, split(programs, triton.cdiv(depth, tile.depth), sharing=4)


def reft_rows(m: int, x: Tensor) -> dict[str, int]:
    """The tile of the rows kernels of loreft for m rows: the last where its programs fill a device."""
    tiles = REFT_ROWS[kind(x)]
    return tiles[-1] if m >= PROGRAMS * tiles[-1]["BLOCK_M"] else tiles[0]


def chunks(column_blocks: int, ranks: int, row_blocks: int) -> tuple[int, int, int]:
    """How a pass over G [M, N] is shared: (chunks, column blocks in each, split of the row blocks).

    Each chunk costs a partial sum of dZ [M, R]: `CHUNKS` for many rows, more where few leave programs idle.
    """
    parts = split(CHUNKS * ranks, row_blocks)
    wanted = min(column_blocks, max(CHUNKS, triton.cdiv(PROGRAMS, parts * ranks)))
    columns = triton.cdiv(column_blocks, max(wanted, 1))
    return triton.cdiv(column_blocks, max(columns, 1)), columns, parts
