"""The command `peft-fast`: its options come from `TrainConfig`, its work from the modules that commands name.

Errors that a user can act on are one line on stderr and exit code 2; heavy imports wait until needed.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import config
from .errors import BackendUnavailable, UnsupportedLayer, UnsupportedWeight
from .training_methods import default_text, methods_with

USER_ERRORS = (BackendUnavailable, UnsupportedLayer, UnsupportedWeight, ValueError, TypeError, OSError)

SIZING = (
    "method", "quant", "dtype", "r", "act", "dropout", "target_modules", "virtual_tokens", "last_layers",
    "positions", "layers", "component", "share_weights", "checkpointing", "stock",
)  # fmt: skip
"""The options of a job that its memory depends on."""

NOT_COMPARED = ("method", "seed", "stock", "output", "resume", "overwrite")
"""The options of a job that `compare` sets, or that would compare something else."""

app = typer.Typer(
    help="Fast parameter-efficient fine-tuning on 4-bit weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _with_options(names: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a flag for each of these fields of `TrainConfig` to the signature of a command with **flags.

    A flag that was not given is None.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        own = typing.get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=own[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters += [_flag(name) for name in names]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return add


def _flag(name: str) -> inspect.Parameter:
    field = config.OPTIONS[name]
    kind, _ = config.base_type(typing.get_type_hints(config.TrainConfig)[name])
    flag = "--" + name.replace("_", "-")
    choices = field.metadata["choices"]
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=field.metadata["help"] + _whose(name),
        show_default=_default(name),
        metavar="|".join(choices) if choices and len(choices) > 1 else None,
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, option])


def _whose(name: str) -> str:
    """Which methods have an option, or have it not, whichever is shorter; nothing where all have it."""
    have = methods_with(name) or list(config.METHODS)
    lack = [method for method in config.METHODS if method not in have]
    if not lack:
        return ""
    return f" ({', '.join(have)})" if len(have) <= len(lack) else f" (not {', '.join(lack)})"


def _default(name: str) -> str | bool:
    """What the help says of the default of an option; False for nothing."""
    if name in config.SPECIFIC:
        return default_text(name)
    default = config.OPTIONS[name].default
    return str(default) if default not in (None, False) else False


@app.command()
@_with_options(config.OPTIONS)
def train(
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file with any of the options below.", show_default=False),
    ] = None,
    **flags: Any,
) -> None:
    """Fine-tune a model. Flags win over --config, which wins over the defaults.

    With no options: a pretrained MiniLM in NF4, LoRA on all of its linear layers, and the question whether
    two adjacent words of a sentence were swapped; under two minutes on two CPU cores.
    """
    options = config.resolve(flags, config_file)
    _prepare_libraries()
    from .train import train

    train(options)


@app.command()
@_with_options(name for name in config.OPTIONS if name not in NOT_COMPARED)
def compare(
    methods: Annotated[str, typer.Option(help="Names of methods with commas, or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="Seeds with commas.")] = "0,1,2",
    output: Annotated[
        Path, typer.Option(help="Folder of the runs and the table; finished runs in it are kept.")
    ] = Path("runs/compare"),
    **flags: Any,
) -> None:
    """Train the same job with several methods, one process each, and write one table and plot.

    An option that only some methods have goes to those. Each run is evaluated once, at its end.
    """
    from .compare import compare, jobs

    names = list(config.METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    given = {name: value for name, value in flags.items() if value is not None}
    compare(jobs(names, _integers("seeds", seeds), output, given), output)


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: expected numbers with commas, as in 0,1,2, got {text!r}") from None


def _prepare_libraries() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every input is a local file
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels when imported


@app.command()
@_with_options(SIZING)
def estimate(
    model: Annotated[Path, typer.Option(help="A config.json of transformers, or the folder with one.")],
    batch: Annotated[int, typer.Option(help="Sequences in a step.")],
    seq: Annotated[int, typer.Option(help="Tokens in a sequence.")],
    task: Annotated[
        str | None,
        typer.Option(
            help="causal-lm or classification.", show_default="classification for encoders, else causal-lm"
        ),
    ] = None,
    labels: Annotated[int, typer.Option(help="Classes of a classification.")] = 2,
    padding: Annotated[
        bool | None,
        typer.Option(
            "--padding/--no-padding",
            help="Whether sequences are padded, so that attention gets a mask.",
            show_default="in a classification",
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda if any")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
    **flags: Any,
) -> None:
    """Tell the memory that training a model will take, without its weights."""
    _prepare_libraries()
    from . import estimate as sizing

    found = sizing.estimate(
        model,
        batch=batch,
        seq=seq,
        task=task,
        labels=labels,
        padding=padding,
        optimizer=optimizer,
        device=device,
        **{name: value for name, value in flags.items() if value is not None},
    )
    if as_json:
        import json

        typer.echo(json.dumps(found.as_dict(), indent=1))
    else:
        from rich.console import Console

        Console().print(sizing.table(found, f"{model}, {batch} x {seq} tokens"))


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Check every backend against fp64; exit code 1 when one fails."),
    ] = False,
) -> None:
    """Show versions, devices, and which backend runs which weights."""
    from . import info as information

    outcomes = information.self_test() if self_test else None
    if as_json:
        import json

        typer.echo(json.dumps(information.report(outcomes), indent=1))
    else:
        from rich.console import Console

        information.show(Console(), outcomes)
    if outcomes is not None and any(outcome.failure is not None for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def bench(
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Words that each match a label of a case, as 'lora MiniLM-L6.* R=16 M=1,M=512'; repeatable.",
            show_default="cases of two models; --list shows them",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Under a minute: few cases, if no --filter names them; no compilers."),
    ] = False,
    providers: Annotated[
        str | None,
        typer.Option(help="Names with commas; ours[NAME] is a backend of ours.", show_default="all"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if any")] = None,
    threads: Annotated[int | None, typer.Option(help="Of a CPU.", show_default="torch's")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Of timing for each case.", show_default="4, 1 with --quick")
    ] = None,
    cache_mib: Annotated[
        int | None, typer.Option(help="Size of the last-level cache.", show_default="as the system tells")
    ] = None,
    again: Annotated[bool, typer.Option("--aa", help="Time every provider against itself.")] = False,
    csv: Annotated[Path | None, typer.Option(help="File to append to, in a folder that exists.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the cases, run none.")] = False,
) -> None:
    """Time adapted layers beside peers and the frozen dense layer.

    The exit code is 1 when a provider is not exact, or when ours or the dense layer fails.
    """
    _prepare_libraries()
    from .bench import show

    exact = show.command(
        filters or (), quick, providers, device, threads, seconds, again, csv, listed, cache_mib
    )
    if not exact:
        raise typer.Exit(1)


def main() -> None:
    """The entry point: exit code 0, 1 for a failed self-test, 2 for an error the user can act on."""
    try:
        app()
    except USER_ERRORS as error:
        typer.echo(f"peft-fast: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("peft-fast: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
