"""Decoding against transformers.generate on random models, token for token in fp32."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import BaseModelOutput

import lora
from captioner import decode_weights, generate, sampling, weights
from captioner.cache import BeamCache, DecoderCache
from captioner.t5 import T5, T5Config
from tests.tiny_t5 import hf_model

SEEDS = range(12)
TOKENS = 9  # of an image


def pair(seed: int, eos_boost: float = 0.0, variant: str = "v1.1", **sizes):
    """The same random decoder in transformers and here; eos_boost stretches lm_head's eos row, so that some captions end early."""
    # Generation in transformers 5 sizes its cache by the encoder's depth.
    theirs = hf_model(variant, seed, num_layers=3, num_decoder_layers=3, **sizes)
    with torch.no_grad():
        theirs.lm_head.weight[1] *= 1 + eos_boost
    tied = theirs.lm_head.weight is theirs.shared.weight
    values = theirs.config.to_dict() | {"tie_word_embeddings": tied, "scale_decoder_outputs": tied}
    text = T5(T5Config.from_dict(values)).eval()
    weights.load_into(text, dict(theirs.state_dict()), weights.HF_T5, "transformers")
    return theirs, SimpleNamespace(text=text)


def memory_of(seed: int, batch: int, width: int = 24) -> torch.Tensor:
    return torch.randn(batch, TOKENS, width, generator=torch.Generator().manual_seed(1000 + seed))


def expected(theirs, memory, mask=None, decoder_input_ids=None, **options):
    """transformers' ids, with nothing taken from a default generation config but the special tokens."""
    config = GenerationConfig(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, do_sample=False, **options)
    mask = torch.ones(memory.shape[:2], dtype=torch.long) if mask is None else mask.long()
    given = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
    with torch.no_grad():
        return theirs.generate(encoder_outputs=BaseModelOutput(memory), attention_mask=mask, generation_config=config, **given)


def padded(ids: torch.Tensor, length: int) -> torch.Tensor:
    return nn.functional.pad(ids, (0, length - ids.shape[-1]))


# ---- token for token ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy(seed):
    theirs, ours = pair(seed, eos_boost=1.5)
    memory = memory_of(seed, 3)
    for options in ({"max_new_tokens": 12}, {"max_length": 9}, {"max_new_tokens": 12, "repetition_penalty": 1.3}):
        assert torch.equal(generate.greedy(ours, memory, **options), expected(theirs, memory, num_beams=1, **options))


@pytest.mark.parametrize("length_penalty", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("beams", [1, 4, 10])
@pytest.mark.parametrize("seed", SEEDS)
def test_beam_search(seed, beams, length_penalty):
    theirs, ours = pair(seed, eos_boost=0.5 * (seed % 4))
    memory = memory_of(seed, 1 + seed % 3)
    options = dict(num_beams=beams, length_penalty=length_penalty, max_length=11)
    assert torch.equal(generate.beam_search(ours, memory, **options), expected(theirs, memory, early_stopping=False, **options))


def test_the_random_models_end_early_in_some_rows_and_not_in_others():
    for decode, options in ((generate.beam_search, {"num_beams": 4}), (generate.greedy, {})):
        ids = [decode(pair(seed, 0.5 * (seed % 4))[1], memory_of(seed, 3), max_length=11, **options) for seed in SEEDS]
        lengths = {int((row[1:] == 1).int().argmax()) if (row[1:] == 1).any() else 11 for batch in ids for row in batch}
        assert 11 in lengths and len(lengths) > 4


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(max_new_tokens=7),
        dict(max_length=2),
        dict(max_length=8, repetition_penalty=1.4),
        dict(max_length=12, early_stopping=True),
        dict(max_length=12, early_stopping=True, length_penalty=0.0),
        dict(max_length=12, length_penalty=-1.0),
    ],
)
def test_beam_search_options(seed, options):
    theirs, ours = pair(seed, eos_boost=1.0)
    memory = memory_of(seed, 3)
    ids = generate.beam_search(ours, memory, num_beams=4, **options)
    assert torch.equal(ids, expected(theirs, memory, num_beams=4, **{"early_stopping": False} | options))


PREFIX = [17, 5, 17, 40]


@pytest.mark.parametrize("options", [dict(max_new_tokens=7), dict(max_length=13), dict(max_new_tokens=9, repetition_penalty=1.4)])
@pytest.mark.parametrize("seed", range(6))
def test_a_prefix_is_decoder_input_ids(seed, options):
    theirs, ours = pair(seed, eos_boost=0.5 * (seed % 4))
    memory = memory_of(seed, 3)
    given = torch.tensor([[0, *PREFIX]]).expand(3, -1)
    mask = torch.arange(TOKENS) < torch.tensor([[9], [4], [6]])
    for beams in (1, 4, 10):
        ids = expected(theirs, memory, mask, num_beams=beams, decoder_input_ids=given, early_stopping=False, length_penalty=1.5 if beams > 1 else 1.0, **options)
        assert ids[:, : given.shape[1]].equal(given) and ids.shape[1] > given.shape[1]
        options_of = {"length_penalty": 1.5, "num_beams": beams} if beams > 1 else {}
        decode = generate.beam_search if beams > 1 else generate.greedy
        assert torch.equal(decode(ours, memory, memory_mask=mask, prefix_ids=PREFIX, **options_of, **options), ids)


@pytest.mark.parametrize("n", [1, 3])
def test_samples_after_a_prefix_are_samples_of_its_continuations(n):
    """At each position the draw is from transformers' distribution after the tokens so far, with the noise of that position."""
    theirs, ours = pair(2)
    memory = memory_of(2, 2)
    ids = generate.sample(ours, memory, n=n, top_k=8, temperature=0.8, max_new_tokens=5, seed=3, image_ids=["a", "b"], prefix_ids=PREFIX)
    assert ids.shape[:2] == (2, n) and (ids[..., : len(PREFIX) + 1] == torch.tensor([0, *PREFIX])).all()
    keys = sampling.sample_keys(3, ["a", "b"], n)
    rows, states = ids.flatten(0, 1), memory.repeat_interleave(n, dim=0)
    for length in range(1 + len(PREFIX), rows.shape[1]):
        before = rows[:, :length]
        with torch.no_grad():
            logits = theirs(encoder_outputs=BaseModelOutput(states), decoder_input_ids=before).logits[:, -1]
        scores = hf_chain(logits, before, 0.8, 8, 0.9, 1.2)
        drawn = (scores + sampling.gumbel_noise(keys, length, torch.arange(scores.shape[1]).expand_as(scores))).argmax(-1)
        going_on = ~(before[:, 1 + len(PREFIX) :] == 1).any(1)
        assert torch.equal(rows[going_on, length], drawn[going_on])


def test_a_prefix_that_leaves_no_room_is_named():
    _, ours = pair(0)
    for decode in (generate.greedy, generate.beam_search, generate.sample):
        with pytest.raises(ValueError, match="max_length=5 leaves no room after a prefix of 4 tokens"):
            decode(ours, memory_of(0, 1), prefix_ids=PREFIX, max_length=5)


@pytest.mark.parametrize("decode", ["greedy", "beam"])
def test_other_variants_and_special_tokens(decode):
    theirs, ours = pair(3, variant="v1.0")
    memory = memory_of(3, 3)
    if decode == "greedy":
        assert torch.equal(generate.greedy(ours, memory, max_length=9), expected(theirs, memory, num_beams=1, max_length=9))
    else:
        ids = generate.beam_search(ours, memory, num_beams=4, max_length=9)
        assert torch.equal(ids, expected(theirs, memory, num_beams=4, early_stopping=False, max_length=9))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_memory_masks(seed):
    theirs, ours = pair(seed, eos_boost=1.5)
    memory = memory_of(seed, 4)
    mask = torch.ones(4, TOKENS, dtype=torch.bool)
    mask[0, 4:] = mask[2, 7:] = False
    ids = generate.greedy(ours, memory, max_new_tokens=12, memory_mask=mask)
    assert torch.equal(ids, expected(theirs, memory, mask, max_new_tokens=12, num_beams=1))
    ids = generate.beam_search(ours, memory, num_beams=4, max_length=12, memory_mask=mask)
    assert torch.equal(ids, expected(theirs, memory, mask, max_length=12, num_beams=4, early_stopping=False))
    unmasked = generate.greedy(ours, memory, max_new_tokens=12)
    assert unmasked.shape != ids.shape or not torch.equal(unmasked, ids)


@pytest.mark.parametrize("seed", [4, 6, 10])
def test_images_that_are_done_leave_the_batch(seed, monkeypatch):
    theirs, ours = pair(seed, eos_boost=2.5)
    memory, kept = memory_of(seed, 12), []
    select = DecoderCache.select
    monkeypatch.setattr(DecoderCache, "select", lambda self, images: (kept.append(len(images)), select(self, images)))
    assert torch.equal(generate.greedy(ours, memory, max_new_tokens=15), expected(theirs, memory, num_beams=1, max_new_tokens=15))
    assert kept and kept[-1] < 12
    kept.clear()
    options = dict(num_beams=4, max_length=16)
    assert torch.equal(generate.beam_search(ours, memory, **options), expected(theirs, memory, early_stopping=False, **options))
    assert kept and kept[-1] < 12
    mask = torch.ones(12, TOKENS, dtype=torch.bool)
    mask[::2, 5:] = False
    ids = generate.beam_search(ours, memory, memory_mask=mask, **options)
    assert torch.equal(ids, expected(theirs, memory, mask, early_stopping=False, **options))


# ---- the step and what it keeps -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v1.1", "v1.0"])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_steps_equal_one_pass_over_the_whole_text(variant, side_by_side):
    _, ours = pair(0, variant=variant)
    if side_by_side:
        generate.prepare_for_decoding(ours)
    memory = memory_of(0, 2)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 6:] = False
    ids = torch.randint(2, 190, (6, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    with torch.no_grad():
        whole = ours.text.logits(ours.text.decode(ids, memory, mask))
        state = DecoderCache(ours.text, memory, 3, 40, mask)
        steps = torch.stack([state.step(ids[:, t]) for t in range(40)], dim=1)
    assert (whole - steps).abs().max() < 1e-5 * whole.abs().max()


def test_branched_steps_equal_one_pass_over_each_beams_own_text():
    _, ours = pair(0)
    memory, generator = memory_of(0, 2), torch.Generator().manual_seed(0)
    texts = torch.zeros(2, 3, 1, dtype=torch.long)
    with torch.no_grad():
        state = BeamCache(ours.text, memory, 3, 9)
        for _ in range(9):
            step = state.step(texts[..., -1].flatten())
            whole = ours.text.logits(ours.text.decode(texts.flatten(0, 1), memory)[:, -1])
            assert (step - whole).abs().max() < 1e-5 * whole.abs().max()
            parents = torch.randint(3, (2, 3), generator=generator)
            state.branch(parents)
            texts = texts.gather(1, parents[..., None].expand_as(texts))
            texts = torch.cat([texts, torch.randint(2, 190, (2, 3, 1), generator=generator)], dim=-1)


def test_memory_keys_are_made_once_per_image_and_never_copied():
    _, ours = pair(0)
    memory = memory_of(0, 2)
    calls = []
    for block in ours.text.decoder.blocks:
        block.cross_attn.k_proj.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    with torch.no_grad():
        for kind in (DecoderCache, BeamCache):
            calls.clear()
            state = kind(ours.text, memory, 5, 6)
            kept = [tensor for layer in state.layers for tensor in layer.memory]
            assert all(tensor.shape == (2, 3, TOKENS, 5) for tensor in kept), "images, heads, tokens, head width: no axis of beams"
            places = [tensor.data_ptr() for tensor in kept] + [layer.tokens.data_ptr() for layer in state.layers]
            for _ in range(3):
                state.step(torch.full((10,), 4))
                if kind is BeamCache:
                    state.branch(torch.tensor([[1, 0, 0, 2, 4], [3, 3, 3, 1, 0]]))
            now = [tensor.data_ptr() for layer in state.layers for tensor in layer.memory]
            assert now + [layer.tokens.data_ptr() for layer in state.layers] == places
            assert calls == [memory.shape] * 3


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 13, 40, 48, 49])
def test_products_of_few_rows(rows):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 24, generator=generator)
    for size in (192, 190):
        weight = torch.randn(size, 24, generator=generator)
        assert torch.allclose(decode_weights.multiply(x, weight), x @ weight.t(), atol=1e-5)
        assert torch.allclose(decode_weights.multiply(x, weight.t().contiguous().t()), x @ weight.t(), atol=1e-5)


@pytest.mark.parametrize("variant", ["v1.1", "v1.0"])
def test_prepare_for_decoding_changes_no_value(variant):
    theirs, ours = pair(2, eos_boost=1.0, variant=variant)
    before = {name: tensor.clone() for name, tensor in ours.text.state_dict().items()}
    parameters, memory = dict(ours.text.named_parameters()), memory_of(2, 3)
    greedy = expected(theirs, memory, num_beams=1, max_length=9)
    beam = expected(theirs, memory, num_beams=4, early_stopping=False, max_length=9)
    for rows in (None, 1, 1, 30, None):
        generate.prepare_for_decoding(ours, rows)
        pointers = [parameter.data_ptr() for parameter in ours.text.parameters()]
        generate.prepare_for_decoding(ours, rows)
        assert [parameter.data_ptr() for parameter in ours.text.parameters()] == pointers, "a second time there is nothing to do"
        assert all(torch.equal(tensor, before[name]) for name, tensor in ours.text.state_dict().items())
        assert all(parameter is parameters[name] for name, parameter in ours.text.named_parameters())
        decoder = [*ours.text.decoder.blocks[1].self_attn.parameters(), *ours.text.decoder.blocks[1].mlp.parameters()]
        assert all(parameter.is_contiguous() == (rows != 1) for parameter in decoder)
        for block in ours.text.decoder.blocks:
            assert decode_weights.Linears(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj).one is not None
            assert decode_weights.Linears(*(getattr(block.mlp, name) for name in block.mlp.inputs)).one is not None
        assert torch.equal(generate.greedy(ours, memory, max_length=9), greedy)
        assert torch.equal(generate.greedy(ours, memory[:1], max_length=9), expected(theirs, memory[:1], num_beams=1, max_length=9))
        assert torch.equal(generate.beam_search(ours, memory, num_beams=4, max_length=9), beam)


def test_a_prepared_model_can_be_saved_and_trained(tmp_path):
    _, ours = pair(2)
    generate.prepare_for_decoding(ours)
    state = ours.text.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())
    q_proj = ours.text.decoder.blocks[0].self_attn.q_proj
    before = q_proj.weight.detach().clone(), ours.text.decoder.blocks[0].self_attn.k_proj.weight.detach().clone()
    optimizer = torch.optim.SGD([q_proj.weight], lr=1.0)
    ours.text.logits(ours.text.decode(torch.tensor([[0, 5]]), memory_of(2, 1))).sum().backward()
    optimizer.step()
    assert not torch.equal(q_proj.weight, before[0]) and torch.equal(ours.text.decoder.blocks[0].self_attn.k_proj.weight, before[1])


def test_weights_that_do_not_follow_each_other_are_not_joined():
    whole, columns = torch.randn(30, 8), torch.randn(8, 30).t()
    for weight in (whole, columns):
        assert torch.equal(decode_weights.joined([weight[:10], weight[10:30]]), weight)
        assert torch.equal(decode_weights.joined([weight[:10], weight[10:20]]), weight[:20])
        assert decode_weights.joined([weight[10:30], weight[:10]]) is None
        assert decode_weights.joined([weight[:10], weight[11:30]]) is None
        assert decode_weights.joined([weight[:10], torch.randn(20, 8)]) is None


@pytest.mark.parametrize("side_by_side", [False, True])
def test_lora_unmerged_decodes_as_merged(side_by_side):
    _, ours = pair(1, eos_boost=1.0)
    model = nn.ModuleDict({"text": ours.text})
    if side_by_side:
        generate.prepare_for_decoding(ours)
    lora.apply_lora(model, ("attn", "ffn"), ("decoder",), 2, 8, 0.1)
    plain = generate.beam_search(ours, memory_of(1, 3), num_beams=4, max_length=9)
    with torch.no_grad():
        for name, parameter in lora.adapter_parameters(model).items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    adapted = generate.beam_search(ours, memory_of(1, 3), num_beams=4, max_length=9)
    assert adapted.shape != plain.shape or not torch.equal(adapted, plain)
    lora.merge_lora(model, remove=True)
    assert torch.equal(generate.beam_search(ours, memory_of(1, 3), num_beams=4, max_length=9), adapted)


@pytest.mark.parametrize("decode", [generate.greedy, generate.beam_search, generate.sample])
def test_the_model_is_left_as_it_was_and_the_ids_are_usable_in_training(decode):
    _, ours = pair(0)
    ours.text.train()
    ours.text.decoder.blocks[0].eval()
    modes = [module.training for module in ours.text.modules()]
    ids = decode(ours, memory_of(0, 2).requires_grad_(), max_new_tokens=3)
    assert [module.training for module in ours.text.modules()] == modes
    assert ids.dtype == torch.int64
    ours.text.embedding(ids).sum().backward()


def test_autocast_does_not_reach_decoding():
    theirs, ours = pair(0)
    memory = memory_of(0, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ids = generate.greedy(ours, memory)
        rounded = generate.greedy(ours, memory.bfloat16())
    assert torch.equal(ids, expected(theirs, memory, num_beams=1, max_new_tokens=20))
    assert torch.equal(rounded, expected(theirs, memory.bfloat16().float(), num_beams=1, max_new_tokens=20))


def test_dropout_is_off():
    _, ours = pair(0)
    ours.text.set_dropout(0.5)
    ours.text.train()
    memory = memory_of(0, 2)
    assert torch.equal(generate.greedy(ours, memory), generate.greedy(ours, memory))


@pytest.mark.parametrize("decode", [generate.greedy, generate.beam_search, generate.sample])
def test_low_precision(decode):
    _, ours = pair(0)
    ours.text.bfloat16()
    ids = decode(ours, memory_of(0, 2).bfloat16(), max_new_tokens=5)
    assert ids.shape[0] == 2 and int(ids.max()) < 192


# ---- sampling -----------------------------------------------------------------------------------------------

LOGITS = torch.randn(40, 64, generator=torch.Generator().manual_seed(5)) * 3
LOGITS[0, :10] = 2.0
LOGITS[1] = 0.0
LOGITS[2:6] = LOGITS[2:6].round()
TIED = 6  # rows with equal logits
HISTORY = torch.randint(0, 64, (40, 6), generator=torch.Generator().manual_seed(6))


def hf_chain(logits, history, temperature, top_k, top_p, penalty):
    chain = LogitsProcessorList()
    if penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    return chain(history, logits.clone())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 0, 1, 5, 50, 64, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.2, 0.7])
def test_processed_logits_are_transformers(temperature, top_k, top_p, penalty):
    theirs = hf_chain(LOGITS, HISTORY, temperature, top_k, top_p, penalty)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    ours = generate.processed_logits(LOGITS, HISTORY, **options)
    assert torch.equal(ours[TIED:], theirs[TIED:])
    assert torch.equal(generate.probabilities(LOGITS, HISTORY, **options)[TIED:], theirs[TIED:].softmax(-1))
    # Which of equal logits stay where p is crossed is up to an unstable sort there, but not how many.
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    if top_p == 1:
        assert torch.equal(ours, theirs)


def test_of_tied_tokens_at_the_top_k_limit_all_stay_and_at_top_p_the_highest_ids():
    logits, history = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]]), torch.zeros(1, 1, dtype=torch.long)
    assert generate.probabilities(logits, history, top_k=2).gt(0).tolist() == [[True] * 4 + [False]]
    assert generate.probabilities(logits, history, top_k=4, top_p=0.5).gt(0).tolist() == [[False, False, True, True, False]]


@pytest.mark.parametrize("top_k", [None, 3, 8, 40])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("decimals", [0, 6])
def test_draws_from_the_few_best_equal_draws_from_all(top_k, top_p, decimals):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(300, 64, generator=generator) * 2).round(decimals=decimals)
    history = torch.randint(0, 64, (300, 4), generator=generator)
    options = dict(temperature=0.8, top_k=top_k, top_p=top_p, repetition_penalty=1.3)
    keys = sampling.sample_keys(0, ["image"], 300)
    scores = generate.processed_logits(logits, history, **options)
    noise = sampling.gumbel_noise(keys, 4, torch.arange(64).expand(300, -1))
    assert torch.equal(sampling.draw(logits, history, keys, **options), (scores + noise).argmax(-1))


@pytest.mark.parametrize("seed", [7, 8])
def test_samples_follow_the_processed_distribution(seed):
    _, ours = pair(3)
    memory, count = memory_of(3, 1), 6000
    options = dict(temperature=1.2, top_k=6, top_p=0.95, repetition_penalty=1.1)
    draws = generate.sample(ours, memory, n=count, max_new_tokens=2, seed=seed, **options)[0]
    with torch.no_grad():
        logits = ours.text.logits(ours.text.decode(torch.zeros(1, 1, dtype=torch.long), memory)[:, -1])
        first = generate.probabilities(logits, torch.zeros(1, 1, dtype=torch.long), **options)[0]
        assert_follows(draws[:, 1], first)
        token = int(first.argmax())
        ids = torch.tensor([[0, token]])
        logits = ours.text.logits(ours.text.decode(ids, memory)[:, -1])
        assert_follows(draws[draws[:, 1] == token, 2], generate.probabilities(logits, ids, **options)[0])


def assert_follows(draws: torch.Tensor, shares: torch.Tensor) -> None:
    counts = torch.bincount(draws, minlength=len(shares)).double()
    kept = shares > 0
    assert 3 <= kept.sum() <= 6 and counts[~kept].sum() == 0
    expected_counts = len(draws) * shares[kept].double()
    # The 99.9 % points of chi-square with 2 to 5 degrees of freedom.
    limit = {3: 13.8, 4: 16.3, 5: 18.5, 6: 20.5}[int(kept.sum())]
    assert ((counts[kept] - expected_counts) ** 2 / expected_counts).sum() < limit


def test_noise_is_standard_gumbel_and_independent_between_neighbours():
    noise = sampling.gumbel_noise(torch.arange(2000), 3, torch.arange(100).expand(2000, -1))
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - torch.pi**2 / 6) < 0.03
    uniform = torch.exp(-torch.exp(-noise)) - 0.5
    further = torch.exp(-torch.exp(-sampling.gumbel_noise(torch.arange(2000), 4, torch.arange(100).expand(2000, -1)))) - 0.5
    # The standard error of the correlations is 0.0022.
    for other in (uniform.roll(1, 0), uniform.roll(1, 1), further):
        assert abs((uniform * other).mean() * 12) < 0.01


def test_a_sample_depends_on_seed_image_and_index_alone():
    _, ours = pair(1, eos_boost=1.5)
    memory = memory_of(1, 8)
    names = [f"{k}.jpg" for k in range(8)]
    options = dict(top_p=0.95, temperature=1.0, top_k=30, repetition_penalty=1.1, max_new_tokens=12, seed=5)
    together = generate.sample(ours, memory, n=5, image_ids=names, **options)
    length = together.shape[-1]
    for k in range(8):
        alone = generate.sample(ours, memory[k : k + 1], n=5, image_ids=names[k : k + 1], **options)
        assert torch.equal(padded(alone, length)[0], together[k])
    order = [2, 7, 0, 3, 1]
    shuffled = generate.sample(ours, memory[order], n=5, image_ids=[names[k] for k in order], **options)
    assert torch.equal(padded(shuffled, length), together[order])
    fewer = generate.sample(ours, memory, n=1, image_ids=names, **options)
    assert torch.equal(padded(fewer, length), together[:, :1])
    more = generate.sample(ours, memory, n=9, image_ids=names, **options)
    assert torch.equal(padded(more[:, :5], max(length, more.shape[-1])), padded(together, max(length, more.shape[-1])))
    for change in ({"seed": 6}, {"image_ids": names[::-1]}):
        other = generate.sample(ours, memory, n=5, **{"image_ids": names} | options | change)
        assert other.shape != together.shape or not torch.equal(other, together)
    assert all(len({tuple(row) for row in rows.tolist()}) > 1 for rows in together)
    positions = generate.sample(ours, memory, n=2, image_ids=[str(k) for k in range(8)], **options)
    assert torch.equal(generate.sample(ours, memory, n=2, **options), positions)


def test_a_finished_sample_is_padded():
    _, ours = pair(1, eos_boost=1.5)
    ids = generate.sample(ours, memory_of(1, 6), n=4, temperature=1.0, max_new_tokens=12)
    ends = (ids == 1).int()
    assert ends.sum(-1).max() == 1 and (ends.sum(-1) == 0).any() == (ids[..., -1] > 1).any()
    assert (ids[(ends.cumsum(-1) - ends).bool()] == 0).all() and ends.sum() > 4


# ---- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decode", "options"),
    [
        (generate.beam_search, dict(num_beams=0)),
        (generate.beam_search, dict(num_beams=1000)),
        (generate.beam_search, dict(max_length=1)),
        (generate.greedy, dict(max_new_tokens=0)),
        (generate.greedy, dict(max_length=1)),
        (generate.greedy, dict(max_length=5, max_new_tokens=5)),
        (generate.greedy, dict(repetition_penalty=0.0)),
        (generate.sample, dict(temperature=0.0)),
        (generate.sample, dict(temperature=float("nan"))),
        (generate.sample, dict(top_p=0.0)),
        (generate.sample, dict(top_p=1.5)),
        (generate.sample, dict(top_k=-1)),
        (generate.sample, dict(n=0)),
        (generate.sample, dict(image_ids=["a"])),
    ],
)
def test_arguments_out_of_range_are_named(decode, options):
    _, ours = pair(0)
    with pytest.raises(ValueError) as error:
        decode(ours, memory_of(0, 2), **options)
    assert "\n" not in str(error.value) and any(name in str(error.value) for name in options)


@pytest.mark.parametrize("decode", [generate.greedy, generate.beam_search, generate.sample])
@pytest.mark.parametrize("shape", [(9, 24), (0, 9, 24)])
def test_memory_of_another_shape_is_refused(decode, shape):
    with pytest.raises(ValueError, match="memory has shape"):
        decode(pair(0)[1], torch.zeros(shape))
