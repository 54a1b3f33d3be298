"""The embedded backbones: tiny CLIPs and a tiny T5 that know drawn scenes, so that everything runs offline within minutes.

`scripts/pretrain_demo.py` makes the files in this folder, `card.md` says how and how good they are. They load through the same doors as real ones:
`--vision ViT-Tiny-Scenes:demo`, `--text t5-tiny-scenes`, `--reranker ViT-Tiny-Scenes:demo`, `--scorer ViT-Tiny-Scenes:scorer`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MERGES = FOLDER / "bpe_scenes.txt.gz"  # byte pairs for open_clip's SimpleTokenizer

# Architectures of our own beside open_clip's, as its config files describe them.
CLIPS = {
    "ViT-Tiny-Scenes": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32, "pos_embed_type": "sin_cos_2d", "pool_type": "avg",
        },
        "text_cfg": {"context_length": 77, "vocab_size": 800, "width": 128, "heads": 4, "layers": 3, "tokenizer_kwargs": {"bpe_path": str(MERGES)}},
    },
}  # fmt: skip

# Their weights, by architecture and tag, and the T5s by name.
CLIP_WEIGHTS = {name: {tag: FOLDER / f"{name}.{tag}.safetensors" for tag in ("demo", "scorer")} for name in CLIPS}
TEXTS = {"t5-tiny-scenes": FOLDER / "t5-tiny-scenes"}
