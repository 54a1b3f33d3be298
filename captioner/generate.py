"""Decoding: greedy, beam search and sampling from an image memory, equal to `transformers.generate` token for token in fp32.

Ids come as `transformers` returns them: the start token first, then the tokens, then filling after the end-of-sequence token. One step
decodes one token of every row; what it keeps between steps is in `cache.py`, what sampling draws from in `sampling.py`.

`prefix_ids`, the same P tokens for all images, are written after the start token before anything is chosen: `transformers.generate` with
`decoder_input_ids` of the start token and them. They count in `max_length` and for the repetition penalty, not in `max_new_tokens` or a length penalty.

Legend: B images, G rows (beams or samples) of each, N image tokens, P prefix tokens, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner import sampling
from captioner.cache import BeamCache, DecoderCache
from captioner.decode_weights import StepWeights, choose_precision, prepare
from captioner.sampling import probabilities, processed_logits
from captioner.t5 import T5

__all__ = ["beam_search", "greedy", "prepare_for_decoding", "probabilities", "processed_logits", "sample"]

IMPOSSIBLE = -1e9  # score of a beam that must not be chosen, as in transformers


def greedy(
    model: nn.Module,
    memory: Tensor,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    repetition_penalty: float = 1.0,
    memory_mask: Tensor | None = None,
    prefix_ids: Sequence[int] = (),
) -> Tensor:
    """The likeliest token at every step: memory (B, N, D) → ids (B, T), pad after eos.

    `max_length` counts the start token, `max_new_tokens` (20 unless either is given) does not; memory_mask (B, N) is True at real tokens.
    Raises ValueError for arguments out of range.
    """
    steps = _steps(max_new_tokens, max_length, 20, len(prefix_ids))
    _check(memory, repetition_penalty=repetition_penalty)

    def choose(logits: Tensor, ids: Tensor, _: Tensor) -> Tensor:
        return sampling.argmax(sampling.penalize_repetition(logits, ids, repetition_penalty))

    with _decoding(model.text) as text:
        ids = _decode_rows(text, memory, memory_mask, 1, steps, choose, prefix_ids)[:, 0]
    return ids.clone()  # outside, since autograd refuses tensors of inference mode


def sample(
    model: nn.Module,
    memory: Tensor,
    *,
    n: int = 10,
    top_p: float = 0.9,
    temperature: float = 0.5,
    top_k: int | None = 50,
    repetition_penalty: float = 1.2,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    image_ids: Sequence[str] | None = None,
    memory_mask: Tensor | None = None,
    prefix_ids: Sequence[int] = (),
) -> Tensor:
    """n sampled captions per image: memory (B, N, D) → ids (B, n, T), pad after eos; the distribution is `processed_logits`'.

    Draws depend on (seed, image id, sample index, position, token) alone, so that sample k of an image is the same in any batch, for any n.
    `image_ids` are B stable names, by default "0", "1", …. Exact up to the last bits of the logits: matrix products round differently for
    other numbers of rows, which changes a draw only where two candidates, or a candidate and a top-k or top-p limit, differ by no more than that.
    `max_length`, `max_new_tokens` and `memory_mask` as in `greedy`. Raises ValueError for arguments out of range.
    """
    steps = _steps(max_new_tokens, max_length, 20, len(prefix_ids))
    _check(memory, n=n, top_p=top_p, temperature=temperature, top_k=top_k, repetition_penalty=repetition_penalty)
    image_ids = [str(position) for position in range(len(memory))] if image_ids is None else image_ids
    if len(image_ids) != len(memory):
        raise ValueError(f"{len(image_ids)} image_ids for {len(memory)} images")
    keys = sampling.sample_keys(seed, image_ids, n, memory.device)

    def choose(logits: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        return sampling.draw(logits, ids, keys[rows], temperature, top_k, top_p, repetition_penalty)

    with _decoding(model.text) as text:
        ids = _decode_rows(text, memory, memory_mask, n, steps, choose, prefix_ids)
    return ids.clone()


def beam_search(
    model: nn.Module,
    memory: Tensor,
    *,
    num_beams: int = 10,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    repetition_penalty: float = 1.0,
    memory_mask: Tensor | None = None,
    prefix_ids: Sequence[int] = (),
) -> Tensor:
    """The best of `num_beams` hypotheses by sum of log-probabilities / length ** length_penalty: memory (B, N, D) → ids (B, T).

    `max_length` (20 unless either is given) counts the start token, `max_new_tokens` does not. An image is done when num_beams hypotheses are
    finished and, unless early_stopping, the best running one would not beat the worst of them at its present length. One beam is `greedy`. After
    eos the filling is pad, or eos where pad is 0: `transformers`' choice. Raises ValueError for arguments out of range.
    """
    prefix = len(prefix_ids)
    steps = _steps(max_new_tokens, max_length, 19, prefix)
    _check(memory, num_beams=num_beams, repetition_penalty=repetition_penalty)
    if num_beams == 1:
        return greedy(model, memory, max_new_tokens=steps, repetition_penalty=repetition_penalty, memory_mask=memory_mask, prefix_ids=prefix_ids)
    config = model.text.config
    if 2 * num_beams > config.vocab_size:
        raise ValueError(f"num_beams={num_beams} needs a vocabulary of at least {2 * num_beams}, not {config.vocab_size}")
    batch, device = len(memory), memory.device
    fill = config.pad_token_id or config.eos_token_id
    best = torch.full((batch, 1 + prefix + steps), fill, device=device)  # of every image, also of those that are done
    images = torch.arange(batch, device=device)  # those still searched

    beginning = torch.tensor([config.decoder_start_token_id, *prefix_ids], device=device)
    running = beginning.expand(batch, num_beams, -1)
    running_scores = torch.full((batch, num_beams), IMPOSSIBLE, device=device)
    running_scores[:, 0] = 0  # all beams start alike: only the first may branch
    finished = torch.full((batch, num_beams, 1 + prefix + steps), fill, device=device)
    finished_scores = torch.full((batch, num_beams), IMPOSSIBLE, device=device)
    is_finished = torch.zeros((batch, num_beams), dtype=torch.bool, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)

    with _decoding(model.text) as text:
        cache = BeamCache(text, memory, num_beams, prefix + steps, memory_mask)
        for position in range(prefix):
            cache.step(running[..., position].flatten())
            cache.branch(cache.own_slot.expand(batch, -1))
        for length in range(1, steps + 1):
            logits = cache.step(running[..., -1].flatten()).float()
            scores, parents, tokens = _best_continuations(logits, running, running_scores, repetition_penalty)
            sequences = torch.cat([_take(running, parents), tokens[..., None]], dim=-1)
            ends = tokens == config.eos_token_id if length < steps else torch.ones_like(tokens, dtype=torch.bool)

            ended = ends & (torch.arange(2 * num_beams, device=device) < num_beams)  # the lower half only stands in for beams that end
            candidates = (scores / length**length_penalty).masked_fill(~ended, IMPOSSIBLE)
            finished_scores, kept = torch.cat([finished_scores, candidates], 1).topk(num_beams)
            finished = _take(torch.cat([finished, F.pad(sequences, (0, steps - length), value=fill)], 1), kept)
            is_finished = torch.cat([is_finished, ended], 1).gather(1, kept)

            running_scores, kept = scores.masked_fill(ends, IMPOSSIBLE).topk(num_beams)
            running = _take(sequences, kept)
            cache.branch(parents.gather(1, kept))

            best_possible = running_scores[:, :1] / length**length_penalty
            hopeless = ~(best_possible > torch.where(is_finished, finished_scores[:, -1:], IMPOSSIBLE)).any(1)
            stops = hopeless | is_finished.all(1) if early_stopping else hopeless
            stops = stops & ~done if length < steps else ~done
            best[images[stops]] = finished[stops, 0]
            done = done | stops
            left = _worth_keeping(done)
            if left is None:
                continue
            if not len(left):
                break
            cache.select(left)
            images, done, running, running_scores = images[left], done[left], running[left], running_scores[left]
            finished, finished_scores, is_finished = finished[left], finished_scores[left], is_finished[left]
    ended = best[:, 1 + prefix :] == config.eos_token_id
    lengths = 1 + prefix + torch.where(ended.any(1), ended.int().argmax(1) + 1, steps)
    return best[:, : max(lengths.tolist(), default=1)]


def prepare_for_decoding(model: nn.Module, rows: int | None = None, precision: str = "fp32") -> StepWeights:
    """Arrange the decoder's weights for faster decoding: optional. Do it after loading weights, merging LoRA and moving the model.

    precision fp32 keeps the weights as they are loaded, moved in memory on a CPU; no value, shape or parameter changes (see `decode_weights.lay_out`).
    bf16 and int8 make copies that take the place of the weights in every step until this is called again; auto chooses (see
    `decode_weights.choose_precision`). `rows` is what a step will decode at once, images times beams or samples, where that is known; with 1 and fp32 the
    weights are stored column by column, which safetensors refuses to save. Returns what was made. Raises UserError for int8 where it cannot be had.
    """
    return prepare(model.text, choose_precision(precision, model.text.embedding.weight.device, rows), rows)


@contextmanager
def _decoding(text: T5) -> Iterator[T5]:
    """The decoder in eval mode, without autograd; modes are put back module by module.

    Autocast stays on only where frozen weights are kept in its dtype beside fp32 ones; over fp32 weights it would cast all of them at every step.
    """
    weight = text.embedding.weight
    mixed = torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float32
    autocast = torch.autocast(weight.device.type, torch.get_autocast_dtype(weight.device.type), enabled=mixed)
    modules = list(text.modules())
    modes = [module.training for module in modules]
    text.eval()
    try:
        with torch.inference_mode(), autocast:
            yield text
    finally:
        for module, mode in zip(modules, modes):
            module.training = mode


def _decode_rows(text: T5, memory: Tensor, memory_mask: Tensor | None, n: int, steps: int, choose: Callable, prefix_ids: Sequence[int]) -> Tensor:
    """n independent rows per image, each to its eos; choose(logits (R, V), ids (R, T), rows (R,)) gives the next tokens (R,) → (B, n, T)."""
    config = text.config
    ids = torch.tensor([config.decoder_start_token_id, *prefix_ids], device=memory.device).repeat(len(memory) * n, 1)
    written = F.pad(ids, (0, steps), value=config.pad_token_id)  # of all rows
    rows = torch.arange(len(ids), device=memory.device)  # those still decoded
    finished = torch.zeros(len(ids), dtype=torch.bool, device=memory.device)
    prefix = len(prefix_ids)
    cache = DecoderCache(text, memory, n, prefix + steps, memory_mask)
    for position in range(prefix):
        cache.step(ids[:, position])
    for length in range(1 + prefix, 1 + prefix + steps):
        tokens = choose(cache.step(ids[:, -1]).float(), ids, rows).masked_fill(finished, config.pad_token_id)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        written[rows, length] = tokens
        finished = finished | (tokens == config.eos_token_id)
        left = _worth_keeping(finished.view(-1, n).all(1))
        if left is None:
            continue
        if not len(left):
            break
        cache.select(left)
        ids, rows, finished = (tensor.unflatten(0, (-1, n))[left].flatten(0, 1) for tensor in (ids, rows, finished))
    return written[:, : length + 1].view(len(memory), n, -1)


def _best_continuations(logits: Tensor, running: Tensor, scores: Tensor, repetition_penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """The 2G best next tokens of an image's G beams together: scores, parent beams and tokens, each (B, 2G), best first.

    logits (B*G, V), which are overwritten, running (B, G, T), scores (B, G). The 2G best of each beam are taken before they are normalised, so that
    no (B*G, V) log-probabilities are made.
    """
    batch, beams = scores.shape
    if repetition_penalty != 1.0:  # on log-probabilities, as transformers does in beam search
        log_probs = sampling.penalize_repetition(logits.log_softmax(-1), running.flatten(0, 1), repetition_penalty)
        log_probs, tokens = sampling.topk(log_probs, 2 * beams)
    else:
        top, tokens = sampling.topk(logits, 2 * beams)
        largest = top[:, :1]
        log_probs = top - largest - logits.sub_(largest).exp_().sum(-1, keepdim=True).log()
    log_probs = log_probs.view(batch, beams, -1) + scores[..., None]
    scores, best = log_probs.flatten(1).topk(2 * beams)
    return scores, best // (2 * beams), tokens.view(batch, -1).gather(1, best)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, G, T) at index (B, G') → (B, G', T)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _worth_keeping(done: Tensor) -> Tensor | None:
    """Indices of the images not done, where dropping the others pays for the copy (a quarter of the batch); None to go on with all."""
    count = int(done.sum())
    return None if count == 0 or 4 * count < len(done) else (~done).nonzero()[:, 0]


def _steps(max_new_tokens: int | None, max_length: int | None, default: int, prefix: int) -> int:
    """How many tokens to choose at most, after a start token and a prefix of so many."""
    if max_new_tokens is not None and max_length is not None:
        raise ValueError("give max_new_tokens or max_length, not both")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not at least 1")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} is not at least 2: it counts the start token")
    if max_length is not None and max_length < prefix + 2:
        raise ValueError(f"max_length={max_length} leaves no room after a prefix of {prefix} tokens: it counts them and the start token")
    return default if max_new_tokens is max_length is None else max_new_tokens or max_length - 1 - prefix


def _check(memory: Tensor, **options) -> None:
    """Raise ValueError for the first option out of range."""
    if memory.dim() != 3 or memory.numel() == 0:
        raise ValueError(f"memory has shape {tuple(memory.shape)}, not (images, tokens, width)")
    for name in ("num_beams", "n"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name}={options[name]} is not at least 1")
    for name in ("temperature", "repetition_penalty"):
        if not options.get(name, 1.0) > 0:
            raise ValueError(f"{name}={options[name]} is not above 0")
    if not 0 < options.get("top_p", 1.0) <= 1:
        raise ValueError(f"top_p={options['top_p']} is not in (0, 1]")
    if options.get("top_k") is not None and options["top_k"] < 0:
        raise ValueError(f"top_k={options['top_k']} is negative; 0 or None keeps all tokens")
