"""Fixtures that several test files use. Everything here runs on the CPU without network."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data beside the checkout (or $CAPTIONER_SHARED); the test skips where it is absent."""
    folder = Path(os.environ.get("CAPTIONER_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "design.md").is_file():
        pytest.skip(f"no shared data at {folder} (set CAPTIONER_SHARED)")
    return folder


COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")
TINY_TEXT = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 0, "num_decoder_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True, "dropout_rate": 0.0,
}  # fmt: skip


def write_tiny_data(folder: Path) -> Path:
    """A data folder: eight plain pictures in train, four of them in val, two captions each."""
    from PIL import Image

    for split, count in (("train", 8), ("val", 4)):
        (folder / split).mkdir(parents=True)
        lines = []
        for colour in COLOURS[:count]:
            Image.new("RGB", (40, 30), colour).save(folder / split / f"{colour}.png")
            captions = [f"a plain {colour} picture", f"everything here is {colour}"]
            lines.append(json.dumps({"file_name": f"{colour}.png", "captions": captions}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def tiny_train_flags(data: Path, folder: Path) -> list[str]:
    """Flags of train.py for a model that takes a second: random backbones, all trained, fp32, no dropout; the run is `run` in the folder."""
    config = folder / "tiny.json"
    config.write_text(json.dumps(TINY_TEXT), encoding="utf-8")
    return [
        "--data", str(data), "--vision", "ViT-Tiny-Scenes", "--image-size", "16", "--text-config", str(config), "--vocab-size", "64",
        "--train-base", "vision,text", "--batch-size", "4", "--max-steps", "4", "--precision", "fp32", "--device", "cpu",
        "--lora-dropout", "0", "--output", str(folder / "run"), "--workers", "0",
    ]  # fmt: skip


@pytest.fixture
def tiny_data(tmp_path) -> Path:
    return write_tiny_data(tmp_path / "data")


@pytest.fixture
def tiny_flags(tiny_data, tmp_path) -> list[str]:
    return tiny_train_flags(tiny_data, tmp_path)


@pytest.fixture
def trained(tiny_flags, tmp_path, monkeypatch) -> Path:
    """A run under runs/ of the working directory."""
    import train

    monkeypatch.chdir(tmp_path)
    assert train.main([*tiny_flags, "--max-steps", "30", "--lr", "5e-3", "--eval-every", "30", "--output", str(tmp_path / "runs" / "tiny")]) == 0
    return tmp_path / "runs" / "tiny"


@pytest.fixture(scope="session")
def train_scenes():
    """1,500 rows of drawn scenes to train on."""
    from data import scenes

    return scenes.split("train", 1500)


@pytest.fixture(scope="session")
def val_scenes():
    """All rows of the validation scenes, half of them with a held-out pair."""
    from data import scenes

    return scenes.split("val")
