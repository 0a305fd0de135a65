"""Behaviours of autograd around a layer: transforms, hooks, in-place writes, tracing, saved tensors."""

from __future__ import annotations

import concurrent.futures

import pytest
import torch
from behaviours import BASE, FUSED, METHODS, Run, behaviour
from behaviours_training import fixed_inputs
from peft_models import WIDTH, adapted_layers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

NO_TRANSFORMS = {  # bitsandbytes'
    "nf4-lora": "In order to use an autograd.Function with functorch transforms",
    "nf4-dora": "inside functorch transform is not allowed",
}


@behaviour(methods=METHODS)
def backward_twice(run: Run) -> None:
    x = fixed_inputs(4).requires_grad_()
    leaves = [x, *(p for p in run.model.parameters() if p.requires_grad)]
    loss = run.model(x).square().sum()
    run.show("first", torch.autograd.grad(loss, leaves, retain_graph=True))
    run.show("second", torch.autograd.grad(loss, leaves))


@behaviour(methods=METHODS)
def functional_call(run: Run) -> None:
    """The parameters of one call replaced, as torch.func does."""
    halved = {n: p.detach() * 0.5 for n, p in run.model.named_parameters() if p.requires_grad}
    run.step()
    run.step(call=lambda x: torch.func.functional_call(run.model, halved, (x,)))
    run.step()


@behaviour(raises=NO_TRANSFORMS)
def gradients_by_func(run: Run) -> None:
    adapter = {n: p.detach() for n, p in run.model.named_parameters() if "lora_" in n}

    def loss(parameters, x):
        return torch.func.functional_call(run.model, parameters, (x,)).square().sum()

    run.show("gradients", torch.func.grad(loss)(adapter, fixed_inputs(4)))


@behaviour(methods=METHODS)
def vmap(run: Run) -> None:
    run.model.eval()
    with torch.no_grad():
        run.show("y", torch.vmap(run.model)(fixed_inputs(4, 3)))


@behaviour(methods=METHODS)
def forward_mode(run: Run) -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(fixed_inputs(4), fixed_inputs(4).flip(0))
        if run.kind == "dense":
            run.show("y", forward_ad.unpack_dual(run.model(x)).tangent)
        else:
            run.refused(lambda: run.model(x))
    run.step()


@behaviour(lora_dropout=0.1, methods=METHODS)
def output_written_in_place(run: Run) -> None:
    layer = adapted_layers(run.model)[0]
    for write in (
        lambda y: y.mul_(2.0),
        lambda y: y.relu_(),
        lambda y: y[..., :3].add_(1.0) if y.requires_grad else y,
        lambda y: y.chunk(2, -1)[0].mul_(3.0) if y.requires_grad else y,
    ):
        torch.manual_seed(4)
        x = fixed_inputs(2, 3).requires_grad_()
        y = layer(x)
        run.tried(lambda y=y, write=write: write(y))
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        run.show("gradients", torch.autograd.grad(y.square().sum(), leaves))


@behaviour()
def input_written_in_place(run: Run) -> None:
    """autograd notices."""
    layer = adapted_layers(run.model)[0]
    x = fixed_inputs(4).requires_grad_()
    h = x * 1.0
    y = layer(h)
    h.zero_()
    try:
        y.sum().backward()
    except RuntimeError as error:
        run.show("noticed", "modified by an inplace operation" in str(error))
    else:
        raise AssertionError("expected autograd to notice")


@behaviour(lora_dropout=0.1, methods=METHODS)
def gradient_hooks(run: Run) -> None:
    seen: list[str] = []
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g: g * 2.0)
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    torch.manual_seed(4)
    run.model(fixed_inputs(4).requires_grad_()).square().sum().backward()
    run.show("seen", sorted(seen))
    run.show("gradients", {n: p.grad for n, p in run.model.named_parameters()})


@behaviour(lora_dropout=0.1, methods=METHODS)
def called_twice(run: Run) -> None:
    """One layer at two places of a graph."""
    run.step(call=lambda x: run.model(run.model(x)), times=2)


@behaviour()
def adapters_tied_across_layers(run: Run) -> None:
    run.add("other", targets=["up"], r=4)
    layers = adapted_layers(run.model)
    layers[0].lora_A["other"].weight = layers[0].lora_A["default"].weight
    run.step()
    run.model.set_adapter("other")
    run.step((FUSED, BASE))


@behaviour()
def learned_scaling(run: Run) -> None:
    scaling = torch.tensor(2.0, requires_grad=True)
    for layer in adapted_layers(run.model):
        layer.scaling["default"] = scaling
    run.step()
    run.model(fixed_inputs(4)).square().sum().backward()
    run.show("gradient", scaling.grad)


@behaviour()
def scaling_of_any_number(run: Run) -> None:
    for value in (2, 0, -1.5, torch.tensor(0.5).item(), torch.tensor([0.25])):
        for layer in adapted_layers(run.model):
            layer.scaling["default"] = value
        run.step()


@behaviour(lora_dropout=0.2, methods=METHODS)
def saved_on_cpu(run: Run) -> None:
    with torch.autograd.graph.save_on_cpu():
        run.step()


@behaviour(methods=METHODS)
def saved_by_hooks(run: Run) -> None:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> int:
        kept.append(t)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i]):
        run.step()


@behaviour(lora_dropout=0.2, methods=METHODS)
def selective_checkpointing(run: Run) -> None:
    """Products are kept, the rest is computed again."""

    def policy(_, op, *args, **kwargs):
        kept = any(name in str(op) for name in ("mm", "lora_linear"))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(policy)

    run.step(call=lambda x: checkpoint(run.model, x, use_reentrant=False, context_fn=contexts))


@behaviour(methods=METHODS)
def anomaly_detection(run: Run) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        run.step()


@behaviour(methods=METHODS)
def jit_trace(run: Run) -> None:
    run.model.eval()
    net = run.model.base_model.model
    traced = torch.jit.trace(net, fixed_inputs(4), check_trace=False)
    run.show("y", traced(fixed_inputs(7)))


@behaviour(methods=METHODS)
def exported(run: Run) -> None:
    """PyTorch cannot make Params4bit fake."""
    net = run.model.base_model.model.eval()
    if run.kind == "dense":
        program = torch.export.export(net, (fixed_inputs(4),), strict=False)
        run.show("y", program.module()(fixed_inputs(4)))
    else:
        with pytest.raises(Exception, match=r"Params4bit|fake tensor"):
            torch.export.export(net, (fixed_inputs(4),), strict=False)
    run.step()


@behaviour(methods=METHODS)
def default_dtype(run: Run) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            run.step(x=fixed_inputs(3, 5).float())
        finally:
            torch.set_default_dtype(torch.float32)


@behaviour(methods=METHODS)
def device_context(run: Run) -> None:
    with torch.device("cpu"):
        run.step()


@behaviour(methods=METHODS)
def threads_with_gradients(run: Run) -> None:
    batches = [fixed_inputs(i + 1) for i in range(8)]

    def gradients(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        leaves = [x, *(p for p in run.model.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(run.model(x).square().sum(), leaves))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        run.show("gradients", list(pool.map(gradients, batches)))


@behaviour(lora_dropout=0.3)
def dropout_changed(run: Run) -> None:
    for p in (0.6, 0.0):
        for layer in adapted_layers(run.model):
            layer.lora_dropout["default"].p = p
        run.step()


@behaviour(methods=METHODS)
def parameter_as_input(run: Run) -> None:
    x = nn.Parameter(fixed_inputs(4))
    run.model(x).square().sum().backward()
    run.show("dx", x.grad)
    run.show("y", run.model(x=fixed_inputs(4).expand(3, 4, WIDTH)))
