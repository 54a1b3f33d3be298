"""Make a run directory of a GCC-caption-lora checkpoint, which captioner.load, evaluate.py and best_of_n.py then use like any other.

    python scripts/import_gcc_checkpoint.py outputs/NAME/checkpoint-5088 --tokenizer google/flan-t5-base
    python scripts/import_gcc_checkpoint.py model.safetensors --tokenizer spiece.model --output runs/gcc --data dataset

Source of the layout: https://github.com/DaehanKim/GCC-caption-lora. Its state dict has `vision_model.*` (a CLIP image tower under Hugging Face's names),
`bridge_proj.*` and `text_model.*` (T5ForConditionalGeneration), where an adapted layer is `.base_layer.weight`, `.lora_a.weight` (R, in) and
`.lora_b.weight` (out, R) with the scaling alpha / sqrt(R). The checkpoint has no config: T5's sizes follow from the shapes, and what no shape shows is
as in every published T5 (128 as the furthest distance, 1e-6 in the norms, pad 0, eos 1). The run holds both backbones and the LoRA apart from them.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from captioner import cli
from captioner.cli import say, setting
from captioner.errors import UsageError, UserError
from captioner.files import write_json

import torch  # noqa: I001
from torch import Tensor, nn

import lora
from captioner import checkpoint, weights
from captioner.backbones import Backbone, TextBackbone, check_vocabulary, load_t5, load_vit
from captioner.demo import TEXTS
from captioner.model import Captioner
from captioner.runtime import versions
from captioner.tokenizer import FILE_NAME, Tokenizer
from captioner.vit import VisionConfig, VisionTransformer
from data.transforms import ImageTransform
from lora.inject import places_of, replace_linears

PARTS = ("vision_model", "bridge_proj", "text_model")
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # names of one tensor
LAYER = ("base_layer.weight", "lora_a.weight", "lora_b.weight")
DROPOUT = 0.1  # of GCC's LoRA layers; only further training would use it


@dataclass
class Settings:
    """Every setting of the import; each field is one flag."""

    checkpoint: str | None = setting(None, "model.safetensors, its index, or the directory with either")
    tokenizer: str | None = setting(None, "vocabulary: spiece.model, a T5 directory with one, or a Hugging Face repository (google/flan-t5-base)")
    vision: str = setting("ViT-B-16-quickgelu", "architecture of the image encoder; its weights come from the checkpoint")
    alpha: float = setting(8.0, "of the LoRA scaling alpha / sqrt(rank); the rank follows from the shapes")
    data: str = setting("dataset", "data folder that evaluate.py and best_of_n.py read where they are given none")
    output: str | None = setting(None, "run directory (default: runs/gcc-TIME)")
    json: str | None = setting(None, "write what was imported to this file, or - for stdout")

    positional = ("checkpoint",)


def by_part(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """The state dict of each of PARTS without LoRA, under the donor's names, and by adapted module (`text_model.decoder.…`) its tensors of LAYER.

    Raises UserError with both lists where a part or a third of an adapted layer is missing, or a key belongs to none.
    """
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    layers: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in state.items():
        part, _, name = key.partition(".")
        found = re.fullmatch(r"(.+)\.(base_layer\.(weight|bias)|lora_[ab]\.weight)", name)
        module, _, last = key.rpartition(".")
        if part not in parts or f"{module}.base_layer.{last}" in state:
            unexpected.append(key)
            continue
        if found and found[2] in LAYER:
            layers.setdefault(f"{part}.{found[1]}", {})[found[2]] = tensor
        if found is None:
            parts[part][name] = tensor
        elif found[3]:
            parts[part][f"{found[1]}.{found[3]}"] = tensor
    missing = [f"{part}.*" for part in PARTS if not parts[part]]
    missing += [f"{name}.{third}" for name, layer in layers.items() for third in LAYER if third not in layer]
    if not layers:
        missing.append("text_model.*.lora_a.weight")
    if missing or unexpected:
        raise not_gcc(source, missing, unexpected)
    return parts, layers


def not_gcc(source: str, missing: Iterable[str], unexpected: Iterable[str]) -> UserError:
    return UserError(f"{source} is not a checkpoint of GCC-caption-lora: {weights.both_lists(missing, unexpected)}")


def t5_values(state: Mapping[str, Tensor], source: str) -> dict:
    """The values of config.json that T5's shapes show; a checkpoint without lm_head.weight is one whose head is the embedding (and scales, as v1.0 does)."""
    attention = "decoder.block.0.layer.0.SelfAttention"
    mlp = "decoder.block.0.layer.2.DenseReluDense"
    gated = f"{mlp}.wi_0.weight" in state
    names = (
        next((name for name in EMBEDDINGS if name in state), EMBEDDINGS[0]),
        f"{attention}.relative_attention_bias.weight", f"{attention}.q.weight", f"{mlp}.wi{'_0' if gated else ''}.weight",
    )  # fmt: skip
    missing = [f"text_model.{name}" for name in names if name not in state]
    wrong = [f"text_model.{name} of shape {list(state[name].shape)}" for name in names if name in state and (state[name].ndim != 2 or 0 in state[name].shape)]
    if missing or wrong:
        raise not_gcc(source, missing, wrong)
    embedding, bias, query, wide = (state[name] for name in names)
    # A number that is left out is missed when the weights are loaded.
    layers = {stack: len({found[1] for name in state if (found := re.match(rf"{stack}\.block\.(\d+)\.", name))}) for stack in ("encoder", "decoder")}
    return {
        "vocab_size": embedding.shape[0],
        "d_model": embedding.shape[1],
        "num_heads": bias.shape[1],
        "relative_attention_num_buckets": bias.shape[0],
        "d_kv": query.shape[0] // bias.shape[1],
        "d_ff": wide.shape[0],
        "num_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": weights.same_tensor(state.get("lm_head.weight", embedding), embedding),
    }


def load_vision(name: str, state: dict[str, Tensor], source: str) -> VisionTransformer:
    """The tower of an architecture at the image size of the checkpoint's position table."""
    config = VisionConfig.from_name(name)
    for key, table in state.items():
        if key.endswith("embeddings.position_embedding.weight") and table.ndim == 2:
            config = dataclasses.replace(config, image_size=config.patch_size * int((len(table) - 1) ** 0.5))
    return load_vit(config, state, f"vision_model of {source}")


def wrap(model: Captioner, layers: Mapping[str, Mapping[str, Tensor]], alpha: float, source: str) -> list[str]:
    """Put the LoRA of the checkpoint beside the linear layers of the model; their names in the model.

    Raises UserError, and the model is as it was, for a module that is no linear layer of the model and for shapes that do not fit it.
    """
    wrapped: dict[str, tuple[Tensor, Tensor]] = {}
    unexpected, wrong = [], []
    for donor, layer in layers.items():
        try:
            name = weights.our_module_name(donor.partition(".")[2])
            base = model.get_submodule(name)
        except (UserError, AttributeError):
            base = None
        if not isinstance(base, nn.Linear) or not places_of([name]):
            unexpected.append(donor)
            continue
        a, b = layer["lora_a.weight"], layer["lora_b.weight"]
        rank = len(a) if a.ndim else 0
        shapes = (tuple(a.shape), tuple(b.shape))
        if rank < 1 or shapes != ((rank, base.in_features), (base.out_features, rank)):
            wrong.append(f"{donor} has lora_a {list(a.shape)} and lora_b {list(b.shape)} beside {list(base.weight.shape)}")
            continue
        if not (a.isfinite().all() and b.isfinite().all()):
            wrong.append(f"{donor} has LoRA values that are not finite")
            continue
        wrapped[name] = (a, b)
    if unexpected:
        raise not_gcc(source, (), unexpected)
    if wrong:
        raise UserError(f"{source}: {'; '.join(wrong[:4])}")
    names = replace_linears(model, {name: {"rank": len(a), "alpha": alpha, "dropout": DROPOUT} for name, (a, _) in wrapped.items()})
    with torch.no_grad():
        for name in names:
            for own, values in zip((model.get_submodule(name).lora_A, model.get_submodule(name).lora_B), wrapped[name], strict=True):
                own.copy_(values)
    return names


def vocabulary(spec: str) -> Tokenizer:
    """The vocabulary of a file, a T5 directory, an embedded T5 or a repository. Raises UserError where there is none."""
    path = TEXTS.get(spec, Path(spec))
    if path.is_dir():
        path = path / FILE_NAME
    elif not path.exists():
        try:
            path = weights.fetch(spec, FILE_NAME)
        except UserError as error:
            raise UserError(f"--tokenizer {spec} is neither a file nor a directory, and {error}") from error
    return Tokenizer(path)


def read_checkpoint(settings: Settings) -> tuple[Captioner, Tokenizer, dict]:
    """The model of the checkpoint with its LoRA, its vocabulary, and the facts from which `checkpoint.load` rebuilds it."""
    source = str(Path(settings.checkpoint).resolve())
    tokenizer = vocabulary(settings.tokenizer)
    parts, layers = by_part(weights.read_state_dict(source), source)
    vision = load_vision(settings.vision, parts["vision_model"], source)
    text = load_t5(parts["text_model"], t5_values(parts["text_model"], source), f"text_model of {source}")
    check_vocabulary(tokenizer, text.config)
    model = Captioner(vision, text).eval()
    weights.load_into(model.bridge, parts["bridge_proj"], None, f"bridge_proj of {source}")
    transform = ImageTransform(vision.image_size)
    facts = {
        "vision": checkpoint.describe(Backbone(vision, transform, settings.vision, source, weights.fingerprint(vision)), embedded=True),
        "text": checkpoint.describe(TextBackbone(text, tokenizer, source, source, weights.fingerprint(text)), embedded=True),
        **checkpoint.no_parts(),
    }
    facts["lora"] = places_of(wrap(model, layers, settings.alpha, source))
    return model, tokenizer, facts


def write_run(run: Path, model: Captioner, tokenizer: Tokenizer, facts: dict, settings: Settings) -> None:
    """The run directory; config.json, which makes it one, comes last. Of the settings it keeps those that train.py has too."""
    checkpoint.save_weights(model, tokenizer, facts, run)
    data = str(Path(settings.data).resolve()) if Path(settings.data).is_dir() else settings.data
    checkpoint.write_config(run, {"data": data, "vision": settings.vision, "lora_alpha": settings.alpha}, facts, {"versions": versions()})


def check(settings: Settings) -> None:
    """Refuse settings that cannot be; raises UsageError."""
    if not settings.checkpoint:
        raise UsageError("name the checkpoint: model.safetensors or the directory with it")
    if not settings.tokenizer:
        raise UsageError("--tokenizer is needed: the checkpoint has no vocabulary (spiece.model, a T5 directory, or a repository such as google/flan-t5-base)")
    if ":" in settings.vision or settings.vision.startswith("timm/"):
        raise UsageError(f"--vision {settings.vision}: name a ViT architecture of open_clip alone; its weights come from the checkpoint")
    if not settings.alpha > 0:
        raise UsageError("--alpha must be above 0")


def main(argv: list[str] | None = None) -> int:
    settings = cli.parse_settings(Settings, argv, __doc__)
    check(settings)
    run = Path(settings.output or f"runs/gcc-{time.strftime('%Y%m%d-%H%M%S')}")
    if (run / "config.json").exists():
        raise UserError(f"{run} already holds a run: choose another --output")
    model, tokenizer, facts = read_checkpoint(settings)
    write_run(run, model, tokenizer, facts, settings)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, lora.LoRALinear)}
    ranks = sorted({module.rank for module in adapted.values()})
    shown = f"rank {', '.join(map(str, ranks))} on {len(adapted)} layers of the {', '.join(facts['lora'])}"
    text = model.text.config
    say(f"{run}: {settings.vision} at {model.vision.image_size} pixels, T5 of width {text.d_model} and {text.num_decoder_layers} layers, LoRA of {shown}")
    sizes = {"vision": settings.vision, "image_size": model.vision.image_size, "text": dataclasses.asdict(text)}
    write_json(settings.json, {"run": str(run), **sizes, "alpha": settings.alpha, "ranks": ranks, "lora": sorted(adapted)})
    return cli.DONE


if __name__ == "__main__":
    cli.run_command(main, expected=(ValueError,))
