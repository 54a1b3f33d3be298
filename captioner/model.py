"""The captioner: image encoder → linear bridge → T5 decoder.

Legend: B images, G captions per image, N image tokens, P tokens of an instruction to T5's encoder, T text tokens, D decoder width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from captioner.cross_entropy import IGNORED, head_cross_entropy
from captioner.t5 import T5


class Captioner(nn.Module):
    """`vision` turns pixels into (B, N, D_vision) tokens, `bridge` maps them to the decoder's width, `text` reads them through cross-attention."""

    def __init__(self, vision: nn.Module, text: T5):
        super().__init__()
        self.vision = vision
        self.bridge = nn.Linear(vision.width, text.config.d_model)
        self.text = text

    def encode(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) → memory (B, N, D); see `read`."""
        return self.read(self.vision(pixel_values))

    def read(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, N, D_vision) → memory (B, N, D); where T5's encoder has a prefix, its reading follows: (B, N + P, D)."""
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
        """(B, 3, H, W), labels (B*G, T), -100 = ignore → (B*G, T, V)."""
        return self.decoder_logits(self.encode(pixel_values), labels)

    def loss(self, memory: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the labels (B*G, T) that are not -100, and their number; see `captioner.cross_entropy`."""
        hidden, kept = self.text.scaled(self.decoder_hidden(memory, labels)), labels != IGNORED
        # To leave rows out would wait for a GPU, which a CUDA graph can not; there they are computed and do not count.
        hidden, counted = (hidden.flatten(0, 1), labels.flatten()) if labels.device.type == "cuda" else (hidden[kept], labels[kept])
        return head_cross_entropy(self.text.lm_head, hidden, counted, label_smoothing), kept.sum()
