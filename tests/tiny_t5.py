"""Tiny random T5 models of `transformers`, written by its own `save_pretrained`, as oracles and as files to load."""

import functools
import json
import random
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from captioner.tokenizer import train_tokenizer

WORDS = "a the red green blue small large circle square triangle above below dog cat man woman runs sits on in".split()
# heads * d_kv is not d_model, and the decoder is deeper than the encoder.
SIZES = dict(
    vocab_size=192, d_model=24, d_kv=5, d_ff=40, num_heads=3, num_layers=2, num_decoder_layers=3,
    decoder_start_token_id=0, dropout_rate=0.0,
)  # fmt: skip
VARIANTS = {
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
    "gated-tied": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=True),
}


@functools.cache
def vocabulary() -> bytes:
    """A spiece.model of at most 60 pieces, so that with the sentinels it fits the models."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=8)) for _ in range(300)]
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, Path(folder) / "spiece.model", 60).path.read_bytes()


def hf_model(variant: str, seed: int = 0, **changes) -> T5ForConditionalGeneration:
    """A model all of whose weights matter: norms are not 1, position biases not small, the v1.1 head is its own."""
    torch.manual_seed(seed)
    kinds = VARIANTS[variant]
    model = T5ForConditionalGeneration(T5Config(**(SIZES | kinds | changes))).eval()
    if not kinds["tie_word_embeddings"]:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 1.0 if "shared" in name or "bias" in name else parameter.shape[1] ** -0.5)
    return model


def save(model: T5ForConditionalGeneration, folder: Path, changes: dict | None = None, **options) -> Path:
    """The directory of `model` with a spiece.model; `changes` go into its config.json, None removes a key."""
    model.save_pretrained(folder, **options)
    (folder / "spiece.model").write_bytes(vocabulary())
    if changes:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
    return folder
