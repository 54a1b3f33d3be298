"""FSDP2: every process holds a part of each weight, for backbones that do not fit one device (`--shard`).

The weights of a Transformer block are whole on a device only while the block runs, forwards or backwards; those outside of blocks (embeddings, head, bridge)
while a pass over the model runs. In between a parameter is a DTensor, its rows dealt to the processes, and so are its gradient and AdamW's moments, frozen
parameters as well. Whatever reads a weight therefore runs inside of `Sharded`, or after `gathered` has put it together; and since weights travel at every
block, all processes make the same passes in the same order, those without data on a blank picture.

Papers: "PyTorch FSDP" (arXiv 2304.11277); ZeRO stage 3 (arXiv 1910.02054). Legend: B images, N image tokens, D width, T text tokens, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import lora
from captioner import checkpoint, sampling
from captioner.cross_entropy import IGNORED
from captioner.errors import UserError
from captioner.model import Captioner
from captioner.processes import Processes
from captioner.trainer import StepLoss, Trainer
from captioner.vit import VisionTransformer

OLDEST_TORCH = (2, 8)  # frozen weights of another dtype beside trained ones, and sums instead of averages, which Gloo lacks


class Sharded(nn.Module):
    """A module whose forward pass, and whatever goes through `run`, finds whole weights. Every process is to call either in the same order."""

    def __init__(self, step_loss: nn.Module, blank: dict[str, Tensor]):
        """blank: what step_loss gets in a process without a micro-batch; its loss is to be zero."""
        super().__init__()
        self.step_loss, self.blank = step_loss, blank

    def forward(self, *arguments: Any, function: Callable | None = None) -> Any:
        """step_loss(batch), None being the blank batch; or function(*arguments)."""
        if function is not None:
            return function(*arguments)
        return self.step_loss(self.blank if arguments[0] is None else arguments[0])

    def run(self, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), which may call any part of the model, without gradients."""
        try:
            with torch.no_grad():
                return self(*arguments, function=function)
        finally:
            self.reshard()

    def no_sync(self) -> contextlib.nullcontext:
        """As DistributedDataParallel's, but gradients are shared out after every micro-batch all the same: whole ones might not fit."""
        return contextlib.nullcontext()


def shard(step_loss: nn.Module, model: Captioner, device: torch.device, from_features: bool = False) -> Sharded:
    """step_loss, which holds model, over the processes of the default process group; model's parameters are DTensors on the device from here on.

    All processes must have the same frozen weights, which need not be on the device yet; trained ones are those of rank 0. Parameters taken from the model
    before are no longer its own and become empty: see `trained`. Linear layers must not be laid out (`lora.lay_out`), copied (`captioner.frozen_vit`) or in
    4 bits. from_features: batches hold image tokens instead of pixels. The gradient is the mean over the processes. Raises UserError where torch is too old,
    and for a parameter that is a single number.
    """
    if torch_version() < OLDEST_TORCH:
        raise UserError(f"--shard needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, not {torch.__version__}")
    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            raise UserError(f"--shard: {name} is a single number, which can not be dealt to several processes")
    for parameter in trained(model).values():
        dist.broadcast(parameter.data, 0)  # as DistributedDataParallel does
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sharded = Sharded(step_loss, blank_batch(model, device, from_features))
    for module in (*units(model), sharded):
        whole = [parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)]
        fully_shard(module, mesh=mesh)
        for parameter in whole:
            parameter.data = parameter.new_empty(0)  # whoever still holds one must not keep its memory
    for module in sharded.modules():
        if isinstance(module, FSDPModule) and device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # Gloo knows no average
    return sharded


def torch_version() -> tuple[int, int]:
    """Major and minor."""
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def units(model: Captioner) -> list[nn.Module]:
    """The modules whose weights are put together at once: each Transformer block, an image encoder of timm as a whole."""
    stacks = [stack for stack in (model.text.encoder, model.text.decoder) if stack is not None]
    vision = list(model.vision.blocks) if isinstance(model.vision, VisionTransformer) else [model.vision]
    return [*(block for stack in stacks for block in stack.blocks), *vision]


def blank_batch(model: Captioner, device: torch.device, from_features: bool) -> dict[str, Tensor]:
    """One picture of zeros with one label that does not count: its loss and all gradients are zero, and every layer runs."""
    side, views = model.vision.image_size, (model.views,) if model.views else ()
    shape = {"features": (1, *views, 1, model.vision.width)} if from_features else {"pixel_values": (1, *views, 3, side, side)}
    content = {name: torch.zeros(size, dtype=model.bridge.weight.dtype, device=device) for name, size in shape.items()}
    return content | {"labels": torch.full((1, 1), IGNORED, device=device)}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained by name, tied ones once: what `lora.set_trainable` returned, as it is now."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over all processes; the norm before, the same scalar in each."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def distribute(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part that this process keeps of a whole tensor (a moment of AdamW), laid out as the parameter; scalars, which all keep, as they are."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor) or not tensor.ndim:
        return tensor.to(parameter.device)
    # Each process has the whole tensor, so nothing is sent.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextlib.contextmanager
def gathered(sharded: Sharded, model: Captioner, facts: dict, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, nn.Parameter]]:
    """In the body, rank 0 has the parameters that a checkpoint saves, and the optimiser's moments, whole and on the CPU: `checkpoint.save_weights` and
    `save_optimizer` are the usual ones. All processes enter it together; at the others nothing changes. Gives the trained parameters by name, as they are then.

    facts: as in config.json under "model". One tensor at a time is whole on the devices. Frozen weights that are not saved stay in parts.
    """
    sharded.reshard()
    moments = dict(optimizer.state)
    names = saved_names(model, facts)
    parts = {name: model.get_parameter(name) for name in names}
    whole = {part: nn.Parameter(put_together(part), part.requires_grad) for part in dict.fromkeys(parts.values())}
    whole_moments = {parameter: {key: put_together(moment) for key, moment in own.items()} for parameter, own in moments.items()}
    if dist.get_rank():
        yield trained(model)
        return
    try:
        for name, part in parts.items():
            put(model, name, whole[part])
        optimizer.state.update(whole_moments)
        yield trained(model)
    finally:
        for name, part in parts.items():
            put(model, name, part)
        optimizer.state.update(moments)


def put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make parameter the one of this name."""
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, parameter)


def put_together(tensor: Tensor) -> Tensor:
    """The whole of a DTensor on the CPU of rank 0, empty elsewhere; of any other tensor, itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.detach().full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)


def saved_names(model: Captioner, facts: dict) -> list[str]:
    """Names of the parameters that `checkpoint.save_weights` reads, tied ones under each: what was added, the bridge, and backbones kept with the run."""
    added = lora.adapter_parameters(model)
    whole = tuple(f"{part}." for part in ("bridge", "vision", "text") if part == "bridge" or facts[part]["embedded"])
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name in added or name.startswith(whole)]


def greedy(model: Captioner, memory: Tensor, max_new_tokens: int, processes: Processes) -> Tensor:
    """`generate.greedy` by passes over the whole text so far, inside of `Sharded.run` and in eval mode: memory (B, N, D) → ids (B, T), pad after eos.

    All processes decode, each its own images, until the last of them is done.
    """
    config, dtype = model.text.config, model.text.embedding.weight.dtype
    memory = memory.to(dtype)
    ids = torch.full((len(memory), 1), config.decoder_start_token_id, device=memory.device)
    finished = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
    length = 1
    # As in `generate.greedy`, fp32 weights decode in fp32.
    with torch.autocast(memory.device.type, enabled=torch.is_autocast_enabled(memory.device.type) and dtype != torch.float32):
        while length <= max_new_tokens and processes.any(not finished.all()):
            last = model.text.decode(ids, memory)[:, -1]
            tokens = sampling.argmax(model.text.logits(last).float()).masked_fill(finished, config.pad_token_id)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            finished = finished | (tokens == config.eos_token_id)
            length += 1
    ends = (ids == config.eos_token_id).int()
    needed = torch.where(ends.any(1), ends.argmax(1) + 1, length)
    return ids[:, : int(needed.max())]


class ShardedTrainer(Trainer):
    """`Trainer` over shared out weights, to be made in every process, of a model that may still be on the CPU. `trainable` is new: see `shard`."""

    def over_processes(self) -> Sharded:
        step_loss = StepLoss(self.model, (), self.device, self.settings.label_smoothing, self.trains_vision)
        sharded = shard(step_loss, self.model, self.device, from_features=self.settings.cache_features is not None)
        self.trainable = trained(self.model)
        return sharded

    def micro_batches(self, batches: list[dict]) -> list[dict | None]:
        """As many as the process with the most has."""
        return batches + [None] * (max(1, *self.processes.everyone(len(batches))) - len(batches))

    def clip_gradients(self) -> Tensor:
        return clip_gradients(self.trainable.values(), self.settings.clip)

    def look_at(self, batch: dict[str, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Without a batch, what comes of the blank one."""
        return self.step_loss.run(super().look_at, self.step_loss.blank if batch is None else batch)

    def greedy(self, memory: Tensor) -> Tensor:
        return greedy(self.model, memory, self.caption_tokens, self.processes)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[dict[str, Tensor]]:
        with gathered(self.step_loss, self.model, self.facts, self.optimizer) as trainable:
            yield trainable
        self.processes.wait()  # for as long as writing takes: in the next pass over the model NCCL would give up after minutes

    def load_moments(self, path: Path) -> None:
        checkpoint.load_optimizer(self.optimizer, self.trainable, path, distribute)
