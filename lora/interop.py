"""LoRA in the files of `peft`: adapter_config.json and adapter_model.safetensors, written and read without peft.

Tensor names are `base_model.model.<module path in the donor's model>.lora_A.weight` (R, in) and `.lora_B.weight`
(out, R). Our module paths differ from the donor's, so both functions take a callable between the two. No pickle is
written or read.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora.inject import lora_modules, refuse_second_injection, replace_linears

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of peft that change what an adapter computes and that we do not have, with their values of no effect.
WITHOUT_EFFECT = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None, []),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}


def save_peft(
    model: nn.Module, directory: str | Path, module_name: Callable[[str], str], base_model_name: str | None = None
) -> None:
    """Write the model's LoRA into directory in peft's layout, A and B in fp32.

    module_name turns our module path into the donor's. The config lists every module by its whole path, so that peft
    adapts these and nothing else. Raises ValueError if the model has no LoRA, layers of different settings, or merged
    ones (its base weights then hold the update too), and OSError where the files cannot be written.
    """
    modules = lora_modules(model)
    if not modules:
        raise ValueError("the model has no LoRA to save")
    merged = [name for name, module in modules.items() if module.merged]
    if merged:
        raise ValueError(
            f"LoRA is merged into {len(merged)} layers, {merged[0]} the first: call unmerge_lora before saving"
        )
    settings = {(module.rank, module.alpha, module.dropout, module.init) for module in modules.values()}
    if len(settings) > 1:
        raise ValueError(
            f"LoRA layers differ in (rank, alpha, dropout, init), which one PEFT file cannot hold: {sorted(settings)}"
        )
    rank, alpha, dropout, init = settings.pop()
    donor_names = {name: module_name(name) for name in modules}
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model_name,
        "target_modules": list(donor_names.values()),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": True,
        "init_lora_weights": "gaussian" if init == "gaussian" else True,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for name, module in modules.items():
        for own, parameter in module.adapter_parameters().items():
            tensors[f"{PREFIX}{donor_names[name]}.{own}.weight"] = parameter.detach().float().cpu().contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))


def load_peft(model: nn.Module, directory: str | Path, our_name: Callable[[str], str]) -> list[str]:
    """Inject the LoRA of a peft directory into a model without one and load its weights; the names of the modules, in
    module order.

    our_name turns the donor's module path into ours; a LookupError or ValueError from it counts as an unexpected
    name. A file with alpha / rank scaling (use_rslora false) gets the alpha that gives the same scaling here. Raises
    FileNotFoundError where a file is missing; ValueError, and the model is as it was, where the config asks for what
    we do not have, the names do not fit the model and the config in both directions (both lists are in the message),
    or a shape differs.
    """
    refuse_second_injection(model)
    directory = Path(directory)
    config = read_config(directory)
    pairs = grouped(read_tensors(directory), directory)
    rank = config["r"]
    alpha = config["lora_alpha"] * (1.0 if config.get("use_rslora") else rank**-0.5)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ours: dict[str, dict[str, Tensor]] = {}
    unexpected = []
    for donor, pair in pairs.items():
        try:
            name = our_name(donor)
        except (LookupError, ValueError):
            name = None
        if name not in linears or name in ours or not is_targeted(donor, config["target_modules"]):
            unexpected.append(donor)
        else:
            ours[name] = pair
    missing = missing_targets(config["target_modules"], pairs, ours, linears)
    if missing or unexpected:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} does not fit: missing: {short(missing)}; unexpected: {short(unexpected)}"
        )
    wrong = []
    for name, pair in ours.items():
        expected = {"lora_A": (rank, linears[name].in_features), "lora_B": (linears[name].out_features, rank)}
        wrong += [
            f"{name}.{key} has shape {list(pair[key].shape)}, expected {list(shape)}"
            for key, shape in expected.items()
            if pair[key].shape != shape
        ]
    if wrong:
        raise ValueError(f"{directory / WEIGHTS_FILE} does not fit: {short(wrong)}")
    init = "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming"
    names = replace_linears(model, ours, rank, alpha, config.get("lora_dropout", 0.0), init)
    with torch.no_grad():
        for name, module in lora_modules(model).items():
            for own, parameter in module.adapter_parameters().items():
                parameter.copy_(ours[name][own])
    return names


def read_config(directory: Path) -> dict:
    """adapter_config.json, checked to be a LoRA that LoRALinear can compute."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        if not config.get(key):
            raise ValueError(f"{path}: lacks {key}")
    for key, values in WITHOUT_EFFECT.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{path}: {key} = {json.dumps(config[key])} is not supported")
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """adapter_model.safetensors by name."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        advice = (
            "; adapter_model.bin is a pickle and is not read: load it in peft and save_pretrained() it again"
            if pickled
            else ""
        )
        raise FileNotFoundError(f"{path}: no such file{advice}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None


def grouped(tensors: dict[str, Tensor], directory: Path) -> dict[str, dict[str, Tensor]]:
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
    if missing or unexpected or not pairs:
        raise ValueError(
            f"{directory / WEIGHTS_FILE} does not fit: missing: {short(missing)}; unexpected: {short(unexpected)}"
        )
    return pairs


def is_targeted(donor: str, targets: str | list[str]) -> bool:
    """Whether peft's target_modules cover a donor module: a list of whole paths or last components, a regular
    expression, or all-linear.
    """
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, donor) is not None
    return any(donor == target or donor.endswith(f".{target}") for target in targets)


def missing_targets(
    targets: str | list[str], pairs: Iterable[str], ours: Iterable[str], linears: Iterable[str]
) -> list[str]:
    """What the config promises and the file lacks: listed targets without a pair, and, for targets that are no whole
    paths, layers of a stack that are left out while others are there.
    """
    if isinstance(targets, list):
        lacking = [target for target in targets if not any(is_targeted(donor, [target]) for donor in pairs)]
        if lacking or set(targets) <= set(pairs):
            return lacking
    kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in ours}
    return [name for name in linears if re.sub(r"\.\d+\.", ".*.", name) in kinds and name not in ours]


def short(names: Iterable[str], limit: int = 8) -> str:
    """A sorted list for a message, cut after limit names."""
    names = sorted(names)
    rest = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest if names else "none"
