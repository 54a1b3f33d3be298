"""Backbones by name: a flag's value becomes a module, with what prepares its input and a fingerprint of its weights."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.errors import UserError
from captioner.files import read_json
from captioner.run_config import LARGEST_IMAGE, TRANSFORM, check_object

if TYPE_CHECKING:
    from torch import nn

    from captioner.t5 import T5
    from captioner.tokenizer import Tokenizer
    from captioner.vit import VisionConfig, VisionTransformer

LARGEST_TABLE = 2**27  # numbers of a position table, half a gigabyte


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

    NAME: an open_clip ViT (`ViT-B-16`), a row of `captioner.demo.CLIPS`, or `timm/ARCHITECTURE`. WEIGHTS: a tag of
    open_clip, timm or the embedded demo, or a local safetensors file or directory with the keys of open_clip (for a ViT, also those of Hugging
    Face's CLIPModel and CLIPVisionModel; config.json and preprocessor_config.json beside them count); without it the tower is random.
    image_size: pixels, instead of the architecture's own; position tables are resized.
    Raises UserError for unknown names (with the closest ones) and tags, files that do not fit, weights of another GELU.
    """
    name, _, weights = spec.partition(":")
    if spec.endswith(":"):
        raise UserError(f"{spec!r} ends in a colon: write NAME or NAME:WEIGHTS")
    if image_size is not None and image_size > LARGEST_IMAGE:
        raise UserError(f"images of {image_size} pixels are larger than {LARGEST_IMAGE}")
    if name.startswith("timm/"):
        return _build_timm(name, weights or None, image_size)
    return _build_vit(name.replace("/", "-"), weights or None, image_size)


def build_own_vision(name: str, image_size: int, path: Path) -> Backbone:
    """The image tower NAME with the weights of a safetensors file under our own names, as `build_vision`.

    Raises UserError where they do not fit, before anything of the size that the name stands for is allocated.
    """
    import torch

    from captioner.vit import VisionConfig, VisionTransformer
    from captioner.weights import fingerprint, load_into, read_state_dict
    from data.transforms import ImageTransform

    state = read_state_dict(path)
    if name.startswith("timm/"):
        _check_timm_size(name.removeprefix("timm/"), state, path)
        built = build_vision(name, image_size)
        load_into(built.module, state, None, "vision")
        return replace(built, weights_hash=fingerprint(built.module))
    config = VisionConfig.from_name(name.replace("/", "-"), image_size)
    with torch.device("meta"):
        module = VisionTransformer(config).eval()
    load_into(module, state, None, "vision")
    return Backbone(module, ImageTransform(config.image_size), name, str(path), fingerprint(module))


def _check_timm_size(name: str, state: dict, path: Path) -> None:
    """Raises UserError where a file holds far fewer numbers than a timm architecture has."""
    import timm
    import torch

    if not timm.is_model(name.partition(".")[0]):
        return  # build_vision says so
    with torch.device("meta"):
        trunk = timm.create_model(name.partition(".")[0], pretrained=False, num_classes=0)
    needed, held = (sum(tensor.numel() for tensor in tensors) for tensors in (trunk.state_dict().values(), state.values()))
    if needed > 2 * held:
        raise UserError(f"{path} does not fit timm/{name}: it holds {held:,} numbers, not {needed:,}")


def _build_timm(name: str, weights: str | None, image_size: int | None) -> Backbone:
    from captioner.timm_vision import TimmVision
    from captioner.weights import fingerprint
    from data.transforms import ImageTransform

    module = TimmVision(name.removeprefix("timm/"), weights, image_size).eval()
    transform = ImageTransform(**module.preprocess)
    return Backbone(module, transform, name, weights, fingerprint(module) if weights else None)


def _build_vit(name: str, weights: str | None, image_size: int | None) -> Backbone:
    from captioner.vit import VisionConfig, VisionTransformer
    from captioner.weights import fingerprint, is_hf_clip
    from data.transforms import ImageTransform

    config = VisionConfig.from_name(name, image_size)
    if weights is None:
        return Backbone(VisionTransformer(config).eval(), ImageTransform(config.image_size), name, None, None)
    state, preprocess, source = clip_weights(name, weights)
    if is_hf_clip(state):
        preprocess |= _hf_clip_settings(name, config, Path(source))
    module = load_vit(config, state, source)
    check_object(preprocess, {key: TRANSFORM[key] for key in preprocess}, f"the image settings beside {source} cannot be used: preprocessing")
    return Backbone(module, ImageTransform(config.image_size, **preprocess), name, weights, fingerprint(module))


def load_vit(config: "VisionConfig", state: dict, source: str) -> "VisionTransformer":
    """An image tower with the weights of a CLIP's state dict under open_clip's or Hugging Face's names, on the CPU, in float32, in eval mode.

    The position table is resized to config.image_size; source is what messages call the state dict. Raises UserError where it does not fit.
    """
    import torch

    from captioner.vit import VisionTransformer, resize_positions
    from captioner.weights import HF_CLIP_VISION, OPEN_CLIP_VIT, is_hf_clip, load_into

    names = HF_CLIP_VISION if is_hf_clip(state) else OPEN_CLIP_VIT
    if config.num_tokens * config.width > LARGEST_TABLE:
        raise UserError(f"images of {config.image_size} pixels are {config.num_tokens:,} tokens of width {config.width}, more than fit into memory")
    for key in [donor for donor, ours in names.items() if ours == "position_embedding"]:
        if key in state and state[key].ndim == 2 and len(state[key]) > 1 and state[key].shape[1] == config.width and state[key].is_floating_point():
            state = state | {key: resize_positions(state[key], config.grid_size)}
    with torch.device("meta"):  # no time spent on random numbers that the weights replace
        module = VisionTransformer(config).eval()
    load_into(module, state, names, source)
    return module


def _hf_clip_settings(name: str, config: "VisionConfig", path: Path) -> dict:
    """Arguments of `ImageTransform` from Hugging Face's files beside CLIP weights; raises UserError where their config.json is of another tower."""
    from captioner import clip_hf

    folder = path if path.is_dir() else path.parent
    facts = clip_hf.unseen_facts(folder)
    if facts is not None:
        source = str(folder / "config.json")
        _check_activation(name, config.activation == "quick_gelu", facts["activation"] == "quick_gelu", source)
        for ours, value in facts.items():
            if value != getattr(config, ours):
                raise UserError(f"{source}: its {ours} is {value}, and {name} has {getattr(config, ours)}: it is another architecture")
    return clip_hf.preprocessing(folder, config.image_size) or {}


def clip_weights(name: str, weights: str) -> tuple[dict, dict, str]:
    """The weights of a whole CLIP: state dict, arguments of `ImageTransform` that come with them, and a name for messages.

    weights: a tag of open_clip, a tag of an embedded architecture, or a local safetensors file or directory.
    Raises UserError for unknown tags (naming the known ones), missing files, pickles, and weights of another GELU than the architecture's.
    """
    from captioner.demo import CLIP_WEIGHTS
    from captioner.timm_vision import open_clip_preprocess
    from captioner.vit import clip_config
    from captioner.weights import PICKLE_SUFFIXES, fetch, read_state_dict

    tower_is_quick = bool(clip_config(name).get("quick_gelu"))
    if weights in CLIP_WEIGHTS.get(name, {}):
        path = CLIP_WEIGHTS[name][weights]
        return read_state_dict(path), {}, str(path)
    path = Path(weights)
    # A bare word is a tag first, so that a folder that happens to be called "openai" does not shadow it.
    is_path = path.is_file() or os.sep in weights or path.suffix in (".safetensors", *PICKLE_SUFFIXES)
    tag = None if is_path else _open_clip_tag(name, weights)
    preprocess: dict = {}
    if tag:
        _check_activation(name, tower_is_quick, bool(tag.get("quick_gelu")), f"{name}:{weights}")
        preprocess = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode")}
        repo, _, filename = tag["hf_hub"].rpartition("/")
        path = fetch(repo, str(Path(filename or "open_clip_model").with_suffix(".safetensors")))
    elif not is_path and not path.exists():
        raise _unknown_tag(name, weights)
    state = read_state_dict(path)
    config_file = (path if path.is_dir() else path.parent) / "open_clip_config.json"
    if not tag and config_file.is_file():
        values = read_json(config_file)
        parts = [values.get(key, {}) for key in ("preprocess_cfg", "model_cfg")] if isinstance(values, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{config_file}: not a JSON object with objects preprocess_cfg and model_cfg")
        preprocess, model = open_clip_preprocess(config_file), parts[1]
        _check_activation(name, tower_is_quick, bool(model.get("quick_gelu")), str(config_file))
    if state and all(key.startswith("module.") for key in state):
        # Checkpoints of open_clip's distributed training.
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state, preprocess, str(path)


def _open_clip_tag(name: str, tag: str) -> dict:
    from open_clip.pretrained import get_pretrained_cfg

    return get_pretrained_cfg(name, tag)


def _unknown_tag(name: str, tag: str) -> UserError:
    from open_clip.pretrained import list_pretrained_models_by_tag, list_pretrained_tags_by_model

    from captioner.demo import CLIP_WEIGHTS

    others = list_pretrained_models_by_tag(tag) if name not in CLIP_WEIGHTS else []
    known = ", ".join([*CLIP_WEIGHTS.get(name, ()), *list_pretrained_tags_by_model(name)]) or "none"
    return UserError(
        f"{tag!r} is neither a file nor a tag of {name}; its tags: {known}"
        + (f"; architectures with that tag: {', '.join(others)}" if others else "")
    )


def _check_activation(name: str, tower_is_quick: bool, weights_are_quick: bool, source: str) -> None:
    """Weights of the other GELU load without a shape error and give wrong tokens."""
    from captioner.vit import clip_names

    if weights_are_quick and not tower_is_quick:
        right = f"{name}-quickgelu"
        hint = f"use {right}" if right in clip_names() else f"there is no {right} to load them into"
        raise UserError(f"{source}: these weights were trained with QuickGELU, and {name} has GELU: {hint}")
    right = name.removesuffix("-quickgelu")
    # An architecture that is QuickGELU without the suffix (roberta-ViT-B-32) has no twin; its tags leave the mark out.
    if tower_is_quick and not weights_are_quick and right != name:
        raise UserError(f"{source}: these weights were trained with GELU, and {name} has QuickGELU: use {right}")


@dataclass(frozen=True)
class TextBackbone:
    """A built T5 with its vocabulary, and where they came from."""

    module: "T5"
    tokenizer: "Tokenizer | None"  # None: random weights without a vocabulary
    name: str  # directory, repository, or config, as given
    weights: str | None  # directory or repository, as given; None: random initialisation
    weights_hash: str | None  # captioner.weights.fingerprint of the loaded module; None: random initialisation


def build_text(spec: str | None, config: str | None = None, tokenizer_path: str | Path | None = None) -> TextBackbone:
    """A T5 from `spec` (trained weights) or from `config` (random ones), on the CPU, in float32, in eval mode.

    spec: a directory with config.json, spiece.model and model.safetensors (or an index and its shards), or the name of
    a Hugging Face repository or embedded T5 (`captioner.demo.TEXTS`) that has them. config: a row of `captioner.t5.SIZES`, or the path of a config.json.
    tokenizer_path: another sentencepiece file than the directory's; with `config`, the embedding gets as many rows as
    it has ids.
    Raises UserError for anything missing or that does not fit, and for a vocabulary larger than the embedding.
    """
    if (spec is None) == (config is None):
        raise UserError("a text model is built either from trained weights (--text) or from a config (--text-config)")
    if spec is None:
        return _random_text(config, tokenizer_path)
    return _trained_text(str(spec), tokenizer_path)


def _random_text(config: str, tokenizer_path: str | Path | None) -> TextBackbone:
    from captioner.t5 import T5, T5Config
    from captioner.tokenizer import Tokenizer

    sizes = T5Config.from_name(config)
    tokenizer = None if tokenizer_path is None else Tokenizer(tokenizer_path)
    if tokenizer is not None:
        sizes = replace(sizes, vocab_size=len(tokenizer))
        check_vocabulary(tokenizer, sizes)
    return TextBackbone(T5(sizes).eval(), tokenizer, config, None, None)


def _trained_text(spec: str, tokenizer_path: str | Path | None) -> TextBackbone:
    from captioner.tokenizer import Tokenizer
    from captioner.weights import fingerprint, read_state_dict

    config_file, vocabulary, weights = _text_files(spec, tokenizer_path is None)
    values = read_json(config_file)
    tokenizer = Tokenizer(tokenizer_path or vocabulary)
    module = load_t5(read_state_dict(weights), values, spec)
    check_vocabulary(tokenizer, module.config)
    return TextBackbone(module, tokenizer, spec, spec, fingerprint(module))


def load_t5(state: dict, values: dict, source: str) -> "T5":
    """A T5 with the weights of a state dict under Hugging Face's names, on the CPU, in float32, in eval mode.

    values: those of its config.json; source is what messages call the state dict. Raises UserError where they do not fit.
    """
    import torch

    from captioner.t5 import T5
    from captioner.weights import load_into, t5_from_hf, t5_table

    state, config = t5_from_hf(state, values, source)
    with torch.device("meta"):  # no time spent on random numbers that the weights replace
        module = T5(config).eval()
    load_into(module, state, t5_table(config), source)
    if config.tie_word_embeddings:
        module.lm_head.weight = module.embedding.weight
    return module


def _text_files(spec: str, with_vocabulary: bool) -> tuple[Path, Path | None, Path]:
    """config.json, spiece.model, and what `read_state_dict` takes, of a local directory or a repository."""
    from captioner.demo import TEXTS
    from captioner.tokenizer import FILE_NAME
    from captioner.weights import fetch, fetch_weights

    directory = TEXTS.get(spec, Path(spec))
    if directory.is_dir():
        config, vocabulary = directory / "config.json", directory / FILE_NAME
        for file in (config, vocabulary) if with_vocabulary else (config,):
            if not file.is_file():
                rest = " (a tokenizer.json alone is not read)" if file == vocabulary else ""
                raise UserError(f"no {file.name} in the T5 directory {directory}{rest}")
        return config, vocabulary, directory
    if directory.exists():
        raise UserError(
            f"{directory} is a file; a text model is a directory with config.json, {FILE_NAME} and model.safetensors"
        )
    try:
        return fetch(spec, "config.json"), fetch(spec, FILE_NAME) if with_vocabulary else None, fetch_weights(spec)
    except UserError as error:
        raise UserError(f"{spec!r} is no local directory, and {error}") from error


def check_vocabulary(tokenizer: "Tokenizer", config) -> None:
    """Raises UserError where a vocabulary has more ids than a T5's embedding has rows, or other special ids."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {len(tokenizer)} ids, more than the {config.vocab_size} rows of the embedding"
        )
    ids, expected = (tokenizer.pad_id, tokenizer.eos_id), (config.pad_token_id, config.eos_token_id)
    if ids != expected:
        raise UserError(f"{tokenizer.path} has pad and eos at {ids}; the config has them at {expected}")
