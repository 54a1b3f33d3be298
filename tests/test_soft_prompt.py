"""Soft prompts against transformers (inputs_embeds, generate with the prompt as tokens of their own) and peft's files, on tiny random T5s."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, MultitaskPromptTuningConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

import lora
from captioner import generate, sampling, weights
from captioner.cache import BeamCache, DecoderCache
from captioner.model import Captioner
from captioner.t5 import T5, T5Config
from lora.inject import adapter_parameters, set_trainable
from lora.soft_prompt import SoftPrompt, apply_soft_prompt, initial_prompt, load_prompt, prompts, save_prompt
from tests.tiny_t5 import VARIANTS, hf_model

WIDTH, VOCABULARY, TOKENS, P = 24, 192, 9, 4  # TOKENS of an image's memory
TEXT = [7, 30, 7, 101]  # a prompt's tokens
SEEDS = range(6)


def captioner_of(theirs, changes: dict | None = None) -> Captioner:
    """A captioner whose text model has the weights of transformers' one; its image encoder gives what it gets, (B, N, 16)."""
    tied = theirs.lm_head.weight is theirs.shared.weight
    values = theirs.config.to_dict() | {"tie_word_embeddings": tied, "scale_decoder_outputs": tied} | (changes or {})
    text = T5(T5Config.from_dict(values))
    weights.load_into(text, dict(theirs.state_dict()), weights.t5_table(text.config), "transformers")
    vision = nn.Identity()
    vision.width = 16
    return Captioner(vision, text).eval()


def pair(variant: str = "v1.1", seed: int = 0, eos_boost: float = 0.0):
    """transformers' T5 and a captioner on it; eos_boost stretches lm_head's eos row, so that some captions end early."""
    # Generation in transformers 5 sizes its cache by the encoder's depth.
    theirs = hf_model(variant, seed, num_layers=3, num_decoder_layers=3)
    with torch.no_grad():
        theirs.lm_head.weight[1] *= 1 + eos_boost
    return theirs, captioner_of(theirs)


def soft(rows: int = P, seed: int = 5) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def memory_of(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1000 + seed))


def ids_of(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2000 + seed))


def mask_of(batch: int, length: int) -> Tensor:
    """Real tokens: all of the first row, fewer in each next one."""
    return torch.arange(length) < length - 2 * torch.arange(batch)[:, None]


def before(theirs, prompt: Tensor | None, ids: Tensor) -> Tensor:
    """Embeddings of the ids (B, T) behind the prompt, as transformers' inputs_embeds."""
    embedded = theirs.shared(ids)
    return embedded if prompt is None else torch.cat([prompt.to(embedded.dtype).expand(len(ids), -1, -1), embedded], dim=1)


def widened(mask: Tensor | None, prompt: Tensor | None) -> Tensor | None:
    return mask if mask is None or prompt is None else F.pad(mask, (len(prompt), 0), value=True)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


# ---- the module and where it goes ------------------------------------------------------------------------------


def test_a_prompt_is_fp32_beside_a_bf16_base_and_the_same_for_every_text():
    rows = soft().bfloat16()
    prompt = SoftPrompt(rows)
    assert prompt.embeddings.dtype == torch.float32 and prompt(3).shape == (3, P, WIDTH)
    assert torch.equal(prompt(3)[2], rows.float())
    assert prompt.adapter_parameters() == {"embeddings": prompt.embeddings}
    prompt(3).sum().backward()
    assert torch.equal(prompt.embeddings.grad, torch.full((P, WIDTH), 3.0))


def test_each_place_gets_its_own_copy():
    _, model = pair()
    rows = soft()
    assert apply_soft_prompt(model, rows, ("decoder",)) == ["text.decoder.prefix"]
    assert list(prompts(model)) == ["decoder"]
    _, model = pair()
    assert apply_soft_prompt(model, rows, ("decoder", "encoder")) == ["text.encoder.prefix", "text.decoder.prefix"]
    found = prompts(model)
    assert found == {"encoder": model.text.encoder.prefix, "decoder": model.text.decoder.prefix}
    assert len({prompt.embeddings.data_ptr() for prompt in found.values()} | {rows.data_ptr()}) == 3
    assert list(adapter_parameters(model)) == ["text.encoder.prefix.embeddings", "text.decoder.prefix.embeddings"]


@pytest.mark.parametrize(
    "rows, where, message",
    [
        (soft(), ("decoder", "vision"), r"unknown soft prompt place 'vision': one of encoder, decoder"),
        (soft(), "decoder", r"must be a list of at least one of encoder, decoder, not 'decoder'"),
        (soft(), (), r"must be a list of at least one of encoder, decoder, not \(\)"),
        (soft()[:, :8], ("encoder", "decoder"), r"prompt of this encoder has shape \[at least 1, 24\], not \[4, 8\]"),
        (soft()[:0], ("decoder",), r"prompt of this decoder has shape \[at least 1, 24\], not \[0, 24\]"),
        (soft()[None], ("decoder",), r"prompt of this decoder has shape \[at least 1, 24\], not \[1, 4, 24\]"),
    ],
)
def test_refused_and_the_model_untouched(rows, where, message):
    _, model = pair()
    with pytest.raises(ValueError, match=message):
        apply_soft_prompt(model, rows, where)
    assert not prompts(model)


def test_a_second_prompt_and_a_missing_encoder_are_refused():
    theirs, model = pair()
    apply_soft_prompt(model, soft())
    kept = model.text.decoder.prefix
    with pytest.raises(ValueError, match=r"the decoder has a soft prompt already \(text.decoder.prefix\)"):
        apply_soft_prompt(model, soft(), ("encoder", "decoder"))
    assert model.text.decoder.prefix is kept and model.text.encoder.prefix is None
    model = captioner_of(theirs, {"num_layers": 0})
    with pytest.raises(ValueError, match=r"this model has no encoder \(text.encoder\) for a soft prompt"):
        apply_soft_prompt(model, soft(), ("decoder", "encoder"))
    assert not prompts(model)


class Lookup(nn.Module):
    """An embedding without a weight, as one in 4 bits has none to index."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.num_embeddings = len(rows)
        self.register_buffer("packed", rows)

    def forward(self, ids: Tensor) -> Tensor:
        return self.packed[ids]


def test_initial_rows_are_those_of_the_tokens():
    table = torch.randn(6000, 3)
    embedding = nn.Embedding.from_pretrained(table, freeze=False)
    rows = initial_prompt(embedding, TEXT)
    assert torch.equal(rows, table[TEXT]) and not rows.requires_grad
    assert torch.equal(initial_prompt(Lookup(table), TEXT), rows)


def test_sampled_rows_are_different_common_tokens():
    table = torch.arange(6000.0)[:, None]
    draw = [initial_prompt(Lookup(table), length=5000, generator=torch.Generator().manual_seed(seed))[:, 0] for seed in (0, 0, 1)]
    assert torch.equal(draw[0].sort().values, torch.arange(5000.0)), "the paper's 5,000 most common, none twice"
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert initial_prompt(Lookup(table[:10]), length=10).shape == (10, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give one of the two"),
        ({"ids": [3], "length": 2}, "give one of the two"),
        ({"length": 0}, "length must be from 1 to 192, not 0"),
        ({"length": 193}, "length must be from 1 to 192, not 193"),
        ({"ids": []}, "needs at least 1 token"),
        ({"ids": [3, 192]}, "token 192 of the soft prompt is not in the embedding of 192 tokens"),
        ({"ids": [-1]}, "token -1 of the soft prompt"),
    ],
)
def test_no_such_initial_prompt(options, message):
    with pytest.raises(ValueError, match=message):
        initial_prompt(nn.Embedding(VOCABULARY, WIDTH), **options)


# ---- what it computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_step_0_the_decoder_has_read_the_prompts_text(variant):
    theirs, model = pair(variant)
    apply_soft_prompt(model, initial_prompt(model.text.embedding, TEXT))
    memory, labels, mask = memory_of(2), ids_of(6, 5), mask_of(2, TOKENS)  # three captions of each image
    inputs = torch.cat([torch.tensor(TEXT).expand(6, -1), torch.zeros(6, 1, dtype=torch.long), labels[:, :-1]], dim=1)
    repeated = BaseModelOutput(memory.repeat_interleave(3, dim=0))
    with torch.no_grad():
        expected = theirs(encoder_outputs=repeated, decoder_input_ids=inputs).logits[:, len(TEXT) :]
        assert close(model.decoder_logits(memory, labels), expected)
        masked = theirs(encoder_outputs=repeated, attention_mask=mask.repeat_interleave(3, dim=0), decoder_input_ids=inputs).logits
        ours = model.text.logits(model.text.decode(model.text.shift_right(labels), memory, mask))
    assert close(ours, masked[:, len(TEXT) :]) and not close(ours, expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("where", [("encoder",), ("decoder",), ("encoder", "decoder")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_text_to_text(variant, where, padded):
    theirs, model = pair(variant)
    apply_soft_prompt(model, soft(), where)
    input_ids, labels, mask = ids_of(3, 8), ids_of(3, 5, seed=1), mask_of(3, 8) if padded else None
    prompt, instruction = (soft() if place in where else None for place in ("decoder", "encoder"))
    with torch.no_grad():
        expected = theirs(
            inputs_embeds=before(theirs, instruction, input_ids),
            attention_mask=widened(mask, instruction),
            decoder_inputs_embeds=before(theirs, prompt, model.text.shift_right(labels)),
        ).logits[:, -5:]
        assert close(model.text(input_ids, labels, mask), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoders_prompt_is_read_behind_the_image(variant):
    theirs, model = pair(variant)
    apply_soft_prompt(model, soft(), ("encoder", "decoder"))
    image, labels = torch.randn(2, TOKENS, 16), ids_of(4, 5)
    with torch.no_grad():
        instruction = theirs.encoder(inputs_embeds=soft()[None]).last_hidden_state
        expected = torch.cat([model.bridge(image), instruction.expand(2, -1, -1)], dim=1)
        memory = model.encode(image)
        assert memory.shape == (2, TOKENS + P, WIDTH) and close(memory, expected)
        inputs = before(theirs, soft(), model.text.shift_right(labels))
        logits = theirs(encoder_outputs=BaseModelOutput(expected.repeat_interleave(2, dim=0)), decoder_inputs_embeds=inputs).logits
        assert close(model(image, labels), logits[:, P:])


def test_bf16():
    theirs, model = pair()
    theirs.bfloat16()
    model.bfloat16()
    apply_soft_prompt(model, initial_prompt(model.text.embedding, TEXT), ("encoder", "decoder"))
    assert {prompt.embeddings.dtype for prompt in prompts(model).values()} == {torch.float32}
    image, labels = torch.randn(2, TOKENS, 16).bfloat16(), ids_of(2, 5)
    memory = model.encode(image)
    logits = model.decoder_logits(memory, labels)
    inputs = before(theirs, theirs.shared.weight[TEXT], model.text.shift_right(labels))
    expected = theirs(encoder_outputs=BaseModelOutput(memory.detach()), decoder_inputs_embeds=inputs).logits[:, P:]
    assert memory.dtype == logits.dtype == torch.bfloat16 and close(logits.float(), expected.float(), 0.03)
    logits.float().sum().backward()
    assert all(prompt.embeddings.grad.dtype == torch.float32 and prompt.embeddings.grad.any() for prompt in prompts(model).values())


# ---- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_autograds_on_transformers_and_reach_nothing_else(variant):
    theirs, model = pair(variant)
    apply_soft_prompt(model, soft(), ("encoder", "decoder"))
    trained = set_trainable(model, also=())
    assert list(trained) == ["text.encoder.prefix.embeddings", "text.decoder.prefix.embeddings"]
    image, labels = torch.randn(2, TOKENS, 16), ids_of(4, 6)
    labels[1, 3:] = -100
    total, count = model.loss(model.encode(image), labels)
    (total / count).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == list(trained)

    instruction, prompt = soft().requires_grad_(), soft().requires_grad_()
    read = theirs.encoder(inputs_embeds=instruction[None]).last_hidden_state.expand(4, -1, -1)
    memory = torch.cat([model.bridge(image).repeat_interleave(2, dim=0), read], dim=1)
    inputs = before(theirs, prompt, model.text.shift_right(labels))
    padded = F.pad(labels, (P, 0), value=-100)
    loss = theirs(encoder_outputs=BaseModelOutput(memory), decoder_inputs_embeds=inputs, labels=padded).loss
    loss.backward()
    assert torch.allclose(total / count, loss)
    for ours, expected in zip(trained.values(), (instruction, prompt)):
        assert close(ours.grad, expected.grad)


def test_a_frozen_prompt_stays_while_lora_trains():
    _, model = pair()
    apply_soft_prompt(model, soft(), ("encoder", "decoder"))
    lora.apply_lora(model, ("attn",), ("decoder",), rank=2, alpha=2, dropout=0.0)
    trained = set_trainable(model, also=(), frozen=("prompt",))
    assert trained and all("lora_" in name for name in trained)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    total, count = model.loss(model.encode(torch.randn(2, TOKENS, 16)), ids_of(2, 5))
    (total / count).backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert changed and changed <= set(trained)


# ---- decoding --------------------------------------------------------------------------------------------------


def decode_by_transformers(theirs, memory: Tensor, prompt: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """transformers' ids behind a soft prompt, given to it as the first P decoder tokens: new rows of its vocabulary that it can never write."""
    rows = torch.arange(VOCABULARY, VOCABULARY + len(prompt))
    with torch.no_grad():
        shared = nn.Embedding.from_pretrained(torch.cat([theirs.shared.weight, prompt]))
        head = nn.Linear(WIDTH, len(shared.weight), bias=False)
        head.weight.copy_(torch.cat([theirs.lm_head.weight, prompt]))
    head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, rows, -torch.inf))
    theirs.shared = theirs.encoder.embed_tokens = theirs.decoder.embed_tokens = shared
    theirs.lm_head, theirs.config.vocab_size = head, len(shared.weight)
    start = torch.cat([rows, torch.zeros(1, dtype=torch.long)]).expand(len(memory), -1)
    # It puts its start token before decoder ids that do not begin with it.
    config = GenerationConfig(decoder_start_token_id=VOCABULARY, pad_token_id=0, eos_token_id=1, do_sample=False, **options)
    mask = torch.ones(memory.shape[:2], dtype=torch.long) if mask is None else mask.long()
    with torch.no_grad():
        ids = theirs.generate(encoder_outputs=BaseModelOutput(memory), attention_mask=mask, decoder_input_ids=start, generation_config=config)
    assert torch.equal(ids[:, : len(prompt) + 1], start)
    return ids[:, len(prompt) :]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"num_beams": 3, "length_penalty": 2.0}, {"num_beams": 1, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_and_beam_search_are_transformers(seed, options, masked):
    theirs, model = pair(list(VARIANTS)[seed % 3], seed, eos_boost=0.5 * (seed % 4))
    memory, mask = memory_of(3, seed), mask_of(3, TOKENS) if masked else None
    plain = generate.greedy(model, memory, max_new_tokens=10)
    apply_soft_prompt(model, soft(seed=seed))
    if options["num_beams"] == 1:
        rest = {name: value for name, value in options.items() if name != "num_beams"}
        ids = generate.greedy(model, memory, max_new_tokens=10, memory_mask=mask, **rest)
    else:
        ids = generate.beam_search(model, memory, max_new_tokens=10, memory_mask=mask, **options)
    assert torch.equal(ids, decode_by_transformers(theirs, memory, soft(seed=seed), mask, max_new_tokens=10, **options))
    assert ids.shape != plain.shape or not torch.equal(ids, plain)


@pytest.mark.parametrize("seed", [4, 6])
def test_images_that_are_done_leave_the_batch(seed, monkeypatch):
    theirs, model = pair("v1.1", seed, eos_boost=2.5)
    apply_soft_prompt(model, soft())
    memory, mask, kept = memory_of(12, seed), torch.ones(12, TOKENS, dtype=torch.bool), []
    mask[::2, 5:] = False
    select = DecoderCache.select
    monkeypatch.setattr(DecoderCache, "select", lambda self, images: (kept.append(len(images)), select(self, images)))
    greedy = generate.greedy(model, memory, max_new_tokens=15, memory_mask=mask)
    assert kept and kept[-1] < 12
    kept.clear()
    beam = generate.beam_search(model, memory, num_beams=3, max_new_tokens=15, memory_mask=mask)
    assert kept and kept[-1] < 12
    theirs_too = pair("v1.1", seed, eos_boost=2.5)[0]
    assert torch.equal(greedy, decode_by_transformers(theirs, memory, soft(), mask, num_beams=1, max_new_tokens=15))
    assert torch.equal(beam, decode_by_transformers(theirs_too, memory, soft(), mask, num_beams=3, max_new_tokens=15))


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_are_those_of_a_loop_without_a_cache(variant, monkeypatch):
    _, model = pair(variant, 6, eos_boost=5.0)
    apply_soft_prompt(model, soft())
    memory, mask, n, images = memory_of(8), mask_of(8, TOKENS), 2, list("abcdefgh")
    mask[:, 0] = True
    kept, select = [], DecoderCache.select
    monkeypatch.setattr(DecoderCache, "select", lambda self, images: (kept.append(len(images)), select(self, images)))
    settings = dict(top_p=0.95, temperature=1.1, top_k=20, repetition_penalty=1.2)
    ids = generate.sample(model, memory, n=n, seed=3, image_ids=images, max_new_tokens=14, memory_mask=mask, **settings)
    assert kept, "an image is done before the others"

    keys = sampling.sample_keys(3, images, n)
    expected, ended = torch.zeros(len(images) * n, 1, dtype=torch.long), torch.zeros(len(images) * n, dtype=torch.bool)
    with torch.no_grad():
        for length in range(1, ids.shape[-1]):
            logits = model.text.logits(model.text.decode(expected, memory, mask)[:, -1])
            noise = sampling.gumbel_noise(keys, length, torch.arange(VOCABULARY).expand(len(keys), -1))
            tokens = (generate.probabilities(logits, expected, **settings).log() + noise).argmax(-1).masked_fill(ended, 0)
            expected, ended = torch.cat([expected, tokens[:, None]], dim=1), ended | (tokens == 1)
    assert torch.equal(ids.flatten(0, 1), expected)


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_one_pass_over_the_whole_text(variant, dtype, tolerance, side_by_side):
    _, model = pair(variant)
    model.to(dtype)
    apply_soft_prompt(model, soft())
    if side_by_side:
        generate.prepare_for_decoding(model)
    memory, mask, ids = memory_of(2).to(dtype), mask_of(2, TOKENS), ids_of(6, 30)
    generator, texts = torch.Generator().manual_seed(0), torch.zeros(2, 3, 1, dtype=torch.long)
    with torch.no_grad():
        whole = model.text.logits(model.text.decode(ids, memory, mask))
        state = DecoderCache(model.text, memory, 3, 30, mask)
        assert close(torch.stack([state.step(ids[:, t]) for t in range(30)], dim=1), whole, tolerance)
        state = BeamCache(model.text, memory, 3, 6, mask)
        for _ in range(6):
            whole = model.text.logits(model.text.decode(texts.flatten(0, 1), memory, mask)[:, -1])
            assert close(state.step(texts[..., -1].flatten()), whole, tolerance)
            parents = torch.randint(3, (2, 3), generator=generator)
            state.branch(parents)
            texts = texts.gather(1, parents[..., None].expand_as(texts))
            texts = torch.cat([texts, torch.randint(2, VOCABULARY, (2, 3, 1), generator=generator)], dim=-1)


# ---- peft's files ----------------------------------------------------------------------------------------------


def peft_logits(peer, labels: Tensor, length: int, **inputs) -> Tensor:
    """Logits of peft's model at the labels' positions, without those of a decoder's prompt."""
    config = peer.active_peft_config
    multitask = config.peft_type == "MULTITASK_PROMPT_TUNING"
    if multitask:
        inputs["task_ids"] = torch.zeros(len(labels), dtype=torch.long)
    with torch.no_grad():
        logits = peer.eval()(labels=labels, **inputs).logits
    prompt = length if multitask and config.num_transformer_submodules == 2 else 0
    assert logits.shape[1] == labels.shape[1] + prompt
    return logits[:, prompt:]


def peft_model(base, config):
    peer = get_peft_model(base, config)
    with torch.no_grad():  # not peft's 0.02 around zero
        for parameter in peer.prompt_encoder.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return peer


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("where", [("encoder",), ("encoder", "decoder")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_ours_for_text_to_text(variant, where, padded, tmp_path):
    theirs, model = pair(variant)
    for place in where:
        apply_soft_prompt(model, soft(seed=len(place + place[0])), (place,))
    save_prompt(model, tmp_path, "google/flan-t5-tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's, of keys it does not know or misses
        peer = PeftModel.from_pretrained(theirs, tmp_path)
    input_ids, labels, mask = ids_of(3, 8), ids_of(3, 5, seed=1), mask_of(3, 8) if padded else None
    theirs_mask = None if mask is None else mask.long()
    expected = peft_logits(peer, labels, P, input_ids=input_ids, attention_mask=theirs_mask)
    with torch.no_grad():
        assert close(model.text(input_ids, labels, mask), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_loads_ours_behind_image_tokens(variant, tmp_path):
    theirs, model = pair(variant)
    apply_soft_prompt(model, soft())
    save_prompt(model, tmp_path)
    peer = PeftModel.from_pretrained(theirs, tmp_path)
    memory, labels = memory_of(2), ids_of(2, 5)
    expected = peft_logits(peer, labels, P, input_ids=ids_of(2, 3), encoder_outputs=BaseModelOutput(memory))
    with torch.no_grad():
        assert close(model.decoder_logits(memory, labels), expected)


def test_why_a_decoders_prompt_is_no_prompt_tuning_file():
    """peft's own PROMPT_TUNING with two sub-modules never reads the second one's rows."""
    theirs, _ = pair()
    peer = peft_model(theirs, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=2))
    inputs = dict(labels=ids_of(2, 5), length=P, input_ids=ids_of(2, 3))
    logits = peft_logits(peer, **inputs)
    with torch.no_grad():
        peer.prompt_encoder["default"].embedding.weight[P:] = 0
    assert torch.equal(peft_logits(peer, **inputs), logits)
    with torch.no_grad():
        peer.prompt_encoder["default"].embedding.weight[:P] = 0
    assert not torch.equal(peft_logits(peer, **inputs), logits)


@pytest.mark.parametrize("submodules", [1, 2, None])
@pytest.mark.parametrize("kind", [PromptTuningConfig, MultitaskPromptTuningConfig])
def test_files_of_peft(kind, submodules, tmp_path):
    theirs, model = pair()
    several = {"num_ranks": 2} if kind is MultitaskPromptTuningConfig else {}
    peer = peft_model(theirs, kind(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=submodules, **several))
    peer.save_pretrained(tmp_path)
    names = load_prompt(model, tmp_path)
    both = kind is MultitaskPromptTuningConfig and submodules != 1
    assert names == (["text.encoder.prefix", "text.decoder.prefix"] if both else ["text.encoder.prefix"])
    input_ids, mask, labels = ids_of(3, 8), mask_of(3, 8), ids_of(3, 5, seed=1)
    with torch.no_grad():
        expected = peft_logits(peer, labels, P, input_ids=input_ids, attention_mask=mask.long())
        assert close(model.text(input_ids, labels, mask), expected)


@pytest.mark.parametrize("where", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_round_trip(where, tmp_path):
    theirs, model = pair()
    for index, place in enumerate(where):
        apply_soft_prompt(model, soft(seed=index), (place,))
    save_prompt(model, tmp_path, "base", {"base_sha256": "ab" * 32})
    other = captioner_of(theirs) if "encoder" in where else captioner_of(theirs, {"num_layers": 0})
    assert load_prompt(other, tmp_path, "ab" * 32) == [f"text.{place}.prefix" for place in where]
    assert list(prompts(other)) == list(where)
    for index, place in enumerate(where):
        assert torch.equal(prompts(other)[place].embeddings, soft(seed=index))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and config["num_virtual_tokens"] == P and config["token_dim"] == WIDTH
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "base_sha256": "ab" * 32, "places": ",".join(where)}
        assert file.get_tensor("prompt_embeddings").dtype == torch.float32
        assert list(file.keys()) == (["prompt_embeddings"] if where == ("encoder",) else ["prefix_task_cols", "prefix_task_rows", "prompt_embeddings"])


def test_what_cannot_be_saved(tmp_path):
    _, model = pair()
    with pytest.raises(ValueError, match="the model has no soft prompt to save"):
        save_prompt(model, tmp_path / "none")
    apply_soft_prompt(model, soft(3), ("encoder",))
    apply_soft_prompt(model, soft(2), ("decoder",))
    with pytest.raises(ValueError, match="cannot hold soft prompts of different lengths: encoder 3, decoder 2"):
        save_prompt(model, tmp_path / "two")
    assert not list(tmp_path.iterdir())


# ---- files that do not fit -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A directory with prompts of both places."""
    _, model = pair()
    apply_soft_prompt(model, soft(), ("encoder", "decoder"))
    save_prompt(model, tmp_path, metadata={"base_sha256": "ab" * 32})
    return tmp_path


def refused(directory, error, message, model=None, **options) -> None:
    model = pair()[1] if model is None else model
    with pytest.raises(error, match=message) as caught:
        load_prompt(model, directory, **options)
    assert not prompts(model) and "\n" not in str(caught.value)


def rewrite(directory, config: dict | None = None, tensors: dict | None = None, metadata: dict | None = None) -> None:
    """Change keys of the config and tensors of a saved prompt; None removes one."""
    for name, changes in (("adapter_config.json", config), ("adapter_model.safetensors", tensors or metadata)):
        path = directory / name
        if changes is None:
            continue
        values = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
        kept = {key: value for key, value in (values | ((config if path.suffix == ".json" else tensors) or {})).items() if value is not None}
        path.write_text(json.dumps(kept)) if path.suffix == ".json" else save_file(kept, path, metadata)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LORA"}, r"peft_type = 'LORA' is not supported, only PROMPT_TUNING, MULTITASK_PROMPT_TUNING"),
        ({"peft_type": None}, r"peft_type = None is not supported"),
        ({"task_type": "CAUSAL_LM"}, r"task_type = 'CAUSAL_LM' is not supported, only SEQ_2_SEQ_LM"),
        ({"num_transformer_submodules": 3}, r"num_transformer_submodules = 3 is not supported, only 1, 2"),
        ({"num_tasks": 2}, r"num_tasks = 2 is not supported, only 1"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"num_virtual_tokens": None}, r"num_virtual_tokens = None is not a whole number of at least 1"),
        ({"num_virtual_tokens": 0}, r"num_virtual_tokens = 0 is not a whole number of at least 1"),
        ({"num_virtual_tokens": 5}, r"prompt_embeddings has shape \[8, 24\], expected \[10, 24\]"),
        ({"token_dim": "24"}, r"token_dim = '24' is not a whole number"),
        ({"num_transformer_submodules": 2.0}, r"num_transformer_submodules = 2.0 is not a whole number"),
        ({"num_ranks": 2}, r"prefix_task_cols has shape \[1, 8, 1\], expected \[1, 8, 2\]"),
        ({"peft_type": "PROMPT_TUNING"}, r"does not fit: missing: none; unexpected: prefix_task_cols, prefix_task_rows"),
    ],
)
def test_configs_that_do_not_fit(saved, changes, message):
    rewrite(saved, config=changes)
    refused(saved, ValueError, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_embeddings": None}, r"does not fit: missing: prompt_embeddings; unexpected: none"),
        ({"base_model.prompt": torch.zeros(1)}, r"does not fit: missing: none; unexpected: base_model.prompt"),
        ({"prompt_embeddings": torch.zeros(8, 16)}, r"prompt_embeddings has shape \[8, 16\], expected \[8, 24\]"),
        ({"prompt_embeddings": torch.full((8, 24), torch.nan)}, r"prompt_embeddings has numbers that are not finite"),
        ({"prefix_task_rows": torch.full((1, 1, 24), torch.inf)}, r"prefix_task_rows has numbers that are not finite"),
        ({"prompt_embeddings": torch.zeros(8, 24, dtype=torch.int32)}, r"prompt_embeddings has numbers that are not finite floating-point numbers"),
    ],
)
def test_tensors_that_do_not_fit(saved, changes, message):
    rewrite(saved, tensors=changes)
    refused(saved, ValueError, message)


def test_damaged_and_missing_files(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(saved, ValueError, "adapter_model.safetensors: not a safetensors file")
    path.rename(path.with_suffix(".bin"))
    refused(saved, FileNotFoundError, "adapter_model.safetensors: no such file; adapter_model.bin is a pickle and is not read")
    for text, message in (("{", "not a JSON file"), ("[]", "not a JSON object")):
        (saved / "adapter_config.json").write_text(text)
        refused(saved, ValueError, f"adapter_config.json: {message}")
    (saved / "adapter_config.json").unlink()
    refused(saved, FileNotFoundError, "adapter_config.json: no such file")


def test_other_bases_and_models(saved):
    refused(saved, ValueError, r"was made for another backbone \(sha256 abababababab, here cdcdcdcdcdcd\)", base_sha256="cd" * 32)
    theirs, _ = pair()
    decoder_only = captioner_of(theirs, {"num_layers": 0})
    refused(saved, ValueError, r"does not fit: this model has no encoder \(text.encoder\) for a soft prompt", decoder_only)
    wide = captioner_of(hf_model("v1.1", d_model=32))
    refused(saved, ValueError, r"does not fit: a soft prompt of this encoder has shape \[at least 1, 32\], not \[4, 24\]", wide)
    rewrite(saved, metadata={"places": "decoder,vision"})
    refused(saved, ValueError, "names the places decoder, vision, it holds decoder, encoder")
    _, model = pair()
    apply_soft_prompt(model, soft(), ("encoder",))
    rewrite(saved, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit: the encoder has a soft prompt already"):
        load_prompt(model, saved)
    assert list(prompts(model)) == ["encoder"]


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)],
)
def test_other_methods_of_peft(config, tmp_path):
    get_peft_model(hf_model("v1.1", d_model=15, num_layers=3), config).save_pretrained(tmp_path)
    refused(tmp_path, ValueError, f"peft_type = '{config.peft_type.value}' is not supported")
