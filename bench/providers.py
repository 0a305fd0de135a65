"""Who computes a case: one row per provider, how to build its layer, and why it cannot run a case.

    dense-DTYPE    the frozen `nn.Linear` in that dtype: its fastest is the unit of every ratio
    peft           PEFT's layer on bitsandbytes, eager: LoRA, DoRA, VeRA, IA3
    peft-compile   the same under torch.compile
    accelerated    the same after `peft_fast.accelerate`
    pyreft         pyreft's intervention on the output of the base layer
    unsloth        PEFT's layer by Unsloth's function for one adapted linear layer
    torchao        torchao's NF4 tensor with plain low-rank products beside it, in the dtype of X
    liger          Liger-Kernel, which has no adapted linear layer up to now
    ours           this library's layer; `ours[NAME]` by that backend, `ours` by the one that it chooses

All share the operands of bench/layers.py, apart from torchao, which quantizes W itself. To add a provider,
write `cannot` and `layer` and add a row to `PROVIDERS`. Trained parameters come in the order of the method's
row in bench/methods.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft_fast.bench import layers
from peft_fast.bench.layers import DTYPES, Operands, Provider, base_linear, make_layer
from peft_fast.bench.methods import SCALING
from peft_fast.bench.registry import FORMATS, Case
from torch import Tensor, nn
from torch.nn import functional as F

from peft_fast import backends, info
from peft_fast.errors import BackendUnavailable

ALONE = "unsloth"
"""It changes other packages when it is imported, so it runs beside dense layers alone."""


class Entry(NamedTuple):
    """A row: `cannot(case, device)` says why it does not run a case, `layer` builds it in training mode.

    A provider that runs nothing has no `layer`. `dtype` is of the activations, None for the case's. A `peer`
    may be as inexact as `measure.PEER_ERROR`; `compiled` ones take seconds to start. `backend` is what is
    asked for, of ours.
    """

    cannot: Callable[[Case, str], str | None]
    layer: Callable[[Case, Operands], nn.Module] | None
    dtype: str | None = None
    peer: bool = True
    compiled: bool = False
    backend: str | None = None


# ---------------------------------------------------------------------------------------------------- dense


def _dense(dtype: str) -> Entry:
    def cannot(case: Case, device: str) -> str | None:
        if dtype == "float16" and device == "cpu" and case.dtype != dtype:
            return "on a CPU it is timed beside float16 cases alone"
        return None

    def layer(case: Case, operands: Operands) -> nn.Module:
        return layers.dense_linear(operands, DTYPES[dtype])

    return Entry(cannot, layer, dtype, peer=False)


# ----------------------------------------------------------------------------------------------------- PEFT


def _no_peft_layer(case: Case) -> str | None:
    if case.op != "lora_linear":
        return f"PEFT has no {case.method}"
    if case.method == "dora" and case.dropout:
        return "PEFT's DoRA drops the input of the frozen layer too: another function"
    return layers.missing("peft")


def _peft_cannot(case: Case, device: str) -> str | None:
    if FORMATS[case.format].name in layers.OURS_ALONE:
        return f"bitsandbytes has no {case.format} layer"
    return _no_peft_layer(case)


def _peft(case: Case, operands: Operands) -> nn.Module:
    return make_layer(Provider("peft", case.dtype, case.method), operands, case.dropout)


def _compiled_cannot(case: Case, device: str) -> str | None:
    if case.dropout:
        return "compiled code draws a dropout mask of its own, so its results cannot be checked"
    return _peft_cannot(case, device)


def _compiled(case: Case, operands: Operands) -> nn.Module:
    compiled: nn.Module = torch.compile(_peft(case, operands), dynamic=False)
    return compiled


# --------------------------------------------------------------------------------------------------- pyreft


class Pyreft(nn.Module):
    """pyreft's intervention on every row of a base layer's output, started at the edit of `ours`."""

    def __init__(self, base: nn.Linear, edit: Any, dtype: torch.dtype) -> None:
        from peft_fast.bench.loreft import load_pyreft

        super().__init__()
        self.base_layer = base
        self.edit = load_pyreft().interventions.LoreftIntervention(
            embed_dim=base.out_features, low_rank_dimension=len(edit.bias), dtype=dtype
        )
        with torch.no_grad():
            self.edit.learned_source.weight.copy_(edit.source)
            self.edit.learned_source.bias.copy_(edit.bias)
            self.edit.rotate_layer.weight = edit.rows().t()
        self.to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.edit(self.base_layer(x))


def _pyreft_cannot(case: Case, device: str) -> str | None:
    if case.op != "loreft":
        return f"pyreft has no {case.method}"
    absent = [name for name in ("pyreft", "pyvene") if importlib.util.find_spec(name) is None]
    return f"{absent[0]}: not installed" if absent else _needs_bitsandbytes(case)


def _needs_bitsandbytes(case: Case) -> str | None:
    """A 4-bit base runs by itself with bitsandbytes alone."""
    return None if case.format == "dense" or layers.bnb is not None else "bitsandbytes: not installed"


def _pyreft(case: Case, operands: Operands) -> nn.Module:
    dtype = DTYPES[case.dtype]
    return Pyreft(base_linear(operands, dtype), _edited(case, operands, "auto").edit, dtype)


# ------------------------------------------------------------------------------------------------- GPU peers


def _unsloth_cannot(case: Case, device: str) -> str | None:
    if (case.method, case.format, case.dropout) != ("lora", "nf4-nested", 0):
        return "its kernels take LoRA over nested NF4 without dropout"
    return layers.missing("unsloth")


def _unsloth(case: Case, operands: Operands) -> nn.Module:
    return make_layer(Provider("unsloth", case.dtype, case.method), operands)


class TorchAO(nn.Module):
    """LoRA on torchao's NF4 tensor, adapters in the dtype of X."""

    def __init__(self, case: Case, operands: Operands) -> None:
        nf4 = _nf4_tensor()
        super().__init__()
        dtype = DTYPES[case.dtype]
        self.weight = nn.Parameter(nf4.NF4Tensor.from_tensor(operands.dense.to(dtype), 64, 256), False)
        self.linear = nf4.linear_nf4
        self.lora_A = nn.Parameter(operands.lora_A.to(dtype))
        self.lora_B = nn.Parameter(operands.lora_B.to(dtype))
        self.dropout = case.dropout

    def exact_weight(self) -> Tensor:
        """[N, K] in fp64."""
        return self.weight.get_original_weight().double()

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(F.dropout(x, self.dropout), self.lora_A)
        return self.linear(x, self.weight) + SCALING * F.linear(z, self.lora_B)


def _nf4_tensor() -> Any:
    """The module of torchao that has `NF4Tensor` and `linear_nf4`. Raises ImportError without one."""
    for home in ("torchao.quantization", "torchao.dtypes"):  # of 0.18, and of releases before
        kind = getattr(importlib.import_module(home), "NF4Tensor", None)
        if kind is not None:
            return importlib.import_module(kind.__module__)
    raise ImportError("neither torchao.quantization nor torchao.dtypes has NF4Tensor")


@functools.cache
def _no_torchao() -> str | None:
    try:
        _nf4_tensor()
    except Exception as error:  # whatever a package does when it is imported
        return layers.absent("torchao", error)
    return None


def _torchao_cannot(case: Case, device: str) -> str | None:
    if (case.method, case.format) != ("lora", "nf4-nested"):
        return "its NF4 tensor is nested, with plain LoRA beside it"
    if case.N * case.K % (64 * 256):
        return "its NF4 tensor takes whole groups of 256 blocks"
    return _no_torchao()


def _liger_cannot(case: Case, device: str) -> str | None:
    """It would be added here once `liger_kernel.ops` has an adapted linear layer."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel: not installed"
    return "liger_kernel has no adapted linear layer"


# ----------------------------------------------------------------------------------------------------- ours


def backend_of(case: Case, device: str, backend: str) -> str:
    """The name of the backend that runs a case; raises as `backends.resolve`."""
    format = "dense" if case.op == "loreft" else FORMATS[case.format].name
    return backends.resolve(case.op, format, device, DTYPES[case.dtype], backend)


def _edited(case: Case, operands: Operands, backend: str) -> Any:
    """A `LoReFTLinear` of the same random edit at every call."""
    from peft_fast import LoReFTConfig, LoReFTLinear

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoReFTConfig(r=case.R, backend=backend)
        return LoReFTLinear.from_linear(base_linear(operands, DTYPES[case.dtype]), config)


def _unavailable(case: Case, device: str, backend: str) -> str | None:
    try:
        backend_of(case, device, backend)
    except BackendUnavailable as error:
        return str(error)
    return None


def _ours(backend: str) -> Entry:
    def cannot(case: Case, device: str) -> str | None:
        return _unavailable(case, device, backend)

    def layer(case: Case, operands: Operands) -> nn.Module:
        if case.op == "loreft":
            return _edited(case, operands, backend)
        return make_layer(Provider("ours", case.dtype, case.method, backend), operands, case.dropout)

    return Entry(cannot, layer, peer=False, backend=backend)


def _accelerated_cannot(case: Case, device: str) -> str | None:
    return _no_peft_layer(case) or _unavailable(case, device, "auto")


def _accelerated(case: Case, operands: Operands) -> nn.Module:
    return make_layer(Provider("accelerated", case.dtype, case.method), operands, case.dropout)


PROVIDERS: dict[str, Entry] = {
    **{f"dense-{dtype}": _dense(dtype) for dtype in DTYPES},
    "peft": Entry(_peft_cannot, _peft),
    "peft-compile": Entry(_compiled_cannot, _compiled, compiled=True),
    "pyreft": Entry(_pyreft_cannot, _pyreft),
    "unsloth": Entry(_unsloth_cannot, _unsloth),
    "torchao": Entry(_torchao_cannot, TorchAO),
    "liger": Entry(_liger_cannot, None),
    "accelerated": Entry(_accelerated_cannot, _accelerated, peer=False, backend="auto"),
    "ours": _ours("auto"),
}
PEERS = ("peft", "peft-compile", "pyreft", "unsloth", "torchao")
PACKAGES = ("pyreft", "pyvene", "torchao", "unsloth", "liger_kernel")
"""Of peers, beside those that `info.versions` tells."""


def versions() -> dict[str, str | None]:
    """Of this library, what it builds on and the packages of peers; None where not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {**info.versions(), **found}


def entry(name: str) -> Entry:
    """The row of a name, `ours[BACKEND]` included. Raises ValueError for another name."""
    if name.startswith("ours[") and name[5:-1] in backends.BACKENDS and name.endswith("]"):
        return _ours(name[5:-1])
    if name not in PROVIDERS:
        raise ValueError(
            f"--providers: expected {list(PROVIDERS)} or ours[NAME] with one of {list(backends.BACKENDS)}, "
            f"got {name!r}"
        )
    return PROVIDERS[name]


def is_dense(name: str) -> bool:
    return name.startswith("dense-")
