"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
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
