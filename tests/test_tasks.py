"""Tasks: the default one has no leaks and is the same in every process; files are read as written."""

import collections
import csv
import json
import os
import random
import subprocess
import sys

import pytest

from peft_fast import tasks
from peft_fast.config import TrainConfig


@pytest.fixture(scope="module")
def swap_task():
    return tasks.docstring_swap()


def test_swap_task_is_large_and_balanced(swap_task):
    train_part, eval_part = swap_task
    assert len(train_part) >= 7000
    assert len(eval_part) >= 600
    for part in swap_task:
        assert 0.45 < sum(e.label for e in part) / len(part) < 0.55


def test_no_sentence_leaks_into_the_evaluation(swap_task):
    """Neither the words of a sentence in any order, nor all but one of them, are on both sides."""
    train_part, eval_part = swap_task

    def words(example):
        return "".join(c if c.isascii() and c.isalpha() else " " for c in example.text.lower()).split()

    def bag(of_words):
        return frozenset(collections.Counter(of_words).items())

    def bags(example):
        all_words = words(example)
        return {bag(all_words), *(bag(all_words[:i] + all_words[i + 1 :]) for i in range(len(all_words)))}

    assert len({bag(words(e)) for e in train_part}) == len(train_part), "a training sentence comes twice"
    of_train = set().union(*map(bags, train_part))
    leaked = [e.text for e in eval_part if not of_train.isdisjoint(bags(e))]
    assert not leaked


def test_labels_are_true(swap_task):
    """A sentence labelled 0 is in the standard library as it stands, one labelled 1 is not."""
    as_written = set(tasks._unique_sentences().values())
    for example in (*swap_task[0], *swap_task[1]):
        assert (example.text not in as_written) == bool(example.label), example.text


def test_near_sentences_are_recognized():
    base = tasks.fingerprint_of("Return the 2 names of the file.")

    def is_near(sentence):
        return not set(tasks._near(base)).isdisjoint(tasks._near(tasks.fingerprint_of(sentence)))

    assert is_near("return the THREE of names the file")
    assert is_near("The names of the file.")
    assert not is_near("Close the 2 names of a socket.")


def test_swap_task_is_the_same_in_another_process(swap_task):
    code = "from peft_fast import tasks; print(tasks.docstring_swap())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == str(swap_task)


def test_swap_changes_one_adjacent_pair_of_plain_words():
    sentence = "The a, the a the (first) of Two words."
    for seed in range(50):
        before, after = sentence.split(" "), tasks.swap_adjacent(sentence, random.Random(seed)).split(" ")
        changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        i = changed[0]
        assert changed == [i, i + 1]
        assert (after[i], after[i + 1]) == (before[i + 1], before[i])
        assert before[i].isalpha()
        assert before[i + 1].isalpha()


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_texts_may_hold_line_separators(tmp_path, suffix):
    texts = ["two\nlines", "a\u2028separator", 'a\x0btab, quoted "so"']
    path = tmp_path / f"rows.{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix == "csv":
            csv.writer(file).writerows([("text", "label"), *((text, "1") for text in texts)])
        else:
            file.writelines(json.dumps({"text": t, "label": 1}, ensure_ascii=False) + "\n" for t in texts)
    config = TrainConfig(task="classification", data=str(path))
    assert tasks._labelled_rows("data", str(path), config) == [(text, "1") for text in texts]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "text,label\nfirst,1\n" + "x" * 200_000 + ",0\n",
            r"data: expected CSV after line 2 of .*a\.csv",
        ),
        ("a.jsonl", "[" * 200_000, r"data: expected JSON in line 1 of .*a\.jsonl"),
        ("a.jsonl", "1" * 5000, r"data: expected JSON in line 1 of .*a\.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(tasks._records("data", str(path)))
