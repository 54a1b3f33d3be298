"""Run directories: everything needed to use a trained captioner, and `load`, the one way to get it back.

    config.json            settings, versions, seed, and under "model" where each backbone comes from
    adapter/               LoRA in PEFT's layout
    bridge.safetensors
    vision.safetensors     only if the image encoder cannot be had elsewhere (trained here, or random)
    text/                  likewise, as a Hugging Face T5 directory (config.json, model.safetensors, spiece.model)
    checkpoints/best, checkpoints/last    the same files at one step, with state.json and, in last, optimizer.safetensors
    metrics.jsonl  loss.png  report.html

The files at the top are those of checkpoints/best. No pickle is written or read.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lora
from captioner import weights
from captioner.backbones import Backbone, TextBackbone, build_text, build_vision
from captioner.errors import UserError
from captioner.files import read_json, replacing, save_tensors, write_json
from captioner.model import Captioner
from captioner.tokenizer import Tokenizer
from data.transforms import ImageTransform

FORMAT = 1
PUBLISHED = ("adapter", "bridge.safetensors", "vision.safetensors", "text")


def load(run: str | Path | None = None, *, vision: str | None = None, text: str | None = None, checkpoint: str | None = None, merge: bool = False):
    """(model, tokenizer, transform), on the CPU in fp32 and eval mode.

    run: a run directory (checkpoint: `best` or `last` instead of the files at its top). Otherwise vision and text name bare backbones
    (`--vision` and `--text` of train.py) and the bridge is random. merge folds LoRA into the base weights, which is faster and not undone by training.
    Raises UserError on anything missing, unexpected or of another hash than the run was trained with.
    """
    if run is None:
        if vision is None or text is None:
            raise UserError("load() takes a run directory, or both vision= and text=")
        vision_backbone, text_backbone = build_vision(vision), build_text(text)
        model = Captioner(vision_backbone.module, text_backbone.module)
    else:
        config = read_config(run)
        directory = Path(run) if checkpoint is None else Path(run) / "checkpoints" / checkpoint
        vision_backbone, text_backbone = rebuild(config["model"], directory)
        model = Captioner(vision_backbone.module, text_backbone.module)
        weights.load_into(model.bridge, weights.read_state_dict(directory / "bridge.safetensors"), None, "bridge")
        if config["model"]["adapted"]:
            load_adapter(model, directory / "adapter")
            if merge:
                lora.merge_lora(model, remove=True)
    return model.eval(), text_backbone.tokenizer, vision_backbone.transform


def read_config(run: str | Path) -> dict:
    """A run's config.json. Raises UserError where run is not a run directory or of a later format."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    config = read_json(run / "config.json")
    if config.get("format") != FORMAT:
        raise UserError(f"{run / 'config.json'}: format {config.get('format')!r} is not {FORMAT}: not a run directory of this version")
    return config


def newest_run(root: Path = Path("runs")) -> Path:
    """The run under root that was trained last. Raises UserError where there is none."""
    runs = [path.parent for path in root.glob("*/bridge.safetensors") if (path.parent / "config.json").is_file()]
    if not runs:
        raise UserError(f"no trained run under {root}/: train one with `python train.py`, or name a run directory")
    return max(runs, key=lambda run: (run / "bridge.safetensors").stat().st_mtime)


def describe(backbone: Backbone | TextBackbone, embedded: bool) -> dict:
    """The facts from which `rebuild` gets a backbone back; embedded says that its weights travel with the run."""
    facts = {"name": backbone.name, "weights": backbone.weights, "hash": backbone.weights_hash, "embedded": embedded}
    if isinstance(backbone, Backbone):
        return facts | {"image_size": backbone.transform.image_size, "transform": backbone.transform.to_dict()}
    return facts


def vision_backbone(model: Captioner, transform: ImageTransform, facts: dict) -> Backbone:
    """The image encoder of a loaded run with where it came from; facts as in config.json under "model"."""
    return Backbone(model.vision, transform, *(facts["vision"][key] for key in ("name", "weights", "hash")))


def rebuild(facts: dict, directory: Path) -> tuple[Backbone, TextBackbone]:
    """Both backbones of a run, from its own files where embedded, else from where they were first loaded, with the same hash."""
    vision_facts, text_facts = facts["vision"], facts["text"]
    if vision_facts["embedded"]:
        vision = build_vision(vision_facts["name"], vision_facts["image_size"])
        weights.load_into(vision.module, weights.read_state_dict(directory / "vision.safetensors"), None, "vision")
    else:
        spec = ":".join(part for part in (vision_facts["name"], vision_facts["weights"]) if part)
        vision = build_vision(spec, vision_facts["image_size"])
        check_hash("vision", spec, vision.weights_hash, vision_facts["hash"])
    vision = dataclasses.replace(
        vision, transform=ImageTransform.from_dict(vision_facts["transform"]), weights=vision_facts["weights"], weights_hash=vision_facts["hash"]
    )
    if text_facts["embedded"]:
        text = build_text(str(directory / "text"))
        text = dataclasses.replace(text, name=text_facts["name"], weights=text_facts["weights"], weights_hash=text_facts["hash"])
    else:
        text = build_text(text_facts["name"])
        check_hash("text", text_facts["name"], text.weights_hash, text_facts["hash"])
    return vision, text


def check_hash(part: str, name: str, found: str | None, expected: str | None) -> None:
    if found != expected:
        raise UserError(f"{part} {name}: its weights are not those the run was trained with (sha256 {str(found)[:12]}, expected {str(expected)[:12]})")


def to_donor_name(name: str) -> str:
    """Our path of an adapted module → its name in the donor's model, as PEFT files have it."""
    return weights.hf_module_name(name) if name.startswith("text.") else name


def from_donor_name(name: str) -> str:
    """Inverse of `to_donor_name`; raises LookupError for a name that neither has."""
    try:
        return name if name.startswith("vision.") else weights.our_module_name(name)
    except UserError as error:
        raise LookupError(str(error)) from None


def load_adapter(model: Captioner, directory: Path) -> list[str]:
    """Inject and load a PEFT directory; the names of the modules it replaced."""
    try:
        return lora.load_peft(model, directory, from_donor_name)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{directory}: {error}") from error


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module as they were named before adapters went in, without the adapters'."""
    adapters = set(lora.adapter_parameters(module))
    return {name.replace(".base.", "."): tensor for name, tensor in module.state_dict().items() if name not in adapters}


def save_weights(model: Captioner, tokenizer: Tokenizer, facts: dict, directory: Path) -> None:
    """Write adapter, bridge and embedded backbones into directory, in fp32 under the names that `load` reads."""
    if facts["adapted"]:
        lora.save_peft(model, directory / "adapter", to_donor_name, facts["text"]["name"])
    save_tensors(directory / "bridge.safetensors", model.bridge.state_dict())
    if facts["vision"]["embedded"]:
        save_tensors(directory / "vision.safetensors", base_state(model.vision))
    if facts["text"]["embedded"]:
        state = {name: tensor.float() for name, tensor in base_state(model.text).items()}
        save_tensors(directory / "text" / "model.safetensors", weights.t5_to_hf(state, model.text.config), {"format": "pt"})
        write_json(directory / "text" / "config.json", {"model_type": "t5", **dataclasses.asdict(model.text.config)})
        tokenizer.save(directory / "text")


def save_checkpoint(run: Path, name: str, write: Callable[[Path], None]) -> Path:
    """checkpoints/<name> written whole by write(directory), then put in the place of the old one. Raises UserError where the disk is full."""
    target = run / "checkpoints" / name
    fresh, old = target.with_name(f".{name}.new"), target.with_name(f".{name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def publish(run: Path, checkpoint: Path) -> None:
    """Put a checkpoint's weights at the top of the run, as hard links where the file system has them."""
    for entry in PUBLISHED:
        for source in sorted([checkpoint / entry] if (checkpoint / entry).is_file() else (checkpoint / entry).glob("*")):
            with replacing(run / source.relative_to(checkpoint)) as temporary:
                try:
                    os.link(source, temporary)
                except OSError:
                    shutil.copyfile(source, temporary)


def save_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], path: Path) -> None:
    """The moments of AdamW as `<parameter name>/<moment>` tensors."""
    tensors = {f"{names[p]}/{key}": value for p, moments in optimizer.state.items() for key, value in moments.items()}
    save_tensors(path, tensors)


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], path: Path) -> None:
    """Inverse of `save_optimizer`; raises UserError where the parameters are not those that were saved."""
    saved = weights.read_state_dict(path)
    stored = {name.rsplit("/", 1)[0] for name in saved}
    if stored != set(parameters):
        raise UserError(f"{path}: saved for other parameters: missing {sorted(set(parameters) - stored)[:4]}, unexpected {sorted(stored - set(parameters))[:4]}")
    for name, tensor in saved.items():
        parameter, key = name.rsplit("/", 1)
        target = parameters[parameter]
        optimizer.state[target][key] = tensor if key == "step" else tensor.to(target.device)


def write_config(run: Path, settings: dict, facts: dict, versions: dict) -> None:
    """config.json of a run."""
    write_json(run / "config.json", {"format": FORMAT, "settings": settings, "model": facts, "versions": versions})
