"""Tiny CLIPs with random weights, as an architecture `Tiny` beside the embedded ones."""

from pathlib import Path

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def save(path: Path, seed: int) -> str:
    """Weights under open_clip's names at path; the `NAME:WEIGHTS` that loads them once `captioner.demo.CLIPS["Tiny"]` is CONFIG."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_file(open_clip.CLIP(**CONFIG).state_dict(), path)
    return f"Tiny:{path}"
