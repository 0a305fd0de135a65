"""The Triton backend: the ops of `peft_fast.ops` for GPU tensors, and for CPU tensors under the interpreter.

decode.py       one decode per format, called by every kernel
tiles.py        tiles in and out, the dot wrapper, dropout, activations, program order
configs.py      tile sizes, with the reason for each
launch.py       the device guard and the arguments that all kernels take
strategies.py   the ways to carry lora_linear out, and the tables, in measured/, by which one is picked
low_rank.py, linear.py    the kernels of lora_linear: thin products; main loops over the weight
lora_linear.py  their launchers, by strategy
loreft.py, dequantize.py    kernels, then launchers
"""

from .dequantize import dequantize
from .lora_linear import Strategy, lora_linear, lora_linear_backward
from .loreft import loreft, loreft_backward

__all__ = ["Strategy", "dequantize", "lora_linear", "lora_linear_backward", "loreft", "loreft_backward"]
