"""Dropout masks from a counter: the hash against plain integers, rates and independence, and who seeds them."""

import math

import pytest
import torch
from torch import nn

import lora
from lora.masks import DropoutStream, adapter_key, adapter_keys, drop_level, keep_fields, keep_probability, mix, stream_state

WORD = 2**64


def hashed(x: int) -> int:
    """The hash on unsigned integers, arithmetic shifts spelled out."""

    def shifted(x: int, by: int) -> int:
        return (x >> by) | (((1 << by) - 1) << (64 - by) if x >> 63 else 0)

    x = (x ^ shifted(x, 32)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ shifted(x, 29)) * 0x94D049BB133111EB % WORD
    return x ^ shifted(x, 32)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 64])
def test_a_mask_is_the_hash_of_its_counter(columns):
    golden = 0x9E3779B97F4A7C15
    state = hashed((hashed(5) + 8 * golden) % WORD)
    key = hashed((state + 3 * golden) % WORD)
    mask = keep_fields(adapter_key(torch.tensor([stream_state(5, 7)]), 2), 4, 6, columns, 0.3)
    for row in range(6):
        for column in range(columns):
            draw = hashed((key + ((row + 4) * math.ceil(columns / 4) + column // 4) * golden) % WORD)
            kept = (draw >> (16 * (column % 4)) & 0x7FFF) < 32768 - round(0.3 * 32768)
            assert mask[row, column].item() == -kept


def test_keys_of_integers_and_of_tensors_are_the_same():
    state = torch.tensor([stream_state(1, 2)])
    assert torch.equal(adapter_keys(state, [0, 5]), torch.cat([adapter_key(state, 0), adapter_key(state, 5)]))
    assert mix(-1) == mix(2**64 - 1)


def mask(rate=0.5, seed=0, step=0, adapter=0, shape=(2000, 512)):
    return keep_fields(adapter_key(torch.tensor([stream_state(seed, step)]), adapter), 0, *shape, rate).double()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_keep_rate(rate):
    kept = mask(rate) < 0
    assert set(mask(rate).unique().tolist()) == {-1, 0}
    for field in (kept, kept[:, 0::4], kept[:, 1::4], kept[:, 2::4], kept[:, 3::4], kept[::7]):
        assert field.double().mean().item() == pytest.approx(1 - rate, abs=4.5 * math.sqrt(rate * (1 - rate) / field.numel()))
    assert keep_probability(rate) == pytest.approx(1 - rate, abs=2**-16)
    assert keep_probability(0.1) == 1 - 3277 / 32768 and drop_level(1e-6) == 0


def correlation(a, b):
    """In standard deviations of what independent ones show."""
    return abs(((a + 0.5) * (b + 0.5)).mean().item()) * 4 * math.sqrt(a.numel())


def test_elements_adapters_steps_and_seeds_are_independent():
    first = mask()
    pairs = [(first, mask(seed=1)), (first, mask(step=1)), (first, mask(adapter=1)), (mask(step=1), mask(adapter=1))]
    pairs += [(first[:, :-by], first[:, by:]) for by in (1, 2, 3, 4, 5, 8)] + [(first[:-by], first[by:]) for by in (1, 2, 16)]
    assert max(correlation(*pair) for pair in pairs) < 4.5


def test_a_stream_that_nobody_seeds_follows_pytorchs_generator():
    stream = DropoutStream()
    torch.manual_seed(4)
    first, second = stream.state(torch.device("cpu")).item(), stream.state(torch.device("cpu")).item()
    torch.manual_seed(4)
    assert stream.state(torch.device("cpu")).item() == first != second


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.text = nn.Module()
    model.text.decoder = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "k_proj": nn.Linear(64, 64)})
    lora.apply_lora(model, ("attn",), dropout=0.5)
    for name, parameter in lora.adapter_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.ones_(parameter)
    return model


def test_seed_dropout_fixes_the_masks_of_a_model_and_nothing_else_does():
    model = two_layers().train()
    q, k, x = model.text.decoder["q_proj"], model.text.decoder["k_proj"], torch.ones(4, 64)
    lora.seed_dropout(model, 3, 5)
    first = q(x)
    torch.manual_seed(1)
    assert torch.equal(q(x), first)
    lora.seed_dropout(model, 3, 6)
    assert not torch.equal(q(x), first)
    lora.seed_dropout(model, 3, 5)
    assert torch.equal(q(x), first)
    k.lora_A, k.lora_B, k.base = q.lora_A, q.lora_B, q.base
    assert not torch.equal(k(x), first), "two layers share a mask"


def test_recomputing_a_block_draws_the_same_masks():
    from torch.utils.checkpoint import checkpoint

    model = two_layers().train()
    q = model.text.decoder["q_proj"]
    gradients = []
    for seeded in (True, False):
        for recompute in (False, True):
            lora.seed_dropout(model, 1, 1) if seeded else setattr(q.stream, "seeded", None)
            torch.manual_seed(7)
            x = torch.linspace(-1, 1, 256).view(4, 64).requires_grad_()
            y = checkpoint(q, x, use_reentrant=False) if recompute else q(x)
            y.square().sum().backward()
            gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[2], gradients[3]) and not torch.equal(gradients[0], gradients[2])


def test_layers_in_different_modes_are_computed_each_in_its_own():
    model = two_layers().train()
    q, k, x = model.text.decoder["q_proj"], model.text.decoder["k_proj"], torch.ones(4, 64)
    k.eval()
    lora.seed_dropout(model, 1, 1)
    together = lora.LoRALinear.project(x, [q, k])
    assert torch.equal(together[0], q(x)) and torch.equal(together[1], k(x))
