"""What these examples share: any method of the family on a 4-bit base, and a plain training loop.

Each example makes a small model, teaches it one kind of data in fp32, stores it in NF4, and then adapts it to
data of another kind, where it is bad, with everything frozen but the method's own parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast import AdapterConfig, LoReFTConfig, accelerate, get_adapter_model, get_reft_model, quantize

ADAPTERS = ("vera", "s2lora", "kadaptation", "ia3", "ssf", "bitfit", "parallel", "series")
METHODS = ("lora", "dora", "loreft", *ADAPTERS)
LEARNING_RATES = {"lora": 5e-3, "dora": 5e-3, "parallel": 5e-3, "series": 5e-3, "loreft": 1e-2, "ia3": 5e-2}
"""Of the examples; the methods that train vectors take more."""

Data = tuple[dict[str, Tensor], Tensor]
"""Inputs of the model by name, and labels; -100 where there is none."""


class Example(NamedTuple):
    model: Callable[[], nn.Module]
    source: tuple[Data, Data]
    """Training and test data of the kind that the base learns."""
    target: tuple[Data, Data]
    """Those of the kind that it is adapted to."""
    pretraining_steps: int
    without: tuple[str, ...] = ()
    """Methods that the model has no place for."""
    exclude: tuple[str, ...] = ()
    """Layers that no method adapts."""


class Accuracy(NamedTuple):
    source: float
    """Of the base, on the kind that it learned."""
    before: float
    """Of the frozen 4-bit base on the other kind."""
    after: float
    parameters: int


def run(example: Example, method: str, steps: int = 150) -> Accuracy:
    """Teaches the base, stores it in NF4, adapts it; accuracies are of test data."""
    torch.manual_seed(0)
    model = example.model()
    fit(model, example.source[0], example.pretraining_steps, 2e-3)
    return adapt(example, model, method, steps)


def adapt(example: Example, model: nn.Module, method: str, steps: int = 150) -> Accuracy:
    """The second half of `run`, from a model that has learned; it is changed in place."""
    source = accuracy(model, example.source[1])
    quantize(model, "nf4")
    adapted = attach(model, method, example.exclude)
    before = accuracy(adapted, example.target[1])
    fit(adapted, example.target[0], steps, LEARNING_RATES.get(method, 2e-2))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Accuracy(source, before, accuracy(adapted, example.target[1]), trained)


def attach(model: nn.Module, method: str, exclude: tuple[str, ...] = ()) -> nn.Module:
    """The model with the method on its linear layers, or its blocks; nothing else is trained."""
    if method in ("lora", "dora"):
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=list(exclude) or None,
            use_dora=method == "dora",
        )  # fmt: skip
        adapted = get_peft_model(model, config)
        accelerate(adapted)
        return adapted
    if method == "loreft":
        return get_reft_model(model, LoReFTConfig(r=8, positions="all"))
    sizes = {"vera": {"r": 64}, "parallel": {"r": 8}, "series": {"r": 8}}
    options = sizes.get(method, {})
    return get_adapter_model(
        model, AdapterConfig(method, exclude_modules=exclude, modules_to_save=[], **options)
    )


def fit(model: nn.Module, data: Data, steps: int, lr: float, batch_size: int = 64) -> list[float]:
    """AdamW on what is trained, the rate falling to zero; the loss of every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    model.train()
    for _, (inputs, labels) in zip(range(steps), batches(data, batch_size), strict=False):
        loss = F.cross_entropy(scores(model, inputs), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of labels that are predicted."""
    inputs, labels = data
    model.eval()
    labels = labels.flatten()
    right = scores(model, inputs).argmax(1) == labels
    return right[labels != -100].float().mean().item()


def scores(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [labels, classes], of sequences flattened."""
    logits = model(**inputs).logits
    return logits.reshape(-1, logits.shape[-1])


def batches(data: Data, size: int) -> Iterator[Data]:
    """Without end, in an order drawn anew for each pass."""
    inputs, labels = data
    while True:
        for chosen in torch.randperm(len(labels)).split(size):
            yield {name: tensor[chosen] for name, tensor in inputs.items()}, labels[chosen]


def split(inputs: dict[str, Tensor], labels: Tensor, test: int) -> tuple[Data, Data]:
    """Training and test data, the last `test` examples."""
    cut = len(labels) - test
    first = ({name: tensor[:cut] for name, tensor in inputs.items()}, labels[:cut])
    return first, ({name: tensor[cut:] for name, tensor in inputs.items()}, labels[cut:])


def main(examples: dict[str, Callable[[], Example]], description: str) -> None:
    """The command line of an example: a line for each method."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=list(examples), default=next(iter(examples)))
    parser.add_argument("--method", choices=METHODS, action="append", help="repeatable; default all")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    example = examples[options.model]()
    for method in options.method or [m for m in METHODS if m not in example.without]:
        result = run(example, method, options.steps)
        print(
            f"{options.model} {method:12} {result.parameters:7,} trained; accuracy {result.before:.3f} -> "
            f"{result.after:.3f} (before the shift {result.source:.3f})",
            flush=True,
        )
