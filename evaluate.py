"""Score a captioner, or captions that are already written, or compare two systems.

    python evaluate.py [RUN] --split val --decode beam                decode a split with a run (the newest if not named), then score
    python evaluate.py --hypotheses H.txt --references R.txt          score finished captions; line k belongs to line k
    python evaluate.py --compare A/captions.jsonl B/captions.jsonl    how sure is the difference B - A: paired bootstrap, wins on images
    torchrun --nproc-per-node K evaluate.py RUN                       K processes, a device each; the same results

Until the results are written, finished captions are kept in decoded.jsonl beside them: the same command goes on after an interrupt.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import cli, comparison, scoring
from captioner.cli import repeated, say, setting
from captioner.decoding import (
    REPORT_IMAGES, OpenRun, RunSettings, are_scenes, attention_of, decode, exit_code, finish, open_journal, open_run, say_stopped,
)  # fmt: skip
from captioner.errors import Stopped, UsageError, UserError
from captioner.files import write_json, write_text
from captioner.job import started
from captioner.journal import Journal
from captioner.processes import place

if TYPE_CHECKING:
    from data.rows import Row

# Settings that decide the captions, and those that do by one method alone; anything else may change when an interrupted evaluation goes on.
CAPTION_SETTINGS = ("decode", "split", "max_length", "max_new_tokens", "repetition_penalty")
METHOD_SETTINGS = {"greedy": (), "beam": ("num_beams", "length_penalty"), "sample": ("temperature", "top_k", "top_p", "seed")}


@dataclass
class Settings(RunSettings):
    """Every setting of an evaluation; each field is one flag."""

    decode: str = setting("beam", "decoding method", ("greedy", "beam", "sample"))
    max_length: int | None = setting(None, "longest caption in tokens, counting the start token (default for beam: 20)")
    max_new_tokens: int | None = setting(None, "longest caption in tokens, not counting the start token (default otherwise: 20)")
    repetition_penalty: float | None = setting(None, "divides the scores of tokens already written (default: 1.2 for sample, else 1)")
    hypotheses: str | None = setting(None, "text file of captions to score, one a line")
    references: tuple[str, ...] = repeated("text file of references, one a line; may be given several times")
    compare: tuple[str, str] | None = setting(None, "two captions.jsonl files of the same images")
    draws: int = setting(1000, "draws of the bootstrap")


def read_lines(path: str, limit: int | None) -> list[str]:
    """The lines of a UTF-8 text file, ended by newlines only. Raises UserError that names the file."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")][:limit] if text else []


def score_files(settings: Settings) -> dict:
    """Scores of a hypotheses file against one or more references files."""
    hypotheses = read_lines(settings.hypotheses, settings.limit)
    if not hypotheses:
        raise UserError(f"{settings.hypotheses}: no captions")
    columns = [read_lines(path, settings.limit) for path in settings.references]
    for path, lines in zip(settings.references, columns, strict=True):
        if len(lines) != len(hypotheses):
            raise UserError(f"{path} has {len(lines)} lines, {settings.hypotheses} has {len(hypotheses)}: line k must belong to line k")
    scores, _ = scoring.score_text(hypotheses, [list(texts) for texts in zip(*columns, strict=True)], settings.tokenize)
    return scores


def load_scorer(settings: Settings, run: OpenRun):
    """The CLIP that the settings name; for drawn scenes the embedded one; otherwise None, which is said."""
    name = settings.scorer or (scoring.SCENE_SCORER if are_scenes(run.rows) else None)
    if name is None:
        say("no CLIPScore: name a model with --scorer")
        return None
    from captioner import clip_score

    return clip_score.load_scorer(name, run.device)


def caption_batch(settings: Settings, run: OpenRun, batch: dict) -> list[dict]:
    """{"image_id", "caption", "tokens"} of each image, tokens without the start token and up to the end token."""
    ids = decode(run.model, run.encode(batch), batch["ids"], settings)
    end = run.tokenizer.eos_id
    tokens = [own[: own.index(end) + 1] if end in own else own for own in ids[:, 1:].tolist()]
    captions = run.tokenizer.decode(ids)
    return [
        {"image_id": image_id, "caption": caption, "tokens": own} for image_id, caption, own in zip(batch["ids"], captions, tokens, strict=True)
    ]


def line_fields(run: OpenRun) -> dict[str, Callable[[Any], bool]]:
    """What a line of the journal holds, see `captioner.journal.Journal`."""
    vocabulary = range(run.model.text.config.vocab_size)
    return {
        "caption": lambda caption: isinstance(caption, str),
        "tokens": lambda tokens: isinstance(tokens, list) and all(type(token) is int and token in vocabulary for token in tokens),
    }


def score_rows(settings: Settings, run: OpenRun, rows: "list[Row]", captions: list[str], scorer, embeddings: dict) -> tuple[dict, list[dict]]:
    """(corpus scores, a line of captions.jsonl for each row's caption with its own scores).

    These are text metrics, with a scorer CLIP scores and its name, of drawn scenes the judged facts. embeddings: the scorer's, of the images by image id.
    """
    references = [list(row.captions) for row in rows]
    lines = [
        {"image_id": row.id, "caption": caption, "references": texts} for row, caption, texts in zip(rows, captions, references, strict=True)
    ]
    scores, items = scoring.score_text(captions, references, settings.tokenize)
    scores |= scoring.variety(captions)
    if scorer:
        import torch

        from captioner.clip_score import score_captions

        scoring.embed_captions(scorer, [text for own in zip(captions, references, strict=True) for text in (own[0], *own[1])], run.job.progress)
        corpus, clip_items = score_captions(scorer, torch.stack([embeddings[row.id] for row in rows]), captions, references)
        scores |= corpus
        items = [item | clip_item | {"scorer": scorer.name} for item, clip_item in zip(items, clip_items, strict=True)]
    if are_scenes(rows):
        corpus, judgements = scoring.judge_scenes(captions, rows)
        scores |= corpus
        items = [item | {"facts": dataclasses.asdict(judgement)} for item, judgement in zip(items, judgements, strict=True)]
    return scores, [line | item for line, item in zip(lines, items, strict=True)]


def write_results(settings: Settings, directory: Path, rows: list[dict], scores: dict) -> None:
    """captions.jsonl with a line an image, the COCO results format, and the scores."""
    write_text(directory / "captions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(directory / f"captions_{settings.split}_results.json", [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows])
    write_json(directory / "scores.json", scores)


def write_report(settings: Settings, run: OpenRun, directory: Path, rows: list[dict], scores: dict, tokens: dict[str, list[int]]) -> None:
    """report.html: pictures, references, captions with their scores and what each word looked at; tokens: of the captions, by image id."""
    from captioner import report

    shown = rows[:REPORT_IMAGES]
    attention = attention_of(run, settings, {row["image_id"]: tokens[row["image_id"]] for row in shown})
    by_id = {row.id: row for row in run.rows}

    def items() -> Iterator["report.Item"]:
        for row in run.job.progress(shown, "report"):
            decoded = report.Decoded(settings.decode, row["caption"], scoring.item_scores(row), *attention.get(row["image_id"], ()))
            yield report.item_of(by_id[row["image_id"]], [decoded], run.transform)

    facts = {
        "run": str(run.path), "split": f"{settings.split}, {len(rows)} images", "decoding": settings.decode, "precision": run.precisions,
        "tokenize": settings.tokenize, "adapters": ", ".join(run.stack) or "none",
        "CLIP scores by": scores.get("scorer", "no model"),
    }  # fmt: skip
    if len(rows) > REPORT_IMAGES:
        facts["shown"] = f"the first {REPORT_IMAGES} images"
    table = [{"decoding": settings.decode} | {name: scores[name] for name in scoring.TABLE if name in scores}]
    report.write_report(directory / "report.html", f"{run.path.name} on {settings.split}", facts, table, items(), report.training_plot(run.path))


def check(settings: Settings) -> None:
    """Refuse settings that contradict each other; raises UsageError."""
    if bool(settings.hypotheses) != bool(settings.references):
        raise UsageError("--hypotheses and --references go together")
    if settings.hypotheses and settings.run:
        raise UsageError("--hypotheses scores finished captions: give no run with it")
    if settings.compare and (settings.run or settings.hypotheses):
        raise UsageError("--compare compares finished captions: give no run and no --hypotheses with it")
    if settings.max_length is not None and settings.max_new_tokens is not None:
        raise UsageError("--max-length and --max-new-tokens exclude each other")
    cli.require_positive(settings, "limit", "batch_size", "num_beams", "max_new_tokens", "draws")


def main(argv: list[str] | None = None) -> int:
    begun = time.perf_counter()
    settings = cli.parse_settings(Settings, argv, __doc__)
    check(settings)
    if (settings.compare or settings.hypotheses) and place()[0]:
        return cli.DONE  # work for the main process
    if settings.compare:
        found, notes = comparison.compare(*settings.compare, settings.tokenize, settings.draws, settings.seed, settings.limit)
        comparison.show(found, say)
        for note in notes:
            say(note)
        write_json(settings.json, found)
        return cli.DONE
    if settings.hypotheses:
        scores = score_files(settings)
        scoring.show(scores, say)
        write_json(settings.json, scores)
        return cli.DONE
    with started(settings.device) as job:
        run = journal = None
        try:
            run = open_run(settings, settings.num_beams if settings.decode == "beam" else 1, job)
            scorer = load_scorer(settings, run)
            directory = Path(settings.output) if settings.output else run.results(f"{settings.split}-{settings.decode}")
            names = CAPTION_SETTINGS + METHOD_SETTINGS[settings.decode]
            with open_journal(run, settings, names, directory / "decoded.jsonl", line_fields(run)) as journal, job.bad_images_in(directory, run.ledger):
                evaluate_run(settings, run, scorer, directory, journal, begun)
        except Stopped as stopped:
            say_stopped("evaluate.py", argv, settings, job, run, journal)
            return 128 + stopped.number
        return exit_code(run)


def evaluate_run(settings: Settings, run: OpenRun, scorer, directory: Path, journal: Journal | None, begun: float) -> None:
    """Caption a split, score the captions and write the results; until all is written, the journal keeps finished captions."""
    kept = sum(row.id in journal.lines for row in run.rows) if journal else 0
    going_on = f", {kept} of them captioned before" if kept else ""
    say(f"{run.path}: {len(run.rows)} images of {settings.split}{going_on}, {settings.decode}, {run.device}, {run.precisions}")
    rows = finish(run, settings, journal, settings.decode, functools.partial(caption_batch, settings, run))
    embeddings = {}
    if scorer:
        from captioner.clip_score import embed_split

        embeddings = embed_split(scorer, rows, run.ledger, settings.batch_size, settings.workers, run.job)
        rows = [row for row in rows if row.id in embeddings]
    with run.job.processes.main_first():
        if journal:
            scores, lines = score_rows(settings, run, rows, [journal.lines[row.id]["caption"] for row in rows], scorer, embeddings)
            scores |= {
                "decode": settings.decode, "decode_precision": run.decode_precision, "split": settings.split, "stack": run.stack,
                "seconds": time.perf_counter() - begun, "bad_images": run.ledger.to_list(),
            }  # fmt: skip
            write_results(settings, directory, lines, scores)
            if settings.report:
                write_report(settings, run, directory, lines, scores, {row.id: journal.lines[row.id]["tokens"] for row in rows})
                say(f"report: {directory / 'report.html'}")
            scoring.show(scores, say)
            write_json(settings.json, scores | {"run": str(run.path), "captions": str(directory / "captions.jsonl")})
            if journal.lines.keys() <= {row.id for row in run.rows}:  # else a longer evaluation has yet to go on
                journal.remove()


if __name__ == "__main__":
    cli.run_command(main, expected=(ValueError,))
