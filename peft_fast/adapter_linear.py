"""`AdapterLinear`: a frozen, possibly 4-bit, linear layer with any method of `methods.METHODS` on it.

    Y = out_scale ⊙ (X'·Ŵᵀ + s·drop(X')·Aᵀ·Bᵀ) + bias,  X' = in_scale ⊙ X,

one fused op, whose operands the method makes from its parameters. The "parallel" and "series" adapters have
an activation, which the op does not carry: their base runs fused, their branch in plain torch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .formats import from_linear
from .functional import check_choice, lora_linear
from .methods import METHODS, Options, Tensors, resolve_options
from .modules import as_base_returns, check_base, in_compute_dtype, protect_from_repacking
from .ops import check_adapter


class SharedFactors(nn.Module):
    """What the layers of a method have in common, sized for the largest of them; each uses its leading part.

    VeRA's A [r, in_features] and B [out_features, r] are drawn from `projection_prng_key` as PEFT draws them,
    frozen, and saved unless `save_projection` is False. S2-LoRA's A and B and KAdaptation's A [terms, n, n]
    are trained.
    """

    def __init__(
        self,
        method: str,
        in_features: int,
        out_features: int,
        *,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        """`options` are the method's; layers that share must agree on those that shape what is shared.

        Raises:
            ValueError: a method that shares nothing, or a size or an option that does not fit.
            TypeError: another dtype, or an option that the method does not have.
        """
        super().__init__()
        check_choice("method", method, tuple(name for name, row in METHODS.items() if row.shared_options))
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        check_adapter(adapter_dtype, "auto")
        row = METHODS[method]
        options = resolve_options(method, options, out_features, in_features)
        self.method, self.in_features, self.out_features = method, in_features, out_features
        self.options = {name: options[name] for name in row.shared_options}
        empty = functools.partial(torch.empty, dtype=adapter_dtype or torch.float32, device=device)
        shared = row.shared(options, out_features, in_features, empty)
        self.names = tuple(shared)
        for name, tensor in shared.items():
            if row.shared_trains:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=self.options.get("save_projection", True))

    def check(self, method: str, options: Options, in_features: int, out_features: int) -> None:
        """Raises ValueError unless a layer of these sizes and options can use these factors."""
        if method != self.method:
            raise ValueError(f"shared: expected factors of method {method!r}, got those of {self.method!r}")
        for name, value in self.options.items():
            if options[name] != value:
                raise ValueError(
                    f"{name}: expected {value!r}, as in the shared factors, got {options[name]!r}"
                )
        if in_features > self.in_features or out_features > self.out_features:
            raise ValueError(
                f"shared: expected factors of at least [out_features, in_features] = "
                f"{[out_features, in_features]}, got {[self.out_features, self.in_features]}"
            )

    def cut(self, in_features: int, out_features: int) -> dict[str, Tensor]:
        """The tensors by name; A [r, K] and B [N, r] cut to a layer's K and N, by a view."""
        tensors = {name: getattr(self, name) for name in self.names}  # a replica has no named_parameters
        if self.method == "kadaptation":
            return tensors
        a, b = tensors
        return {a: tensors[a][:, :in_features], b: tensors[b][:out_features]}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def fused_method_forward(
    method: str,
    base: nn.Linear,
    x: Tensor,
    p: Tensors,
    options: Options,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`base(x)` with a method's parameters `p` on it as one op, without what `Method.after` adds.

    With the dtype conventions of `modules.fused_lora_forward`; `p` and `options` as for `Method.operands`.
    """
    bias, lora_A, lora_B, out_scale, in_scale, scaling = METHODS[method].operands(p, options, base.bias)
    weight = from_linear(base)
    y = lora_linear(
        in_compute_dtype(base, x if in_scale is None else (x * in_scale).to(x.dtype)),
        weight,
        x.new_empty(0, weight.in_features) if lora_A is None else lora_A,
        x.new_empty(weight.out_features, 0) if lora_B is None else lora_B,
        bias,
        scaling=scaling,
        out_scale=out_scale,
        dropout_p=dropout_p,
        training=training,
        backend=backend,
    )
    return as_base_returns(base, y, x.dtype)


class AdapterLinear(nn.Module):
    """A frozen linear layer with one method's trainable parameters on it; see the module and docs/methods.md.

    A new layer equals its base, up to rounding, whatever the method. State-dict keys: `base_layer.*` (the
    owner's own), the method's parameters by name, and `shared.*` where the method shares factors.

    Make one with `from_linear`, which names the arguments.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        method: str,
        shared: SharedFactors | None,
        adapter_dtype: torch.dtype | None,
        backend: str,
        options: Options,
    ) -> None:
        super().__init__()
        check_base(base_layer)
        check_adapter(adapter_dtype, backend)
        if shared is not None and not isinstance(shared, SharedFactors):
            raise TypeError(f"shared: expected SharedFactors or None, got {type(shared).__name__}")
        weight = from_linear(base_layer)
        self.in_features, self.out_features = K, N = weight.in_features, weight.out_features
        self.method, self.backend = method, backend
        self.options = resolve_options(method, options, N, K)
        row, device = METHODS[method], base_layer.weight.device
        if shared is not None:
            shared.check(method, self.options, K, N)
        elif row.shared_options:
            shared = SharedFactors(method, K, N, adapter_dtype=adapter_dtype, device=device, **self.options)
        empty = functools.partial(torch.empty, dtype=adapter_dtype or torch.float32, device=device)
        created = row.create(self.options, N, K, empty)
        self.adapter_names = tuple(created)
        for name, tensor in created.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.shared = shared
        protect_from_repacking(base_layer)
        base_layer.requires_grad_(False)
        self.base_layer = base_layer

    @classmethod
    def from_linear(
        cls,
        base: nn.Linear,
        method: str,
        *,
        shared: SharedFactors | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> AdapterLinear:
        """Wraps `base` without copying its weight, and freezes it, its bias too.

        Args:
            base: `nn.Linear`, a transformers `Conv1D` or a quantized bitsandbytes `Linear4bit`.
            method: a key of `methods.METHODS`: "vera", "s2lora", "kadaptation", "ia3", "ssf", "bitfit",
                "parallel" or "series".
            shared: factors in common with other layers ("vera", "s2lora", "kadaptation"); its own when None.
            adapter_dtype: dtype of the method's parameters; float32 when None.
            backend: "auto" or a name of `backends.BACKENDS`.
            **options: of the method, see docs/methods.md.

        Raises:
            UnsupportedLayer, UnsupportedWeight: `base` cannot be fused; it is left as it was.
            ValueError: another argument does not fit; the message names it.
            TypeError: an option that the method does not have.
        """
        return cls(base, method, shared, adapter_dtype, backend, options)

    def forward(self, x: Tensor) -> Tensor:
        p = {} if self.shared is None else self.shared.cut(self.in_features, self.out_features)
        p.update((name, getattr(self, name)) for name in self.adapter_names)
        y = fused_method_forward(
            self.method,
            self.base_layer,
            x,
            p,
            self.options,
            dropout_p=self.options.get("dropout", 0.0),
            training=self.training,
            backend=self.backend,
        )
        after = METHODS[self.method].after
        return y if after is None else after(p, self.options, x, y)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.method!r}{options}, backend={self.backend!r}"
