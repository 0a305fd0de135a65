"""pyreft's checkpoints: edits read from them, and written as them (pyreft 0.1.0, pyvene 0.1.8).

A folder holds `config.json`, which lists the interventions, and a file `intkey_<key>.bin` for each:

    layer_<i>_comp_block_output_unit_pos_nunit_1#0    of block i, at all positions or the first ones
    layer_<i>_comp_block_output_unit_pos_nunit_1#1    at the last ones, where those have weights of their own

Neither names positions, activation or dropout, nor stores what they were. A LoReFT checkpoint holds R itself,
so training goes on from it in another parametrization; its state is that of pyreft in every other respect.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedWeight
from ..files import replace_file
from ..orthonormal import OrthonormalRows, dense_base
from .config import BLOCK_OUTPUT, VARIANTS, LoReFTConfig
from .edit import LoReFT
from .files import build

if TYPE_CHECKING:
    from .model import ReftModel

_MODULE = "pyreft.interventions"
_COMPONENT = re.compile(r"block_output|(?:.+\.)?\w+\[(\d+)\]\.output")
# Of pyvene's RepresentationConfig: layer, component, unit, max_number_of_units, low_rank_dimension, then
# nine that pyreft leaves empty, among them the link to another intervention's weights.
_FIELDS, _LINK = 14, 9


def export_pyreft(model: ReftModel, directory: str | Path) -> None:
    """Writes the edits of `model` as pyreft's `ReftModel.save` does: its files, keys, shapes and our dtypes.

    pyreft can load them for the models whose block_output it knows (Llama, Mistral, Gemma, Qwen2, GPT-2 …).
    It loads V and b in bfloat16, without activation or dropout, and NoReFT and NodiReFT not at all.

    Raises:
        ValueError: the edits are of another component than the output of blocks.
    """
    directory = Path(directory)
    config, targets = model.reft_config, model.reft_targets
    if config.component != BLOCK_OUTPUT:
        raise ValueError(f"model: expected edits of {BLOCK_OUTPUT!r}, got of {config.component!r}")
    directory.mkdir(parents=True, exist_ok=True)
    places = [(i, k, group) for k, group in enumerate(targets.groups) for i in targets.layers]
    keys = [f"layer_{i}_comp_block_output_unit_pos_nunit_1#{k}" for i, k, _ in places]
    edits = model.edits
    for key, (i, _, group) in zip(keys, places, strict=True):
        state = {name: t.detach().cpu().contiguous() for name, t in _state(edits[f"{i}.{group}"]).items()}
        replace_file(directory / f"intkey_{key}.bin", _saver(state))
    hidden_size = next(iter(edits.values())).hidden_size
    described = {
        "intervention_constant_sources": [True] * len(keys),
        "intervention_dimensions": [hidden_size] * len(keys),
        "intervention_types": [f"<class '{_MODULE}.{_class_name(config.variant)}'>"] * len(keys),
        "mode": "parallel",
        "representations": [
            [i, "block_output", "pos", 1, config.r, *[None] * (_FIELDS - 5)] for i, _, _ in places
        ],
        "sorted_keys": keys,
    }
    text = json.dumps(described, indent=2) + "\n"
    replace_file(directory / "config.json", lambda part: part.write_text(text, encoding="utf-8"))


def import_pyreft(
    base_model: nn.Module,
    directory: str | Path,
    *,
    positions: str,
    act_fn: str | None = None,
    dropout: float = 0.0,
    dropout_on: str = "state",
    blocks: str | None = None,
    backend: str = "auto",
) -> ReftModel:
    """`base_model` with the edits that pyreft saved in `directory`, in the dtypes they have there.

    Args:
        base_model: as for `get_reft_model`.
        directory: what `pyreft.ReftModel.save` wrote.
        positions, act_fn, dropout: what the model was trained with, which pyreft does not save.
        dropout_on, blocks, backend: as in `LoReFTConfig`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError, TypeError: a file does not fit or R is not orthonormal; the message names file and tensor,
            and the model is left as it was.
        UnsupportedWeight: the interventions are other than `LoReFTConfig` can describe, likewise.
    """
    directory = Path(directory)
    places, variant, r = _described(directory / "config.json")
    groups = sorted({k for _, k in places.values()})
    layers = sorted({i for i, _ in places.values()})
    if groups not in ([0], [0, 1]) or len(places) != len(layers) * len(groups):
        raise UnsupportedWeight(
            f"{directory / 'config.json'}: representations: expected one intervention in each block, or two, "
            f"got {sorted(places)}"
        )
    config = LoReFTConfig(
        r=r, layers=layers, positions=positions, share_weights=groups == [0], act_fn=act_fn, dropout=dropout,
        dropout_on=dropout_on, variant=variant, blocks=blocks, backend=backend,
    )  # fmt: skip
    if len(config.groups) != len(groups):
        raise ValueError(
            f"positions: expected first and last ones, for weights of their own, got {positions!r}"
        )
    files = {place: directory / f"intkey_{key}.bin" for key, place in places.items()}
    states = {place: _read(file) for place, file in files.items()}

    def fill(model: ReftModel) -> None:
        edits = model.edits
        for (i, k), state in states.items():
            _fill(edits[f"{i}.{config.groups[k]}"], state, files[i, k])

    return build(base_model, config, fill)


def _class_name(variant: str) -> str:
    return f"{variant.capitalize()}Intervention"


def _state(edit: LoReFT) -> dict[str, Tensor]:
    """The state dict of pyreft's intervention."""
    if edit.variant == "loreft":
        assert edit.source is not None
        return {"weight": edit.source, "bias": edit.bias, "rotate_layer": edit.rows().mT}
    state = dict.fromkeys(("embed_dim", "interchange_dim"), torch.tensor(edit.hidden_size))
    if isinstance(edit.basis, OrthonormalRows):
        original = edit.basis.rotation.mT.tril(-1)  # the diagonal holds the signs
        original = original - torch.eye(*original.shape, dtype=original.dtype, device=original.device)
        state["rotate_layer.parametrizations.weight.original"] = original
        state["rotate_layer.parametrizations.weight.0.base"] = dense_base(
            edit.basis.base, edit.basis.base_sign
        )
    else:
        state["proj_layer.weight"] = edit.basis
    if edit.source is None:
        return {**state, "learned_source": edit.bias}
    return {**state, "learned_source.weight": edit.source, "learned_source.bias": edit.bias}


def _fill(edit: LoReFT, state: dict[str, Tensor], file: Path) -> None:
    """The inverse of `_state`."""
    expected = _state(edit)
    for name in [*expected, *state]:
        if name not in state or name not in expected:
            count = "a tensor, got none" if name in expected else "no such tensor, got one"
            raise ValueError(f"{file}: {name}: expected {count}")
        got, like = state[name], expected[name]
        if got.shape != like.shape or got.is_floating_point() != like.is_floating_point():
            raise ValueError(
                f"{file}: {name}: expected {like.dtype} {list(like.shape)}, got {got.dtype} {list(got.shape)}"
            )
        if not bool(got.isfinite().all()):
            raise ValueError(f"{file}: {name}: expected finite numbers, got some that are not")
    device = edit.bias.device
    learned = "" if edit.variant == "loreft" else "learned_source."
    if edit.source is not None:
        edit.source = nn.Parameter(state[f"{learned}weight"].to(device))
    edit.bias = nn.Parameter(
        state[f"{learned}bias" if edit.source is not None else "learned_source"].to(device)
    )
    if not VARIANTS[edit.variant].orthonormal:
        edit.basis = nn.Parameter(state["proj_layer.weight"].to(device))
        return
    name = "rotate_layer" if edit.variant == "loreft" else "rotate_layer.parametrizations.weight.original"
    try:
        rows = state[name] if edit.variant == "loreft" else _parametrized(state)
        edit.basis = OrthonormalRows.from_rows(rows.mT.contiguous()).to(device)
    except ValueError as error:
        raise ValueError(f"{file}: {name}: {error}") from None


def _parametrized(state: dict[str, Tensor]) -> Tensor:
    """Rᵀ [d, r] as torch's parametrization has it: base, r reflectors, and the diagonal cut to integers."""
    original = state["rotate_layer.parametrizations.weight.original"]
    base = state["rotate_layer.parametrizations.weight.0.base"].double()
    reflectors = original.double().tril(-1)
    tau = 2.0 / (1.0 + reflectors.square().sum(0))
    rotated = torch.linalg.householder_product(reflectors, tau) * original.diagonal().int()
    return (base @ rotated).to(original.dtype)


def _described(file: Path) -> tuple[dict[str, tuple[int, int]], str, int]:
    """({key: (block, 0 or 1)}, variant, rank) of a config.json."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kinds = set(config["intervention_types"])
        representations = [dict(enumerate(fields)) for fields in config["representations"]]
        keys = list(config["sorted_keys"])
        ranks = {fields[4] for fields in representations}
        described = [
            (fields[0], fields[1], fields[2], fields[3], fields.get(_LINK)) for fields in representations
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected what pyreft saves, got {type(error).__name__}: {error}") from None
    variants = {f"<class '{_MODULE}.{_class_name(name)}'>": name for name in VARIANTS}
    if len(kinds) != 1 or not kinds <= set(variants):
        raise UnsupportedWeight(
            f"{file}: intervention_types: expected one of {list(variants)}, got {sorted(map(str, kinds))}"
        )
    if len(ranks) != 1 or type(next(iter(ranks))) is not int:
        raise UnsupportedWeight(f"{file}: low_rank_dimension: expected one integer for all, got {ranks}")
    if len(keys) != len(described):
        raise ValueError(f"{file}: sorted_keys: expected {len(described)}, got {len(keys)}")
    places: dict[str, tuple[int, int]] = {}
    for key, (layer, component, unit, count, link) in zip(keys, described, strict=True):
        match = _COMPONENT.fullmatch(component)
        if match is None or (unit, count, link) != ("pos", 1, None):
            raise UnsupportedWeight(
                f"{file}: representations: expected outputs of blocks at positions, with their own weights, "
                f"got {component!r}, unit {unit!r}, {count!r} of them, linked to {link!r}"
            )
        block = layer if match[1] is None else int(match[1])
        places[key] = (block, sum(i == block for i, _ in places.values()))
    return places, variants[kinds.pop()], ranks.pop()


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected an intervention of pyreft, got no such file")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file}: expected tensors that torch.save wrote, got {error}") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file}: expected a dict of tensors, got {type(state).__name__}")
    return state


def _saver(state: dict[str, Tensor]) -> Callable[[Path], Any]:
    return lambda part: torch.save(state, part)
