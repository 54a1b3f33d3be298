"""PEFT files both ways against peft itself, on random T5s."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from captioner.model import Captioner
from captioner.t5 import T5, T5Config

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=0.0
)
LAYERS = {
    "self_attn_norm": "layer.0.layer_norm",
    "self_attn.q_proj": "layer.0.SelfAttention.q",
    "self_attn.k_proj": "layer.0.SelfAttention.k",
    "self_attn.v_proj": "layer.0.SelfAttention.v",
    "self_attn.o_proj": "layer.0.SelfAttention.o",
    "cross_attn_norm": "layer.1.layer_norm",
    "cross_attn.q_proj": "layer.1.EncDecAttention.q",
    "cross_attn.k_proj": "layer.1.EncDecAttention.k",
    "cross_attn.v_proj": "layer.1.EncDecAttention.v",
    "cross_attn.o_proj": "layer.1.EncDecAttention.o",
}


def donor_name(name: str) -> str:
    """text.decoder.blocks.0.cross_attn.q_proj → decoder.block.0.layer.1.EncDecAttention.q"""
    stack, block, layer = re.fullmatch(r"text\.(encoder|decoder)\.blocks\.(\d+)\.(.+)", name).groups()
    mlp = {"encoder": "layer.1", "decoder": "layer.2"}[stack]
    mapped = LAYERS.get(layer) or layer.replace("mlp_norm", f"{mlp}.layer_norm").replace(
        "mlp.", f"{mlp}.DenseReluDense."
    )
    return f"{stack}.block.{block}.{mapped}"


def our_name(donor: str) -> str:
    """Inverse of donor_name; KeyError for what it does not know."""
    names = (
        f"text.{stack}.blocks.{block}.{layer}"
        for stack in ("encoder", "decoder")
        for block in range(4)
        for layer in (*LAYERS, "mlp.wi_0", "mlp.wi_1", "mlp.wo")
    )
    return {donor_name(name): name for name in names}[donor]


def pair_of_models() -> tuple[Captioner, nn.Module]:
    """A captioner and transformers' T5 with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=True, decoder_start_token_id=0
        )
    ).eval()
    vision = nn.Identity()
    vision.width = 16
    model = Captioner(vision, T5(T5Config(**SIZES, tie_word_embeddings=True))).eval()
    donors = theirs.state_dict()
    state = {}
    for name in model.text.state_dict():
        if name in ("embedding.weight", "lm_head.weight"):
            state[name] = donors["shared.weight"]
        elif name.endswith("position_bias.embedding.weight"):
            state[name] = donors[f"{name.split('.')[0]}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        elif name.count(".") == 2:
            state[name] = donors[f"{name.split('.')[0]}.final_layer_norm.weight"]
        else:
            state[name] = donors[f"{donor_name('text.' + name.removesuffix('.weight'))}.weight"]
    model.text.load_state_dict(state)
    return model, theirs


def logits(model: Captioner, peer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    memory, labels = torch.randn(2, 7, 32, generator=generator), torch.randint(2, 64, (2, 5), generator=generator)
    with torch.no_grad():
        theirs = peer.eval()(
            encoder_outputs=transformers.modeling_outputs.BaseModelOutput(last_hidden_state=memory), labels=labels
        ).logits
        return model.eval().decoder_logits(memory, labels), theirs


def randomise_B(parameters) -> None:
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in parameters:
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def saved_by_us(directory, targets=("attn", "ffn"), **settings) -> Captioner:
    model, _ = pair_of_models()
    lora.apply_lora(model, targets, ("decoder",), **{"rank": 4, "alpha": 6.0} | settings)
    randomise_B(model.named_parameters())
    lora.save_peft(model, directory, donor_name, "google/flan-t5-tiny")
    return model


def saved_by_peft(directory, **settings) -> nn.Module:
    _, theirs = pair_of_models()
    defaults = dict(
        r=4,
        lora_alpha=6,
        lora_dropout=0.1,
        use_rslora=True,
        target_modules=r"decoder\..*\.(q|k|v|o|wi_0|wi_1|wo)",
        task_type="SEQ_2_SEQ_LM",
    )
    peer = peft.get_peft_model(theirs, peft.LoraConfig(**defaults | settings))
    randomise_B(peer.named_parameters())
    peer.save_pretrained(directory)
    return peer


def edit_config(directory, **changes) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory, edit) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("targets", [("attn", "ffn"), ("cross_attn.q_proj", "wo")])
@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_peft_loads_what_we_save(tmp_path, targets, init):
    model = saved_by_us(tmp_path, targets, init=init)
    _, theirs = pair_of_models()
    plain = logits(*pair_of_models())
    assert torch.allclose(plain[0], plain[1], atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns about keys that are missing or left over
        peer = peft.PeftModel.from_pretrained(theirs, tmp_path)
    wrapped = {name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert wrapped == {donor_name(name) for name in lora.inject.lora_modules(model)}
    ours, expected = logits(model, peer)
    assert torch.allclose(ours, expected, atol=1e-5) and not torch.allclose(ours, plain[0], atol=1e-2)


def test_peft_gives_back_the_same_file(tmp_path):
    saved_by_us(tmp_path / "ours")
    _, theirs = pair_of_models()
    peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    for key in configs[0].keys() - {"target_modules", "base_model_name_or_path"}:
        assert configs[0][key] == configs[1][key], key


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("targets", [r"decoder\..*\.(q|k|v|o|wi_0|wi_1|wo)", ["q", "v"], ["EncDecAttention.k", "wo"]])
def test_we_load_what_peft_saves(tmp_path, targets, rslora):
    peer = saved_by_peft(tmp_path, target_modules=targets, use_rslora=rslora)
    model, _ = pair_of_models()
    names = lora.load_peft(model, tmp_path, our_name)
    wrapped = [
        name for name, module in peer.base_model.model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert sorted(map(donor_name, names)) == sorted(wrapped)
    assert names == [name for name, _ in model.named_modules() if name in set(names)]
    layer = model.get_submodule(names[0])
    assert (layer.rank, layer.dropout) == (4, 0.1) and layer.scaling == pytest.approx(6 / 2 if rslora else 6 / 4)
    ours, expected = logits(model, peer)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_round_trip_keeps_every_number_and_setting(tmp_path):
    model = saved_by_us(tmp_path / "first", dropout=0.2)
    again, _ = pair_of_models()
    names = lora.load_peft(again, tmp_path / "first", our_name)
    assert names == list(lora.inject.lora_modules(model))
    first, second = lora.adapter_parameters(model), lora.adapter_parameters(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    lora.save_peft(again, tmp_path / "second", donor_name, "google/flan-t5-tiny")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert set(load_file(tmp_path / "first/adapter_model.safetensors")) == {
        f"base_model.model.{donor_name(name)}.lora_{half}.weight" for name in names for half in "AB"
    }


def drop_module(tensors):
    for half in "AB":
        del tensors[f"base_model.model.decoder.block.1.layer.2.DenseReluDense.wo.lora_{half}.weight"]


def rename_module(tensors):
    for half in "AB":
        tensors[f"base_model.model.decoder.block.9.layer.2.DenseReluDense.wo.lora_{half}.weight"] = tensors.pop(
            f"base_model.model.decoder.block.1.layer.2.DenseReluDense.wo.lora_{half}.weight"
        )


def halve_pair(tensors):
    del tensors["base_model.model.decoder.block.0.layer.0.SelfAttention.q.lora_A.weight"]


def strange_key(tensors):
    tensors["decoder.block.0.layer.0.SelfAttention.q.magnitude"] = torch.zeros(3)


def wrong_shape(tensors):
    tensors["base_model.model.decoder.block.0.layer.0.SelfAttention.q.lora_A.weight"] = torch.zeros(4, 31)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop_module, r"missing: .*decoder.block.1.layer.2.DenseReluDense.wo; unexpected: none"),
        (rename_module, r"missing: decoder.block.1.\S+wo; unexpected: decoder.block.9.layer.2.DenseReluDense.wo"),
        (halve_pair, r"missing: base_model\S+SelfAttention.q.lora_A.weight; unexpected: none"),
        (strange_key, r"missing: none; unexpected: decoder.block.0.\S+magnitude"),
        (wrong_shape, r"text.decoder.blocks.0.self_attn.q_proj.lora_A has shape \[4, 31\], expected \[4, 32\]"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_both_lists(tmp_path, edit, named):
    saved_by_us(tmp_path)
    edit_tensors(tmp_path, edit)
    model, _ = pair_of_models()
    with pytest.raises(ValueError, match=named):
        lora.load_peft(model, tmp_path, our_name)
    assert not lora.adapter_parameters(model)


def test_a_layer_left_out_of_a_suffix_target_is_missing(tmp_path):
    saved_by_peft(tmp_path)
    edit_tensors(tmp_path, drop_module)
    with pytest.raises(ValueError, match=r"missing: text.decoder.blocks.1.mlp.wo; unexpected: none"):
        lora.load_peft(pair_of_models()[0], tmp_path, our_name)


def test_weights_outside_the_configs_targets_are_unexpected(tmp_path):
    saved_by_us(tmp_path)
    edit_config(tmp_path, target_modules=["q", "k", "v", "o", "wi_0", "wi_1"])
    with pytest.raises(
        ValueError, match=r"missing: none; unexpected: decoder.block.0.layer.2.DenseReluDense.wo, decoder.block.1"
    ):
        lora.load_peft(pair_of_models()[0], tmp_path, our_name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"r": None}, "lacks r"),
        ({"r": 8}, "shape"),
    ],
)
def test_configs_that_we_cannot_compute_are_refused(tmp_path, changes, named):
    saved_by_us(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=named):
        lora.load_peft(pair_of_models()[0], tmp_path, our_name)


def test_missing_and_broken_files_are_named(tmp_path):
    saved_by_us(tmp_path)
    model, _ = pair_of_models()
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="adapter_model.safetensors: not a safetensors file"):
        lora.load_peft(model, tmp_path, our_name)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is a pickle"):
        lora.load_peft(model, tmp_path, our_name)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        lora.load_peft(model, tmp_path, our_name)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        lora.load_peft(model, tmp_path / "nowhere", our_name)


def test_saving_and_loading_at_the_wrong_time(tmp_path):
    model, _ = pair_of_models()
    with pytest.raises(ValueError, match="no LoRA"):
        lora.save_peft(model, tmp_path, donor_name)
    model = saved_by_us(tmp_path)
    with pytest.raises(ValueError, match="already"):
        lora.load_peft(model, tmp_path, our_name)
    lora.merge_lora(model)
    with pytest.raises(ValueError, match="unmerge_lora"):
        lora.save_peft(model, tmp_path, donor_name)
    lora.unmerge_lora(model)
    lora.save_peft(model, tmp_path, donor_name)
