"""`accelerate` for `transformers.Trainer` and trainers made of it, such as trl's: one callback."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from .report import Report
from .swap import accelerate

logger = logging.get_logger(__name__)


class PeftFastCallback(TrainerCallback):
    """Swaps the fused layers into the model of a trainer, `Trainer(..., callbacks=[PeftFastCallback()])`.

    That happens where the trainer is made, so before anything is evaluated, trained or wrapped, and once more
    at the start of each training, for layers and models that came later, as from `model_init`. The layers
    stay fused afterwards; `restore(model)` undoes it. `report` says what was fused; what was not is logged as
    a warning.

    Args:
        options: of `accelerate`: `methods`, `strict`, `backend`.

    Raises, where the trainer is made:
        As `accelerate`.
    """

    report: Report | None = None
    """What `accelerate` did last."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._swap(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.report is None or not _is_sharded(kwargs["model"]):
            self._swap(kwargs["model"])

    def _swap(self, model: nn.Module | None) -> None:
        if model is None:  # made later, by `model_init`
            return
        before, self.report = self.report, accelerate(model, **self.options)
        if self.report.left and str(before) != str(self.report):
            logger.warning(f"PeftFastCallback: {self.report}")


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has the parameters by now: layers swapped before that stay fused, others cannot be."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
