"""Soft prompts: trained embeddings before the text that a stack of T5 reads (prompt tuning, arXiv 2104.08691), and
peft's files of them.

A decoder's prompt stands before the start token. An encoder's stands before the encoder's text; where that text is
empty, it is an instruction whose encoded states follow the image's in the memory (`Captioner.read`).

What peft 0.21 computes with its files, S = num_transformer_submodules:

| peft_type               | S    | prompt_embeddings | before the encoder's text | before the decoder's |
| ----------------------- | ---- | ----------------- | ------------------------- | -------------------- |
| PROMPT_TUNING           | 1, 2 | (S * P, D)        | the first P rows          | nothing              |
| MULTITASK_PROMPT_TUNING | 1    | (P, D)            | all rows, times M         | nothing              |
| MULTITASK_PROMPT_TUNING | 2    | (2 * P, D)        | the first P rows, times M | the others, times M  |

M = prefix_task_cols[task] @ prefix_task_rows[task] (arXiv 2303.02861). So an encoder's prompt is written as
PROMPT_TUNING, and one of the decoder, which PROMPT_TUNING never reads, as MULTITASK_PROMPT_TUNING with a single task of
M = 1; without an encoder's prompt the first P rows are zeros and the tensor file's metadata has `places: decoder`. peft
then gives equal logits when it is called with `task_ids` of zeros and `labels` or `decoder_inputs_embeds`, and, for a
decoder's prompt alone, with `encoder_outputs`, since a text would come behind the zeros (`input_ids` must be given all
the same, and are not read). Its logits and labels include the prompt's positions.

Legend: B batch, D width, P prompt tokens, R rank.
"""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.inject import WHERE, has_place
from lora.interop import WEIGHTS_FILE, read_tensors, refuse_other_base, refuse_other_names, write_adapter
from lora.peft_config import CONFIG_FILE, read_config, short

PLACES = ("encoder", "decoder")  # in the order of peft's rows
PLAIN, MULTITASK = "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING"
COMMON = 5000  # T5's vocabulary is ordered by frequency; the paper samples its 5,000 most common tokens


class SoftPrompt(nn.Module):
    """P trained embeddings, the same for every text of a batch: embeddings (P, D), fp32 even if made from bf16."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        self.embeddings = nn.Parameter(embeddings.detach().to(dtype, copy=True))

    def forward(self, batch: int) -> Tensor:
        """→ (batch, P, D)."""
        return self.embeddings.expand(batch, -1, -1)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters by name."""
        return {"embeddings": self.embeddings}

    def extra_repr(self) -> str:
        return "tokens={}, width={}".format(*self.embeddings.shape)


@torch.no_grad()
def initial_prompt(
    embedding: nn.Module,
    ids: Sequence[int] | None = None,
    length: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token embeddings to start a prompt from: (P, D).

    Either those of ids, a text's tokens without eos: the model then begins as one that reads this text, so that its
    logits are those for the decoder input [ids, start, caption...] without the first P positions. Or those of `length`
    different tokens out of the 5,000 most common, drawn by generator or torch's default one ("sampled vocabulary").
    Raises ValueError unless one of the two is given, and on a length or id out of range.
    """
    if (ids is None) == (length is None):
        raise ValueError("a soft prompt starts from the ids of a text or from a length: give one of the two")
    size = embedding.num_embeddings
    if ids is None:
        common = min(size, COMMON)
        if not 1 <= length <= common:
            raise ValueError(f"soft prompt length must be from 1 to {common}, not {length}")
        device = "cpu" if generator is None else generator.device
        ids = torch.randperm(common, generator=generator, device=device)[:length].tolist()
    elif not len(ids):
        raise ValueError("a soft prompt needs at least 1 token, and its text has none")
    outside = [token for token in ids if not 0 <= token < size]
    if outside:
        raise ValueError(f"token {outside[0]} of the soft prompt is not in the embedding of {size} tokens")
    stored = next(iter([*embedding.parameters(), *embedding.buffers()]))
    return embedding(torch.tensor(ids, device=stored.device))


def apply_soft_prompt(model: nn.Module, embeddings: Tensor, where: Sequence[str] = ("decoder",)) -> list[str]:
    """Put a prompt that starts as embeddings (P, D) before the text of each place; the modules' names, in module order.

    where: `decoder`, `encoder`; each gets a copy of its own. Raises ValueError, and changes nothing, on an unknown
    place, one that the model lacks or that has a prompt, or embeddings of another width or without rows.
    """
    if isinstance(where, str) or not where:
        raise ValueError(f"soft prompt places must be a list of at least one of {', '.join(PLACES)}, not {where!r}")
    return attach(model, dict.fromkeys(where, embeddings))


def attach(model: nn.Module, embeddings: Mapping[str, Tensor]) -> list[str]:
    """`apply_soft_prompt` with embeddings (P, D) for each place."""
    for place, rows in embeddings.items():
        if place not in PLACES:
            raise ValueError(f"unknown soft prompt place {place!r}: one of {', '.join(PLACES)}")
        if not has_place(model, place):
            raise ValueError(f"this model has no {place} ({WHERE[place]}) for a soft prompt")
        stack = model.get_submodule(WHERE[place])
        if stack.prefix is not None:
            raise ValueError(f"the {place} has a soft prompt already ({WHERE[place]}.prefix)")
        width = stack.norm.weight.shape[0]
        if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != width:
            raise ValueError(f"a soft prompt of this {place} has shape [at least 1, {width}], not {list(rows.shape)}")
    places = [place for place in PLACES if place in embeddings]
    for place in places:
        stack = model.get_submodule(WHERE[place])
        stack.prefix = SoftPrompt(embeddings[place].to(stack.norm.weight.device))
    return [f"{WHERE[place]}.prefix" for place in places]


def prompts(model: nn.Module) -> dict[str, SoftPrompt]:
    """The model's soft prompts by place."""
    found = {place: model.get_submodule(WHERE[place]).prefix for place in PLACES if has_place(model, place)}
    return {place: prompt for place, prompt in found.items() if isinstance(prompt, SoftPrompt)}


def save_prompt(
    model: nn.Module,
    directory: str | Path,
    base_model_name: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the model's prompts into directory in peft's layout (see above), in fp32.

    metadata goes into the tensor file as it is (`base_sha256` is compared when loading). Raises ValueError if the model
    has no prompt or two of different lengths, and OSError where the files cannot be written.
    """
    found = {place: prompt.embeddings.detach().float().cpu() for place, prompt in prompts(model).items()}
    if not found:
        raise ValueError("the model has no soft prompt to save")
    if len({len(rows) for rows in found.values()}) > 1:
        lengths = ", ".join(f"{place} {len(rows)}" for place, rows in found.items())
        raise ValueError(f"one PEFT file cannot hold soft prompts of different lengths: {lengths}")
    length, width = next(iter(found.values())).shape
    submodules = 2 if "decoder" in found else 1
    sizes = model.text.config
    config = {
        "peft_type": PLAIN if submodules == 1 else MULTITASK,
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model_name,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": submodules,
        "num_attention_heads": sizes.num_heads,
        "num_layers": sizes.num_layers or sizes.num_decoder_layers,
        "prompt_tuning_init": "RANDOM",
        "inference_mode": True,
    }
    rows = [found.get(place, torch.zeros(length, width)) for place in PLACES[:submodules]]
    tensors = {"prompt_embeddings": torch.cat(rows)}
    if submodules == 2:
        config |= {"num_tasks": 1, "num_ranks": 1}
        tensors["prefix_task_cols"] = torch.ones(1, 2 * length, 1)
        tensors["prefix_task_rows"] = torch.ones(1, 1, width)
    write_adapter(Path(directory), config, tensors, {**(metadata or {}), "places": ",".join(found)})


def load_prompt(model: nn.Module, directory: str | Path, base_sha256: str | None = None) -> list[str]:
    """Put the prompts of a directory, ours or peft's, where peft would; the modules' names, in module order.

    base_sha256: of the model's base weights; a file that names another one is refused. Of a PROMPT_TUNING file the rows
    that peft never reads are left out. Raises FileNotFoundError where a file is missing; ValueError, and the model is
    as it was, where a file is damaged, holds no soft prompt or several tasks, or tensor names (both lists are in the
    message), shapes or places do not fit.
    """
    config, weights_path = read_prompt_config(Path(directory)), Path(directory) / WEIGHTS_FILE
    tensors, metadata = read_tensors(weights_path)
    refuse_other_base(weights_path, metadata, base_sha256)
    check_tensors(tensors, expected_shapes(config), weights_path)
    rows, length = tensors["prompt_embeddings"].float(), config["num_virtual_tokens"]
    held = PLACES[:1]
    if config["peft_type"] == MULTITASK:
        rows = rows * (tensors["prefix_task_cols"][0].float() @ tensors["prefix_task_rows"][0].float())
        if not rows.isfinite().all():
            raise ValueError(f"{weights_path}: its prompt times its task is not finite")
        held = PLACES[: config["num_transformer_submodules"]]
    places = metadata["places"].split(",") if "places" in metadata else held
    if not set(places) <= set(held):
        raise ValueError(f"{weights_path}: its metadata names the places {short(places)}, it holds {short(held)}")
    try:
        return attach(model, {place: rows.split(length)[PLACES.index(place)] for place in places})
    except ValueError as error:
        raise ValueError(f"{weights_path} does not fit: {error}") from None


def read_prompt_config(directory: Path) -> dict:
    """`read_config`, checked to be a soft prompt of one task, with peft's defaults filled in. Raises ValueError."""
    config, path = read_config(directory), directory / CONFIG_FILE
    defaults = {"num_transformer_submodules": 2, "num_tasks": 1, "num_ranks": 1}
    config |= {key: value for key, value in defaults.items() if config.get(key) is None}
    allowed = {
        "peft_type": (PLAIN, MULTITASK),
        "task_type": ("SEQ_2_SEQ_LM",),
        "num_transformer_submodules": (1, 2),
        "num_tasks": (1,),
        "modules_to_save": (None, []),
    }
    for key, values in allowed.items():
        if config.get(key) not in values:
            choices = ", ".join(str(value) for value in values)
            raise ValueError(f"{path}: {key} = {reprlib.repr(config.get(key))} is not supported, only {choices}")
    for key in ("num_virtual_tokens", "token_dim", *defaults):
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key} = {reprlib.repr(config.get(key))} is not a whole number of at least 1")
    return config


def expected_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Tensors of a file with this config."""
    rows = config["num_virtual_tokens"] * config["num_transformer_submodules"]
    width, ranks = config["token_dim"], config["num_ranks"]
    task = {"prefix_task_cols": (1, rows, ranks), "prefix_task_rows": (1, ranks, width)}
    return {"prompt_embeddings": (rows, width)} | (task if config["peft_type"] == MULTITASK else {})


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raises ValueError unless names and shapes are these and all numbers floating-point and finite."""
    refuse_other_names(path, shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys())
    wrong = [
        f"{key} has shape {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in shapes.items()
        if tensors[key].shape != shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit its {CONFIG_FILE}: {short(wrong)}")
    damaged = [key for key, tensor in tensors.items() if not (tensor.is_floating_point() and tensor.float().isfinite().all())]
    if damaged:
        raise ValueError(f"{path}: {short(damaged)} has numbers that are not finite floating-point numbers")
