"""What rounding does to an update that is merged into a half-precision weight, simulated on a CPU.

    merge       W̃ = round(c ⊙ (Ŵ + s·B·A)), Y = X·W̃ᵀ, dX = dY·W̃          one rounding of the sum
    split       Y = c ⊙ (X·round(Ŵ)ᵀ + s·(X·Aᵀ)·Bᵀ), dX alike              only Ŵ is rounded
    stochastic  merge, W̃ rounded up or down at random, right on average

    python bench/merge_study.py error --csv bench/results/merge_study.csv
    python bench/merge_study.py train --seed 0 1 2 --csv bench/results/merge_losses.csv
    python bench/merge_study.py plot --gains bench/results/merge_study.csv docs/merge_gain.png

`error`: weights [N, K] of each origin (Gaussian fp32; those rounded to bf16 or fp16 as a checkpoint has them;
"zeros", bf16 of which half the weights are 0), format and dtype; updates of each size ‖s·B·A‖/‖Ŵ‖:

    y_*, dx_*   relative error of Y and dX against fp64, of each form
    gain_*      ⟨D, ΔW⟩/‖ΔW‖² with ΔW = c ⊙ (Ŵ + s·B·A) − Ŵ, and D = W̃ − round(Ŵ), what was realized of it:
                1 when all of the update arrives on average, 0 when it is lost
    gain_y_*    the same of ΔY = X·ΔWᵀ, for an X of few rows whose columns have scales e^normal
    noise_*     ‖D − gain·ΔW‖/‖ΔW‖

`grid`: how many of these weights need no rounding. `train`: the default fine-tuning job in each form
(merge_training.py). `plot`: gains and losses as pictures, and the differences of the losses as a table.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import bitsandbytes.functional as bnb
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft_fast.bench.lora_linear import append
from peft_fast.bench.measure import relative_error
from peft_fast.bench.merge_forms import FORMS, Merge, round_stochastically
from peft_fast.bench.merge_training import plot_losses, read_runs, summary, train_runs
from torch import Tensor

from peft_fast.formats import QuantizedWeight, from_bitsandbytes, from_dense

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ORIGINS = ("fp32", "bf16", "fp16", "zeros")
SIZES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
UPDATES = ("random", "column", "blocks")
SCALING = 2.0


class Case(NamedTuple):
    """A layer and an update of it; a dense weight is stored in the dtype of its origin."""

    N: int
    K: int
    R: int
    format: str
    nested: bool
    blocksize: int
    origin: str
    dtype: str
    method: str
    update: str
    size: float
    seed: int


@functools.lru_cache(maxsize=1)
def make_weight(
    N: int, K: int, format: str, nested: bool, blocksize: int, origin: str, seed: int
) -> QuantizedWeight:
    """Gaussian weights [N, K] of variance 1/K, as their origin and format have them."""
    generator = torch.Generator().manual_seed(3 * seed)
    W = torch.randn(N, K, generator=generator) / K**0.5
    if origin == "zeros":
        W *= torch.rand(N, K, generator=generator) < 0.5
    W = W.to(DTYPES["bf16" if origin == "zeros" else origin])
    if format == "dense":
        return from_dense(W)
    packed, state = bnb.quantize_4bit(
        W.float(), blocksize=blocksize, compress_statistics=nested, quant_type=format
    )
    return from_bitsandbytes(packed, state).check()


def make_update(case: Case, W: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """lora_A [R, K] and lora_B [N, R] with ‖s·B·A‖ = size·‖W‖; for DoRA out_scale [N], m as near to ‖W‖."""
    generator = torch.Generator().manual_seed(3 * case.seed + 1)
    random = functools.partial(torch.randn, generator=generator)
    lora_B = random(case.N, case.R)
    if case.update == "blocks":  # ΔW is constant inside each block of 64 weights
        lora_A = random(case.R, case.K // 64).repeat_interleave(64, 1)
    else:
        lora_A = random(case.R, case.K)
    if case.update == "column":
        lora_B[:, 1:] = 0
    lora_B *= case.size * W.norm() / (SCALING * (lora_B @ lora_A).norm())
    if case.method == "lora":
        return lora_A, lora_B, None
    norm = torch.linalg.vector_norm(W + SCALING * lora_B @ lora_A, dim=1)
    magnitude = torch.linalg.vector_norm(W, dim=1) * (1 + case.size * random(case.N))
    return lora_A, lora_B, magnitude / norm


def measured(case: Case, rows: int) -> dict[str, float]:
    """The errors, gains and noises of a case, of `rows` rows of X and dY."""
    dtype = DTYPES[case.dtype]
    weight = make_weight(case.N, case.K, case.format, case.nested, case.blocksize, case.origin, case.seed)
    W = weight.decode(torch.float32)
    lora_A, lora_B, out_scale = make_update(case, W)
    c = torch.ones(case.N) if out_scale is None else out_scale
    generator = torch.Generator().manual_seed(3 * case.seed + 2)
    random = functools.partial(torch.randn, generator=generator)
    X = (random(rows, case.K) * random(case.K).exp()).to(dtype).float()
    dY = random(rows, case.N).to(dtype).float()

    exact = c.double().unsqueeze(1) * (W.double() + SCALING * lora_B.double() @ lora_A.double())
    delta = exact - W
    dY_scaled = dY.double() * c.double()
    true_delta_y = SCALING * (X.double() @ lora_A.double().t()) @ lora_B.double().t() * c.double()
    true_delta_y += X.double() @ ((c.double() - 1).unsqueeze(1) * W.double()).t()
    true_y, true_dx = X.double() @ exact.t(), dY.double() @ exact
    plain = W.to(dtype).float()
    results = {
        "y_split": relative_error(
            ((X @ plain.t() + SCALING * (X @ lora_A.t()) @ lora_B.t()) * c).to(dtype), true_y
        ),
        "dx_split": relative_error(
            ((dY_scaled.to(dtype).float() @ plain) + SCALING * (dY_scaled.float() @ lora_B) @ lora_A).to(
                dtype
            ),
            true_dx,
        ),
    }
    for form in FORMS[1:]:
        backend = Merge(stochastic=form == "stochastic")
        scratch = backend.scratch(weight, lora_A, lora_B, SCALING, out_scale, dtype).float()
        at_rest = plain
        if backend.generator is not None:
            at_rest = round_stochastically(W, dtype, backend.generator).float()
        realized = scratch.double() - at_rest
        gain, noise = projection(realized, delta)
        results |= {
            f"y_{form}": relative_error((X @ scratch.t()).to(dtype), true_y),
            f"dx_{form}": relative_error((dY @ scratch).to(dtype), true_dx),
            f"gain_{form}": gain,
            f"gain_y_{form}": projection(X.double() @ realized.t(), true_delta_y)[0],
            f"noise_{form}": noise,
        }
    return results


def projection(realized: Tensor, true: Tensor) -> tuple[float, float]:
    """(gain, noise): realized = gain·true + what is orthogonal to it, of norm noise·‖true‖."""
    square = (true * true).sum()
    gain = (realized * true).sum() / square
    return gain.item(), ((realized - gain * true).norm() / square.sqrt()).item()


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every combination of the options; a dense weight has no blocks, and no origin "zeros"."""
    seen = set()
    for (N, K), format, nested, blocksize, origin, *rest in itertools.product(
        args.shape, args.format, args.nested, args.blocksize, args.origin, args.dtype, args.method,
        args.update, args.size, args.seed,
    ):  # fmt: skip
        if format == "dense":
            nested, blocksize = False, 0
        case = Case(N, K, args.rank, format, nested, blocksize, origin, *rest)
        if case not in seen and not (format == "dense" and origin == "zeros"):
            seen.add(case)
            yield case


def error(args: argparse.Namespace) -> None:
    for case in cases(args):
        results = {name: f"{value:.4g}" for name, value in measured(case, args.rows).items()}
        shown = ("y_split", "y_merge", "dx_split", "dx_merge", "gain_merge", "noise_merge", "gain_stochastic")
        print(*case, *(f"{name}={results[name]}" for name in shown), flush=True)
        if args.csv is not None:
            append(args.csv, [{**case._asdict(), **results}])


def grid(args: argparse.Namespace) -> None:
    """Prints, for each weight, the share that is not 0 and lies on the grid, and the number of mantissas."""
    for case in cases(args):
        weight = make_weight(case.N, case.K, case.format, case.nested, case.blocksize, case.origin, case.seed)
        W = weight.decode(torch.float32)
        share = ((W.to(DTYPES[case.dtype]).float() == W) & (W != 0)).float().mean().item()
        mantissas = torch.frexp(W[W != 0].abs()).mantissa.unique().numel()
        print(*case[:2], *case[3:8], f"on_grid={share:.4f} mantissas={mantissas}", flush=True)


def plot_gains(path: Path, picture: Path) -> None:
    """The gain of random updates of a 2048 x 2048 weight that was bf16, by dtype of the activations."""
    chosen = {"N": "2048", "K": "2048", "origin": "bf16", "method": "lora", "update": "random", "seed": "0"}
    lines: dict[tuple[str, str], list[tuple[float, float]]] = collections.defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["blocksize"] in ("0", "64") and chosen.items() <= row.items():
                nested = {"True": "nested", "False": "un-nested"}[row["nested"]]
                name = "dense bf16" if row["format"] == "dense" else f"{row['format']} {nested}"
                lines[row["dtype"], name].append((float(row["size"]), float(row["gain_merge"])))
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = dict(zip(("bf16", "fp16"), figure.subplots(1, 2, sharey=True), strict=True))
    for (dtype, name), points in lines.items():
        axes[dtype].semilogx(*zip(*sorted(points), strict=True), "o-", label=name, markersize=3)
    for dtype, ax in axes.items():
        ax.set(xlabel="‖ΔW‖ / ‖W‖", title=f"activations in {dtype}", ylim=(-0.1, 1.5))
        ax.grid(alpha=0.3)
    axes["bf16"].set(ylabel="gain of the merged update")
    if lines:
        axes["bf16"].legend(fontsize="small")
    figure.savefig(picture, dpi=100)


def plot(args: argparse.Namespace) -> None:
    if args.gains is not None:
        plot_gains(*args.gains)
    if args.losses is not None:
        file, picture = args.losses
        runs = dict(read_runs(file))
        print("\n".join(summary(runs)))
        plot_losses(runs, picture)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    commands = parser.add_subparsers(required=True, metavar="error | grid | train | plot")

    weights = argparse.ArgumentParser(add_help=False)
    add = weights.add_argument
    add("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="default: 2048 2048")
    add("--format", nargs="+", default=["nf4", "fp4", "dense"], choices=("nf4", "fp4", "dense"))
    add("--nested", type=parse_bool, nargs="+", default=[True, False], metavar="BOOL")
    add("--blocksize", type=int, nargs="+", default=[64])
    add("--origin", nargs="+", default=ORIGINS, choices=ORIGINS)
    add("--dtype", nargs="+", default=["bf16", "fp16"], choices=("bf16", "fp16"))
    add("--seed", type=int, nargs="+", default=[0])

    command = commands.add_parser("error", help="errors and gains of single layers", parents=[weights])
    add = command.add_argument
    add("--rank", type=int, default=16, metavar="R")
    add("--method", nargs="+", default=["lora"], choices=("lora", "dora"))
    add("--update", nargs="+", default=["random"], choices=UPDATES)
    add("--size", type=float, nargs="+", default=SIZES, help="‖s·B·A‖/‖Ŵ‖")
    add("--rows", type=int, default=32, help="of X and dY")
    add("--csv", type=Path, help="file to append to")
    command.set_defaults(run=error)

    command = commands.add_parser("grid", help="how many weights need no rounding", parents=[weights])
    command.set_defaults(run=grid, rank=0, method=["lora"], update=["random"], size=[0.0])

    add = (command := commands.add_parser("train", help="the default fine-tuning job")).add_argument
    add("--quant", default="nf4", choices=("nf4", "fp4", "none"))
    add("--nested", type=parse_bool, nargs="+", default=[True], metavar="BOOL")
    add("--method", nargs="+", default=["lora"], choices=("lora", "dora"))
    add("--dtype", nargs="+", default=["bf16"], choices=("bf16", "fp32"), help="of activations")
    add("--lr", type=float, nargs="+", default=[1e-3])
    add("--steps", type=int, default=250)
    add("--form", nargs="+", default=FORMS[:2], choices=FORMS)
    add("--seed", type=int, nargs="+", default=[0])
    add("--csv", type=Path, help="file to append to; runs that it has are not repeated")
    command.set_defaults(run=train_runs)

    add = (command := commands.add_parser("plot", help="pictures, and a table of the losses")).add_argument
    add("--gains", type=Path, nargs=2, metavar=("CSV", "PNG"), help="what `error` wrote, and the picture")
    add("--losses", type=Path, nargs=2, metavar=("CSV", "PNG"), help="what `train` wrote, and the picture")
    command.set_defaults(run=plot)

    args = parser.parse_args(argv)
    if args.run in (error, grid) and args.shape is None:
        args.shape = [(2048, 2048)]
    torch.set_num_threads(args.threads)
    args.run(args)


def parse_bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text == "True"


if __name__ == "__main__":
    main()
