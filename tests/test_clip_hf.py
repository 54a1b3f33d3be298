"""Image towers from Hugging Face's CLIP directories: tokens, position tables, preprocessing, and what is refused, against transformers."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from captioner import demo
from captioner.backbones import build_vision
from captioner.errors import UserError
from data.transforms import ImageTransform
from tests import tiny_clip

transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=24)
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, bos_token_id=1, eos_token_id=2)


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    """Tiny architectures of open_clip, one for each activation."""
    monkeypatch.setitem(demo.CLIPS, "Tiny", tiny_clip.CONFIG)
    monkeypatch.setitem(demo.CLIPS, "Tiny-quickgelu", tiny_clip.CONFIG | {"quick_gelu": True})
    tanh = tiny_clip.CONFIG["vision_cfg"] | {"act_kwargs": {"approximate": "tanh"}}
    monkeypatch.setitem(demo.CLIPS, "Tiny-tanh", tiny_clip.CONFIG | {"vision_cfg": tanh})


def hf_clip(kind: str = "CLIPVisionModel", **changes) -> nn.Module:
    """A random model of transformers, all of whose weights matter."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**SIZES | changes)
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=SIZES | changes, projection_dim=24)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def write_json(path, values) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def same_tokens(model: nn.Module, module: nn.Module) -> None:
    """Whether the tower gives transformers' last_hidden_state."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = getattr(model, "vision_model", model)(pixels).last_hidden_state
        torch.testing.assert_close(module(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel", "CLIPVisionModelWithProjection"])
@pytest.mark.parametrize(("activation", "name"), [("quick_gelu", "Tiny-quickgelu"), ("gelu", "Tiny"), ("gelu_pytorch_tanh", "Tiny-tanh")])
def test_a_directory_gives_transformers_tokens(tmp_path, kind, activation, name):
    model = hf_clip(kind, hidden_act=activation)
    model.save_pretrained(tmp_path)
    backbone = build_vision(f"{name}:{tmp_path}")
    same_tokens(model, backbone.module)
    assert backbone.transform == ImageTransform(32), "no preprocessor_config.json: CLIP's own"
    assert build_vision(f"{name}:{tmp_path / 'model.safetensors'}").weights_hash == backbone.weights_hash


def test_names_of_transformers_4(tmp_path):
    """There the tower of CLIPVisionModel is `vision_model`, and old files carry the numbers of the positions."""
    model = hf_clip()
    state = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}, tmp_path / "clip.safetensors")
    same_tokens(model, build_vision(f"Tiny-quickgelu:{tmp_path / 'clip.safetensors'}").module)


def test_position_table_of_another_size(tmp_path):
    """As open_clip resizes it; transformers, which interpolates at every call, has another cubic."""
    resize = pytest.importorskip("open_clip.model").resize_pos_embed
    model = hf_clip()
    model.save_pretrained(tmp_path)
    backbone = build_vision(f"Tiny-quickgelu:{tmp_path}", image_size=64)
    state = {"visual.positional_embedding": model.embeddings.position_embedding.weight.detach()}
    resize(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(4, 4))))
    torch.testing.assert_close(backbone.module.position_embedding, nn.Parameter(state["visual.positional_embedding"]))
    assert backbone.transform.image_size == 64 and backbone.module(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 32)


def test_files_that_do_not_fit(tmp_path):
    hf_clip(num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not fit VisionTransformer: missing: none; unexpected: blocks\.2\.attn"):
        build_vision(f"Tiny-quickgelu:{tmp_path}")
    state = load_file(tmp_path / "model.safetensors")
    state["qformer.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="unknown keys: qformer.weight"):
        build_vision(f"Tiny-quickgelu:{tmp_path}")


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel"])
@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Tiny", {}, "these weights were trained with QuickGELU, and Tiny has GELU: use Tiny-quickgelu"),
        ("Tiny-quickgelu", {"hidden_act": "gelu"}, "trained with GELU, and Tiny-quickgelu has QuickGELU: use Tiny"),
        ("Tiny", {"hidden_act": "gelu_pytorch_tanh"}, "its activation is gelu_tanh, and Tiny has gelu: it is another architecture"),
        ("Tiny-tanh", {"hidden_act": "gelu"}, "its activation is gelu, and Tiny-tanh has gelu_tanh"),
        ("Tiny-quickgelu", {"num_attention_heads": 4}, "its heads is 4, and Tiny-quickgelu has 2"),
        ("Tiny-quickgelu", {"layer_norm_eps": 1e-6}, "its norm_eps is 1e-06, and Tiny-quickgelu has 1e-05"),
        ("Tiny-quickgelu", {"hidden_act": "silu"}, "hidden_act 'silu' is not one of quick_gelu, gelu, gelu_pytorch_tanh"),
    ],
)
def test_weights_of_another_tower_that_no_shape_shows(tmp_path, kind, name, changes, words):
    hf_clip(kind, **changes).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=words) as caught:
            build_vision(f"{name}:{path}")
        assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{", '{"vision_config": [1]}'])
def test_a_broken_config(tmp_path, text):
    hf_clip().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: not a JSON"):
        build_vision(f"Tiny-quickgelu:{tmp_path}")


# ---- preprocessing ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    hf_clip().save_pretrained(tmp_path)
    return tmp_path


def transform_of(folder, image_size: int | None = None) -> ImageTransform:
    return build_vision(f"Tiny-quickgelu:{folder}", image_size).transform


@pytest.mark.parametrize(
    "settings",
    [
        dict(size={"shortest_edge": 32}, crop_size=32),
        dict(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=2, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]),
        dict(size={"height": 36, "width": 36}, crop_size=32, resample=1),
        dict(size={"height": 32, "width": 32}, do_center_crop=False),
    ],
    ids=["own", "crop", "squash and crop", "squash"],
)
def test_pixels_are_those_of_transformers(folder, settings):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**settings)
    processor.save_pretrained(folder)
    transform = transform_of(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    torch.testing.assert_close(transform(image), expected, rtol=1e-5, atol=1e-5)


def test_another_image_size_keeps_the_share_that_is_cropped(folder):
    write_json(folder / "preprocessor_config.json", {"size": {"shortest_edge": 40}, "crop_size": 32})
    assert transform_of(folder).resize_size == 40 and transform_of(folder, 64).resize_size == 80
    write_json(folder / "preprocessor_config.json", {"size": 32, "crop_size": 32, "image_std": None})
    assert transform_of(folder) == ImageTransform(32)


def test_the_composite_file_of_a_processor(folder):
    write_json(folder / "processor_config.json", {"image_processor": {"size": 32, "crop_size": 32, "image_mean": [0, 0, 0]}})
    assert transform_of(folder).mean == (0, 0, 0)
    write_json(folder / "preprocessor_config.json", {"size": 32, "crop_size": 32, "image_mean": [1, 1, 1]})
    assert transform_of(folder).mean == (1, 1, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_normalize": False}, "do_normalize is off"),
        ({"do_resize": False}, "do_resize is off"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.0078.* is not 1/255"),
        ({"rescale_factor": "x"}, "rescale_factor 'x' is not 1/255"),
        ({"resample": 9}, "resample 9 is not one of 0, 1, 2"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "without do_center_crop gives images that are not square"),
        ({"size": {"height": 30, "width": 32}}, "size {'height': 30, 'width': 32} is not one number of pixels"),
        ({"size": {"longest_edge": 32}}, "is not one number of pixels"),
        ({"size": 32, "crop_size": 0}, "crop_size 0 is not one number of pixels"),
        ({"size": 32, "crop_size": 32, "image_mean": [0.5]}, "three numbers"),
        ({"size": 32, "crop_size": 32, "image_std": 0.5}, "the image settings beside .* cannot be used"),
    ],
)
def test_preprocessing_that_is_refused(folder, settings, words):
    write_json(folder / "preprocessor_config.json", settings)
    with pytest.raises(UserError, match=words):
        transform_of(folder)
