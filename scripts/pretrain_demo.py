"""Make the embedded backbones of captioner/demo/ from drawn scenes alone: two tiny CLIPs and a tiny T5.

    python scripts/pretrain_demo.py                                     all three, one after the other
    python scripts/pretrain_demo.py --parts demo,scorer --steps 50      some of them, in fewer steps

Training scenes are those of the split train behind the ones that a captioner trains on, so a held-out (colour, shape) pair never occurs.
The CLIPs (arXiv 2103.00020) learn from batches in which every scene comes with a twin that differs in one thing, a hard negative in both directions (in the spirit
of arXiv 2210.01936). The T5 (arXiv 1910.10683) sees no picture: it turns plain descriptions into captions, answers questions about them, and restores
words left out of captions.

Legend: B scenes, C captions of each, T text tokens, E embedding width.
"""

import collections
import dataclasses
import gzip
import itertools
import math
import random
import re
import sys
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioner import cli
from captioner.cli import say, setting

import torch  # noqa: I001
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from torch import Tensor, nn

from captioner import demo, generate, weights
from captioner.backbones import build_text
from captioner.clip_score import PROMPT, load_scorer
from captioner.errors import UserError
from captioner.files import replacing, save_tensors, write_json, write_text
from captioner.runtime import choose_device
from captioner.t5 import T5, T5Config
from captioner.tokenizer import Tokenizer, train_tokenizer
from captioner.vit import clip_config
from data.scene_facts import judge
from data.scene_language import captions, describe
from data.scene_questions import questions
from data.scenes import BACKGROUND_COLOURS, BACKGROUND_KINDS, COLOURS, SHAPES, SPLITS, Scene, draw, make_scene
from data.transforms import ImageTransform

CLIP_NAME, TEXT_NAME = "ViT-Tiny-Scenes", "t5-tiny-scenes"
TEXT_SIZES = dict(d_model=128, d_kv=32, d_ff=384, num_layers=3, num_decoder_layers=3, num_heads=4, dropout_rate=0.0)
PIECES = 400
PARTS = ("demo", "scorer", "text")
FIRST_SCENE = SPLITS["train"]
TEST_SCENES = 500


@dataclass
class Settings:
    """Every setting of the pretraining; each field is one flag."""

    parts: tuple[str, ...] = setting(PARTS, "what to make: the CLIP that captions and reranks, the one that scores, the T5", PARTS)
    steps: int | None = setting(None, "optimiser steps of each part, instead of its own number")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    output: str = setting(str(demo.FOLDER), "folder for the files")


# Each part sees scenes of its own (make_scene's seed) and starts from weights of its own.
RECIPES = {
    "demo": dict(seed=1, steps=2400, batch=64, lr=1e-3, weight_decay=0.1),
    "scorer": dict(seed=2, steps=1500, batch=64, lr=1e-3, weight_decay=0.1),
    "text": dict(seed=3, steps=3000, batch=48, lr=2e-3, weight_decay=0.01),
}


# ---- scenes and twins ------------------------------------------------------------------------------------


def training_scenes(seed: int) -> Iterable[Scene]:
    """Endless scenes without held-out pairs, none of which a captioner trains on."""
    return (make_scene("train", index, seed) for index in itertools.count(FIRST_SCENE))


def twin(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one thing changed: a colour, a shape, a size, two colours swapped, left and right or up and down mirrored, or the background."""
    while True:
        changed = rng.choice(CHANGES)(scene, rng)
        if changed is not None and not changed.held_out and not hidden_colours(changed) & {item.colour for item in changed.objects}:
            return changed


def hidden_colours(scene: Scene) -> set[str]:
    """Colours too close to the background for an object."""
    background = scene.background
    own = {background.colour, *BACKGROUND_COLOURS[background.colour][1]} if background.colour else set()
    return own | set(BACKGROUND_KINDS[background.kind].hides)


def replace_object(scene: Scene, index: int, **changes) -> Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **changes)
    return dataclasses.replace(scene, objects=tuple(objects))


def recolour(scene: Scene, rng: random.Random) -> Scene:
    index = rng.randrange(len(scene.objects))
    colour = rng.choice([name for name in COLOURS if name != scene.objects[index].colour])
    return replace_object(scene, index, colour=colour, tint=COLOURS[colour])


def reshape(scene: Scene, rng: random.Random) -> Scene:
    index = rng.randrange(len(scene.objects))
    return replace_object(scene, index, shape=rng.choice([name for name in SHAPES if name != scene.objects[index].shape]))


def shrink(scene: Scene, rng: random.Random) -> Scene | None:
    large = [index for index, item in enumerate(scene.objects) if item.size == "large"]
    return replace_object(scene, rng.choice(large), size="small", radius=round(rng.uniform(0.08, 0.1), 4)) if large else None


def swap_colours(scene: Scene, rng: random.Random) -> Scene | None:
    if len(scene.objects) < 2:
        return None
    first, second = rng.sample(range(len(scene.objects)), 2)
    a, b = scene.objects[first], scene.objects[second]
    if a.colour == b.colour:
        return None
    return replace_object(replace_object(scene, first, colour=b.colour, tint=b.tint), second, colour=a.colour, tint=a.tint)


def mirror(scene: Scene, rng: random.Random) -> Scene:
    axis = rng.choice("xy")
    objects = tuple(dataclasses.replace(item, **{axis: round(1 - getattr(item, axis), 4)}) for item in scene.objects)
    return dataclasses.replace(scene, objects=objects)


def other_background(scene: Scene, rng: random.Random) -> Scene:
    return dataclasses.replace(scene, background=make_scene("train", rng.randrange(2**30), seed=0).background)


CHANGES = (recolour, recolour, reshape, reshape, shrink, swap_colours, swap_colours, mirror, mirror, other_background)


# ---- training --------------------------------------------------------------------------------------------


def fit(model: nn.Module, loss_of_step: Callable[[int], Tensor], recipe: dict, name: str) -> float:
    """AdamW with a short warm-up and a cosine; returns the seconds taken. Raises UserError at the first loss that is not finite."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    started, steps, window = time.perf_counter(), recipe["steps"], collections.deque(maxlen=50)
    warmup = max(1, steps // 20)
    model.train()
    for step in range(steps):
        lr = recipe["lr"] * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window.append(loss.item())
        if not math.isfinite(window[-1]):
            raise UserError(f"{name}: non-finite loss at step {step + 1}")
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            say(f"{name}: step {step + 1}/{steps}, loss {sum(window) / len(window):.4f}, {seconds:.0f} s, {seconds / (step + 1) * (steps - step - 1):.0f} s left")
    model.eval()
    return time.perf_counter() - started


# ---- CLIP ------------------------------------------------------------------------------------------------


def learn_merges(texts: Iterable[str], limit: int) -> list[tuple[str, str]]:
    """Byte-pair merges in the order learned (arXiv 1508.07909), until every word is one token or `limit` merges are there."""
    symbols = bytes_to_unicode()
    counts = collections.Counter(word for text in texts for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()))
    words = {word: [symbols[byte] for byte in word.encode()] for word in counts}
    for letters in words.values():
        letters[-1] += "</w>"
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs = collections.Counter()
        for word, letters in words.items():
            for pair in itertools.pairwise(letters):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        for letters in words.values():
            index = 0
            while index < len(letters) - 1:
                if (letters[index], letters[index + 1]) == best:
                    letters[index : index + 2] = ["".join(best)]
                index += 1
    return merges


def write_merges(path: Path, vocab_size: int) -> None:
    """The merges file that open_clip's SimpleTokenizer reads; the same texts give the same bytes."""
    rng = random.Random("merges")
    texts = [text for scene in itertools.islice(training_scenes(0), 4000) for text in captions(scene, rng)]
    merges = learn_merges([*texts, PROMPT], vocab_size - 2 * 256 - 2)
    with replacing(path) as temporary, open(temporary, "wb") as file, gzip.GzipFile("", "wb", mtime=0, fileobj=file) as packed:
        packed.write("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]).encode())


def embed_texts(model: CLIP, tokens: Tensor) -> Tensor:
    """`CLIP.encode_text` without the padding behind the longest text: tokens (B, 77) → unit vectors (B, E)."""
    ends = tokens.argmax(-1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(x), device=x.device), ends] @ model.text_projection, dim=-1)


def pretrain_clip(tag: str, recipe: dict, output: Path, device: torch.device) -> None:
    """Train one CLIP and write it in open_clip's names, in bf16, with its recipe and scores in the file's header."""
    torch.manual_seed(recipe["seed"])
    model = CLIP(**clip_config(CLIP_NAME)).to(device)
    tokenize = SimpleTokenizer(str(demo.MERGES))
    transform = ImageTransform(model.visual.image_size[0])
    scenes, rng, captions_each = iter(training_scenes(recipe["seed"])), random.Random(recipe["seed"]), 2

    def loss_of_step(step: int) -> Tensor:
        pairs = [(scene, twin(scene, rng)) for scene in itertools.islice(scenes, recipe["batch"] // 2)]
        batch = [scene for pair in pairs for scene in pair]
        texts = [captions(scene, rng, captions_each) for scene in batch]
        images = torch.stack([transform(draw(scene, transform.image_size)) for scene in batch]).to(device)
        image_embeddings = F.normalize(model.encode_image(images), dim=-1)  # (B, E)
        prompted = [PROMPT + texts[b][c] if rng.random() < 0.5 else texts[b][c] for c in range(captions_each) for b in range(len(batch))]
        text_embeddings = embed_texts(model, tokenize(prompted).to(device)).unflatten(0, (captions_each, len(batch)))  # (C, B, E)
        logits = model.logit_scale.clamp(max=math.log(100)).exp() * torch.einsum("ie,cte->cit", image_embeddings, text_embeddings)
        # A caption that is true of the twin as well is no negative for it.
        fits = [[judge(texts[b][c], batch[b ^ 1]).false == 0 for b in range(len(batch))] for c in range(captions_each)]
        excluded = torch.zeros_like(logits, dtype=torch.bool)
        c, t = torch.tensor(fits, device=device).nonzero(as_tuple=True)
        excluded[c, t ^ 1, t] = True
        logits = logits.masked_fill(excluded, -torch.inf)
        target = torch.arange(len(batch), device=device).expand(captions_each, -1)
        return (F.cross_entropy(logits.mT, target) + F.cross_entropy(logits, target)) / 2

    seconds = fit(model, loss_of_step, recipe, tag)
    path = output / demo.CLIP_WEIGHTS[CLIP_NAME][tag].name
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_tensors(path, state)
    save_tensors(path, state, header(recipe, seconds, clip_scores(f"{CLIP_NAME}:{path}", device)))


def header(recipe: dict, seconds: float, scores: dict[str, float]) -> dict[str, str]:
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in (recipe | scores | {"seconds": round(seconds)}).items()}


def test_sets() -> dict[str, list[Scene]]:
    """Scenes that no part was trained on: of known (colour, shape) pairs, and with a held-out one."""
    held_out = (make_scene("val", index) for index in range(1, 2 * TEST_SCENES, 2))
    return {"known pairs": [make_scene("train", index, seed=99) for index in range(TEST_SCENES)], "held-out pairs": list(held_out)}


@torch.inference_mode()
def clip_scores(spec: str, device: torch.device) -> dict[str, float]:
    """Top-1 retrieval among 500 scenes in both directions, and how often a caption lies nearer to its scene than to the scene's twin, where it is false."""
    scorer, scores = load_scorer(spec, device), {}
    for name, scenes in test_sets().items():
        rng = random.Random(0)
        texts = [captions(scene, rng, 1)[0] for scene in scenes]
        twins = [twin(scene, rng) if not scene.held_out else mirror(scene, rng) for scene in scenes]

        def embed(pictures: list[Scene]) -> Tensor:
            return scorer.embed_images(torch.stack([scorer.transform(draw(scene, scorer.transform.image_size)) for scene in pictures]))

        images, sentences, others = embed(scenes), scorer.embed_texts(texts, PROMPT), embed(twins)
        right = torch.arange(len(scenes))
        similarity = sentences @ images.T
        scores[f"text to image, {name}"] = (similarity.argmax(1) == right).double().mean().item()
        scores[f"image to text, {name}"] = (similarity.argmax(0) == right).double().mean().item()
        false = torch.tensor([judge(text, other).false > 0 for text, other in zip(texts, twins, strict=True)])
        nearer = (sentences * images).sum(-1) > (sentences * others).sum(-1)
        scores[f"true picture before its twin, {name}"] = nearer[false].double().mean().item()
    return scores


# ---- T5 --------------------------------------------------------------------------------------------------


def text_pair(scene: Scene, rng: random.Random, kind: str) -> tuple[str, str]:
    """(input, output) of one kind of task."""
    if kind == "caption":
        return f"caption: {describe(scene, rng)}", captions(scene, rng, 1)[0]
    if kind == "question":
        question, answer = questions(scene, rng, 1)[0]
        return f"question: {question} scene: {describe(scene, rng)}", answer
    words = captions(scene, rng, 1)[0].split()
    left_out, outputs, inputs, spans = [rng.random() < 0.3 for _ in words], [], [], 0
    for index, (word, out) in enumerate(zip(words, left_out, strict=True)):
        if out and (index == 0 or not left_out[index - 1]):
            inputs.append(f"<extra_id_{spans}>")
            outputs.append(f"<extra_id_{spans}>")
            spans += 1
        (outputs if out else inputs).append(word)
    return f"fill: {' '.join(inputs)}", " ".join([*outputs, f"<extra_id_{spans}>"])


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of ids → (B, T)."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def batch_of(pairs: list[tuple[str, str]], vocabulary: Tokenizer, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """input ids (B, T_in), their mask, and labels (B, T) padded with -100."""
    inputs = pad(vocabulary.encode([source for source, _ in pairs]), vocabulary.pad_id).to(device)
    return inputs, inputs != vocabulary.pad_id, pad(vocabulary.encode([target for _, target in pairs]), -100).to(device)


def learn_vocabulary(path: Path) -> Tokenizer:
    """Pieces of the scenes' language as a unigram model, the kind that T5 has, so that transformers reads it too.

    sentencepiece's own unigram trainer finds too few pieces in a grammar of a hundred words; so pieces are learned by byte-pair merges and then get the
    logarithms of their frequencies as scores.
    """
    from sentencepiece import sentencepiece_model_pb2

    rng = random.Random("vocabulary")
    scenes = itertools.islice(training_scenes(0), 4000)
    texts = [text for scene in scenes for kind in ("caption", "question") for text in text_pair(scene, rng, kind)]
    learned = train_tokenizer([*texts, "fill:"], path, PIECES)
    used = collections.Counter(piece for row in learned.encode(texts) for piece in row)
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    total = sum(used.values())
    for index, piece in enumerate(model.pieces):
        if piece.type == piece.NORMAL:
            piece.score = math.log((used[index] + 0.01) / total)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return Tokenizer(path)


def pretrain_text(recipe: dict, output: Path, device: torch.device) -> None:
    """Train the T5 and write it as a Hugging Face directory, in bf16."""
    torch.manual_seed(recipe["seed"])
    folder = output / TEXT_NAME
    vocabulary = learn_vocabulary(folder / "spiece.model")
    model = T5(T5Config(vocab_size=len(vocabulary), **TEXT_SIZES)).to(device)
    scenes, rng = iter(training_scenes(recipe["seed"])), random.Random(recipe["seed"])

    def loss_of_step(step: int) -> Tensor:
        kinds = rng.choices(("caption", "question", "fill"), weights=(2, 1, 1), k=recipe["batch"])
        pairs = [text_pair(scene, rng, kind) for kind, scene in zip(kinds, scenes)]
        inputs, mask, labels = batch_of(pairs, vocabulary, device)
        return F.cross_entropy(model(inputs, labels, mask).flatten(0, 1), labels.flatten(), ignore_index=-100)

    seconds = fit(model, loss_of_step, recipe, "text")
    write_json(folder / "config.json", {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], **dataclasses.asdict(model.config)})
    state = {name: tensor.bfloat16() for name, tensor in weights.t5_to_hf(model.state_dict(), model.config).items()}
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    scores = text_scores(build_text(str(folder)), device)
    save_tensors(folder / "model.safetensors", state, {"format": "pt"} | header(recipe, seconds, scores))


@torch.inference_mode()
def text_scores(backbone, device: torch.device) -> dict[str, float]:
    """Perplexity per token of captions after a description, and the share of questions whose greedy answer is right."""
    model, vocabulary, scores = backbone.module.to(device), backbone.tokenizer, {}
    for name, scenes in test_sets().items():
        rng = random.Random(0)
        inputs, mask, labels = batch_of([text_pair(scene, rng, "caption") for scene in scenes], vocabulary, device)
        loss = F.cross_entropy(model(inputs, labels, mask).flatten(0, 1), labels.flatten(), ignore_index=-100)
        scores[f"perplexity of captions, {name}"] = loss.exp().item()
        pairs = [text_pair(scene, rng, "question") for scene in scenes]
        inputs, mask, _ = batch_of(pairs, vocabulary, device)
        ids = generate.greedy(types.SimpleNamespace(text=model), model.encode(inputs, mask), memory_mask=mask)
        answers = vocabulary.decode(ids)
        scores[f"questions answered right, {name}"] = sum(answer == right for answer, (_, right) in zip(answers, pairs, strict=True)) / len(pairs)
    return scores


# ---- card ------------------------------------------------------------------------------------------------


def write_card(output: Path) -> None:
    """card.md from the headers of the files that are there."""
    from safetensors import safe_open

    files = {path: path.stem for path in sorted(output.glob(f"{CLIP_NAME}.*.safetensors"))} | {output / TEXT_NAME / "model.safetensors": TEXT_NAME}
    lines = [
        "# The embedded backbones",
        "",
        "Made by `python scripts/pretrain_demo.py` from `data/scenes.py` alone, which also wrote this page. bf16, loaded as fp32. Seconds are wall time beside other work. Measured after rounding, on "
        f"{TEST_SCENES} scenes of (colour, shape) pairs seen in training and on {TEST_SCENES} with a pair that was never seen. Chance of a retrieval is {1 / TEST_SCENES:.1%}.",
    ]
    for path, name in files.items():
        if path.is_file():
            with safe_open(path, "pt") as file:
                facts = {key: value for key, value in sorted((file.metadata() or {}).items()) if key != "format"}
            lines += ["", f"## {name}", "", f"{path.stat().st_size / 1e6:.2f} MB", "", "| | |", "| --- | --- |", *(f"| {key} | {facts[key]} |" for key in facts)]
    write_text(output / "card.md", "\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    cli.require_positive(settings, "steps")
    device, output = choose_device(settings.device), Path(settings.output)
    for part in settings.parts:
        recipe = RECIPES[part] | ({"steps": settings.steps} if settings.steps else {})
        recipe["threads"] = f"{torch.get_num_threads()} on {device}"
        if part == "text":
            pretrain_text(recipe, output, device)
        else:
            if not demo.MERGES.is_file():
                write_merges(demo.MERGES, clip_config(CLIP_NAME)["text_cfg"]["vocab_size"])
            pretrain_clip(part, recipe, output, device)
        write_card(output)
    return cli.DONE


if __name__ == "__main__":
    cli.run_command(main)
