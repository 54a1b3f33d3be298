"""Two files of captions of the same images, compared metric by metric. Imports no torch."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from captioner.errors import UserError
from captioner.metrics.bootstrap import LEVEL, Group, mean_group, paired_bootstrap, ratio_group, text_groups

CLIP_SCORES = ("CLIPScore", "CLIP_cosine", "RefCLIPScore")
NAMED_IN_ERRORS = 3


def compare(a_path: str, b_path: str, tokenize: str = "ptb", draws: int = 1000, seed: int = 0, limit: int | None = None) -> tuple[dict, list[str]]:
    """What `--json` gets, and lines for people about metrics that cannot be compared.

    The files are captions.jsonl as evaluate.py and best_of_n.py write it: rows with image_id, caption, references, and scores if there are any.
    Differences are B - A. limit: the first N images of A. Raises UserError where the images or their references differ.
    """
    a, by_id = read_captions(a_path), {row["image_id"]: row for row in read_captions(b_path)}
    check_same(a, by_id, a_path, b_path)
    a = a[:limit]
    b = [by_id[row["image_id"]] for row in a]
    groups = text_groups([row["caption"] for row in a], [row["caption"] for row in b], [row["references"] for row in a], tokenize)
    clip, notes = clip_groups(a, b)
    differences = paired_bootstrap([*groups, *clip, *scene_groups(a, b)], draws, seed)
    metrics = {name: dataclasses.asdict(difference) for name, difference in differences.items()}
    facts = {"a": a_path, "b": b_path, "n": len(a), "tokenize": tokenize, "draws": draws, "seed": seed, "level": LEVEL}
    if clip:
        facts["scorer"] = a[0]["scorer"]
    return {**facts, "metrics": metrics}, notes


def read_captions(path: str) -> list[dict]:
    """The rows of a captions.jsonl. Raises UserError that names the file and line where it is not one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path}: not a captions.jsonl") from None
    rows: dict[str, dict] = {}
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            row = json.loads(line)
            image_id, _, _ = row["image_id"], row["caption"], row["references"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is no JSON object with image_id, caption and references") from None
        if image_id in rows:
            raise UserError(f"{path}: line {number} repeats the image {image_id}")
        rows[image_id] = row
    if not rows:
        raise UserError(f"{path}: no captions")
    return list(rows.values())


def check_same(a: Sequence[dict], b: dict[str, dict], a_path: str, b_path: str) -> None:
    """Raise UserError unless both files have the same images with the same references."""
    ids = {row["image_id"] for row in a}
    for missing, path in ((sorted(ids - b.keys()), b_path), (sorted(b.keys() - ids), a_path)):
        if missing:
            raise UserError(f"{path} lacks {_some(missing)} of the other file: only captions of the same images can be compared")
    differing = [row["image_id"] for row in a if sorted(row["references"]) != sorted(b[row["image_id"]]["references"])]
    if differing:
        raise UserError(f"{a_path} and {b_path} have different references for {_some(differing)}")


def _some(ids: Sequence[str]) -> str:
    """How many, and the first of them."""
    more = ", …" if len(ids) > NAMED_IN_ERRORS else ""
    return f"{len(ids)} image{'s' if len(ids) > 1 else ''} ({', '.join(map(str, ids[:NAMED_IN_ERRORS]))}{more})"


def clip_groups(a: Sequence[dict], b: Sequence[dict]) -> tuple[list[Group], list[str]]:
    """CLIP scores that every row of both files has from one scorer; otherwise a line that says why there are none."""
    scorers = [{row.get("scorer") for row in rows} for rows in (a, b)]
    named = [" and ".join(sorted(str(name) for name in names)) for names in scorers]
    if scorers[0] != scorers[1] or len(scorers[0]) > 1:
        return [], [f"no CLIPScore: A was scored by {named[0]}, B by {named[1]}"]
    present = [name for name in CLIP_SCORES if all(name in row for row in [*a, *b])]
    return [mean_group(name, _values(a, name), _values(b, name)) for name in present], []


def scene_groups(a: Sequence[dict], b: Sequence[dict]) -> list[Group]:
    """Hallucination and recall where every row of both files has its judged facts (drawn scenes)."""
    if not all("facts" in row for row in [*a, *b]):
        return []

    def counts(rows: Sequence[dict], name: str) -> np.ndarray:
        return _values([row["facts"] for row in rows], name)

    return [
        ratio_group("hallucination", *((counts(rows, "false"), counts(rows, "stated")) for rows in (a, b)), lower_is_better=True),
        ratio_group("recall", *((counts(rows, "named"), counts(rows, "objects")) for rows in (a, b))),
    ]


def _values(rows: Sequence[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def show(comparison: dict, say: Callable[[str], None]) -> None:
    """The comparison as a table for people."""
    say(f"A {comparison['a']}\nB {comparison['b']}")
    say(f"{'':13} {'A':>8} {'B':>8} {'B - A':>9}   {comparison['level']:.0%} interval       B better, worse, equal")
    for name, found in comparison["metrics"].items():
        interval = f"[{found['low']:+.4f}, {found['high']:+.4f}]"
        verdict = "" if found["low"] <= 0 <= found["high"] else "  excludes 0"
        images = f"{found['wins']:>6} {found['losses']:>6} {found['ties']:>6}"
        say(f"{name:13} {found['a']:8.4f} {found['b']:8.4f} {found['difference']:+9.4f}   {interval}  {images}{verdict}")
    clip = f", CLIP scores by {comparison['scorer']}" if "scorer" in comparison else ""
    say(f"{comparison['n']} images, {comparison['draws']} draws, seed {comparison['seed']}, tokenize {comparison['tokenize']}{clip}")
