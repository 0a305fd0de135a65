"""Compares the sizes that bench/traffic.py repeats with the Triton kernels'; run without the interpreter."""

import torch
from peft_fast.bench import traffic
from peft_fast.triton_kernels import configs
from peft_fast.triton_kernels.strategies import Problem

large = [tile for tile in configs.MAIN_LOOP if not tile.small]
narrowest = {
    rows: min(t.columns for t in large if t.rows == rows) for rows in sorted({t.rows for t in large})
}
assert tuple(narrowest.items()) == traffic.TILES, narrowest
assert configs.RANKS[-1] == traffic.RANKS
assert configs.UP_BACKWARD[True][-1]["BLOCK_M"] == traffic.THIN_ROWS
assert (configs.CHUNKS, configs.PROGRAMS) == (traffic.CHUNKS, traffic.PROGRAMS)

configs.target.arch = lambda device: "sm_90"
for M in (1, 16, 64):
    for columns in (1024, 4096, 14336):
        x = torch.empty(M, 2**14, dtype=torch.bfloat16)
        problem = Problem(M, columns, 2**14, 16, x.dtype, "nf4", True, False, False)
        sizes = traffic.Sizes(problem, traffic.DEVICES["H200"]._replace(l2=0))
        _, bytes_of_sums = sizes.split_k(sizes.x, columns)
        tile, parts = configs.splitk(M, columns, 2**14, x)
        assert (tile.rows, tile.columns) == (sizes.rows, sizes.columns), (M, columns, tile)
        assert bytes_of_sums == 4 * parts * M * columns, (M, columns, parts)
