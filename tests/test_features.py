"""The feature cache: equal to live encoding, keyed by content and encoder, safe against interrupts and damage."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from captioner.backbones import Backbone, build_vision
from captioner.errors import UserError
from captioner.features import DeviceFeatures, FeatureStore
from captioner.runtime import frozen_tokens
from data.bad_images import BadImageLedger
from data.dataset import CaptionDataset, make_loader
from data.rows import FileImage, Row
from data.views import parse_views

CPU = torch.device("cpu")


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_vision("ViT-Tiny-Scenes", 16)


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    for k in range(5):
        pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{k}.png")
    return [Row(f"{k}.png", FileImage(tmp_path / f"{k}.png"), ("a picture",)) for k in range(5)]


def live(backbone: Backbone, row: Row) -> torch.Tensor:
    with torch.no_grad():
        pixels = backbone.transform(row.image.open())
        return backbone.module(pixels.reshape(-1, 3, *pixels.shape[-2:]))[0]


def prepared(directory: Path, backbone: Backbone, rows, ledger=BadImageLedger(), **options) -> FeatureStore:
    store = FeatureStore(directory, backbone, **options)
    store.prepare(rows, ledger, CPU, batch_size=2, images_per_shard=2)
    return store


def test_stored_tokens_are_the_encoders(backbone, rows, tmp_path):
    store = prepared(tmp_path / "cache", backbone, rows)
    for row in rows:
        assert torch.equal(store.get(row), live(backbone, row))
    half = prepared(tmp_path / "cache", backbone, rows, precision="bf16")
    assert half.get(rows[0]).dtype == torch.bfloat16
    exact = store.get(rows[0])
    assert 0 < (half.get(rows[0]).float() - exact).norm() / exact.norm() < 0.01


def test_a_second_pass_encodes_nothing_even_under_new_names(backbone, rows, tmp_path, monkeypatch):
    first = prepared(tmp_path / "cache", backbone, rows)
    renamed = [Row(f"renamed-{row.id}", row.image, row.captions) for row in rows]
    monkeypatch.setattr(backbone.module, "forward", lambda pixels: pytest.fail("encoded again"))
    again = prepared(tmp_path / "cache", backbone, renamed)
    assert torch.equal(again.get(renamed[3]), first.get(rows[3]))


def test_the_same_id_in_two_splits_is_two_images(backbone, rows, tmp_path):
    twin = Row(rows[0].id, rows[1].image, rows[1].captions)
    store = prepared(tmp_path / "cache", backbone, [rows[0], twin])
    assert torch.equal(store.get(rows[0]), live(backbone, rows[0]))
    assert torch.equal(store.get(twin), live(backbone, rows[1]))


def test_a_changed_image_is_encoded_again(backbone, rows, tmp_path):
    before = prepared(tmp_path / "cache", backbone, rows).get(rows[1])
    Image.new("RGB", (9, 9), "red").save(tmp_path / "1.png")
    after = prepared(tmp_path / "cache", backbone, rows).get(rows[1])
    assert not torch.equal(before, after)
    assert torch.equal(after, live(backbone, rows[1]))


def test_another_encoder_or_transform_never_reads_these(backbone, rows, tmp_path):
    prepared(tmp_path / "cache", backbone, rows)
    torch.manual_seed(1)
    other = build_vision("ViT-Tiny-Scenes", 16)
    store = prepared(tmp_path / "cache", other, rows)
    assert torch.equal(store.get(rows[0]), live(other, rows[0]))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def batches_seen(seen: list):
    """`progress` that notes the ids of the batches that are encoded."""
    return lambda items, what: (seen.append(item["ids"]) or item for item in items) if what.startswith("encoding") else items


def test_an_interrupt_keeps_the_finished_shards(backbone, rows, tmp_path):
    def stop_after_two(batches, _):
        for count, batch in enumerate(batches):
            if count == 2:
                raise KeyboardInterrupt
            yield batch

    store = FeatureStore(tmp_path / "cache", backbone)
    with pytest.raises(KeyboardInterrupt):
        store.prepare(rows, BadImageLedger(), CPU, batch_size=2, images_per_shard=2, progress=stop_after_two)
    seen = []
    resumed = FeatureStore(tmp_path / "cache", backbone)
    resumed.prepare(rows, BadImageLedger(), CPU, batch_size=2, images_per_shard=2, progress=batches_seen(seen))
    assert [len(ids) for ids in seen] == [1]
    assert all(torch.equal(resumed.get(row), live(backbone, row)) for row in rows)


def test_bad_images_go_to_the_ledger_and_have_no_features(backbone, rows, tmp_path):
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "3.png").unlink()
    ledger = BadImageLedger(warn=lambda line: None)
    store = prepared(tmp_path / "cache", backbone, rows, ledger)
    assert {Path(bad.path).name for bad in ledger.rows.values()} == {"2.png", "3.png"}
    assert store.get(rows[2]) is None and store.get(rows[3]) is None and store.get(rows[4]) is not None


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)


DAMAGES = {
    "a bit": flip_a_bit,
    "cut": lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
    "no header": lambda shard: shard.write_bytes(b"\x00" * 16),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_encoded_again_and_no_other(backbone, rows, tmp_path, capsys, damage):
    store = prepared(tmp_path / "cache", backbone, rows)
    before = {file.read_bytes() for file in store.directory.glob("*.safetensors")}
    victim = store.directory / store.index[store.content[rows[2].image.name]][0]
    DAMAGES[damage](victim)
    seen = []
    again = FeatureStore(tmp_path / "cache", backbone)
    again.prepare(rows, BadImageLedger(), CPU, batch_size=2, images_per_shard=2, progress=lambda items, what: (seen.append(what), items)[1])
    assert f"{victim}: " in capsys.readouterr().err
    assert [what for what in seen if what.startswith("encoding")] == ["encoding 2 images once"]
    assert all(torch.equal(again.get(row), live(backbone, row)) for row in rows)
    assert {file.read_bytes() for file in store.directory.glob("*.safetensors")} == before
    assert FeatureStore(tmp_path / "cache", backbone).index == again.index


def test_a_shard_that_breaks_while_it_is_used_is_named(backbone, rows, tmp_path):
    store = prepared(tmp_path / "cache", backbone, rows)
    for shard in store.directory.glob("*.safetensors"):
        shard.write_bytes(b"\x00" * 16)
    with pytest.raises(UserError, match=r"safetensors: cannot read features .* the next start encodes them again"):
        store.get(rows[0])


@pytest.mark.parametrize(
    "index",
    [
        [], {}, {"images": 3}, {"images": {"a": 3}}, {"images": {"a": ["0.safetensors"]}}, {"images": {"a": ["0.safetensors", 0, 0]}}, {"images": {"a": [7, 0]}},
        {"images": {"a": ["0.safetensors", -1]}}, {"images": {"a": ["0.safetensors", True]}}, {"images": {"a": ["0.safetensors", 0.0]}},
        {"images": {"a": ["0.safetensors", 10**30]}}, {"images": {"a": ["../0.safetensors", 0]}}, {"images": {"a": ["/0.safetensors", 0]}},
        {"images": {"a": ["..", 0]}}, {"images": {"a": ["", 0]}}, {"images": {"a": ["\0.safetensors", 0]}}, {"images": {"a": ["index.json", 0]}},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_a_damaged_index_is_made_again(backbone, rows, tmp_path, capsys, index):
    empty = FeatureStore(tmp_path / "cache", backbone)
    empty.directory.mkdir(parents=True)
    empty.index_path.write_text(json.dumps(index | {"shards": {"0.safetensors": "0" * 64}} if isinstance(index, dict) and "images" in index else index))
    store = prepared(tmp_path / "cache", backbone, rows)
    assert f"{empty.index_path} is damaged or of an older version" in capsys.readouterr().err
    assert all(torch.equal(store.get(row), live(backbone, row)) for row in rows)


@pytest.mark.parametrize("shards", [None, [], {}, {"x.safetensors": "0" * 64}, {"NAME": 7}, {"NAME": "short"}], ids=json.dumps)
def test_an_index_without_the_hashes_of_its_shards_is_made_again(backbone, rows, tmp_path, capsys, shards):
    store = prepared(tmp_path / "cache", backbone, rows[:2])
    index, name = json.loads(store.index_path.read_text()), next(iter(store.hashes))
    store.index_path.write_text(json.dumps(index | {"shards": {key.replace("NAME", name): value for key, value in shards.items()} if isinstance(shards, dict) else shards}))
    again = prepared(tmp_path / "cache", backbone, rows[:2])
    assert "damaged or of an older version" in capsys.readouterr().err
    assert torch.equal(again.get(rows[0]), live(backbone, rows[0]))


def test_an_index_of_places_that_no_shard_has_is_made_again(backbone, rows, tmp_path, capsys):
    store = prepared(tmp_path / "cache", backbone, rows)
    index = json.loads(store.index_path.read_text())
    store.index_path.write_text(json.dumps(index | {"images": {content: [name, 999] for content, (name, _) in index["images"].items()}}))
    again = prepared(tmp_path / "cache", backbone, rows)
    assert "the index names images that it does not hold" in capsys.readouterr().err
    assert all(torch.equal(again.get(row), live(backbone, row)) for row in rows)
    store.index = {content: [name, 999] for content, (name, _) in store.index.items()}
    with pytest.raises(UserError, match="cannot read features"):
        DeviceFeatures(store, rows, CPU)


def test_the_index_says_what_made_it(backbone, rows, tmp_path):
    store = prepared(tmp_path / "cache", backbone, rows)
    index = json.loads(store.index_path.read_text())
    assert index["backbone"] == "ViT-Tiny-Scenes" and index["transform"]["image_size"] == 16 and len(index["images"]) == 5


class Together(torch.nn.Module):
    """An encoder whose tokens tell what they were encoded with: the image's mean, and the mean over the batch."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        own = pixels.mean((1, 2, 3))
        return torch.stack([own, own.mean().expand_as(own)], 1)[:, None]


def die_after(count: int):
    """`progress` that ends the process's work in the middle, after `count` batches."""

    def progress(batches, _):
        for number, batch in enumerate(batches):
            if number == count:
                raise KeyboardInterrupt
            yield batch

    return progress


@pytest.mark.parametrize("known", [(), (0,), (2, 3), (0, 5)], ids=str)
def test_images_are_encoded_with_the_same_others_after_any_interrupt(backbone, rows, tmp_path, known):
    """The last bits of a product depend on what else is in it. known: rows in the cache before, as of a run on fewer images; one row is bad."""
    backbone = Backbone(Together(), *list(vars(backbone).values())[1:])
    (tmp_path / "1.png").write_bytes(b"broken")
    for k in range(5, 10):
        Image.new("RGB", (9, 9), (20 * k, 7, 3)).save(tmp_path / f"{k}.png")
    rows = [*rows, *(Row(f"{k}.png", FileImage(tmp_path / f"{k}.png"), ("a picture",)) for k in range(5, 10))]
    quiet, options = BadImageLedger(warn=lambda line: None), {"batch_size": 3, "images_per_shard": 3}
    stores = []
    for name, deaths in (("whole", []), ("killed", [0, 1, 1, 2])):
        FeatureStore(tmp_path / name, backbone).prepare([rows[k] for k in known], quiet, CPU, **options)
        for count in deaths:
            try:
                FeatureStore(tmp_path / name, backbone).prepare(rows, quiet, CPU, **options, progress=die_after(count))
            except KeyboardInterrupt:
                continue
        stores.append(FeatureStore(tmp_path / name, backbone))
        stores[-1].prepare(rows, quiet, CPU, **options)
    whole, killed = stores
    assert whole.get(rows[1]) is None and killed.get(rows[1]) is None
    assert all(torch.equal(whole.get(row), killed.get(row)) for row in rows if row is not rows[1])
    assert {file.name: file.read_bytes() for file in whole.directory.iterdir()} == {file.name: file.read_bytes() for file in killed.directory.iterdir()}


def test_what_killed_writers_left_is_deleted_and_never_read(backbone, rows, tmp_path):
    store = prepared(tmp_path / "cache", backbone, rows[:2])
    half, unnamed = store.directory / ".00001-abc.safetensors.4711", store.directory / "00001-abc.safetensors"
    for path in (half, unnamed, store.directory / ".index.json.4711"):
        path.write_bytes(b"half")
    again = prepared(tmp_path / "cache", backbone, rows)
    assert {path.name for path in again.directory.iterdir()} == {"index.json", ".lock", *(name for name, _ in again.index.values())}
    assert all(torch.equal(again.get(row), live(backbone, row)) for row in rows)


def test_two_trainings_fill_one_folder_in_turn(backbone, rows, tmp_path, capsys):
    """The second says that it waits, and encodes only what the first has not."""
    store = FeatureStore(tmp_path / "cache", backbone)
    store.directory.mkdir(parents=True)
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, store.directory / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        said = []

        def progress(items, description):
            said.append(description)
            for item in items:
                yield item
                if "waiting" in description and not other.stdin.closed:
                    prepared(tmp_path / "elsewhere", backbone, rows[:4])
                    for file in (tmp_path / "elsewhere" / store.directory.name).iterdir():
                        if file.name != ".lock":
                            file.rename(store.directory / file.name)
                    other.stdin.close()

        store.prepare(rows, BadImageLedger(), CPU, batch_size=2, images_per_shard=2, progress=progress)
    assert said == ["waiting", "checking features", "encoding 1 images once"]
    assert capsys.readouterr().err.splitlines() == [f"waiting for the process that adds to {store.directory}"]
    assert all(torch.equal(store.get(row), live(backbone, row)) for row in rows)


def test_tokens_do_not_depend_on_the_batch_in_fp32():
    """To the bit, on several threads, of a ViT and of a convolutional encoder whose products do depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name, size in (("ViT-B-32", 64), ("timm/convnext_atto", 64)):
            vision, pixels = build_vision(name, size).module, torch.randn(9, 3, size, size)
            together = frozen_tokens(vision, pixels)
            assert torch.equal(together, torch.cat([frozen_tokens(vision, part) for part in pixels.split(4)]))
            assert torch.equal(together[3:4], vision(pixels[3:4]))
            views = pixels.unflatten(0, (3, 3))
            assert torch.equal(frozen_tokens(vision, views), together.unflatten(0, (3, 3)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tokens_do_not_depend_on_the_batch_in_fp32_on_a_gpu():
    vision, pixels = build_vision("ViT-B-32", 64).module.cuda(), torch.randn(70, 3, 64, 64, device="cuda")
    assert torch.equal(frozen_tokens(vision, pixels), torch.cat([frozen_tokens(vision, part) for part in pixels.split(7)]))


def test_features_of_views_are_those_of_live_encoding(backbone, rows, tmp_path):
    several = dataclasses.replace(backbone, transform=dataclasses.replace(backbone.transform, views=parse_views("6")))
    store = prepared(tmp_path / "cache", several, rows)
    expected = torch.stack([live(dataclasses.replace(backbone, transform=one), rows[1]) for one in single_views(several.transform)])
    assert torch.equal(store.get(rows[1]), expected)  # (C, N, D)
    assert torch.equal(store.get(rows[1])[0], prepared(tmp_path / "cache", backbone, rows).get(rows[1]))
    batch = next(iter(make_loader(CaptionDataset(rows, features=store), None, 3, range(5))))
    assert torch.equal(batch["features"][1], expected)
    device = DeviceFeatures(store, rows, CPU)
    assert torch.equal(device.gather(device.get(rows[1])[None])[0], expected)


def single_views(transform):
    return [dataclasses.replace(transform, views=(view,)) for view in transform.views]
