"""The embedded backbones: other people's programs load them, they know scenes, and scripts/pretrain_demo.py makes such files."""

import importlib.util
import random

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from captioner import cli, demo
from captioner.backbones import build_text, build_vision
from captioner.clip_score import PROMPT, load_scorer, same_model
from data.scene_facts import judge
from data.scene_language import captions
from data.scenes import split
from tests.conftest import REPOSITORY

NAME = "ViT-Tiny-Scenes"
TAGS = sorted(demo.CLIP_WEIGHTS[NAME])


@pytest.fixture(scope="module")
def pretrain():
    """scripts/pretrain_demo.py as a module."""
    spec = importlib.util.spec_from_file_location("pretrain_demo", REPOSITORY / "scripts" / "pretrain_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_small():
    files = [path for path in demo.FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 12e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3 and all(tensor.dtype == torch.bfloat16 for path in weights for tensor in load_file(path).values())
    card = (demo.FOLDER / "card.md").read_text(encoding="utf-8")
    for words in ("perplexity of captions", "text to image", "seconds", *(path.stem for path in demo.CLIP_WEIGHTS[NAME].values())):
        assert words in card


@pytest.mark.parametrize("tag", TAGS)
def test_open_clip_loads_the_clips(tag):
    donor = open_clip.CLIP(**demo.CLIPS[NAME]).eval()
    state = load_file(demo.CLIP_WEIGHTS[NAME][tag])
    donor.load_state_dict(state, strict=True)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    caught = []
    donor.visual.transformer.resblocks[-1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        expected = donor.encode_image(pixels, normalize=True)
        tokens = build_vision(f"{NAME}:{tag}").module(pixels)
    torch.testing.assert_close(load_scorer(f"{NAME}:{tag}", "cpu").embed_images(pixels), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens, caught[0], rtol=0, atol=1e-5)


def test_transformers_loads_the_t5():
    from transformers import T5ForConditionalGeneration, T5Tokenizer

    folder = demo.TEXTS["t5-tiny-scenes"]
    donor, ours = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(), build_text("t5-tiny-scenes")
    texts = [caption for row in split("val", 100) for caption in row.captions] + ["caption: small red circle at 3 7 on green grass"]
    ids = ours.tokenizer.encode(texts)
    theirs = T5Tokenizer.from_pretrained(folder)
    assert theirs(texts).input_ids == ids
    source, labels = torch.tensor(ids[-1:]), torch.tensor(ids[:1])
    with torch.no_grad():
        torch.testing.assert_close(ours.module(source, labels), donor(input_ids=source, labels=labels).logits, rtol=0, atol=1e-4)


def test_the_two_clips_are_independent_and_know_scenes():
    demo_clip, scorer = (load_scorer(f"{NAME}:{tag}", "cpu") for tag in TAGS)
    assert not same_model(demo_clip, scorer)
    rows = split("val", 100)
    texts = [captions(row.image.scene, random.Random(row.id), 1)[0] for row in rows]
    for clip in (demo_clip, scorer):
        images = clip.embed_images(torch.stack([clip.transform(row.image.open()) for row in rows]))
        similarity = clip.embed_texts(texts, PROMPT) @ images.T
        true = torch.tensor([[judge(text, row.image.scene).false == 0 for row in rows] for text in texts])
        # Several pictures may fit a vague caption; chance is true.float().mean().
        hits = true[torch.arange(len(rows)), similarity.argmax(1)].float().mean()
        assert hits > 0.5 > 5 * true.float().mean()


def test_the_words_of_captions_are_whole_tokens():
    tokenizer = open_clip.SimpleTokenizer(str(demo.MERGES))
    assert tokenizer.vocab_size <= demo.CLIPS[NAME]["text_cfg"]["vocab_size"]
    texts = [caption for row in split("test", 200) for caption in row.captions]
    words = [len(text.replace(",", " ,").replace(":", " :").split()) for text in texts]
    assert [len(tokenizer.encode(text)) for text in texts] == words
    assert max(words) + 5 <= 77


def test_twins_differ_in_one_thing_and_stay_within_the_training_split(pretrain):
    rng = random.Random(0)
    scenes = [scene for scene, _ in zip(pretrain.training_scenes(5), range(300))]
    twins = [pretrain.twin(scene, rng) for scene in scenes]
    assert not any(scene.held_out or other.held_out or scene == other for scene, other in zip(scenes, twins))
    for scene, other in zip(scenes, twins):
        assert not {item.colour for item in other.objects} & pretrain.hidden_colours(other)
        changed = [name for name in ("shape", "colour", "size", "x", "y") for a, b in zip(scene.objects, other.objects) if getattr(a, name) != getattr(b, name)]
        assert len(set(changed)) + (scene.background != other.background) == 1
    seen = {row.image.scene for row in split("train", 500)}
    assert not seen & set(scenes)


@pytest.mark.parametrize("part", ["demo", "text"])
def test_pretraining_writes_what_loads(pretrain, tmp_path, monkeypatch, part):
    monkeypatch.setattr(pretrain, "TEST_SCENES", 6)
    monkeypatch.setitem(pretrain.RECIPES, part, pretrain.RECIPES[part] | {"batch": 4})
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(pretrain.main, ["--parts", part, "--steps", "2", "--device", "cpu", "--output", str(tmp_path)])
    assert exit_info.value.code == 0
    assert "| steps | 2 |" in (tmp_path / "card.md").read_text(encoding="utf-8")
    if part == "text":
        assert build_text(str(tmp_path / "t5-tiny-scenes")).module.config.vocab_size == len(build_text("t5-tiny-scenes").tokenizer)
    else:
        assert build_vision(f"{NAME}:{tmp_path / f'{NAME}.demo.safetensors'}").module.num_tokens == 65
