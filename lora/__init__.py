"""What is trained: LoRA, bottleneck adapters, soft prompts; where they go into a model, their files, and a 4-bit base
under them. Knows nothing of captions or images.

names = lora.apply_lora(model, targets=("attn", "ffn"), where=("decoder",), rank=8, alpha=8, dropout=0.1)
trainable = lora.set_trainable(model, also=("bridge",))
"""

from lora.adapter_files import load_adapter, read_settings, save_adapter
from lora.adapters import (
    STYLES,
    AdaptedResidual,
    Bottleneck,
    adapter_names,
    all_settings,
    apply_adapters,
    get_stack,
    remove_adapter,
    set_stack,
)
from lora.functional import KERNELS, use_kernel
from lora.inject import (
    adapter_parameters,
    apply_lora,
    format_parameter_table,
    kernel_report,
    lay_out,
    merge_lora,
    parameter_table,
    seed_dropout,
    set_trainable,
    unmerge_lora,
)
from lora.interop import load_peft, save_peft
from lora.layers import LoRALinear
from lora.peft_config import CONFIG_FILE, read_config
from lora.quant import Linear4bit, base_bytes, dequantize_base, quantize_base
from lora.soft_prompt import SoftPrompt, apply_soft_prompt, initial_prompt, load_prompt, prompts, save_prompt

__all__ = [
    "CONFIG_FILE",
    "KERNELS",
    "STYLES",
    "AdaptedResidual",
    "Bottleneck",
    "Linear4bit",
    "LoRALinear",
    "SoftPrompt",
    "adapter_names",
    "adapter_parameters",
    "all_settings",
    "apply_adapters",
    "apply_lora",
    "apply_soft_prompt",
    "base_bytes",
    "dequantize_base",
    "format_parameter_table",
    "get_stack",
    "initial_prompt",
    "kernel_report",
    "lay_out",
    "load_adapter",
    "load_peft",
    "load_prompt",
    "merge_lora",
    "parameter_table",
    "prompts",
    "quantize_base",
    "read_config",
    "read_settings",
    "remove_adapter",
    "save_adapter",
    "save_peft",
    "save_prompt",
    "seed_dropout",
    "set_stack",
    "set_trainable",
    "unmerge_lora",
    "use_kernel",
]
