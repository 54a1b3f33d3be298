"""LoRA in whole models, and PEFT files both ways, against peft itself on random T5s and CLIP image encoders."""

import json
import math
import re
import sys
import time
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora
from captioner.model import Captioner
from captioner.t5 import T5, T5Config
from captioner.vit import VisionConfig, VisionTransformer
from lora.inject import lora_modules
from lora.peft_config import full_matches

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
# Of transformers 5's CLIPVisionModel, which has no inner `vision_model`.
CLIP_LAYERS = {
    "norm1": "layer_norm1",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.o_proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def donor_name(name: str) -> str:
    """text.decoder.blocks.0.cross_attn.q_proj → decoder.block.0.layer.1.EncDecAttention.q, vision.blocks.0.mlp.fc1 →
    encoder.layers.0.mlp.fc1.
    """
    if name.startswith("vision."):
        _, _, block, layer = name.split(".", 3)
        return f"encoder.layers.{block}.{CLIP_LAYERS[layer]}"
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
    vision = (f"vision.blocks.{block}.{layer}" for block in range(2) for layer in CLIP_LAYERS)
    return {donor_name(name): name for name in (*names, *vision)}[donor]


def pair_of_models() -> tuple[Captioner, nn.Module]:
    """A captioner and transformers' T5 with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=True, decoder_start_token_id=0
        )
    ).eval()
    vision = VisionTransformer(VisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, activation="quick_gelu"))
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


def pair_of_towers() -> tuple[Captioner, nn.Module]:
    """A captioner and transformers' CLIPVisionModel with the weights of its image encoder."""
    torch.manual_seed(1)
    model, _ = pair_of_models()
    sizes = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, hidden_act="quick_gelu")).eval()
    donors = theirs.state_dict()
    state = {
        "class_embedding": donors["embeddings.class_embedding"],
        "patch_embed.weight": donors["embeddings.patch_embedding.weight"],
        "position_embedding": donors["embeddings.position_embedding.weight"],
        "norm_pre.weight": donors["pre_layrnorm.weight"],
        "norm_pre.bias": donors["pre_layrnorm.bias"],
    }
    for name in model.vision.state_dict().keys() - state.keys():
        path, _, kind = name.rpartition(".")
        state[name] = donors[f"{donor_name('vision.' + path)}.{kind}"]
    model.vision.load_state_dict(state)
    return model, theirs


PAIRS = {"text": pair_of_models, "vision": pair_of_towers}


def outputs(model: Captioner, peer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a whole T5, encoder included, or the tokens of an image encoder, ours and theirs, with gradients."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(peer.base_model.model if isinstance(peer, peft.PeftModel) else peer, transformers.CLIPVisionModel):
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return model.vision(pixels), peer(pixel_values=pixels).last_hidden_state
    ids, labels = (torch.randint(2, 64, (2, length), generator=generator) for length in (6, 5))
    return model.decoder_logits(model.text.encode(ids), labels), peer(input_ids=ids, labels=labels).logits


def assert_same(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    """Equal but for fp32's rounding, which these networks magnify: peft's own error against fp64 is up to 1.4e-5."""
    assert a.shape == b.shape and (a - b).norm() <= 3e-5 * b.norm(), what


def same_weights_into_peft(model: Captioner, theirs: nn.Module, part: str, **config) -> tuple[nn.Module, dict]:
    """peft's LoRA on the layers that ours is on below a part, with our A and B; and its parameters by our names."""
    modules = {name: module for name, module in lora_modules(model).items() if name.startswith(part)}
    config = peft.LoraConfig(target_modules=[donor_name(name) for name in modules], **config)
    peer = peft.get_peft_model(theirs, config)
    named = dict(peer.named_parameters())
    theirs_by_ours = {
        f"{name}.{half}": named[f"base_model.model.{donor_name(name)}.{half}.default.weight"]
        for name in modules
        for half in ("lora_A", "lora_B")
    }
    assert len(theirs_by_ours) == sum(parameter.requires_grad for parameter in peer.parameters())
    with torch.no_grad():
        for name, parameter in lora.adapter_parameters(model).items():
            if name.startswith(part):
                theirs_by_ours[name].copy_(parameter)
    return peer, theirs_by_ours


def logits(model: Captioner, peer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    memory, labels = torch.randn(2, 7, 32, generator=generator), torch.randint(2, 64, (2, 5), generator=generator)
    with torch.no_grad():
        theirs = peer.eval()(
            encoder_outputs=transformers.modeling_outputs.BaseModelOutput(last_hidden_state=memory), labels=labels
        ).logits
        return model.eval().decoder_logits(memory, labels), theirs


def randomise_B(parameters, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in parameters:
            if "lora_B" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


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


# ---- outputs and gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "where"),
    [("text", ("decoder",)), ("text", ("encoder",)), ("text", ("decoder", "encoder")), ("vision", ("vision",))],
)
@pytest.mark.parametrize("targets", [("attn",), ("ffn",), ("q", "v"), ("attn", "ffn")])
@pytest.mark.parametrize(("rslora", "init"), [(True, "gaussian"), (False, "kaiming")])
def test_outputs_and_every_gradient_equal_pefts(part, where, targets, rslora, init):
    model, theirs = PAIRS[part]()
    untouched, expected = outputs(model, theirs)
    assert_same(untouched, expected)
    lora.apply_lora(model, targets, where, rank=4, alpha=6, dropout=0.0, init=init, rslora=rslora)
    randomise_B(model.named_parameters(), 0.05)
    ours = lora.set_trainable(model, also=())
    config = dict(r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights="gaussian" if init == "gaussian" else True)
    peer, expected_parameters = same_weights_into_peft(model, theirs, part, **config)
    compare_backward(model, peer, ours, expected_parameters, untouched)


def compare_backward(model, peer, ours, theirs, untouched) -> None:
    found, expected = outputs(model, peer)
    assert_same(found, expected)
    assert not torch.allclose(found, untouched, atol=1e-2)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    found.backward(upstream), expected.backward(upstream)
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.grad.abs().max() > 0, name
        assert_same(parameter.grad, theirs[name].grad, name)


@pytest.mark.parametrize("rslora", [True, False])
def test_a_rank_for_each_part_is_pefts_rank_pattern(rslora):
    ranks = {"decoder": 5, "encoder": 2, "vision": 3}
    for part, pattern in (("text", {r"encoder\..*": 2}), ("vision", {".*": 3})):
        model, theirs = PAIRS[part]()
        untouched = outputs(model, theirs)[0]
        lora.apply_lora(model, ("attn", "ffn"), tuple(ranks), rank=ranks, alpha=6, dropout=0.0, rslora=rslora)
        randomise_B(model.named_parameters(), 0.05)
        lora.set_trainable(model, also=())
        config = dict(r=5, lora_alpha=6, use_rslora=rslora, rank_pattern=pattern)
        peer, theirs_by_ours = same_weights_into_peft(model, theirs, part, **config)
        ours = {name: parameter for name, parameter in lora.adapter_parameters(model).items() if name.startswith(part)}
        compare_backward(model, peer, ours, theirs_by_ours, untouched)


# ---- our files in peft -----------------------------------------------------------------------------------


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


def load_in_peft(theirs: nn.Module, directory) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns about keys that are missing or left over
        return peft.PeftModel.from_pretrained(theirs, directory)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [4, {"decoder": 5, "encoder": 2, "vision": 3}])
def test_both_parts_load_into_their_models_in_peft(tmp_path, rslora, rank, fold):
    model, _ = pair_of_towers()
    lora.apply_lora(model, ("attn", "ffn"), ("decoder", "encoder", "vision"), rank=rank, alpha=6, rslora=rslora)
    randomise_B(model.named_parameters())
    for part, pair in PAIRS.items():
        lora.save_peft(model, tmp_path / part, donor_name, under=f"{part}.", fold_rslora=fold)
        config = json.loads((tmp_path / part / "adapter_config.json").read_text())
        assert config["use_rslora"] == (rslora and not fold)
        assert config["task_type"] == ("SEQ_2_SEQ_LM" if part == "text" else None)
        plain, theirs = pair()
        untouched = outputs(plain, theirs)[0]
        peer = load_in_peft(theirs, tmp_path / part)
        scalings = {layer.scaling["default"] for layer in peer.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
        expected = {module.scaling for name, module in lora_modules(model).items() if name.startswith(part)}
        assert sorted(scalings) == pytest.approx(sorted(expected), rel=1e-12)
        # Our own reading of the file and peft's, on the same base.
        again, _ = pair()
        assert lora.load_peft(again, tmp_path / part, our_name) == [n for n in lora_modules(model) if n.startswith(part)]
        found, from_peft = outputs(again.eval(), peer)
        assert_same(found, from_peft)
        assert not torch.allclose(found, untouched, atol=1e-2)
        for name, module in lora_modules(again).items():
            saved = model.get_submodule(name)
            assert module.scaling == pytest.approx(saved.scaling, rel=1e-12) and module.rank == saved.rank
            assert torch.equal(module.lora_A, saved.lora_A) and torch.equal(module.lora_B, saved.lora_B)


def test_folded_scaling_is_for_runtimes_that_divide_by_the_rank(tmp_path):
    model = saved_by_us(tmp_path / "plain", rank=4, alpha=6.0)
    lora.save_peft(model, tmp_path / "folded", donor_name, fold_rslora=True)
    plain, folded = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("plain", "folded"))
    assert (plain["use_rslora"], plain["lora_alpha"]) == (True, 6.0)
    assert (folded["use_rslora"], folded["lora_alpha"]) == (False, 6.0 * math.sqrt(4))
    assert {key for key in plain if plain[key] != folded[key]} == {"use_rslora", "lora_alpha", "base_model_name_or_path"}


def test_each_different_layer_stands_in_a_pattern_of_its_own(tmp_path):
    model, _ = pair_of_models()
    lora.apply_lora(model, ("attn", "ffn"), ("decoder", "encoder"), rank={"decoder": 4, "encoder": 2}, alpha=6)
    lora.save_peft(model, tmp_path, donor_name, fold_rslora=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    encoder = [name for name in config["target_modules"] if name.startswith("encoder")]
    assert (config["r"], config["lora_alpha"]) == (4, 12.0) and len(encoder) == 14
    for pattern, value in (("rank_pattern", 2), ("alpha_pattern", 6 * math.sqrt(2))):
        assert set(config[pattern].values()) == {value}
        # The rule of peft.utils.other.get_pattern_key, on names that differ from the key in one place.
        for name in encoder:
            keys = [key for key in config[pattern] if re.match(rf"(.*\.)?({key})$", name)]
            assert len(keys) == 1
            assert not any(re.match(rf"(.*\.)?({keys[0]})$", other) for other in (f"x.{name}", name.replace(".", "x"), name + "x"))


def test_layers_that_one_file_cannot_hold_apart(tmp_path):
    model = saved_by_us(tmp_path)
    first = next(iter(lora_modules(model).values()))
    first.rslora, first.scaling = False, first.alpha / first.rank
    with pytest.raises(ValueError, match=r"differ in \(dropout, init, rslora\).*False\), .*True\)"):
        lora.save_peft(model, tmp_path, donor_name)
    # Folded, they are alike.
    lora.save_peft(model, tmp_path, donor_name, fold_rslora=True)
    again, _ = pair_of_models()
    lora.load_peft(again, tmp_path, our_name)
    expected = [layer.scaling for layer in lora_modules(model).values()]
    assert [layer.scaling for layer in lora_modules(again).values()] == pytest.approx(expected)
    first.dropout = 0.5
    with pytest.raises(ValueError, match=r"differ in \(dropout"):
        lora.save_peft(model, tmp_path, donor_name, fold_rslora=True)
    with pytest.raises(ValueError, match="no LoRA under vision. to save"):
        lora.save_peft(model, tmp_path, donor_name, under="vision.")


def test_peft_gives_back_the_same_file(tmp_path):
    saved_by_us(tmp_path / "ours")
    _, theirs = pair_of_models()
    peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    for key in configs[0].keys() - {"target_modules", "base_model_name_or_path"}:
        assert configs[0][key] == configs[1][key], key


# ---- files of peft here ----------------------------------------------------------------------------------


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
    assert (layer.rank, layer.alpha, layer.dropout, layer.rslora) == (4, 6, 0.1, rslora)
    assert layer.scaling == (6 / 2 if rslora else 6 / 4)
    ours, expected = logits(model, peer)
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q", "wo"], "rank_pattern": {r".*\.wo": 2, r"decoder\..*": 7}},
        {"target_modules": ["q", "wo"], "rank_pattern": {"EncDecAttention.q": 3}, "alpha_pattern": {"block.1.layer.0.SelfAttention.q": 11}},
        {"target_modules": r".*\.(q|o)", "alpha_pattern": {r"(encoder|decoder)\.block\.0\..*": 2.5}, "use_rslora": False},
        {"target_modules": ["SelfAttention.v"], "exclude_modules": r"encoder\..*"},
        {"target_modules": ["v", "wi_0"], "exclude_modules": ["EncDecAttention.v", "decoder.block.0.layer.2.DenseReluDense.wi_0"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q"], "init_lora_weights": "orthogonal"},
    ],
)
def test_patterns_made_by_peft(tmp_path, settings):
    peer = saved_by_peft(tmp_path, **settings)
    model, _ = pair_of_models()
    names = lora.load_peft(model, tmp_path, our_name)
    layers = {name: m for name, m in peer.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert sorted(map(donor_name, names)) == sorted(layers)
    for name in names:
        ours, theirs = model.get_submodule(name), layers[donor_name(name)]
        assert (ours.rank, ours.alpha, ours.scaling) == (theirs.r["default"], theirs.lora_alpha["default"], theirs.scaling["default"])
    assert_same(*outputs(model.eval(), peer.eval()))


@pytest.mark.parametrize("targets", [["q_proj", "out_proj"], r"encoder\.layers\.\d+\.mlp\.fc[12]", "all-linear"])
def test_adapters_of_clip_made_by_peft(tmp_path, targets):
    model, theirs = pair_of_towers()
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=targets, rank_pattern={"out_proj": 2})
    peer = peft.get_peft_model(theirs, config)
    randomise_B(peer.named_parameters())
    peer.save_pretrained(tmp_path)
    names = lora.load_peft(model, tmp_path, our_name)
    assert names and all(name.startswith("vision.") for name in names)
    assert_same(*outputs(model.eval(), peer.eval()))


def test_the_names_that_peft_shortens_are_read_again(tmp_path):
    """From 20 modules on, peft saves the shortest endings that tell targets from other modules."""
    model, theirs = pair_of_models()
    lora.apply_lora(model, ("blocks.1", "blocks.0.self_attn"), ("decoder", "encoder"), rank=2)
    randomise_B(model.named_parameters())
    lora.save_peft(model, tmp_path / "ours", donor_name)
    peer = load_in_peft(theirs, tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    first, second = (json.loads((tmp_path / n / "adapter_config.json").read_text())["target_modules"] for n in ("ours", "theirs"))
    assert len(second) < len(first) and not set(second) <= set(first)
    again, _ = pair_of_models()
    assert lora.load_peft(again, tmp_path / "theirs", our_name) == list(lora_modules(model))
    assert_same(*outputs(again.eval(), peer.eval()))


def test_a_text_and_an_image_adapter_one_after_the_other(tmp_path):
    model, _ = pair_of_towers()
    lora.apply_lora(model, ("attn",), ("decoder", "vision"), rank={"decoder": 4, "vision": 2})
    randomise_B(model.named_parameters())
    for part in PAIRS:
        lora.save_peft(model, tmp_path / part, donor_name, under=f"{part}.")
    again, _ = pair_of_towers()
    for part in PAIRS:
        lora.load_peft(again, tmp_path / part, our_name)
    first, second = lora.adapter_parameters(model), lora.adapter_parameters(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match=r"LoRA on 8 of its layers already, vision.blocks.0.attn.\w+ the first"):
        lora.load_peft(again, tmp_path / "vision", our_name)
    with pytest.raises(ValueError, match="already"):
        lora.apply_lora(again, ("ffn",))


def test_an_adapter_goes_on_a_4_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    saved = saved_by_us(tmp_path)
    model, _ = pair_of_models()
    lora.quantize_base(model, ("text",))
    assert lora.load_peft(model, tmp_path, our_name) == list(lora_modules(saved))
    for name, layer in lora_modules(model).items():
        assert isinstance(layer.base, lora.Linear4bit) and torch.equal(layer.lora_B, saved.get_submodule(name).lora_B)


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


# ---- files that do not fit -------------------------------------------------------------------------------


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


def integers(tensors):
    tensors["base_model.model.decoder.block.0.layer.0.SelfAttention.q.lora_B.weight"] = torch.zeros(16, 4, dtype=torch.int8)


def not_finite(tensors):
    tensors["base_model.model.decoder.block.0.layer.0.SelfAttention.q.lora_B.weight"][3, 1] = math.nan
    tensors["base_model.model.decoder.block.1.layer.0.SelfAttention.k.lora_A.weight"][0, 0] = -math.inf


def too_large_for_fp32(tensors):
    name = "base_model.model.decoder.block.0.layer.0.SelfAttention.q.lora_B.weight"
    tensors[name] = tensors[name].double() * 1e300


def broken_name(tensors):
    for half in "AB":
        tensors[f"base_model.model.x\n\x1b[2J.lora_{half}.weight"] = torch.zeros(4, 4)


def nothing(tensors):
    tensors.clear()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (integers, r"blocks.0.self_attn.q_proj.lora_B is int8, expected floating point"),
        (not_finite, r"blocks.0.self_attn.q_proj.lora_B holds values that are not finite, text.decoder.blocks.1.self_attn.k_proj.lora_A holds"),
        (too_large_for_fp32, r"blocks.0.self_attn.q_proj.lora_B holds values that are not finite"),
        (nothing, r"missing: none; unexpected: none"),
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
    with pytest.raises(ValueError, match=named) as caught:
        lora.load_peft(model, tmp_path, our_name)
    assert not lora.adapter_parameters(model) and "\n" not in str(caught.value)


def test_settings_that_are_null_have_pefts_defaults(tmp_path):
    saved_by_us(tmp_path)
    edit_config(tmp_path, lora_dropout=None, use_rslora=None, rank_pattern=None, alpha_pattern=None, exclude_modules=None)
    model, _ = pair_of_models()
    layer = model.get_submodule(lora.load_peft(model, tmp_path, our_name)[0])
    assert (layer.dropout, layer.rslora, layer.scaling) == (0.0, False, 6 / 4)


def test_a_layer_left_out_of_a_suffix_target_is_missing(tmp_path):
    saved_by_peft(tmp_path)
    edit_tensors(tmp_path, drop_module)
    with pytest.raises(ValueError, match=r"missing: text.decoder.blocks.1.mlp.wo; unexpected: none"):
        lora.load_peft(pair_of_models()[0], tmp_path, our_name)


def test_siblings_are_layers_whose_names_differ_in_the_first_number():
    names = ["vision.layers.0.blocks.0.qkv", "vision.layers.0.blocks.1.qkv", "vision.layers.1.blocks.0.qkv", "vision.layers.0.blocks.0.proj"]
    found = lora.interop.stack_siblings({names[0]: "layers.0.blocks.0.qkv"}, lambda donor: f"vision.{donor}", names)
    # blocks.1 differs in the second: with the first number alone its name would be that of blocks.0.
    assert found == {names[2]: "layers.1.blocks.0.qkv"}


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
        ({"rank_pattern": {"q": 2}}, r"q_proj.lora_A has shape \[4, 32\], expected \[2, 32\]"),
        ({"rank_pattern": {"q": 10**9}}, "rank_pattern = .*1000000000.* is not an object of whole numbers from 1"),
        ({"rank_pattern": ["q"]}, "rank_pattern = .* is not an object"),
        ({"rank_pattern": {"q(": 2}}, r"no regular expressions \(.*\): .*q\("),
        ({"alpha_pattern": {"q": -2}}, "alpha_pattern = .* is not an object of numbers above 0"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"r": 10**9}, "r = 1000000000 is not a whole number from 1 to 1048576"),
        ({"r": -1}, "r = -1 is not"),
        ({"r": True}, "r = True is not"),
        ({"r": 4.5}, "r = 4.5 is not"),
        ({"lora_alpha": -8}, "lora_alpha = -8 is not a number above 0"),
        ({"lora_alpha": 0}, "lora_alpha = 0 is not"),
        ({"lora_alpha": math.nan}, "lora_alpha = nan is not"),
        ({"lora_alpha": math.inf}, "lora_alpha = inf is not"),
        ({"lora_alpha": "8"}, "lora_alpha = '8' is not"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1000.* is not"),
        ({"lora_dropout": 1.5}, "lora_dropout = 1.5 is not a number from 0 to below 1"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes' is not true or false"),
        ({"target_modules": []}, r"target_modules = \[\] is not a regular expression or a list of names"),
        ({"target_modules": [["q"]]}, "target_modules"),
        ({"target_modules": {"q": 1}}, "target_modules"),
        ({"target_modules": "(decoder"}, r"no regular expressions \(.*\): \(decoder"),
        ({"exclude_modules": ["q"]}, "unexpected: decoder.block.0.layer.0.SelfAttention.q"),
        ({"target_modules": "(" * 100_000}, r"no regular expressions \(.*\): \({200}…$"),
        ({"target_modules": ["../../q"]}, "missing: ../../q; unexpected: decoder.block.0"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"r": None}, "lacks r"),
        ({"r": 8}, r"shape \[4, 32\], expected \[8, 32\]"),
    ],
)
def test_configs_that_we_cannot_compute_are_refused(tmp_path, changes, named):
    saved_by_us(tmp_path)
    edit_config(tmp_path, **changes)
    model, _ = pair_of_models()
    with pytest.raises(ValueError, match=named) as caught:
        lora.load_peft(model, tmp_path, our_name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000 and str(tmp_path / "adapter_") in message
    assert not lora.adapter_parameters(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(.*.*)*(.*.*)*x"},
        {"exclude_modules": r"((\w|\.)+)+!"},
        {"rank_pattern": {r"((\w|\.)+)+!": 4}},
        {"alpha_pattern": {r"(.?){60}(.?){60}(.*)*!": 4}},
    ],
)
def test_an_expression_that_never_ends_is_given_up(tmp_path, monkeypatch, changes):
    saved_by_us(tmp_path)
    edit_config(tmp_path, **changes)
    monkeypatch.setattr("lora.peft_config.REGEX_SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(ValueError, match="regular expressions take more than 1 s"):
        lora.load_peft(pair_of_models()[0], tmp_path, our_name)
    assert time.monotonic() - started < 10


def test_a_machine_that_is_late_refuses_no_expression(tmp_path, monkeypatch):
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 1.5\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(slow))
    monkeypatch.setattr("lora.peft_config.REGEX_SECONDS", 1)
    assert full_matches([r"a.*"], ["ab", "b"], tmp_path) == {r"a.*": {"ab"}}


def test_names_that_would_break_the_line_are_escaped(tmp_path):
    saved_by_us(tmp_path)
    edit_tensors(tmp_path, broken_name)
    with pytest.raises(ValueError, match=r"unexpected: 'base_model.model.x\\n\\x1b\[2J.lora_A.weight', '"):
        lora.load_peft(pair_of_models()[0], tmp_path, our_name)


def test_an_adapter_of_another_backbone_is_refused_with_both_hashes(tmp_path):
    model = saved_by_us(tmp_path)
    lora.save_peft(model, tmp_path, donor_name, metadata={"base_sha256": "ab" * 32, "run": "x"})
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "base_sha256": "ab" * 32, "run": "x"}
    load_in_peft(pair_of_models()[1], tmp_path)
    other, _ = pair_of_models()
    with pytest.raises(ValueError, match=r"made for another backbone \(sha256 abababababab, here cdcdcdcdcdcd\)"):
        lora.load_peft(other, tmp_path, our_name, base_sha256="cd" * 32)
    assert not lora.adapter_parameters(other)
    assert lora.load_peft(other, tmp_path, our_name, base_sha256="ab" * 32)
    # A foreign file says nothing about its backbone.
    saved_by_peft(tmp_path / "peft")
    assert lora.load_peft(pair_of_models()[0], tmp_path / "peft", our_name, base_sha256="cd" * 32)


@pytest.mark.parametrize("donor", ["decoder.block.9.layer.0.SelfAttention.q", "model.layers.0.self_attn.q_proj", ".", "..", "__class__"])
def test_an_adapter_of_another_architecture_names_its_modules(tmp_path, donor):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [donor]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{donor}.lora_A.weight": torch.zeros(4, 32), f"base_model.model.{donor}.lora_B.weight": torch.zeros(16, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model, _ = pair_of_models()
    for names in (our_name, str):
        with pytest.raises(ValueError, match=rf"missing: none; unexpected: {re.escape(donor)}$"):
            lora.load_peft(model, tmp_path, names)
    assert not lora.adapter_parameters(model)


def test_missing_and_broken_files_are_named(tmp_path):
    saved_by_us(tmp_path)
    model, _ = pair_of_models()
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", b"{}", whole[:-1], whole[:200], b"\xff" * 8 + whole[8:], whole.replace(b"F32", b"F99", 1)):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="adapter_model.safetensors: not a safetensors file"):
            lora.load_peft(model, tmp_path, our_name)
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
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a JSON file"):
        lora.load_peft(model, tmp_path, our_name)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
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


def test_files_of_the_same_content_have_the_same_bytes(tmp_path):
    """safetensors writes several metadata in an order that changes from save to save."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a.ü": torch.ones(1, dtype=torch.bfloat16), "empty": torch.empty(0, 4)}
    metadata = {str(number): "x" for number in range(12)}
    for name in ("one", "two"):
        lora.interop.write_tensors(tmp_path / name, dict(tensors), dict(metadata))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found, written = lora.interop.read_tensors(tmp_path / "one")
    assert written == {"format": "pt", **metadata} and found.keys() == tensors.keys() == load_file(tmp_path / "one").keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
