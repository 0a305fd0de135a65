"""The cases of the suite: op × format × method × layer of a real model × rank × M × dtype × dropout.

A case is one adapted layer, and knows what each pass must at least compute and move (`work`). Shapes that
several layers share are one case with all their names. `select` picks cases by their labels: a filter is
words, each of which has to match a label; "," separates alternatives, "*" stands for anything:

    lora nf4-nested Llama-3-8B.q,MiniLM-L6.* R=16 M=1,M=512 bfloat16 dropout=0

Labels are op, format, method, dtype, `KxN`, `R=`, `M=`, `dropout=`, models (`MiniLM-L6`) and layers
(`MiniLM-L6.up`).
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from peft_fast.bench import traffic
from peft_fast.bench.layers import DTYPES
from peft_fast.triton_kernels.strategies import Problem

MEASURES = ("forward", "forward+backward", "dX")
"""A training forward; with a backward that takes every gradient; a backward to X alone, adapters frozen."""


class Format(NamedTuple):
    """The format of the frozen weight in `formats.FORMATS`, and whether its block scales are coded too."""

    name: str
    nested: bool


FORMATS = {
    "nf4-nested": Format("nf4", True),
    "nf4": Format("nf4", False),
    "fp4": Format("fp4", False),
    "mxfp4": Format("mxfp4", True),
    "int8": Format("int8", False),
    "fp8": Format("fp8", False),
    "dense": Format("dense", False),
}


RANKS = (8, 16, 64, 256, 13)


class Method(NamedTuple):
    """The op behind a method, what it is run over, the layers it is put on, None for all, and its ranks."""

    op: str
    formats: tuple[str, ...]
    dropouts: tuple[float, ...]
    layers: tuple[str, ...] | None = None
    ranks: tuple[int, ...] = RANKS


SOME = ("nf4-nested", "int8", "dense")
METHODS = {
    "lora": Method("lora_linear", tuple(FORMATS), (0.0, 0.1)),
    "dora": Method("lora_linear", tuple(FORMATS), (0.0, 0.1)),
    "vera": Method("lora_linear", SOME, (0.0, 0.1)),
    # Its vector is on the outputs; on the inputs in the layer that reads the inner activations.
    "ia3": Method("lora_linear", SOME, (0.0,), ranks=(0,)),
    "ia3-in": Method("lora_linear", SOME, (0.0,), ("down",), (0,)),
    # Every row of the output of a layer that writes to the residual stream is edited.
    "loreft": Method("loreft", ("nf4-nested", "dense"), (0.0,), ("o", "down")),
}
OUT_SCALE = ("dora", "ia3")
"""Those that scale the output of the op."""

ROWS = (1, 16, 128, 512, 2048, 8192, 333)


def _decoder(hidden: int, keys: int, inner: int) -> dict[str, tuple[int, int]]:
    wide = dict.fromkeys(("gate", "up"), (hidden, inner))
    kv = dict.fromkeys("kv", (hidden, keys))
    return {"q": (hidden, hidden), **kv, "o": (hidden, hidden), **wide, "down": (inner, hidden)}


def _encoder(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    square = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
    return {**square, "up": (hidden, inner), "down": (inner, hidden)}


MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3-8B": _decoder(4096, 1024, 14336),
    "Qwen2.5-7B": _decoder(3584, 512, 18944),
    "Mistral-7B": _decoder(4096, 1024, 14336),
    "ViT-B": _encoder(768, 3072),
    "MiniLM-L6": _encoder(384, 1536),
    "ESM2-650M": _encoder(1280, 5120),
    "Whisper-large-v3": _encoder(1280, 5120),
}
"""(K, N) of every linear layer of a block, as in the models' published configurations."""

QUICK = (
    "lora,dora nf4-nested MiniLM-L6.up R=16 M=16,M=512 bfloat16 dropout=0",
    "loreft nf4-nested MiniLM-L6.down R=8 M=512 bfloat16",
    "lora nf4-nested Llama-3-8B.q R=16 M=16 bfloat16 dropout=0",
)
DEFAULT = (
    "lora,dora nf4-nested Llama-3-8B.q,MiniLM-L6.up R=16 M=1,M=16,M=128,M=512,M=2048 bfloat16 dropout=0",
    "lora,dora nf4-nested Llama-3-8B.up,Llama-3-8B.down R=16 M=16,M=512 bfloat16 dropout=0",
    "loreft nf4-nested Llama-3-8B.o,MiniLM-L6.down R=8 M=16,M=512 bfloat16",
)


class Case(NamedTuple):
    """One adapted layer: X [M, K] in `dtype`, a frozen weight [N, K], adapters of rank R."""

    op: str
    format: str
    method: str
    K: int
    N: int
    R: int
    M: int
    dtype: str
    dropout: float

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of this shape, as "model.layer"; none of a shape that is not in the registry."""
        return _layers().get((self.K, self.N), ())

    @property
    def labels(self) -> frozenset[str]:
        """What a filter may name, in lower case."""
        numbers = (
            f"{self.K}x{self.N}",
            f"R={self.R}",
            f"M={self.M}",
            f"dropout={self.dropout:g}",
        )
        return frozenset((self.op, self.format, self.method, self.dtype, *map(str.lower, numbers))) | _named(
            self.K, self.N
        )

    def __str__(self) -> str:
        sizes = (f"{self.K}x{self.N}", *([f"R={self.R}"] if self.R else []), f"M={self.M}")
        dropout = (f"dropout={self.dropout:g}",) if self.dropout else ()
        return " ".join((self.method, self.format, *self.layers[:1], *sizes, self.dtype, *dropout))

    def problem(self) -> Problem:
        """As the strategies and the traffic model know it."""
        name, nested = FORMATS[self.format]
        dtype, dropout, out_scale = DTYPES[self.dtype], self.dropout > 0, self.method in OUT_SCALE
        return Problem(self.M, self.N, self.K, self.R, dtype, name, nested, dropout, out_scale)


@functools.cache
def _layers() -> dict[tuple[int, int], tuple[str, ...]]:
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    for model, layers in MODELS.items():
        for layer, shape in layers.items():
            found[shape].append(f"{model}.{layer}")
    return {shape: tuple(names) for shape, names in found.items()}


@functools.cache
def _named(K: int, N: int) -> frozenset[str]:
    names = [name.lower() for name in _layers().get((K, N), ())]
    return frozenset((*names, *(name.rpartition(".")[0] for name in names)))


def cases() -> Iterator[Case]:
    """Every case of the registry; those on one weight follow each other."""
    for (K, N), names in _layers().items():
        for format, R, method in itertools.product(FORMATS, (0, *RANKS), METHODS):
            op, formats, dropouts, layers, ranks = METHODS[method]
            fits = layers is None or any(name.rpartition(".")[2] in layers for name in names)
            if format in formats and R in ranks and fits:
                for M, dtype, dropout in itertools.product(ROWS, DTYPES, dropouts):
                    yield Case(op, format, method, K, N, R, M, dtype, dropout)


def select(filters: Iterable[str] = DEFAULT) -> list[Case]:
    """The cases that any of the filters picks, in the order of the registry.

    Raises:
        ValueError: a filter has no word, a word matches no case, or a filter picks none.
    """
    parsed = {text: [word.split(",") for word in text.lower().split()] for text in filters}
    labels = _labels()
    every = frozenset().union(*labels.values())
    picked: set[Case] = set()
    for text, words in parsed.items():
        if not words:
            raise ValueError(f"--filter: expected words that each match a label, got {text!r}")
        wanted = [_matching(alternatives, every, text) for alternatives in words]
        found = {case for case, names in labels.items() if all(not names.isdisjoint(w) for w in wanted)}
        if not found:
            raise ValueError(f"--filter: expected words that one case has together, got {text!r}")
        picked |= found
    return [case for case in labels if case in picked]


@functools.cache
def _labels() -> dict[Case, frozenset[str]]:
    return {case: case.labels for case in cases()}


def _matching(alternatives: Sequence[str], every: frozenset[str], text: str) -> frozenset[str]:
    """The labels that match any of the alternatives, all of which match one."""
    found: set[str] = set()
    for alternative in alternatives:
        matches = fnmatch.filter(every, alternative)
        if not matches:
            near = difflib.get_close_matches(alternative, every, 6, 0.0)
            raise ValueError(f"--filter: expected labels such as {near}, got {alternative!r} in {text!r}")
        found.update(matches)
    return frozenset(found)


# ----------------------------------------------------------------------------------------------------- work


class Work(NamedTuple):
    """What a pass must at least compute and move: FLOPs, and bytes with each operand moved once."""

    flops: float
    bytes: float

    def plus(self, *others: Work) -> Work:
        return Work(*(sum(column) for column in zip(self, *others, strict=True)))


def _of_factors(case: Case, s: traffic.Sizes) -> Work:
    return Work(2.0 * case.M * case.R * (case.N + case.K), s.x + s.z + s.a + s.b)


GRADIENTS: dict[str, Callable[[Case, traffic.Sizes], Work]] = {
    "lora": _of_factors,
    # Of the magnitude: Y again.
    "dora": lambda case, s: _of_factors(case, s).plus(Work(0, s.y)),
    # Of b: dYᵀ·Z, as for LoRA's B; of d: what is there for dX.
    "vera": lambda case, s: Work(2.0 * case.M * case.R * case.N, s.z),
    # Of the vector: Y, or X, again.
    "ia3": lambda case, s: Work(0, s.y),
    "ia3-in": lambda case, s: Work(0, s.x),
}
"""What the gradients of a method's parameters take beside dX; vectors themselves are not counted."""


def work(case: Case) -> dict[str, Work]:
    """Of the adapted layer, by measure. The gradients of LoReFT read H again."""
    M, N, K, R = case.M, case.N, case.K, case.R
    s = traffic.Sizes(case.problem(), traffic.DEVICES["H100"])  # sizes of operands are the same on each
    base, adapters, inputs = 2.0 * M * N * K, s.a + s.b, s.x + s.y
    if case.method == "loreft":
        thin, rows = 2.0 * M * N * R, 2 * 4 * R * N  # V and R, [R, N] fp32; H·Vᵀ − H·Rᵀ is one product
        forward = Work(base + 2 * thin, s.base + inputs + rows + s.z)
        to_x = Work(base + 2 * thin, s.base + inputs + rows)
        return _measures(forward, to_x, Work(2 * thin, s.y + s.z + rows))
    low_rank = 2.0 * M * R * (N + K)
    forward = Work(base + low_rank, s.base + inputs + adapters + s.z + s.mask)
    to_x = Work(base + low_rank, s.base + inputs + adapters + s.mask)
    return _measures(forward, to_x, GRADIENTS[case.method](case, s))


def _measures(forward: Work, to_x: Work, weights: Work) -> dict[str, Work]:
    return dict(zip(MEASURES, (forward, forward.plus(to_x, weights), to_x), strict=True))


def dense_work(case: Case, dtype: str) -> dict[str, Work]:
    """Of the frozen dense layer in a dtype, which has no gradient but dX."""
    size = DTYPES[dtype].itemsize
    once = Work(2.0 * case.M * case.N * case.K, size * (case.N * case.K + case.M * case.K + case.M * case.N))
    return dict(zip(MEASURES, (once, once.plus(once), once), strict=True))
