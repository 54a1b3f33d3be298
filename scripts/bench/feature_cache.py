"""What `train.py --cache-features` saves: seconds an image in an epoch from the cache, against the same training that encodes every image in every epoch.

    python scripts/bench/feature_cache.py [--only ID,ID] [--pairs 3] [--threads N] [--json PATH|-]

Both sides are `python train.py` on Flickr8k photographs written as JPEG, or drawn scenes where there are none; the "peer" is the one without
--cache-features. FC-flickr8k is the recipe of scripts/flickr8k.sh (EfficientNet-Lite2 at 288 pixels, frozen, a small T5 trained on all captions, 48 images),
FC-flickr8k-6 the same with six views of 112 pixels, FC-base `--preset base` (ViT-B/16, LoRA on Flan-T5-base), with 8 images a step. Weights are random.
The cache is filled before; a measurement is the median over the steps of a training but the first, as its timing.jsonl has them: loading included,
evaluations and checks not.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import cold_start
import common

STEPS, IMAGES = 4, 96
FLICKR8K = [
    "--vision", "timm/tf_efficientnet_lite2", "--resize-mode", "squash", "--text-config", "t5-mini", "--vocab-size", "300", "--train-base", "text",
    "--lora-targets", "none", "--captions-per-image", "all", "--max-caption-tokens", "24", "--batch-size", "48",
]  # fmt: skip
# Row: what is trained, and its flags.
ROWS = {
    "FC-flickr8k": ("Flickr8k recipe, EfficientNet-Lite2 at 288 px", [*FLICKR8K, "--image-size", "288"]),
    "FC-flickr8k-6": ("Flickr8k recipe, six views of 112 px", [*FLICKR8K, "--image-size", "112", "--views", "6"]),
    "FC-base": ("LoRA on Flan-T5-base, ViT-B/16", ["--vision", f"{cold_start.VISION}:VISION", "--text", "TEXT", "--batch-size", "8"]),
}
IDS = tuple(ROWS)
PACKAGES = ("torch", "timm")


def write_encoder(folder: Path) -> Path:
    """A file of random weights of the recipe's encoder: only a file has the same weights in every process."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = folder / "encoder.safetensors"
    save_file(timm.create_model("tf_efficientnet_lite2").state_dict(), path)
    return path


def seconds_per_image(folder: Path, flags: list[str], threads: int | None, cached: bool) -> float:
    """Of a short training by train.py. Raises RuntimeError with its last line where it fails."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [
        sys.executable, str(common.REPOSITORY / "train.py"), "--preset", "base", "--data", str(folder / "data"), *flags, "--max-steps", str(STEPS),
        "--eval-every", str(STEPS), "--eval-images", "1", "--log-every", "1", "--output", str(run), *(["--threads", str(threads)] if threads else []),
        *(["--cache-features", str(folder / "cache")] if cached else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"train.py failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    speeds = [json.loads(line).get("images_per_s") for line in (run / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    return 1 / statistics.median([speed for speed in speeds if speed][1:])


def run(pairs: int = 3, only: Collection[str] | None = None, threads: int | None = None) -> list[dict]:
    """The rows named, or all."""
    import torch

    from captioner.runtime import choose_precision

    precision, result = choose_precision("auto", torch.device("cpu")), []
    for id in IDS if only is None else only:
        what, flags = ROWS[id]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if id == "FC-base":
                cold_start.write_files(folder)
                words = {f"{cold_start.VISION}:VISION": f"{cold_start.VISION}:{folder / 'vision'}", "TEXT": str(folder / "text")}
            else:
                words = {"timm/tf_efficientnet_lite2": f"timm/tf_efficientnet_lite2:{write_encoder(folder)}"}
                common.write_photographs(folder / "data", 2, "val")
                common.write_photographs(folder / "data", IMAGES)
            flags = [words.get(word, word) for word in flags]
            seconds_per_image(folder, flags, threads, cached=True)  # fills the cache
            ours, theirs = [], []
            for turn in range(pairs):
                for cached in (True, False) if turn % 2 else (False, True):
                    (ours if cached else theirs).append(seconds_per_image(folder, flags, threads, cached))
        details = dict(peer="without --cache-features", peer_version="same", must=None, threads=threads or torch.get_num_threads())
        result.append(common.row(id, f"{what}: an image in an epoch, from JPEG files", ours=ours, theirs=theirs, dtype=precision, **details))
    return result


def main() -> int:
    arguments = common.parse_rows(common.row_parser(__doc__.split("\n")[0], IDS, pairs=3), IDS)
    common.report(run(arguments.pairs, arguments.only, arguments.threads), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
