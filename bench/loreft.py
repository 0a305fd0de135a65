"""LoReFT on a model: the cost of a step over the frozen model, beside pyreft, and what each does to R.

A Llama of `--blocks` blocks, `--width` wide, random weights, edited after every block at positions f7+l7.
Timed is forward + backward of a batch with dX taken, in turns: `frozen`, the model without edits; `ours`;
`pyreft` 0.1.0 with pyvene's hooks, from the same weights. All three run over the same base, with --quant nf4
over fused 4-bit layers, so a ratio to `frozen` is the cost of the edits alone. Before anything is timed, ours
and pyreft have to agree: the hidden states to 1e-4 of the largest, in float32.

`buffers` are bytes that edits hold beside their parameters, `saved` what autograd keeps more than `frozen`.

    python bench/loreft.py --csv bench/results/loreft.csv
    python bench/loreft.py --basis         # R and its gradient alone, beside torch's parametrization
    python bench/loreft.py --behaviour     # resume, weight decay, ragged batches, checkpointing, side by side
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import importlib
import importlib.util
import io
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft_fast.bench import measure
from peft_fast.bench.layers import DTYPES, to_nf4
from peft_fast.bench.lora_linear import append
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from peft_fast import LoReFTConfig, get_reft_model
from peft_fast.info import device_name, versions
from peft_fast.orthonormal import OrthonormalRows
from peft_fast.reft import import_pyreft

POSITIONS = 7
INSTALL = "pip install --no-deps pyreft==0.1.0 pyvene==0.1.8"


@functools.cache
def load_pyreft() -> Any:
    """pyreft's models and interventions, without its trainers, which want packages of their own."""
    found = importlib.util.find_spec("pyreft")
    if found is None:
        raise SystemExit(f"pyreft: expected it installed, got none: {INSTALL}")
    package = types.ModuleType("pyreft")
    package.__path__, package.__spec__ = list(found.submodule_search_locations or []), found
    sys.modules["pyreft"] = package
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return types.SimpleNamespace(
            **{n: importlib.import_module(f"pyreft.{n}") for n in ("reft_model", "interventions", "config")}
        )


def make_base(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=4 * args.width, num_hidden_layers=args.blocks,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=256, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaModel(config).to(args.device, DTYPES[args.dtype]).requires_grad_(False)
    if args.quant == "nf4":
        to_nf4(model)
        make_fast(model)
    return model


def make_fast(model: nn.Module) -> None:
    """Fuses the 4-bit layers. Raises SystemExit where the packages that it takes are missing."""
    try:
        from peft_fast import accelerate
    except ImportError as error:
        raise SystemExit(
            f"--quant nf4: expected what peft_fast.accelerate needs, got none ({error}): pip install peft "
            "bitsandbytes"
        ) from error
    accelerate(model)


class Pyreft(nn.Module):
    """pyreft's model, called as the others are; `lengths` are the tokens of each row, for its positions."""

    def __init__(self, pyreft: Any, base: nn.Module, rank: int) -> None:
        super().__init__()
        width, dtype = (
            base.config.hidden_size,
            next(p.dtype for p in base.parameters() if p.is_floating_point()),
        )
        make = pyreft.interventions.LoreftIntervention
        options = {"embed_dim": width, "low_rank_dimension": rank, "dtype": dtype}
        self.model = pyreft.reft_model.ReftModel(
            pyreft.config.ReftConfig(
                representations=[
                    {
                        "layer": i,
                        "component": f"layers[{i}].output",
                        "low_rank_dimension": rank,
                        "intervention": make(**options),
                    }
                    for i in range(base.config.num_hidden_layers)
                ]
            ),
            base,
        )

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        lengths = lengths or [x.shape[1]] * len(x)
        columns = [[*range(POSITIONS), *range(n - POSITIONS, n)] for n in lengths]
        blocks = len(self.model.interventions)
        _, output = self.model(
            {"inputs_embeds": x}, unit_locations={"sources->base": (None, [columns] * blocks)}
        )
        return output.last_hidden_state


class Ours(nn.Module):
    """A transformers model called with hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(inputs_embeds=x, attention_mask=mask).last_hidden_state


def providers(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The models of the same weights; with pyreft, agreeing ones."""
    base, positions = make_base(args), f"f{POSITIONS}+l{POSITIONS}"
    if not args.pyreft:
        config = LoReFTConfig(r=args.rank, positions=positions)
        return {"frozen": Ours(base), "ours": Ours(get_reft_model(copy.deepcopy(base), config))}
    theirs = Pyreft(load_pyreft(), copy.deepcopy(base), args.rank).to(args.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        theirs.model.save(folder)
        ours = Ours(import_pyreft(copy.deepcopy(base), folder, positions=positions))
    found = {"frozen": Ours(base), "ours": ours, "pyreft": theirs}
    if args.dtype == "float32":
        x = make_input(args)
        with torch.no_grad():
            expected, got = theirs(x), ours(x)
        difference = ((got - expected).abs().max() / expected.abs().max()).item()
        if not difference <= 1e-4:
            raise measure.Inexact(f"ours: hidden states {difference:.1e} from pyreft's, allowed 1e-4")
        print(f"checked: hidden states {difference:.1e} from pyreft's, of the largest")
    return found


def make_input(args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch, args.tokens, args.width, generator=generator)
    return x.to(args.device, DTYPES[args.dtype])


def bench(args: argparse.Namespace) -> None:
    models = providers(args)
    x = make_input(args)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    steps = {name: measure.Step(model, x.clone().requires_grad_(), grad) for name, model in models.items()}
    timings = measure.interleaved(steps, args.seconds, args.device, lambda name: None)
    saved = {name: measure.memory(step, args.device).saved for name, step in steps.items()}
    held = {name: sum(b.nbytes for b in model.buffers()) for name, model in models.items()}
    case = {
        "date": datetime.date.today(), "device": device_name(args.device), **versions(), "quant": args.quant,
        "dtype": args.dtype, "width": args.width, "blocks": args.blocks, "batch": args.batch,
        "tokens": args.tokens, "rank": args.rank, "threads": torch.get_num_threads(),
    }  # fmt: skip
    rows = []
    print(f"{'':<8}{'ms':>9}{'p20':>9}{'p80':>9}{'ratio':>8}{'buffers KiB':>13}{'saved KiB':>11}")
    for name, t in timings.items():
        ratio = t.p50 / timings["frozen"].p50
        buffers, more = held[name] - held["frozen"], saved[name] - saved["frozen"]
        ms = "".join(f"{value:9.1f}" for value in (t.p50, t.p20, t.p80))
        print(f"{name:<8}{ms}{ratio:8.3f}{buffers / 1024:13.1f}{more / 1024:11.1f}", flush=True)
        values = {key: f"{value:.6g}" for key, value in (*t._asdict().items(), ("ratio", ratio))}
        rows.append({**case, "provider": name, **values, "buffers_bytes": buffers, "saved_bytes": more})
    if args.csv is not None:
        append(args.csv, rows)


def basis(args: argparse.Namespace) -> None:
    """The time of R [rank, width] and its gradient, float32, and the bytes of the buffers that it takes."""
    ours = OrthonormalRows(args.width, args.rank)
    theirs = nn.utils.parametrizations.orthogonal(nn.Linear(args.rank, args.width, bias=False))
    grad = torch.randn(args.rank, args.width)
    steps: dict[str, Callable[[], object]] = {
        "peft-fast": lambda: ours().backward(grad),
        "torch": lambda: theirs.weight.backward(grad.T),
    }
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(measure.MIN_SAMPLES):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append(1e3 * (time.perf_counter() - start))
    for name, module in (("peft-fast", ours), ("torch", theirs)):
        held = sum(buffer.nbytes for buffer in module.buffers())
        print(f"R [{args.rank}, {args.width}], {name}: {statistics.median(samples[name]):.2f} ms, "
              f"buffers {held / 1024:.1f} KiB")  # fmt: skip


# ------------------------------------------------------------------------------------------------- behaviour


def orthonormality(rows: Sequence[Tensor]) -> float:
    """The largest ‖R·Rᵀ − I‖, of R [r, d]."""
    exact = [R.detach().double() for R in rows]
    return max((R @ R.T - torch.eye(len(R))).abs().max().item() for R in exact)


def bases_of(model: nn.Module) -> list[Tensor]:
    """Every R [r, d]."""
    if isinstance(model, Pyreft):
        return [v.rotate_layer.weight.T for v in model.model.interventions.values()]
    return [edit.rows() for edit in model.model.edits.values()]


def train(model: nn.Module, x: Tensor, steps: int, weight_decay: float = 0.0) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def resumed(model: nn.Module, x: Tensor) -> str:
    train(model, x, 5)
    if isinstance(model, Pyreft):  # as its `load` does, which wants a GPU
        for intervention in model.model.interventions.values():
            intervention.load_state_dict(copy.deepcopy(intervention.state_dict()))
    else:
        with tempfile.TemporaryDirectory() as folder:
            model.model.save_pretrained(folder)
            model.model.load_edits(folder)
    train(model, x, 20)
    return f"{orthonormality(bases_of(model)):.1e}"


def decayed(model: nn.Module, x: Tensor) -> str:
    train(model, x, 5, weight_decay=0.1)
    return f"{orthonormality(bases_of(model)):.1e}"


def ragged(model: nn.Module, x: Tensor) -> str:
    """The largest difference between rows of a padded batch and the same rows alone."""
    lengths = [x.shape[1], x.shape[1] - 9]
    mask = torch.tensor([[column < n for column in range(x.shape[1])] for n in lengths]).long()
    if isinstance(model, Pyreft):
        batch = model(x[:2], lengths)
    else:
        batch = model(x[:2], mask)
    alone = [model(x[i : i + 1, :n]) for i, n in enumerate(lengths)]
    return f"{max((batch[i, :n] - alone[i][0]).abs().max().item() for i, n in enumerate(lengths)):.1e}"


def checkpointed(model: nn.Module, x: Tensor) -> str:
    """The largest difference of gradients with gradient checkpointing from those without."""
    gradients = []
    model.train()
    for enable in (False, True):
        if enable:
            base = model.model.model if isinstance(model, Pyreft) else model.model
            base.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = model(x.clone().requires_grad_()).square().mean()
        gradients.append(torch.autograd.grad(loss, trained))
    worst = max(((a - b).norm() / a.norm()).item() for a, b in zip(*gradients, strict=True) if a.norm() > 0)
    return f"{worst:.1e}"


CASES: dict[str, Callable[[nn.Module, Tensor], str]] = {
    "‖R·Rᵀ − I‖ 20 steps after a save and a load": resumed,
    "‖R·Rᵀ − I‖ after 5 AdamW steps, weight decay 0.1": decayed,
    "padded batch against single rows, largest difference": ragged,
    "gradients under checkpointing, relative difference": checkpointed,
}


def behaviour(args: argparse.Namespace) -> None:
    for title, case in CASES.items():
        models = providers(args)
        x = make_input(args)
        results = {}
        for name in ("ours", "pyreft"):
            try:
                results[name] = case(models[name], x)
            except Exception as error:  # a peer's failure is its result
                if name == "ours":
                    raise
                results[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        print(f"{title}: ours {results['ours']}, pyreft {results['pyreft']}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--width", type=int, default=1024)
    add("--blocks", type=int, default=4)
    add("--batch", type=int, default=4)
    add("--tokens", type=int, default=64)
    add("--rank", type=int, default=8)
    add("--quant", choices=("none", "nf4"), default="none")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--pyreft", action=argparse.BooleanOptionalAction, default=True, help="beside it (default: yes)")
    add("--seconds", type=float, default=30.0)
    add("--basis", action="store_true", help="R and its gradient alone, beside torch's parametrization")
    add("--behaviour", action="store_true", help="what each does to R and to its inputs, instead of timings")
    add("--csv", type=Path, help="file to append the timings to")
    args = parser.parse_args(argv)
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    print(f"{device_name(args.device)}; {packages}")
    (behaviour if args.behaviour else basis if args.basis else bench)(args)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
