"""Device, precision and versions: what a command settles once, before any model code runs."""

import importlib.metadata
import platform

import torch
from torch import Tensor, nn

from captioner.errors import UserError
from captioner.model import Captioner

PACKAGES = ("torch", "numpy", "pillow", "timm", "open-clip-torch", "sentencepiece", "safetensors")


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises UserError on a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0]})") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the device multiplies it in hardware, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "cpu" and cpu_has_amx() else "fp32"


def cpu_has_amx() -> bool:
    """Whether the CPU has matrix instructions for bf16; without them bf16 is slower than fp32 there."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False


def encode_images(model: Captioner, batch: dict, device: torch.device, trains_vision: bool = False) -> Tensor:
    """Memory (B, N, D) of a batch that holds pixels (B, 3, H, W) or the frozen encoder's features (B, N, D_vision)."""
    if "features" in batch:
        return model.read(batch["features"].to(device, model.bridge.weight.dtype))
    with torch.set_grad_enabled(trains_vision and torch.is_grad_enabled()):
        tokens = model.vision(batch["pixel_values"].to(device))
    return model.read(tokens)


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep a module's frozen matrices in dtype, so that autocast does not convert them at every step; trained ones and norms stay as they are."""
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.ndim >= 2:
            parameter.data = parameter.data.to(dtype)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
