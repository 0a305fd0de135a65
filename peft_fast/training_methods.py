"""The table of what `peft-fast train` can train: the options of each method, their defaults, its adapter.

Light to import: the command line reads the table. What an adapter is made of is imported when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from peft import PeftConfig

    from .adapter_config import AdapterConfig
    from .config import TrainConfig
    from .reft import LoReFTConfig

    Adapter = PeftConfig | AdapterConfig | LoReFTConfig


class TrainingMethod(NamedTuple):
    """A row of `TRAINING_METHODS`."""

    options: Mapping[str, Any]
    """The fields of `TrainConfig` that not every method has, with the method's defaults."""
    adapter: Callable[[TrainConfig, str], Adapter]
    """What to train: a config of PEFT, `AdapterConfig` or `LoReFTConfig`; the text is PEFT's task type."""
    stock: bool
    """Whether --stock has something to compare with."""
    choices: Mapping[str, tuple[str, ...]] = {}
    """Of options that have others elsewhere."""
    checkpointing: bool = True
    """Whether it trains with --checkpointing, where transformers drops keys and values given from outside."""


def _targets(config: TrainConfig) -> Any:
    names: str = config.own["target_modules"]
    return names if names == "all-linear" else [name.strip() for name in names.split(",")]


def _lora(config: TrainConfig, task_type: str) -> PeftConfig:
    from peft import LoraConfig

    own = config.own
    return LoraConfig(
        task_type=task_type,
        r=own["r"],
        lora_alpha=own["alpha"],
        lora_dropout=own["dropout"],
        use_dora=config.method == "dora",
        use_rslora=own["rslora"],
        target_modules=_targets(config),
    )


def _vera(config: TrainConfig, task_type: str) -> PeftConfig:
    from peft import VeraConfig

    own = config.own
    return VeraConfig(
        task_type=task_type, r=own["r"], vera_dropout=own["dropout"], target_modules=_targets(config)
    )


def _ia3(config: TrainConfig, task_type: str) -> PeftConfig:
    from peft import IA3Config

    return IA3Config(task_type=task_type, target_modules=_targets(config), feedforward_modules=[])


def _prompt_learning(name: str) -> Callable[[TrainConfig, str], PeftConfig]:
    def make(config: TrainConfig, task_type: str) -> PeftConfig:
        import peft

        tokens = config.own["virtual_tokens"]
        made: PeftConfig = getattr(peft, name)(task_type=task_type, num_virtual_tokens=tokens)
        return made

    return make


def _own(method: str, **names: str) -> Callable[[TrainConfig, str], AdapterConfig]:
    """A method of `methods.METHODS`, and its options by their names in `TrainConfig`."""

    def make(config: TrainConfig, task_type: str) -> AdapterConfig:
        from .adapter_config import AdapterConfig

        options = {theirs: config.own[ours] for ours, theirs in names.items()}
        return AdapterConfig(method, target_modules=_targets(config), backend=config.backend, **options)

    return make


def _freeze(config: TrainConfig, task_type: str) -> AdapterConfig:
    from .adapter_config import AdapterConfig
    from .base_models import last_modules

    return AdapterConfig(None, modules_to_save=last_modules(config, head=task_type == "SEQ_CLS"))


def _loreft(config: TrainConfig, task_type: str) -> LoReFTConfig:
    from .reft import LoReFTConfig

    own = {name: value for name, value in config.own.items() if name != "lr"}
    if own["layers"] != "all":
        own["layers"] = _indices(own["layers"])
    return LoReFTConfig(**own, backend=config.backend)


def _indices(text: str) -> list[int]:
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise ValueError(f"layers: expected 'all' or block indices as in '0,2', got {text!r}") from None


_TARGETS = {"target_modules": "all-linear"}
_LOW_RANK = {"r": 8, "alpha": 16.0, "dropout": 0.0, "rslora": False, "lora_plus_ratio": 1.0, **_TARGETS}
_EDITS = {"positions": "f7+l7", "layers": "all", "component": "block_output", "share_weights": True}
_PROMPT = {"virtual_tokens": 20}

TRAINING_METHODS: dict[str, TrainingMethod] = {
    "lora": TrainingMethod(
        {"lr": 1e-3, **_LOW_RANK, "init": "default"},
        _lora,
        stock=True,
        choices={"init": ("default", "pissa", "olora")},
    ),
    "dora": TrainingMethod({"lr": 1e-3, **_LOW_RANK}, _lora, stock=True),
    "loreft": TrainingMethod(
        # The default job learns slower at 2e-3, and nothing at 1e-2.
        {"lr": 3e-3, "r": 8, "dropout": 0.0, **_EDITS, "init": "pyreft"},
        _loreft,
        stock=True,
        choices={"init": ("pyreft", "identity")},
    ),
    "adapter-parallel": TrainingMethod(
        {"lr": 1e-3, "r": 8, "act": "relu", **_TARGETS}, _own("parallel", r="r", act="act"), stock=False
    ),
    "adapter-series": TrainingMethod(
        {"lr": 1e-3, "r": 8, "act": "gelu", **_TARGETS}, _own("series", r="r", act="act"), stock=False
    ),
    "vera": TrainingMethod({"lr": 5e-2, "r": 256, "dropout": 0.0, **_TARGETS}, _vera, stock=True),
    "s2lora": TrainingMethod(
        {"lr": 3e-3, "r": 32, "alpha": 32.0, "dropout": 0.0, **_TARGETS},
        _own("s2lora", r="r", alpha="lora_alpha", dropout="dropout"),
        stock=False,
    ),
    "kadaptation": TrainingMethod(
        {"lr": 3e-3, "dropout": 0.0, **_TARGETS}, _own("kadaptation", dropout="dropout"), stock=False
    ),
    "ia3": TrainingMethod({"lr": 1e-2, **_TARGETS}, _ia3, stock=True),
    "ssf": TrainingMethod({"lr": 3e-3, **_TARGETS}, _own("ssf"), stock=False),
    "bitfit": TrainingMethod({"lr": 3e-3, **_TARGETS}, _own("bitfit"), stock=False),
    "prefix": TrainingMethod(
        {"lr": 1e-2, **_PROMPT}, _prompt_learning("PrefixTuningConfig"), stock=True, checkpointing=False
    ),
    "prompt": TrainingMethod({"lr": 1e-2, **_PROMPT}, _prompt_learning("PromptTuningConfig"), stock=True),
    "p-tuning": TrainingMethod({"lr": 1e-3, **_PROMPT}, _prompt_learning("PromptEncoderConfig"), stock=True),
    "freeze": TrainingMethod({"lr": 1e-3, "last_layers": 1}, _freeze, stock=True),
}


def methods_with(option: str) -> list[str]:
    """The methods that have an option which not every method has."""
    return [name for name, row in TRAINING_METHODS.items() if option in row.options]


def default_text(option: str) -> str:
    """The defaults of such an option, in words: "8; 256 for vera; 32 for s2lora"."""
    names: dict[str, list[str]] = {}
    for name in methods_with(option):
        default = TRAINING_METHODS[name].options[option]
        names.setdefault(f"{default:g}" if type(default) is float else str(default), []).append(name)
    most = max(names, key=lambda text: len(names[text]))
    others = (f"{text} for {', '.join(names[text])}" for text in names if text != most)
    return "; ".join((most, *others))
