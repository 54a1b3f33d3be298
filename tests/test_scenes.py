"""The drawn data set: deterministic and visible, with held-out pairs, and questions to the truth."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data import scenes
from data.rows import DataError
from data.scene_truth import is_at, is_between


def test_a_scene_is_a_function_of_seed_split_and_index(train_scenes):
    again = scenes.split("train", 30)
    assert again == train_scenes[:30]
    for row, other in zip(again, train_scenes, strict=False):
        assert row.image.open().tobytes() == other.image.open().tobytes()
        assert row.image.fingerprint() == other.image.fingerprint()
    assert scenes.split("train", 5, seed=1) != train_scenes[:5]
    assert scenes.make_scene("val", 0) != scenes.make_scene("train", 0)
    assert scenes.make_scene("train", 29) == train_scenes[29].image.scene
    assert len({row.image.fingerprint() for row in train_scenes}) == len(train_scenes)
    assert scenes.split("train", 1, size=32)[0].image.fingerprint() != train_scenes[0].image.fingerprint()


def test_another_process_draws_the_same(train_scenes):
    program = (
        "from data import scenes\n"
        "row = scenes.split('train', 8)[7]\n"
        "print(row.captions, row.image.open().tobytes()[::97].hex())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == f"{train_scenes[7].captions} {train_scenes[7].image.open().tobytes()[::97].hex()}"


def test_held_out_pairs_are_never_in_train_and_in_half_of_val(train_scenes, val_scenes):
    assert not any(row.image.scene.held_out for row in train_scenes)
    pairs = {(item.colour, item.shape) for row in train_scenes for item in row.image.scene.objects}
    assert pairs == {(colour, shape) for colour in scenes.COLOURS for shape in scenes.SHAPES} - scenes.HELD_OUT
    assert [row.image.scene.held_out for row in val_scenes] == [index % 2 == 1 for index in range(len(val_scenes))]
    shown = {(item.colour, item.shape) for row in val_scenes for item in row.image.scene.objects}
    assert shown >= scenes.HELD_OUT
    assert not {" ".join(pair) for pair in scenes.HELD_OUT} & {
        " ".join(pair)
        for row in train_scenes
        for caption in row.captions
        for pair in zip(caption.split(), caption.split()[1:], strict=False)
    }


def test_objects_keep_their_distance_and_stay_inside(train_scenes):
    for row in train_scenes:
        objects = row.image.scene.objects
        assert 1 <= len(objects) <= 4
        for index, a in enumerate(objects):
            assert a.radius < a.x < 1 - a.radius and a.radius < a.y < 1 - a.radius
            for b in objects[:index]:
                assert math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (0 to 255) -> CIELAB, D65."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def test_objects_stand_out_from_their_background_and_show_their_colour(train_scenes):
    """An object's colour differs from nearly all of the background by far more than CIELAB's just noticeable 2.3."""
    for row in train_scenes[:600]:
        scene = row.image.scene
        background = lab(np.asarray(scenes.draw(scenes.Scene((), scene.background), 64)).reshape(-1, 3).astype(float))
        picture = lab(np.asarray(row.image.open()).astype(float))
        for item in scene.objects:
            colour = lab(np.array(item.tint, dtype=float))
            distances = np.linalg.norm(background - colour, axis=-1)
            assert np.quantile(distances, 0.05) > 25, (item, scene.background, np.quantile(distances, 0.05))
            nearest = min(
                scenes.COLOURS, key=lambda name: np.linalg.norm(lab(np.array(scenes.COLOURS[name], float)) - colour)
            )
            assert nearest == item.colour
            reach = int(item.radius * 64)
            x, y = int(item.x * 64), int(item.y * 64)
            patch = picture[y - reach : y + reach + 1, x - reach : x + reach + 1].reshape(-1, 3)
            assert (np.linalg.norm(patch - colour, axis=-1) < 3).mean() > 0.15, item


@pytest.mark.parametrize("size", [16, 64, 100, 224])
def test_pictures_of_any_size_show_the_same_scene(train_scenes, size):
    small = np.asarray(train_scenes[4].image.open().resize((16, 16)), dtype=float)
    picture = scenes.draw(train_scenes[4].image.scene, size)
    assert picture.size == (size, size) and picture.mode == "RGB"
    assert np.abs(np.asarray(picture.resize((16, 16)), dtype=float) - small).mean() < 6


def test_area_of_the_shapes():
    """The drawn area of each shape against its formula, at radius 40 of 200 pixels, unrotated."""
    areas = {
        "circle": math.pi,
        "ring": math.pi * (1 - 0.55**2),
        "square": 1.5**2,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 10 * 0.5 * 0.42 * math.sin(math.pi / 5),
        "heart": 180 * math.pi / 17**2,
        "cross": 1.9 * 0.6 * 2 - 0.6**2,
        "diamond": 2 * 0.62,
    }
    background = scenes.Background("plain", "white", 0)
    for shape, area in areas.items():
        item = scenes.SceneObject(shape, "black", "large", 0.5, 0.5, 0.2, 0.0, (0, 0, 0))
        ink = 248 - np.asarray(scenes.draw(scenes.Scene((item,), background), 200), dtype=float)[..., 0]
        assert ink.sum() / 248 / 40**2 == pytest.approx(area, rel=0.04), shape


def test_questions_to_the_truth():
    red = scenes.SceneObject("circle", "red", "small", 0.2, 0.5, 0.08, 0, (214, 39, 40))
    twin = scenes.SceneObject("circle", "red", "large", 0.5, 0.52, 0.16, 0, (214, 39, 40))
    blue = scenes.SceneObject("square", "blue", "small", 0.8, 0.2, 0.08, 0, (35, 80, 215))
    scene = scenes.Scene((red, twin, blue), scenes.Background("plain", "grey", 0))
    assert (scene.count(), scene.count(colour="red"), scene.count("small"), scene.count(shape="star")) == (3, 2, 2, 0)
    assert scene.find("small", "red", "circle") == [red]
    assert scene.related([red], "left of", [blue]) and not scene.related([blue], "left of", [red])
    assert scene.related([blue], "above", [red]) and scene.related([red], "next to", [twin])
    assert not scene.related([red], "next to", [blue]) and not scene.related([red], "above", [twin])
    assert not scene.related([red], "next to", [red])
    assert (
        scenes.place(blue) == ("top", "right") and scenes.place(twin) == ("middle",) and scenes.place(red) == ("left",)
    )
    assert not scene.held_out
    assert is_at(blue, ["top", "right"]) and is_at(twin, ["middle"]) and not is_at(red, ["top"]) and not is_at(red, ["middle"])
    assert is_between(twin, red, scenes.SceneObject("star", "blue", "small", 0.8, 0.5, 0.08, 0, (35, 80, 215)))
    assert not is_between(red, twin, blue) and not is_between(twin, red, blue) and is_between(twin, red, blue, 0.1, 0.2)
    assert not is_between(red, red, blue)


def test_rows(val_scenes):
    assert [row.id for row in val_scenes[:2]] == ["scene-val-00000", "scene-val-00001"]
    assert val_scenes[0].image.name == "scene-val-00000"
    assert pickle.loads(pickle.dumps(val_scenes[0])) == val_scenes[0]
    with pytest.raises(DataError, match="no split 'dev' of scenes: choose from train, val, test"):
        scenes.split("dev")
