"""config.json of a run: read, and checked key by key before anything is built from it. Imports no torch.

A config from elsewhere may hold anything. What is accepted here names no file outside the run, asks for no size that no run has, and has the type that
every later use expects; whether it is true of the run's weights is checked where they are loaded.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from captioner.errors import UserError
from captioner.files import read_json
from data.views import View, check_views

FORMAT = 2
LARGEST_IMAGE = 8192  # pixels along a side
NO_RUN = ", which no run has: it is {}"
PLACES = ("decoder", "encoder", "vision")

Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and what it must be


def is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_IMAGE


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def are_three(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list of three that each hold."""
    return lambda value: isinstance(value, (list, tuple)) and len(value) == 3 and all(map(holds, value))


def is_number(low: float, high: float) -> Callable[[Any], bool]:
    """Whether a value is a finite number from low to high."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def are_different(holds: Callable[[str], Any]) -> Callable[[Any], bool]:
    """Whether a value is a list of different texts that each hold."""
    return lambda value: isinstance(value, list) and all(isinstance(name, str) and holds(name) for name in value) and len(set(value)) == len(value)


def are_views(value: Any) -> bool:
    """Whether a value is a list of at least one view, see data/views.py."""
    if not isinstance(value, list) or not value or not all(map(are_three(is_number(0, 1)), value)):
        return False
    try:
        check_views(tuple(View(*view) for view in value))
    except ValueError:
        return False
    return True


def optional(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


are_places: Rule = (are_different(PLACES.__contains__), f"a list of {', '.join(PLACES)}")
# An adapter's name is also that of its folder.
are_names: Rule = (are_different(re.compile(r"[A-Za-z0-9_-]+").fullmatch), "a list of names of letters, digits, - and _")
SOURCE: dict[str, Rule] = {
    "name": (is_text, "a text"),
    "weights": (optional(is_text), "a text or null"),
    "hash": (optional(is_hash), "a SHA-256 or null"),
    "embedded": (lambda value: isinstance(value, bool), "true or false"),
}
TRANSFORM: dict[str, Rule] = {
    "image_size": (is_size, f"a number of pixels up to {LARGEST_IMAGE}"),
    "mean": (are_three(is_number(-1e3, 1e3)), "three numbers"),
    "std": (are_three(is_number(1e-3, 1e3)), "three numbers above 0"),
    "interpolation": (lambda value: value in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"), "a filter of Pillow's"),
    "resize_mode": (lambda value: value in ("shortest", "longest", "squash"), "one of shortest, longest, squash"),
    "resize_size": (optional(is_size), f"a number of pixels up to {LARGEST_IMAGE}, or null"),
    "fill_color": (lambda value: is_byte(value) or are_three(is_byte)(value), "one or three numbers from 0 to 255"),
}
VIEWS: Rule = (are_views, "a list of views, each [left, top, side] within 0 to 1")
IS_OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
MODEL: dict[str, Rule] = {
    "vision": IS_OBJECT, "text": IS_OBJECT, "lora": are_places, "adapters": are_names, "stack": are_names, "prompt": are_places, "frozen": are_names,
    "base_bits": (lambda value: value is None or value == 4 and type(value) is int, "null or 4"),
}  # fmt: skip


def as_json(value: Any) -> str:
    """A JSON value in a message, at most 100 characters of it."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def check_object(value: Any, rules: Mapping[str, Rule], where: str, verdict: str = ", not {}") -> None:
    """Raises UserError unless value is an object that has every key of rules with a value that holds.

    where is how messages call it, verdict how they go on after a wrong value, `{}` for what it must be.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} is {as_json(value)}{verdict.format('an object')}")
    for key, (holds, must_be) in rules.items():
        if key not in value:
            raise UserError(f"{where} lacks {key}")
        if not holds(value[key]):
            raise UserError(f"{where}.{key} is {as_json(value[key])}{verdict.format(must_be)}")


def read_config(run: str | Path) -> dict:
    """A run's config.json. Raises UserError where run is neither a run directory nor a bundle, of another format, or holds what no run has."""
    from captioner import bundle

    run = Path(run)
    if not run.is_dir() and not bundle.is_bundle(run):
        raise UserError(f"{run}: no such run directory or bundle")
    if run.is_dir() and not (run / "config.json").is_file():
        advice = "; name the run, and --checkpoint best or last" if run.resolve().parent.name == "checkpoints" else ""
        raise UserError(f"{run} is no run directory: it has no config.json{advice}")
    config = read_json(run / "config.json") if run.is_dir() else bundle.read_config(run)
    where = f"{run / 'config.json'}: "
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT or type(found) is not int:
        raise UserError(f"{where}format {as_json(found)} is not {FORMAT}: not a run directory of this version")
    check_object(config, {"model": IS_OBJECT, "settings": IS_OBJECT}, f"{where}config", NO_RUN)
    check_object(config["settings"], {"data": (is_text, "a text")}, f"{where}settings", NO_RUN)
    check_model(config["model"], where)
    return config


def check_model(facts: dict, where: str) -> None:
    """Raises UserError where the facts about a model (config.json under "model") are none that a run has."""
    check_object(facts, MODEL, f"{where}model", NO_RUN)
    vision, text = facts["vision"], facts["text"]
    check_object(vision, SOURCE | {"image_size": TRANSFORM["image_size"], "transform": IS_OBJECT}, f"{where}model.vision", NO_RUN)
    check_object(vision["transform"], TRANSFORM, f"{where}model.vision.transform", NO_RUN)
    check_object(text, SOURCE, f"{where}model.text", NO_RUN)
    if "views" in vision["transform"]:  # runs without views have no such key
        check_object(vision["transform"], {"views": VIEWS}, f"{where}model.vision.transform", NO_RUN)
    unknown = sorted(vision["transform"].keys() - TRANSFORM.keys() - {"views"})
    if unknown:
        raise UserError(f"{where}model.vision.transform has {as_json(unknown[0])}, which no run has")
    if vision["transform"]["image_size"] != vision["image_size"]:
        raise UserError(f"{where}model.vision: image_size is {vision['image_size']}, and {vision['transform']['image_size']} in its transform")
    for part, source in (("vision", vision), ("text", text)):
        if not source["embedded"] and None in (source["weights"], source["hash"]):
            raise UserError(f"{where}model.{part} is not embedded and names no weights with a hash: there is nothing to load it from")


def checked_settings(cls: type, saved: Any, where: str) -> dict:
    """Fields of the dataclass cls by name from what a file holds of them, lists as tuples where the field is one; where is how messages call it.

    Fields that saved lacks keep their defaults: the file is older than they are. Raises UserError on a name that cls has not, a value of another type, or
    one that is not among the field's choices.
    """
    check_object(saved, {}, where)
    hints, choices = typing.get_type_hints(cls), {field.name: field.metadata.get("choices") for field in dataclasses.fields(cls)}
    settings = {}
    for name, value in saved.items():
        if name not in hints:
            raise UserError(f"{where} has {as_json(name)}, which this version does not")
        if not fits(value, hints[name]):
            raise UserError(f"{where}.{name} is {as_json(value)}, not {shown(hints[name])}")
        chosen = () if value is None else value if isinstance(value, list) else (value,)
        if choices[name] and not set(chosen) <= set(choices[name]):
            raise UserError(f"{where}.{name} is {as_json(value)}, not of {', '.join(map(str, choices[name]))}")
        settings[name] = tuple(value) if isinstance(value, list) and holds_tuple(hints[name]) else value
    return settings


def holds_tuple(kind: Any) -> bool:
    """Whether a field's type is a tuple, or one or nothing."""
    return any(typing.get_origin(member) is tuple for member in (kind, *typing.get_args(kind)))


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type as dataclass fields name it: plain ones, unions, lists, tuples and objects of them."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, member) for member in members)
    if origin in (tuple, list):
        return isinstance(value, list) and all(fits(item, members[0]) for item in value) and (origin is list or ... in members or len(value) == len(members))
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, members[1]) for item in value.values())
    if kind is float:
        return type(value) in (int, float) and -1e30 <= value <= 1e30
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    return type(value) is kind


def shown(kind: Any) -> str:
    """A type in a message."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
