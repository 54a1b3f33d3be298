"""Cross-attention of words: weights against transformers, tokens to words and image tokens to grids by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import lora
from captioner import generate
from captioner.backbones import build_text
from captioner.model import Captioner
from captioner.word_attention import cross_attention, merge_tokens, square_grid, word_attention
from tests.tiny_t5 import SIZES, VARIANTS, hf_model, save


class Eye(nn.Module):
    """An image encoder that only has a width."""

    width = 6


def memory_of(batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, tokens, SIZES["d_model"], generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours as a captioner, tokenizer) with the same weights."""
    donor = hf_model(request.param, attn_implementation="eager")
    text = build_text(str(save(donor, tmp_path_factory.mktemp("t5"))))
    return donor, Captioner(Eye(), text.module).eval(), text.tokenizer


def donor_attention(donor, memory, input_ids):
    """transformers' cross-attention, the mean over layers and heads: (B, T, N)."""
    with torch.no_grad():
        output = donor(encoder_outputs=BaseModelOutput(last_hidden_state=memory), decoder_input_ids=input_ids, output_attentions=True)
    return torch.stack(output.cross_attentions).mean((0, 2))


def test_weights_equal_transformers(pair):
    donor, model, _ = pair
    memory = memory_of(3, 10)
    ids = torch.randint(3, SIZES["vocab_size"], (3, 7), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = 0
    expected = donor_attention(donor, memory, ids)
    assert expected.std() > 0.01, "not flat, so that a wrong scale would show"
    mine = cross_attention(model.text, memory.requires_grad_(), ids)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
    assert not mine.requires_grad and not any(block.cross_attn._forward_pre_hooks for block in model.text.decoder.blocks)


@pytest.mark.parametrize("tokens, first", [(9, 0), (10, 1)])
def test_maps_of_generated_captions(pair, tokens, first):
    donor, model, tokenizer = pair
    memory = memory_of(2, tokens)
    ids = generate.sample(model, memory, n=1, temperature=1.0, max_new_tokens=12, seed=1)[:, 0]
    expected = donor_attention(donor, memory, ids[:, :-1])
    results = word_attention(model, memory, ids, tokenizer)
    for row, ((words, maps), caption) in enumerate(zip(results, tokenizer.decode(ids), strict=True)):
        assert words and " ".join(words) == " ".join(caption.split())
        assert maps.shape == (len(words), 3, 3) and maps.dtype == np.float32
        # The attention that wrote token t + 1 is that of decoder input t.
        _, members = merge_tokens(ids[row, 1:].tolist(), tokenizer)
        for index, positions in enumerate(members):
            np.testing.assert_allclose(maps[index].flatten(), expected[row, positions].mean(0)[first:], rtol=0, atol=1e-5)
    assert any(len(positions) > 1 for positions in members)


def test_lora_and_bf16_weights_take_part(tmp_path):
    model = Captioner(Eye(), build_text(str(save(hf_model("v1.1"), tmp_path))).module).eval()
    memory, ids = memory_of(1, 9), torch.tensor([[0, 5, 9, 12]])
    lora.apply_lora(model, ("attn",), ("decoder",), rank=2, alpha=2, dropout=0.1)
    before = cross_attention(model.eval().text, memory, ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    adapted = cross_attention(model.text, memory, ids)
    assert (adapted - before).abs().max() > 1e-3
    lora.merge_lora(model, remove=True)
    torch.testing.assert_close(cross_attention(model.text, memory, ids), adapted, rtol=0, atol=1e-5)
    rounded = cross_attention(model.text.bfloat16(), memory, ids)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, adapted, rtol=0, atol=0.05)


def test_a_prompt_shifts_no_map(pair):
    """With a prompt before the decoder's text the rows are those of the text; with one read by the encoder the grid is that of the image tokens."""
    donor, model, tokenizer = pair
    prompt = torch.randn(4, SIZES["d_model"], generator=torch.Generator().manual_seed(7))
    image, ids = memory_of(2, 10), torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(8))
    ids[:, 0] = 0
    lora.apply_soft_prompt(model, prompt, ("decoder", "encoder"))
    try:
        with torch.no_grad():
            instruction = donor.encoder(inputs_embeds=prompt[None]).last_hidden_state.expand(2, -1, -1)
            memory = torch.cat([image, instruction], dim=1)
            embeddings = torch.cat([prompt.expand(2, -1, -1), donor.shared(ids)], dim=1)
            read = donor(encoder_outputs=BaseModelOutput(last_hidden_state=memory), decoder_inputs_embeds=embeddings, output_attentions=True).cross_attentions
        expected = torch.stack(read).mean((0, 2))[:, len(prompt) :]  # (B, T, N + P)
        torch.testing.assert_close(cross_attention(model.text, memory, ids), expected, rtol=0, atol=1e-5)
        for row, (words, maps) in enumerate(word_attention(model, memory, torch.cat([ids, ids[:, :1]], dim=1), tokenizer)):
            _, members = merge_tokens([*ids[row, 1:].tolist(), 0], tokenizer)
            assert maps.shape == (len(words), 3, 3)
            np.testing.assert_allclose(maps[0].flatten(), expected[row, members[0]].mean(0)[1:10], rtol=0, atol=1e-5)
    finally:
        model.text.decoder.prefix = model.text.encoder.prefix = None


class Pieces:
    """A tokenizer of a few known pieces; ids 0, 1, 2 are pad, eos, unk."""

    eos_id = 1
    table = {3: "▁a", 4: "▁", 5: "dog", 6: "gy", 7: "▁runs", 8: ".", 9: "▁a dog"}

    def decode(self, rows):
        texts = []
        for row in rows:
            pieces = [self.table[i] for i in row if i in self.table]
            pieces[:1] = [pieces[0].replace("▁", "")] if pieces else []
            texts.append("".join(pieces).replace("▁", " "))
        return texts


@pytest.mark.parametrize(
    "tokens, words, members",
    [
        ([3, 7, 8, 1, 0, 0], ["a", "runs."], [[0], [1, 2]]),
        ([5, 6, 7], ["doggy", "runs"], [[0, 1], [2]]),
        ([3, 4, 5, 6, 1], ["a", "doggy"], [[0], [1, 2, 3]]),
        ([4, 5, 7], ["dog", "runs"], [[1], [2]]),
        ([3, 4, 7], ["a", "runs"], [[0], [2]]),
        ([2, 3, 0, 6, 1, 7], ["agy"], [[1, 3]]),
        ([1, 0, 0], [], []),
        ([], [], []),
    ],
)
def test_tokens_become_words(tokens, words, members):
    assert merge_tokens(tokens, Pieces()) == (words, members)


def test_an_empty_caption_has_no_maps(pair):
    _, model, tokenizer = pair
    [(words, maps)] = word_attention(model, memory_of(1, 10), torch.tensor([[0, 1, 0]]), tokenizer)
    assert words == [] and maps.shape == (0, 3, 3)


def test_grids():
    assert square_grid(196) == (0, 14) and square_grid(197) == (1, 14) and square_grid(50) == (1, 7) and square_grid(1) == (0, 1)
    assert square_grid(198) is None and square_grid(12) is None


def test_no_square_grid_no_maps(pair):
    _, model, tokenizer = pair
    [(words, maps)] = word_attention(model, memory_of(1, 7), torch.tensor([[0, 12, 14, 1]]), tokenizer)
    assert words and maps is None
