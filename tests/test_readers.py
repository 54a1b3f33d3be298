"""The formats of data sets: each made here by another library or by hand, read, and damaged; and mixtures of them."""

import csv
import hashlib
import importlib.util
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import mixing, readers
from data.dataset import CaptionDataset, epoch_order, make_loader
from data.images import BadImage
from data.readers import json_stream, tar_index, webdataset
from data.rows import DataError, FileImage, Row, TarImage
from data.transforms import ImageTransform

HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None


def expect_error(match: str, data, split: str = "train", format: str | None = None) -> None:
    with pytest.raises(DataError, match=match) as caught:
        readers.read(data, split, format)
    assert "\n" not in str(caught.value)


def picture(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (number * 20 % 256, 99, 7)).save(file, kind)
    return file.getvalue()


def put(path: Path, content: bytes | str | list | dict = b"") -> Path:
    """A file with its folders; lists and dicts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(content) if isinstance(content, list | dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def facts(rows: list[Row]) -> list[tuple]:
    return [(row.id, row.captions) for row in rows]


# metadata.csv


def test_csv_as_the_csv_module_writes_it(tmp_path):
    values = [("a.jpg", 'a "dog",\nand a cat'), ("deep/b.png", "plain"), ("é, x.jpg", "größer 😀")]
    with open(put(tmp_path / "train" / "metadata.csv"), "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("file_name", "text"), *values])
    rows = readers.read(tmp_path, "train")
    assert facts(rows) == [(name, (" ".join(text.split()),)) for name, text in values]
    assert rows[1].image == FileImage(tmp_path / "train" / "deep" / "b.png")
    assert rows == readers.read(tmp_path, "train", "csv")


def test_csv_captions_may_be_a_json_list_and_columns_in_any_order(tmp_path):
    put(tmp_path / "train" / "metadata.csv", 'captions,width,file_name\n"[""one"", ""two""]",3,a.jpg\r\n[sic,4,b.jpg\n')
    expect_error(r"metadata\.csv, line 3: captions begins with '\[' but is no JSON list", tmp_path)
    put(tmp_path / "train" / "metadata.csv", 'captions,width,file_name\n"[""one"", ""two""]",3,a.jpg\n\nthree,4,b.jpg\n')
    assert facts(readers.read(tmp_path, "train")) == [("a.jpg", ("one", "two")), ("b.jpg", ("three",))]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "metadata.csv is empty"),
        (b"file_name,text\n", "the split 'train' is empty"),
        (b"file_name,text\na,x\n\nb,y,z\n", r"line 4: 3 values, but the header has 2 columns \(file_name, text\)"),
        (b"file_name,text\na\n", "line 2: 1 values"),
        (b'file_name,text\na,"x\ny"\nb,"never closed\nc,z\n', "line 4: .*unexpected end"),
        (b"file_name,text,text\na,x,y\n", "line 1: the header has the column 'text' twice"),
        (b"file_name,text\na,x\nb,\xff\n", "line 3: not UTF-8"),
        (b"name;text\na;x\n", "line 2: no file_name .*, found name;text"),
        (b"file_name,label\na,x\n", "line 2: no caption: .* found file_name, label"),
        (b"file_name,text\na,x\na,y\n", "line 3: file_name 'a' is already on line 2"),
        (b"file_name,text\n../a,y\n", r"line 2: .* holds '\.\.'"),
        (b"file_name,text\n/etc/a,y\n", "line 2: .* is absolute"),
        (b"file_name,text\na\0,y\n", "line 2: .*(zero byte|NUL)"),
        (b"file_name,text\na," + b"x" * 200_000, "line 2: field larger than field limit"),
    ],
)
def test_a_wrong_csv_is_named_with_its_line(tmp_path, content, match):
    put(tmp_path / "train" / "metadata.csv", content)
    expect_error(match, tmp_path)


def test_two_kinds_of_metadata_must_be_chosen_from(tmp_path):
    put(tmp_path / "train" / "metadata.csv", "file_name,text\na,from csv\n")
    put(tmp_path / "train" / "metadata.jsonl", {"file_name": "a", "text": "from jsonl"})
    expect_error("train has metadata.jsonl and metadata.csv: choose one with --format", tmp_path)
    assert readers.read(tmp_path, "train", "csv")[0].captions == ("from csv",)
    assert readers.read(tmp_path, "train", "jsonl")[0].captions == ("from jsonl",)
    expect_error("unknown format 'xml': choose from jsonl, csv, parquet, webdataset,", tmp_path, format="xml")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_split_column_in_one_metadata_file(tmp_path, kind):
    values = [("a.jpg", "train"), ("b.jpg", "validation"), ("c.jpg", "train")]
    lines = {
        "jsonl": [json.dumps({"file_name": name, "text": name, "split": split}) for name, split in values],
        "csv": ["file_name,text,split", *(f"{name},{name},{split}" for name, split in values)],
    }
    path = put(tmp_path / f"metadata.{kind}", "\n".join(lines[kind]))
    assert [row.id for row in readers.read(tmp_path, "train")] == ["a.jpg", "c.jpg"]
    assert [row.image.path for row in readers.read(path, "val")] == [tmp_path / "b.jpg"]
    expect_error(r"no split 'test' in .*: it has train, validation", tmp_path, "test")
    assert readers.splits(tmp_path) == ("train", "val", "test")
    put(path, lines[kind][0].replace("split", "part") + ("\na,b,c" if kind == "csv" else ""))
    expect_error("no 'split'; without one, the metadata of split 'train' belongs in a sub-folder", tmp_path)


def test_metadata_at_the_root_as_image_folders_of_hugging_face_have_it(tmp_path):
    names = ("train/a.jpg", "./validation/b.jpg", "train/deep/c.jpg")
    path = put(tmp_path / "metadata.csv", "file_name,text\r\n" + "".join(f"{name},{name}\r\n" for name in names))
    (tmp_path / "train").mkdir()
    assert [row.image.path for row in readers.read(tmp_path, "train")] == [tmp_path / "train/a.jpg", tmp_path / "train/deep/c.jpg"]
    assert [row.id for row in readers.read(tmp_path, "val")] == ["validation/b.jpg"]
    expect_error(r"no split 'test' in .*: it has train, validation", tmp_path, "test")
    put(path, "file_name,text\nimages/a.jpg,x\n")
    expect_error("line 2: no 'split'; without one", tmp_path)
    put(path, "file_name,text,split\ntrain/a.jpg,x,val\n")
    assert [row.id for row in readers.read(tmp_path, "val")] == ["train/a.jpg"]


def test_metadata_that_is_named_with_its_split(tmp_path):
    put(tmp_path / "train" / "metadata.jsonl", {"file_name": "a.jpg", "text": "x"})
    assert facts(readers.read(tmp_path / "{split}" / "metadata.jsonl", "train")) == [("a.jpg", ("x",))]
    expect_error("no 'split'; without one", tmp_path / "train" / "metadata.jsonl", "val")


# metadata.parquet


@pytest.mark.skipif(not HAS_PYARROW, reason="pyarrow is an extra")
def test_parquet_as_pyarrow_writes_it(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "metadata.parquet"
    names = [f"{number}.jpg" for number in range(20_000)]
    table = pyarrow.table({"width": [3] * len(names), "caption": [f"picture {name}\n" for name in names], "file_name": names})
    parquet.write_table(table, path, row_group_size=3000)
    assert facts(readers.read(tmp_path, "train")) == [(name, (f"picture {name}",)) for name in names]
    parquet.write_table(pyarrow.table({"file_name": ["a", "b"], "captions": [["x", "y"], ["z"]]}), path)
    assert facts(readers.read(tmp_path, "train")) == [("a", ("x", "y")), ("b", ("z",))]
    parquet.write_table(pyarrow.table({"file_name": ["a", "b"], "text": pyarrow.array(["x", "y"]).dictionary_encode()}), path)
    assert facts(readers.read(tmp_path, "train")) == [("a", ("x",)), ("b", ("y",))]
    for columns, match in (
        ({"file_name": ["a", "b"], "text": ["x", None]}, "row 2: text must be a string or a list of strings, not NoneType"),
        ({"file_name": ["a", "a"], "text": ["x", "y"]}, "row 2: file_name 'a' is already on row 1"),
        ({"file_name": ["../a"], "text": ["x"]}, r"row 1: .* holds '\.\.'"),
        ({"file_name": [b"a"], "text": ["x"]}, "row 1: no file_name"),
        ({"name": ["a"], "text": ["x"]}, "has no column file_name, only name, text"),
        ({"file_name": pyarrow.array([], pyarrow.string())}, "the split 'train' is empty"),
    ):
        parquet.write_table(pyarrow.table(columns), path)
        expect_error(match, tmp_path)
    bad = pyarrow.array([b"x\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"file_name": ["a"], "text": bad}), path)
    expect_error("rows 1 to .*: not UTF-8", tmp_path)
    content = path.read_bytes()
    for broken in (b"", b"PAR1", content[:-9], content[:20] + bytes(40) + content[60:]):
        path.write_bytes(broken)
        expect_error(r"cannot read .*metadata\.parquet as Parquet", tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    put(tmp_path / "train" / "metadata.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    expect_error(r"metadata\.parquet needs pyarrow, which is not installed: pip install pyarrow", tmp_path)


# sidecars


def test_sidecars(tmp_path, capsys):
    for name in ("a.jpg", "b.PNG", "deep/er/c.webp", "d.v2.jpg", "e.jpg", "e.png", "lonely.gif", ".hidden.jpg", "deep/bare.jpg"):
        put(tmp_path / "train" / name, b"x")
    for name, text in (
        ("a.txt", "\ufeffa dog\r\n runs \n"), ("b.caption", "two"), ("deep/er/c.txt", "größer 😀"), ("d.v2.txt", "four"), ("e.jpg.txt", "five"),
        ("e.png.caption", "six"), ("README.txt", "not a caption"), (".hidden.txt", "hidden"),
    ):  # fmt: skip
        put(tmp_path / "train" / name, text)
    rows = readers.read(tmp_path, "train")
    assert facts(rows) == [
        ("a.jpg", ("a dog runs",)), ("b.PNG", ("two",)), ("d.v2.jpg", ("four",)), ("e.jpg", ("five",)), ("e.png", ("six",)),
        ("deep/er/c.webp", ("größer 😀",)),
    ]  # fmt: skip
    assert rows[-1].image == FileImage(tmp_path / "train" / "deep" / "er" / "c.webp")
    assert "2 images of" in (said := capsys.readouterr().err) and "the first is lonely.gif" in said


def test_sidecars_that_fit_two_images_or_images_with_two_are_named(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg", "b.txt", "a.txt"):
        put(tmp_path / "train" / name, "x")
    expect_error(r"a\.txt can belong to a\.jpg and to a\.png: name it after one of them, as a\.png\.txt", tmp_path)
    (tmp_path / "train" / "a.png").unlink()
    put(tmp_path / "train" / "b.caption", "y")
    expect_error(r"b\.jpg has two captions: b\.txt and b\.caption", tmp_path)


def test_hostile_sidecars(tmp_path):
    secret = put(tmp_path / "secret.txt", "the password")
    put(tmp_path / "data" / "train" / "a.jpg", b"x")
    sidecar = tmp_path / "data" / "train" / "a.txt"
    sidecar.symlink_to(secret)
    expect_error(r"file 'a\.txt' leads through a link to .*secret\.txt, outside of", tmp_path / "data")
    for content, match in ((b"\xff", r"a\.txt: not UTF-8"), (b" \n", r"a\.txt: the caption is empty"), (b"x" * 2**21, "too much for a caption")):
        sidecar.unlink()
        sidecar.write_bytes(content)
        expect_error(match, tmp_path / "data")
    sidecar.unlink()
    os.mkfifo(sidecar)
    expect_error(r"a\.txt: the caption is empty", tmp_path / "data")
    (tmp_path / "data" / "train" / "loop").symlink_to(tmp_path / "data" / "train")
    sidecar.unlink()
    put(sidecar, "fine")
    assert facts(readers.read(tmp_path / "data", "train")) == [("a.jpg", ("fine",))]


# COCO and Karpathy


def write_coco(folder: Path) -> dict:
    """captions_train2014.json beside instances of the same images, as cocodataset.org packs them."""
    images = [{"id": number, "file_name": f"COCO_train2014_{number:012d}.jpg", "width": 6} for number in (7, 3, 9)]
    captions = [(3, "three"), (7, "seven\n"), (3, "drei")]
    annotations = [{"id": place, "image_id": image, "caption": text} for place, (image, text) in enumerate(captions)]
    whole = {"info": {"year": 2014}, "licenses": [{"id": 1}], "images": images, "annotations": annotations}
    put(folder / "annotations" / "captions_train2014.json", whole)
    put(folder / "annotations" / "instances_train2014.json", {"images": images, "annotations": [{"image_id": 7, "bbox": [1, 2]}]})
    put(folder / "train2014" / images[0]["file_name"], picture(7))
    return whole


def test_coco_captions(tmp_path, capsys):
    whole = write_coco(tmp_path)
    rows = readers.read(tmp_path, "train")
    assert facts(rows) == [("COCO_train2014_000000000007.jpg", ("seven",)), ("COCO_train2014_000000000003.jpg", ("three", "drei"))]
    assert rows[0].image.open().size == (6, 4)
    assert "1 images of" in capsys.readouterr().err
    assert rows == readers.read(tmp_path / "annotations" / "captions_train2014.json", "train")
    put(tmp_path / "annotations" / "captions_train2014.json", dict(reversed(whole.items())))
    assert readers.read(tmp_path / "annotations" / "captions_{split}2014.json", "train") == rows
    expect_error("no split 'val'", tmp_path, "val")
    expect_error("does not say that it is split 'val'", tmp_path / "annotations" / "captions_train2014.json", "val")


def test_coco_as_pycocotools_understands_it(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    write_coco(tmp_path)
    api = coco.COCO(str(tmp_path / "annotations" / "captions_train2014.json"))
    expected = {
        image["file_name"]: tuple(" ".join(one["caption"].split()) for one in api.loadAnns(api.getAnnIds(imgIds=image["id"])))
        for image in api.loadImgs(api.getImgIds())
    }
    assert dict(facts(readers.read(tmp_path, "train"))) == {name: texts for name, texts in expected.items() if texts}


@pytest.mark.parametrize(
    ("images", "annotations", "match"),
    [
        ([{"id": 1}], [], r"images\[0\]: no file_name"),
        ([{"file_name": "a.jpg"}], [], r"images\[0\]: no id"),
        ([{"id": 1, "file_name": "a.jpg"}, 3], [], r"images\[1\]: a JSON object is expected, not int"),
        ([{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}], [], r"images\[1\]: id 1 is already that of 'a.jpg'"),
        ([{"id": 1, "file_name": "a.jpg"}], [{"image_id": 2, "caption": "x"}], "the captions of image 2 have no image"),
        ([{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": " "}], r"annotations\[0\]: no caption"),
        ([{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": "\ud800"}], r"annotations\[0\]: .*surrogate"),
        ([{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "../b.jpg"}], [{"image_id": 2, "caption": "x"}], r"image 2: .* holds '\.\.'"),
        ([{"id": 1, "file_name": "gone.jpg"}], [{"image_id": 1, "caption": "x"}], r"none of its first images \(file_name\) is in"),
        ([{"id": 1, "file_name": "a.jpg"}], [], "has no captions"),
        ([{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}], [{"image_id": n, "caption": "x"} for n in (1, 2)], "already on image 1"),
    ],
)
def test_wrong_coco_records_are_named(tmp_path, images, annotations, match):
    put(tmp_path / "a.jpg", b"x")
    put(tmp_path / "captions_train.json", {"images": images, "annotations": annotations})
    expect_error(rf"captions_train\.json.*{match}", tmp_path, format="coco")


def write_karpathy(folder: Path, filepath: bool) -> None:
    splits = {"a": "train", "b": "restval", "c": "val", "d": "test"}
    images = [
        {"filename": f"{name}.jpg", "split": split, "sentences": [{"raw": f"{name} one ", "tokens": []}, {"raw": f"{name} two"}]}
        for name, split in splits.items()
    ]
    for name, image in zip(splits, images, strict=True):
        if filepath:
            image["filepath"] = "val2014"
        put(folder / ("val2014" if filepath else "images") / f"{name}.jpg", picture(1))
    put(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


@pytest.mark.parametrize("filepath", [True, False])
def test_karpathy_splits(tmp_path, filepath):
    write_karpathy(tmp_path, filepath)
    prefix = "val2014/" if filepath else ""
    # restval belongs to train, as in the 113,287 training images that papers report for COCO.
    expected = {"train": "ab", "val": "c", "test": "d"}
    for split, names in expected.items():
        rows = readers.read(tmp_path, split)
        assert facts(rows) == [(f"{prefix}{name}.jpg", (f"{name} one", f"{name} two")) for name in names]
        assert all(row.image.open().mode == "RGB" for row in rows)
    assert readers.read(tmp_path / "dataset_coco.json", "test") == readers.read(tmp_path, "test")
    expect_error(r"no split 'dev2' in .*: it has restval, test, train, val", tmp_path, "dev2")
    put(tmp_path / "dataset_coco.json", {"images": [{"sentences": []}]})
    expect_error(r"dataset_coco\.json, images\[0\]: no split", tmp_path)
    put(tmp_path / "dataset_coco.json", {"images": [{"sentences": [], "split": "train", "filename": "a.jpg"}]})
    expect_error(r"dataset_coco\.json, images\[0\]: no sentences", tmp_path)


# JSON, record by record


@pytest.mark.parametrize("chunk", [1, 2, 7, 2**20])
def test_the_json_stream_reads_what_json_reads(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    values = [12, -3.5e7, "é😀\\ \" \u2028", None, True, {}, [], {"a": [1, {"b": "]"}]}, "", 0]
    for text in (json.dumps(values), json.dumps(values, ensure_ascii=False, indent=2), "[]", " [ ] \n"):
        path = put(tmp_path / "array.json", text)
        with json_stream.open_json(path) as stream:
            assert [value for _, value in stream.records()] == json.loads(text)
    for whole in ({"x": values, "y": 3, "z": {"a": values}, "w": []}, {}):
        path = put(tmp_path / "object.json", whole)
        found = {}
        with json_stream.open_json(path) as stream:
            for key in stream.members():
                found[key] = [value for _, value in stream.items(key)] if isinstance(whole[key], list) else stream.value()
        assert found == whole


def test_every_cut_of_a_json_file_is_an_error(tmp_path):
    text = json.dumps([{"id": "a", "n": [1, 2.5]}, "x"])
    for end in range(len(text)):
        with pytest.raises(DataError, match=r"array\.json, "), json_stream.open_json(put(tmp_path / "array.json", text[:end])) as stream:
            list(stream.records())
    for text in ("[1 2]", "[1,]", "[1] 2", "{}", '["\xff"'.encode("latin-1"), "[" * 100_000, "[1, }"):
        with pytest.raises(DataError, match=r"array\.json, ") as caught, json_stream.open_json(put(tmp_path / "array.json", text)) as stream:
            list(stream.records())
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# WebDataset


def write_shard(path: Path, samples: dict[str, dict[str, bytes]], format: int = tarfile.PAX_FORMAT, mtime: float = 1.7e9 + 0.25) -> Path:
    """A shard as webdataset's TarWriter makes it: times of parts of a second give every member a pax record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(content), mtime
                tar.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, caption: str | None = None) -> dict[str, bytes]:
    """As img2dataset writes one."""
    about = {"caption": caption or f"picture {number}", "key": f"{number:09d}", "status": "success"}
    return {"jpg": picture(number, "JPEG"), "json": json.dumps(about).encode(), "txt": about["caption"].encode()}


def write_shards(folder: Path, count: int = 3, size: int = 4) -> Path:
    for shard in range(count):
        write_shard(folder / f"{shard:05d}.tar", {f"{shard:05d}{n:04d}": sample(10 * shard + n) for n in range(size)})
    return folder


def test_shards_as_tarfile_and_img2dataset_write_them(tmp_path):
    write_shards(tmp_path / "train")
    rows = readers.read(tmp_path, "train")
    assert facts(rows) == [(f"{s:05d}{n:04d}", (f"picture {10 * s + n}",)) for s in range(3) for n in range(4)]
    for row in rows:
        with tarfile.open(row.image.tar) as tar:
            content = tar.extractfile(row.image.member).read()
        assert row.image.open().tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()
        assert row.image.fingerprint() == hashlib.sha256(content).hexdigest()
        assert row.image.name == f"{row.image.tar}/{row.id}.jpg"
    pattern = str(tmp_path / "{split}" / "{00000..00001}.tar") + "::" + str(tmp_path / "train" / "00002.tar")
    assert readers.read(pattern, "train") == rows
    assert readers.read(str(tmp_path / "train" / "{00002,00000}.tar"), "train") == rows[8:] + rows[:4]
    assert readers.read(str(tmp_path / "train" / "0000[12].tar"), "train") == rows[4:]
    assert readers.read(tmp_path / "train" / "00001.tar", "train") == rows[4:8]
    assert pickle.loads(pickle.dumps(rows)) == rows  # noqa: S301: what worker processes that are spawned get


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_of_a_tar_is_that_of_tarfile(tmp_path, format):
    long = "/".join(["folder" * 4] * 5) + "/" + "n" * 60
    names = ["./a", "b.c", "deep/d", "x" * 80, long[:90], long] + ([] if format == tarfile.USTAR_FORMAT else ["é" * 70, "y" * 300])
    path = write_shard(tmp_path / "a.tar", {name: {"jpg": bytes([n]) * (n * 300)} for n, name in enumerate(names)}, format, 1.7e9 + (format == 2) / 4)
    with tarfile.open(path, "a", format=format) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        tar.addfile(tarfile.TarInfo("last"))
    with tarfile.open(path) as tar:
        expected = [(one.name, one.offset_data, one.size) for one in tar if one.isreg()]
    with tar_index.TarFile(path) as tar:
        found = list(tar.members())
    assert found == [(name.removeprefix("./"), offset, size) for name, offset, size in expected]
    assert len(found) == len(names) + 1


def test_keys_end_at_the_first_dot_and_clash_between_shards_only(tmp_path, capsys):
    write_shard(tmp_path / "train" / "a.tar", {
        "deep/x": {"png": picture(1), "seg.png": b"z", "txt": b"one", "cls": b"3", "pyd": b"cos\nsystem\n"},
        "k": {"WEBP": picture(2, "WEBP"), "JSON": b'{"caption": "two"}'},
        "bare": {"jpg": b"x"}, "none": {"txt": b"x"}, "blank": {"jpg": b"x", "txt": b" "}, "num": {"jpg": b"x", "json": b'{"caption": 3}'},
    })  # fmt: skip
    assert facts(readers.read(tmp_path, "train")) == [("deep/x", ("one",)), ("k", ("two",))]
    said = capsys.readouterr().err
    assert "3 samples of" in said and "no caption and are left out, the first is bare" in said and "1 samples of" in said and "no image" in said
    write_shard(tmp_path / "train" / "b.tar", {"k": sample(3)})
    assert [row.id for row in readers.read(tmp_path, "train")] == ["a.tar/deep/x", "a.tar/k", "b.tar/k"]


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        ([("k", {"jpg": b"x", "txt": b"one"}), ("l", sample(1)), ("k", {"png": b"x"})], r"a\.tar, member 'k\.png': its key has come before"),
        ([("k", {"jpg": b"x", "png": b"y", "txt": b"one"})], r"member 'k\.png': the sample has another image, k\.jpg"),
        ([("k", {"jpg": b"x", "txt": b"\xff"})], r"member 'k\.txt': not UTF-8"),
        ([("k", {"jpg": b"x", "json": b"{"})], r"member 'k\.json': Expecting"),
        ([("k", {"jpg": b"x", "json": b'{"caption": "\\ud800"}'})], r"member 'k\.json': .*surrogate"),
        ([("k", {"jpg": b"x", "txt": b"x" * 2**21})], r"member 'k\.txt': 2097152 bytes are too much"),
        ([("../k", sample(1))], r"member '\.\./k\.jpg' at byte \d+: the name is empty, absolute or leads upwards"),
        ([("/etc/k", sample(1))], "absolute"),
        ([("a/../../k", sample(1))], "leads upwards"),
        ([("a/" * 60 + "../k", sample(1))], "leads upwards"),
        ([], "has no samples"),
    ],
)
def test_wrong_samples_are_named_with_shard_and_member(tmp_path, samples, match):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
        for key, files in samples:
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    expect_error(match, tmp_path)


def test_two_members_of_one_name(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
        for content in (b"one", b"two"):
            info = tarfile.TarInfo("k.txt")
            info.size = 3
            tar.addfile(info, io.BytesIO(content))
    expect_error(r"member 'k\.txt': the sample has two txt files", tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"Z"])
def test_members_that_are_no_regular_files_are_refused(tmp_path, kind):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
        info = tarfile.TarInfo("k.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    expect_error(r"a\.tar, member 'k\.jpg' is .*: only regular files are read", tmp_path)


def raw_member(name: bytes, content: bytes = b"", kind: bytes = b"0", size: bytes | None = None) -> bytes:
    """A member with any header."""
    header = bytearray(512)
    header[:100] = name.ljust(100, b"\0")
    header[124:136] = (b"%011o\0" % len(content) if size is None else size).ljust(12, b"\0")
    header[156:157], header[257:265] = kind, b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def pax(**items: str) -> bytes:
    body = b""
    for key, value in items.items():
        record = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(record) + 1
        while len(str(length)) + len(record) != length:
            length += 1
        body += str(length).encode() + record
    return body


END = bytes(1024)
GOOD = raw_member(b"a.jpg", picture(1)) + raw_member(b"a.txt", b"one")


@pytest.mark.parametrize(
    ("members", "match"),
    [
        (raw_member(b"x", pax(path="../../b.jpg"), b"x") + raw_member(b"b.jpg", b"x"), "leads upwards"),
        (raw_member(b"x", pax(path="/b.jpg"), b"x") + raw_member(b"b.jpg", b"x"), "absolute"),
        (raw_member(b"x", pax(path="b\0.jpg"), b"x") + raw_member(b"b.jpg", b"x"), "empty, absolute"),
        (raw_member(b"x", pax(GNU__sparse__major="1", path="b.jpg"), b"x") + raw_member(b"b.jpg", b"x"), "a sparse file"),
        (raw_member(b"x", pax(path="b.jpg"), b"g") + raw_member(b"b.jpg", b"x"), "a global header sets the path of every member"),
        (raw_member(b"x", b"../b.jpg\0", b"L") + raw_member(b"b.jpg", b"x"), "leads upwards"),
        (raw_member(b"x", b"y" * 70_000, b"L") + raw_member(b"b.jpg", b"x"), "a name or pax record of 70000 bytes"),
        (raw_member(b"", b"x"), "the name is empty"),
        (raw_member(b"\xff.jpg", b"x"), "a name is not UTF-8"),
    ],
)
def test_tricks_of_tar_headers_are_refused(tmp_path, members, match):
    put(tmp_path / "train" / "s.tar", GOOD + members + END)
    expect_error(rf"s\.tar, .*{match}", tmp_path)


@pytest.mark.parametrize(
    ("after", "match"),
    [
        (b"", "ends at byte 2048 without its end mark"),
        (raw_member(b"b.jpg", picture(2))[:300], "without its end mark"),
        (raw_member(b"b.jpg", bytes(9000))[:5000], r"ends at byte 7048, within 'b\.jpg'"),
        (raw_member(b"b.jpg", size=b"77777777777") + END, r"within 'b\.jpg'"),
        (raw_member(b"b.jpg", size=b"\x80\0\0\0\0\0\0\0\0\0\1\0") + END, "the size of a member is no octal number"),
        (raw_member(b"b.jpg", size=b"-0000000001") + END, "the size of a member is no octal number"),
        (raw_member(b"x", pax(size="-5"), b"x") + raw_member(b"b.jpg", b"x") + END, "the size of a member is no number"),
        (raw_member(b"x", pax(size="999999999999"), b"x") + raw_member(b"b.jpg", b"x") + END, r"within 'b\.jpg'"),
        (raw_member(b"x", b"99 path=b.jpg\n", b"x") + raw_member(b"b.jpg", b"x") + END, "a pax record is malformed"),
        (raw_member(b"b.jpg", b"x").replace(b"b.jpg", b"c.jpg", 1) + END, "no tar header there"),
        (b"\x1f" * 2048, "no tar header there"),
    ],
)
def test_samples_before_the_damage_of_a_tar_are_read_and_the_damage_is_named(tmp_path, capsys, after, match):
    put(tmp_path / "train" / "s.tar", GOOD + after)
    rows = readers.read(tmp_path, "train")
    assert facts(rows) == [("a", ("one",))] and rows[0].image.open().size == (6, 4)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(rf"s\.tar .*{match}.*; 1 samples before that are read", said), said


def test_every_cut_of_a_shard_gives_whole_samples_only(tmp_path, capsys):
    whole = write_shard(tmp_path / "whole.tar", {f"{n:03d}": {"jpg": b"x" * 700, "txt": b"caption"} for n in range(4)}).read_bytes()
    for end in range(0, len(whole), 256):
        path = put(tmp_path / "train" / "a.tar", whole[:end])
        try:
            rows = readers.read(tmp_path, "train")
        except DataError as error:
            assert "has no samples" in str(error)
            rows = []
        for row in rows:
            assert row.captions == ("caption",) and path.read_bytes()[row.image.offset :][: row.image.size] == b"x" * 700
        # A sample takes 9 blocks, four of them pax records; its 7 bytes of text begin with the last one.
        assert len(rows) == min(4, (end - 8 * 512 - 7) // (9 * 512) + 1), end
    capsys.readouterr()


def test_random_damage_never_leads_elsewhere(tmp_path, capsys):
    whole = write_shard(tmp_path / "whole.tar", {f"{n:03d}": sample(n) for n in range(3)}).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            content[place] = rng.integers(0, 256)
        path = put(tmp_path / "train" / "a.tar", bytes(content))
        try:
            rows = readers.read(tmp_path, "train")
        except DataError as error:
            assert ("a.tar" in str(error) or "has no samples" in str(error)) and "\n" not in str(error)
            continue
        for row in rows:
            assert 0 <= row.image.offset and row.image.offset + row.image.size <= path.stat().st_size
            try:
                row.image.open()
            except BadImage:
                pass
    capsys.readouterr()


def test_commands_and_addresses_are_no_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    marker = tmp_path / "made"
    touch = f"pipe:touch {marker}"
    for data in (touch, "pipe:curl -s http://x/train.tar", "http://x/train.tar", "s3://x/{0..3}.tar", f"a/train.tar::{touch}"):
        expect_error("is refused: shards are local files", data)
    assert not marker.exists()


def test_patterns(tmp_path):
    names = [path.as_posix() for path in webdataset.expand("train/a{08..11}-{x,y}.tar", "train")]
    assert names == [f"train/a{number}-{letter}.tar" for number in ("08", "09", "10", "11") for letter in "xy"]
    for pattern, match in (
        ("train/{3..1}.tar", "ends before it begins"),
        ("train/{0..99999999999999}.tar", "more than 100000 shards"),
        ("train/{0..999}{0..999}.tar", "more than 100000 shards"),
        ("train/{0..1}.tar::train/1.tar", r"names train/1\.tar twice"),
        ("shards/{0..1}.tar", r"does not say that it is split 'train': .* write \{split\}"),
        ("train/{0..1}.tar", r"no shard train/0\.tar"),
    ):
        expect_error(match, pattern)
    (tmp_path / "train" / "0.tar").mkdir(parents=True)
    expect_error("is not a regular file", str(tmp_path / "train" / "{0..0}.tar"))


def test_images_in_tars_that_cannot_be_read_are_bad_images(tmp_path):
    path = write_shard(tmp_path / "a.tar", {"a": {"jpg": b"not an image"}, "b": {"jpg": b""}})
    images = {name: TarImage(path, name, offset, size) for name, offset, size in tar_index.TarFile(path).members()}
    good, huge = images["a.jpg"], TarImage(path, "huge.jpg", 0, 2**40)
    for image, reason in (
        (good, "format"), (images["b.jpg"], "empty"), (huge, "too-large"), (TarImage(path, "x.jpg", path.stat().st_size, 9), "truncated"),
        (TarImage(tmp_path / "gone.tar", "x.jpg", 0, 9), "missing"), (TarImage(tmp_path, "x.jpg", 0, 9), "unreadable"),
    ):  # fmt: skip
        with pytest.raises(BadImage) as caught:
            image.open()
        assert caught.value.reason == reason and "\n" not in str(caught.value) and caught.value.name == image.name


def test_a_shuffled_pass_over_shards_is_the_same_in_workers_resumed_and_shared(tmp_path):
    dataset = CaptionDataset(readers.read(write_shards(tmp_path / "train").parent, "train"), ImageTransform(16))
    order = epoch_order(len(dataset), 5, 1)

    def batches(workers=0, **options):
        return list(make_loader(dataset, None, 2, order, workers, "1", **options))

    whole = batches()
    assert [name for batch in whole for name in batch["ids"]] == [dataset.rows[place].id for place in order] and len(whole) == 6
    shared = sorted(batches(share=(0, 2)) + batches(2, share=(1, 2)), key=lambda batch: batch["batch_index"])
    for other in (batches(2), whole[:2] + batches(start_batch=2), shared):
        assert [batch["ids"] for batch in other] == [batch["ids"] for batch in whole]
        assert all((a["pixel_values"] == b["pixel_values"]).all() for a, b in zip(other, whole, strict=True))


# Conceptual Captions


def test_a_list_of_addresses_without_images_names_the_downloader(tmp_path):
    path = put(tmp_path / "Train_GCC-training.tsv", "a dog\thttp://x/1.jpg\na cat\thttp://x/2.jpg\n")
    command = r"download them with `python scripts/download_cc3m\.py .*Train_GCC-training\.tsv OUT --split train`"
    expect_error(command, tmp_path)
    expect_error(command, path)
    assert (Path(__file__).parent.parent / "scripts" / "download_cc3m.py").is_file()
    expect_error("no split 'val'", tmp_path, "val")


def test_a_list_of_addresses_with_images_named_after_its_lines(tmp_path, capsys):
    lines = [f"picture  {number}\thttp://x/{number}.jpg" for number in range(1, 6)]
    put(tmp_path / "Validation_GCC-1.1.0-Validation.tsv", "\ufeff" + "\n".join(lines) + "\n")
    for number in (2, 5):
        put(tmp_path / "val" / f"{number:06d}.png", picture(number))
    rows = readers.read(tmp_path, "val")
    assert facts(rows) == [("000002.png", ("picture 2",)), ("000005.png", ("picture 5",))] and rows[0].image.open().size == (6, 4)
    assert "3 lines of" in capsys.readouterr().err
    put(tmp_path / "val" / "000007.jpg", b"x")
    expect_error(r"000007\.jpg has no line in .*, which has 5", tmp_path, "val")
    put(tmp_path / "val" / "2.jpg", b"x")
    expect_error("has two images of line 2: ", tmp_path, "val")


@pytest.mark.parametrize(("line", "match"), [(b"a", "1 columns"), (b"a\tb\tc", "3 columns"), (b" \tb", "is empty"), (b"\xff\tb", "not UTF-8")])
def test_wrong_lines_of_a_list_are_named(tmp_path, line, match):
    put(tmp_path / "train" / "000001.jpg", b"x")
    put(tmp_path / "train.tsv", b"a\tb\n" + line)
    expect_error(rf"train\.tsv, line 2: .*{match}", tmp_path)


# LLaVA and preferences


def test_llava_conversations(tmp_path):
    def turns(*texts):
        return [{"from": speaker, "value": text} for speaker, text in zip(itertools.cycle(("human", "gpt")), texts, strict=False)]

    values = [
        {"id": "one", "image": "coco/a.jpg", "conversations": turns("<image>\nWhat is  it?", "A dog.", "Where?", "Outside,\nin the sun.")},
        {"image": "b.jpg", "conversations": turns("<image>", "A plain caption.")},
        {"id": 7, "image": "b.jpg", "conversations": [{"from": "system", "value": "Be kind."}, *turns("Is it red?\n<image>", "No.")]},
    ]
    for name in ("coco/a.jpg", "b.jpg"):
        put(tmp_path / "images" / name, picture(1))
    path = put(tmp_path / "llava_train.json", values)
    rows = readers.read(tmp_path, "train")
    assert [(row.id, row.captions, row.question, row.answers) for row in rows] == [
        ("one", (), "What is it?", ("A dog.",)), ("one#2", (), "Where?", ("Outside, in the sun.",)),
        ("b.jpg", ("A plain caption.",), None, ()), ("7", (), "Is it red?", ("No.",)),
    ]  # fmt: skip
    assert rows[0].image.path == tmp_path / "images" / "coco" / "a.jpg" and rows[0].image.open().size == (6, 4)
    path.rename(tmp_path / "other.json")
    put(tmp_path / "train.jsonl", "\n".join(map(json.dumps, values)))
    assert readers.read(tmp_path, "train") == rows
    expect_error("does not say that it is split|holds no split 'train'", tmp_path / "other.json", format="llava")


ASKED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def test_conversations_without_an_image_are_left_out_and_counted(tmp_path, capsys):
    put(tmp_path / "a.jpg", b"x")
    put(tmp_path / "train.json", [{"id": 1, "conversations": ASKED}, {"id": 2, "image": "a.jpg", "conversations": ASKED}, {"id": 3, "conversations": ASKED}])
    assert [row.id for row in readers.read(tmp_path, "train")] == ["2"]
    assert "2 conversations of" in capsys.readouterr().err
    put(tmp_path / "train.json", [{"id": 1, "conversations": ASKED}])
    expect_error("has no image in any of its 1 conversations", tmp_path)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"image": ""}, r"\[1\]: no image"),
        ({"image": "a.jpg"}, r"\[1\]: no conversations"),
        ({"image": "a.jpg", "conversations": [{"from": "gpt", "value": "x"}]}, r"\[1\]: human and gpt are expected in turn, found gpt"),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}]}, "found human"),
        ({"image": "a.jpg", "conversations": [{"from": "human"}]}, "something else than"),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]}, "the gpt's value is empty"),
        ({"id": "first", "image": "a.jpg", "conversations": ASKED}, "id 'first' is already"),
        ({"image": "../a.jpg", "conversations": ASKED}, r"\[1\]: image .* holds '\.\.'"),
        ({"id": [], "image": "a.jpg", "conversations": []}, "id must be a string"),
        (3, "a JSON object is expected, not int"),
    ],
)
def test_wrong_conversations_are_named(tmp_path, record, match):
    put(tmp_path / "a.jpg", b"x")
    first = {"id": "first", "image": "a.jpg", "conversations": ASKED}
    put(tmp_path / "train.json", [first, record])
    expect_error(rf"train\.json, .*{match}", tmp_path)


PREFERENCES = [("a.jpg", "a good, long one", "bad", ""), ("deep/b.jpg", "better", 'wo"rse', "What is it?"), ("a.jpg", "fine", "poor", "")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_preferences(tmp_path, suffix):
    for name in ("a.jpg", "deep/b.jpg"):
        put(tmp_path / "images" / name, picture(1))
    keys = ("image", "chosen", "rejected", "prompt")
    values = [dict(zip(keys, one, strict=True)) for one in PREFERENCES]
    if suffix == "csv":
        with open(tmp_path / "train.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([keys, *PREFERENCES])
    else:
        put(tmp_path / f"train.{suffix}", values if suffix == "json" else "\n".join(map(json.dumps, values)))
    rows = readers.read(tmp_path, "train")
    assert [(row.id, row.captions, row.chosen, row.rejected, row.question) for row in rows] == [
        ("a.jpg", ("a good, long one",), "a good, long one", "bad", None), ("deep/b.jpg", ("better",), "better", 'wo"rse', "What is it?"),
        ("a.jpg#2", ("fine",), "fine", "poor", None),
    ]  # fmt: skip
    assert rows[1].image == FileImage(tmp_path / "images" / "deep" / "b.jpg")
    assert rows == readers.read(tmp_path / f"train.{suffix}", "train", "preference")


def test_preferences_with_a_split_field_and_wrong_ones(tmp_path):
    put(tmp_path / "a.jpg", b"x")
    good = {"image": "a.jpg", "chosen": "x", "rejected": "y", "split": "train"}
    path = put(tmp_path / "pairs.jsonl", json.dumps(good) + "\n" + json.dumps(good | {"split": "val"}))
    assert [row.id for row in readers.read(tmp_path, "train")] == [row.id for row in readers.read(path, "val")] == ["a.jpg"]
    expect_error("no split 'test' in .*: it has train, val", tmp_path, "test")
    for wrong, match in (
        ({"rejected": "x"}, "chosen and rejected are the same"), ({"rejected": ""}, "rejected is empty"), ({"chosen": 3}, "chosen must be a string"),
        ({"image": None}, "no image"), ({"id": [1]}, "id must be"), ({"image": "/a.jpg"}, "is absolute"), ({"prompt": 3}, "prompt must be a string"),
        ({"rejected": "\ud800"}, "surrogate"),
    ):  # fmt: skip
        put(path, json.dumps(good) + "\n\n" + json.dumps(good | wrong))
        expect_error(rf"pairs\.jsonl, line 3: .*{match}", tmp_path)
    put(path, json.dumps(good) + "\n{")
    expect_error(r"pairs\.jsonl, line 2: not JSON", tmp_path)
    put(path, json.dumps(good) + "\n" + json.dumps({"image": "a.jpg", "chosen": "x", "rejected": "z"}))
    expect_error(r"pairs\.jsonl, line 2: no 'split', which records before it have", tmp_path)


# Which format


def test_the_download_of_a_list_is_read_as_what_it_is(tmp_path):
    """Folders with the files of several formats: metadata comes before shards, shards before sidecars."""
    write_shards(tmp_path / "train", 1, 1)
    put(tmp_path / "train" / "a.jpg", b"x")
    put(tmp_path / "train" / "a.txt", "sidecar")
    assert readers.read(tmp_path, "train")[0].captions == ("picture 0",)
    assert readers.read(tmp_path, "train", "sidecars")[0].captions == ("sidecar",)
    put(tmp_path / "train" / "manifest.jsonl", "{}")
    put(tmp_path / "train" / "metadata.jsonl", {"file_name": "a.jpg", "text": "metadata"})
    assert readers.read(tmp_path, "train")[0].captions == ("metadata",)
    for format in readers.BY_NAME:
        if format not in ("jsonl", "webdataset", "sidecars"):
            with pytest.raises(DataError):
                readers.read(tmp_path, "train", format)
    assert readers.splits(tmp_path) == ("train",)


def test_what_is_no_data_set_is_said(tmp_path):
    for data in ("x\0y", "a" * 5000, "@1", "gone/{split}", "/dev/gone"):
        expect_error("no data folder ", data)
    expect_error("is neither a folder nor a regular file", "/dev/zero")
    write_shards(tmp_path / "unnamed", 2)
    put(tmp_path / "unnamed" / "00000_stats.json", {"count": 4})
    expect_error("it has no sub-folders; .*; 00000.tar, 00000_stats.json, 00001.tar are not named after it", tmp_path / "unnamed")
    expect_error("holds no split 'train' in a format that is known", put(tmp_path / "train.json", "[1, 2]"))
    expect_error("holds no split 'train' in a format that is known", put(tmp_path / "train.json", "{"))
    os.mkfifo(tmp_path / "train.jsonl")
    expect_error("is neither a folder nor a regular file", tmp_path / "train.jsonl")


# Mixtures


def write_source(folder: Path, names: str, split: str = "train") -> Path:
    put(folder / split / "metadata.jsonl", "\n".join(json.dumps({"file_name": name, "text": f"{folder.name} {name}"}) for name in names))
    return folder


def test_a_mixture_holds_the_rows_of_all_sources_with_their_weights(tmp_path):
    a, b, c = (write_source(tmp_path / name, names) for name, names in (("a", "xy"), ("b,2@home", "yz"), ("c", "w")))
    rows = readers.read(f"{a}@2,{b}@0.5,{c}@1", "train")
    # y is in two sources, so the ids of both say which; those of c stay.
    assert [(row.id, row.weight) for row in rows] == [("a:x", 2), ("b,2@home:y", 0.5), ("w", 1), ("a:y", 2), ("b,2@home:z", 0.5)]
    assert [row.id for row in readers.read(f"{a}@1,{c}@1", "train")] == ["x", "w", "y"]
    assert {row.weight for row in readers.read(a, "train")} == {1}
    assert len(readers.read(f"scenes@1,{c}@3", "train")) == 4001
    write_source(tmp_path / "a@2,c@1", "only")
    assert [row.id for row in readers.read(tmp_path / "a@2,c@1", "train")] == list("only")


@pytest.mark.parametrize(
    ("data", "match"),
    [("a@2,b", "'b' has no weight"), ("a@2,", "'nothing' has no weight"), ("a@0,b@1", "the weight of a must be above 0"), ("a@1e9", "no data folder"),
     ("a@99999", "at most 1000"), ("a@1,a@2", "has a source twice"), ("a@1,gone@2", "no data folder gone")],
)  # fmt: skip
def test_wrong_mixtures(tmp_path, monkeypatch, data, match):
    monkeypatch.chdir(tmp_path)
    write_source(Path("a"), "xy")
    expect_error(match, data)


def test_data_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source(Path("a"), "xy")
    write_shards(Path("b") / "train", 2, 1)
    for data in ("a", "./a/", "a@2,b@1", "b/{split}/{00000..00000}.tar::b/train/00001.tar", "b/train/*.tar@0.5,a@1"):
        here, expected = readers.absolute(data), facts(readers.read(data, "train"))
        monkeypatch.chdir("/")
        assert facts(readers.read(here, "train")) == expected
        monkeypatch.chdir(tmp_path)
    assert [readers.absolute(data) for data in ("scenes", "http://x/train.tar")] == ["scenes", "http://x/train.tar"]


def test_a_mixed_epoch_has_each_row_as_often_as_its_weight_says():
    weights = [2.0] * 5 + [0.3] * 11 + [1.0] * 4 + [0.01] * 3 + [1.5] * 7
    expected = {2.0: 10, 0.3: 3, 1.0: 4, 0.01: 1, 1.5: 10}  # rows of each weight in an epoch: round(n w), at least one; 10.5 is rounded to even
    total = Counter()
    for epoch in range(60):
        order = mixing.mixed_order(weights, 7, epoch)
        assert len(order) == mixing.rows_per_epoch(weights) == sum(expected.values())
        assert Counter(weights[row] for row in order) == expected
        total.update(order)
        for weight, count in expected.items():
            rows = [row for row in range(len(weights)) if weights[row] == weight]
            shown = [total[row] for row in rows]
            assert max(shown) - min(shown) <= 1 and sum(shown) == count * (epoch + 1)


def test_a_mixed_order_is_a_function_of_seed_and_epoch():
    weights = [2.0] * 20 + [0.5] * 20
    orders = {(seed, epoch): tuple(mixing.mixed_order(weights, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert tuple(mixing.mixed_order(weights, 2, 1)) == orders[2, 1]
    first, second = (set(orders[0, epoch]) & set(range(20, 40)) for epoch in (0, 1))
    assert len(first) == len(second) == 10 and not first & second
    assert mixing.mixed_order([1.0] * 50, 3, 4) == epoch_order(50, 3, 4)
    code = "from data import mixing; print(mixing.mixed_order([2.0] * 20 + [0.5] * 20, 2, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert json.loads(done.stdout) == list(orders[2, 1])


def test_a_mixture_resumes_in_the_middle_of_an_epoch(tmp_path):
    shards = write_shards(tmp_path / "shards" / "train").parent
    folder = write_source(tmp_path / "folder", "ab")
    for name in "ab":
        put(folder / "train" / name, picture(3))
    rows = readers.read(f"{shards}@1.5,{folder}@3", "train")
    dataset = CaptionDataset(rows, ImageTransform(16))
    order = mixing.mixed_order([row.weight for row in rows], 1, 2)
    whole = list(make_loader(dataset, None, 5, order, 0, "1"))
    assert sum(len(batch["ids"]) for batch in whole) == 18 + 6
    for start in range(len(whole) + 1):
        rest = list(make_loader(dataset, None, 5, order, 2 * (start == 2), "1", start_batch=start))
        assert [batch["ids"] for batch in rest] == [batch["ids"] for batch in whole[start:]]


def test_reading_imports_no_torch_and_no_pyarrow():
    code = "import sys; from data import readers; readers.read('scenes', 'test'); print(sorted({'torch', 'pyarrow'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert done.stdout == "[]\n"
