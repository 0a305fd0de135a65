"""Op schemas, shape checks and fakes: of `lora_linear` and `dropout_mask`; `loreft` has its in `reft_ops.py`.

`peft_fast::lora_linear` and its backward are dispatcher ops: `torch.compile` sees one opaque node, and the
backend is resolved inside it (`backends.resolve`).

To add an op: its definition in `reference.py`, a schema and a fake here or in a file beside this one, a
formula in `autograd.py`, and a function of the same name in each backend that carries it.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, native, reference
from .formats import DENSE_DTYPES, QuantizedWeight
from .reference import Gradients, Needs

WEIGHT_SCHEMA = (
    "Tensor weight, Tensor? absmax, Tensor? code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, str format, int out_features, int in_features, int blocksize, "
    "int nested_blocksize"
)
WEIGHT_FIELDS = len(QuantizedWeight._fields)

_library = torch.library.Library("peft_fast", "DEF")
_library.define(
    f"lora_linear(Tensor x, {WEIGHT_SCHEMA}, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "Tensor? dropout_mask, Tensor? out_scale, float scaling, float dropout_p, str backend) "
    "-> (Tensor, Tensor)"
)
_library.define(
    f"lora_linear_backward(Tensor grad, Tensor x, {WEIGHT_SCHEMA}, Tensor lora_A, Tensor lora_B, Tensor z, "
    "Tensor? dropout_mask, Tensor? out_scale, Tensor? bias, Tensor? y, float scaling, float dropout_p, "
    "bool needs_x, bool needs_A, bool needs_B, bool needs_bias, bool needs_out_scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("dropout_mask(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


# ------------------------------------------------------------------------------------------------ checks


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}


def runs_directly(operands: Sequence[Tensor], frozen: Sequence[Tensor | None]) -> bool:
    """Whether an op may be called as a plain function, since nothing has to see it in the dispatcher.

    True in eager mode on plain tensors: a small layer is then spared round trips that cost more than its
    arithmetic. False under a compiler, tracer, mode or functorch transform, for tensor subclasses, and for
    operands that the dispatcher would unwrap (left behind by a transform) or materialize (lazily negated).
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, operands))
        or not _PLAIN_OR_NONE.issuperset(map(type, frozen))
        or any(map(torch._C._functorch.is_functorch_wrapped_tensor, operands))
        or any(map(Tensor.is_neg, operands))
    )


FLOATING = (*DENSE_DTYPES, torch.float64)


def check_number(argument: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a finite number."""
    _check_real(argument, value)
    if not torch.compiler.is_compiling() and not math.isfinite(value):  # a compiler's may be a symbol
        raise ValueError(f"{argument}: expected a finite number, got {value!r}")


def check_probability(argument: str, p: float) -> None:
    _check_real(argument, p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{argument}: expected a probability in [0, 1], got {p}")


def _check_real(argument: str, value: Any) -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, _REAL)):
        raise TypeError(f"{argument}: expected a number, got {value!r}")


_REAL = (numbers.Real, torch.SymFloat, torch.SymInt)


def check_dtype(dtype: Any) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected one of {FLOATING}, got {dtype!r}")


def check_adapter(adapter_dtype: torch.dtype | None, backend: str) -> None:
    """Raises TypeError or ValueError for what no adapter of a layer can have."""
    if adapter_dtype is not None and adapter_dtype not in FLOATING:
        raise TypeError(f"adapter_dtype: expected None or one of {FLOATING}, got {adapter_dtype!r}")
    backends.check_name(backend)


def check_tensor(argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")


def check_lora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    out_scale: Tensor | None,
    dropout_p: float,
    dropout_mask: Tensor | None = None,
) -> None:
    """Raises ValueError or TypeError naming the argument, the expected and the received."""
    N, K = weight.out_features, weight.in_features
    stored = weight.weight
    check_tensor("weight", stored)
    device = stored.device
    check_operand("x", x, device)
    dtypes = FLOATING if x.dtype is torch.float64 else DENSE_DTYPES
    if stored.dtype is torch.float64 and dtypes is not FLOATING:
        raise TypeError(f"x: expected torch.float64, the dtype of the weight, got {x.dtype}")
    check_operand("lora_A", lora_A, device, dtypes)
    check_operand("lora_B", lora_B, device, dtypes)
    if bias is not None:
        check_operand("bias", bias, device, dtypes)
    # Each shape is read once: this runs at every forward.
    rows, a, b = x.shape, lora_A.shape, lora_B.shape
    if not rows or rows[-1] != K:
        raise ValueError(f"x: expected [..., K] = [..., {K}], got {list(rows)}")
    if len(a) != 2 or a[1] != K:
        raise ValueError(f"lora_A: expected [R, K] = [*, {K}], got {list(a)}")
    if len(b) != 2 or b[0] != N or b[1] != a[0]:
        raise ValueError(f"lora_B: expected [N, R] = [{N}, {a[0]}], got {list(b)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(f"bias: expected [N] = [{N}], got {list(bias.shape)}")
    check_probability("dropout_p", dropout_p)
    if dropout_mask is not None:
        check_mask(dropout_mask, x.numel() // max(K, 1), K, device)
    if out_scale is not None:
        check_vector("out_scale", out_scale, N, device)
        if out_scale.dtype != (dtype := reference.accumulation_dtype(x.dtype)):
            raise TypeError(f"out_scale: expected {dtype} for x in {x.dtype}, got {out_scale.dtype}")


def check_lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    needs: Needs,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor,
    dropout_mask: Tensor | None,
    out_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    _scaling: float,
    dropout_p: float,
) -> None:
    """As `check_lora_linear`, of what the op is given by others than the formula; the weight, too."""
    weight.check()
    check_lora_linear(x, weight, bias, lora_A, lora_B, out_scale, dropout_p, dropout_mask)
    if needs.out_scale and (out_scale is None or y is None):
        raise ValueError("out_scale, y: expected tensors for the gradient of out_scale, got None")
    shape = [*x.shape[:-1], weight.out_features]
    for name, tensor in (("grad", grad), ("y", y)):
        if tensor is not None:
            check_operand(name, tensor, weight.weight.device, (x.dtype,))
            if list(tensor.shape) != shape:
                raise ValueError(f"{name}: expected [..., N] = {shape}, got {list(tensor.shape)}")
    check_operand("z", z, weight.weight.device, (reference.accumulation_dtype(x.dtype),))
    M, R = x.numel() // max(weight.in_features, 1), lora_A.shape[0]
    if list(z.shape) != [M, R]:
        raise ValueError(f"z: expected [M, R] = {[M, R]}, got {list(z.shape)}")


def check_operand(
    argument: str, tensor: Any, device: torch.device, dtypes: tuple[torch.dtype, ...] = FLOATING
) -> None:
    """Raises unless it is a strided tensor of one of the dtypes on the weight's device."""
    if not isinstance(tensor, Tensor):
        check_tensor(argument, tensor)
    if tensor.dtype not in dtypes:
        raise TypeError(f"{argument}: expected a floating dtype of {dtypes}, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{argument}: expected a strided tensor, got {tensor.layout}")
    if tensor.device != device:
        raise ValueError(f"{argument}: expected device {device} (the weight's), got {tensor.device}")


def check_tensors(
    x: Tensor, weight: QuantizedWeight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> None:
    """That the operands are tensors; what else they have to be, `check_lora_linear` says."""
    if not _PLAIN.issuperset(map(type, (x, weight.weight, lora_A, lora_B))):
        for name, tensor in (("x", x), ("weight", weight.weight), ("lora_A", lora_A), ("lora_B", lora_B)):
            check_tensor(name, tensor)
    if bias is not None:
        check_tensor("bias", bias)


def check_subspace(
    basis: Tensor, source: Tensor | None, bias: Tensor | None, device: torch.device, bias_name: str = "bias"
) -> None:
    for name, tensor in (("basis", basis), ("source", source), (bias_name, bias)):
        if tensor is not None or name == "basis":
            check_operand(name, tensor, device)
    if basis.dim() != 2:
        raise ValueError(f"basis: expected [r, d], got {list(basis.shape)}")
    if source is not None and source.shape != basis.shape:
        raise ValueError(f"source: expected [r, d] = {list(basis.shape)}, got {list(source.shape)}")
    if bias is not None and bias.shape != basis.shape[:1]:
        raise ValueError(f"{bias_name}: expected [r] = {list(basis.shape[:1])}, got {list(bias.shape)}")


def check_mask(mask: Tensor, M: int, K: int, device: torch.device) -> None:
    if mask.dtype != torch.uint8 or mask.device != device or list(mask.shape) != [M, (K + 7) // 8]:
        raise ValueError(
            f"dropout_mask: expected uint8 [M, ⌈K/8⌉] = {[M, (K + 7) // 8]} on {device}, got {mask.dtype} "
            f"{list(mask.shape)} on {mask.device}"
        )


def check_vector(argument: str, tensor: Any, N: int, device: torch.device) -> None:
    check_operand(argument, tensor, device)
    if tensor.dim() != 1 or tensor.shape[0] != N:
        raise ValueError(f"{argument}: expected [N] = [{N}], got {list(tensor.shape)}")


# ------------------------------------------------------------------------------- implementations and fakes


def _as_given(op: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an implementation with autocast off: casting is decided before the op, not inside it."""

    @functools.wraps(op)
    def run(x: Tensor, *args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return op(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return op(x, *args)

    return run


_unsafe_view = torch.ops.aten._unsafe_view.default  # as `F.linear` reshapes its result


@_as_given
def lora_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_mask: Tensor | None,
    out_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Checks, picks a backend and runs it: (Y [..., N], Z [M, R] fp32) of x [..., K]; not differentiable."""
    check_lora_linear(x, weight, bias, lora_A, lora_B, out_scale, dropout_p, dropout_mask)
    y, z = backends.over_weight(
        "lora_linear",
        weight,
        x,
        backend,
        _rows(x, weight.in_features),
        weight,
        bias if bias is None else bias.contiguous(),
        lora_A.contiguous(),
        lora_B.contiguous(),
        dropout_mask if dropout_mask is None else dropout_mask.contiguous(),
        out_scale if out_scale is None else out_scale.contiguous(),
        scaling,
        dropout_p,
    )
    return _unflatten_rows(y, x), z


@_as_given
def lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor,
    dropout_mask: Tensor | None,
    out_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: Needs,
    backend: str,
) -> Gradients:
    """The gradients that `needs` names, dX in the shape of x; grad [..., N], and z of `lora_linear`.

    Only for d_out_scale, the bias and the y [..., N] of `lora_linear`.
    """
    grads = backends.implementation("lora_linear_backward", weight.format, x, backend)(
        _rows(grad, weight.out_features),
        _rows(x, weight.in_features),
        weight,
        lora_A.contiguous(),
        lora_B.contiguous(),
        z,
        dropout_mask,
        out_scale if out_scale is None else out_scale.contiguous(),
        bias if bias is None else bias.contiguous(),
        y if y is None else _rows(y, weight.out_features),
        scaling,
        dropout_p,
        needs,
    )
    return grads if grads.x is None else grads._replace(x=_unflatten_rows(grads.x, x))


def _rows(x: Tensor, features: int) -> Tensor:
    """x [..., features] as a contiguous matrix [M, features]."""
    return (x if x.dim() == 2 else x.reshape(-1, features)).contiguous()


def _unflatten_rows(y: Tensor, x: Tensor) -> Tensor:
    """y [M, features] with the leading dimensions of x; no view, which autograd would not let be written."""
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _lora_linear_op(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return lora_linear(x, QuantizedWeight(*args[:WEIGHT_FIELDS]), *args[WEIGHT_FIELDS:])


def _lora_linear_backward_op(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, rest = QuantizedWeight(*args[:WEIGHT_FIELDS]), args[WEIGHT_FIELDS:]
    *operands, needs_x, needs_A, needs_B, needs_bias, needs_out_scale, backend = rest
    needs = Needs(needs_x, needs_A, needs_B, needs_bias, needs_out_scale)
    check_lora_linear_backward(grad, x, weight, needs, *operands)
    grads = lora_linear_backward(grad, x, weight, *operands, needs, backend)
    return tuple(_or_empty(g, x) for g in grads)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    """Ops return tensors, each its own: an empty one stands for a gradient that nobody needs."""
    return like.new_empty(0) if grad is None else grad


def _fake_lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, rest = QuantizedWeight(*args[:WEIGHT_FIELDS]), args[WEIGHT_FIELDS:]
    bias, lora_A, lora_B, _, out_scale, _, dropout_p, _ = rest
    check_lora_linear(x, weight, bias, lora_A, lora_B, out_scale, dropout_p)
    M = x.numel() // weight.in_features
    z = x.new_empty((M, lora_A.shape[0]), dtype=reference.accumulation_dtype(x.dtype))
    return x.new_empty((*x.shape[:-1], weight.out_features)), z


def _fake_lora_linear_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    lora_A, lora_B, z, _, _, _, _, _, _, *needs, _ = args[WEIGHT_FIELDS:]
    grads = Gradients(
        x.new_empty(x.shape),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
        z.new_empty(lora_B.shape[0]),
        z.new_empty(lora_B.shape[0]),
    )
    return tuple(_or_empty(g if needed else None, x) for g, needed in zip(grads, needs, strict=True))


def _dropout_mask(x: Tensor, p: float) -> Tensor:
    keep = reference.draw_mask(x, p)
    pack = native.pack_mask if x.device.type == "cpu" and native.load_error() is None else reference.pack_mask
    return pack(keep.contiguous())


def _fake_dropout_mask(x: Tensor, p: float) -> Tensor:
    K = x.shape[-1]
    return x.new_empty((x.numel() // K, (K + 7) // 8), dtype=torch.uint8)


_library.impl("lora_linear", _lora_linear_op, "CompositeExplicitAutograd")
_library.impl("lora_linear_backward", _lora_linear_backward_op, "CompositeExplicitAutograd")
_library.impl("dropout_mask", _dropout_mask, "CompositeExplicitAutograd")
torch.library.register_fake("peft_fast::lora_linear", _fake_lora_linear, lib=_library)
torch.library.register_fake("peft_fast::lora_linear_backward", _fake_lora_linear_backward, lib=_library)
torch.library.register_fake("peft_fast::dropout_mask", _fake_dropout_mask, lib=_library)
