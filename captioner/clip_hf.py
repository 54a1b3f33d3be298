"""Hugging Face's files beside a CLIP image tower: config.json and preprocessor_config.json in our words, and a config.json from ours.

Source: https://github.com/huggingface/transformers, models/clip (release 5.23). The names of the tensors are `captioner.weights.HF_CLIP_VISION`.
Facts that a file leaves out have the values that transformers gives them.
"""

import math
from pathlib import Path

from captioner.errors import UserError
from captioner.files import read_json
from captioner.run_config import LARGEST_IMAGE
from captioner.vit import VisionConfig

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # hidden_act -> ours
# Facts that no shape shows, by our name: key and default of CLIPVisionConfig.
UNSEEN = {"activation": ("hidden_act", "quick_gelu"), "heads": ("num_attention_heads", 12), "norm_eps": ("layer_norm_eps", 1e-5)}
# Pillow's numbers of its filters.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
OWN_SIZE = 224  # of CLIPImageProcessor


def clip_config_to_hf(config: VisionConfig) -> dict:
    """The values of the config.json with which CLIPVisionModel builds the same tower.

    Raises UserError for a tower that CLIPVisionModel cannot express, naming what differs.
    """
    differs = []
    if not config.pre_norm:
        differs.append("no norm before its first block")
    if config.layer_scale is not None:
        differs.append("factors on its residual branches (layer_scale)")
    if differs:
        raise UserError(f"Hugging Face's CLIPVisionModel cannot express this image encoder: it has {' and '.join(differs)}")
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "layer_norm_eps": config.norm_eps,
    }


def unseen_facts(folder: Path) -> dict | None:
    """`activation`, `heads` and `norm_eps` of the tower that the folder's config.json describes (CLIPVisionModel's or CLIPModel's); None without one.

    Raises UserError for a broken file and for an activation that we do not have.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    values = _object(read_json(file), file)
    values = _object(values.get("vision_config") or values, file)
    facts = {ours: values.get(key, default) for ours, (key, default) in UNSEEN.items()}
    if not isinstance(facts["activation"], str) or facts["activation"] not in ACTIVATIONS:
        raise UserError(f"{file}: hidden_act {facts['activation']!r:.100} is not one of {', '.join(ACTIVATIONS)}")
    return facts | {"activation": ACTIVATIONS[facts["activation"]]}


def preprocessing(folder: Path, image_size: int) -> dict | None:
    """Arguments of `data.transforms.ImageTransform` from the folder's preprocessor_config.json, or from the image_processor of its
    processor_config.json; None without either.

    image_size: what the tower takes; where it is not the file's crop size, the size before the crop changes in proportion. The crop's offset is
    open_clip's, which for an odd margin may lie one pixel beside Hugging Face's. Raises UserError for steps that ImageTransform does not have.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        values = _object(read_json(file), file)
    elif (file := folder / "processor_config.json").is_file():
        values = _object(_object(read_json(file), file).get("image_processor"), file)
    else:
        return None
    values = {key: value for key, value in values.items() if value is not None}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not values.get(step, True):
            raise UserError(f"{file}: {step} is off, and images are always resized and normalised here")
    factor, resample = values.get("rescale_factor", 1 / 255), values.get("resample", 3)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{file}: rescale_factor {factor!r:.100} is not 1/255")
    if not isinstance(resample, int) or resample not in INTERPOLATIONS:
        raise UserError(f"{file}: resample {resample!r:.100} is not one of {', '.join(map(str, INTERPOLATIONS))}")
    size, cropped = values.get("size", OWN_SIZE), values.get("do_center_crop", True)
    mode = "squash" if isinstance(size, dict) and "height" in size else "shortest"
    side = _side(size, "size", file)
    if mode == "shortest" and not cropped:
        raise UserError(f"{file}: size {size!r:.100} without do_center_crop gives images that are not square")
    crop = _side(values.get("crop_size", OWN_SIZE), "crop_size", file) if cropped else side
    return {
        **{name: values[key] for name, key in (("mean", "image_mean"), ("std", "image_std")) if key in values},
        "interpolation": INTERPOLATIONS[resample],
        "resize_mode": mode,
        "resize_size": None if side == crop else math.floor(image_size * side / crop),
    }


def _side(size: int | dict, name: str, file: Path) -> int:
    """The one side of `224`, `{"shortest_edge": 224}` or `{"height": 224, "width": 224}`."""
    edges = size if isinstance(size, dict) and size.keys() in ({"shortest_edge"}, {"height", "width"}) else {"": size}
    sides = list(edges.values())
    if type(sides[0]) is not int or not 1 <= sides[0] <= LARGEST_IMAGE or sides[0] != sides[-1]:
        raise UserError(f"{file}: {name} {size!r:.100} is not one number of pixels, {{'shortest_edge': n}} or an equal height and width")
    return sides[0]


def _object(values, file: Path) -> dict:
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a JSON object")
    return values
