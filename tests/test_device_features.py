"""Features kept on a device: equal to those on disk, found by workers, gathered by the process that trains."""

import pickle

import pytest
import torch
from PIL import Image

from captioner.backbones import build_vision
from captioner.errors import UserError
from captioner.features import DeviceFeatures, FeatureStore
from data.bad_images import BadImageLedger
from data.dataset import CaptionDataset, make_loader
from data.rows import FileImage, Row

CPU = torch.device("cpu")


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    """Seven images: 4 has the content of 1, 2 and 5 can not be read."""
    generator = torch.Generator().manual_seed(0)
    for k in range(7):
        pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{k}.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "5.png").unlink()
    return [Row(f"{k}.png", FileImage(tmp_path / f"{k}.png"), ("a picture",)) for k in range(7)]


def prepared(tmp_path, rows, precision="fp32") -> FeatureStore:
    torch.manual_seed(0)
    store = FeatureStore(tmp_path / "cache", build_vision("ViT-Tiny-Scenes", 16), precision)
    store.prepare(rows, BadImageLedger(warn=lambda line: None), CPU, batch_size=2, images_per_shard=2)
    return store


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_are_those_of_the_store(tmp_path, rows, precision):
    store = prepared(tmp_path, rows, precision)
    assert len(list(store.directory.glob("*.safetensors"))) > 1
    kept = DeviceFeatures(store, rows, CPU)
    readable = [row for k, row in enumerate(rows) if k not in (2, 5)]
    places = torch.stack([kept.get(row) for row in readable])
    assert torch.equal(kept.gather(places), torch.stack([store.get(row) for row in readable]))
    assert kept.get(rows[2]) is None and kept.get(rows[5]) is None
    assert len(kept.tokens) == 4 and kept.get(rows[4]) == kept.get(rows[1]), "equal content is kept once"
    assert kept.tokens.dtype == store.dtype


def test_some_rows_of_a_store(tmp_path, rows):
    store = prepared(tmp_path, rows)
    kept = DeviceFeatures(store, rows[3:4] + rows[:1], CPU)
    assert len(kept.tokens) == 2 and kept.get(rows[1]) is None
    assert torch.equal(kept.gather(torch.stack([kept.get(rows[0])])), store.get(rows[0])[None])
    empty = DeviceFeatures(store, rows[2:3], CPU)
    assert len(empty.tokens) == 0 and empty.get(rows[2]) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_store(tmp_path, rows, workers):
    store = prepared(tmp_path, rows)
    loaders = [
        make_loader(CaptionDataset(rows, features=features), None, 3, [6, 5, 4, 3, 2, 1, 0], workers, ledger=BadImageLedger(warn=lambda line: None))
        for features in (store, DeviceFeatures(store, rows, CPU))
    ]
    for expected, batch in zip(*loaders, strict=True):
        assert batch["ids"] == expected["ids"] and torch.equal(batch["features"], expected["features"])


def test_workers_get_no_tokens(tmp_path, rows):
    kept = DeviceFeatures(prepared(tmp_path, rows), rows, CPU)
    sent = pickle.loads(pickle.dumps(kept))
    assert sent.get(rows[6]) == kept.get(rows[6]) and not hasattr(sent, "tokens")


def test_a_damaged_shard_is_named(tmp_path, rows):
    store = prepared(tmp_path, rows)
    for shard in store.directory.glob("*.safetensors"):
        shard.write_bytes(b"\x00" * 16)
    with pytest.raises(UserError, match=r"safetensors: cannot read features .* the next start encodes them again"):
        DeviceFeatures(store, rows, CPU)


def test_they_fit_where_they_take_half_of_the_free_memory(tmp_path, rows, monkeypatch):
    store = prepared(tmp_path, rows)
    nbytes = DeviceFeatures(store, rows, CPU).tokens.nbytes
    for free, fits in ((2 * nbytes, True), (2 * nbytes - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * nbytes))
        assert DeviceFeatures.fit(store, rows, torch.device("cuda")) is fits
    assert not DeviceFeatures.fit(store, rows, CPU) and not DeviceFeatures.fit(store, rows[2:3], torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path, rows):
    device = torch.device("cuda")
    store = prepared(tmp_path, rows)
    assert DeviceFeatures.fit(store, rows, device)
    on_device = CaptionDataset(rows, features=DeviceFeatures(store, rows, device))
    batches = list(make_loader(on_device, None, 3, range(7), workers=2, ledger=BadImageLedger(warn=lambda line: None)))
    assert all(batch["features"].device.type == "cuda" for batch in batches)
    expected = torch.stack([store.get(rows[k]) for k in (0, 1, 3, 4, 6)])
    assert torch.equal(torch.cat([batch["features"] for batch in batches]).cpu(), expected)
