"""Rows, and the reader of `metadata.jsonl` folders: what it accepts, and the one line it says for everything else."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from data import readers
from data.images import BadImage
from data.rows import DataError, FileImage, Row


def write(folder: Path, *records, split: str = "train") -> Path:
    """A data folder whose metadata has the given lines (dicts, text or bytes)."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) if isinstance(record, dict) else record for record in records]
    content = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    (folder / split / "metadata.jsonl").write_bytes(content)
    return folder


def expect_error(match: str, data, split: str = "train") -> None:
    with pytest.raises(DataError, match=match) as caught:
        readers.read(data, split)
    assert "\n" not in str(caught.value)


def test_rows_of_a_folder(tmp_path):
    write(
        tmp_path,
        {"file_name": "a.jpg", "caption": "  a dog\n runs  "},
        {"file_name": "deep/er/b.png", "captions": ["one", "two\u2028words"]},
        "",
        {"file_name": "./c.webp", "text": "text"},
        {"file_name": "d.gif", "text": ["x", "y"], "width": 3},
        {"file_name": "é.jpg", "caption": "café"},
    )
    rows = readers.read(str(tmp_path), "train")
    assert [row.id for row in rows] == ["a.jpg", "deep/er/b.png", "c.webp", "d.gif", "é.jpg"]
    assert [row.captions for row in rows] == [("a dog runs",), ("one", "two words"), ("text",), ("x", "y"), ("café",)]
    assert rows[1].image == FileImage(tmp_path / "train" / "deep/er/b.png")
    assert rows[0].image.name == str(tmp_path / "train" / "a.jpg")
    assert rows == readers.read(tmp_path, "train")


def test_captions_come_before_caption_and_text(tmp_path):
    write(
        tmp_path,
        {"file_name": "a", "text": "t", "caption": "c", "captions": ["cs"]},
        {"file_name": "b", "text": "t", "caption": "c"},
    )
    assert [row.captions for row in readers.read(tmp_path, "train")] == [("cs",), ("c",)]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    write(tmp_path, b'\xef\xbb\xbf{"file_name": "a", "caption": "x"}\r', b'{"file_name": "b", "caption": "y"}\r', b"")
    assert [row.id for row in readers.read(tmp_path, "train")] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object is expected, not list"),
        ("[" * 100_000, "not JSON"),
        (b'{"file_name": "b", "caption": "\xff"}', "not UTF-8"),
        ('{"caption": "x"}', "no file_name"),
        ('{"file_name": 3, "caption": "x"}', "no file_name"),
        ('{"file_name": " ", "caption": "x"}', "no file_name"),
        (
            '{"file_name": "b", "label": "x"}',
            "no caption: one of the keys captions, caption, text is expected, found file_name, label",
        ),
        ('{"file_name": "b", "captions": []}', "captions is an empty list"),
        ('{"file_name": "b", "captions": ["x", 3]}', "captions holds 3, which is not a string"),
        ('{"file_name": "b", "caption": null}', "caption must be a string or a list of strings, not NoneType"),
        ('{"file_name": "b", "captions": {"0": "x"}}', "not dict"),
        ('{"file_name": "b", "caption": " \\n "}', "caption holds an empty caption"),
        ('{"file_name": "b", "caption": "\\ud83d"}', "surrogate"),
        ('{"file_name": "b\\udc00", "caption": "x"}', "surrogate"),
        ('{"file_name": "b\\u0000", "caption": "x"}', "zero byte"),
        ('{"file_name": "/etc/b.jpg", "caption": "x"}', "'/etc/b.jpg' is absolute"),
        ('{"file_name": "C:\\\\b.jpg", "caption": "x"}', "is absolute"),
        ('{"file_name": "../val/b.jpg", "caption": "x"}', r"holds '\.\.'"),
        ('{"file_name": "x\\\\..\\\\b.jpg", "caption": "x"}', r"holds '\.\.'"),
        ('{"file_name": "./a.jpg", "caption": "x"}', "file_name 'a.jpg' is already on line 1"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, line, match):
    write(tmp_path, {"file_name": "a.jpg", "caption": "x"}, "", line)
    expect_error(rf"train.metadata\.jsonl, line 3: .*{match}", tmp_path)


def test_links_may_not_leave_the_data_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"x")
    data = write(tmp_path / "data", {"file_name": "a.jpg", "caption": "x"}, {"file_name": "link.jpg", "caption": "y"})
    (data / "train" / "link.jpg").symlink_to(outside / "secret.jpg")
    expect_error("line 2: file_name 'link.jpg' leads through a link to .*secret.jpg, outside of", data)
    write(data, {"file_name": "folder/secret.jpg", "caption": "x"})
    (data / "train" / "folder").symlink_to(outside)
    expect_error("line 1: .*outside of", data)
    (data / "train" / "link.jpg").unlink()
    (data / "images").mkdir()
    (data / "train" / "link.jpg").symlink_to(data / "images" / "a.jpg")
    write(data, {"file_name": "link.jpg", "caption": "a link inside the folder is fine"})
    assert len(readers.read(data, "train")) == 1


def test_a_link_loop_and_a_missing_file_are_bad_images_not_reader_errors(tmp_path):
    write(tmp_path, {"file_name": "gone.jpg", "caption": "x"}, {"file_name": "loop.jpg", "caption": "y"})
    (tmp_path / "train" / "loop.jpg").symlink_to(tmp_path / "train" / "loop.jpg")
    gone, loop = readers.read(tmp_path, "train")
    for row, reason in ((gone, "missing"), (loop, "unreadable")):
        for use in (row.image.open, row.image.fingerprint):
            with pytest.raises(BadImage) as caught:
                use()
            assert caught.value.reason == reason


def test_missing_folders_and_splits(tmp_path):
    expect_error("no data folder .*nowhere, .*built in: scenes", tmp_path / "nowhere")
    write(tmp_path, {"file_name": "a", "caption": "x"})
    write(tmp_path, {"file_name": "a", "caption": "x"}, split="val")
    expect_error("no split 'test' in .*: it has train, val", tmp_path, "test")
    expect_error("split '../data' is not the name of a sub-folder", tmp_path, "../data")
    expect_error("split '..' is not the name", tmp_path, "..")
    (tmp_path / "empty").mkdir()
    expect_error("no split 'train' in .*empty: it has no sub-folders", tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    expect_error(r"file is a file that holds no split 'train' in a format that is known \(jsonl, csv, ", tmp_path / "file")
    expect_error("no split 'dev' in the built-in data set scenes: it has train, val, test", "scenes", "dev")


def test_misnamed_metadata_is_pointed_out(tmp_path):
    (tmp_path / "train").mkdir()
    expect_error(r"no metadata\.jsonl or metadata\.csv or metadata\.parquet, no \.tar and no image with a .* in .*train$", tmp_path)
    (tmp_path / "train" / "metadata.json1").write_text("{}")
    expect_error(r"no metadata\.jsonl or .* in .*train, but metadata\.json1: rename it", tmp_path)
    (tmp_path / "train" / "metadata.json1").rename(tmp_path / "metadata.json1")
    (tmp_path / "train").rmdir()
    expect_error(r"no metadata\.jsonl or .* in .*, but metadata\.json1: rename it", tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_split_is_an_error(tmp_path, content):
    write(tmp_path, content)
    expect_error("the split 'train' is empty", tmp_path)


def test_unreadable_metadata(tmp_path, monkeypatch):
    write(tmp_path, {"file_name": "a", "caption": "x"})

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    expect_error(r"cannot read .*metadata\.jsonl: Permission denied", tmp_path)


def test_file_image_opens_and_fingerprints(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), "red").save(path)
    image = FileImage(path)
    assert image.open().size == (3, 2)
    with pytest.raises(BadImage, match="more than the limit of 5"):
        image.open(max_pixels=5)
    before = image.fingerprint()
    assert before == hashlib.sha256(path.read_bytes()).hexdigest()
    Image.new("RGB", (3, 2), "blue").save(path)
    assert image.fingerprint() != before


def test_scenes_are_read_by_name():
    rows = readers.read("scenes", "val")
    assert len(rows) == 500 and len({row.id for row in rows}) == 500
    assert isinstance(rows[0], Row) and rows[0].image.open().mode == "RGB"


def test_every_row_of_the_shared_photographs(shared_dir):
    rows = readers.read(shared_dir / "flickr8k", "val")
    lines = (shared_dir / "flickr8k" / "val" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row.id for row in rows] == [json.loads(line)["file_name"] for line in lines]
    assert all(len(row.captions) == 5 for row in rows)
    assert min(rows[0].image.open().size) > 100
