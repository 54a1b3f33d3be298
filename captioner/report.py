"""Reports that people look at: one HTML file with pictures, captions, scores and plots that needs no network, and the loss curve of a run.

The data is JSON inside the file; `report_template.html` draws it, as text only, so a caption can neither end the script nor run one.

Legend: W words of a caption, h and w rows and columns of its attention maps.
"""

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from captioner.errors import UserError
from captioner.files import describe_os_error, replacing, write_text
from data.images import BadImage
from data.rows import Row
from data.transforms import ImageTransform

TEMPLATE = Path(__file__).with_name("report_template.html")
THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 160, 65
LOWER_IS_BETTER = ("false", "hallucination")


@dataclass
class Decoded:
    """One caption of an image. maps (W, h, w): the decoder's attention to the picture for each word; scores that are not finite count as missing."""

    name: str
    caption: str
    scores: dict[str, float] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    maps: np.ndarray | None = None


@dataclass
class Item:
    """One image with its references and captions. seen_box: the part that maps cover, from `ImageTransform.seen_box`."""

    image_id: str
    image: Image.Image | None
    references: list[str]
    decoded: list[Decoded]
    seen_box: tuple[float, float, float, float] = (0, 0, 1, 1)


def item_of(row: Row, decoded: list[Decoded], transform: ImageTransform | None = None) -> Item:
    """The item of a data row, without a picture where it cannot be read. transform: that of the encoder over whose tokens the maps are."""
    references = list(row.captions)
    try:
        image = row.image.open()
    except BadImage:
        return Item(row.id, None, references, decoded)
    return Item(row.id, image, references, decoded, transform.seen_box(image)) if transform else Item(row.id, image, references, decoded)


def write_report(path: str | Path, title: str, facts: dict[str, str], table: list[dict], items: Iterable[Item], plots: dict[str, Path]) -> None:
    """Write the report, whole or not at all.

    table: rows of the summary table, keys are columns; a key `self_scored` lists the columns whose cells are marked so, and is no column itself.
    items are read once, one at a time. plots: title → PNG file. Raises UserError on a plot that cannot be read, a full disk, or maps that
    do not fit their words.
    """
    data = {
        "title": title,
        "facts": list(facts.items()),
        "table": _table(table),
        "plots": [{"title": name, "image": _data_uri("png", _read(Path(file)))} for name, file in plots.items()],
        "items": [_item(item) for item in items],
        "lower_is_better": LOWER_IS_BETTER,
    }
    write_text(Path(path), _fill_template(data))


def training_plot(run: Path) -> dict[str, Path]:
    """`plots` of a report with the run's loss curve, if it has one."""
    return {"Training": run / "loss.png"} if (run / "loss.png").is_file() else {}


def write_training_report(run: Path, facts: dict[str, str], rows: Iterable[Row]) -> None:
    """report.html of a run from its metrics.jsonl: the loss curve, and what every evaluation said about the shown images.

    rows: the validation split; those that metrics.jsonl names are opened and shown, without a picture where it cannot be read.
    """
    evaluations = {line["step"]: line for line in _metrics(run) if line["split"] == "val"}.values()
    captions: dict[str, list[Decoded]] = {}
    for line in evaluations:
        for shown in line["captions"]:
            captions.setdefault(shown["id"], []).append(Decoded(f"step {line['step']}", shown["caption"]))
    table = [{"step": str(line["step"]), "loss": line["loss"], "CIDEr": line["CIDEr"], "images": line["n"]} for line in evaluations]
    found = {row.id: row for row in rows if row.id in captions}
    items = (item_of(found[name], decoded) for name, decoded in captions.items() if name in found)
    write_report(run / "report.html", f"Training of {run.name}", facts, table, items, training_plot(run))


def plot_losses(run: Path) -> None:
    """loss.png of a run from its metrics.jsonl: training and validation loss, and CIDEr on a second axis, over steps."""
    from matplotlib.figure import Figure

    lines = _metrics(run)
    train = [line for line in lines if line["split"] == "train"]
    val = [line for line in lines if line["split"] == "val"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.subplots()
    losses.plot([line["step"] for line in train], [line["loss"] for line in train], color="#9db8d9", linewidth=1, label="training loss")
    losses.plot([line["step"] for line in val], [line["loss"] for line in val], color="#1f5fa8", marker="o", markersize=4, label="validation loss")
    losses.set_xlabel("step")
    losses.set_ylabel("loss per token")
    later = [line["loss"] for line in [*train, *val] if line["step"] > 0 and math.isfinite(line["loss"])]
    if later:
        losses.set_ylim(0.95 * min(later), 1.05 * max(later))
    scores = losses.twinx()
    scores.plot([line["step"] for line in val], [line["CIDEr"] for line in val], color="#c4622d", marker="s", markersize=4, label="CIDEr (greedy)")
    scores.set_ylabel("CIDEr")
    scores.set_ylim(bottom=0)
    handles = [*losses.get_lines(), *scores.get_lines()]
    losses.legend(handles, [handle.get_label() for handle in handles], loc="center right")
    losses.spines["top"].set_visible(False)
    scores.spines["top"].set_visible(False)
    with replacing(run / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _item(item: Item) -> dict:
    values = {"id": item.image_id, "references": list(item.references), "decoded": [_decoded(one) for one in item.decoded]}
    if item.image is not None:
        values |= {"image": thumbnail(item.image), "size": item.image.size, "seen": [round(side, 4) for side in item.seen_box]}
    return values


def _decoded(decoded: Decoded) -> dict:
    values = {"name": decoded.name, "caption": decoded.caption}
    values["scores"] = {name: float(f"{value:.5g}") for name, value in decoded.scores.items() if math.isfinite(value)}
    if decoded.maps is not None and len(decoded.words):
        maps = np.nan_to_num(np.asarray(decoded.maps, dtype=np.float32))
        if maps.ndim != 3 or len(maps) != len(decoded.words):
            raise UserError(f"caption {decoded.caption!r}: {len(decoded.words)} words do not fit attention maps of shape {maps.shape}")
        values |= {"words": decoded.words, "grid": maps.shape[1:], "maps": quantise(maps)}
        values["peaks"] = [round(float(one.max() / max(one.mean(), 1e-9)), 1) for one in maps]
    return values


def quantise(maps: np.ndarray) -> str:
    """Maps (W, h, w) as base64 of one byte a cell, row by row: 0 at a map's least, 255 at its greatest."""
    low, high = (extreme(maps, axis=(1, 2), keepdims=True) for extreme in (np.min, np.max))
    levels = np.rint(255 * (maps - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode("ascii")


def thumbnail(image: Image.Image) -> str:
    """A data URI of the image, its longest side at most 160 pixels; nothing but pixels goes through."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    small.info = {}
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY)
    return _data_uri("webp", buffer.getvalue())


def _table(rows: list[dict]) -> dict:
    """Columns and cells [text, is a number, is self-scored]."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "self_scored"]
    cells = []
    for row in rows:
        marked = row.get("self_scored", ())
        cells.append([[_text(row.get(name)), isinstance(row.get(name), int | float), name in marked] for name in columns])
    return {"columns": columns, "rows": cells}


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:.{3 if abs(value) < 10 else 2}f}" if math.isfinite(value) else "–"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the plot {describe_os_error(error)}") from None


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _fill_template(data: dict) -> str:
    """The template with the data, and with the hash of its script as the only one that a browser may run."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: lone surrogates and U+2028 are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return template.replace("SCRIPT_HASH", digest, 1).replace("REPORT_DATA", text, 1)
