"""Train a captioner: settings → data → backbones → adapters → optimiser → loop → run directory.

    python train.py --lora-targets attn,ffn                          the embedded demo: drawn scenes, tiny backbones, minutes on two CPU cores
    python train.py --preset base --data DATA                        CLIP ViT-B/16 and Flan-T5-base, frozen; bridge and LoRA trained
    python train.py --base runs/NAME --data DATA                     adapt a trained run, frozen, to other pictures or another style
    python train.py --lora-targets none --adapters attn,ffn          bottleneck adapters instead of LoRA; --soft-prompt, --base-bits 4: see the README
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import re
import shutil
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from captioner import cli  # first: it sets how OpenMP threads wait
from captioner.cli import progress, say, setting

import torch  # noqa: I001
from tqdm import tqdm

import lora
from captioner import checkpoint
from captioner.backbones import Backbone, build_text, build_vision
from captioner.errors import UsageError, UserError
from captioner.features import DeviceFeatures, FeatureStore
from captioner.files import write_json
from captioner.frozen_vit import prepare_frozen
from captioner.model import Captioner
from captioner.runtime import PeakMemory, cast_frozen, choose_device, choose_precision, recompute_blocks, versions
from captioner.t5 import input_groups
from captioner.tokenizer import Tokenizer, train_tokenizer
from captioner.tracking import TRACKERS, open_tracker
from captioner.trainer import Trainer
from data.buckets import CaptionLengths, bucket_edges, bucketed_order
from data.dataset import BadImageLedger, CaptionDataset, epoch_order, make_loader
from data.images import BadImage
from data.readers import BUILT_IN, read
from data.rows import DataError, Row
from data.transforms import RESIZE_MODES


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
    data: str = setting("scenes", "folder with SPLIT/metadata.jsonl, or scenes (drawn)")
    train_split: str = setting("train", "split to train on")
    val_split: str = setting("val", "split to evaluate on")
    limit: int | None = setting(None, "use only the first N images of each split")
    captions_per_image: str = setting("1", "captions of an image in a step: one picked by (seed, epoch, id), or all with the image encoded once", ("1", "all"))
    max_caption_tokens: int = setting(40, "longer captions are cut, keeping the end token")
    length_buckets: bool = setting(True, "batches of captions of about the same length; --no-length-buckets: random ones, with more padding")
    on_bad: str = setting("skip", "bad image: leave out, name and count it, or stop", ("skip", "fail"))
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
    resume: str | None = setting(None, "go on with this interrupted run, with its own settings")
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
        "threads", "adapter_reduction",
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
    """Settings from the command line: preset, then flags; a resumed run brings its own."""
    settings = cli.parse_settings(Settings, argv, __doc__, PRESETS)
    if settings.resume:
        if Path(settings.resume).is_file():
            raise UserError(f"{settings.resume} is a file: an exported run holds no state of a training to go on with")
        saved = checkpoint.read_config(settings.resume)["settings"]
        extra = sorted(settings.given - {"resume", "device", "workers", "threads", "json", "preset", "lora_kernel"})
        if extra:
            raise UsageError(f"--resume keeps the settings of the run; remove --{extra[0].replace('_', '-')}")
        restored = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        kept = {name: getattr(settings, name) for name in settings.given - {"preset"}}
        settings = Settings(**(restored | {"json": None} | kept | {"output": settings.resume}))
        settings.given = frozenset()
    elif settings.base:
        extra = sorted(settings.given & {"vision", "text", "text_config", "tokenizer", "image_size", "resize_mode"})
        if extra:
            raise UsageError(f"--base brings both backbones and the size of its images; remove --{extra[0].replace('_', '-')}")
        settings.vision = settings.text = settings.text_config = None
    elif "text" in settings.given and "text_config" in settings.given:
        raise UsageError("--text and --text-config exclude each other: trained weights or random ones")
    elif "text" in settings.given:
        settings.text_config = None
    elif "text_config" in settings.given:
        settings.text = None
    if not settings.resume:
        fit_preset(settings)
    check(settings)
    return absolute_paths(settings)


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
    if settings.data not in BUILT_IN and Path(settings.data).is_dir():
        settings.data = str(Path(settings.data).resolve())
    return settings


def build(settings: Settings, rows: list[Row], directory: Path) -> tuple[Captioner, Tokenizer, Backbone, dict]:
    """Model and tokenizer, the image encoder as a `Backbone` (for its transform), and the facts from which `checkpoint.load` rebuilds them."""
    trained = set(settings.train_base)
    if settings.base:
        facts = checkpoint.read_config(settings.base)["model"]
        model, tokenizer, transform = checkpoint.load(settings.base, merge=True, dequantize=True)
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
        tokenizer_path = settings.tokenizer
        if settings.text_config and not tokenizer_path:
            tokenizer_path = directory / "spiece.model"
            train_tokenizer([caption for row in rows for caption in row.captions], tokenizer_path, settings.vocab_size)
        text = build_text(settings.text, settings.text_config, tokenizer_path)
        tokenizer = text.tokenizer
        model = Captioner(vision.module, text.module)
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


@contextlib.contextmanager
def made(run: Path):
    """Make the directory of a run; after an error in the block it is gone again, if it was not there before."""
    is_new = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            shutil.rmtree(run, ignore_errors=True)
        raise


def run_directory(settings: Settings) -> Path:
    """The run's directory; raises UserError where it already holds a run."""
    run = Path(settings.output or f"runs/{settings.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    if settings.resume is None and (run / "config.json").exists():
        raise UserError(f"{run} already holds a run: choose another --output, or go on with it by --resume {run}")
    return run


def main(argv: list[str] | None = None) -> int:
    settings = resolve(argv)
    started = time.perf_counter()
    device = choose_device(settings.device)
    if settings.cuda_graphs and device.type != "cuda":
        raise UsageError(f"--cuda-graphs needs a CUDA device, not {device}")
    precision = choose_precision(settings.precision, device)
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    train_rows = read(settings.data, settings.train_split)[: settings.limit]
    val_rows = read(settings.data, settings.val_split)[: settings.limit][: settings.eval_images]
    run = run_directory(settings)
    ledger = BadImageLedger(settings.on_bad, say)

    if settings.resume:
        facts = checkpoint.read_config(run)["model"]
        model, tokenizer, transform = checkpoint.load(run, checkpoint="last")
        vision = checkpoint.vision_backbone(model, transform, facts)
        trainable = choose_trainable(model, settings, facts)
        choose_kernel(model, settings, device, precision)
    else:
        with made(run):
            model, tokenizer, vision, facts = build(settings, train_rows, run)
            add_parts(model, tokenizer, settings, facts)
            trainable = choose_trainable(model, settings, facts)
            choose_kernel(model, settings, device, precision)
    if settings.dropout is not None:
        model.text.set_dropout(settings.dropout)
    say(lora.format_parameter_table(lora.parameter_table(model, trainable)))

    store = None
    if settings.cache_features:
        store = FeatureStore(Path(settings.cache_features), vision, precision, checkpoint.vision_stack(model))
        store.prepare(train_rows + val_rows, ledger, device, settings.workers, progress=progress)
    model.to(device)
    if precision == "bf16" and store is None and not any(name.startswith("vision.") for name in trainable):
        prepare_frozen(model.vision, torch.bfloat16)
    for part in ("vision", "text") if precision == "bf16" else ():
        # Weights that travel with the run are saved from here, so they are never rounded.
        if not facts[part]["embedded"]:
            cast_frozen(model.get_submodule(part), torch.bfloat16, keep=lora.adapter_parameters(model).values())
    if "text" not in settings.train_base:
        lay_out(model)
    if settings.gradient_checkpointing:
        say(f"{recompute_blocks(model)} Transformer blocks are computed again in the backward pass")

    if store is not None and settings.features_on_device and DeviceFeatures.fit(store, train_rows + val_rows, device):
        store = DeviceFeatures(store, train_rows + val_rows, device)
        say(f"features of {len(store.tokens)} images kept in the memory of {device} ({store.tokens.nbytes / 2**30:.1f} GiB)")

    tracker = open_tracker(settings.report_to, run, dataclasses.asdict(settings))
    trainer = Trainer(settings, run, model, tokenizer, trainable, facts, device, precision, tracker, val_rows, functools.partial(lora.seed_dropout, model))
    if settings.resume:
        trainer.restore()
    else:
        checkpoint.write_config(run, dataclasses.asdict(settings), facts, versions())
    steps_per_epoch = math.ceil(math.ceil(len(train_rows) / settings.batch_size) / settings.grad_accumulation)
    total = settings.max_steps or settings.epochs * steps_per_epoch
    eval_every = settings.eval_every or steps_per_epoch
    say(f"{run}: {len(train_rows)} images, {total} steps of {settings.batch_size * settings.grad_accumulation} images, {device}, {precision}")
    train_data = CaptionDataset(train_rows, vision.transform, store)
    val_data = CaptionDataset(val_rows, vision.transform, store)

    def val_batches() -> Iterable[dict]:
        return make_loader(val_data, tokenizer.encode, settings.batch_size, range(len(val_rows)), settings.workers, "all", ledger=ledger)

    edges = bucket_edges(settings.max_caption_tokens)
    lengths = CaptionLengths(train_rows, tokenizer.encode, settings.max_caption_tokens) if settings.length_buckets else None

    def train_order(epoch: int) -> list[int]:
        """The images of an epoch, those of a step having captions of about the same length."""
        order = epoch_order(len(train_rows), settings.seed, epoch)
        if lengths is None:
            return order
        tokens = lengths.of_epoch(settings.captions_per_image, settings.seed, epoch)
        return bucketed_order(order, tokens, edges, settings.batch_size * settings.grad_accumulation, settings.seed, epoch)

    def train_batches() -> Iterable[list[dict]]:
        """The micro-batches of each step from the current one on, epoch after epoch."""
        for epoch in itertools.count(trainer.state.step // steps_per_epoch):
            loader = make_loader(
                train_data, tokenizer.encode, settings.batch_size, train_order(epoch), settings.workers,
                settings.captions_per_image, seed=settings.seed, epoch=epoch, max_caption_tokens=settings.max_caption_tokens,
                start_batch=max(0, trainer.state.step - epoch * steps_per_epoch) * settings.grad_accumulation, ledger=ledger,
                widths=edges if settings.cuda_graphs else (),
            )  # fmt: skip
            empty = True
            for _, group in itertools.groupby(loader, key=lambda batch: batch["batch_index"] // settings.grad_accumulation):
                empty = False
                yield list(group)
            if empty and trainer.state.step % steps_per_epoch == 0:
                raise UserError("no image of the training split can be read")

    scores: dict = {}
    step_seconds: list[float] = []
    memory = PeakMemory(device)
    with cli.StopSignal() as stop, tqdm(total=total, initial=trainer.state.step, disable=None, unit="step", dynamic_ncols=True) as bar:
        window_start, window_images, window_loss = time.perf_counter(), 0, []
        if trainer.state.step == 0:
            scores = trainer.evaluate_and_save(val_batches())
        for batches in train_batches() if trainer.state.step < total else ():
            lr = get_lr(trainer.state.step, total, settings)
            step_start = time.perf_counter()
            loss, norm = trainer.train_step(batches, lr)
            step_seconds.append(time.perf_counter() - step_start)
            window_images, window_loss = window_images + sum(len(batch["ids"]) for batch in batches), [*window_loss, loss]
            step, last = trainer.state.step, trainer.state.step == total
            bar.update()
            if step % settings.log_every == 0 or last:
                speed = window_images / (time.perf_counter() - window_start)
                values = {"loss": sum(window_loss) / len(window_loss), "lr": lr, "grad_norm": norm, "images_per_s": speed}
                trainer.log("train", values, epoch=step / steps_per_epoch)
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.0f} images/s")
                if bar.disable and (step % (10 * settings.log_every) == 0 or last):
                    left = (total - step) * (time.perf_counter() - window_start) / len(window_loss)
                    say(f"step {step}/{total}: loss {values['loss']:.4f}, {speed:.1f} images/s, {tqdm.format_interval(left)} left")
                window_start, window_images, window_loss = time.perf_counter(), 0, []
            if step % eval_every == 0 or last:
                scores = trainer.evaluate_and_save(val_batches())
                window_start = time.perf_counter()
            if last or stop.number is not None:
                break
        if stop.number is not None:
            trainer.save(is_best=False)
            say(f"stopped after step {trainer.state.step}; go on with: python train.py --resume {run}")
            return stop.exit_code

    seconds = time.perf_counter() - started
    say(f"done in {tqdm.format_interval(seconds)}: {run} (best step {trainer.state.best_step})")
    summary = {
        "run": str(run), "steps": trainer.state.step, "best_step": trainer.state.best_step, "val": scores, "seconds": seconds, "bad_images": ledger.to_list(),
        "trainable": sum(parameter.numel() for parameter in trainable.values()),
        "step_seconds": statistics.median(step_seconds) if step_seconds else None, "peak_memory_bytes": memory.bytes(),
    }  # fmt: skip
    write_json(settings.json, summary)
    if ledger:
        say(ledger.summary())
        return cli.SOME_BAD
    return cli.DONE


if __name__ == "__main__":
    cli.run_command(main, expected=(DataError, BadImage))
