"""What is in a data set and what is wrong with it, before anyone trains on it.

    python scripts/data_doctor.py DATA --tokenizer google/flan-t5-base/spiece.model      all splits of a data folder
    python scripts/data_doctor.py scenes --splits train,val --limit 500                  the drawn scenes

Every picture is decoded. Copies that were saved again, resized, brightened or darkened are found; mirrored, rotated, cropped, framed and grey ones are
not. The text of captions is checked, not that of questions and answers. A table and, last, what to do go to stderr; data-doctor.html in --output shows
examples. Exit code 0: no fault, 3: faults or bad images were found. Thresholds and definitions: data/near_duplicates.py, data/caption_faults.py,
captioner/doctor.py.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from captioner import cli  # noqa: E402
from captioner.cli import say, setting  # noqa: E402
from captioner.errors import UsageError  # noqa: E402
from captioner.files import write_json  # noqa: E402
from data.rows import DataError  # noqa: E402

PAGE = "data-doctor.html"
DEMO_TOKENIZER = Path(__file__).resolve().parents[1] / "captioner" / "demo" / "t5-tiny-scenes"
USUAL_SPLITS = ("train", "val", "test")


@dataclass
class Settings:
    """Each field is one flag."""

    data: str | None = setting(None, "folder with SPLIT/metadata.jsonl, or scenes")
    splits: tuple[str, ...] = setting((), "splits to look at (all there are, if not given)")
    limit: int | None = setting(None, "only the first N images of each split")
    workers: int = setting(0, "processes that decode images")
    tokenizer: str | None = setting(None, "T5 vocabulary: a spiece.model or a directory with one; for scenes that of the demo if not given")
    max_caption_tokens: int = setting(40, "T5 tokens at which train.py cuts captions")
    max_image_pixels: int | None = setting(None, "larger pictures are bad (128 million if not given)")
    output: str = setting(".", f"directory for {PAGE}")
    json: str | None = setting(None, "write everything to this file, or - for stdout")

    positional = ("data",)


def splits_of(data: str) -> tuple[str, ...]:
    """The splits that can be read, in the order train, val, test, others; as asked for one by one where they cannot be listed."""
    from data import readers

    # An empty folder is left to the reader, which says what it expects.
    return readers.splits(data, USUAL_SPLITS) or USUAL_SPLITS


def load_tokenizer(settings: Settings):
    """T5's vocabulary that the settings name, of drawn scenes the demo's; otherwise None, which is said."""
    from captioner.tokenizer import FILE_NAME, Tokenizer

    path = Path(settings.tokenizer) if settings.tokenizer else DEMO_TOKENIZER if settings.data == "scenes" else None
    if path is None:
        say("no T5 token counts: name a vocabulary with --tokenizer")
        return None
    return Tokenizer(path / FILE_NAME if path.is_dir() else path)


def examine(settings: Settings) -> tuple[dict, list, list]:
    """(report, findings, splits that were looked at)."""
    from tqdm import tqdm

    from captioner import doctor
    from captioner.doctor_findings import findings
    from data import readers
    from data.images import MAX_PIXELS

    names = settings.splits or splits_of(settings.data)
    rows = {name: readers.read(settings.data, name)[: settings.limit] for name in names}
    tokenizer = load_tokenizer(settings)
    splits = []
    with tqdm(total=sum(map(len, rows.values())), desc="pictures", unit="image", disable=None, dynamic_ncols=True) as bar:
        for name in names:
            max_pixels = settings.max_image_pixels or MAX_PIXELS
            splits.append(doctor.look(name, rows[name], settings.workers, max_pixels, bar.update))
    report = {"data": settings.data, "limit": settings.limit, "tokenizer": str(tokenizer.path) if tokenizer else None}
    report |= doctor.examine(splits, tokenizer, settings.max_caption_tokens)
    found = findings(report)
    return report | {"findings": [asdict(one) for one in found]}, found, splits


def show(report: dict, say: Callable[[str], None]) -> None:
    """The table: a column a split."""
    from captioner.doctor_table import SPREAD, table

    rows = [(SPREAD, list(report["splits"])), *table(report)]
    widths = [max(map(len, column)) + 3 for column in zip(*([label, *cells] for label, cells in rows), strict=True)]
    for label, cells in rows:
        say(f"{label:{widths[0]}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)))


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    if not settings.data:
        raise UsageError("name the data: a folder with a sub-folder per split, or scenes")
    cli.require_positive(settings, "limit", "max_caption_tokens", "max_image_pixels")
    if settings.workers < 0:
        raise UsageError("--workers must not be negative")
    if len(set(settings.splits)) < len(settings.splits):
        raise UsageError("--splits names a split twice")
    # After the flags, so that --help and wrong flags need no torch.
    from captioner.doctor_findings import FAULT
    from captioner.doctor_page import write_page

    report, found, splits = examine(settings)
    show(report, say)
    page = Path(settings.output) / PAGE
    write_page(page, report, found, splits)
    write_json(settings.json, report)
    say(f"\nexamples: {page}")
    say("What to do" if found else "What to do: nothing, no fault was found")
    for one in found:
        say(f"  {one.level}  {one.sentence}")
    return cli.SOME_BAD if any(one.level == FAULT for one in found) else cli.DONE


if __name__ == "__main__":
    cli.run_command(main, expected=(DataError,))
