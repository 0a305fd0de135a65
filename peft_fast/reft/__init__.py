"""LoReFT: edits of a model's hidden states in low-rank subspaces, at chosen positions (arXiv 2404.03592)."""

from .config import LoReFTConfig
from .edit import LoReFT
from .linear import LoReFTLinear
from .model import ReftModel, get_reft_model
from .pyreft import export_pyreft, import_pyreft

__all__ = [
    "LoReFT",
    "LoReFTConfig",
    "LoReFTLinear",
    "ReftModel",
    "export_pyreft",
    "get_reft_model",
    "import_pyreft",
]
