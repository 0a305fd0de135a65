"""The norm of DoRA's denominator, ‖Ŵ + s·B·A‖ per row: what it costs where it is not cached, and its error.

Time, in turns, cold caches, median milliseconds, for a nested NF4 weight [N, K], fp32 adapters:

    dequantize   one pass that decodes Ŵ to a fresh fp32 [N, K]: the unit of `ratio`
    cold         the norm from the packed weight with ‖ŵ‖² kept, as the first forward after an optimizer step
    first        with ‖ŵ‖² too, as the first forward of a layer
    cached       the check that A and B are unchanged, as every other forward
    peft         PEFT's way, at every forward: B·A through an identity, a dequantization (of bitsandbytes, or
                 the one above where that is not installed), a dense norm

In the file each has its column, `dequantize_ms` and so on; `ratio` is cold over dequantize. On a GPU the host
waits for the device before and after each.

Error against fp64, the largest over rows, relative, for updates s·B·A much smaller than Ŵ to much larger, and
for one that cancels Ŵ but for a millionth (a base of rank R, s·B·A = −(1 − 1e-6)·Ŵ): the factored form alone,
ours (which takes cancelled rows directly), and the dense computation in fp32 that PEFT does.

    python bench/dora_norm.py --shape 4096 4096 --threads 1 2 --csv bench/results/dora_norm.csv
    python bench/dora_norm.py --device cuda
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from peft_fast.bench import layers, measure
from peft_fast.bench.layers import Operands, Shape, linear4bit, make_operands
from peft_fast.bench.lora_linear import append
from peft_fast.bench.methods import SCALING
from torch import Tensor

from peft_fast import dora
from peft_fast.formats import from_dense, from_linear
from peft_fast.functional import dequantize
from peft_fast.info import device_name, versions
from peft_fast.norm_cache import NormCache

UPDATES = (1e-6, 1e-3, 1.0, 1e3)
CANCELLED = 1e-6


def timed(operands: Operands, seconds: float) -> dict[str, float]:
    """The median milliseconds of each way, taken in turns with cold caches, on the device of the operands."""
    base = linear4bit(operands, torch.float32)
    weight, A, B = from_linear(base), operands.lora_A, operands.lora_B
    squares = dora.row_norms_squared(weight)
    cache = NormCache()
    theirs, identity = DoraLinearLayer(fan_in_fan_out=False), torch.eye(A.shape[1], device=A.device)
    their_base = linear4bit(operands, torch.float32)  # PEFT puts a new parameter in its place

    def peft_norm() -> Tensor:
        delta = ((identity @ A.t()) @ B.t()).t()
        plain = layers.bnb is None
        dense = dequantize(weight, torch.float32) if plain else dequantize_module_weight(their_base)
        return theirs.get_weight_norm(dense, delta, SCALING)

    ways: dict[str, Callable[[], object]] = {
        "dequantize": lambda: dequantize(weight, torch.float32),
        "cold": lambda: dora.lora_weight_norm(weight, A, B, SCALING, norms_squared=squares),
        "first": lambda: dora.lora_weight_norm(weight, A, B, SCALING),
        "cached": lambda: cache.norm(base, weight, A, B, SCALING, "auto"),
        "peft": peft_norm,
    }
    device = A.device.type
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    flush = measure.cache_flush(device, measure.last_level_cache(device))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for way in ways.values():
            way()
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(samples["peft"]) < measure.MIN_SAMPLES:
            for name, way in ways.items():
                flush()
                wait()
                start = time.perf_counter()
                way()
                wait()
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


def errors(case: str, W: Tensor, A: Tensor, B: Tensor, s: float) -> dict[str, object]:
    """The largest relative errors over the rows of W [N, K] fp32 + s·B·A, of three ways to the norm."""
    truth = torch.linalg.vector_norm(W.double() + s * B.double() @ A.double(), dim=1)
    norm_squared = W.square().sum(1) + 2 * s * (B * (W @ A.t())).sum(1) + s**2 * (B @ (A @ A.t()) * B).sum(1)
    found = {
        "factored": norm_squared.clamp(min=0).sqrt(),
        "ours": dora.lora_weight_norm(from_dense(W), A, B, s),
        "dense": torch.linalg.vector_norm(W + s * B @ A, dim=1),
    }
    worst = {name: ((value.double() - truth) / truth).abs().max().item() for name, value in found.items()}
    return {"case": case, **{name: f"{value:.1e}" for name, value in worst.items()}}


def error_rows(shape: Shape) -> list[dict[str, object]]:
    """`errors` for updates of each size, and for one that cancels the base."""
    operands = make_operands(shape)
    W, A, B = operands.dense, operands.lora_A, operands.lora_B
    unit = W.norm() / (B @ A).norm()
    rows = [errors(f"‖s·B·A‖ = {size:g}·‖W‖", W, A, B, float(size * unit)) for size in UPDATES]
    return [*rows, errors(f"s·B·A = −(1 − {CANCELLED:g})·W", B @ A, A, B, CANCELLED - 1)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("K", "N"), help="default: %(default)s")
    add("--rank", type=int, default=16, metavar="R")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="a row each")
    add("--seconds", type=float, default=5.0, help="of timing per number of threads")
    add("--csv", type=Path, help="file to append the timings to")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, got cuda, which torch does not find here")
    shape, name = Shape(*args.shape, args.rank, args.device), device_name(args.device)
    case = {
        "date": datetime.date.today(), "device": name, **versions(), "K": shape.K, "N": shape.N, "R": shape.R,
    }  # fmt: skip
    print(f"{name}; K={shape.K} N={shape.N} R={shape.R}, nested NF4, fp32 adapters")
    for row in error_rows(shape):
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    operands = make_operands(shape)
    for threads in args.threads:
        torch.set_num_threads(threads)
        ms = timed(operands, args.seconds)
        print(f"threads={threads}  " + "  ".join(f"{name} {value:.3f} ms" for name, value in ms.items()))
        ratio = ms["cold"] / ms["dequantize"]
        print(f"cold / dequantize {ratio:.2f}, peft / cold {ms['peft'] / ms['cold']:.1f}", flush=True)
        if args.csv is not None:
            values = {f"{name}_ms": f"{value:.6g}" for name, value in ms.items()}
            append(args.csv, [{**case, "threads": threads, **values, "ratio": f"{ratio:.6g}"}])


if __name__ == "__main__":
    main()
