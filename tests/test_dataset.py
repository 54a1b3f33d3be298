"""From rows to batches: order, the pick of captions, labels, workers, bad images."""

import json
import multiprocessing
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from data import readers, scenes
from data.collate import Collate, pad_labels, pick_caption
from data.bad_images import BadImageLedger, BadRow
from data.dataset import CaptionDataset, epoch_order, make_loader
from data.images import BadImage
from data.rows import DataError
from data.transforms import ImageTransform

TRANSFORM = ImageTransform(16)


def encode(texts: list[str]) -> list[list[int]]:
    """A stand-in for the tokenizer: one id per word, then eos = 1."""
    return [[2 + sum(map(ord, word)) % 500 for word in text.split()] + [1] for text in texts]


@pytest.fixture(scope="module")
def rows():
    return scenes.split("train", 24, size=16)


@pytest.fixture
def folder(tmp_path):
    """Six images of which b (missing), d (text) and e (truncated) are bad."""
    (tmp_path / "train").mkdir()
    lines = []
    for k, name in enumerate("abcdef"):
        Image.effect_noise((20, 20), 50).convert("RGB").save(tmp_path / "train" / f"{name}.png")
        lines.append(
            json.dumps({"file_name": f"{name}.png", "captions": [f"{name} first", f"{name} second one"][: 1 + k % 2]})
        )
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "train" / "b.png").unlink()
    (tmp_path / "train" / "d.png").write_text("no picture")
    content = (tmp_path / "train" / "e.png").read_bytes()
    (tmp_path / "train" / "e.png").write_bytes(content[: len(content) // 2])
    return tmp_path


def run(rows, batch_size=5, order=None, **options):
    dataset = CaptionDataset(rows, TRANSFORM)
    return list(make_loader(dataset, encode, batch_size, list(range(len(rows))) if order is None else order, **options))


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key], key


def test_epoch_order_is_a_permutation_of_seed_and_epoch_alone():
    orders = {(seed, epoch): epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)}
    for order in orders.values():
        assert sorted(order) == list(range(1000))
    assert len({tuple(order) for order in orders.values()}) == 9
    assert epoch_order(1000, 1, 2) == orders[1, 2]
    places = np.array([epoch_order(10, 0, epoch).index(0) for epoch in range(2000)])
    counts = np.bincount(places, minlength=10)
    assert counts.min() > 140 and counts.max() < 260  # 200 each, five standard deviations
    assert epoch_order(0, 0, 0) == []
    with pytest.raises(ValueError, match="must not be negative"):
        epoch_order(3, -1, 0)


def test_streams_of_epoch_order_are_different_permutations():
    first, second = epoch_order(1000, 1, 2), epoch_order(1000, 1, 2, stream=1)
    assert first != second and sorted(second) == list(range(1000))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.16  # five standard deviations


def philox_words(key: list[int], number: int) -> list[int]:
    """Philox4x64-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; NumPy counts from 1."""
    mask, words = 2**64 - 1, []
    for block in range(1, number // 4 + 2):
        c, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [second >> 64 ^ c[1] ^ k[0], second & mask, first >> 64 ^ c[3] ^ k[1], first & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:number]


def test_epoch_order_sorts_the_words_of_philox():
    for n, seed, epoch in ((6, 7, 3), (1001, 0, 0), (50, 2**63, 12)):
        words = philox_words([seed, epoch], n)
        assert epoch_order(n, seed, epoch) == sorted(range(n), key=words.__getitem__)


def test_pick_caption_uses_every_caption_once_a_cycle_and_evenly():
    captions = ("a", "b", "c", "d", "e")
    for row_id in ("x", "y"):
        for cycle in range(4):
            picks = [pick_caption(row_id, captions, 0, 5 * cycle + k) for k in range(5)]
            assert sorted(picks) == list(captions)
    first = Counter(pick_caption(f"image {k}", captions, 0, 0) for k in range(2000))
    assert all(300 < count < 500 for count in first.values())
    assert [pick_caption(f"{k}", captions, 0, 0) for k in range(20)] != [
        pick_caption(f"{k}", captions, 1, 0) for k in range(20)
    ]
    assert pick_caption("x", ("only",), 3, 9) == "only"


def test_the_picked_caption_depends_on_neither_order_nor_batch_nor_workers(rows):
    def picks(**options):
        return {
            row_id: texts
            for batch in run(rows, seed=3, epoch=2, **options)
            for row_id, texts in zip(batch["ids"], batch["captions"], strict=True)
        }

    expected = {row.id: [pick_caption(row.id, row.captions, 3, 2)] for row in rows}
    assert picks() == expected
    assert picks(batch_size=7, order=epoch_order(len(rows), 0, 0)) == expected
    assert picks(workers=2) == expected
    assert picks(start_batch=0, captions_per_image="1") == expected


def test_workers_give_identical_batches(rows):
    options = {"order": epoch_order(len(rows), 1, 0), "captions_per_image": "all", "seed": 1}
    assert_same_batches(run(rows, workers=0, **options), run(rows, workers=2, **options))


def test_batch_contents(rows):
    batches = run(rows, batch_size=10, captions_per_image="all")
    assert [len(batch["ids"]) for batch in batches] == [10, 10, 4]
    assert [batch["batch_index"] for batch in batches] == [0, 1, 2]
    first = batches[0]
    assert first["pixel_values"].shape == (10, 3, 16, 16) and first["pixel_values"].dtype == torch.float32
    assert torch.equal(first["pixel_values"][4], TRANSFORM(rows[4].image.open()))
    assert first["captions"] == [list(row.captions) for row in rows[:10]]
    assert first["labels"].shape[:2] == (10, 5) and first["labels"].dtype == torch.int64
    for b, row in enumerate(rows[:10]):
        for c, ids in enumerate(encode(list(row.captions))):
            assert first["labels"][b, c, : len(ids)].tolist() == ids
            assert (first["labels"][b, c, len(ids) :] == -100).all()
    one = run(rows, batch_size=10)[0]
    assert one["labels"].shape[1] == 1
    assert first["bad"] == []


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generators(rows, workers):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(rows, workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_resume_from_any_batch(rows):
    order = epoch_order(len(rows), 0, 4)
    whole = run(rows, order=order, epoch=4)
    for start in (1, 3, 4):
        assert_same_batches(whole[start:], run(rows, order=order, epoch=4, start_batch=start))
    assert len(make_loader(CaptionDataset(rows, TRANSFORM), encode, 5, order, start_batch=2)) == 3
    assert run(rows, order=order, start_batch=5) == []


@pytest.mark.parametrize("start", [0, 1, 3])
def test_shares_are_the_batches_dealt_out(rows, start):
    order = epoch_order(len(rows), 0, 4)
    whole = run(rows, order=order, epoch=4, start_batch=start)
    for count in (2, 3, 9):
        shares = [run(rows, order=order, epoch=4, start_batch=start, share=(rank, count)) for rank in range(count)]
        for rank, share in enumerate(shares):
            assert all(batch["batch_index"] % count == rank for batch in share)
        dealt = sorted((batch for share in shares for batch in share), key=lambda batch: batch["batch_index"])
        assert_same_batches(whole, dealt)
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="needs 0 <= rank < count"):
            run(rows, share=share)


def test_labels_of_different_lengths_and_missing_captions():
    labels = pad_labels([[[5, 6, 1]], [[7, 1], [8, 9, 10, 11, 1]]], max_caption_tokens=4)
    assert labels.tolist() == [
        [[5, 6, 1, -100], [-100] * 4],
        [[7, 1, -100, -100], [8, 9, 10, 1]],
    ]
    assert pad_labels([[[5, 6, 1]]], max_caption_tokens=1).tolist() == [[[1]]]


def test_labels_are_as_wide_as_the_next_of_the_widths(rows):
    batches = run(rows, captions_per_image="all", max_caption_tokens=20)
    padded = run(rows, captions_per_image="all", max_caption_tokens=20, widths=(4, 12, 17, 20))
    for narrow, wide in zip(batches, padded, strict=True):
        longest = narrow["labels"].shape[-1]
        assert wide["labels"].shape[-1] == min(width for width in (4, 12, 17, 20) if width >= longest)
        assert torch.equal(wide["labels"][..., :longest], narrow["labels"]) and (wide["labels"][..., longest:] == -100).all()
    with pytest.raises(ValueError, match="no width for 5 tokens among 2, 4"):
        pad_labels([[[2, 3, 4, 5, 1]]], 8, (2, 4))


def test_long_captions_are_cut_before_eos(rows):
    batch = run(rows, max_caption_tokens=4, captions_per_image="all")[0]
    assert batch["labels"].shape[-1] == 4
    assert set(batch["labels"][:, :, -1].flatten().tolist()) <= {1, -100}


def test_without_a_tokenizer_there_are_no_labels(rows):
    batch = next(iter(make_loader(CaptionDataset(rows, TRANSFORM), None, 4, [0, 1, 2, 3], captions_per_image="all")))
    assert "labels" not in batch and batch["captions"][0] == list(rows[0].captions)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_once_counted_and_left_out(folder, workers):
    lines = []
    ledger = BadImageLedger(warn=lines.append)
    rows = readers.read(folder, "train")
    for epoch in range(2):
        batches = run(rows, batch_size=2, workers=workers, epoch=epoch, ledger=ledger)
        # Batches (a, b), (c, d), (e, f): each loses one image and is not filled up.
        assert [batch["ids"] for batch in batches] == [["a.png"], ["c.png"], ["f.png"]]
        assert all(len(batch["pixel_values"]) == len(batch["labels"]) == 1 for batch in batches)
        assert [bad.id for batch in batches for bad in batch["bad"]] == ["b.png", "d.png", "e.png"]
    assert len(ledger) == len(lines) == 3
    assert ledger.summary() == "3 bad images left out (1 format, 1 missing, 1 truncated)"
    assert "missing" in lines[0] and str(folder / "train" / "b.png") in lines[0]
    assert [(row["id"], row["reason"]) for row in ledger.to_list()] == [
        ("b.png", "missing"),
        ("d.png", "format"),
        ("e.png", "truncated"),
    ]
    json.dumps(ledger.to_list())


def test_a_batch_without_a_good_image_is_skipped_but_counted(folder):
    ledger = BadImageLedger(warn=lambda line: None)
    batches = run(readers.read(folder, "train"), batch_size=2, order=[1, 3, 0, 4, 2, 5], ledger=ledger)
    assert [(batch["batch_index"], batch["ids"]) for batch in batches] == [(1, ["a.png"]), (2, ["c.png", "f.png"])]
    assert len(ledger) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_on_bad_fail_stops_at_the_first(folder, workers):
    with pytest.raises(DataError, match=r"bad image \(missing\) .*b\.png: no such file"):
        run(readers.read(folder, "train"), batch_size=2, workers=workers, ledger=BadImageLedger("fail"))


def test_the_ledger_writes_to_standard_error(capsys):
    BadImageLedger().record(BadRow("a", "a.jpg", "missing", None, "a.jpg: no such file"))
    captured = capsys.readouterr()
    assert captured.err == "bad image left out (missing): a.jpg: no such file\n" and captured.out == ""
    assert BadImageLedger().summary() == "0 bad images left out"


def test_the_pixel_cap_reaches_the_decoder(folder):
    dataset = CaptionDataset(readers.read(folder, "train"), TRANSFORM, max_image_pixels=100)
    assert dataset[0].reason == "too-large"


class Store:
    """A feature store that knows some images, and knows that one was bad."""

    def __init__(self, known):
        self.known = known

    def get(self, row):
        if row.id == "d.png":
            raise BadImage(row.image.name, "truncated", "was cut short")
        return self.known.get(row.id)

    def gather(self, found):
        return -found


def test_features_take_the_place_of_pixels(folder):
    store = Store({f"{name}.png": torch.full((4, 3), float(k)) for k, name in enumerate("abc")})
    ledger = BadImageLedger(warn=lambda line: None)
    dataset = CaptionDataset(readers.read(folder, "train"), features=store)
    # b.png has no file: that it appears shows that nothing was decoded.
    (batch,) = make_loader(dataset, encode, 8, range(6), ledger=ledger)
    assert batch["ids"] == ["a.png", "b.png", "c.png"]
    assert batch["features"].shape == (3, 4, 3) and batch["features"][:, 0, 0].tolist() == [0, -1, -2], "as gathered"
    assert "pixel_values" not in batch
    assert {bad["id"]: bad["reason"] for bad in ledger.to_list()} == {
        "d.png": "truncated",
        "e.png": "no-features",
        "f.png": "no-features",
    }


def test_wrong_settings_are_named(rows):
    dataset = CaptionDataset(rows, TRANSFORM)
    with pytest.raises(ValueError, match="unknown captions_per_image '5': choose from 1, all"):
        make_loader(dataset, encode, 2, [0], captions_per_image="5")
    with pytest.raises(ValueError, match="batch_size 0"):
        make_loader(dataset, encode, 0, [0])
    with pytest.raises(ValueError, match="unknown on_bad 'ignore': choose from skip, fail"):
        BadImageLedger("ignore")
    with pytest.raises(ValueError, match="transform or a feature store"):
        CaptionDataset(rows)
    with pytest.raises(ValueError, match="max_caption_tokens 0"):
        Collate(encode, max_caption_tokens=0)


class ThreadProbe(CaptionDataset):
    def __getitem__(self, index):
        return {"id": str(torch.get_num_threads()), "captions": (), "pixel_values": torch.zeros(3, 1, 1)}


def test_a_worker_uses_one_thread(rows):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (batch,) = make_loader(ThreadProbe(rows, TRANSFORM), None, 2, [0, 1], workers=1)
    finally:
        torch.set_num_threads(threads)
    assert batch["ids"] == ["1", "1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_live_through_a_signal_to_their_group(rows, number):
    """The main process catches it; its workers, which get it too, go on to the last batch and then end."""
    caught = []
    previous = signal.signal(number, lambda *_: caught.append(number))
    try:
        batches = iter(make_loader(CaptionDataset(rows, TRANSFORM), encode, 2, range(len(rows)), workers=2))
        ids = [row_id for _ in range(2) for row_id in next(batches)["ids"]]  # one of each worker: both have begun
        workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid, number)
        os.kill(os.getpid(), number)
        ids += [row_id for batch in batches for row_id in batch["ids"]]
    finally:
        signal.signal(number, previous)
    assert ids == [row.id for row in rows] and caught == [number] and len(workers) == 2
    assert not any(worker.is_alive() for worker in workers)
