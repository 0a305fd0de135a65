"""What a training job will need in memory, from a model's config alone: `peft-fast estimate`.

The model is built without data, with the quantized layers, adapters and fused forwards that `train` would
give it. Then one optimizer step runs on fake tensors, which have sizes and no values: the ledger notes when
every storage comes and goes, so that what autograd keeps, what checkpointing spares and what the loss takes
are counted, not modelled. Only two things do not show in such a step. On CUDA, the scratch that decoded
weights pass through is added: the largest panel, at most `scratch.limit()`. What an op allocates and frees
within itself is taken as nothing, since this library's kernels hardly do.

The step is that of a CPU. On CUDA this library's ops keep the same, but attention and autocast may not. The
process, the device's context, fragmentation, the data, and the loading of weights are not counted.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import logging as transformers_logging

from . import base_models, fake_models, scratch
from .config import METHODS, MOST, TrainConfig
from .errors import BackendUnavailable, UnsupportedLayer
from .packed_linear import PackedLinear
from .tuned_model import count_parameters

if TYPE_CHECKING:
    from rich.table import Table

TASKS = ("causal-lm", "classification")
DEVICES = ("cpu", "cuda")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": torch.optim.SGD,
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes, and counts of parameters. `peak` is the sum of the fields from `packed` to `temporary`."""

    packed: int
    """Quantized weights."""
    statistics: int
    """Their scales and tables."""
    dense: int
    """Frozen weights that are not quantized, and buffers: embeddings, norms, a language model's head."""
    trained: int
    """Adapters, and a classification's head."""
    optimizer: int
    kept_norms: int
    """Norms that DoRA keeps between steps, with what they are known by."""
    scratch: int
    """On CUDA, the most that decoded weights pass through."""
    saved: int
    """Activations held for the backward pass, at the peak."""
    gradients: int
    """Gradients of parameters, at the peak."""
    temporary: int
    """Everything else at the peak: logits and their gradient, gradients of activations."""
    saved_by_forward: int
    """Activations held for the backward pass when the forward pass ends, the most that `saved` can be."""
    all_gradients: int
    """Gradients of parameters when the backward pass ends."""
    trainable_parameters: int
    total_parameters: int

    @property
    def weights(self) -> int:
        return self.packed + self.statistics + self.dense

    @property
    def resident(self) -> int:
        """What stays between two steps."""
        return self.weights + self.trained + self.optimizer + self.kept_norms + self.scratch

    @property
    def peak(self) -> int:
        return self.resident + self.saved + self.gradients + self.temporary

    def as_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self) | {
            "weights": self.weights,
            "resident": self.resident,
            "peak": self.peak,
        }


def estimate(
    model: str | Path,
    *,
    batch: int,
    seq: int,
    task: str | None = None,
    labels: int = 2,
    padding: bool | None = None,
    optimizer: str = "adamw",
    device: str | None = None,
    **options: Any,
) -> Estimate:
    """The memory of training `model` on batches [batch, seq] of tokens.

    Args:
        model: a config.json of transformers, or the folder that holds one.
        batch: sequences in a step.
        seq: tokens in each sequence.
        task: of `TASKS`; if None, classification for encoders and causal-lm for the others.
        labels: classes of a classification.
        padding: whether sequences are padded, so that attention gets a mask; if None, in a classification.
        optimizer: of `OPTIMIZERS`.
        device: of `DEVICES`; if None, cuda where there is one.
        options: of `TrainConfig`: method, quant, dtype, r, target_modules, checkpointing and the like.

    Raises:
        ValueError, TypeError: an option is out of range or does not fit the model; the message names it.
        UnsupportedLayer: the model cannot be adapted, or does not run without data.
    """
    for name, value in (("batch", batch), ("seq", seq), ("labels", labels)):
        if not isinstance(value, int) or not 1 <= value <= MOST:
            raise ValueError(f"{name}: expected a number from 1 to {MOST}, got {value!r}")
    if batch * seq > MOST:
        raise ValueError(f"seq: expected at most {MOST} tokens in a step, got {batch} x {seq}")
    _check_choice("method", options.get("method", "lora"), METHODS)
    _check_choice("optimizer", optimizer, OPTIMIZERS)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_choice("device", device, DEVICES)
    if options.get("dtype") == "fp16" and device == "cpu":
        raise ValueError("dtype: expected fp32 or bf16 on a CPU, where fp16 is not trained, got 'fp16'")
    model_config = _load_config(Path(model))
    task = task or _usual_task(model_config)
    _check_choice("task", task, TASKS)
    # A job has data, which is not read here.
    job = TrainConfig(task=task, model=str(model), data="data", **options)
    if job.stock and job.method == "dora" and job.quant != "none":
        raise ValueError(
            "stock: expected none for dora on 4-bit weights, which PEFT knows by a class that those without "
            "data cannot have, got True"
        )
    padding = task == "classification" if padding is None else padding

    net = fake_models.build(job, model_config, labels)
    _check_length(net, model_config, seq, job.virtual_tokens or 0)
    if job.checkpointing:
        if not net.supports_gradient_checkpointing:
            raise UnsupportedLayer(f"checkpointing: {type(net).__name__} has none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer releases of transformers rename it
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = partial(_inputs, job, (batch, seq), padding)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return _run(net, job, inputs, OPTIMIZERS[optimizer], device)
    except RuntimeError as error:
        if isinstance(error, BackendUnavailable):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedLayer(f"model: expected one that runs without data, got {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


# ---------------------------------------------------------------------------------------------- the options


def _check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, got {value!r}")


def _load_config(path: Path) -> Any:
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model: expected a config.json or a folder with one, got {str(path)!r}")
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: expected a config that transformers can read, got {str(file)!r}: {reason}"
        ) from None
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model: expected weights that are not quantized yet, got {str(file)!r} of some that are"
        )
    return config


def _usual_task(model_config: Any) -> str:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return "classification" if type(model_config) in MODEL_FOR_MASKED_LM_MAPPING else "causal-lm"


def _check_length(model: nn.Module, model_config: Any, seq: int, more: int) -> None:
    """Lets a step raise ValueError when it comes to a table of positions that is too short for its sequences.

    `more` tokens are learned, and put in front. Only a step tells which table it comes to: a tower for
    images, which texts leave out, has one of its own.
    """
    for name, positions in base_models.position_tables(model, model_config).items():
        if seq + more > positions:
            reader = model.get_submodule(name.rpartition(".")[0])
            reader.register_forward_pre_hook(partial(_refuse, name, positions, seq, more))


def _refuse(name: str, positions: int, seq: int, more: int, *_: Any) -> None:
    learned = f" without the {more} that are learned" if more else ""
    raise ValueError(f"seq: expected at most {positions - more}, the positions in {name}{learned}, got {seq}")


# ------------------------------------------------------------------------------------------------- the step


def _run(
    model: Any,
    job: TrainConfig,
    inputs: Callable[[], dict[str, Any]],
    make_optimizer: Callable[..., torch.optim.Optimizer],
    device: str,
) -> Estimate:
    """One step of a built model; `inputs` makes those of its forward pass."""
    total_parameters = count_parameters(model)[1]
    with FakeTensorMode(), fake_models.Ledger() as ledger:
        fake_models.fill(model)
        if not job.stock:
            _make_fast(model, job)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = list(fake_models.packed_weights(model))
        packed, statistics = [w for w, _ in weights], [t for _, rest in weights for t in rest]
        parts = {"packed": packed, "statistics": statistics, "trained": trained}
        held = {name: ledger.numbers(tensors) for name, tensors in parts.items()}
        held["dense"] = ledger.alive().difference(*held.values())
        fake_models.keep_norms(model, device)
        held["kept_norms"] = ledger.alive().difference(*held.values())
        optimizer = make_optimizer(trained, lr=1e-3)
        for parameter in trained:  # so that the optimizer makes its state
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        held["optimizer"] = ledger.alive().difference(*held.values())
        before = ledger.alive()
        step_inputs = inputs()
        ledger.forget_peak()

        loss = _forward(model, job)(**step_inputs)["loss"]
        saved = ledger.alive() - before
        loss.backward()
        gradients = ledger.numbers(p.grad for p in trained if p.grad is not None)
        optimizer.step()
        kept = {"saved": saved, "gradients": gradients}
        at_peak = {name: ledger.bytes_of(numbers, at_peak=True) for name, numbers in kept.items()}
        return Estimate(
            **{name: ledger.bytes_of(numbers) for name, numbers in held.items()},
            **at_peak,
            temporary=ledger.peak - ledger.bytes_of(before) - sum(at_peak.values()),
            scratch=max(_panels(model, job), default=0) if device == "cuda" else 0,
            saved_by_forward=ledger.bytes_of(saved),
            all_gradients=ledger.bytes_of(gradients),
            trainable_parameters=sum(p.numel() for p in trained),
            total_parameters=total_parameters,
        )


def _make_fast(model: Any, job: TrainConfig) -> None:
    """Swaps in the fused layers that `train` would."""
    from .swap import accelerate

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="accelerate: ")  # there may be no layer to swap
        accelerate(model)


def _inputs(job: TrainConfig, shape: tuple[int, int], padding: bool) -> dict[str, Any]:
    empty = partial(torch.empty, dtype=torch.int64, device="cpu")
    causal = job.task == "causal-lm"
    inputs = {"input_ids": empty(shape), "labels": empty(shape if causal else shape[:1])}
    if padding:
        return inputs | {"attention_mask": empty(shape)}
    return inputs | ({"past_key_values": fake_models.NoCache()} if causal else {})


def _forward(model: nn.Module, job: TrainConfig) -> Callable[..., Any]:
    """The model's forward pass as accelerate wraps it: in autocast, with results in fp32."""
    if job.dtype == "fp32":
        return model

    def forward(**inputs: Tensor) -> Any:
        with torch.autocast("cpu", base_models.DTYPES[job.dtype]):
            return model(**inputs)

    return convert_outputs_to_fp32(forward)


def _panels(model: nn.Module, job: TrainConfig) -> Iterator[int]:
    """Bytes of each quantized layer's largest panel, where this library's kernels decode it."""
    size = base_models.DTYPES[job.dtype].itemsize
    for layer in model.modules():
        if isinstance(layer, Linear4bit | PackedLinear) and not job.stock:
            row = layer.in_features * size
            yield scratch.panels(layer.out_features, row)[0][1] * row


# ------------------------------------------------------------------------------------------------ the table


def table(found: Estimate, title: str) -> Table:
    """An estimate for people; parts that are nothing are left out."""
    from rich.table import Table

    rows = {
        "quantized weights": found.packed,
        "their scales and tables": found.statistics,
        "other frozen weights": found.dense,
        "trained weights": found.trained,
        "optimizer state": found.optimizer,
        "norms kept between steps": found.kept_norms,
        "scratch for decoded weights": found.scratch,
        "activations saved for backward": found.saved,
        "gradients of weights": found.gradients,
        "logits and other temporaries": found.temporary,
    }
    share = f"{found.trainable_parameters / found.total_parameters:.3%}"
    result = Table(
        "memory at the peak of a step",
        title=title,
        caption=f"{found.trainable_parameters:,} of {found.total_parameters:,} parameters are trained "
        f"({share}). The forward pass saves {_readable(found.saved_by_forward)} in all, the backward pass "
        f"leaves {_readable(found.all_gradients)} of gradients.",
    )
    result.add_column("", justify="right")
    for name, size in rows.items():
        if size:
            result.add_row(name, _readable(size))
    result.add_section()
    result.add_row("peak", _readable(found.peak), style="bold")
    return result


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
