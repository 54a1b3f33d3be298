"""Run directories: everything needed to use a trained captioner, and `load`, the one way to get it back.

    config.json            settings, versions, seed, and under "model" where each backbone comes from
    adapter/               LoRA of the T5 in PEFT's layout; adapter/vision/ that of the image encoder
    adapters/NAME/         bottleneck adapters
    prompt/                soft prompt in PEFT's layout
    bridge.safetensors
    vision/                only if the image encoder cannot be had elsewhere (trained here, or random): a Hugging Face CLIPVisionModel directory
                           (config.json, model.safetensors); vision.safetensors under our own names where it is no such model
    text/                  likewise, as a Hugging Face T5 directory (config.json, model.safetensors, spiece.model)
    checkpoints/step-00000400/    the same files at one step, with optimizer.safetensors and complete.json (captioner/checkpoint_store.py)
    metrics.jsonl  timing.jsonl  loss.png  report.html

The files at the top are those of the best checkpoint. No pickle is written or read. What scripts/export.py makes is a run directory too, without
checkpoints, or one as a single file (captioner/bundle.py).
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora
from captioner import bundle, checkpoint_store, weights
from captioner.backbones import Backbone, TextBackbone, build_own_vision, build_text, build_vision
from captioner.clip_hf import clip_config_to_hf
from captioner.errors import UserError
from captioner.files import save_tensors, write_json
from captioner.model import Captioner
from captioner.run_config import FORMAT, read_config
from captioner.t5 import T5
from captioner.tokenizer import Tokenizer
from captioner.vit import VisionTransformer
from data.transforms import ImageTransform
from data.views import parse_views

PUBLISHED = ("adapter", "adapters", "prompt", "bridge.safetensors", "vision", "vision.safetensors", "text")
TEXT_PLACES = {"decoder", "encoder"}
LORA_FOLDERS = {"adapter": TEXT_PLACES, "adapter/vision": {"vision"}}


def load(
    run: str | Path | None = None,
    *,
    vision: str | None = None,
    text: str | None = None,
    views: str | None = None,
    adapters: Sequence[str | Path] = (),
    checkpoint: str | None = None,
    merge: bool = False,
    dequantize: bool = False,
    stack: Sequence[str] | None = None,
):
    """(model, tokenizer, transform), on the CPU in fp32 and eval mode.

    run: a run directory, or a bundle of one (checkpoint: `best`, `last` or a folder's name such as `step-00000400` instead of the files at its top). Otherwise vision and text name bare backbones
    (`--vision`, `--text` and `--views` of train.py), the bridge is random, and adapters are directories of LoRA or soft prompts in PEFT's layout, made here or by
    `peft`, or of bottleneck adapters. merge folds LoRA into the base weights, which is faster and not undone by training. dequantize turns a 4-bit base
    into fp32 weights of the same values first. stack: the bottleneck adapters that are on, the lowest first, if not those of the run.
    Raises UserError on anything missing, unexpected or of another hash than the run was trained with, and on merging into a 4-bit base.
    """
    if run is None:
        if vision is None or text is None:
            raise UserError("load() takes a run directory, or both vision= and text=")
        vision_backbone, text_backbone = build_vision(vision), build_text(text)
        if views:
            with translated():
                vision_backbone = dataclasses.replace(vision_backbone, transform=with_views(vision_backbone.transform, views))
        model = Captioner(vision_backbone.module, text_backbone.module, len(vision_backbone.transform.views))
        hashes = {"vision": {"hash": vision_backbone.weights_hash}, "text": {"hash": text_backbone.weights_hash}}
        if isinstance(adapters, (str, Path)):
            raise UserError(f"adapters= is a list of directories, not {str(adapters)!r}")
        for directory in adapters:
            load_adapter(model, Path(directory), hashes)
    else:
        if adapters or views:
            raise UserError("a run brings its own adapters and views: load() takes adapters= and views= only with vision= and text=")
        facts = read_config(run)["model"]
        with bundle.opened(Path(run)) as top:
            directory = directory_of(top, checkpoint)
            vision_backbone, text_backbone = rebuild(facts, directory)
            model = Captioner(vision_backbone.module, text_backbone.module, len(vision_backbone.transform.views))
            bridge = directory / "bridge.safetensors"
            weights.load_into(model.bridge, weights.read_state_dict(bridge), None, str(bridge))
            if facts["base_bits"]:
                quantize(model, facts)
            load_parts(model, directory, facts)
        stack = facts["stack"] if stack is None else stack
    with translated():
        if stack is not None:
            lora.set_stack(model, stack)
        if dequantize:
            lora.dequantize_base(model)
        if merge:
            lora.merge_lora(model, remove=True)
    return model.eval(), text_backbone.tokenizer, vision_backbone.transform


def with_views(transform: ImageTransform, views: str) -> ImageTransform:
    """The transform with the views of `--views`; raises ValueError, see `data.views.parse_views`."""
    return dataclasses.replace(transform, views=parse_views(views))


@contextlib.contextmanager
def translated(kind: type[UserError] = UserError):
    """Turn the one-line exceptions of `lora`, which knows nothing of commands, into UserError or a kind of it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise kind(str(error)) from error


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


def no_parts() -> dict:
    """What config.json says of a model to which nothing was added: places with LoRA, names of adapters and of those that are on, places with a soft
    prompt, parts that are frozen though they were added, and bits of the base."""
    return {"lora": [], "adapters": [], "stack": [], "prompt": [], "frozen": [], "base_bits": None}


def stamp(model: Captioner, facts: dict, trained: Iterable[str] = (), dtype: torch.dtype = torch.float32) -> None:
    """Write the hashes of embedded backbones, once saved in dtype and loaded again, into facts; None for those in trained, whose weights change."""
    for part in ("vision", "text"):
        if facts[part]["embedded"]:
            state = cast(cast(base_state(model.get_submodule(part)), dtype), torch.float32)
            facts[part]["hash"] = None if part in trained else weights.fingerprint(state)


def quantize(model: Captioner, facts: dict) -> str:
    """Keep both backbones in 4 bits, and note it in facts; a line that says what it saves. Raises UserError where bitsandbytes is missing."""
    parts = [part for part in ("vision", "text") if any(isinstance(module, nn.Linear) for module in model.get_submodule(part).modules())]
    with translated():
        lora.quantize_base(model, parts)
    facts["base_bits"] = 4
    size = lora.base_bytes(model, parts)
    return f"base in 4 bits ({', '.join(parts)}): {size.now / 1e6:.1f} MB, {size.now / size.bf16:.2f} of bf16"


def base_hash(facts: dict, places: Iterable[str]) -> str | None:
    """Hash of the backbones that an adapter in these places was made for; None where one of them has none."""
    parts = [part for part, of_part in (("vision", {"vision"}), ("text", TEXT_PLACES)) if of_part & set(places)]
    hashes = [facts[part]["hash"] for part in parts]
    return None if None in hashes else hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def part_folders(facts: dict) -> list[str]:
    """The folders of a run that hold what was added to its backbones, in the order in which it was."""
    lora_folders = [folder for folder, places in LORA_FOLDERS.items() if places & set(facts["lora"])]
    return [*lora_folders, *(f"adapters/{name}" for name in facts["adapters"]), *(["prompt"] if facts["prompt"] else [])]


def rebuild(facts: dict, directory: Path) -> tuple[Backbone, TextBackbone]:
    """Both backbones of a run, from its own files where embedded, else from where they were first loaded, with the same hash."""
    vision_facts, text_facts = facts["vision"], facts["text"]
    if vision_facts["embedded"]:
        if (directory / "vision.safetensors").is_file():
            vision = build_own_vision(vision_facts["name"], vision_facts["image_size"], directory / "vision.safetensors")
        elif not (directory / "vision").is_dir():
            raise UserError(f"{directory}: its image encoder, vision/ or vision.safetensors, is missing")
        else:
            vision = build_vision(f"{vision_facts['name']}:{directory / 'vision'}", vision_facts["image_size"])
    else:
        spec = ":".join(part for part in (vision_facts["name"], vision_facts["weights"]) if part)
        vision = build_vision(spec, vision_facts["image_size"])
    check_hash("vision", vision_facts, vision.weights_hash)
    vision = dataclasses.replace(
        vision, transform=ImageTransform.from_dict(vision_facts["transform"]), weights=vision_facts["weights"], weights_hash=vision_facts["hash"]
    )
    if text_facts["embedded"]:
        text = build_text(str(directory / "text"))
        check_hash("text", text_facts, text.weights_hash)
        text = dataclasses.replace(text, name=text_facts["name"], weights=text_facts["weights"], weights_hash=text_facts["hash"])
    else:
        text = build_text(text_facts["name"])
        check_hash("text", text_facts, text.weights_hash)
    return vision, text


def check_hash(part: str, facts: dict, found: str | None) -> None:
    """Raises UserError where a backbone is not the one of the run; one that was trained with the run has no hash."""
    if found != facts["hash"] and not (facts["embedded"] and facts["hash"] is None):
        name = f"{facts['name']}:{facts['weights']}" if part == "vision" and facts["weights"] else facts["name"]
        raise UserError(f"{part} {name}: its weights are not those the run was trained with (sha256 {str(found)[:12]}, expected {str(facts['hash'])[:12]})")


def to_donor_name(name: str) -> str:
    """Our path of an adapted module → its name in the donor's model, as PEFT files have it."""
    return weights.hf_module_name(name)


def from_donor_name(name: str) -> str:
    """Inverse of `to_donor_name`; raises LookupError for a name that neither has."""
    try:
        return weights.our_module_name(name)
    except UserError as error:
        raise LookupError(str(error)) from None


def load_parts(model: Captioner, directory: Path, facts: dict) -> None:
    """Add all that config.json says a run adds to its backbones. Raises UserError where the folders of directory hold more, less or other parts."""
    folders = part_folders(facts)
    there = {file.parent.relative_to(directory).as_posix() for folder in ("adapter", "adapters", "prompt") for file in (directory / folder).rglob(lora.CONFIG_FILE)}
    unexpected = sorted(there - set(folders))
    if unexpected:
        raise UserError(f"{directory / unexpected[0]}: an adapter that the run's config.json does not name")
    for folder in folders:
        load_adapter(model, directory / folder, facts)
    found = parts_of(model)
    for key, value in found.items():
        if value != facts[key]:
            raise UserError(f"{directory}: its folders hold {key} {', '.join(value) or 'none'}, its config.json says {', '.join(facts[key]) or 'none'}")


def parts_of(model: Captioner) -> dict[str, list[str]]:
    """What was added to the backbones, as config.json names it: places with LoRA, names of adapters, places with a soft prompt."""
    with_lora = lora.inject.places_of(lora.inject.lora_modules(model))
    return {"lora": with_lora, "adapters": lora.adapter_names(model), "prompt": sorted(lora.prompts(model))}


def vision_stack(model: Captioner) -> list[str]:
    """The adapters of the image encoder that are on."""
    return [name for name in lora.get_stack(model) if "vision" in lora.all_settings(model)[name].where]


def load_adapter(model: Captioner, directory: Path, facts: dict) -> None:
    """Add what a directory holds, LoRA, soft prompt or bottleneck adapter, to the model; facts has the hashes of its backbones."""
    with translated():
        config = lora.read_config(directory)
        kind = config.get("peft_type")
        if kind == "BOTTLENECK":
            lora.load_adapter(model, directory, base_hash(facts, lora.read_settings(directory).where))
        elif kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"):
            lora.load_prompt(model, directory, facts["text"]["hash"])
        else:
            lora.load_peft(model, directory, from_donor_name, base_hash(facts, [place_of_donor_names(config.get("target_modules"))]))


def place_of_donor_names(names: Any) -> str:
    """Where a LoRA written by `save_weights` goes, by the target_modules of its config: those of any other file need not tell."""
    try:
        return "vision" if from_donor_name(names[0]).startswith("vision.") else "decoder"
    except (LookupError, TypeError, AttributeError):
        return "decoder"


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module as they were named before adapters went in, without the adapters'."""
    adapters = set(lora.adapter_parameters(module))
    return {name.replace(".base.", "."): tensor for name, tensor in module.state_dict().items() if name not in adapters}


def cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point tensors of a state dict in dtype, beside the others as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def hf_vision_config(vision: nn.Module) -> dict | None:
    """config.json of an image encoder as Hugging Face's CLIPVisionModel; None where it has no such form."""
    if not isinstance(vision, VisionTransformer):
        return None
    try:
        return clip_config_to_hf(vision.config)
    except UserError:
        return None


def present_hashes(model: Captioner, facts: dict) -> dict:
    """The facts' hashes of both backbones; of one that is trained along, that of its weights as they are now."""
    return {part: {"hash": facts[part]["hash"] or weights.fingerprint(base_state(model.get_submodule(part)))} for part in ("vision", "text")}


def made_for(hashes: dict, places: Iterable[str]) -> dict[str, str]:
    """Metadata of an adapter's file: the hash of the backbones it belongs to."""
    return {"base_sha256": base_hash(hashes, places)}


def save_weights(
    model: Captioner, tokenizer: Tokenizer, facts: dict, directory: Path, dtype: torch.dtype = torch.float32, fold_rslora: bool = False
) -> None:
    """Write what was added to the backbones, the bridge, and embedded backbones into directory under the names that `load` reads.

    Bridge and backbones are written in dtype, what was added in fp32. fold_rslora: as in `lora.save_peft`.
    """
    hashes = present_hashes(model, facts) if part_folders(facts) else {}
    for folder, places in LORA_FOLDERS.items():
        if places & set(facts["lora"]):
            part = "vision" if places == {"vision"} else "text"
            lora.save_peft(
                model, directory / folder, to_donor_name, facts[part]["name"], under=f"{part}.", fold_rslora=fold_rslora, metadata=made_for(hashes, places)
            )
    for name in facts["adapters"]:
        lora.save_adapter(model, name, directory / "adapters" / name, made_for(hashes, lora.all_settings(model)[name].where))
    if facts["prompt"]:
        lora.save_prompt(model, directory / "prompt", facts["text"]["name"], made_for(hashes, TEXT_PLACES))
    save_tensors(directory / "bridge.safetensors", cast(model.bridge.state_dict(), dtype))
    if facts["vision"]["embedded"]:
        save_vision(model.vision, directory, dtype)
    if facts["text"]["embedded"]:
        save_text(model.text, tokenizer, directory / "text", dtype)


def save_vision(vision: nn.Module, directory: Path, dtype: torch.dtype) -> None:
    """Write an image encoder as directory/vision/, or as vision.safetensors where it is no CLIPVisionModel."""
    state, config = cast(base_state(vision), dtype), hf_vision_config(vision)
    if config is None:
        save_tensors(directory / "vision.safetensors", state)
        return
    save_tensors(directory / "vision" / "model.safetensors", weights.clip_to_hf(state, vision.config), {"format": "pt"})
    write_json(directory / "vision" / "config.json", config)


def save_text(text: T5, tokenizer: Tokenizer, directory: Path, dtype: torch.dtype) -> None:
    """Write a T5 as a directory that Hugging Face's T5ForConditionalGeneration loads."""
    tensors = weights.t5_to_hf(cast(base_state(text), dtype), text.config)
    if not text.config.num_layers:
        # transformers gives every T5 an encoder: one of no blocks still has its last norm.
        tensors["encoder.final_layer_norm.weight"] = torch.ones(text.config.d_model, dtype=dtype)
    save_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", **dataclasses.asdict(text.config)})
    tokenizer.save(directory)


def directory_of(run: Path, checkpoint: str | None = None) -> Path:
    """The folder with the weights of a run directory: its own, or those of `best`, `last` or a checkpoint by name. Raises UserError where there is none."""
    return checkpoint_store.top(run) if checkpoint is None else checkpoint_store.find(run, checkpoint)


def save_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], path: Path) -> None:
    """The moments of AdamW as `<parameter name>/<moment>` tensors."""
    tensors = {f"{names[p]}/{key}": value for p, moments in optimizer.state.items() for key, value in moments.items()}
    save_tensors(path, tensors)


def on_device(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor where the parameter is."""
    return tensor.to(parameter.device)


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], path: Path, place: Callable[[Tensor, Tensor], Tensor] = on_device
) -> None:
    """Inverse of `save_optimizer`; place(moment, parameter) is what is kept. Raises UserError where the parameters are not those that were saved, or a tensor is none that AdamW can have."""
    saved = weights.read_state_dict(path)
    moments = {f"{name}/{key}": p for name, p in parameters.items() for key in ("step", "exp_avg", "exp_avg_sq")}
    if saved.keys() != moments.keys():
        raise UserError(f"{path}: saved for other parameters: {weights.both_lists(moments.keys() - saved.keys(), saved.keys() - moments.keys())}")
    for name, tensor in saved.items():
        key, shape = name.rpartition("/")[2], list(moments[name].shape)
        shape, dtype = ([], torch.float32) if key == "step" else (shape, moments[name].dtype)
        fits = list(tensor.shape) == shape and tensor.dtype == dtype and tensor.isfinite().all()
        if not fits or (key != "exp_avg" and tensor.lt(0).any()):
            raise UserError(f"{path}: {name} is not what AdamW keeps: finite numbers {shape} of {dtype}, none of step and exp_avg_sq below 0")
    for name, tensor in saved.items():
        optimizer.state[moments[name]][name.rpartition("/")[2]] = place(tensor, moments[name])


def write_config(run: Path, settings: dict, facts: dict, record: dict) -> None:
    """config.json of a run; record: how it was made, such as versions, hardware and data."""
    write_json(run / "config.json", {"format": FORMAT, "settings": settings, "model": facts, **record})
