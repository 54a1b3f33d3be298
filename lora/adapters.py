"""Bottleneck adapters: small trained networks where a sub-layer's output joins the residual stream.

    y = x + f + scale * up(activation(down(read)))          f = dropout(sub-layer(source)), source = norm(x)

What `read` is tells the styles apart, see STYLES. `up` starts at zero, so that a new adapter changes nothing. Adapters
have names; those of a model's stack are applied in turn, the lowest first, and each reads the update that the ones
below have changed. The others are kept and do nothing.

Legend: D width.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora.inject import WHERE, has_place

SUBLAYERS = {"attn": ("self_attn_residual", "cross_attn_residual", "attn_residual"), "ffn": ("mlp_residual",)}
# A run keeps other things in folders of these names.
RESERVED = ("lora", "prompt", "bridge", "vision", "text")


class Style(NamedTuple):
    """One kind of adapter: what it reads of the stream x, the update f and the normed input, and what it does to it."""

    reads: Callable[[Tensor, Tensor, Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    scale: float


STYLES = {
    # arXiv 1902.00751: behind the sub-layer, y = x + f + A(f); the activation is that of AdapterHub's double_seq_bn.
    "houlsby": Style(lambda x, update, source: update, F.silu, 1.0),
    # arXiv 2005.00052, in a pre-norm block as AdapterHub's seq_bn: y = x + f + A(x + f).
    "pfeiffer": Style(lambda x, update, source: x + update, F.relu, 1.0),
    # arXiv 2110.04366: beside the sub-layer, reading what it reads, y = x + f + 4 A(source). AdapterHub's par_bn reads x.
    "parallel": Style(lambda x, update, source: source, F.relu, 4.0),
}


class AdapterSettings(NamedTuple):
    """What an adapter was made with."""

    name: str
    style: str
    reduction: int
    sublayers: Sequence[str]
    where: Sequence[str]


class Projection(nn.Module):
    """x W^T + b with W and b cast to x's dtype at use. No nn.Linear, so that nothing takes it for a layer of the base."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Bottleneck(nn.Module):
    """scale * up(activation(down(x))), D → max(1, D // reduction) → D, with the style's activation and scale.

    down.weight is kaiming_uniform(a=sqrt 5), drawn from generator or torch's default one; all else is zero, as in the
    code of arXiv 2110.04366. Parameters are fp32 (or wider, as dtype asks); under autocast and where x is bf16 the
    products are in that precision. Raises ValueError on an unknown style or a reduction below 1.
    """

    def __init__(
        self,
        width: int,
        reduction: int = 16,
        style: str = "houlsby",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        super().__init__()
        check_settings(style, reduction)
        self.width, self.reduction, self.style = width, reduction, style
        hidden = max(1, width // reduction)
        dtype = torch.promote_types(dtype, torch.float32)
        self.down = Projection(width, hidden, dtype, device)
        self.up = Projection(hidden, width, dtype, device)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → (..., D) in x's dtype."""
        style = STYLES[self.style]
        return (style.scale * self.up(style.activation(self.down(x)))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, reduction={self.reduction}, style={self.style}"


class AdaptedResidual(nn.Module):
    """A residual connection with named adapters. Without active ones it is exactly base.

    base: a module with `width`, `dropout` and base(x, update, source) = x + dropout(update). `adapters` holds the
    adapters here by name. All residuals of a model agree on `settings`, of all its adapters by name in order of
    addition, and on `stack`, the names of the active ones, the lowest first; those that are not here are skipped.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.settings: dict[str, AdapterSettings] = {}
        self.stack: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.base.width

    @property
    def dropout(self) -> nn.Module:
        return self.base.dropout

    def forward(self, x: Tensor, update: Tensor, source: Tensor) -> Tensor:
        """Stream x, the sub-layer's output and its normed input, each (..., D) → (..., D)."""
        active = [self.adapters[name] for name in self.stack if name in self.adapters]
        if not active:
            return self.base(x, update, source)
        update = self.dropout(update)
        for adapter in active:
            update = update + adapter(STYLES[adapter.style].reads(x, update, source)).to(update.dtype)
        return x + update

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all adapters here by name, active or not, without base's."""
        return {f"adapters.{name}": parameter for name, parameter in self.adapters.named_parameters()}

    def extra_repr(self) -> str:
        return f"stack={self.stack}"


def apply_adapters(
    model: nn.Module,
    sublayers: Sequence[str] = ("attn", "ffn"),
    where: Sequence[str] = ("decoder",),
    reduction: int = 16,
    style: str = "houlsby",
    name: str = "caption",
    generator: torch.Generator | None = None,
) -> list[str]:
    """Add one named adapter, on top of the stack, to the residual connections of the given places; their names, in
    module order.

    sublayers: `attn` (self- and cross-attention), `ffn`. where: `decoder`, `encoder`, `vision`. style: a key of STYLES.
    name: letters, digits, - and _. Draws from generator, or torch's default one. Raises ValueError, and changes
    nothing, on an unknown sub-layer, place or style, a name that is taken or cannot be one, a reduction below 1, or a
    place without such residual connections.
    """
    check_new_name(model, name)
    paths = residual_names(model, sublayers, where)
    settings = AdapterSettings(name, style, reduction, tuple(sublayers), tuple(where))
    attach(model, bottlenecks(model, paths, settings, generator), settings)
    return paths


def bottlenecks(
    model: nn.Module, paths: Iterable[str], settings: AdapterSettings, generator: torch.Generator | None = None
) -> dict[str, Bottleneck]:
    """A new adapter for each residual connection, on the device of its block; the model is not changed."""
    made = {}
    for path in paths:
        near = next(model.get_submodule(path.rpartition(".")[0]).parameters())
        width = model.get_submodule(path).width
        made[path] = Bottleneck(width, settings.reduction, settings.style, generator, near.dtype, near.device)
    return made


def attach(model: nn.Module, adapters: Mapping[str, Bottleneck], settings: AdapterSettings) -> None:
    """Put adapters, by their residual connections' names, on top of the stack."""
    everything, stack = all_settings(model) | {settings.name: settings}, (*get_stack(model), settings.name)
    for path, adapter in adapters.items():
        residual = model.get_submodule(path)
        if not isinstance(residual, AdaptedResidual):
            residual = AdaptedResidual(residual)
            model.set_submodule(path, residual)
        residual.adapters[settings.name] = adapter
    agree(model, everything, stack)


def agree(model: nn.Module, settings: dict[str, AdapterSettings], stack: tuple[str, ...]) -> None:
    """Tell every adapted residual connection of what is in the model and what is active."""
    for residual in adapted_residuals(model).values():
        residual.settings, residual.stack = settings, stack


def residual_names(model: nn.Module, sublayers: Sequence[str], where: Sequence[str]) -> list[str]:
    """Names of the residual connections in these places, adapted or not, in module order. Raises ValueError."""
    check_choices(sublayers, SUBLAYERS, "sub-layer")
    check_choices(where, WHERE, "place")
    found: set[str] = set()
    for place in where:
        if not has_place(model, place):
            raise ValueError(f"this model has no {place} ({WHERE[place]}) for adapters")
        part = model.get_submodule(WHERE[place])
        for sublayer in sublayers:
            names = [path for path, module in part.named_modules() if is_residual(path, module, sublayer)]
            if not names:
                advice = ": a ViT of open_clip's has them; LoRA works in the linear layers of any" if place == "vision" else ""
                raise ValueError(
                    f"the {place} ({type(part).__name__}) has no residual connections of {sublayer} for adapters{advice}"
                )
            found.update(f"{WHERE[place]}.{path}" for path in names)
    return [path for path, _ in model.named_modules() if path in found]


def is_residual(path: str, module: nn.Module, sublayer: str) -> bool:
    """Whether a module is the residual connection behind a sub-layer: by its name and what it has."""
    return path.rpartition(".")[2] in SUBLAYERS[sublayer] and hasattr(module, "width") and hasattr(module, "dropout")


def check_choices(names: Sequence[str], choices: Iterable[str], what: str) -> None:
    """Raises ValueError unless names is a list of at least one of the choices."""
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError(f"adapter {what}s must be a list of at least one of {', '.join(choices)}, not {names!r}")
    for name in names:
        if name not in tuple(choices):
            raise ValueError(f"unknown adapter {what} {name!r}: one of {', '.join(choices)}")


def check_settings(style: str, reduction: int) -> None:
    """Raises ValueError, in one line, on settings that no Bottleneck can have."""
    if style not in tuple(STYLES):
        raise ValueError(f"unknown adapter style {style!r}: one of {', '.join(STYLES)}")
    if not isinstance(reduction, int) or reduction < 1:
        raise ValueError(f"adapter reduction must be a whole number of at least 1, not {reduction!r}")


def check_new_name(model: nn.Module, name: str) -> None:
    """Raises ValueError if no adapter of the model can be called so: the name is also a folder's and a module's."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"an adapter's name has letters, digits, - and _ and nothing else, not {name!r}")
    if name in RESERVED:
        raise ValueError(f"an adapter cannot be called {name!r}: {', '.join(RESERVED)} are names of other things")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adapter cannot be called {name!r}: modules of PyTorch have an attribute of that name")
    if name in adapter_names(model):
        raise ValueError(f"there is an adapter {name!r} already; the model has {', '.join(adapter_names(model))}")


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError on a name that no adapter of the model has."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter {name!r}: the model has {', '.join(known) or 'none'}")


def adapted_residuals(model: nn.Module) -> dict[str, AdaptedResidual]:
    """Residual connections with adapters by name, in module order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedResidual)}


def all_settings(model: nn.Module) -> dict[str, AdapterSettings]:
    """Settings of every adapter by name, in order of addition."""
    return next((residual.settings for residual in adapted_residuals(model).values()), {})


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters, active or not, in order of addition."""
    return list(all_settings(model))


def places_of(model: nn.Module, name: str) -> dict[str, Bottleneck]:
    """One adapter's parts by their residual connections' names, in module order. Raises ValueError on an unknown name."""
    check_known(model, [name])
    residuals = adapted_residuals(model).items()
    return {path: residual.adapters[name] for path, residual in residuals if name in residual.adapters}


def get_stack(model: nn.Module) -> tuple[str, ...]:
    """Names of the active adapters, the lowest (applied first) first."""
    return next((residual.stack for residual in adapted_residuals(model).values()), ())


def set_stack(model: nn.Module, names: Sequence[str]) -> None:
    """Make these adapters active, the lowest first, and no others; () switches all off.

    Raises ValueError, and changes nothing, on unknown or repeated names.
    """
    if isinstance(names, str):
        raise ValueError(f"an adapter stack is a list of names, not {names!r}")
    check_known(model, names)
    repeated = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if repeated:
        raise ValueError(f"adapter {repeated[0]!r} is in the stack twice; the model has {', '.join(adapter_names(model))}")
    agree(model, all_settings(model), tuple(names))


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter out; where it was the last, the plain residual connection is put back. Raises ValueError."""
    places = places_of(model, name)
    settings = {other: own for other, own in all_settings(model).items() if other != name}
    stack = tuple(other for other in get_stack(model) if other != name)
    for path in places:
        residual = model.get_submodule(path)
        del residual.adapters[name]
        if not residual.adapters:
            model.set_submodule(path, residual.base)
    agree(model, settings, stack)
