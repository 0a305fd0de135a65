"""Options of the representation edits of a model, as `reft_config.json` stores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..backends import BACKENDS
from ..functional import DROPOUT_ON, check_choice
from ..ops import check_probability
from ..ranks import check_rank
from ..reference import ACTIVATIONS
from .positions import Positions

BLOCK_OUTPUT = "block_output"
INITS = ("pyreft", "identity")


class Variant(NamedTuple):
    """What a variant is made of: act(H·Vᵀ + b) − H·Rᵀ, with V, the subtraction, or R orthonormal, or not."""

    orthonormal: bool
    source: bool
    subtract: bool


VARIANTS = {
    "loreft": Variant(orthonormal=True, source=True, subtract=True),
    "noreft": Variant(orthonormal=False, source=True, subtract=True),
    "direft": Variant(orthonormal=True, source=True, subtract=False),
    "nodireft": Variant(orthonormal=False, source=True, subtract=False),
    "consreft": Variant(orthonormal=True, source=False, subtract=True),
    "lobireft": Variant(orthonormal=True, source=False, subtract=False),
}


@dataclass(frozen=True)
class LoReFTConfig:
    """How `get_reft_model` edits a model (LoReFT, arXiv 2404.03592).

    Args:
        r: rank of the edit.
        layers: indices of the blocks to edit, or "all".
        positions: which tokens of the prompt: "f7+l7" the first 7 and the last 7, "f7", "l7", or "all".
        component: what is edited, "block_output", or a linear layer of each block by the end of its name.
        share_weights: one edit for the first and the last positions of a block, instead of one for each.
        act_fn: activation on H·Vᵀ + b, a key of `reference.ACTIVATIONS`; None is none.
        dropout: dropout probability, in training mode.
        dropout_on: "edit" drops what is added to the state; "state" the edited state, as pyreft does.
        variant: "loreft", or "noreft" with a free R, "direft" and "nodireft" without the subtraction of H·Rᵀ,
            "consreft" without V, "lobireft" without both.
        init: "pyreft" starts as pyreft does; "identity" with an edit of zero, so that a new model equals its
            base.
        blocks: dotted path of the list of blocks, found if None.
        backend: "auto" or a name of `backends.BACKENDS`.

    Raises:
        ValueError, TypeError: an option does not fit; the message names it.
    """

    r: int = 8
    layers: str | Sequence[int] = "all"
    positions: str = "f7+l7"
    component: str = BLOCK_OUTPUT
    share_weights: bool = True
    act_fn: str | None = None
    dropout: float = 0.0
    dropout_on: str = "edit"
    variant: str = "loreft"
    init: str = "pyreft"
    blocks: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        Positions.parse(self.positions)
        for name in ("component", "blocks"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (name == "blocks" and value is None):
                raise ValueError(f"{name}: expected the name of a module, got {value!r}")
        if type(self.share_weights) is not bool:
            raise TypeError(f"share_weights: expected a bool, got {self.share_weights!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float):
            raise TypeError(f"dropout: expected a number, got {self.dropout!r}")
        check_probability("dropout", self.dropout)
        check_choice("dropout_on", self.dropout_on, DROPOUT_ON)
        check_choice("variant", self.variant, tuple(VARIANTS))
        check_choice("init", self.init, INITS)
        check_choice("backend", self.backend, ("auto", *BACKENDS))
        if self.act_fn is not None:
            check_choice("act_fn", self.act_fn, tuple(ACTIVATIONS))
        if self.act != "linear" and not VARIANTS[self.variant].source:
            raise ValueError(f"act_fn: expected None for {self.variant!r}, got {self.act_fn!r}")
        if self.init == "identity" and self.variant == "consreft":
            raise ValueError(
                "init: expected 'pyreft' for 'consreft', which no start makes zero, got 'identity'"
            )
        if self.init == "identity" and self.act != "linear":
            raise ValueError(f"init: expected 'pyreft' with act_fn={self.act_fn!r}, got 'identity'")

    @property
    def act(self) -> str:
        return self.act_fn or "linear"

    @property
    def groups(self) -> tuple[str, ...]:
        """The edits of a block, in the order in which they run: ("all",) or ("first", "last")."""
        positions = Positions.parse(self.positions)
        both = positions.first > 0 and positions.last > 0
        return ("first", "last") if both and not self.share_weights else ("all",)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        layers = self.layers if isinstance(self.layers, str) else list(self.layers)
        return {**dataclasses.asdict(self), "layers": layers}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> LoReFTConfig:
        """The inverse of `to_dict`; an option left out takes its default.

        Raises:
            ValueError, TypeError: an option is unknown or does not fit; the message names it.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]}: expected an option of {known}, got one that is not known")
        return cls(**options)


def _checked_layers(layers: Any) -> str | tuple[int, ...]:
    if layers == "all":
        return "all"
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise ValueError(f"layers: expected 'all' or a list of block indices, got {layers!r}")
    if any(type(i) is not int or i < 0 for i in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"layers: expected different indices from 0 on, got {list(layers)!r}")
    return tuple(sorted(layers))
