"""Train a captioner: settings → data → backbones → adapters → optimiser → loop → run directory.

    python train.py --lora-targets attn,ffn                          the embedded demo: drawn scenes, tiny backbones, minutes on two CPU cores
    python train.py --preset base --data DATA                        CLIP ViT-B/16 and Flan-T5-base, frozen; bridge and LoRA trained
    python train.py --base runs/NAME --data DATA                     adapt a trained run, frozen, to other pictures or another style
    python train.py --lora-targets none --adapters attn,ffn          bottleneck adapters instead of LoRA; --soft-prompt, --base-bits 4: see the README
    python train.py --resume auto --output runs/NAME …               go on where it was killed, or begin; --dry-run: only the checks before the first step
    torchrun --nproc-per-node K train.py …                           K processes, each with a batch of its own
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from captioner import cli  # first: it sets how OpenMP threads wait
from captioner.cli import say, setting

import torch  # noqa: I001
from tqdm import tqdm

import lora
from captioner import checkpoint, checkpoint_store, preflight, provenance
from captioner.backbones import Backbone, build_text, build_vision
from captioner.errors import Stopped, UsageError, UserError
from captioner.features import DeviceFeatures, prepared_store
from captioner.files import locked, write_json
from captioner.frozen_vit import prepare_frozen
from captioner.job import Job, started
from captioner.model import Captioner
from captioner.processes import Processes
from captioner.run_config import checked_settings
from captioner.runtime import PeakMemory, cast_frozen, choose_precision, recompute_blocks
from captioner.t5 import input_groups
from captioner.timm_vision import TimmVision
from captioner.tokenizer import Tokenizer, train_tokenizer
from captioner.tracking import TRACKERS, open_tracker
from captioner.trainer import Trainer, TrainState
from data.bad_images import BadImageLedger, check_limit
from data.dataset import CaptionDataset, make_loader
from data.images import BadImage
from data.readers import BY_NAME, absolute, read
from data.rows import DataError, Row
from data.schedule import TrainingSchedule
from data.transforms import RESIZE_MODES
from data.views import parse_views


def rank_of_places(text: str) -> int | dict[str, int]:
    """Parser of `8` or `decoder=8,vision=4`."""
    try:
        if "=" not in text:
            return int(text)
        pairs = [(place.strip(), int(rank)) for place, _, rank in (part.partition("=") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor PLACE=NUMBER,PLACE=NUMBER") from None
    if len(dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a place twice")
    return dict(pairs)


@dataclass
class Settings:
    """Every setting of a training run; each field is one flag, and all are saved in the run's config.json."""

    preset: str = setting("demo", "defaults for the settings below", ("demo", "base", "large"))
    vision: str | None = setting(None, "image encoder: an open_clip architecture or timm/NAME, then :TAG or :FILE for its weights")
    text: str | None = setting(None, "decoder: a Hugging Face T5 directory or repository")
    text_config: str | None = setting(None, "decoder with random weights: a named size or a T5 config.json")
    tokenizer: str | None = setting(None, "spiece.model for --text-config; without it a vocabulary is learned from the training captions")
    vocab_size: int = setting(4000, "pieces of a learned vocabulary")
    base: str | None = setting(None, "start from this trained run instead of --vision and --text: its LoRA merged, its adapters and prompt frozen")
    image_size: int | None = setting(None, "input size in pixels, if not the encoder's own")
    resize_mode: str | None = setting(
        None, "how an image becomes square, if not the encoder's own way: short side and centre crop, long side and padding, or squashed whole", RESIZE_MODES
    )
    views: str | None = setting(
        None, "encode several parts of each picture: 6 for the whole, its quadrants and its centre, 5, 1, or a list of names and LEFT:TOP:SIDE", parse=cli.checked(parse_views)
    )
    data: str = setting("scenes", "folder, file or shards (README: formats), a mixture A@2,B@1, or scenes (drawn); {split} in it stands for the split")
    format: str | None = setting(None, "format of --data, if not told by its content", tuple(BY_NAME))
    train_split: str = setting("train", "split to train on")
    val_split: str = setting("val", "split to evaluate on")
    limit: int | None = setting(None, "use only the first N images of each split")
    captions_per_image: str = setting("1", "captions of an image in a step: one picked by (seed, epoch, id), or all with the image encoded once", ("1", "all"))
    max_caption_tokens: int = setting(40, "longer captions are cut, keeping the end token")
    length_buckets: bool = setting(True, "batches of captions of about the same length; --no-length-buckets: random ones, with more padding")
    on_bad: str = setting("skip", "bad image: leave out, name and count it, or stop", ("skip", "fail"))
    max_bad: str | None = setting(None, "stop where more images than this are bad, a number or a share such as 1%", parse=cli.checked(check_limit))
    cache_features: str | None = setting(None, "folder that keeps the frozen encoder's features, computed once")
    features_on_device: bool = setting(True, "--cache-features on CUDA: keep all features in its memory where they take at most half of what is free")
    workers: int = setting(0, "processes that decode images")
    lora_targets: tuple[str, ...] = setting(("attn", "ffn"), "linear layers that get LoRA: groups attn, ffn, or names such as cross_attn.q_proj; none for no LoRA")
    lora_where: tuple[str, ...] = setting(("decoder",), "towers that get LoRA; the demo's own tiny image encoder does too unless its features are cached", ("decoder", "encoder", "vision"))
    lora_rank: int | dict[str, int] = setting(8, "rank, or one a place: decoder=8,vision=4", parse=rank_of_places)
    lora_alpha: float = setting(8.0, "scaling is alpha / sqrt(rank)")
    rslora: bool = setting(True, "--no-rslora: scaling is alpha / rank")
    lora_dropout: float = setting(0.1, "dropout on the input of LoRA")
    lora_init: str = setting("gaussian", "first values of A: normal with standard deviation 1/rank, or PEFT's default", ("gaussian", "kaiming"))
    lora_kernel: str = setting("auto", "how LoRA layers are computed: by measurement, by Triton's fused kernels, or by the plain formula", lora.KERNELS)
    adapters: tuple[str, ...] = setting((), "sub-layers that get a bottleneck adapter; --lora-targets none for adapters without LoRA", ("attn", "ffn"))
    adapter_where: tuple[str, ...] = setting(("decoder",), "towers that get adapters", ("decoder", "encoder", "vision"))
    adapter_reduction: int = setting(16, "an adapter's bottleneck is the width divided by this")
    adapter_style: str = setting("houlsby", "what an adapter reads: the sub-layer's output, the stream after it, or the sub-layer's input", lora.STYLES)
    adapter_name: str = setting("caption", "name of the new adapter; those of --base keep theirs")
    stack: tuple[str, ...] | None = setting(None, "adapters that are on, the lowest first (those of --base with the new one on top, if not given)")
    soft_prompt: str | None = setting(None, "trained embeddings in front of a tower's text: those of the tokens of this text to begin with, or this number of them")
    prompt_where: tuple[str, ...] = setting(("decoder",), "towers whose input the soft prompt goes in front of", ("decoder", "encoder"))
    freeze: tuple[str, ...] = setting((), "new parts that are not trained: lora, prompt, bridge, or an adapter's name")
    unfreeze: tuple[str, ...] = setting((), "parts of --base that are trained on: prompt, or an adapter's name")
    base_bits: int | None = setting(None, "keep the frozen backbones in 4 bits (NF4; needs bitsandbytes)", (4,))
    gradient_checkpointing: bool = setting(False, "compute blocks again in the backward pass instead of keeping their activations")
    train_base: tuple[str, ...] = setting((), "backbones to train too", ("vision", "text"))
    epochs: int = setting(4, "passes over the training images")
    max_steps: int | None = setting(None, "stop after N optimiser steps")
    batch_size: int = setting(128, "images in a micro-batch")
    grad_accumulation: int = setting(1, "micro-batches in an optimiser step")
    lr: float = setting(5e-4, "peak learning rate")
    weight_decay: float = setting(0.0, "AdamW's, on matrices other than embeddings")
    schedule: str = setting("linear", "learning rate after the warm-up", ("linear", "cosine", "constant"))
    warmup_ratio: float = setting(0.2, "share of the steps in which the learning rate rises from 0")
    clip: float = setting(1.0, "largest norm of the gradient")
    label_smoothing: float = setting(0.0, "share of the target probability spread over the vocabulary")
    dropout: float | None = setting(None, "T5's own dropout while training, if not that of its config")
    cuda_graphs: bool = setting(False, "replay the training step from CUDA graphs, one per bucket of caption lengths")
    precision: str = setting("auto", "bf16 where the device computes in it, else fp32", ("auto", "fp32", "bf16"))
    seed: int = setting(0, "of initial weights, data order, caption choice and dropout")
    eval_every: int | None = setting(None, "steps between evaluations (once an epoch if not given)")
    eval_images: int = setting(500, "evaluate on the first N images of the validation split")
    best_by: str = setting("CIDEr", "what the best checkpoint is best in", ("CIDEr", "loss"))
    log_every: int = setting(10, "steps between lines of metrics.jsonl")
    report_to: str = setting("none", "also send the numbers of metrics.jsonl to a tracker", TRACKERS)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = setting(None, "CPU threads of a product, if not PyTorch's choice")
    save_every: int | None = setting(None, "also save a checkpoint every N steps, besides one before each evaluation")
    keep_last: int = setting(2, "checkpoints that are kept, besides the best")
    stop_on_collapse: bool = setting(False, "where captions collapse after a better evaluation, stop and leave the best checkpoint as the last")
    dry_run: bool = setting(False, "only the checks before the first step: data, longest batch, gradients, writing a checkpoint; with --cache-features once all is encoded")
    deterministic: bool = setting(False, "on CUDA only kernels that give the same bits twice; a CPU gives them anyway")
    shard: bool = setting(False, "with torchrun: each process keeps a part of the weights (FSDP2), for backbones that do not fit one device")
    resume: str | None = setting(None, "go on with this interrupted run, with its own settings; auto: with that of --output or the newest of these settings, else begin")
    like: str | None = setting(None, "repeat this run: its settings, but for those given here, which must fit the same data")
    output: str | None = setting(None, "run directory (runs/PRESET-DATE-TIME if not given)")
    json: str | None = setting(None, "write a summary to this file, or - for stdout")


# At the size of the demo's models, conversions to bf16 and waiting for a second thread cost more than products.
PRESETS = {
    "demo": dict(
        vision="ViT-Tiny-Scenes:demo", text="t5-tiny-scenes", lora_where=("decoder", "vision"), lora_dropout=0.0, captions_per_image="all", precision="fp32",
        threads=1, epochs=2, max_steps=800, eval_every=400, eval_images=300, batch_size=8, lr=3e-3, warmup_ratio=0.1, schedule="cosine",
    ),
    "base": dict(vision="ViT-B-16-quickgelu:openai", text="google/flan-t5-base"),
    "large": dict(vision="ViT-B-16-quickgelu:openai", text="google/flan-t5-large"),
}


# Settings that decide no weight: a run may be gone on with under others.
FREE = {
    "resume", "output", "json", "device", "workers", "threads", "lora_kernel", "report_to", "save_every", "keep_last", "dry_run", "like", "features_on_device",
    "shard",
}  # fmt: skip


def get_lr(step: int, total: int, settings: Settings) -> float:
    """Learning rate of a step in [0, total): a linear rise from 0 over the warm-up, then the schedule, ending near 0."""
    warmup = round(settings.warmup_ratio * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[settings.schedule]
    return settings.lr * factor


def check(settings: Settings) -> None:
    """Refuse settings that contradict each other; raises UsageError."""
    cli.require_positive(
        settings, "epochs", "batch_size", "grad_accumulation", "eval_images", "log_every", "max_caption_tokens", "vocab_size", "limit", "max_steps", "eval_every",
        "threads", "adapter_reduction", "keep_last", "save_every",
    )  # fmt: skip
    adapted = set(settings.lora_where if settings.lora_targets else ()) | set(settings.adapter_where if settings.adapters else ())
    if settings.cache_features and "vision" in adapted | set(settings.train_base):
        raise UsageError("--cache-features needs a frozen image encoder: drop vision from --train-base, --lora-where and --adapter-where")
    both = sorted(set(settings.freeze) & set(settings.unfreeze))
    if both:
        raise UsageError(f"--freeze and --unfreeze both name {both[0]}")
    if settings.soft_prompt is not None and not settings.soft_prompt.strip():
        raise UsageError("--soft-prompt is empty: give a text or a number of tokens")
    if settings.cuda_graphs and (settings.gradient_checkpointing or settings.grad_accumulation > 1):
        other = "--gradient-checkpointing" if settings.gradient_checkpointing else "--grad-accumulation"
        raise UsageError(f"--cuda-graphs and {other} exclude each other: both set the seed of dropout in the middle of a step")
    if settings.dry_run and settings.resume:
        raise UsageError("--dry-run checks the beginning of a training: drop --resume")
    if settings.shard and settings.base_bits:
        raise UsageError("--shard and --base-bits exclude each other: packed weights can not be shared out")
    if settings.base_bits and settings.train_base:
        raise UsageError("--base-bits keeps the backbones frozen: drop --train-base")
    for flags, needed in ((("adapter_where", "adapter_reduction", "adapter_style", "adapter_name"), "adapters"), (("prompt_where",), "soft_prompt")):
        for name in sorted(settings.given & set(flags)) if not getattr(settings, needed) else ():
            raise UsageError(f"--{name.replace('_', '-')} says nothing without --{needed.replace('_', '-')}")
    if not 0 <= settings.warmup_ratio <= 1:
        raise UsageError("--warmup-ratio must be between 0 and 1")
    if settings.seed < 0:
        raise UsageError("--seed must not be negative")


def resolve(argv: list[str] | None) -> Settings:
    """Settings from the command line: preset, then flags; --resume RUN and --like RUN bring those of the run."""
    settings = cli.parse_settings(Settings, argv, __doc__, PRESETS)
    if settings.resume and settings.like:
        raise UsageError("--resume goes on with a run and --like repeats one: give one of them")
    if settings.resume not in (None, "auto"):
        settings = settings_of_resumed(settings)
    elif settings.like:
        saved = saved_settings(settings.like)
        given = {name: getattr(settings, name) for name in settings.given}
        settings = with_given(Settings(**(saved | {"json": None, "output": None, "resume": None, "dry_run": False} | given)), settings.given)
    if settings.base and settings.resume in (None, "auto"):
        extra = sorted(settings.given & {"vision", "text", "text_config", "tokenizer", "image_size", "resize_mode"})
        if extra:
            raise UsageError(f"--base brings both backbones and the size of its images; remove --{extra[0].replace('_', '-')}")
        settings.vision = settings.text = settings.text_config = None
    elif {"text", "text_config"} <= settings.given:
        raise UsageError("--text and --text-config exclude each other: trained weights or random ones")
    elif "text" in settings.given:
        settings.text_config = None
    elif "text_config" in settings.given:
        settings.text = None
    if settings.resume in (None, "auto") and not settings.like:
        fit_preset(settings)
    check(settings)
    return absolute_paths(settings)


def with_given(settings: Settings, given: Iterable[str]) -> Settings:
    """Settings that know which of them were on the command line."""
    settings.given = frozenset(given)
    return settings


def saved_settings(run: str | Path) -> dict:
    """The settings of a run by name. Raises UserError where they are none of this version."""
    if Path(run).is_file():
        raise UserError(f"{run} is a file: an exported run holds no state of a training")
    return checked_settings(Settings, checkpoint.read_config(run)["settings"], f"{Path(run) / 'config.json'}: settings")


def settings_of_resumed(settings: Settings) -> Settings:
    """The settings of the run that --resume names, with those of FREE that are given. Raises UsageError where others are given."""
    saved = saved_settings(settings.resume)
    extra = sorted(settings.given - (FREE - {"output"}))
    if extra:
        raise UsageError(f"--resume keeps the settings of the run; remove --{extra[0].replace('_', '-')}")
    kept = {name: getattr(settings, name) for name in settings.given}
    return with_given(Settings(**(saved | {"json": None, "dry_run": False} | kept | {"output": settings.resume})), ())


def choose_run(settings: Settings) -> tuple[str, bool]:
    """(the run's directory, whether it is there and is gone on with). Raises UserError where it holds a run that is not to be gone on with."""
    run = Path(settings.output or f"runs/{settings.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    if run.exists() and not run.is_dir():
        raise UserError(f"--output {run} is a file, not a directory")
    if settings.resume == "auto" and settings.output is None:
        unfinished = newest_unfinished(settings)
        return str(unfinished or run), unfinished is not None
    is_there = (run / "config.json").is_file()
    if settings.resume == "auto" and is_there and (other := differing(settings, run)):
        raise UserError(f"{run} holds a run with another --{other.replace('_', '-')}: choose another --output")
    if settings.resume is None and is_there:
        raise UserError(f"{run} already holds a run: choose another --output, or go on with it by --resume {run}")
    if not is_there and checkpoint_store.present(run):
        raise UserError(f"{run} holds checkpoints and no config.json: choose another --output")
    return str(run), is_there


def is_complete(run: Path) -> bool:
    """Whether a directory holds a trained model at its top."""
    return (run / "bridge.safetensors").exists()


def newest_unfinished(settings: Settings, root: Path = Path("runs")) -> Path | None:
    """The newest run under root of these settings that is not at its end; what can not be gone on with is another run, and damaged ones are named."""
    configs = sorted(root.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run in (path.parent for path in configs):
        try:
            if differing(settings, run) is not None:
                continue
        except UserError:  # of another version
            continue
        try:
            saved = checkpoint_store.newest(run)
        except UserError as error:
            say(f"not gone on with: {error}")
            continue
        if not is_complete(run) if saved is None else saved.state.get("finished") is not True:
            return run
    return None


def differing(settings: Settings, run: Path) -> str | None:
    """A setting in which a run differs from these, but for those of FREE; None where it is the same training."""
    saved = saved_settings(run)
    return next((name for name, value in dataclasses.asdict(settings).items() if name not in FREE and saved.get(name, getattr(Settings, name)) != value), None)


def fit_preset(settings: Settings) -> None:
    """Take back what a preset sets for its own backbones and data alone, where others are given."""
    backbones = settings.given & {"vision", "text", "text_config", "base"}
    if "lora_where" not in settings.given and (settings.cache_features or settings.given & {"vision", "base"}):
        settings.lora_where = Settings.lora_where
    if "threads" not in settings.given and backbones:
        settings.threads = Settings.threads
    if "max_steps" not in settings.given and (backbones or settings.given & {"data", "limit", "epochs"}):
        settings.max_steps = Settings.max_steps


def absolute_paths(settings: Settings) -> Settings:
    """Local weights by their whole path, so that the run loads from any working directory."""
    if settings.text and Path(settings.text).is_dir():
        settings.text = str(Path(settings.text).resolve())
    name, _, source = (settings.vision or "").partition(":")
    if source and Path(source).exists():
        settings.vision = f"{name}:{Path(source).resolve()}"
    settings.data = absolute(settings.data)
    return settings


def build(settings: Settings, rows: list[Row], directory: Path, learns: bool = True) -> tuple[Captioner, Tokenizer, Backbone, dict]:
    """Model and tokenizer, the image encoder as a `Backbone` (for its transform), and the facts from which `checkpoint.load` rebuilds them.

    learns: whether this process is the one that learns the vocabulary, where one is to be learned.
    """
    trained = set(settings.train_base)
    if settings.base:
        facts = checkpoint.read_config(settings.base)["model"]
        model, tokenizer, transform = checkpoint.load(settings.base, merge=True, dequantize=True)
        if settings.views:
            transform = checkpoint.with_views(transform, settings.views)
            model.bridge = model.bridge.of_views(len(transform.views))
            facts["vision"]["transform"] = transform.to_dict()
        vision = checkpoint.vision_backbone(model, transform, facts)
        # Weights that the base run's LoRA was merged into exist nowhere else.
        facts["vision"]["embedded"] |= "vision" in trained | set(facts["lora"])
        facts["text"]["embedded"] |= bool({"text", "encoder", "decoder"} & (trained | set(facts["lora"])))
        if facts["lora"] and settings.base_bits:
            say(f"the LoRA of {settings.base} is merged in full precision and then rounded to 4 bits with the rest, which loses most of a small update")
        if facts["base_bits"]:
            # The values of 4-bit weights are not those of the file they came from.
            facts["vision"]["embedded"] = facts["text"]["embedded"] = True
        facts |= {"lora": [], "base_bits": None}
    else:
        vision = build_vision(settings.vision, settings.image_size)
        if settings.resize_mode:
            transform = dataclasses.replace(vision.transform, resize_mode=settings.resize_mode, resize_size=None)
            vision = dataclasses.replace(vision, transform=transform)
        if settings.views:
            vision = dataclasses.replace(vision, transform=checkpoint.with_views(vision.transform, settings.views))
        tokenizer_path = settings.tokenizer
        if settings.text_config and not tokenizer_path:
            tokenizer_path = directory / "spiece.model"
            if learns:
                train_tokenizer([caption for row in rows for caption in row.captions], tokenizer_path, settings.vocab_size)
        text = build_text(settings.text, settings.text_config, tokenizer_path)
        tokenizer = text.tokenizer
        model = Captioner(vision.module, text.module, len(vision.transform.views))
        facts = {
            "vision": checkpoint.describe(vision, embedded=vision.weights is None or "vision" in trained),
            "text": checkpoint.describe(text, embedded=text.weights is None or "text" in trained),
            **checkpoint.no_parts(),
        }
    if settings.base_bits:
        say(checkpoint.quantize(model, facts))
    checkpoint.stamp(model, facts, trained)
    return model, tokenizer, vision, facts


def add_parts(model: Captioner, tokenizer: Tokenizer, settings: Settings, facts: dict) -> None:
    """Put the new LoRA, adapters and soft prompt of the settings into the model, beside those that --base brought, and note them in facts."""
    brought = {*facts["adapters"], *(["prompt"] if facts["prompt"] else [])}
    unknown = sorted(set(settings.unfreeze) - brought)
    if unknown:
        raise UsageError(f"--unfreeze {unknown[0]}: --base brings {', '.join(sorted(brought)) or 'no adapters and no prompt'}")
    if settings.soft_prompt and facts["prompt"]:
        raise UsageError(f"{settings.base} has a soft prompt already: --unfreeze prompt trains it on")
    with checkpoint.translated(UsageError):
        if settings.lora_targets:
            facts["lora"] = sorted(settings.lora_where)
            lora.apply_lora(
                model, settings.lora_targets, settings.lora_where, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_init,
                rslora=settings.rslora,
            )  # fmt: skip
        if settings.adapters:
            lora.apply_adapters(
                model, settings.adapters, settings.adapter_where, settings.adapter_reduction, settings.adapter_style, settings.adapter_name
            )
            facts["adapters"] = [*facts["adapters"], settings.adapter_name]
        if settings.stack is not None:
            lora.set_stack(model, settings.stack)
        if settings.soft_prompt:
            length = int(settings.soft_prompt) if re.fullmatch(r"[+-]?\d+", settings.soft_prompt) else None
            ids = None if length is not None else tokenizer.encode([settings.soft_prompt])[0][:-1]
            if ids and tokenizer.unk_id in ids:
                say(f"soft prompt: {ids.count(tokenizer.unk_id)} of the {len(ids)} tokens of {settings.soft_prompt!r} are unknown to the vocabulary")
            lora.apply_soft_prompt(model, lora.initial_prompt(model.text.embedding, ids, length), settings.prompt_where)
            facts["prompt"] = sorted(settings.prompt_where)
    facts["stack"] = list(lora.get_stack(model))
    for name in sorted({*([settings.adapter_name] if settings.adapters else []), *settings.unfreeze} - {"prompt", *settings.freeze, *facts["stack"]}):
        raise UsageError(f"adapter {name} would be trained, and is not in --stack {','.join(facts['stack'])}")
    for name in sorted(brought & set(settings.freeze)):
        raise UsageError(f"--freeze {name}: what --base brings is frozen already")
    facts["frozen"] = sorted((brought - set(settings.unfreeze)) | set(settings.freeze))
    reads = {*(settings.lora_where if settings.lora_targets else ()), *(settings.adapter_where if settings.adapters else ())}
    if "encoder" in reads and "encoder" not in facts["prompt"]:
        raise UsageError("T5's encoder reads nothing here, so nothing in it would be trained: drop encoder, or give it a text by --soft-prompt TEXT --prompt-where encoder")


def choose_trainable(model: Captioner, settings: Settings, facts: dict) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name: the bridge, new parts, and the backbones of --train-base but for a T5 encoder that reads nothing."""
    text = ["text"] if "encoder" in facts["prompt"] else ["text.embedding", "text.decoder", "text.lm_head"]
    whole = ["bridge", *(name for part in settings.train_base for name in (text if part == "text" else [part]))]
    with checkpoint.translated(UsageError):
        trainable = lora.set_trainable(model, whole, facts["frozen"])
    behind = {f"vision.{name}" for name in model.vision.behind_tokens()} & trainable.keys() if isinstance(model.vision, TimmVision) else ()
    for name in behind:
        trainable.pop(name).requires_grad_(False)
    if behind:
        say(f"{len(behind)} parameters of the image encoder stand behind its tokens, where no gradient reaches them, and are not trained: {min(behind)}, …")
    if not trainable:
        raise UsageError("nothing is left to train: --freeze names every part")
    if settings.cache_features and any(name.startswith("vision.") for name in trainable):
        raise UsageError("--cache-features needs a frozen image encoder: what --unfreeze names has parts in it")
    return trainable


def choose_kernel(model: Captioner, settings: Settings, device: torch.device, precision: str) -> None:
    """Say how LoRA layers are computed, and why; raises UsageError where --lora-kernel can not be had."""
    lora.use_kernel(settings.lora_kernel)
    rows = settings.batch_size * settings.max_caption_tokens // 2
    with checkpoint.translated(UsageError):
        for line in lora.kernel_report(model, rows, device, torch.bfloat16 if precision == "bf16" else torch.float32):
            say(f"LoRA kernel: {line}")


def lay_out(model: Captioner) -> None:
    """Frozen weights side by side in memory where LoRA layers multiply by them together."""
    stacks = [stack for stack in (model.text.encoder, model.text.decoder) if stack is not None]
    lora.lay_out(group for stack in stacks for block in stack.blocks for group in input_groups(block))


def make(run: Path) -> bool:
    """Make the directory of a run; whether it was not there before."""
    try:
        run.mkdir(parents=True)
        return True
    except FileExistsError:
        return False


@contextlib.contextmanager
def gone_unless_begun(run: Path, is_new: bool, stays: bool):
    """After an error in the block, or where it does not stay, a new directory is gone again."""
    done = False
    try:
        yield
        done = stays
    finally:
        if is_new and not done:
            shutil.rmtree(run, ignore_errors=True)


def settle(settings: Settings, device: torch.device, processes: Processes) -> None:
    """What holds for the whole process: seed, threads, kernels. Raises UsageError for what the device or the number of processes rules out."""
    if settings.cuda_graphs and (device.type != "cuda" or processes.count > 1):
        raise UsageError("--cuda-graphs needs one process" if processes.count > 1 else f"--cuda-graphs needs a CUDA device, not {device}")
    if settings.shard and processes.count == 1:
        raise UsageError("--shard needs several processes: torchrun --nproc-per-node K train.py …; --no-shard goes on in one")
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def micro_batches(settings: Settings, run: Path, goes_on: bool, processes: Processes) -> int:
    """Micro-batches of an optimiser step over all processes; a run that goes on, or is repeated, keeps its number.

    Raises UsageError where that can not be dealt to the processes evenly.
    """
    source = run if goes_on else settings.like if "grad_accumulation" not in settings.given else None
    total = checkpoint.read_config(source).get("micro_batches", settings.grad_accumulation) if source else settings.grad_accumulation * processes.count
    if total % processes.count:
        raise UsageError(f"a step of {source} has {total} micro-batches, which can not be dealt to {processes.count} processes evenly")
    return total


def open_model(settings: Settings, rows: list[Row], run: Path, saved: checkpoint_store.Checkpoint | None, processes: Processes, device: torch.device, precision: str):
    """(model, tokenizer, image encoder, facts, trainable): built from the settings, or those of a checkpoint."""
    if saved is not None:
        facts = checkpoint.read_config(run)["model"]
        model, tokenizer, transform = checkpoint.load(run, checkpoint=saved.path.name)
        vision = checkpoint.vision_backbone(model, transform, facts)
    else:
        with processes.main_first():
            model, tokenizer, vision, facts = build(settings, rows, run, learns=processes.is_main)
        add_parts(model, tokenizer, settings, facts)
    trainable = choose_trainable(model, settings, facts)
    if processes.count > 1 and any(name.startswith("vision.") for name in trainable) and any("BatchNorm" in type(module).__name__ for module in model.vision.modules()):
        raise UsageError(f"{vision.name} has batch norms, whose statistics would differ between processes: keep it frozen, or train in one process")
    choose_kernel(model, settings, device, precision)
    if settings.dropout is not None:
        model.text.set_dropout(settings.dropout)
    say(lora.format_parameter_table(lora.parameter_table(model, trainable)))
    return model, tokenizer, vision, facts, trainable


def compare_records(settings: Settings, run: Path, goes_on: bool, record: dict, facts: dict) -> None:
    """Say in what a run that goes on or is repeated differs from what it was. Raises UserError where it has other data or weights than the one it repeats."""
    source = run if goes_on else settings.like
    if not source:
        return
    config = checkpoint.read_config(source)
    found = provenance.differences(config, record)
    repeats = settings.like and not goes_on
    if repeats and not settings.given & {"data", "train_split", "val_split", "limit", "eval_images"}:
        other = next((line for line in found if line.startswith("data") and "not recorded there" not in line), None)
        if other:
            raise UserError(f"{source} can not be repeated: {other}")
    if repeats and not settings.given & {"vision", "text", "text_config", "base"}:
        for part in ("vision", "text"):
            loaded = not (config["model"][part]["embedded"] or facts[part]["embedded"])
            if loaded and config["model"][part]["hash"] != facts[part]["hash"]:
                raise UserError(f"{source} can not be repeated: the weights of {part} {facts[part]['name']} are others than its own")
    for line in found:
        say(f"unlike {source}: {line}")


def place_weights(model: Captioner, trainable: dict, facts: dict, settings: Settings, device: torch.device, precision: str, from_store: bool) -> None:
    """Move the model to the device and keep its frozen weights as training reads them fastest. With --shard it stays where it is until it is shared out."""
    if not settings.shard:
        model.to(device)
    if precision == "bf16" and not settings.shard and not from_store and not any(name.startswith("vision.") for name in trainable):
        prepare_frozen(model.vision, torch.bfloat16)
    for part in ("vision", "text") if precision == "bf16" else ():
        # Weights that travel with the run are saved from here, so they are never rounded.
        if not facts[part]["embedded"]:
            cast_frozen(model.get_submodule(part), torch.bfloat16, keep=lora.adapter_parameters(model).values())
    if "text" not in settings.train_base and not settings.shard:
        lay_out(model)
    if settings.gradient_checkpointing:
        say(f"{recompute_blocks(model)} Transformer blocks are computed again in the backward pass")


def trainer_kind(settings: Settings) -> type[Trainer]:
    """The class of the trainer."""
    if not settings.shard:
        return Trainer
    from captioner.sharding import ShardedTrainer  # brings along half of torch.distributed

    return ShardedTrainer


def check_before_step_1(trainer: Trainer, schedule: TrainingSchedule) -> None:
    """The longest batch forward and backward with its memory, every gradient, and a checkpoint written and read. Raises UserError that names what is wrong."""
    settings, begun = trainer.settings, time.perf_counter()
    rows = preflight.longest_rows(schedule.lengths, settings.captions_per_image, settings.batch_size)
    loader = make_loader(
        schedule.dataset, schedule.encode, settings.batch_size, rows, 0, "all", max_caption_tokens=settings.max_caption_tokens, ledger=schedule.ledger,
        widths=schedule.edges if schedule.same_widths else (),
    )  # fmt: skip
    batch = preflight.worst_batch(loader, settings.captions_per_image, min(settings.batch_size, len(rows)))
    tokens = batch["labels"].shape[-1]
    what = f"{len(batch['ids'])} images x {batch['labels'].shape[1]} captions x {tokens} tokens"
    indifferent = preflight.one_key_parameters(trainer.model, trainer.trainable, tokens)

    def try_step() -> None:
        moments = preflight.moments_like(trainer.trainable)  # held meanwhile, as the optimiser will hold them
        preflight.check_gradients(trainer.model, trainer.trainable, functools.partial(trainer.try_batch, batch), indifferent)
        del moments

    cost = preflight.measured(
        try_step, trainer.device, what, preflight.smaller_batches(settings.batch_size, settings.grad_accumulation, settings.gradient_checkpointing),
    )  # fmt: skip
    trainer.try_saving()
    trainer.processes.wait()
    say(f"checked in {time.perf_counter() - begun:.1f} s: {preflight.describe_cost(what, cost)}; checkpoint, {preflight.in_units(trainer.checkpoint_bytes)}")


def main(argv: list[str] | None = None) -> int:
    settings = resolve(argv)
    with started(settings.device) as job:
        with job.processes.main_first():
            chosen = choose_run(settings) if job.processes.is_main else None
        run, goes_on = job.processes.share(chosen)
        try:
            with job.processes.together() if job.processes.count > 1 else contextlib.nullcontext():
                return train(settings, Path(run), goes_on, job, sys.argv[1:] if argv is None else argv)
        except Stopped as stopped:
            is_saved = bool(checkpoint_store.present(Path(run)))
            go_on = f"go on with: {job.command('train.py', ['--resume', run])}"
            say(f"stopped; {go_on}" if is_saved else "stopped before the first checkpoint; begin again by the same command")
            return 128 + stopped.number


def read_captioned(settings: Settings, split: str) -> list[Row]:
    """The rows of a split, up to the limit. Raises DataError for one without a caption, such as a question with its answer."""
    rows = read(settings.data, split, settings.format)[: settings.limit]
    lacking = next((row for row in rows if not row.captions), None)
    if lacking is not None:
        raise DataError(f"row {lacking.id!r} of {settings.data}, split {split!r}, has no caption: it is a question with its answer")
    return rows


def train(settings: Settings, run: Path, goes_on: bool, job: Job, argv: list[str]) -> int:
    """A whole training, from the data to the summary; returns the exit code."""
    begun, processes, device = time.perf_counter(), job.processes, job.device
    settle(settings, device, processes)
    precision = choose_precision(settings.precision, device)
    train_rows, val_rows = (read_captioned(settings, split) for split in (settings.train_split, settings.val_split))
    val_rows = val_rows[: settings.eval_images]
    ledger = BadImageLedger(settings.on_bad, say, settings.max_bad, len(train_rows) + len(val_rows))
    per_step = micro_batches(settings, run, goes_on, processes)

    with contextlib.ExitStack() as stack, contextlib.ExitStack() as beginning:
        if processes.is_main:
            is_new = make(run)
            stack.enter_context(locked(run / ".lock"))
            if not settings.dry_run:
                stack.enter_context(job.bad_images_in(run, ledger))
            beginning.enter_context(gone_unless_begun(run, is_new, stays=not settings.dry_run))
        processes.wait()
        saved = checkpoint_store.newest(run, say) if goes_on else None
        if goes_on and saved is None and is_complete(run):
            raise UserError(f"{run} has no checkpoint to go on from: it was exported, or trained by an older version")
        if saved is not None:
            ledger.remember(TrainState.of(saved).bad_images)
        model, tokenizer, vision, facts, trainable = open_model(settings, train_rows, run, saved, processes, device, precision)
        record = provenance.describe(argv, {settings.val_split: val_rows, settings.train_split: train_rows}) | {"processes": processes.count, "micro_batches": per_step}
        compare_records(settings, run, goes_on, record, facts)
        job.check()
        store = None
        if settings.cache_features:
            stack_of_vision, rows = checkpoint.vision_stack(model), train_rows + val_rows
            store = prepared_store(Path(settings.cache_features), vision, precision, stack_of_vision, rows, ledger, device, settings.workers, job)
        place_weights(model, trainable, facts, settings, device, precision, from_store=store is not None)
        if store is not None and settings.features_on_device and DeviceFeatures.fit(store, train_rows + val_rows, device):
            store = DeviceFeatures(store, train_rows + val_rows, device)
            say(f"features of {len(store.tokens)} images kept in the memory of {device} ({store.tokens.nbytes / 2**30:.1f} GiB)")
        share = (processes.rank, processes.count)
        schedule = TrainingSchedule(
            CaptionDataset(train_rows, vision.transform, store), tokenizer.encode, settings.batch_size, per_step, settings.captions_per_image, settings.seed,
            settings.max_caption_tokens, settings.length_buckets, settings.cuda_graphs, settings.workers, ledger, share,
        )  # fmt: skip
        val_data = CaptionDataset(val_rows, vision.transform, store)
        tracker = open_tracker(settings.report_to if processes.is_main and not settings.dry_run else "none", run, dataclasses.asdict(settings))
        trainer = trainer_kind(settings)(
            settings, run, model, tokenizer, trainable, facts, device, precision, tracker, val_rows, functools.partial(lora.seed_dropout, model), processes,
            ledger, per_step,
        )  # fmt: skip
        if saved is not None:
            trainer.restore(saved)
        else:
            check_before_step_1(trainer, schedule)
        job.check()
        if settings.dry_run:
            say("everything that is checked before the first step is in order")
            return cli.DONE
        if saved is None and processes.is_main:
            for name in ("metrics.jsonl", "timing.jsonl"):  # of a beginning that left no checkpoint
                (run / name).unlink(missing_ok=True)
            checkpoint.write_config(run, dataclasses.asdict(settings), facts, record)
        beginning.close()

        total = settings.max_steps or settings.epochs * schedule.turns_per_epoch
        say(f"{run}: {len(train_rows)} images, {total} steps of {settings.batch_size * per_step} images, {device}, {precision}")

        def val_batches() -> Iterable[dict | None]:
            loader = make_loader(val_data, tokenizer.encode, settings.batch_size, range(len(val_rows)), settings.workers, "all", ledger=ledger, share=share)
            return job.turns(loader, "evaluation")

        memory = PeakMemory(device)
        with job.one_ledger(ledger, train_rows + val_rows):
            seconds = run_steps(trainer, schedule, val_batches, total, job)

    spent = time.perf_counter() - begun
    say(f"done in {tqdm.format_interval(spent)}: {run} (best step {trainer.state.best_step})")
    summary = {
        "run": str(run), "steps": trainer.state.step, "best_step": trainer.state.best_step, "val": trainer.state.scores, "seconds": spent,
        "bad_images": ledger.to_list(), "trainable": sum(parameter.numel() for parameter in trainer.trainable.values()),
        "step_seconds": statistics.median(seconds) if seconds else None, "peak_memory_bytes": memory.bytes(),
    }  # fmt: skip
    if processes.is_main:
        write_json(settings.json, summary)
    if ledger:
        say(ledger.summary())
    return cli.SOME_BAD if ledger else cli.DONE


def run_steps(trainer: Trainer, schedule: TrainingSchedule, val_batches: Callable[[], Iterable[dict | None]], total: int, job: Job) -> list[float]:
    """The training loop, from where the trainer's state is to step `total`, with its evaluations; the seconds of each step.

    val_batches: this process's batches of an evaluation, None in turns without one. Raises Stopped after a signal, once a resume can go on from there, and
    UserError where captions collapse and --stop-on-collapse is given.
    """
    settings, state, processes = trainer.settings, trainer.state, trainer.processes
    eval_every = settings.eval_every or schedule.turns_per_epoch
    seconds, unreadable = [], 0

    def evaluate_if_due() -> None:
        if state.step == state.evaluated or (state.step % eval_every and state.step < total):
            return
        found = trainer.evaluate_and_save(val_batches(), total)
        if found and found.since_best and settings.stop_on_collapse:
            trainer.roll_back()
            raise UserError(f"stopped at step {state.step}, {trainer.run} is back at step {state.best_step}, its best")

    if state.step > total:
        raise UserError(f"{trainer.run} is at step {state.step} of a training that has {total} with the present data")
    evaluate_if_due()
    if state.step == total:
        return seconds
    bar = tqdm(total=total, initial=state.step, disable=None if processes.is_main else True, unit="step", dynamic_ncols=True)
    with bar:
        window_start, window_images, window_steps = time.perf_counter(), 0, 0
        for batches in schedule.turns(state.turns):
            images, asked = processes.sum([sum(len(batch["ids"]) for batch in batches), job.stop.number is not None])
            if asked:
                trainer.save()
                job.check()
            state.turns += 1
            unreadable = 0 if images else unreadable + 1
            if unreadable == schedule.turns_per_epoch:
                raise UserError("no image of the training split can be read")
            if not images:
                continue
            lr = get_lr(state.step, total, settings)
            step_start = time.perf_counter()
            loss, norm = trainer.train_step(batches, lr)
            seconds.append(time.perf_counter() - step_start)
            state.losses.append(loss)
            window_images, window_steps, step = window_images + images, window_steps + 1, state.step
            bar.update()
            if step % settings.log_every == 0 or step == total:
                mean, speed = sum(state.losses) / len(state.losses), window_images / (time.perf_counter() - window_start)
                state.losses.clear()
                trainer.log("train", {"loss": mean, "lr": lr, "grad_norm": norm}, epoch=state.turns / schedule.turns_per_epoch)
                trainer.log_times({"images_per_s": speed})
                bar.set_postfix_str(f"loss {mean:.3f}, {speed:.0f} images/s")
                if bar.disable and (step % (10 * settings.log_every) == 0 or step == total):
                    left = (total - step) * (time.perf_counter() - window_start) / window_steps
                    say(f"step {step}/{total}: loss {mean:.4f}, {speed:.1f} images/s, {tqdm.format_interval(left)} left")
                window_start, window_images, window_steps = time.perf_counter(), 0, 0
            if settings.save_every and step % settings.save_every == 0:
                trainer.save()
            evaluate_if_due()
            if step == state.evaluated:
                window_start = time.perf_counter()
            if step == total:
                return seconds


if __name__ == "__main__":
    cli.run_command(main, expected=(DataError, BadImage))
