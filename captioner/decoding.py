"""Captioning a split with a trained run: the settings and the opened run that evaluate.py and best_of_n.py share.

torch is imported when a run is opened, so that a command's flags, help and errors come at once.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import cli
from captioner.cli import progress, setting
from captioner.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from captioner.model import Captioner
    from captioner.tokenizer import Tokenizer
    from data.dataset import BadImageLedger, Batches, CaptionDataset
    from data.rows import Row

REPORT_IMAGES = 1000  # a report shows the first ones of a larger split


@dataclass
class RunSettings:
    """What every command that captions a split with a run can be told; each field is one flag."""

    run: str | None = setting(None, "run directory, or a bundle of scripts/export.py (default: the newest under runs/)")
    split: str = setting("val", "split to caption")
    data: str | None = setting(None, "folder with SPLIT/metadata.jsonl, or scenes; that of the run if not given")
    checkpoint: str | None = setting(None, "use checkpoints/best or checkpoints/last", ("best", "last"))
    stack: tuple[str, ...] | None = setting(None, "bottleneck adapters that are on, the lowest first, or none; those of the run if not given")
    num_beams: int = setting(10, "beams of beam search")
    length_penalty: float = setting(1.0, "beam score is the sum of log-probabilities / length ** penalty")
    temperature: float = setting(0.5, "of sampling")
    top_k: int = setting(50, "sample among the k likeliest tokens; 0 for all")
    top_p: float = setting(0.9, "sample among the likeliest tokens that together reach p")
    seed: int = setting(0, "of sampling")
    scorer: str | None = setting(None, "CLIP for CLIPScore, NAME[:WEIGHTS]; for drawn scenes ViT-Tiny-Scenes:scorer if not given")
    tokenize: str = setting("ptb", "words: Penn Treebank tokens without punctuation, or split at spaces", ("ptb", "none"))
    limit: int | None = setting(None, "only the first N images (or lines)")
    batch_size: int = setting(16, "images decoded together")
    workers: int = setting(0, "processes that decode image files")
    cache_features: str | None = setting(None, "folder that keeps the frozen encoder's features, computed once")
    on_bad: str = setting("skip", "bad image: leave out, name and count it, or stop", ("skip", "fail"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = setting("fp32", "arithmetic of the image encoder and the bridge", ("auto", "fp32", "bf16"))
    decode_precision: str = setting("fp32", "of the weights that a step of decoding reads: as loaded, bf16, or int8 on a CPU; auto: the fastest of them on this machine", ("auto", "fp32", "bf16", "int8"))
    report: bool = setting(True, "write report.html with the results")
    output: str | None = setting(None, "directory for the results (under RUN/results/ if not given)")
    json: str | None = setting(None, "write the scores to this file, or - for stdout")

    positional = ("run",)


@dataclass
class OpenRun:
    """A trained run with its adapters merged, ready to caption the rows of a split."""

    path: Path
    config: dict
    model: "Captioner"
    tokenizer: "Tokenizer"
    transform: Any  # data.transforms.ImageTransform
    rows: "Sequence[Row]"
    dataset: "CaptionDataset"
    ledger: "BadImageLedger"
    device: "torch.device"
    precision: str
    stack: list[str]  # bottleneck adapters that are on, the lowest first
    decode_precision: str  # of the weights that a step of decoding reads: fp32 (as loaded), bf16 or int8

    @property
    def precisions(self) -> str:
        """Both precisions for people."""
        return self.precision if self.decode_precision == "fp32" else f"{self.precision}, decoding in {self.decode_precision}"

    def results(self, name: str) -> Path:
        """Folder for results of this name, and of another stack than the run's own: inside a run directory, beside a bundle."""
        folder = self.path / "results" if self.path.is_dir() else self.path.with_name(f"{self.path.stem}-results")
        return folder / (name if self.stack == self.config["model"]["stack"] else f"{name}-stack-{'+'.join(self.stack) or 'none'}")

    def batches(self, batch_size: int, workers: int = 0, order: Sequence[int] | None = None) -> "Batches":
        """Batches (see data/collate.py) with all captions of an image, of the rows with these numbers, or of all."""
        from data.dataset import make_loader

        order = range(len(self.rows)) if order is None else order
        return make_loader(self.dataset, None, batch_size, order, workers, "all", ledger=self.ledger)

    def encode(self, batch: dict) -> "Tensor":
        """Memory (B, N, D) of a batch."""
        import torch

        from captioner.runtime import encode_images

        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return encode_images(self.model, batch, self.device)


def open_run(settings: RunSettings, group: int | None = None) -> OpenRun:
    """The run, split and device that the settings name; `group` captions of an image will be decoded at once at most, where that is known.

    Raises UserError, or the data's one-line errors, for what is not there.
    """
    import torch

    from captioner import checkpoint, generate
    from captioner.features import FeatureStore
    from captioner.frozen_vit import prepare_frozen
    from captioner.runtime import choose_device, choose_precision
    from data.dataset import BadImageLedger, CaptionDataset
    from data.readers import read

    path = Path(settings.run) if settings.run else checkpoint.newest_run()
    config = checkpoint.read_config(path)
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    rows = read(settings.data or config["settings"]["data"], settings.split)[: settings.limit]
    # In a 4-bit base there is no room for the update.
    model, tokenizer, transform = checkpoint.load(path, checkpoint=settings.checkpoint, merge=not config["model"]["base_bits"], stack=settings.stack)
    model.to(device)
    ledger = BadImageLedger(settings.on_bad, cli.say)
    store = None
    if settings.cache_features:
        backbone = checkpoint.vision_backbone(model, transform, config["model"])
        store = FeatureStore(Path(settings.cache_features), backbone, precision, checkpoint.vision_stack(model))
        store.prepare(rows, ledger, device, settings.workers, progress=progress)
    elif precision == "bf16":
        prepare_frozen(model.vision, torch.bfloat16)
    step_rows = None if group is None else group * min(settings.batch_size, len(rows))
    weights = generate.prepare_for_decoding(model, step_rows if settings.decode_precision != "fp32" else None, settings.decode_precision)
    if weights.left_out:
        left_out = f"{weights.left_out} of {weights.count} layers stay as they are (unmerged LoRA, a 4-bit base)"
        cli.say(f"--decode-precision {weights.precision}: {left_out}")
    stack = config["model"]["stack"] if settings.stack is None else list(settings.stack)
    dataset = CaptionDataset(rows, transform, store)
    return OpenRun(path, config, model, tokenizer, transform, rows, dataset, ledger, device, precision, stack, weights.precision)


def attend(run: OpenRun, batch: dict, captions: Sequence[str]) -> "list[tuple[list[str], np.ndarray | None]]":
    """(words, maps of where the decoder looks while it writes them) of a finished caption for each image of a batch."""
    import torch

    from captioner.word_attention import word_attention

    start = run.model.text.config.decoder_start_token_id
    ids = [torch.tensor([start, *tokens]) for tokens in run.tokenizer.encode(list(captions))]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=run.tokenizer.pad_id).to(run.device)  # (B, T)
    return word_attention(run.model, run.encode(batch), ids, run.tokenizer)


def weights_hash(run: OpenRun, checkpoint: str | None) -> str:
    """SHA-256 over everything that decides what a run's model computes: its own weight files, and the facts about weights kept elsewhere."""
    from captioner.checkpoint import PUBLISHED, files_of

    directory = run.path if checkpoint is None else run.path / "checkpoints" / checkpoint
    digest = hashlib.sha256(json.dumps(run.config["model"], sort_keys=True).encode())
    files = [file for name in PUBLISHED for file in files_of(directory / name)] if run.path.is_dir() else [run.path]
    for file in files:
        with open(file, "rb") as opened:
            name = file.name if file == directory else file.relative_to(directory)
            digest.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def are_scenes(rows: "Sequence[Row]") -> bool:
    """Whether every picture is a drawn scene, whose truth is known."""
    return all(hasattr(row.image, "scene") for row in rows)


class Stopped(Exception):
    """A signal asked to stop, and what was in hand is finished."""


def until_stopped(stop: cli.StopSignal) -> Callable[[Iterable, str], Iterable]:
    """`cli.progress` that raises Stopped after the item during which the signal came."""

    def items_until_stopped(items: Iterable, description: str) -> Iterable:
        for item in progress(items, description):
            yield item
            if stop.number is not None:
                raise Stopped

    return items_until_stopped


def no_captions(split: str) -> UserError:
    return UserError(f"no image of the split {split} can be read")
