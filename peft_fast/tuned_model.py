"""What models with adapters of this library have in common: the mixin of `ReftModel` and `AdapterModel`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .packed_linear import PackedLinear
from .swapped import Swapped


class TunedModel(Swapped, nn.Module):
    """A model whose class was replaced by one of the same name: frozen, but for what was added."""

    # What transformers' Trainer asks for before it trains over a quantized base: that there are adapters.
    _hf_peft_config_loaded = True

    def unload(self) -> nn.Module:
        """Removes what was added: the model, still frozen, as it was. Returns it."""
        raise NotImplementedError

    def _write(self, directory: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Writes the files of `save_pretrained`."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes what was added alone, and its config.

        Args:
            save_directory: made if it is missing.
            state_dict: of the whole model, to take the tensors from, where its parameters are sharded.
            is_main_process: whether this process writes.
            safe_serialization: True; there are no other files than safetensors.
            max_shard_size: of no meaning for one small file; transformers' push_to_hub passes it.

        Raises:
            ValueError: `safe_serialization` is not True.
        """
        if safe_serialization is not True:
            raise ValueError(f"safe_serialization: expected True, got {safe_serialization!r}")
        if is_main_process:
            self._write(Path(save_directory), state_dict)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, among these every value of a packed weight."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints both counts and their ratio, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of any model, among these every value of a packed weight."""
    packed_layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    trainable, total = 0, sum(layer.out_features * layer.in_features for layer in packed_layers)
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None) is not None
        count = parameter.numel() * (2 * parameter.element_size() if packed else 1)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


Tuned = TypeVar("Tuned", bound=TunedModel)


def build(base_model: nn.Module, make: Callable[[], Tuned], fill: Callable[[Tuned], Any]) -> Tuned:
    """`make` a model of `base_model`, then `fill` it; an error in either leaves the base as it was."""
    trained = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
    model = make()
    try:
        fill(model)
    except BaseException:
        model.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return model
