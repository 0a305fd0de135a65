"""Edits of a linear layer's output, over a quantized base: `LoReFTLinear`.

    H = X·Ŵᵀ + β            Y = H + gate ⊙ (act(H·Vᵀ + b) − H·Rᵀ)·R

Two ways lead to Y. *Projected*: the base, then one op that edits rows of H, as at a block's output; its cost
goes with the number of edited rows. *Folded*, where every row is edited and act and dropout are none: with
P = V − R one `lora_linear` of A = P·Ŵ, B = Rᵀ and another bias, which costs two thin passes over the packed
weight, then low-rank products with X in place of some with H. So it is the faster for many rows of a layer
that is wider than its input: measured on a CPU, forward and backward take 0.72 to 0.99 of the time of
projecting at 384 → 1536 from 704 rows on, 0.99 to 1.23 at 4096 → 4096 and 1.07 to 1.19 at 1536 → 384.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedLayer
from ..formats import from_linear, is_conv1d
from ..functional import check_choice, fold_edit
from ..modules import (
    check_base,
    fused_base_forward,
    fused_lora_forward,
    is_linear4bit,
    protect_from_repacking,
)
from ..reference import accumulation_dtype
from .config import VARIANTS, LoReFTConfig
from .edit import LoReFT, is_fsdp_unit

STRATEGIES = ("auto", "fold", "project")

FOLD_FROM = 512
"""Rows from which "auto" folds a layer with more outputs than inputs, on the CPU; elsewhere it projects."""


def check_editable(layer: nn.Linear) -> None:
    """Raises `UnsupportedLayer` or `UnsupportedWeight` unless the output of `layer` can be edited."""
    check_base(layer)
    if is_conv1d(layer):
        raise UnsupportedLayer(
            "base: LoReFT expects nn.Linear, Linear4bit, Linear8bitLt or PackedLinear, got Conv1D; "
            "`quantize` makes one of them of it"
        )


class LoReFTLinear(nn.Module):
    """A frozen linear layer whose output is edited in a subspace (LoReFT, arXiv 2404.03592, eq. 2).

    Y = H + (act(H·Vᵀ + b) − H·Rᵀ)·R in the given rows of H = X·Ŵᵀ + bias, and H in the others. State-dict
    keys: `base_layer.*` (the owner's own) and `edit.*`, those of `LoReFT`.

    Make one with `from_linear`, which names the arguments.
    """

    def __init__(self, base_layer: nn.Linear, edit: LoReFT, strategy: str) -> None:
        super().__init__()
        self.base_layer, self.edit, self.strategy = base_layer, edit, strategy
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    @classmethod
    def from_linear(
        cls,
        base: nn.Linear,
        config: LoReFTConfig | None = None,
        *,
        strategy: Literal["auto", "fold", "project"] = "auto",
    ) -> LoReFTLinear:
        """Wraps `base` without copying its weight, and freezes it.

        Args:
            base: `nn.Linear` or a quantized bitsandbytes `Linear4bit`.
            config: rank, variant, activation, dropout, init and backend of the edit; None for the defaults.
            strategy: "fold" or "project", see the module's docstring; "auto" chooses by the number of rows.

        Raises:
            UnsupportedLayer, UnsupportedWeight: `base` cannot be fused; it is left as it was.
            ValueError: "fold" does not fit the edit, or the rank is larger than the layer is wide.
        """
        config = config or LoReFTConfig()
        check_choice("strategy", strategy, STRATEGIES)
        check_editable(base)
        edit = LoReFT(base.out_features, config, device=base.weight.device)
        if strategy == "fold" and not foldable(edit):
            raise ValueError("strategy: expected 'project' for an edit with act_fn or dropout, got 'fold'")
        protect_from_repacking(base)
        base.requires_grad_(False)
        return cls(base, edit, strategy)

    def forward(self, x: Tensor, rows: Tensor | None = None, basis: Tensor | None = None) -> Tensor:
        """Y [..., out_features] in the dtype that the base returns.

        Args:
            x: [..., in_features].
            rows: int64 [m], which rows of H to edit, as for `functional.loreft`; None for all.
            basis: R [r, out_features] if already computed.

        Raises:
            ValueError: `rows` were given with the strategy "fold".
        """
        if self.strategy == "fold" and rows is not None:
            raise ValueError("rows: expected None with the strategy 'fold', got a tensor")
        return edited_linear(self.base_layer, self.edit, x, rows, basis, self.strategy)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A dense layer that computes this one with every row edited: weight Ŵ + Rᵀ·P·Ŵ, and the moved bias.

        Args:
            dtype: of its weight and bias, default the one that the base's weight decodes to.

        Raises:
            ValueError: the edit has an activation, which no weight computes.
        """
        if self.edit.act != "linear":
            raise ValueError(f"merged: expected an edit without act_fn, got {self.edit.act!r}")
        base = self.base_layer
        weight = from_linear(base)
        dtype = dtype or (base.weight.dtype if weight.format == "dense" else torch.float32)
        acc = accumulation_dtype(dtype)
        lora_A, lora_B, increment = _folded(base, self.edit, self.edit.rows(), acc)
        layer = nn.Linear(self.in_features, self.out_features, device="meta")
        layer.weight = nn.Parameter((weight.decode(acc) + lora_B @ lora_A).to(dtype))
        layer.bias = nn.Parameter((increment if base.bias is None else increment + base.bias).to(dtype))
        return layer.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"strategy={self.strategy!r}"


def foldable(edit: LoReFT) -> bool:
    """Whether an edit of every row is a low-rank update of the weight."""
    return edit.act == "linear" and edit.dropout == 0.0


def edited_linear(
    base: nn.Linear,
    edit: LoReFT,
    x: Tensor,
    rows: Tensor | None,
    basis: Tensor | None,
    strategy: str = "auto",
) -> Tensor:
    """The output of `base`, whatever its own forward, with rows edited by a strategy of `LoReFTLinear`."""
    backend = vars(base).get("backend", edit.backend)  # of a base that `accelerate` has swapped
    invariant = backend == "cpu-batch-invariant"  # neither the choice nor the GEMM may depend on the batch
    if strategy == "auto":
        N, K = base.out_features, base.in_features
        pays = N > K and x.numel() >= FOLD_FROM * K and x.device.type == "cpu"
        apart = is_fsdp_unit(edit) or is_fsdp_unit(edit.basis)
        folds = pays and rows is None and not apart and not invariant and foldable(edit)
        strategy = "fold" if folds else "project"
    if strategy == "fold":
        lora_A, lora_B, increment = _folded(base, edit, edit.rows() if basis is None else basis, x.dtype)
        return fused_lora_forward(base, x, lora_A, lora_B, scaling=1.0, lora_bias=increment, backend=backend)
    if is_linear4bit(base) or invariant:
        h = fused_base_forward(base, x, backend)
    else:
        h = F.linear(x, base.weight, base.bias)
    return edit(h, rows, basis=basis)


def _folded(
    base: nn.Linear, edit: LoReFT, basis: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    subtract = VARIANTS[edit.variant].subtract
    weight = from_linear(base)
    return fold_edit(
        weight, basis, edit.source, edit.bias, base.bias, subtract=subtract, dtype=dtype, backend=edit.backend
    )
