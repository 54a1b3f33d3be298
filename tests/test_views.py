"""Several views of a picture: which parts they show, the bridge that joins them, and runs that are trained, saved and loaded with them."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import captioner
import evaluate
import train
from captioner import word_attention
from captioner.backbones import build_vision
from captioner.errors import UserError
from captioner.export import export
from captioner.model import Bridge, Captioner
from captioner.t5 import T5, T5Config
from data.scenes import split
from data.transforms import ImageTransform
from data.views import NAMED, WHOLE, View, parse_views
from tests.conftest import REPOSITORY


def picture(width: int = 90, height: int = 61) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_views_by_number_and_by_name():
    assert parse_views("1") == parse_views("whole") == ()
    assert parse_views("6") == tuple(NAMED.values()) and parse_views("5") == tuple(NAMED.values())[:5]
    assert parse_views("whole, center ,0.5:0:0.25") == (WHOLE, View(0.25, 0.25, 0.5), View(0.5, 0, 0.25))
    assert parse_views("0:0:0.3333333,0.6666667:0:0.3333333")[1].side == 0.3333333


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "7 views: choose from 1, 5, 6"), ("", "unknown view ''"), ("whole,middle", "unknown view 'middle': choose from whole, top-left"),
        ("whole,whole", "a view is given twice: whole, whole"), ("0.6:0:0.5", "view 0.6:0:0.5 is not within the picture"), ("nan:0:1", "unknown view 'nan:0:1'"),
        ("0:0:0.01", "its side is below 0.0625"), ("-0.1:0:0.5", "not within the picture"), ("0:0", "unknown view '0:0'"),
        (",".join(f"0:{k / 100}:0.125" for k in range(65)), "65 views, at most 64"),
    ],
)  # fmt: skip
def test_views_that_cannot_be_are_told(text, message, capsys):
    with pytest.raises(ValueError) as caught:
        parse_views(text)
    assert message in str(caught.value)
    with pytest.raises(SystemExit) as stopped:
        train.main([f"--views={text}"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(90, 61), (61, 90), (17, 200), (40, 40)])
def test_the_quadrants_and_the_centre_are_cut_out_of_open_clips_picture_of_twice_the_size(mode, size):
    image = picture(*size)
    double = image_transform_v2(PreprocessCfg(size=(32, 32), resize_mode=mode, interpolation="bicubic"), is_train=False)(image)
    whole = image_transform_v2(PreprocessCfg(size=(16, 16), resize_mode=mode, interpolation="bicubic"), is_train=False)(image)
    views = ImageTransform(16, resize_mode=mode, views=parse_views("6"))(image)
    assert views.shape == (6, 3, 16, 16)
    expected = [whole, double[:, :16, :16], double[:, :16, 16:], double[:, 16:, :16], double[:, 16:, 16:], double[:, 8:24, 8:24]]
    assert torch.equal(views, torch.stack(expected))


def test_a_huge_picture_is_never_resized_whole():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 30000, 3), dtype=np.uint8))
    views = ImageTransform(64, views=parse_views("whole,center"))(image)
    assert views.shape == (2, 3, 64, 64) and torch.isfinite(views).all()


def test_a_transform_with_views_as_json():
    transform = ImageTransform(16, views=parse_views("whole,0.25:0.5:0.5"))
    assert ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    assert "views" not in ImageTransform(16).to_dict()
    with pytest.raises(ValueError, match="not within the picture"):
        ImageTransform(16, views=((0.9, 0, 0.5),))


def tiny_model(views: int) -> Captioner:
    torch.manual_seed(0)
    return Captioner(build_vision("ViT-Tiny-Scenes", 16).module, T5(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=0, num_decoder_layers=2, num_heads=2, dropout_rate=0.0)), views).eval()


def test_the_memory_is_each_views_tokens_with_its_embedding_one_after_another():
    model, pixels = tiny_model(3), torch.randn(2, 3, 3, 16, 16)
    torch.nn.init.normal_(model.bridge.view_embedding)
    memory = model.encode(pixels)
    assert model.image_tokens == memory.shape[1] == 3 * model.vision.num_tokens
    for number in range(3):
        tokens = model.vision(pixels[:, number])
        expected = tokens @ model.bridge.weight.T + model.bridge.bias + model.bridge.view_embedding[number]
        part = memory[:, number * tokens.shape[1] : (number + 1) * tokens.shape[1]]
        assert torch.allclose(part, expected, atol=1e-5)


def test_without_views_nothing_is_added():
    model = tiny_model(0)
    assert set(model.bridge.state_dict()) == {"weight", "bias"} and model.views == 0 and model.image_tokens == model.vision.num_tokens


def test_view_embeddings_start_at_zero_and_get_a_gradient():
    model = tiny_model(2)
    assert not model.bridge.view_embedding.any()
    loss, _ = model.loss(model.encode(torch.randn(2, 2, 3, 16, 16)), torch.tensor([[5, 6, 1], [7, 1, -100]]))
    loss.backward()
    assert (model.bridge.view_embedding.grad.norm(dim=1) > 0).all()


def test_a_bridge_for_another_number_of_views_keeps_its_map():
    bridge = Bridge(4, 6, 2)
    other = bridge.of_views(5)
    assert other.view_embedding.shape == (5, 6) and torch.equal(other.weight, bridge.weight) and torch.equal(other.bias, bridge.bias)
    assert bridge.of_views(0).view_embedding is None


def test_attention_over_views_is_laid_on_one_grid():
    """A look at one token of a quadrant is a look at that spot of the picture; sums stay."""
    views = parse_views("6")
    looks = torch.zeros(1, 6, 4, 4)
    looks[0, 2, 3, 0] = 0.25  # top right quadrant, its lower left corner
    looks[0, 0, 0, 0] = 0.5  # the whole, its upper left corner
    total = word_attention.on_one_grid(looks, views)
    assert total.shape == (1, 8, 8) and total.sum().item() == pytest.approx(0.75)
    assert total[0, 3, 4].item() == pytest.approx(0.25)
    assert torch.allclose(total[0, :2, :2], torch.full((2, 2), 0.125))
    centre = word_attention.on_one_grid(torch.ones(1, 1, 3, 3), views[5:])
    assert centre.shape == (1, 6, 6) and centre.sum().item() == pytest.approx(9)
    assert torch.allclose(centre, centre.flip(1)) and torch.allclose(centre, centre.transpose(1, 2))


TINY = ["--lora-targets", "attn", "--lora-where", "decoder", "--max-steps", "2", "--eval-every", "2", "--eval-images", "4", "--limit", "12", "--batch-size", "4", "--best-by", "loss"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    output = folder / "run"
    assert train.main([*TINY, "--views", "whole,top-left,0.25:0.25:0.5", "--cache-features", str(folder / "cache"), "--output", str(output)]) == 0
    return output


def test_a_run_brings_its_views(run):
    model, _, transform = captioner.load(run)
    assert transform.views == parse_views("whole,top-left,center") and model.views == 3
    assert model.bridge.view_embedding.abs().sum() > 0
    pixels = torch.stack([transform(row.image.open()) for row in split("val", 2)])
    assert model.encode(pixels).shape[1] == 3 * model.vision.num_tokens


def test_cached_and_live_captions_of_views_are_the_same(run, tmp_path):
    captions = []
    for name, more in (("live", []), ("cached", ["--cache-features", str(run.parent / "cache")])):
        assert evaluate.main([str(run), "--limit", "6", "--output", str(tmp_path / name), *more]) == 0
        captions.append((tmp_path / name / "captions.jsonl").read_text())
    assert captions[0] == captions[1]
    assert (tmp_path / "live" / "report.html").is_file()


def test_a_run_without_views_goes_on_with_some_and_back(run, tmp_path):
    plain, several = tmp_path / "plain", tmp_path / "several"
    assert train.main([*TINY, "--output", str(plain)]) == 0
    assert train.main([*TINY, "--base", str(plain), "--views", "5", "--max-steps", "1", "--output", str(several)]) == 0
    model, _, transform = captioner.load(several)
    assert model.views == 5 and len(transform.views) == 5
    assert train.main([*TINY, "--base", str(several), "--max-steps", "1", "--output", str(tmp_path / "kept")]) == 0
    assert captioner.load(tmp_path / "kept")[0].views == 5
    assert train.main([*TINY, "--base", str(several), "--views", "1", "--max-steps", "1", "--output", str(tmp_path / "back")]) == 0
    assert captioner.load(tmp_path / "back")[0].views == 0


def test_bare_backbones_with_views(run):
    model, _, transform = captioner.load(vision="ViT-Tiny-Scenes:demo", text="t5-tiny-scenes", views="6")
    assert model.views == len(transform.views) == 6
    with pytest.raises(UserError, match="7 views: choose from"):
        captioner.load(vision="ViT-Tiny-Scenes:demo", text="t5-tiny-scenes", views="7")
    with pytest.raises(UserError, match="brings its own adapters and views"):
        captioner.load(run, views="6")


@pytest.mark.parametrize("views", [[], [[0, 0]], [[0, 0, 2]], [[0.9, 0, 0.5]], "6", [[0, 0, 1], [0, 0, 1]], [[0, 0, True]], [["0", 0, 1]], None], ids=json.dumps)
def test_a_config_with_views_that_no_run_has_is_refused(run, tmp_path, views):
    config = json.loads((run / "config.json").read_text())
    config["model"]["vision"]["transform"]["views"] = views
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model.vision.transform.views is .*, which no run has: it is a list of views"):
        captioner.load(tmp_path)


def test_a_bridge_of_another_number_of_views_is_refused(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    config = json.loads((copied / "config.json").read_text())
    config["model"]["vision"]["transform"]["views"] = [[0, 0, 1], [0, 0, 0.5]]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="view_embedding"):
        captioner.load(copied)


def test_a_bundle_brings_its_views(run, tmp_path):
    model, _, transform = captioner.load(export(run, "bundle", tmp_path / "one.safetensors").output)
    assert model.views == 3 and transform == dataclasses.replace(transform, views=parse_views("whole,top-left,center"))
    merged = export(run, "merged", tmp_path / "merged").output
    assert "view_embedding" in (merged / "README.md").read_text() and "transformers import CLIPVisionModel" not in (merged / "README.md").read_text()


@pytest.mark.parametrize("more", [["--decode", "greedy"], ["--best-of", "2", "--reranker", "ViT-Tiny-Scenes:scorer"]], ids=" ".join)
def test_a_folder_is_captioned_with_views(run, tmp_path, more):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    picture().save(pictures / "a.png")
    done = subprocess.run([sys.executable, REPOSITORY / "scripts" / "caption.py", pictures, "--run", run, *more], capture_output=True, text=True)
    assert done.returncode == 0 and (pictures / "a.txt").read_text().strip(), done.stderr
