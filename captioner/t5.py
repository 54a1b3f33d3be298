"""T5: encoder and decoder of T5 v1.0, v1.1 and Flan-T5.

Papers: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (arXiv 1910.10683), v1.1's gated GELU from "GLU Variants
Improve Transformer" (arXiv 2002.05202), Flan-T5 from arXiv 2210.11416. Numerics match `transformers.T5ForConditionalGeneration`.

Legend: B batch (images or texts), G text rows that read the same memory, T text tokens, P prefix (prompt) tokens, N memory tokens, D width, H heads, K head
dim, V vocabulary.

Where T5 differs from most Transformers: attention has no 1/sqrt(K); positions enter as one learned bias per head and distance bucket, made in
layer 0 and used by the whole stack (both directions in the encoder, backwards only in the decoder, none in cross-attention); H * K need not
equal D; norms are RMSNorm in fp32; no Linear has a bias; tied checkpoints (v1.0) scale the last hidden state by D ** -0.5.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from captioner.attention import DroppedAttention, MemoryAttention, few_queries
from captioner.dropout import Dropout, Residual
from captioner.errors import UserError
from captioner.linears import parts, project


@dataclass
class T5Config:
    """Sizes of one T5, under the names of a Hugging Face `config.json`."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8  # of the encoder; 0 = no encoder
    num_decoder_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"  # or "relu" (v1.0)
    tie_word_embeddings: bool = False
    scale_decoder_outputs: bool | None = None  # by d_model ** -0.5 before lm_head; None: where the embeddings are tied
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self):
        if self.feed_forward_proj not in ("gated-gelu", "relu"):
            raise UserError(f"feed_forward_proj {self.feed_forward_proj!r} is not one of gated-gelu, relu")
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings

    @classmethod
    def from_dict(cls, values: dict) -> "T5Config":
        """Config from the keys of a `config.json`; keys that are not sizes are ignored, absent ones take T5's documented defaults."""
        values = {"feed_forward_proj": "relu", "tie_word_embeddings": True} | values
        if values.get("num_decoder_layers") is None:
            values["num_decoder_layers"] = values.get("num_layers", cls.num_layers)
        missing = [name for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads") if name not in values]
        if missing:
            raise UserError(f"T5 config lacks {', '.join(missing)}")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    @classmethod
    def from_name(cls, name: str) -> "T5Config":
        """Config from a row of `SIZES` or from the path of a JSON file. Raises UserError that names the rows."""
        if name in SIZES:
            return cls(**SIZES[name])
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name!r} is neither a T5 config file nor one of {', '.join(SIZES)}")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a JSON file ({error})") from None


SIZES = {
    "flan-t5-small": dict(d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6),
    "flan-t5-base": dict(d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12),
    "flan-t5-large": dict(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16),
    "flan-t5-xl": dict(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32),
    "flan-t5-xxl": dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_decoder_layers=24, num_heads=64),
    # Decoders without an encoder, to be trained from scratch.
    "t5-tiny": dict(d_model=128, d_kv=32, d_ff=384, num_layers=0, num_decoder_layers=3, num_heads=4),
    "t5-mini": dict(d_model=320, d_kv=64, d_ff=1024, num_layers=0, num_decoder_layers=3, num_heads=5),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm of x (..., D) with its gradients by hand: half the passes over x that autograd makes, and only x is kept."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()
        scale = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).to(weight.dtype).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dnormed = dy * weight.float()
        return dnormed.sub_(normed * (dnormed * normed).mean(-1, keepdim=True)).mul_(scale).to(x.dtype), dweight, None


class RelativePositionBias(nn.Module):
    """One learned bias per head and bucket of the distance key - query."""

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional
        self.embedding = nn.Embedding(self.num_buckets, config.num_heads, _weight=torch.empty(self.num_buckets, config.num_heads))

    def relative_position_bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each distance: exact up to half the buckets of a direction, then logarithmic up to `max_distance`."""
        num_buckets = self.num_buckets
        bucket = torch.zeros_like(distance)
        if self.bidirectional:
            num_buckets //= 2
            bucket = (distance > 0).long() * num_buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = num_buckets // 2
        log_ratio = torch.log(distance.float() / exact) / math.log(self.max_distance / exact)
        logarithmic = exact + (log_ratio * (num_buckets - exact)).long()
        return bucket + torch.where(distance < exact, distance, logarithmic.clamp(max=num_buckets - 1))

    def forward(self, query_length: int, key_length: int) -> Tensor:
        """Bias of the last `query_length` positions over all `key_length` keys: (1, H, query_length, key_length)."""
        device = self.embedding.weight.device
        keys = torch.arange(key_length, device=device)
        queries = keys[key_length - query_length :]
        bias = self.embedding(self.relative_position_bucket(keys[None, :] - queries[:, None]))  # (Tq, Tk, H)
        return bias.permute(2, 0, 1)[None]


class Attention(nn.Module):
    """Multi-head attention without 1/sqrt(K). Keys and values are projected apart from queries, so that they can be computed once and kept."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.d_kv
        inner = config.num_heads * config.d_kv
        self.q_proj = nn.Linear(config.d_model, inner, bias=False)
        self.k_proj = nn.Linear(config.d_model, inner, bias=False)
        self.v_proj = nn.Linear(config.d_model, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.d_model, bias=False)
        self.dropout = config.dropout_rate

    def split_heads(self, x: Tensor, batch: int) -> Tensor:
        """(B*G, ..., H*K) → (B, H, G*T, K): the G rows of one memory become more queries of one attention call."""
        return x.reshape(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) → keys and values, each (B, H, N, K)."""
        batch = memory.shape[0]
        keys, values = project(memory, self.k_proj, self.v_proj)
        return self.split_heads(keys, batch), self.split_heads(values, batch)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Projected queries (B*G, ..., H*K) over keys and values (B, H, N, K) → the heads' mixtures of values, shaped as the queries."""
        dropout = self.dropout if self.training else 0.0
        heads = self.split_heads(queries, keys.shape[0])
        if dropout and heads.device.type == "cpu":
            mixed = DroppedAttention.apply(heads, keys, values, bias, dropout)
        else:
            mixed = F.scaled_dot_product_attention(heads, keys, values, attn_mask=bias, dropout_p=dropout, scale=1.0)
        return mixed.transpose(1, 2).reshape(queries.shape)  # (B, H, G*T, K) → (B*G, T, H*K)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """x (B*G, T, D) attends to keys and values (B, H, N, K) with an additive bias that broadcasts to (B, H, G*T, N) → (B*G, T, D)."""
        return self.o_proj(self.attend(self.q_proj(x), keys, values, bias))

    def attend_itself(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, T, D) attends to itself with a bias that broadcasts to (B, H, T, T) → (B, T, D)."""
        queries, keys, values = project(x, self.q_proj, self.k_proj, self.v_proj)
        return self.o_proj(self.attend(queries, self.split_heads(keys, x.shape[0]), self.split_heads(values, x.shape[0]), bias))

    def attend_memory(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        """x (B*G, T, D) attends to memory (B, N, D) with a bias (B, 1, 1, N) → (B*G, T, D).

        Where it is fewer operations, in fp32 on a CPU with a gradient into the memory, its keys and values are never formed.
        """
        batch, queries = memory.shape[0], x.shape[0] // memory.shape[0] * x.shape[1]
        plain_fp32 = memory.device.type == "cpu" and memory.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not (plain_fp32 and memory.requires_grad and few_queries(queries, memory.shape[1], self.head_dim)):
            return self(x, *self.keys_values(memory), bias)
        q = self.q_proj(x).reshape(batch, queries, self.num_heads, self.head_dim)
        key_parts, value_parts = parts(memory, self.k_proj, self.v_proj)
        dropout = self.dropout if self.training else 0.0
        mixed = MemoryAttention.apply(q, memory, *key_parts, *value_parts, None if bias is None else bias[:, 0], dropout)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1))


class GatedMLP(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x), with the tanh form of GELU (v1.1, Flan-T5)."""

    inputs = ("wi_0", "wi_1")

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(self.activate(*project(x, self.wi_0, self.wi_1))))

    @staticmethod
    def activate(gate: Tensor, value: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * value


class ReluMLP(nn.Module):
    """wo(relu(wi x)) (v1.0)."""

    inputs = ("wi",)
    activate = staticmethod(F.relu)

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(self.activate(self.wi(x))))


class Block(nn.Module):
    """Pre-norm self-attention, cross-attention where there is a memory to read (decoder), and MLP."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.self_attn_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.self_attn = Attention(config)
        self.self_attn_residual = Residual(config.d_model, config.dropout_rate)
        if is_decoder:
            self.cross_attn_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
            self.cross_attn = Attention(config)
            self.cross_attn_residual = Residual(config.d_model, config.dropout_rate)
        self.mlp_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.mlp = GatedMLP(config) if config.feed_forward_proj == "gated-gelu" else ReluMLP(config)
        self.mlp_residual = Residual(config.d_model, config.dropout_rate)

    def forward(self, x, self_bias, memory=None, memory_bias=None) -> Tensor:
        """x (B*G, T, D), memory (B, N, D) in a decoder → (B*G, T, D)."""
        normed = self.self_attn_norm(x)
        x = self.self_attn_residual(x, self.self_attn.attend_itself(normed, self_bias), normed)
        if memory is not None:
            normed = self.cross_attn_norm(x)
            x = self.cross_attn_residual(x, self.cross_attn.attend_memory(normed, memory, memory_bias), normed)
        normed = self.mlp_norm(x)
        return self.mlp_residual(x, self.mlp(normed), normed)


def input_groups(block: Block) -> list[list[nn.Module]]:
    """The linear layers of a block, those that read the same input together."""
    own, cross, mlp = block.self_attn, getattr(block, "cross_attn", None), block.mlp
    groups = [[own.q_proj, own.k_proj, own.v_proj], [own.o_proj]]
    if cross is not None:
        groups += [[cross.k_proj, cross.v_proj], [cross.q_proj], [cross.o_proj]]
    return [*groups, [getattr(mlp, name) for name in mlp.inputs], [mlp.wo]]


class Stack(nn.Module):
    """Encoder or decoder: blocks over embedded tokens, one position bias for all of them, a last norm.

    `prefix`: None, or a module whose prefix(B) gives embeddings (B, P, D) that stand before every text. An encoder returns their states too.
    """

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        self.is_decoder = is_decoder
        self.register_module("prefix", None)
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.position_bias = RelativePositionBias(config, bidirectional=not is_decoder)
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(num_layers))
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    def self_bias(self, length: int, mask: Tensor | None) -> Tensor:
        """Position bias, minus infinity where a decoder would look ahead, lowest where mask (B, length) is False: (B or 1, H, length, length)."""
        bias = self.position_bias(length, length)
        if self.is_decoder:
            visible = torch.ones(length, length, dtype=torch.bool, device=bias.device).tril()
            bias = bias.masked_fill(~visible, -torch.inf)
        if mask is not None:
            bias = bias + mask_bias(mask, bias.dtype)
        return bias

    def forward(self, x, mask=None, memory=None, memory_mask=None) -> Tensor:
        """x (B*G, T, D) → (B*G, T, D), in an encoder (B*G, P + T, D); mask (B*G, T) and memory_mask (B, N) are True at real tokens; memory is (B, N, D)."""
        length = x.shape[1]
        if self.prefix is not None:
            x = torch.cat([self.prefix(x.shape[0]).to(x.dtype), x], dim=1)  # (B*G, P + T, D)
            mask = None if mask is None else after_prefix(mask, x.shape[1])
        self_bias = self.self_bias(x.shape[1], mask).to(x.dtype)
        memory_bias = None if memory_mask is None else mask_bias(memory_mask, x.dtype)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, self_bias, memory, memory_bias)
        return self.dropout(self.norm(x[:, x.shape[1] - length :] if self.is_decoder else x))


def after_prefix(mask: Tensor, length: int) -> Tensor:
    """mask (B, T) of a text that follows a prefix, filled up in front to (B, length)."""
    return F.pad(mask.bool(), (length - mask.shape[1], 0), value=True)


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T), True at real tokens → additive (B, 1, 1, T): 0 there and the most negative finite number elsewhere, so that no row is all -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask.bool(), torch.finfo(dtype).min)[:, None, None]


class T5(nn.Module):
    """Token embedding, encoder (if any), decoder, lm_head."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, _weight=torch.empty(config.vocab_size, config.d_model))
        self.encoder = Stack(config, is_decoder=False) if config.num_layers else None
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight
        if not self.embedding.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Random weights before a checkpoint or for training from scratch; T5's own scheme.

        | weight                     | standard deviation        |
        | -------------------------- | ------------------------- |
        | embedding (and tied head)  | 1                         |
        | q_proj                     | (D * K) ** -0.5           |
        | k_proj, v_proj, wi*        | D ** -0.5                 |
        | o_proj                     | (H * K) ** -0.5           |
        | wo                         | d_ff ** -0.5              |
        | position bias, untied head | D ** -0.5                 |
        | norms                      | all ones                  |
        """
        width, head_dim, heads, d_ff = self.config.d_model, self.config.d_kv, self.config.num_heads, self.config.d_ff
        self.embedding.weight.normal_(std=1.0)
        if not self.config.tie_word_embeddings:
            self.lm_head.weight.normal_(std=width**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):
                module.q_proj.weight.normal_(std=(width * head_dim) ** -0.5)
                module.k_proj.weight.normal_(std=width**-0.5)
                module.v_proj.weight.normal_(std=width**-0.5)
                module.o_proj.weight.normal_(std=(heads * head_dim) ** -0.5)
            elif isinstance(module, GatedMLP):
                module.wi_0.weight.normal_(std=width**-0.5)
                module.wi_1.weight.normal_(std=width**-0.5)
                module.wo.weight.normal_(std=d_ff**-0.5)
            elif isinstance(module, ReluMLP):
                module.wi.weight.normal_(std=width**-0.5)
                module.wo.weight.normal_(std=d_ff**-0.5)
            elif isinstance(module, RelativePositionBias):
                module.embedding.weight.normal_(std=width**-0.5)

    def set_dropout(self, rate: float) -> None:
        """Change the dropout of every part of the model."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
            elif isinstance(module, Attention):
                module.dropout = rate

    def shift_right(self, labels: Tensor) -> Tensor:
        """Decoder input of labels (B, T): the start token, then the labels but the last, with ignored ones (-100) as pad."""
        start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)

    def encode(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text (B, T), mask True at real tokens → memory (B, P + T, D), P = 0 without a prefix. Raises UserError where the config has no encoder."""
        if self.encoder is None:
            raise UserError("this T5 was built without an encoder (num_layers = 0)")
        return self.encoder(self.embedding(input_ids), mask)

    def decode(self, input_ids: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Decoder input (B*G, T) over memory (B, N, D), G rows to each → last hidden states (B*G, T, D)."""
        return self.decoder(self.embedding(input_ids), memory=memory, memory_mask=memory_mask)

    def scaled(self, hidden: Tensor) -> Tensor:
        """Last hidden states as lm_head takes them."""
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states (..., D) → (..., V)."""
        return self.lm_head(self.scaled(hidden))

    def forward(self, input_ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text to text: input_ids (B, T_in), mask (B, T_in), labels (B, T) → logits (B, T, V)."""
        memory = self.encode(input_ids, mask)
        memory_mask = None if mask is None else after_prefix(mask, memory.shape[1])
        return self.logits(self.decode(self.shift_right(labels), memory, memory_mask))
