"""T5 directories, sharded or not, as transformers 4 and 5 write them: loading, refusing, writing back, module names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5ForConditionalGeneration

from captioner import t5
from captioner.backbones import build_text
from captioner.errors import UserError
from captioner.tokenizer import Tokenizer, train_tokenizer
from captioner.weights import fingerprint, hf_module_name, our_module_name, t5_to_hf
from tests.hub_cache import hub, put  # noqa: F401
from tests.tiny_t5 import SIZES, VARIANTS, hf_model, save, vocabulary

IDS = torch.tensor([[5, 9, 40, 1], [7, 3, 1, 0]])
LABELS = torch.tensor([[8, 30, 1], [12, 1, -100]])


def logits_of(donor: T5ForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return donor(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS).logits


def assert_same(module: t5.T5, donor: T5ForConditionalGeneration) -> None:
    with torch.no_grad():
        torch.testing.assert_close(module(IDS, LABELS), logits_of(donor), rtol=0, atol=1e-5)


def edit(folder, change) -> None:
    """Rewrite model.safetensors after change(state)."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_loads_single_and_sharded_directories(tmp_path, variant):
    donor = hf_model(variant)
    single = build_text(str(save(donor, tmp_path / "single")))
    sharded = build_text(str(save(donor, tmp_path / "sharded", max_shard_size="20KB")))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for backbone in (single, sharded):
        assert_same(backbone.module, donor)
        assert not backbone.module.training and all(p.requires_grad for p in backbone.module.parameters())
        assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}
    assert single.weights_hash == sharded.weights_hash == fingerprint(single.module)
    assert single.name == single.weights == str(tmp_path / "single")
    assert single.tokenizer.decode(single.tokenizer.encode(["a red circle"])) == ["a red circle"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(tmp_path, dtype):
    module = build_text(str(save(hf_model("v1.1").to(dtype), tmp_path))).module
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(module.embedding.weight, load_file(tmp_path / "model.safetensors")["shared.weight"].float())


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_is_the_file_again_and_transformers_reads_it(tmp_path, variant):
    donor = hf_model(variant)
    module = build_text(str(save(donor, tmp_path / "first"))).module
    exported = t5_to_hf(module.state_dict(), module.config)
    stored = load_file(tmp_path / "first" / "model.safetensors")
    assert exported.keys() == stored.keys() and all(torch.equal(exported[key], stored[key]) for key in stored)

    (tmp_path / "second").mkdir()
    save_file(exported, tmp_path / "second" / "model.safetensors", {"format": "pt"})
    (tmp_path / "second" / "config.json").write_text(json.dumps({"model_type": "t5", **vars(module.config)}))
    (tmp_path / "second" / "spiece.model").write_bytes(vocabulary())
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "second").eval()
    assert torch.equal(logits_of(again), logits_of(donor))
    assert build_text(str(tmp_path / "second")).weights_hash == fingerprint(module)


# ---- the head: tied or not, scaled or not ----------------------------------------------------------------


def test_v1_1_as_written_by_transformers_4(tmp_path):
    donor = hf_model("v1.1")
    save(donor, tmp_path, {"tie_word_embeddings": False, "scale_decoder_outputs": None})
    module = build_text(str(tmp_path)).module
    assert not module.config.tie_word_embeddings and not module.config.scale_decoder_outputs
    assert_same(module, donor)


def test_v1_1_as_written_by_transformers_5(tmp_path):
    donor = hf_model("v1.1")
    save(donor, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    # Were these ever written otherwise, this test would say no more than the one above.
    assert written["tie_word_embeddings"] is True and written["scale_decoder_outputs"] is False
    module = build_text(str(tmp_path)).module
    assert not module.config.tie_word_embeddings and not module.config.scale_decoder_outputs
    assert module.lm_head.weight is not module.embedding.weight
    assert_same(module, donor)


def test_tied_without_scaling(tmp_path):
    donor = hf_model("v1.1")
    donor.lm_head.weight = donor.shared.weight
    module = build_text(str(save(donor, tmp_path))).module
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert module.config.tie_word_embeddings and not module.config.scale_decoder_outputs
    assert_same(module, donor)


def test_untied_with_scaling(tmp_path):
    donor = hf_model("v1.0")
    donor.lm_head.weight = nn.Parameter(torch.randn_like(donor.shared.weight))
    module = build_text(str(save(donor, tmp_path))).module
    assert not module.config.tie_word_embeddings and module.config.scale_decoder_outputs
    assert_same(module, donor)


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_head_is_one_parameter(tmp_path, with_head):
    donor = hf_model("v1.0")
    save(donor, tmp_path, {"scale_decoder_outputs": None})
    if with_head:
        edit(tmp_path, lambda state: state.update({"lm_head.weight": state["shared.weight"]}))
    module = build_text(str(tmp_path)).module
    assert module.lm_head.weight is module.embedding.weight and module.config.scale_decoder_outputs
    assert_same(module, donor)


def test_head_that_contradicts_the_config(tmp_path):
    save(hf_model("v1.1"), tmp_path, {"tie_word_embeddings": True, "scale_decoder_outputs": None})
    with pytest.raises(UserError, match='lm_head.weight differs from shared.weight; set "tie_word_embeddings": false'):
        build_text(str(tmp_path))


def test_untied_config_without_a_head(tmp_path):
    save(hf_model("v1.0"), tmp_path, {"tie_word_embeddings": False, "scale_decoder_outputs": None})
    with pytest.raises(UserError, match="missing: lm_head.weight; unexpected: none"):
        build_text(str(tmp_path))


# ---- aliases, leftovers, absent encoders -----------------------------------------------------------------


def test_other_names_of_the_embedding(tmp_path):
    donor = hf_model("v1.1")
    save(donor, tmp_path)
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    edit(tmp_path, lambda state: state.update({name: state["shared.weight"] for name in aliases}))
    assert_same(build_text(str(tmp_path)).module, donor)
    edit(tmp_path, lambda state: state.pop("shared.weight"))
    assert_same(build_text(str(tmp_path)).module, donor)
    edit(tmp_path, lambda state: state[aliases[1]].add_(1.0))
    with pytest.raises(UserError, match="decoder.embed_tokens.weight differs from shared.weight"):
        build_text(str(tmp_path))


def test_bias_that_the_first_checkpoints_carry(tmp_path):
    donor = hf_model("v1.0")
    save(donor, tmp_path)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    edit(tmp_path, lambda state: state.update({name: torch.randn(32, SIZES["num_heads"])}))
    assert_same(build_text(str(tmp_path)).module, donor)


def test_config_without_an_encoder_leaves_the_files_encoder_out(tmp_path):
    save(hf_model("v1.1"), tmp_path)
    whole = build_text(str(tmp_path)).module
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    half = build_text(str(tmp_path)).module
    assert half.encoder is None
    memory = torch.randn(2, 5, SIZES["d_model"])
    with torch.no_grad():
        assert torch.equal(half.decode(IDS, memory), whole.decode(IDS, memory))
    edit(tmp_path, lambda state: state.update({"encoder.extra.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match="unknown keys: encoder.extra.weight"):
        build_text(str(tmp_path))


def test_a_decoder_alone_is_written_and_read(tmp_path):
    torch.manual_seed(0)
    module = t5.T5(t5.T5Config.from_dict(SIZES | VARIANTS["gated-tied"] | {"num_layers": 0}))
    exported = t5_to_hf(module.state_dict(), module.config)
    assert not any(name.startswith(("encoder.", "lm_head.")) for name in exported)
    save_file(exported, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vars(module.config)))
    (tmp_path / "spiece.model").write_bytes(vocabulary())
    assert build_text(str(tmp_path)).weights_hash == fingerprint(module)


# ---- what is refused -------------------------------------------------------------------------------------


def set_odd_names(state):
    state["decoder.block.9.layer.0.SelfAttention.q.weight"] = torch.zeros(1, 1)
    del state["decoder.final_layer_norm.weight"], state["encoder.block.1.layer.0.SelfAttention.q.weight"]


@pytest.mark.parametrize(
    "change, words",
    [
        (
            set_odd_names,
            "missing: decoder.norm.weight, encoder.blocks.1.self_attn.q_proj.weight; "
            "unexpected: decoder.blocks.9.self_attn.q_proj.weight$",
        ),
        (
            lambda state: state.update({"shared.bias": torch.zeros(1), "a": torch.zeros(1)}),
            "unknown keys: a, shared.bias$",
        ),
        (
            lambda state: state.update({"shared.weight": torch.zeros(8, 24)}),
            r"embedding.weight has shape \[8, 24\], expected \[192, 24\]",
        ),
        (lambda state: state.pop("shared.weight"), "missing: embedding.weight; unexpected: none"),
    ],
)
def test_names_and_shapes_are_checked_in_both_directions(tmp_path, change, words):
    save(hf_model("v1.1"), tmp_path)
    edit(tmp_path, change)
    with pytest.raises(UserError, match=words) as caught:
        build_text(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_config_says_which_mlp_a_file_must_have(tmp_path):
    save(hf_model("v1.1"), tmp_path, {"feed_forward_proj": "relu"})
    words = "missing: decoder.blocks.0.mlp.wi.weight, .*unexpected: decoder.blocks.0.mlp.wi_0.weight"
    with pytest.raises(UserError, match=words):
        build_text(str(tmp_path))


def test_pickles_are_refused(tmp_path):
    save(hf_model("v1.1"), tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle.*convert it once"):
        build_text(str(tmp_path))


@pytest.mark.parametrize(
    "name, words",
    [
        ("config.json", "no config.json in the T5 directory"),
        ("spiece.model", r"no spiece.model in the T5 directory .*a tokenizer.json alone is not read"),
        ("model.safetensors", "expected model.safetensors"),
    ],
)
def test_missing_files_are_named(tmp_path, name, words):
    save(hf_model("v1.1"), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=words):
        build_text(str(tmp_path))


def test_config_that_is_not_one_of_a_t5(tmp_path):
    save(hf_model("v1.1"), tmp_path, {"d_kv": None})
    with pytest.raises(UserError, match=f"config.json of {tmp_path}: T5 config lacks d_kv"):
        build_text(str(tmp_path))


def test_neither_directory_nor_repository(tmp_path, hub):  # noqa: F811
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; a text model is a directory with config.json"):
        build_text(str(tmp_path / "model.safetensors"))
    words = "'someone/t5' is no local directory, and cannot get config.json of someone/t5 .*HF_HUB_OFFLINE"
    with pytest.raises(UserError, match=words):
        build_text("someone/t5")
    with pytest.raises(UserError, match="'/no/such/folder' is no local directory"):
        build_text("/no/such/folder")


def test_repository_from_the_cache(tmp_path, hub):  # noqa: F811
    donor = hf_model("v1.1")
    save(donor, tmp_path / "files", max_shard_size="40KB")
    for file in sorted((tmp_path / "files").iterdir()):
        if file.name != "spiece.model":
            put(hub, "someone/t5", file.name, lambda path, file=file: path.write_bytes(file.read_bytes()))
    with pytest.raises(UserError, match="cannot get spiece.model of someone/t5"):
        build_text("someone/t5")
    put(hub, "someone/t5", "spiece.model", lambda path: path.write_bytes(vocabulary()))
    backbone = build_text("someone/t5")
    assert_same(backbone.module, donor)
    assert backbone.name == backbone.weights == "someone/t5"
    assert backbone.weights_hash == build_text(str(tmp_path / "files")).weights_hash


def test_vocabulary_must_fit_the_model(tmp_path):
    folder = save(hf_model("v1.1"), tmp_path / "t5")
    pieces = [chr(0x4E00 + i) for i in range(200)]
    large = train_tokenizer(pieces, tmp_path / "large.model", 300)
    assert len(large) > SIZES["vocab_size"]
    with pytest.raises(UserError, match=f"large.model has {len(large)} ids, more than the 192 rows of the embedding"):
        build_text(str(folder), tokenizer_path=large.path)
    save(hf_model("v1.1"), folder, {"eos_token_id": 3})
    with pytest.raises(UserError, match=r"spiece.model has pad and eos at \(0, 1\); the config has them at \(0, 3\)"):
        build_text(str(folder))


def test_another_vocabulary_than_the_directorys(tmp_path):
    folder = save(hf_model("v1.1"), tmp_path / "t5")
    (folder / "spiece.model").rename(tmp_path / "mine.model")
    assert build_text(str(folder), tokenizer_path=tmp_path / "mine.model").tokenizer.path == tmp_path / "mine.model"


# ---- random weights --------------------------------------------------------------------------------------


def test_random_weights_from_a_named_size_and_from_a_file(tmp_path):
    torch.manual_seed(0)
    named = build_text(None, "t5-tiny")
    assert (named.name, named.weights, named.weights_hash, named.tokenizer) == ("t5-tiny", None, None, None)
    assert named.module.config == t5.T5Config.from_name("t5-tiny") and not named.module.training
    torch.manual_seed(0)
    assert fingerprint(build_text(None, "t5-tiny").module) == fingerprint(named.module)

    (tmp_path / "small.json").write_text(json.dumps(SIZES))
    (tmp_path / "spiece.model").write_bytes(vocabulary())
    tokenizer = Tokenizer(tmp_path / "spiece.model")
    for path in (tokenizer.path, str(tokenizer.path)):
        backbone = build_text(None, str(tmp_path / "small.json"), path)
        assert backbone.module.config.d_model == SIZES["d_model"] and backbone.tokenizer.path == tokenizer.path
        assert backbone.module.embedding.num_embeddings == backbone.module.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("spec, config", [(None, None), ("directory", "t5-tiny")])
def test_weights_or_a_config(spec, config):
    with pytest.raises(UserError, match="either from trained weights .* or from a config"):
        build_text(spec, config)


# ---- names of modules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v1.1", "v1.0"])
def test_module_names_of_both_worlds(variant):
    donor = hf_model(variant)
    ours = t5.T5(t5.T5Config.from_dict(SIZES | VARIANTS[variant]))
    kinds = nn.Linear | nn.Embedding
    theirs = {name for name, module in donor.named_modules() if isinstance(module, kinds)}
    theirs -= {"encoder.embed_tokens", "decoder.embed_tokens"}
    translated = {}
    for name, module in ours.named_modules():
        if isinstance(module, kinds):
            translated[name] = hf_module_name(f"text.{name}")
            assert donor.get_submodule(translated[name]).weight.shape == module.weight.shape
            assert our_module_name(translated[name]) == f"text.{name}"
    assert set(translated.values()) == theirs
    assert hf_module_name("text.decoder.blocks.10.cross_attn.q_proj") == "decoder.block.10.layer.1.EncDecAttention.q"
    assert hf_module_name("text.encoder.blocks.0.mlp.wo") == "encoder.block.0.layer.1.DenseReluDense.wo"


def test_names_without_a_counterpart():
    for name in ("bridge", "vision.blocks.0.attn", "decoder.blocks.0.mlp.wo", "text.decoder.blocks.0.mlp"):
        with pytest.raises(UserError, match=f"{name} has no counterpart"):
            hf_module_name(name)
    block = "decoder.block.1.layer.0.SelfAttention"
    for name in ("encoder.embed_tokens", f"{block}.relative_attention_bias", f"{block}.w"):
        with pytest.raises(UserError, match=f"{name} of Hugging Face's T5 has no counterpart"):
            our_module_name(name)
