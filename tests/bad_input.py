"""Malformed calls, each with the argument that its error has to name.

A row is (what is wrong, argument, call); the call raises, and says of the argument what it expected and what
it got.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from cases import make_weight
from torch import nn

from peft_fast import functional
from peft_fast.formats import QuantizedWeight

N, K, R, D, RANK = 48, 64, 4, 32, 4
NAN, INF = float("nan"), float("inf")


class Bad(NamedTuple):
    """What is wrong, the argument, and what is passed for it in place of what is right."""

    wrong: str
    argument: str
    given: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.argument}: {self.wrong}"


def weights() -> list[Bad]:
    """4-bit and dense weights that contradict themselves, as `weight`."""
    w, flat, dense = (
        make_weight("nf4", N, K),
        make_weight("nf4", N, K, nested=False),
        make_weight("dense", N, K),
    )

    def every_second(t: torch.Tensor) -> torch.Tensor:
        return torch.stack((t, t), -1)[..., 0]

    lies: list[tuple[str, str, QuantizedWeight]] = [
        ("one short", "absmax", w._replace(absmax=w.absmax[:-1])),
        ("twice as long", "absmax", w._replace(absmax=w.absmax.repeat(2))),
        ("none", "absmax", w._replace(absmax=None)),
        ("bytes without nested statistics", "absmax", w._replace(nested_absmax=None)),
        ("half precision", "absmax", flat._replace(absmax=flat.absmax.half())),
        ("on the meta device", "absmax", w._replace(absmax=w.absmax.to("meta"))),
        ("not contiguous", "absmax", w._replace(absmax=every_second(w.absmax))),
        ("twice the one quantized with", "absmax", w._replace(blocksize=128)),
        ("no power of two", "blocksize", w._replace(blocksize=48)),
        ("zero", "blocksize", w._replace(blocksize=0)),
        ("negative", "blocksize", w._replace(blocksize=-64)),
        ("a row too many", "weight", w._replace(out_features=N + 1)),
        ("half the columns", "weight", w._replace(in_features=K // 2)),
        ("no integer", "out_features", w._replace(out_features=float(N))),
        ("no rows", "shape", w._replace(out_features=0)),
        ("one byte short", "weight", w._replace(weight=w.weight.reshape(-1)[:-1])),
        ("signed bytes", "weight", w._replace(weight=w.weight.view(torch.int8))),
        ("not contiguous", "weight", w._replace(weight=every_second(w.weight))),
        ("none", "weight", w._replace(weight=None)),
        ("fifteen values", "code", w._replace(code=w.code[:15].clone())),
        ("double precision", "code", w._replace(code=w.code.double())),
        ("none", "code", w._replace(code=None)),
        ("not contiguous", "code", w._replace(code=every_second(w.code))),
        ("none", "nested_code", w._replace(nested_code=None)),
        ("255 values", "nested_code", w._replace(nested_code=w.nested_code[:255].clone())),
        ("none", "nested_offset", w._replace(nested_offset=None)),
        ("two", "nested_offset", w._replace(nested_offset=torch.zeros(2))),
        ("empty", "nested_absmax", w._replace(nested_absmax=w.nested_absmax[:0])),
        ("no power of two", "nested_blocksize", w._replace(nested_blocksize=3)),
        ("zero", "nested_blocksize", w._replace(nested_blocksize=0)),
        ("unknown", "format", w._replace(format="nf5")),
        ("none", "format", w._replace(format=None)),
        ("three dimensions", "weight", dense._replace(weight=dense.weight[None])),
        ("integers", "weight", dense._replace(weight=dense.weight.int())),
        ("a row less than it has", "weight", dense._replace(out_features=N - 1)),
        ("no rows", "weight", dense._replace(weight=dense.weight[:0], out_features=0)),
        ("no columns", "weight", dense._replace(weight=dense.weight[:, :0], in_features=0)),
        ("no elements", "weight", torch.empty(0, 0)),
        ("an array", "weight", dense.weight.numpy()),
        ("nothing", "weight", None),
    ]
    return [Bad(wrong, argument, {"weight": lie}) for wrong, argument, lie in lies]


def fitting(weight: Any) -> dict[str, torch.Tensor]:
    """Operands of the sizes that a weight claims, so that it is the weight that is found wrong."""
    n, k = (getattr(weight, name, size) for name, size in (("out_features", N), ("in_features", K)))
    n, k = int(n), int(k)
    return {
        "x": torch.randn(3, k),
        "lora_A": torch.randn(R, k),
        "lora_B": torch.randn(n, R),
        "bias": torch.randn(n),
    }


def operands() -> list[Bad]:
    """Of `lora_linear` and `dora_linear` alike."""
    x, A, B, bias = torch.randn(3, K), torch.randn(R, K), torch.randn(N, R), torch.randn(N)
    rows: list[tuple[str, str, Any]] = [
        ("a list", "x", [1.0]),
        ("integers", "x", x.int()),
        ("no dimension", "x", torch.tensor(1.0)),
        ("a column too many", "x", torch.randn(3, K + 1)),
        ("complex", "x", x + 0j),
        ("float8", "x", x.to(torch.float8_e4m3fn)),
        ("sparse", "x", x.to_sparse()),
        ("on the meta device", "x", x.to("meta")),
        ("nothing", "lora_A", None),
        ("a vector", "lora_A", A[0]),
        ("transposed", "lora_A", A.t()),
        ("integers", "lora_A", A.int()),
        ("float8", "lora_A", A.to(torch.float8_e4m3fn)),
        ("sparse", "lora_A", A.to_sparse()),
        ("on the meta device", "lora_A", A.to("meta")),
        ("another rank", "lora_B", torch.randn(N, R + 1)),
        ("a row too many", "lora_B", torch.randn(N + 1, R)),
        ("three dimensions", "lora_B", B[None]),
        ("an element too many", "bias", torch.randn(N + 1)),
        ("a matrix", "bias", bias[None]),
        ("a list", "bias", [0.0] * N),
        ("complex", "bias", bias + 0j),
        ("not a number", "scaling", NAN),
        ("infinite", "scaling", INF),
        ("text", "scaling", "1"),
        ("nothing", "scaling", None),
        ("a tensor", "scaling", torch.ones(2)),
        ("negative", "dropout_p", -0.1),
        ("above one", "dropout_p", 1.5),
        ("not a number", "dropout_p", NAN),
        ("text", "dropout_p", "0.1"),
        ("nothing", "dropout_p", None),
        ("unknown", "backend", "gpu"),
        ("nothing", "backend", None),
        ("a list", "backend", ["cpu"]),
        ("three dimensions", "weight", torch.randn(1, N, K)),
        ("integers", "weight", torch.ones(N, K, dtype=torch.int32)),
        ("a list", "weight", [1.0]),
    ]
    return [Bad(wrong, argument, {argument: value}) for wrong, argument, value in rows]


LORA_ALONE = [
    Bad("float64 beside fp32 activations", "lora_A", {"lora_A": torch.randn(R, K).double()}),
    Bad("an element too many", "lora_bias", {"lora_bias": torch.randn(N + 1)}),
    Bad("integers", "lora_bias", {"lora_bias": torch.ones(N, dtype=torch.int32)}),
    Bad("a list", "lora_bias", {"lora_bias": [1.0]}),
    Bad("an element too many", "out_scale", {"out_scale": torch.randn(N + 1)}),
    Bad("integers", "out_scale", {"out_scale": torch.ones(N, dtype=torch.int32)}),
    Bad("a matrix", "out_scale", {"out_scale": torch.ones(1, N)}),
    Bad("on the meta device", "out_scale", {"out_scale": torch.ones(N, device="meta")}),
]
DORA_ALONE = [
    Bad("an element too many", "magnitude", {"magnitude": torch.randn(N + 1)}),
    Bad("integers", "magnitude", {"magnitude": torch.ones(N, dtype=torch.int32)}),
    Bad("complex", "magnitude", {"magnitude": torch.ones(N) + 0j}),
    Bad("nothing", "magnitude", {"magnitude": None}),
    Bad("on the meta device", "magnitude", {"magnitude": torch.ones(N, device="meta")}),
    Bad("an element too many", "norm", {"norm": torch.ones(N + 1)}),
    Bad("a list", "norm", {"norm": [1.0]}),
    Bad("unknown", "dropout", {"dropout": "none"}),
    Bad("a list", "dropout", {"dropout": ["peft"]}),
    Bad("unknown", "norm_grad", {"norm_grad": "half"}),
]


def edits() -> list[Bad]:
    """Of `loreft`."""
    h, basis, source, bias = (
        torch.randn(2, 5, D),
        torch.randn(RANK, D),
        torch.randn(RANK, D),
        torch.randn(RANK),
    )
    rows: list[tuple[str, str, Any]] = [
        ("a list", "h", [1.0]),
        ("integers", "h", h.int()),
        ("complex", "h", h + 0j),
        ("float8", "h", h.to(torch.float8_e4m3fn)),
        ("no dimension", "h", torch.tensor(1.0)),
        ("nothing", "basis", None),
        ("a vector", "basis", basis[0]),
        ("integers", "basis", basis.int()),
        ("on the meta device", "basis", basis.to("meta")),
        ("another rank", "source", source[:2]),
        ("a list", "source", [1.0]),
        ("another rank", "bias", bias[:2]),
        ("a matrix", "bias", bias[None]),
        ("integers", "bias", bias.int()),
        ("a matrix", "rows", torch.zeros(2, 2, dtype=torch.int64)),
        ("int32", "rows", torch.zeros(2, dtype=torch.int32)),
        ("a mask", "rows", torch.ones(10, dtype=torch.bool)),
        ("past the end", "rows", torch.tensor([10])),
        ("a list", "rows", [1]),
        ("on the meta device", "rows", torch.tensor([1], device="meta")),
        ("one sequence of two", "residual", h[:1]),
        ("integers", "residual", h.int()),
        ("a list", "residual", [1.0]),
        ("unknown", "act", "swish"),
        ("nothing", "act", None),
        ("above one", "dropout_p", 1.5),
        ("not a number", "dropout_p", NAN),
        ("unknown", "dropout_on", "input"),
        ("unknown", "backend", "gpu"),
    ]
    return [Bad(wrong, argument, {argument: value}) for wrong, argument, value in rows]


def call_lora(backend: str, given: dict[str, Any]) -> Any:
    right = {**fitting(given.get("weight")), "weight": make_weight("nf4", N, K), "backend": backend}
    return functional.lora_linear(**{**right, **given})


def call_dora(backend: str, given: dict[str, Any]) -> Any:
    right = {**fitting(given.get("weight")), "weight": make_weight("nf4", N, K), "backend": backend}
    right |= {"magnitude": torch.ones(len(right["bias"])), "scaling": 1.0}
    return functional.dora_linear(**{**right, **given})


def call_loreft_linear(backend: str, given: dict[str, Any]) -> Any:
    fits = fitting(given.get("weight"))
    right = {"x": fits["x"], "weight": make_weight("nf4", N, K), "basis": fits["lora_B"].t()}
    return functional.loreft_linear(**{**right, "bias": fits["bias"], "backend": backend, **given})


def call_dequantize(backend: str, given: dict[str, Any]) -> Any:
    right = {"weight": make_weight("nf4", N, K), "dtype": torch.float32, "backend": backend}
    return functional.dequantize(**{**right, **given})


def call_loreft(backend: str, given: dict[str, Any]) -> Any:
    right = {"h": torch.randn(2, 5, D), "basis": torch.randn(RANK, D), "source": torch.randn(RANK, D)}
    return functional.loreft(**{**right, "bias": torch.randn(RANK), "backend": backend, **given})


DEQUANTIZE = [
    Bad("integers", "dtype", {"dtype": torch.int8}),
    Bad("float8", "dtype", {"dtype": torch.float8_e4m3fn}),
    Bad("nothing", "dtype", {"dtype": None}),
    Bad("text", "dtype", {"dtype": "float32"}),
    Bad("transposed", "out", {"out": torch.zeros(K, N)}),
    Bad("not contiguous", "out", {"out": torch.zeros(K, N).t()}),
    Bad("another dtype", "out", {"out": torch.zeros(N, K, dtype=torch.float16)}),
    Bad("a list", "out", {"out": [1.0]}),
    Bad("unknown", "backend", {"backend": "gpu"}),
]

Call = Callable[[str, dict[str, Any]], Any]
FUNCTIONS: list[tuple[str, Call, list[Bad]]] = [
    ("lora_linear", call_lora, [*weights(), *operands(), *LORA_ALONE]),
    ("dora_linear", call_dora, [*weights(), *operands(), *DORA_ALONE]),
    ("loreft_linear", call_loreft_linear, weights()),
    ("dequantize", call_dequantize, [*weights(), *DEQUANTIZE]),
    ("loreft", call_loreft, edits()),
]


# ------------------------------------------------------------------------------------------ layers and models


class OwnLinear(nn.Linear):
    """A subclass, whose forward may be anything."""


def linear4bit(**changes: Any) -> nn.Module:
    """A quantized layer whose quant state was changed."""
    layer = bnb.nn.Linear4bit(K, N, quant_type="nf4").to("cpu")
    for name, value in changes.items():
        setattr(layer.weight.quant_state, name, value)
    return layer


def bases() -> dict[str, nn.Module]:
    """Layers that cannot be a frozen base, by what is wrong with them."""
    state = linear4bit().weight.quant_state
    other = nn.Linear(K, N)
    other.in_features = K + 1
    whole = nn.Linear(K, N)
    whole.weight = nn.Parameter(torch.ones(N, K, dtype=torch.int32), requires_grad=False)
    return {
        "a subclass": OwnLinear(K, N),
        "no linear layer": nn.Conv2d(3, 3, 1),
        "a bilinear one": nn.Bilinear(K, K, N),
        "an embedding": nn.Embedding(K, N),
        "no layer": "linear",
        "sizes that lie": other,
        "integers": whole,
        "not quantized": bnb.nn.Linear4bit(K, N),
        "a shape that lies": linear4bit(shape=torch.Size((K, N))),
        "a shape of three": linear4bit(shape=torch.Size((1, N, K))),
        "a block size that lies": linear4bit(blocksize=128),
        "an absmax cut short": linear4bit(absmax=state.absmax[:-1]),
        "no nested state": linear4bit(state2=None),
        "a code cut short": linear4bit(code=state.code[:15]),
        "an unknown format": linear4bit(quant_type="nf5"),
        "no quant state": linear4bit_with("state"),
    }


def linear4bit_with(state: Any) -> nn.Module:
    layer = linear4bit()
    layer.weight.quant_state = state
    return layer


REFT_OPTIONS: list[tuple[str, Any]] = [
    ("r", 0), ("r", 1.5), ("r", True), ("r", 10**9), ("layers", []), ("layers", [0, 0]), ("layers", [-1]),
    ("layers", "first"), ("positions", "f0"), ("positions", None), ("component", ""),
    ("share_weights", "yes"), ("dropout", NAN), ("dropout", -0.1), ("dropout", "0.1"),
    ("dropout_on", "x"), ("variant", "reft"),
    ("variant", ["loreft"]), ("init", "zero"), ("backend", "gpu"), ("act_fn", "swish"), ("blocks", ""),
]  # fmt: skip
LOW_RANK_OPTIONS: list[tuple[str, Any]] = [
    ("r", 0), ("r", -1), ("r", 1.5), ("r", True), ("r", "8"), ("r", 10**9), ("r", 10**12),
    ("lora_alpha", NAN), ("lora_alpha", INF), ("lora_alpha", "16"), ("lora_alpha", None),
    ("lora_dropout", NAN), ("lora_dropout", -0.5),
    ("lora_dropout", 2), ("lora_dropout", "0"), ("bias", "both"), ("bias", None), ("backend", "gpu"),
    ("adapter_dtype", torch.int8), ("adapter_dtype", "fp32"),
]  # fmt: skip
METHOD_OPTIONS: list[tuple[str, str, Any]] = [
    ("vera", "r", 0), ("vera", "r", 10**9), ("parallel", "r", 10**12), ("kadaptation", "terms", 10**9),
    ("vera", "d_initial", NAN), ("vera", "projection_prng_key", 1.0),
    ("vera", "dropout", NAN), ("vera", "save_projection", 1), ("s2lora", "threshold", -1.0),
    ("s2lora", "coefficient", 0.05),
    ("s2lora", "lora_alpha", INF), ("kadaptation", "n", 5), ("kadaptation", "terms", 0),
    ("kadaptation", "scaling", NAN), ("ia3", "feedforward", "no"), ("parallel", "act", "swish"),
    ("parallel", "bias", "up"), ("series", "r", 2.0), ("ssf", "rank", 4), ("lora", "method", None),
    ("vera", "backend", "gpu"), ("vera", "adapter_dtype", torch.int8), ("vera", "shared", "own"),
]  # fmt: skip
