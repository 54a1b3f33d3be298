"""The captioner: image encoder → linear bridge → T5 decoder.

Legend: B images, C views of an image (data/views.py), G captions per image, N image tokens, P tokens of an instruction to T5's encoder, T text tokens,
D decoder width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from captioner.cross_entropy import IGNORED, head_cross_entropy
from captioner.t5 import T5


class Bridge(nn.Linear):
    """Image tokens (B, N, D_vision) → (B, N, D). With views, (B, C, N, D_vision) → (B, C*N, D), the tokens of a view with its learned embedding added.

    The embeddings are zero at first, so that the views are told apart by what they show alone.
    """

    def __init__(self, vision_width: int, d_model: int, views: int = 0):
        super().__init__(vision_width, d_model)
        self.view_embedding = nn.Parameter(torch.zeros(views, d_model)) if views else None

    def of_views(self, views: int) -> "Bridge":
        """The same map for another number of views, whose embeddings are zero again."""
        bridge = Bridge(self.in_features, self.out_features, views)
        bridge.weight, bridge.bias = self.weight, self.bias
        return bridge

    def forward(self, tokens: Tensor) -> Tensor:
        memory = super().forward(tokens)
        if self.view_embedding is None:
            return memory
        return (memory + self.view_embedding[:, None]).flatten(1, 2)


def see(vision: nn.Module, pixel_values: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) → tokens (B, N, D_vision), or of views (B, C, 3, H, W) → (B, C, N, D_vision)."""
    if pixel_values.ndim == 4:
        return vision(pixel_values)
    return vision(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])


class Captioner(nn.Module):
    """`vision` turns pixels into (B, N, D_vision) tokens, `bridge` maps them to the decoder's width, `text` reads them through cross-attention.

    views: how many views of an image there are, 0 for the image alone.
    """

    def __init__(self, vision: nn.Module, text: T5, views: int = 0):
        super().__init__()
        self.vision = vision
        self.bridge = Bridge(vision.width, text.config.d_model, views)
        self.text = text

    @property
    def views(self) -> int:
        """Views of an image, 0 for the image alone."""
        return 0 if self.bridge.view_embedding is None else len(self.bridge.view_embedding)

    @property
    def image_tokens(self) -> int:
        """Tokens that the memory has of an image."""
        return self.vision.num_tokens * max(1, self.views)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) → memory (B, N, D), or of views (B, C, 3, H, W) → (B, C*N, D); see `read`."""
        return self.read(see(self.vision, pixel_values))

    def read(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, N, D_vision) or (B, C, N, D_vision) → memory (B, N, D); where T5's encoder has a prefix, its reading follows: (B, N + P, D)."""
        memory = self.bridge(tokens)
        if self.text.encoder is None or self.text.encoder.prefix is None:
            return memory
        nothing = torch.empty((1, 0), dtype=torch.long, device=memory.device)
        instruction = self.text.encode(nothing).to(memory.dtype)  # (1, P, D)
        return torch.cat([memory, instruction.expand(len(memory), -1, -1)], dim=1)

    def decoder_hidden(self, memory: Tensor, labels: Tensor) -> Tensor:
        """memory (B, N, D), labels (B*G, T), the G captions of an image in a row → last hidden states (B*G, T, D)."""
        return self.text.decode(self.text.shift_right(labels), memory)

    def decoder_logits(self, memory: Tensor, labels: Tensor) -> Tensor:
        """memory (B, N, D), labels (B*G, T), -100 = ignore → (B*G, T, V); the decoder input is the labels shifted right."""
        return self.text.logits(self.decoder_hidden(memory, labels))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, C, 3, H, W), labels (B*G, T), -100 = ignore → (B*G, T, V)."""
        return self.decoder_logits(self.encode(pixel_values), labels)

    def loss(self, memory: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the labels (B*G, T) that are not -100, and their number; see `captioner.cross_entropy`."""
        hidden, kept = self.text.scaled(self.decoder_hidden(memory, labels)), labels != IGNORED
        # To leave rows out would wait for a GPU, which a CUDA graph can not; there they are computed and do not count.
        hidden, counted = (hidden.flatten(0, 1), labels.flatten()) if labels.device.type == "cuda" else (hidden[kept], labels[kept])
        return head_cross_entropy(self.text.lm_head, hidden, counted, label_smoothing), kept.sum()
