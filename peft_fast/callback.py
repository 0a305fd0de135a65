"""`accelerate` for `transformers.Trainer` and trainers made of it, such as trl's: one callback."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from .report import Report
from .swap import accelerate

logger = logging.get_logger(__name__)


class PeftFastCallback(TrainerCallback):
    """Swaps the fused layers into the model of a trainer, `Trainer(..., callbacks=[PeftFastCallback()])`.

    That happens where the trainer is made, so before anything is evaluated, trained or wrapped, and once more
    at the start of training for a model that came later, as from `model_init`. The layers stay fused
    afterwards; `restore(model)` undoes it. What was fused, and why the rest was not, is logged; see `report`.

    Args:
        options: of `accelerate`: `methods`, `strict`, `backend`.

    Raises, where the trainer is made:
        As `accelerate`.
    """

    report: Report | None = None
    """What `accelerate` did to the present model."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._swapped: weakref.ref[nn.Module] | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._swap(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._swap(kwargs["model"])

    def _swap(self, model: nn.Module | None) -> None:
        if model is None or (self._swapped is not None and self._swapped() is model):
            return
        self.report = accelerate(model, **self.options)
        self._swapped = weakref.ref(model)
        logger.info(str(self.report))
