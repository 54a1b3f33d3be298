"""Fetch the images of a list of captions and URLs (Conceptual Captions' TSV, or any CAPTION<TAB>URL file without a header).

    python scripts/download_cc3m.py Train_GCC-training.tsv data/cc3m --split train        a folder that --data reads
    python scripts/download_cc3m.py LIST.tsv OUT --split train --shards 10000             webdataset shards, as img2dataset names them

The same command goes on after an interrupt or a kill: finished rows are in OUT/SPLIT/manifest.jsonl and are not fetched again. Every row ends there,
as an image with its SHA-256 or with the reason why there is none; expect a third of an old list to be gone. --retry-failed tries those again whose
reason may pass.

Only http and https, and only public addresses: each is checked after every redirect, and the connection goes to the checked address. Proxies of the
environment are not used. X-Robots-Tag: noai (noimageai, noindex, noimageindex) is respected. An image is kept as it was received, byte for byte, with
its EXIF block, which may hold the position where it was taken. Checking images takes up to 64 bytes of memory for each of --max-image-pixels.
"""

import asyncio
import contextlib
import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioner import cli
from captioner.cli import say, setting
from captioner.errors import UsageError, UserError
from captioner.files import locked, write_json

try:
    from data.fetch import USER_AGENT, Fetcher, Limits
except ModuleNotFoundError as missing:
    sys.exit(f"error: no module {missing.name}: pip install -e \".[download]\"")

from data.download import Download, Job, Pace, Result
from data.download_store import Store
from data.rows import DataError
from data.url_list import read_list

OPEN_FILES = 256  # beside two for each request: idle connections, threads, the manifest


@dataclass
class Settings:
    """Every setting of a download; each field is one flag."""

    list: str | None = setting(None, "the list, CAPTION<TAB>URL in each line, UTF-8, no header")
    output: str | None = setting(None, "data folder to make or to go on with")
    split: str = setting("train", "sub-folder of the data folder")
    shards: int | None = setting(None, "write webdataset shards OUT/SPLIT/00000.tar with this many rows of the list each, not a folder of images")
    limit: int | None = setting(None, "only the first lines of the list")
    concurrency: int = setting(64, "requests at once")
    per_host: int = setting(4, "requests at once to one host")
    timeout: float = setting(10.0, "seconds without a byte: of a name lookup, a connection, a read")
    total_timeout: float = setting(60.0, "seconds of one try with all its redirects")
    max_bytes: int = setting(20_000_000, "largest image in bytes, as sent and as unpacked")
    max_image_pixels: int = setting(40_000_000, "largest image in pixels")
    max_redirects: int = setting(5, "redirects that are followed")
    retries: int = setting(3, "further tries after a failure that may pass: 429, 5xx, timeouts, broken connections")
    backoff: float = setting(1.0, "seconds before the second try; doubled for each further one, and varied by half")
    max_wait: float = setting(60.0, "seconds at most before another try, whatever Retry-After says")
    host_failures: int = setting(20, "rows in a row that failed, with all tries, after which a host is not asked again (but by --retry-failed)")
    retry_failed: bool = setting(False, "try rows again that failed before with a reason that may pass")
    allow_loopback: bool = setting(False, "also fetch from this machine's own addresses 127.0.0.0/8 and ::1")
    user_agent: str = setting(USER_AGENT, "how to introduce oneself; name an address where you can be reached")
    json: str | None = setting(None, "write the counts to this file, or - for stdout")

    positional = ("list", "output")


def check(settings: Settings) -> None:
    """Refuse settings that cannot be; raises UsageError."""
    if not settings.list or not settings.output:
        raise UsageError("a list and an output folder are needed: download_cc3m.py LIST.tsv OUT")
    if settings.split in ("", ".", "..") or Path(settings.split).name != settings.split:
        raise UsageError(f"--split {settings.split!r} is not the name of a sub-folder")
    cli.require_positive(settings, "shards", "limit", "concurrency", "per_host", "max_bytes", "max_image_pixels", "host_failures")
    for name in ("timeout", "total_timeout", "max_wait", "backoff"):
        if not 0 < getattr(settings, name) < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be above 0")
    for name in ("retries", "max_redirects"):
        if getattr(settings, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 0")
    if not settings.user_agent.isprintable() or not settings.user_agent.isascii() or not settings.user_agent.strip():
        raise UsageError("--user-agent must be printable ASCII")


def count_lines(path: Path, limit: int | None) -> int:
    """Lines of the list that are asked for. Raises UserError where there is none."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(2**20):
            lines += block.count(b"\n")
            last = block
    lines += not last.endswith(b"\n")
    if not lines:
        raise UserError(f"{path}: the list is empty")
    return min(lines, limit or lines)


def raise_open_files(concurrency: int) -> None:
    """Let this process open as many files as the requests need. Raises UsageError where the system does not."""
    import resource

    needed = 2 * concurrency + OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(f"--concurrency {concurrency} needs {needed} open files, the system allows {hard}")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def download(settings: Settings, store: Store, jobs: Iterator[Job], stop: cli.StopSignal, bar) -> int:
    """Run the jobs and record each end; the bytes of the images that came."""
    limits = Limits(settings.timeout, settings.total_timeout, settings.max_bytes, settings.max_image_pixels, settings.max_redirects)
    pace = Pace(settings.concurrency, settings.per_host, settings.retries, settings.backoff, settings.max_wait, settings.host_failures)
    received = 0

    with ThreadPoolExecutor(1, "pack") as packer:

        async def finish(result: Result) -> None:
            nonlocal received
            shard = store.add(result)
            received += getattr(result.outcome, "bytes", 0)
            bar.update()
            if shard is not None:
                await asyncio.get_running_loop().run_in_executor(packer, store.pack, shard)

        fetcher = Fetcher(limits, settings.allow_loopback, settings.user_agent, threads=settings.concurrency)
        async with fetcher:
            await Download(fetcher, pace, store.parts, finish).run(jobs, lambda: stop.number is not None)
    return received


def show(reasons: dict[str, int], rows: int) -> None:
    """The summary as a table on stderr: how rows ended, how many, of all."""
    width = max([len(reason) for reason in reasons] + [8])
    unfinished = rows - sum(reasons.values())
    for reason, count in [*reasons.items()] + ([("not tried", unfinished)] if unfinished else []):
        say(f"{reason:<{width}}  {count:>9}  {count / rows:>6.1%}")


def main(argv: list[str] | None = None) -> int:
    from tqdm import tqdm

    begun = time.monotonic()
    settings = cli.parse_settings(Settings, argv, __doc__)
    check(settings)
    raise_open_files(settings.concurrency)
    path, folder = Path(settings.list), Path(settings.output) / settings.split
    rows = count_lines(path, settings.limit)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder / ".lock"))
        stop = stack.enter_context(cli.StopSignal())
        store = Store(folder, settings.shards, settings.retry_failed)
        stack.callback(store.close)
        before = sum(store.reason_counts(rows).values())
        say(f"{path}: {rows} lines" + (f", {before} of them finished before" if before else "") + f", to {folder}")
        for shard in store.full_shards():
            store.pack(shard)
        jobs = (job for job in itertools.islice(read_list(path), rows) if not store.finished(job))
        bar = stack.enter_context(tqdm(total=rows, initial=before, desc="rows", unit="row", disable=None, dynamic_ncols=True))
        received = asyncio.run(download(settings, store, jobs, stop, bar))
        bar.close()
        if not settings.shards:
            store.write_metadata()
        elif stop.number is None:
            for shard in store.open_shards():
                store.pack(shard)
        reasons = store.reason_counts(rows)
    show(reasons, rows)
    ok = reasons.get("ok", 0)
    summary = {"list": str(path), "output": str(folder), "rows": rows, "ok": ok, "failed": sum(reasons.values()) - ok}
    summary |= {"reasons": {reason: count for reason, count in reasons.items() if reason != "ok"}}
    write_json(settings.json, summary | {"bytes_received": received, "seconds": round(time.monotonic() - begun, 3)})
    if stop.number is not None:
        say(f"stopped; go on with: python scripts/download_cc3m.py {shlex.join(argv if argv is not None else sys.argv[1:])}")
        return stop.exit_code
    return cli.SOME_BAD if summary["failed"] else cli.DONE


if __name__ == "__main__":
    cli.run_command(main, expected=(DataError,))
