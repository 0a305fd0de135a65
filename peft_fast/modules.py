"""Drop-in `nn.Module` replacements over frozen, possibly 4-bit, base layers.

`LoRALinear` computes  Y = X·Ŵᵀ + s·(drop(X)·Aᵀ·Bᵀ + lora_bias) + bias,
`DoRALinear` computes  Y = c ⊙ (X·Ŵᵀ + s·drop(X)·Aᵀ·Bᵀ) + bias,  c = m / ‖Ŵ + s·B·A‖ per row,

each in one fused op; see `functional` for what flows where, `autograd` for what is saved and `norm_cache`
for when a norm is computed.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import dora
from .errors import UnsupportedLayer
from .formats import from_linear, is_conv1d
from .functional import DROPOUTS, NORM_GRADS, check_choice, dora_linear, lora_linear
from .norm_cache import NormCache, fold_scaling
from .ops import check_adapter, check_number, check_probability
from .ranks import check_rank
from .reference import accumulation_dtype

Bias = Literal["none", "all", "lora_only"]

_REPACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes' switch for repacking a Linear4bit in place."""


def is_linear4bit(layer: nn.Module) -> bool:
    """Whether `layer` is a bitsandbytes `Linear4bit`, without importing bitsandbytes."""
    return _is_bitsandbytes(layer, "Linear4bit")


def is_linear8bit(layer: nn.Module) -> bool:
    """Whether `layer` is a bitsandbytes `Linear8bitLt`, without importing bitsandbytes."""
    return _is_bitsandbytes(layer, "Linear8bitLt")


def _is_bitsandbytes(layer: nn.Module, name: str) -> bool:
    return any(c.__name__ == name and c.__module__.startswith("bitsandbytes.") for c in type(layer).__mro__)


def check_base(layer: nn.Linear) -> None:
    """Raises `UnsupportedLayer` or `UnsupportedWeight` unless `layer` can be a fused layer's frozen base."""
    if not isinstance(layer, nn.Module):
        raise UnsupportedLayer(f"base: expected a linear layer, got {type(layer).__name__}")
    is_quantized = is_linear4bit(layer) or is_linear8bit(layer) or "packing" in vars(layer)
    if type(layer) is not nn.Linear and not is_quantized and not is_conv1d(layer):
        raise UnsupportedLayer(
            "base: expected nn.Linear, transformers Conv1D, bitsandbytes Linear4bit or Linear8bitLt, or "
            f"PackedLinear, got {type(layer).__name__}"
        )
    weight = from_linear(layer).check()
    if is_conv1d(layer):
        return
    expected = (layer.out_features, layer.in_features)
    if (weight.out_features, weight.in_features) != expected:
        raise UnsupportedLayer(
            f"base: expected a weight [out_features, in_features] = {list(expected)}, "
            f"got {[weight.out_features, weight.in_features]}"
        )


def protect_from_repacking(layer: Any) -> bool:
    """Keeps bitsandbytes from repacking `layer` in place at an eval forward on an AVX512_BF16 CPU.

    After that repacking a training forward loses dX and saving stores other weights. The switch is an
    attribute of this one layer. Returns whether it was on.
    """
    if not is_linear4bit(layer) or not getattr(layer, _REPACKS, False):
        return False
    setattr(layer, _REPACKS, False)
    return True


def allow_repacking(layer: Any) -> None:
    """Undoes `protect_from_repacking`."""
    setattr(layer, _REPACKS, True)


def compute_dtype(base: Any) -> torch.dtype:
    """The dtype that `base` computes in: autocast's, else what bitsandbytes was told, else the weight's.

    For a base that computes in the dtype of x whatever its weight's, the default one.
    """
    device = base.weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if is_linear4bit(base):
        return base.compute_dtype or base.weight.quant_state.dtype
    return base.weight.dtype if base.weight.is_floating_point() else torch.get_default_dtype()


def warn_slow_compute_dtype(layer: nn.Module, x_dtype: torch.dtype | None = None) -> None:
    """bitsandbytes' default compute dtype is float32; half activations are then upcast at every forward."""
    if getattr(layer, "compute_dtype", None) == torch.float32 and x_dtype in (torch.float16, torch.bfloat16):
        warnings.warn(
            f"bnb_4bit_compute_dtype is float32 while the model is {x_dtype}: every activation is upcast and "
            f"saved in float32. Set bnb_4bit_compute_dtype={x_dtype}",
            stacklevel=3,
        )


def fused_lora_forward(
    base: nn.Linear,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`base(x)` plus the low-rank branch as one op, with the dtype conventions of `base`.

    `nn.Linear` computes in the dtype of x. `Linear4bit` casts x to its `compute_dtype` (when set) and the
    result back to the dtype x came in; autocast wins over `compute_dtype`.
    """
    y = lora_linear(
        in_compute_dtype(base, x),
        from_linear(base),
        lora_A,
        lora_B,
        base.bias,
        scaling=scaling,
        lora_bias=lora_bias,
        dropout_p=dropout_p,
        training=training,
        backend=backend,
    )
    return as_base_returns(base, y, x.dtype)


def fused_base_forward(base: nn.Linear, x: Tensor, backend: str = "auto") -> Tensor:
    """`base(x)` by the fused op: `fused_lora_forward` of rank 0."""
    no_A, no_B = x.new_empty(0, base.in_features), x.new_empty(base.out_features, 0)
    return fused_lora_forward(base, x, no_A, no_B, scaling=1.0, backend=backend)


def fused_dora_forward(
    base: nn.Linear,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norms: NormCache,
    *,
    scaling: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = False,
    dropout: str = "paper",
    norm_grad: str = "detached",
    backend: str = "auto",
) -> Tensor:
    """`functional.dora_linear` over `base`, with the dtype conventions of `fused_lora_forward`.

    A norm comes from `norms`; where that keeps none, it is computed here.
    """
    weight = from_linear(base)
    if norm_grad == "full":
        norm, squares = None, norms.norms_squared(base, weight, lora_A, backend)
    else:
        norm, squares = norms.norm(base, weight, lora_A, lora_B, scaling, backend), None
    if isinstance(scaling, Tensor) or torch.compiler.is_compiling():
        lora_B, scaling = fold_scaling(lora_B, scaling), 1.0
    if squares is not None:
        norm = dora.lora_weight_norm(weight, lora_A, lora_B, scaling, norms_squared=squares, backend=backend)
    y = dora_linear(
        in_compute_dtype(base, x),
        weight,
        lora_A,
        lora_B,
        magnitude,
        base.bias,
        scaling=scaling,
        dropout_p=dropout_p,
        training=training,
        dropout=dropout,
        norm=norm,
        norm_grad=norm_grad,
        backend=backend,
    )
    return as_base_returns(base, y, x.dtype)


def in_compute_dtype(base: nn.Linear, x: Tensor) -> Tensor:
    """x in the dtype that a `Linear4bit` was told to compute in."""
    dtype = vars(base).get("compute_dtype")  # nn.Module's getattr is slow where nothing is found
    return x if dtype is None else x.to(dtype)


def as_base_returns(base: nn.Linear, y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in the `dtype` that x came in, where `base` is a layer of bitsandbytes."""
    return y.to(dtype) if y.dtype != dtype and (is_linear4bit(base) or is_linear8bit(base)) else y


class LowRankLinear(nn.Module):
    """What `LoRALinear` and `DoRALinear` share: a frozen base layer and the factors of its update.

    A [r, in_features] is initialised as `nn.Linear` is (Kaiming uniform), B [out_features, r] with zeros, so
    that the update starts as zero.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        bias: Bias,
        adapter_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        super().__init__()
        check_base(base_layer)
        check_rank("r", r)
        check_number("lora_alpha", lora_alpha)
        check_adapter(adapter_dtype, backend)
        check_probability("lora_dropout", lora_dropout)
        check_choice("bias", bias, ("none", "all", "lora_only"))
        if bias != "none" and base_layer.bias is None:
            raise ValueError(f"bias: expected a base layer with a bias for {bias!r}, got one without")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.backend = backend
        weight = from_linear(base_layer)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        protect_from_repacking(base_layer)
        base_layer.weight.requires_grad_(False)
        if base_layer.bias is not None:
            base_layer.bias.requires_grad_(bias != "none")
        self.base_layer = base_layer
        dtype = adapter_dtype or torch.float32
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def extra_repr(self) -> str:
        dropout = f"lora_dropout={self.lora_dropout}"
        return f"r={self.r}, scaling={self.scaling:g}, {dropout}, backend={self.backend!r}"


class LoRALinear(LowRankLinear):
    """A frozen linear layer with a trainable low-rank update (LoRA, arXiv 2106.09685; rsLoRA, 2312.03732).

    Y = X·Ŵᵀ + s·(drop(X)·Aᵀ·Bᵀ + lora_bias) + bias,  s = alpha/r, or alpha/√r with `use_rslora`.

    A new layer, made by `from_linear`, equals its base. State-dict keys: `base_layer.*` (the owner's own),
    `lora_A`, `lora_B`, `lora_bias`.
    """

    def __init__(self, *shared: Any, lora_bias: bool) -> None:
        super().__init__(*shared)
        bias = torch.zeros(self.out_features, dtype=self.lora_A.dtype, device=self.lora_A.device)
        self.lora_bias = nn.Parameter(bias) if lora_bias else None

    @classmethod
    def from_linear(
        cls,
        base: nn.Linear,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: Bias = "none",
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> LoRALinear:
        """Wraps `base` without copying its weight, and freezes it.

        Args:
            base: `nn.Linear`, a transformers `Conv1D`, a quantized layer of bitsandbytes or a `PackedLinear`.
            r: rank.
            lora_alpha: numerator of the scaling.
            lora_dropout: dropout probability on the input of the low-rank branch, in training mode.
            use_rslora: scale by alpha/√r.
            bias: "all" or "lora_only" also trains the bias of `base`.
            lora_bias: adds a trainable bias to the low-rank branch, scaled with it.
            adapter_dtype: dtype of A, B and lora_bias; float32 when None.
            backend: "auto" or a name of `backends.BACKENDS`.

        Raises:
            UnsupportedLayer, UnsupportedWeight: `base` cannot be fused; it is left as it was.
            ValueError: another argument does not fit; the message names it.
        """
        shared = (base, r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, backend)
        return cls(*shared, lora_bias=lora_bias)

    def forward(self, x: Tensor) -> Tensor:
        return fused_lora_forward(
            self.base_layer,
            x,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            lora_bias=self.lora_bias,
            dropout_p=self.lora_dropout,
            training=self.training,
            backend=self.backend,
        )


class DoRALinear(LowRankLinear):
    """A frozen linear layer whose weight is adapted in direction and in length (DoRA, arXiv 2402.09353).

    Y = c ⊙ (X·Ŵᵀ + s·drop(X)·Aᵀ·Bᵀ) + bias,  c = magnitude / ‖Ŵ + s·B·A‖ per row,  s as in `LoRALinear`.

    `magnitude` [out_features], at least float32, is initialised with the lengths of the rows of Ŵ, so a new
    layer equals its base. State-dict keys: `base_layer.*`, `lora_A`, `lora_B`, `magnitude`.

    The norm is computed when A, B or the weight has changed, not at every forward; see `norm_cache`, which
    also says which writes need `reset_norm`. `from_linear` makes a layer.
    """

    def __init__(self, *shared: Any, dropout: str, norm_grad: str) -> None:
        check_choice("dropout", dropout, DROPOUTS)
        check_choice("norm_grad", norm_grad, NORM_GRADS)
        super().__init__(*shared)
        self.dropout = dropout
        self.norm_grad = norm_grad
        self.norms = NormCache()
        weight, dtype = from_linear(self.base_layer), accumulation_dtype(self.lora_A.dtype)
        squares = self.norms.norms_squared(self.base_layer, weight, self.lora_A)
        if squares is None:
            squares = dora.row_norms_squared(weight, dtype=dtype)
        self.magnitude = nn.Parameter(squares.sqrt().to(dtype))

    @classmethod
    def from_linear(
        cls,
        base: nn.Linear,
        *,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: Bias = "none",
        adapter_dtype: torch.dtype | None = None,
        dropout: Literal["paper", "peft"] = "paper",
        norm_grad: Literal["detached", "full"] = "detached",
        backend: str = "auto",
    ) -> DoRALinear:
        """Wraps `base` without copying its weight, and freezes it.

        Args:
            base, r, lora_alpha, use_rslora, bias, backend: as for `LoRALinear.from_linear`.
            lora_dropout: dropout probability, in training mode; on what, `dropout` says.
            adapter_dtype: dtype of A and B; float32 when None.
            dropout: "paper" drops the input of the low-rank branch; "peft" what PEFT drops, see
                `functional.dora_linear`.
            norm_grad: "detached" takes the norm as a constant (§4.3); "full" differentiates through it, for
                which it is computed at every forward.

        Raises:
            UnsupportedLayer, UnsupportedWeight: `base` cannot be fused; it is left as it was.
            ValueError: another argument does not fit; the message names it.
        """
        shared = (base, r, lora_alpha, lora_dropout, use_rslora, bias, adapter_dtype, backend)
        return cls(*shared, dropout=dropout, norm_grad=norm_grad)

    def forward(self, x: Tensor) -> Tensor:
        return fused_dora_forward(
            self.base_layer,
            x,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            self.norms,
            scaling=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
            dropout=self.dropout,
            norm_grad=self.norm_grad,
            backend=self.backend,
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.reset_norm()  # under FSDP what is loaded goes into shards

    def reset_norm(self) -> None:
        """Has the next forward compute the norm: after writes that `norm_cache` does not notice."""
        self.norms.reset()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout!r}, norm_grad={self.norm_grad!r}"
