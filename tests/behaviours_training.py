"""Behaviours around training: steps, what requires gradients, dtypes, autocast, checkpoints, threads."""

from __future__ import annotations

import concurrent.futures

import torch
from behaviours import BASE, FUSED, METHODS, Run, behaviour
from peft_models import WIDTH, adapted_layers, inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

PEFTS_DTYPE = ("lora", "dora", "vera")
"""Those whose half output has PEFT's dtype; see test_peft_ia3."""

TRAINED_BASE = "the weight of base_layer is trained"


def fixed_inputs(*shape: int) -> torch.Tensor:
    torch.manual_seed(8)
    return inputs(*shape)


# ---------------------------------------------------------------------------------------------------- modes


@behaviour(lora_dropout=0.5, methods=METHODS)
def train_and_eval(run: Run) -> None:
    run.step()
    run.model.eval()
    run.step()
    run.step(grad=False)
    run.model.train()
    run.step(grad=False)
    run.step()


@behaviour(lora_dropout=0.5)
def dropout_in_eval_alone(run: Run) -> None:
    """The dropout module and the layer have training flags of their own; PEFT's DoRA looks at both."""
    for layer in adapted_layers(run.model):
        layer.lora_dropout["default"].eval()
    run.step()
    for layer in adapted_layers(run.model):
        layer.training, layer.lora_dropout["default"].training = False, True
    run.step()


@behaviour(lora_dropout=1.0)
def everything_dropped(run: Run) -> None:
    run.step()


@behaviour(lora_dropout=0.1, methods=METHODS)
def inference_mode(run: Run) -> None:
    run.model.eval()
    with torch.inference_mode():
        run.show("y", run.model(inputs()))
        run.show("y", run.model(inputs()))
    run.step()


@behaviour(methods=METHODS)
def shapes(run: Run) -> None:
    for shape in ((7,), (1, 1), (0,), (2, 3, 4)):
        run.step(x=fixed_inputs(*shape))
    run.step(x=fixed_inputs(9, 2)[::2, :1])
    if run.method == "lora":  # PEFT's DoRA makes a batch of one row of it
        run.step(x=fixed_inputs(5)[0])
    run.step(x=fixed_inputs(5).expand(2, 3, 5, WIDTH))
    run.step(x=torch.randn(WIDTH, 6, generator=torch.Generator().manual_seed(4)).t())


@behaviour(methods=METHODS)
def eight_threads(run: Run) -> None:
    run.model.eval()
    batches = [fixed_inputs(i + 1) for i in range(8)]

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return run.model(x)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        run.show("y", list(pool.map(forward, batches)))
    run.step()


# --------------------------------------------------------------------------------------------- trained steps


def trained(run: Run, forward, steps: int = 4, accumulated: int = 1) -> None:
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    torch.manual_seed(7)
    batch = fixed_inputs(2 * accumulated, 6)
    for _ in range(steps):
        for part in batch.chunk(accumulated):
            loss = forward(part.clone().requires_grad_()).square().mean() / accumulated
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    run.show("losses", losses)
    assert losses[-1] < losses[0]


@behaviour(methods=METHODS)
def training(run: Run) -> None:
    trained(run, run.model)
    run.step()


@behaviour(methods=METHODS)
def gradient_accumulation(run: Run) -> None:
    trained(run, run.model, accumulated=4)


@behaviour(lora_dropout=0.2, methods=METHODS)
def checkpointing(run: Run) -> None:
    run.step(call=lambda x: checkpoint(run.model, x, use_reentrant=False))


@behaviour(lora_dropout=0.2, methods=METHODS)
def checkpointing_reentrant(run: Run) -> None:
    """Without torch.autograd.grad, which a reentrant checkpoint refuses."""
    for name in ("default", "other"):
        if name == "other":
            run.add(name)
            run.model.set_adapter(name)
        x = fixed_inputs(3, 5).requires_grad_()
        torch.manual_seed(5)
        run.expect(FUSED)
        checkpoint(run.model, x, use_reentrant=True).square().sum().backward()
        run.show("dx", x.grad)
        run.show("gradients", {n: p.grad for n, p in run.model.named_parameters()})


@behaviour(methods=METHODS)
def checkpointed_training(run: Run) -> None:
    trained(run, lambda x: checkpoint(run.model, x, use_reentrant=False), accumulated=2)


# ----------------------------------------------------------------------------------------- requires_grad


def layer_parts(run: Run) -> list[dict[str, nn.Parameter]]:
    return [
        {
            part: getattr(layer, part)["default"].weight
            for part in ("lora_A", "lora_B", "lora_magnitude_vector")
            if "default" in getattr(layer, part)
        }
        for layer in adapted_layers(run.model)
    ]


@behaviour(lora_dropout=0.1)
def frozen_parts(run: Run) -> None:
    """A, B or the magnitude alone, and all of them: dX goes on."""
    for frozen in ("lora_A", "lora_B", "lora_magnitude_vector", "all"):
        for parts in layer_parts(run):
            for name, parameter in parts.items():
                parameter.requires_grad_(name != frozen and frozen != "all")
        run.step()
    run.model.set_requires_grad("default", True)
    run.step()
    run.model.set_requires_grad("default", False)
    run.step()


@behaviour()
def frozen_in_one_layer(run: Run) -> None:
    for parameter in layer_parts(run)[0].values():
        parameter.requires_grad_(False)
    run.step()


@behaviour(bias="all")
def trained_bias(run: Run) -> None:
    run.step()
    for layer in adapted_layers(run.model):
        layer.base_layer.bias.requires_grad_(False)
    run.step()


@behaviour(raises={"nf4": "only Tensors of floating point dtype can require gradients"}, methods=METHODS)
def trained_base(run: Run) -> None:
    run.step()
    run.model.base_model.model.up.base_layer.weight.requires_grad_()
    run.step((TRAINED_BASE, FUSED))
    run.model.base_model.model.up.base_layer.weight.requires_grad_(False)
    run.step()


@behaviour(methods=METHODS)
def frozen_input(run: Run) -> None:
    run.model(fixed_inputs(4)).square().sum().backward()
    run.show("gradients", {name: p.grad for name, p in run.model.named_parameters()})


# ---------------------------------------------------------------------------------------- dtypes and devices


@behaviour(lora_dropout=0.2, methods=PEFTS_DTYPE)
def autocast(run: Run) -> None:
    run.rounding = torch.bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            run.step(x=fixed_inputs(3, 5).to(dtype))
    run.rounding = torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        run.step()
    run.step()


@behaviour()
def autocast_without_cache(run: Run) -> None:
    run.rounding = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        run.step()
        run.step(grad=False)


@behaviour(lora_dropout=0.1, methods=PEFTS_DTYPE)
def to_half_and_back(run: Run) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        run.model.to(dtype)
        run.rounding = dtype
        run.step(x=fixed_inputs(3, 5).to(dtype))


@behaviour(methods=METHODS)
def to_double(run: Run) -> None:
    run.model.double()
    run.step("is torch.float64", x=fixed_inputs(3, 5).double())
    run.model.float()
    run.step()


@behaviour(dtype=torch.bfloat16, lora_dropout=0.1, methods=PEFTS_DTYPE)
def half_base(run: Run) -> None:
    """fp32 adapters on a bfloat16 model."""
    run.rounding = torch.bfloat16
    run.step(x=fixed_inputs(3, 5).bfloat16())


@behaviour(dtype=torch.float16, adapter_dtype=torch.float16)
def half_everywhere(run: Run) -> None:
    run.rounding = torch.float16
    run.step(x=fixed_inputs(3, 5).half())


@behaviour(fails={"dense": "must have the same dtype"})
def half_input(run: Run) -> None:
    """bfloat16 into an fp32 model: bitsandbytes casts, and so does the fused op; nn.Linear refuses."""
    run.rounding = torch.bfloat16
    run.step(x=fixed_inputs(3, 5).bfloat16())


@behaviour(methods=METHODS)
def to_device(run: Run) -> None:
    run.model.to("cpu")
    run.step()
    for layer in adapted_layers(run.model):
        layer._move_adapter_to_device_of_base_layer("default")
    run.step()
    run.model.to_empty(device="meta")
    run.show("devices", [str(p.device) for p in run.model.parameters()])


@behaviour(raises={"nf4": "Creating a Parameter from an instance of type Params4bit"})
def meta(run: Run) -> None:
    """Everything on the meta device: shapes without values."""
    run.model.to("meta")
    run.expect("the weight of base_layer is on the meta device")
    run.show("y", run.model(torch.empty(3, WIDTH, device="meta")))


@behaviour()
def share_memory(run: Run) -> None:
    run.model.share_memory()
    run.step()


@behaviour()
def base_alone_by_forward(run: Run) -> None:
    """The base layer of a layer called by itself, as quantization-aware code does."""
    layer = adapted_layers(run.model)[0]
    run.show("y", layer.get_base_layer()(fixed_inputs(4)))
    run.show("weight", layer.get_base_weight())
    with run.model.disable_adapter():
        run.step(BASE)
