"""The Python examples of the README and of docs/methods.md run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
METHODS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "methods.md").read_text(), re.DOTALL | re.MULTILINE
)
EXAMPLES = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_every_example_is_found():
    titles = [
        "Replace a layer",
        "Accelerate a PEFT model",
        "Convert a model without PEFT",
        "Edit representations",
    ]
    assert [title for title, _ in EXAMPLES] == titles


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_runs(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, title, "exec"), {})


@pytest.mark.parametrize("code", METHODS, ids=["layers", "a model", "a trainer"])
def test_example_of_the_methods_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/methods.md", "exec"), {})
