"""The options of a training job: one dataclass that the command line, YAML files and Python share.

A field is an option: its annotation is the type, its metadata the help text and the range. The command line
is generated from this class, so an option is written once.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .ranks import MOST_RANK
from .training_methods import TRAINING_METHODS, methods_with

METHODS = tuple(TRAINING_METHODS)
STOCK_QUANTS = ("nf4", "fp4", "none")
"""What bitsandbytes and PEFT train on."""
QUANTS = ("nf4", "fp4", "int8", "fp8", "mxfp4", "none")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its help text and its range."""
    rules = {"help": help, "choices": choices, "minimum": minimum, "above": above, "maximum": maximum}
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of `peft-fast train`; the defaults are the default job.

    An option that not every method has is None in a job without it, and the method's default comes from
    `training_methods.TRAINING_METHODS`.

    Raises:
        TypeError, ValueError: an option has the wrong type or is out of range; the message names it, what was
            expected and what came.
    """

    task: str = option(
        "docstring-swap", "What to learn.", choices=("docstring-swap", "classification", "causal-lm")
    )
    model: str | None = option(
        None, "Local folder of a transformers model; a pretrained MiniLM when not given."
    )
    data: str | None = option(
        None, "Training data: .csv or .jsonl for classification, a text file for causal-lm."
    )
    eval_data: str | None = option(
        None, "Evaluation data, as --data; when not given a tenth of --data is held out."
    )
    text_column: str = option("text", "Column of the text in --data (classification).")
    label_column: str = option("label", "Column of the label in --data (classification).")
    max_length: int = option(40, "Tokens kept of each text (classification tasks).", minimum=4)
    block_size: int = option(128, "Tokens in each block (causal-lm).", minimum=2)

    quant: str = option("nf4", "How the frozen linear layers are stored.", choices=QUANTS)
    dtype: str = option(
        "fp32",
        "Dtype of the frozen model; bf16 and fp16 train in autocast.",
        choices=("fp32", "bf16", "fp16"),
    )
    method: str = option("lora", "What to train.", choices=METHODS)
    r: int | None = option(None, "Rank, or width, of the adapter.", minimum=1, maximum=MOST_RANK)
    alpha: float | None = option(None, "The adapter's output is scaled by alpha / r.", above=0)
    rslora: bool | None = option(None, "Scale by alpha / sqrt(r) instead.")
    dropout: float | None = option(
        None, "Dropout on the adapter's input; in loreft on what it adds.", minimum=0, maximum=1
    )
    target_modules: str | None = option(
        None, "Layers to adapt: all-linear, or the ends of their names, separated by commas."
    )
    init: str | None = option(
        None,
        "How the adapter starts: lora as PEFT does, or from the main directions of the weights (pissa, "
        "olora); loreft as pyreft does, or as the identity.",
        choices=("default", "pissa", "olora", "pyreft", "identity"),
    )
    lora_plus_ratio: float | None = option(
        None, "Learning rate of lora_B over that of the rest, as in LoRA+.", above=0
    )
    act: str | None = option(None, "Activation of the bottleneck.", choices=("relu", "gelu", "tanh", "silu"))
    virtual_tokens: int | None = option(None, "Tokens that are put in front.", minimum=1)
    positions: str | None = option(None, "Tokens to edit: f7+l7 the first and the last 7, f7, l7, or all.")
    layers: str | None = option(
        None, "Blocks to edit: all, or those with these indices, separated by commas."
    )
    last_layers: int | None = option(None, "Blocks at the end to train, the others frozen.", minimum=1)
    component: str | None = option(
        None, "What to edit: block_output, or a linear layer of each block by the end of its name."
    )
    share_weights: bool | None = option(None, "One edit for the first and the last tokens, instead of two.")
    backend: str = option("auto", "Kernels to run: auto, or a name that `peft-fast info` lists.")
    checkpointing: bool = option(False, "Run each block again in the backward pass.")
    stock: bool = option(
        False,
        "Train with PEFT's and bitsandbytes' own layers, for comparison; loreft keeps its edits, which "
        "neither has. Not for methods that are this library's alone.",
    )

    steps: int | None = option(None, "Optimizer steps; counted from --epochs when not given.", minimum=1)
    epochs: float = option(1.0, "Passes over the training data.", above=0)
    batch_size: int = option(32, "Examples in each training step.", minimum=1)
    lr: float | None = option(None, "Peak learning rate of AdamW; falls linearly to zero.", above=0)
    warmup: float = option(0.06, "Fraction of the steps in which the rate rises.", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", minimum=0)
    seed: int = option(
        0, "Seed of the weights, the order of the data and dropout.", minimum=0, maximum=2**32 - 1
    )
    eval_every: int = option(50, "Steps between evaluations; one more follows the last step.", minimum=1)
    save_every: int = option(50, "Steps between checkpoints.", minimum=1)

    output: str | None = option(
        None, "Folder of the run; runs/<task>-<method>-<quant>-seed<seed> by default."
    )
    resume: bool = option(False, "Continue the run in --output from its last complete checkpoint.")
    overwrite: bool = option(False, "Start again in a folder that holds an unfinished run.")

    def __post_init__(self) -> None:
        from . import backends

        for name, kind in typing.get_type_hints(type(self)).items():
            value = _typed(name, kind, getattr(self, name))
            object.__setattr__(self, name, value)
            _check_range(name, value, type(self).__dataclass_fields__[name].metadata)
        row = TRAINING_METHODS[self.method]
        for name in SPECIFIC:
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, row.options.get(name))
            elif name not in row.options:
                raise ValueError(f"{name}: expected none for method {self.method!r}, got {value!r}")
            elif name in row.choices:
                _check_range(name, value, {**_NO_RULES, "choices": row.choices[name]})
        targets = self.target_modules
        if targets is not None and not all(name.strip() for name in targets.split(",")):
            raise ValueError(f"target_modules: expected all-linear, or names and commas, got {targets!r}")
        backends.check_name(self.backend)
        if self.method == "loreft":
            row.adapter(self, "")  # checks positions, layers and component
        if self.resume and self.overwrite:
            raise ValueError("overwrite: expected False with resume, got True")
        if self.stock and not row.stock:
            raise ValueError(f"stock: expected none for method {self.method!r}, which PEFT lacks, got True")
        if self.stock and self.quant not in STOCK_QUANTS:
            raise ValueError(
                f"stock: expected none with quant {self.quant!r}, which is PackedLinear, got True"
            )
        if self.checkpointing and not row.checkpointing:
            raise ValueError(f"checkpointing: expected False for method {self.method!r}, got True")
        needs_data = self.task != "docstring-swap"
        if needs_data and self.data is None:
            raise ValueError(f"data: expected a file for task {self.task!r}, got None")
        if not needs_data and (self.data or self.eval_data):
            raise ValueError(
                f"data: expected none for task {self.task!r}, got {self.data or self.eval_data!r}"
            )
        if self.task == "causal-lm" and self.model is None:
            raise ValueError(
                "model: expected a folder with a causal language model for task 'causal-lm', got None"
            )

    @property
    def own(self) -> dict[str, Any]:
        """The options of the method, of those that not every method has."""
        return {name: getattr(self, name) for name in TRAINING_METHODS[self.method].options}

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        if self.output is not None:
            return Path(self.output)
        stock = "-stock" if self.stock else ""
        return Path("runs") / f"{self.task}-{self.method}-{self.quant}-seed{self.seed}{stock}"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


OPTIONS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(TrainConfig)}
SPECIFIC = tuple(name for name in OPTIONS if methods_with(name))
"""The options that not every method has, or whose default is the method's."""
NOT_OF_THE_RUN = ("resume", "overwrite", "output")
"""Options that say how to start, not what to compute; a resumed run may differ in them."""


def load(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, by name (`-` and `_` are the same).

    Raises:
        ValueError: the file is missing, is not a mapping, or has a key that is no option.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(
            f"config: expected a readable YAML file, got {str(path)!r} ({error.strerror})"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"config: expected YAML in {str(path)!r}, got {' '.join(str(error).split())}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(
            f"config: expected a mapping of options in {str(path)!r}, got {type(values).__name__}"
        )
    assert isinstance(node, yaml.MappingNode)
    names = [str(key.value).replace("-", "_") for key, _ in node.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"config: expected each option once in {str(path)!r}, got {twice} more than once")
    options = {str(key).replace("-", "_"): value for key, value in values.items()}
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"config: expected options among {sorted(OPTIONS)}, got {unknown} in {str(path)!r}")
    return options


def save(config: TrainConfig, path: Path) -> None:
    """Writes a file that is either the old one or the whole new one."""
    import yaml

    from .files import replace_file

    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def resolve(flags: Mapping[str, Any], file: str | Path | None = None) -> TrainConfig:
    """The options of a job: flags (None where not given) win over the YAML file, that over the defaults.

    With `resume`, the saved options of the run stand below both, and may not be contradicted.
    """
    given = {**(load(file) if file is not None else {}), **{k: v for k, v in flags.items() if v is not None}}
    if not given.get("resume"):
        return TrainConfig(**given)
    if given.get("output") is None:
        saved_path = TrainConfig(**given).folder / "config.yaml"
    else:
        saved_path = Path(given["output"]) / "config.yaml"
    if not saved_path.is_file():
        raise ValueError(
            f"resume: expected a run in {str(saved_path.parent)!r}, got no {saved_path.name} there"
        )
    saved = {name: value for name, value in load(saved_path).items() if name not in NOT_OF_THE_RUN}
    if not saved:
        raise ValueError(f"resume: expected the options of a run in {str(saved_path)!r}, got none")
    config = TrainConfig(**{**saved, **given})
    for name, value in saved.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}: expected {value!r} as in the resumed run, got {getattr(config, name)!r}"
            )
    return config


def base_type(kind: Any) -> tuple[type, bool]:
    """An annotation as (type, whether None is allowed)."""
    if isinstance(kind, types.UnionType):
        members = typing.get_args(kind)
        return next(m for m in members if m is not type(None)), True
    return kind, False


def _typed(name: str, kind: Any, value: Any) -> Any:
    expected, optional = base_type(kind)
    if value is None and optional:
        return None
    if expected is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as a string
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    elif expected is str and isinstance(value, Path):
        return str(value)
    raise TypeError(f"{name}: expected {expected.__name__}, got {value!r}")


MOST = 2**31 - 1
"""Of integers without a maximum of their own."""
_NO_RULES = dict.fromkeys(("choices", "minimum", "above", "maximum"))


def _check_range(name: str, value: Any, rules: Mapping[str, Any]) -> None:
    if value is None:
        return
    if value == "":
        raise ValueError(f"{name}: expected some text, got ''")
    if rules["choices"] is not None and value not in rules["choices"]:
        raise ValueError(f"{name}: expected one of {', '.join(rules['choices'])}, got {value!r}")
    bounds = []
    if rules["minimum"] is not None:
        bounds.append((f"at least {rules['minimum']}", value >= rules["minimum"]))
    if rules["above"] is not None:
        bounds.append((f"more than {rules['above']}", value > rules["above"]))
    maximum = MOST if rules["maximum"] is None and type(value) is int else rules["maximum"]
    if maximum is not None:
        bounds.append((f"at most {maximum}", value <= maximum))
    if isinstance(value, float):
        bounds.append(("a finite number", abs(value) < float("inf")))
    if not all(held for _, held in bounds):
        raise ValueError(f"{name}: expected {' and '.join(text for text, _ in bounds)}, got {value!r}")
