"""Any timm model as the image encoder: the last feature grid as tokens.

Source of the trunks and their numerics: https://github.com/huggingface/pytorch-image-models. CLIPs whose image tower
is no ViT of open_clip's own (ConvNeXt, MobileCLIP, …) have a timm trunk, so they come through here as well.

Legend: B batch (images), N image tokens, D width, S image size in pixels.

What a token is: timm's `forward_features`, row by row over the grid; (B, D, h, w) and (B, h, w, D) grids become
(B, h * w, D), the (B, N, D) of a Transformer stays as it is, prefix tokens included. Trunks that keep their last norm
in the head, behind the pooling (ConvNeXt's `head.norm`, `fc_norm` of average-pooled Transformers), have that norm
applied to every token, as timm does with pooling and classifier switched off (`num_classes=0, global_pool=""`).
"""

import difflib
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from captioner.errors import UserError
from captioner.files import read_json
from captioner.run_config import TRANSFORM, check_object
from captioner.weights import OPEN_CLIP_TEXT, Table, fetch, load_into, read_state_dict


class TimmVision(nn.Module):
    """Normalised pixels (B, 3, S, S) -> tokens (B, N, D) of a timm trunk without its classifier.

    Attributes: `width` (D), `image_size` (S), `num_tokens` (N), `preprocess` (the arguments of
    `data.transforms.ImageTransform` that the trunk expects). Batch norms follow train() and eval() as everywhere in
    PyTorch: a frozen tower belongs in eval().

    name: a timm architecture. `ARCHITECTURE.TAG` takes that tag's preprocessing, for a file of weights trained with it.
    weights: a timm tag, or a safetensors file with timm's own names (the classifier's keys are dropped) or open_clip's
        (`visual.trunk.*`); an open_clip_config.json beside it settles the preprocessing. None: random, as timm does it.
    image_size: None for the trunk's own; Transformers have their position tables resized by timm.
    Raises UserError for unknown names, tags and sizes, and for weights that do not fit.
    """

    def __init__(self, name: str, weights: str | None = None, image_size: int | None = None) -> None:
        super().__init__()
        import timm

        architecture, _, tag = name.partition(".")
        _check_architecture(architecture)
        if tag and weights is None:
            raise UserError(f"timm/{name} names a tag but no weights are asked for: write timm/{architecture}:{tag}")
        if weights is not None and weights in tags(architecture):
            tag = weights
        if tag and tag not in tags(architecture):
            raise UserError(f"timm/{architecture} has no tag {tag!r}; it has {', '.join(tags(architecture)) or 'none'}")
        full_name = f"{architecture}.{tag}" if tag else architecture
        config = timm.get_pretrained_cfg(full_name).to_dict()
        self.preprocess = image_settings(config, image_size)
        self.image_size = self.preprocess["image_size"]
        path = None if weights is None else _find(architecture, weights, config)
        self.trunk = timm.create_model(full_name, pretrained=False, num_classes=0)
        if path is not None:
            self._load(path)
        self._norm_name = _norm_in_head(self.trunk)
        if self.image_size != config["input_size"][-1]:
            self._resize(architecture)
        self.num_tokens, self.width = self._measure(architecture)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.trunk.forward_features(pixel_values)
        if self._norm_name is not None:
            x = self.trunk.get_submodule(self._norm_name)(x)
        if x.ndim == 4 and getattr(self.trunk, "output_fmt", "NCHW") == "NHWC":
            return x.flatten(1, 2)
        return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x  # (B, N, D)

    def behind_tokens(self) -> frozenset[str]:
        """Names of the parameters that ask for a gradient and get none from the tokens, such as SigLIP's pooling; encodes a blank image."""
        asking = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if not asking:
            return frozenset()
        training = self.training
        self.eval()
        tokens = self(torch.zeros(1, 3, self.image_size, self.image_size, device=next(iter(asking.values())).device))
        self.train(training)
        if not tokens.requires_grad:
            return frozenset(asking)
        received = torch.autograd.grad(tokens.sum(), list(asking.values()), allow_unused=True)
        return frozenset(name for name, gradient in zip(asking, received, strict=True) if gradient is None)

    def _load(self, path: Path) -> None:
        state = read_state_dict(path)
        if "visual.class_embedding" in state:
            raise UserError(f"{path} holds an open_clip ViT, no timm trunk: name it so, as in ViT-B-16:{path}")
        load_into(self.trunk, state, key_table(self.trunk, state), str(path))
        beside = (path if path.is_dir() else path.parent) / "open_clip_config.json"
        if beside.is_file():
            # open_clip resizes straight to the input size.
            self.preprocess |= open_clip_preprocess(beside) | {"resize_size": None}

    def _resize(self, architecture: str) -> None:
        if hasattr(self.trunk, "set_input_size"):
            try:
                self.trunk.set_input_size((self.image_size, self.image_size))
            except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
                raise UserError(f"timm/{architecture} takes no images of {self.image_size} pixels: {error}") from error
        elif self.trunk.pretrained_cfg.get("fixed_input_size"):
            own = self.trunk.pretrained_cfg["input_size"][-1]
            raise UserError(f"timm/{architecture} takes images of {own} pixels only, not {self.image_size}")

    def _measure(self, architecture: str) -> tuple[int, int]:
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                tokens = self(torch.zeros(1, 3, self.image_size, self.image_size))
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"timm/{architecture} gives no features at {self.image_size} pixels: {reason}") from error
        if tokens.ndim != 3:
            raise UserError(f"timm/{architecture} gives features of shape {tuple(tokens.shape)}, not a grid")
        self.train(training)
        return tokens.shape[1], tokens.shape[2]


def tags(architecture: str) -> list[str]:
    """Tags of the pretrained weights that timm knows for an architecture."""
    import timm

    return [name.partition(".")[2] for name in timm.list_models(f"{architecture}.*", pretrained=True)]


def key_table(trunk: nn.Module, state: dict[str, Tensor]) -> Table:
    """Donor names of a trunk: open_clip's (`visual.trunk.*`) if the state has any, else timm's. Drops classifiers."""
    prefix = "visual.trunk." if any(key.startswith("visual.trunk.") for key in state) else ""
    classifiers = trunk.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    table: dict = {f"{prefix}{name}.*": None for name in classifiers}
    table[f"{prefix}*"] = "*"
    return table | {"visual.head.*": None} | OPEN_CLIP_TEXT if prefix else table


def open_clip_preprocess(config_file: Path) -> dict:
    """The image settings of an open_clip_config.json, those that it has, as arguments of ImageTransform. Raises UserError where they are none."""
    config = read_json(config_file)
    settings = config.get("preprocess_cfg", {}) if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{config_file}: not a JSON object with an object preprocess_cfg")
    names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    found = {name: settings[name] for name in names if settings.get(name) is not None}
    check_object(found, {name: TRANSFORM[name] for name in found}, f"{config_file}: preprocess_cfg")
    return found


def _check_architecture(architecture: str) -> None:
    import timm

    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        raise UserError(
            f"timm has no model {architecture!r}" + (f"; closest: {', '.join(close)}" if close else "")
            + '; all of them: python -c "import timm; print(*timm.list_models())"'
        )


def _norm_in_head(trunk: nn.Module) -> str | None:
    """Name of the norm that a trunk applies behind its pooling."""
    from timm.layers import ClNormMlpClassifierHead, NormMlpClassifierHead

    if isinstance(getattr(trunk, "head", None), (NormMlpClassifierHead, ClNormMlpClassifierHead)):
        return "head.norm"
    return None if isinstance(getattr(trunk, "fc_norm", nn.Identity()), nn.Identity) else "fc_norm"


def image_settings(config: dict, image_size: int | None = None) -> dict:
    """timm's evaluation transform of one pretrained_cfg, as arguments of `data.transforms.ImageTransform`."""
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg=config)
    _, height, width = data["input_size"]
    if height != width:
        raise UserError(f"timm/{config['architecture']} takes images of {height} x {width} pixels, and ours are square")
    size = height if image_size is None else image_size
    mode = {"center": "shortest", "squash": "squash", "border": "longest"}[data["crop_mode"]]
    return {
        "image_size": size,
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "interpolation": data["interpolation"],
        "resize_mode": mode,
        "resize_size": math.floor(size / data["crop_pct"]),
        "fill_color": tuple(round(255 * value) for value in data["mean"]) if mode == "longest" else 0,
    }


def _find(architecture: str, weights: str, config: dict) -> Path:
    """The local path of weights given as a tag or as a path."""
    if weights == config.get("tag"):
        return _fetch_tag(architecture, config)
    if Path(weights).exists():
        return Path(weights)
    known = ", ".join(tags(architecture)) or "none"
    raise UserError(f"{weights!r} is neither a file nor a tag of timm/{architecture}; its tags: {known}")


def _fetch_tag(architecture: str, config: dict) -> Path:
    for note in config.get("notes") or ():
        # timm keeps OpenAI's weights under the plain GELU architecture too, where they load and give other features.
        if "quickgelu" in note.lower() and "quickgelu" not in architecture:
            right = architecture.replace("_clip_", "_clip_quickgelu_")
            raise UserError(
                f"timm/{architecture}:{config['tag']}: these weights were trained with QuickGELU, and {architecture} "
                f"has GELU: use timm/{right}:{config['tag']}"
            )
    if not config.get("hf_hub_id"):
        raise UserError(
            f"timm/{architecture}:{config['tag']} is published only as {config.get('url')}, which may be a pickle: "
            "convert it to safetensors and give the file"
        )
    names = {
        None: "model.safetensors",
        "pytorch_model.bin": "model.safetensors",
        "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
    }
    filename = config.get("hf_hub_filename")
    return fetch(config["hf_hub_id"], names.get(filename) or str(Path(filename).with_suffix(".safetensors")))
