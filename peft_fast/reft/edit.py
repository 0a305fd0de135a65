"""One edit of hidden states in a subspace: `LoReFT`, and its variants."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import loreft
from ..orthonormal import OrthonormalRows
from .config import VARIANTS, LoReFTConfig


class LoReFT(nn.Module):
    """Φ(h) = h + Rᵀ(act(V·h + b) − R·h) (LoReFT, arXiv 2404.03592, eq. 2, whose W is V here).

    Parameters, fp32: source V [r, d], bias b [r], and the basis R [r, d], of orthonormal rows by construction
    (`basis.rotation`, with the buffers `basis.base` and `basis.base_sign`). NoReFT and NodiReFT have a free
    basis; ConsReFT and LobiReFT have no source. Drawn on the CPU, so that a seed gives the same ones on every
    device.

    Args:
        hidden_size: d.
        config: rank, variant, activation, dropout, init and backend; the other options are the model's.
        device: of the parameters, default the CPU.

    Raises:
        ValueError: r ≤ d does not hold.
    """

    bias: nn.Parameter

    def __init__(
        self, hidden_size: int, config: LoReFTConfig, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        d, r = hidden_size, config.r
        if r > d:
            raise ValueError(f"r: expected at most the hidden size {d}, got {r}")
        self.hidden_size, self.variant = d, config.variant
        self.act, self.dropout, self.dropout_on = config.act, config.dropout, config.dropout_on
        self.backend = config.backend
        kind = VARIANTS[config.variant]
        self.basis: OrthonormalRows | nn.Parameter
        if kind.orthonormal:
            self.basis = OrthonormalRows(d, r, dtype=torch.float32, device="cpu")
        else:
            self.basis = nn.Parameter(_linear_weight(r, d))
        self.source: nn.Parameter | None = None
        if kind.source:
            self.source = nn.Parameter(_linear_weight(r, d))
            bias = torch.empty(r, dtype=torch.float32, device="cpu").uniform_(-(d**-0.5), d**-0.5)
        else:
            bias = torch.rand(r, dtype=torch.float32, device="cpu")
        self.bias = nn.Parameter(bias)
        if config.init == "identity":
            with torch.no_grad():
                self.bias.zero_()
                if self.source is not None and kind.subtract:
                    self.source.copy_(self.rows())
                elif self.source is not None:
                    self.source.zero_()
        self.to(device)

    def rows(self) -> Tensor:
        """R [r, d]; of orthonormal rows in fp32 (fp64 if the parameters are) unless the basis is free."""
        return self.basis() if isinstance(self.basis, OrthonormalRows) else self.basis

    def forward(
        self,
        h: Tensor,
        rows: Tensor | None = None,
        residual: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> Tensor:
        """Edits rows of h + residual.

        Args:
            h: hidden states [..., d], float32, float16 or bfloat16.
            rows: int64 [m], unique indices into the flattened leading dimensions, negative ones skipped; None
                for all.
            residual: [..., d] as h, or None.
            basis: R [r, d] if already computed (`rows()`).

        Returns:
            [..., d] in the dtype of h.

        Raises:
            ValueError, TypeError: a tensor does not fit; the message names it.
        """
        return loreft(
            h,
            self.rows() if basis is None else basis,
            self.source,
            self.bias,
            subtract=VARIANTS[self.variant].subtract,
            rows=rows,
            residual=residual,
            act=self.act,
            dropout_p=self.dropout,
            dropout_on=self.dropout_on,
            training=self.training,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        sizes = f"d={self.hidden_size}, r={len(self.bias)}"
        return f"{sizes}, variant={self.variant!r}, act={self.act!r}, dropout={self.dropout}"


def is_fsdp_unit(module: object) -> bool:
    """Whether `fully_shard` was called on it: its parameters are gathered in its own call alone."""
    cls: Any = type(module)
    return _made_by_fully_shard(cls)


@functools.cache
def _made_by_fully_shard(cls: type) -> bool:
    return any(c.__name__ == "FSDPModule" for c in cls.__mro__)  # known without importing torch.distributed


def _linear_weight(r: int, d: int) -> Tensor:
    """As `nn.Linear(d, r)` draws its weight."""
    weight = torch.empty(r, d, dtype=torch.float32, device="cpu")
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight
