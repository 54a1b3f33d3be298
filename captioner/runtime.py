"""Device, precision and versions: what a command settles once, before any model code runs."""

import contextlib
import functools
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captioner.errors import UserError
from captioner.model import Captioner, see
from captioner.t5 import Stack
from captioner.vit import VisionTransformer

GPU_GROUP = 32
PROCESS_STATUS = Path("/proc/self/status")
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
    """Memory (B, N, D) of a batch that holds pixels (B, 3, H, W) or the frozen encoder's features (B, N, D_vision); of views, as `Captioner.read`."""
    if "features" in batch:
        return model.read(batch["features"].to(device, model.bridge.weight.dtype))
    pixel_values = batch["pixel_values"].to(device)
    return model.read(see(model.vision, pixel_values) if trains_vision else frozen_tokens(model.vision, pixel_values))


@torch.no_grad()
def frozen_tokens(vision: nn.Module, pixel_values: Tensor) -> Tensor:
    """Tokens of a frozen encoder as `captioner.model.see` gives them; in fp32 an image has the same bits in every batch, so that cached ones equal them.

    How a product adds up depends on its shape. On a CPU images are therefore encoded one by one, which costs a large encoder nothing, and on a GPU in
    groups of GPU_GROUP, the last one filled up. A batch stays one in bf16, where last bits are no matter, and where the weights are shared out, since
    processes with unlike batches must put them together equally often.
    """
    device = pixel_values.device.type
    in_bf16 = torch.is_autocast_enabled(device) or getattr(vision, "frozen", None) is not None
    if in_bf16 or any(hasattr(parameter, "device_mesh") for parameter in vision.parameters()):
        return see(vision, pixel_values)
    images = pixel_values if pixel_values.ndim == 4 else pixel_values.flatten(0, 1)
    size = 1 if device == "cpu" else GPU_GROUP
    groups = [F.pad(group, (0, 0, 0, 0, 0, 0, 0, size - len(group))) for group in images.split(size)]
    tokens = torch.cat([vision(group) for group in groups])[: len(images)]
    return tokens if pixel_values.ndim == 4 else tokens.unflatten(0, pixel_values.shape[:2])


def cast_frozen(module: nn.Module, dtype: torch.dtype, keep: Iterable[Tensor] = ()) -> None:
    """Keep a module's frozen matrices in dtype, so that autocast does not convert them at every step; trained ones, those in keep and norms stay as they are."""
    kept = {id(parameter) for parameter in keep}
    for parameter in module.parameters():
        if not parameter.requires_grad and parameter.ndim >= 2 and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def recompute_blocks(model: Captioner) -> int:
    """Gradient checkpointing (arXiv 1604.06174): every Transformer block keeps its input alone and is computed again in the backward pass, dropout included.

    Returns the number of blocks. The non-reentrant form is used: with the reentrant one, blocks behind frozen embeddings get no gradient.
    """
    blocks = [block for module in model.modules() if isinstance(module, (Stack, VisionTransformer)) for block in module.blocks]
    for block in blocks:
        block.forward = functools.partial(_recomputed, block.forward)
    return len(blocks)


def _recomputed(forward, *arguments):
    return checkpoint(forward, *arguments, use_reentrant=False) if torch.is_grad_enabled() else forward(*arguments)


def process_memory(key: str) -> int | None:
    """A size of /proc/self/status in bytes, such as VmRSS; None where there is none (not Linux)."""
    lines = PROCESS_STATUS.read_text(encoding="utf-8").splitlines() if PROCESS_STATUS.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


class PeakMemory:
    """The most memory in use since it was made: of the device where that is CUDA, else of this process where the kernel tells (Linux)."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif PROCESS_STATUS.is_file():
            with contextlib.suppress(OSError):
                PROCESS_STATUS.with_name("clear_refs").write_text("5")  # resets VmHWM

    def bytes(self) -> int | None:
        """None where it is not known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return process_memory("VmHWM")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
