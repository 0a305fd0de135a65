"""`initialize(model, "pissa")`: LoRA that starts from the main directions of the base weight, also in 4 bits.

    PiSSA (arXiv 2404.02948)   W = U·Σ·Vᵀ:  B = U_r·√(Σ_r/s)   A = √(Σ_r/s)·V_rᵀ
    OLoRA (arXiv 2406.01775)   W = Q·R:     B = Q_r            A = R_r
    both                       the base becomes Ŵ = store(W − s·B·A)

W [N, K], A [r, K], B [N, r], s the scaling; `store` rounds to the format that the layer has: its dtype, or
its NF4 or FP4 with the same block size and nesting. So the layer computes what it did, Ŵ + s·B·A ≈ W, up to
the rounding by `store`.

The base is changed, so an adapter file alone is not the model any more. What was trained is in either of:

* The base with the adapter. Over 4 bits, this alone is exact.
* A LoRA of rank 2r for the original base, ΔW = s·(B·A − B₀·A₀): `plain_lora`, or as PEFT does it: save the
  new adapter, train, and save with `path_initial_model_for_weight_conversion`. It leaves out by how much
  Ŵ + s·B₀·A₀ differs from the original base: a rounding of the dtype, or the difference of two quantizations.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Params4bit
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .errors import UnsupportedLayer, UnsupportedWeight
from .formats import from_linear, is_conv1d
from .functional import check_choice
from .fused_layer import base_reason
from .modules import LoRALinear, LowRankLinear, check_base, is_linear4bit
from .peft_layers import fused_kind
from .reference import accumulation_dtype
from .swap import check_module, reader_reason

METHODS = ("pissa", "olora")

NESTED_BLOCKSIZE = 256
"""Scales that share one in nested quantization by bitsandbytes."""


class Factors(NamedTuple):
    """lora_A [r, K] and lora_B [N, r]."""

    lora_A: Tensor
    lora_B: Tensor


class _Layer(NamedTuple):
    """What there is to rewrite of a layer with the adapter, PEFT's or a `LoRALinear`."""

    base: Any
    factors: Factors
    scaling: float


@torch.no_grad()
def initialize(
    model: nn.Module,
    method: str,
    *,
    niter: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    adapter: str = "default",
) -> dict[str, Factors]:
    """Initializes every LoRA layer of `model` from its base weight, **and takes that part out of the base**.

    Do it once, on a new adapter, before a distributed wrapper is made. Over a base in 4 bits W is its decoded
    value, which is quantized a second time; only with `weights` does the layer come nearer to the original
    than its 4-bit base was, as in QPiSSA. While it runs, every new base weight is held beside the old.

    Args:
        model: with PEFT's LoRA or rsLoRA layers, accelerated or not, or `LoRALinear`s.
        method: "pissa" or "olora".
        niter: for PiSSA, iterations of the randomized SVD, `torch.svd_lowrank`; the exact one when None.
        weights: what to decompose instead of the layers' own weights, such as those before quantization: a
            state dict of the model without adapters, of which `<name>.weight` of each layer is read.
        adapter: the adapter of PEFT's layers. In its configuration `init_lora_weights` becomes the method, as
            PEFT writes it, by which PEFT takes the same out of a dense base when it loads the adapter.

    Returns:
        Copies of the new factors by the names of the layers; `plain_lora` takes them.

    Raises:
        UnsupportedLayer, UnsupportedWeight: a layer with the adapter cannot be initialized: it is merged,
            tied, trained already, a variant such as DoRA, under further adapters, or its weight cannot be
            rewritten.
        ValueError: no layer has the adapter, or an argument does not fit.
        In each case nothing was changed.
    """
    check_choice("method", method, METHODS)
    if niter is not None and (method != "pissa" or type(niter) is not int or niter < 0):
        raise ValueError(f"niter: expected None, or for 'pissa' an integer from 0 on, got {niter!r}")
    check_module(model)
    _check(model, adapter)
    layers = _layers(model, adapter)
    if not layers:
        raise ValueError(f"adapter: expected that of a LoRA layer in model, got {adapter!r}")
    starts = {}
    for name, layer in layers.items():
        W = _given(name, layer.base, weights)
        factors = _factors(name, layer, W, method, niter)
        starts[name] = factors, _stored(layer.base, W - layer.scaling * _product(factors, W.dtype))
    for name, (factors, weight) in starts.items():
        for parameter, value in zip(layers[name].factors, factors, strict=True):
            parameter.copy_(value)
        _replace_weight(layers[name].base, weight)
    for config in _configs(model, adapter):
        config.init_lora_weights = method if niter is None else f"{method}_niter_{niter}"
    return {name: factors for name, (factors, _) in starts.items()}


@torch.no_grad()
def plain_lora(
    model: nn.Module, initial: Mapping[str, Factors], adapter: str = "default"
) -> dict[str, Factors]:
    """The training since `initialize` as a LoRA of rank 2r for the original base, at the same scaling.

    B'·A' = B·A − B₀·A₀, with A' [2r, K] = A over A₀ and B' [N, 2r] = B beside −B₀.

    Args:
        model: as it was initialized.
        initial: what `initialize` returned.
        adapter: as there.

    Raises:
        ValueError: `initial` is not of the layers of `model`.
    """
    layers = _layers(model, adapter)
    shapes, expected = (
        {name: [list(t.shape) for t in factors] for name, factors in of.items()}
        for of in (initial, {name: layer.factors for name, layer in layers.items()})
    )
    if shapes != expected:
        raise ValueError(f"initial: expected lora_A and lora_B of shapes {expected}, got {shapes}")
    update = {}
    for name, layer in layers.items():
        A, B = layer.factors
        A_0, B_0 = (t.to(A) for t in initial[name])
        update[name] = Factors(torch.cat((A, A_0)), torch.cat((B, -B_0), dim=1))
    return update


def _layers(model: nn.Module, adapter: str) -> dict[str, _Layer]:
    """The LoRA layers with the adapter by name."""
    layers = {}
    module: Any
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            factors, scaling = Factors(module.lora_A, module.lora_B), module.scaling
        elif isinstance(module, LoraLayer) and adapter in module.lora_A:
            linear_A: Any = module.lora_A[adapter]
            linear_B: Any = module.lora_B[adapter]
            factors, scaling = Factors(linear_A.weight, linear_B.weight), module.scaling[adapter]
        else:
            continue
        layers[name] = _Layer(module.base_layer, factors, float(scaling))
    return layers


def _check(model: nn.Module, adapter: str) -> None:
    """Raises `UnsupportedLayer` or `UnsupportedWeight` where a layer cannot be initialized."""
    modules = dict(model.named_modules())
    owners = collections.Counter(id(p) for module in modules.values() for p in module._parameters.values())
    for name, module in modules.items():
        reason = _reason(name, module, adapter, modules, owners)
        if reason is not None:
            raise UnsupportedLayer(
                f"model: expected LoRA layers that can be initialized, got {name!r}: {reason}"
            )


def _reason(
    name: str, module: Any, adapter: str, modules: dict[str, nn.Module], owners: Mapping[int, int]
) -> str | None:
    if isinstance(module, LowRankLinear):
        if not isinstance(module, LoRALinear):
            return f"a {type(module).__name__}"
    elif not isinstance(module, LoraLayer) or adapter not in (*module.lora_A, *module.lora_embedding_A):
        return None
    elif (kind := fused_kind(module)) is None:
        return f"a {type(module).__module__}.{type(module).__name__}"
    elif (method := kind.method(module, adapter)) != "lora":
        return f"the adapter is {method}"
    elif module.merged_adapters:
        return f"merged adapters: {module.merged_adapters}"
    elif others := sorted({*module.lora_A} - {adapter}):
        return f"under further adapters, {others}, whose base would change"
    elif unfit := kind.part_reason(module, adapter) or reader_reason(name, modules):
        return unfit
    layer = _layers(module, adapter)[""]
    if reason := base_reason(layer.base):
        return reason
    check_base(layer.base)
    if tied := [p for p in (layer.base.weight, *layer.factors) if owners[id(p)] > 1]:
        return f"a weight {list(tied[0].shape)} that another module has too"
    if layer.factors.lora_B.count_nonzero():
        return "lora_B is not zero: an update that would be lost"
    if not (layer.scaling > 0 and math.isfinite(layer.scaling)):
        return f"scaling {layer.scaling}"
    weight = from_linear(layer.base)
    if weight.format != "dense" and not is_linear4bit(layer.base):
        return f"its base is a {type(layer.base).__name__}, whose {weight.format} weight is not rewritten"
    if weight.nested and weight.nested_blocksize != NESTED_BLOCKSIZE:
        return f"scales in blocks of {weight.nested_blocksize}, where bitsandbytes makes {NESTED_BLOCKSIZE}"
    if (r := len(layer.factors.lora_A)) > (most := min(weight.out_features, weight.in_features)):
        return f"rank {r}, of a weight that has {most}"
    return None


def _given(name: str, base: Any, weights: Mapping[str, Tensor] | None) -> Tensor:
    """W [N, K], at least float32, where the layer is: from `weights`, or the layer's own."""
    packed = from_linear(base)
    dtype = accumulation_dtype(packed.weight.dtype)
    W = packed.decode(dtype)
    if weights is not None:
        key = f"{name.rpartition('base_model.model.')[2]}.weight"
        if key not in weights:
            raise ValueError(f"weights: expected {key!r} among them")
        given = weights[key].t() if is_conv1d(base) else weights[key]
        if given.shape != W.shape or not given.is_floating_point():
            expected = f"a floating {list(W.shape)} as {key!r}"
            raise ValueError(f"weights: expected {expected}, got {given.dtype} {list(given.shape)}")
        W = given.to(W)
    if not W.isfinite().all():
        raise UnsupportedWeight(f"weight of {name!r}: expected finite values, got others")
    return W


def _factors(name: str, layer: _Layer, W: Tensor, method: str, niter: int | None) -> Factors:
    """The initial factors, in the dtype of the adapter."""
    r = len(layer.factors.lora_A)
    if method == "olora":
        Q, R = torch.linalg.qr(W)
        A, B = R[:r], Q[:, :r]
    else:
        if niter is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, r, niter)
            Vh = V.t()
        roots = (S[:r] / layer.scaling).sqrt()
        A, B = roots.unsqueeze(1) * Vh[:r], U[:, :r] * roots
    return Factors(*(t.to(p.dtype).contiguous() for t, p in zip((A, B), layer.factors, strict=True)))


def _product(factors: Factors, dtype: torch.dtype) -> Tensor:
    return factors.lora_B.to(dtype) @ factors.lora_A.to(dtype)


def _stored(base: Any, W: Tensor) -> nn.Parameter:
    """W as a new weight for `base`, in the format of its present one."""
    old = base.weight
    if not is_linear4bit(base):
        W = W.t() if is_conv1d(base) else W
        return nn.Parameter(W.to(old.dtype).contiguous(), requires_grad=False)
    state = getattr(old, "quant_state", None) or base.quant_state
    new: Any = Params4bit(
        W,
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.dtype,
    )
    new = new.to(W.device)  # quantizes
    new.quant_state.dtype = state.dtype
    return new


def _replace_weight(base: Any, weight: Any) -> None:
    """A new parameter, so that models which share the old one keep it."""
    base.weight = weight
    if is_linear4bit(base):
        weight.module, base.quant_state = base, weight.quant_state


def _configs(model: nn.Module, adapter: str) -> Iterator[Any]:
    """Those of PEFT for the adapter."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            yield configs[adapter]
