"""What is trained: LoRA layers, where they go into a model, and PEFT files. Knows nothing of captions or images.

names = lora.apply_lora(model, targets=("attn", "ffn"), where=("decoder",), rank=8, alpha=8, dropout=0.1)
trainable = lora.set_trainable(model, also=("bridge",))
"""

from lora.inject import (
    adapter_parameters,
    apply_lora,
    format_parameter_table,
    merge_lora,
    parameter_table,
    set_trainable,
    unmerge_lora,
)
from lora.interop import load_peft, save_peft
from lora.layers import LoRALinear

__all__ = [
    "LoRALinear",
    "adapter_parameters",
    "apply_lora",
    "format_parameter_table",
    "load_peft",
    "merge_lora",
    "parameter_table",
    "save_peft",
    "set_trainable",
    "unmerge_lora",
]
