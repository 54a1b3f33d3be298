"""Loss and gradient of a chunk of logits in two passes over each row, in place: the CUDA form of `captioner.cross_entropy.plain_row_losses`.

The first pass keeps a running maximum and the sum of exponentials relative to it, rescaled whenever the maximum grows (Milakov & Gimelshein, arXiv
1805.02867); the second writes the gradient. Rows are independent and nothing is added atomically, so results repeat to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns at a time
NUM_WARPS = 8


@triton.jit
def row_losses_kernel(
    logits_ptr, labels_ptr, losses_ptr, row_stride, vocabulary, label_smoothing, GRADIENT: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row: logits (m, vocabulary) with unit column stride, labels (m,) int64 → losses (m,) fp32.

    A row of label -100 has loss and gradient 0, one of another label outside the vocabulary has the loss NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    columns = tl.arange(0, BLOCK)
    known = (label >= 0) & (label < vocabulary)
    expected = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)

    peak = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)  # a partial sum for each lane, so that a block is reduced for its maximum only
    logit_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.exp(x - higher)
        peak = higher
        if SMOOTH:
            logit_sum += tl.where(inside, x, 0.0)
    row_total = tl.sum(total, 0)

    if SMOOTH:
        expected += label_smoothing * (tl.sum(logit_sum, 0) / vocabulary - expected)
    counts = label != -100
    tl.store(losses_ptr + row, tl.where(counts, tl.log(row_total) - (expected - peak), 0.0))

    if GRADIENT:
        tl.debug_barrier()  # no thread writes before all have read: the label's logit is not its own thread's alone
        scale = 1.0 / row_total
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - peak) * scale
            target = tl.where(start + columns == label, 1.0, 0.0)
            if SMOOTH:
                target = target * (1.0 - label_smoothing) + label_smoothing / vocabulary
            gradient = tl.where(counts, gradient - target, 0.0)
            tl.store(logits_ptr + start + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def row_losses(logits: Tensor, labels: Tensor, label_smoothing: float, gradient: bool) -> Tensor:
    """logits (m, V) bf16 or fp32, unit column stride, labels (m,) int64 → losses (m,) fp32; the logits become their gradient where asked for."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    arguments = (logits, labels.contiguous(), losses, logits.stride(0), logits.shape[1], float(label_smoothing))
    with torch.cuda.device_of(logits):
        row_losses_kernel[(len(logits),)](*arguments, GRADIENT=gradient, SMOOTH=label_smoothing > 0, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return losses
