"""Reading, renaming, checking and fingerprinting of weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from captioner.errors import UserError
from captioner.weights import Split, export, fetch, fetch_weights, fingerprint, load_into, read_state_dict, rename
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
