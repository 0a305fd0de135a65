"""The table of methods: what each adds to a frozen linear layer, as operands of one fused op.

    Y = out_scale ⊙ (X'·Ŵᵀ + s·drop(X')·Aᵀ·Bᵀ) + bias,  X' = in_scale ⊙ X,

with the weight Ŵ [N, K] frozen. A row of `METHODS` says which parameters a method creates and how A [R, K],
B [N, R], bias [N], out_scale [N] and in_scale [K] follow from them in thin differentiable torch, so that
`adapter_linear.AdapterLinear` is one fused call whatever the method. The two bottleneck adapters with an
activation, which the op does not carry, add a branch in plain torch around that call.

Adding a method is adding a row; docs/methods.md has the equations and what each is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import check_choice
from .ops import check_probability
from .ranks import check_rank
from .reference import ACTIVATIONS

Options = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Empty = Callable[..., Tensor]
"""`torch.empty` with a dtype and a device."""

ADAPTER_ACTIVATIONS = ("relu", "gelu", "tanh", "silu")
BOTTLENECK_BIASES = ("none", "down", "both")


class Operands(NamedTuple):
    """What the fused op is given beside x and the weight; None stands for nothing of that kind."""

    bias: Tensor | None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None
    scaling: float = 1.0


def _nothing_shared(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    return {}


def _base_alone(p: Tensors, o: Options, base_bias: Tensor | None) -> Operands:
    return Operands(base_bias)


class Method(NamedTuple):
    """A row of `METHODS`; N and K are the layer's out- and in-features, `p` the tensors that it made."""

    options: Options
    """Every option with its default."""
    check: Callable[[Options, int, int], None]
    """Raises ValueError naming the option that does not fit."""
    create: Callable[[Options, int, int, Empty], dict[str, Tensor]]
    """The layer's own parameters by name, initialised."""
    operands: Callable[[Tensors, Options, Tensor | None], Operands] = _base_alone
    """From the parameters (shared ones cut to this layer), the options and the bias of the base."""
    shared: Callable[[Options, int, int, Empty], dict[str, Tensor]] = _nothing_shared
    """Tensors that layers may have in common, for the largest N and K among them."""
    shared_options: tuple[str, ...] = ()
    """The options on which layers that share must agree."""
    shared_trains: bool = True
    after: Callable[[Tensors, Options, Tensor, Tensor], Tensor] | None = None
    """The layer's output from its x and the fused op's y, where the op does not carry all."""


def _rank(o: Options, *names: str) -> None:
    for name in names:
        check_rank(name, o[name])


def _number(o: Options, *names: str) -> None:
    for name in names:
        if type(o[name]) not in (int, float) or not math.isfinite(o[name]):
            raise ValueError(f"{name}: expected a finite number, got {o[name]!r}")


def _boolean(o: Options, *names: str) -> None:
    for name in names:
        if type(o[name]) is not bool:
            raise ValueError(f"{name}: expected True or False, got {o[name]!r}")


def _as_linear(weight: Tensor) -> Tensor:
    """Initialised as the weight of an `nn.Linear` is, and as LoRA's A."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


# VeRA: s·A and B are one random, frozen pair for all layers; vectors scale their rows.


def _check_vera(o: Options, N: int, K: int) -> None:
    _rank(o, "r")
    _number(o, "d_initial")
    _boolean(o, "save_projection")
    key = o["projection_prng_key"]
    if type(key) is not int or not -(2**63) <= key < 2**64:  # what torch's generators take
        raise ValueError(f"projection_prng_key: expected an integer from -2^63 to 2^64 - 1, got {key!r}")
    check_probability("dropout", o["dropout"])


def _create_vera(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    return {"vera_lambda_b": empty(N).zero_(), "vera_lambda_d": empty(o["r"]).fill_(o["d_initial"])}


def _share_vera(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    """PEFT's: Kaiming uniform for ReLU, A then B, drawn on the CPU in float32 whatever the layer's."""
    generator = torch.Generator("cpu").manual_seed(o["projection_prng_key"])
    shapes = {"vera_A": (o["r"], K), "vera_B": (N, o["r"])}
    shared = {}
    for name, shape in shapes.items():
        shared[name] = empty(shape)
        if shared[name].is_meta:
            continue
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(
            -bound, bound, generator=generator
        )
        shared[name].copy_(drawn)
    return shared


def _vera(p: Tensors, o: Options, base_bias: Tensor | None) -> Operands:
    # With d in B rather than in A, no gradient of A is computed: that of B gives both vectors'.
    # b·dᵀ first: autograd then keeps b, d and the frozen B, no further [N, r].
    lora_B = torch.outer(p["vera_lambda_b"], p["vera_lambda_d"]) * p["vera_B"]
    return Operands(base_bias, p["vera_A"], lora_B)


# S2-LoRA: A and B are shared and trained; a layer has a sparse coefficient for each rank.


def _check_s2lora(o: Options, N: int, K: int) -> None:
    _rank(o, "r")
    _number(o, "lora_alpha", "threshold", "coefficient")
    if o["threshold"] < 0:
        raise ValueError(f"threshold: expected a number ≥ 0, got {o['threshold']!r}")
    if abs(o["coefficient"]) <= o["threshold"]:
        raise ValueError(
            f"coefficient: expected a magnitude above the threshold {o['threshold']!r}, below which it takes "
            f"no gradient, got {o['coefficient']!r}"
        )
    check_probability("dropout", o["dropout"])


def _create_s2lora(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    return {"s2_lambda": empty(o["r"]).fill_(o["coefficient"])}


def _share_s2lora(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    return {"s2_A": _as_linear(empty(o["r"], K)), "s2_B": empty(N, o["r"]).zero_()}


def _s2lora(p: Tensors, o: Options, base_bias: Tensor | None) -> Operands:
    sparse = F.softshrink(p["s2_lambda"], o["threshold"])
    return Operands(base_bias, p["s2_A"], p["s2_B"] * sparse, scaling=o["lora_alpha"] / o["r"])


# KAdaptation: Σ_i A_i ⊗ (u_i·v_iᵀ) = Σ_i (A_i ⊗ u_i)·(I_n ⊗ v_iᵀ), a low-rank pair of rank n·terms.


def _check_kadaptation(o: Options, N: int, K: int) -> None:
    _rank(o, "n", "terms")
    for size, name in ((N, "out_features"), (K, "in_features")):
        if size % o["n"]:
            raise ValueError(f"n: expected a divisor of {name} = {size}, got {o['n']}")
    _number(o, "scaling")
    check_probability("dropout", o["dropout"])


def _create_kadaptation(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    terms, n = o["terms"], o["n"]
    return {"kron_u": empty(terms, N // n).zero_(), "kron_v": _as_linear(empty(terms, K // n))}


def _share_kadaptation(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    n = o["n"]
    return {"kron_A": empty(o["terms"], n, n).normal_(std=1 / math.sqrt(n))}


def _kadaptation(p: Tensors, o: Options, base_bias: Tensor | None) -> Operands:
    rules, u, v = p["kron_A"], p["kron_u"], p["kron_v"]  # [t, n, n], [t, N/n], [t, K/n]
    n = rules.shape[1]
    eye = torch.eye(n, dtype=v.dtype, device=v.device)
    lora_A = (eye[:, :, None] * v[:, None, None, :]).flatten(2).flatten(0, 1)  # [t·n, n·K/n]
    lora_B = (rules[:, :, None, :] * u[:, None, :, None]).flatten(1, 2)  # [t, n·N/n, n]
    return Operands(base_bias, lora_A, lora_B.transpose(0, 1).flatten(1), scaling=o["scaling"])


# IA3, SSF, BitFit: vectors.


def _check_ia3(o: Options, N: int, K: int) -> None:
    _boolean(o, "feedforward")


def _create_ia3(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    return {"ia3_l": (empty(1, K) if o["feedforward"] else empty(N, 1)).fill_(1.0)}


def _ia3(p: Tensors, o: Options, base_bias: Tensor | None) -> Operands:
    gamma = p["ia3_l"].flatten()
    if o["feedforward"]:
        return Operands(base_bias, in_scale=gamma)
    return Operands(base_bias if base_bias is None else gamma * base_bias, out_scale=gamma)


def _check_nothing(o: Options, N: int, K: int) -> None:
    pass


def _create_ssf(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    return {"ssf_scale": empty(N).fill_(1.0), "ssf_shift": empty(N).zero_()}


def _ssf(p: Tensors, o: Options, base_bias: Tensor | None) -> Operands:
    scale, shift = p["ssf_scale"], p["ssf_shift"]
    return Operands(shift if base_bias is None else scale * base_bias + shift, out_scale=scale)


def _create_bitfit(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    return {"bias_shift": empty(N).zero_()}


def _bitfit(p: Tensors, o: Options, base_bias: Tensor | None) -> Operands:
    shift = p["bias_shift"]
    return Operands(shift if base_bias is None else base_bias + shift)


# Bottleneck adapters, whose branch is plain torch.


def _check_bottleneck(o: Options, N: int, K: int) -> None:
    _rank(o, "r")
    _number(o, "scaling")
    check_choice("act", o["act"], ADAPTER_ACTIVATIONS)
    check_choice("bias", o["bias"], BOTTLENECK_BIASES)


def _create_bottleneck(o: Options, N: int, width: int, empty: Empty) -> dict[str, Tensor]:
    created = {"down": _as_linear(empty(o["r"], width)), "up": empty(N, o["r"]).zero_()}
    if o["bias"] != "none":
        created["down_bias"] = empty(o["r"]).zero_()
    if o["bias"] == "both":
        created["up_bias"] = empty(N).zero_()
    return created


def _create_series(o: Options, N: int, K: int, empty: Empty) -> dict[str, Tensor]:
    return _create_bottleneck(o, N, N, empty)


def _bottleneck(p: Tensors, o: Options, h: Tensor, y: Tensor) -> Tensor:
    z = F.linear(h.to(p["down"].dtype), p["down"], p.get("down_bias"))
    added = F.linear(ACTIVATIONS[o["act"]](z), p["up"], p.get("up_bias"))
    return (y + o["scaling"] * added).to(y.dtype)


def _series(p: Tensors, o: Options, x: Tensor, y: Tensor) -> Tensor:
    return _bottleneck(p, o, y, y)


METHODS: dict[str, Method] = {
    "vera": Method(
        {"r": 256, "d_initial": 0.1, "projection_prng_key": 0, "save_projection": True, "dropout": 0.0},
        _check_vera,
        _create_vera,
        _vera,
        shared=_share_vera,
        shared_options=("r", "projection_prng_key", "save_projection"),
        shared_trains=False,
    ),
    "s2lora": Method(
        {"r": 32, "lora_alpha": 32, "threshold": 0.1, "coefficient": 1.0, "dropout": 0.0},
        _check_s2lora,
        _create_s2lora,
        _s2lora,
        shared=_share_s2lora,
        shared_options=("r",),
    ),
    "kadaptation": Method(
        {"n": 4, "terms": 4, "scaling": 1.0, "dropout": 0.0},
        _check_kadaptation,
        _create_kadaptation,
        _kadaptation,
        shared=_share_kadaptation,
        shared_options=("n", "terms"),
    ),
    "ia3": Method({"feedforward": False}, _check_ia3, _create_ia3, _ia3),
    "ssf": Method({}, _check_nothing, _create_ssf, _ssf),
    "bitfit": Method({}, _check_nothing, _create_bitfit, _bitfit),
    "parallel": Method(
        {"r": 64, "act": "relu", "bias": "down", "scaling": 1.0},
        _check_bottleneck,
        _create_bottleneck,
        after=_bottleneck,
    ),
    "series": Method(
        {"r": 64, "act": "gelu", "bias": "both", "scaling": 1.0},
        _check_bottleneck,
        _create_series,
        after=_series,
    ),
}


def resolve_options(method: str, given: Options, N: int, K: int) -> dict[str, Any]:
    """The options of `method` with its defaults, checked for a layer [N, K].

    Raises:
        ValueError: an unknown method or a value that does not fit.
        TypeError: an option that the method does not have.
    """
    check_choice("method", method, tuple(METHODS))
    row = METHODS[method]
    for name in given:
        if name not in row.options:
            raise TypeError(f"{name}: expected an option of {method!r}, {sorted(row.options)}, got another")
    options = {**row.options, **given}
    row.check(options, N, K)
    return options
