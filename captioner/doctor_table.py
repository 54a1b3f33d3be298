"""The data doctor's numbers as rows of text, a cell a split: for the terminal and for the page."""

from collections.abc import Iterable

from captioner.doctor import CLIP_TOKENS, EXTREME_RATIO, TINY_SIDE
from data.caption_faults import FAULTS, HABITS

NONE = "–"
FILES = "different image files"  # where some have several rows, as questions have
SPREAD = "least – median – greatest"  # how `_spread` is read


def table(report: dict) -> list[tuple[str, list[str]]]:
    """[(label, a cell for each split)] of a report of `doctor.examine`; faults of captions that no split has are left out."""
    splits = report["splits"].values()
    reasons = _names(split["bad_images"]["reasons"] for split in splits)
    formats, modes = (_names(split["pictures"][key] for split in splits) for key in ("formats", "modes"))
    columns = [_images(split, reasons, formats, modes) | _shared(name, report) | _captions(split) for name, split in report["splits"].items()]
    faults = {*FAULTS, *HABITS}
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    rows = [(label, cells) for label, cells in rows if label not in faults or set(cells) != {"0"}]
    several_rows = any(split["different_files"] != split["images"] for split in splits)
    return [(label, cells) for label, cells in rows if several_rows or label != FILES]


def _names(counts: Iterable[dict[str, int]]) -> list[str]:
    """The names of all splits' counts, each once."""
    return list(dict.fromkeys(name for one in counts for name in one))


def _images(split: dict, reasons: list[str], formats: list[str], modes: list[str]) -> dict[str, str]:
    pictures, copies, bad = split["pictures"], split["copies"], split["bad_images"]
    return {
        "images": _number(split["images"]),
        FILES: _number(split["different_files"]),
        "bad images": _number(bad["count"]),
        **{f"bad images: {reason}": _number(bad["reasons"].get(reason, 0)) for reason in reasons},
        "megabytes": f"{pictures['file_bytes']['total'] / 1e6:,.1f}" if pictures["file_bytes"] else NONE,
        "kilobytes of a file": _spread(pictures["file_bytes"], 1e3),
        "width": _spread(pictures["width"]),
        "height": _spread(pictures["height"]),
        f"less than {TINY_SIDE} pixels": _number(pictures["tiny"]["count"]),
        f"longer than {EXTREME_RATIO:g} : 1": _number(pictures["extreme_aspect_ratio"]["count"]),
        **{f"format {name}": _number(pictures["formats"].get(name, 0)) for name in formats},
        **{f"mode {name}": _number(pictures["modes"].get(name, 0)) for name in modes},
        "with transparency": _number(pictures["alpha"]["count"]),
        "animated or several pages": _number(pictures["animated"]["count"]),
        "turned by EXIF": _number(pictures["turned_by_exif"]["count"]),
        "with a GPS position": _number(pictures["gps"]["count"]),
        "same file as an earlier one": _number(copies["exact"]),
        "looks the same as an earlier one": _number(copies["near"]),
        "too plain to compare looks": _number(pictures["too_plain_to_compare"]["count"]),
    }


def _shared(second: str, report: dict) -> dict[str, str]:
    """Pictures of a split that are also in an earlier one."""
    leaks = {tuple(leak["splits"]): leak for leak in report["leaks"]}
    cells = {}
    for first in list(report["splits"])[:-1]:
        leak = leaks.get((first, second))
        cells[f"same file as one of {first}"] = _number(leak["exact"]) if leak else NONE
        cells[f"looks the same as one of {first}"] = _number(leak["near"]) if leak else NONE
    return cells


def _captions(split: dict) -> dict[str, str]:
    text, t5, total = split["text"], split["text"]["t5"], split["captions"]
    cells = {
        "captions": _number(total),
        "captions of an image": _spread(split["captions_per_image"]),
        "words": _spread(text["words"]),
        "characters": _spread(text["characters"]),
        "T5 tokens": _spread(t5["tokens"]) if t5 else NONE,
        **({f"more than {t5['max_caption_tokens']} T5 tokens": _share(t5["longer"]["count"], total)} if t5 else {}),
        "with unknown T5 pieces": _share(t5["unknown"]["count"], total) if t5 else NONE,
        "CLIP tokens": _spread(text["clip_tokens"]),
        f"more than {CLIP_TOKENS} CLIP tokens": _share(text["longer_than_clip"]["count"], total),
        "with an end mark": _share(text["with_end_mark"], total),
        "with other than ASCII": _share(text["with_other_than_ascii"], total),
        "mostly other than ASCII": _share(text["mostly_not_ascii"]["count"], total),
        "distinct captions": _number(text["distinct"]),
        "captions on several images": _number(text["on_several_images"]),
    }
    return cells | {name: _number(found["count"]) for name, found in (text["faults"] | text["habits"]).items()}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.1f}"


def _spread(values: dict | None, unit: float = 1) -> str:
    return " – ".join(_number(values[name] / unit) for name in ("min", "median", "max")) if values else NONE


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else "0"
