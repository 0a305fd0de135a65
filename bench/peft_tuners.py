"""A training step of PEFT's prompt and prefix methods on an NF4 base: accelerated beside stock, in turns.

    python bench/peft_tuners.py --layers 2 --tokens 128 --seconds 60 --csv bench/results/peft_tuners.csv

The model is that of end_to_end.py. A step is the loss, its gradients and AdamW's update of what is trained.
Before anything is timed, the losses of both are compared. `ratio` is ours over stock, of the medians.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from peft_fast.bench import measure
from peft_fast.bench.end_to_end import HEAD, WIDTHS, Loss, Training, make_dense, share
from peft_fast.bench.layers import DTYPES, to_nf4
from peft_fast.bench.lora_linear import append
from torch import Tensor, nn

import peft_fast
from peft_fast.info import device_name, versions

VIRTUAL = 16
METHODS = {
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=128
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "adaption-prompt": lambda: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=VIRTUAL, adapter_layers=1
    ),
}
CLOSE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 2e-2}
"""Relative difference of two losses."""


class TokenTraining(Training):
    """A step from tokens: these methods prepend to the embeddings that they look up."""

    def layer(self, x: Tensor) -> Loss:
        del x
        with torch.autocast(self.ids.device.type, self.x.dtype, enabled=self.autocast):
            return Loss(self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss, self.optimizer)


def tuned(packed: nn.Module, method: str) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(share(packed), METHODS[method]()).train()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--width", choices=WIDTHS, default="8b")
    add("--layers", type=int, default=1)
    add("--vocab", type=int, help="tokens of the vocabulary; by default scaled with the layers")
    add("--batch", type=int, default=1)
    add("--tokens", type=int, default=128, help="of one sequence")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of activations")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--lr", type=float, default=1e-3)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seconds", type=float, default=60, help="for all methods together")
    add("--csv", type=Path, help="adds rows to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    packed = make_dense(args)
    vocab = packed.config.vocab_size
    packed.config.max_position_embeddings = args.tokens + VIRTUAL
    to_nf4(packed, keep=(HEAD,))
    ids = torch.randint(vocab, (args.batch, args.tokens), device=args.device)
    x = torch.empty(0, dtype=DTYPES[args.dtype], device=args.device)
    steps = {}
    for method in args.methods:
        stock = tuned(packed, method)
        ours = share(stock)
        peft_fast.accelerate(ours, strict=True)
        pair = [TokenTraining(model, x, ids, args) for model in (stock, ours)]
        losses = [step.run() for step in pair]
        if abs(losses[1] / losses[0] - 1) > CLOSE[args.dtype]:
            raise measure.Inexact(
                f"{method}: expected the loss {losses[0]:.6f} of stock, got {losses[1]:.6f}"
            )
        steps.update({(method, "stock"): pair[0], (method, "ours"): pair[1]})
    timings = measure.interleaved(steps, args.seconds, args.device, lambda key: None)
    rows = []
    for (method, provider), timing in timings.items():
        ratio = timing.p50 / timings[method, "stock"].p50
        print(f"{method:16} {provider:6} {timing.p50:9.1f} ms  x{ratio:.2f}")
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "device": device_name(args.device),
                "versions": " ".join(f"{name} {version}" for name, version in versions().items()),
                "threads": torch.get_num_threads(),
                **{name: getattr(args, name) for name in ("width", "layers", "batch", "tokens", "dtype")},
                "method": method,
                "provider": provider,
                **timing._asdict(),
                "ratio": round(ratio, 4),
            }
        )
    if args.csv:
        append(args.csv, rows)


if __name__ == "__main__":
    main()
