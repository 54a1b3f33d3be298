"""A training step replayed from CUDA graphs: the GPU runs it without waiting for Python to launch its some two thousand kernels one by one.

A graph fixes the shapes and addresses of all it reads, so there is one per shape of the inputs (images, caption length), with buffers that a batch is
copied into, and nothing in the step may depend on a value that is on the device. What changes from step to step is read from device tensors: learning
rate, dropout state, torch's generator (whose seed a replay reads anew). API and restrictions: "CUDA Graphs" in PyTorch's CUDA semantics notes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.errors import UserError

Inputs = list[dict[str, Tensor]]  # micro-batches of one step: features (B, N, D) or pixel_values (B, 3, H, W), labels (B*G, T)
Step = Callable[[Inputs], tuple[Tensor, ...]]

WARM_UPS = 2  # steps of a shape before it is recorded: libraries choose kernels and the optimiser makes its moments in them
MOST_GRAPHS = 32


def shape_key(inputs: Inputs) -> tuple:
    """What a graph is recorded for: names, shapes and dtypes of all tensors."""
    return tuple(tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(micro.items())) for micro in inputs)


@dataclass(frozen=True)
class FullBatches:
    """Which inputs come again and again: one batch of `images`, its captions padded to one of `widths`. The last batch of an epoch and one with a bad
    image do not, and of several micro-batches each has a seed of its own, which is set between them.
    """

    images: int
    widths: Sequence[int]

    def __call__(self, inputs: Inputs) -> bool:
        content = inputs[0]["features"] if "features" in inputs[0] else inputs[0]["pixel_values"]
        return len(inputs) == 1 and len(content) == self.images and inputs[0]["labels"].shape[-1] in self.widths


class Recorder:
    """Runs a function on a stream of its own, and records functions into graphs that share one pool of memory.

    They may share it because no tensor of a replay is read after the next one, so that the memory of all is that of the largest.
    """

    def __init__(self, device: torch.device):
        """Raises UserError on a device without CUDA."""
        if device.type != "cuda":
            raise UserError(f"CUDA graphs need a CUDA device, not {device}")
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The function's results; recording needs that it ran on this stream before."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = function()
        current.wait_stream(self.stream)
        return results

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """(replay, results): each call of replay runs the function's kernels again and overwrites results.

        Raises UserError where the function does what a graph can not hold, such as waiting for the device.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Errors of this thread alone: a thread that pins batches in memory may make CUDA calls meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                results = function()
        except RuntimeError as error:
            raise UserError(f"CUDA graphs can not record this training step ({str(error).splitlines()[0]})") from error
        return graph.replay, results


@dataclass(frozen=True)
class RecordedStep:
    """A graph with the buffers that it reads and writes."""

    inputs: Inputs
    replay: Callable[[], None]
    results: tuple[Tensor, ...]


class StepGraphs:
    """`step` with the same arguments and results, replayed where the inputs are regular and of a shape that came WARM_UPS times before.

    step: inputs → tensors on the device. It must leave no gradients behind, take all its randomness from torch's generators or device tensors that are
    set before the call, and write nothing but parameters, moments and results. The results hold until the next call.
    """

    def __init__(self, step: Step, recorder: Recorder, is_regular: Callable[[Inputs], bool], most: int = MOST_GRAPHS):
        self.step, self.recorder, self.is_regular, self.most = step, recorder, is_regular, most
        self.recorded: dict[tuple, RecordedStep] = {}
        self.seen: Counter[tuple] = Counter()

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        key = shape_key(inputs)
        if key not in self.recorded:
            if not self.is_regular(inputs) or len(self.recorded) == self.most:
                return self.step(inputs)
            self.seen[key] += 1
            if self.seen[key] <= WARM_UPS:
                return self.recorder.run(lambda: self.step(inputs))
            self.recorded[key] = self.record(inputs)
        recorded = self.recorded[key]
        for buffer, tensor in zip(tensors_of(recorded.inputs), tensors_of(inputs), strict=True):
            buffer.copy_(tensor, non_blocking=True)
        recorded.replay()
        return recorded.results

    def record(self, inputs: Inputs) -> RecordedStep:
        """A graph of the step for inputs of these shapes; nothing is computed yet."""
        buffers = [{name: torch.empty_like(tensor, device=self.recorder.device) for name, tensor in micro.items()} for micro in inputs]
        return RecordedStep(buffers, *self.recorder.record(lambda: self.step(buffers)))


def tensors_of(inputs: Inputs) -> Iterable[Tensor]:
    """All tensors, in the order of `shape_key`."""
    return (micro[name] for micro in inputs for name in sorted(micro))
