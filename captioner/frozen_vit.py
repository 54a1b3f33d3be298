"""A frozen image tower in one dtype: the tokens of `captioner.vit.VisionTransformer` for weights that no longer change, without gradients.

Where the time goes that the plain form spends besides its products, and what is done about it:
- q, k and v have the same input: one product.
- QuickGELU is silu(1.702 x) / 1.702: the factors go into the weights around it, and SiLU works in place.
- The patches do not overlap: their embedding is a product, not a convolution.
- Nothing is cast between layers; norms and softmax keep fp32 statistics inside their kernels.
- On a CPU, F.linear converts bf16 weights to oneDNN's layout and copies the bias at every call: the weights are converted once, and bias and residual
  stream are added by the product itself.

Legend: B batch (images), N image tokens, D width, H heads, P patch size, G patches along one side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.dropout import Residual
from captioner.errors import UserError
from captioner.vit import Block, LayerScale, VisionTransformer

QUICK_GELU_SLOPE = 1.702


class FrozenLinear:
    """x (M, K) → x Wᵀ + bias, plus residual (M, N) where there is one; the weight (N, K) is rounded to dtype once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype).contiguous()
        self.bias = None if bias is None else bias.to(dtype)
        # In fp32 oneDNN's layout is no faster than F.linear.
        self.in_onednn_layout = dtype == torch.bfloat16 and weight.device.type == "cpu" and onednn_multiplies_bf16()
        if self.in_onednn_layout:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.in_onednn_layout:
            y = F.linear(x, self.weight, self.bias)
            return y if residual is None else y.add_(residual)
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


def onednn_multiplies_bf16() -> bool:
    """Whether PyTorch was built with oneDNN and the processor has what its bf16 products need."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class FrozenNorm:
    """LayerNorm over D, in and out in dtype."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.eps = norm.weight.to(dtype), norm.bias.to(dtype), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class FrozenBlock:
    """`captioner.vit.Block` on the rows of all images: (B*N, D) → (B*N, D)."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attention, mlp = block.attn, block.mlp
        self.num_heads = attention.num_heads
        self.activation = mlp.activation
        slope = QUICK_GELU_SLOPE if mlp.activation == "quick_gelu" else 1.0
        self.norm1, self.norm2 = FrozenNorm(block.norm1, dtype), FrozenNorm(block.norm2, dtype)
        self.qkv = FrozenLinear(*joined(attention.q_proj, attention.k_proj, attention.v_proj), dtype)
        self.out = FrozenLinear(*scaled(attention.o_proj, block.scale1), dtype)
        self.fc1 = FrozenLinear(mlp.fc1.weight.float() * slope, mlp.fc1.bias.float() * slope, dtype)
        weight, bias = scaled(mlp.fc2, block.scale2)
        self.fc2 = FrozenLinear(weight / slope, bias, dtype)

    def __call__(self, x: Tensor, num_tokens: int) -> Tensor:
        qkv = self.qkv(self.norm1(x)).view(-1, num_tokens, 3, self.num_heads, x.shape[1] // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, K) each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.out(mixed, residual=x)
        hidden = self.fc1(self.norm2(x))
        if self.activation == "quick_gelu":
            hidden = F.silu(hidden, inplace=True)
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.fc2(hidden, residual=x)


class FrozenTower:
    """Normalised pixels (B, 3, S, S) → tokens (B, N, D) in dtype; see `prepare_frozen`."""

    def __init__(self, vision: VisionTransformer, dtype: torch.dtype) -> None:
        self.dtype, self.config = dtype, vision.config
        self.made_from = [(parameter, version(parameter)) for parameter in vision.parameters()]
        self.embed = FrozenLinear(vision.patch_embed.weight.flatten(1), None, dtype)
        self.class_token = (vision.class_embedding + vision.position_embedding[0]).to(dtype)
        self.positions = vision.position_embedding[1:].to(dtype)
        self.norm_pre = FrozenNorm(vision.norm_pre, dtype) if isinstance(vision.norm_pre, nn.LayerNorm) else lambda x: x
        self.blocks = [FrozenBlock(block, dtype) for block in vision.blocks]

    def __deepcopy__(self, memo: dict) -> None:
        """oneDNN's layout cannot be copied: a copied tower is plain until it is prepared."""

    def __call__(self, pixel_values: Tensor) -> Tensor:
        if any(version(parameter) != before for parameter, before in self.made_from):
            raise UserError("the image encoder has changed since prepare_frozen: call it again, or release_frozen")
        if pixel_values.device != self.positions.device:
            raise UserError(f"the image encoder was prepared on {self.positions.device}, its images are on {pixel_values.device}")
        # Autocast on a GPU would take every norm back to fp32.
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.tokens(pixel_values)

    def tokens(self, pixel_values: Tensor) -> Tensor:
        images, grid, patch, width = len(pixel_values), self.config.grid_size, self.config.patch_size, self.config.width
        seen = pixel_values[:, :, : grid * patch, : grid * patch].to(self.dtype)
        patches = seen.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).permute(0, 2, 4, 1, 3, 5)  # (B, G, G, 3, P, P)
        embedded = self.embed(patches.reshape(images * grid**2, 3 * patch**2))
        tokens = seen.new_empty(images, 1 + grid**2, width)
        tokens[:, 0] = self.class_token
        torch.add(embedded.view(images, grid**2, width), self.positions, out=tokens[:, 1:])
        x = self.norm_pre(tokens.view(-1, width))
        for block in self.blocks:
            x = block(x, 1 + grid**2)
        return x.view(tokens.shape)


def prepare_frozen(vision: nn.Module, dtype: torch.dtype) -> bool:
    """Let an image tower whose weights no longer change compute in dtype wherever no gradient is asked for; with gradients it stays as it is.

    The tower keeps a second copy of its weights, on the device where they are now. Calling it raises UserError after a change in place of the weights
    (but for one through `.data`), or for images elsewhere: prepare it again. Copies of the tower are plain.
    Rounding to bf16 happens once, from the weights as they are. Returns False, and does nothing, for a tower that is no plain VisionTransformer:
    a timm trunk, LoRA that is not merged, bottleneck adapters, a 4-bit base.
    """
    if not is_plain(vision):
        return False
    with torch.no_grad(), torch.autocast(vision.class_embedding.device.type, enabled=False):
        vision.frozen = FrozenTower(vision, dtype)
    return True


def version(parameter: Tensor) -> int:
    """Counts changes in place; tensors of inference mode can not change."""
    return 0 if parameter.is_inference() else parameter._version


def release_frozen(vision: nn.Module) -> None:
    """Give the second copy of `prepare_frozen` back."""
    if type(vision) is VisionTransformer:
        vision.frozen = None


def is_plain(vision: nn.Module) -> bool:
    """Whether a tower is a VisionTransformer to which nothing was added."""
    if type(vision) is not VisionTransformer:
        return False
    linears = (linear for block in vision.blocks for linear in (*block.attn.children(), block.mlp.fc1, block.mlp.fc2))
    residuals = (residual for block in vision.blocks for residual in (block.attn_residual, block.mlp_residual))
    return all(type(linear) is nn.Linear for linear in linears) and all(type(residual) is Residual for residual in residuals)


def joined(*linears: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of one linear layer that gives the outputs of several, in a row."""
    return torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])


def scaled(linear: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float32, of a linear layer and the LayerScale behind it, if there is one."""
    gamma = scale.gamma.float() if isinstance(scale, LayerScale) else torch.ones_like(linear.bias, dtype=torch.float32)
    return linear.weight.float() * gamma[:, None], linear.bias.float() * gamma
