"""The data doctor's page: one HTML file with what to do, the numbers, and examples with their pictures; no script, no network.

The style is that of the gallery, report_template.html. Every text from the data is escaped.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from captioner.doctor import Split, storable
from captioner.doctor_findings import FAULT, Finding, counted, visible
from captioner.doctor_table import NONE, SPREAD, table
from captioner.files import write_text
from captioner.report import TEMPLATE, thumbnail
from data.images import BadImage
from data.rows import Row

SHOWN = 8  # rows or captions with the same fault
SHOWN_PAIRS = 24
PICTURE_LISTS = {
    "tiny": "Tiny", "extreme_aspect_ratio": "Long and narrow", "animated": "Animated or several pages", "turned_by_exif": "Turned by EXIF",
    "gps": "With a GPS position", "alpha": "With transparency", "too_plain_to_compare": "Too plain to compare looks",
}  # fmt: skip
STYLE = """
main { padding-bottom: 4rem; }
section > p, .quiet { color: var(--quiet); font-size: 0.86rem; }
.scroll { max-height: none; }
.advice { list-style: none; margin: 0; padding: 0; max-width: 62rem; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.advice li { display: grid; grid-template-columns: 3.6rem minmax(0, 1fr); gap: 0.75rem; align-items: baseline; padding: 0.6rem 1rem; }
.advice li { overflow-wrap: anywhere; }
.advice li + li { border-top: 1px solid var(--line); }
.advice .fault { background: var(--warm); color: var(--card); }
.badge { margin: 0; text-align: center; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(22.5rem, 1fr)); gap: 1rem; }
.grid.single { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
figure { margin: 0; padding: 0.75rem; background: var(--card); border: 1px solid var(--line); border-radius: 12px; min-width: 0; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0.75rem; }
figure img { display: block; width: 100%; height: 10rem; object-fit: contain; border-radius: 8px; background: var(--faint); }
figure .none { display: grid; place-items: center; height: 10rem; border-radius: 8px; background: var(--faint); }
figcaption, .name { font-size: 0.78rem; color: var(--quiet); overflow-wrap: anywhere; }
figcaption { padding-bottom: 0.5rem; }
h3 { margin: 1.25rem 0 0.5rem; font-size: 0.86rem; }
td.text, td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 0.15rem; box-shadow: 0 0 0 1px var(--line); }
"""


def write_page(path: Path, report: dict, found: Sequence[Finding], splits: Sequence[Split]) -> None:
    """Write the page, whole or not at all; pictures of examples are opened again. Raises UserError on a full disk."""
    by_name = {split.name: split for split in splits}
    name = visible(storable(report["data"].rstrip("/").rpartition("/")[2] or report["data"]))
    images = sum(split["images"] for split in report["splits"].values())
    captions = sum(split["captions"] for split in report["splits"].values())
    facts = {"data": report["data"], "images": f"{images:,}", "captions": f"{captions:,}", "T5 vocabulary": report["tokenizer"] or "none"}
    if report["limit"]:
        facts["limit"] = f"the first {report['limit']:,} images of each split"
    shown_facts = "".join(f"<div><dt>{key}</dt><dd>{_text(value)}</dd></div>" for key, value in facts.items())
    numbers = [[_text(label), *map(_text, cells)] for label, cells in table(report)]
    body = "".join([
        f'<header><h1>Data doctor: {_text(name)}</h1><dl id="facts">{shown_facts}</dl></header>',
        "<main>",
        _section("What to do", _advice(found)),
        "".join(_leak(leak, by_name) for leak in report["leaks"] if leak["images"]),
        _section("Numbers", _table([SPREAD, *report["splits"]], numbers, numbers=True)),
        "".join(_split(split_name, split, by_name[split_name]) for split_name, split in report["splits"].items()),
        "".join(_shared(shared) for shared in report["shared_captions"] if shared["captions"]),
        "</main>",
    ])  # fmt: skip
    write_text(path, _document(f"Data doctor: {name}", body))


def _document(title: str, body: str) -> str:
    template = TEMPLATE.read_text(encoding="utf-8")
    style = template.split("<style>")[1].split("</style>")[0]
    dark = style.split(':root[data-theme="dark"] {')[1].split("}")[0]
    style += f"@media (prefers-color-scheme: dark) {{ :root {{{dark}}} }}\n{STYLE}"
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _text(text: str) -> str:
    """Text from the data or from a report as HTML, characters that show nothing as escapes."""
    return escape(visible(text))


def _section(title: str, *content: str) -> str:
    """A section, nothing where all of its content is empty."""
    return f"<section><h2>{_text(title)}</h2>{''.join(content)}</section>\n" if any(content) else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Cells are HTML; numbers: all columns but the first are set to the right."""
    kind = ' class="number"' if numbers else ' class="text"'
    head = "".join(f'<th scope="col"{kind if index else ""}>{_text(one)}</th>' for index, one in enumerate(heads))
    lines = [f'<tr><th scope="row">{first}</th>{"".join(f"<td{kind}>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>' if lines else ""


def _advice(found: Sequence[Finding]) -> str:
    if not found:
        return "<p>Nothing: no fault was found.</p>"
    lines = [
        f'<li><span class="badge{" fault" if one.level == FAULT else ""}">{one.level}</span><span>{_text(one.sentence)}</span></li>' for one in found
    ]
    return f'<ul class="advice">{"".join(lines)}</ul>'


def _leak(leak: dict, splits: dict[str, Split]) -> str:
    first, second = leak["splits"]
    told = f"{counted(leak['images'], 'image')} of {second}: {leak['exact']} the same file, {leak['near']} the same look. Left {first}, right {second}."
    return _section(f"In {first} and in {second}", f"<p>{_text(told)}</p>", _pairs(leak, splits[first], splits[second]))


def _pairs(copies: dict, first: Split, second: Split) -> str:
    figures = []
    for example in _some(copies):
        told = "the same file" if example["kind"] == "exact" else f"the same look, {example['distance']} of 64 bits of its hash differ"
        shown = "".join(_picture(split, split.rows[number]) for split, number in zip((first, second), example["rows"], strict=True))
        figures.append(f'<figure><figcaption>{told}</figcaption><div class="pair">{shown}</div></figure>')
    left = copies["images"] - len(figures)
    return f'<div class="grid">{"".join(figures)}</div>{f"<p>{left:,} more</p>" if left else ""}' if figures else ""


def _some(copies: dict) -> list[dict]:
    """Pairs to show: of many, exact ones take half of the places at most; of near ones the closest and the most doubtful."""
    listed, exact = copies["listed"], min(copies["exact"], SHOWN_PAIRS // 2)
    near, places = listed[copies["exact"] :], SHOWN_PAIRS - exact
    if len(near) > places:
        near = near[: places - places // 2] + near[-(places // 2) :]
    return [*listed[:exact], *near, *listed[exact : copies["exact"]]][:SHOWN_PAIRS]


def _of_every_reason(bad: list[dict]) -> list[dict]:
    seen = Counter()
    shown = []
    for one in bad:
        seen[one["reason"]] += 1
        if seen[one["reason"]] <= SHOWN:
            shown.append(one)
    return shown


def _picture(split: Split, row: Row) -> str:
    """The picture over its split and id."""
    try:
        shown = f'<img src="{thumbnail(row.image.open())}" alt="">'
    except BadImage:
        shown = '<span class="none quiet">no picture</span>'
    return f'<div>{shown}<div class="name">{_text(f"{split.name} / {storable(row.id)}")}</div></div>'


def _split(name: str, values: dict, split: Split) -> str:
    """The examples of one split."""
    rows = {storable(row.id): row for row in split.rows}
    bad = [[_text(one["id"]), _text(one["reason"]), _text(one["message"])] for one in _of_every_reason(values["bad_images"]["listed"])]
    text = values["text"]
    unknown = text["t5"]["unknown"] if text["t5"] else {"listed": [], "characters": {}}
    lists = "".join(_pictures(title, values["pictures"][key], split, rows) for key, title in PICTURE_LISTS.items())
    faults = text["faults"] | text["habits"] | {"becomes <unk>": unknown, "mostly other than ASCII": text["mostly_not_ascii"]}
    captions = [[_text(kind), _text(one["id"]), _marked(one)] for kind, found in faults.items() for one in found["listed"][:SHOWN]]
    repeated = [[_text(visible(one["caption"]) or NONE), f"{one['images']:,}"] for one in text["most_repeated"]]
    characters = [[_text(one), f"U+{ord(one):04X}", f"{count:,}"] for one, count in unknown["characters"].items() if len(one) == 1][:50]
    return "".join([
        _section(f"Bad images of {name}", _table(["id", "reason", "message"], bad)),
        _section(f"Copies within {name}", _pairs(values["copies"], split, split)),
        _section(f"Pictures of {name} to look at", lists),
        _section(f"Captions of {name} to look at", _table(["what", "id", "caption"], captions)),
        _section(f"Characters of {name} that the T5 vocabulary lacks", _table(["character", "code", "captions"], characters, numbers=True)),
        _section(f"Captions of {name} on most images", _table(["caption", "images"], repeated, numbers=True)),
    ])  # fmt: skip


def _pictures(title: str, listed: dict, split: Split, rows: dict[str, Row]) -> str:
    if not listed["listed"]:
        return ""
    figures = "".join(f"<figure>{_picture(split, rows[row_id])}</figure>" for row_id in listed["listed"][:SHOWN])
    return f'<h3>{_text(title)}: {listed["count"]:,}</h3><div class="grid single">{figures}</div>'


def _marked(example: dict) -> str:
    """A caption with the part that was found marked."""
    before, found, after = example["caption"].partition(example["found"]) if example["found"] else (example["caption"], "", "")
    if found == example["caption"]:
        return _text(found)
    return f"{_text(before)}<mark>{_text(found) or ' '}</mark>{_text(after)}" if found else _text(before)


def _shared(shared: dict) -> str:
    first, second = shared["splits"]
    told = f"{counted(shared['captions'], 'caption')}, on {counted(shared['images'], 'image')} of {second}"
    return _section(f"Captions in {first} and in {second}", f"<p>{_text(told)}</p>", _table(["caption"], [[_text(one)] for one in shared["listed"][:SHOWN]]))
