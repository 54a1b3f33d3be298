"""The image tower against open_clip's own VisionTransformer, and how `build_vision` finds and refuses weights."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower, resize_pos_embed
from open_clip.pos_embed import get_2d_sincos_pos_embed
from safetensors.torch import save_file
from torch import nn

from captioner.backbones import build_vision
from captioner.demo import CLIPS
from captioner.errors import UserError
from captioner.vit import (
    VisionConfig,
    VisionTransformer,
    open_clip_names,
    resize_positions,
    sin_cos_2d_positions,
)
from captioner.weights import OPEN_CLIP_VIT, export, fingerprint, load_into
from tests.hub_cache import hub, put  # noqa: F401

SMALL = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """No weight stays at a value (0, 1, a tiny scale) that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                continue  # matrices and tables are random already
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(0.5 + 0.2 * noise)
            elif "ln_" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return module.eval()


def donor_tower(vision_cfg: dict, quick_gelu: bool = False) -> nn.Module:
    return randomise(_build_vision_tower(16, CLIPVisionCfg(**vision_cfg), quick_gelu))


def checkpoint(tower: nn.Module) -> dict[str, torch.Tensor]:
    """The tower as open_clip saves it, with a stub of CLIP's text tower."""
    text = ("positional_embedding", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight", "ln_final.bias")
    visual = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    return visual | {key: torch.zeros(1) for key in (*text, "logit_scale")}


def donor_tokens(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What open_clip's last block gives, caught before the post-norm."""
    caught = []
    hook = tower.transformer.resblocks[-1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        tower(pixels)
    hook.remove()
    return caught[0]


def assert_same_tokens(ours: nn.Module, tower: nn.Module, size: int, batch: int = 2) -> None:
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = ours(pixels)
    expected = donor_tokens(tower, pixels)
    assert tokens.shape == expected.shape == (batch, ours.num_tokens, ours.width)
    assert expected.std() > 0.1
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["ViT-B-32", "ViT-B-16-quickgelu"])
def test_tokens_equal_open_clip_from_a_file(tmp_path, architecture):
    settings = open_clip.get_model_config(architecture)
    donor = randomise(open_clip.CLIP(**settings))
    save_file(donor.state_dict(), tmp_path / "clip.safetensors")
    backbone = build_vision(f"{architecture}:{tmp_path / 'clip.safetensors'}")
    assert_same_tokens(backbone.module, donor.visual, 224)
    assert backbone.name == architecture and backbone.weights == str(tmp_path / "clip.safetensors")
    assert backbone.weights_hash == fingerprint(backbone.module)


def test_tokens_equal_open_clip_vit_l_14_from_a_file(tmp_path):
    donor = randomise(_build_vision_tower(768, open_clip.get_model_config("ViT-L-14")["vision_cfg"]))
    path = tmp_path / "tower.safetensors"
    save_file(checkpoint(donor), path)
    ours = build_vision(f"ViT-L-14:{path}").module
    path.unlink()  # 1.2 GB
    assert_same_tokens(ours, donor, 224, batch=1)


def test_tokens_equal_open_clip_from_a_tag(hub):  # noqa: F811
    donor = randomise(_build_vision_tower(512, open_clip.get_model_config("ViT-B-32")["vision_cfg"], quick_gelu=True))
    write = lambda path: save_file(checkpoint(donor), path)  # noqa: E731
    put(hub, "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors", write)
    backbone = build_vision("ViT-B-32-quickgelu:openai")
    assert_same_tokens(backbone.module, donor, 224, batch=1)
    assert backbone.transform.mean == (0.48145466, 0.4578275, 0.40821073)
    assert (backbone.weights, backbone.weights_hash) == ("openai", fingerprint(backbone.module))


def test_preprocessing_is_the_tags(hub, monkeypatch):  # noqa: F811
    tags = {"datacomp1b": open_clip.get_pretrained_cfg("ViT-L-14-CLIPA", "datacomp1b")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", tags)
    monkeypatch.setitem(CLIPS, "small", {"vision_cfg": SMALL})
    state = checkpoint(donor_tower(SMALL))
    put(hub, "UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B", "open_clip_model.safetensors", lambda path: save_file(state, path))
    transform = build_vision("small:DataComp1B").transform
    assert (transform.interpolation, transform.resize_mode) == ("bilinear", "squash")
    assert transform.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    "changes, quick_gelu",
    [
        ({}, False),
        ({}, True),
        ({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, False),
        ({"ls_init_value": 1e-4, "mlp_ratio": 4.9231}, False),
        ({"pos_embed_type": "sin_cos_2d"}, False),
        ({"norm_kwargs": {"eps": 0.1}, "act_kwargs": {"approximate": "tanh"}}, False),
        ({"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}, True),
        ({"head_width": 32, "patch_size": 6}, False),
    ],
)
def test_every_setting_of_an_architecture(tmp_path, monkeypatch, changes, quick_gelu):
    settings = SMALL | changes
    donor = donor_tower(settings, quick_gelu)
    (tmp_path / "small.json").write_text(json.dumps({"vision_cfg": settings, "quick_gelu": quick_gelu}))
    monkeypatch.setattr("captioner.vit._open_clip_folder", lambda: tmp_path)
    monkeypatch.setattr("captioner.vit.open_clip_names", lambda: ("small",))
    ours = VisionTransformer(VisionConfig.from_name("small")).eval()
    load_into(ours, checkpoint(donor), OPEN_CLIP_VIT, "small")
    assert_same_tokens(ours, donor, 32)


@pytest.mark.parametrize(
    "vision, words",
    [
        ({"qk_norm": True}, "qk_norm to True"),
        ({"scale_fc": True}, "scale_fc to True"),
        ({"block_type": "custom"}, "block_type to 'custom'"),
        ({"norm_kwargs": {"bias": False}}, "bias to False"),
        ({"act_kwargs": {"inplace": True}}, "act_kwargs"),
        ({"image_size": [32, 64]}, "only square"),
        ({"new_setting": 1}, "new_setting to 1"),
        ({"pos_embed_type": "rotary"}, "'rotary' is not one of learned, sin_cos_2d"),
    ],
)
def test_settings_that_the_tower_lacks_are_errors(tmp_path, monkeypatch, vision, words):
    (tmp_path / "small.json").write_text(json.dumps({"vision_cfg": SMALL | vision}))
    monkeypatch.setattr("captioner.vit._open_clip_folder", lambda: tmp_path)
    monkeypatch.setattr("captioner.vit.open_clip_names", lambda: ("small",))
    with pytest.raises(UserError, match=words):
        VisionConfig.from_name("small")


def test_every_open_clip_architecture_is_built_or_refused_by_name():
    built, seen = 0, set()
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        if "timm_model_name" in vision or not isinstance(vision["layers"], int):
            with pytest.raises(UserError, match=f"{name} is .*use timm/"):
                VisionConfig.from_name(name)
            continue
        built += 1
        config = VisionConfig.from_name(name)
        assert config.layers == vision["layers"]
        if config in seen:
            continue
        seen.add(config)
        with torch.device("meta"):
            ours = VisionTransformer(replace(config, layers=2))
            quick_gelu = bool(open_clip.get_model_config(name).get("quick_gelu"))
            donor = _build_vision_tower(16, vision | {"layers": 2}, quick_gelu)
        load_into(ours, checkpoint(donor), OPEN_CLIP_VIT, name)
        block = donor.transformer.resblocks[0]
        assert ours.image_size == donor.image_size[0] and ours.blocks[0].attn.num_heads == block.attn.num_heads
        assert (ours.config.activation == "quick_gelu") == (type(block.mlp.gelu).__name__ == "QuickGELU")
        assert ours.config.pre_norm == isinstance(donor.ln_pre, nn.LayerNorm)
        assert ours.config.norm_eps == block.ln_1.eps
    assert built >= 56 and set(open_clip_names()) == set(open_clip.list_models())


def test_state_dict_round_trip_is_bitwise():
    donor = donor_tower(SMALL | {"ls_init_value": 0.1})
    state = checkpoint(donor)
    ours = VisionTransformer(VisionConfig(32, 8, 64, 2, 4, layer_scale=0.1))
    load_into(ours, state, OPEN_CLIP_VIT, "small")
    back = export(ours, OPEN_CLIP_VIT)
    dropped = {"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"}
    assert back.keys() == {key for key in state if key.startswith("visual.")} - dropped
    assert all(torch.equal(back[key], state[key]) for key in back)


@pytest.mark.parametrize(
    "name, kind",
    [("ViT-B-32", open_clip.CLIP), ("ViT-B-32", open_clip.CustomTextCLIP), ("coca_ViT-B-32", open_clip.CoCa)],
)
def test_whole_checkpoints_of_each_kind_load(name, kind):
    with torch.device("meta"):
        settings = open_clip.get_model_config(name)
        settings.pop("custom_text", None)
        donor = kind(**settings)
        load_into(VisionTransformer(VisionConfig.from_name(name)), donor.state_dict(), OPEN_CLIP_VIT, name)


def test_unknown_missing_and_misshapen_keys_are_errors(tmp_path):
    ours = VisionTransformer(VisionConfig(32, 8, 64, 2, 4))
    state = checkpoint(donor_tower(SMALL))
    with pytest.raises(UserError, match="unknown keys: visual.transformer.resblocks.0.attn.ln_q.weight"):
        load_into(ours, state | {"visual.transformer.resblocks.0.attn.ln_q.weight": torch.zeros(1)}, OPEN_CLIP_VIT, "x")
    with pytest.raises(UserError, match="missing: blocks.1.attn.k_proj.bias, blocks.1.attn.q_proj.bias"):
        absent = "visual.transformer.resblocks.1.attn.in_proj_bias"
        load_into(ours, {key: value for key, value in state.items() if key != absent}, OPEN_CLIP_VIT, "x")
    with pytest.raises(UserError, match=r"patch_embed.weight has shape \[64, 3, 4, 4\], expected \[64, 3, 8, 8\]"):
        load_into(ours, state | {"visual.conv1.weight": torch.zeros(64, 3, 4, 4)}, OPEN_CLIP_VIT, "x")
    save_file(state, tmp_path / "small.safetensors")
    with pytest.raises(UserError, match="small.safetensors does not fit VisionTransformer"):
        build_vision(f"ViT-S-32:{tmp_path / 'small.safetensors'}")


@pytest.mark.parametrize("size", [24, 40, 56])
def test_another_input_size_resizes_positions_as_open_clip(tmp_path, monkeypatch, size):
    trained, donor = donor_tower(SMALL), donor_tower(SMALL | {"image_size": size})
    state = checkpoint(trained)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = donor

    resized = dict(state)
    resize_pos_embed(resized, Model())
    prefix = "visual."
    donor.load_state_dict({key.removeprefix(prefix): resized[key] for key in resized if key.startswith(prefix)})
    save_file(state, tmp_path / "small.safetensors")
    monkeypatch.setitem(CLIPS, "small", {"vision_cfg": SMALL})
    backbone = build_vision(f"small:{tmp_path / 'small.safetensors'}", image_size=size)
    assert torch.equal(backbone.module.position_embedding, donor.positional_embedding)
    assert backbone.transform.image_size == backbone.module.image_size == size
    assert_same_tokens(backbone.module, donor, size)


def test_position_tables_that_are_no_square():
    with pytest.raises(UserError, match="12 rows"):
        resize_positions(torch.zeros(12, 4), 5)


def test_fixed_positions_equal_open_clip():
    expected = torch.from_numpy(get_2d_sincos_pos_embed(32, 5, cls_token=True)).float()
    torch.testing.assert_close(sin_cos_2d_positions(5, 32), expected, rtol=0, atol=1e-6)


def test_another_size_than_built_for_is_an_error():
    with pytest.raises(ValueError, match=r"expected pixels of shape \(B, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        VisionTransformer(VisionConfig(32, 8, 64, 2, 4))(torch.zeros(1, 3, 64, 64))


def test_own_sizes_and_initialisation():
    torch.manual_seed(0)
    backbone = build_vision("ViT-Tiny-Scenes")
    module = backbone.module
    assert (backbone.weights, backbone.weights_hash) == (None, None) and not module.training
    tokens = module(torch.randn(2, 3, 64, 64))
    assert tokens.shape == (2, 65, 128) == (2, module.num_tokens, module.width) and tokens.isfinite().all()
    tokens.sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    # A constant added to every key changes no attention weight, and fixed positions are not trained.
    idle = {name for name in gradients if name.endswith("k_proj.bias")}
    assert all(gradients[name].any() for name in gradients.keys() - idle)
    assert "position_embedding" in dict(module.named_buffers())
    learned = VisionTransformer(VisionConfig(64, 8, 192, 4, 3))
    assert abs(learned.blocks[0].attn.q_proj.weight.std() / 192**-0.5 - 1) < 0.05
    assert abs(learned.blocks[0].mlp.fc2.weight.std() / (192 * 8) ** -0.5 - 1) < 0.05
    assert abs(learned.position_embedding.std() / 192**-0.5 - 1) < 0.05
    assert not any(value.any() for name, value in learned.named_parameters() if name.endswith("bias"))


def test_config_is_checked():
    for changes, words in (
        ({"heads": 7}, "does not divide"),
        ({"activation": "relu"}, "not one of gelu"),
        ({"image_size": 8}, "smaller than one patch"),
        ({"width": 6, "heads": 1, "positions": "sin_cos_2d"}, "multiple of 4"),
    ):
        with pytest.raises(UserError, match=words):
            VisionConfig(**changes)
    config = VisionConfig.from_name("ViT-L-14-quickgelu", image_size=336)
    assert VisionConfig(**json.loads(json.dumps(asdict(config)))) == config and config.num_tokens == 577


@pytest.mark.parametrize(
    "spec, words",
    [
        ("ViT-B-33", "unknown architecture 'ViT-B-33'; closest: .*ViT-B-32.*open_clip.list_models"),
        ("RN50:openai", "is a ResNet, not a ViT: use timm/resnet50_clip"),
        ("MobileCLIP-S1", "use timm/fastvit_mci1"),
        ("convnext_base_w", "use timm/convnext_base"),
        ("ViT-B-32:", "ends in a colon"),
        ("ViT-B-32:openai", "trained with QuickGELU, and ViT-B-32 has GELU: use ViT-B-32-quickgelu"),
        ("ViT-H-14:dfn5b", "use ViT-H-14-quickgelu"),
        ("ViT-B-16-quickgelu:laion2b_s34b_b88k", "nor a tag of ViT-B-16-quickgelu; its tags: openai.*: ViT-B-16"),
        ("ViT-B-32:nothing_like_it", "its tags: openai, "),
        ("ViT-Tiny-Scenes:openai", "its tags: demo, scorer$"),
        ("ViT-B-32:missing/clip.safetensors", "no weights at missing/clip.safetensors"),
        ("ViT-B-32-quickgelu:openai", "open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai .*OFFLINE"),
        ("roberta-ViT-B-32:laion2b_s12b_b32k", "CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k .*HF_HUB_OFFLINE"),
    ],
)
def test_specs_that_fail(hub, spec, words):  # noqa: F811
    with pytest.raises(UserError, match=words) as caught:
        build_vision(spec)
    assert "\n" not in str(caught.value)


def test_config_beside_a_file_settles_activation_and_preprocessing(tmp_path, monkeypatch):
    monkeypatch.setitem(CLIPS, "small", {"vision_cfg": SMALL})
    state = {f"module.{key}": value for key, value in checkpoint(donor_tower(SMALL)).items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "resize_mode": "squash", "size": 32}
    config = {"model_cfg": {"quick_gelu": False}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    transform = build_vision(f"small:{tmp_path}").transform
    assert transform.mean == (0.5, 0.5, 0.5) and transform.resize_mode == "squash"
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="open_clip_config.json: .*QuickGELU"):
        build_vision(f"small:{tmp_path}")


def test_the_tower_needs_neither_open_clip_nor_timm():
    program = (
        "import sys; from captioner.vit import VisionConfig; VisionConfig.from_name('ViT-B-32'); "
        "print(sorted({'open_clip', 'timm', 'data', 'lora', 'torchvision'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
