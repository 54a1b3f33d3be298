"""The CLIP image tower: a Vision Transformer that gives every token of its last block.

Papers: "An Image is Worth 16x16 Words" (arXiv 2010.11929), CLIP (arXiv 2103.00020). Numerics match open_clip's
VisionTransformer (https://github.com/mlfoundations/open_clip) up to its last block; the pooled embedding (post-norm,
projection) is not built.

Legend: B batch (images), N image tokens, D width, H heads, K head dim, L layers, P patch size, S image size in pixels.

Where CLIP differs from the first ViT: a norm before the blocks (`norm_pre`; CLIPA has none), no bias in the patch
embedding, one class token in front, and QuickGELU in OpenAI's weights and those trained to match them. The wrong
activation loads without a shape error and gives other tokens, so it is part of a name (`ViT-B-16-quickgelu`).
"""

import copy
import difflib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.demo import CLIPS
from captioner.dropout import Residual
from captioner.errors import UserError

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
POSITIONS = ("learned", "sin_cos_2d")

# Keys of a vision_cfg that concern only the pooled embedding or the donor's own training: no token depends on them.
WITHOUT_EFFECT = {
    "pool_type",
    "final_ln_after_pool",
    "attentional_pool",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "output_tokens",
    "patch_dropout",
}
# Experimental attention of open_clip, which none of its architectures uses: the values that leave it off.
EXPERIMENTAL_OFF = {
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of one image tower. The defaults are ViT-B-16."""

    image_size: int = 224  # S: height and width in pixels
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    pre_norm: bool = True  # norm between the position table and the first block
    layer_scale: float | None = None  # initial value of the factors on the residual branches; None: no factors
    positions: str = "learned"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.positions not in POSITIONS:
            raise UserError(f"positions {self.positions!r} is not one of {', '.join(POSITIONS)}")
        if self.width % self.heads:
            raise UserError(f"width {self.width} does not divide into {self.heads} heads")
        if self.positions == "sin_cos_2d" and self.width % 4:
            raise UserError(f"sin_cos_2d positions need a width that is a multiple of 4, not {self.width}")
        if self.image_size < self.patch_size:
            raise UserError(f"image size {self.image_size} is smaller than one patch of {self.patch_size} pixels")

    @property
    def grid_size(self) -> int:
        """Patches along one side; pixels that fill no whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return 1 + self.grid_size**2

    @classmethod
    def from_name(cls, name: str, image_size: int | None = None) -> "VisionConfig":
        """Config of an open_clip or embedded architecture, at its own image size unless one is given.

        Raises UserError for an unknown name, and for a tower that is no ViT of open_clip's own, saying what to use.
        """
        settings = clip_config(name)
        vision = dict(settings["vision_cfg"])
        if vision.get("timm_model_name"):
            trunk = vision["timm_model_name"]
            raise UserError(f"the image tower of {name} is the timm model {trunk}: use timm/{trunk}")
        layers = vision.pop("layers", cls.layers)
        if not isinstance(layers, int):
            trunk = name.removesuffix("-quickgelu").replace("RN", "resnet") + "_clip"
            raise UserError(f"the image tower of {name} is a ResNet, not a ViT: use timm/{trunk}")
        width = vision.pop("width", cls.width)
        activation = _activation(name, bool(settings.get("quick_gelu")), vision.pop("act_kwargs", None) or {})
        norm = vision.pop("norm_kwargs", None) or {}
        position_type = vision.pop("pos_embed_type", "learnable")
        config = cls(
            image_size=_one_side(name, vision.pop("image_size", cls.image_size)) if image_size is None else image_size,
            patch_size=_one_side(name, vision.pop("patch_size", cls.patch_size)),
            width=width,
            layers=layers,
            heads=width // vision.pop("head_width", 64),
            mlp_ratio=vision.pop("mlp_ratio", cls.mlp_ratio),
            activation=activation,
            pre_norm=not vision.pop("no_ln_pre", False),
            layer_scale=vision.pop("ls_init_value", None),
            positions={"learnable": "learned"}.get(position_type, position_type),
            norm_eps=norm.pop("eps", cls.norm_eps),
        )
        vision.pop("image_size", None)
        for key, value in (vision | norm).items():
            if key not in WITHOUT_EFFECT and value not in EXPERIMENTAL_OFF.get(key, ()):
                raise UserError(f"{name} sets {key} to {value!r}, which this image tower does not have")
        return config


def clip_config(name: str) -> dict:
    """The whole config of an architecture as open_clip writes it: `embed_dim`, `vision_cfg`, `text_cfg`, and `quick_gelu` where it is.

    From `captioner.demo.CLIPS`, or from the files of the installed open_clip (which is not imported). Raises UserError for an unknown name, with the
    closest ones.
    """
    if name in CLIPS:
        return copy.deepcopy(CLIPS[name])
    if name not in open_clip_names():
        close = difflib.get_close_matches(name, clip_names(), n=5, cutoff=0.4)
        raise UserError(
            f"unknown architecture {name!r}" + (f"; closest: {', '.join(close)}" if close else "") + "; all of them: "
            f'{", ".join(CLIPS)}, timm/ARCHITECTURE, and python -c "import open_clip; print(*open_clip.list_models())"'
        )
    return json.loads((_open_clip_folder() / f"{name}.json").read_text(encoding="utf-8"))


def clip_names() -> tuple[str, ...]:
    """Every architecture with a config: embedded ones, then open_clip's of any kind of image tower."""
    return (*CLIPS, *open_clip_names())


@lru_cache(maxsize=1)
def open_clip_names() -> tuple[str, ...]:
    """Every architecture of the installed open_clip, of any kind of image tower."""
    return tuple(sorted(file.stem for file in _open_clip_folder().glob("*.json")))


def _open_clip_folder() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise UserError("open_clip is not installed, and its architectures come with it: pip install open-clip-torch")
    return Path(spec.origin).parent / "model_configs"


def _one_side(name: str, size: int | list[int]) -> int:
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(f"{name} takes images or patches of {size} pixels; only square ones are supported")
    return size[0]


def _activation(name: str, quick_gelu: bool, arguments: dict) -> str:
    if quick_gelu and not arguments:
        return "quick_gelu"
    if not quick_gelu and arguments in ({}, {"approximate": "none"}):
        return "gelu"
    if not quick_gelu and arguments == {"approximate": "tanh"}:
        return "gelu_tanh"
    raise UserError(f"{name} sets act_kwargs to {arguments!r}, which this image tower does not have")


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Self-attention over all tokens, scaled by K ** -0.5."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.o_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        q = self.q_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, N, K)
        k = self.k_proj(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """Two linear layers with the architecture's activation between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.activation = config.activation
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "quick_gelu":
            x = quick_gelu(x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.fc2(x)


class LayerScale(nn.Module):
    """One learned factor per channel on a residual branch (CaiT, arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        scaled = config.layer_scale is not None
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.scale1 = LayerScale(config.width) if scaled else nn.Identity()
        self.attn_residual = Residual(config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.scale2 = LayerScale(config.width) if scaled else nn.Identity()
        self.mlp_residual = Residual(config.width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self.attn_residual(x, self.scale1(self.attn(normed)), normed)
        normed = self.norm2(x)
        return self.mlp_residual(x, self.scale2(self.mlp(normed)), normed)


class VisionTransformer(nn.Module):
    """Normalised pixels (B, 3, S, S) -> tokens (B, N, D) of the last block, before the post-norm.

    The class token comes first, then the patches row by row: N = 1 + (S // P) ** 2.
    Attributes: `width` (D), `image_size` (S), `num_tokens` (N), `config`, and `frozen`, the faster form that
    `captioner.frozen_vit.prepare_frozen` puts there and that is used where no gradient is asked for.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.image_size = config.image_size
        self.num_tokens = config.num_tokens
        self.frozen: Callable[[Tensor], Tensor] | None = None
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        positions = torch.empty(config.num_tokens, config.width)
        if config.positions == "learned":
            self.position_embedding = nn.Parameter(positions)
        else:
            self.register_buffer("position_embedding", positions)
        self.norm_pre = nn.LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        # Without values (the meta device) there is nothing to draw, and drawing would import half of torch's compiler.
        if not self.class_embedding.is_meta:
            init_weights(self)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"expected pixels of shape (B, 3, {self.image_size}, {self.image_size}), "
                f"got {tuple(pixel_values.shape)}; another size needs a tower built for it (image_size)"
            )
        if self.frozen is not None and not torch.is_grad_enabled():
            return self.frozen(pixel_values)
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.position_embedding.to(x.dtype)  # (B, N, D)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def init_weights(model: VisionTransformer) -> None:
    """Random initialisation, the scheme of CLIP's text tower (arXiv 2103.00020). std is that of a zero-mean normal.

    | parameter                               | value                                   |
    | --------------------------------------- | --------------------------------------- |
    | patch_embed.weight                      | std (3 P P) ** -0.5                     |
    | class_embedding, learned positions      | std D ** -0.5                           |
    | sin_cos_2d positions                    | `sin_cos_2d_positions`, not trained     |
    | attn.q_proj, k_proj, v_proj .weight     | std D ** -0.5                           |
    | attn.o_proj, mlp.fc2 .weight            | std D ** -0.5 * (2 L) ** -0.5           |
    | mlp.fc1.weight                          | std (2 D) ** -0.5                       |
    | every bias                              | 0                                       |
    | norms                                   | weight 1, bias 0                        |
    | scale1, scale2                          | `layer_scale`                           |
    """
    config = model.config
    width_std = config.width**-0.5
    branch_std = width_std * (2 * config.layers) ** -0.5
    nn.init.normal_(model.patch_embed.weight, std=(3 * config.patch_size**2) ** -0.5)
    nn.init.normal_(model.class_embedding, std=width_std)
    if config.positions == "learned":
        nn.init.normal_(model.position_embedding, std=width_std)
    else:
        model.position_embedding.copy_(sin_cos_2d_positions(config.grid_size, config.width))
    for block in model.blocks:
        for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            nn.init.normal_(linear.weight, std=width_std)
        nn.init.normal_(block.attn.o_proj.weight, std=branch_std)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * config.width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=branch_std)
        if config.layer_scale is not None:
            nn.init.constant_(block.scale1.gamma, config.layer_scale)
            nn.init.constant_(block.scale2.gamma, config.layer_scale)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def sin_cos_2d_positions(grid_size: int, width: int) -> Tensor:
    """Fixed position table (1 + grid_size ** 2, width): zeros for the class token, then one row per patch, row by row.

    The first half of the channels encodes the column, the second the row, each as sines and then cosines of width / 4
    frequencies (MAE, arXiv 2111.06377; open_clip's `sin_cos_2d`).
    """
    index = torch.arange(grid_size, dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = index[:, None] * frequencies  # (grid_size, width / 4)
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, width / 2)
    column = along[None].expand(grid_size, -1, -1)
    row = along[:, None].expand(-1, grid_size, -1)
    patches = torch.cat([column, row], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()


def resize_positions(table: Tensor, grid_size: int) -> Tensor:
    """A position table (1 + G * G, D) for another square grid (1 + grid_size ** 2, D), as open_clip resizes it.

    The class token's row stays; the patches' rows are interpolated (bicubic, antialiased).
    Raises UserError if the rows behind the first fill no square.
    """
    class_row, patches = table[:1], table[1:]
    old = int(len(patches) ** 0.5)
    if old * old != len(patches):
        raise UserError(f"a position table of {len(table)} rows is not one class token and a square grid")
    if old == grid_size:
        return table
    image = patches.T.reshape(1, -1, old, old).float()
    image = F.interpolate(image, size=(grid_size, grid_size), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([class_row, image[0].flatten(1).T.to(table.dtype)])
