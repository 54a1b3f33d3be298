"""CLIPScore and RefCLIPScore (Hessel et al., 2021, https://arxiv.org/abs/2104.08718), and the plain cosine, through open_clip's models.

    CLIPScore    = 2.5 * max(cos(caption, image), 0)                 texts prompted with "A photo depicts "
    RefCLIPScore = harmonic mean of CLIPScore and max(max_r cos(caption, reference r), 0), prompted likewise
    CLIP_cosine  = cos(caption, image)                               no prompt, no clamp: some tables call it CLIP score

Behaviour matched: jmhessel/clipscore, in float32. A number means something only together with its scorer, so every result names it.
Legend: N images, n candidates an image, B images of a batch, E embedding width, T text tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from captioner.backbones import clip_weights
from captioner.demo import CLIPS
from captioner.errors import UserError
from captioner.job import Job
from captioner.vit import clip_config
from captioner.weights import fingerprint, load_into, one_line
from data.bad_images import BadImageLedger
from data.dataset import CaptionDataset, make_loader
from data.rows import Row
from data.transforms import ImageTransform

PROMPT = "A photo depicts "
SCALE = 2.5
TEXT_BATCH = 256
# Integers that OpenAI's archives carry beside the weights.
ARCHIVE_FACTS = ("input_resolution", "context_length", "vocab_size")


class ClipScorer:
    """A whole CLIP that embeds images and texts, in float32; it remembers the texts that it has seen.

    name: as the user gave it, NAME[:WEIGHTS]. weights_hash: `captioner.weights.fingerprint` of the model.
    transform: PIL image -> what `embed_images` takes. model, tokenizer: open_clip's.
    """

    def __init__(self, name: str, model: nn.Module, tokenizer: Callable, transform: ImageTransform, device: torch.device | str = "cpu"):
        self.name, self.tokenizer, self.transform, self.device = name, tokenizer, transform, torch.device(device)
        self.weights_hash = fingerprint(model)
        self.model = model.float().eval().to(self.device)
        self.text_embeddings: dict[str, Tensor] = {}  # (E,) by text, prompt included
        self.cut: set[str] = set()  # texts without their prompt, so that a caption counts once

    @property
    def truncated(self) -> int:
        """Distinct texts so far that were longer than the model's context; their end token is kept."""
        return len(self.cut)

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) of `transform` -> (B, E) unit vectors, float32, on the CPU."""
        return self.model.encode_image(pixel_values.to(self.device), normalize=True).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], prompt: str = "") -> Tensor:
        """Texts, each with the prompt before it -> (len(texts), E) unit vectors, float32, on the CPU; a distinct text is encoded once."""
        new = [text for text in dict.fromkeys(texts) if prompt + text not in self.text_embeddings]
        if new:
            prompted = [prompt + text for text in new]
            ids = self.tokenizer(prompted)  # (len(new), T)
            self.cut.update(text for text, cut in zip(new, _is_cut(self.tokenizer, prompted, ids), strict=True) if cut)
            lengths = _seen_lengths(self.model, ids)
            # Texts of like length go together, so that little of a batch is padding.
            for batch in lengths.argsort(stable=True).split(TEXT_BATCH):
                seen = ids[batch, : int(lengths[batch].max())].to(self.device)
                embeddings = _encode_text(self.model, seen).cpu()  # (B, E)
                self.text_embeddings.update(zip((prompted[index] for index in batch.tolist()), embeddings, strict=True))
        return torch.stack([self.text_embeddings[prompt + text] for text in texts]) if texts else torch.empty(0, 0)


def _is_cut(tokenizer: Callable, texts: list[str], ids: Tensor) -> list[bool]:
    """Whether each text has more tokens, its end token included, than its row of ids (B, T) shows."""
    hugging_face = getattr(tokenizer, "tokenizer", None)
    # SimpleTokenizer pads with 0, which is also the token "!"; but a row that is full ends in the end token.
    pad = 0 if hugging_face is None else hugging_face.pad_token_id
    # Padding may be the end token, so a row that lacks one token may be full. Only full rows can be cut.
    cut = ids[:, -1] != 0 if hugging_face is None else (ids != pad).sum(dim=1) >= ids.shape[1] - 1
    if cut.any():
        longer = tokenizer([texts[index] for index in cut.nonzero()[:, 0].tolist()], context_length=ids.shape[1] + 1)
        cut[cut.clone()] = longer[:, -1] != 0 if hugging_face is None else (longer != pad).sum(dim=1) > (ids[cut] != pad).sum(dim=1)
    return cut.tolist()


class _TextTower(nn.Module):
    """`encode_text` as a forward pass, which is what `torch.func.functional_call` can run."""

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, ids: Tensor) -> Tensor:
        return self.clip.encode_text(ids, normalize=True)


def _ignores_padding(model: nn.Module) -> bool:
    """Whether the text tower is causal and pools where the id is highest (CLIP's own): it does not see what is behind."""
    return getattr(model, "text_pool_type", None) == "argmax" and model.attn_mask is not None


def _seen_lengths(model: nn.Module, ids: Tensor) -> Tensor:
    """How many places of each row of ids (B, T) its embedding depends on: (B,). Most captions fill a fifth of the context."""
    return ids.argmax(dim=1) + 1 if _ignores_padding(model) else torch.full((len(ids),), ids.shape[1])


def _encode_text(model: nn.Module, ids: Tensor) -> Tensor:
    """open_clip's `encode_text` of ids (B, T) -> (B, E) unit vectors; T may be less than the context where the tower ignores padding."""
    if not _ignores_padding(model):
        return model.encode_text(ids, normalize=True)
    length = ids.shape[1]
    parts = {"clip.positional_embedding": model.positional_embedding[:length], "clip.attn_mask": model.attn_mask[:length, :length]}
    return torch.func.functional_call(_TextTower(model), parts, (ids,))


def load_scorer(spec: str, device: torch.device | str) -> ClipScorer:
    """The CLIP of `NAME[:WEIGHTS]`, on the device, in float32.

    NAME: an open_clip architecture, or a row of `captioner.demo.CLIPS`. WEIGHTS: a tag, or a local safetensors file or directory with the keys of
    open_clip; without it the weights are random, always the same for a name.
    Raises UserError for unknown names and tags, pickles, damaged files, files that do not fit, and vocabularies that cannot be had.
    """
    name, _, weights = spec.partition(":")
    if spec.endswith(":"):
        raise UserError(f"{spec!r} ends in a colon: write NAME or NAME:WEIGHTS")
    if name.startswith("timm/"):
        raise UserError(f"{name} has no text tower: a scorer is a whole CLIP of open_clip, such as ViT-B-32:openai")
    name = name.replace("/", "-")
    config = clip_config(name)
    # The weights come first: a wrong path is told before the model is built.
    state, preprocess, source = clip_weights(name, weights) if weights else ({}, {}, "")
    model = _build(name, config)
    if weights:
        load_into(model, _for_model(state, model), None, source)
    size = model.visual.image_size
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"{name} takes images of {size} pixels; only square ones are supported")
    return ClipScorer(spec, model, _tokenizer(name, config["text_cfg"]), ImageTransform(sides.pop(), **preprocess), device)


def _build(name: str, config: dict) -> nn.Module:
    """The open_clip model of a config, as `open_clip.create_model` chooses its class; random weights, the same at every call."""
    import open_clip

    config = {**config, "vision_cfg": dict(config["vision_cfg"]), "text_cfg": dict(config["text_cfg"])}
    # Towers that other libraries build would fetch their own weights first.
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    has_hf_text = "hf_model_name" in config["text_cfg"]
    if has_hf_text:
        config["text_cfg"]["hf_model_pretrained"] = False
    custom_text = config.pop("custom_text", False) or has_hf_text
    model_class = (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP) if custom_text else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return model_class(**config)
        except Exception as error:  # transformers and the hub raise their own types for a config that cannot be had
            if not has_hf_text:
                raise
            source = config["text_cfg"]["hf_model_name"]
            raise UserError(f"cannot build {name}: its text tower needs the config of {source} ({one_line(error)})") from error


def _for_model(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """An open_clip checkpoint under the names of `model`: an old layout of the text tower, OpenAI's integers and a scalar's shape are allowed for."""
    from open_clip.model import convert_to_custom_text_state_dict

    state = {key: tensor for key, tensor in state.items() if key not in ARCHIVE_FACTS}
    if hasattr(model, "text"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)
    return state


def _tokenizer(name: str, text_cfg: dict) -> Callable:
    """open_clip's tokenizer of an architecture: texts -> (B, T) ids."""
    import open_clip

    if name in CLIPS:
        return open_clip.SimpleTokenizer(context_length=text_cfg.get("context_length", 77), **text_cfg.get("tokenizer_kwargs") or {})
    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # transformers and the hub raise their own types
        source = text_cfg.get("hf_tokenizer_name") or "its vocabulary"
        raise UserError(f"cannot get the tokenizer of {name} ({source}): {one_line(error)}") from error


def same_model(a: ClipScorer, b: ClipScorer) -> bool:
    """Whether two scorers have equal weights, whatever they are called: one then scores what the other chose."""
    return a.weights_hash == b.weights_hash


def embed_split(
    scorer: ClipScorer,
    rows: Sequence[Row],
    ledger: BadImageLedger,
    batch_size: int = 64,
    workers: int = 0,
    job: Job | None = None,
) -> dict[str, Tensor]:
    """Row id -> (E,) image embedding. Each image is opened once; bad ones go to the ledger and are left out.

    Batches are dealt to the processes of the job; each gets all embeddings. Raises Stopped, in all of them, where a signal came.
    """
    job = job or Job()
    dataset, processes = CaptionDataset(rows, scorer.transform), job.processes
    loader = make_loader(dataset, None, batch_size, range(len(dataset)), workers, ledger=ledger, share=(processes.rank, processes.count))
    ids, embeddings = [], []
    with job.one_ledger(ledger, rows):
        for batch in job.turns(loader, f"embedding {len(rows)} images for {scorer.name}"):
            if batch is not None:
                ids += batch["ids"]
                embeddings.append(scorer.embed_images(batch["pixel_values"]))
    ids = [row_id for part in processes.everyone(ids) for row_id in part]
    return dict(zip(ids, processes.everyone_rows(torch.cat(embeddings) if embeddings else torch.empty(0)), strict=True))


def score_captions(
    scorer: ClipScorer, image_embeddings: Tensor, captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float | str | int], list[dict[str, float]]]:
    """Scores of one caption an image: (N, E) embeddings, N captions, N lists of references.

    Returns the corpus values {"CLIPScore", "CLIP_cosine", "RefCLIPScore"} (means), with "scorer" (its name) and "truncated" (its count so far), and N
    dicts with the three. Raises ValueError where the lengths differ, nothing is to be scored, or an item has no references.
    """
    if not len(image_embeddings) == len(captions) == len(references):
        raise ValueError(f"{len(image_embeddings)} images, {len(captions)} captions and {len(references)} lists of references")
    if not captions:
        raise ValueError("no captions to score")
    counts = [len(texts) for texts in references]
    if not all(counts):
        raise ValueError(f"item {counts.index(0)} has no references")
    caption_embeddings = scorer.embed_texts(captions, PROMPT)  # (N, E)
    clip_score = _clip_score(image_embeddings, caption_embeddings)  # (N,)
    cosine = _cosine(image_embeddings, scorer.embed_texts(captions))  # (N,)
    reference_embeddings = scorer.embed_texts([text for texts in references for text in texts], PROMPT)  # (R, E), R references in all
    item = torch.arange(len(captions)).repeat_interleave(torch.tensor(counts))  # (R,) which caption a reference belongs to
    # Zeros to begin with are the formula's clamp.
    best = torch.zeros(len(captions)).scatter_reduce(0, item, _cosine(caption_embeddings[item], reference_embeddings), "amax")  # (N,)
    total = clip_score + best
    ref_clip_score = torch.where(total > 0, 2 * clip_score * best / total.where(total > 0, 1), 0)  # (N,)
    values = {"CLIPScore": clip_score, "CLIP_cosine": cosine, "RefCLIPScore": ref_clip_score}
    corpus = {name: value.double().mean().item() for name, value in values.items()}
    items = [dict(zip(values, row)) for row in torch.stack(list(values.values()), dim=1).tolist()]
    return {**corpus, "scorer": scorer.name, "truncated": scorer.truncated}, items


def score_candidates(scorer: ClipScorer, image_embeddings: Tensor, candidates: Sequence[Sequence[str]]) -> Tensor:
    """CLIPScores (N, n) of n candidates for each of N images, (N, E) embeddings. Equal captions are encoded once; of one image they score the same.

    Raises ValueError where the lengths differ.
    """
    lengths = {len(texts) for texts in candidates}
    if len(image_embeddings) != len(candidates) or len(lengths) != 1:
        raise ValueError(f"{len(image_embeddings)} images need as many lists, all of one length, not {len(candidates)} of {sorted(lengths)}")
    n = lengths.pop()
    embeddings = scorer.embed_texts([text for texts in candidates for text in texts], PROMPT)  # (N * n, E)
    return _clip_score(image_embeddings[:, None], embeddings.view(len(candidates), n, -1))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of unit vectors: (..., E), (..., E) -> (...)."""
    return (a * b).sum(dim=-1)


def _clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Of unit vectors: (..., E), (..., E) -> (...)."""
    return SCALE * _cosine(images, texts).clamp(min=0)
