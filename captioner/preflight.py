"""What is tried before the first step of a training: the longest batch and its memory, every gradient, writing a checkpoint.

Nothing is left behind: weights, buffers, gradients and random generators are bit for bit as before, and the run directory too.
Legend: B images, G captions per image, T text tokens, N image tokens.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lora
from captioner.errors import UserError
from captioner.files import describe_os_error, sync
from captioner.runtime import PeakMemory
from data.buckets import CaptionLengths
from data.collate import IGNORE

NAMED = 8  # parameters in a message
ATTEMPTS = 8  # at finding a gradient that is not zero
NOISE = 0.01  # standard deviation of what all-zero parameters hold for the check
KEY_BIAS = re.compile(r"(^|\.)(k|key|k_proj|to_k)\.bias$")
FULL = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED")


# The longest batch


def longest_rows(lengths: CaptionLengths, captions_per_image: str, batch_size: int) -> list[int]:
    """All rows, those first that make the batch with the most padded tokens (B * G * T) that any epoch can meet.

    captions_per_image `1`: by the longest caption of each row, since every one is picked in some epoch. `all`: by turns the row with the most captions and
    the one with the longest, since a batch is as wide as either. Where images are bad, the rows behind take their places: give the whole list to
    `make_loader` with captions_per_image="all", and its first batch to `worst_batch`.
    """
    longest = [max(counts, default=0) for counts in lengths.tokens]
    rows = range(len(longest))
    if str(captions_per_image) == "1":
        return sorted(rows, key=lambda row: -longest[row])
    by_area = sorted(rows, key=lambda row: -longest[row] * len(lengths.tokens[row]))
    if batch_size == 1:
        return by_area
    by_captions = sorted(by_area, key=lambda row: -len(lengths.tokens[row]))
    by_tokens = sorted(by_area, key=lambda row: -longest[row])
    return list(dict.fromkeys(row for pair in zip(by_captions, by_tokens, strict=True) for row in pair))


def worst_batch(batches: Iterable[dict], captions_per_image: str, images: int) -> dict:
    """The longest batch that training can meet, from the batches of `longest_rows` with all captions.

    It has `images` images, those at hand repeated to that number: the smaller of the batch size and the number of rows. With captions_per_image `1` each
    image keeps its longest caption: labels (B, 1, T). Raises UserError where no image can be read or none has a caption.
    """
    batch = next(iter(batches), None)
    if batch is None:
        raise UserError("no image of the training split can be read")
    if not batch["labels"].numel():
        raise UserError("no image of the training split has a caption")
    if str(captions_per_image) == "1":
        batch |= {"labels": longest_captions(batch["labels"])}
    rows = [place % len(batch["ids"]) for place in range(images)]
    tensors = {name: value[rows] for name, value in batch.items() if isinstance(value, Tensor)}
    return batch | {"ids": [batch["ids"][row] for row in rows], "captions": [batch["captions"][row] for row in rows], **tensors}


def longest_captions(labels: Tensor) -> Tensor:
    """Labels (B, G, T) → (B, 1, T), of each image the caption with the most tokens."""
    choice = (labels != IGNORE).sum(-1).argmax(1)  # (B,)
    return labels[torch.arange(len(labels)), choice][:, None]


# Gradients


def check_gradients(model: nn.Module, trainable: Mapping[str, nn.Parameter], backward: Callable[[int], None], indifferent: Collection[str] = ()) -> None:
    """Run backward(attempt), forward and backward of a batch in training mode; raises UserError that names parameters with a gradient that is not to be.

    Those are trained ones whose gradient is missing, zero everywhere or not finite, and frozen ones that received one. All-zero parameters, such as LoRA's
    B, hold small noise meanwhile, as they would block the gradients of what is before them. What is zero is tried again, up to ATTEMPTS times, with the
    sign of those parameters turned, which wakes a ReLU that is off for a whole batch, and with attempt counted up, of which the masks should be a function:
    stochastic depth may skip a block for a whole batch. `indifferent` (see `one_key_parameters`) and what `moves_all_keys` may be zero. Gradients are
    cleared; parameters, buffers and random generators are as before, also after an exception.
    """
    with unchanged(model, trainable) as change:
        change([name for name, size in sizes(trainable).items() if size == 0], fill_with_noise)
        received = gradients(model, trainable, functools.partial(backward, 0))
        sleeping = [name for name in trainable if received[name] == 0 and name not in indifferent and not moves_all_keys(name, trainable[name])]
        # A second pass through DistributedDataParallel is an error where the first one missed a parameter.
        for attempt in range(1, ATTEMPTS if sleeping and None not in received.values() else 1):
            change(sleeping, Tensor.neg_)
            again = gradients(model, trainable, functools.partial(backward, attempt))
            received |= {name: again[name] for name in sleeping}
            sleeping = [name for name in sleeping if received[name] == 0]
            if not sleeping:
                break
    trained = {name: received[name] for name in trainable}
    complain(
        {
            "trained but not reached by any gradient": [name for name, size in trained.items() if size is None],
            "trained with a gradient of zero everywhere": sleeping,
            "with a gradient that is not finite": [name for name, size in received.items() if size is not None and not 0 <= size < torch.inf],
            "frozen but given a gradient": [name for name in received if name not in trained],
        }
    )


def moves_all_keys(name: str, parameter: Tensor) -> bool:
    """Whether a parameter adds one number to the scores of all keys, which softmax does not see: a bias of keys, or a table for one distance."""
    return bool(KEY_BIAS.search(name)) or name.endswith("relative_position_bias_table") and len(parameter) == 1


def complain(faults: Mapping[str, list[str]]) -> None:
    """Raises UserError, in one line, where a kind of fault has names: the first ones and their number."""
    found = []
    for kind, names in faults.items():
        if names:
            shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            found.append(f"{len(names)} parameter{'s' if len(names) > 1 else ''} {kind}: {shown}")
    if found:
        raise UserError("; ".join(found))


def one_key_parameters(model: nn.Module, trainable: Iterable[str], caption_tokens: int) -> set[str]:
    """Those of the trained parameters that only weigh keys against each other where there is one key, so that their gradient is zero.

    Cross-attention has one key over a memory of one token, a decoder over a caption of caption_tokens = 1, T5's encoder over an instruction of one.
    """
    prompts = {place: len(prompt.embeddings) for place, prompt in lora.prompts(model).items()}
    patterns = []
    if model.image_tokens + prompts.get("encoder", 0) == 1:
        patterns.append(r"text\.decoder\.blocks\.\d+\.cross_attn(_norm|\.[qk]_proj)\.")
    if caption_tokens + prompts.get("decoder", 0) == 1:
        patterns.append(r"text\.decoder\.(position_bias|blocks\.\d+\.self_attn\.[qk]_proj)\.")
    if prompts.get("encoder") == 1:
        patterns.append(r"text\.encoder\.(position_bias|blocks\.\d+\.self_attn\.[qk]_proj)\.")
    return {name for name in trainable if any(re.match(pattern, name) for pattern in patterns)}


@contextlib.contextmanager
def unchanged(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> Iterator[Callable]:
    """Gives change(names, function), function(tensor) in place; at the end all has its old bits, random generators too, and no gradient is left."""
    # Packed 4-bit weights are bytes, large, and written by nobody.
    kept = {id(buffer): (buffer, buffer.clone()) for buffer in model.buffers() if buffer.dtype != torch.uint8}

    def change(names: Iterable[str], function: Callable[[Tensor], object]) -> None:
        with torch.no_grad():
            for name in names:
                values = local(trainable[name])
                kept.setdefault(id(trainable[name]), (values, values.clone()))
                function(values)

    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield change
    finally:
        with torch.no_grad():
            for tensor, old in kept.values():
                tensor.copy_(old)
        model.zero_grad(set_to_none=True)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that FSDP has split, else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def fill_with_noise(tensor: Tensor) -> None:
    """Normal numbers of a generator of its own, in place."""
    tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).mul_(NOISE))


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest absolute value of each tensor; NaN where it holds one. One transfer from the device for all."""
    if not tensors:
        return {}
    whole = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors.values())
    largest = torch.stack([torch.linalg.vector_norm(tensor.detach(), torch.inf).float() for tensor in whole])
    return dict(zip(tensors, largest.tolist(), strict=True))


def gradients(model: nn.Module, trainable: Mapping[str, nn.Parameter], backward: Callable[[], None]) -> dict[str, float | None]:
    """`sizes` of the gradients of one call of backward, None where a trained parameter has none, then those of others that got one."""
    model.zero_grad(set_to_none=True)
    try:
        backward()
    except RuntimeError as error:
        if "does not require grad" not in str(error):  # autograd's words for a loss that no parameter leads to
            raise
    trained = {id(parameter) for parameter in trainable.values()}
    others = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in trained}
    found = {name: parameter.grad for name, parameter in {**trainable, **others}.items() if parameter.grad is not None}
    return dict.fromkeys(trainable) | sizes(found)


# Memory and time


@dataclass
class Cost:
    """What a step took: the most memory in bytes, of how much that this process could have (None where it is not known), and seconds."""

    bytes: int | None
    available: int | None
    seconds: float


def measured(step: Callable[[], object], device: torch.device, what: str, advice: str) -> Cost:
    """Run step and tell the most memory in use meanwhile, of the device or, on a CPU, of this process.

    Raises UserError where the memory is not enough; what names the batch (`128 images x 40 tokens`), advice what to change.
    """
    available = available_memory(device)
    memory, start = PeakMemory(device), time.perf_counter()
    try:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        room = "" if available is None else f" ({in_units(available)}, model included)"
        raise UserError(f"the longest batch, {what}, does not fit into the memory of {device}{room}: lower it by {advice}") from error
    return Cost(memory.bytes(), available, time.perf_counter() - start)


def available_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device that are free or already this process's; None elsewhere."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device, or of this process, was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def smaller_batches(batch_size: int, grad_accumulation: int, recomputes: bool) -> str:
    """What to change where a batch does not fit: half of it with twice the accumulation, which trains alike, and gradient checkpointing if it is off."""
    ways = [f"--batch-size {batch_size // 2} --grad-accumulation {grad_accumulation * 2}"] if batch_size > 1 else []
    ways += [] if recomputes else ["--gradient-checkpointing"]
    return " or ".join(ways) or "a smaller --max-caption-tokens, --image-size or model"


def describe_cost(what: str, cost: Cost) -> str:
    """`longest batch: 128 images x 40 tokens, 3.4 GiB of 79.1 GiB, 1.2 s`, with as much of it as is known."""
    memory = " of ".join(in_units(size) for size in (cost.bytes, cost.available) if size is not None)
    return ", ".join(part for part in (f"longest batch: {what}", memory, f"{cost.seconds:.1f} s") if part)


# The disk


def moments_like(trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named, shaped and placed as the moments of AdamW that a checkpoint holds, before the optimiser has any.

    They hold noise, since file systems that compress would store zeros in no space.
    """
    moments = {}
    for name, parameter in trainable.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}/{moment}"] = torch.empty_like(parameter, requires_grad=False)
            local(moments[f"{name}/{moment}"]).uniform_(generator=torch.Generator(parameter.device).manual_seed(0))
        moments[f"{name}/step"] = torch.zeros((), device=parameter.device)
    return moments


def checkpoint_bytes(model: nn.Module, trainable: Mapping[str, Tensor], embedded: Iterable[str]) -> int:
    """About the bytes of a checkpoint: what was added, bridge and embedded backbones (`vision`, `text`) in fp32, and the moments."""
    parts = [model.get_submodule(part) for part in ("bridge", *embedded)]
    saved = {id(parameter): parameter for part in parts for parameter in part.parameters()}
    saved |= {id(parameter): parameter for parameter in lora.adapter_parameters(model).values()}
    return sum(4 * parameter.numel() for parameter in saved.values()) + sum(8 * parameter.numel() for parameter in trainable.values())


def check_writing(run: Path, write: Callable[[Path], None], read: Callable[[Path], None] | None = None, needed: int | None = None) -> int:
    """Write a checkpoint into run/checkpoints by write(directory), sync it, read it back, compare, and remove it; its bytes.

    read(directory), if given, opens it as a resume would. needed: about its bytes, for messages. Raises UserError, which names the directory and the bytes
    needed and free, where the disk is full, read-only, not permitted, gone, or gives back other bytes than were written.
    """
    checkpoints, is_new = run / "checkpoints", False
    directory = checkpoints / f".preflight.{os.getpid()}"
    try:
        with told_with_bytes(checkpoints, needed):
            is_new = not checkpoints.exists()
            checkpoints.mkdir(exist_ok=True)
            directory.mkdir()
            write(directory)
            size = read_back(directory)
        if read is not None:
            read(directory)
        return size
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                checkpoints.rmdir()


def read_back(directory: Path) -> int:
    """Sync all files under directory and compare what the disk gives back; their bytes. Raises UserError where it is something else."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    written = {path: digest(path) for path in files}
    for path in files:
        sync(path)
        forget(path)
    damaged = [path.relative_to(directory) for path in files if digest(path) != written[path]]
    if damaged:
        raise UserError(f"{directory.parent}: the disk gives back other bytes than were written ({damaged[0]})")
    return sum(path.stat().st_size for path in files)


def forget(path: Path) -> None:
    """Let the kernel drop what it holds of a synced file, where it can be told to, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digest(path: Path) -> bytes:
    """BLAKE2 of a file, the fastest of hashlib on CPUs without instructions for SHA."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


@contextlib.contextmanager
def told_with_bytes(directory: Path, needed: int | None) -> Iterator[None]:
    """Errors of writing a checkpoint into directory, in one UserError that names it and the bytes needed and, before it, free."""
    room = needed_and_free(directory, needed)
    try:
        yield
    except (OSError, UserError) as error:
        cause = system_error(error)
        if isinstance(error, UserError) and cause is None:
            raise
        reason = "the disk is full" if cause in FULL else os.strerror(cause) if cause else describe_os_error(error)
        raise UserError(f"{directory}: a checkpoint cannot be written: {reason} ({room})") from error


def system_error(error: BaseException | None) -> int | None:
    """The errno behind an exception, also behind those raised from it and safetensors' own; None where there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        told = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if told:
            return int(told[1])
        error = error.__cause__
    return None


def needed_and_free(path: Path, needed: int | None) -> str:
    """`2.1 GiB needed, 3.0 MiB free`: for messages about what could not be written below path."""
    free = free_bytes(path)
    parts = [] if needed is None else [f"{in_units(needed)} needed"]
    return ", ".join([*parts, "free space unknown" if free is None else f"{in_units(free)} free"])


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write below path or its nearest directory that exists; None where the system does not tell."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def in_units(count: int) -> str:
    """`3.4 GiB`: bytes as people write them."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
