"""The data doctor's numbers as rows of text, a cell a split: for the terminal and for the page."""

from captioner.doctor import CLIP_TOKENS, EXTREME_RATIO, TINY_SIDE
from data.caption_faults import FAULTS, HABITS

NONE = "–"
SPREAD = "least – median – greatest"  # how `_spread` is read


def table(report: dict) -> list[tuple[str, list[str]]]:
    """[(label, a cell for each split)] of a report of `doctor.examine`; faults of captions that no split has are left out."""
    columns = [_images(split) | _captions(split) for split in report["splits"].values()]
    faults = {*FAULTS, *HABITS}
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    return [(label, cells) for label, cells in rows if label not in faults or set(cells) != {"0"}]


def _images(split: dict) -> dict[str, str]:
    pictures, copies = split["pictures"], split["copies"]
    return {
        "images": _number(split["images"]),
        "bad images": _kinds(split["bad_images"]["reasons"]) or "0",
        "megabytes": f"{pictures['file_bytes']['total'] / 1e6:,.1f}" if pictures["file_bytes"] else NONE,
        "kilobytes of a file": _spread(pictures["file_bytes"], 1e3),
        "width": _spread(pictures["width"]),
        "height": _spread(pictures["height"]),
        f"less than {TINY_SIDE} pixels": _number(pictures["tiny"]["count"]),
        f"longer than {EXTREME_RATIO:g} : 1": _number(pictures["extreme_aspect_ratio"]["count"]),
        "formats": _kinds(pictures["formats"]) or NONE,
        "modes": _kinds(pictures["modes"]) or NONE,
        "with transparency": _number(pictures["alpha"]["count"]),
        "animated or several pages": _number(pictures["animated"]["count"]),
        "turned by EXIF": _number(pictures["turned_by_exif"]["count"]),
        "with a GPS position": _number(pictures["gps"]["count"]),
        "same file as an earlier one": _number(copies["exact"]),
        "looks the same as an earlier one": _number(copies["near"]),
        "too plain to compare looks": _number(pictures["too_plain_to_compare"]["count"]),
    }


def _captions(split: dict) -> dict[str, str]:
    text, t5, total = split["text"], split["text"]["t5"], split["captions"]
    cells = {
        "captions": _number(total),
        "captions of an image": _spread(split["captions_per_image"]),
        "words": _spread(text["words"]),
        "characters": _spread(text["characters"]),
        "T5 tokens": _spread(t5["tokens"]) if t5 else NONE,
        "too many T5 tokens": f"{_share(t5['longer']['count'], total)} > {t5['max_caption_tokens']}" if t5 else NONE,
        "with <unk>": _share(t5["unknown"]["count"], total) if t5 else NONE,
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


def _kinds(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else "0"
