"""The package itself: a free import, honest messages where a part is missing, and no shadowed names."""

import subprocess
import sys
from pathlib import Path

import torch

import peft_fast
from peft_fast import backends, native

ROOT = Path(__file__).parent.parent


def run(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_heavy():
    out = run(
        "import sys, peft_fast\n"
        "from peft_fast import lora_linear, LoRALinear\n"
        "print(sorted({'bitsandbytes', 'peft', 'transformers', 'triton', 'typer'} & set(sys.modules)))"
    )
    assert out.strip() == "[]"


def test_every_public_name_resolves():
    for name in peft_fast.__all__:
        assert getattr(peft_fast, name).__name__ == name
        assert name in dir(peft_fast)


def test_a_missing_extension_is_said_with_the_command_that_builds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.load_error.cache_clear()
    try:
        reason = backends.availability("lora_linear", "nf4", "cpu", torch.float32)["cpu"]
        assert "not built" in reason
        assert "pip install --no-build-isolation -e ." in reason
        assert backends.resolve("lora_linear", "nf4", "cpu", torch.float32) == "reference"
    finally:
        native.load_error.cache_clear()


def test_the_kernels_folder_does_not_shadow_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    run("from transformers import LlamaForCausalLM", cwd=ROOT)


def test_the_triton_kernels_import_as_a_subpackage():
    assert (
        run("import peft_fast.triton_kernels as t; print(t.__name__)").strip() == "peft_fast.triton_kernels"
    )


def test_a_source_distribution_has_all_that_a_build_and_its_tests_take(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (listed,) = tmp_path.rglob("SOURCES.txt")
    packed = {line.replace("\\", "/") for line in listed.read_text().splitlines()}
    parts = ("bench", "csrc", "docs", "examples", "kernels", "peft_fast", "tests")
    there = {file.relative_to(ROOT) for part in parts for file in (ROOT / part).rglob("*") if file.is_file()}
    made = {file for file in there if "__pycache__" in file.parts or file.suffix in (".pyc", ".so")}
    assert {str(file) for file in there - made} - packed == set()
    assert {str(file) for file in made} & packed == set()
    assert {"Makefile", "constraints.txt", "setup.py", "pyproject.toml"} <= packed
