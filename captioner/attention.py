"""Attention with dropout on a CPU, and cross-attention of few queries over a long memory that forms no keys and values of it:

    scores_h = q_h K_h^T = (q_h Wk_h) X^T        mixed_h = P_h V_h = (P_h X) Wv_h^T

X (B, N, D) is the memory, q (B, T, H, K), W the projections' weights (H*K, D). A projection may have a low-rank side
path, K = X W^T + Z F^T with Z (B, N, R) and F (H*K, R): scores_h += (q_h Fk_h) Zk^T, mixed_h += (P_h Zv) Fv_h^T. The
result is that of projecting first, to rounding. With a gradient into X it takes fewer operations below T = 2 N K / (2
K + 3 N) queries an image (35 at N = 197, K = 64), and keeps no (N, H*K) tensor.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from captioner.dropout import apply_keep_mask, draw_keep_mask, drop_level, keep_scale


def few_queries(queries: int, keys: int, head_dim: int) -> bool:
    """Whether T queries over N keys are cheaper without projecting the memory."""
    return queries * (2 * head_dim + 3 * keys) < 2 * keys * head_dim


def heads_first(x: Tensor) -> Tensor:
    """(B, T, H, C) → (H, B*T, C), a view."""
    return x.flatten(0, 1).transpose(0, 1)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, T, H, I), weight (H, I, C) → (B, T, H, C), each head times its own matrix, written where it belongs."""
    out = x.new_empty(*x.shape[:3], weight.shape[2])
    for source, matrix, target in zip(heads_first(x), weight, heads_first(out), strict=True):
        torch.mm(source, matrix, out=target)
    return out


class DroppedAttention(torch.autograd.Function):
    """softmax(q k^T + bias), dropped out, times v, without 1/sqrt(K): q (B, H, T, K), k and v (B, H, N, K), an additive
    bias that broadcasts to (B, H, T, N) or None, the dropout rate → (B, H, T, K). As PyTorch's on a CPU, from cheaper masks.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, rate):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # products of many small matrices would copy them, transposed ones slowly
        scores = q @ k.transpose(2, 3)
        if bias is not None:
            scores += bias
        probs = torch.softmax(scores, dim=-1)
        mask = draw_keep_mask(probs, rate)
        ctx.save_for_backward(q, k, v, bias, probs, mask)
        ctx.scale = keep_scale(rate)
        return (apply_keep_mask(probs, mask) @ v).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, bias, probs, mask = ctx.saved_tensors
        dy = dy.contiguous() * ctx.scale
        dv = apply_keep_mask(probs, mask).transpose(2, 3) @ dy
        dprobs = apply_keep_mask(dy @ v.transpose(2, 3), mask)
        dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        dbias = dscores.sum_to_size(bias.shape) if ctx.needs_input_grad[3] else None
        return dscores @ k, dscores.transpose(2, 3) @ q, dv, dbias, None


class MemoryAttention(torch.autograd.Function):
    """Arguments: q (B, T, H, K), X (B, N, D), then for keys and for values W (H*K, D), Z (B, N, R) or None, F (H*K,
    R) or None, then an additive bias (B, 1, N) or None and the dropout rate of the probabilities. Returns (B, T, H,
    K).
    """

    @staticmethod
    def forward(ctx, q, X, Wk, Zk, Fk, Wv, Zv, Fv, bias, rate):
        B, T, H, K = q.shape
        by_head = (H, K, -1)
        Q = per_head(q, Wk.view(by_head))  # (B, T, H, D)
        scores = torch.bmm(Q.flatten(1, 2), X.transpose(1, 2))  # (B, T*H, N)
        side_k = None
        if Zk is not None:
            side_k = per_head(q, Fk.view(by_head))  # (B, T, H, R)
            scores.baddbmm_(side_k.flatten(1, 2), Zk.transpose(1, 2))
        if bias is not None:
            scores += bias
        probs = torch.softmax(scores, dim=-1)
        mask, kept, scale = None, probs, 1.0
        if drop_level(rate):
            mask, scale = draw_keep_mask(probs, rate), keep_scale(rate)
            kept = apply_keep_mask(probs, mask)
        read = torch.bmm(kept, X).view(B, T, H, -1)  # (B, T, H, D)
        mixed = per_head(read, Wv.view(by_head).transpose(1, 2))  # (B, T, H, K)
        side_v = None
        if Zv is not None:
            side_v = torch.bmm(kept, Zv).view(B, T, H, -1)  # (B, T, H, R)
            mixed += per_head(side_v, Fv.view(by_head).transpose(1, 2))
        ctx.save_for_backward(
            q, X, Wk, Wv, Zk, Fk, Zv, Fv, Q, side_k, side_v, probs, mask, read if ctx.needs_input_grad[5] else None
        )
        ctx.scale = scale
        return mixed.mul_(scale) if mask is not None else mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, X, Wk, Wv, Zk, Fk, Zv, Fv, Q, side_k, side_v, probs, mask, read = ctx.saved_tensors
        need_q, need_X, need_Wk, need_Wv = (ctx.needs_input_grad[index] for index in (0, 1, 2, 5))
        B, T, H, K = q.shape
        by_head = (H, K, -1)
        dX = dWk = dWv = dZk = dFk = dZv = dFv = None
        dy = dy * ctx.scale
        dread = per_head(dy, Wv.view(by_head)).flatten(1, 2)  # (B, T*H, D)
        dkept = torch.bmm(dread, X.transpose(1, 2))  # (B, T*H, N)
        kept = probs if mask is None else apply_keep_mask(probs, mask)
        if Zv is not None:
            dside_v = per_head(dy, Fv.view(by_head)).flatten(1, 2)  # (B, T*H, R)
            dkept.baddbmm_(dside_v, Zv.transpose(1, 2))
            dZv = torch.bmm(kept.transpose(1, 2), dside_v)
            dFv = torch.bmm(heads_first(dy).transpose(1, 2), heads_first(side_v)).view(H * K, -1)
        dscores = torch._softmax_backward_data(
            dkept if mask is None else apply_keep_mask(dkept, mask), probs, -1, probs.dtype
        )
        if need_X:
            dX = torch.bmm(kept.transpose(1, 2), dread).baddbmm_(dscores.transpose(1, 2), Q.flatten(1, 2))
        dQ = torch.bmm(dscores, X).view(B, T, H, -1)
        dq = per_head(dQ, Wk.view(by_head).transpose(1, 2))
        if Zk is not None:
            dside_k = torch.bmm(dscores, Zk).view(B, T, H, -1)
            dq += per_head(dside_k, Fk.view(by_head).transpose(1, 2))
            dZk = torch.bmm(dscores.transpose(1, 2), side_k.flatten(1, 2))
            dFk = torch.bmm(heads_first(q).transpose(1, 2), heads_first(dside_k)).view(H * K, -1)
        if need_Wk:
            dWk = torch.bmm(heads_first(q).transpose(1, 2), heads_first(dQ)).view(H * K, -1)
        if need_Wv:
            dWv = torch.bmm(heads_first(dy).transpose(1, 2), heads_first(read)).view(H * K, -1)
        return dq if need_q else None, dX, dWk, dZk, dFk, dWv, dZv, dFv, None, None
