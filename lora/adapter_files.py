"""Bottleneck adapters in files: adapter_config.json and adapter_model.safetensors in a folder of the adapter's own."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lora.adapters import (
    SUBLAYERS,
    AdapterSettings,
    all_settings,
    attach,
    bottlenecks,
    check_choices,
    check_new_name,
    check_settings,
    places_of,
    residual_names,
)
from lora.inject import WHERE
from lora.interop import WEIGHTS_FILE, read_tensors, refuse_other_base, refuse_other_names, write_adapter
from lora.peft_config import CONFIG_FILE, read_config, short


def save_adapter(model: nn.Module, name: str, directory: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one adapter into directory: adapter_config.json and adapter_model.safetensors.

    Tensors are `<residual connection>.{down,up}.{weight,bias}` in fp32; metadata goes into the file as it is
    (`base_sha256` is compared when loading). Raises ValueError on an unknown name, and OSError where the files cannot
    be written.
    """
    places = places_of(model, name)
    tensors = {
        f"{path}.{own}": parameter.detach().float().cpu().contiguous()
        for path, made in places.items()
        for own, parameter in made.named_parameters()
    }
    write_adapter(Path(directory), {"peft_type": "BOTTLENECK"} | all_settings(model)[name]._asdict(), tensors, metadata)


def load_adapter(model: nn.Module, directory: str | Path, base_sha256: str | None = None, name: str | None = None) -> str:
    """Add the adapter of a directory, on top of the stack; its name, which is the file's unless one is given.

    base_sha256: of the model's base weights; a file that names another one is refused. Raises FileNotFoundError where a
    file is missing; ValueError, and the model is as it was, where a file is damaged or holds no such adapter, the name
    is taken, or names (both lists are in the message) or shapes do not fit the model.
    """
    config_path, weights_path = Path(directory) / CONFIG_FILE, Path(directory) / WEIGHTS_FILE
    settings = read_settings(Path(directory))
    tensors, metadata = read_tensors(weights_path)
    refuse_other_base(weights_path, metadata, base_sha256)
    if name is not None:
        settings = settings._replace(name=name)
    try:
        check_new_name(model, settings.name)
        paths = residual_names(model, settings.sublayers, settings.where)
    except ValueError as error:
        raise ValueError(f"{config_path} does not fit: {short([str(error)])}") from None
    adapters = bottlenecks(model, paths, settings)
    own = {f"{path}.{key}": value for path, made in adapters.items() for key, value in made.named_parameters()}
    refuse_other_names(weights_path, own.keys() - tensors.keys(), tensors.keys() - own.keys())
    wrong = [
        f"{key} has shape {list(tensors[key].shape)}, expected {list(parameter.shape)}"
        for key, parameter in own.items()
        if tensors[key].shape != parameter.shape
    ]
    wrong += [
        f"{key} is {str(tensors[key].dtype).removeprefix('torch.')}, expected floating point" for key in own if not tensors[key].is_floating_point()
    ]
    # In the parameter's dtype: a number that is finite in a wider one need not be so here.
    real = [key for key in own if tensors[key].is_floating_point()]
    wrong += [f"{key} holds values that are not finite" for key in real if not tensors[key].to(own[key].dtype).isfinite().all()]
    if wrong:
        raise ValueError(f"{weights_path} does not fit: {short(wrong)}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])
    attach(model, adapters, settings)
    return settings.name


def read_settings(directory: Path) -> AdapterSettings:
    """adapter_config.json of a directory, checked to be an adapter that Bottleneck can compute."""
    config, path = read_config(directory), directory / CONFIG_FILE
    if config.get("peft_type") != "BOTTLENECK":
        raise ValueError(f"{path}: peft_type is {short([json.dumps(config.get('peft_type'))])}, not BOTTLENECK")
    lacking = [key for key in AdapterSettings._fields if key not in config]
    if lacking:
        raise ValueError(f"{path}: lacks {', '.join(lacking)}")
    settings = AdapterSettings(*(config[key] for key in AdapterSettings._fields))
    try:
        check_settings(settings.style, settings.reduction)
        check_choices(settings.sublayers, SUBLAYERS, "sub-layer")
        check_choices(settings.where, WHERE, "place")
    except ValueError as error:
        raise ValueError(f"{path}: {short([str(error)])}") from None
    return settings
