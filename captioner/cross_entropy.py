"""The cross-entropy of a vocabulary's logits, which are never all there at once.

The loss of one token needs its logits alone, and so does the gradient into its hidden state: dL/dh = (softmax(W h) - one_hot) W. So rows are taken
in chunks, and the forward pass makes loss and gradients of one chunk before it goes on to the next; the backward pass multiplies the gradients by the
incoming scalar. Of the (M, V) logits and their gradient, 82 million numbers each for 128 captions of 20 tokens, at most one chunk lives.

The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989); values match `F.cross_entropy` of `F.linear`.
Legend: M tokens, m of a chunk, D width, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from captioner.errors import UserError

IGNORED = -100  # the label of a row that does not count, as in torch
# Rows of a chunk at most: fewer, and reading W again for each costs more than the logits do.
CHUNK_ROWS = {"cpu": 512, "cuda": 1024}
TILE = 128
BLOCK_NUMBERS = 2**18  # logits that a CPU works on at a time: 1 MB in fp32 stays in the cache from the first pass to the last


def head_cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of head(hidden), summed over the labels that are not -100: hidden (M, D), labels (M,) → scalar, fp32.

    A plain nn.Linear without bias goes through `linear_cross_entropy`; a head that something wraps or packs (LoRA, 4 bits) computes its logits.
    """
    if type(head) is nn.Linear and head.bias is None:
        return linear_cross_entropy(hidden, head.weight, labels, label_smoothing)
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum", label_smoothing=label_smoothing)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum", label_smoothing=...)` without its logits.

    hidden (M, D) and weight (V, D) of one dtype, or autocast's; bf16, fp32 or fp64 (fp16 gradients would need a loss scale before they are formed).
    labels (M,) int64 in [0, V), or -100 for a row that does not count (it is computed all the same). Returns a scalar, fp32, differentiable once in
    hidden and weight; only the gradients that are asked for are computed. Raises UserError for a label outside the vocabulary on a CPU; on CUDA,
    where looking would wait for the device, that is a loss of NaN or a device-side assertion.
    """
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels):
        low, high = (int(value) for value in labels.masked_fill(labels == IGNORED, 0).aminmax())
        if low < 0 or high >= len(weight):
            raise UserError(f"label {low if low < 0 else high} is outside the vocabulary of {len(weight)}")
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return LinearCrossEntropy.apply(hidden, weight, labels, label_smoothing)


class LinearCrossEntropy(torch.autograd.Function):
    """Arguments as of `linear_cross_entropy`."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, label_smoothing):
        device, (need_hidden, need_weight) = hidden.device.type, ctx.needs_input_grad[:2]
        rows, matrix = hidden, weight
        if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
            rows, matrix = (operand.to(torch.get_autocast_dtype(device)) for operand in (hidden, weight))
        wide = torch.promote_types(rows.dtype, torch.float32)
        size = chunk_rows(len(rows), CHUNK_ROWS.get(device, CHUNK_ROWS["cuda"]))
        buffer = rows.new_empty(size, len(matrix))
        grad_rows = torch.empty_like(rows) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        loss = torch.zeros((), dtype=wide, device=rows.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                logits = torch.mm(chunk, matrix.t(), out=buffer[: len(chunk)])
                loss += row_losses(logits, labels[start : start + size], label_smoothing, need_hidden or need_weight).sum()
                if need_hidden:
                    torch.mm(logits, matrix, out=grad_rows[start : start + size])
                if need_weight:
                    grad_weight += logits.t() @ chunk
        ctx.save_for_backward(grad_rows, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.hidden_dtype = hidden.dtype
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_rows, grad_weight = ctx.saved_tensors
        return (
            None if grad_rows is None else grad_rows.to(ctx.hidden_dtype) * grad_loss,
            None if grad_weight is None else grad_weight * grad_loss,
            None,
            None,
        )


def chunk_rows(rows: int, limit: int) -> int:
    """Rows of each of the fewest chunks of at most `limit`: about equal, in whole tiles of a GPU's matrix product where there are so many."""
    chunks = max(-(-rows // limit), 1)
    return min(-(-rows // (chunks * TILE)) * TILE, rows, limit) or 1


def row_losses(logits: Tensor, labels: Tensor, label_smoothing: float, gradient: bool) -> Tensor:
    """logits (m, V), labels (m,) → losses (m,) in at least fp32. The logits become their gradient where it is asked for, else nothing of use."""
    kernel = triton_row_losses() if logits.is_cuda and logits.dtype != torch.float64 else None
    return (kernel or plain_row_losses)(logits, labels, label_smoothing, gradient)


@functools.cache
def triton_row_losses() -> Callable | None:
    """`captioner.triton_cross_entropy.row_losses` where there is triton, which installs of torch for CUDA bring along on Linux."""
    try:
        from captioner.triton_cross_entropy import row_losses
    except ImportError:
        return None
    return row_losses


def plain_row_losses(logits: Tensor, labels: Tensor, label_smoothing: float, gradient: bool) -> Tensor:
    """`row_losses` in operations of torch, on a CPU a cache's worth of rows at a time."""
    vocabulary, dtype = logits.shape[1], torch.promote_types(logits.dtype, torch.float32)
    rows = max(BLOCK_NUMBERS // vocabulary, 1) if logits.device.type == "cpu" else len(logits)
    losses = logits.new_empty((len(logits), 1), dtype=dtype)
    wide = None if logits.dtype == dtype else logits.new_empty((min(rows, len(logits)), vocabulary), dtype=dtype)
    for block, label, loss in zip(logits.split(rows), labels[:, None].split(rows), losses.split(rows), strict=True):
        x = block if wide is None else wide[: len(block)].copy_(block)
        x.sub_(x.amax(1, keepdim=True))
        ignored = label == IGNORED
        label, counts = label.masked_fill(ignored, 0), (~ignored).to(dtype)  # (rows, 1)
        expected = x.gather(1, label)
        if label_smoothing:
            expected = torch.lerp(expected, x.mean(1, keepdim=True), label_smoothing)
        total = x.exp_().sum(1, keepdim=True)
        torch.sub(total.log(), expected, out=loss).mul_(counts)
        if gradient:
            x.mul_(counts / total)
            if label_smoothing:
                x.sub_(counts * (label_smoothing / vocabulary))
            x.scatter_add_(1, label, counts * (label_smoothing - 1))
            if x is not block:
                block.copy_(x)
    return losses[:, 0]
