"""The command `peft-fast`: its options come from `TrainConfig`, its work from `train` and `info`.

Errors that a user can act on are one line on stderr and exit code 2; heavy imports wait until needed.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from . import config
from .errors import BackendUnavailable, UnsupportedLayer, UnsupportedWeight

USER_ERRORS = (BackendUnavailable, UnsupportedLayer, UnsupportedWeight, ValueError, TypeError, OSError)

app = typer.Typer(
    help="Fast parameter-efficient fine-tuning on 4-bit weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def train(config_file: Path | None, **flags: Any) -> None:
    """Fine-tune a model. Flags win over --config, which wins over the defaults.

    With no options: a pretrained MiniLM in NF4, LoRA on all of its linear layers, and the question whether
    two adjacent words of a sentence were swapped; under two minutes on two CPU cores.
    """
    options = config.resolve(flags, config_file)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every input is a local file
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels when imported
    from .train import train

    train(options)


def _signature() -> inspect.Signature:
    """The signature of `train`: --config, and a flag for each field of `TrainConfig`."""
    file_option = typer.Option(
        "--config", help="YAML file with any of the options below.", show_default=False
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            "config_file", keyword, default=None, annotation=Annotated[Path | None, file_option]
        )
    ]
    hints = typing.get_type_hints(config.TrainConfig)
    for name, field in config.OPTIONS.items():
        kind, _ = config.base_type(hints[name])
        flag = "--" + name.replace("_", "-")
        choices = field.metadata["choices"]
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=field.metadata["help"],
            show_default=str(field.default) if field.default not in (None, False) else False,
            metavar="|".join(choices) if choices and len(choices) > 1 else None,
        )
        parameters.append(
            inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, option])
        )
    return inspect.Signature(parameters)


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {p.name: p.annotation for p in train.__signature__.parameters.values()}  # type: ignore[attr-defined]
app.command()(train)


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
