"""Behaviours of what is attached to a layer or in the place of its parts: hooks, parametrizations."""

from __future__ import annotations

import torch
from behaviours import METHODS, Run, behaviour, each_layer
from peft.helpers import disable_input_dtype_casting
from peft_models import adapted_layers, inputs, rescale
from torch import nn

HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


def hooked(run: Run, name: str, adapter: str = "default") -> None:
    """Hooks on a part that fusing would skip are called, and the part is skipped again without them."""
    for register in HOOKS:
        seen: list[int] = []

        def set_up(layer, register=register, seen=seen):
            part = layer.base_layer if name == "base_layer" else getattr(layer, name)[adapter]
            return getattr(part, register)(lambda *_: seen.append(1))

        with each_layer(run.model, set_up):
            run.step(f"{name} has hooks")
        run.show("hooks called", len(seen))
        assert seen
    run.step()


@behaviour(lora_dropout=0.1, methods=METHODS)
def hooks_on_base_layer(run: Run) -> None:
    hooked(run, "base_layer")


@behaviour(lora_dropout=0.1)
def hooks_on_lora_A(run: Run) -> None:
    hooked(run, "lora_A")


@behaviour(lora_dropout=0.1)
def hooks_on_lora_B(run: Run) -> None:
    hooked(run, "lora_B")


@behaviour(lora_dropout=0.1)
def hooks_on_lora_dropout(run: Run) -> None:
    hooked(run, "lora_dropout")


@behaviour()
def hooks_on_magnitude(run: Run) -> None:
    run.add("other", use_dora=True)
    run.model.set_adapter("other")
    hooked(run, "lora_magnitude_vector", "other")


@behaviour(methods=METHODS)
def hooks_on_the_layer(run: Run) -> None:
    seen: list[torch.Size] = []
    with each_layer(
        run.model, lambda layer: layer.register_forward_hook(lambda _, x, y: seen.append(y.shape) or y * 2)
    ):
        run.step()
    run.show("seen", seen)


@behaviour(methods=METHODS)
def hooks_for_all_modules(run: Run) -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__.replace("Fused", ""))
    )
    try:
        run.step("a hook for all modules is registered")
    finally:
        handle.remove()
    run.show("seen", seen)
    run.step()


@behaviour(methods=METHODS)
def forward_of_its_own(run: Run) -> None:
    """As device_map offloading sets on a submodule."""
    seen: list[int] = []
    for layer in adapted_layers(run.model):
        call = layer.base_layer.forward
        layer.base_layer.forward = lambda x, call=call: seen.append(1) or call(x) * 2.0
    run.step("base_layer has a forward of its own")
    run.show("seen", len(seen))
    for layer in adapted_layers(run.model):
        del layer.base_layer.forward
    run.step()


@behaviour()
def parametrized(run: Run) -> None:
    for layer in adapted_layers(run.model):
        nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", nn.Tanh())
    run.step("lora_A is a ParametrizedLinear")
    for layer in adapted_layers(run.model):
        nn.utils.parametrize.remove_parametrizations(layer.lora_A["default"], "weight")
    run.step()


@behaviour()
def replaced_dropout(run: Run) -> None:
    for layer in adapted_layers(run.model):
        layer.lora_dropout["default"] = nn.Tanh()
    run.step("lora_dropout is a Tanh")
    for layer in adapted_layers(run.model):
        layer.lora_dropout["default"] = nn.Dropout(0.25)
    run.step()


@behaviour()
def no_casting_of_the_input(run: Run) -> None:
    with disable_input_dtype_casting(run.model):
        run.step("casting of the input is disabled")
        run.refused(lambda: run.model(inputs(dtype=torch.bfloat16)))
    run.step()


@behaviour()
def other_variants(run: Run) -> None:
    """aLoRA, VeLoRA and their kind keep PEFT's forward."""
    run.add("other", use_dora=False, alora_invocation_tokens=[1])
    run.model.set_adapter("other")
    run.step("is a LoRA variant, ALoraLinearVariant")


@behaviour()
def another_magnitude(run: Run) -> None:
    """Adapter weights written through `.data`, as optimizers of other libraries do."""
    run.step()
    for layer in adapted_layers(run.model):
        layer.lora_A["default"].weight.data.mul_(1.5)
        for name in layer.lora_magnitude_vector:
            rescale(layer, name)
    run.step()
