"""Image captioner: a CLIP image encoder, a linear bridge and a T5 decoder.

    model, tokenizer, transform = captioner.load("runs/base")

Submodules load when they are first used, so that `captioner.metrics` needs no torch.
"""

import importlib

SUBMODULES = ("backbones", "checkpoint", "generate", "metrics", "model", "t5", "timm_vision", "tokenizer", "vit", "weights")


def __getattr__(name: str):
    if name == "load":
        return importlib.import_module("captioner.checkpoint").load
    if name in SUBMODULES:
        return importlib.import_module(f"captioner.{name}")
    raise AttributeError(f"module 'captioner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["load", *SUBMODULES]
