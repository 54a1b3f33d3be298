"""All captions of a split, scored: what greedy decoding, beam search, one sample, the best of n, the oracle and the references are worth.

Legend: N images, n samples of each, D decodings and samples of an image together.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from captioner import scoring
from captioner.clip_score import ClipScorer, same_model, score_candidates
from captioner.decoding import are_scenes
from captioner.files import replacing
from captioner.metrics import cider
from captioner.metrics.best_at_k import best_at_k
from data.rows import Row

ROWS = ("greedy", "beam", "sample", "best_of_n", "oracle", "references")
FIRST_SAMPLE = 3


@dataclass
class ScoredCaptions:
    """All captions of the images that can be read, and their scores; decodings come in the order greedy, beam, first reference, samples."""

    reranker: ClipScorer
    scorer: ClipScorer
    rows: list[Row]
    decoded: list[list[str]]  # N lists of D = 3 + n captions
    by_reranker: np.ndarray  # (N, D) CLIPScores
    by_scorer: np.ndarray  # (N, D) CLIPScores
    cider: np.ndarray  # (N, n) CIDEr of the samples, document frequencies from the references

    @property
    def self_scored(self) -> bool:
        """Whether the scorer is the model that chose."""
        return same_model(self.reranker, self.scorer)

    @property
    def references(self) -> list[list[str]]:
        return [list(row.captions) for row in self.rows]

    def places(self) -> dict[str, np.ndarray]:
        """Of each row of the table, which decoding of each image it is: (N,)."""
        fixed = {"greedy": 0, "beam": 1, "references": 2, "sample": FIRST_SAMPLE}
        places = {name: np.full(len(self.rows), place) for name, place in fixed.items()}
        places["best_of_n"] = FIRST_SAMPLE + self.by_reranker[:, FIRST_SAMPLE:].argmax(1)
        places["oracle"] = FIRST_SAMPLE + self.cider.argmax(1)
        return {name: places[name] for name in ROWS}

    def texts(self, places: np.ndarray) -> list[str]:
        return [captions[place] for captions, place in zip(self.decoded, places, strict=True)]


def score_candidate_lines(
    lines: dict[str, dict],
    rows: Sequence[Row],
    reranker: ClipScorer,
    scorer: ClipScorer,
    embeddings: Sequence[dict[str, torch.Tensor]],
    tokenize: str,
    progress: Callable[[Iterable, str], Iterable],
) -> ScoredCaptions:
    """Score every caption of every image by both CLIPs, and the samples by CIDEr.

    lines: {"image_id", "greedy", "beam", "candidates"} by image id. embeddings: of the images for each of `distinct_clips`, by image id; rows without one
    are left out.
    """
    clips = distinct_clips(reranker, scorer)
    rows = [row for row in rows if all(row.id in found for found in embeddings)]
    found = [lines[row.id] for row in rows]
    decoded = [[line["greedy"], line["beam"], row.captions[0], *line["candidates"]] for row, line in zip(rows, found, strict=True)]
    scores = []
    for clip, images in zip(clips, embeddings, strict=True):
        scoring.embed_captions(clip, (text for texts in decoded for text in texts), progress)
        scores.append(score_candidates(clip, torch.stack([images[row.id] for row in rows]), decoded).double().numpy())
    references = [list(row.captions) for row in rows]
    # Sample by sample, so that the document frequencies are those of the split.
    samples = zip(*(line["candidates"] for line in found), strict=True)
    cider_of_samples = np.stack([cider(texts, references, tokenize)[1] for texts in samples], axis=1)
    return ScoredCaptions(reranker, scorer, rows, decoded, scores[0], scores[-1], cider_of_samples)


def distinct_clips(reranker: ClipScorer, scorer: ClipScorer) -> list[ClipScorer]:
    """The CLIPs that have to see the images: one that is both works once."""
    return [reranker] if scorer is reranker else [reranker, scorer]


def summarize(captions: ScoredCaptions, tokenize: str) -> tuple[list[dict], dict[str, list[dict]]]:
    """The rows of the table, and for each of them the text metrics of every image.

    Ground truth is each image's first reference, scored against its others; images with a single one are left out of its text metrics, which are None
    where there are no others.
    """
    rows, items = [], {}
    everyone = np.arange(len(captions.rows))
    for name, places in captions.places().items():
        texts, references = captions.texts(places), captions.references
        scored = everyone
        if name == "references":
            scored, references = np.array([i for i in everyone if len(references[i]) > 1], dtype=int), [own[1:] for own in references]
        corpus: dict = {"CIDEr": None, "Bleu_4": None, "n": 0}
        items[name] = [{} for _ in everyone]
        if len(scored):
            corpus, per_item = scoring.score_text([texts[i] for i in scored], [references[i] for i in scored], tokenize)
            for i, values in zip(scored, per_item, strict=True):
                items[name][i] = values
        row = {
            "name": name, "CIDEr": corpus["CIDEr"], "Bleu_4": corpus["Bleu_4"], "CLIPScore": captions.by_scorer[everyone, places].mean().item(),
            "scorer": captions.scorer.name, "self_scored": captions.self_scored,
            "reranker_CLIPScore": captions.by_reranker[everyone, places].mean().item(), "reranker": captions.reranker.name, "n": corpus["n"],
        }  # fmt: skip
        row |= scoring.variety(texts)
        if are_scenes(captions.rows):
            row |= scoring.judge_scenes(texts, captions.rows)[0]
        rows.append(row)
    return rows, items


def curves(captions: ScoredCaptions) -> dict[str, list[float]]:
    """For k = 1 … n the expected CLIPScore of the reranker's choice among k samples by itself and by the scorer, its CIDEr, and the best CIDEr."""
    chosen_by, by_scorer = captions.by_reranker[:, FIRST_SAMPLE:], captions.by_scorer[:, FIRST_SAMPLE:]
    found = {
        "reranker_CLIPScore": best_at_k(chosen_by),
        "scorer_CLIPScore": best_at_k(chosen_by, by_scorer),
        "CIDEr": best_at_k(chosen_by, captions.cider),
        "oracle_CIDEr": best_at_k(captions.cider),
    }
    return {"k": list(range(1, chosen_by.shape[1] + 1)), **{name: values.tolist() for name, values in found.items()}}


def plot_curves(curves: dict[str, list[float]], captions: ScoredCaptions, path: Path) -> None:
    """The expected best of k samples over k, CLIPScore by both CLIPs and CIDEr side by side → PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    clip_axis, cider_axis = figure.subplots(1, 2)
    own = " (self-scored)" if captions.self_scored else ""
    for axis, name, label, colour in (
        (clip_axis, "reranker_CLIPScore", f"by the reranker {captions.reranker.name} (self-scored)", "#9db8d9"),
        (clip_axis, "scorer_CLIPScore", f"by the scorer {captions.scorer.name}{own}", "#1f5fa8"),
        (cider_axis, "CIDEr", "of the reranker's choice", "#c4622d"),
        (cider_axis, "oracle_CIDEr", "of the best sample (oracle)", "#e3b08f"),
    ):
        axis.plot(curves["k"], curves[name], color=colour, marker="o", markersize=4, label=label)
    for axis, title, corner in ((clip_axis, "CLIPScore of the choice", "lower right"), (cider_axis, "CIDEr", "upper left")):
        axis.set_title(title, loc="left", fontsize="medium")
        axis.set_xlabel("samples to choose from (k)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
        axis.legend(fontsize="small", frameon=False, loc=corner)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def caption_rows(captions: ScoredCaptions, items: dict[str, list[dict]]) -> list[dict]:
    """The lines of captions.jsonl: the chosen caption with its scores, every candidate, and the other decodings. items as from `summarize`."""
    places, scenes = captions.places(), are_scenes(captions.rows)

    def described(image: int, place: int, more: dict) -> dict:
        """A caption and its scores."""
        text = captions.decoded[image][place]
        clip = {"CLIPScore": captions.by_scorer[image, place].item(), "reranker_CLIPScore": captions.by_reranker[image, place].item()}
        values = {"caption": text, **more, **clip}
        if scenes:
            values["facts"] = dataclasses.asdict(scoring.judge_scenes([text], [captions.rows[image]])[1][0])
        return values

    lines = []
    for image, row in enumerate(captions.rows):
        decodings = {name: described(image, places[name][image], items[name][image]) for name in ROWS if name != "references"}
        candidates = [described(image, FIRST_SAMPLE + k, {"CIDEr": value}) for k, value in enumerate(captions.cider[image].tolist())]
        chosen = decodings.pop("best_of_n")
        line = {"image_id": row.id, "caption": chosen.pop("caption"), "references": list(row.captions), **chosen}
        lines.append(line | {"scorer": captions.scorer.name, "reranker": captions.reranker.name, "candidates": candidates, **decodings})
    return lines
