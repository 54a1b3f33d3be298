"""What scripts/caption.py costs beside the model: files opened and checked, journal, sidecars.

    python scripts/bench/caption_folder.py [--run RUN] [--pictures N] [--pairs N] [--only ID,ID] [--threads N] [--json PATH|-]

Ours captions a folder of drawn scenes saved as JPEG, from the opened run to the last sidecar on the disk; the "peer" is the bare model: encoding and decoding
of the same batches, which are decoded and transformed already. The bar is 1.1 times its cost. The smaller the model, the larger the share of everything else:
the run is the newest if none is named, and those of scripts/demo.sh are the smallest there are.
"""

import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import common

sys.path.insert(0, str(common.REPOSITORY / "scripts"))

ROWS = {"F1": "beam", "F1-greedy": "greedy"}
IDS = tuple(ROWS)
MUST = 0.909  # 1 / 1.1
PACKAGES = ("torch", "pillow")


def run(only: Collection[str] | None = None, pairs: int = 7, pictures: int = 200, run: str | None = None) -> list[dict]:
    """Rows of IDS, or those in `only`. Raises UserError where there is no run."""
    import torch

    # With one thread, CPU seconds: the machine need not be idle. The wait for the disk is not in them.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory(prefix="captioner-bench-") as folder:
        draw(Path(folder), pictures)
        return [measure(id, decode, Path(folder), run, pairs, clock) for id, decode in ROWS.items() if only is None or id in only]


def draw(folder: Path, count: int) -> None:
    """Drawn scenes as JPEG files."""
    from data import scenes

    for index, row in enumerate(scenes.split("val", count)):
        row.image.open().save(folder / f"{index:04}.jpg", quality=90)


def measure(id: str, decode: str, folder: Path, run: str | None, pairs: int, clock) -> dict:
    """One row: the median of bare / ours over pairs that take turns."""
    import caption

    from captioner import cli
    from captioner.decoding import open_model
    from captioner.job import Job
    from data.dataset import BadImageLedger, CaptionDataset, make_loader
    from data.rows import FileImage, Row

    settings = cli.parse_settings(caption.Settings, [str(folder), "--decode", decode, *(["--run", run] if run else [])], "")
    caption.check(settings)
    pictures = caption.find_pictures(settings.paths, print)
    opened = open_model(settings, settings.num_beams if decode == "beam" else 1)
    rows = [Row(str(picture), FileImage(picture)) for picture in pictures]
    batches = list(make_loader(CaptionDataset(rows, opened.transform), None, settings.batch_size, range(len(rows)), 0, "all"))

    def ours() -> None:
        for file in [*folder.glob("*.txt"), caption.journal_path(settings)]:
            file.unlink(missing_ok=True)
        with caption.CaptionJournal(caption.journal_path(settings)) as journal:
            target = caption.open_target(settings, journal)
            call = caption.Captioning(settings, target)
            call.opened, call.ledger = opened, BadImageLedger()
            target.begin(caption.job_settings(settings))
            chosen, _ = target.select(pictures)
            call.caption(chosen, Job())
            target.finish()

    def bare() -> None:
        for batch in batches:
            caption.decode(opened.model, opened.encode(batch), batch["ids"], settings)

    seconds = common.interleave({"ours": ours, "theirs": bare}, pairs, clock=clock)
    if missing := len(rows) - len(list(folder.glob("*.txt"))):
        raise RuntimeError(f"{id}: {missing} of {len(rows)} pictures have no caption")
    what = f"{len(rows)} JPEG files to sidecars, {opened.path.name}, {decode}"
    return common.row(
        id, what, **seconds, peer="encode and decode alone", peer_version="", must=MUST, dtype=opened.precision, device=opened.device.type,
        clock=common.clock_name(clock),
    )  # fmt: skip


def main() -> None:
    parser = common.row_parser(__doc__.splitlines()[0], IDS, 7)
    parser.add_argument("--run", metavar="RUN", help="run directory or bundle (default: the newest under runs/)")
    parser.add_argument("--pictures", type=int, default=200, metavar="N", help="pictures (default 200)")
    arguments = common.parse_rows(parser, IDS)
    common.report(run(arguments.only, arguments.pairs, arguments.pictures, arguments.run), arguments.json, PACKAGES)


if __name__ == "__main__":
    common.run_main(main)
