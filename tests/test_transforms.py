"""The transform against open_clip's and timm's own evaluation transforms."""

import io
import json

import numpy as np
import open_clip
import pytest
import timm.data
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from data import transforms
from data.images import open_image
from data.transforms import HALF, IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD, ImageTransform

# width, height
SIZES = [(224, 224), (64, 64), (500, 375), (375, 500), (301, 223), (33, 200), (1, 1), (7, 3), (225, 224), (640, 97)]


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("image_size", [32, 224])
def test_equals_open_clip(image_size, resize_mode, interpolation):
    for fill_color in (0, 200):
        settings = PreprocessCfg(
            size=image_size, interpolation=interpolation, resize_mode=resize_mode, fill_color=fill_color
        )
        theirs = image_transform_v2(settings, is_train=False)
        ours = ImageTransform(image_size, interpolation=interpolation, resize_mode=resize_mode, fill_color=fill_color)
        for size in SIZES:
            assert_equal(ours(noise(*size)), theirs(noise(*size)))


def test_equals_open_clip_on_the_transform_of_a_real_architecture():
    _, _, theirs = open_clip.create_model_and_transforms("RN50", image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    assert_equal(ImageTransform(224, IMAGENET_MEAN, IMAGENET_STD)(noise(300, 200)), theirs(noise(300, 200)))


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (2, 2500), (40, 900)])
def test_extreme_shapes_equal_open_clip(size):
    theirs = image_transform_v2(PreprocessCfg(size=16), is_train=False)(noise(*size))
    assert_equal(ImageTransform(16)(noise(*size)), theirs)


@pytest.mark.parametrize("size", [(2, 2500), (2500, 2), (5, 3001), (40, 900), (3001, 170), (500, 375)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_computing_only_the_crop_equals_open_clip_to_a_level(size, interpolation, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_RESIZED_PIXELS", 0)
    theirs = image_transform_v2(PreprocessCfg(size=64, interpolation=interpolation), is_train=False)(noise(*size))
    difference = (ImageTransform(64, interpolation=interpolation)(noise(*size)) - theirs).abs()
    assert difference.max() <= 1.01 / 255 / min(OPENAI_STD)
    assert difference.count_nonzero() <= 0.002 * difference.numel()


def test_the_thinnest_image_needs_no_memory():
    tall = np.repeat(np.arange(20000, dtype=np.uint16)[:, None, None] // 80, 3, axis=-1).astype(np.uint8)  # 20000 x 1
    pixels = ImageTransform(224, mean=(0, 0, 0), std=(1, 1, 1))(
        Image.fromarray(tall)
    )  # the middle: about one source pixel
    np.testing.assert_allclose(pixels.numpy() * 255, 10000 // 80, atol=1)
    wide = ImageTransform(224, resize_mode="longest", mean=(0, 0, 0), std=(1, 1, 1))(
        Image.new("RGB", (20000, 1), "white")
    )
    assert wide[:, 111].eq(1).all() and wide.sum() == 3 * 224  # one row of white, the rest padding


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite2", "resnet18", "convnext_tiny.fb_in22k", "vit_base_patch16_siglip_224"]
)
def test_equals_timm(name):
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    theirs = timm.data.create_transform(**config)
    image_size = config["input_size"][-1]
    ours = ImageTransform(
        image_size,
        config["mean"],
        config["std"],
        config["interpolation"],
        resize_mode={"center": "shortest", "squash": "squash"}[config["crop_mode"]],
        resize_size=int(image_size // config["crop_pct"]),
    )
    for size in SIZES:
        assert_equal(ours(noise(*size)), theirs(noise(*size)))


def test_equals_timm_with_borders():
    theirs = timm.data.create_transform(
        (3, 96, 96), crop_mode="border", crop_pct=0.9, mean=OPENAI_MEAN, std=OPENAI_STD, interpolation="bicubic"
    )
    fill = tuple(round(255 * value) for value in OPENAI_MEAN)
    ours = ImageTransform(96, resize_mode="longest", resize_size=int(96 // 0.9), fill_color=fill)
    for size in ((500, 375), (64, 64), (33, 200)):
        assert_equal(ours(noise(*size)), theirs(noise(*size)))


def test_the_transform_of_an_opened_file_equals_open_clips():
    buffer = io.BytesIO()
    noise(120, 90).save(buffer, "JPEG")
    buffer.seek(0)
    theirs = image_transform_v2(PreprocessCfg(size=64), is_train=False)(Image.open(buffer))
    assert_equal(ImageTransform(64)(open_image(buffer)), theirs)


@pytest.mark.parametrize(
    ("settings", "box", "filled"),
    [
        ({}, (0.25, 0, 0.75, 1), 1),
        ({"resize_size": 80}, (0.3, 0.1, 0.7, 0.9), 1),
        ({"resize_mode": "squash"}, (0, 0, 1, 1), 1),
        ({"resize_mode": "longest"}, (0, -0.5, 1, 1.5), 0.5),
    ],
)
def test_the_box_that_is_seen(settings, box, filled):
    image = Image.new("RGB", (400, 200))
    transform = ImageTransform(64, mean=(0, 0, 0), std=(1, 1, 1), **settings)
    assert transform.seen_box(image) == pytest.approx(box)
    image.paste("white", tuple(round(side * length) for side, length in zip(box, (400, 200, 400, 200), strict=True)))
    assert transform(image).mean() == pytest.approx(filled, abs=0.01)


def test_json_round_trip():
    transform = ImageTransform(260, HALF, HALF, "bilinear", "longest", 280, (1, 2, 3))
    again = ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict())))
    assert again == transform and hash(again) == hash(transform)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': choose from"),
        ({"resize_mode": "crop"}, "unknown resize_mode 'crop': choose from"),
        ({"image_size": 0}, "at least 1"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"crop": 1}, "unknown image transform settings: crop"),
    ],
)
def test_wrong_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        ImageTransform.from_dict({"image_size": 32, **settings})


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="not mode RGBA"):
        ImageTransform(32)(Image.new("RGBA", (4, 4)))
