"""Length buckets: what an order of batches keeps of an epoch, what it saves in padding, and the training command with it."""

import json
import math
from collections import Counter

import pytest
import torch
from PIL import Image

import train
from captioner.tokenizer import Tokenizer
from data import buckets, readers
from data.buckets import CaptionLengths, bucket_edges, bucketed_order, padding_ratio
from data.collate import next_width, pick_caption
from data.bad_images import BadImageLedger
from data.dataset import CaptionDataset, epoch_order, make_loader
from data.rows import FileImage, Row
from data.transforms import ImageTransform

EDGES = (8, 12, 16, 20, 28, 40)


def encode(texts: list[str]) -> list[list[int]]:
    """A stand-in for the tokenizer: one id per word, then eos = 1."""
    return [[2 + sum(map(ord, word)) % 500 for word in text.split()] + [1] for text in texts]


def caption_of(words: int) -> str:
    return " ".join(["word"] * words)


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    """Fifty images with three captions of 1 to 40 tokens each, of which two can not be read."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    words = torch.randint(0, 40, (50, 3), generator=torch.Generator().manual_seed(0)).tolist()
    names = ["missing.png" if k in (7, 31) else "red.png" for k in range(50)]
    return [Row(f"row {k}", FileImage(tmp_path / names[k]), tuple(caption_of(n) for n in words[k])) for k in range(50)]


def lengths_like_captions(n: int, seed: int = 0) -> list[int]:
    draws = 16 + 5 * torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return draws.round().clamp(3, 40).int().tolist()


def bucket_of(length: int) -> int:
    return min(edge for edge in EDGES if edge >= length)


def pieces(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_edges_end_where_captions_are_cut():
    assert bucket_edges(40) == (8, 12, 16, 20, 28, 40)
    assert bucket_edges(30) == (8, 12, 16, 20, 28, 30) and bucket_edges(5) == (5,) and bucket_edges(8) == (8,)
    assert bucket_edges(64)[-2:] == (40, 64) and bucket_edges(150)[-4:] == (64, 96, 128, 150)
    for longest in range(1, 300):
        edges = bucket_edges(longest)
        assert list(edges) == sorted(set(edges)) and all(next_width(n, edges) >= n for n in range(longest + 1))
    with pytest.raises(ValueError, match="max_caption_tokens 0"):
        bucket_edges(0)


@pytest.mark.parametrize("n, size", [(1000, 32), (128, 128), (100, 128), (257, 64), (7, 1), (0, 4)])
def test_batches_of_one_bucket_hold_every_image_once(n, size):
    lengths = lengths_like_captions(n)
    order = bucketed_order(epoch_order(n, 3, 5), lengths, EDGES, size, 3, 5)
    assert sorted(order) == list(range(n))
    kinds = [Counter(bucket_of(lengths[row]) for row in batch) for batch in pieces(order, size)]
    assert sum(len(kind) > 1 for kind in kinds) <= len(EDGES) - 1, "leftovers make one mixed batch an edge at most"
    assert all(len(batch) == size for batch in pieces(order, size)[:-1])


def test_leftovers_go_to_the_next_longer_bucket():
    lengths = [5] * 5 + [10] * 6 + [30] * 3
    order = bucketed_order(range(14), lengths, EDGES, 4, 0, 0)
    made = Counter(tuple(sorted(lengths[row] for row in batch)) for batch in pieces(order, 4))
    assert made == {(5, 5, 5, 5): 1, (5, 10, 10, 10): 1, (10, 10, 10, 30): 1, (30, 30): 1}


def test_the_order_depends_on_seed_and_epoch_alone_and_spreads_images_and_batches():
    lengths = [4] * 40 + [30] * 40
    keys = [(seed, epoch) for seed in range(2) for epoch in range(200)]
    orders = {key: bucketed_order(epoch_order(80, *key), lengths, EDGES, 4, *key) for key in keys}
    assert orders[1, 7] == bucketed_order(epoch_order(80, 1, 7), lengths, EDGES, 4, 1, 7)
    assert len({tuple(order) for order in orders.values()}) == 400
    places = Counter(order.index(0) // 4 for order in orders.values())
    assert len(places) == 20 and max(places.values()) < 45, "400 / 20 = 20 each, above five standard deviations"
    long_first = sum(lengths[order[0]] == 30 for order in orders.values())
    assert 150 < long_first < 250, "short batches do not come first"
    partners = Counter(frozenset(orders[0, epoch][:4]) for epoch in range(200))
    assert max(partners.values()) == 1, "images meet others in every epoch"


@pytest.mark.parametrize("images", [1, 5, 8, 31, 32, 33, 100])
@pytest.mark.parametrize("batch, accumulation", [(4, 1), (4, 3), (8, 2)])
def test_an_epoch_has_as_many_steps_as_without_and_a_step_is_of_one_bucket(images, batch, accumulation):
    lengths = lengths_like_captions(images)
    order = bucketed_order(epoch_order(images, 0, 0), lengths, EDGES, batch * accumulation, 0, 0)
    micro_batches = pieces(order, batch)
    steps = pieces(micro_batches, accumulation)
    assert len(steps) == math.ceil(math.ceil(images / batch) / accumulation)
    mixed = sum(len({bucket_of(lengths[row]) for micro in step for row in micro}) > 1 for step in steps)
    assert mixed <= len(EDGES) - 1


def test_lengths_are_those_of_the_captions_in_the_labels(rows, monkeypatch):
    monkeypatch.setattr(buckets, "CHUNK", 7)
    lengths = CaptionLengths(rows, encode, max_caption_tokens=30)
    for epoch in range(4):
        picked = [pick_caption(row.id, row.captions, 2, epoch) for row in rows]
        assert lengths.of_epoch("1", 2, epoch) == [min(len(ids), 30) for ids in encode(picked)]
    longest = lengths.of_epoch("all", 2, 0)
    assert longest == [min(max(map(len, encode(list(row.captions)))), 30) for row in rows]
    assert CaptionLengths([Row("x", rows[0].image)], encode).of_epoch("1", 0, 0) == [0]
    assert CaptionLengths([Row("x", rows[0].image)], encode).of_epoch("all", 0, 0) == [0]


@pytest.mark.parametrize("captions", ["1", "all"])
def test_loading_by_buckets(rows, captions):
    """Every good image once; labels within their bucket; the same with workers and from any batch on."""
    dataset = CaptionDataset(rows, ImageTransform(8))
    order = bucketed_order(epoch_order(50, 1, 2), CaptionLengths(rows, encode, 40).of_epoch(captions, 1, 2), EDGES, 4, 1, 2)

    def load(**options) -> list[dict]:
        options |= dict(captions_per_image=captions, seed=1, epoch=2, max_caption_tokens=40, ledger=BadImageLedger(warn=lambda line: None))
        return list(make_loader(dataset, encode, 4, order, **options))

    whole = load()
    assert sorted(row_id for batch in whole for row_id in batch["ids"]) == sorted(f"row {k}" for k in range(50) if k not in (7, 31))
    narrow = 0
    for batch in whole:
        longest = (batch["labels"] != -100).sum(-1).amax(-1)  # (B,), tokens of an image's longest caption
        narrow += len({bucket_of(int(n)) for n in longest}) == 1
    assert narrow >= len(whole) - len(EDGES) + 1
    for start in (0, 1, 6):
        for resumed, expected in zip(load(start_batch=start, workers=1), whole[start:], strict=True):
            assert resumed["ids"] == expected["ids"] and resumed["batch_index"] == expected["batch_index"]
            assert torch.equal(resumed["labels"], expected["labels"])


def test_padding_ratio_counts_the_labels(rows):
    lengths = CaptionLengths(rows, encode, 40)
    readable = [k for k in range(50) if k not in (7, 31)]
    order = [k for k in epoch_order(50, 0, 0) if k in readable]
    dataset = CaptionDataset(rows, ImageTransform(8))
    for captions, tokens in (("1", [[n] for n in lengths.of_epoch("1", 0, 0)]), ("all", lengths.tokens)):
        for edges in ((), EDGES):
            batches = make_loader(dataset, encode, 5, order, captions_per_image=captions, max_caption_tokens=40, widths=edges)
            labels = [batch["labels"] for batch in batches]
            real = sum(int((label != -100).sum()) for label in labels)
            assert padding_ratio(order, tokens, 5, edges) == sum(label.numel() for label in labels) / real


@pytest.mark.parametrize("batch_size", [32, 128])
def test_padding_of_captions_of_photographs(shared_dir, batch_size):
    """Printed with `pytest -s`: padded / real tokens of an epoch."""
    rows = readers.read(shared_dir / "flickr8k", "train")
    lengths = CaptionLengths(rows, Tokenizer(shared_dir / "t5" / "spiece.model").encode, 40)
    tokens, order, edges = lengths.of_epoch("1", 0, 0), epoch_order(len(rows), 0, 0), bucket_edges(40)
    by_length = bucketed_order(order, tokens, edges, batch_size, 0, 0)
    columns = [[n] for n in tokens]
    random, longest, to_edges = (padding_ratio(*arguments) for arguments in (
        (order, columns, batch_size), (by_length, columns, batch_size), (by_length, columns, batch_size, edges),
    ))  # fmt: skip
    print(f"batches of {batch_size}: random {random:.3f}, bucketed {longest:.3f}, padded to the bucket's edge {to_edges:.3f}")
    assert longest <= to_edges < 1.2 and random > 1.7


def test_training_by_buckets_sees_every_image_once_an_epoch(tiny_flags, tiny_data, monkeypatch):
    metadata = tiny_data / "train" / "metadata.jsonl"
    data_rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for k, row in enumerate(data_rows):
        row["captions"] = [caption_of(3 if k % 2 else 12) + " picture"]
    metadata.write_text("\n".join(map(json.dumps, data_rows)))
    monkeypatch.setattr(train.Trainer, "evaluate_and_save", lambda *_: {})
    ids, widths = {}, {}

    def note(name):
        def step(self, batches, lr):
            self.state.step += 1
            ids[name] = ids.get(name, []) + [[row_id for batch in batches for row_id in batch["ids"]]]
            widths[name] = widths.get(name, []) + [batch["labels"].shape[-1] for batch in batches]
            return 0.0, 0.0

        return step

    for name in ("length-buckets", "no-length-buckets"):
        monkeypatch.setattr(train.Trainer, "train_step", note(name))
        assert train.main([*tiny_flags, f"--{name}", "--max-steps", "20", "--output", str(tiny_data / name)]) == 0
        assert len(ids[name]) == 20
        for epoch in range(10):
            assert sorted(ids[name][2 * epoch] + ids[name][2 * epoch + 1]) == sorted(row["file_name"] for row in data_rows)
    for first, second in pieces(widths["length-buckets"], 2):
        assert first != second, "four short captions in one batch of an epoch and four long ones in the other"
    assert any(first == second for first, second in pieces(widths["no-length-buckets"], 2)), "random batches hold both"
