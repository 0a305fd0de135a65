"""QLoRA under FSDP2: a tiny Llama in NF4, sharded over processes, on CPUs or on GPUs.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py

The order is: quantize, add the adapter, `accelerate`, `fully_shard`, make the optimizer.
"""

from __future__ import annotations

import argparse
import os

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fast

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCAB = 99


def make_base(device: torch.device) -> LlamaForCausalLM:
    """A Llama of random weights, its blocks in NF4; else `from_pretrained` with a BitsAndBytesConfig."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZES))
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                packed = Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4",
                    quant_storage=torch.uint8,  # or the param_dtype of a MixedPrecisionPolicy
                )  # fmt: skip
                packed.load_state_dict(child.state_dict())
                setattr(module, name, packed)
    model.is_loaded_in_4bit = True
    return model.to(device)


def train_and_save(output: str, steps: int, device: torch.device) -> list[float]:
    """The mean loss over the processes at each step; the adapter in `output`, in PEFT's format."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True)
    model = get_peft_model(make_base(device), config)
    peft_fast.accelerate(model, strict=True)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

    torch.manual_seed(distributed.get_rank())  # each process has its own data
    losses = []
    for _ in range(steps):
        first = torch.randint(VOCAB, (4, 1), device=device)
        ids = (first + torch.arange(16, device=device)) % VOCAB
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / distributed.get_world_size()
        distributed.all_reduce(mean)
        losses.append(mean.item())

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)  # whole on rank 0, empty on the others
    if distributed.get_rank() == 0:
        model.save_pretrained(output, state_dict=state)
    distributed.barrier()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/fsdp2")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    losses = train_and_save(options.output, options.steps, device)
    if distributed.get_rank() == 0:
        model = PeftModel.from_pretrained(make_base(device), options.output)  # PEFT alone, in one process
        ids = torch.arange(16, device=device)[None]
        with torch.no_grad():
            loss = model.eval()(input_ids=ids, labels=ids).loss
        print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; of {options.output} in one process: {loss:.3f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
