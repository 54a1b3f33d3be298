"""Sample n captions an image and keep the one that a CLIP likes best; an independent CLIP, CIDEr and BLEU say what that is worth.

    python best_of_n.py [RUN] --split val --n 10                      the newest run if none is named
    python best_of_n.py RUN --reranker ViT-L-14-quickgelu:openai --scorer ViT-B-32:laion2b_s34b_b79k
    torchrun --nproc-per-node K -- best_of_n.py RUN --n 10            K processes, a device each; the same results

An image is encoded once for all its captions. Finished images are kept in candidates.jsonl: the same command goes on after an interrupt.
Legend: B images of a batch, n samples of each, N image tokens, T text tokens, D width.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import cli, scoring
from captioner.cli import say, setting
from captioner.decoding import (
    REPORT_IMAGES, OpenRun, RunSettings, are_scenes, attention_of, exit_code, finish, open_journal, open_run, say_stopped,
)  # fmt: skip
from captioner.errors import Stopped
from captioner.files import write_json, write_text
from captioner.job import started
from captioner.journal import Journal

if TYPE_CHECKING:
    from captioner.reranking import ScoredCaptions

# Settings that decide the candidates; anything else may change from one call to the next.
CANDIDATE_SETTINGS = (
    "n", "split", "num_beams", "length_penalty", "max_length", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed",
)  # fmt: skip


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


def caption_batch(settings: Settings, run: OpenRun, batch: dict) -> list[dict]:
    """{"image_id", "greedy", "beam", "candidates"} of each image."""
    found = decode(run.model, run.encode(batch), batch["ids"], settings)
    greedy, beam, samples = (run.tokenizer.decode(ids) for ids in (found[0], found[1], found[2].flatten(0, 1)))
    return [
        {
            "image_id": image_id,
            "greedy": greedy[index],
            "beam": beam[index],
            "candidates": samples[index * settings.n : (index + 1) * settings.n],
        }
        for index, image_id in enumerate(batch["ids"])
    ]


def line_fields(n: int) -> dict[str, Callable[[Any], bool]]:
    """What a line of candidates.jsonl holds, see `captioner.journal.Journal`."""

    def is_text(value: Any) -> bool:
        return isinstance(value, str)

    return {"greedy": is_text, "beam": is_text, "candidates": lambda own: isinstance(own, list) and len(own) == n and all(map(is_text, own))}


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


def write_results(settings: Settings, run: OpenRun, directory: Path, captions: "ScoredCaptions") -> dict:
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
        write_report(settings, run, directory, captions, lines, scores)
    write_json(directory / "scores.json", scores)
    return scores


def write_report(settings: Settings, run: OpenRun, directory: Path, captions: "ScoredCaptions", lines: list[dict], scores: dict) -> None:
    """report.html: pictures, references, every decoding with its scores, and what each word of the chosen caption looked at."""
    from captioner import report

    shown = lines[:REPORT_IMAGES]
    chosen = run.tokenizer.encode([line["caption"] for line in shown])
    attention = attention_of(run, settings, {line["image_id"]: tokens for line, tokens in zip(shown, chosen, strict=True)})

    def items() -> Iterator["report.Item"]:
        for row, line in run.job.progress(list(zip(captions.rows[: len(shown)], shown, strict=True)), "report"):
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
    with started(settings.device) as job:
        run = journal = None
        try:
            run = open_run(settings, job=job)  # with no number of rows: --decode-precision auto must not depend on what decides no candidate
            directory = Path(settings.output) if settings.output else run.results(f"{settings.split}-best-of-{settings.n}")
            clips = load_clips(settings, run)
            with open_journal(run, settings, CANDIDATE_SETTINGS, directory / "candidates.jsonl", line_fields(settings.n)) as journal, job.bad_images_in(directory, run.ledger):
                caption_and_score(settings, run, *clips, directory, journal)
        except Stopped as stopped:
            say_stopped("best_of_n.py", argv, settings, job, run, journal)
            return 128 + stopped.number
        return exit_code(run)


def caption_and_score(settings: Settings, run: OpenRun, reranker, scorer, directory: Path, journal: Journal | None) -> None:
    """Caption a split, choose and score, write the results; the journal keeps the candidates for another time."""
    from captioner import clip_score, reranking

    kept = sum(row.id in journal.lines for row in run.rows) if journal else 0
    going_on = f", {kept} of them finished before" if kept else ""
    say(f"{run.path}: {len(run.rows)} images of {settings.split}{going_on}, {settings.n} samples each, {run.device}, {run.precisions}")
    rows = finish(run, settings, journal, f"{settings.n} samples an image", functools.partial(caption_batch, settings, run))
    embeddings = [
        clip_score.embed_split(clip, rows, run.ledger, settings.batch_size, settings.workers, run.job) for clip in reranking.distinct_clips(reranker, scorer)
    ]
    with run.job.processes.main_first():
        if journal:
            captions = reranking.score_candidate_lines(journal.lines, rows, reranker, scorer, embeddings, settings.tokenize, run.job.progress)
            scores = write_results(settings, run, directory, captions)
            show(scores)
            write_json(settings.json, scores | {"run": str(run.path), "captions": str(directory / "captions.jsonl")})


if __name__ == "__main__":
    cli.run_command(main, expected=(ValueError,))
