"""Captioning files and folders: which pictures, where the captions go, kills and undo, against the filesystem and other readers of the formats."""

import csv
import errno
import fcntl
import hashlib
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import evaluate
from captioner import caption_files, caption_targets, checkpoint, cli, generate, sidecars
from captioner.caption_journal import FILE_NAME
from captioner.errors import UserError
from captioner.pictures import find_pictures, place_of
from data.readers import metadata_jsonl
from tests.conftest import COLOURS, REPOSITORY, tiny_train_flags, write_tiny_data
from tests.evil_images import make_evil

sys.path.insert(0, str(REPOSITORY / "scripts"))
import caption  # noqa: E402


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """A trained run; its data folder is `data` beside it."""
    import train

    folder = tmp_path_factory.mktemp("tiny")
    flags = tiny_train_flags(write_tiny_data(folder / "data"), folder)
    assert train.main([*flags, "--max-steps", "40", "--lr", "5e-3", "--eval-every", "40"]) == 0
    return folder / "run"


@pytest.fixture
def run(tiny_run, capsys):
    """run(*flags) → (exit code, summary, stderr)."""

    def call(*flags, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            named = [] if "--undo" in flags else ["--run", tiny_run, "--decode", "greedy", "--device", "cpu"]
            cli.run_command(caption.main, [str(flag) for flag in (*flags, *named, "--json", "-")], expected=(ValueError,))
        captured = capsys.readouterr()
        assert exit_info.value.code == code, captured.err
        return (json.loads(captured.out) if captured.out else None), captured.err

    return call


def draw(folder: Path, *names: str) -> Path:
    """A folder of small pictures, each of its own colour."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), COLOURS[index % len(COLOURS)]).save(folder / name)
    return folder


def snapshot(folder: Path) -> dict:
    """Every entry but the journal: content, permissions and time of files, the target of links."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.name == FILE_NAME or path.is_dir() and not path.is_symlink():
            continue
        status = path.lstat()
        entries[str(path)] = os.readlink(path) if path.is_symlink() else (path.read_bytes(), stat.S_IMODE(status.st_mode), status.st_mtime_ns)
    return entries


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.txt"))}


# ---- which pictures ------------------------------------------------------------------------------------------


def test_files_folders_and_globs_in_an_order_that_stays(tmp_path):
    draw(tmp_path, "b.png", "a.jpg", "sub/c.JPG", "sub/deeper/d.webp", ".hidden/e.png", "sub/.f.png", "z/g.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "sub" / "loop2").symlink_to(tmp_path)
    notes = []

    def names(*words):
        return [os.path.relpath(path, tmp_path) for path in find_pictures([str(tmp_path / word) for word in words], notes.append)]

    everything = ["a.jpg", "b.png", "sub/c.JPG", "sub/deeper/d.webp", "z/g.png"]
    assert names(".") == everything
    assert len(notes) == 2 and "loop is a symlink" in notes[0]
    assert names("*.jpg", "z") == ["a.jpg", "z/g.png"]
    assert sorted(names("**/*.*")) == sorted(everything) and names("**/[cd].*") == ["sub/c.JPG", "sub/deeper/d.webp"]
    assert names("b.png", "b.png", "sub/../b.png", "*") == ["b.png", "a.jpg", "sub/c.JPG", "sub/deeper/d.webp", "z/g.png"], "each once"
    assert names(".hidden", "sub/.f.png") == [".hidden/e.png", "sub/.f.png"], "hidden ones that are named"
    assert names("sub/loop/z") == ["sub/loop/z/g.png"]
    draw(tmp_path, "odd[1].png")
    assert names("odd[1].png") == ["odd[1].png"], "a file that is there is no glob"


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["missing"], 1, "missing: no such file or folder"),
        (["*.gif"], 1, "*.gif: no pictures there"),
        (["empty"], 1, "empty: no pictures there"),
        (["a.jpg", "notes.txt"], 1, "notes.txt: not a picture by its name"),
        ([], 2, "name pictures"),
        (["a.jpg", ""], 2, "one of the PATHS is empty"),
        (["**.jpg"], 1, "**.jpg: Invalid pattern"),
        (["a.jpg", "--format", "csv", "--output", "nowhere/x.csv"], 1, "nowhere/x.csv: its folder is not there"),
        (["a.jpg", "--journal", "pipe"], 1, "the journal pipe: is not a regular file"),
        (["a.jpg", "--journal", "link"], 1, "the journal link: is a symlink"),
        (["a.jpg", "--best-of", "3", "--decode", "beam"], 2, "--best-of chooses among samples"),
        (["a.jpg", "--format", "csv"], 2, "--output FILE goes with"),
        (["a.jpg", "--output", "x.json"], 2, "--output FILE goes with"),
        (["a.jpg", "--ext", "jpg"], 2, "no extension for text files"),
        (["a.jpg", "--ext", "../x"], 2, "no extension for text files"),
        (["a.jpg", "--watch"], 2, "--watch takes folders"),
        (["a.jpg", "--prefix", " "], 2, "--prefix is empty"),
        (["a.jpg", "--existing", "merge"], 2, "overwrite"),
        (["--undo", "."], 1, "nothing to undo"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_done(tmp_path, monkeypatch, capsys, words, code, named):
    draw(tmp_path, "a.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("notes.txt")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(caption.main, [*words, "--run", "nowhere"], expected=(ValueError,))
    assert exit_info.value.code == code and named in capsys.readouterr().err
    (tmp_path / "pipe").unlink()
    assert snapshot(tmp_path) == before and not (tmp_path / FILE_NAME).exists()


def test_a_folder_that_is_a_link_may_lead_elsewhere_by_the_next_search(tmp_path):
    draw(tmp_path, "one/a.png", "two/a.png")
    for name in ("one", "two"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(name)
        assert [place_of(path) for path in find_pictures([str(tmp_path / "link")], print)] == [tmp_path / name / "a.png"]


def test_pictures_that_share_a_sidecar(tmp_path, run):
    draw(tmp_path, "a.jpg", "a.png", "sub/a.jpg")
    _, err = run(tmp_path, code=1)
    assert "a.jpg, " in err and "a.png → a.txt" in err and "sub" not in err and texts(tmp_path) == {}
    run(tmp_path, "--sidecar-name", "full")
    assert list(texts(tmp_path)) == ["a.jpg.txt", "a.png.txt", "sub/a.jpg.txt"]


# ---- the captions are the model's --------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["greedy", "beam", "sample"])
def test_captions_are_those_of_evaluate(tiny_run, tmp_path, monkeypatch, decode):
    data = tiny_run.parent / "data"
    assert evaluate.main([str(tiny_run), "--decode", decode, "--no-report", "--device", "cpu", "--output", str(tmp_path / decode)]) == 0
    lines = [json.loads(line) for line in (tmp_path / decode / "captions.jsonl").read_text().splitlines()]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in (data / "val").glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    code = caption.main([str(folder), "--run", str(tiny_run), "--decode", decode, "--device", "cpu", "--ext", "caption"])
    found = {line["image_id"].replace(".png", ".caption"): " ".join(line["caption"].split()) + "\n" for line in lines}
    expected = {name: text for name, text in found.items() if text.strip()}
    assert expected and code == (0 if len(expected) == 4 else 3), "of an empty caption the picture is named"
    assert {path.name: path.read_text() for path in folder.glob("*.caption")} == expected


def test_a_prefix_is_what_the_decoder_is_made_to_begin_with(tiny_run, tmp_path, run):
    folder = draw(tmp_path / "p", "a.png", "b.png")
    run(folder, "--prefix", "everything  here")
    model, tokenizer, transform = checkpoint.load(tiny_run, merge=True)
    ids = tokenizer.encode(["everything here"])[0][:-1]
    pixels = [transform(Image.open(folder / name).convert("RGB")) for name in ("a.png", "b.png")]
    import torch

    with torch.no_grad():
        found = tokenizer.decode(generate.greedy(model, model.encode(torch.stack(pixels)), prefix_ids=ids))
    assert [(folder / name).read_text() for name in ("a.txt", "b.txt")] == [" ".join(text.split()) + "\n" for text in found]
    assert all(text.startswith("everything here") for text in found)
    _, err = run(folder, "--prefix", "日本", "--existing", "overwrite", code=1)
    assert "can only write" in err


def test_best_of_keeps_what_the_reranker_likes_best(tmp_path, tiny_run, monkeypatch):
    folder = draw(tmp_path / "p", "a.png", "b.png", "c.png")
    seen = []
    from captioner import clip_score

    def longest(scorer, embeddings, candidates):
        import torch

        seen.extend(candidates)
        return torch.tensor([[float(len(text)) for text in own] for own in candidates])

    monkeypatch.setattr(clip_score, "score_candidates", longest)
    flags = ["--best-of", "5", "--reranker", "ViT-Tiny-Scenes:demo", "--temperature", "2", "--top-k", "0", "--top-p", "1"]
    assert caption.main([str(folder), "--run", str(tiny_run), "--device", "cpu", *flags]) == 0
    assert [len(own) for own in seen] == [5, 5, 5] and len({text for own in seen for text in own}) > 5
    assert [path.read_text().strip() for path in sorted(folder.glob("*.txt"))] == [" ".join(max(own, key=len).split()) for own in seen]


# ---- pictures that have a caption --------------------------------------------------------------------------------


def test_a_caption_that_is_there(tmp_path, run):
    folder = draw(tmp_path / "p", "a.png", "b.png")
    run(folder)
    fresh = (folder / "a.txt").read_text()
    (folder / "a.txt").write_text("mine")
    (folder / "a.png").write_bytes(b"not even opened")
    summary, _ = run(folder)
    assert (summary["skipped"], summary["captioned"], summary["run"]) == (2, 0, None) and (folder / "a.txt").read_text() == "mine"
    draw(folder, "a.png")
    run(folder, "--existing", "append")
    assert (folder / "a.txt").read_text() == "mine\n" + fresh
    run(folder, "--existing", "prepend")
    assert (folder / "a.txt").read_text() == fresh + "mine\n" + fresh
    (folder / "b.txt").chmod(0o600)
    run(folder, "--existing", "overwrite")
    assert (folder / "a.txt").read_text() == fresh and stat.S_IMODE((folder / "b.txt").stat().st_mode) == 0o600


def test_sidecars_that_are_not_touched(tmp_path, run):
    folder, outside = draw(tmp_path / "p", "a.png", "b.png", "c.png", "d.png", "e.png"), tmp_path / "outside.txt"
    outside.write_text("secret")
    (folder / "a.txt").symlink_to(outside)
    (folder / "b.txt").symlink_to(tmp_path / "not-there")
    (folder / "c.txt").mkdir()
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    summary, err = run(folder, "--existing", "append", code=3)
    assert outside.read_text() == "secret" and not (tmp_path / "not-there").exists() and (folder / "d.txt").read_bytes() == b"\xff\xfe"
    assert summary["refused"] == 4 and summary["captioned"] == 1 and (folder / "e.txt").is_file()
    assert "a.txt: is a symlink" in err and "b.txt: is a symlink" in err and "c.txt: " in err and "d.txt: is not UTF-8" in err
    summary, _ = run(folder, code=3)
    assert summary["refused"] == 2 and summary["skipped"] == 3, "one that leads nowhere is no caption, one that leads to a file is"


def test_bad_pictures_are_named_and_the_others_captioned(tmp_path, run):
    folder = draw(tmp_path / "p", "a.png", "z.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture")
    (folder / "folder.jpg").mkdir()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "phone.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(50))
    summary, err = run(folder, "--batch-size", "2", code=3)
    bad = {Path(line["id"]).name for line in summary["bad_images"]}
    assert bad == {"cut.png", "empty.jpg", "text.jpg", "folder.jpg", "loop.png", "gone.png", "pipe.png", "phone.heic"}
    assert all(name in err for name in bad) and list(texts(folder)) == ["a.txt", "z.txt"] and summary["captioned"] == 2


@pytest.mark.parametrize("workers", ["0", "2"])
def test_evil_pictures_are_listed_beside_the_journal(tmp_path, run, workers):
    reasons = make_evil(tmp_path / "p")
    draw(tmp_path / "p", "a.png")
    before = sorted(path.name for path in (tmp_path / "p").iterdir())
    summary, err = run(tmp_path / "p", "--workers", workers, code=3)
    found = [json.loads(line) for line in (tmp_path / "p" / "bad_images.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name: line["reason"] for line in found} == {name: reason for name, reason in reasons.items() if reason}
    assert all(line["sha256"] == hashlib.sha256(Path(line["path"]).read_bytes()).hexdigest() for line in found if line["reason"] == "truncated")
    assert all(f"{name}: " in err for name, reason in reasons.items() if reason)
    listed = (tmp_path / "p" / "bad_images.jsonl").read_bytes()
    assert run(tmp_path / "p", code=3)[0]["captioned"] == 0
    assert (tmp_path / "p" / "bad_images.jsonl").read_bytes() == listed
    assert summary["captioned"] == 1 + sum(reason is None for reason in reasons.values())
    assert caption.main([str(tmp_path / "p"), "--undo"]) == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == before


def test_a_list_of_bad_pictures_that_is_somebody_elses_stays(tmp_path, run):
    folder = draw(tmp_path / "p", "a.png")
    (folder / "bad_images.jsonl").write_text("my own notes\n")
    with pytest.raises(UserError, match="is not a list of bad pictures"):
        caption.main([str(folder), "--run", "nowhere"])
    assert (folder / "bad_images.jsonl").read_text() == "my own notes\n" and not (folder / "a.txt").exists()


def test_names_do_not_steer_the_terminal(tmp_path, run):
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "\x1b[31m\nred.png").write_text("no picture")
    _, err = run(folder, code=3)
    assert "\x1b" not in err and "\\x1b[31m red.png" in err
    draw(folder, "\x1b[2J.png", "\x1b[2J.jpg")
    _, err = run(folder, code=1)
    assert "\x1b" not in err and "\\x1b[2J.jpg" in err


def test_a_picture_that_is_replaced_while_it_is_captioned(tmp_path, run, monkeypatch):
    folder = draw(tmp_path / "p", "a.png", "b.png")
    captions_of = caption.Captioning.captions_of

    def replace_and_caption(call, batch):
        Image.new("RGB", (41, 31), "white").save(folder / "a.png")
        return captions_of(call, batch)

    monkeypatch.setattr(caption.Captioning, "captions_of", replace_and_caption)
    _, err = run(folder, code=3)
    assert "a.png: was changed while it was captioned" in err and list(texts(folder)) == ["b.txt"]
    monkeypatch.undo()
    assert run(folder)[0]["captioned"] == 1 and list(texts(folder)) == ["a.txt", "b.txt"]


def test_a_folder_that_cannot_be_written_costs_no_captioning(tmp_path, run, monkeypatch):
    folder = draw(tmp_path / "p", "a.png", "b.png")
    (folder / "a.txt").write_text("mine")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    summary, err = run(folder, code=3)
    assert (summary["run"], summary["skipped"], summary["refused"]) == (None, 1, 1) and "b.txt: its folder cannot be written" in err


def test_nothing_of_a_picture_but_its_name_is_written(tmp_path, run):
    exif = Image.Exif()
    exif[0x010E] = "the secret of the description"
    exif.get_ifd(0x8825)[2] = (48.0, 8.0, 15.0)
    folder = tmp_path / "p"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "a.jpg", exif=exif, comment=b"another secret")
    assert b"secret" in (folder / "a.jpg").read_bytes()
    run(folder)
    run(folder, "--format", "coco", "--output", tmp_path / "c.json")
    for path in (folder / "a.txt", folder / FILE_NAME, tmp_path / "c.json"):
        assert b"secret" not in path.read_bytes() and b"48.0" not in path.read_bytes()
    assert json.loads((tmp_path / "c.json").read_text())["images"] == [{"id": 1, "file_name": "p/a.jpg"}]


# ---- one file for all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["metadata.jsonl", "coco", "csv"])
def test_one_file_for_all(tmp_path, run, kind):
    names = ["a.png", 'quote"s, and commas.png', "=1+1.png", "-x.png", "sub/line\nbreak.png", "日本.png"]
    folder, out = draw(tmp_path / "val", *names), tmp_path / "val" / "metadata.jsonl"
    run(folder)
    expected = {name: (folder / name).with_suffix(".txt").read_text().strip() for name in names}
    run(folder, "--format", kind, "--output", out)
    if kind == "metadata.jsonl":
        found = {row.id: row.captions[0] for row in metadata_jsonl.read(tmp_path, "val")}
    elif kind == "coco":
        content = json.loads(out.read_text())
        ids = {image["id"]: image["file_name"] for image in content["images"]}
        found = {ids[line["image_id"]]: line["caption"] for line in content["annotations"]}
    else:
        rows = list(csv.DictReader(out.open(newline="")))
        assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
        assert all((folder / row["file_name"]).is_file() for row in rows)
        found = {row["file_name"].removeprefix("./"): row["caption"] for row in rows}
    assert found == expected
    summary, _ = run(folder, "--format", kind, "--output", out)
    assert summary["skipped"] == 6
    whole = out.read_bytes()
    draw(folder, "new.png")
    assert run(folder, "--format", kind, "--output", out)[0]["captioned"] == 1
    run(folder, "--format", kind, "--output", out, "--undo")
    assert out.read_bytes() == whole
    run(folder, "--format", kind, "--output", out, "--undo")
    assert not out.exists()


def test_a_job_that_never_wrote_its_file_can_be_undone(tmp_path, run, monkeypatch):
    folder, out = draw(tmp_path / "p", "a.png"), tmp_path / "out" / "c.csv"
    out.parent.mkdir()
    captions_of = caption.Captioning.captions_of

    def remove_and_caption(call, batch):
        out.parent.rmdir()
        return captions_of(call, batch)

    monkeypatch.setattr(caption.Captioning, "captions_of", remove_and_caption)
    _, err = run(folder, "--format", "csv", "--output", out, code=1)
    assert "c.csv: cannot be written" in err
    assert run(folder, "--undo", "--output", out)[0]["restored"] == 0
    assert not (folder / FILE_NAME).exists()


def test_a_caption_ends_its_line_as_the_others_do():
    old = b"\xef\xbb\xbfone\r\ntwo"
    assert sidecars.compose(old, "new", "append", Path("f")) == old + b"\r\nnew\r\n"
    assert sidecars.compose(old, "new", "prepend", Path("f")) == b"\xef\xbb\xbfnew\r\none\r\ntwo"
    assert sidecars.compose(old, "new", "overwrite", Path("f")) == b"new\n"


def test_what_a_file_of_captions_has_of_other_pictures_stays():
    given = {
        "metadata.jsonl": '{"file_name": "x.png", "text": "old", "score": 1}\n{"file_name": "y.png", "captions": ["one", "two"]}\n',
        "coco": json.dumps(
            {"info": {"year": 1}, "images": [{"id": 7, "file_name": "x.png"}, {"id": 9, "file_name": "y.png"}],
             "annotations": [{"id": 3, "image_id": 7, "caption": "old"}]}
        ),
        "csv": "file_name,caption\nx.png,'=old\ny.png,one\ny.png,two\n",
    }  # fmt: skip
    found = {}
    for kind, text in given.items():
        file = caption_files.parse(kind, text.encode(), Path("f"))
        file.put("x.png", "new", "append")
        file.put("z.png", "@first", "skip")
        found[kind] = file.text()
    lines = [json.loads(line) for line in found["metadata.jsonl"].splitlines()]
    assert lines[0] == {"file_name": "x.png", "text": ["old", "new"], "score": 1} and lines[1]["captions"] == ["one", "two"] and lines[2]["caption"] == "@first"
    coco = json.loads(found["coco"])
    assert coco["info"] == {"year": 1} and coco["images"][2] == {"id": 10, "file_name": "z.png"}
    assert [(own["id"], own["image_id"], own["caption"]) for own in coco["annotations"]] == [(3, 7, "old"), (4, 7, "new"), (5, 10, "@first")]
    assert found["csv"] == "file_name,caption\nx.png,'=old\nx.png,new\ny.png,one\ny.png,two\nz.png,'@first\n"


@pytest.mark.parametrize(
    ("kind", "data"),
    [("metadata.jsonl", b"{\n"), ("metadata.jsonl", b"[]\n"), ("coco", b"[]"), ("coco", b'{"images": [{}], "annotations": []}'), ("csv", b"a,b\n"), ("csv", b"\xff")],
)
def test_another_file_is_not_overwritten(kind, data):
    with pytest.raises(UserError, match="^f: not a file of captions in the format"):
        caption_files.parse(kind, data, Path("f"))


# ---- kills, signals, undo ----------------------------------------------------------------------------------------

NAMES = [f"{letter}{number}.png" for letter in "ab" for number in range(3)]


def killed_at(flags: list[str], left: int) -> int:
    """The command in a process of its own, which gets SIGKILL after `left` openings, writes, renamings and syncs of files; its status, as of os.waitpid."""
    import torch

    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)  # OpenMP's threads are not in the child

        def counted(function):
            def call(*arguments, **named):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return call

        for name in ("open", "write", "replace", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        code = caption.main(flags)
    finally:
        os._exit(code)


def prepare(folder: Path) -> Path:
    """Six pictures, three of them with a sidecar, and a file of captions with one."""
    draw(folder, *NAMES)
    for name in NAMES[::2]:
        (folder / name).with_suffix(".txt").write_text("before")
        os.utime((folder / name).with_suffix(".txt"), ns=(10**18, 10**18))
    (folder / "captions.jsonl").write_text('{"file_name": "a0.png", "caption": "before"}\n')
    return folder


@pytest.mark.parametrize("kind", ["sidecars", "metadata.jsonl"])
def test_a_kill_at_any_moment(tiny_run, tmp_path, run, kind):
    """Every file is the old or the new one; the same command then does each picture once, as if undisturbed; --undo puts all back."""

    def flags(folder):
        output = [] if kind == "sidecars" else ["--format", kind, "--output", str(folder / "captions.jsonl")]
        return [str(folder), *output, "--existing", "append", "--batch-size", "4"]

    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".txt", ".jsonl") and path.name != FILE_NAME}

    undisturbed = prepare(tmp_path / "undisturbed")
    old = contents(undisturbed)
    run(*flags(undisturbed))
    new = contents(undisturbed)
    assert new != old and (kind != "sidecars" or len(new) == 7 and all(len(new[f"{name[:-4]}.txt"].splitlines()) == 2 for name in NAMES[::2]))
    step = 4 if kind == "sidecars" else 1
    for left in itertools.count(2, step):
        folder = prepare(tmp_path / str(left))
        before = snapshot(folder)
        status = killed_at([*flags(folder), "--run", str(tiny_run), "--decode", "greedy", "--device", "cpu"], left)
        if not os.WIFSIGNALED(status):
            assert left > 8 * step and os.waitstatus_to_exitcode(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = contents(folder)
        assert all(content in (old.get(name), new[name]) for name, content in found.items()), "no partial file"
        assert old.keys() <= found.keys()
        run(*flags(folder))
        assert contents(folder) == new and not list(folder.glob(".captioning*"))
        run(*flags(folder), "--undo")
        assert snapshot(folder) == before and not (folder / FILE_NAME).exists()
        run(*flags(folder), "--undo", code=1)


def test_batches_that_follow_fast_wait_for_the_disk_together(tmp_path, run, monkeypatch):
    syncs = []  # the sidecars that were there before each wait
    fsync = os.fsync

    def counted(descriptor):
        syncs.append(len(texts(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    for pause, expected in ((100.0, [0]), (0.0, [0, 1, 2, 3, 4, 5])):
        monkeypatch.setattr(caption_targets, "PAUSE", pause)
        syncs.clear()
        run(draw(tmp_path, *NAMES), "--batch-size", "1")
        assert len(texts(tmp_path)) == 6 and syncs == expected
        run(tmp_path, "--undo")


def test_a_disk_that_gets_full(tmp_path, run, monkeypatch):
    folder = prepare(tmp_path / "p")
    before, write = snapshot(folder), os.write
    for room in (1, 2, 4):
        left = room

        def write_while_there_is_room(descriptor, data):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_while_there_is_room)
            _, err = run(folder, "--existing", "append", code=1)
        assert err.splitlines()[-1].endswith(": cannot be written: the disk is full") and str(folder) in err.splitlines()[-1]
        assert not list(folder.glob(".captioning*"))
    assert run(folder, "--existing", "append")[0]["captioned"] == 6
    run(folder, "--undo")
    assert snapshot(folder) == before


def test_a_journal_is_for_its_owner_and_was_not_taken_away(tmp_path, run, monkeypatch):
    folder = draw(tmp_path / "p", "a.png")
    run(folder)
    assert stat.S_IMODE((folder / FILE_NAME).stat().st_mode) == 0o600, "it has the old content of files that may be private"
    lockf = fcntl.lockf

    def lose_and_lock(file, how):
        (folder / FILE_NAME).unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", lose_and_lock)
    _, err = run(folder, "--existing", "overwrite", code=1)
    assert "is in use by another process" in err


def test_undo_puts_back_content_permissions_and_times(tmp_path, run):
    folder = prepare(tmp_path / "p")
    (folder / "a0.txt").chmod(0o640)
    (folder / "a2.txt").write_bytes(b"\xffnot UTF-8")
    before = snapshot(folder)
    run(folder, "--existing", "overwrite")
    first = texts(folder)
    run(folder, "--existing", "append")
    assert len(texts(folder)["b0.txt"].splitlines()) == 2
    summary, _ = run(folder, "--undo")
    assert summary["restored"] == 6 and texts(folder) == first
    assert run(folder, "--undo")[0]["restored"] == 6
    assert snapshot(folder) == before
    _, err = run(folder, "--undo", code=1)
    assert "nothing to undo" in err and not (folder / FILE_NAME).exists()


def test_undo_leaves_what_was_changed_since(tmp_path, run):
    folder, outside = draw(tmp_path / "p", "a.png", "b.png", "c.png", "d.png"), tmp_path / "outside.txt"
    run(folder)
    caption_of_c = (folder / "c.txt").read_bytes()
    (folder / "a.txt").write_text("better")
    (folder / "c.txt").unlink()
    outside.write_bytes(caption_of_c)
    (folder / "c.txt").symlink_to(outside)
    summary, err = run(folder, "--undo", code=3)
    assert summary["restored"] == 2 and "a.txt: was changed since" in err and "c.txt: is a symlink" in err
    assert (folder / "a.txt").read_text() == "better" and outside.read_bytes() == caption_of_c
    assert not (folder / "b.txt").exists() and not (folder / "d.txt").exists()


def test_a_journal_from_elsewhere_reaches_no_file_outside(tmp_path, run):
    folder, victim = draw(tmp_path / "p", "a.png"), tmp_path / "victim.txt"
    victim.write_text("known\n")
    run(folder)
    lines = [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]
    lines[1] |= {"file": "../victim.txt", "sha256": sidecars.read(victim).sha256, "old": {"text": "evil", "mode": 511, "changed": 0}}
    (folder / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, err = run(folder, "--undo", code=3)
    assert victim.read_text() == "known\n" and "victim.txt: is not below the paths given" in err
    lines[1] |= {"sha256": "0", "old": {"text": "known\n", "mode": 511, "changed": 0}}
    (folder / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    (folder / "a.txt").unlink()
    run(folder)
    assert victim.read_text() == "known\n"


def test_a_torn_or_damaged_journal(tmp_path, run):
    folder = draw(tmp_path / "p", *NAMES)
    run(folder)
    whole, journal = texts(folder), folder / FILE_NAME
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:30])
    for name in NAMES[3:]:
        (folder / name).with_suffix(".txt").unlink()
    summary, _ = run(folder)
    assert (summary["captioned"], summary["captioned_before"]) == (6, 3) and texts(folder) == whole
    for torn in (b"", b"{", b'{"event": "jo'):
        journal.write_bytes(torn)
        assert run(folder)[0]["skipped"] == 6 and not journal.exists()
    journal.write_bytes(b"".join(lines[:2]) + b"{}\n" + b"".join(lines[3:]))
    _, err = run(folder, code=1)
    assert f"{FILE_NAME}: line 3 is damaged" in err


@pytest.mark.parametrize("content", [b"a note without a newline", b"two\nlines", b"\xff\xd8\xff\n\xe0", b"\n"])
def test_a_file_that_is_no_journal_stays(tmp_path, run, content):
    folder, other = draw(tmp_path / "p", "a.png"), tmp_path / "other"
    other.write_bytes(content)
    _, err = run(folder, "--journal", other, code=1)
    assert str(other) in err and other.read_bytes() == content
    _, err = run(folder, "--format", "csv", "--output", tmp_path / "j", "--journal", tmp_path / "j", code=2)
    assert "--output is the journal" in err


def test_an_unfinished_job_goes_on_with_its_own_settings_alone(tmp_path, run):
    folder = draw(tmp_path / "p", *NAMES)
    run(folder)
    journal = folder / FILE_NAME
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:4]))
    (folder / "b2.txt").unlink()
    _, err = run(folder, "--prefix", "a", code=1)
    assert "holds an unfinished job with other settings: prefix None (now a)" in err and not (folder / "b2.txt").exists()
    summary, _ = run(folder, "--batch-size", "2")
    assert summary["captioned_before"] == 3


def test_one_process_at_a_time(tmp_path, run):
    folder = draw(tmp_path / "p", "a.png")
    code = "import sys, pathlib; from captioner.caption_journal import CaptionJournal as J\n"
    code += "journal = J(pathlib.Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, folder / FILE_NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
        other.stdout.readline()
        _, err = run(folder, code=1)
        assert "is in use by another process" in err
        other.stdin.close()
    run(folder)


def test_a_signal_stops_after_a_batch_and_names_the_command(tmp_path, run, monkeypatch):
    folder = draw(tmp_path / "p", *NAMES)
    add = caption.Sidecars.add

    def add_and_signal(target, captions):
        os.kill(os.getpid(), signal.SIGTERM)
        return add(target, captions)

    monkeypatch.setattr(caption.Sidecars, "add", add_and_signal)
    summary, err = run(folder, "--batch-size", "2", code=143)
    assert summary["captioned"] == 2 and len(texts(folder)) == 2
    assert "stopped with 2 of 6 pictures captioned; go on with: python scripts/caption.py" in err
    monkeypatch.undo()
    summary, _ = run(folder, "--batch-size", "2")
    assert (summary["captioned"], summary["captioned_before"]) == (6, 2)


def test_watching_a_folder(tiny_run, tmp_path):
    """Pictures that arrive are captioned, half-copied ones when they are whole, until SIGTERM."""
    folder = draw(tmp_path / "p", "a.png")
    (tmp_path / "p" / "new").mkdir()
    words = [folder, "--run", tiny_run, "--device", "cpu", "--decode", "greedy", "--watch", "--json", tmp_path / "counts.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def wait_for(path: Path) -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    with subprocess.Popen([sys.executable, REPOSITORY / "scripts" / "caption.py", *words], env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(folder / "a.txt")
            content = (folder / "a.png").read_bytes()
            with open(folder / "new" / "b.png", "wb") as file:
                for start in range(0, len(content), len(content) // 6):
                    file.write(content[start : start + len(content) // 6])
                    file.flush()
                    time.sleep(0.3)
                assert not (folder / "new" / "b.txt").exists(), "a half-copied file waits"
            wait_for(folder / "new" / "b.txt")
            draw(folder, "a.jpg")
            time.sleep(2)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 143 and "go on with: python scripts/caption.py" in err and "bad" not in err.split("captioned, ")[0]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["captioned"], counts["bad"]) == (2, 0)
    assert (folder / "new" / "b.txt").read_text() == (folder / "a.txt").read_text()
