"""Models that have sizes and no data, and a ledger of what running them allocates: the parts of `estimate`.

A model is built on the meta device, where PEFT's adapters and bitsandbytes' layers can be made. Then it gets
the tensors of a `FakeTensorMode`, which know their device: so the ops choose as they would on real ones.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from . import base_models
from .norm_cache import COMPARED_BY_CONTENT, NormCache
from .packed_linear import PackedLinear
from .packing import PACKINGS
from .quantization import choose, replace_by_packed

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from .config import TrainConfig

BLOCK, NESTED_BLOCK = 64, 256
"""bitsandbytes' defaults, with which `base_models` quantizes."""


def build(job: TrainConfig, model_config: Any, labels: int) -> Any:
    """The model of a job on the meta device, with its 4-bit layers and adapters."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights

    causal = job.task == "causal-lm"
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    if type(model_config) not in auto._model_mapping:
        raise ValueError(f"model: expected one for {job.task}, got {type(model_config).__name__}")
    model_config.use_cache = False  # as transformers' Trainer sets it
    if not causal:
        model_config.num_labels = labels
        model_config.pad_token_id = model_config.pad_token_id or 0
    with torch.device("meta"), no_init_weights():
        model = auto.from_config(model_config, dtype=base_models.DTYPES[job.dtype])
        model.tie_weights()
    adapter = base_models.adapter_config(job, "CAUSAL_LM" if causal else "SEQ_CLS")
    dense = base_models.trained_whole(adapter)
    if job.quant in base_models.BITSANDBYTES:
        _quantize(model, job, base_models.quantization(job, head=not causal, dense=dense))
    elif job.quant in PACKINGS:
        replace_by_packed(model, choose(model, tuple(dense)), job.quant)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of weights without data
        return base_models.add_adapter(adapter, model).train()


def _quantize(model: Any, job: TrainConfig, settings: BitsAndBytesConfig) -> None:
    """Makes 4-bit layers as transformers does with these settings, of the right sizes and without data."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    dtype = base_models.DTYPES[job.dtype]
    skip = [*(settings.llm_int8_skip_modules or ()), *(model._keep_in_fp32_modules or ())]
    replace_with_bnb_linear(model, skip, settings)
    model.is_loaded_in_4bit = True  # transformers' mark, which PEFT reads
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(dtype)
            state = _quant_state(layer.out_features, layer.in_features, job.quant, dtype)
            packed = torch.empty(-(-layer.weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
            layer.weight = Params4bit(
                packed, quant_state=state, quant_type=job.quant, bnb_quantized=True, module=layer
            )
            layer.quant_state = state


def _quant_state(N: int, K: int, quant: str, dtype: torch.dtype) -> QuantState:
    """Of a weight [N, K] with nested statistics; see `formats`."""
    empty = partial(torch.empty, dtype=torch.float32, device="meta")
    blocks = -(-N * K // BLOCK)
    nested = QuantState(
        absmax=empty(-(-blocks // NESTED_BLOCK)), code=empty(256), blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    return QuantState(
        absmax=empty(blocks, dtype=torch.uint8), shape=torch.Size((N, K)), code=empty(16), blocksize=BLOCK,
        quant_type=quant, dtype=dtype, offset=empty(()), state2=nested,
    )  # fmt: skip


def packed_weights(model: nn.Module) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Each quantized weight, with its scales and tables."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            buffers = dict(layer.named_buffers(recurse=False))
            yield buffers.pop("weight"), list(buffers.values())
        elif isinstance(layer, Linear4bit):
            weight: Any = layer.weight
            yield weight, _statistics(weight.quant_state)


def _statistics(state: QuantState) -> list[Tensor]:
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def fill(model: Any) -> None:
    """Puts CPU tensors of the current mode in place of those on the meta device; shared ones stay shared."""
    made: dict[int, Tensor | None] = {id(None): None}
    replaced = []  # kept alive: an address that is used again would be mistaken

    def filled(old: Tensor | None) -> Tensor | None:
        if id(old) not in made:
            assert old is not None
            replaced.append(old)
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            if isinstance(old, Params4bit):
                state = old.quant_state
                state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code = map(
                    filled, _statistics(state)
                )
                vars(new).update(vars(old))
            made[id(old)] = new
        return made[id(old)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = filled(tensor)
    for adapter, tokens in getattr(model, "prompt_tokens", {}).items():  # PEFT's, of what learns a prompt
        model.prompt_tokens[adapter] = filled(tokens)


def keep_norms(model: nn.Module, device: str) -> None:
    """Gives each fused DoRA layer the norms that it keeps between steps on a device, without values."""
    from .peft_lora import FusedLora

    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, FusedLora)]
    for layer in layers:
        for adapter in layer.lora_variant:
            operands = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
            layer.norms = KeptNorm(layer.out_features, operands, device)


class KeptNorm(NormCache):
    """The norms of a layer with `operands` A [R, K] and B [N, R], made from them before."""

    def __init__(self, N: int, operands: list[Tensor], device: str) -> None:
        super().__init__()
        self.kept = torch.empty(N, dtype=torch.float32, device="cpu")
        self.squares = torch.empty(N, dtype=torch.float64, device="cpu")
        self.compared = [torch.empty_like(t) for t in operands if device in COMPARED_BY_CONTENT]

    def norm(self, *_: Any) -> Tensor:
        return self.kept


class NoCache(DynamicCache):
    """Keeps nothing: with it a model of transformers knows that no sequence is padded or packed.

    It would look whether they are, which fake tensors cannot tell, and make a mask in case they are.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class Ledger(TorchDispatchMode):
    """Notes every storage that an op returns, and when it is freed; storages are numbered from 1.

    A clock counts storages: one that is freed at `t` was gone when storage `t + 1` came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [0]
        self.freed_at: dict[int, int] = {}
        self.now = self.peak = self.peak_at = 0
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if id(storage) in self._live:
            return
        number = len(self.sizes)
        self.sizes.append(storage.nbytes())
        freed = partial(self._free, id(storage), number)
        self._live[id(storage)] = weakref.ref(storage, freed), number
        self.now += storage.nbytes()
        if self.now > self.peak:
            self.peak, self.peak_at = self.now, number

    def _free(self, key: int, number: int, _: Any) -> None:
        del self._live[key]
        self.freed_at[number] = len(self.sizes) - 1
        self.now -= self.sizes[number]

    def forget_peak(self) -> None:
        self.peak, self.peak_at = self.now, len(self.sizes) - 1

    def alive(self) -> set[int]:
        return {number for _, number in self._live.values()}

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """The storages of tensors that are alive."""
        return {self._live[id(tensor.untyped_storage())][1] for tensor in tensors}

    def bytes_of(self, numbers: Iterable[int], *, at_peak: bool = False) -> int:
        """Of these storages; or of those among them that were there at the peak."""
        return sum(
            self.sizes[n]
            for n in numbers
            if not at_peak or (n <= self.peak_at and self.freed_at.get(n, self.peak_at) >= self.peak_at)
        )
