"""What scripts/caption.py costs beside the bare model: files found and checked, journal, sidecars.

    python scripts/bench/caption_folder.py [--run RUN] [--pictures N] [--pairs N] [--only ID,ID] [--threads N] [--wall] [--json PATH|-]

Ours captions a folder of drawn scenes saved as JPEG, from the search for pictures to the last sidecar on the disk; the "peer" is the bare model: the same
pictures opened, transformed, encoded and decoded in the same batches, and nothing written. Both have an opened run. The bar is 1.1 times the peer's cost. The
smaller the model, the larger the share of everything else: the run is the newest if none is named, and those of scripts/demo.sh are the smallest there are.

`model_alone` in the JSON is the harder comparison, with batches that are in memory already.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

import common

sys.path.insert(0, str(common.REPOSITORY / "scripts"))

ROWS = {"F1": "beam", "F1-greedy": "greedy"}
IDS = tuple(ROWS)
MUST = 0.909  # 1 / 1.1
PACKAGES = ("torch", "pillow")


def run(only: Collection[str] | None = None, pairs: int = 7, pictures: int = 200, run: str | None = None, wall: bool = False) -> list[dict]:
    """Rows of IDS, or those in `only`. Raises UserError where there is no run."""
    import torch

    # With one thread, CPU seconds: the machine need not be idle. The wait for the disk is not in them.
    clock = time.process_time if torch.get_num_threads() == 1 and not wall else time.perf_counter
    with tempfile.TemporaryDirectory(prefix="captioner-bench-") as name:
        folder = Path(name)
        draw(folder / "pictures", pictures)
        return [measure(id, decode, folder, run, pairs, clock) for id, decode in ROWS.items() if only is None or id in only]


def draw(folder: Path, count: int) -> None:
    """Drawn scenes as JPEG files."""
    from data import scenes

    folder.mkdir()
    for index, row in enumerate(scenes.split("val", count)):
        row.image.open().save(folder / f"{index:04}.jpg", quality=90)


def copies(folder: Path, count: int, name: str) -> list[Path]:
    """Folders of their own with the same pictures, by hard links: so that no round has to delete what the last one wrote."""
    made = [folder / f"{name}-{number}" for number in range(count)]
    for own in made:
        own.mkdir()
        for picture in (folder / "pictures").iterdir():
            os.link(picture, own / picture.name)
    return made


def measure(id: str, decode: str, folder: Path, run: str | None, pairs: int, clock: Callable[[], float]) -> dict:
    """One row: the median of bare / ours over pairs that take turns."""
    import caption

    from captioner import cli, sidecars
    from captioner.decoding import open_model
    from captioner.job import Job
    from data.dataset import BadImageLedger, CaptionDataset, make_loader
    from data.rows import FileImage, Row

    pictures = folder / "pictures"
    settings = cli.parse_settings(caption.Settings, [str(pictures), "--decode", decode, *(["--run", run] if run else [])], "")
    caption.check(settings)
    opened = open_model(settings, settings.num_beams if decode == "beam" else 1)
    rows = [Row(str(picture), FileImage(picture)) for picture in caption.find_pictures(settings.paths, print)]
    loader = make_loader(CaptionDataset(rows, opened.transform), None, settings.batch_size, range(len(rows)), 0, "all")
    batches = list(loader)
    folders = copies(folder, 1 + pairs, decode)
    unused = iter(folders)

    def ours() -> None:
        settings.paths = (str(next(unused)),)
        found = caption.find_pictures(settings.paths, print)
        sidecars.check_collisions(found, settings.ext, settings.sidecar_name)
        with caption.CaptionJournal(caption.journal_path(settings)) as journal:
            target = caption.open_target(settings, journal)
            call = caption.Captioning(settings, target)
            call.opened, call.ledger = opened, BadImageLedger()
            target.begin(caption.job_settings(settings))
            chosen, _ = target.select(found)
            call.caption(chosen, Job())
            target.finish()

    def caption_batches(batches) -> None:
        for batch in batches:
            opened.tokenizer.decode(caption.decode(opened.model, opened.encode(batch), batch["ids"], settings))

    functions = {"ours": ours, "theirs": lambda: caption_batches(loader), "model": lambda: caption_batches(batches)}
    seconds = common.interleave(functions, pairs, clock=clock)
    model = seconds.pop("model")
    for own in folders:
        if missing := len(rows) - len(list(own.glob("*.txt"))):
            raise RuntimeError(f"{id}: {missing} of {len(rows)} pictures have no caption")
    what = f"{len(rows)} JPEG files to sidecars, {opened.path.name}, {decode}"
    return common.row(
        id, what, **seconds, peer="bare model", peer_version="", must=MUST, dtype=opened.precision, device=opened.device.type,
        clock=common.clock_name(clock), model_alone=statistics.median(alone / own for own, alone in zip(seconds["ours"], model, strict=True)),
    )  # fmt: skip


def main() -> None:
    parser = common.row_parser(__doc__.splitlines()[0], IDS, 7)
    parser.add_argument("--run", metavar="RUN", help="run directory or bundle (default: the newest under runs/)")
    parser.add_argument("--pictures", type=int, default=200, metavar="N", help="pictures (default 200)")
    parser.add_argument("--wall", action="store_true", help="wall seconds also with one thread, the wait for the disk with them")
    arguments = common.parse_rows(parser, IDS)
    common.report(run(arguments.only, arguments.pairs, arguments.pictures, arguments.run, arguments.wall), arguments.json, PACKAGES)


if __name__ == "__main__":
    common.run_main(main)
