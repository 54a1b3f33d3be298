"""Attention without keys and values against projecting first, and the cheap dropout."""

import math

import pytest
import torch
import torch.nn.functional as F

from captioner.attention import MemoryAttention, few_queries
from captioner.dropout import Dropout
from captioner.t5 import Attention, T5Config

B, T, H, K, N, D, R = 2, 3, 2, 4, 5, 6, 2


def arguments(side: bool, dtype=torch.float64) -> list:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, K), (B, N, D)] + 2 * [(H * K, D), (B, N, R), (H * K, R)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return tensors if side else [None if index in (3, 4, 6, 7) else tensor for index, tensor in enumerate(tensors)]


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_projecting_first(side, masked):
    q, X, Wk, Zk, Fk, Wv, Zv, Fv = arguments(side)
    bias = torch.zeros(B, 1, N, dtype=torch.float64)
    if masked:
        bias[1, 0, 3:] = torch.finfo(torch.float32).min
    keys, values = (
        (X @ W.t() + (Z @ F_.t() if side else 0)).view(B, N, H, K).transpose(1, 2)
        for W, Z, F_ in ((Wk, Zk, Fk), (Wv, Zv, Fv))
    )
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=bias[:, None], scale=1.0
    ).transpose(1, 2)
    found = MemoryAttention.apply(q, X, Wk, Zk, Fk, Wv, Zv, Fv, bias if masked else None, 0.0)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_gradients_against_finite_differences(side, rate):
    tensors = arguments(side)

    def function(*given):
        torch.manual_seed(1)
        given = iter(given)
        return MemoryAttention.apply(*(None if tensor is None else next(given) for tensor in tensors), None, rate)

    assert torch.autograd.gradcheck(function, [tensor for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("captions", [1, 2])
def test_the_module_gives_the_same_either_way(captions, monkeypatch):
    torch.manual_seed(0)
    attention = Attention(T5Config(d_model=16, num_heads=2, d_kv=8, dropout_rate=0.0))
    x, memory = torch.randn(2 * captions, 2, 16), torch.randn(2, 40, 16, requires_grad=True)
    assert few_queries(2 * captions, 40, 8)
    results = []
    for few in (True, False):
        monkeypatch.setattr("captioner.t5.few_queries", lambda *_, few=few: few)
        y = attention.attend_memory(x, memory, None)
        results.append([y, *torch.autograd.grad(y.square().sum(), [memory, *attention.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_its_rate_its_mean_and_its_gradient():
    torch.manual_seed(0)
    layer, x = Dropout(0.1), torch.ones(1000, 999, requires_grad=True)
    y = layer(x)
    kept = y > 0
    assert kept.double().mean().item() == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 999_000))
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9], abs=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(layer.eval()(x), x)
    torch.manual_seed(5)
    first = layer.train()(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
