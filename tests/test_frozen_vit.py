"""The frozen form of the image tower against open_clip's VisionTransformer, and which towers it leaves alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lora
from captioner.errors import UserError
from captioner.frozen_vit import prepare_frozen, release_frozen
from captioner.model import Captioner
from captioner.t5 import T5, T5Config
from captioner.vit import VisionConfig, VisionTransformer
from captioner.weights import OPEN_CLIP_VIT, load_into
from tests.test_vit import checkpoint, donor_tokens, donor_tower
from tests.conftest import TINY_TEXT

SMALL = {"image_size": 36, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}  # 36 = 4 patches and 4 pixels that are not seen
VARIANTS = {
    "gelu": {},
    "gelu_tanh": {"act_kwargs": {"approximate": "tanh"}},
    "quick_gelu": {},
    "layer_scale": {"ls_init_value": 0.3},
    "no_pre_norm": {"no_ln_pre": True},
}


def towers(variant: str) -> tuple[nn.Module, VisionTransformer]:
    """open_clip's tower and ours, with the same weights, none of them at a value that would hide a mistake."""
    donor = donor_tower(SMALL | VARIANTS[variant], quick_gelu=variant == "quick_gelu")
    config = VisionConfig(
        36, 8, 64, 3, 4, activation=variant if "gelu" in variant else "gelu", pre_norm=variant != "no_pre_norm",
        layer_scale=0.3 if variant == "layer_scale" else None,
    )  # fmt: skip
    ours = VisionTransformer(config).eval()
    load_into(ours, checkpoint(donor), OPEN_CLIP_VIT, "open_clip")
    return donor, ours


def pixels(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 36, 36, generator=torch.Generator().manual_seed(1))


def relative_error(tokens: Tensor, expected: Tensor) -> float:
    return ((tokens.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tokens_are_open_clips(variant):
    donor, ours = towers(variant)
    assert prepare_frozen(ours, torch.float32)
    with torch.inference_mode():
        tokens = ours(pixels())
    torch.testing.assert_close(tokens, donor_tokens(donor, pixels()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_bf16_it_is_as_close_as_open_clip_in_bf16(variant):
    donor, ours = towers(variant)
    expected = donor_tokens(donor, pixels())
    assert prepare_frozen(ours, torch.bfloat16)
    with torch.no_grad():
        tokens = ours(pixels())
    assert tokens.dtype == torch.bfloat16
    theirs = relative_error(donor_tokens(donor.bfloat16(), pixels().bfloat16()), expected)
    assert 0 < relative_error(tokens, expected) <= 2 * theirs


def test_autocast_changes_nothing():
    _, ours = towers("quick_gelu")
    prepare_frozen(ours, torch.float32)
    with torch.inference_mode():
        expected = ours(pixels())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(pixels()), expected)


def test_every_image_is_encoded_for_itself():
    _, ours = towers("quick_gelu")
    prepare_frozen(ours, torch.float32)
    with torch.inference_mode():
        together, alone = ours(pixels()), torch.cat([ours(image[None]) for image in pixels()])
        assert ours(pixels(0)).shape == (0, 17, 64)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_where_a_gradient_is_asked_for_the_plain_tower_gives_it():
    _, ours = towers("quick_gelu")
    prepare_frozen(ours, torch.bfloat16)
    tokens = ours(pixels())
    assert tokens.dtype == torch.float32
    tokens.square().mean().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_the_copy_is_no_part_of_the_tower_and_can_be_given_back():
    _, ours = towers("gelu")
    names = list(ours.state_dict())
    prepare_frozen(ours, torch.bfloat16)
    assert list(ours.state_dict()) == names and ours.frozen is not None
    release_frozen(ours)
    with torch.no_grad():
        assert ours(pixels()).dtype == torch.float32


@pytest.mark.parametrize("add", ["lora", "adapter"])
def test_a_tower_with_something_added_stays_as_it_is(add):
    _, ours = towers("gelu")
    model = Captioner(ours, T5(T5Config(**TINY_TEXT)))
    if add == "lora":
        lora.apply_lora(model, ("attn",), ("vision",), 2, 2.0, 0.0)
    else:
        lora.apply_adapters(model, ("ffn",), ("vision",), 4, "houlsby", "a")
    assert not prepare_frozen(ours, torch.bfloat16) and ours.frozen is None
    assert not prepare_frozen(nn.Linear(2, 2), torch.bfloat16)


def test_a_tower_that_has_changed_is_refused_and_copies_are_plain():
    _, ours = towers("gelu")
    prepare_frozen(ours, torch.bfloat16)
    with torch.no_grad():
        assert copy.deepcopy(ours)(pixels()).dtype == torch.float32
        ours.class_embedding.mul_(2)
        with pytest.raises(UserError, match="has changed since prepare_frozen"):
            ours(pixels())
        prepare_frozen(ours, torch.bfloat16)
        ours(pixels())
