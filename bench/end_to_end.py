"""A training step of a Llama-shaped causal language model, adapted and quantized, over the frozen dense one.

The model has `--layers` decoder layers of the width of a known one and random weights; all linear layers
but the head are packed to nested NF4. A step is the loss, its gradients and AdamW's update of the adapters,
always with the gradient of the input embeddings, so that dX is taken through every layer. In turns:

    frozen       the dense model without adapters and optimizer, in --dtype: the unit of `ratio`
    lora, dora   `stock`, PEFT on bitsandbytes; `ours`, the same after `peft_fast.accelerate`, or, where these
                 packages are missing, peft_fast's own layers
    loreft       `ours`, edits of the first and last 7 tokens after each layer, over the packed model after
                 `accelerate`, or where packages are missing over the dense one

All models share the frozen weights, adapters start equal, and B is not zero. In half precision all run under
autocast with fp32 adapters, as in transformers' Trainer. By default the vocabulary is scaled with the layers,
so that the head has the share of the work that it has in the whole model.

Before anything is timed, the losses of the first steps of `ours` are compared with those of `stock`, or of
the same model on the backend `reference`: a difference may be CHANGE of what these steps change the loss by.
Otherwise the run ends.

`forward` ends with the loss, `backward` with the optimizer's step. `peak` is what a step allocates at most
beyond the model, its gradients included, known on a GPU only; `held` the bytes of a model's parameters,
buffers and scales.

    python bench/end_to_end.py --layers 4 --checkpointing off on --csv end_to_end.csv
    python bench/end_to_end.py --width tiny --layers 2 --tokens 32 --seconds 2
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft_fast.bench import layers, measure
from peft_fast.bench.layers import DTYPES, to_nf4
from peft_fast.bench.lora_linear import append
from peft_fast.bench.measure import Timing
from peft_fast.bench.methods import LOW_RANK, SCALING
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import peft_fast
from peft_fast.formats import from_linear
from peft_fast.info import device_name, versions


class Width(NamedTuple):
    """The sizes of one decoder layer, and of the whole model it is of."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    layers: int


WIDTHS = {
    "8b": Width(4096, 14336, 32, 8, 128256, 32),
    "tiny": Width(128, 256, 4, 2, 512, 2),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEAD = "lm_head"
POSITIONS = "f7+l7"
CHECKED_STEPS = 4
CHANGE = 0.02


class Key(NamedTuple):
    """Whose step: `method` is empty for the frozen model, `provider` for it is "frozen"."""

    method: str
    provider: str

    def __str__(self) -> str:
        return f"{self.method} {self.provider}".strip()


class Loss(NamedTuple):
    """A loss that its model still has to learn from."""

    value: Tensor
    optimizer: torch.optim.Optimizer | None

    def backward(self, gradient: None) -> None:
        self.value.backward()
        if self.optimizer is not None:
            self.optimizer.step()


class Training:
    """What `measure.Step` is of a layer, of a model: on x [batch, tokens, hidden], with labels `ids`."""

    grad = None

    def __init__(self, model: nn.Module, x: Tensor, ids: Tensor, args: argparse.Namespace) -> None:
        self.model, self.ids = model, ids
        self.x = x.clone().requires_grad_()
        self.autocast = args.dtype != "float32"
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=args.lr) if self.trained else None

    def drop_gradients(self) -> None:
        for tensor in (self.x, *self.trained):
            tensor.grad = None

    def layer(self, x: Tensor) -> Loss:
        with torch.autocast(x.device.type, x.dtype) if self.autocast else contextlib.nullcontext():
            loss = self.model(inputs_embeds=x, labels=self.ids, use_cache=False).loss
        return Loss(loss, self.optimizer)

    def run(self) -> float:
        """The loss before the update."""
        self.drop_gradients()
        loss = self.layer(self.x)
        loss.backward(None)
        return loss.value.item()


# ---------------------------------------------------------------------------------------------------- models


def make_dense(args: argparse.Namespace) -> nn.Module:
    """The frozen model with random weights, made in its dtype where it runs."""
    width = WIDTHS[args.width]
    vocab = args.vocab or math.ceil(width.vocab * args.layers / width.layers / 64) * 64
    config = LlamaConfig(
        hidden_size=width.hidden, intermediate_size=width.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=width.heads, num_key_value_heads=width.kv_heads, vocab_size=vocab,
        max_position_embeddings=args.tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype])
    return model.requires_grad_(False).train()


def share(model: nn.Module) -> nn.Module:
    """A copy with modules and adapters of its own and the same frozen weights."""
    kept = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def make_models(args: argparse.Namespace, checkpointing: bool) -> dict[Key, nn.Module]:
    """The models to be timed. Prints which methods lack a package."""
    dense = make_dense(args)
    if checkpointing:
        dense.gradient_checkpointing_enable({"use_reentrant": False})
    packed = share(dense)
    to_nf4(packed, keep=(HEAD,))
    missing = layers.missing("peft")
    if missing is not None:
        print(f"left out stock: {missing}")
    models = {Key("", "frozen"): dense}
    for method in args.methods:
        ours = Key(method, "ours")
        if method == "loreft":
            models[ours] = make_loreft(packed, dense, args)
        elif missing is not None:
            models[ours] = make_own(packed, method, args)
        else:
            models[Key(method, "stock")] = make_peft(packed, method, args)
            models[ours] = make_peft(packed, method, args)
            peft_fast.accelerate(models[ours], strict=True)
    return models


def make_peft(packed: nn.Module, method: str, args: argparse.Namespace) -> nn.Module:
    import peft

    base = share(packed)
    base.is_loaded_in_4bit = True  # what transformers sets, and PEFT takes its 4-bit layers by
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=SCALING * args.rank, target_modules=PROJECTIONS, use_dora=method == "dora"
    )
    return start(peft.get_peft_model(base, config))


def make_own(packed: nn.Module, method: str, args: argparse.Namespace) -> nn.Module:
    """The model with peft_fast's own layers in the place of its packed ones."""
    model = share(packed)
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name in PROJECTIONS:
                adapted = LOW_RANK[method].from_linear(linear, r=args.rank, lora_alpha=SCALING * args.rank)
                setattr(parent, name, adapted)
    return start(model)


def make_loreft(packed: nn.Module, dense: nn.Module, args: argparse.Namespace) -> nn.Module:
    """Packed layers run only through `accelerate`, which needs the packages of the peer."""
    alone = layers.missing("peft") is not None
    base = share(dense if alone else packed)
    if not alone:
        peft_fast.accelerate(base, strict=True)
    torch.manual_seed(2)
    return peft_fast.get_reft_model(base, peft_fast.LoReFTConfig(r=args.rank, positions=POSITIONS)).train()


def start(model: nn.Module) -> nn.Module:
    """The same adapters in every model; B is small but not zero, so that all gradients flow."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_A" in name or "lora_B" in name):
            scale = 0.1 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.train()


def expected_of(key: Key, models: dict[Key, nn.Module]) -> nn.Module:
    """A copy of what a model of ours is compared with."""
    stock = models.get(Key(key.method, "stock"))
    if stock is not None:
        return share(stock)
    model = share(models[key])
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return model


# --------------------------------------------------------------------------------------------------- measures


class Agreement(NamedTuple):
    """The first and last loss of the checked steps, and the largest difference, beside what is allowed."""

    first: float
    last: float
    difference: float
    allowed: float


def agreement(key: Key, ours: Training, expected: Training) -> Agreement:
    """Of the first steps of two trainings from equal states.

    Raises:
        measure.Inexact: they differ by more than CHANGE of what the steps change the loss by.
    """
    losses = [(ours.run(), expected.run()) for _ in range(CHECKED_STEPS)]
    first, last = losses[0][1], losses[-1][1]
    worst = max(abs(a - b) if math.isfinite(a) else math.inf for a, b in losses)
    found = Agreement(first, last, worst, CHANGE * abs(first - last))
    if not worst <= found.allowed:
        raise measure.Inexact(f"{key}: losses differ by {worst:.2e}, allowed {found.allowed:.2e}: {losses}")
    print(f"checked {key}: {', '.join(f'{name} {value:.3g}' for name, value in found._asdict().items())}")
    return found


def peak(step: Training, device: str) -> int | None:
    """Bytes that a step allocates at most beyond what is there before it; None on a CPU."""
    if device != "cuda":
        return None
    step.drop_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held(model: nn.Module) -> int:
    """Bytes of the parameters, the buffers and the scales of packed weights, each storage once."""
    scales = (
        field
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for field in from_linear(module)
        if isinstance(field, Tensor)
    )
    storages = (t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *scales))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Row(NamedTuple):
    """A measured model; `agreement` of ours only."""

    key: Key
    timing: Timing
    ratio: float
    tokens_per_second: float
    peak: int | None
    held: int
    agreement: Agreement | None


def bench(args: argparse.Namespace, checkpointing: bool) -> Iterator[Row]:
    """The rows of all models; losses are compared before the first is timed."""
    models = make_models(args, checkpointing)
    frozen = models[Key("", "frozen")]
    ids = torch.randint(
        frozen.config.vocab_size, (args.batch, args.tokens), generator=torch.Generator().manual_seed(3)
    ).to(args.device)
    x = frozen.get_input_embeddings()(ids).detach()
    steps = {key: Training(model, x, ids, args) for key, model in models.items()}
    found = {}
    for key in models:
        if key.provider == "ours":
            pair = share(models[key]), expected_of(key, models)
            found[key] = agreement(key, *(Training(model, x, ids, args) for model in pair))
            del pair
    timings = measure.interleaved(steps, args.seconds, args.device, lambda key: None)
    unit = timings[Key("", "frozen")].p50
    for key, timing in timings.items():
        speed = 1e3 * ids.numel() / timing.p50
        size = peak(steps[key], args.device), held(models[key])
        yield Row(key, timing, timing.p50 / unit, speed, *size, found.get(key))


# ---------------------------------------------------------------------------------------------------- report

HEADER = (
    f"{'':<14}{'ms':>10}{'p20':>10}{'p80':>10}{'forward':>10}{'backward':>10}{'tokens/s':>10}{'ratio':>8}"
    f"{'peak MiB':>10}{'held MiB':>10}"
)


def line(row: Row) -> str:
    t = row.timing
    ms = "".join(f"{value:10.2f}" for value in (t.p50, t.p20, t.p80, t.forward, t.backward))
    most = "" if row.peak is None else f"{row.peak / 2**20:.0f}"
    speed = f"{row.tokens_per_second:10.0f}{row.ratio:8.3f}"
    return f"{row.key!s:<14}{ms}{speed}{most:>10}{row.held / 2**20:10.0f}"


def record(case: dict[str, object], row: Row) -> dict[str, object]:
    """`row` as a line of the CSV file: milliseconds and bytes; empty where not known."""
    losses = row.agreement._asdict() if row.agreement else dict.fromkeys(Agreement._fields)
    return {
        **case,
        **row.key._asdict(),
        **{name: f"{value:.6g}" for name, value in row.timing._asdict().items()},
        "ratio": f"{row.ratio:.6g}",
        "tokens_per_second": f"{row.tokens_per_second:.6g}",
        "peak_bytes": row.peak,
        "held_bytes": row.held,
        **{f"loss_{name}": value if value is None else f"{value:.6g}" for name, value in losses.items()},
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    # fmt: off
    add("--width", choices=WIDTHS, default="8b", help="whose decoder layers (default: %(default)s)")
    add("--layers", type=int, default=2)
    add("--vocab", type=int, help="tokens known (default: the head's share as in the whole model)")
    add("--batch", type=int, default=2)
    add("--tokens", type=int, default=2048, help="of each row of the batch")
    add("--rank", type=int, default=16, metavar="R")
    add("--lr", type=float, default=1e-3)
    add("--methods", choices=(*LOW_RANK, "loreft"), nargs="+", default=[*LOW_RANK, "loreft"])
    add("--checkpointing", choices=("off", "on"), nargs="+", default=["off"],
        help="recompute each layer's forward in the backward; a block of rows each")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32", help="of the frozen model")
    add("--seconds", type=float, default=10.0,
        help=f"of timing per block; at least {measure.MIN_SAMPLES} steps of each model are taken")
    add("--csv", type=Path, help="file to append the rows to")
    # fmt: on
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = device_name(args.device)
    print(f"{device}; {', '.join(f'{package} {version}' for package, version in versions().items())}")
    names = ("width", "layers", "vocab", "batch", "tokens", "rank", "dtype")
    for checkpointing in args.checkpointing:
        case = {
            "date": datetime.date.today(), "device": device, **versions(),
            **{name: getattr(args, name) for name in names}, "checkpointing": checkpointing,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        print(f"\n{args.layers} layers of {args.width} width, batch {args.batch} x {args.tokens} tokens, "
              f"{args.dtype}, R={args.rank}, checkpointing {checkpointing}")  # fmt: skip
        rows = list(bench(args, checkpointing == "on"))
        print("\n".join((HEADER, *map(line, rows))), flush=True)
        if args.csv is not None:
            append(args.csv, [record(case, row) for row in rows])


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
