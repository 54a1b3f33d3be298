"""Reading, renaming, checking and fingerprinting of weights."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from captioner import vit
from captioner.clip_hf import ACTIVATIONS, clip_config_to_hf
from captioner.errors import UserError
from captioner.weights import (
    HF_CLIP_VISION, Split, clip_to_hf, export, fetch, fetch_weights, fingerprint, hf_module_name, load_into, our_module_name, read_state_dict, rename,
)  # fmt: skip
from tests.hub_cache import hub, put  # noqa: F401

TABLE = {
    "stem.weight": "first.weight",
    "layers.{}.fused": Split(("blocks.{}.a", "blocks.{}.b")),
    "layers.{}.wide": Split(("blocks.{}.left", "blocks.{}.right"), dim=1),
    "layers.{}.parts.{}.scale": "blocks.{}.scales.{}",
    "head.*": None,
    "tail.*": "rest.*",
}


def donor_state() -> dict[str, torch.Tensor]:
    state = {"stem.weight": torch.randn(3, 2), "head.fc.weight": torch.randn(2), "tail.x.y": torch.randn(4)}
    for layer in (0, 1, 10):
        state[f"layers.{layer}.fused"] = torch.randn(6, 2)
        state[f"layers.{layer}.wide"] = torch.randn(2, 4)
        state[f"layers.{layer}.parts.3.scale"] = torch.randn(1)
    return state


def shards(folder, states: list[dict], weight_map: dict | None = None):
    names = [f"model-{i + 1:05}-of-{len(states):05}.safetensors" for i in range(len(states))]
    for name, state in zip(names, states, strict=True):
        save_file(state, folder / name)
    weight_map = weight_map or {key: name for name, state in zip(names, states, strict=True) for key in state}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


@pytest.mark.parametrize("name", ["model.safetensors", "open_clip_model.safetensors"])
def test_reads_a_file_and_its_directory(tmp_path, name):
    state = {"a": torch.randn(2, 3), "b": torch.arange(3), "c": torch.randn(2).bfloat16()}
    save_file(state, tmp_path / name)
    for path in (tmp_path / name, tmp_path, str(tmp_path)):
        read = read_state_dict(path)
        assert read.keys() == state.keys()
        assert all(read[key].dtype == state[key].dtype and torch.equal(read[key], state[key]) for key in state)


def test_reads_shards(tmp_path):
    parts = [{"a": torch.randn(2)}, {"b": torch.randn(3), "c": torch.randn(1)}]
    shards(tmp_path, parts)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        read = read_state_dict(path)
        assert sorted(read) == ["a", "b", "c"] and torch.equal(read["b"], parts[1]["b"])


def test_missing_shard_is_named(tmp_path):
    names = shards(tmp_path, [{"a": torch.randn(2)}, {"b": torch.randn(3)}])
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=names[1]):
        read_state_dict(tmp_path)


def test_shards_that_differ_from_their_index(tmp_path):
    names = shards(tmp_path, [{"a": torch.randn(2), "extra": torch.randn(1)}])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[0]}}))
    with pytest.raises(UserError, match="missing: b; unexpected: extra"):
        read_state_dict(tmp_path)


def test_index_may_not_lead_out_of_its_directory(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.randn(2)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="outside its directory"):
        read_state_dict(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"a": 3}}'])
def test_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "last.ckpt"])
def test_pickles_are_refused_with_a_conversion_that_works(tmp_path, name):
    weight = torch.randn(3, 2)
    torch.save({"a": weight, "shared": weight, "turned": weight.T}, tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match="is a pickle") as caught:
            read_state_dict(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    program = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(program, {})
    read = read_state_dict(next(tmp_path.glob("*.safetensors")))
    assert torch.equal(read["shared"], weight) and torch.equal(read["turned"], weight.T)


def test_safetensors_beside_a_pickle_is_read(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path)["a"] == 1


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_damaged_file_is_one_line_with_its_name(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or incomplete"):
        read_state_dict(path)


def test_no_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for name, words in ((".", "expected"), ("nowhere", "no such file"), ("notes.txt", "must end in")):
        with pytest.raises(UserError, match=words):
            read_state_dict(tmp_path / name)


def test_rename_and_export_are_inverse_bit_for_bit():
    state = donor_state()
    ours = rename(state, TABLE)
    assert torch.equal(ours["first.weight"], state["stem.weight"])
    assert torch.equal(ours["blocks.10.b"], state["layers.10.fused"][3:])
    assert torch.equal(ours["blocks.1.left"], state["layers.1.wide"][:, :2])
    assert torch.equal(ours["blocks.0.scales.3"], state["layers.0.parts.3.scale"])
    assert torch.equal(ours["rest.x.y"], state["tail.x.y"])
    back = export(ours, TABLE)
    assert back.keys() == state.keys() - {"head.fc.weight"}
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_rename_lists_unknown_keys():
    state = donor_state() | {f"odd.{i:02}": torch.zeros(1) for i in range(12)}
    with pytest.raises(UserError, match=r"unknown keys: odd\.00, odd\.01, .*odd\.07, … \(12 in all\)") as caught:
        rename(state, TABLE)
    assert "odd.08" not in str(caught.value)


def test_rename_refuses_an_uneven_split_and_two_sources_of_one_name():
    with pytest.raises(UserError, match="does not split into 2"):
        rename({"layers.0.fused": torch.zeros(5, 2)}, TABLE)
    with pytest.raises(UserError, match="both x"):
        rename({"a": torch.zeros(1), "b": torch.zeros(1)}, {"a": "x", "b": "x"})


def test_export_refuses_unknown_and_incomplete():
    with pytest.raises(UserError, match="stranger"):
        export({"stranger": torch.zeros(1)}, TABLE)
    with pytest.raises(UserError, match="layers.2.fused"):
        export({"blocks.2.a": torch.zeros(1, 1)}, TABLE)


def small_module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_load_into_casts_to_the_module():
    source = small_module()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    source[1].num_batches_tracked += 7
    original = source.state_dict()
    state = {key: value.bfloat16() if value.is_floating_point() else value for key, value in original.items()}
    module = small_module()
    load_into(module, state, None, "a donor")
    for key, value in module.state_dict().items():
        assert value.dtype == original[key].dtype and torch.equal(value, state[key].to(value.dtype))
    with torch.device("meta"):
        empty = small_module()
    load_into(empty, state, None, "a donor")
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in empty.state_dict().items())
    assert empty[0].weight.requires_grad and empty[0].weight.data_ptr() != state["0.weight"].data_ptr()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("0.bias"), "missing: 0.bias; unexpected: none"),
        (lambda s: s.update(extra=torch.zeros(1)), "missing: none; unexpected: extra"),
        (lambda s: s.update({"other": s.pop("1.weight")}), "missing: 1.weight; unexpected: other"),
        (lambda s: s.update({"0.weight": torch.zeros(3, 4)}), r"0.weight has shape \[3, 4\], expected \[3, 2\]"),
        (lambda s: s.update({"0.bias": torch.zeros(3, dtype=torch.int64)}), "0.bias has dtype torch.int64"),
    ],
)
def test_load_into_refuses_and_changes_nothing(change, words):
    module = small_module()
    before = fingerprint(module)
    state = {key: torch.ones_like(value) for key, value in module.state_dict().items()}
    change(state)
    with pytest.raises(UserError, match=f"a donor does not fit Sequential: {words}"):
        load_into(module, state, None, "a donor")
    assert fingerprint(module) == before


def test_fingerprint_sees_names_shapes_dtypes_and_bytes():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.int64), "c": torch.tensor(1.0)}
    variants = [
        base,
        {"x": base["a"], "b": base["b"], "c": base["c"]},
        base | {"a": base["a"].reshape(3, 2)},
        base | {"b": torch.zeros(4, dtype=torch.int32)},
        base | {"c": torch.tensor(1.0 + 2**-20)},
        base | {"d": torch.zeros(0)},
    ]
    assert len({fingerprint(state) for state in variants}) == len(variants)
    assert fingerprint(dict(reversed(base.items()))) == fingerprint(base)
    strided = base | {"a": base["a"].T.contiguous().T}
    assert fingerprint(strided) == fingerprint(base)
    module = small_module()
    assert fingerprint(module) == fingerprint(module.state_dict())


def test_fetch_from_the_cache_and_missing_offline(hub):  # noqa: F811
    put(hub, "someone/model", "config.json", lambda path: path.write_text("{}"))
    assert fetch("someone/model", "config.json").read_text() == "{}"
    with pytest.raises(UserError, match="spiece.model of someone/model .*HF_HUB_OFFLINE"):
        fetch("someone/model", "spiece.model")
    with pytest.raises(UserError, match="a/b/c .*not a repository name"):
        fetch("a/b/c", "config.json")


def test_fetch_weights_single_sharded_and_missing(hub):  # noqa: F811
    put(hub, "one/file", "model.safetensors", lambda path: save_file({"a": torch.ones(1)}, path))
    assert read_state_dict(fetch_weights("one/file"))["a"] == 1

    index = json.dumps({"weight_map": {"a": "part1.safetensors", "b": "part2.safetensors"}})
    put(hub, "two/shards", "model.safetensors.index.json", lambda path: path.write_text(index))
    put(hub, "two/shards", "part1.safetensors", lambda path: save_file({"a": torch.ones(1)}, path))
    with pytest.raises(UserError, match="part2.safetensors of two/shards"):
        fetch_weights("two/shards")
    put(hub, "two/shards", "part2.safetensors", lambda path: save_file({"b": torch.ones(1)}, path))
    assert sorted(read_state_dict(fetch_weights("two/shards"))) == ["a", "b"]

    with pytest.raises(UserError, match="model.safetensors or model.safetensors.index.json of no/thing"):
        fetch_weights("no/thing")


# ---- Hugging Face CLIP -----------------------------------------------------------------------------------

TOWER = vit.VisionConfig(image_size=32, patch_size=16, width=32, layers=2, heads=4, mlp_ratio=1.5, norm_eps=1e-3, activation="quick_gelu")


def random_tower(config: vit.VisionConfig) -> vit.VisionTransformer:
    """A tower all of whose weights matter."""
    torch.manual_seed(0)
    tower = vit.VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return tower


def export_clip(tower: vit.VisionTransformer, folder):
    """(CLIPVisionModel, loading info) of the tower's export."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(exist_ok=True)
    save_file(clip_to_hf(tower, tower.config), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(clip_config_to_hf(tower.config)))
    model, info = transformers.CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


@pytest.mark.parametrize(
    "changes",
    [*({"activation": activation} for activation in ACTIVATIONS.values()), {"positions": "sin_cos_2d"}, {"image_size": 39, "patch_size": 12}],
    ids=lambda changes: ",".join(map(str, changes.values())),
)
def test_an_exported_clip_loads_in_transformers_and_gives_the_same_tokens(tmp_path, changes):
    tower = random_tower(dataclasses.replace(TOWER, **changes))
    model, info = export_clip(tower, tmp_path)
    assert not any(info.values()), info
    pixels = torch.randn(2, 3, tower.image_size, tower.image_size)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).last_hidden_state, tower(pixels), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert read_state_dict(tmp_path / "again").keys() == clip_to_hf(tower, tower.config).keys(), "the names that it writes itself"
    renamed = rename(model.state_dict(), HF_CLIP_VISION)
    assert fingerprint(renamed) == fingerprint(tower)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pre_norm": False}, "cannot express this image encoder: it has no norm before its first block$"),
        ({"layer_scale": 1e-5}, r"it has factors on its residual branches \(layer_scale\)"),
        ({"layer_scale": 1e-5, "pre_norm": False}, "first block and factors on"),
    ],
)
def test_towers_that_hugging_face_cannot_express(changes, words):
    tower = vit.VisionTransformer(dataclasses.replace(TOWER, **changes))
    for write in (lambda: clip_to_hf(tower, tower.config), lambda: clip_config_to_hf(tower.config)):
        with pytest.raises(UserError, match=words):
            write()


def test_module_names_of_clip(tmp_path):
    tower = random_tower(TOWER)
    model, _ = export_clip(tower, tmp_path)
    translated = {}
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            translated[name] = hf_module_name(f"vision.{name}")
            assert torch.equal(model.get_submodule(translated[name]).weight, module.weight), name
            assert our_module_name(translated[name]) == our_module_name(f"vision_model.{translated[name]}") == f"vision.{name}"
    theirs = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm)}
    assert set(translated.values()) == theirs - {"post_layernorm"}
    assert hf_module_name("vision.blocks.10.attn.o_proj") == "encoder.layers.10.self_attn.out_proj"


def test_module_names_of_timm():
    for name in ("vision.trunk.blocks.0.attn.qkv", "vision.trunk.stages.2.blocks.1.mlp.fc1"):
        assert hf_module_name(name) == name.removeprefix("vision.") and our_module_name(hf_module_name(name)) == name


def test_names_that_neither_side_has():
    for name in ("vision.blocks.0.attn", "vision.blocks.0.attn.qkv", "vision.encoder.layers.0.mlp.fc1", "blocks.0.mlp.fc1", "vision.position_embedding"):
        with pytest.raises(UserError, match=f"{name} has no counterpart in Hugging Face's T5 or its CLIPVisionModel"):
            hf_module_name(name)
    for name in ("post_layernorm", "visual_projection", "embeddings.position_embedding", "text_model.encoder.layers.0.mlp.fc1", "vision.blocks.0.mlp.fc1"):
        with pytest.raises(UserError, match=f"{name} of Hugging Face's T5 has no counterpart here, nor of its CLIPVisionModel"):
            our_module_name(name)
