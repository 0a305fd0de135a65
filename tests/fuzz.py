"""Random calls of every op: what is drawn, and the operands made of it; test_fuzz.py judges the results.

A spec is drawn (hypothesis shrinks it, and its repr is code) and stands for the same operands every time. To
join, a weight format needs its way in `cases.make_weight`, and a row in `WEIGHTS` if it has options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from cases import EVERY_FORMAT, Case, ReftCase, _Operands, adapters, dense_norm, device_of, make_weight, on
from fuzz_cases import LAYOUTS, DoraCase, ReftLinearCase, laid_out
from hypothesis import strategies as st
from torch import Tensor

from peft_fast import formats
from peft_fast.dora import NORM_MIN
from peft_fast.functional import DROPOUTS, NORM_GRADS, dequantize
from peft_fast.reference import ACTIVATIONS

# -------------------------------------------------------------------------------------------- what is drawn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 130)
LARGE = (255, 256, 257, 320, 513, 600, 1025, 1100)
RANKS = (1, 2, 0, 3, 5, 8, 15, 16, 17, 33, 64, 100, 257)
SMALL, SMALL_RANKS = (1, 2, 3, 5, 8, 16, 17, 33), (1, 2, 0, 3, 8, 17)

WEIGHTS = {
    "dense": st.fixed_dictionaries({"dtype": st.sampled_from(DTYPES)}),
    **{
        format: st.fixed_dictionaries(
            {"blocksize": st.sampled_from(formats.BLOCK_SIZES), "nested": st.booleans()}
        )
        for format in ("nf4", "fp4")
    },
}
"""The options of `cases.make_weight` for a format, drawn; {} for one that is not here."""


@dataclass(frozen=True)
class Sizes:
    M: int
    K: int
    N: int
    R: int


def sizes(small: bool) -> st.SearchStrategy[Sizes]:
    """One dimension of four may be large."""
    if small:
        dim = st.sampled_from(SMALL)
        return st.builds(Sizes, st.sampled_from((*SMALL, 0)), dim, dim, st.sampled_from(SMALL_RANKS))
    dim, large = st.sampled_from(EDGES), st.sampled_from(LARGE)
    usual = {"M": st.sampled_from((*EDGES, 0)), "K": dim, "N": dim, "R": st.sampled_from(RANKS)}
    return st.one_of(
        *(st.builds(Sizes, **(usual | which)) for which in ({}, {"M": large}, {"K": large}, {"N": large}))
    )


def layouts(count: int) -> st.SearchStrategy[tuple[str, ...]]:
    return st.tuples(*[st.sampled_from(tuple(LAYOUTS))] * count)


LEADING = {
    "M": lambda M: (M,),
    "2 M": lambda M: (2, M),
    "M 1": lambda M: (M, 1),
    "1 M 1": lambda M: (1, M, 1),
    "3 0 M": lambda M: (3, 0, M),
    "": lambda M: (),
}
"""Leading dimensions of the activations."""

SCALINGS = (0.5, 1.0, -2.0, 0.0, 2.0**-10, 16.0)
PROBABILITIES = (0.0, 0.1, 0.5, 0.9, 1.0)
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Weight:
    format: str
    options: dict
    layout: str = "contiguous"

    def make(self, N: int, K: int) -> formats.QuantizedWeight:
        """[N, K], or K rounded up to what the format asks for."""
        weight = make_weight(self.format, N, K, **self.options)
        return formats.from_dense(laid_out(weight.weight, self.layout)) if self.format == "dense" else weight


WEIGHT = st.one_of(
    *(
        st.builds(
            Weight,
            st.just(format),
            WEIGHTS.get(format, st.just({})),
            st.sampled_from(tuple(LAYOUTS) if format == "dense" else ("contiguous",)),
        )
        for format in EVERY_FORMAT
    )
)


# ---------------------------------------------------------------------------------------------- the ops' own


class Spec:
    """What they have in common: the op, the one of `backends` that carries it out, and a weight's format."""

    op: str
    kernel: str

    @property
    def format(self) -> str:
        return self.weight.format

    def magnitudes(self, case: _Operands) -> dict[str, Tensor]:
        """By name of a result, its terms summed without their signs; {} where it is not a sum of products."""
        return {}


def _positive(case: Any) -> Any:
    """The case with the absolute values of its operands."""
    tensors = {n: getattr(case, n) for n in (*case.leaves, "grad")}
    changes = {n: t.abs() for n, t in tensors.items() if t is not None}
    if hasattr(case, "weight"):
        changes["weight"] = formats.from_dense(case.weight.decode(torch.float64).abs())
    return replace(case, **changes)


@dataclass(frozen=True)
class Lora(Spec):
    """A call of `lora_linear`, layouts of x, lora_A, lora_B, the vectors and dY."""

    sizes: Sizes
    weight: Weight
    leading: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    bias: bool
    out_scale: bool
    dropout_p: float
    scaling: float
    layouts: tuple[str, ...]
    seed: int

    op = kernel = "lora_linear"

    def make(self, draw: int) -> Case:
        torch.manual_seed(self.seed + draw)
        s, (x, A, B, vectors, grad) = self.sizes, self.layouts
        weight = self.weight.make(s.N, s.K)
        case = Case.make(
            "dense", LEADING[self.leading](s.M), weight.in_features, s.N, s.R, dtype=self.dtype,
            adapter_dtype=self.adapter_dtype, bias=self.bias, dropout_p=self.dropout_p,
            out_scale=self.out_scale,
        )  # fmt: skip
        return replace(
            case,
            weight=weight,
            scaling=self.scaling,
            x=laid_out(case.x, x),
            lora_A=laid_out(case.lora_A, A),
            lora_B=laid_out(case.lora_B, B),
            bias=laid_out(case.bias, vectors),
            out_scale=laid_out(case.out_scale, vectors),
            grad=laid_out(case.grad, grad),
        )

    def magnitudes(self, case: Case) -> dict[str, Tensor]:
        return replace(_positive(case), scaling=abs(self.scaling)).plain(torch.float64)


@dataclass(frozen=True)
class Loreft(Spec):
    """A call of `loreft`: layouts of h, the residual, projection and basis, bias, and dY."""

    M: int
    d: int
    r: int
    leading: str
    dtype: torch.dtype
    terms: int
    share: float | None
    act: str
    residual: bool
    bias: bool
    dropout_p: float
    drop_state: bool
    layouts: tuple[str, ...]
    seed: int

    op = kernel = "loreft"
    format = "dense"

    def make(self, draw: int) -> ReftCase:
        torch.manual_seed(self.seed + draw)
        h, residual, factors, bias, grad = self.layouts
        shape = LEADING[self.leading](self.M)
        M, rows = math.prod(shape), None
        if self.share is not None:  # rows in any order, some of them negative
            rows = [int(i) for i in torch.randperm(M)[: int(M * self.share)]]
            rows += [-1] * (self.seed % 3)
        case = ReftCase.make(
            shape, self.d, self.r, terms=self.terms, rows=rows, act=self.act, dtype=self.dtype,
            residual=self.residual, bias=self.bias or self.terms == 0, dropout_p=self.dropout_p,
            drop_state=self.drop_state,
        )  # fmt: skip
        return replace(
            case,
            h=laid_out(case.h, h),
            residual=laid_out(case.residual, residual),
            projection=laid_out(case.projection, factors),
            basis=laid_out(case.basis, factors),
            bias=laid_out(case.bias, bias),
            grad=laid_out(case.grad, grad),
        )

    def magnitudes(self, case: ReftCase) -> dict[str, Tensor]:
        """Activations grow nothing by much: as without one."""
        positive = _positive(case)
        positive.projection[self.r :] *= -1  # of what is subtracted
        results = replace(positive, act="linear").plain(torch.float64)
        return {name: t.abs() for name, t in results.items()}


# -------------------------------------------------------------------------------------------- dora_linear


@dataclass(frozen=True)
class Dora(Spec):
    """A call of `dora_linear`: layouts of x, lora_A, lora_B, the vectors and dY."""

    sizes: Sizes
    weight: Weight
    leading: str
    dtype: torch.dtype
    bias: bool
    dropout_p: float
    scaling: float
    dropout: str
    norm_grad: str
    layouts: tuple[str, ...]
    seed: int

    op, kernel = "dora_linear", "lora_linear"

    def make(self, draw: int) -> DoraCase:
        torch.manual_seed(self.seed + draw)
        s, (x, A, B, vectors, grad) = self.sizes, self.layouts
        shape = LEADING[self.leading](s.M)
        weight = self.weight.make(s.N, s.K)
        lora_A, lora_B = adapters(s.N, weight.in_features, s.R)
        return DoraCase(
            laid_out(torch.randn(*shape, weight.in_features, dtype=self.dtype), x),
            weight,
            laid_out(lora_A, A),
            laid_out(lora_B, B),
            laid_out(torch.randn(s.N).sign() * (torch.rand(s.N) + 0.5), vectors),
            laid_out(torch.randn(s.N), vectors) if self.bias else None,
            laid_out(torch.randn(*shape, s.N, dtype=self.dtype), grad),
            self.scaling,
            self.dropout_p,
            self.dropout,
            self.norm_grad,
            self.seed,
        )

    def magnitudes(self, case: DoraCase) -> dict[str, Tensor]:
        factors = case.lora_A.double(), case.lora_B.double()
        norm = dense_norm(case.weight, *factors, case.scaling, torch.float64).clamp(min=NORM_MIN)
        positive = replace(_positive(case), scaling=abs(case.scaling), norm=norm, sign=1.0)
        return positive.plain(torch.float64)


# ------------------------------------------------------------------------------------------- loreft_linear


@dataclass(frozen=True)
class ReftLinear(Spec):
    """A call of `loreft_linear`: layouts of x, the factors, the vectors and dY."""

    sizes: Sizes
    weight: Weight
    leading: str
    dtype: torch.dtype
    source: bool
    edit_bias: bool
    bias: bool
    subtract: bool
    layouts: tuple[str, ...]
    seed: int

    op, kernel = "loreft_linear", "lora_linear"

    def make(self, draw: int) -> ReftLinearCase:
        torch.manual_seed(self.seed + draw)
        s, (x, factors, vectors, grad) = self.sizes, self.layouts
        weight = self.weight.make(s.N, s.K)
        shape = LEADING[self.leading](s.M)

        def factor() -> Tensor:
            return laid_out(torch.randn(s.R, s.N) / s.N**0.5, factors)

        return ReftLinearCase(
            laid_out(torch.randn(*shape, weight.in_features, dtype=self.dtype), x),
            weight,
            factor(),
            factor() if self.source else None,
            laid_out(torch.randn(s.R), vectors) if self.edit_bias else None,
            laid_out(torch.randn(s.N), vectors) if self.bias else None,
            self.subtract,
            laid_out(torch.randn(*shape, s.N, dtype=self.dtype), grad),
        )

    def magnitudes(self, case: ReftLinearCase) -> dict[str, Tensor]:
        return replace(_positive(case), sign=1.0).plain(torch.float64)


# ---------------------------------------------------------------------------------------------- dequantize


@dataclass(frozen=True)
class Dequantize(Spec):
    """A decode to `dtype`, whose bits are those of the definition."""

    sizes: Sizes
    weight: Weight
    dtype: torch.dtype
    given_out: bool
    seed: int

    op = kernel = "dequantize"

    def check(self, backend: str) -> None:
        torch.manual_seed(self.seed)
        weight = self.weight.make(self.sizes.N, self.sizes.K)
        expected, there = weight.decode(self.dtype), on(device_of(backend), weight)
        out = torch.empty_like(there.decode(self.dtype)).contiguous() if self.given_out else None
        got = dequantize(there, self.dtype, out=out, backend=backend)
        assert out is None or got is out
        assert got.shape == expected.shape
        assert torch.equal(_bits(got), _bits(expected)), backend


def _bits(t: Tensor) -> Tensor:
    return t.cpu().contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16)


# -------------------------------------------------------------------------------------------------- drawing


def specs(op: type, small: bool = False) -> st.SearchStrategy:
    """Random specs of an op, by the names of their fields."""
    dim = st.sampled_from(SMALL if small else (*EDGES, *LARGE))
    drawn = {
        "sizes": sizes(small),
        "weight": WEIGHT,
        "leading": st.sampled_from(tuple(LEADING)),
        "dtype": st.sampled_from(DTYPES),
        "adapter_dtype": st.sampled_from(DTYPES),
        "bias": st.booleans(),
        "out_scale": st.booleans(),
        "dropout_p": st.sampled_from(PROBABILITIES),
        "scaling": st.sampled_from(SCALINGS),
        "dropout": st.sampled_from(DROPOUTS),
        "norm_grad": st.sampled_from(NORM_GRADS),
        "layouts": layouts(4 if op is ReftLinear else 5),
        "M": st.sampled_from((*SMALL, 0) if small else (*EDGES, 0, *LARGE[:6])),
        "d": dim,
        "r": st.sampled_from(SMALL_RANKS if small else RANKS),
        "terms": st.sampled_from((1, 2, 0)),
        "share": st.sampled_from((None, 0.0, 0.3, 1.0)),
        "act": st.sampled_from(tuple(ACTIVATIONS)),
        "residual": st.booleans(),
        "drop_state": st.booleans(),
        "source": st.booleans(),
        "edit_bias": st.booleans(),
        "subtract": st.booleans(),
        "given_out": st.booleans(),
        "seed": SEEDS,
    }
    return st.builds(op, **{f.name: drawn[f.name] for f in fields(op)})
