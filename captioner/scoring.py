"""What the captions of a split are worth: text metrics, CLIPScore, the truth of drawn scenes, how varied they are. Imports no torch by itself."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from captioner import metrics

if TYPE_CHECKING:
    from captioner.clip_score import ClipScorer
    from data.rows import Row
    from data.scene_facts import Judgement

SCENE_RERANKER, SCENE_SCORER = "ViT-Tiny-Scenes:demo", "ViT-Tiny-Scenes:scorer"
RERANKER, SCORER = "ViT-L-14-quickgelu:openai", "ViT-B-32:laion2b_s34b_b79k"
# Columns of tables for people, in order.
TABLE = ("CIDEr", "Bleu_4", "CLIPScore", "CLIP_cosine", "RefCLIPScore", "hallucination", "recall", "duplicates", "mean_words")
# Scores of a single caption in a report.
ITEM_SCORES = ("CIDEr", "Bleu_4", "CLIPScore", "CLIP_cosine", "RefCLIPScore")
TEXTS_AT_ONCE = 1024


def score_text(hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: str) -> tuple[dict, list[dict]]:
    """({"Bleu_1" … "Bleu_4", "CIDEr", "n", "tokenize"}, the metrics of each caption)."""
    corpus, items = metrics.score(hypotheses, references, tokenize)
    return {**corpus, "n": len(hypotheses), "tokenize": tokenize}, items


def variety(captions: Sequence[str]) -> dict[str, float]:
    """`duplicates`: the share of images whose caption another image has too; `mean_words`: mean length in words, split at spaces."""
    times = Counter(captions)
    return {
        "duplicates": sum(count for count in times.values() if count > 1) / len(captions),
        "mean_words": sum(len(caption.split()) for caption in captions) / len(captions),
    }


def judge_scenes(captions: Sequence[str], rows: "Sequence[Row]") -> "tuple[dict[str, float], list[Judgement]]":
    """({"hallucination", "recall"}, a judgement a caption) of captions of drawn scenes."""
    from data.scene_facts import judge, totals

    judgements = [judge(caption, row.image.scene) for caption, row in zip(captions, rows, strict=True)]
    return totals(judgements), judgements


def embed_captions(scorer: "ClipScorer", captions: Iterable[str], progress: Callable[[Iterable, str], Iterable]) -> None:
    """Encode texts with CLIPScore's prompt, so that the scorer remembers them; in pieces, since a long list takes its time."""
    from captioner.clip_score import PROMPT

    texts = sorted(dict.fromkeys(captions), key=len)  # those of like length share a batch, and so its padding
    pieces = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
    for piece in progress(pieces, f"embedding {len(texts)} captions for {scorer.name}"):
        scorer.embed_texts(piece, PROMPT)


def item_scores(row: dict) -> dict[str, float]:
    """What a report shows of a caption: those of `ITEM_SCORES` that it has; of a drawn scene also false facts and the share of objects named."""
    scores = {name: row[name] for name in ITEM_SCORES if name in row}
    if "facts" in row:
        scores |= {"false": row["facts"]["false"], "recall": row["facts"]["named"] / max(row["facts"]["objects"], 1)}
    return scores


def show(scores: dict, say: Callable[[str], None]) -> None:
    """The corpus scores for people, a line each."""
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr", *TABLE[2:]):
        if name in scores:
            say(f"{name:>13} {scores[name]:.4f}")
    scorer = f"   CLIP scores by {scores['scorer']}" if "scorer" in scores else ""
    cut = f", {scores['truncated']} texts cut to its context" if scores.get("truncated") else ""
    say(f"{'n':>13} {scores['n']}   tokenize {scores['tokenize']}{scorer}{cut}")
