"""Checkpoints of a transformers `Trainer` that hold all that is trained, and are read again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import set_peft_model_state_dict
from torch import Tensor

from . import base_models
from .adapter_model import AdapterModel
from .files import WEIGHTS, check_tensors, copy_tensors, read_tensors, write_tensors
from .reft import ReftModel

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

PROMPT_ENCODER = "prompt_encoder.safetensors"


class TrainerCheckpoints(_Trainer):
    """To be put before `Trainer` or a subclass of it: `class Tuner(TrainerCheckpoints, SFTTrainer): pass`.

    transformers saves and loads PEFT's adapters by itself. What it does not know, or not whole, is added, in
    checkpoints, `train(resume_from_checkpoint=…)` and `load_best_model_at_end`: `AdapterModel`, `ReftModel`
    and its head, and of PEFT's prompt methods the encoder that makes the tokens.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        directory = self.args.output_dir if output_dir is None else output_dir
        assert directory is not None
        if isinstance(self.model, ReftModel):
            base_models.save_head(self.model, Path(directory))
        elif tensors := _prompt_encoder(self.model):
            write_tensors(Path(directory, PROMPT_ENCODER), tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        directory = Path(resume_from_checkpoint)
        if isinstance(model, ReftModel):
            model.load_edits(directory)
            base_models.load_head(model, directory)
        elif isinstance(model, AdapterModel):
            model.load_adapter(directory)
        elif own := _prompt_encoder(model):
            stored = read_tensors(directory / PROMPT_ENCODER, "the prompt encoder of a model")
            check_tensors(directory / PROMPT_ENCODER, stored, own)
            # The adapter's file has what the encoder computes; PEFT would load it as what it computes from.
            tensors = read_tensors(directory / WEIGHTS, "an adapter")
            tensors["prompt_embeddings"] = stored[f"{model.active_adapter}.embedding.weight"]
            set_peft_model_state_dict(model, tensors, model.active_adapter)
            copy_tensors(stored, own)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and (
            isinstance(self.model, ReftModel | AdapterModel) or _prompt_encoder(self.model)
        ):
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()


def _prompt_encoder(model: Any) -> dict[str, Tensor]:
    """What PEFT's prompt methods train; their adapter files hold what it computes."""
    encoder = getattr(model, "prompt_encoder", None)
    return {} if encoder is None else {name: p.detach() for name, p in encoder.named_parameters()}
