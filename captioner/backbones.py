"""Backbones by name: a flag's value becomes a module, with what prepares its input and a fingerprint of its weights."""

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Backbone:
    """A built backbone and where it came from."""

    module: "nn.Module"
    transform: Any  # image towers: data.transforms.ImageTransform
    name: str  # architecture, as given before the colon
    weights: str | None  # tag or path, as given after the colon; None: random initialisation
    weights_hash: str | None  # captioner.weights.fingerprint of the loaded module; None: random initialisation


def build_vision(spec: str, image_size: int | None = None) -> Backbone:
    """The image tower of `NAME[:WEIGHTS]`, on the CPU, in float32, in eval mode.

    NAME: an open_clip ViT (`ViT-B-16`), a row of `captioner.vit.SIZES`, or `timm/ARCHITECTURE`. WEIGHTS: a tag of
    open_clip or timm, or a local safetensors file or directory; without it the tower is random.
    image_size: pixels, instead of the architecture's own; position tables are resized.
    Raises UserError for unknown names (with the closest ones) and tags, files that do not fit, weights of another GELU.
    """
    name, _, weights = spec.partition(":")
    if spec.endswith(":"):
        raise UserError(f"{spec!r} ends in a colon: write NAME or NAME:WEIGHTS")
    if name.startswith("timm/"):
        return _build_timm(name, weights or None, image_size)
    return _build_vit(name.replace("/", "-"), weights or None, image_size)


def _build_timm(name: str, weights: str | None, image_size: int | None) -> Backbone:
    from captioner.timm_vision import TimmVision
    from captioner.weights import fingerprint
    from data.transforms import ImageTransform

    module = TimmVision(name.removeprefix("timm/"), weights, image_size).eval()
    transform = ImageTransform(**module.preprocess)
    return Backbone(module, transform, name, weights, fingerprint(module) if weights else None)


def _build_vit(name: str, weights: str | None, image_size: int | None) -> Backbone:
    import torch

    from captioner.vit import SIZES, VisionConfig, VisionTransformer, open_clip_names, resize_positions
    from captioner.weights import OPEN_CLIP_VIT, fingerprint, load_into
    from data.transforms import ImageTransform

    known = [*SIZES, *open_clip_names()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        raise UserError(
            f"unknown image tower {name!r}" + (f"; closest: {', '.join(close)}" if close else "") + "; all of them: "
            f'{", ".join(SIZES)}, timm/ARCHITECTURE, and python -c "import open_clip; print(*open_clip.list_models())"'
        )
    config = VisionConfig.from_name(name, image_size)
    if weights is None:
        return Backbone(VisionTransformer(config).eval(), ImageTransform(config.image_size), name, None, None)
    state, preprocess, source = _open_clip_weights(name, weights, known)
    table = state.get("visual.positional_embedding")
    if table is not None and table.ndim == 2:
        state["visual.positional_embedding"] = resize_positions(table, config.grid_size)
    with torch.device("meta"):  # no time spent on random numbers that the weights replace
        module = VisionTransformer(config).eval()
    load_into(module, state, OPEN_CLIP_VIT, source)
    return Backbone(module, ImageTransform(config.image_size, **preprocess), name, weights, fingerprint(module))


def _open_clip_weights(name: str, weights: str, known: list[str]) -> tuple[dict, dict, str]:
    """State dict, image settings and a name for messages, of a local file or directory or of an open_clip tag."""
    from captioner.timm_vision import open_clip_preprocess
    from captioner.vit import VisionConfig
    from captioner.weights import PICKLE_SUFFIXES, fetch, read_state_dict

    tower_is_quick = VisionConfig.from_name(name).activation == "quick_gelu"
    path = Path(weights)
    # A bare word is a tag first, so that a folder that happens to be called "openai" does not shadow it.
    is_path = path.is_file() or os.sep in weights or path.suffix in (".safetensors", *PICKLE_SUFFIXES)
    tag = None if is_path else _open_clip_tag(name, weights)
    preprocess: dict = {}
    if tag:
        _check_activation(name, tower_is_quick, bool(tag.get("quick_gelu")), f"{name}:{weights}", known)
        preprocess = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode")}
        repo, _, filename = tag["hf_hub"].rpartition("/")
        path = fetch(repo, str(Path(filename or "open_clip_model").with_suffix(".safetensors")))
    elif not is_path and not path.exists():
        raise _unknown_tag(name, weights)
    state = read_state_dict(path)
    config_file = (path if path.is_dir() else path.parent) / "open_clip_config.json"
    if not tag and config_file.is_file():
        preprocess = open_clip_preprocess(config_file)
        model = json.loads(config_file.read_text(encoding="utf-8")).get("model_cfg", {})
        _check_activation(name, tower_is_quick, bool(model.get("quick_gelu")), str(config_file), known)
    if state and all(key.startswith("module.") for key in state):
        # Checkpoints of open_clip's distributed training.
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state, preprocess, str(path)


def _open_clip_tag(name: str, tag: str) -> dict:
    from open_clip.pretrained import get_pretrained_cfg

    return get_pretrained_cfg(name, tag)


def _unknown_tag(name: str, tag: str) -> UserError:
    from open_clip.pretrained import list_pretrained_models_by_tag, list_pretrained_tags_by_model

    others = list_pretrained_models_by_tag(tag)
    known = ", ".join(list_pretrained_tags_by_model(name)) or "none"
    return UserError(
        f"{tag!r} is neither a file nor a tag of {name}; its tags: {known}"
        + (f"; architectures with that tag: {', '.join(others)}" if others else "")
    )


def _check_activation(name: str, tower_is_quick: bool, weights_are_quick: bool, source: str, known: list[str]) -> None:
    """Weights of the other GELU load without a shape error and give wrong tokens."""
    if weights_are_quick and not tower_is_quick:
        right = f"{name}-quickgelu"
        hint = f"use {right}" if right in known else f"there is no {right} to load them into"
        raise UserError(f"{source}: these weights were trained with QuickGELU, and {name} has GELU: {hint}")
    right = name.removesuffix("-quickgelu")
    # An architecture that is QuickGELU without the suffix (roberta-ViT-B-32) has no twin; its tags leave the mark out.
    if tower_is_quick and not weights_are_quick and right != name:
        raise UserError(f"{source}: these weights were trained with GELU, and {name} has QuickGELU: use {right}")
