"""Weights from files: read a state dict, rename it through a donor's key table, check it, load it, fingerprint it.

Only safetensors is read; a pickle can run code when it is opened and is refused. A key table is one dict per donor:

    donor key template -> our key template | None | Split(our key templates)

`{}` in a template stands for a layer number, a trailing `*` for any rest, None means "known, and not used by us"; the
first template that fits a key counts. Tables are invertible (`export`), so a module can be written back under the
donor's names, bit for bit. Nothing loads partially: names are compared in both directions and every shape is checked
before the first tensor is copied.
"""

import hashlib
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from captioner.clip_hf import clip_config_to_hf
from captioner.errors import UserError
from captioner.files import read_json
from captioner.t5 import T5Config
from captioner.vit import VisionConfig

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
SINGLE_FILES = ("model.safetensors", "open_clip_model.safetensors")
INDEX_FILE = "model.safetensors.index.json"


# ---- files -----------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU and in the stored dtype.

    `path` is a .safetensors file, a model.safetensors.index.json (sharded: every shard and every tensor that the index
    names must be there, and no others), or a directory with model.safetensors, open_clip_model.safetensors or an index.
    Raises UserError for a missing path, a pickle (with the way to convert it), a damaged file, missing shards.
    """
    path = Path(path)
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}: no such file or directory")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    return _read_file(path)


def _read_directory(directory: Path) -> dict[str, Tensor]:
    for name in SINGLE_FILES:
        if (directory / name).is_file():
            return _read_file(directory / name)
    if (directory / INDEX_FILE).is_file():
        return _read_shards(directory / INDEX_FILE)
    for file in sorted(directory.iterdir()):
        if file.suffix in PICKLE_SUFFIXES:
            raise _pickle_refused(file)
    raise UserError(f"no weights in {directory}: expected {', '.join(SINGLE_FILES)} or {INDEX_FILE}")


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_refused(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a safetensors file: its name must end in .safetensors")
    if not path.is_file():  # to open a pipe would wait for ever
        raise UserError(f"{path} is no file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"cannot read {path}, a damaged or incomplete safetensors file: {one_line(error)}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = _weight_map(index)
    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise UserError(f"shard {shard} is missing: {index} names it, and it is not in {index.parent}")
        tensors = _read_file(index.parent / shard)
        elsewhere = [name for name in tensors if weight_map.get(name, shard) != shard]
        if elsewhere:
            raise UserError(f"{shard} holds tensors that {index} has in another shard: {_short(elsewhere)}")
        state.update(tensors)
    missing, unexpected = weight_map.keys() - state.keys(), state.keys() - weight_map.keys()
    if missing or unexpected:
        raise UserError(f"the shards of {index} do not match it: {both_lists(missing, unexpected)}")
    return state


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, of a shard index."""
    values = read_json(index)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"cannot read the shard index {index}: its weight_map is no object of file names")
    # The names come from the file: they may not lead out of its directory.
    outside = [shard for shard in weight_map.values() if Path(shard).name != shard or not shard.isprintable()]
    if outside:
        raise UserError(f"the shard index {index} names a file outside its directory: {_short(outside)}")
    return weight_map


def _pickle_refused(path: Path) -> UserError:
    target = path.with_name("model.safetensors" if path.name == "pytorch_model.bin" else path.stem + ".safetensors")
    return UserError(
        f"{path} is a pickle, which can run code when it is opened; if you trust it, convert it once: "
        'python -c "import torch, safetensors.torch as s; s.save_file({k: v.clone().contiguous() for k, v in '
        f"torch.load('{path}', map_location='cpu', weights_only=True).items()}}, '{target}')\""
    )


def one_line(error: Exception) -> str:
    """An exception of another library for the end of a message: its type and text, at most 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return text if text.isprintable() else ascii(text)


# ---- hub -------------------------------------------------------------------------------------------------


def fetch(repo: str, filename: str) -> Path:
    """Local path of a file of a Hugging Face repository, downloaded if need be.

    HF_HUB_OFFLINE=1 looks in the cache only. Raises UserError naming the file and the repository.
    """
    path, reason = _try_fetch(repo, filename)
    if path is None:
        raise UserError(f"cannot get {filename} of {repo} from the Hugging Face hub: {reason}")
    return path


def fetch_weights(repo: str) -> Path:
    """Local path for `read_state_dict`: a repository's model.safetensors, or its index, with all its shards fetched."""
    path, reason = _try_fetch(repo, SINGLE_FILES[0])
    if path is not None:
        return path
    index, _ = _try_fetch(repo, INDEX_FILE)
    if index is None:
        raise UserError(f"cannot get {SINGLE_FILES[0]} or {INDEX_FILE} of {repo} from the Hugging Face hub: {reason}")
    for shard in sorted(set(_weight_map(index).values())):
        fetch(repo, shard)
    return index


def _try_fetch(repo: str, filename: str) -> tuple[Path | None, str]:
    import huggingface_hub
    from huggingface_hub import constants, errors

    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename)), ""
    except errors.LocalEntryNotFoundError:
        return None, "it is not in the local cache and " + (
            "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        )
    except errors.GatedRepoError:
        return None, "the repository is gated: accept its terms on the hub and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        return None, "there is no such repository (or it is private: set HF_TOKEN)"
    except errors.EntryNotFoundError:
        return None, "the repository has no such file"
    except errors.HFValidationError as error:
        return None, f"not a repository name and not a local path ({one_line(error)})"
    except Exception as error:  # network libraries raise their own types; each becomes the same single line
        return None, one_line(error)


# ---- key tables ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A donor tensor that holds several of ours one after the other along `dim`, in equal parts."""

    targets: tuple[str, ...]
    dim: int = 0


Table = Mapping[str, str | None | Split]


@lru_cache(maxsize=None)
def _pattern(template: str) -> re.Pattern[str]:
    body, star = (template[:-1], "(.*)") if template.endswith("*") else (template, "")
    return re.compile(r"(\d+)".join(re.escape(part) for part in body.split("{}")) + star)


def _match(key: str, templates: Iterable[str]) -> tuple[str, tuple[str, ...]] | None:
    """The template that `key` follows, and what its {} and * stand for. An exact name comes before a template."""
    if key in templates:
        return key, ()
    for template in templates:
        match = _pattern(template).fullmatch(key)
        if match:
            return template, match.groups()
    return None


def _fill(template: str, parts: tuple[str, ...]) -> str:
    return template.replace("*", "{}").format(*parts)


def rename(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """A donor's state dict under our names. Raises UserError listing every key that the table does not know."""
    ours: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        found = _match(key, table)
        if found is None:
            unknown.append(key)
            continue
        rule = table[found[0]]
        if isinstance(rule, Split):
            count = len(rule.targets)
            if tensor.ndim <= rule.dim or tensor.shape[rule.dim] % count:
                raise UserError(f"{_short([key])} has shape {list(tensor.shape)}: axis {rule.dim} does not split into {count}")
            parts = [(target, part.clone()) for target, part in zip(rule.targets, tensor.chunk(count, rule.dim))]
        else:
            parts = [(rule, tensor)] if rule is not None else []
        for target, part in parts:
            name = _fill(target, found[1])
            if name in ours:
                raise UserError(f"{_short([key])} and another key are both {_short([name])} here")
            ours[name] = part
    if unknown:
        raise UserError(f"unknown keys: {_short(unknown)}")
    return ours


def export(state: Mapping[str, Tensor] | nn.Module, table: Table) -> dict[str, Tensor]:
    """The inverse of `rename`: our state dict (or module) under the donor's names, without what the table drops."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    inverse = {}
    for donor, rule in table.items():
        targets = rule.targets if isinstance(rule, Split) else (rule,) if rule is not None else ()
        inverse.update({target: (donor, position) for position, target in enumerate(targets)})
    donors: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        found = _match(key, inverse)
        if found is None:
            raise UserError(f"{key} has no name in the donor's table")
        donor, position = inverse[found[0]]
        name = _fill(donor, found[1])
        if not isinstance(table[donor], Split):
            donors[name] = tensor
            continue
        parts.setdefault(name, {})[position] = tensor
        if len(parts[name]) == len(table[donor].targets):
            pieces = parts.pop(name)
            donors[name] = torch.cat([pieces[i] for i in sorted(pieces)], dim=table[donor].dim)
    if parts:
        raise UserError(f"incomplete groups of tensors for {_short(parts)}")
    return donors


def load_into(module: nn.Module, state: Mapping[str, Tensor], table: Table | None, donor_name: str) -> None:
    """Load a donor's state dict into `module` in place, cast to the dtypes that the module has.

    `table` None means that the names are the module's own. `donor_name` is what messages call the source. A module on
    the meta device gets its memory here. Raises UserError, and changes nothing, if a key is unknown, missing or
    unexpected, a shape differs or a number is not finite; the message carries both sorted lists, the first 8 names of
    each.
    """
    mismatch = f"{donor_name} does not fit {type(module).__name__}"
    if table is not None:
        try:
            state = rename(state, table)
        except UserError as error:
            raise UserError(f"{mismatch}: {error}") from error
    own = module.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unexpected:
        raise UserError(f"{mismatch}: {both_lists(missing, unexpected)}")
    wrong = []
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            wrong.append(f"{key} has shape {list(state[key].shape)}, expected {list(tensor.shape)}")
        elif state[key].is_floating_point() != tensor.is_floating_point():
            wrong.append(f"{key} has dtype {state[key].dtype}, expected {tensor.dtype}")
    if wrong:
        raise UserError(f"{mismatch}: {_short(wrong)}")
    on_meta = any(tensor.is_meta for tensor in own.values())
    # In the module's dtype: a number that is finite in a wider one need not be so here.
    state = {key: state[key].to(tensor.dtype, copy=on_meta) for key, tensor in own.items()}
    damaged = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()]
    if damaged:
        raise UserError(f"{mismatch}: {_short(damaged)} has values that are not finite")
    module.load_state_dict(state, strict=True, assign=on_meta)


def _short(names: Iterable[str], limit: int = 8) -> str:
    """Names that come from a file, on one line: the first ones sorted, each at most 200 characters."""
    names = sorted(names)
    rest = f", … ({len(names)} in all)" if len(names) > limit else ""
    shown = [name if name.isprintable() else ascii(name) for name in names[:limit]]
    return ", ".join(name if len(name) <= 200 else f"{name[:200]}…" for name in shown) + rest if names else "none"


def both_lists(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """`missing: …; unexpected: …` for a message, the first 8 names of each."""
    return f"missing: {_short(missing)}; unexpected: {_short(unexpected)}"


def fingerprint(state: Mapping[str, Tensor] | nn.Module) -> str:
    """SHA-256 (hex) over the sorted names with shapes, dtypes and bytes: equal exactly if every stored number is."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


# ---- open_clip -------------------------------------------------------------------------------------------

# What an open_clip checkpoint holds besides its image tower.
OPEN_CLIP_TEXT: Table = {
    # CLIP's own text tower, the custom-text layout (also Hugging Face text models), CoCa's caption decoder.
    "positional_embedding": None,
    "token_embedding.*": None,
    "transformer.*": None,
    "ln_final.*": None,
    "text_projection": None,
    "text.*": None,
    "text_decoder.*": None,
    "logit_scale": None,
    "logit_bias": None,
    # Three integers that OpenAI's own archives carry.
    "input_resolution": None,
    "context_length": None,
    "vocab_size": None,
}

# To captioner.vit.VisionTransformer.
OPEN_CLIP_VIT: Table = {
    "visual.conv1.weight": "patch_embed.weight",
    "visual.class_embedding": "class_embedding",
    "visual.positional_embedding": "position_embedding",
    "visual.ln_pre.weight": "norm_pre.weight",
    "visual.ln_pre.bias": "norm_pre.bias",
    "visual.transformer.resblocks.{}.ln_1.weight": "blocks.{}.norm1.weight",
    "visual.transformer.resblocks.{}.ln_1.bias": "blocks.{}.norm1.bias",
    "visual.transformer.resblocks.{}.attn.in_proj_weight": Split(
        ("blocks.{}.attn.q_proj.weight", "blocks.{}.attn.k_proj.weight", "blocks.{}.attn.v_proj.weight")
    ),
    "visual.transformer.resblocks.{}.attn.in_proj_bias": Split(
        ("blocks.{}.attn.q_proj.bias", "blocks.{}.attn.k_proj.bias", "blocks.{}.attn.v_proj.bias")
    ),
    "visual.transformer.resblocks.{}.attn.out_proj.weight": "blocks.{}.attn.o_proj.weight",
    "visual.transformer.resblocks.{}.attn.out_proj.bias": "blocks.{}.attn.o_proj.bias",
    "visual.transformer.resblocks.{}.ls_1.gamma": "blocks.{}.scale1.gamma",
    "visual.transformer.resblocks.{}.ln_2.weight": "blocks.{}.norm2.weight",
    "visual.transformer.resblocks.{}.ln_2.bias": "blocks.{}.norm2.bias",
    "visual.transformer.resblocks.{}.mlp.c_fc.weight": "blocks.{}.mlp.fc1.weight",
    "visual.transformer.resblocks.{}.mlp.c_fc.bias": "blocks.{}.mlp.fc1.bias",
    "visual.transformer.resblocks.{}.mlp.c_proj.weight": "blocks.{}.mlp.fc2.weight",
    "visual.transformer.resblocks.{}.mlp.c_proj.bias": "blocks.{}.mlp.fc2.bias",
    "visual.transformer.resblocks.{}.ls_2.gamma": "blocks.{}.scale2.gamma",
    # The pooled image embedding is not used: our tokens leave before the post-norm.
    "visual.ln_post.*": None,
    "visual.proj": None,
    "visual.attn_pool.*": None,  # CoCa
} | OPEN_CLIP_TEXT


# ---- Hugging Face CLIP -----------------------------------------------------------------------------------

# To captioner.vit.VisionTransformer, under the names of transformers 5's CLIPVisionModel.
HF_CLIP_TOWER: Table = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "patch_embed.weight",
    "embeddings.position_embedding.weight": "position_embedding",
    "embeddings.position_ids": None,
    "pre_layrnorm.weight": "norm_pre.weight",
    "pre_layrnorm.bias": "norm_pre.bias",
    "encoder.layers.{}.layer_norm1.weight": "blocks.{}.norm1.weight",
    "encoder.layers.{}.layer_norm1.bias": "blocks.{}.norm1.bias",
    "encoder.layers.{}.self_attn.q_proj.weight": "blocks.{}.attn.q_proj.weight",
    "encoder.layers.{}.self_attn.q_proj.bias": "blocks.{}.attn.q_proj.bias",
    "encoder.layers.{}.self_attn.k_proj.weight": "blocks.{}.attn.k_proj.weight",
    "encoder.layers.{}.self_attn.k_proj.bias": "blocks.{}.attn.k_proj.bias",
    "encoder.layers.{}.self_attn.v_proj.weight": "blocks.{}.attn.v_proj.weight",
    "encoder.layers.{}.self_attn.v_proj.bias": "blocks.{}.attn.v_proj.bias",
    "encoder.layers.{}.self_attn.out_proj.weight": "blocks.{}.attn.o_proj.weight",
    "encoder.layers.{}.self_attn.out_proj.bias": "blocks.{}.attn.o_proj.bias",
    "encoder.layers.{}.layer_norm2.weight": "blocks.{}.norm2.weight",
    "encoder.layers.{}.layer_norm2.bias": "blocks.{}.norm2.bias",
    "encoder.layers.{}.mlp.fc1.weight": "blocks.{}.mlp.fc1.weight",
    "encoder.layers.{}.mlp.fc1.bias": "blocks.{}.mlp.fc1.bias",
    "encoder.layers.{}.mlp.fc2.weight": "blocks.{}.mlp.fc2.weight",
    "encoder.layers.{}.mlp.fc2.bias": "blocks.{}.mlp.fc2.bias",
    # Only the pooled embedding passes it.
    "post_layernorm.*": None,
}
# CLIPModel, CLIPVisionModelWithProjection and files of transformers 4 have the tower under `vision_model.`. `export` takes the last name of a
# tensor, which is the bare one.
HF_CLIP_PREFIX = "vision_model."
HF_CLIP_VISION: Table = {
    **{HF_CLIP_PREFIX + donor: ours for donor, ours in HF_CLIP_TOWER.items()},
    "text_model.*": None,
    "text_projection.weight": None,
    "visual_projection.weight": None,
    "logit_scale": None,
    **HF_CLIP_TOWER,
}
OUR_CLIP = {ours: donor for donor, ours in HF_CLIP_TOWER.items() if ours is not None}


def is_hf_clip(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds a CLIP image tower under Hugging Face's names."""
    donor = OUR_CLIP["class_embedding"]
    return donor in state or HF_CLIP_PREFIX + donor in state


def clip_to_hf(state: Mapping[str, Tensor] | nn.Module, config: VisionConfig) -> dict[str, Tensor]:
    """Our image tower's state dict (or the tower) under the names of Hugging Face's CLIPVisionModel.

    The post-norm, which our tower does not have, is weight 1 and bias 0: `last_hidden_state`, what the captioner reads, does not pass it; the
    pooled output does and means nothing. Raises UserError for a tower that CLIPVisionModel cannot express (`clip_config_to_hf`).
    """
    clip_config_to_hf(config)
    state = state.state_dict() if isinstance(state, nn.Module) else state
    like = state["norm_pre.weight"]
    return export(state, HF_CLIP_VISION) | {"post_layernorm.weight": torch.ones_like(like), "post_layernorm.bias": torch.zeros_like(like)}


# ---- Hugging Face T5 -------------------------------------------------------------------------------------

# To captioner.t5.T5. Both kinds of MLP are here; which one a file must have follows from its config.
HF_T5: Table = {
    "shared.weight": "embedding.weight",
    "lm_head.weight": "lm_head.weight",
    # Further names of shared.weight; t5_from_hf has compared them by then.
    "encoder.embed_tokens.weight": None,
    "decoder.embed_tokens.weight": None,
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "encoder.position_bias.embedding.weight",
    "encoder.block.{}.layer.0.layer_norm.weight": "encoder.blocks.{}.self_attn_norm.weight",
    "encoder.block.{}.layer.0.SelfAttention.q.weight": "encoder.blocks.{}.self_attn.q_proj.weight",
    "encoder.block.{}.layer.0.SelfAttention.k.weight": "encoder.blocks.{}.self_attn.k_proj.weight",
    "encoder.block.{}.layer.0.SelfAttention.v.weight": "encoder.blocks.{}.self_attn.v_proj.weight",
    "encoder.block.{}.layer.0.SelfAttention.o.weight": "encoder.blocks.{}.self_attn.o_proj.weight",
    "encoder.block.{}.layer.1.layer_norm.weight": "encoder.blocks.{}.mlp_norm.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi.weight": "encoder.blocks.{}.mlp.wi.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight": "encoder.blocks.{}.mlp.wi_0.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight": "encoder.blocks.{}.mlp.wi_1.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wo.weight": "encoder.blocks.{}.mlp.wo.weight",
    "encoder.final_layer_norm.weight": "encoder.norm.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "decoder.position_bias.embedding.weight",
    "decoder.block.{}.layer.0.layer_norm.weight": "decoder.blocks.{}.self_attn_norm.weight",
    "decoder.block.{}.layer.0.SelfAttention.q.weight": "decoder.blocks.{}.self_attn.q_proj.weight",
    "decoder.block.{}.layer.0.SelfAttention.k.weight": "decoder.blocks.{}.self_attn.k_proj.weight",
    "decoder.block.{}.layer.0.SelfAttention.v.weight": "decoder.blocks.{}.self_attn.v_proj.weight",
    "decoder.block.{}.layer.0.SelfAttention.o.weight": "decoder.blocks.{}.self_attn.o_proj.weight",
    "decoder.block.{}.layer.1.layer_norm.weight": "decoder.blocks.{}.cross_attn_norm.weight",
    "decoder.block.{}.layer.1.EncDecAttention.q.weight": "decoder.blocks.{}.cross_attn.q_proj.weight",
    "decoder.block.{}.layer.1.EncDecAttention.k.weight": "decoder.blocks.{}.cross_attn.k_proj.weight",
    "decoder.block.{}.layer.1.EncDecAttention.v.weight": "decoder.blocks.{}.cross_attn.v_proj.weight",
    "decoder.block.{}.layer.1.EncDecAttention.o.weight": "decoder.blocks.{}.cross_attn.o_proj.weight",
    # The first checkpoints of v1.0 carry a bias that cross-attention never used.
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": None,
    "decoder.block.{}.layer.2.layer_norm.weight": "decoder.blocks.{}.mlp_norm.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi.weight": "decoder.blocks.{}.mlp.wi.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi_0.weight": "decoder.blocks.{}.mlp.wi_0.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi_1.weight": "decoder.blocks.{}.mlp.wi_1.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wo.weight": "decoder.blocks.{}.mlp.wo.weight",
    "decoder.final_layer_norm.weight": "decoder.norm.weight",
}
# Sizes of a config.json beyond this are none of a T5; the largest one has a vocabulary of 2**18 and width 2**16.
LARGEST_SIZE = 2**20
MAY_BE_ZERO = ("num_layers", "pad_token_id", "eos_token_id", "decoder_start_token_id")
OUR_T5 = {ours: donor for donor, ours in HF_T5.items() if ours is not None}


def t5_table(config: T5Config) -> Table:
    """`HF_T5` for one config: where it has no encoder, a file's encoder is known and left out."""
    if config.num_layers:
        return HF_T5
    return {donor: None if donor.startswith("encoder.") else ours for donor, ours in HF_T5.items()}


def t5_from_hf(state: Mapping[str, Tensor], values: Mapping, donor_name: str) -> tuple[dict[str, Tensor], T5Config]:
    """A donor's state dict and the values of its config.json → state dict, still under the donor's names, with one
    shared.weight and an lm_head.weight, and the config that says whether the two are tied.

    transformers 5 writes `tie_word_embeddings: true` for every T5 and keeps v1.1's missing scaling in
    `scale_decoder_outputs`; with that key, the file decides: its lm_head.weight, where it has one, is untied.
    Raises UserError where names of one tensor hold different ones, or a config without that key says they are tied.
    """
    state = dict(state)
    if not isinstance(values, Mapping):
        raise UserError(f"config.json of {donor_name}: not a JSON object")
    try:
        config = T5Config.from_dict(dict(values))
        check_t5_config(config, state)
    except UserError as error:
        raise UserError(f"config.json of {donor_name}: {error}") from error
    for alias in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if alias in state and not same_tensor(state.setdefault("shared.weight", state[alias]), state[alias]):
            raise UserError(f"{donor_name}: {alias} differs from shared.weight; T5 has one embedding")
    if config.tie_word_embeddings and "shared.weight" in state:
        tied = same_tensor(state.setdefault("lm_head.weight", state["shared.weight"]), state["shared.weight"])
        if not tied and values.get("scale_decoder_outputs") is None:
            raise UserError(
                f"{donor_name}: its config ties lm_head to the embedding, and lm_head.weight differs from "
                'shared.weight; set "tie_word_embeddings": false in config.json if this is a T5 v1.1 or Flan-T5'
            )
        config = replace(config, tie_word_embeddings=tied)
    return state, config


def check_t5_config(config: T5Config, state: Mapping[str, Tensor]) -> None:
    """Raises UserError where a config from a file has no sense, or more layers than there are weights for, before a module of its sizes is built."""
    for field in fields(config):
        value, name = getattr(config, field.name), field.name
        if field.type is int and not (type(value) is int and (name in MAY_BE_ZERO or value > 0) and 0 <= value <= LARGEST_SIZE):
            raise UserError(f"{name} is {reprlib.repr(value)}, not a whole number from {0 if name in MAY_BE_ZERO else 1} to {LARGEST_SIZE}")
        if field.type is float and not (type(value) in (int, float) and 0 <= value < 1):
            raise UserError(f"{name} is {reprlib.repr(value)}, not a number from 0 to below 1")
        if field.type in (bool, bool | None) and not isinstance(value, bool):
            raise UserError(f"{name} is {reprlib.repr(value)}, not true or false")
    if config.num_heads * config.d_kv > LARGEST_SIZE:
        raise UserError(f"{config.num_heads} heads of {config.d_kv} are wider than {LARGEST_SIZE}")
    if config.relative_attention_num_buckets < 4 or config.relative_attention_max_distance <= config.relative_attention_num_buckets // 2:
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        raise UserError(f"{buckets} buckets of relative attention do not reach a distance of {distance}")
    ids = max(config.pad_token_id, config.eos_token_id, config.decoder_start_token_id)
    if ids >= config.vocab_size:
        raise UserError(f"token {ids} is not in a vocabulary of {config.vocab_size}")
    for part, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        stored = len({found[1] for name in state if (found := re.match(rf"{part}\.block\.([0-9]+)\.", name))})
        if layers > stored:
            raise UserError(f"{layers} layers of the {part}, and weights of {stored}")


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every number."""
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


def t5_to_hf(state: Mapping[str, Tensor], config: T5Config) -> dict[str, Tensor]:
    """The inverse: our state dict under Hugging Face's names, a tied lm_head left out as its own files do."""
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return export({name: tensor for name, tensor in state.items() if name not in tied}, HF_T5)


# ---- names of modules ------------------------------------------------------------------------------------

# A timm tower keeps the path that it has in open_clip's TimmModel too, `trunk.…`: without it the way back could not tell timm's names from others.
TIMM_TRUNK = "trunk."


def hf_module_name(name: str) -> str:
    """A module's path in the captioner → in the donor's model, as PEFT files name it.

    `text.decoder.blocks.0.cross_attn.q_proj` → `decoder.block.0.layer.1.EncDecAttention.q` of Hugging Face's T5;
    `vision.blocks.0.attn.q_proj` → `encoder.layers.0.self_attn.q_proj` of its CLIPVisionModel;
    `vision.trunk.blocks.0.attn.qkv` → `trunk.blocks.0.attn.qkv`, which is that module of the timm model `trunk`.
    Raises UserError for others.
    """
    part, _, inner = name.partition(".")
    if part == "vision" and inner.startswith(TIMM_TRUNK):
        return inner
    names = {"text": OUR_T5, "vision": OUR_CLIP}.get(part, {})
    found = _match(inner + ".weight", names)
    if found is None:
        raise UserError(f"{name} has no counterpart in Hugging Face's T5 or its CLIPVisionModel")
    return _fill(names[found[0]], found[1]).removesuffix(".weight")


def our_module_name(name: str) -> str:
    """The inverse of `hf_module_name`. Names of CLIP may stand under `vision_model.`, as in transformers 4."""
    if name.startswith(TIMM_TRUNK):
        return f"vision.{name}"
    for part, table in (("text", HF_T5), ("vision", HF_CLIP_VISION)):
        found = _match(name + ".weight", table)
        ours = table[found[0]] if found else None
        if ours is not None and ours.endswith(".weight"):
            return f"{part}." + _fill(ours, found[1]).removesuffix(".weight")
    raise UserError(f"{name} of Hugging Face's T5 has no counterpart here, nor of its CLIPVisionModel")
