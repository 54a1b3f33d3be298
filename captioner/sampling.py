"""The distribution that sampling draws from, and draws that depend on nothing but their own coordinates.

Order and edge cases are those of `transformers`: repetition penalty (arXiv 1909.05858) → temperature → top-k (arXiv 1805.04833) → top-p
(arXiv 1904.09751; the token that crosses p stays).

Legend: R rows (captions being written), T tokens so far, V vocabulary, C candidates.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's increment and multipliers, as signed 64-bit integers
COLUMN, BLOCK = 16, 64  # scores of which the largest is looked for first
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (R, V), largest first, and their ids: (R, k) each.

    On a CPU the best of V / 16 columns of 16 are looked for first: the k largest lie in the k columns with the largest maxima.
    """
    vocabulary = scores.shape[1]
    width = vocabulary // COLUMN
    if scores.device.type != "cpu" or vocabulary % COLUMN or width < 2 * k:
        return tuple(scores.topk(k))
    columns = scores.unflatten(1, (COLUMN, width))
    best = columns.amax(1).topk(k, sorted=False).indices  # (R, k)
    values, places = columns.gather(2, best[:, None].expand(-1, COLUMN, -1)).flatten(1).topk(k)
    return values, places // k * width + best.gather(1, places % k)


def argmax(scores: Tensor) -> Tensor:
    """The id of the largest of each row of scores (R, V), of equal ones the lowest: (R,)."""
    if scores.device.type != "cpu" or scores.shape[1] % BLOCK:
        return scores.argmax(-1)
    blocks = scores.unflatten(1, (-1, BLOCK))
    best = blocks.amax(-1).argmax(-1, keepdim=True)  # (R, 1)
    return best[:, 0] * BLOCK + blocks.gather(1, best[..., None].expand(-1, -1, BLOCK))[:, 0].argmax(-1)


def penalize_repetition(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Scores (R, V) with those of the tokens in ids (R, T) multiplied by the penalty where negative, divided by it where positive."""
    if penalty == 1.0:
        return scores
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def processed_logits(
    logits: Tensor,
    generated_ids: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Logits (R, V) of the next token after generated_ids (R, T), start token included → (R, V) in fp32, minus infinity where excluded.

    top_k None or 0 keeps all, top_p 1 too. Equals the chain of `transformers`' processors. Of tokens that tie at the top-k limit all stay; of those
    that tie where p is crossed the highest ids (there, an unstable sort decides).
    """
    scores = penalize_repetition(logits.float(), generated_ids, repetition_penalty) / temperature
    if top_k and top_k < scores.shape[-1]:
        limit = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < limit, -torch.inf)
    if top_p < 1.0:
        ascending, order = scores.sort(stable=True)
        excluded = _below_top_p(ascending, top_p)
        scores = scores.masked_fill(torch.zeros_like(excluded).scatter(1, order, excluded), -torch.inf)
    return scores


def probabilities(logits: Tensor, generated_ids: Tensor, **options) -> Tensor:
    """Softmax of `processed_logits`: (R, V)."""
    return processed_logits(logits, generated_ids, **options).softmax(-1)


def draw(
    logits: Tensor,
    generated_ids: Tensor,
    keys: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """One token per row from `probabilities`, by the Gumbel-max trick: (R,).

    The noise of a token is a hash of the row's key (see `sample_keys`), the number of tokens so far and the token's id; so a row draws the
    same whatever the other rows are. With top-k only its survivors get noise.
    """
    vocabulary = logits.shape[-1]
    window = min(2 * top_k, vocabulary) if top_k else vocabulary
    if window < vocabulary:
        candidates, ids = topk(penalize_repetition(logits.float(), generated_ids, repetition_penalty), window)
        candidates = candidates / temperature  # wider than top_k, since all that tie at its limit stay
        limit = candidates[:, top_k - 1 : top_k]
    if window == vocabulary or bool((candidates[:, -1:] == limit).any()):
        candidates = processed_logits(logits, generated_ids, temperature, top_k, top_p, repetition_penalty)
        ids = torch.arange(vocabulary, device=logits.device).expand_as(candidates)
    else:
        candidates = candidates.masked_fill(candidates < limit, -torch.inf)
        if top_p < 1.0:
            ids, order = ids.sort()  # so that ties come in the order of processed_logits
            candidates, order = candidates.gather(1, order).sort(stable=True)
            ids = ids.gather(1, order)
            candidates = candidates.masked_fill(_below_top_p(candidates, top_p), -torch.inf)
    chosen = (candidates + gumbel_noise(keys, generated_ids.shape[1], ids)).argmax(-1, keepdim=True)
    return ids.gather(1, chosen)[:, 0]


def sample_keys(seed: int, image_ids: Iterable[str], n: int, device: torch.device | None = None) -> Tensor:
    """One 64-bit key for each of n samples of each image, a hash of (seed, image id, sample index): (images * n,)."""
    names = (f"{seed}\0{image_id}\0{sample}" for image_id in image_ids for sample in range(n))
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64, device=device)


def gumbel_noise(keys: Tensor, step: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64 as a function of key (R,), step and token id (R, C) alone: (R, C)."""
    stream = _mix(keys + torch.full_like(keys, step) * GOLDEN_RATIO)[:, None]
    bits = _logical_shift(_mix(stream + (token_ids + 1) * GOLDEN_RATIO), 11)
    uniform = (bits.double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _below_top_p(ascending: Tensor, top_p: float) -> Tensor:
    """True at the entries of ascending scores (R, C) that the nucleus does not need."""
    excluded = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    excluded[:, -1] = False
    return excluded


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea, Flood 2014) on int64."""
    x = (x ^ _logical_shift(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _logical_shift(x, 27)) * MULTIPLIERS[1]
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, by: int) -> Tensor:
    """Right shift of int64 that brings in zeros."""
    return (x >> by) & ((1 << (64 - by)) - 1)
