"""Putting adapters into a model, and the one list of parameters that is trained."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lora.layers import LoRALinear, check_settings

TARGETS = {
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "ffn": ("wi", "wi_0", "wi_1", "wo", "fc1", "fc2"),
}
WHERE = {"decoder": "text.decoder", "encoder": "text.encoder", "vision": "vision"}

# Rows of the parameter table: the first prefix that fits a parameter's name takes it; adapters come before all.
PARTS = {
    "vision": ("vision.",),
    "bridge": ("bridge.",),
    "text encoder": ("text.encoder.",),
    "text decoder": ("text.decoder.",),
    "embeddings + head": ("text.embedding.", "text.lm_head."),
}
ADAPTERS, OTHER, TOTAL = "lora adapters", "other", "total"


def apply_lora(
    model: nn.Module,
    targets: Sequence[str] = ("attn", "ffn"),
    where: Sequence[str] = ("decoder",),
    rank: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.1,
    init: str = "gaussian",
    generator: torch.Generator | None = None,
) -> list[str]:
    """Replace the targeted nn.Linear modules by `LoRALinear` in place; their names, in module order.

    targets: groups (`attn`, `ffn`) or the last or several dotted components of names, compared whole: `q_proj`,
    `cross_attn.q_proj`, `self_attn` (all linears under it). where: `decoder`, `encoder`, `vision`. Draws A from
    generator, or torch's default one. Raises ValueError, and changes nothing, on an unknown target or place, a target
    that matches nothing in a place, a model that has LoRA already, or settings that LoRALinear refuses.
    """
    check_settings(rank, dropout, init)
    refuse_second_injection(model)
    matched: set[str] = set()
    for place in list_of(where, "where"):
        names = linear_names(model, place)
        for target in list_of(targets, "targets"):
            found = {
                name for name in names if any(matches(name, pattern) for pattern in TARGETS.get(target, (target,)))
            }
            if not found:
                everywhere = {name for known in WHERE if has_place(model, known) for name in linear_names(model, known)}
                if target not in TARGETS and not any(matches(name, target) for name in everywhere):
                    choices = sorted({name.rpartition(".")[2] for name in names})
                    groups = ", ".join(TARGETS)
                    raise ValueError(
                        f"unknown LoRA target {target!r}: one of {groups}, or a name such as {', '.join(choices)}"
                    )
                raise ValueError(f"LoRA target {target!r} matches no linear layer in the {place}")
            matched |= found
    return replace_linears(model, matched, rank, alpha, dropout, init, generator)


def replace_linears(
    model, names: Iterable[str], rank: int, alpha: float, dropout: float, init: str, generator=None
) -> list[str]:
    """Wrap exactly the named linears; their names, in module order."""
    names = set(names)
    ordered = [name for name, _ in model.named_modules() if name in names]
    for name in ordered:
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            LoRALinear(model.get_submodule(name), rank, alpha, dropout, init, generator),
        )
    return ordered


def refuse_second_injection(model: nn.Module) -> None:
    """Raises ValueError if the model has LoRA layers."""
    present = lora_modules(model)
    if present:
        raise ValueError(
            f"the model has LoRA on {len(present)} layers already, {next(iter(present))} the first; "
            "merge_lora(model, remove=True) folds them in"
        )


def list_of(value: Sequence[str], what: str) -> list[str]:
    """value without duplicates, in order. Raises ValueError if it is empty or a bare string."""
    if isinstance(value, str) or not value:
        raise ValueError(f"LoRA {what} must be a list of at least one name, not {value!r}")
    return list(dict.fromkeys(value))


def has_place(model: nn.Module, place: str) -> bool:
    """Whether the model has the part that a key of WHERE names."""
    try:
        return isinstance(model.get_submodule(WHERE[place]), nn.Module)
    except AttributeError:
        return False


def linear_names(model: nn.Module, place: str) -> list[str]:
    """Names of the nn.Linear modules in one place. Raises ValueError if the place is unknown or the model lacks it."""
    if place not in WHERE:
        raise ValueError(f"unknown LoRA place {place!r}: one of {', '.join(WHERE)}")
    if not has_place(model, place):
        raise ValueError(f"this model has no {place} ({WHERE[place]}) for LoRA")
    prefix = WHERE[place]
    return [
        f"{prefix}.{name}"
        for name, module in model.get_submodule(prefix).named_modules()
        if isinstance(module, nn.Linear)
    ]


def matches(name: str, pattern: str) -> bool:
    """Whether the components of pattern stand one after another in name, whole."""
    return f".{pattern}." in f".{name}."


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """LoRA layers by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that LoRA added, by their names in the model."""
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in lora_modules(model).items()
        for own, parameter in module.adapter_parameters().items()
    }


def set_trainable(model: nn.Module, also: Iterable[str] = ("bridge",)) -> dict[str, nn.Parameter]:
    """Freeze everything but the adapters and the parameters under the modules named in also; what is trained, by name.

    That one list, in the model's order and with tied weights once, drives freezing, optimiser, counting and saving.
    Raises ValueError if the model has no module of a name in also.
    """
    adapters = set(adapter_parameters(model))
    prefixes = []
    for name in also:
        try:
            model.get_submodule(name)
        except AttributeError:
            choices = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"no part {name!r} to train: the model has {choices}") from None
        prefixes.append(f"{name}.")
    trainable, seen = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (name in adapters or name.startswith(tuple(prefixes))) and id(parameter) not in seen:
            trainable[name] = parameter
            seen.add(id(parameter))
    model.requires_grad_(False)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    return trainable


class ParameterRow(NamedTuple):
    """Numbers of parameters in one part of a model."""

    part: str
    trainable: int
    total: int


def parameter_table(model: nn.Module, trainable: dict[str, nn.Parameter]) -> list[ParameterRow]:
    """Trainable and total parameters by part, tied weights once; the parts that the model lacks are left out, the
    last row is the sum.
    """
    adapters = set(adapter_parameters(model))
    trained = {id(parameter) for parameter in trainable.values()}
    counts = {part: [0, 0] for part in (*PARTS, OTHER, ADAPTERS)}
    for name, parameter in model.named_parameters():
        part = next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), OTHER)
        count = counts[ADAPTERS if name in adapters else part]
        count[0] += parameter.numel() if id(parameter) in trained else 0
        count[1] += parameter.numel()
    rows = [ParameterRow(part, *count) for part, count in counts.items() if count[1]]
    return [*rows, ParameterRow(TOTAL, sum(row.trainable for row in rows), sum(row.total for row in rows))]


def format_parameter_table(rows: Sequence[ParameterRow]) -> str:
    """The rows of `parameter_table` as aligned text with the trained share in percent."""
    lines = [("part", "trainable", "total", "%")]
    lines += [
        (row.part, f"{row.trainable:,}", f"{row.total:,}", f"{100 * row.trainable / max(1, row.total):.2f}")
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def merge_lora(model: nn.Module, remove: bool = False) -> None:
    """Merge every LoRA layer into its base weight; twice is once. remove puts the plain linears back: the model then
    has no LoRA.
    """
    for name, module in lora_modules(model).items():
        module.merge()
        if remove:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora` bit for bit."""
    for module in lora_modules(model).values():
        module.unmerge()
