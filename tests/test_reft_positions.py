"""Which tokens `positions` selects, against a loop over tokens, whatever the padding."""

import pytest
import torch
from reft_models import selected

from peft_fast.reft.positions import Positions, columns, flat_rows, group_rows, prompt_mask, window

POSITIONS = ["f2+l2", "f7+l7", "f1+l5", "f5", "l3", "all"]


def groups_of(positions: str, shared: bool) -> tuple[str, ...]:
    return ("first", "last") if "+" in positions and not shared else ("all",)


def rows_by_hand(prompts: list[list[int]], positions: str, group: str, length: int) -> list[list[int]]:
    return [
        [b * length + column for column in selected(prompt, positions, group)]
        for b, prompt in enumerate(prompts)
    ]


def assert_rows(rows: torch.Tensor, expected: list[list[int]], length: int) -> None:
    """`rows` holds exactly the expected ones, in the order of the tokens, and −1 elsewhere."""
    assert rows.dtype == torch.int64
    per_row = rows.view(len(expected), -1).tolist()
    for got, wanted in zip(per_row, expected, strict=True):
        assert [r for r in got if r >= 0] == wanted
        assert set(got) - set(wanted) <= {-1}


@pytest.mark.parametrize(
    ("text", "first", "last"), [("f7+l7", 7, 7), ("f12+l1", 12, 1), ("f5", 5, 0), ("l3", 0, 3), ("all", 0, 0)]
)
def test_the_grammar(text, first, last):
    assert Positions.parse(text) == (first, last)
    assert Positions.parse(text).every == (text == "all")


@pytest.mark.parametrize(
    "text",
    ["", "f", "l", "f0", "f0+l2", "f2+l0", "l2+f2", "f2+f2", "f2 + l2", "f2+l2+l2", "F2", "f-1", "f2+", "+l2",
     "f02", "f2.5", "all ", "ALL", "f²", "f٣", "\nf2", "f2\n", None, 7, ["f2"]],
)  # fmt: skip
def test_anything_else_raises(text):
    with pytest.raises(ValueError, match=r"positions: expected .* got"):
        Positions.parse(text)


def random_masks(batch: int, length: int, kind: str) -> torch.Tensor:
    counts = torch.randint(0, length + 1, (batch, 1))
    column = torch.arange(length)
    if kind == "left":
        return (column >= length - counts).long()
    if kind == "right":
        return (column < counts).long()
    return torch.randint(0, 2, (batch, length))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_rows_equal_those_of_a_loop(positions, kind, shared):
    parsed, groups = Positions.parse(positions), groups_of(positions, shared)
    for length in (1, 2, 3, 5, 13, 40):
        mask = random_masks(7, length, kind)
        prompts = [row.nonzero().flatten().tolist() for row in mask]
        rows = group_rows(parsed, groups, prompt_mask(mask))
        assert len(rows) == len(groups)
        for group, got in zip(groups, rows, strict=True):
            assert_rows(got, rows_by_hand(prompts, positions, group, length), length)


def test_short_prompts_are_edited_once_at_most():
    for n in range(8):
        first, last = columns(torch.ones(1, n, dtype=torch.bool), Positions(7, 7))
        chosen = [c for c in torch.cat((first, last), 1).flatten().tolist() if c >= 0]
        assert chosen == [*range(n // 2), *range(n - n // 2, n)]


def test_the_same_tokens_on_both_sides_of_the_padding():
    lengths = [9, 4, 1, 0, 7]
    left = torch.stack([(torch.arange(9) >= 9 - n) for n in lengths])
    right = torch.stack([(torch.arange(9) < n) for n in lengths])
    offset = 9 - torch.tensor(lengths).unsqueeze(1)
    for a, b in zip(columns(left, Positions(3, 2)), columns(right, Positions(3, 2)), strict=True):
        assert torch.equal(torch.where(a < 0, a, a - offset), b)


def test_prompt_lengths_count_valid_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    prompt = prompt_mask(mask, prompt_lengths=torch.tensor([2, 3, 9, 0]))
    assert [row.nonzero().flatten().tolist() for row in prompt] == [[2, 3], [0, 1, 2], [0, 2, 4, 5], []]


def test_the_prompt_ends_before_the_first_label():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    labels = torch.full_like(mask, -100)
    labels[0, 4:] = 5  # two tokens of prompt
    labels[1, 5] = 5  # a label on padding says nothing
    labels[2, 0] = labels[2, 1] = 5  # begins with a label: whole
    prompt = prompt_mask(mask, labels=labels)
    assert [row.nonzero().flatten().tolist() for row in prompt] == [
        [2, 3], [0, 1, 2, 3], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip
    labels[3, 3] = 0  # 0 is a label
    assert prompt_mask(None, labels=labels)[3].tolist() == [True] * 3 + [False] * 3
    assert prompt_mask(None) is None


def test_prompt_lengths_win_over_labels():
    prompt = prompt_mask(
        torch.ones(1, 4), prompt_lengths=torch.tensor([3]), labels=torch.tensor([[-100, 1, 1, 1]])
    )
    assert prompt.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("positions", POSITIONS)
def test_parts_of_the_sequence_add_up_to_it(positions):
    """Chunks [past, past + S) select the rows of the whole prompt, each in its own coordinates."""
    parsed, length = Positions.parse(positions), 13
    prompt = random_masks(5, length, "left").bool()
    (whole,) = group_rows(parsed, ("all",), prompt)
    found = set()
    for past in range(0, length + 4, 4):
        as_tensor = past if past != 8 else torch.tensor(past)
        (rows,) = group_rows(parsed, ("all",), prompt, past=as_tensor, length=4)
        found |= {(r // 4, r % 4 + past) for r in rows.tolist() if r >= 0}
    assert found == {(r // length, r % length) for r in whole.tolist() if r >= 0}


def test_a_window_keeps_what_is_in_it():
    assert window(torch.tensor([-1, 0, 3, 4, 7, 8]), 4, 4).tolist() == [-1, -1, -1, 0, 3, -1]
    assert flat_rows(torch.tensor([[1, -1], [0, 2]]), 5).tolist() == [1, -1, 5, 7]


@pytest.mark.parametrize("positions", POSITIONS)
def test_nothing_waits_for_the_device(positions):
    """On the meta device reading a value raises; the shapes follow from those of the masks alone."""
    mask = torch.ones(3, 11, device="meta")
    prompt = prompt_mask(mask, prompt_lengths=torch.ones(3, dtype=torch.int64, device="meta"))
    prompt = prompt_mask(prompt, labels=torch.ones(3, 11, dtype=torch.int64, device="meta"))
    parsed = Positions.parse(positions)
    (rows,) = group_rows(parsed, ("all",), prompt, past=torch.tensor(0, device="meta"))
    assert rows.shape == (3 * (parsed.first + parsed.last or 11),)
