"""Sample n captions an image and keep the one that a CLIP likes best; an independent CLIP, CIDEr and BLEU say what that is worth.

    python best_of_n.py [RUN] --split val --n 10                      the newest run if none is named
    python best_of_n.py RUN --reranker ViT-L-14-quickgelu:openai --scorer ViT-B-32:laion2b_s34b_b79k

An image is encoded once for all its captions. Finished images are kept in candidates.jsonl: the same command goes on after an interrupt.
Legend: B images of a batch, n samples of each, N image tokens, T text tokens, D width.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from captioner import cli, scoring
from captioner.cli import say, setting
from captioner.decoding import (
    REPORT_IMAGES, OpenRun, RunSettings, Stopped, are_scenes, attend, no_captions, open_run, until_stopped, weights_hash,
)  # fmt: skip
from captioner.files import write_json, write_text
from captioner.journal import Journal
from data.readers import BUILT_IN

if TYPE_CHECKING:
    from captioner.reranking import ScoredCaptions

# Settings that decide the candidates; anything else may change from one call to the next.
CANDIDATE_SETTINGS = (
    "n", "split", "num_beams", "length_penalty", "max_length", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed",
)  # fmt: skip
Progress = Callable[[Iterable, str], Iterable]


@dataclass
class Settings(RunSettings):
    """Every setting of best-of-n; each field is one flag."""

    n: int = setting(10, "samples of an image")
    reranker: str | None = setting(None, "CLIP that chooses (default: ViT-Tiny-Scenes:demo for drawn scenes, else ViT-L-14-quickgelu:openai)")
    scorer: str | None = setting(None, "CLIP that scores (default: ViT-Tiny-Scenes:scorer for drawn scenes, else ViT-B-32:laion2b_s34b_b79k)")
    max_length: int = setting(20, "longest caption of beam search in tokens, counting the start token")
    max_new_tokens: int = setting(20, "longest sampled or greedy caption in tokens, not counting the start token")
    repetition_penalty: float = setting(1.2, "of sampling: divides the scores of tokens already written")


def load_clips(settings: Settings, run: OpenRun):
    """(reranker, scorer); the same object where both flags say the same."""
    from captioner import clip_score

    scenes = are_scenes(run.rows)
    reranker_name = settings.reranker or (scoring.SCENE_RERANKER if scenes else scoring.RERANKER)
    scorer_name = settings.scorer or (scoring.SCENE_SCORER if scenes else scoring.SCORER)
    reranker = clip_score.load_scorer(reranker_name, run.device)
    return reranker, reranker if scorer_name == reranker_name else clip_score.load_scorer(scorer_name, run.device)


def decode_split(settings: Settings, run: OpenRun, journal: Journal, progress: Progress) -> None:
    """Add to the journal every readable image that it lacks: {"image_id", "greedy", "beam", "candidates"}.

    Whole batches are decoded, those of an undisturbed run, since the last bits of a product may depend on what else is in it.
    """
    size = settings.batch_size
    starts = range(0, len(run.rows), size)
    unfinished = [start for start in starts if any(row.id not in journal.lines for row in run.rows[start : start + size])]
    order = [index for start in unfinished for index in range(start, min(start + size, len(run.rows)))]
    for batch in progress(run.batches(size, settings.workers, order), f"{settings.n} samples an image"):
        found = decode(run.model, run.encode(batch), batch["ids"], settings)
        texts = {name: run.tokenizer.decode(ids) for name, ids in (("greedy", found[0]), ("beam", found[1]), ("samples", found[2].flatten(0, 1)))}
        journal.add(
            {
                "image_id": image_id,
                "greedy": texts["greedy"][index],
                "beam": texts["beam"][index],
                "candidates": texts["samples"][index * settings.n : (index + 1) * settings.n],
            }
            for index, image_id in enumerate(batch["ids"])
            if image_id not in journal.lines
        )


def decode(model, memory, image_ids: Sequence[str], settings: Settings):
    """Greedy and beam-search ids (B, T) and samples (B, n, T), all from one memory (B, N, D)."""
    from captioner import generate

    greedy = generate.greedy(model, memory, max_new_tokens=settings.max_new_tokens)
    beam = generate.beam_search(model, memory, num_beams=settings.num_beams, max_length=settings.max_length, length_penalty=settings.length_penalty)
    samples = generate.sample(
        model, memory, n=settings.n, top_p=settings.top_p, temperature=settings.temperature, top_k=settings.top_k,
        repetition_penalty=settings.repetition_penalty, max_new_tokens=settings.max_new_tokens, seed=settings.seed, image_ids=image_ids,
    )  # fmt: skip
    return greedy, beam, samples


def candidate_settings(settings: Settings, run: OpenRun) -> dict:
    """Everything that decides the candidates of an image; the size of the batches and the number of images do not."""
    data = settings.data or run.config["settings"]["data"]
    return {
        **{name: getattr(settings, name) for name in CANDIDATE_SETTINGS}, "data": data if data in BUILT_IN else str(Path(data).resolve()),
        "precision": run.precision, "decode_precision": run.decode_precision, "weights": weights_hash(run, settings.checkpoint), "stack": run.stack,
    }  # fmt: skip


def write_results(settings: Settings, run: OpenRun, directory: Path, captions: "ScoredCaptions", progress: Progress) -> dict:
    """Every file of the results; returns the scores."""
    from captioner import reranking

    rows, items = reranking.summarize(captions, settings.tokenize)
    curves = reranking.curves(captions)
    lines = reranking.caption_rows(captions, items)
    scores = {
        "rows": rows, "best_at_k": curves["reranker_CLIPScore"], "n": settings.n, "images": len(lines), "split": settings.split,
        "tokenize": settings.tokenize, "seed": settings.seed,
        "reranker": captions.reranker.name, "reranker_truncated": captions.reranker.truncated,
        "scorer": captions.scorer.name, "truncated": captions.scorer.truncated, "bad_images": run.ledger.to_list(),
    }  # fmt: skip
    write_text(directory / "captions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(directory / f"captions_{settings.split}_results.json", [{"image_id": line["image_id"], "caption": line["caption"]} for line in lines])
    write_json(directory / "best_at_k.json", curves)
    reranking.plot_curves(curves, captions, directory / "best_at_k.png")
    if settings.report:
        write_report(settings, run, directory, captions, lines, scores, progress)
    write_json(directory / "scores.json", scores)
    return scores


def write_report(
    settings: Settings, run: OpenRun, directory: Path, captions: "ScoredCaptions", lines: list[dict], scores: dict, progress: Progress
) -> None:
    """report.html: pictures, references, every decoding with its scores, and what each word of the chosen caption looked at."""
    from captioner import report

    shown = lines[:REPORT_IMAGES]
    chosen = {line["image_id"]: line["caption"] for line in shown}
    order = [number for number, row in enumerate(run.rows) if row.id in chosen]
    attention = {}
    for batch in progress(run.batches(settings.batch_size, settings.workers, order), "attention of words"):
        attention.update(zip(batch["ids"], attend(run, batch, [chosen[image_id] for image_id in batch["ids"]]), strict=True))

    def items() -> Iterator["report.Item"]:
        for row, line in progress(list(zip(captions.rows[: len(shown)], shown, strict=True)), "report"):
            decoded = [report.Decoded(f"best of {settings.n}", line["caption"], item_scores(line), *attention.get(row.id, ()))]
            decoded += [report.Decoded(name, line[name]["caption"], item_scores(line[name])) for name in ("greedy", "beam", "sample", "oracle")]
            yield report.item_of(row, decoded, run.transform)

    facts = {
        "run": str(run.path), "split": f"{settings.split}, {len(lines)} images", "samples": f"{settings.n} an image, seed {settings.seed}",
        "chosen by": captions.reranker.name, "scored by": captions.scorer.name, "tokenize": settings.tokenize,
    } | dict(zip(("CLIPScore", "references"), notes(scores), strict=True))  # fmt: skip
    if len(lines) > REPORT_IMAGES:
        facts["shown"] = f"the first {REPORT_IMAGES} images"
    plots = {"Expected best of k samples": directory / "best_at_k.png", **report.training_plot(run.path)}
    title = f"Best of {settings.n}: {run.path.name} on {settings.split}"
    report.write_report(directory / "report.html", title, facts, table(scores), items(), plots)


def item_scores(line: dict) -> dict[str, float]:
    """Scores of a caption that the report shows."""
    return scoring.item_scores(line) | {"CLIPScore (reranker)": line["reranker_CLIPScore"]}


def table(scores: dict) -> list[dict]:
    """The rows of the scores as people read them: CLIPScore by both CLIPs, marked in `self_scored` where a CLIP scores its own choice."""
    by_reranker, by_scorer = "CLIPScore (reranker)", "CLIPScore (scorer)"
    rows = []
    for row in scores["rows"]:
        shown = {"captions": row["name"].replace("_n", f"_{scores['n']}").replace("_", " "), "CIDEr": row["CIDEr"], "BLEU-4": row["Bleu_4"]}
        shown |= {by_reranker: row["reranker_CLIPScore"], by_scorer: row["CLIPScore"], "duplicates": row["duplicates"], "words": row["mean_words"]}
        shown |= {name: row[name] for name in ("hallucination", "recall") if name in row}
        if row["name"] == "best_of_n":
            shown["self_scored"] = [by_reranker, by_scorer] if row["self_scored"] else [by_reranker]
        rows.append(shown)
    return rows


def notes(scores: dict) -> tuple[str, str]:
    """What the table's CLIP columns mean, and what became of the references."""
    reranker, scorer, counted = scores["reranker"], scores["scorer"], scores["rows"][-1]["n"]
    if scores["rows"][0]["self_scored"]:
        clips = f"reranker {reranker} and scorer {scorer} are the same model: it scores its own choice (self-scored)"
    else:
        clips = f"the reranker {reranker} scores its own choice (self-scored); the scorer {scorer} is independent"
    return clips, f"each image's first one, against its others in CIDEr and BLEU ({counted} of {scores['images']} images have others)"


def show(scores: dict) -> None:
    """The table for people."""
    rows = table(scores)
    columns = [name for name in rows[0] if name != "self_scored"]
    cells = [columns] + [[_cell(row[name], name, name in row.get("self_scored", ())) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        say("  ".join(f"{cell:>{width}}" if index else f"{cell:<{width}}" for index, (cell, width) in enumerate(zip(row, widths, strict=True))))
    clips, references = notes(scores)
    say(f"CLIPScore: {clips}\nreferences: {references}\n{scores['images']} images, {scores['n']} samples each, tokenize {scores['tokenize']}")


def _cell(value: str | float | None, column: str, self_scored: bool) -> str:
    text = value if isinstance(value, str) else "–" if value is None else f"{value:.1f}" if column == "words" else f"{value:.3f}"
    return f"{text} self-scored" if self_scored else text


def check(settings: Settings) -> None:
    """Refuse settings out of range; raises UsageError."""
    cli.require_positive(settings, "n", "limit", "batch_size", "num_beams", "max_new_tokens")


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    check(settings)
    run = open_run(settings)  # with no number of rows: --decode-precision auto must not depend on what decides no candidate
    reranker, scorer = load_clips(settings, run)
    directory = Path(settings.output) if settings.output else run.results(f"{settings.split}-best-of-{settings.n}")
    journal = Journal(directory / "candidates.jsonl", candidate_settings(settings, run))
    kept = sum(row.id in journal.lines for row in run.rows)
    going_on = f", {kept} of them finished before" if kept else ""
    say(f"{run.path}: {len(run.rows)} images of {settings.split}{going_on}, {settings.n} samples each, {run.device}, {run.precisions}")
    with cli.StopSignal() as stop:
        try:
            scores = caption_and_score(settings, run, directory, journal, reranker, scorer, until_stopped(stop))
        except Stopped:
            words = sys.argv[1:] if argv is None else argv
            words = words if settings.run else [str(run.path), *words]
            finished = sum(row.id in journal.lines for row in run.rows)
            say(f"stopped with {finished} of {len(run.rows)} images finished; go on with: python best_of_n.py {shlex.join(words)}")
            return stop.exit_code
    show(scores)
    write_json(settings.json, scores | {"run": str(run.path), "captions": str(directory / "captions.jsonl")})
    if run.ledger:
        say(run.ledger.summary())
        return cli.SOME_BAD
    return cli.DONE


def caption_and_score(settings: Settings, run: OpenRun, directory: Path, journal: Journal, reranker, scorer, progress: Progress) -> dict:
    """All the work that a signal may stop: the scores."""
    from captioner import reranking

    decode_split(settings, run, journal, progress)
    if not any(row.id in journal.lines for row in run.rows):
        raise no_captions(settings.split)
    captions = reranking.score_candidate_lines(journal.lines, run.rows, reranker, scorer, run.ledger, settings, progress)
    return write_results(settings, run, directory, captions, progress)


if __name__ == "__main__":
    cli.run_command(main, expected=(ValueError,))
