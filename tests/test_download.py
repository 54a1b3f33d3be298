"""The downloader against a server that misbehaves, and its parts against what they must never do."""

import asyncio
import contextlib
import datetime
import email.utils
import gc
import hashlib
import io
import ipaddress
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("aiohttp")

from yarl import URL

from captioner.errors import UsageError, UserError
from data.addresses import AddressError, UrlError, address_problem, checked_url
from data.download import WINDOW, Download, Job, Pace, Result
from data.download_store import Store
from data.fetch import CheckedResolver, Fetcher, Limits, Picture, retry_after
from data.readers import metadata_jsonl
from data.received import MAX_SCANS, Failure, Unpacking
from data.rows import DataError
from data.url_list import read_list
from tests import hostile_server
from tests.conftest import REPOSITORY
from tests.hostile_server import BOMB, GOOD, MAX_BYTES, REASONS, ROBOTS, HostileServer, kinds, picture

sys.path.insert(0, str(REPOSITORY / "scripts"))

import download_cc3m

SCRIPT = REPOSITORY / "scripts" / "download_cc3m.py"
QUICK = ("--allow-loopback", "--timeout", "1.5", "--total-timeout", "4", "--max-bytes", str(MAX_BYTES), "--backoff", "0.1", "--max-wait", "2")


def command(*words) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, words), *QUICK]


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=120)


def write_list(path: Path, server: HostileServer, row_kinds: list[str]) -> Path:
    """A list of one row for each kind, spread over twenty hosts."""
    lines = [f"caption of {row}\thttp://127.0.0.{2 + (row + row // 20) % 20}:{server.port}/{kind}/{row}\n" for row, kind in enumerate(row_kinds, 1)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def images(folder: Path) -> dict[int, bytes]:
    """The bytes of every image that has its name, by row."""
    return {int(path.stem): path.read_bytes() for path in folder.iterdir() if path.suffix in (".jpg", ".png")}


def peak_memory(process: subprocess.Popen) -> float:
    """MB that the process has held at most until now."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def test_two_thousand_rows_of_a_hostile_server(tmp_path):
    row_kinds = list(kinds(2000))
    assert min(Counter(row_kinds)[kind] for kind in hostile_server.EVIL) == 100
    memory = {}
    with HostileServer() as server:
        path = write_list(tmp_path / "list.tsv", server, row_kinds)
        words = command(path, tmp_path / "out", "--concurrency", "128", "--per-host", "8", "--json", tmp_path / "counts.json")
        with open(tmp_path / "stderr", "w+") as stderr, subprocess.Popen(words, stderr=stderr) as process:
            begun = time.monotonic()
            while process.poll() is None:
                assert time.monotonic() - begun < 120, "the download hangs"
                time.sleep(0.1)
                if (tmp_path / "out/train/manifest.jsonl").exists() and Path(f"/proc/{process.pid}/status").exists():
                    memory[(tmp_path / "out/train/manifest.jsonl").stat().st_size] = peak_memory(process)
        assert process.returncode == 3
    folder = tmp_path / "out" / "train"
    records = {record["row"]: record for record in manifest(folder)}
    assert len(records) == len(manifest(folder)) == 2000
    expected = {row: picture(row) for row, kind in enumerate(row_kinds, 1) if kind in GOOD}
    assert images(folder) == expected
    for row, kind in enumerate(row_kinds, 1):
        record = records[row]
        if kind in GOOD:
            assert (record["status"], record["sha256"]) == ("ok", hashlib.sha256(expected[row]).hexdigest()), record
            assert (record["width"], record["height"]) == (24 + row % 5, 16)
            assert record["tries"] >= (2 if kind in ("busy", "flaky") else 1), record
        else:
            assert record["status"] == "failed" and record["reason"] in REASONS[kind], (kind, record)
            assert record["tries"] == 4 or kind not in ("reset", "silent", "short"), record
    rows = metadata_jsonl.read(tmp_path / "out", "train")
    assert [row.id.partition(".")[0] for row in rows] == [f"{row:06d}" for row in sorted(expected)]
    assert rows[0].captions == (f"caption of {min(expected)}",)
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["rows"], counts["ok"], counts["failed"]) == (2000, len(expected), 2000 - len(expected))
    assert counts["reasons"] == Counter(record["reason"] for record in records.values() if record["status"] == "failed")
    assert f"\nok {len(expected)} 27.0%\n" in re.sub(" +", " ", (tmp_path / "stderr").read_text())
    assert not (folder / ".parts").exists()
    if memory:
        early = memory[min(memory, key=lambda size: abs(size - max(memory) / 4))]
        assert max(memory.values()) < 200 and max(memory.values()) - early < 20, memory


@pytest.mark.parametrize("shards", [(), ("--shards", "40")])
def test_kills_lose_only_rows_under_way(tmp_path, shards):
    row_kinds = [("slow", "good", "gone", "slow")[row % 4] for row in range(170)]
    expected = {row: picture(row) for row, kind in enumerate(row_kinds, 1) if kind in GOOD}
    folder = tmp_path / "out" / "train"
    with HostileServer() as server:
        path = write_list(tmp_path / "list.tsv", server, row_kinds)
        words = command(path, tmp_path / "out", "--concurrency", "12", *shards)
        finished = {}
        for aim in (20, 70, 120):
            process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
            while process.poll() is None and (not folder.exists() or len(finished := {record["row"] for record in manifest_or_none(folder)}) < aim):
                time.sleep(0.01)
            process.kill()
            process.wait()
            finished = {record["row"] for record in manifest_or_none(folder)}
            asked = {row: server.asked[f"/{row_kinds[row - 1]}/{row}"] for row in finished}
            whole = packed_images(folder) if shards else images(folder)
            assert all(expected[row] == content for row, content in whole.items())
        done = run(path, tmp_path / "out", "--concurrency", "12", *shards)
        assert done.returncode == 3, done.stderr
        again = [row for row in finished if server.asked[f"/{row_kinds[row - 1]}/{row}"] > asked[row]]
        assert len(again) <= 1  # a row whose line was written when the kill came before its image got its name
    assert (packed_images(folder) if shards else images(folder)) == expected
    assert {record["row"] for record in manifest(folder)} == set(range(1, 171))
    leftovers = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert leftovers <= {".lock"}, leftovers


def manifest_or_none(folder: Path) -> list[dict]:
    return manifest(folder) if (folder / "manifest.jsonl").exists() else []


def packed_images(folder: Path) -> dict[int, bytes]:
    """The images of all shards of 40 rows by row; their texts and JSON must fit."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, content in members.items():
            key, _, extension = name.partition(".")
            if extension in ("jpg", "png"):
                row = int(key[:5]) * 40 + int(key[5:]) + 1
                assert path.name == f"{key[:5]}.tar" and members[f"{key}.txt"].decode() == f"caption of {row}"
                about = json.loads(members[f"{key}.json"])
                assert about["sha256"] == hashlib.sha256(content).hexdigest() and about["key"] == key and about["status"] == "success"
                found[row] = content
        assert len(members) == 3 * sum(name.endswith(".txt") for name in members)
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_politely_and_says_how_to_go_on(tmp_path, number, code):
    with HostileServer() as server:
        path = write_list(tmp_path / "list.tsv", server, ["good"] * 10 + ["silent"] * 10)
        words = [word for word in command(path, tmp_path / "out") if word != "1.5"]
        words.remove("--timeout")  # ten seconds: the silent rows are under way when the signal comes
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        while len(manifest_or_none(tmp_path / "out/train")) < 10:
            time.sleep(0.02)
        process.send_signal(number)
        begun = time.monotonic()
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == code and time.monotonic() - begun < 4
        assert f"go on with: python scripts/download_cc3m.py {path} {tmp_path / 'out'}" in stderr and "Traceback" not in stderr
        assert "not tried" in stderr
        assert len(metadata_jsonl.read(tmp_path / "out", "train")) == 10
        assert len(manifest(tmp_path / "out/train")) == 10


def test_failed_rows_are_tried_again_on_request(tmp_path):
    with HostileServer() as server:
        path = write_list(tmp_path / "list.tsv", server, ["good", "broken", "gone"])
        flags = (path, tmp_path / "out", "--retries", "0", "--shards", "2")
        assert run(*flags).returncode == 3
        assert server.asked == {"/good/1": 1, "/broken/2": 1, "/gone/3": 1}
        assert run(*flags).returncode == 3
        assert server.asked == {"/good/1": 1, "/broken/2": 1, "/gone/3": 1}
        server._broken = server._good
        assert run(*flags, "--retry-failed").returncode == 3
        assert server.asked == {"/good/1": 1, "/broken/2": 2, "/gone/3": 1}
    with tarfile.open(tmp_path / "out/train/00000.tar") as tar:
        assert tar.getnames() == [f"00000000{row}.{end}" for row, own in ((0, "jpg"), (1, "png")) for end in (own, "json", "txt")]
        assert tar.extractfile("000000001.png").read() == picture(2)
    with tarfile.open(tmp_path / "out/train/00001.tar") as tar:
        assert tar.getnames() == []


def test_more_of_the_list_goes_on_in_the_last_shard(tmp_path):
    folder = tmp_path / "out" / "train"
    with HostileServer() as server:
        path = write_list(tmp_path / "list.tsv", server, ["good"] * 60)
        assert run(path, tmp_path / "out", "--shards", "40", "--limit", "50").returncode == 0
        assert set(packed_images(folder)) == set(range(1, 51))
        assert run(path, tmp_path / "out", "--shards", "40").returncode == 0
        assert packed_images(folder) == {row: picture(row) for row in range(1, 61)}
        assert set(server.asked.values()) == {1}
        (folder / "00001.tar").unlink()
        assert run(path, tmp_path / "out", "--shards", "40").returncode == 0
        assert packed_images(folder) == {row: picture(row) for row in range(1, 61)}
        assert sorted(server.asked.values()) == [1] * 40 + [2] * 20


# The command's own mistakes.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "LIST.tsv OUT"), (("list.tsv", "out", "--split", "../x"), "--split"), (("list.tsv", "out", "--per-host", "0"), "--per-host"),
        (("list.tsv", "out", "--timeout", "0"), "--timeout"), (("list.tsv", "out", "--timeout", "nan"), "--timeout"),
        (("list.tsv", "out", "--retries", "-1"), "--retries"), (("list.tsv", "out", "--user-agent", "a\nb"), "--user-agent"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        download_cc3m.main(list(words))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"), (b"http://a.example/1.jpg\ta dog\n", "line 1: the URL comes first"), (b"a dog http://a.example/1.jpg\n", "line 1: .* no tab"),
    ],
)  # fmt: skip
def test_lists_of_another_format(tmp_path, content, message):
    (tmp_path / "list.tsv").write_bytes(content)
    with pytest.raises((DataError, UserError), match=message):
        download_cc3m.main([str(tmp_path / "list.tsv"), str(tmp_path / "out")])


def test_without_the_library_the_message_says_what_to_install():
    code = "import sys, runpy; sys.modules['aiohttp'] = None; runpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no module aiohttp") and done.stderr.count("\n") == 1


def test_bad_lines_are_rows_with_a_reason(tmp_path):
    content = b"\xef\xbb\xbfa  dog\thttp://a.example/1\r\n\nb\xff\thttp://a.example/3\nc\thttp://a.example/4\tx\n \thttp://a.example/5\n"
    content += b"d" * 2**21 + b"\thttp://a.example/6\ne\tfile:///etc/passwd"
    (tmp_path / "list.tsv").write_bytes(content)
    jobs = list(read_list(tmp_path / "list.tsv"))
    assert [job.row for job in jobs] == [1, 2, 3, 4, 5, 6, 7]
    assert (jobs[0].caption, jobs[0].text, jobs[0].problem) == ("a dog", "http://a.example/1", None)
    assert ["UTF-8" in (jobs[2].problem or ""), jobs[1].problem, jobs[4].problem] == [True, "empty", "no caption"]
    assert "columns" in jobs[3].problem and "bytes" in jobs[5].problem and jobs[6].problem is None
    (tmp_path / "list.tsv").write_bytes(b"\n".join(content.split(b"\n")[2:]).replace(b"b\xff", b"b\xff\t"))
    assert download_cc3m.main([str(tmp_path / "list.tsv"), str(tmp_path / "out"), "--json", str(tmp_path / "counts.json")]) == 3
    assert json.loads((tmp_path / "counts.json").read_text())["reasons"] == {"line": 4, "url": 1}


def finish(store: Store, row: int, outcome: Picture | Failure, url: str = "http://a.example/") -> int | None:
    part = store.parts / str(row)
    part.write_bytes(b"x" * getattr(outcome, "bytes", 0))
    return store.add(Result(Job(row, f"caption {row}", f"{url}{row}", url=URL(f"{url}{row}")), outcome, part))


PICTURE = Picture("0" * 64, 5, 2, 3, "jpg")


def test_a_manifest_of_another_list_or_of_shards_is_refused(tmp_path):
    store = Store(tmp_path / "train")
    finish(store, 1, PICTURE)
    store.close()
    again = Store(tmp_path / "train")
    assert again.finished(Job(1, "caption 1", "http://a.example/1")) and not again.finished(Job(2, "caption 2", "http://a.example/2"))
    with pytest.raises(DataError, match="line 1 of the list: it was made with another list"):
        again.finished(Job(1, "caption 1", "http://a.example/other"))
    with pytest.raises(DataError, match="begun with no rows a shard"):
        Store(tmp_path / "train", 10)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "000001.jpg").write_bytes(b"of somebody else")
    with pytest.raises(DataError, match="was not downloaded here"):
        Store(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["000001.jpg"]


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[]\n", b'{"row": 2, "url": "", "caption": "", "status": "ok"}\n', b'{"row": -1}\n']
)  # fmt: skip
def test_a_damaged_manifest_is_named_with_its_line(tmp_path, line):
    store = Store(tmp_path)
    finish(store, 1, PICTURE)
    store.close()
    whole = store.path.read_bytes()
    store.path.write_bytes(whole + line)
    with pytest.raises(DataError, match="manifest.jsonl, line 2 is damaged"):
        Store(tmp_path)
    record = json.loads(whole) | {"file": "../../outside.jpg"}
    store.path.write_bytes(json.dumps(record).encode() + b"\n")
    with pytest.raises(DataError, match="line 1 is damaged"):
        Store(tmp_path)


def test_rows_whose_image_is_gone_or_whose_line_was_cut_are_open(tmp_path):
    store = Store(tmp_path)
    for row in (1, 2, 3, 4):
        finish(store, row, PICTURE)
    finish(store, 5, Failure("timeout", may_pass=True))
    finish(store, 6, Failure("http-404"))
    store.close()
    (tmp_path / "000001.jpg").unlink()
    (tmp_path / "000002.jpg").write_bytes(b"xx")
    with open(store.path, "ab") as file:
        file.write(b'{"row": 7, "url": "http://a.exa')

    def finished(**kwargs) -> list[int]:
        store = Store(tmp_path, **kwargs)
        store.close()
        return [row for row in range(1, 8) if store.finished(Job(row, f"caption {row}", f"http://a.example/{row}"))]

    assert finished() == [3, 4, 5, 6]
    assert finished(retry=True) == [3, 4, 6]
    assert store.path.read_bytes().endswith(b"}\n")


def test_a_kill_while_a_shard_is_packed_changes_nothing(tmp_path):
    store = Store(tmp_path, 2)
    assert finish(store, 1, PICTURE) is None
    store.close()
    store = Store(tmp_path, 2)
    assert (tmp_path / ".shards/00000/000000000.jpg").exists() and finish(store, 2, PICTURE) == 0
    shutil.copytree(tmp_path / ".shards", tmp_path / "spools")
    store.pack(0)
    store.close()
    whole = (tmp_path / "00000.tar").read_bytes()
    assert [entry["images"] for entry in map(json.loads, (tmp_path / "shards.jsonl").open())] == [2]

    # After the tar has its name, before its line is written.
    shards = (tmp_path / "shards.jsonl").read_bytes()
    (tmp_path / "shards.jsonl").write_bytes(shards[:-20])
    shutil.copytree(tmp_path / "spools", tmp_path / ".shards")
    store = Store(tmp_path, 2)
    assert store.full_shards() == [0] and all(store.finished(Job(row, f"caption {row}", f"http://a.example/{row}")) for row in (1, 2))
    store.pack(0)
    store.close()
    assert (tmp_path / "00000.tar").read_bytes() == whole and (tmp_path / "shards.jsonl").read_bytes() == shards

    # After that, before the images are deleted.
    shutil.copytree(tmp_path / "spools", tmp_path / ".shards")
    store = Store(tmp_path, 2)
    assert store.full_shards() == [] and not (tmp_path / ".shards/00000").exists()
    store.close()
    assert not (tmp_path / ".shards").exists()


@contextlib.contextmanager
def no_file_larger_than(limit: int):
    """As on a full disk, the beginning of what is too much is written, and then an error comes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_the_disk_has_no_room_for_spoils_no_other(tmp_path):
    store = Store(tmp_path)
    finish(store, 1, Failure("http-404"))
    whole = store.path.read_bytes()
    with no_file_larger_than(len(whole) + 20), pytest.raises(DataError, match=r"cannot write .*manifest.jsonl: \w+"):
        finish(store, 2, PICTURE)
    assert store.path.read_bytes() == whole
    finish(store, 3, PICTURE)
    store.close()
    again = Store(tmp_path)
    assert [again.finished(Job(row, f"caption {row}", f"http://a.example/{row}")) for row in (1, 2, 3)] == [True, False, True]


def test_an_image_that_the_disk_has_no_room_for_is_no_fault_of_the_server(tmp_path):
    with HostileServer() as server, no_file_larger_than(100), pytest.raises(DataError, match=r"cannot write .*part: \w+"):
        fetch(f"http://127.0.0.1:{server.port}/good/1", folder=tmp_path)
    assert not (tmp_path / "part").exists()


def test_a_full_disk_ends_the_download_in_one_line_and_it_can_go_on(tmp_path):
    with HostileServer() as server:
        path = write_list(tmp_path / "list.tsv", server, ["good"] * 60)
        words = command(path, tmp_path / "out", "--shards", "10")
        full = subprocess.run(["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *words], capture_output=True, text=True, timeout=60)
        assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
        assert full.stderr.splitlines()[-1].startswith("error: cannot write ")
        assert {record["status"] for record in manifest(tmp_path / "out/train")} == {"ok"}
        assert run(path, tmp_path / "out", "--shards", "10").returncode == 0
    records = manifest(tmp_path / "out/train")
    assert sorted(record["row"] for record in records) == list(range(1, 61))


def test_what_a_kill_left_beside_its_place_is_removed(tmp_path):
    Store(tmp_path / "train").close()
    for name in (".metadata.jsonl.123", ".00000.tar.123", ".own.tar.123"):
        (tmp_path / "train" / name).write_bytes(b"half")
    Store(tmp_path / "train").close()
    assert {path.name for path in (tmp_path / "train").iterdir()} == {"manifest.jsonl", "manifest.settings.json", ".own.tar.123"}


# One request.


def fetch(url: str, *, folder: Path, lookup=None, ssl_context=None, allow_loopback: bool = True, limits: Limits | None = None):
    """What Fetcher.fetch returns or the Failure it raises; nothing of a failed image is left."""

    async def once():
        async with Fetcher(limits or Limits(2, 4, MAX_BYTES), allow_loopback, lookup=lookup, ssl_context=ssl_context, threads=4) as fetcher:
            try:
                return await fetcher.fetch(URL(url), folder / "part", fetcher.limits.total_timeout)
            except Failure as failure:
                return failure

    outcome = asyncio.run(once())
    assert (folder / "part").exists() == isinstance(outcome, Picture)
    return outcome


def answering(*answers: list[str]):
    """A name server that gives another answer each time; asked: the names."""
    remaining, asked = list(answers), []

    async def lookup(host: str) -> list[str]:
        asked.append(host)
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    return lookup, asked


def test_the_connection_goes_to_the_address_that_was_checked(tmp_path):
    with HostileServer() as server:
        lookup, asked = answering(["10.0.0.7", "127.0.0.9"], ["127.0.0.10"])
        assert isinstance(fetch(f"http://rebound.test:{server.port}/good/1", folder=tmp_path, lookup=lookup), Picture)
        assert asked == ["rebound.test"] and server.requests[0][0] == "127.0.0.9"
        assert server.requests[0][1]["host"] == f"rebound.test:{server.port}"


@pytest.mark.parametrize("address", ["169.254.169.254", "10.0.0.1", "::ffff:127.0.0.1", "fd00:ec2::254", "fe80::1%1"])
def test_a_name_that_leads_inward_is_refused(tmp_path, address):
    lookup, _ = answering([address])
    outcome = fetch("http://pictures.test/1.jpg", folder=tmp_path, lookup=lookup)
    assert outcome.reason == "address" and not outcome.may_pass and address in outcome.detail


def test_every_redirect_is_resolved_and_checked_again(tmp_path):
    """A server that was looked up as loopback first and inside the network at the second look."""
    lookup, asked = answering(["127.0.0.1"], ["10.0.0.7"])

    async def follow(server: HostileServer) -> Failure:
        async with Fetcher(Limits(2, 4, MAX_BYTES), True, lookup=lookup) as fetcher:
            target = await fetcher.fetch(URL(f"http://pictures.test:{server.port}/away/1"), tmp_path / "part", 4)
            assert target.host == "rebound.test"
            with pytest.raises(Failure) as caught:
                await fetcher.fetch(target, tmp_path / "part", 4)
            return caught.value

    with HostileServer() as server:
        assert asyncio.run(follow(server)).reason == "address"
        assert asked == ["pictures.test", "rebound.test"] and server.asked == {"/away/1": 1}


def test_an_address_that_no_check_saw_gets_no_socket(tmp_path):
    """An address in a URL is not resolved: the last look, where the socket is made, must see it too."""
    with HostileServer() as server:
        assert fetch(f"http://127.0.0.1:{server.port}/good/1", folder=tmp_path, allow_loopback=False).reason == "address"
        assert not server.asked
        assert isinstance(fetch(f"http://127.0.0.1:{server.port}/good/1", folder=tmp_path), Picture)


def test_loopback_is_refused_without_the_flag(tmp_path):
    with HostileServer() as server:
        path = write_list(tmp_path / "list.tsv", server, ["good"])
        assert download_cc3m.main([str(path), str(tmp_path / "out")]) == 3
        assert manifest(tmp_path / "out/train")[0]["reason"] == "address" and not server.asked


def test_only_the_public_addresses_of_a_name_are_given_out():
    lookup, _ = answering(["10.0.0.7", "8.8.8.8", "::1", "2606:4700::1111", "169.254.169.254"])
    found = asyncio.run(CheckedResolver(lookup, False, 1.0).resolve("pictures.test", 443))
    expected = [("8.8.8.8", 443, socket.AF_INET), ("2606:4700::1111", 443, socket.AF_INET6)]
    assert [(one["host"], one["port"], one["family"]) for one in found] == expected


def test_no_more_is_unpacked_than_allowed():
    decode = Unpacking("gzip", 1000)
    assert sum(len(decode(BOMB[begin : begin + 9])) for begin in range(0, len(BOMB), 9)) == 1001
    assert len(Unpacking("gzip", 1000)(BOMB)) == 1001


@pytest.mark.parametrize(("error", "may_pass"), [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)])
def test_names_without_addresses(tmp_path, error, may_pass):
    async def lookup(host: str) -> list[str]:
        raise socket.gaierror(error, "no such luck")

    outcome = fetch("http://pictures.test/1.jpg", folder=tmp_path, lookup=lookup)
    assert (outcome.reason, outcome.may_pass) == ("dns", may_pass)


def test_a_silent_name_server_is_given_up(tmp_path):
    async def lookup(host: str) -> list[str]:
        await asyncio.sleep(60)

    begun = time.monotonic()
    outcome = fetch("http://pictures.test/1.jpg", folder=tmp_path, lookup=lookup, limits=Limits(0.3, 4))
    assert (outcome.reason, outcome.may_pass) == ("dns", True) and time.monotonic() - begun < 3


def test_tls_is_verified_against_the_name_in_the_url(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=pictures.test -addext subjectAltName=DNS:pictures.test".split()
    subprocess.run(["openssl", *words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names = []
    context.sni_callback = lambda connection, name, _: names.append(name)
    lookup, _ = answering(["127.0.0.1"])
    trusted = ssl.create_default_context(cafile=str(certificate))
    with HostileServer(ssl_context=context) as server:
        outcome = fetch(f"https://pictures.test:{server.port}/good/1", folder=tmp_path, lookup=lookup, ssl_context=trusted)
        assert isinstance(outcome, Picture) and names == ["pictures.test"]
        (tmp_path / "part").unlink()
        other = fetch(f"https://other.test:{server.port}/good/1", folder=tmp_path, lookup=lookup, ssl_context=trusted)
        assert (other.reason, other.may_pass) == ("tls", False) and "other.test" in other.detail
        assert fetch(f"https://pictures.test:{server.port}/good/1", folder=tmp_path, lookup=lookup).reason == "tls"
        assert server.asked == {"/good/1": 1}


@pytest.mark.parametrize(
    ("kind", "reason", "may_pass"),
    [
        ("chunks", "protocol", False), ("torn", "cut-off", True), ("short", "cut-off", True), ("headers", "protocol", False),
        ("trailers", "protocol", False), ("extension", "too-slow", True), ("crumbs", "too-many-bytes", False), ("flood", "too-slow", True),
        ("noise", "protocol", False), ("bytes", "http-404", False), ("strange", "url", False), ("coding", "encoding", False),
        ("bomb", "too-many-bytes", False), ("voids", "too-many-bytes", False), ("tail", "too-many-bytes", False),
        ("drip", "too-slow", True), ("silent", "timeout", True), ("reset", "reset", True),
    ],
)  # fmt: skip
def test_what_a_server_does_has_its_reason_in_time(tmp_path, kind, reason, may_pass):
    with HostileServer() as server:
        begun = time.monotonic()
        outcome = fetch(f"http://127.0.0.1:{server.port}/{kind}/1", folder=tmp_path, limits=Limits(0.7, 1.5, MAX_BYTES))
        assert (outcome.reason, outcome.may_pass) == (reason, may_pass), outcome.detail
        assert time.monotonic() - begun < 4
    json.dumps(outcome.detail, ensure_ascii=False).encode()


def test_a_server_that_never_shakes_hands_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        begun, port = time.monotonic(), listening.getsockname()[1]
        outcome = fetch(f"https://127.0.0.1:{port}/", folder=tmp_path, limits=Limits(0.7, 20))
        assert (outcome.reason, outcome.may_pass) == ("timeout", True) and time.monotonic() - begun < 5
    outcome = fetch(f"http://127.0.0.1:{port}/", folder=tmp_path)
    assert (outcome.reason, outcome.may_pass) == ("connection", True)


@pytest.mark.parametrize("row", range(len(ROBOTS)))
def test_the_opt_out_header(tmp_path, row):
    with HostileServer() as server:
        outcome = fetch(f"http://127.0.0.1:{server.port}/robots/{row}", folder=tmp_path)
    assert (isinstance(outcome, Failure) and outcome.reason == "opt-out") == ROBOTS[row][1]


def test_a_proxy_of_the_environment_is_not_used(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    with HostileServer() as server:
        assert isinstance(fetch(f"http://127.0.0.1:{server.port}/good/1", folder=tmp_path), Picture)


def test_the_request_is_honest_and_carries_no_cookie_back(tmp_path):

    async def twice(url: str) -> None:
        async with Fetcher(Limits(2, 4, MAX_BYTES), True) as fetcher:
            for _ in range(2):
                await fetcher.fetch(URL(url), tmp_path / "part", 4)

    with HostileServer() as server:
        asyncio.run(twice(f"http://127.0.0.1:{server.port}/cookie/1"))
    headers = server.requests[1][1]
    assert headers["user-agent"].startswith("clip-t5-captioner/") and "mozilla" not in headers["user-agent"]
    assert headers["accept-encoding"] == "identity" and "cookie" not in headers


def test_a_jpeg_of_endless_scans_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    (tmp_path / "part").write_bytes(buffer.getvalue()[:-2] + scan * (MAX_SCANS + 1) + b"\xff\xd9")
    with pytest.raises(Failure, match="too-large"):
        Fetcher(Limits())._picture(tmp_path / "part", ("", 0, "jpg"))


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("120") == 120 and retry_after(" 0 ") == 0
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    assert 80 < retry_after(email.utils.format_datetime(soon, usegmt=True)) <= 90
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [retry_after(value) for value in ("", "soon", "-5", "1.5", "٣")] == [None] * 5
    assert retry_after("9" * 400) > 1e9


# Addresses and URLs.


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.255.255.255", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16", "169.254.169.254",
        "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:8.8.8.8", "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::",
        "3fff::1",
        "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "2606:4700::1%2", "fec0::1", "ff02::1", "4000::1", "", "localhost", "1.2.3",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert address_problem(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert address_problem(address) is None


def test_the_flag_allows_loopback_and_nothing_else():
    assert [address_problem(address, True) for address in ("127.0.0.1", "127.9.9.9", "::1")] == [None] * 3
    others = ("10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fe80::1", "0.0.0.0", "::")
    assert all(address_problem(address, True) for address in others)


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_what_is_let_through_is_global_to_the_standard_library_too(address):
    translated = ipaddress.ip_network("64:ff9b::/96")
    if address_problem(str(address)) is None and not (address.version == 6 and address in translated):
        assert address.is_global and not address.is_multicast


@pytest.mark.parametrize(
    "url",
    [
        "", "a.jpg", "//a.example/1", "ftp://a.example/1", "file:///etc/passwd", "data:image/png;base64,AA", "javascript:1", "http://", "http:///1",
        "http://user@a.example/", "http://user:word@a.example/", "http://:word@a.example/", "http://a.example:22/", "http://a.example:25/",
        "http://a.example:0/", "http://a.example:6379x/", "http://a.example:99999/", "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/",
        "http://127.1/", "http://127.0.0.1./", "http://0x7f.0.0.1/", "http://1.2.3.4.5/", "http://a.example.0x1/", "http://127%2e0%2e0%2e1/",
        "http://a b/", "http://a.example\\@b.example/", "http://a.example/\r\nHost: b", "http://a.example/\x00", "http://" + "a" * 9000,
        "http://.../", "http://[::1", "http://[fe80::1%25eth0]/", "http://256.1.1.1/",
    ],
)  # fmt: skip
def test_urls_that_are_not_fetched(url):
    with pytest.raises(UrlError):
        checked_url(url)


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.1/", "http://127.0.0.1/", "http://[::1]/", "http://[::ffff:8.8.8.8]/", "http://１２７.0.0.1/", "http://127。0。0。1/"],
)
def test_urls_of_addresses_that_are_not_public(url):
    with pytest.raises(AddressError):
        checked_url(url)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://a.example/1.jpg", "http://a.example/1.jpg"), (" https://A.Example:443/x y?z=ü#part ", "https://a.example/x%20y?z=%C3%BC#part"),
        ("http://a.example:8080/", "http://a.example:8080/"), ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://8.8.8.8/", "http://8.8.8.8/"), ("http://a_b.example/", "http://a_b.example/"), ("http://1and1.example/", "http://1and1.example/"),
    ],
)  # fmt: skip
def test_urls_as_they_are_asked_for(url, asked):
    assert str(checked_url(url)) == asked


@given(st.text() | st.from_regex(r"https?://[^/]{0,20}(/.{0,20})?") | st.from_regex(r"//[\[\]@:%.\-0-9a-fx]{0,20}"))
def test_any_text_is_a_url_or_an_error(text):
    for base in (None, URL("https://a.example/1.jpg")):
        try:
            url = checked_url(text, base)
        except UrlError:
            continue
        assert url.scheme in ("http", "https") and url.raw_host


def test_a_redirect_is_joined_and_checked():
    base = URL("https://a.example/deep/1.jpg")
    assert str(checked_url("../2.jpg", base)) == "https://a.example/2.jpg"
    assert str(checked_url("//b.example/2.jpg", base)) == "https://b.example/2.jpg"
    for target in ("file:///etc/passwd", "//10.0.0.1/", "//user@b.example/", "http://[::1]/", "//2130706433/"):
        with pytest.raises(UrlError):
            checked_url(target, base)


# Pace and retries, with no network at all.


class ScriptedFetcher:
    """Answers by the URL's path from a script; the last answer of a path stays."""

    def __init__(self, script: dict[str, list], seconds: float = 0.0) -> None:
        self.limits, self.script, self.seconds = Limits(total_timeout=60), script, seconds
        self.asked: list[tuple[str, float]] = []
        self.active, self.most = Counter(), Counter()

    def check_url(self, text: str, base: URL | None = None) -> URL:
        return URL(text)

    async def fetch(self, url: URL, part: Path, seconds: float):
        self.asked.append((url.path, time.monotonic()))
        for name in (url.host, "all"):
            self.active[name] += 1
            self.most[name] = max(self.most[name], self.active[name])
        await asyncio.sleep(self.seconds)
        for name in (url.host, "all"):
            self.active[name] -= 1
        answers = self.script.get(url.path, [PICTURE])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def times(self, path: str) -> list[float]:
        return [when for name, when in self.asked if name == path]


def download(fetcher: ScriptedFetcher, urls: list[str], tmp_path: Path, **pace) -> dict[int, Result]:
    ended: dict[int, Result] = {}
    waiting = []

    async def finish(result: Result) -> None:
        assert result.job.row not in ended
        ended[result.job.row] = result

    def jobs():
        for row, url in enumerate(urls, 1):
            waiting.append(row - 1 - len(ended))
            yield Job(row, "caption", url)

    settings = Pace(**({"backoff": 0.02} | pace))
    asyncio.run(asyncio.wait_for(Download(fetcher, settings, tmp_path, finish).run(jobs()), 30))
    assert max(waiting) < WINDOW * settings.concurrency
    return ended


def test_requests_at_once_are_limited_in_all_and_by_host(tmp_path):
    fetcher = ScriptedFetcher({}, 0.002)
    urls = [f"http://{'one' if row % 3 else row % 7}.test/{row}" for row in range(400)]
    ended = download(fetcher, urls, tmp_path, concurrency=6, per_host=2)
    assert len(ended) == 400 and all(isinstance(result.outcome, Picture) for result in ended.values())
    assert fetcher.most["all"] == 6 and fetcher.most["one.test"] == 2 and max(fetcher.most[f"{host}.test"] for host in range(7)) <= 2


def test_only_what_may_pass_is_tried_again(tmp_path):
    script = {
        "/1": [Failure("timeout", may_pass=True)], "/2": [Failure("http-404")], "/3": [Failure("reset", may_pass=True), PICTURE],
        "/4": [Failure("too-slow", may_pass=True)], "/5": [URL("http://b.test/6")], "/6": [Failure("http-503", may_pass=True), PICTURE],
    }  # fmt: skip
    fetcher = ScriptedFetcher(script)
    ended = download(fetcher, [f"http://a.test/{row}" for row in range(1, 6)], tmp_path, retries=2)
    assert Counter(path for path, _ in fetcher.asked) == {"/1": 3, "/2": 1, "/3": 2, "/4": 1, "/5": 2, "/6": 2}
    assert [ended[row].job.tries for row in range(1, 6)] == [3, 1, 2, 1, 2]
    assert [isinstance(ended[row].outcome, Picture) for row in range(1, 6)] == [False, False, True, False, True]


def test_waits_grow_and_vary(tmp_path):
    script = {f"/{row}": [Failure("timeout", may_pass=True)] for row in range(40)}
    fetcher = ScriptedFetcher(script)
    download(fetcher, [f"http://{row}.test/{row}" for row in range(40)], tmp_path, retries=2, backoff=0.5, concurrency=64)
    first, second = zip(*[(times[1] - times[0], times[2] - times[1]) for times in (fetcher.times(f"/{row}") for row in range(40))], strict=True)
    assert 0.25 <= min(first) < 0.4 and 0.6 < max(first) < 1.3
    assert 0.5 <= min(second) < 0.8 and 1.2 < max(second) < 2.2


def test_retry_after_is_honoured_by_the_whole_host_and_capped(tmp_path):
    script = {"/0": [Failure("http-429", may_pass=True, wait=10_000.0), PICTURE]}
    fetcher = ScriptedFetcher(script)
    ended = download(fetcher, [f"http://a.test/{row}" for row in range(5)] + ["http://b.test/5"], tmp_path, per_host=1, max_wait=0.6)
    assert all(isinstance(result.outcome, Picture) for result in ended.values())
    refused = fetcher.times("/0")[0]
    assert all(0.6 <= fetcher.times(f"/{row}")[-1] - refused < 2 for row in range(5))
    assert fetcher.times("/5")[0] - refused < 0.5


def test_a_host_that_fails_and_fails_is_given_up_and_others_go_on(tmp_path):
    script = {f"/{row}": [Failure("timeout", may_pass=True)] for row in range(100)}
    urls = [f"http://dead.test/{row}" for row in range(100)] + [f"http://live.test/{row}" for row in range(100, 200)]
    fetcher = ScriptedFetcher(script)
    ended = download(fetcher, urls, tmp_path, retries=0, host_failures=10, per_host=2)
    reasons = Counter(result.outcome.reason for result in ended.values() if isinstance(result.outcome, Failure))
    assert reasons["timeout"] in (10, 11) and reasons["host-down"] == 100 - reasons["timeout"]
    assert all(result.outcome.may_pass for result in list(ended.values()) if isinstance(result.outcome, Failure))
    assert sum(isinstance(result.outcome, Picture) for result in ended.values()) == 100


def test_redirects_end(tmp_path):
    fetcher = ScriptedFetcher({"/1": [URL("http://a.test/1")], "/2": [URL("http://b.test/3")]})
    ended = download(fetcher, ["http://a.test/1", "http://a.test/2"], tmp_path)
    assert ended[1].outcome.reason == "redirects" and len(fetcher.times("/1")) == fetcher.limits.max_redirects + 1
    assert isinstance(ended[2].outcome, Picture) and ended[2].job.url.host == "b.test"


def test_a_fault_of_this_machine_ends_the_download(tmp_path):
    with pytest.raises(DataError, match="disk"):
        download(ScriptedFetcher({"/3": [DataError("the disk is full")]}), [f"http://a.test/{row}" for row in range(1000)], tmp_path)


def test_faults_of_several_rows_at_once_are_told_once(tmp_path):
    fetcher = ScriptedFetcher({f"/{row}": [DataError("the disk is full")] for row in range(50)})
    jobs = iter([Job(row, "caption", f"http://{row}.test/{row}") for row in range(50)])
    told = []

    async def finish(result: Result) -> None:
        """No row ends well."""

    async def run_all() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["message"]))
        with contextlib.suppress(DataError):
            await Download(fetcher, Pace(), tmp_path, finish).run(jobs)
        fetcher.script.clear()  # its errors keep the tasks alive
        gc.collect()

    asyncio.run(run_all())
    assert told == []


def test_two_downloads_into_one_folder_are_refused(tmp_path):
    with HostileServer() as server:
        path = write_list(tmp_path / "list.tsv", server, ["silent"])
        process = subprocess.Popen(command(path, tmp_path / "out"), stderr=subprocess.DEVNULL)
        while not (tmp_path / "out/train/manifest.jsonl").exists():
            time.sleep(0.02)
        second = run(path, tmp_path / "out")
        os.kill(process.pid, signal.SIGTERM)
        process.wait()
    assert second.returncode == 1 and f"in use by process {process.pid}" in second.stderr and second.stderr.count("\n") == 1
