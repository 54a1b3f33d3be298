"""T5 against transformers, with weights that transformers wrote and `build_text` loaded."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention

from captioner import t5
from captioner.backbones import build_text
from captioner.errors import UserError
from captioner.model import Captioner
from captioner.weights import t5_to_hf
from tests.tiny_t5 import SIZES, VARIANTS, hf_model, save

TOLERANCE = dict(rtol=0, atol=1e-5)
MEMORY_TOKENS = 7


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours) with the same weights, for each variant."""
    donor = hf_model(request.param)
    return donor, build_text(str(save(donor, tmp_path_factory.mktemp("t5")))).module


def texts(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with pads at the end of all rows but the first, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SIZES["vocab_size"], (batch, length), generator=generator)
    lengths = torch.tensor([length, *torch.randint(1, length, (batch - 1,), generator=generator).tolist()])
    mask = torch.arange(length) < lengths[:, None]
    return ids * mask, mask


def some_labels(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    ids, mask = texts(batch, length, seed)
    return ids.masked_fill(~mask, -100)


def some_memory(batch: int) -> torch.Tensor:
    return torch.randn(batch, MEMORY_TOKENS, SIZES["d_model"], generator=torch.Generator().manual_seed(2))


def donor_logits(donor, memory: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """transformers' logits for an image memory."""
    return donor(encoder_outputs=BaseModelOutput(last_hidden_state=memory), attention_mask=mask, labels=labels).logits


def named(name: str):
    """A message for assert_close that begins with the name of the tensor."""
    return lambda text: f"{name}: {text}"


class Eye(nn.Module):
    """An image encoder that only has a width."""

    width = 5


def captioner_of(text: t5.T5) -> Captioner:
    return Captioner(Eye(), text).eval()


# 150 tokens are further apart than the last distance bucket begins.
@pytest.mark.parametrize("length", [6, 150])
@torch.no_grad()
def test_text_to_text_logits_with_padding(pair, length):
    donor, ours = pair
    ids, mask = texts(3, length)
    labels = some_labels(3, length)
    expected = donor(input_ids=ids, attention_mask=mask.long(), labels=labels).logits
    torch.testing.assert_close(ours(ids, labels, mask), expected, **TOLERANCE)
    assert expected.std() > 0.1, "logits that hardly differ would show nothing"


@torch.no_grad()
def test_without_a_mask_pads_are_read(pair):
    donor, ours = pair
    ids, mask = texts(3, 6)
    labels = some_labels(3, 4)
    expected = donor(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits
    torch.testing.assert_close(ours(ids, labels), expected, **TOLERANCE)
    assert (ours(ids, labels, mask) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 5, 150])
@torch.no_grad()
def test_decoder_over_an_image_memory(pair, length):
    donor, ours = pair
    memory, labels = some_memory(3), some_labels(3, length) if length > 1 else torch.tensor([[4], [1], [9]])
    logits = captioner_of(ours).decoder_logits(memory, labels)
    torch.testing.assert_close(logits, donor_logits(donor, memory, labels), **TOLERANCE)


@torch.no_grad()
def test_masked_memory(pair):
    donor, ours = pair
    memory, labels = some_memory(3), some_labels(3, 5)
    mask = torch.arange(MEMORY_TOKENS) < torch.tensor([7, 1, 4])[:, None]
    logits = ours.logits(ours.decode(ours.shift_right(labels), memory, mask))
    torch.testing.assert_close(logits, donor_logits(donor, memory, labels, mask.long()), **TOLERANCE)


@torch.no_grad()
def test_several_captions_read_one_memory(pair):
    donor, ours = pair
    memory, labels = some_memory(2), some_labels(2 * 4, 6)
    expected = donor_logits(donor, memory.repeat_interleave(4, dim=0), labels)
    torch.testing.assert_close(captioner_of(ours).decoder_logits(memory, labels), expected, **TOLERANCE)


def test_gradients_of_memory_and_of_every_weight(pair):
    donor, ours = pair
    labels = some_labels(2 * 3, 6)
    theirs, mine = some_memory(2).requires_grad_(), some_memory(2).requires_grad_()
    donor.zero_grad()
    ours.zero_grad()
    logits = donor_logits(donor, theirs.repeat_interleave(3, dim=0), labels)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    loss, _ = captioner_of(ours).loss(mine, labels)
    loss.backward()
    tolerance = dict(rtol=1e-4, atol=1e-4)  # the loss is a sum over the tokens
    torch.testing.assert_close(mine.grad, theirs.grad, **tolerance)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    compared = t5_to_hf(gradients, ours.config)
    assert {name for name, p in donor.named_parameters() if p.grad is not None} == compared.keys()
    for name, gradient in compared.items():
        torch.testing.assert_close(gradient, donor.get_parameter(name).grad, **tolerance, msg=named(name))
    everything = t5_to_hf(ours.state_dict(), ours.config)
    assert compared.keys() == {key for key in everything if not key.startswith("encoder.")}


def test_loss_is_cross_entropy_of_the_labels_that_count(pair):
    _, ours = pair
    captioner, memory, labels = captioner_of(ours), some_memory(2), some_labels(2 * 3, 6)
    labels[3] = -100
    logits = captioner.decoder_logits(memory, labels)
    for smoothing in (0.0, 0.1):
        loss, count = captioner.loss(memory, labels, label_smoothing=smoothing)
        expected = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing
        )
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert count == (labels != -100).sum()


def test_mean_loss_equals_transformers(pair):
    donor, ours = pair
    memory, labels = some_memory(3), some_labels(3, 6)
    loss, count = captioner_of(ours).loss(memory, labels)
    expected = donor(encoder_outputs=BaseModelOutput(last_hidden_state=memory), labels=labels).loss
    torch.testing.assert_close(loss / count, expected, rtol=1e-6, atol=0)


def test_shift_right(pair):
    donor, ours = pair
    labels = some_labels(4, 6)
    assert torch.equal(ours.shift_right(labels), donor._shift_right(labels))
    assert ours.shift_right(labels)[0, 0] == 0 and (ours.shift_right(labels) >= 0).all()


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers(tmp_path):
    donor = hf_model("v1.1")
    ours = build_text(str(save(donor, tmp_path))).module
    memory, labels = some_memory(4), some_labels(4, 12)
    exact = donor_logits(donor, memory, labels)
    theirs = donor_logits(donor.bfloat16(), memory.bfloat16(), labels)
    mine = captioner_of(ours.bfloat16()).decoder_logits(memory.bfloat16(), labels)
    assert mine.dtype == torch.bfloat16
    error = (mine.float() - exact).square().mean().sqrt()
    assert error <= 1.25 * (theirs.float() - exact).square().mean().sqrt()
    assert error < 0.02 * exact.std()


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (16, 40), (8, 20)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_buckets(bidirectional, num_buckets, max_distance):
    config = t5.T5Config(relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance)
    distances = torch.arange(-600, 601)
    mine = t5.RelativePositionBias(config, bidirectional).relative_position_bucket(distances)
    expected = T5Attention._relative_position_bucket(distances, bidirectional, num_buckets, max_distance)
    assert torch.equal(mine, expected)
    assert mine.max() == num_buckets - 1


def test_the_bias_of_later_positions_is_the_end_of_the_whole():
    bias = t5.RelativePositionBias(t5.T5Config(), bidirectional=False)
    assert torch.equal(bias(3, 40), bias(40, 40)[:, :, -3:])


# d_model, d_ff, layers, heads, and the parameters that the hub states.
PUBLISHED = {
    "flan-t5-small": (512, 1024, 8, 6, 76_961_152),
    "flan-t5-base": (768, 2048, 12, 12, 247_577_856),
    "flan-t5-large": (1024, 2816, 24, 16, 783_150_080),
    "flan-t5-xl": (2048, 5120, 24, 32, 2_849_757_184),
    "flan-t5-xxl": (4096, 10240, 24, 64, 11_135_332_352),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name, tmp_path):
    d_model, d_ff, layers, heads, parameters = PUBLISHED[name]
    published = {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": d_ff, "d_kv": 64, "d_model": d_model,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
        "n_positions": 512, "num_decoder_layers": layers, "num_heads": heads, "num_layers": layers, "output_past": True,
        "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False, "transformers_version": "4.23.1", "use_cache": True, "vocab_size": 32128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = t5.T5Config.from_name(str(tmp_path / "config.json"))
    assert config == t5.T5Config.from_name(name)
    with torch.device("meta"):
        model = t5.T5(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_v1_0_configs_leave_out_what_was_then_the_only_choice():
    config = t5.T5Config.from_dict(
        {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
    )
    assert config.feed_forward_proj == "relu" and config.num_decoder_layers == 6
    assert config.tie_word_embeddings and config.scale_decoder_outputs


@pytest.mark.parametrize(
    "values, words",
    [
        ({"vocab_size": 8, "d_model": 8}, "T5 config lacks d_kv, d_ff, num_layers, num_heads"),
        (SIZES | {"feed_forward_proj": "gated-silu"}, "'gated-silu' is not one of gated-gelu, relu"),
    ],
)
def test_configs_that_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        t5.T5Config.from_dict(values)


def test_config_names_and_files_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="'t5-gigantic' is neither a T5 config file nor one of flan-t5-small, .*-tiny"):
        t5.T5Config.from_name("t5-gigantic")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not a JSON file"):
        t5.T5Config.from_name(str(tmp_path / "config.json"))


def test_a_decoder_alone_has_nothing_to_encode_with():
    model = t5.T5(t5.T5Config.from_dict(SIZES | {"num_layers": 0}))
    assert model.encoder is None
    with pytest.raises(UserError, match="without an encoder"):
        model.encode(torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("variant", ["v1.1", "v1.0"])
def test_random_weights_spread_as_those_of_transformers(variant):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 24, "d_ff": 160, "vocab_size": 400, "relative_attention_num_buckets": 256}
    values = SIZES | VARIANTS[variant] | sizes
    torch.manual_seed(0)
    ours = t5.T5(t5.T5Config.from_dict(values))
    donor = T5ForConditionalGeneration(T5Config(**values)).state_dict()
    exported = t5_to_hf(ours.state_dict(), ours.config)
    exported.pop("lm_head.weight", None)  # transformers 5 begins with a tied head
    assert len(exported) > 40
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor.std(), donor[name].std(), rtol=0.15, atol=0, msg=named(name))


@torch.no_grad()
def test_dropout_acts_in_training_only_and_can_be_switched_off():
    torch.manual_seed(0)
    model = t5.T5(t5.T5Config.from_dict(SIZES | {"dropout_rate": 0.2}))
    captioner, memory, labels = captioner_of(model), some_memory(2), some_labels(2, 5)
    still = captioner.decoder_logits(memory, labels)
    captioner.train()
    assert not torch.allclose(captioner.decoder_logits(memory, labels), still, atol=1e-2)
    model.set_dropout(0.0)
    torch.testing.assert_close(captioner.decoder_logits(memory, labels), still)
