"""timm trunks as image encoders, against timm itself and open_clip's TimmModel."""

import json

import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from torch import nn

import train
from captioner import checkpoint
from captioner.backbones import build_vision
from captioner.errors import UserError
from captioner.timm_vision import TimmVision, image_settings
from captioner.weights import fingerprint
from data.readers import read
from data.transforms import ImageTransform
from tests.hub_cache import hub, put  # noqa: F401


def randomise(model: nn.Module) -> nn.Module:
    """Norms, layer scales and batch statistics away from their 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                noise = torch.empty_like(tensor).normal_(generator=generator)
                tensor.copy_(noise.abs() + 0.5 if name.endswith(("weight", "gamma", "running_var")) else 0.3 * noise)
    return model.eval()


def pixels(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(ours: nn.Module, expected: torch.Tensor, images: torch.Tensor) -> None:
    tokens = ours(images)
    assert tokens.shape == expected.shape == (len(images), ours.num_tokens, ours.width)
    assert expected.std() > 1e-3
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def grid(features: torch.Tensor) -> torch.Tensor:
    return features.flatten(2).transpose(1, 2)


def test_the_real_encoder(shared_dir):
    path = shared_dir / "weights" / "tf_efficientnet_lite2.safetensors"
    donor = timm.create_model("tf_efficientnet_lite2", num_classes=1000).eval()
    donor.load_state_dict(load_file(path))
    backbone = build_vision(f"timm/tf_efficientnet_lite2:{path}")
    images = pixels(260)
    with torch.no_grad():
        assert_same(backbone.module, grid(donor.forward_features(images)), images)
    assert (backbone.module.num_tokens, backbone.module.width, backbone.module.image_size) == (81, 1280, 260)
    assert (backbone.name, backbone.weights) == ("timm/tf_efficientnet_lite2", str(path))
    assert backbone.weights_hash == fingerprint(backbone.module) and not backbone.module.training
    smaller = build_vision(f"timm/tf_efficientnet_lite2:{path}", image_size=224).module
    assert (smaller.num_tokens, smaller.image_size) == (49, 224)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "fastvit_mci0", "deepseek_vit_412m"])
def test_transform_is_timms(name):
    """Centre crops, MobileCLIP's mean 0 and std 1, and a padded border."""
    config = timm.get_pretrained_cfg(name).to_dict()
    expected = create_transform(**resolve_data_config(pretrained_cfg=config))
    noise = torch.randint(0, 256, (37, 53, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy()).resize((530, 370))
    torch.testing.assert_close(ImageTransform(**image_settings(config))(image), expected(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["convnext_atto", "fastvit_mci0", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "davit_tiny"]
)
def test_tokens_are_timms_without_pooling_and_classifier(tmp_path, name):
    donor = randomise(timm.create_model(name, num_classes=10))
    save_file(donor.state_dict(), tmp_path / "trunk.safetensors")
    ours = TimmVision(name, str(tmp_path / "trunk.safetensors")).eval()
    images = pixels(ours.image_size, batch=1)
    unpooled = timm.create_model(name, num_classes=0, global_pool="").eval()
    unpooled.load_state_dict(ours.trunk.state_dict())
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in ours.trunk.state_dict().items())
    with torch.no_grad():
        expected, features = unpooled(images), donor.forward_features(images)
    if name.startswith("swin"):
        expected, features = expected.flatten(1, 2), features.flatten(1, 2)
    elif expected.ndim == 4:
        expected, features = grid(expected), grid(features)
    assert_same(ours, expected, images)
    # Only where the last norm stands behind the pooling does this differ from the plain features.
    assert torch.allclose(expected, features) == (name not in ("convnext_atto", "davit_tiny"))


def test_norm_behind_the_pooling_of_a_transformer():
    ours = TimmVision("eva02_tiny_patch14_224")
    randomise(ours)
    images = pixels(224, batch=1)
    donor = timm.create_model("eva02_tiny_patch14_224", num_classes=0).eval()
    donor.load_state_dict(ours.trunk.state_dict())
    donor.reset_classifier(0, global_pool="")
    with torch.no_grad():
        assert_same(ours, donor(images), images)
        assert not torch.allclose(donor(images), donor.forward_features(images))


@pytest.mark.parametrize("name, pool, projection", [("convnext_atto", "", "linear"), ("fastvit_mci0", "avg", None)])
def test_open_clip_checkpoint(tmp_path, name, pool, projection):
    donor = randomise(TimmModel(name, embed_dim=16, pool=pool, proj=projection))
    state = {f"visual.{key}": value for key, value in donor.state_dict().items()}
    state |= {key: torch.zeros(1) for key in ("logit_scale", "text.cls_emb", "token_embedding.weight")}
    assert any(key.startswith(("visual.head.", "visual.trunk.head.fc.")) for key in state)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    settings = {"size": 256, "mean": [0.1, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": settings}))
    backbone = build_vision(f"timm/{name}:{tmp_path}")
    images = pixels(backbone.module.image_size, batch=1)
    with torch.no_grad():
        expected = donor.trunk.forward_features(images)
        expected = donor.trunk.head.norm(expected) if name == "convnext_atto" else expected
    assert_same(backbone.module, grid(expected), images)
    transform = backbone.transform
    assert (transform.mean, transform.interpolation, transform.resize_mode) == ((0.1, 0.2, 0.3), "bilinear", "squash")
    assert transform.resize_size is None and transform.image_size == backbone.module.image_size


def test_tag_comes_from_the_hub(hub):  # noqa: F811
    donor = randomise(timm.create_model("convnext_atto"))
    put(hub, "timm/convnext_atto.d2_in1k", "model.safetensors", lambda path: save_file(donor.state_dict(), path))
    backbone = build_vision("timm/convnext_atto:d2_in1k")
    assert backbone.weights == "d2_in1k" and backbone.weights_hash is not None
    assert torch.equal(backbone.module.trunk.head.norm.weight, donor.head.norm.weight)


def test_tag_in_the_name_takes_its_preprocessing(tmp_path):
    save_file(timm.create_model("tf_efficientnet_b0", num_classes=0).state_dict(), tmp_path / "trunk.safetensors")
    for tag, mean in (("", (0.485, 0.456, 0.406)), (".ap_in1k", (0.5, 0.5, 0.5))):
        backbone = build_vision(f"timm/tf_efficientnet_b0{tag}:{tmp_path / 'trunk.safetensors'}")
        assert backbone.transform.mean == mean


@pytest.mark.parametrize("name, tokens", [("vit_tiny_patch16_224", 1 + 16 * 16), ("convnext_atto", 8 * 8)])
def test_another_image_size(tmp_path, name, tokens):
    donor = randomise(timm.create_model(name, num_classes=0))
    save_file(donor.state_dict(), tmp_path / "trunk.safetensors")
    backbone = build_vision(f"timm/{name}:{tmp_path / 'trunk.safetensors'}", image_size=256)
    resized = donor
    if name.startswith("vit"):
        donor.set_input_size((256, 256))
    images = pixels(256, batch=1)
    with torch.no_grad():
        expected = resized.forward_features(images)
        expected = expected if expected.ndim == 3 else grid(resized.head.norm(expected))
    assert_same(backbone.module, expected, images)
    assert backbone.module.num_tokens == tokens and backbone.transform.image_size == 256
    crop = resolve_data_config(pretrained_cfg=donor.pretrained_cfg)["crop_pct"]
    assert backbone.transform.resize_size == int(256 / crop)


@pytest.mark.parametrize(
    "config, words",
    [
        ([], "not a JSON object"),
        ({"preprocess_cfg": []}, "not a JSON object with an object preprocess_cfg"),
        ({"preprocess_cfg": {"mean": 0.5}}, "preprocess_cfg.mean is 0.5, not three numbers"),
        ({"preprocess_cfg": {"mean": ["a", 0, 0]}}, "preprocess_cfg.mean is .*, not three numbers"),
        ({"preprocess_cfg": {"std": [0, 1, 1]}}, "preprocess_cfg.std is .*, not three numbers above 0"),
        ({"preprocess_cfg": {"interpolation": "random"}}, "preprocess_cfg.interpolation is .random., not a filter"),
        ({"preprocess_cfg": {"resize_mode": ["squash"]}}, "preprocess_cfg.resize_mode is .*, not one of shortest, longest, squash"),
        ({"preprocess_cfg": {"fill_color": "a"}}, "preprocess_cfg.fill_color is .a., not one or three numbers"),
        ("[" * 100_000, "not a JSON file"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_damaged_config_beside_the_weights_is_named(tmp_path, config, words):
    save_file(timm.create_model("convnext_atto", num_classes=0).state_dict(), tmp_path / "trunk.safetensors")
    (tmp_path / "open_clip_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError, match=f"^{tmp_path}/open_clip_config.json: {words}") as caught:
        build_vision(f"timm/convnext_atto:{tmp_path}/trunk.safetensors")
    assert "\n" not in str(caught.value)


BEHIND_TOKENS = {  # by reading timm: what its forward_head uses and forward_features does not
    "mobilenetv3_small_050": ("conv_head.",), "test_vit3": ("attn_pool.",), "ghostnetv3_050": ("conv_head.",), "convnext_atto": (),
    "vit_small_patch16_rope_mixed_224": (), "vit_small_patch16_rope_mixed_ape_224": (),
}  # fmt: skip


@pytest.mark.parametrize("name", BEHIND_TOKENS)
def test_parameters_behind_the_tokens_are_known_and_stay_in_the_trunk(name):
    vision, own = TimmVision(name), timm.create_model(name, num_classes=0)
    assert vision.trunk.state_dict().keys() == own.state_dict().keys()
    behind = {f"trunk.{parameter}" for parameter, _ in own.named_parameters() if parameter.startswith(BEHIND_TOKENS[name])}
    assert vision.behind_tokens() == behind
    assert vision.training and all(parameter.grad is None for parameter in vision.parameters())
    assert vision.requires_grad_(False).behind_tokens() == set()


@pytest.mark.parametrize(
    "name, size, flags, behind, reached",
    [
        ("mobilenetv3_small_050", 64, ["--train-base", "vision"], ["trunk.conv_head.weight"], ["trunk.conv_stem.weight"]),
        (
            "test_vit3", 64, ["--train-base", "text", "--lora-where", "vision", "--lora-targets", "ffn"],
            ["trunk.attn_pool.mlp.fc1.lora_B"], ["trunk.blocks.0.mlp.fc1.lora_B"],
        ),
    ],
)  # fmt: skip
def test_training_leaves_out_what_stands_behind_the_tokens(tiny_flags, tmp_path, capsys, name, size, flags, behind, reached):
    flags = [*tiny_flags, "--vision", f"timm/{name}", "--image-size", str(size), *flags, "--max-steps", "2", "--eval-every", "2"]
    assert train.main(flags) == 0
    assert "of the image encoder stand behind its tokens" in capsys.readouterr().err
    settings = train.resolve([*flags, "--output", str(tmp_path / "other")])
    model, tokenizer, _, facts = train.build(settings, read(settings.data, "train"), tmp_path)
    train.add_parts(model, tokenizer, settings, facts)
    trainable = train.choose_trainable(model, settings, facts)
    for names, trained in ((behind, False), (reached, True)):
        for parameter in (f"vision.{path}" for path in names):
            assert (parameter in trainable) == model.get_parameter(parameter).requires_grad == trained
    assert checkpoint.load(tmp_path / "run")


def test_random_trunks_have_no_hash():
    backbone = build_vision("timm/convnext_atto")
    assert (backbone.weights, backbone.weights_hash, backbone.name) == (None, None, "timm/convnext_atto")


def test_weights_that_do_not_fit(tmp_path):
    donor = timm.create_model("convnext_atto", num_classes=10)
    state = donor.state_dict()
    for change, words in (
        ({"stem.0.weight": torch.zeros(1)}, r"stem.0.weight has shape \[1\]"),
        ({"extra.weight": torch.zeros(1)}, "unexpected: extra.weight"),
        ({"visual.class_embedding": torch.zeros(1)}, "holds an open_clip ViT"),
    ):
        save_file(state | change, tmp_path / "trunk.safetensors")
        with pytest.raises(UserError, match=words):
            TimmVision("convnext_atto", str(tmp_path / "trunk.safetensors"))
    del state["head.norm.weight"]
    save_file(state, tmp_path / "trunk.safetensors")
    with pytest.raises(UserError, match="does not fit ConvNeXt: missing: head.norm.weight; unexpected: none"):
        TimmVision("convnext_atto", str(tmp_path / "trunk.safetensors"))


@pytest.mark.parametrize(
    "spec, size, words",
    [
        ("timm/convnext_ato", None, "timm has no model 'convnext_ato'; closest: .*convnext_atto.*timm.list_models"),
        ("timm/convnext_atto.d2_in1k", None, "write timm/convnext_atto:d2_in1k"),
        ("timm/convnext_atto:nothing", None, "neither a file nor a tag of timm/convnext_atto; its tags: d2_in1k"),
        ("timm/convnext_atto.nothing:model.safetensors", None, "no tag 'nothing'; it has d2_in1k"),
        ("timm/convnext_atto:d2_in1k", None, "model.safetensors of timm/convnext_atto.d2_in1k .*HF_HUB_OFFLINE"),
        ("timm/fastvit_mci0:apple_mclip", None, "model.safetensors of apple/mobileclip_s0_timm"),
        ("timm/legacy_seresnet18:in1k", None, "published only as https://"),
        ("timm/vit_base_patch32_clip_224:openai", None, "use timm/vit_base_patch32_clip_quickgelu_224:openai"),
        ("timm/vit_base_patch16_sapiens2:fb", None, "1024 x 768 pixels"),
        ("timm/levit_128s", 256, "levit_128s .*224 pixels only, not 256"),
        ("timm/resnet10t", 0, "gives no features at 0 pixels"),
        ("timm/vit_tiny_patch16_224", 7, "vit_tiny_patch16_224 .* 7 pixels"),
    ],
)
def test_specs_that_fail(hub, spec, size, words):  # noqa: F811
    with pytest.raises(UserError, match=words) as caught:
        build_vision(spec, size)
    assert "\n" not in str(caught.value)


def test_open_clip_names_of_timm_trunks_lead_here():
    for name in open_clip.list_models():
        trunk = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name")
        if trunk:
            assert timm.is_model(trunk)
            with pytest.raises(UserError, match=f"use timm/{trunk}$"):
                build_vision(name)
        elif name.startswith("RN"):
            with pytest.raises(UserError, match="use timm/resnet") as caught:
                build_vision(name)
            assert timm.is_model(str(caught.value).rpartition("timm/")[2])
