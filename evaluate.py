"""Score a captioner, or captions that are already written, or compare two systems.

    python evaluate.py [RUN] --split val --decode beam                decode a split with a run (the newest if not named), then score
    python evaluate.py --hypotheses H.txt --references R.txt          score finished captions; line k belongs to line k
    python evaluate.py --compare A/captions.jsonl B/captions.jsonl    how sure is the difference B - A: paired bootstrap, wins on images
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from captioner import cli, comparison, scoring
from captioner.cli import progress, repeated, say, setting
from captioner.decoding import REPORT_IMAGES, OpenRun, RunSettings, are_scenes, no_captions, open_run
from captioner.errors import UsageError, UserError
from captioner.files import write_json, write_text


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


def decode_split(settings: Settings, run: OpenRun) -> tuple[list[dict], dict]:
    """Rows of {"image_id", "caption", "references"} of the images that can be read, and (words, maps) of the report's captions by image id."""
    from captioner.word_attention import word_attention

    rows, attention = [], {}
    for batch in progress(run.batches(settings.batch_size, settings.workers), settings.decode):
        memory = run.encode(batch)
        ids = decode(run.model, memory, batch["ids"], settings)
        if settings.report and len(rows) < REPORT_IMAGES:
            attention.update(zip(batch["ids"], word_attention(run.model, memory, ids, run.tokenizer), strict=True))
        rows += [
            {"image_id": image_id, "caption": caption, "references": references}
            for image_id, caption, references in zip(batch["ids"], run.tokenizer.decode(ids), batch["captions"], strict=True)
        ]
    if not rows:
        raise no_captions(settings.split)
    return rows, attention


def decode(model, memory, image_ids: list[str], settings: Settings):
    """One caption an image by the method of the settings: ids (B, T)."""
    from captioner import generate

    length = {"max_length": settings.max_length, "max_new_tokens": settings.max_new_tokens}
    if settings.max_length is None and settings.max_new_tokens is None:
        length = {"max_length": 20} if settings.decode == "beam" else {"max_new_tokens": 20}
    penalty = settings.repetition_penalty or (1.2 if settings.decode == "sample" else 1.0)
    if settings.decode == "greedy":
        return generate.greedy(model, memory, repetition_penalty=penalty, **length)
    if settings.decode == "beam":
        return generate.beam_search(
            model, memory, num_beams=settings.num_beams, length_penalty=settings.length_penalty, repetition_penalty=penalty, **length
        )
    return generate.sample(
        model, memory, n=1, top_p=settings.top_p, temperature=settings.temperature, top_k=settings.top_k,
        repetition_penalty=penalty, seed=settings.seed, image_ids=image_ids, **length,
    )[:, 0]  # fmt: skip


def score_rows(settings: Settings, run: OpenRun, rows: list[dict], scorer) -> dict:
    """Corpus scores; each row gets its own: text metrics, with a scorer CLIP scores and its name, of drawn scenes the judged facts.

    A row whose image can no longer be read by then is taken out.
    """
    by_id = {row.id: row for row in run.rows}
    if scorer:
        from captioner.clip_score import embed_split

        sources = [by_id[row["image_id"]] for row in rows]
        embeddings = embed_split(scorer, sources, run.ledger, settings.batch_size, settings.workers, progress)
        rows[:] = [row for row in rows if row["image_id"] in embeddings]
    captions, references = [row["caption"] for row in rows], [row["references"] for row in rows]
    scores, items = scoring.score_text(captions, references, settings.tokenize)
    scores |= scoring.variety(captions)
    for row, item in zip(rows, items, strict=True):
        row.update(item)
    sources = [by_id[row["image_id"]] for row in rows]
    if scorer:
        import torch

        from captioner.clip_score import score_captions

        scoring.embed_captions(scorer, [text for row in rows for text in (row["caption"], *row["references"])], progress)
        corpus, items = score_captions(scorer, torch.stack([embeddings[row["image_id"]] for row in rows]), captions, references)
        scores |= corpus
        for row, item in zip(rows, items, strict=True):
            row.update(item | {"scorer": scorer.name})
    if are_scenes(sources):
        corpus, judgements = scoring.judge_scenes(captions, sources)
        scores |= corpus
        for row, judgement in zip(rows, judgements, strict=True):
            row["facts"] = dataclasses.asdict(judgement)
    return scores


def write_results(settings: Settings, directory: Path, rows: list[dict], scores: dict) -> None:
    """captions.jsonl with a line an image, the COCO results format, and the scores."""
    write_text(directory / "captions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(directory / f"captions_{settings.split}_results.json", [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows])
    write_json(directory / "scores.json", scores)


def write_report(settings: Settings, run: OpenRun, directory: Path, rows: list[dict], scores: dict, attention: dict) -> None:
    """report.html: pictures, references, captions with their scores and what each word looked at."""
    from captioner import report

    by_id = {row.id: row for row in run.rows}

    def items() -> Iterator["report.Item"]:
        for row in progress(rows[:REPORT_IMAGES], "report"):
            words, maps = attention[row["image_id"]]
            decoded = report.Decoded(settings.decode, row["caption"], scoring.item_scores(row), words, maps)
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
    settings = cli.parse_settings(Settings, argv, __doc__)
    check(settings)
    if settings.compare:
        found, notes = comparison.compare(*settings.compare, settings.tokenize, settings.draws, settings.seed, settings.limit)
        comparison.show(found, say)
        for note in notes:
            say(note)
        write_json(settings.json, found)
        return cli.DONE
    if settings.hypotheses:
        scores, ledger = score_files(settings), []
    else:
        scores, ledger = evaluate_run(settings)
    scoring.show(scores, say)
    write_json(settings.json, scores)
    if ledger:
        say(ledger.summary())
        return cli.SOME_BAD
    return cli.DONE


def evaluate_run(settings: Settings):
    """Decode a split, score it and write the results: (scores, ledger of bad images)."""
    started = time.perf_counter()
    run = open_run(settings, settings.num_beams if settings.decode == "beam" else 1)
    scorer = load_scorer(settings, run)
    say(f"{run.path}: {len(run.rows)} images of {settings.split}, {settings.decode}, {run.device}, {run.precisions}")
    rows, attention = decode_split(settings, run)
    scores = score_rows(settings, run, rows, scorer)
    scores |= {
        "decode": settings.decode, "decode_precision": run.decode_precision, "split": settings.split, "stack": run.stack,
        "seconds": time.perf_counter() - started, "bad_images": run.ledger.to_list(),
    }  # fmt: skip
    directory = Path(settings.output) if settings.output else run.results(f"{settings.split}-{settings.decode}")
    write_results(settings, directory, rows, scores)
    if settings.report:
        write_report(settings, run, directory, rows, scores, attention)
        say(f"report: {directory / 'report.html'}")
    return scores | {"run": str(run.path), "captions": str(directory / "captions.jsonl")}, run.ledger


if __name__ == "__main__":
    cli.run_command(main, expected=(ValueError,))
