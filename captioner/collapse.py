"""Is a training collapsing, as the greedy captions of its evaluations tell? Imports no torch.

Three families of failure: captions that never end ("post post post …"), empty captions, and the same caption for every picture.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from captioner.scoring import variety

if TYPE_CHECKING:
    from torch import Tensor

FEWEST_IMAGES = 20  # the standard error of a share is then at most 0.11, a quarter of the gaps below
# How far a share may fall behind both the best evaluation and the references. Given are healthy and collapsed trainings of the demo.
EOS_GAP = 0.4  # healthy 0.81 to 1.00 after the first evaluation, collapsed 0.00 to 0.01
REPETITION_GAP = 0.4  # healthy 0.01 to 0.16, collapsed 0.93 to 0.97; references 0.01
COMMONEST_GAP = 0.4  # healthy 0.01 to 0.03, collapsed 0.65 to 1.00
DUPLICATES_GAP = 0.5  # healthy 0.01 to 0.27, on Conceptual Captions 0.22 to 0.27; collapsed 0.99 to 1.00
EMPTY_GAP = 0.2  # hardly a healthy caption is empty, and 4 of the fewest images are no accident
LENGTH_FACTOR, LENGTH_WORDS = 2.0, 5.0  # captions of one word may become three: both must be passed
LOSS_FACTOR, LOSS_NATS = 4.0, 1.0  # overfitting seldom trebles the loss; a small loss may, at no harm
USEFUL_CIDER = 0.05  # untrained captions of the demo have 0.017, trained ones 0.4 and more
TRAINED = 0.5  # share of a training after which one caption for all is no longer the start of learning

PHRASES = {
    "empty": "{:.0%} are empty",
    "eos_share": "{:.0%} end with EOS",
    "repetition": "{:.0%} of their word pairs are repeats",
    "commonest": "{:.0%} are one and the same",
    "duplicates": "{:.0%} are the same as another image's",
    "mean_words": "{:.1f} words on average",
}
ALLOWED_RISE = {"empty": EMPTY_GAP, "repetition": REPETITION_GAP, "commonest": COMMONEST_GAP, "duplicates": DUPLICATES_GAP}


@dataclass(frozen=True)
class Collapse:
    """A line for people, and whether the best evaluation was healthier, so that its weights are worth going back to."""

    line: str
    since_best: bool


def ended(ids: "Tensor", eos: int) -> list[bool]:
    """Of ids (B, T), start token first as `generate.greedy` gives them: whether each row ends with EOS, rather than at the limit of tokens."""
    return (ids[:, 1:] == eos).any(1).tolist()


def measure(captions: Sequence[str], ended: Sequence[bool]) -> dict[str, float]:
    """What tells a collapse, of all captions of an evaluation and whether each `ended`; numbers from 0 to 1 but for `mean_words`.

    eos_share, empty: share of the captions that end with EOS, that hold no word
    distinct_1, distinct_2: different n-grams / n-grams over all captions (Li et al., arXiv 1510.03055). They fall as captions become more or
        longer, so they compare evaluations of the same images alone.
    repetition: bigrams of a caption that it holds already / its bigrams, mean over captions (seq-rep-2 of Welleck et al., arXiv 1908.04319)
    commonest: share of the images that get the most frequent caption
    duplicates, mean_words: see `scoring.variety`

    Words are split at spaces. Of references, `ended` is whether each fits into the tokens that a caption may have. Raises ValueError where there
    is no caption, or not one `ended` for each.
    """
    if not captions or len(captions) != len(ended):
        raise ValueError(f"{len(captions)} captions and {len(ended)} ends: there must be as many, and at least one")
    count, texts = len(captions), [caption.split() for caption in captions]
    bigrams = [list(zip(words, words[1:])) for words in texts]
    return {
        "eos_share": sum(ended) / count,
        "empty": sum(not words for words in texts) / count,
        "distinct_1": _distinct(texts),
        "distinct_2": _distinct(bigrams),
        "repetition": sum(1 - len(set(pairs)) / len(pairs) for pairs in bigrams if pairs) / count,
        "commonest": max(Counter(captions).values()) / count,
        **variety(captions),
    }


def diagnose(now: dict, best: dict | None, references: dict, progress: float) -> Collapse | None:
    """The collapse that an evaluation shows, or None.

    now: its scores: `measure` of the captions, "loss" (nats per token), "CIDEr" and the number of images "n"
    best: those of the best evaluation before this one and its "step"; None where there is none
    references: `measure` of the first reference of each image; captions as uniform, repetitive or long as these are never a collapse
    progress: steps done / steps of the whole training. One caption for all is no alarm in a model that has never done better until `TRAINED`.

    A best evaluation counts as healthy with a CIDEr of `USEFUL_CIDER` and none of the signs itself; an evaluation with a higher CIDEr is no
    collapse since then. Fewer images than `FEWEST_IMAGES` tell of a non-finite loss alone.
    """
    if not math.isfinite(now["loss"]):
        return Collapse(f"collapse: the validation loss is {now['loss']}", since_best=best is not None)
    if now["n"] < FEWEST_IMAGES:
        return None
    best_is_healthy = best is not None and best["CIDEr"] >= USEFUL_CIDER and not _signs(best, references)
    if best is not None and now["CIDEr"] <= best["CIDEr"]:
        found = _grown_loss(now, best) + (_signs(now, best, references) if best_is_healthy else [])
        if found:
            return Collapse(f"collapse since the best evaluation (step {best['step']}, its values in brackets): {', '.join(found)}", since_best=True)
    found = [] if best_is_healthy or progress < TRAINED else _signs(now, references)
    if not found:
        return None
    line = f"collapse: no healthy captions yet after {progress:.0%} of the steps (the references' values in brackets): {', '.join(found)}"
    return Collapse(line, since_best=False)


def _signs(now: dict, shown: dict, *others: dict) -> list[str]:
    """What is wrong with captions, in words with the value of `shown` beside it: worse by a gap than `shown` and all others."""
    yardsticks = (shown, *others)
    longest = max(one["mean_words"] for one in yardsticks)
    found = [name for name, rise in ALLOWED_RISE.items() if now[name] > max(one[name] for one in yardsticks) + rise]
    if now["eos_share"] < min(one["eos_share"] for one in yardsticks) - EOS_GAP:
        found.append("eos_share")
    if now["mean_words"] > max(LENGTH_FACTOR * longest, longest + LENGTH_WORDS):
        found.append("mean_words")
    if "commonest" in found or "empty" in found:
        found = [name for name in found if name != "duplicates" and (name != "commonest" or "empty" not in found)]
    return [f"{phrase.format(now[name])} ({phrase.format(shown[name]).split()[0]})" for name, phrase in PHRASES.items() if name in found]


def _grown_loss(now: dict, best: dict) -> list[str]:
    if now["loss"] <= max(LOSS_FACTOR * best["loss"], best["loss"] + LOSS_NATS):
        return []
    return [f"validation loss {now['loss']:.4g} ({best['loss']:.4g})"]


def _distinct(grams: Sequence[Sequence]) -> float:
    """Different items / items of all lists together; 0 where there are none."""
    return len(set().union(*grams)) / max(sum(map(len, grams)), 1)
