"""Behaviours around saving: copies, pickles, state dicts, files, other names."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile

import torch
from behaviours import METHODS, STOCK_LAYER, Run, behaviour, small_net
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict


@behaviour(lora_dropout=0.1, methods=METHODS)
def deepcopy(run: Run) -> None:
    original, run.model = run.model, copy.deepcopy(run.model)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)
    run.step()
    run.model = original
    run.step()


@behaviour(fails={"nf4-dora": "The size of tensor a (4096) must match"}, lora_dropout=0.1, methods=METHODS)
def pickled(run: Run) -> None:
    run.model = pickle.loads(pickle.dumps(run.model))
    run.step()
    file = io.BytesIO()
    torch.save(run.model, file)
    file.seek(0)
    run.model = torch.load(file, weights_only=False)
    run.step()


@behaviour(methods=METHODS)
def state_dict_round_trip(run: Run) -> None:
    """Strictly; of 4-bit layers PyTorch's loading refuses the keys of the quantization state."""
    other = small_net(run.kind, run.method)
    run.step()
    for state in (other.state_dict(), run.model.state_dict()):
        if run.kind == "nf4":
            run.refused(lambda state=state: run.model.load_state_dict(state, strict=True))
            state = {name: value for name, value in state.items() if "base_layer" not in name}
        run.show("keys", list(run.model.load_state_dict(state, strict=run.kind == "dense")))
        run.step()
    if run.kind == "dense":
        other.load_state_dict(run.model.state_dict(), strict=True)
        run.show("loaded", other.state_dict())


@behaviour()
def load_by_assignment(run: Run) -> None:
    """load_state_dict(assign=True) replaces the parameters."""
    other = {n: v for n, v in small_net(run.kind, run.method).state_dict().items() if "lora_" in n}
    run.step()
    run.model.load_state_dict(other, strict=False, assign=True)
    run.step()


@behaviour(lora_dropout=0.1, methods=METHODS)
def adapter_state_dict(run: Run) -> None:
    state = get_peft_model_state_dict(run.model)
    run.show("saved", state)
    run.step()
    set_peft_model_state_dict(run.model, {name: value * 1.5 for name, value in state.items()})
    run.step()


@behaviour(lora_dropout=0.1, methods=METHODS, raises={"nf4-ia3": "Cannot merge ia3 layers"})
def save_and_load(run: Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run.model.save_pretrained(folder)
        run.model.load_adapter(folder, "loaded", is_trainable=True)
        run.model.set_adapter("loaded")
        run.step()
        run.model.load_adapter(folder, "lean", low_cpu_mem_usage=True)
        run.model.set_adapter("lean")
        run.step()
        base = run.model.unload()
        base.is_loaded_in_4bit = run.kind == "nf4"
        run.model = PeftModel.from_pretrained(base, folder)
    run.step(STOCK_LAYER, grad=False)
