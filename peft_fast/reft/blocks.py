"""The blocks of a model whose output is edited: how they are found, swapped and told what to edit.

No hooks. A block's `__class__` becomes a subclass of its own, of the same name, with the edits in a submodule
`reft`. The model's forward leaves a `Plan` in this thread; the block's `__call__` takes its part of it along
as one more argument of its forward. So a forward that gradient checkpointing runs again in the backward pass
edits the rows of the forward it repeats. Where a linear layer inside the block is what is edited, that one is
swapped too, holds the edits, and reads what the block's forward leaves for it in this thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayer
from ..formats import is_conv1d
from ..orthonormal import OrthonormalRows, orthonormal_rows
from ..swapped import Swapped, check_swappable, subclass
from .edit import LoReFT, is_fsdp_unit
from .linear import check_editable, edited_linear

if TYPE_CHECKING:
    from .model import ReftModel


class BlockInputs(NamedTuple):
    """What one block is to edit, of hidden states [*shape, d]; one entry of rows and bases for each edit."""

    shape: tuple[int, int] | None
    rows: tuple[Tensor | None, ...]
    bases: tuple[Tensor | None, ...]


NO_EDITS = BlockInputs(None, (), ())
"""What a linear layer is told whose model edits nothing in a forward."""

_OUTSIDE = (
    "expected a call by its model's forward, which says what to edit, got one from outside. To checkpoint, "
    "use no wrapper but the model's own activation_checkpointing_enable(), in an older transformers "
    "gradient_checkpointing_enable()"
)


class Plan(NamedTuple):
    """What one forward of a model edits: for each edited block its inputs, or nothing at all."""

    blocks: dict[int, BlockInputs] | None


class Generation(NamedTuple):
    """A call of `generate`: the prompt is the columns below `width`, where the mask [B, ≥ width] is not 0.

    Without a mask there is no padding.
    """

    model: ReftModel
    width: int
    mask: Tensor | None


class _Current(threading.local):
    """What runs in this thread; set at first sight, since a compiled forward is guarded by what is there."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.inputs: BlockInputs | None = None
        self.generation: Generation | None = None


current = _Current()


# ---------------------------------------------------------------------------------------------------- blocks


class ReftBlock(Swapped, nn.Module):
    """Mixin: a block that edits its output, a tensor [B, S, d] or the first element of a tuple.

    Or that has the output of a linear layer in it edited, the submodule `reft_component`; "" is the block.
    """

    reft: nn.ModuleDict
    reft_layer: int
    reft_component: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = current.plan
        if plan is None:
            raise RuntimeError(f"block {self.reft_layer}: {_OUTSIDE}")
        inputs = None if plan.blocks is None else plan.blocks[self.reft_layer]
        return super().__call__(*args, reft_inputs=inputs, **kwargs)

    def forward(self, *args: Any, reft_inputs: BlockInputs | None, **kwargs: Any) -> Any:
        before = current.inputs
        current.inputs = (NO_EDITS if reft_inputs is None else reft_inputs) if self.reft_component else None
        try:
            output = super().forward(*args, **kwargs)
        finally:
            current.inputs = before
        if reft_inputs is None or self.reft_component:
            return output
        if isinstance(output, tuple):
            return (self._edited(output[0], reft_inputs), *output[1:])
        return self._edited(output, reft_inputs)

    def _edited(self, h: Any, inputs: BlockInputs) -> Tensor:
        if not isinstance(h, Tensor):
            raise TypeError(
                f"block {self.reft_layer}: expected it to return a tensor, got {type(h).__name__}"
            )
        _check_tokens(f"block {self.reft_layer}", h, inputs)
        for edit, rows, basis in zip(self.reft.values(), inputs.rows, inputs.bases, strict=True):
            h = edit(h, rows if rows is None else rows.to(h.device), basis=basis)
        return h


class ReftLinear(Swapped, nn.Linear):
    """Mixin: a linear layer in a `ReftBlock` whose output is edited, as `LoReFTLinear` does."""

    reft: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        inputs = current.inputs
        if inputs is None:
            raise RuntimeError(f"component: {_OUTSIDE}")
        if inputs is NO_EDITS:
            return super().forward(x)
        _check_tokens("component", x, inputs)
        y: Tensor | None = None
        edits: Any = self.reft.values()
        for edit, rows, basis in zip(edits, inputs.rows, inputs.bases, strict=True):
            rows = rows if rows is None else rows.to(x.device)
            y = edited_linear(self, edit, x, rows, basis) if y is None else edit(y, rows, basis=basis)
        assert y is not None
        return y


def _check_tokens(where: str, h: Tensor, inputs: BlockInputs) -> None:
    if inputs.shape is not None and h.shape[:-1] != inputs.shape:
        expected = f"[*{list(inputs.shape)}, d], as the tokens are"
        raise ValueError(f"{where}: expected hidden states {expected}, got {list(h.shape)}")


@functools.cache
def block_class(stock: Any) -> type:
    return subclass(ReftBlock, block_class, stock)


@functools.cache
def linear_class(stock: Any) -> type:
    return subclass(ReftLinear, linear_class, stock)


def find_component(block: nn.Module, name: str) -> tuple[str, nn.Linear]:
    """The one linear layer in a block whose path ends with `name`, and that path.

    Raises:
        UnsupportedLayer: there is none, or several, or it cannot be edited; the message names `component`.
    """
    found = [
        (path, module)
        for path, module in block.named_modules()
        if f".{path}".endswith(f".{name}") and _is_linear(module)
    ]
    if len(found) != 1:
        linears = [path for path, module in block.named_modules() if _is_linear(module)]
        raise UnsupportedLayer(
            f"component: expected the end of one path of {linears}, got {name!r}, of {len(found)}"
        )
    path, linear = found[0]
    check_swappable("component", linear)
    check_editable(linear)
    return path, linear


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def holder(block: Any) -> Any:
    """The module with the edits of a swapped block: itself, or the linear layer whose output is edited."""
    return block.get_submodule(block.reft_component)


def attach(block: nn.Module, layer: int, edits: dict[str, LoReFT], component: str = "") -> None:
    """Swaps the class of a block in place, and of its `component`, and gives it its edits, by group."""
    swapped: Any = block
    swapped.reft_layer, swapped.reft_component = layer, component
    held = holder(block)
    held.reft = nn.ModuleDict(edits).train(block.training)
    if component:
        held.__class__ = linear_class(held.__class__)
    swapped.__class__ = block_class(swapped.__class__)


def detach(block: Any) -> None:
    """Undoes `attach`."""
    held = holder(block)
    del held.reft
    for module in {held, block}:
        module.__class__ = type(module)._stock
    del block.reft_layer, block.reft_component


def find_blocks(model: nn.Module, path: str | None) -> str:
    """The dotted path of the list of blocks: `path` if given, else the list that is most of the model.

    Raises:
        UnsupportedLayer: there is no such list, or two of them; the message names `blocks`.
    """
    if path is not None:
        try:
            found = model.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedLayer(f"blocks: expected the path of a module, got {path!r}: {error}") from None
        if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
            raise UnsupportedLayer(
                f"blocks: expected the path of a list of blocks, got {path!r}, a {type(found).__name__}"
            )
        return path
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    if not sizes:
        raise UnsupportedLayer(
            f"blocks: expected the path of the list of blocks, got None, and {type(model).__name__} has no "
            "ModuleList of modules of one class"
        )
    largest = max(sizes, key=lambda name: sizes[name])
    rivals = [name for name in sizes if not f"{name}.".startswith(f"{largest}.")]
    rivals = [name for name in rivals if not f"{largest}.".startswith(f"{name}.")]
    for rival in rivals:
        if 2 * sizes[rival] > sizes[largest]:
            raise UnsupportedLayer(
                f"blocks: expected one of {[largest, rival]}, the model has both, got None"
            )
    return largest


def _sharded_within(block: Any) -> bool:
    modules: list[Any] = [block]
    for name in block.reft_component.split(".") if block.reft_component else ():
        modules.append(modules[-1]._modules[name])
    for edit in modules[-1].reft.values():
        modules += (edit, edit.basis)
    return any(map(is_fsdp_unit, modules))


def batched_bases(
    blocks: dict[int, Any], above: Iterable[nn.Module] = ()
) -> dict[int, tuple[Tensor | None, ...]]:
    """R of every edit of the blocks, those of one shape computed in one batch; `above` are around the blocks.

    None where the basis is a parameter, and where the edit computes R itself: in a checkpointed block, since
    reentrant checkpointing would run backward through the shared batch once for each block, and under FSDP,
    which gathers parameters, and takes their gradients, in the call of a module.
    """
    sharded = any(map(is_fsdp_unit, above))
    batches: dict[tuple[Any, ...], list[tuple[int, int, OrthonormalRows]]] = {}
    bases: dict[int, list[Tensor | None]] = {}
    for layer, block in blocks.items():
        edits = holder(block).reft
        bases[layer] = [None] * len(edits)
        if getattr(block, "gradient_checkpointing", False) and block.training:
            continue
        if sharded or _sharded_within(block):
            continue
        for i, edit in enumerate(edits.values()):
            if isinstance(edit.basis, OrthonormalRows):
                rotation = edit.basis.rotation
                batch = batches.setdefault((rotation.shape, rotation.dtype, rotation.device), [])
                batch.append((layer, i, edit.basis))
    for batch in batches.values():
        tensors = [(basis.rotation, basis.base, basis.base_sign) for _, _, basis in batch]
        computed = orthonormal_rows(*(torch.stack(same) for same in zip(*tensors, strict=True)))
        for (layer, i, _), rows in zip(batch, computed.unbind(), strict=True):
            bases[layer][i] = rows
    return {layer: tuple(rows) for layer, rows in bases.items()}
