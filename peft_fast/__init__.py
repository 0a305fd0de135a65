"""Fast, exact, quantized parameter-efficient fine-tuning: fused adapters over frozen packed weights.

Importing this package needs neither a GPU nor Triton nor the compiled extension, and loads none of PEFT,
transformers or bitsandbytes; names resolve on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BackendUnavailable": "errors",
    "UnsupportedLayer": "errors",
    "UnsupportedWeight": "errors",
    "QuantizedWeight": "formats",
    "from_bitsandbytes": "formats",
    "from_dense": "formats",
    "AdapterConfig": "adapter_config",
    "AdapterLinear": "adapter_linear",
    "AdapterModel": "adapter_model",
    "SharedFactors": "adapter_linear",
    "DoRALinear": "modules",
    "LoRALinear": "modules",
    "dequantize": "functional",
    "dora_linear": "functional",
    "lora_linear": "functional",
    "loreft": "functional",
    "LoReFT": "reft",
    "LoReFTConfig": "reft",
    "LoReFTLinear": "reft",
    "ReftModel": "reft",
    "get_adapter_model": "adapter_model",
    "get_reft_model": "reft",
    "PackedLinear": "packed_linear",
    "PeftFastCallback": "callback",
    "TrainerCheckpoints": "trainer_checkpoints",
    "accelerate": "swap",
    "convert": "conversion",
    "quantize": "quantization",
    "to_packed": "quantization",
    "restore": "swap",
    "initialize": "initialization",
    "plain_lora": "initialization",
    "explain": "explanation",
}
__all__ = [
    "AdapterConfig",
    "AdapterLinear",
    "AdapterModel",
    "BackendUnavailable",
    "DoRALinear",
    "LoRALinear",
    "LoReFT",
    "LoReFTConfig",
    "LoReFTLinear",
    "PackedLinear",
    "PeftFastCallback",
    "QuantizedWeight",
    "ReftModel",
    "SharedFactors",
    "TrainerCheckpoints",
    "UnsupportedLayer",
    "UnsupportedWeight",
    "accelerate",
    "convert",
    "dequantize",
    "dora_linear",
    "explain",
    "from_bitsandbytes",
    "from_dense",
    "get_adapter_model",
    "get_reft_model",
    "initialize",
    "lora_linear",
    "loreft",
    "plain_lora",
    "quantize",
    "restore",
    "to_packed",
]

if TYPE_CHECKING:
    from .adapter_config import AdapterConfig
    from .adapter_linear import AdapterLinear, SharedFactors
    from .adapter_model import AdapterModel, get_adapter_model
    from .callback import PeftFastCallback
    from .conversion import convert
    from .errors import BackendUnavailable, UnsupportedLayer, UnsupportedWeight
    from .explanation import explain
    from .formats import QuantizedWeight, from_bitsandbytes, from_dense
    from .functional import dequantize, dora_linear, lora_linear, loreft
    from .initialization import initialize, plain_lora
    from .modules import DoRALinear, LoRALinear
    from .packed_linear import PackedLinear
    from .quantization import quantize, to_packed
    from .reft import LoReFT, LoReFTConfig, LoReFTLinear, ReftModel, get_reft_model
    from .swap import accelerate, restore
    from .trainer_checkpoints import TrainerCheckpoints


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
