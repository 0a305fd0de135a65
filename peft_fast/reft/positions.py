"""Which tokens are edited: the grammar of `positions`, and the rows of [B·S, d] that it selects.

A row of the batch has n prompt tokens, wherever its padding is. Of these the first f and the last l are
edited, each at most n // 2, as in pyreft, so that no token is edited twice. Everything is computed on the
device of the masks, in shapes that follow from theirs alone: nothing waits for a GPU.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

_GRAMMAR = re.compile(
    r"all|f(?P<first>[1-9]\d*)(?:\+l(?P<last>[1-9]\d*))?|l(?P<only_last>[1-9]\d*)", re.ASCII
)

IGNORED_LABEL = -100


class Positions(NamedTuple):
    """`first` and `last` tokens of the prompt, both 0 for all of them."""

    first: int
    last: int

    @property
    def every(self) -> bool:
        return self.first == 0 and self.last == 0

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Reads "f7+l7", "f7", "l7" or "all"; raises ValueError for anything else."""
        match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"positions: expected 'f7+l7', 'f7', 'l7' or 'all', any counts, got {text!r}")
        return cls(int(match["first"] or 0), int(match["last"] or match["only_last"] or 0))


def prompt_mask(
    valid: Tensor | None,
    *,
    prompt_lengths: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor | None:
    """Which tokens belong to the prompt, [B, S] bool; None when every token does.

    Args:
        valid: [B, S], zero for padding; None without any.
        prompt_lengths: [B] integers, how many of a row's valid tokens are its prompt.
        labels: [B, S]; the prompt ends before the first valid token with a label other than −100. A row that
            begins with one counts whole: there, the labels do not mark a prompt.
    """
    valid = None if valid is None else valid != 0
    if prompt_lengths is not None:
        assert valid is not None
        return valid & (valid.cumsum(1) <= prompt_lengths.unsqueeze(1))
    if labels is None:
        return valid
    labelled = labels != IGNORED_LABEL
    if valid is None:
        valid = torch.ones_like(labelled)
    prompt = valid & ((labelled & valid).cumsum(1) == 0)
    return torch.where(prompt.any(1, keepdim=True), prompt, valid)


def columns(prompt: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """The columns of the selected tokens, ([B, first], [B, last]) int64, −1 where a prompt is too short.

    For `positions` that are not all; prompt [B, S] bool.
    """
    counts = prompt.cumsum(1)  # [B, S], the k-th prompt token is where it becomes k
    n = prompt.sum(1, keepdim=True)  # [B, 1]
    half = n // 2
    i_first = torch.arange(positions.first, device=prompt.device)
    i_last = torch.arange(positions.last, device=prompt.device) - positions.last  # −1 is the last one
    k_first = (1 + i_first).expand(len(n), -1)
    k_last = n + 1 + i_last
    first, last = (torch.searchsorted(counts, k.contiguous()) for k in (k_first, k_last))
    return first.masked_fill(i_first >= half, -1), last.masked_fill(i_last < -half, -1)


def window(columns: Tensor, past: int | Tensor, length: int) -> Tensor:
    """Columns of the whole sequence as those of its part [past, past + length), −1 outside it."""
    shifted = columns - past
    return shifted.masked_fill((shifted < 0) | (shifted >= length) | (columns < 0), -1)


def flat_rows(columns: Tensor, length: int) -> Tensor:
    """Columns [B, m], −1 for none, as rows [B·m] of a flattened [B, length, d], −1 for none."""
    batch = torch.arange(columns.shape[0], device=columns.device).unsqueeze(1)
    return torch.where(columns < 0, -1, batch * length + columns).flatten()


def group_rows(
    positions: Positions,
    groups: tuple[str, ...],
    prompt: Tensor,
    *,
    past: int | Tensor = 0,
    length: int | None = None,
) -> tuple[Tensor, ...]:
    """The rows that each group of edits takes, [B·m] int64 each, −1 for none; see the module docstring.

    Args:
        positions: which tokens of the prompt.
        groups: ("all",), or ("first", "last").
        prompt: [B, T] bool, the prompt's tokens.
        past: columns of the prompt that come before those of the hidden states.
        length: S of the hidden states [B, S, d]; T if None.
    """
    length = prompt.shape[1] if length is None else length
    if positions.every:
        every = torch.arange(prompt.shape[1], device=prompt.device)
        selected: tuple[Tensor, ...] = (torch.where(prompt, every, -1),)
    else:
        selected = columns(prompt, positions)
        if groups == ("all",):
            selected = (torch.cat(selected, 1),)
    return tuple(flat_rows(window(c, past, length), length) for c in selected)
