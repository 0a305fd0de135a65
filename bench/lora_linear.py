"""One QLoRA linear layer, forward + backward, against the frozen dense layer and PEFT on bitsandbytes.

The providers run interleaved, so each finds the caches as the others left them; medians are printed. The
dense layer computes dX only (its weight is frozen), the adapted ones dX, dA and dB. Outputs and gradients of
the fused layer are compared with the reference in fp64 before anything is timed.

    python bench/lora_linear.py --shape 4096 4096 --rows 1 16 512 --csv bench/results/lora_linear.csv
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn

from peft_fast import reference
from peft_fast.formats import from_dense, from_linear
from peft_fast.info import cpu_name
from peft_fast.modules import LoRALinear

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Timing(NamedTuple):
    """Percentiles of a run's milliseconds."""

    p20: float
    p50: float
    p80: float


def quantized(dense: nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """`dense` as nested NF4, on its device."""
    N, K = dense.weight.shape
    layer = bnb.nn.Linear4bit(
        K, N, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=True
    )
    layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return layer.to(dense.weight.device)


def peft_layer(base: bnb.nn.Linear4bit, fused: LoRALinear) -> nn.Module:
    """PEFT's LoRA on `base`, with the adapter of `fused`."""
    config = peft.LoraConfig(r=fused.r, lora_alpha=fused.scaling * fused.r, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(fused.lora_A.data)
    layer.lora_B["default"].weight.data.copy_(fused.lora_B.data)
    return layer


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """One forward and backward; gradients are dropped before, as an optimizer would."""
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None
    layer(x).backward(grad)


def check(layer: LoRALinear, x: Tensor, grad: Tensor) -> None:
    """Raises AssertionError unless y, dX, dA and dB are those of the reference in fp64."""
    weight = from_dense(from_linear(layer.base_layer).decode(torch.float64))
    A, B, xd, g = (t.detach().double() for t in (layer.lora_A, layer.lora_B, x, grad))
    y, z = reference.lora_linear(xd, weight, None, A, B, None, layer.scaling, 0.0)
    needs = reference.Needs(True, True, True, False)
    grads = reference.lora_linear_backward(g, xd, weight, A, B, z, None, layer.scaling, 0.0, needs)
    step(layer, x, grad)
    got = {"y": layer(x), "dX": x.grad, "dA": layer.lora_A.grad, "dB": layer.lora_B.grad}
    truth = {"y": y, "dX": grads.x, "dA": grads.lora_A, "dB": grads.lora_B}
    for name, value in got.items():
        error = ((value.double() - truth[name]).norm() / truth[name].norm()).item()
        assert error <= TOLERANCE[x.dtype], f"{name}: relative error {error:.2e} against fp64"


def interleaved(runs: dict[str, Callable[[], None]], seconds: float, device: str) -> dict[str, Timing]:
    """The time of each run, taken in turns for about `seconds`, at least five times each."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < 5:
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: percentiles(values) for name, values in times.items()}


def percentiles(values: list[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(values), fifths[3])


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Adds rows to a CSV file, which gets its header when it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 512], metavar="M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the activations")
    parser.add_argument("--backend", default="auto", help="of the fused layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each number of rows")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    (N, K), dtype = args.shape, DTYPES[args.dtype]

    dense = nn.Linear(K, N, bias=False, device=args.device).requires_grad_(False)
    base = quantized(dense, dtype)
    fused = LoRALinear.from_linear(copy.deepcopy(base), r=args.rank, backend=args.backend)
    nn.init.normal_(fused.lora_B, std=0.02)
    adapted = peft_layer(base, fused)
    dense = dense.to(dtype)

    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    versions = f"torch {torch.__version__}, peft {peft.__version__}, bitsandbytes {bnb.__version__}"
    where = f"{device}, {args.threads} threads, {versions}, {datetime.date.today()}"
    print(f"N={N} K={K} R={args.rank} {args.dtype}, nested NF4, fp32 adapters; {where}")
    case = {"device": where, "N": N, "K": K, "R": args.rank, "dtype": args.dtype, "format": "nf4 nested"}
    layers = {"dense": dense, "peft": adapted, "ours": fused}
    columns = ("dense ms", "peft ms", "ours ms", "ours/dense", "peft/dense", "ours/peft")
    print(f"{'M':>6}" + "".join(f"{column:>12}" for column in columns))
    for M in args.rows:
        x = torch.randn(M, K, device=args.device).to(dtype).requires_grad_()
        grad = torch.randn(M, N, device=args.device).to(dtype)
        check(fused, x, grad)
        runs = {name: functools.partial(step, layer, x, grad) for name, layer in layers.items()}
        ms = interleaved(runs, args.seconds, args.device)
        dense_ms, peft_ms, ours_ms = (timing.p50 for timing in ms.values())
        row = (dense_ms, peft_ms, ours_ms, ours_ms / dense_ms, peft_ms / dense_ms, ours_ms / peft_ms)
        print(f"{M:6d}" + "".join(f"{value:12.2f}" for value in row), flush=True)
        if args.csv is not None:
            append(
                args.csv,
                [
                    {**case, "M": M, "provider": name, **timing._asdict(), "ratio": timing.p50 / dense_ms}
                    for name, timing in ms.items()
                ],
            )


if __name__ == "__main__":
    main()
