"""The command line: options and files, errors in one line, and what `info` finds."""

import json
import subprocess
import sys

import pytest
import torch

from peft_fast import backends, cli, config, info, reference


def call(monkeypatch, capsys, *arguments):
    """Runs `peft-fast` in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["peft-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.fixture
def trained(monkeypatch):
    """What `train` was called with; no training happens."""
    from peft_fast import train

    calls = []
    monkeypatch.setattr(train, "train", calls.append)
    return calls


def test_importing_the_command_line_is_light():
    heavy = "torch", "transformers", "peft", "bitsandbytes", "matplotlib"
    code = f"import sys, peft_fast.cli; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_no_options_are_the_defaults(monkeypatch, capsys, trained):
    assert call(monkeypatch, capsys, "train")[0] == 0
    assert trained == [config.TrainConfig()]


def test_flags_win_over_the_file_and_the_file_over_defaults(monkeypatch, capsys, trained, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("lr: 5e-4\nseed: 7\nstock: true\nmax-length: 16\n")
    arguments = ("train", "--config", path, "--seed", 8, "--no-stock", "--method", "dora")
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    assert trained == [config.TrainConfig(lr=5e-4, seed=8, stock=False, max_length=16, method="dora")]


def test_flags_of_loreft(monkeypatch, capsys, trained):
    flags = ("--positions", "f3", "--layers", "0,2", "--component", "down_proj", "--no-share-weights")
    arguments = ("train", "--method", "loreft", *flags, "--init", "identity")
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    options = {"positions": "f3", "layers": "0,2", "component": "down_proj", "init": "identity"}
    assert trained == [config.TrainConfig(method="loreft", share_weights=False, **options)]


def test_flags_of_lora(monkeypatch, capsys, trained):
    flags = ("--lora-plus-ratio", "16", "--rslora", "--init", "pissa", "--r", "4")
    assert call(monkeypatch, capsys, "train", *flags)[0] == 0
    assert trained == [config.TrainConfig(lora_plus_ratio=16, rslora=True, init="pissa", r=4)]


@pytest.fixture
def compared(monkeypatch):
    """What `compare` was called with; nothing is run."""
    from peft_fast import compare

    calls = []
    monkeypatch.setattr(compare, "compare", lambda todo, output: calls.append((todo, output)))
    return calls


def test_compare_makes_a_job_of_every_method_and_seed(monkeypatch, capsys, compared, tmp_path):
    flags = ("--seeds", "3,5", "--steps", "100", "--r", "4", "--output", tmp_path)
    assert call(monkeypatch, capsys, "compare", "--methods", "lora, ssf", *flags)[0] == 0
    todo, output = compared.pop()
    assert output == tmp_path
    assert [(job.method, job.seed, job.r, job.folder.name) for job in todo] == [
        ("lora", 3, 4, "lora-seed3"),
        ("lora", 5, 4, "lora-seed5"),
        ("ssf", 3, None, "ssf-seed3"),
        ("ssf", 5, None, "ssf-seed5"),
    ]
    assert {job.steps for job in todo} == {100}
    assert call(monkeypatch, capsys, "compare")[0] == 0
    todo, _ = compared.pop()
    assert [job.method for job in todo] == [m for m in config.METHODS for _ in range(3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds", "1,x"), "seeds: expected numbers with commas, as in 0,1,2, got '1,x'"),
        (("--seeds", "1,1"), "seeds: expected different ones, at least one, got [1, 1]"),
        (("--methods", "lora,galore"), "method: expected one of lora, "),
        (("--methods", "ssf,ia3", "--r", "4"), "r: expected an option of one of ['ssf', 'ia3'], got one of"),
    ],
)
def test_what_cannot_be_compared_is_named(monkeypatch, capsys, compared, flags, message):
    code, _, err = call(monkeypatch, capsys, "compare", *flags)
    assert (code, compared) == (2, [])
    assert message in err


def test_every_option_is_a_flag_with_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(monkeypatch, capsys, "train", "--help")
    assert code == 0
    for name, field in config.OPTIONS.items():
        assert "--" + name.replace("_", "-") in out
        assert field.metadata["help"].split(";")[0].split(",")[0][:30] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--r", "0"), "peft-fast: r: expected at least 1 and at most 65536, got 0\n"),
        (("--method", "galore"), "peft-fast: method: expected one of lora, dora, loreft, adapter-parallel, "),
        (("--positions", "all"), "peft-fast: positions: expected none for method 'lora', got 'all'\n"),
        (
            ("--quant", "int3"),
            "peft-fast: quant: expected one of nf4, fp4, int8, fp8, mxfp4, none, got 'int3'\n",
        ),
        (
            ("--config", "no-such.yaml"),
            "peft-fast: config: expected a readable YAML file, got 'no-such.yaml' (No such",
        ),
        (("--resume", "--output", "no-such-run"), "peft-fast: resume: expected a run in 'no-such-run'"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    code, out, err = call(monkeypatch, capsys, "train", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"), [(("--steps", "many"), "--steps"), (("--no-such-flag",), "No such option")]
)
def test_flags_that_do_not_parse_exit_with_2(monkeypatch, capsys, arguments, message):
    code, _, err = call(monkeypatch, capsys, "train", *arguments)
    assert code == 2
    assert message in err


def test_unknown_yaml_key_is_named(monkeypatch, capsys, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("rank: 8\n")
    code, _, err = call(monkeypatch, capsys, "train", "--config", path)
    assert code == 2
    assert "got ['rank']" in err


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, trained):
    from peft_fast import train

    def broken(_):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "train", broken)
    monkeypatch.setattr(sys, "argv", ["peft-fast", "train"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_info_as_json(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["torch"] == torch.__version__ or found["versions"]["torch"] in torch.__version__
    assert "cpu" in found["devices"]
    assert "self_test" not in found
    keys = ("op", "backend", "device", "format", "dtype")
    rows = {tuple(r[key] for key in keys): r["reason"] for r in found["backends"]}
    assert rows["lora_linear", "reference", "cpu", "nf4", "bfloat16"] is None
    assert {r["backend"] for r in found["backends"]} == set(backends.BACKENDS)
    for (op, backend, device, format, dtype), reason in rows.items():
        assert reason == backends.availability(op, format, device, getattr(torch, dtype))[backend]


def test_info_says_why_a_backend_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    row = backends.BACKENDS["cpu"]._replace(unavailable=lambda *_: "the moon is full")
    monkeypatch.setitem(backends.BACKENDS, "cpu", row)
    code, out, _ = call(monkeypatch, capsys, "info")
    assert code == 0
    assert "the moon is full" in out


def test_self_test_checks_every_available_case(monkeypatch, capsys):
    """Of the slow interpreter float32 alone."""
    some = [
        case
        for case in info.cases()
        if not case.backend.startswith("triton") or case.device == "cuda" or case.dtype == "float32"
    ]
    monkeypatch.setattr(info, "cases", lambda: some)
    code, out, _ = call(monkeypatch, capsys, "info", "--self-test", "--json")
    found = json.loads(out)
    available = [row for row in found["backends"] if row["reason"] is None]
    assert code == 0
    assert [o["case"] for o in found["self_test"]] == available
    assert all(0 < o["error"] <= o["allowed"] < 0.05 for o in found["self_test"])


@pytest.mark.parametrize("part", ["forward", "dX", "raises", "nan"])
def test_self_test_finds_a_broken_backend(monkeypatch, capsys, part):
    monkeypatch.setattr(backends, "BACKENDS", {"reference": backends.BACKENDS["reference"]})
    forward, backward = reference.lora_linear, reference.lora_linear_backward

    def wrong_forward(*args):
        if part == "raises":
            raise RuntimeError("it broke")
        y, z = forward(*args)
        return y * (float("nan") if part == "nan" else 1.05), z

    def wrong_backward(*args):
        gradients = backward(*args)
        return gradients._replace(x=gradients.x * 1.05)

    if part == "dX":
        monkeypatch.setattr(reference, "lora_linear_backward", wrong_backward)
    else:
        monkeypatch.setattr(reference, "lora_linear", wrong_forward)
    code, out, _ = call(monkeypatch, capsys, "info", "--self-test")
    expected = {
        "forward": "Y is off by",
        "dX": "dX is off by",
        "raises": "it broke",
        "nan": "Y is off by nan",
    }
    assert code == 1
    assert expected[part] in " ".join(out.split())
