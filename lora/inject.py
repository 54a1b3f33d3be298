"""Putting LoRA into a model, and the one list of parameters that is trained, whatever kind of adapter they belong to.

Every module that adds trained parameters tells them by a method `adapter_parameters() -> dict[str, nn.Parameter]`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora import functional
from lora.layers import LoRALinear, check_settings
from lora.masks import DropoutStream
from lora.quant import Linear4bit, NF4Weight

# Groups of target modules. timm's Transformers have one linear for q, k and v (attn.qkv) and call the output attn.proj.
TARGETS = {
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj", "attn.qkv", "attn.proj"),
    "ffn": ("wi", "wi_0", "wi_1", "wo", "fc1", "fc2"),
}
# Other names of one linear: T5's own, and CLIP's output projection in Hugging Face's.
ALIASES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "out_proj": "o_proj"}
WHERE = {"decoder": "text.decoder", "encoder": "text.encoder", "vision": "vision"}

# Rows of the parameter table: the first prefix that fits a parameter's name takes it; what was added comes before all.
PARTS = {
    "vision": ("vision.",),
    "bridge": ("bridge.",),
    "text encoder": ("text.encoder.",),
    "text decoder": ("text.decoder.",),
    "embeddings + head": ("text.embedding.", "text.lm_head."),
}
OTHER, TOTAL = "other", "total"
# What `set_trainable` calls the added parts that are no named bottleneck adapters.
LORA, PROMPT = "lora", "prompt"


def apply_lora(
    model: nn.Module,
    targets: Sequence[str] = ("attn", "ffn"),
    where: Sequence[str] = ("decoder",),
    rank: int | Mapping[str, int] = 8,
    alpha: float = 8.0,
    dropout: float = 0.1,
    init: str = "gaussian",
    generator: torch.Generator | None = None,
    rslora: bool = True,
) -> list[str]:
    """Replace the targeted linear modules by `LoRALinear` in place; their names, in module order.

    targets: groups (`attn`, `ffn`) or the last or several dotted components of names, compared whole: `q_proj` or `q`,
    `cross_attn.q_proj`, `self_attn` (all linears under it). where: `decoder`, `encoder`, `vision`. rank: one for all,
    or one for each place of where, `{"decoder": 8, "vision": 4}`. alpha, dropout, init, rslora as in LoRALinear. Draws
    A from generator, or torch's default one. Raises ValueError, and changes nothing, on an unknown target or place, a
    target that matches nothing in a place, ranks for other places than where, a model that has LoRA already, or
    settings that LoRALinear refuses. Bottleneck adapters and soft prompts may be there already and get no LoRA.
    """
    places = list_of(where, "where")
    ranks = rank_of_places(rank, places)
    for place_rank in ranks.values():
        check_settings(place_rank, alpha, dropout, init)
    refuse_second_injection(model)
    layers: dict[str, dict[str, Any]] = {}
    for place in places:
        names = linear_names(model, place)
        for target in list_of(targets, "targets"):
            found = [name for name in names if any(matches(name, pattern) for pattern in patterns(target))]
            if not found:
                everywhere = [name for known in WHERE if has_place(model, known) for name in linear_names(model, known)]
                if target not in TARGETS and not any(matches(name, *patterns(target)) for name in everywhere):
                    choices = sorted({name.rpartition(".")[2] for name in names})
                    groups = ", ".join(TARGETS)
                    raise ValueError(
                        f"unknown LoRA target {target!r}: one of {groups}, or a name such as {', '.join(choices)}"
                    )
                raise ValueError(f"LoRA target {target!r} matches no linear layer in the {place}")
            settings = {"rank": ranks[place], "alpha": alpha, "dropout": dropout, "init": init, "rslora": rslora}
            layers |= dict.fromkeys(found, settings)
    return replace_linears(model, layers, generator)


def rank_of_places(rank: int | Mapping[str, int], places: Sequence[str]) -> dict[str, int]:
    """The rank of each place. Raises ValueError if a mapping's keys are not exactly the places."""
    if not isinstance(rank, Mapping):
        return dict.fromkeys(places, rank)
    missing, unexpected = (sorted(set(a) - set(b)) for a, b in ((places, rank), (rank, places)))
    if missing or unexpected:
        lists = f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
        raise ValueError(f"LoRA ranks must name the places {', '.join(places)}: {lists}")
    return dict(rank)


def patterns(target: str) -> tuple[str, ...]:
    """The dotted names that a target stands for."""
    prefix, dot, last = target.rpartition(".")
    return TARGETS.get(target, (prefix + dot + ALIASES.get(last, last),))


def replace_linears(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], generator: torch.Generator | None = None
) -> list[str]:
    """Wrap exactly the named linears, each with its settings of `LoRALinear`; their names, in module order."""
    ordered = [name for name, _ in model.named_modules() if name in layers]
    for name in ordered:
        parent, _, child = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), generator=generator, **layers[name])
        setattr(model.get_submodule(parent), child, layer)
    # Numbered over all LoRA of the model: one that is loaded folder by folder draws the masks that it was trained with.
    stream = DropoutStream()
    for number, layer in enumerate(lora_modules(model).values()):
        layer.stream, layer.stream_number = stream, number
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


def places_of(names: Iterable[str]) -> list[str]:
    """The places, keys of WHERE, under which modules of these names lie, sorted."""
    return sorted({place for place, prefix in WHERE.items() for name in names if name.startswith(f"{prefix}.")})


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that LoRA can wrap, by name, in module order: linears that belong to no adapter."""
    adapters = tuple(f"{name}." for name in adapter_modules(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Linear4bit) and not name.startswith(adapters)
    }


def linear_names(model: nn.Module, place: str) -> list[str]:
    """Names of the `linears` in one place. Raises ValueError if the place is unknown or the model lacks it."""
    if place not in WHERE:
        raise ValueError(f"unknown LoRA place {place!r}: one of {', '.join(WHERE)}")
    if not has_place(model, place):
        raise ValueError(f"this model has no {place} ({WHERE[place]}) for LoRA")
    return [name for name in linears(model) if name.startswith(f"{WHERE[place]}.")]


def matches(name: str, pattern: str) -> bool:
    """Whether the components of pattern stand one after another in name, whole."""
    return f".{pattern}." in f".{name}."


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """LoRA layers by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that add trained parameters (LoRA, bottleneck adapters, soft prompts), by name, in module order."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "adapter_parameters")}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that LoRA, bottleneck adapters and soft prompts added, by their names in the model."""
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in adapter_modules(model).items()
        for own, parameter in module.adapter_parameters().items()
    }


def adapter_kinds(model: nn.Module) -> dict[str, str]:
    """What each of `adapter_parameters` belongs to: `lora`, `prompt`, or the name of a bottleneck adapter."""
    lora = tuple(f"{name}." if name else "" for name in lora_modules(model))
    kinds = {}
    for name in adapter_parameters(model):
        named = re.search(r"(?:^|\.)adapters\.([^.]+)\.", name)
        kinds[name] = LORA if name.startswith(lora) else named[1] if named else PROMPT
    return kinds


def set_trainable(
    model: nn.Module, also: Iterable[str] = ("bridge",), frozen: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """Freeze everything but the adapters and the parameters under the modules named in also; what is trained, by name.

    frozen: parts that stay as they are although they were added: `lora`, `prompt`, names of bottleneck adapters, or
    names in also. The one list that is returned, in the model's order and with tied weights once, drives freezing,
    optimiser, counting and saving. Raises ValueError if the model has no module of a name in also, or nothing of a
    name in frozen.
    """
    kinds = adapter_kinds(model)
    also, frozen = list(also), set(frozen)
    for name in also:
        try:
            model.get_submodule(name)
        except AttributeError:
            choices = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"no part {name!r} to train: the model has {choices}") from None
    choices = list(dict.fromkeys([*kinds.values(), *also]))
    unknown = sorted(frozen - set(choices))
    if unknown:
        raise ValueError(f"no part {unknown[0]!r} to freeze: what would be trained is {', '.join(choices) or 'nothing'}")
    prefixes = tuple(f"{name}." for name in also if name not in frozen)
    trainable, seen = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trained = kinds[name] not in frozen if name in kinds else name.startswith(prefixes)
        if trained and id(parameter) not in seen:
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
    last row is the sum. LoRA, each named adapter and soft prompts have rows of their own; a number in 4 bits is one.
    """
    kinds = adapter_kinds(model)
    named = {kind: f"adapter {kind}" for kind in kinds.values() if kind not in (LORA, PROMPT)}
    labels = {LORA: "LoRA", **named, PROMPT: "soft prompt"}
    trained = {id(parameter) for parameter in trainable.values()}
    numbers = [(name, parameter.numel(), id(parameter) in trained) for name, parameter in model.named_parameters()]
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, NF4Weight)]
    numbers += [(name, module.shape.numel(), False) for name, module in packed]
    counts = {part: [0, 0] for part in (*PARTS, OTHER, *labels.values())}
    for name, size, is_trained in numbers:
        part = next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), OTHER)
        count = counts[labels[kinds[name]] if name in kinds else part]
        count[0] += size if is_trained else 0
        count[1] += size
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


def seed_dropout(model: nn.Module, seed: int, step: int) -> None:
    """The masks of all LoRA layers are those of (seed, step) from here on; a micro-batch counts as a step of its own."""
    for stream in {module.stream for module in lora_modules(model).values()}:
        stream.seed(seed, step)


def kernel_report(model: nn.Module, rows: int, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Which implementation LoRA layers use for inputs of so many rows, and why, a line each: `fused on 132 layers (CPU; ...)`. Raises ValueError where
    the one asked for can not run.
    """
    counts: dict[tuple[str, str], int] = {}
    for layer in lora_modules(model).values():
        if isinstance(layer.base, Linear4bit):
            choice = functional.choose_over_4_bits()
        else:
            x = torch.empty((rows, layer.in_features), dtype=dtype, device=device)
            name, _, reason = functional.choose(x, [layer.base.weight], [layer.base.bias], [layer.adapter], layer.dropout)
            choice = name, reason
        counts[choice] = counts.get(choice, 0) + 1
    return [f"{name} on {count} layers ({reason})" for (name, reason), count in counts.items()]


def lay_out(groups: Iterable[Sequence[nn.Module]]) -> None:
    """Put the frozen weights of every group of layers that read one input where `lora_linears` multiplies by them and by B at once; groups with a
    layer that is no LoRALinear on a frozen nn.Linear are left alone. Do it after the model is on its device and in its precision.
    """
    for layers in groups:
        if all(isinstance(layer, LoRALinear) and isinstance(layer.base, nn.Linear) and not layer.base.weight.requires_grad for layer in layers):
            functional.lay_out([layer.base.weight for layer in layers], sum(layer.rank for layer in layers))


def merge_lora(model: nn.Module, remove: bool = False) -> None:
    """Merge every LoRA layer into its base weight; twice is once. remove puts the plain linears back: the model then
    has no LoRA. Raises ValueError, and changes nothing, where a base is in 4 bits.
    """
    modules = lora_modules(model)
    # A 4-bit base refuses, so these come before any weight is changed.
    for module in sorted(modules.values(), key=lambda module: isinstance(module.base, nn.Linear)):
        module.merge()
    if remove:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora` bit for bit."""
    for module in lora_modules(model).values():
        module.unmerge()
