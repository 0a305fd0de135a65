"""Malformed calls are typed errors that name the argument, and change nothing; the table is bad_input.py."""

from __future__ import annotations

import hashlib
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bad_input import (
    FUNCTIONS,
    LOW_RANK_OPTIONS,
    METHOD_OPTIONS,
    NAN,
    RANK,
    REFT_OPTIONS,
    D,
    K,
    N,
    R,
    bases,
    linear4bit,
    weights,
)
from cases import backends_of, make_weight
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_fast import (
    AdapterConfig,
    AdapterLinear,
    BackendUnavailable,
    DoRALinear,
    LoRALinear,
    LoReFTConfig,
    LoReFTLinear,
    UnsupportedLayer,
    UnsupportedWeight,
    accelerate,
    convert,
    explain,
    get_adapter_model,
    get_reft_model,
    native,
    quantize,
    restore,
)
from peft_fast.adapter_linear import SharedFactors
from peft_fast.config import TrainConfig
from peft_fast.initialization import initialize
from peft_fast.quantization import to_packed

TYPED = (ValueError, TypeError, BackendUnavailable)
BACKENDS = ("auto", *backends_of("lora_linear", "nf4"))


def state_of(model: nn.Module) -> str:
    """A hash of every parameter and buffer, and of what else a refused call could have left behind."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        plain = {
            k: v
            for k, v in vars(module).items()
            if not k.startswith("_") and isinstance(v, str | int | float)
        }
        digest.update(
            repr((name, type(module).__qualname__, id(type(module)), sorted(plain.items()))).encode()
        )
        digest.update(repr([list(h) for h in hooks]).encode())
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                digest.update(repr((key, type(t), t.dtype, t.shape, t.requires_grad, id(t))).encode())
                digest.update(
                    b"" if t.is_meta else t.detach().contiguous().view(torch.uint8).numpy().tobytes()
                )
    return digest.hexdigest()


def refused(call, argument: str) -> str:
    """The call raises one of our errors, which names the argument, and what was expected and came."""
    with pytest.raises(TYPED) as caught:
        call()
    message = str(caught.value)
    assert argument in message.split("expected")[0], message
    assert "expected" in message, message
    assert "got" in message, message
    return message


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [name for name, _, _ in FUNCTIONS])
def test_functions_name_what_does_not_fit(function, backend):
    _, call, rows = next(row for row in FUNCTIONS if row[0] == function)
    for bad in rows:
        before = {
            name: t.clone() for name, t in bad.given.items() if type(t) is torch.Tensor and not t.is_meta
        }
        try:
            refused(lambda bad=bad: call(backend, bad.given), bad.argument)
        except BaseException as error:
            raise AssertionError(f"{function}: {bad.id}: {error}") from error
        for name, tensor in before.items():
            now = bad.given[name]
            assert tensor.dtype == now.dtype
            assert tensor.is_sparse or torch.equal(tensor.cdouble(), now.cdouble())


@pytest.mark.parametrize("level", native.levels())
def test_compiled_ops_check_sizes_themselves(level):
    """Called past every check in Python: nothing is read beyond what is there."""
    ops = torch.ops.peft_fast_cpu
    weight = make_weight("nf4", N, K)
    x, A, B, z, grad = (torch.randn(*s) for s in ((3, K), (R, K), (N, R), (3, R), (3, N)))
    forward = {"x": x, "weight": weight, "bias": torch.randn(N), "lora_A": A, "lora_B": B, "mask": None}
    forward |= {"out_scale": torch.ones(N)}
    backward = {"grad": grad, "x": x, "weight": weight, "lora_A": A, "lora_B": B, "z": z, "mask": None}
    backward |= {"out_scale": torch.ones(N), "bias": torch.randn(N), "y": grad}

    def args(values):
        return [field for value in values for field in (value if isinstance(value, tuple) else (value,))]

    def run_forward(**given):
        return ops.lora_linear(*args({**forward, **given}.values()), 1.0, 0.0, level, False)

    def run_backward(**given):
        return ops.lora_linear_backward(
            *args({**backward, **given}.values()), 1.0, 0.0, *[True] * 5, level
        )  # fmt: skip

    run_forward(), run_backward()
    for bad in weights():
        lie = bad.given["weight"]
        if isinstance(lie, tuple):
            for call in (
                lambda lie=lie: run_forward(weight=lie),
                lambda lie=lie: run_backward(weight=lie),
                lambda lie=lie: ops.dequantize(*lie, torch.float32, level),
            ):
                with pytest.raises((RuntimeError, TypeError)):
                    call()
    short = {"x": x[:, :-1].contiguous(), "lora_A": A[:, 1:].contiguous(), "lora_B": B[1:], "mask": A[0]}
    short |= {"out_scale": torch.ones(N - 1), "bias": torch.ones(N - 1)}
    for name, tensor in short.items():
        with pytest.raises(RuntimeError, match=f"{name}: expected"):
            run_forward(**{name: tensor})
    for name, tensor in {**short, "grad": grad[1:], "z": z[:, :1].contiguous(), "y": grad[:, 1:]}.items():
        with pytest.raises(RuntimeError, match=name):
            run_backward(**{name: tensor})


@pytest.mark.parametrize("level", native.levels())
def test_compiled_edits_check_sizes_themselves(level):
    ops, right = (
        torch.ops.peft_fast_cpu,
        {"h": torch.randn(3, D), "residual": None, "rows": torch.tensor([0, -1, 2])},
    )
    right |= {"projection": torch.randn(RANK, D), "bias": torch.randn(RANK), "basis": torch.randn(RANK, D)}
    rest = (None, 0.0, False, "gelu", level)
    ops.loreft(*right.values(), *rest)
    wrong = {
        "h": torch.randn(2, D), "residual": torch.randn(3, D - 1), "rows": torch.tensor([3]),
        "projection": torch.randn(RANK + 1, D), "bias": torch.randn(RANK - 1),
        "basis": torch.randn(RANK, D + 1),
    }  # fmt: skip
    for name, tensor in wrong.items():
        with pytest.raises(RuntimeError, match="rows" if name == "h" else name):
            ops.loreft(*{**right, name: tensor}.values(), *rest)


LAYERS = {
    "LoRALinear": lambda base, **options: LoRALinear.from_linear(base, **{"r": 4, **options}),
    "DoRALinear": lambda base, **options: DoRALinear.from_linear(base, **{"r": 4, **options}),
    "AdapterLinear": lambda base, **options: AdapterLinear.from_linear(base, "ia3", **options),
    "LoReFTLinear": lambda base, **options: LoReFTLinear.from_linear(base, LoReFTConfig(r=4), **options),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_that_cannot_be_a_base_are_left_as_they_were(layer):
    for wrong, base in bases().items():
        before = state_of(base) if isinstance(base, nn.Module) else None
        with pytest.raises((UnsupportedLayer, UnsupportedWeight), match=r"expected .* got"):
            LAYERS[layer](base)
        assert before is None or state_of(base) == before, wrong


@pytest.mark.parametrize("layer", ["LoRALinear", "DoRALinear"])
@pytest.mark.parametrize(("option", "value"), LOW_RANK_OPTIONS, ids=repr)
def test_options_of_low_rank_layers(layer, option, value):
    base = nn.Linear(K, N)
    before = state_of(base)
    refused(lambda: LAYERS[layer](base, **{option: value}), option)
    assert state_of(base) == before


@pytest.mark.parametrize(("method", "option", "value"), METHOD_OPTIONS, ids=repr)
def test_options_of_methods(method, option, value):
    base = nn.Linear(K, N)
    before, given = state_of(base), {} if option == "method" else {option: value}
    refused(lambda: AdapterLinear.from_linear(base, method, **given), option)
    assert state_of(base) == before


@pytest.mark.parametrize(("option", "value"), REFT_OPTIONS, ids=repr)
def test_options_of_edits(option, value):
    refused(lambda: LoReFTConfig(**{option: value}), option)


MODEL_CALLS = {
    "quantize": quantize,
    "convert": convert,
    "accelerate": accelerate,
    "restore": restore,
    "explain": explain,
    "get_adapter_model": lambda model: get_adapter_model(model, AdapterConfig("ia3")),
    "get_reft_model": lambda model: get_reft_model(model, LoReFTConfig(r=4)),
}


@pytest.mark.parametrize("call", MODEL_CALLS)
@pytest.mark.parametrize("given", [None, "model", [nn.Linear(K, N)], nn.Linear], ids=repr)
def test_what_is_no_model(call, given):
    refused(lambda: MODEL_CALLS[call](given), "module" if call == "explain" else "model")


@pytest.mark.parametrize(
    ("call", "option", "value"),
    [
        (convert, "lora_dropout", float("nan")),
        (convert, "lora_dropout", 1.5),
        (convert, "lora_alpha", float("inf")),
        (convert, "double_quant", "yes"),
        (convert, "r", 0),
        (convert, "backend", "gpu"),
        (quantize, "double_quant", "yes"),
        (quantize, "blocksize", 48),
        (quantize, "quant", "nf5"),
        (accelerate, "backend", "gpu"),
        (accelerate, "methods", 5),
        (accelerate, "methods", ()),
        (accelerate, "methods", "lora"),
        (accelerate, "methods", [["lora"]]),
        (accelerate, "methods", ("lora", None)),
    ],
)
def test_options_for_models(call, option, value):
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    before = state_of(model)
    refused(lambda: call(model, **{option: value}), option)
    assert state_of(model) == before


WITH_A_LIE = {
    "accelerate": lambda model: accelerate(model, strict=True),
    "to_packed": to_packed,
    "get_adapter_model": lambda model: get_adapter_model(model, AdapterConfig("ia3")),
    "initialize": lambda model: initialize(
        get_peft_model(model, LoraConfig(target_modules=["bad"])), "pissa"
    ),
}


@pytest.mark.parametrize("call", WITH_A_LIE)
def test_models_with_a_quant_state_that_lies(call):
    for wrong, base in bases().items():
        if not isinstance(base, bnb.nn.Linear4bit):
            continue
        model = nn.ModuleDict({"good": nn.Linear(K, K), "bad": base})
        model.config = {"model_type": "custom"}
        before = state_of(model)
        with pytest.raises((UnsupportedLayer, UnsupportedWeight), match=r"expected [\s\S]* got"):
            WITH_A_LIE[call](model)
        if call != "initialize":  # there PEFT's layers are in the model
            assert state_of(model) == before, wrong


LIES = {
    "shape": torch.Size((K, N)),
    "blocksize": 128,
    "absmax": torch.zeros(N * K // 64 - 1, dtype=torch.uint8),
    "code": torch.zeros(15),
    "state2": None,
    "quant_type": "nf5",
}


@pytest.mark.parametrize("layer", ["LoRALinear", "DoRALinear", "AdapterLinear", "LoReFTLinear"])
@pytest.mark.parametrize("lie", LIES)
def test_a_quant_state_that_lies_later_on(layer, lie):
    """Once the layer is adopted: the next call says so, with gradients and without."""
    base = linear4bit()
    adopted = LAYERS[layer](base)
    setattr(base.weight.quant_state, lie, LIES[lie])
    for x in (torch.randn(3, K), torch.randn(3, K, requires_grad=True)):
        with pytest.raises(TYPED, match=r"expected .* got"):
            adopted(x)


SHARED: list[tuple[str, Any]] = [
    ("in_features", 0), ("in_features", -1), ("in_features", 8.0), ("in_features", "8"),
    ("in_features", None), ("in_features", True), ("out_features", 0), ("out_features", 2.5),
    ("adapter_dtype", torch.int8), ("adapter_dtype", "fp32"), ("method", "ia3"), ("method", None),
    ("r", 0), ("r", 10**12), ("dropout", NAN),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), SHARED, ids=repr)
def test_shared_factors(option, value):
    right = {"method": "vera", "in_features": K, "out_features": N, "r": 4}
    refused(lambda: SharedFactors(**{**right, option: value}), option)


TRAINING: list[tuple[str, dict[str, Any]]] = [
    ("r", {"r": 2**70}), ("r", {"r": 10**9}), ("seed", {"seed": 2**40}), ("seed", {"seed": -1}),
    ("lr", {"lr": NAN}), ("lr", {"lr": 10**400}), ("lr", {"lr": "1e999"}), ("alpha", {"alpha": -(10**400)}),
    ("steps", {"steps": 2**31}), ("batch_size", {"batch_size": 2**70}), ("max_length", {"max_length": 2**63}),
    ("backend", {"backend": "gpu"}), ("backend", {"backend": ""}), ("backend", {"backend": None}),
    ("target_modules", {"target_modules": ""}), ("target_modules", {"target_modules": "q_proj,,v_proj"}),
    ("target_modules", {"target_modules": " "}), ("model", {"model": ""}), ("output", {"output": ""}),
    ("positions", {"method": "loreft", "positions": "f0"}), ("layers", {"method": "loreft", "layers": "x"}),
    ("layers", {"method": "loreft", "layers": "0,0"}), ("component", {"method": "loreft", "component": ""}),
    ("data", {"task": "classification", "data": ""}), ("overwrite", {"resume": True, "overwrite": True}),
]  # fmt: skip


@pytest.mark.parametrize(("option", "given"), TRAINING, ids=repr)
def test_options_of_training(option, given):
    refused(lambda: TrainConfig(**given), option)
