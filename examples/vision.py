"""Vision: handwritten digits, learned upright and adapted to lying ones (`python examples/vision.py`).

`--model vit` is a Vision Transformer, `--model convnext` a convolutional network of which the pointwise
convolutions are linear layers. The convolutions of a ResNet (`--model resnet --method lora`) have PEFT's
LoRA, which runs in PEFT's own forward; methods that adapt linear layers find none there but its head.
"""

from collections.abc import Callable

import torch
from adaptation import METHODS, Example, main, split
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

DIGITS = {"num_labels": 10, "num_channels": 1}


def pictures(turned: bool) -> tuple[dict[str, Tensor], Tensor]:
    """1,797 pictures [1, 8, 8] in −1 … 1, and which digit each is."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(digits.target)[order]
    return {"pixel_values": images.rot90(1, (2, 3)) if turned else images}, labels


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=8,
            patch_size=2, hidden_dropout_prob=0.0, **DIGITS,
        )
    )  # fmt: skip


def convnext() -> nn.Module:
    return ConvNextForImageClassification(
        ConvNextConfig(patch_size=1, num_stages=2, hidden_sizes=[32, 64], depths=[1, 2], **DIGITS)
    )


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", **DIGITS)
    )


def example(model: Callable[[], nn.Module], without: tuple[str, ...] = ()) -> Example:
    upright, lying = split(*pictures(turned=False), 400), split(*pictures(turned=True), 400)
    return Example(model, upright, lying, 200, without)


EXAMPLES = {
    "vit": lambda: example(vit),
    "convnext": lambda: example(convnext, without=("loreft",)),  # it has no list of blocks
    "resnet": lambda: example(resnet, without=tuple(m for m in METHODS if m != "lora")),
}

if __name__ == "__main__":
    main(EXAMPLES, "Digits, adapted from upright to lying ones.")
