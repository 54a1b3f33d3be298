"""LoRA in the files of `peft`: adapter_config.json and adapter_model.safetensors, written and read without peft.

Tensor names are `base_model.model.<module path in the donor's model>.lora_A.weight` (R, in) and `.lora_B.weight`
(out, R). Our module paths differ from the donor's, so both functions take a callable between the two. No pickle is
written or read.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora.inject import linears, lora_modules, replace_linears
from lora.peft_config import CONFIG_FILE, default_and_pattern, read_lora_config, read_patterns, short, untouched_targets

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYER_NUMBER = re.compile(r"\.\d+\.")


def save_peft(
    model: nn.Module,
    directory: str | Path,
    module_name: Callable[[str], str],
    base_model_name: str | None = None,
    *,
    under: str = "",
    fold_rslora: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the model's LoRA into directory in peft's layout, A and B in fp32.

    module_name turns our module path into the donor's. The config lists every module by its whole path, so that peft
    adapts these and nothing else; where ranks or alphas differ, the most frequent ones are the defaults and the others
    stand in `rank_pattern` and `alpha_pattern`. under takes only the modules below a path, such as `text.` or
    `vision.`. fold_rslora writes alpha * sqrt(rank) with `use_rslora` false, the same effect in runtimes that do not
    know rank-stabilised scaling. metadata goes into the header of the safetensors file; `base_sha256` there is what
    `load_peft` compares. Raises ValueError if there is no LoRA, settings differ that one file cannot hold apart, or
    layers are merged (the base weights then hold the update too), and OSError where the files cannot be written.
    """
    modules = {name: module for name, module in lora_modules(model).items() if name.startswith(under)}
    if not modules:
        raise ValueError(f"the model has no LoRA {f'under {under} ' if under else ''}to save")
    merged = [name for name, module in modules.items() if module.merged]
    if merged:
        raise ValueError(
            f"LoRA is merged into {len(merged)} layers, {merged[0]} the first: call unmerge_lora before saving"
        )
    shared = {(module.dropout, module.init, module.rslora or fold_rslora) for module in modules.values()}
    if len(shared) > 1:
        raise ValueError(
            f"LoRA layers differ in (dropout, init, rslora), which one PEFT file cannot hold: {sorted(shared)}"
        )
    dropout, init, rslora = shared.pop()
    donor_names = {name: module_name(name) for name in modules}
    ranks = {donor_names[name]: module.rank for name, module in modules.items()}
    alphas = {
        donor_names[name]: module.alpha * math.sqrt(module.rank) if fold_rslora and module.rslora else module.alpha
        for name, module in modules.items()
    }
    rank, rank_pattern = default_and_pattern(ranks)
    alpha, alpha_pattern = default_and_pattern(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if any(name.startswith("text.") for name in modules) else None,
        "base_model_name_or_path": base_model_name,
        "target_modules": list(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": dropout,
        "use_rslora": rslora and not fold_rslora,
        "init_lora_weights": "gaussian" if init == "gaussian" else True,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for name, module in modules.items():
        for own, parameter in module.adapter_parameters().items():
            tensors[f"{PREFIX}{donor_names[name]}.{own}.weight"] = parameter.detach().float().cpu().contiguous()
    write_adapter(Path(directory), config, tensors, metadata)


def load_peft(
    model: nn.Module, directory: str | Path, our_name: Callable[[str], str], base_sha256: str | None = None
) -> list[str]:
    """Inject the LoRA of a peft directory and load its weights; the names of the modules, in module order.

    our_name turns the donor's module path into ours; a LookupError or ValueError from it counts as an unexpected
    name. The model may have LoRA on other layers. base_sha256: hash of the backbone that the model has; a file that
    names another one in its metadata is refused, one that names none is not. Raises FileNotFoundError where a file is
    missing; ValueError, and the model is as it was, where the config asks for what we do not have or makes no sense,
    the names do not fit the model and the config in both directions (both lists are in the message), a layer has LoRA
    already, a shape or dtype differs, or a number is not finite.
    """
    directory = Path(directory)
    config, path = read_lora_config(directory), directory / WEIGHTS_FILE
    tensors, metadata = read_tensors(path)
    refuse_other_base(path, metadata, base_sha256)
    pairs = grouped(tensors, path)
    candidates, present = linears(model), lora_modules(model)
    names = {donor: try_name(our_name, donor) for donor in pairs}
    taken = [name for name in names.values() if name in present]
    if taken:
        raise ValueError(
            f"{path}: the model has LoRA on {len(taken)} of its layers already, {taken[0]} the first; "
            "merge_lora(model, remove=True) folds them in"
        )
    donors = {name: donor for donor, name in names.items() if name in candidates}
    siblings = stack_siblings(donors, our_name, candidates)
    targeted, settings = read_patterns(config, [*pairs, *siblings.values()], directory / CONFIG_FILE)
    unexpected = [donor for donor in pairs if donor not in targeted or donors.get(names[donor]) != donor]
    missing = untouched_targets(config["target_modules"], pairs)
    missing = missing or [name for name, donor in siblings.items() if donor in targeted]
    refuse_other_names(path, missing, unexpected)
    wrong = [
        complaint
        for name, donor in donors.items()
        for complaint in complaints(name, pairs[donor], settings[donor]["rank"], candidates[name])
    ]
    if wrong:
        raise ValueError(f"{path} does not fit: {short(wrong)}")
    common = {
        "dropout": config.get("lora_dropout") or 0.0,
        "init": "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        "rslora": bool(config.get("use_rslora")),
    }
    ordered = replace_linears(model, {name: settings[donor] | common for name, donor in donors.items()})
    with torch.no_grad():
        for name in ordered:
            for own, parameter in model.get_submodule(name).adapter_parameters().items():
                parameter.copy_(pairs[donors[name]][own])
    return ordered


def write_adapter(directory: Path, config: Mapping, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """adapter_config.json and adapter_model.safetensors, in a directory that is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(directory / WEIGHTS_FILE, tensors, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file whose bytes depend on its content alone: safetensors itself writes several metadata in random order."""
    content = save(tensors, {"format": "pt", **(metadata or {})})
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """adapter_model.safetensors by name, and the metadata of its header."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        advice = (
            "; adapter_model.bin is a pickle and is not read: load it in peft and save_pretrained() it again"
            if pickled
            else ""
        )
        raise FileNotFoundError(f"{path}: no such file{advice}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, KeyError, AttributeError, RuntimeError) as error:  # the last ones: a type of numbers that torch has not
        raise ValueError(f"{path}: not a safetensors file ({short([str(error)])})") from None


def refuse_other_base(path: Path, metadata: Mapping[str, str], base_sha256: str | None) -> None:
    """Raises ValueError where a file's metadata name another backbone than the one that is given; either may be silent."""
    made_for = metadata.get("base_sha256")
    if None not in (made_for, base_sha256) and made_for != base_sha256:
        raise ValueError(f"{path} was made for another backbone (sha256 {short([made_for[:12]])}, here {base_sha256[:12]})")


def refuse_other_names(path: Path, missing: Iterable[str], unexpected: Iterable[str], is_empty: bool = False) -> None:
    """Raises ValueError with both lists where a file lacks names or has others, or holds nothing at all."""
    if missing or unexpected or is_empty:
        raise ValueError(f"{path} does not fit: missing: {short(missing)}; unexpected: {short(unexpected)}")


def grouped(tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """The pair lora_A, lora_B of each donor module. Raises ValueError on other names and on half pairs."""
    pairs: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", key)
        if found is None:
            unexpected.append(key)
        else:
            pairs.setdefault(found[1], {})[found[2]] = tensor
    missing = [
        f"{PREFIX}{donor}.{own}.weight"
        for donor, pair in pairs.items()
        for own in ("lora_A", "lora_B")
        if own not in pair
    ]
    refuse_other_names(path, missing, unexpected, is_empty=not pairs)
    return pairs


def try_name(our_name: Callable[[str], str], donor: str) -> str | None:
    """our_name(donor), None for a name that it does not know."""
    try:
        return our_name(donor)
    except (LookupError, ValueError):
        return None


def stack_siblings(donors: Mapping[str, str], our_name: Callable[[str], str], names: Iterable[str]) -> dict[str, str]:
    """Linears that are not in the file and differ from one that is only in the number of their layer: the donor's
    names by ours.
    """
    first: dict[str, str] = {}
    for name, donor in donors.items():
        first.setdefault(LAYER_NUMBER.sub(".*.", name), donor)
    siblings = {}
    for name in names:
        donor, number = first.get(LAYER_NUMBER.sub(".*.", name)), LAYER_NUMBER.search(name)
        if donor is not None and number is not None and name not in donors:
            sibling = LAYER_NUMBER.sub(number[0], donor, count=1)
            if try_name(our_name, sibling) == name:
                siblings[name] = sibling
    return siblings


def complaints(name: str, pair: dict[str, Tensor], rank: int, linear: nn.Module) -> list[str]:
    """What keeps a file's pair from being the LoRA of this rank on a linear."""
    found = []
    for own, shape in (("lora_A", (rank, linear.in_features)), ("lora_B", (linear.out_features, rank))):
        tensor = pair[own]
        if tensor.shape != shape:
            found.append(f"{name}.{own} has shape {list(tensor.shape)}, expected {list(shape)}")
        elif not tensor.is_floating_point():
            found.append(f"{name}.{own} is {str(tensor.dtype).removeprefix('torch.')}, expected floating point")
        elif not tensor.float().isfinite().all():
            found.append(f"{name}.{own} holds values that are not finite")
    return found
