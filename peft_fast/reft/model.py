"""Representation edits on a model: `get_reft_model(model, config)`, undone by `model.unload()`.

The model stays the object it was. Its class and those of its edited blocks become subclasses of the same name
(see `blocks`); signatures, state-dict keys and outputs of the base are what they were, plus the edits.
"""

from __future__ import annotations

import functools
import inspect
import typing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayer
from ..modules import allow_repacking, protect_from_repacking
from ..swapped import check_swappable, subclass
from ..tuned_model import TunedModel
from .blocks import (
    BlockInputs,
    Generation,
    Plan,
    ReftBlock,
    attach,
    batched_bases,
    current,
    detach,
    find_blocks,
    find_component,
    holder,
)
from .config import BLOCK_OUTPUT, LoReFTConfig
from .edit import LoReFT
from .positions import Positions, group_rows, prompt_mask


def get_reft_model(model: nn.Module, config: LoReFTConfig) -> ReftModel:
    """Adds edits to the output of blocks of `model`, or of a linear layer in each, and freezes all else.

    The edits are fp32 whatever the model is, and in `model.<blocks>.<i>.reft`, or the linear layer's. A
    token's place is counted among the prompt tokens of its row, wherever its padding is; the prompt is

    - inside `generate`, the tokens that were passed to it, which generated ones never join;
    - else the first `prompt_lengths` [B] valid tokens, an argument that forward takes beside the base's;
    - else, with token labels in a model that generates, the valid tokens before the first label that is not
      −100 (all, in a row that begins with a label: there is no prompt to tell apart);
    - else every valid token. Tokens behind a cache of others are none.

    bitsandbytes is kept from repacking 4-bit weights of `model` in place, as in `accelerate`.

    Args:
        model: a transformers model, or one like it: `config.hidden_size`, and a forward that takes input_ids
            or inputs_embeds [B, S, ...], attention_mask [B, S] and past_key_values by these names.
        config: what to edit.

    Returns:
        `model`.

    Raises:
        UnsupportedLayer: the model cannot be edited; it is left as it was.
        ValueError: an option of config does not fit the model, which is left as it was.
    """
    if not isinstance(config, LoReFTConfig):
        raise TypeError(f"config: expected a LoReFTConfig, got {type(config).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if any(isinstance(module, ReftModel | ReftBlock) for module in model.modules()):
        raise UnsupportedLayer("model: expected one without edits, got one that has some; see unload()")
    _check_model(model)
    path = find_blocks(model, config.blocks)
    blocks = list(typing.cast(nn.ModuleList, model.get_submodule(path)))
    stated = getattr(getattr(model, "config", None), "num_hidden_layers", len(blocks))
    if config.blocks is None and stated != len(blocks):
        raise UnsupportedLayer(
            f"blocks: expected the path of the list of blocks, got None, and {path!r} has {len(blocks)} of "
            f"the {stated} that config.num_hidden_layers states"
        )
    if len({id(block) for block in blocks}) != len(blocks):
        raise UnsupportedLayer(f"blocks: expected different modules, got {path!r} with one in several places")
    layers = range(len(blocks)) if isinstance(config.layers, str) else config.layers
    if max(layers) >= len(blocks):
        raise ValueError(f"layers: expected indices below {len(blocks)}, got {max(layers)}")
    made: dict[int, tuple[dict[str, LoReFT], str]] = {}
    for i in layers:
        check_swappable(f"block {i}", blocks[i])
        component, held = "", blocks[i]
        if config.component == BLOCK_OUTPUT:
            width = _hidden_size(model)
        else:
            component, held = find_component(blocks[i], config.component)
            width = held.out_features
        parameter = next(held.parameters(), None)
        device = None if parameter is None else parameter.device
        edits = {group: LoReFT(width, config, device=device) for group in config.groups}
        made[i] = edits, component

    model.requires_grad_(False)
    protected = tuple(name for name, module in model.named_modules() if protect_from_repacking(module))
    for i, (edits, component) in made.items():
        attach(blocks[i], i, edits, component)
    reft: Any = model
    positions = Positions.parse(config.positions)
    reft.reft_config = config
    reft.reft_targets = Targets(path, tuple(layers), positions, config.groups, protected)
    reft.__class__ = model_class(reft.__class__)
    return reft


class Targets(NamedTuple):
    """Where the edits of a model are, in parts that a forward need not look up."""

    path: str
    layers: tuple[int, ...]
    positions: Positions
    groups: tuple[str, ...]
    protected: tuple[str, ...]  # the layers that `unload` lets bitsandbytes repack again


class ReftModel(TunedModel):
    """Mixin: a model with edits, made by `get_reft_model` or `ReftModel.from_pretrained`."""

    reft_config: LoReFTConfig
    reft_targets: Targets
    _generates: bool

    @property
    def reft_blocks(self) -> dict[int, Any]:
        """The edited blocks, by their index."""
        blocks: Any = self._reft_path()[-1]
        return {i: blocks[i] for i in self.reft_targets.layers}

    def _reft_path(self) -> list[nn.Module]:
        """The modules from the model to the list of its blocks."""
        path: list[nn.Module] = [self]
        for name in self.reft_targets.path.split("."):
            path.append(getattr(path[-1], name))
        return path

    @property
    def edits(self) -> dict[str, LoReFT]:
        """Every edit, by "<block>.<group>": "0.all", or "0.first" and "0.last"."""
        blocks = self.reft_blocks.items()
        return {f"{i}.{group}": edit for i, block in blocks for group, edit in holder(block).reft.items()}

    def unload(self) -> nn.Module:
        """Removes the edits: the model, still frozen, as it was before `get_reft_model`. Returns it."""
        for block in self.reft_blocks.values():
            detach(block)
        for name in self.reft_targets.protected:
            allow_repacking(self.get_submodule(name))
        self.__class__ = type(self)._stock
        del self.reft_config, self.reft_targets
        return self

    def _write(self, directory: Path, state_dict: dict[str, Tensor] | None) -> None:
        from .files import save

        save(self, directory, state_dict)

    @classmethod
    def from_pretrained(
        cls, base_model: nn.Module, directory: str | Path, *, backend: str = "auto"
    ) -> ReftModel:
        """`base_model`, edited as the model that `save_pretrained` wrote to `directory`, in the same bits.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError, TypeError: a file, or `backend`, does not fit; the message names it, and the model is
                left as it was.
            UnsupportedLayer: as `get_reft_model`.
        """
        from .files import from_pretrained

        return from_pretrained(base_model, Path(directory), backend)

    def load_edits(self, directory: str | Path) -> None:
        """Sets the edits to those in `directory`, in the parameters that an optimizer may hold already.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError, TypeError: a file does not fit; the message names it, and nothing was changed.
        """
        from .files import load

        load(self, Path(directory))

    # ---------------------------------------------------------------------------------------------- forward

    def _reft_plan(self, given: dict[str, Any], prompt_lengths: Tensor | None) -> Plan:
        cache = given.get("past_key_values")
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise TypeError(f"past_key_values: expected a transformers Cache, got {type(cache).__name__}")
        past = 0 if cache is None else cache.get_seq_length()
        shape: tuple[int, int] | None
        rows: tuple[Tensor | None, ...]
        generation = current.generation
        if generation is not None and generation.model is self:
            if not isinstance(past, Tensor) and past >= generation.width:
                return Plan(None)
            shape, rows = self._generation_rows(generation, given, past)
        elif not isinstance(past, Tensor) and past > 0:
            return Plan(None)
        else:
            shape, rows = self._rows(given, prompt_lengths, past)
        bases = batched_bases(self.reft_blocks, self._reft_path())
        return Plan({i: BlockInputs(shape, rows, bases[i]) for i in self.reft_targets.layers})

    def _rows(
        self, given: dict[str, Any], prompt_lengths: Tensor | None, past: int | Tensor
    ) -> tuple[tuple[int, int] | None, tuple[Tensor | None, ...]]:
        positions, groups = self.reft_targets.positions, self.reft_targets.groups
        mask, labels = given.get("attention_mask"), given.get("labels")
        tokens = next((given[n] for n in ("input_ids", "inputs_embeds") if given.get(n) is not None), mask)
        if tokens is None:
            if positions.every and prompt_lengths is None:
                return None, (None,)
            raise ValueError("input_ids: expected them, or inputs_embeds, or an attention_mask, got none")
        B, S = tokens.shape[:2]
        if isinstance(past, Tensor) and isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, -S:]  # a static cache has it cover the tokens before these, too
        mask = _checked_mask(mask, (B, S))
        if prompt_lengths is not None:
            prompt_lengths = _checked_lengths(prompt_lengths, B).to(tokens.device)
            mask = torch.ones(B, S, dtype=torch.bool, device=tokens.device) if mask is None else mask
        if not isinstance(labels, Tensor) or labels.shape != (B, S) or not self._generates:
            labels = None
        prompt = prompt_mask(mask, prompt_lengths=prompt_lengths, labels=labels)
        if prompt is None and positions.every and not isinstance(past, Tensor):
            return (B, S), (None,)
        if prompt is None:
            prompt = torch.ones(B, S, dtype=torch.bool, device=tokens.device)
        if isinstance(past, Tensor):
            prompt = prompt & (past == 0)
        return (B, S), group_rows(positions, groups, prompt)

    def _generation_rows(
        self, generation: Generation, given: dict[str, Any], past: int | Tensor
    ) -> tuple[tuple[int, int], tuple[Tensor, ...]]:
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        B, S = tokens.shape[:2]
        width, mask = generation.width, generation.mask
        if mask is None:
            mask = torch.ones(B, width, dtype=torch.bool, device=tokens.device)
        prompt = mask[:, :width].repeat_interleave(B // mask.shape[0], 0) != 0
        positions, groups = self.reft_targets.positions, self.reft_targets.groups
        return (B, S), group_rows(positions, groups, prompt, past=past, length=S)


@functools.cache
def model_class(stock: Any) -> type:
    """The class of an edited model; its methods keep the signatures of those of `stock`."""
    names = [name for name in inspect.signature(stock.forward).parameters if name != "self"]

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, prompt_lengths: Tensor | None = None, **kwargs: Any) -> Any:
        before = current.plan
        current.plan = self._reft_plan({**dict(zip(names, args, strict=False)), **kwargs}, prompt_lengths)
        try:
            return stock.forward(self, *args, **kwargs)
        finally:
            current.plan = before

    generates = hasattr(stock, "can_generate") and stock.can_generate()
    methods: dict[str, Any] = {"forward": forward, "_generates": generates}
    if hasattr(stock, "generate"):

        @functools.wraps(stock.generate)
        def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            guidance = [kwargs.get("guidance_scale")]
            for settings in (kwargs.get("generation_config"), self.generation_config):
                guidance.append(getattr(settings, "guidance_scale", None))
            if next((scale for scale in guidance if scale is not None), 1) != 1:
                raise ValueError(
                    "guidance_scale: expected none, since its second forward has no prompt to edit, "
                    f"got {guidance}"
                )
            prompts = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs)
            width = next((prompt.shape[1] for prompt in prompts if prompt is not None), 1)
            mask = kwargs.get("attention_mask")
            if mask is not None:
                width = max(width, mask.shape[1])
            before = current.generation
            current.generation = Generation(self, width, mask)
            try:
                return stock.generate(self, inputs, *args, **kwargs)
            finally:
                current.generation = before

        methods["generate"] = generate
    if hasattr(stock, "_prepare_attention_mask_for_generation"):
        # What generate makes without a mask. Forward may see a part of it, in another shape, or none.

        @functools.wraps(stock._prepare_attention_mask_for_generation)
        def prepare_mask(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            mask = stock._prepare_attention_mask_for_generation(self, *args, **kwargs)
            if current.generation is not None and current.generation.model is self:
                current.generation = current.generation._replace(mask=mask)
            return mask

        methods["_prepare_attention_mask_for_generation"] = prepare_mask
    return subclass(ReftModel, model_class, stock, methods)


def _check_model(model: Any) -> None:
    """Raises `UnsupportedLayer` for models whose prompt cannot be told from what follows it."""
    if any(c.__name__ == "PeftModel" and c.__module__.startswith("peft.") for c in type(model).__mro__):
        raise UnsupportedLayer("model: expected the model itself, got a PeftModel; see its get_base_model()")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedLayer("model: expected one sequence of tokens, got an encoder and a decoder")
    check_swappable("model", model)
    takes = inspect.signature(model.forward).parameters
    if hasattr(model, "can_generate") and model.can_generate() and "past_key_values" not in takes:
        raise UnsupportedLayer(
            f"model: expected one that generates with past_key_values, got {type(model).__name__} without"
        )


def _hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise UnsupportedLayer(f"model: expected config.hidden_size to be an integer, got {size!r}")
    return size


def _checked_mask(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected [B, S] = {list(shape)}, got {got}")
    return mask


def _checked_lengths(lengths: Any, B: int) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.shape != (B,):
        got = f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, Tensor) else repr(lengths)
        raise ValueError(f"prompt_lengths: expected integers [B] = [{B}], got {got}")
    return lengths
