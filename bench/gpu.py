"""The acceptance run on a GPU machine, with the Python and the torch that it has: `make gpu OUT=DIR`.

Sections run one after the other, each in processes of its own, within `--minutes` together: what is left is
divided by the sections' shares, so one that ends early leaves its time to the others; one that would start
with too little is not started. What a section prints goes to DIR/<section>.log; of one that did not pass the
end is shown. A section that ended leaves DIR/<section>.done, a JSON object with its return code, commands,
date and versions: a later run does not repeat those that passed, unless told so with --redo. A section whose
packages are missing is skipped, and a peer that is missing is left out of a table; a line says so.

    install      builds the extension                          environment.py
    self_test    every backend on small problems               environment.py, DIR/info.json
    tests        every test that concerns the GPU              pytest, DIR/tests.xml
    sanitizer    the CUDA kernels under memcheck and racecheck compute-sanitizer
    sanity       each strategy at a real shape, against fp64   sanity.py, DIR/sanity.json
    writers      times what decodes to a scratch               writers.py, DIR/writers.csv
    tune         times the strategies, each is used at once    tune.py, DIR/strategies.json
    lora_linear  against frozen dense and peers; memory        lora_linear.py, DIR/lora_linear.csv
    end_to_end   a training step of a Llama-shaped model       end_to_end.py, DIR/end_to_end.csv
    loreft       LoReFT over the frozen model                  loreft.py, DIR/loreft.csv
    dora_norm    DoRA's norm, on the CPU                       dora_norm.py, DIR/dora_norm.csv
    roofline     what the traffic model predicts, beside it    roofline.py, DIR/predicted_*.csv
    report       DIR/report.md, DIR/ratio.png                  report.py, always, and last

    python bench/gpu.py --out DIR
    python bench/gpu.py --out DIR --sections sanity lora_linear --redo
    python bench/gpu.py --out DIR --device cpu --quick      the same code on tiny shapes, without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if __package__:
    from peft_fast.bench.environment import ROOT, child, installed, write
else:  # before peft_fast is installed
    from environment import ROOT, child, installed, write

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "liger_kernel")
TESTS = (
    "test_strategies", "test_tune", "test_triton_strategies", "test_dequantize", "test_triton", "test_ops",
    "test_formats", "test_out_scale", "test_triton_loreft", "test_loreft", "test_dora", "test_modules",
    "test_cuda",
)  # fmt: skip
# Those that run without bitsandbytes, on which the fixtures that others share depend.
ALONE = ("test_strategies", "test_tune", "test_roofline")
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
TINY = ("--shape", 64, 64, "--rank", 4)
REPORT_SECONDS = 20.0
TAIL = 60
Commands = list[list[str]]


class Plan(NamedTuple):
    """What is run: results go to `out`; `quick` takes tiny shapes."""

    out: Path
    device: str
    quick: bool

    def script(self, name: str, *options: object) -> list[str]:
        return [sys.executable, str(ROOT / "bench" / name), *map(str, options)]

    def sound(self, dtype: str) -> list[str] | None:
        """The backends that `sanity` found right; None where it did not run."""
        path = self.out / "sanity.json"
        return json.loads(path.read_text())["sound"].get(dtype, []) if path.exists() else None


# -------------------------------------------------------------------------------------------------- sections


def install(plan: Plan, seconds: float) -> Commands:
    return [plan.script("environment.py", "install", "--out", plan.out, "--seconds", f"{0.9 * seconds:.0f}")]


def self_test(plan: Plan, seconds: float) -> Commands:
    return [plan.script("environment.py", "self-test", "--out", plan.out)]


def tests(plan: Plan, seconds: float) -> Commands:
    """In several processes where pytest-xdist is installed: most of the time goes to compiling kernels."""
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
    names = ("test_strategies",) if plan.quick else TESTS
    if not installed("bitsandbytes"):
        names = ALONE
        options.append("--noconftest")
    files = [str(ROOT / "tests" / f"{name}.py") for name in names]
    if installed("xdist") and not plan.quick:
        options += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    return [[sys.executable, "-m", "pytest", *options, f"--junitxml={plan.out / 'tests.xml'}", *files]]


def sanitizer(plan: Plan, seconds: float) -> Commands:
    """Each tool on a few of the tests; nothing where there is no GPU."""
    selection = ("-k", "not emulated and dtype2 and (every_result or dequantize or update)")
    tests = (
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *selection,
        ROOT / "tests" / "test_cuda.py",
    )
    if plan.device == "cpu" or not (tool := compute_sanitizer()):
        return [[sys.executable, "-c", "print('compute-sanitizer: it or a GPU is not here')"]]
    return [
        [tool, "--tool", name, "--error-exitcode", "1", "--target-processes", "all",
         sys.executable, *map(str, tests)]
        for name in ("memcheck", "racecheck")
    ]  # fmt: skip


def compute_sanitizer() -> str | None:
    toolkit = f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)


def sanity(plan: Plan, seconds: float) -> Commands:
    tiny = (*TINY, "--rows", 5, "--dtype", "float32")
    options = tiny if plan.quick else ("--rows", 4096, 16, 512, 1)
    shared = ("--device", plan.device, "--seconds", 0.85 * seconds, "--json", plan.out / "sanity.json")
    return [plan.script("sanity.py", *shared, *options)]


def writers(plan: Plan, seconds: float) -> Commands:
    tiny = ("--shape", 64, 64, "--rank", 0, 4, "--seconds", 0, "--dtype", "float32")
    options = tiny if plan.quick else ("--seconds", seconds / 20)
    return [plan.script("writers.py", "--device", plan.device, *options, "--csv", plan.out / "writers.csv")]


def tune(plan: Plan, seconds: float) -> Commands:
    """On a GPU straight to the table that is chosen by; many tokens and few first, for it may be cut."""
    tiny = (*TINY, "--rows", 5, "--case", "packed-half", "--cache-mib", 1, "--per-row", 0)
    options = tiny if plan.quick else ("--per-row", 1, "--rows", 8192, 16, 2048, 1, 512, 64, 128, 4)
    table = ("--copy" if plan.device == "cuda" else "--out", plan.out / "strategies.json")
    return [plan.script("tune.py", "--device", plan.device, "--seconds", 0.8 * seconds, *table, *options)]


def lora_linear(plan: Plan, seconds: float) -> Commands:
    """A process for each shape, so that rows of the first are there whatever becomes of the next."""
    csv = plan.out / "lora_linear.csv"
    shared = ("--device", plan.device, "--csv", csv)
    sound = plan.sound("float32" if plan.quick else "bfloat16")
    # On a GPU "auto" is "triton"; with it, what is known to be wrong is left out from the start.
    automatic = sound is None or "triton" in sound or plan.device == "cpu"
    backends = [*(["auto"] if automatic else []), *(sound or [])]
    peers = ["peft"] if installed("peft") and installed("bitsandbytes") else []
    ours = ("--method", "lora", "dora", *(["--backend", *backends] if backends else []))
    if not backends:
        ours = (*ours, "--providers", "dense", *peers)
    if plan.quick:
        tiny = (*TINY, "--rows", 5, "--dtype", "float32", "--seconds", 0, "--threads", 1, "--no-cold")
        return [plan.script("lora_linear.py", *shared, *ours, *tiny)]
    rows = (1, 16, 128, 512, 2048, 4096, 8192)
    half = ("--dtype", "bfloat16", "--rows", *rows)
    each = ("--seconds", f"{0.4 * seconds / len(SHAPES) / len(rows):.2f}")
    found = [plan.script("lora_linear.py", *shared, *ours, *half, *each, "--shape", *s) for s in SHAPES]
    if installed("unsloth"):
        shapes = (option for shape in SHAPES for option in ("--shape", *shape))
        alone = ("--providers", "dense", "unsloth", "--seconds", 0.3, *shapes)
        found.append(plan.script("lora_linear.py", *shared, *half, *alone))
    return found


def end_to_end(plan: Plan, seconds: float) -> Commands:
    tiny = ("--width", "tiny", "--layers", 1, "--tokens", 24, "--rank", 4, "--seconds", 0)
    real = ("--layers", 4, "--tokens", 2048, "--checkpointing", "off", "on", "--seconds", seconds / 5)
    options = tiny if plan.quick else real
    csv = plan.out / "end_to_end.csv"
    return [plan.script("end_to_end.py", "--device", plan.device, *options, "--csv", csv)]


def loreft(plan: Plan, seconds: float) -> Commands:
    tiny = ("--width", 64, "--blocks", 1, "--batch", 2, "--tokens", 24, "--rank", 4, "--seconds", 0)
    real = ("--width", 4096, "--batch", 8, "--tokens", 512, "--dtype", "bfloat16", "--seconds", seconds / 4)
    options = ("--no-pyreft", *(tiny if plan.quick else real), "--csv", plan.out / "loreft.csv")
    return [plan.script("loreft.py", "--device", plan.device, *options)]


def dora_norm(plan: Plan, seconds: float) -> Commands:
    options = (*TINY, "--seconds", 0) if plan.quick else ("--shape", 4096, 4096, "--seconds", seconds / 4)
    return [plan.script("dora_norm.py", "--threads", 1, *options, "--csv", plan.out / "dora_norm.csv")]


def roofline(plan: Plan, seconds: float) -> Commands:
    csv, info = plan.out / "lora_linear.csv", plan.out / "info.json"
    options: list[object] = ["--rank", 16]
    if plan.device == "cuda" and csv.exists():
        options += ["--measured", csv]
    if plan.device == "cuda" and info.exists():
        name = json.loads(info.read_text())["devices"].get("cuda:0", "no GPU").partition(",")[0]
        options += ["--device", name, "--or-default"]
    return [
        plan.script("roofline.py", *options, *flags, "--csv", plan.out / f"predicted_{method}.csv")
        for method, flags in (("lora", ()), ("dora", ("--dora",)))
    ]


class Section(NamedTuple):
    """Its share of the time in seconds, the least that is worth a start, and the packages it is made of.

    A command may take what is left of the section's time, or with `divided` an even part of that. The files
    in `anew` are deleted first, so that none of an earlier run is taken for this one's.
    """

    commands: Callable[[Plan, float], Commands]
    seconds: float
    least: float
    needs: tuple[str, ...]
    divided: bool = False
    anew: tuple[str, ...] = ()


SECTIONS: dict[str, Section] = {
    "install": Section(install, 100, 1, ("torch",)),
    "self_test": Section(self_test, 40, 10, ("torch",)),
    "tests": Section(tests, 150, 20, ("torch", "pytest"), anew=("tests.xml",)),
    "sanity": Section(sanity, 80, 10, ("torch", "triton"), anew=("sanity.json",)),
    "writers": Section(writers, 12, 5, ("torch", "triton", "bitsandbytes")),
    "tune": Section(tune, 90, 20, ("torch", "triton")),
    "sanitizer": Section(sanitizer, 40, 10, ("torch", "pytest"), divided=True),
    "lora_linear": Section(lora_linear, 180, 20, ("torch",), divided=True),
    "end_to_end": Section(end_to_end, 80, 20, ("torch", "transformers")),
    "loreft": Section(loreft, 25, 10, ("torch", "transformers", "peft", "bitsandbytes")),
    "dora_norm": Section(dora_norm, 15, 5, ("torch", "peft")),
    "roofline": Section(roofline, 10, 2, ("torch", "triton")),
}


# --------------------------------------------------------------------------------------------------- running


class Outcome(NamedTuple):
    """How a section ended: "passed", "failed", "out of time", "skipped" or "not started"; and why."""

    name: str
    status: str
    seconds: float
    detail: str


def versions() -> dict[str, str | None]:
    """Of Python and the packages that matter, without importing any; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def environment(plan: Plan) -> dict[str, str]:
    found = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    found.pop("TRITON_INTERPRET", None)
    if plan.device == "cpu":
        found["TRITON_INTERPRET"] = "1"
    stand_in = plan.out / "path"
    if stand_in.exists():
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(stand_in), found.get("PYTHONPATH"))))
    return found


def run(name: str, plan: Plan, limit: float) -> Outcome:
    """Runs the commands of a section, all of them even if one fails, for at most `limit` seconds."""
    start, codes = time.monotonic(), []
    commands = SECTIONS[name].commands(plan, limit)
    for stale in SECTIONS[name].anew:
        (plan.out / stale).unlink(missing_ok=True)
    log = plan.out / f"{name}.log"
    with log.open("wb") as file:
        for i, command in enumerate(commands):
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            left = limit - (time.monotonic() - start)
            part = left / (len(commands) - i) if SECTIONS[name].divided else left
            output = {"stdout": file, "stderr": subprocess.STDOUT}
            with child(command, cwd=plan.out, env=environment(plan), **output) as process:
                try:
                    codes.append(process.wait(timeout=max(part, 0.1)))
                except subprocess.TimeoutExpired:
                    codes.append(None)
    late, seconds = None in codes, time.monotonic() - start
    code = next((code for code in codes if code), None if late else 0)
    status = "failed" if code else "out of time" if late else "passed"
    content = {
        "section": name, "returncode": code, "out_of_time": late, "seconds": round(seconds, 1),
        "date": datetime.datetime.now().isoformat(timespec="seconds"), "commands": commands,
        "versions": versions(),
    }  # fmt: skip
    write(plan.out / f"{name}.done", json.dumps(content, indent=1))
    tail = log.read_text(errors="replace").splitlines()[-TAIL:]
    if status != "passed":
        print("\n".join(f"  | {line}" for line in tail), flush=True)
    return Outcome(name, status, seconds, tail[-1].strip()[:160] if tail else "")


def earlier(name: str, plan: Plan) -> Outcome | None:
    """The outcome of a section that an earlier run finished; None unless it passed."""
    path = plan.out / f"{name}.done"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if content["returncode"] != 0:
        return None
    return Outcome(name, "passed", content["seconds"], f"on {content['date']}")


def attempt(name: str, plan: Plan, limit: float) -> Outcome:
    section = SECTIONS[name]
    missing = [package for package in section.needs if not installed(package)]
    if missing:
        return Outcome(name, "skipped", 0.0, ", ".join(f"{package}: not installed" for package in missing))
    if limit < section.least:
        return Outcome(name, "not started", 0.0, f"{max(limit, 0):.0f} s were left for it")
    return run(name, plan, limit)


def sees_gpu() -> bool:
    """Whether torch does; missing torch is a section's to tell."""
    script = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return (
        not installed("torch") or subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    )


def report(plan: Plan) -> None:
    with child(plan.script("report.py", "--out", plan.out), cwd=plan.out, env=environment(plan)) as process:
        try:
            process.wait(timeout=REPORT_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"report.py: not done after {REPORT_SECONDS:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="made if it is missing")
    add("--sections", choices=SECTIONS, nargs="+", default=list(SECTIONS), help="default: all")
    add("--minutes", type=float, default=9.0, help="for everything (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--quick", action="store_true", help="tiny shapes, to try the command itself")
    add("--redo", action="store_true", help="repeat sections that passed")
    args = parser.parse_args(argv)
    start = time.monotonic()
    if args.device == "cuda" and not sees_gpu():
        parser.error("--device: expected a GPU that torch sees, got none; `--device cpu --quick` needs none")
    end = start + 60 * args.minutes - REPORT_SECONDS
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    plan = Plan(args.out.resolve(), args.device, args.quick)
    plan.out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{package} {version or 'not installed'}" for package, version in versions().items()))
    outcomes = []
    todo = [name for name in SECTIONS if name in args.sections]
    for name in SECTIONS:
        outcome = None if args.redo and name in todo else earlier(name, plan)
        if outcome is None and name in todo:
            print(f"[{time.monotonic() - start:4.0f} s] {name} ...", flush=True)
            shares = [SECTIONS[later].seconds for later in todo[todo.index(name) :]]
            outcome = attempt(name, plan, (end - time.monotonic()) * shares[0] / sum(shares))
        if outcome is not None:
            outcomes.append(outcome)
            print(
                f"[{time.monotonic() - start:4.0f} s] {name}: {outcome.status}, {outcome.detail}", flush=True
            )
    write(plan.out / "sections.json", json.dumps([outcome._asdict() for outcome in outcomes], indent=1))
    report(plan)
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
