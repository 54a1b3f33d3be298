"""Captioning with a trained run: the settings, the opened run and the decoding that evaluate.py, best_of_n.py and scripts/caption.py share.

torch is imported when a run is opened, so that a command's flags, help and errors come at once.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import cli
from captioner.cli import setting
from captioner.errors import UserError
from captioner.files import describe_os_error, locked
from captioner.job import Job
from captioner.journal import Journal
from data.bad_images import check_limit
from data.readers import BY_NAME, absolute

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from captioner.model import Captioner
    from captioner.tokenizer import Tokenizer
    from data.bad_images import BadImageLedger
    from data.dataset import Batches, CaptionDataset
    from data.rows import Row

REPORT_IMAGES = 1000  # a report shows the first ones of a larger split


@dataclass
class ModelSettings:
    """What every command that captions pictures with a run can be told; each field is one flag."""

    run: str | None = setting(None, "run directory, or a bundle of scripts/export.py (default: the newest under runs/)")
    checkpoint: str | None = setting(None, "use checkpoints/best or checkpoints/last", ("best", "last"))
    stack: tuple[str, ...] | None = setting(None, "bottleneck adapters that are on, the lowest first, or none; those of the run if not given")
    num_beams: int = setting(10, "beams of beam search")
    length_penalty: float = setting(1.0, "beam score is the sum of log-probabilities / length ** penalty")
    temperature: float = setting(0.5, "of sampling")
    top_k: int = setting(50, "sample among the k likeliest tokens; 0 for all")
    top_p: float = setting(0.9, "sample among the likeliest tokens that together reach p")
    seed: int = setting(0, "of sampling")
    batch_size: int = setting(16, "images decoded together")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = setting("fp32", "arithmetic of the image encoder and the bridge", ("auto", "fp32", "bf16"))
    decode_precision: str = setting("fp32", "of the weights that a step of decoding reads: as loaded, bf16, or int8 on a CPU; auto: the fastest of them on this machine", ("auto", "fp32", "bf16", "int8"))


@dataclass
class RunSettings(ModelSettings):
    """What every command that captions a split with a run can be told; each field is one flag."""

    split: str = setting("val", "split to caption")
    data: str | None = setting(None, "folder, file or shards (README: formats), or scenes; that of the run if not given")
    format: str | None = setting(None, "format of --data, if not told by its content", tuple(BY_NAME))
    scorer: str | None = setting(None, "CLIP for CLIPScore, NAME[:WEIGHTS]; for drawn scenes ViT-Tiny-Scenes:scorer if not given")
    tokenize: str = setting("ptb", "words: Penn Treebank tokens without punctuation, or split at spaces", ("ptb", "none"))
    limit: int | None = setting(None, "only the first N images (or lines)")
    workers: int = setting(0, "processes that decode image files")
    cache_features: str | None = setting(None, "folder that keeps the frozen encoder's features, computed once")
    on_bad: str = setting("skip", "bad image: leave out, name and count it, or stop", ("skip", "fail"))
    max_bad: str | None = setting(None, "stop where more images than this are bad, a number or a share such as 1%", parse=cli.checked(check_limit))
    report: bool = setting(True, "write report.html with the results")
    output: str | None = setting(None, "directory for the results (under RUN/results/ if not given)")
    json: str | None = setting(None, "write the scores to this file, or - for stdout")

    positional = ("run",)


@dataclass
class OpenModel:
    """A trained run's model with its adapters merged, ready to caption pictures."""

    path: Path
    config: dict
    model: "Captioner"
    tokenizer: "Tokenizer"
    transform: Any  # data.transforms.ImageTransform
    device: "torch.device"
    precision: str
    stack: list[str]  # bottleneck adapters that are on, the lowest first
    decode_precision: str  # of the weights that a step of decoding reads: fp32 (as loaded), bf16 or int8
    job: Job

    @property
    def precisions(self) -> str:
        """Both precisions for people."""
        return self.precision if self.decode_precision == "fp32" else f"{self.precision}, decoding in {self.decode_precision}"

    def encode(self, batch: dict) -> "Tensor":
        """Memory (B, N, D) of a batch."""
        import torch

        from captioner.runtime import encode_images

        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return encode_images(self.model, batch, self.device)

    def prepare(self, precision: str, step_rows: int | None) -> None:
        """Arrange the decoder's weights, see `captioner.generate.prepare_for_decoding`; what cannot be had is said."""
        from captioner import generate

        weights = generate.prepare_for_decoding(self.model, step_rows if precision != "fp32" else None, precision)
        if weights.left_out:
            left_out = f"{weights.left_out} of {weights.count} layers stay as they are (unmerged LoRA, a 4-bit base)"
            cli.say(f"--decode-precision {weights.precision}: {left_out}")
        self.decode_precision = weights.precision


@dataclass
class OpenRun(OpenModel):
    """A trained run with the rows of a split to caption."""

    rows: "Sequence[Row]"
    dataset: "CaptionDataset"
    ledger: "BadImageLedger"

    def results(self, name: str) -> Path:
        """Folder for results of this name, and of another stack than the run's own: inside a run directory, beside a bundle."""
        folder = self.path / "results" if self.path.is_dir() else self.path.with_name(f"{self.path.stem}-results")
        return folder / (name if self.stack == self.config["model"]["stack"] else f"{name}-stack-{'+'.join(self.stack) or 'none'}")

    def batches(self, batch_size: int, workers: int = 0, order: Sequence[int] | None = None, share: tuple[int, int] = (0, 1)) -> "Batches":
        """Batches (see data/collate.py) with all captions of an image, of the rows with these numbers, or of all; share as in `make_loader`."""
        from data.dataset import make_loader

        order = range(len(self.rows)) if order is None else order
        return make_loader(self.dataset, None, batch_size, order, workers, "all", share=share, ledger=self.ledger)


def load_model(settings: ModelSettings, job: Job, path: Path, config: dict) -> OpenModel:
    """The model of a run with this config, on the job's device, its frozen weights still in fp32 and the decoder's not arranged; raises UserError."""
    from captioner import checkpoint
    from captioner.runtime import choose_device, choose_precision

    device = job.device or choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    # In a 4-bit base there is no room for the update.
    model, tokenizer, transform = checkpoint.load(path, checkpoint=settings.checkpoint, merge=not config["model"]["base_bits"], stack=settings.stack)
    model.to(device)
    stack = config["model"]["stack"] if settings.stack is None else list(settings.stack)
    return OpenModel(path, config, model, tokenizer, transform, device, precision, stack, "fp32", job)


def open_model(settings: ModelSettings, group: int | None = None, job: Job | None = None) -> OpenModel:
    """The run that the settings name, without data; otherwise as `open_run`."""
    import torch

    from captioner import checkpoint
    from captioner.frozen_vit import prepare_frozen

    path = Path(settings.run) if settings.run else checkpoint.newest_run()
    opened = load_model(settings, job or Job(), path, checkpoint.read_config(path))
    if opened.precision == "bf16":
        prepare_frozen(opened.model.vision, torch.bfloat16)
    opened.prepare(settings.decode_precision, group and group * settings.batch_size)
    return opened


def open_run(settings: RunSettings, group: int | None = None, job: Job | None = None) -> OpenRun:
    """The run and split that the settings name, on the job's device; `group` captions of an image will be decoded at once at most, where that is known.

    Raises UserError, or the data's one-line errors, for what is not there; Stopped where a signal came while features were computed.
    """
    import torch

    from captioner import checkpoint
    from captioner.features import prepared_store
    from captioner.frozen_vit import prepare_frozen
    from data.bad_images import BadImageLedger
    from data.dataset import CaptionDataset
    from data.readers import read

    job = job or Job()
    path = Path(settings.run) if settings.run else checkpoint.newest_run()
    config = checkpoint.read_config(path)
    format = settings.format if settings.data else settings.format or config["settings"].get("format")
    rows = read(settings.data or config["settings"]["data"], settings.split, format)[: settings.limit]
    opened = load_model(settings, job, path, config)
    ledger = BadImageLedger(settings.on_bad, cli.say, settings.max_bad, len(rows))
    store = None
    if settings.cache_features:
        backbone = checkpoint.vision_backbone(opened.model, opened.transform, config["model"])
        stack = checkpoint.vision_stack(opened.model)
        store = prepared_store(Path(settings.cache_features), backbone, opened.precision, stack, rows, ledger, opened.device, settings.workers, job)
    elif opened.precision == "bf16":
        prepare_frozen(opened.model.vision, torch.bfloat16)
    opened.prepare(settings.decode_precision, group and group * min(settings.batch_size, len(rows)))
    dataset = CaptionDataset(rows, opened.transform, store)
    return OpenRun(**vars(opened), rows=rows, dataset=dataset, ledger=ledger)


def decode(model: "Captioner", memory: "Tensor", image_ids: Sequence[str], settings: ModelSettings, prefix_ids: Sequence[int] = ()) -> "Tensor":
    """One caption an image by the method of the settings, memory (B, N, D) → ids (B, T).

    The settings also have `decode` (greedy, beam or sample), `max_length`, `max_new_tokens` and `repetition_penalty`, each None for the method's own.
    """
    from captioner import generate

    length = {"max_length": settings.max_length, "max_new_tokens": settings.max_new_tokens}
    if settings.max_length is None and settings.max_new_tokens is None:
        length = {"max_new_tokens": 19 if settings.decode == "beam" else 20}
    shared = {"repetition_penalty": settings.repetition_penalty or (1.2 if settings.decode == "sample" else 1.0), "prefix_ids": prefix_ids, **length}
    if settings.decode == "greedy":
        return generate.greedy(model, memory, **shared)
    if settings.decode == "beam":
        return generate.beam_search(model, memory, num_beams=settings.num_beams, length_penalty=settings.length_penalty, **shared)
    return generate.sample(
        model, memory, n=1, top_p=settings.top_p, temperature=settings.temperature, top_k=settings.top_k, seed=settings.seed, image_ids=image_ids, **shared
    )[:, 0]  # fmt: skip


def attend(run: OpenRun, batch: dict, tokens: Sequence[Sequence[int]]) -> "list[tuple[list[str], np.ndarray | None]]":
    """(words, maps of where the decoder looks while it writes them) of a finished caption, without its start token, for each image of a batch."""
    import torch

    from captioner.word_attention import word_attention

    start = run.model.text.config.decoder_start_token_id
    ids = [torch.tensor([start, *own]) for own in tokens]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=run.tokenizer.pad_id).to(run.device)  # (B, T)
    return word_attention(run.model, run.encode(batch), ids, run.tokenizer, run.transform.views)


def attention_of(run: OpenRun, settings: RunSettings, tokens: dict[str, Sequence[int]]) -> "dict[str, tuple[list[str], np.ndarray | None]]":
    """`attend` for the images whose captions' tokens are given by image id; work of the main process alone. Raises Stopped where a signal came.

    An image that can no longer be read has none; it is named, and counts as captioned.
    """
    from data.bad_images import BadImageLedger

    gone = BadImageLedger(warn=lambda line: cli.say(f"report without a picture: {line.partition('): ')[2]}"))
    order = [number for number, row in enumerate(run.rows) if row.id in tokens]
    attention = {}
    for batch in run.job.progress(replace(run, ledger=gone).batches(settings.batch_size, settings.workers, order), "attention of words"):
        attention.update(zip(batch["ids"], attend(run, batch, [tokens[image_id] for image_id in batch["ids"]]), strict=True))
    return attention


@contextlib.contextmanager
def open_journal(
    run: OpenRun, settings: RunSettings, names: Iterable[str], path: Path, fields: Mapping[str, Callable[[Any], bool]]
) -> Iterator[Journal | None]:
    """The main process's journal of finished captions, None in the others; names: the settings that decide a caption; fields: see `Journal`.

    The size of the batches and the number of images decide none. An image that was replaced since is taken for unfinished; one that is gone keeps its
    caption. Until the end of the body the folder is this process's alone. Raises UserError where another process has it, where it cannot be written, or
    where the file was made with other settings or weights.
    """
    from captioner.provenance import stamp_image

    journal = None
    with contextlib.ExitStack() as stack:
        with run.job.processes.main_first():
            if run.job.processes.is_main:
                stack.enter_context(results_folder(path.parent))
                data = settings.data or run.config["settings"]["data"]
                facts = {
                    **{name: getattr(settings, name) for name in names}, "data": absolute(data),
                    "precision": run.precision, "decode_precision": run.decode_precision,
                    "weights": weights_hash(run, settings.checkpoint), "stack": run.stack,
                }  # fmt: skip
                journal = Journal(path, facts, fields)
                stamps = {row.id: stamp_image(row.image) for row in run.rows if row.id in journal.lines}
                journal.forget(image_id for image_id, stamp in stamps.items() if stamp not in (None, journal.lines[image_id].get("stamp")))
        yield journal


@contextlib.contextmanager
def results_folder(folder: Path) -> Iterator[None]:
    """A folder for results, made where it is missing, that no other process uses in the body. Raises UserError."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock"))
        except OSError as error:
            error.filename = None
            reason = "it is no folder" if folder.exists() and not folder.is_dir() else describe_os_error(error)
            raise UserError(f"no results can be written to {folder}: {reason}; choose another --output") from None
        yield


def finish(run: OpenRun, settings: RunSettings, journal: Journal | None, description: str, decode: Callable[[dict], list[dict]]) -> "list[Row]":
    """Add to the journal the line of `decode(batch)`, with the image's stamp, for every readable image that it lacks; the rows that it then holds.

    Whole batches are decoded, those of an undisturbed run, since the last bits of a product may depend on what else is in it. They are dealt to the
    processes; lines are added in the order of the rows. Raises Stopped where a signal came, UserError where no image can be read.
    """
    from captioner.provenance import stamp_image

    processes, size = run.job.processes, settings.batch_size
    starts = range(0, len(run.rows), size)
    lacking = [start for start in starts if journal and any(row.id not in journal.lines for row in run.rows[start : start + size])]
    order = [index for start in processes.share(lacking) for index in range(start, min(start + size, len(run.rows)))]
    # Before the pictures are read: one that is replaced meanwhile will differ.
    stamps = {run.rows[index].id: stamp_image(run.rows[index].image) for index in order} if journal else {}
    batches = run.batches(size, settings.workers, order, (processes.rank, processes.count))
    with run.job.one_ledger(run.ledger, run.rows):
        for batch in run.job.turns(batches, description):
            parts = processes.gather([] if batch is None else decode(batch))
            if journal:
                new = [line for part in parts for line in part if line["image_id"] not in journal.lines]
                journal.add(line | {"stamp": stamps[line["image_id"]]} for line in new)
    finished = set(processes.share(list(journal.lines) if journal else None))
    rows = [row for row in run.rows if row.id in finished]
    if not rows:
        raise UserError(f"no image of the split {settings.split} can be read")
    for row in rows:
        run.ledger.rows.pop(row.image.name, None)  # gone since it was captioned: its caption stays
    return rows


def exit_code(run: OpenRun) -> int:
    """Of a command that finished, once what bad images any process met is said."""
    if run.ledger:
        cli.say(run.ledger.summary())
    return cli.SOME_BAD if run.job.processes.any(len(run.ledger) > 0) else cli.DONE


def weights_hash(run: OpenModel, checkpoint: str | None) -> str:
    """SHA-256 over everything that decides what a run's model computes: its own weight files, and the facts about weights kept elsewhere."""
    from captioner.checkpoint import PUBLISHED, directory_of
    from captioner.checkpoint_store import files_of

    directory = directory_of(run.path, checkpoint) if run.path.is_dir() else run.path
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


def say_stopped(script: str, argv: Sequence[str] | None, settings: RunSettings, job: Job, run: OpenRun | None, journal: Journal | None) -> None:
    """What is finished and the command that goes on, for people; run and journal are None where they were not opened yet."""
    words = sys.argv[1:] if argv is None else list(argv)
    if run is not None and not settings.run:
        words = [str(run.path), *words]  # the newest run may be another one by then
    finished = f" with {sum(row.id in journal.lines for row in run.rows)} of {len(run.rows)} images finished" if journal else ""
    cli.say(f"stopped{finished}; go on with: {job.command(script, words)}")
