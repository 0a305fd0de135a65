"""What the package never does: run what a file says, unpickle, download, or trust remote code."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("peft_fast", "kernels", "bench", "examples") for path in (ROOT / folder).rglob("*.py")
)
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
FORBIDDEN_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "requests", "urllib", "httpx"}
PICKLE_READERS = {"load", "loads", "Unpickler"}
DOWNLOADS = {"snapshot_download", "hf_hub_download", "load_dataset", "load_state_dict_from_url"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str) -> list[str]:
    """Line and name of what a file must not do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            found += [f"{node.lineno}: {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
        module, _, last = name.rpartition(".")
        unsafe = name in FORBIDDEN_CALLS or last in DOWNLOADS
        unsafe |= module == "pickle" and last in PICKLE_READERS
        unsafe |= module == "yaml" and last != "safe_load" and "load" in last
        for keyword, wanted in (
            ("weights_only", True),
            ("allow_pickle", False),
            ("trust_remote_code", False),
        ):
            value = keywords.get(keyword)
            unsafe |= value is not None and not (isinstance(value, ast.Constant) and value.value is wanted)
        unsafe |= name == "torch.load" and "weights_only" not in keywords
        shell = keywords.get("shell")
        unsafe |= isinstance(shell, ast.Constant) and bool(shell.value)
        if unsafe:
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_runs_or_fetches_what_it_reads(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "import shelve",
        "eval(x)",
        "exec(x)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "np.load(f, allow_pickle=True)",
        "A.from_pretrained(x, trust_remote_code=True)",
        "A.from_pretrained(x, trust_remote_code=flag)",
        "huggingface_hub.snapshot_download(x)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "import requests",
    ],
)
def test_the_search_finds(line):
    assert offences(line)


def test_models_are_loaded_from_local_files_alone():
    """Every `from_pretrained` of transformers says so, or is given a folder by a function that does."""
    tree = ast.parse((ROOT / "peft_fast" / "base_models.py").read_text(encoding="utf-8"))
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and dotted(n.func).endswith("from_pretrained")
    ]
    assert calls
    options = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value == "local_files_only"]
    named = [c for c in calls if any(k.arg in ("local_files_only", None) for k in c.keywords)]
    assert len(named) == len(calls)
    assert options


def test_the_command_is_offline():
    """Unless told otherwise, no library underneath asks the network."""
    code = (
        "from peft_fast import cli; cli._prepare_libraries(); "
        "import huggingface_hub.constants as c; print(c.HF_HUB_OFFLINE)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "True"


def test_a_resumed_run_unpickles_tensors_alone(tmp_path):
    """transformers reads a checkpoint's optimizer, schedule and random states with `weights_only`."""
    import inspect

    import transformers

    tree = ast.parse(inspect.getsource(transformers.trainer))
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and dotted(n.func) == "torch.load"]
    assert loads
    for load in loads:
        value = {k.arg: k.value for k in load.keywords}.get("weights_only")
        assert isinstance(value, ast.Constant), f"line {load.lineno}"
        assert value.value is True, f"line {load.lineno}"
