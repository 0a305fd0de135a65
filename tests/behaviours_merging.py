"""Behaviours around merging: into the base and out again, with a check, of several adapters, for good."""

from __future__ import annotations

import copy

import torch
from behaviours import BASE, FUSED, METHODS, Run, behaviour
from peft_models import adapted_layers, inputs

NO_MERGING = {"nf4-ia3": "NotImplementedError"}
NO_UNLOADING = {"nf4-ia3": "Cannot merge ia3 layers when the model is loaded in 4-bit mode"}


@behaviour(lora_dropout=0.1, methods=METHODS, raises=NO_MERGING)
def merge(run: Run) -> None:
    for _ in range(3):
        run.step()
        run.model.merge_adapter()
        run.show("merged", run.model.state_dict())
        run.step(BASE)
        run.model.unmerge_adapter()
    run.step()


@behaviour(methods=METHODS, raises=NO_MERGING)
def safe_merge(run: Run) -> None:
    run.step()
    run.model.merge_adapter(safe_merge=True)
    run.step(BASE)
    run.model.unmerge_adapter()
    run.step()


@behaviour()
def safe_merge_of_a_broken_adapter(run: Run) -> None:
    layer = adapted_layers(run.model)[1]
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    run.refused(lambda: run.model.merge_adapter(safe_merge=True))
    run.show("merged", [layer.merged_adapters for layer in adapted_layers(run.model)])
    run.step((BASE, FUSED))


@behaviour(methods=METHODS, raises=NO_MERGING)
def merge_two(run: Run) -> None:
    run.add("other")
    run.model.merge_adapter(["default", "other"])
    run.step(BASE)
    run.model.unmerge_adapter()
    run.step()
    run.model.set_adapter("other")
    run.step()


@behaviour()
def merge_one_then_another(run: Run) -> None:
    run.add("other")
    run.model.merge_adapter(["other"])
    run.model.merge_adapter(["other"])  # once
    run.model.merge_adapter(["default"])
    run.step(BASE)
    run.model.unmerge_adapter()
    run.step()


@behaviour(methods=METHODS, raises=NO_MERGING)
def merge_an_inactive_one(run: Run) -> None:
    run.add("other")
    run.step()
    run.model.merge_adapter(["other"])
    run.step(BASE)
    run.model.unmerge_adapter()
    run.model.merge_adapter(["nowhere"])
    run.step()


@behaviour()
def merge_where_it_is(run: Run) -> None:
    """An adapter that one layer lacks is merged into the other."""
    run.add("other", targets=["up"])
    run.model.merge_adapter(["other"])
    run.step((BASE, FUSED))
    run.model.unmerge_adapter()
    run.step()


@behaviour(methods=METHODS, raises=NO_MERGING)
def switch_while_merged(run: Run) -> None:
    """PEFT's set_adapter unmerges."""
    run.add("other")
    run.step()
    run.model.merge_adapter()
    run.model.set_adapter("other")
    run.step()


@behaviour()
def delete_while_merged(run: Run) -> None:
    run.add("other")
    run.model.merge_adapter(["default"])
    run.refused(lambda: run.model.delete_adapter("default"))
    run.model.unmerge_adapter()
    run.model.delete_adapter("default")
    run.step()


@behaviour(methods=METHODS, raises=NO_MERGING)
def disable_while_merged(run: Run) -> None:
    """PEFT unmerges at the first forward."""
    run.model.merge_adapter()
    with run.model.disable_adapter():
        run.step("the adapters are disabled, and PEFT unmerges them first")
        run.step(BASE)
    run.show("merged", [layer.merged for layer in adapted_layers(run.model)])
    run.step()


@behaviour(methods=METHODS, raises=NO_MERGING)
def save_while_merged(run: Run) -> None:
    run.model.merge_adapter()
    run.show("state", run.model.state_dict())
    copied = copy.deepcopy(run.model)
    copied.unmerge_adapter()
    original, run.model = run.model, copied
    run.step()
    run.model = original
    run.step(BASE)


@behaviour()
def merge_with_lora_bias(run: Run) -> None:
    run.add("biased", use_dora=False, lora_bias=True)
    run.model.set_adapter("biased")
    run.step()
    run.model.merge_adapter()
    run.step(BASE)
    run.model.unmerge_adapter()
    run.step()


def unloaded(run: Run, **options) -> None:
    run.step()
    run.model = run.model.eval().merge_and_unload(**options)
    assert not adapted_layers(run.model)
    run.show("y", run.model(inputs()))


@behaviour(lora_dropout=0.1, methods=METHODS, raises=NO_UNLOADING)
def merge_and_unload(run: Run) -> None:
    unloaded(run)


@behaviour()
def safe_merge_and_unload(run: Run) -> None:
    unloaded(run, safe_merge=True)


@behaviour()
def merge_and_unload_two(run: Run) -> None:
    run.add("other")
    unloaded(run, adapter_names=["default", "other"])


@behaviour(methods=METHODS, raises=NO_UNLOADING)
def unload(run: Run) -> None:
    run.model = run.model.unload()
    assert not adapted_layers(run.model)
    run.show("y", run.model(inputs()))


@behaviour(methods=METHODS, raises=NO_MERGING)
def merge_and_unload_when_merged(run: Run) -> None:
    run.model.merge_adapter()
    run.model = run.model.merge_and_unload()
    run.show("y", run.model(inputs()))
