"""config.json of a run and the sizes that other files claim: what is refused before anything is built."""

import copy
import dataclasses
import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from captioner import run_config, weights
from captioner.backbones import build_own_vision, build_text
from captioner.errors import UserError
from tests.fuzz_inputs import write_run, write_shards


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run"


def change(run, path: str, value) -> None:
    """Set one value of a run's config.json."""
    config = json.loads((run / "config.json").read_text())
    *parents, last = path.split(".")
    place = config
    for key in parents:
        place = place[key]
    place[last] = value
    (run / "config.json").write_text(json.dumps(config))


WRONG = {
    "adapters name a folder outside": ("model.adapters", ["../../outside"], "model.adapters"),
    "a newline in a name": ("model.vision.name", "ViT\nB", "model.vision.name"),
    "text for a truth value": ("model.text.embedded", "no", "model.text.embedded"),
    "nothing to load it from": ("model.text.embedded", False, "model.text is not embedded and names no weights"),
    "no hash": ("model.vision.hash", "abc", "model.vision.hash"),
    "sizes that differ": ("model.vision.image_size", 24, "image_size is 24, and 16 in its transform"),
    "a size of gigabytes": ("model.vision.image_size", 10**6, "model.vision.image_size"),
    "NaN": ("model.vision.transform.mean", [float("nan"), 0, 0], "transform.mean"),
    "a step of the transform that we do not have": ("model.vision.transform.blur", 3, '"blur", which no run has'),
    "an adapter twice": ("model.adapters", ["a", "a"], "model.adapters"),
    "no stack": ("model.stack", None, "model.stack is null, which no run has"),
    "two bits": ("model.base_bits", 2, "model.base_bits is 2, which no run has: it is null or 4"),
    "a list of settings": ("settings", [], "config.settings"),
    "no data": ("settings.data", None, "settings.data"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_run_has(case, run):
    run_config.read_config(run)
    path, value, message = WRONG[case]
    change(run, path, value)
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as caught:
        run_config.read_config(run)
    assert str(caught.value).isprintable() and str(run / "config.json") in str(caught.value)


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    steps: int | None = None
    words: tuple[str, ...] = ()
    kind: str = dataclasses.field(default="a", metadata={"choices": ("a", "b")})
    rank: int | dict[str, int] = 8
    scores: list[float] = dataclasses.field(default_factory=list)


def test_settings_of_a_dataclass():
    saved = {"lr": 1, "steps": None, "words": ["x", "y"], "kind": "b", "rank": {"decoder": 2}, "scores": [1.5, 2]}
    assert Settings(**run_config.checked_settings(Settings, saved, "here")) == Settings(1, None, ("x", "y"), "b", {"decoder": 2}, [1.5, 2])
    wrong = {"lr": "1", "steps": True, "words": "x", "kind": "c", "rank": {"decoder": "2"}, "scores": [None], "other": 1}
    for name, value in (*wrong.items(), ("lr", float("nan")), ("lr", 1e40), ("steps", 2**70), ("words", [1])):
        with pytest.raises(UserError, match=f"here.*{name}"):
            run_config.checked_settings(Settings, {name: value}, "here")


@pytest.mark.parametrize(("key", "value"), [("num_layers", 10**9), ("num_decoder_layers", 10**9), ("vocab_size", 10**12), ("d_ff", 2**62), ("num_heads", "4"), ("dropout_rate", 2), ("num_heads", 2**20)])
def test_sizes_of_a_t5_are_refused_at_once(key, value, run):
    config = json.loads((run / "text" / "config.json").read_text())
    (run / "text" / "config.json").write_text(json.dumps(config | {key: value}))
    started = time.process_time()
    with pytest.raises(UserError, match="config.json of "):
        build_text(str(run / "text"))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", ["ViT-bigG-14", "timm/vit_giant_patch14_clip_224"])
def test_a_large_architecture_is_refused_before_it_is_built(name, tmp_path, monkeypatch):
    save_file({"class_embedding": torch.zeros(16)}, tmp_path / "vision.safetensors")
    normal = torch.Tensor.normal_

    def refuse(self, *arguments, **options):
        assert self.is_meta, "random weights of an architecture that does not fit"
        return normal(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", refuse)
    with pytest.raises(UserError, match="does not fit"):
        build_own_vision(name, 224, tmp_path / "vision.safetensors")


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path):
    write_shards(tmp_path)
    text = tmp_path / "text"
    index = json.loads((text / "model.safetensors.index.json").read_text())
    expected = weights.read_state_dict(text)
    first, second = sorted(set(index["weight_map"].values()))
    tensors = load_file(text / first)
    name = next(iter(load_file(text / second)))
    save_file(tensors | {name: torch.zeros(2)}, text / first)
    with pytest.raises(UserError, match=f"holds tensors that .* has in another shard: {name}"):
        weights.read_state_dict(text)
    outside = copy.deepcopy(index)
    outside["weight_map"][name] = "../run/model.safetensors\n"
    (text / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(UserError, match="outside its directory") as caught:
        weights.read_state_dict(text)
    assert str(caught.value).isprintable() and len(expected) == len(index["weight_map"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_where_they_are_used(value, tmp_path):
    module = torch.nn.Linear(2, 2)
    state = {"weight": torch.full((2, 2), value, dtype=torch.float64), "bias": torch.zeros(2)}
    before = module.weight.clone()
    with pytest.raises(UserError, match="weight has values that are not finite"):
        weights.load_into(module, state, None, "donor")
    assert torch.equal(module.weight, before)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError):
        weights.read_state_dict(tmp_path / "model.safetensors")
    with pytest.raises(UserError):
        weights.read_state_dict(tmp_path)
