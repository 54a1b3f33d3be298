"""The data doctor: every planted fault is found, nothing else is, and its page is safe to open."""

import base64
import io
import json
import re
import tarfile
from html.parser import HTMLParser

import numpy as np
import pytest
import sentencepiece
from PIL import Image, ImageEnhance

import train
from captioner import cli, doctor, doctor_findings, doctor_page
from captioner.doctor_table import table
from captioner.tokenizer import train_tokenizer
from data import near_duplicates, scenes
from data.caption_faults import FAULTS, HABITS, check, ends_with_mark, is_mostly_not_ascii
from data.image_facts import difference_hash, look_at, look_at_all
from data.rows import DataError, FileImage
from scripts import data_doctor


def photograph(seed: int, size: tuple[int, int] = (200, 150)) -> Image.Image:
    """Blurred noise with grain: as different from each other, and as hard to compress, as photographs."""
    rng = np.random.default_rng(seed)
    blurred = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(blurred) + rng.normal(0, 8, (size[1], size[0], 3)), 0, 255).astype(np.uint8))


def write_split(folder, captions: dict[str, list[str]]) -> None:
    """metadata.jsonl of a split, whose pictures lie there already or are made here as PNG photographs by number."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (name, texts) in enumerate(captions.items()):
        if not (folder / name).exists() and name.endswith(".png"):
            photograph(sum(map(ord, str(folder.name))) * 1000 + number).save(folder / name)
        lines.append(json.dumps({"file_name": name, "captions": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def run(*flags: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(data_doctor.main, list(map(str, flags)), expected=(DataError,))
    return exit_info.value.code


def examine(folder, *flags: str) -> tuple[int, dict]:
    code = run(folder / "data", "--output", folder, "--json", folder / "doctor.json", *flags)
    return code, json.loads((folder / "doctor.json").read_text(encoding="utf-8"))


CLEAN = [
    "A brown dog runs over the lawn.", "Two children play with a red ball.", "A man in a blue coat waits for the bus.", "The white boat lies on the beach.",
    "An old woman reads a paper.", "Three birds sit on a wire.", "A girl jumps into the pool.", "The train leaves the station at night.",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_tokenizer([*CLEAN, "<>&;@#/.:=-_,!ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789éÃ©"], path, 200)
    return path


# The look of pictures.


@pytest.mark.parametrize("size", [(90, 80), (200, 150), (31, 57), (640, 11)])
def test_the_hash_is_that_of_first_principles(size):
    image = photograph(3, size)
    red, green, blue = np.moveaxis(np.asarray(image).astype(np.int64), 2, 0)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16  # 0.299, 0.587, 0.114 in 16 bits
    column, row = (np.ceil((np.arange(pixels) + 0.5) * cells / pixels).astype(int) - 1 for pixels, cells in zip(size, (9, 8), strict=True))
    cells = np.array([[grey[np.ix_(row == y, column == x)].mean() for x in range(9)] for y in range(8)])
    steps = np.diff(cells, axis=1).ravel()
    assert np.abs(steps - 1).min() > 1e-3, "no bit is a matter of rounding"
    found, clear = difference_hash(image)
    assert f"{found:064b}" == "".join("01"[int(step > 1)] for step in steps) and clear == (np.abs(steps) >= 3).sum()


def test_near_pairs_are_those_of_all_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 600, dtype=np.uint64)
    for place in range(300, 600):  # copies with 0 to 11 flipped bits
        flips = rng.choice(64, size=place % 12, replace=False)
        hashes[place] = hashes[place - 300] ^ np.uint64(sum(1 << int(bit) for bit in flips))
    thumbnails = np.tile(rng.integers(0, 256, 48, dtype=np.uint8), (600, 1))
    monkeypatch.setattr(near_duplicates, "BLOCK", 100)
    for limit in (0, 3, 7):
        pairs = near_duplicates.near_pairs(hashes, thumbnails, limit)
        apart = {(i, j): int(hashes[i] ^ hashes[j]).bit_count() for i in range(600) for j in range(i + 1, 600)}
        expected = {pair: distance for pair, distance in apart.items() if distance <= limit}
        found = dict(zip(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), pairs.distance.tolist(), strict=True))
        assert found == expected and len(pairs) == len(expected) >= 25 * (limit + 1)
    with pytest.raises(ValueError, match="max_distance 8"):
        near_duplicates.near_pairs(hashes, thumbnails, 8)


@pytest.mark.parametrize(("same_border", "share"), [(0xFFFFFFFFFFFFFFFF, 0.001), (0x007E7E7E7E7E7E00, 0.05)])
def test_few_of_all_pairs_are_compared(monkeypatch, same_border, share):
    """Also where the border is the same in all pictures, as in photographs of things on white."""
    count, compared = 10_000, []
    hashes = np.random.default_rng(1).integers(0, 2**64, count, dtype=np.uint64) & np.uint64(same_border)
    distances = near_duplicates.distances
    monkeypatch.setattr(near_duplicates, "distances", lambda first, second: compared.append(len(first)) or distances(first, second))
    near_duplicates.near_pairs(hashes, np.zeros((count, 3), dtype=np.uint8))
    assert 0 < sum(compared) < share * count**2


def test_in_a_crowd_of_copies_everyone_has_one_and_few_pairs_are_looked_at(monkeypatch):
    looked, look_alike = [], near_duplicates.look_alike
    monkeypatch.setattr(near_duplicates, "look_alike", lambda first, second: looked.append(len(first)) or look_alike(first, second))
    rng = np.random.default_rng(0)
    hashes = np.uint64(0x0123456789ABCDEF) ^ (np.uint64(1) << rng.integers(0, 64, 3000, dtype=np.uint64))
    thumbnails = rng.integers(0, 200, 48)[None] + rng.integers(0, 9, (3000, 48))
    pairs = near_duplicates.near_pairs(hashes, thumbnails.astype(np.uint8))
    assert sum(looked) < 3000 * 3000 / 10
    assert set(pairs.second.tolist()) == set(range(1, 3000)) and (pairs.first < pairs.second).all()


def test_no_hashes_have_no_pairs():
    assert len(near_duplicates.near_pairs(np.empty(0, dtype=np.uint64), np.empty((0, 768), dtype=np.uint8))) == 0


def save(image: Image.Image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


COPIES = {
    "copy.png": lambda image, path: save(image, path),
    "quality.jpg": lambda image, path: save(image, path, quality=40),
    "small.png": lambda image, path: save(image.resize((97, 73), Image.Resampling.LANCZOS), path),
    "large.jpg": lambda image, path: save(image.resize((400, 300), Image.Resampling.BICUBIC), path, quality=80),
    "brighter.png": lambda image, path: save(ImageEnhance.Brightness(image).enhance(1.1), path),
    "darker.jpg": lambda image, path: save(ImageEnhance.Brightness(image).enhance(0.85), path, quality=70),
}  # fmt: skip


def test_leaks_between_splits_are_found_and_nothing_else(tmp_path):
    train_captions = {f"{number}.png": [f"{CLEAN[number % 8][:-1]} number {number}."] for number in range(30)}
    write_split(tmp_path / "data/train", train_captions)
    val = {f"own{number}.png": [f"A picture of its own, {number}."] for number in range(10)}
    write_split(tmp_path / "data/val", val)
    for number, (name, make) in enumerate(COPIES.items()):
        make(Image.open(tmp_path / f"data/train/{number}.png"), tmp_path / "data/val" / name)
        val[name] = [f"A picture from elsewhere, {number}."]
    write_split(tmp_path / "data/val", val)
    code, report = examine(tmp_path)
    [leak] = report["leaks"]
    found = {example["second"]: (example["first"], example["kind"]) for example in leak["listed"]}
    assert found == {name: (f"{number}.png", "near" if number else "exact") for number, name in enumerate(COPIES)}
    assert (leak["splits"], leak["images"], leak["exact"], leak["near"]) == (["train", "val"], 6, 1, 5)
    assert all(split["copies"]["images"] == 0 for split in report["splits"].values())
    assert code == 3 and [finding["name"] for finding in report["findings"]] == ["leak"]
    page = (tmp_path / "data-doctor.html").read_text(encoding="utf-8")
    assert page.index("In train and in val") < page.index("Numbers") and page.count("<figure>") == 6 and page.count("<img") == 12


def test_copies_within_a_split_are_found_whichever_comes_first(tmp_path):
    folder = tmp_path / "data/train"
    for number, (name, make) in enumerate(COPIES.items()):
        make(photograph(7), folder / name)
    write_split(folder, {name: [CLEAN[number]] for number, name in enumerate(COPIES)} | {"other.png": [CLEAN[7]]})
    _, report = examine(tmp_path)
    copies = report["splits"]["train"]["copies"]
    assert (copies["images"], copies["exact"], copies["near"]) == (5, 0, 5)
    assert {example["second"] for example in copies["listed"]} == {*COPIES} - {"copy.png"} and report["leaks"] == []


def test_pictures_too_plain_to_tell_apart_are_not_called_copies(tmp_path):
    folder = tmp_path / "data/train"
    grain = np.random.default_rng(0).normal(0, 2, (60, 80, 3))
    for number, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 90)]):
        save(Image.new("RGB", (80, 60), colour), folder / f"{number}.png")
        save(Image.fromarray(np.clip(np.array(colour) + np.roll(grain, number), 0, 255).astype(np.uint8)), folder / f"{number}.jpg")
    dot = Image.new("RGB", (80, 60), "white")
    dot.paste((0, 0, 0), (35, 25, 45, 35))
    save(dot, folder / "dot.png")
    names = [*(f"{number}.{kind}" for number in range(4) for kind in ("png", "jpg")), "dot.png"]
    write_split(folder, {name: [f"Picture {name}."] for name in names})
    code, report = examine(tmp_path)
    assert report["splits"]["train"]["pictures"]["too_plain_to_compare"]["count"] == 9
    assert code == 0 and report["findings"] == []


def test_another_object_on_the_same_ground_is_no_copy():
    squares = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((20, 20))).astype(np.uint8) * 200
    moved = [Image.fromarray(squares).convert("RGB") for _ in range(2)]
    for image, place in zip(moved, ((10, 10), (110, 90)), strict=True):
        image.paste((255, 0, 0), (*place, place[0] + 15, place[1] + 15))
    first, second = (np.frombuffer(image.resize((16, 16), Image.Resampling.BOX).tobytes(), dtype=np.uint8)[None] for image in moved)
    assert np.corrcoef(first[0], second[0])[0, 1] > 0.95
    assert not near_duplicates.look_alike(first, second)[0] and near_duplicates.look_alike(first, first)[0]


def test_drawn_scenes_differ_from_each_other(tmp_path):
    facts = [one for batch in look_at_all(scenes.split("train", 300)) for one in batch]
    compared = [one for one in facts if one.look is not None]
    hashes = np.array([one.look for one in compared], dtype=np.uint64)
    pairs = near_duplicates.near_pairs(hashes, np.stack([np.frombuffer(one.thumbnail, dtype=np.uint8) for one in compared]))
    assert len(pairs) == 0 and len(compared) > 200 and all(one.format is None and one.bytes is None for one in facts)


# Kinds of files.


def test_what_a_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    save(photograph(1), tmp_path / "turned.jpg", exif=exif)
    save(photograph(2).convert("CMYK"), tmp_path / "cmyk.jpg")
    save(Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100)), tmp_path / "grey16.png")
    save(photograph(4).convert("RGBA"), tmp_path / "alpha.png")
    save(photograph(4).quantize(16), tmp_path / "palette.png", transparency=0)
    save(photograph(5), tmp_path / "moving.gif", save_all=True, append_images=[photograph(6)])
    save(photograph(7), tmp_path / "still.gif")
    save(photograph(8).convert("L"), tmp_path / "grey.webp")
    facts = {path.name: look_at(FileImage(path)) for path in tmp_path.iterdir()}
    turned = facts.pop("turned.jpg")
    assert (turned.width, turned.height, turned.turned, turned.gps, turned.bytes) == (150, 200, True, True, (tmp_path / "turned.jpg").stat().st_size)
    kinds = {name: (one.format, one.mode, one.alpha, one.animated) for name, one in facts.items()}
    assert kinds == {
        "cmyk.jpg": ("JPEG", "CMYK", False, False), "grey16.png": ("PNG", "I;16", False, False), "alpha.png": ("PNG", "RGBA", True, False),
        "palette.png": ("PNG", "P", True, False), "moving.gif": ("GIF", kinds["moving.gif"][1], False, True), "still.gif": ("GIF", "P", False, False),
        "grey.webp": ("WEBP", "RGB", False, False),
    }  # fmt: skip
    assert not any(one.turned or one.gps for one in facts.values())


def test_a_broken_exif_block_counts_as_none(tmp_path):
    buffer = io.BytesIO()
    photograph(1).save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    (tmp_path / "broken.jpg").write_bytes(buffer.getvalue())
    facts = look_at(FileImage(tmp_path / "broken.jpg"))
    assert not facts.turned and not facts.gps


def test_a_second_frame_of_garbage_is_no_animation(tmp_path):
    buffer = io.BytesIO()
    photograph(1).save(buffer, "GIF")
    frame = buffer.getvalue().removesuffix(b";")
    for number, tail in enumerate((b"\x21\xf9", b"\x2c\xff\xff\xff\xff\xff\xff\xff\xff\x87", b"\x21\xff\x0bNETSCAPE2.0")):
        (tmp_path / f"{number}.gif").write_bytes(frame + tail)
        assert look_at(FileImage(tmp_path / f"{number}.gif")).format == "GIF"


# The text of captions.

SHOWN = {
    "a cafÃ© by the road": ("mojibake", "Ã©"),
    "itâ€™s a dog": ("mojibake", "â€™"),
    "Ð¿Ñ€Ð¸Ð²ÐµÑ‚ to all": ("mojibake", "Ð¿"),
    "a lost \ufffd sign": ("replacement character", "\ufffd"),
    "a dog\x07 barks": ("control character", "\x07"),
    "zero\u200bwidth": ("invisible character", "\u200b"),
    "\ufeffa mark": ("invisible character", "\ufeff"),
    "a \u202etrick": ("invisible character", "\u202e"),
    "salt &amp; pepper": ("HTML", "&amp;"),
    "a <b>bold</b> dog": ("HTML", "<b>"),
    "a dog<br/>runs": ("HTML", "<br/>"),
    "<PERSON> at the sea": ("placeholder", "<PERSON>"),
    "a [NAME] sits": ("placeholder", "[NAME]"),
    "the end</s>": ("placeholder", "</s>"),
    "nan": ("placeholder", "nan"),
    "N/A.": ("placeholder", "N/A."),
    "No caption": ("placeholder", "No caption"),
    "IMG_20190102.jpg": ("placeholder", "IMG_20190102.jpg"),
    "dsc-0012": ("placeholder", "dsc-0012"),
    "Lorem ipsum dolor sit amet": ("placeholder", "Lorem ipsum"),
    "12 / 34 ...": ("no words", "12 / 34 ..."),
    "…": ("no words", "…"),
    "see https://example.org/a.jpg": ("URL", "https://example.org/a.jpg"),
    "from www.example.org/a": ("URL", "www.example.org/a"),
    "ask me@example.org now": ("e-mail address", "me@example.org"),
    "a cafe\u0301": ("not NFC", "cafe\u0301"),
    " a dog": ("spaces", " "),
    "a dog ": ("spaces", " "),
    "a  dog": ("spaces", "  "),
    "A DOG RUNS": ("all capitals", "A DOG RUNS"),
    "a a dog": ("repeated word", "a a"),
    "The the dog": ("repeated word", "The the"),
    "\u200b \u00ad": ("empty", "\u200b \u00ad"),
    "": ("empty", ""),
}  # fmt: skip


@pytest.mark.parametrize("text", SHOWN, ids=ascii)
def test_a_fault_is_shown_by_its_part(text):
    name, part = SHOWN[text]
    assert check(text) == {name: part}


def test_every_fault_is_planted_somewhere():
    assert {name for name, _ in SHOWN.values()} == {*FAULTS, *HABITS}


@pytest.mark.parametrize(
    "text",
    [
        *CLEAN, "TV", "a 2 x 4 & a < b, c > d; AT&T; R&D", "i <3 dogs", "Ein Café im MENÜ – «naïve» ÉTÉ® señor", "犬が走る",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 at home",
        "mail at home @ noon", "It's a dog's life: [sic], (well) {1}", "می\u200cخواهم", "Größe 5–6",
    ],
    ids=ascii,
)  # fmt: skip
def test_clean_text_has_no_fault(text):
    assert check(text) == {}


def test_a_hostile_caption_takes_no_time():
    for text in ("a." * 500_000, "<a " * 300_000, "&" * 10**6, "Ã" * 10**6, " " * 10**6 + "x", "a" * 10**6):
        check(text)
    assert doctor.clip_lengths(["x" * 10**6])[0] > 77


def test_ends_and_scripts():
    assert all(map(ends_with_mark, ["A dog.", "A dog .", 'He said "stop!"', "What?)", "犬。"]))
    assert not any(map(ends_with_mark, ["A dog", "", "a, b,"]))
    assert is_mostly_not_ascii("собака бежит") and not is_mostly_not_ascii("a café") and not is_mostly_not_ascii("123")


def test_token_counts_are_those_of_the_libraries(tmp_path, vocabulary):
    import open_clip

    write_split(tmp_path / "data/train", {f"{number}.png": [text, f"{text} " * 9] for number, text in enumerate(CLEAN)})
    _, report = examine(tmp_path, "--tokenizer", vocabulary)
    texts = [text for one in CLEAN for text in (one, " ".join(f"{one} {one} {one} {one} {one} {one} {one} {one} {one}".split()))]
    library = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    t5 = [len(library.encode(text)) + 1 for text in texts]  # and the end token
    clip = [int((row != 0).sum()) for row in open_clip.tokenize(texts, context_length=400)]
    text = report["splits"]["train"]["text"]
    for found, expected in ((text["t5"]["tokens"], t5), (text["clip_tokens"], clip)):
        assert (found["min"], found["median"], found["max"]) == (min(expected), np.median(expected), max(expected))
        assert found["mean"] == pytest.approx(np.mean(expected), abs=0.006)
    assert text["t5"]["longer"]["count"] == sum(length > 40 for length in t5) > 0
    assert text["longer_than_clip"]["count"] == sum(length > 77 for length in clip) > 0
    assert text["words"]["max"] == max(len(one.split()) for one in texts) and text["characters"]["max"] == max(map(len, texts))


def test_the_limit_of_tokens_is_that_of_training():
    assert data_doctor.Settings().max_caption_tokens == train.Settings().max_caption_tokens


# The whole command.


def test_a_clean_set_has_nothing_to_report(tmp_path, vocabulary, capsys):
    write_split(tmp_path / "data/train", {f"{number}.png": [text] for number, text in enumerate(CLEAN[:5])})
    write_split(tmp_path / "data/val", {f"{number}.png": [text] for number, text in enumerate(CLEAN[5:])})
    code, report = examine(tmp_path, "--tokenizer", vocabulary)
    printed = capsys.readouterr()
    assert code == 0 and report["findings"] == [] and printed.out == ""
    assert "What to do: nothing" in printed.err and str(tmp_path / "data-doctor.html") in printed.err
    assert {name: split["images"] for name, split in report["splits"].items()} == {"train": 5, "val": 3}


HOSTILE = [
    '<script>alert("1")</script> "quoted" \' & <PERSON>',
    "<img src=http://example.org/x.png onerror=alert(2)>",
    "]]> --> </style></body> see https://example.org/?a=b",
]


@pytest.fixture(scope="module")
def sick(tmp_path_factory, vocabulary):
    """(folder, exit code, report) of a data set with every fault once or more."""
    folder = tmp_path_factory.mktemp("sick")
    data = folder / "data"
    captions = {f"f{number}.png": [f"The picture with fault number {number}: {text}."] for number, text in enumerate(SHOWN) if text.strip() == text}
    captions |= {f"clean{number}.png": [text] for number, text in enumerate(CLEAN)}
    captions |= {f"hostile{number}.png": [text] for number, text in enumerate(HOSTILE)}
    captions |= {f"same{number}.png": ["The very same caption"] for number in range(5)}
    captions["unknown.png"] = ["A price of 5 ₿ and ☃ and ☃"]
    captions["digits.png"] = ["12345"]
    captions["long.png"] = ["word " * 100]
    captions["script.png"] = ["ééé ééé"]
    captions["shouting.png"] = ["A DOG RUNS OVER THE LAWN"]
    captions["twice.png"] = ["the same file again"]
    write_split(data / "train", captions)
    (data / "train/twice.png").write_bytes((data / "train/clean0.png").read_bytes())
    save(photograph(900, (400, 40)), data / "train/narrow.png")
    save(photograph(901, (30, 30)), data / "train/tiny.png")
    save(photograph(902), data / "train/moving.gif", save_all=True, append_images=[photograph(903)])
    exif = Image.Exif()
    exif[0x0112] = 3
    exif.get_ifd(0x8825)[1] = "N"
    save(photograph(904), data / "train/phone.jpg", exif=exif)
    save(photograph(905), data / "train/cut.jpg")
    (data / "train/cut.jpg").write_bytes((data / "train/cut.jpg").read_bytes()[:2000])
    (data / "train/text.jpg").write_text("no picture")
    (data / "train/nothing.jpg").touch()
    odd = ("narrow.png", "tiny.png", "moving.gif", "phone.jpg", "cut.jpg", "text.jpg", "nothing.jpg", "missing.jpg")
    write_split(data / "train", captions | {name: [f"A picture with the name {name}."] for name in odd})
    save(Image.open(data / "train/clean1.png"), data / "val/leak.jpg", quality=60)
    write_split(data / "val", {"leak.jpg": [CLEAN[1]], "own.png": ["Nothing like it."]})
    code = run(data, "--output", folder, "--json", folder / "doctor.json", "--tokenizer", vocabulary, "--workers", "1")
    return folder, code, json.loads((folder / "doctor.json").read_text(encoding="utf-8"))


def test_every_planted_fault_is_found(sick):
    _, code, report = sick
    train_split = report["splits"]["train"]
    assert code == 3
    assert train_split["bad_images"]["reasons"] == {"truncated": 1, "format": 1, "empty": 1, "missing": 1}
    # The reader of metadata.jsonl refuses empty captions and collapses spaces, and has no row without a caption.
    unreachable = {"empty", "spaces", "no caption", "near copies", "end marks"}
    expected = [name for name in doctor_findings.ORDER if name not in unreachable]
    found = [finding["name"] for finding in report["findings"]]
    assert set(expected) <= set(found) <= {*expected, "end marks"}
    assert found[0] == "leak" and found[1] == "bad images"
    levels = [finding["level"] for finding in report["findings"]]
    assert levels == sorted(levels), "faults come before notes"
    pictures = train_split["pictures"]
    examples = {name: pictures[name]["listed"] for name in ("tiny", "extreme_aspect_ratio", "animated", "turned_by_exif", "gps")}
    assert examples == {
        "tiny": ["tiny.png"], "extreme_aspect_ratio": ["narrow.png"], "animated": ["moving.gif"], "turned_by_exif": ["phone.jpg"], "gps": ["phone.jpg"],
    }  # fmt: skip
    assert train_split["copies"]["listed"][0] | {"rows": 0} == {"kind": "exact", "distance": 0, "first": "clean0.png", "second": "twice.png", "rows": 0}
    text = train_split["text"]
    assert text["most_repeated"][0] == {"caption": "The very same caption", "images": 5}
    assert "long.png" in text["t5"]["longer"]["listed"] and text["longer_than_clip"]["listed"] == ["long.png"]
    assert {"₿", "☃"} <= set(text["t5"]["unknown"]["characters"]) and "A" not in text["t5"]["unknown"]["characters"]
    assert report["shared_captions"][0] | {"listed": []} == {"splits": ["train", "val"], "captions": 1, "images": 1, "listed": []}


class Page(HTMLParser):
    """What a browser would make of the page: elements with their attributes, and all text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_holds_the_captions_as_text_and_nothing_from_outside(sick):
    folder, _, _ = sick
    source = (folder / "data-doctor.html").read_text(encoding="utf-8")
    page = Page(source)
    text = "".join(page.texts)
    assert all(hostile in text for hostile in HOSTILE)
    tags = {tag for tag, _ in page.elements}
    structure = "html head meta link title style body header main h1 h2 h3 dl dt dd div section p ul li span table thead tbody tr th td"
    assert tags <= {*structure.split(), "mark", "figure", "figcaption", "img"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    style = source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "://" not in style
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:") and "script" not in policy
    assert "\u200b" not in source and "\u202e" not in source and "\\u200b" in source, "what cannot be seen is written out"


def test_the_examples_show_their_pictures(sick):
    folder, _, _ = sick
    page = Page((folder / "data-doctor.html").read_text(encoding="utf-8"))
    pictures = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) >= 9
    for uri in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
        assert max(image.size) <= 160 and not dict(image.getexif())


def test_worker_processes_change_nothing(sick, vocabulary, tmp_path):
    folder, code, report = sick
    assert run(folder / "data", "--output", tmp_path, "--json", tmp_path / "alone.json", "--tokenizer", vocabulary) == code
    assert json.loads((tmp_path / "alone.json").read_text(encoding="utf-8")) == report
    assert (tmp_path / "data-doctor.html").read_bytes() == (folder / "data-doctor.html").read_bytes()


def test_everything_to_take_out_is_listed(tmp_path):
    """The page shows some of the leaks and of the bad images, the JSON has all."""
    write_split(tmp_path / "data/train", {f"{number}.png": [f"Picture {number}."] for number in range(40)})
    names = {f"{number}.png": [f"Another caption {number}."] for number in range(40)} | {f"{number}.jpg": ["Not there."] for number in range(20)}
    (tmp_path / "data/val").mkdir()
    for number in range(40):
        (tmp_path / f"data/val/{number}.png").write_bytes((tmp_path / f"data/train/{number}.png").read_bytes())
    write_split(tmp_path / "data/val", names)
    _, report = examine(tmp_path)
    assert [(one["first"], one["second"], one["rows"]) for one in report["leaks"][0]["listed"]] == [(f"{n}.png", f"{n}.png", [n, n]) for n in range(40)]
    assert [one["id"] for one in report["splits"]["val"]["bad_images"]["listed"]] == [f"{number}.jpg" for number in range(20)]
    page = (tmp_path / "data-doctor.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 24 and "<p>16 more</p>" in page and page.count("no such file") == 8


def test_the_table_has_a_narrow_column_for_each_split_and_tells_leaks(sick):
    _, _, report = sick
    rows = dict(table(report))
    assert rows["same file as one of train"] == ["–", "0"] and rows["looks the same as one of train"] == ["–", "1"]
    assert rows["bad images"] == ["4", "0"] and rows["bad images: missing"] == ["1", "0"]
    assert rows["format JPEG"] == ["1", "1"] and "different image files" not in rows
    assert max(len(cell) for cells in rows.values() for cell in cells) < 24


def test_a_picture_of_several_questions_is_no_copy_of_itself(tmp_path):
    (tmp_path / "data").mkdir()
    for name, seeds in (("train", (1, 2)), ("val", (1, 3))):
        for seed in seeds:
            save(photograph(seed), tmp_path / f"data/images/{name}{seed}.png")
        turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A picture."}] * 3
        records = [{"id": f"{name}{seed}", "image": f"images/{name}{seed}.png", "conversations": turns} for seed in seeds]
        (tmp_path / f"data/{name}.json").write_text(json.dumps(records))
    _, report = examine(tmp_path)
    for split in report["splits"].values():
        assert (split["images"], split["different_files"], split["copies"]["images"]) == (6, 2, 0)
    assert (report["leaks"][0]["images"], report["leaks"][0]["exact"]) == (1, 1)
    assert dict(table(report))["different image files"] == ["2", "2"]


def test_pictures_in_shards_have_the_facts_of_files(tmp_path):
    (tmp_path / "data/train").mkdir(parents=True)
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    buffer = io.BytesIO()
    photograph(1).save(buffer, "JPEG", exif=exif)
    with tarfile.open(tmp_path / "data/train/00000.tar", "w") as tar:
        for name, content in (("0.jpg", buffer.getvalue()), ("0.txt", b"A dog.")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    _, report = examine(tmp_path)
    pictures = report["splits"]["train"]["pictures"]
    assert (pictures["formats"], pictures["file_bytes"]["total"], pictures["gps"]["count"]) == ({"JPEG": 1}, len(buffer.getvalue()), 1)


def test_of_many_near_copies_the_most_doubtful_are_shown_too():
    listed = [{"kind": "near", "distance": distance} for distance in range(60)]
    shown = [one["distance"] for one in doctor_page._some({"listed": listed, "exact": 0})]
    assert shown == [*range(12), *range(48, 60)]


def test_splits_limit_and_stdout(sick, tmp_path, capsys):
    folder, _, _ = sick
    assert run(folder / "data", "--splits", "val", "--limit", "1", "--output", tmp_path, "--json", "-") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert list(report["splits"]) == ["val"] and report["splits"]["val"]["images"] == 1 and report["splits"]["val"]["text"]["t5"] is None
    assert "no T5 token counts" in printed.err and "example.org" not in printed.out
    assert run(folder / "data", "--splits", "val", "--output", tmp_path, "--max-image-pixels", "1000") == 3


def test_what_is_wrong_with_the_command_is_said(sick, tmp_path, capsys):
    folder, _, _ = sick
    for flags, code, said in (
        ([], 2, "name the data"), ([folder / "data", "--limit", "0"], 2, "--limit"), ([folder / "data", "--workers", "-1"], 2, "--workers"),
        ([folder / "data", "--splits", "val,val"], 2, "twice"), ([tmp_path / "none"], 1, "none"), ([folder / "data", "--splits", "dev"], 1, "no split 'dev'"),
        ([folder / "data", "--tokenizer", tmp_path / "none"], 1, "no such sentencepiece file"),
    ):  # fmt: skip
        assert run(*flags) == code
        assert re.search(rf"^error: .*{re.escape(said)}", capsys.readouterr().err, re.MULTILINE)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(empty) == 1 and "no sub-folders" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    write_split(tmp_path / "data/train", {f"{number}.png": ["a \x1b[31mred\x1b[0m dog\u202e"] for number in range(3)})
    run(tmp_path / "data", "--output", tmp_path)
    assert "\x1b" not in capsys.readouterr().err
