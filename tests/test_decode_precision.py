"""Decoding with weights in bf16 and int8: products against integers in numpy, steps against the same rounding in the plain modules."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora
from captioner import decode_weights, generate, sampling
from captioner.cache import BeamCache, DecoderCache
from captioner.decode_weights import BF16Weight, Int8Weight, choose_precision, quantize_rows
from captioner.errors import UserError
from lora.soft_prompt import SoftPrompt
from tests.test_generate import TOKENS, memory_of, pair

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(decode_weights.int8_obstacle(CPU) is not None, reason=str(decode_weights.int8_obstacle(CPU)))
WIDE = dict(d_model=64, d_kv=16, d_ff=128, num_heads=4)  # whose products have the shapes of int8 kernels
LOSSY = ["bf16", pytest.param("int8", marks=needs_int8)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose rows differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.logspace(-2, 1, shape[0])[:, None]


def round_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row as scale * integers of -127 to 127, in the arithmetic of fp32."""
    scale = np.abs(x).max(1, keepdims=True) * np.float32(1 / 127)
    return scale, np.rint(x * (np.float32(1) / scale))


def round_row_to_256_levels(x: np.ndarray) -> tuple[float, float, np.ndarray]:
    """scale, zero point and levels 0 to 255 from the least value (or 0) to the largest (or 0): FBGEMM's asymmetric quantisation."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return scale, zero, np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255)


# ---- products -----------------------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize("rows", [1, 2, 10, 41])
@pytest.mark.parametrize(("width", "size"), [(24, 40), (64, 192), (200, 33)])
def test_products_are_those_of_the_integers(rows, width, size):
    x, weight = random(rows, width), random(size, width, seed=1)
    x_scale, x_integers = round_rows(x.numpy())
    w_scale, w_integers = round_rows(weight.numpy())
    expected = (x_integers @ w_integers.T) * x_scale.astype(np.float64) * w_scale[:, 0].astype(np.float64)
    found = Int8Weight(weight)(x).double().numpy()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert (np.abs(found - expected) <= 1e-6 * (np.abs(x_integers) @ np.abs(w_integers).T) * x_scale * w_scale[:, 0]).all()


@needs_int8
@pytest.mark.parametrize(("width", "size"), [(24, 40), (64, 192), (200, 33)])
def test_a_product_of_one_row_has_256_levels_between_least_and_largest(width, size):
    weight = random(size, width, seed=1)
    w_scale, w_integers = round_rows(weight.numpy())
    product = Int8Weight(weight, rows=1)
    if not product.one_row:
        pytest.skip("this PyTorch has no FBGEMM")
    for x in (random(1, width), random(1, width).abs(), -random(1, width).abs()):
        scale, zero, levels = round_row_to_256_levels(x.numpy())
        expected = ((levels - zero) @ w_integers.T) * scale * w_scale[:, 0].astype(np.float64)
        # A value that lies in the middle between two levels may go to either.
        slack = scale * np.abs(w_integers * w_scale).max(1) * 1.01
        wrong = np.abs(product(x).double().numpy() - expected)
        assert (wrong <= slack).all() and (wrong > 1e-5 * np.abs(expected).max()).sum() <= size // 10


@needs_int8
@pytest.mark.parametrize("rows", [None, 1])
def test_a_rows_product_does_not_depend_on_the_others_and_errs_no_more_than_rounding(rows):
    x, weight = random(9, 64), random(48, 64, seed=1)
    product = Int8Weight(weight, rows)
    together = product(x)
    assert torch.equal(together, torch.cat([product(row) for row in x.split(1)]))
    w_scale, w_integers = quantize_rows(weight)
    x_step = x.abs().amax(-1, keepdim=True) / 127
    if product.one_row:
        x_step = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / 255 * 2  # the zero point is rounded too
    bound = x.abs().sum(-1, keepdim=True) * w_scale.t() / 2 + x_step / 2 * (w_scale * w_integers).abs().sum(-1)
    wrong = (together - x @ weight.t()).abs()
    assert (wrong <= 1.001 * bound).all() and wrong.max() > 0


@needs_int8
@pytest.mark.parametrize("rows", [1, 6])
def test_weights_stored_by_column_give_the_same(rows):
    weight, x = random(48, 64), random(rows, 64, seed=1)
    assert torch.equal(Int8Weight(weight.t().contiguous().t(), rows)(x), Int8Weight(weight, rows)(x))


def test_rows_and_outputs_of_zeros_give_zeros():
    x, weight = random(3, 64), random(48, 64, seed=1)
    x[1], weight[5] = 0, 0
    found = Int8Weight(weight)(x)
    assert (found[1] == 0).all() and (found[:, 5] == 0).all() and found.isfinite().all()
    assert (Int8Weight(weight, 1)(x[1:2]) == 0).all()


def test_bf16_products_are_pytorchs():
    x, weight = random(7, 64), random(48, 64, seed=1)
    found, exact = BF16Weight(weight)(x), x.bfloat16().double() @ weight.bfloat16().double().t()
    assert found.dtype == torch.bfloat16
    theirs = (F.linear(x.bfloat16(), weight.bfloat16()).double() - exact).norm()
    assert (found.double() - exact).norm() <= 1.5 * theirs


# ---- steps --------------------------------------------------------------------------------------------------


def steps_of(text, memory, ids, mask=None) -> torch.Tensor:
    """Logits (R, T, V) of every token of ids (R, T), one step a token."""
    with torch.no_grad():
        state = DecoderCache(text, memory, len(ids) // len(memory), ids.shape[1], mask)
        return torch.stack([state.step(ids[:, t]).float() for t in range(ids.shape[1])], dim=1)


def random_ids(rows: int, length: int) -> torch.Tensor:
    ids = torch.randint(2, 190, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    return ids


class RoundedLinear(nn.Module):
    """x W^T with W's outputs and x's rows rounded as int8 rounds them, in floating point."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale, integers = quantize_rows(linear.weight.detach())
        self.weight = (scale * integers).double()

    def forward(self, x):
        scale, integers = quantize_rows(x.float())
        return ((scale * integers).double() @ self.weight.t()).float()


@needs_int8
@pytest.mark.parametrize("variant", ["v1.1", "v1.0"])
def test_int8_steps_are_those_of_modules_that_round(variant, monkeypatch):
    monkeypatch.setattr(decode_weights, "cpu_has_amx", lambda: False)  # keys and values stay in fp32
    _, ours = pair(0, variant=variant, **WIDE)
    memory, ids = memory_of(0, 2, 64), random_ids(6, 8)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 6:] = False
    rounding = copy.deepcopy(ours.text)
    for name, module in list(rounding.decoder.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")):
            rounding.decoder.set_submodule(name, RoundedLinear(module))
    head = RoundedLinear(rounding.lm_head)
    with torch.no_grad():
        whole = ours.text.logits(ours.text.decode(ids, memory, mask))
        rounded = head(rounding.scaled(rounding.decode(ids, memory, mask)))
    generate.prepare_for_decoding(ours, 6, "int8")
    wrong, coarse = (steps_of(ours.text, memory, ids, mask) - rounded).norm(), (rounded - whole).norm()
    assert wrong < 0.1 * coarse, "what is left are numbers that sums in another order move across the middle between two integers"
    assert 0.002 * whole.norm() < coarse < 0.1 * whole.norm()


@pytest.mark.parametrize("variant", ["v1.1", "v1.0"])
def test_bf16_errs_no_more_than_transformers_in_bf16(variant):
    from transformers.modeling_outputs import BaseModelOutput

    theirs, ours = pair(0, variant=variant, **WIDE)
    memory, ids = memory_of(0, 2, 64), random_ids(2, 8)
    with torch.no_grad():
        exact = theirs(encoder_outputs=BaseModelOutput(memory), decoder_input_ids=ids).logits
        theirs = theirs.bfloat16()(encoder_outputs=BaseModelOutput(memory.bfloat16()), decoder_input_ids=ids).logits.float()
    generate.prepare_for_decoding(ours, 2, "bf16")
    assert 0 < (steps_of(ours.text, memory, ids) - exact).norm() < (theirs - exact).norm()


@pytest.mark.parametrize("precision", LOSSY)
def test_branched_steps_and_steps_after_a_prefix_are_those_of_each_beams_own_text(precision):
    _, ours = pair(0, **WIDE)
    ours.text.decoder.prefix = SoftPrompt(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
    generate.prepare_for_decoding(ours, 6, precision)
    memory, generator = memory_of(0, 2, 64), torch.Generator().manual_seed(0)
    texts = torch.zeros(2, 3, 1, dtype=torch.long)
    with torch.no_grad():
        state = BeamCache(ours.text, memory, 3, 5)
        for _ in range(5):
            step = state.step(texts[..., -1].flatten()).float()
            whole = ours.text.logits(ours.text.decode(texts.flatten(0, 1), memory)[:, -1])
            assert (step - whole).norm() < 0.1 * whole.norm()
            parents = torch.randint(3, (2, 3), generator=generator)
            state.branch(parents)
            texts = texts.gather(1, parents[..., None].expand_as(texts))
            texts = torch.cat([texts, torch.randint(2, 190, (2, 3, 1), generator=generator)], dim=-1)


@pytest.mark.parametrize("precision", LOSSY)
@pytest.mark.parametrize("rows", [None, 1])
def test_captions_are_mostly_the_same(precision, rows):
    """Random models have no clear favourites: most greedy captions, and the first tokens of nearly all, are expected to be the same."""
    same = first = count = 0
    for seed in range(3):
        _, ours = pair(seed, eos_boost=1.5, **WIDE)
        memory = memory_of(seed, 6, 64)
        exact = generate.greedy(ours, memory, max_new_tokens=6)
        generate.prepare_for_decoding(ours, rows, precision)
        ids = generate.greedy(ours, memory, max_new_tokens=6)
        length = min(ids.shape[1], exact.shape[1])
        same += (ids[:, :length] == exact[:, :length]).all(1).sum().item()
        first += (ids[:, 1] == exact[:, 1]).sum().item()
        count += len(ids)
        assert generate.beam_search(ours, memory, num_beams=3, max_length=7).shape[0] == len(memory)
        assert generate.sample(ours, memory, n=2, max_new_tokens=4).shape[:2] == (6, 2)
    assert same > 0.5 * count and first > 0.8 * count


@pytest.mark.parametrize("precision", LOSSY)
def test_weights_and_modes_stay_and_fp32_comes_back(precision):
    _, ours = pair(2, **WIDE)
    memory, before = memory_of(2, 3, 64), {name: tensor.clone() for name, tensor in ours.text.state_dict().items()}
    exact = generate.greedy(ours, memory)
    kept = generate.prepare_for_decoding(ours, 3, precision)
    assert kept.precision == precision and kept.left_out == 0 and kept.count == 3 * 11 + 1
    generate.greedy(ours, memory)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.text.state_dict().items())
    assert generate.prepare_for_decoding(ours, 3).precision == "fp32"
    assert torch.equal(generate.greedy(ours, memory), exact)


@pytest.mark.parametrize("precision", LOSSY)
def test_a_decoder_that_has_changed_is_refused(precision):
    _, ours = pair(2, **WIDE)
    memory = memory_of(2, 2, 64)
    for change in (
        lambda block: block.mlp.wo.weight.detach().mul_(2),
        lambda block: block.cross_attn.k_proj.weight.detach().zero_(),
        lambda block: setattr(block.self_attn, "q_proj", copy.deepcopy(block.self_attn.q_proj)),
    ):
        generate.prepare_for_decoding(ours, 2, precision)
        generate.greedy(ours, memory)
        with torch.no_grad():
            change(ours.text.decoder.blocks[1])
        with pytest.raises(UserError, match="prepare it again"):
            generate.greedy(ours, memory)


@pytest.mark.parametrize("precision", LOSSY)
def test_layers_with_unmerged_lora_compute_for_themselves(precision):
    _, ours = pair(3, **WIDE)
    model = nn.Module()
    model.text = ours.text
    lora.apply_lora(model, ("attn",), ("decoder",), rank=4, alpha=4, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora.adapter_parameters(model).items():
            parameter.normal_(std=0.1 if name.endswith("lora_B") else 0.125, generator=generator)
    memory, ids = memory_of(3, 2, 64), random_ids(4, 6)
    base = steps_of(pair(3, **WIDE)[1].text, memory, ids)
    exact = steps_of(model.text.eval(), memory, ids)
    kept = generate.prepare_for_decoding(model, 4, precision)
    assert kept.left_out == 3 * 8 and kept.count == 3 * 11 + 1
    wrong = (steps_of(model.text, memory, ids) - exact).norm()
    assert 0 < wrong < 0.1 * exact.norm() and wrong < 0.5 * (base - exact).norm(), "the LoRA is there"
    assert generate.greedy(model, memory).shape[0] == 2


# ---- which precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amx", "int8", "rows", "expected"),
    [
        (True, True, 1, "int8"),
        (True, True, 48, "int8"),
        (True, True, 49, "bf16"),
        (True, True, None, "bf16"),
        (False, True, 160, "int8"),
        (True, False, 1, "bf16"),
        (False, False, 1, "fp32"),
    ],
)
def test_auto_takes_the_fastest(amx, int8, rows, expected, monkeypatch):
    monkeypatch.setattr(decode_weights, "cpu_has_amx", lambda: amx)
    monkeypatch.setattr(decode_weights, "_int8_obstacle_on_cpu", lambda: None if int8 else "not here")
    assert choose_precision("auto", CPU, rows) == expected
    assert choose_precision("auto", torch.device("cuda"), rows) == "fp32"


def test_int8_that_cannot_be_had_is_an_error(monkeypatch):
    with pytest.raises(UserError, match="--decode-precision int8: it needs a CPU"):
        choose_precision("int8", torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    decode_weights._int8_obstacle_on_cpu.cache_clear()
    try:
        with pytest.raises(UserError, match="lacks VNNI"):
            choose_precision("int8", CPU)
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
        monkeypatch.setattr(Int8Weight, "__call__", lambda self, x: torch.zeros(len(x), 16))
        decode_weights._int8_obstacle_on_cpu.cache_clear()
        with pytest.raises(UserError, match="multiplies wrongly"):
            choose_precision("int8", CPU)
    finally:
        decode_weights._int8_obstacle_on_cpu.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_weights_on_a_gpu():
    _, ours = pair(0, **WIDE)
    memory, ids = memory_of(0, 2, 64), random_ids(4, 6)
    exact = steps_of(ours.text, memory, ids)
    ours.text.cuda()
    generate.prepare_for_decoding(ours, 4, "bf16")
    wrong = (steps_of(ours.text, memory.cuda(), ids.cuda()).cpu() - exact).norm()
    assert 0 < wrong < 0.05 * exact.norm()


# ---- the largest of many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [32128, 640, 96, 33])
@pytest.mark.parametrize("decimals", [0, 6])
def test_the_largest_scores(vocabulary, decimals):
    scores = torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0)).round(decimals=decimals)
    scores[0, 7] = -torch.inf
    scores[1] = scores[1].sort().values
    assert torch.equal(sampling.argmax(scores), (scores == scores.amax(-1, keepdim=True)).int().argmax(-1))
    for k in (1, 3, 20, 33):
        values, ids = sampling.topk(scores, k)
        assert torch.equal(values, scores.topk(k).values) and torch.equal(scores.gather(1, ids), values)
        assert all(len(set(row)) == k for row in ids.tolist())
    every_other = scores[:, ::2]
    assert torch.equal(sampling.topk(every_other, 3)[0], every_other.topk(3).values)
