"""What a job learns: each task turns its source into tokenized examples for training and evaluation.

* `docstring-swap`: have two adjacent words of this sentence been swapped? The sentences are those in the
  docstrings of the running Python's standard library, read as source (nothing is imported), so the data set
  is the same at every run on one Python version and needs no download.
* `classification`: texts and labels from a .csv or .jsonl file.
* `causal-lm`: the next token, on blocks of a text file.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .config import TrainConfig

Features = dict[str, list[int] | int]

TRAIN_SENTENCES, EVAL_SENTENCES = 8000, 640
EVAL_SHARE = 0.1
SENTENCE_WORDS = range(6, 23)
# Not on every installation, or gone in newer versions of Python: without them the data sets differ less.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "distutils",
}


class Example(NamedTuple):
    text: str
    label: int


class Task(NamedTuple):
    """Tokenized examples: `input_ids`, `attention_mask`, `labels`; no `label_names` for a language model."""

    train: list[Features]
    eval: list[Features]
    label_names: list[str] | None


def build(config: TrainConfig, tokenizer: Any) -> Task:
    """The examples of the task that `config` names, tokenized.

    Raises:
        ValueError: a data file is missing, malformed or too small; the message names the option.
    """
    if config.task == "causal-lm":
        return _causal_lm(config, tokenizer)
    if config.task == "classification":
        train, held_out, names = _labelled_files(config)
    else:
        (train, held_out), names = docstring_swap(), ["as written", "swapped"]
    return Task(
        _tokenize(train, tokenizer, config.max_length),
        _tokenize(held_out, tokenizer, config.max_length),
        names,
    )


def digests(config: TrainConfig) -> dict[str, str]:
    """The SHA-256 of the text of each data file, by the option that names the file.

    Raises:
        ValueError: a file cannot be read; the message names the option.
    """
    given = {name: getattr(config, name) for name in ("data", "eval_data")}
    texts = {name: _read(name, path) for name, path in given.items() if path is not None}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def check_digests(config: TrainConfig, written: Mapping[str, str], run: str) -> None:
    """Raises ValueError where a data file is no longer the one of whose text a run wrote down the SHA-256."""
    for name, digest in digests(config).items():
        if digest != written.get(name):
            raise ValueError(
                f"{name}: expected {getattr(config, name)!r} with the text that {run} was given, of the "
                f"SHA-256 {written.get(name)}, got {digest}: the file has changed"
            )


def _tokenize(examples: list[Example], tokenizer: Any, max_length: int) -> list[Features]:
    encoded = tokenizer([e.text for e in examples], truncation=True, max_length=max_length)
    keys = [k for k in ("input_ids", "attention_mask") if k in encoded]
    return [
        {**{k: encoded[k][i] for k in keys}, "labels": example.label} for i, example in enumerate(examples)
    ]


# ---------------------------------------------------------------------------------------- docstring-swap


def docstring_swap() -> tuple[list[Example], list[Example]]:
    """(train, eval) of the swap task: each sentence once, as written (0) or with two words swapped (1).

    The order, the split and the swaps follow from hashes of the sentences alone. No evaluation sentence
    shares its words, in whatever order, with a training sentence, nor all but one of them; letter case,
    digits and punctuation do not count.
    """
    train: list[str] = []
    held_out: list[str] = []
    for fingerprint, sentence in sorted(_unique_sentences().items(), key=lambda item: _hash(item[0])):
        split = held_out if _hash(fingerprint) < EVAL_SHARE else train
        split.append(sentence)
    held_out = held_out[:EVAL_SENTENCES]
    taken = {near for sentence in held_out for near in _near(fingerprint_of(sentence))}
    train = [s for s in train if taken.isdisjoint(_near(fingerprint_of(s)))][:TRAIN_SENTENCES]
    return [_example(s) for s in train], [_example(s) for s in held_out]


def fingerprint_of(sentence: str) -> str:
    """The words of a sentence, lower-cased and sorted: equal for every order of its words."""
    return " ".join(sorted(re.findall(r"[a-z]+", sentence.lower())))


def _near(fingerprint: str) -> Iterator[str]:
    """A fingerprint and each one with a word less: two sentences a word apart have one in common."""
    words = fingerprint.split(" ")
    yield fingerprint
    for i in range(len(words)):
        yield " ".join(words[:i] + words[i + 1 :])


def _hash(text: str) -> float:
    """Uniform in [0, 1), the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _example(sentence: str) -> Example:
    rng = random.Random(fingerprint_of(sentence))
    label = rng.randrange(2)
    return Example(swap_adjacent(sentence, rng) if label else sentence, label)


def swap_adjacent(sentence: str, rng: random.Random) -> str:
    """The sentence with two adjacent, different words swapped; both plain, since punctuation would tell."""
    words = sentence.split(" ")
    i = rng.choice(_swappable(words))
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def _swappable(words: list[str]) -> list[int]:
    plain = [re.fullmatch(r"[A-Za-z]+", word) is not None for word in words]
    return [
        i
        for i in range(len(words) - 1)
        if plain[i] and plain[i + 1] and words[i].lower() != words[i + 1].lower()
    ]


def _unique_sentences() -> dict[str, str]:
    """Fingerprint → sentence, the first of each, over the standard library in the order of its paths."""
    sentences: dict[str, str] = {}
    for path in _library_files(Path(sysconfig.get_path("stdlib"))):
        for docstring in _docstrings(path):
            for sentence in _sentences(docstring):
                sentences.setdefault(fingerprint_of(sentence), sentence)
    return sentences


def _library_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template or a file of another Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""


def _sentences(docstring: str) -> Iterator[str]:
    """The prose sentences of a docstring: of a sensible length, mostly plain words, closed by a full stop."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            words = sentence.split(" ")
            if len(words) not in SENTENCE_WORDS or not sentence[0].isupper() or sentence[-1] not in ".!?":
                continue
            plain = sum(re.fullmatch(r"[A-Za-z][a-z]*[,.]?", word) is not None for word in words)
            if plain >= 0.8 * len(words) and _swappable(words):
                yield sentence


# ---------------------------------------------------------------------------------------- classification


def _labelled_files(config: TrainConfig) -> tuple[list[Example], list[Example], list[str]]:
    assert config.data is not None
    rows = _labelled_rows("data", config.data, config)
    if config.eval_data is not None:
        held_out = _labelled_rows("eval_data", config.eval_data, config)
    else:
        # By the hash of the text, so that a repeated text does not fall on both sides.
        held_out = [row for row in rows if _hash(row[0]) < EVAL_SHARE]
        rows = [row for row in rows if _hash(row[0]) >= EVAL_SHARE]
    if not rows or not held_out:
        raise ValueError(
            f"data: expected enough rows to train and to evaluate, got {len(rows)} and {len(held_out)} "
            f"from {config.data!r} (pass --eval-data to split them yourself)"
        )
    names = sorted({label for _, label in rows}, key=lambda name: (not name.isdigit(), name.zfill(20)))
    if len(names) < 2:
        raise ValueError(f"label_column: expected at least two labels in {config.data!r}, got {names}")
    ids = {name: i for i, name in enumerate(names)}
    if unknown := sorted({label for _, label in held_out} - set(ids)):
        raise ValueError(f"eval_data: expected only labels of the training data {names}, got {unknown}")

    def examples(part: list[tuple[str, str]]) -> list[Example]:
        return [Example(text, ids[label]) for text, label in part]

    return examples(rows), examples(held_out), names


def _labelled_rows(argument: str, path: str, config: TrainConfig) -> list[tuple[str, str]]:
    """(text, label) of each row of a .csv (with a header) or .jsonl file."""
    rows = []
    for line, record in _records(argument, path):
        for column in (config.text_column, config.label_column):
            if record.get(column) is None:
                raise ValueError(
                    f"{argument}: expected a column {column!r} in line {line} of {path!r}, "
                    f"got {sorted(map(str, record))}"
                )
        text = record[config.text_column]
        if not isinstance(text, str):
            raise ValueError(f"{config.text_column}: expected text in line {line} of {path!r}, got {text!r}")
        rows.append((text, str(record[config.label_column])))
    return rows


def _records(argument: str, path: str) -> Iterable[tuple[int, dict[str, Any]]]:
    suffix = Path(path).suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{argument}: expected a .csv or .jsonl file, got {path!r}")
    lines = io.StringIO(_read(argument, path))  # ends lines at \n alone: a text may hold other separators
    if suffix == ".csv":
        reader = csv.DictReader(lines)
        try:
            yield from ((reader.line_num, row) for row in reader)
        except csv.Error as error:
            raise ValueError(
                f"{argument}: expected CSV after line {reader.line_num} of {path!r}, got {error}"
            ) from error
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{argument}: expected JSON in line {number} of {path!r}, got {error}"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{argument}: expected an object in line {number} of {path!r}, got {record!r}")
        yield number, record


def _read(argument: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{argument}: expected a readable file, got {path!r} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument}: expected UTF-8 text in {path!r}, got {error}") from error


# --------------------------------------------------------------------------------------------- causal-lm


def _causal_lm(config: TrainConfig, tokenizer: Any) -> Task:
    assert config.data is not None
    size = config.block_size
    if config.eval_data is not None:
        blocks = _blocks("data", config.data, size, tokenizer, least=1)
        held_out = _blocks("eval_data", config.eval_data, size, tokenizer, least=1)
    else:
        blocks = _blocks("data", config.data, size, tokenizer, least=2)
        count = max(1, round(EVAL_SHARE * len(blocks)))  # the end of the text
        blocks, held_out = blocks[:-count], blocks[-count:]
    return Task(blocks, held_out, None)


def _blocks(argument: str, path: str, size: int, tokenizer: Any, *, least: int) -> list[Features]:
    """The text of a file in blocks of `size` tokens, `least` or more; what is left at its end is dropped."""
    ids = tokenizer(_read(argument, path), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < least * size:
        raise ValueError(
            f"{argument}: expected at least {least * size} tokens in {path!r} for {least} blocks of "
            f"{size}, got {len(ids)}"
        )
    starts = range(0, len(ids) - size + 1, size)
    return [
        {"input_ids": ids[i : i + size], "attention_mask": [1] * size, "labels": ids[i : i + size]}
        for i in starts
    ]
