"""Two gloo processes on one machine: tiny Llamas over each kind of base, trained by both, and by one."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fast import LoReFTConfig, accelerate, get_reft_model

WORLD = 2
STEPS = 3
PER_PROCESS = 2
VOCAB = 64
METHODS = ("lora", "dora", "loreft")
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]

# How the frozen linear layers are stored: None for dense, else bitsandbytes' options.
BASES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "nf4": {},
    "nf4-nested": {"compress_statistics": True},
    "nf4-bf16": {"quant_storage": torch.bfloat16},
    "nf4-fp32": {"quant_storage": torch.float32},
}


def make_base(kind: str) -> LlamaForCausalLM:
    """The same weights at every call: two blocks of width 64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "initializer_range": 0.2}
    config = LlamaConfig(
        vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, **sizes
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    options = BASES[kind]
    if options is not None:
        for parent in list(model.model.layers.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, to_4bit(child, **{"compress_statistics": False, **options}))
        model.is_loaded_in_4bit = True
    return model


def to_4bit(linear: nn.Linear, **options: Any) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=None,
        quant_type="nf4",
        **options,
    )
    layer.load_state_dict(linear.state_dict())
    layer.support_avx512bf16_for_cpu = False  # bitsandbytes' repacking in place, as in peft_models.unpacked
    return layer.to("cpu")  # the move quantizes


def make_model(method: str, kind: str, *, fast: bool = True) -> nn.Module:
    """The same model at every call, of PEFT or with edits; `fast` accelerates it."""
    base = make_base(kind)
    torch.manual_seed(1)
    if method == "loreft":
        model = get_reft_model(base, LoReFTConfig(r=4, positions="f2+l2"))
        if kind != "dense":
            accelerate(model, strict=True)
        return model
    config = LoraConfig(
        r=4, lora_alpha=12, init_lora_weights=False, use_dora=method == "dora", target_modules=TARGETS
    )
    model = get_peft_model(base, config)
    if fast:
        accelerate(model, strict=True)
    return model


class Step(NamedTuple):
    """What one optimizer step computed and left; `evaluated` is the loss in evaluation mode after it."""

    loss: Tensor
    grads: dict[str, Tensor]
    trained: dict[str, Tensor]
    evaluated: Tensor


def batches(rows: slice) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        yield torch.randint(VOCAB, (WORLD * PER_PROCESS, 12), generator=generator)[rows]


def rows_of(rank: int) -> slice:
    return slice(rank * PER_PROCESS, (rank + 1) * PER_PROCESS)


def train(model: nn.Module, rows: slice, wrapped: nn.Module | None = None) -> list[Step]:
    """SGD on `rows` of every batch, through `wrapped` where that is what runs the model."""
    run = model if wrapped is None else wrapped
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    steps = []
    for ids in batches(rows):
        run.train()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = {name: whole(p.grad) for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        run.eval()
        with torch.no_grad():
            evaluated = run(input_ids=ids, labels=ids, use_cache=False).loss
        steps.append(Step(loss.detach(), grads, {n: whole(p) for n, p in trained.items()}, evaluated))
    return steps


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor that FSDP may have sharded."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


class Difference(NamedTuple):
    """The largest of all steps: of losses, of trained parameters, and of gradients relative to their norm."""

    loss: float
    trained: float
    grads: float

    def __str__(self) -> str:
        return f"losses {self.loss:.1e}, parameters {self.trained:.1e}, gradients {self.grads:.1e} relative"


def difference(got: list[list[Step]], alone: list[Step]) -> Difference:
    """Between what each of several processes got, and one process with all their rows."""
    loss, trained, grads = [], [], []
    for i, one in enumerate(alone):
        ranks = [steps[i] for steps in got]
        for name in ("loss", "evaluated"):
            mean = torch.stack([getattr(step, name) for step in ranks]).mean()
            loss.append((mean - getattr(one, name)).abs())
        for step in ranks:
            assert step.grads.keys() == one.grads.keys()
            for key, expected in one.grads.items():
                grads.append((step.grads[key] - expected).norm() / expected.norm())
                trained.append((step.trained[key] - one.trained[key]).abs().max())
    return Difference(
        *(torch.stack(found).max().item() for found in (loss, trained, grads))
    )  # NaN is largest


# ------------------------------------------------------------------------------------------------ processes


def run_cases(cases: dict[str, Callable[[int, str], Any]], rank: int, folder: str) -> None:
    """In one of the processes: each case's result, or the exception it ended with, to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name, case in cases.items():
        try:
            result = case(rank, folder)
        except Exception as error:  # every rank fails alike, or the next collective would wait for ever
            result = Failed(type(error).__name__, str(error), traceback.format_exc())
        torch.save(result, f"{folder}/{name}-{rank}.pt")
    distributed.destroy_process_group()


class Failed(NamedTuple):
    kind: str
    message: str
    trace: str


def results(folder: Path, name: str) -> list[Any]:
    """What each process got in a case that ended well."""
    found = raw_results(folder, name)
    for result in found:
        assert not isinstance(result, Failed), result.trace
    return found


def raw_results(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(WORLD)]
