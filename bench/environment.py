"""Makes a machine's own Python ready for the benchmarks, and says what is there.

    python bench/environment.py install --out DIR     build the C++ extension, make peft_fast importable
    python bench/environment.py self-test --out DIR   what is here, each automatic backend against fp64

Nothing that is there is installed again, and nothing is downloaded: the build runs without isolation and
without dependencies. bitsandbytes comes from $BITSANDBYTES_WHEEL or from `wheels/`, if it is missing. Where
pip cannot install the package (no pip, no compiler, an environment it may not touch), DIR/path is made, which
on PYTHONPATH has all but the C++ kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("bitsandbytes", "peft", "accelerate", "transformers", "pytest", "matplotlib", "rich", "typer",
            "unsloth", "liger_kernel", "torchao", "pyreft", "pyvene")  # fmt: skip


def write(path: Path, text: str) -> None:
    """The whole file or, if the process is ended on the way, the one that was there."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


@contextlib.contextmanager
def child(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which ends with the block: asked first, so that pytest reports."""
    # A group, not a session: whoever ends this session ends the children too.
    process = subprocess.Popen(command, preexec_fn=os.setpgrp, **options)  # noqa: PLW1509, one thread
    try:
        yield process
    finally:
        for ending in (signal.SIGINT, signal.SIGTERM):
            if process.poll() is not None:
                break
            os.killpg(process.pid, ending)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):  # what it left behind
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def installed(package: str) -> bool:
    """Whether a package is there, which is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # an importer may refuse
        return False


def built() -> bool:
    """Whether a new interpreter imports peft_fast from here, with an extension newer than its sources."""
    script = (
        "import peft_fast.bench, peft_fast.native as n, peft_fast.triton_kernels\n"
        "assert n.levels()\nprint(n.__file__)"
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        got = subprocess.run(
            [sys.executable, "-c", script], cwd=elsewhere, capture_output=True, text=True, check=False
        )
    package = ROOT / "peft_fast"
    if got.returncode or Path(got.stdout.strip()).resolve().parent != package:
        return False
    extensions = [path.stat().st_mtime for path in package.glob("_C*.so")]
    return bool(extensions) and max(extensions) > max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.*"))


def pip(*options: str, seconds: float) -> bool:
    """Whether `pip install` with these options succeeded in time; its output is printed."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *options]
    print(" ".join(command), flush=True)
    with child(command) as process:
        try:
            return process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            print(f"not done after {seconds:.0f} s", flush=True)
            return False


def link(folder: Path) -> None:
    """A folder for PYTHONPATH with the package as it is when installed, made of links."""
    package = folder / "peft_fast"
    package.mkdir(parents=True, exist_ok=True)
    sources = [*(ROOT / "peft_fast").iterdir(), ROOT / "kernels" / "triton_kernels", ROOT / "bench"]
    for source in sources:
        target = package / source.name
        if not target.is_symlink():
            target.symlink_to(source)


def install(out: Path, seconds: float) -> int:
    """The exit code: 0, since what stands in for a failed build is enough to go on."""
    if built():
        print("peft_fast: installed from here, its extension is up to date")
    elif not pip("--no-build-isolation", "--editable", str(ROOT), seconds=seconds):
        link(out / "path")
        print(f"peft_fast: pip could not install it; {out / 'path'} stands in, without the C++ kernels")
    if not installed("bitsandbytes"):
        named = os.environ.get("BITSANDBYTES_WHEEL")
        wheels = [Path(named)] if named else sorted((ROOT / "wheels").glob("bitsandbytes-*.whl"))
        if wheels:
            pip("--no-index", str(wheels[-1]), seconds=seconds)
    return 0


def self_test(out: Path, seconds: float) -> int:
    """Prints packages, devices and failures, and writes them to DIR/info.json; the exit code.

    Backends that run only when they are named are left to bench/sanity.py: there are many, and a GPU's have
    to be compiled for each dtype and format.
    """
    from peft_fast import backends, info

    path, report = out / "info.json", info.report()
    write(path, json.dumps(report, indent=1))
    for package, version in report["versions"].items():
        print(f"{package} {version or 'not installed'}")
    for package in OPTIONAL:
        if not installed(package):
            print(f"{package}: not installed")
    for device, description in report["devices"].items():
        print(f"{device}: {description}")
    usual = [case for case in info.cases() if backends.BACKENDS[case.backend].automatic]
    cases, failed = [case for case in usual if case.reason is None], []
    for case in cases:
        outcome = info._run(case)
        if outcome.failure is not None:
            failed.append({**outcome._asdict(), "case": case._asdict()})
            print(f"failed {' '.join(case[:-1])}: {outcome.failure}", flush=True)
    write(path, json.dumps({**report, "self_test": {"ran": len(cases), "failed": failed}}, indent=1))
    print(f"self-test: {len(cases) - len(failed)} of {len(cases)} cases passed")
    return 1 if failed else 0


STEPS = {"install": install, "self-test": self_test}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=600, help="for each call of pip (default: 600)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return STEPS[args.step](args.out, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
