"""Behaviours around adapters: which are there, which are active, how they are scaled, saved and copied."""

from __future__ import annotations

import tempfile

import torch
from behaviours import BASE, FUSED, METHODS, STOCK_LAYER, Run, behaviour
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import adapted_layers, inputs

NOT_DORA = {"dora": "Cannot pass `adapter_names` when DoRA is enabled"}


# ------------------------------------------------------------------------------------------ which are active


@behaviour(lora_dropout=0.1, methods=METHODS)
def switch(run: Run) -> None:
    run.add("other", lora_dropout=0.3)
    for name in ("other", "default", "other"):
        run.model.set_adapter(name)
        run.step()


@behaviour()
def switch_method(run: Run) -> None:
    run.add("other", use_dora=run.method == "lora")
    for name in ("other", "default", "other"):
        run.model.set_adapter(name)
        run.step()


@behaviour(methods=METHODS)
def set_adapter_for_inference(run: Run) -> None:
    run.add("other")
    run.model.set_adapter("other", inference_mode=True)
    run.step()


def several(run: Run, names: str = "") -> str:
    """What runs with several active adapters: IA3's are multiplied."""
    return FUSED if run.method == "ia3" else f"several active adapters: {names}"


@behaviour(lora_dropout=0.1, methods=METHODS)
def several_active(run: Run) -> None:
    run.add("other")
    run.model.base_model.set_adapter(["default", "other"])
    run.step(several(run, "['default', 'other']"))
    run.model.base_model.set_adapter(["default", "default"])
    run.step(several(run, "['default', 'default']"))


@behaviour(methods=METHODS)
def partly_active(run: Run) -> None:
    """The active adapter is on one layer of two."""
    run.add("other", targets=["up"])
    run.model.set_adapter("other")
    run.step((FUSED, BASE))
    run.model.base_model.set_adapter(["default", "other"])
    run.step((several(run), FUSED))


@behaviour(methods=METHODS)
def none_active(run: Run) -> None:
    run.model.base_model.set_adapter([])
    run.step(BASE)


@behaviour(lora_dropout=0.1, methods=METHODS)
def disable(run: Run) -> None:
    with run.model.disable_adapter():
        run.step(BASE)
        with run.model.disable_adapter():
            run.step(BASE)
    run.step()


@behaviour(methods=METHODS)
def disable_through_an_error(run: Run) -> None:
    def fails() -> None:
        with run.model.disable_adapter(), run.model.disable_adapter():
            raise KeyError("from within")

    run.refused(fails)
    run.step()


@behaviour(bias="all")
def disable_with_trained_bias(run: Run) -> None:
    with run.model.disable_adapter():
        run.step(BASE)
    run.step()


@behaviour(methods=METHODS)
def disable_layers(run: Run) -> None:
    run.model.base_model.disable_adapter_layers()
    run.step(BASE)
    run.model.base_model.enable_adapter_layers()
    run.step()
    adapted_layers(run.model)[0].enable_adapters(False)
    run.step((BASE, FUSED))


@behaviour(lora_dropout=0.1, raises=NOT_DORA)
def mixed_batch(run: Run) -> None:
    run.add("other")
    names = ["default", "__base__", "other"]
    run.refused(lambda: run.model(inputs(), adapter_names=names))  # in training mode
    run.model.eval()
    run.refused(lambda: run.model(inputs(), adapter_names=["default", "nowhere", "other"]))
    run.refused(lambda: adapted_layers(run.model)[0](inputs(2), adapter_names=names))
    for mixed in (names, ["__base__"] * 3, ["default"] * 3):
        with torch.no_grad():
            run.show("y", run.model(inputs(), adapter_names=mixed))
    run.model.merge_adapter()
    run.refused(lambda: run.model(inputs(), adapter_names=names))


# ---------------------------------------------------------------------------------- added, deleted, renamed


@behaviour(methods=METHODS)
def add_after_the_swap(run: Run) -> None:
    run.add("later", r=5, lora_dropout=0.2)
    run.step()
    run.model.set_adapter("later")
    run.step()


@behaviour(targets=["up"], methods=METHODS, raises={"vera": "shapes cannot be multiplied"})
def add_to_another_layer(run: Run) -> None:
    """A layer that gets its first adapter after the swap is PEFT's."""
    run.add("later", targets=["up", "down"])
    run.step((FUSED, STOCK_LAYER))
    run.model.set_adapter("later")
    run.step((FUSED, STOCK_LAYER))


@behaviour()
def add_what_is_refused(run: Run) -> None:
    run.refused(lambda: run.add("default"))
    run.refused(lambda: run.add("zero", r=0))
    run.refused(lambda: run.add("nowhere", targets=["sideways"]))
    run.step()


@behaviour()
def add_on_meta_and_load(run: Run) -> None:
    """low_cpu_mem_usage: an adapter without memory, which loading fills."""
    state = get_peft_model_state_dict(run.model)
    torch.manual_seed(3)
    run.model.add_adapter("later", run.config(r=4, lora_alpha=12), low_cpu_mem_usage=True)
    run.step()
    set_peft_model_state_dict(run.model, state, adapter_name="later", low_cpu_mem_usage=True)
    run.model.set_adapter("later")
    run.step()


@behaviour(methods=METHODS)
def delete(run: Run) -> None:
    run.add("other")
    run.model.delete_adapter("default")
    run.show("active", run.model.active_adapters)
    run.step()
    run.refused(lambda: run.model.delete_adapter("default"))
    run.model.add_adapter("default", run.config())
    run.step()


@behaviour(methods=METHODS)
def delete_an_inactive_one(run: Run) -> None:
    run.add("other")
    run.model.delete_adapter("other")
    run.step()


@behaviour(methods=METHODS, raises={"vera": "buffers are empty"})
def delete_the_last(run: Run) -> None:
    run.model.delete_adapter("default")
    run.step(BASE, call=run.model.base_model)
    run.add("new")
    run.model.set_adapter("new")
    run.step()


@behaviour()
def rename_by_loading(run: Run) -> None:
    """PEFT has no rename: the same weights under another name, and the old one deleted."""
    run.model.add_adapter("renamed", run.config(r=4, lora_alpha=12))
    set_peft_model_state_dict(run.model, get_peft_model_state_dict(run.model), adapter_name="renamed")
    run.model.set_adapter("renamed")
    run.model.delete_adapter("default")
    run.step()


@behaviour()
def rename_in_place(run: Run) -> None:
    for layer in adapted_layers(run.model):
        for name in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
            held = getattr(layer, name)
            if "default" in held:
                held["renamed"] = held["default"]
                del held["default"]
    run.model.base_model.peft_config["renamed"] = run.model.base_model.peft_config.pop("default")
    run.step(BASE, call=run.model.base_model)
    run.model.set_adapter("renamed")
    run.step()


@behaviour()
def weighted(run: Run) -> None:
    """add_weighted_adapter; of DoRA adapters PEFT combines A and B, and gives them new magnitudes."""
    run.add("other", r=4, lora_alpha=12)
    run.refused(lambda: run.model.add_weighted_adapter(["default", "nowhere"], [1.0, 1.0], "no"))
    for kind in ("linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"):
        torch.manual_seed(5)
        density = None if kind in ("linear", "cat", "svd") else 0.5
        run.model.add_weighted_adapter(
            ["default", "other"], [0.7, -0.4], kind, combination_type=kind, density=density
        )
        run.model.set_adapter(kind)
        run.step()


@behaviour()
def subtract_with_one(run: Run) -> None:
    run.model.add_weighted_adapter(["default"], [-0.5], "less")
    run.model.set_adapter("less")
    run.model.delete_adapter("default")
    run.step()


# ------------------------------------------------------------------------------------------------- scaling


@behaviour()
def scale(run: Run) -> None:
    for layer in adapted_layers(run.model):
        layer.scale_layer(0.25)
    run.step()
    with rescale_adapter_scale(run.model, 3.0):
        run.step()
    for layer in adapted_layers(run.model):
        layer.unscale_layer(2)
    run.step()
    for layer in adapted_layers(run.model):
        layer.unscale_layer()
        layer.set_scale("default", 0.0)
    run.step()


@behaviour(use_rslora=True)
def scale_of_rslora(run: Run) -> None:
    for layer in adapted_layers(run.model):
        layer.set_scale("default", 0.5)
    run.step()
    for layer in adapted_layers(run.model):
        layer.unscale_layer()
    run.step()


@behaviour(raises={"dora": "KeyError: 'base_model.model.down.lora_magnitude_vector.default'"})
def hotswap(run: Run) -> None:
    run.add("new", r=4, lora_alpha=9)
    with tempfile.TemporaryDirectory() as folder:
        run.model.save_pretrained(folder, selected_adapters=["new"])
        run.model.delete_adapter("new")
        run.step()
        hotswap_adapter(run.model, f"{folder}/new", adapter_name="default", torch_device="cpu")
        run.step()
        run.refused(
            lambda: hotswap_adapter(run.model, f"{folder}/new", adapter_name="nowhere", torch_device="cpu")
        )


@behaviour()
def hotswap_prepared(run: Run) -> None:
    """For a compiler: ranks are padded, and scalings are tensors that are filled."""
    prepare_model_for_compiled_hotswap(run.model, target_rank=8)
    run.step()
    for layer in adapted_layers(run.model):
        layer.scaling["default"].fill_(0.5)
    run.step()
    run.step(grad=False)


@behaviour(raises={"dora": "KeyError: 'base_model.model.down.lora_magnitude_vector.default'"})
def hotswap_with_tensor_scaling(run: Run) -> None:
    run.add("new", r=2, lora_alpha=9)
    with tempfile.TemporaryDirectory() as folder:
        run.model.save_pretrained(folder, selected_adapters=["new"])
        run.model.delete_adapter("new")
        prepare_model_for_compiled_hotswap(run.model, target_rank=8)
        hotswap_adapter(run.model, f"{folder}/new", adapter_name="default", torch_device="cpu")
    run.show("scaling", [layer.scaling["default"] for layer in adapted_layers(run.model)])
    run.step()
