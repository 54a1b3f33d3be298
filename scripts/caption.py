"""Caption pictures with a trained run: files, folders with all that is below them, and globs.

    python scripts/caption.py photos                                        a.jpg gets a.txt beside it, with the newest run
    python scripts/caption.py photos --run runs/demo --existing overwrite --decode greedy --prefix "a photo of"
    python scripts/caption.py photos --format coco --output captions.json   one file: metadata.jsonl, coco or csv
    python scripts/caption.py photos --undo                                 put back what the last call changed
    python scripts/caption.py photos --watch                                go on as pictures arrive, until Ctrl-C

What is done is in a journal, by default .captions-journal.jsonl in the first PATH's folder: the same command goes on after an interrupt or a kill,
and does each picture once. Pictures that cannot be read are in bad_images.jsonl beside it. Nothing of a picture but its name is written anywhere.

Exit codes: 0 done, 1 error, 2 usage, 3 some pictures are bad or some files were left alone, 130 and 143 stopped by SIGINT and SIGTERM (--watch too).
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioner import cli, scoring, sidecars
from captioner.caption_files import FORMATS
from captioner.caption_journal import FILE_NAME, CaptionJournal, check_settings, stamp_of
from captioner.caption_targets import Caption, OneFile, Sidecars, Target, undo
from captioner.cli import repeated, say, setting
from captioner.decoding import ModelSettings, OpenModel, decode, open_model, weights_hash
from captioner.errors import UsageError, UserError
from captioner.files import write_json
from captioner.job import BAD_IMAGES, Job, started
from captioner.pictures import SUFFIXES, find_pictures, place_of, root_of, visible
from captioner.processes import place
from data.bad_images import BadImageLedger, BadRow

if TYPE_CHECKING:
    from torch import Tensor

    from data.transforms import ImageTransform

# Settings that decide what is written; anything else may change when an unfinished job goes on.
JOB_SETTINGS = (
    "decode", "best_of", "reranker", "prefix", "num_beams", "length_penalty", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty",
    "seed", "existing", "format", "ext", "sidecar_name",
)  # fmt: skip
POLL = 1.0  # seconds for which a picture's size and time must stay the same before --watch takes it
EXTENSION = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass
class Settings(ModelSettings):
    """Every setting of captioning; each field is one flag."""

    paths: tuple[str, ...] = repeated("pictures, folders and globs; several may be given")
    decode: str = setting("beam", "decoding method (default with --best-of: sample)", ("greedy", "beam", "sample"))
    max_new_tokens: int | None = setting(None, "longest caption in tokens, a prefix not counted (default: 19 for beam, else 20, as evaluate.py)")
    repetition_penalty: float | None = setting(None, "divides the scores of tokens already written (default: 1.2 for sample, else 1)")
    best_of: int | None = setting(None, "sample so many captions and keep the one that the reranker likes best")
    reranker: str | None = setting(None, f"CLIP that chooses with --best-of (default: {scoring.RERANKER})")
    prefix: str | None = setting(None, "the caption begins with this text: the decoder is made to write it, and goes on")
    format: str = setting("sidecars", "a text file beside each picture, or one file for all", ("sidecars", *FORMATS))
    output: str | None = setting(None, "the one file, for every other --format")
    existing: str = setting("skip", "a picture that has a caption: leave it, or put the new one in its place, after or before it", sidecars.EXISTING)
    ext: str = setting("txt", "extension of sidecars, such as txt or caption")
    sidecar_name: str = setting("stem", "sidecar of a.jpg: a.txt, or in full a.jpg.txt", sidecars.NAMES)
    journal: str | None = setting(None, f"journal of what was done (default: {FILE_NAME} in the folder of the first PATH)")
    undo: bool = setting(False, "put back all files as before the journal's last job; those that were changed since are named and left alone")
    watch: bool = setting(False, "go on captioning the folders as pictures arrive, until a signal")
    workers: int | None = setting(None, "processes that decode image files (default: 0 on a CPU, else one a core, 8 at most)")
    json: str | None = setting(None, "write the counts to this file, or - for stdout")

    positional = ("paths",)
    max_length = None  # is another way to say max_new_tokens


def check(settings: Settings) -> None:
    """Refuse settings that contradict each other; raises UsageError."""
    if not settings.paths:
        raise UsageError("name pictures, folders or globs: caption.py PATHS…")
    if settings.best_of is not None:
        if "decode" in settings.given and settings.decode != "sample":
            raise UsageError(f"--best-of chooses among samples, not with --decode {settings.decode}")
        settings.decode = "sample"
        settings.reranker = settings.reranker or scoring.RERANKER
    elif settings.reranker:
        raise UsageError("--reranker goes with --best-of")
    if "" in settings.paths:
        raise UsageError("one of the PATHS is empty; the folder where you are is .")
    if not settings.undo and (settings.format == "sidecars") == bool(settings.output):
        raise UsageError("--output FILE goes with --format metadata.jsonl, coco or csv, and each of these needs it")
    if settings.output and place_of(Path(settings.output)) == place_of(journal_path(settings)):
        raise UsageError("--output is the journal: name two files")
    if settings.format != "sidecars" and {"ext", "sidecar_name"} & settings.given:
        raise UsageError("--ext and --sidecar-name are of sidecars")
    settings.ext = settings.ext.removeprefix(".")
    if not EXTENSION.fullmatch(settings.ext) or f".{settings.ext.rpartition('.')[2].lower()}" in SUFFIXES:
        raise UsageError(f"--ext {settings.ext!r} is no extension for text files")
    if settings.watch and (settings.undo or not all(Path(word).is_dir() for word in settings.paths)):
        raise UsageError("--watch takes folders that are there, and no --undo")
    if settings.workers is not None and settings.workers < 0:
        raise UsageError("--workers must be at least 0")
    if settings.prefix is not None and not settings.prefix.split():
        raise UsageError("--prefix is empty")
    if place()[1] > 1:
        raise UsageError("caption.py is one process: start it without torchrun, on other folders for other GPUs")
    cli.require_positive(settings, "batch_size", "num_beams", "max_new_tokens", "best_of")


class Captioning:
    """One call: the opened run, what is done and what went wrong."""

    def __init__(self, settings: Settings, target: Target):
        self.settings, self.target = settings, target
        self.captioned = self.skipped = self.before = 0
        self.seconds = 0.0
        self.opened: OpenModel | None = None
        self.ledger = BadImageLedger("skip", tell)
        self.reranker = None
        self.prefix_ids: list[int] = []

    def open(self, job: Job) -> None:
        """Load the run, once, and begin or go on with a job of the journal. Raises UserError, also where the unfinished job is another one."""
        if self.opened:
            return
        settings = self.settings
        group = settings.best_of or (settings.num_beams if settings.decode == "beam" else 1)
        self.opened = open_model(settings, group, job)
        self.prefix_ids = prefix_ids(self.opened, settings.prefix)
        if settings.best_of:
            from captioner.clip_score import load_scorer

            self.reranker = load_scorer(settings.reranker, self.opened.device)
        facts = job_settings(settings) | {
            "weights": weights_hash(self.opened, settings.checkpoint), "stack": self.opened.stack,
            "precision": self.opened.precision, "decode_precision": self.opened.decode_precision,
        }  # fmt: skip
        if self.target.job:
            check_settings(self.target.journal, self.target.job, facts)
        self.target.begin(facts)

    def caption(self, pictures: Sequence[Path], job: Job) -> None:
        """Caption pictures in whole batches, until all are done or a signal comes; those that the unfinished job has captioned are not written again.

        A batch of which one is lacking is decoded whole, as without the interrupt: the last bits of a product may depend on what else is in it.
        """
        from tqdm import tqdm

        size = self.settings.batch_size
        pieces = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        done = {picture for picture in pictures if self.target.is_done(picture)}
        lacking = [piece for piece in pieces if not done.issuperset(piece)]
        if not lacking:
            return
        self.open(job)
        begun = time.perf_counter()
        with tqdm(total=sum(map(len, lacking)), desc="pictures", unit="picture", disable=None, dynamic_ncols=True) as bar:
            for piece, captions in zip(lacking, self.decoded(lacking), strict=True):
                self.captioned += self.target.add([own for own in captions if own.picture not in done and self.is_good(own)])
                bar.update(len(piece))
                if job.stop.number is not None:
                    break
        self.seconds += time.perf_counter() - begun

    def is_good(self, caption: Caption) -> bool:
        """Whether a caption can be written; of one that cannot, the picture is refused."""
        reason = None if caption.text else "the model writes an empty caption"
        if stamp_of(caption.picture) != caption.stamp:
            reason = "was changed while it was captioned"
        if reason:
            self.target.refuse(str(caption.picture), f"{caption.picture}: {reason}")
        return reason is None

    def decoded(self, pieces: Sequence[Sequence[Path]]) -> Iterator[list[Caption]]:
        """The captions of each piece's pictures; those of bad ones are missing. All pieces but the last are a batch."""
        from data.dataset import CaptionDataset, make_loader
        from data.rows import FileImage, Row

        order = {str(picture): picture for piece in pieces for picture in piece}
        transform = self.opened.transform if self.reranker is None else TwoTransforms(self.opened.transform, self.reranker.transform)
        dataset = CaptionDataset([Row(name, FileImage(picture)) for name, picture in order.items()], transform)
        loader = make_loader(dataset, None, self.settings.batch_size, range(len(order)), self.workers(), "all", ledger=self.ledger)
        turns = loader.turns()
        for piece in pieces:
            stamps = {str(picture): stamp_of(picture) for picture in piece}  # before they are read, but by worker processes
            batch = next(turns)
            captions = {} if batch is None else dict(zip(batch["ids"], self.captions_of(batch), strict=True))
            for name in captions:
                self.ledger.rows.pop(name, None)  # bad at first, and whole by now
            yield [Caption(order[name], stamps[name], " ".join(text.split())) for name, text in captions.items()]

    def captions_of(self, batch: dict) -> list[str]:
        """One caption an image; the draws of sampling depend on the file's name, not on its folder."""
        names = [os.fsencode(Path(name).name).decode("utf-8", "backslashreplace") for name in batch["ids"]]
        opened = self.opened
        if self.reranker is None:
            return opened.tokenizer.decode(decode(opened.model, opened.encode(batch), names, self.settings, self.prefix_ids))
        return self.best_of(batch, names)

    def best_of(self, batch: dict, names: list[str]) -> list[str]:
        """Of n samples of each image the one that the reranker likes best, of equal ones the first."""
        from captioner import generate
        from captioner.clip_score import score_candidates

        settings, opened = self.settings, self.opened
        pixels, seen = TwoTransforms(opened.transform, self.reranker.transform).split(batch["pixel_values"])
        ids = generate.sample(
            opened.model, opened.encode(batch | {"pixel_values": pixels}), n=settings.best_of, top_p=settings.top_p, temperature=settings.temperature,
            top_k=settings.top_k, repetition_penalty=settings.repetition_penalty or 1.2, max_new_tokens=settings.max_new_tokens or 20, seed=settings.seed,
            image_ids=names, prefix_ids=self.prefix_ids,
        )  # fmt: skip
        texts = opened.tokenizer.decode(ids.flatten(0, 1))
        candidates = [texts[start : start + settings.best_of] for start in range(0, len(texts), settings.best_of)]
        best = score_candidates(self.reranker, self.reranker.embed_images(seen), candidates).argmax(1).tolist()
        self.reranker.text_embeddings.clear()  # a folder may be long
        return [own[index] for own, index in zip(candidates, best, strict=True)]

    def workers(self) -> int:
        if self.settings.workers is not None:
            return self.settings.workers
        return 0 if self.opened.device.type == "cpu" or self.settings.watch else min(8, os.cpu_count() or 1)

    def bad(self) -> list[dict]:
        """What `BadImageLedger.to_list` has of the bad pictures."""
        return self.ledger.to_list()

    def summary(self) -> dict:
        """The counts for --json; images_per_second is without loading the model."""
        bad = [{name: value and printable(value) for name, value in row.items()} for row in self.bad()]
        return {
            "captioned": self.captioned + self.before, "captioned_before": self.before, "skipped": self.skipped, "bad": len(bad),
            "refused": len(self.target.refused), "seconds": round(self.seconds, 3),
            "images_per_second": round(self.captioned / self.seconds, 3) if self.captioned else None,
            "run": str(self.opened.path) if self.opened else None, "journal": str(self.target.journal.path), "output": self.settings.output,
            "bad_images": bad, "refused_files": [{"name": printable(name), "reason": printable(reason)} for name, reason in self.target.refused.items()],
        }  # fmt: skip


@dataclass(frozen=True)
class TwoTransforms:
    """A picture as two models want it, in one tensor: it is opened once."""

    first: "ImageTransform"
    second: "ImageTransform"

    def __call__(self, image) -> "Tensor":
        """Image → the numbers of both, one after the other (P1 + P2,)."""
        import torch

        return torch.cat([self.first(image).flatten(), self.second(image).flatten()])

    def split(self, pixels: "Tensor") -> "tuple[Tensor, Tensor]":
        """(B, P1 + P2) → (B, 3, H1, W1) and (B, 3, H2, W2), or of C views (B, C, 3, H, W)."""
        shapes = [(*([len(one.views)] if one.views else []), 3, one.image_size, one.image_size) for one in (self.first, self.second)]
        parts = pixels.split([math.prod(shape) for shape in shapes], dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))


def prefix_ids(opened: OpenModel, prefix: str | None) -> list[int]:
    """The tokens of a prefix, tokenized alone. Raises UserError where they are not the text."""
    if prefix is None:
        return []
    text = " ".join(prefix.split())
    ids = opened.tokenizer.encode([text])[0][:-1]
    written = opened.tokenizer.decode([ids])[0]
    if written != text:
        raise UserError(f"--prefix {text!r}: the vocabulary of {opened.path} can only write {written!r}")
    return ids


def printable(text: str) -> str:
    """A text that UTF-8 can hold: bytes of a file's name that are none are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def tell(line: str) -> None:
    """`say` for a line that names files: what in a name would steer a terminal is escaped."""
    say(visible(line))


def journal_path(settings: Settings) -> Path:
    return Path(settings.journal) if settings.journal else root_of(settings.paths[0]) / FILE_NAME


def is_bad_list(path: Path) -> bool:
    """Whether a file is the list of bad pictures of an earlier call."""
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        if path.is_file() and not path.is_symlink():
            with open(path, encoding="utf-8") as file:
                return json.loads(file.readline(2**20)).keys() == {field.name for field in dataclasses.fields(BadRow)}
    return False


def open_target(settings: Settings, journal: CaptionJournal) -> Target:
    """Where the captions go, with the journal's unfinished job if there is one. Raises UserError where that one wrote something else."""
    job = journal.unfinished()
    if job:
        check_settings(journal, job, job_settings(settings))
    if settings.format == "sidecars":
        return Sidecars(journal, job, settings.existing, tell, settings.ext, settings.sidecar_name)
    return OneFile(journal, job, settings.existing, tell, Path(settings.output), settings.format)


def job_settings(settings: Settings) -> dict:
    output = settings.output and str(place_of(Path(settings.output)))
    return {name: getattr(settings, name) for name in JOB_SETTINGS} | {"output": output}


def take_back(settings: Settings) -> int:
    """--undo: the exit code."""
    path = journal_path(settings)
    if not path.is_file():
        raise UserError(f"{path}: no such journal; nothing to undo")
    refused: dict[str, str] = {}
    with CaptionJournal(path) as journal:
        job = journal.undoable()
        if job is None:
            raise UserError(f"{path}: nothing is left to undo")
        roots = [root_of(word) for word in settings.paths]
        restored = undo(journal, job, roots, Path(settings.output) if settings.output else None, refused.__setitem__)
        for reason in refused.values():
            tell(f"left alone: {reason}")
        if not refused:
            journal.add([{"event": "undone"}])
        left = sum(bool(job.lines) and not job.undone for job in journal.jobs)
        if not left:
            journal.clear()
            if is_bad_list(journal.path.parent / BAD_IMAGES):
                (journal.path.parent / BAD_IMAGES).unlink()
    say(f"{restored} files put back, {len(refused)} left alone" + (f"; jobs that can be undone: {left}" if left else ""))
    files = [{"name": printable(name), "reason": printable(reason)} for name, reason in refused.items()]
    write_json(settings.json, {"restored": restored, "refused_files": files})
    return cli.SOME_BAD if refused else cli.DONE


def watch(settings: Settings, call: Captioning, job: Job, notes: "Notes") -> None:
    """Caption pictures as they arrive; one is taken when its size and time have not changed for POLL seconds, so that half-copied files wait."""
    handled: dict[Path, object] = {}
    seen: dict[Path, tuple[object, float]] = {}
    while job.stop.number is None:
        ready, begun = [], time.monotonic()
        for picture in find_pictures(settings.paths, notes, may_be_empty=True):
            own, stamp = place_of(picture), stamp_of(picture)
            if own in handled and handled[own] == stamp:
                continue
            if own not in seen or seen[own][0] != stamp:
                seen[own] = (stamp, time.monotonic())
            elif time.monotonic() - seen[own][1] >= POLL:
                ready.append(picture)
        pause = max(POLL / 4, 3 * (time.monotonic() - begun))  # looking through a large folder takes a quarter of a core at most
        chosen, skipped = call.target.select(ready)
        call.skipped += skipped
        call.before += call.target.catch_up(chosen)
        call.caption(chosen, job)
        call.captioned += call.target.finish()
        if job.stop.number is None:
            handled.update((own, seen.pop(own)[0]) for own in map(place_of, ready))
        until = time.monotonic() + pause
        while job.stop.number is None and time.monotonic() < until:
            time.sleep(POLL / 4)


class Notes:
    """Lines about folders that are left out, each said once."""

    def __init__(self):
        self.said: set[str] = set()

    def __call__(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            tell(line)


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    check(settings)
    if settings.undo:
        return take_back(settings)
    notes = Notes()
    pictures = find_pictures(settings.paths, notes, may_be_empty=settings.watch)
    if settings.format == "sidecars":
        sidecars.check_collisions(pictures, settings.ext, settings.sidecar_name)
    with CaptionJournal(journal_path(settings)) as journal, contextlib.ExitStack() as closing:
        target = open_target(settings, journal)
        call = Captioning(settings, target)
        bad_list = journal.path.parent / BAD_IMAGES
        if os.path.lexists(bad_list) and not is_bad_list(bad_list):
            raise UserError(f"{visible(str(bad_list))} is not a list of bad pictures: rename it, or choose another folder with --journal")
        closing.enter_context(Job().bad_images_in(journal.path.parent, call.ledger))
        chosen, call.skipped = ([], 0) if settings.watch else target.select(pictures)
        call.before = target.catch_up(chosen)
        number = None
        if settings.watch or call.before < len(chosen):
            with started(settings.device) as job:
                if settings.watch:
                    call.open(job)
                    say(f"{call.opened.path}: watching {', '.join(settings.paths)}")
                    watch(settings, call, job, notes)
                else:
                    call.caption(chosen, job)
                number = job.stop.number
        call.captioned += target.finish()
        if number is None and target.job:
            journal.add([{"event": "end"}])
        report(call, number, argv, len(chosen))
    if number is not None:
        return 128 + number
    return cli.SOME_BAD if call.bad() or target.refused else cli.DONE


def report(call: Captioning, number: int | None, argv: list[str] | None, chosen: int) -> None:
    """The counts for people and for --json, and after a signal the command that goes on."""
    summary = call.summary()
    if call.bad():
        say(call.ledger.summary())
    speed = f", {summary['images_per_second']:.1f} pictures/s" if summary["images_per_second"] else ""
    counts = ", ".join(f"{summary[name]} {name}" for name in ("captioned", "skipped", "bad", "refused"))
    say(counts + speed)
    write_json(call.settings.json, summary)
    if number is not None:
        words = sys.argv[1:] if argv is None else list(argv)
        if not call.settings.run and call.opened:
            words += ["--run", str(call.opened.path)]  # the newest run may be another one by then
        share = "" if call.settings.watch else f" with {summary['captioned']} of {chosen} pictures captioned"
        say(f"stopped{share}; go on with: {Job().command('scripts/caption.py', words)}")


if __name__ == "__main__":
    cli.run_command(main, expected=(ValueError,))
