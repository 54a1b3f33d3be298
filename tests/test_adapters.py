"""Bottleneck adapters against the same ones hooked onto the models of transformers, and their stacks and files."""

import copy
import json
from collections.abc import Sequence

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

import lora
from captioner import generate, weights
from captioner.model import Captioner
from captioner.t5 import T5, T5Config
from captioner.vit import VisionConfig, VisionTransformer
from lora import adapter_files, adapters
from lora.adapters import AdaptedResidual, Bottleneck
from tests.tiny_t5 import hf_model

STYLES = ("houlsby", "pfeiffer", "parallel")
WIDTH, TOKENS = 24, 7  # of the decoder, of a memory
IMAGE = dict(image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


# ---- the same models and adapters on both sides -------------------------------------------------------------


def hf_clip() -> CLIPVisionModel:
    torch.manual_seed(5)
    model = CLIPVisionModel(CLIPVisionConfig(**IMAGE, hidden_act="quick_gelu", attention_dropout=0.0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.2)
    return model


CLIP_NAMES = {
    "vision_model.": "", "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding": "patch_embed",
    "embeddings.position_embedding.weight": "position_embedding", "pre_layrnorm": "norm_pre", "encoder.layers": "blocks",
    "self_attn.out_proj": "attn.o_proj", "self_attn": "attn", "layer_norm": "norm",
}  # fmt: skip


def vit_like(theirs: CLIPVisionModel) -> VisionTransformer:
    ours = VisionTransformer(VisionConfig(16, 8, 32, 2, 4, mlp_ratio=2.0, activation="quick_gelu"))
    state = {}
    for name, tensor in theirs.state_dict().items():
        for donor, own in CLIP_NAMES.items():
            name = name.replace(donor, own)
        if not name.startswith("post_layernorm"):
            state[name] = tensor
    ours.load_state_dict(state)
    return ours


def pair(dropout: float = 0.0) -> tuple[Captioner, nn.Module, nn.Module]:
    """A captioner, and transformers' T5 and CLIP with the same weights."""
    t5 = hf_model("v1.1", num_layers=3)  # generate() of transformers 5 sizes its cache by the encoder's depth
    clip = hf_clip()
    values = t5.config.to_dict() | {"tie_word_embeddings": False, "scale_decoder_outputs": False, "dropout_rate": dropout}
    text = T5(T5Config.from_dict(values))
    weights.load_into(text, dict(t5.state_dict()), weights.HF_T5, "transformers")
    return Captioner(vit_like(clip), text).eval(), t5, clip


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """One adapter's parameters by their names in the model."""
    return {own: parameter for own, parameter in lora.adapter_parameters(model).items() if f".adapters.{name}." in own}


@torch.no_grad()
def randomise(model: nn.Module, name: str, seed: int = 8) -> None:
    """Every number of an adapter random, so that all of it matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(model, name).values():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def places(t5: nn.Module, clip: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Our residual connections' names and, of transformers' models, (the norm before the sub-layer, the sub-layer)."""
    found = {}
    for block in range(3):
        for stack, sublayers in (("encoder", ("self_attn", "mlp")), ("decoder", ("self_attn", "cross_attn", "mlp"))):
            layers = getattr(t5, stack).block[block].layer
            kinds = {"self_attn": "SelfAttention", "cross_attn": "EncDecAttention", "mlp": "DenseReluDense"}
            for layer, name in zip(layers, sublayers, strict=True):
                found[f"text.{stack}.blocks.{block}.{name}_residual"] = layer.layer_norm, getattr(layer, kinds[name])
    encoder = dict(clip.named_modules())
    for block in range(2):
        prefix = next(name for name in encoder if name.endswith(f"encoder.layers.{block}"))
        layer = encoder[prefix]
        found[f"vision.blocks.{block}.attn_residual"] = layer.layer_norm1, layer.self_attn
        found[f"vision.blocks.{block}.mlp_residual"] = layer.layer_norm2, layer.mlp
    return found


def hook(model: Captioner, t5: nn.Module, clip: nn.Module, stack: Sequence[str]) -> dict[str, nn.Module]:
    """The adapters of stack, written plainly and hooked onto transformers' modules; theirs by our parameters' names."""
    theirs = {}
    for path, (norm, function) in places(t5, clip).items():
        residual = model.get_submodule(path)
        if not isinstance(residual, AdaptedResidual):
            continue
        here = []
        for name in stack:
            if name not in residual.adapters:
                continue
            own = residual.adapters[name]
            down, up = nn.Linear(own.down.weight.shape[1], len(own.down.bias)), nn.Linear(len(own.down.bias), len(own.up.bias))
            activation = nn.SiLU() if own.style == "houlsby" else nn.ReLU()
            for copied, source in ((down, own.down), (up, own.up)):
                copied.load_state_dict(source.state_dict())
            here.append((own.style, nn.Sequential(down, activation, up)))
            for layer, linear in (("down", down), ("up", up)):
                theirs[f"{path}.adapters.{name}.{layer}"] = linear
        seen = {}

        def before(module, arguments, output, seen=seen):
            seen["x"], seen["normed"] = arguments[0], output

        def after(module, arguments, output, seen=seen, here=here):
            f = output[0] if isinstance(output, tuple) else output
            for style, adapter in here:
                if style == "houlsby":
                    f = f + adapter(f)
                elif style == "pfeiffer":
                    f = f + adapter(seen["x"] + f)
                else:
                    f = f + 4 * adapter(seen["normed"])
            return (f, *output[1:]) if isinstance(output, tuple) else f

        norm.register_forward_hook(before)
        function.register_forward_hook(after)
    return theirs


def outputs(where: str, model: Captioner, t5: nn.Module, clip: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the part of the model computes here and in transformers."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(2, 190, (2, 5), generator=generator)
    if where == "vision":
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return model.vision(pixels), clip(pixel_values=pixels).last_hidden_state
    if where == "encoder":
        ids = torch.randint(2, 190, (2, 6), generator=generator)
        return model.text(ids, labels), t5(input_ids=ids, labels=labels).logits
    memory = torch.randn(2, TOKENS, WIDTH, generator=generator)
    return model.decoder_logits(memory, labels), t5(encoder_outputs=BaseModelOutput(memory), labels=labels).logits


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_equal_with_gradients(where: str, model: Captioner, t5: nn.Module, clip: nn.Module, theirs: dict) -> None:
    ours, expected = outputs(where, model, t5, clip)
    assert close(ours, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    parameters = dict(model.named_parameters())
    for name, linear in theirs.items():
        for own, parameter in linear.named_parameters():
            assert parameter.grad.any(), name
            assert close(parameters[f"{name}.{own}"].grad, parameter.grad), f"{name}.{own}"


# ---- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("where", "count"), [("decoder", 9), ("encoder", 6), ("vision", 4)])
def test_outputs_and_gradients_equal_those_of_hooks_on_transformers(where, count, style):
    model, t5, clip = pair()
    plain = outputs(where, model, t5, clip)
    assert close(*plain)
    paths = adapters.apply_adapters(model, ("attn", "ffn"), (where,), reduction=3, style=style)
    assert len(paths) == count and set(paths) <= set(places(t5, clip))
    assert torch.equal(outputs(where, model, t5, clip)[0], plain[0])
    randomise(model, "caption")
    theirs = hook(model, t5, clip, ["caption"])
    assert len(theirs) == 2 * count
    assert not torch.allclose(outputs(where, model, t5, clip)[0], plain[0], rtol=0.1)
    assert_equal_with_gradients(where, model, t5, clip, theirs)


@pytest.mark.parametrize("styles", [("houlsby", "pfeiffer"), ("pfeiffer", "pfeiffer"), ("parallel", "houlsby")])
def test_a_stack_applies_the_lowest_first(styles):
    seen = []
    for stack in (("question", "caption"), ("caption", "question")):
        model, t5, clip = pair()
        for name, style, seed in zip(("question", "caption"), styles, (1, 2)):
            adapters.apply_adapters(model, style=style, reduction=4, name=name)
            randomise(model, name, seed)
        assert adapters.get_stack(model) == ("question", "caption")
        adapters.set_stack(model, stack)
        theirs = hook(model, t5, clip, stack)
        assert_equal_with_gradients("decoder", model, t5, clip, theirs)
        seen.append(outputs("decoder", model, t5, clip)[0])
    assert not torch.allclose(*seen, rtol=1e-2)


def test_lora_under_adapters_equals_transformers_with_both():
    model, t5, clip = pair()
    lora.apply_lora(model, ("attn", "ffn"), ("decoder",), rank=4, alpha=4, dropout=0.0)
    adapters.apply_adapters(model, reduction=3)
    # LoRA finds the same layers where adapters are there already, and none in them.
    again = pair()[0]
    adapters.apply_adapters(again, reduction=3)
    assert lora.apply_lora(again) == list(lora.inject.lora_modules(model))
    randomise(model, "caption")
    with torch.no_grad():
        for name, layer in lora.inject.lora_modules(model).items():
            layer.lora_B.normal_(std=0.1)
            t5.get_submodule(weights.hf_module_name(name)).weight += layer.delta_weight()
    assert_equal_with_gradients("decoder", model, t5, clip, hook(model, t5, clip, ["caption"]))
    assert all(parameter.grad is not None for parameter in lora.adapter_parameters(model).values())


@pytest.mark.parametrize("where", [("decoder",), ("decoder", "encoder", "vision")])
def test_nothing_changes_at_step_0_also_with_dropout(where):
    model = pair(dropout=0.2)[0].train()
    pixels, labels = torch.randn(2, 3, 16, 16), torch.randint(2, 190, (2, 5))
    torch.manual_seed(3)
    expected = model(pixels, labels)
    for style in STYLES:
        adapters.apply_adapters(model, where=where, style=style, name=style)
    torch.manual_seed(3)
    assert torch.equal(model(pixels, labels), expected)


def test_the_first_values_are_those_of_the_papers_code():
    made = Bottleneck(200, 2, generator=torch.Generator().manual_seed(1))
    again = nn.Linear(200, 100)  # its weights are drawn as kaiming_uniform(a=sqrt 5)
    nn.init.kaiming_uniform_(again.weight, a=5**0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made.down.weight, again.weight)
    assert not any(parameter.any() for parameter in (made.down.bias, made.up.weight, made.up.bias))
    assert Bottleneck(8, 16).down.weight.shape == (1, 8) and Bottleneck(40, 16).down.weight.shape == (2, 40)


def test_a_generator_fixes_the_first_values_and_leaves_the_default_one_alone():
    models = [pair()[0] for _ in range(2)]
    before = torch.get_rng_state()
    for model in models:
        adapters.apply_adapters(model, generator=torch.Generator().manual_seed(9))
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (parameters_of(model, "caption") for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [first[name].flatten()[0].item() for name in first if name.endswith("down.weight")]
    assert len(drawn) == len(set(drawn)) == 9


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(style, autocast):
    model = pair()[0]
    if not autocast:
        model = model.bfloat16()
    memory = torch.randn(2, TOKENS, WIDTH, dtype=torch.float32 if autocast else torch.bfloat16)
    labels = torch.randint(2, 190, (2, 5))

    def logits() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.decoder_logits(memory, labels)

    plain = logits()
    adapters.apply_adapters(model, style=style, reduction=3)
    own = parameters_of(model, "caption")
    assert {parameter.dtype for parameter in own.values()} == {torch.float32}
    assert torch.equal(logits(), plain)
    randomise(model, "caption")
    low = logits()
    assert low.dtype == plain.dtype == torch.bfloat16
    low.float().sum().backward()
    assert {parameter.grad.dtype for parameter in own.values()} == {torch.float32}
    high = copy.deepcopy(model).float().decoder_logits(memory.float(), labels)
    assert (low.float() - high).abs().mean() < 0.03 * (high - plain.float()).abs().mean()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_adapter_gives_the_dtype_that_it_reads(dtype, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert Bottleneck(8, 2)(torch.randn(3, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_a_residual_keeps_its_dtype_whatever_it_reads(style, stream):
    model = pair()[0]
    residual = model.get_submodule(adapters.apply_adapters(model, ("ffn",), style=style)[0])
    x, update, source = (torch.randn(2, 3, WIDTH, dtype=dtype) for dtype in (stream, torch.bfloat16, torch.float32))
    assert residual(x, update, source).dtype == residual.base(x, update, source).dtype == stream


def test_double_precision_gradients():
    made = Bottleneck(6, 2, dtype=torch.float64)
    with torch.no_grad():
        made.up.weight.normal_()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: made(x), (x, *made.parameters()))


# ---- decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_decoding_sees_the_adapters(style):
    model, t5, clip = pair()
    adapters.apply_adapters(model, style=style, reduction=3)
    memory = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    plain = generate.greedy(model, memory, max_new_tokens=8)
    randomise(model, "caption")
    ids = generate.greedy(model, memory, max_new_tokens=8)
    assert not torch.equal(ids, plain)
    with torch.no_grad():
        whole = model.decoder_logits(memory, ids[:, 1:]).argmax(-1)
    ended = (ids[:, :-1] == 1).cummax(1).values
    assert torch.equal(whole.masked_fill(ended, 0), ids[:, 1:])
    hook(model, t5, clip, ["caption"])
    for beams in (1, 4):
        config = GenerationConfig(
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, do_sample=False, num_beams=beams, max_length=9, early_stopping=False
        )
        with torch.no_grad():
            expected = t5.generate(
                encoder_outputs=BaseModelOutput(memory), attention_mask=torch.ones(memory.shape[:2], dtype=torch.long), generation_config=config
            )
        assert torch.equal(generate.beam_search(model, memory, num_beams=beams, max_length=9), expected)


# ---- stacks -------------------------------------------------------------------------------------------------


def test_switching_gives_bit_equal_outputs_back():
    model = pair()[0]
    pixels, labels = torch.randn(2, 3, 16, 16), torch.randint(2, 190, (2, 5))
    with torch.no_grad():
        results = {(): model(pixels, labels)}
        # Each in other places: a stack skips a name where it is not.
        for seed, (name, where) in enumerate({"a": ("decoder",), "b": ("vision",), "c": ("decoder", "vision")}.items()):
            adapters.apply_adapters(model, where=where, name=name, style=STYLES[seed])
            randomise(model, name, seed)
            results[adapters.get_stack(model)] = model(pixels, labels)
        assert list(results) == [(), ("a",), ("a", "b"), ("a", "b", "c")] and adapters.adapter_names(model) == ["a", "b", "c"]
        for stack in (("c", "a", "b"), ("b",)):
            adapters.set_stack(model, stack)
            results[stack] = model(pixels, labels)
        for stack, expected in reversed(results.items()):
            adapters.set_stack(model, stack)
            assert adapters.get_stack(model) == stack and torch.equal(model(pixels, labels), expected)
    values = [result.sum().item() for result in results.values()]
    assert len(set(values)) == len(values)


def test_a_frozen_adapter_stays_as_it_is_while_the_one_above_learns():
    model = pair()[0].requires_grad_(False)
    adapters.apply_adapters(model, name="question", style="parallel")
    randomise(model, "question")
    adapters.apply_adapters(model, name="caption")
    for parameter in parameters_of(model, "question").values():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(torch.randn(2, TOKENS, WIDTH), torch.randint(2, 190, (2, 5)))[0].backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(parameters_of(model, "caption"))
    assert all(parameter.grad is None for parameter in parameters_of(model, "question").values())


def test_the_whole_list_of_parameters_and_what_a_residual_is():
    model = pair()[0]
    plain = {name: module for name, module in model.named_modules() if name.endswith("_residual")}
    names = dict(model.named_parameters()).keys()
    paths = adapters.apply_adapters(model, ("ffn",), ("vision", "decoder"), name="one")
    assert paths == [f"vision.blocks.{i}.mlp_residual" for i in range(2)] + [
        f"text.decoder.blocks.{i}.mlp_residual" for i in range(3)
    ]
    assert adapters.apply_adapters(model, ("attn",), ("decoder",), name="two") == [
        f"text.decoder.blocks.{i}.{kind}_attn_residual" for i in range(3) for kind in ("self", "cross")
    ]
    added = dict(model.named_parameters()).keys() - names
    assert added == parameters_of(model, "one").keys() | parameters_of(model, "two").keys()
    assert added == set(lora.adapter_parameters(model)) == {name for name in added if ".adapters." in name}
    residual = model.get_submodule(paths[0])
    assert residual.base is plain[paths[0]] and (residual.width, residual.dropout) == (32, residual.base.dropout)
    model.text.set_dropout(0.3)
    assert model.get_submodule(paths[-1]).dropout.p == 0.3


def test_removing_the_last_adapter_puts_the_plain_residual_back():
    model = pair()[0]
    plain = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    adapters.apply_adapters(model, name="one", where=("vision",))
    adapters.apply_adapters(model, ("ffn",), name="two", where=("vision", "decoder"))
    adapters.remove_adapter(model, "one")
    assert adapters.adapter_names(model) == ["two"] and adapters.get_stack(model) == ("two",)
    assert model.vision.blocks[0].attn_residual is plain["vision.blocks.0.attn_residual"]
    adapters.remove_adapter(model, "two")
    assert adapters.adapter_names(model) == [] and adapters.get_stack(model) == ()
    assert dict(model.named_modules()) == plain and model.state_dict().keys() == state.keys()
    adapters.apply_adapters(model, name="one")
    assert adapters.get_stack(model) == ("one",)


def test_a_copy_of_a_model_has_adapters_of_its_own():
    model = pair()[0]
    adapters.apply_adapters(model)
    other = copy.deepcopy(model)
    adapters.apply_adapters(other, name="more")
    adapters.set_stack(other, ())
    assert (adapters.adapter_names(model), adapters.get_stack(model)) == (["caption"], ("caption",))


# ---- errors -------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple:
    """What must be the same after an error."""
    names = [(name, type(module)) for name, module in model.named_modules()]
    return names, adapters.get_stack(model), adapters.adapter_names(model)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(sublayers=("attention",)), "unknown adapter sub-layer 'attention': one of attn, ffn"),
        (dict(sublayers=()), r"adapter sub-layers must be a list of at least one of attn, ffn, not \(\)"),
        (dict(sublayers="attn"), "adapter sub-layers must be a list"),
        (dict(where=("decoder", "everywhere")), "unknown adapter place 'everywhere': one of decoder, encoder, vision"),
        (dict(where=()), "adapter places must be a list of at least one of decoder, encoder, vision"),
        (dict(style="lora"), "unknown adapter style 'lora': one of houlsby, pfeiffer, parallel"),
        (dict(reduction=0), "adapter reduction must be a whole number of at least 1, not 0"),
        (dict(reduction=2.5), "adapter reduction must be a whole number of at least 1, not 2.5"),
        (dict(name="present"), "there is an adapter 'present' already; the model has present"),
        (dict(name=""), "an adapter's name has letters, digits, - and _ and nothing else, not ''"),
        (dict(name="../up"), "an adapter's name has letters, digits"),
        (dict(name="a.b"), "an adapter's name has letters, digits"),
        (dict(name="a\n"), "an adapter's name has letters, digits"),
        (dict(name="prompt"), "an adapter cannot be called 'prompt': lora, prompt, bridge, vision, text are names of other"),
        (dict(name="train"), "an adapter cannot be called 'train': modules of PyTorch have an attribute"),
    ],
)
def test_errors_name_the_thing_and_change_nothing(settings, named):
    model = pair()[0]
    adapters.apply_adapters(model, ("ffn",), name="present")
    before = snapshot(model)
    with pytest.raises(ValueError, match=named) as caught:
        adapters.apply_adapters(model, **{"name": "new"} | settings)
    assert "\n" not in str(caught.value) and snapshot(model) == before


def test_places_without_residual_connections_are_named():
    model = pair()[0]
    model.vision = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.text.encoder = None
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the vision \(Sequential\) has no residual connections of attn .*ViT of open_clip's has them; LoRA works"):
        adapters.apply_adapters(model, where=("decoder", "vision"))
    with pytest.raises(ValueError, match=r"this model has no encoder \(text.encoder\) for adapters"):
        adapters.apply_adapters(model, where=("decoder", "encoder"))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("one", "three"), "no adapter 'three': the model has one, two"),
        (("one", "two", "one"), "adapter 'one' is in the stack twice; the model has one, two"),
        ("one", "an adapter stack is a list of names, not 'one'"),
    ],
)
def test_stacks_that_cannot_be(names, named):
    model = pair()[0]
    for name in ("one", "two"):
        adapters.apply_adapters(model, name=name)
    with pytest.raises(ValueError, match=named):
        adapters.set_stack(model, names)
    assert adapters.get_stack(model) == ("one", "two")


def test_unknown_adapters_are_named(tmp_path):
    model = pair()[0]
    adapters.set_stack(model, ())
    for act in (
        lambda: adapters.set_stack(model, ("one",)),
        lambda: adapters.remove_adapter(model, "one"),
        lambda: adapter_files.save_adapter(model, "one", tmp_path / "one"),
    ):
        with pytest.raises(ValueError, match="no adapter 'one': the model has none"):
            act()
    assert not (tmp_path / "one").exists()


# ---- files --------------------------------------------------------------------------------------------------


BASE = "0123456789abcdef" * 4


def saved(directory, where=("decoder", "vision"), **settings) -> Captioner:
    model = pair()[0]
    adapters.apply_adapters(model, where=where, **{"reduction": 3, "style": "parallel", "name": "question"} | settings)
    randomise(model, "question")
    adapter_files.save_adapter(model, "question", directory, {"base_sha256": BASE})
    return model


def test_a_round_trip_is_bit_equal(tmp_path):
    model = saved(tmp_path / "first")
    pixels, labels = torch.randn(2, 3, 16, 16), torch.randint(2, 190, (2, 5))
    other = pair()[0]
    adapters.apply_adapters(other, name="caption")
    assert adapter_files.load_adapter(other, tmp_path / "first", BASE) == "question"
    assert adapters.get_stack(other) == ("caption", "question")
    adapters.set_stack(other, ("question",))
    with torch.no_grad():
        assert torch.equal(other(pixels, labels), model(pixels, labels))
    adapter_files.save_adapter(other, "question", tmp_path / "second", {"base_sha256": BASE})
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("first", "second")]
    assert configs[0] == configs[1]
    assert json.loads(configs[0]) == {
        "peft_type": "BOTTLENECK", "name": "question", "style": "parallel", "reduction": 3,
        "sublayers": ["attn", "ffn"], "where": ["decoder", "vision"],
    }  # fmt: skip
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert set(first) == {f"{path}.{layer}.{own}" for path in adapters.adapted_residuals(model) for layer in ("down", "up") for own in ("weight", "bias")}
    with safe_open(tmp_path / "first" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "base_sha256": BASE}


def test_another_name_and_a_file_that_names_no_base(tmp_path):
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="there is an adapter 'question' already"):
        adapter_files.load_adapter(model, tmp_path)
    assert adapter_files.load_adapter(model, tmp_path, name="again") == "again"
    first, second = (parameters_of(model, name).values() for name in ("question", "again"))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    adapter_files.save_adapter(model, "again", tmp_path / "unnamed")
    assert adapter_files.load_adapter(pair()[0], tmp_path / "unnamed", BASE) == "again"


def edit_config(directory, **changes) -> None:
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(directory, edit) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


LAST = "text.decoder.blocks.2.mlp_residual.up.bias"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: edit_config(folder, peft_type="LORA"), 'adapter_config.json: peft_type is "LORA", not BOTTLENECK'),
        (lambda folder: edit_config(folder, peft_type=None), "peft_type is null"),
        (lambda folder: edit_config(folder, style=None, name=None), "adapter_config.json: lacks name, style"),
        (lambda folder: edit_config(folder, style="compacter"), "unknown adapter style 'compacter': one of houlsby"),
        (lambda folder: edit_config(folder, style=["houlsby"]), "unknown adapter style"),
        (lambda folder: edit_config(folder, reduction="16"), "reduction must be a whole number of at least 1, not '16'"),
        (lambda folder: edit_config(folder, sublayers="attn"), "sub-layers must be a list"),
        (lambda folder: edit_config(folder, where=[["decoder"]]), "unknown adapter place"),
        (lambda folder: edit_config(folder, name="../../up"), "letters, digits"),
        (lambda folder: edit_config(folder, name=3), "letters, digits"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json: not a JSON file"),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe{}"), "adapter_config.json: not a JSON file"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json: not a JSON object"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40), "adapter_model.safetensors: not a safetensors file"),
        (lambda folder: cut(folder / "adapter_model.safetensors"), "adapter_model.safetensors: not a safetensors file"),
        (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(LAST)), f"missing: {LAST}; unexpected: none"),
        (
            lambda folder: edit_tensors(folder, lambda tensors: tensors.update({LAST.replace("2", "7"): tensors.pop(LAST)})),
            f"missing: {LAST}; unexpected: {LAST.replace('2', '7')}",
        ),
        (
            lambda folder: edit_tensors(folder, lambda tensors: tensors.update({LAST: torch.zeros(23)})),
            rf"{LAST} has shape \[23\], expected \[24\]",
        ),
        (lambda folder: edit_config(folder, reduction=4), r"down.bias has shape \[8\], expected \[6\]"),
        (lambda folder: edit_config(folder, where=["decoder"]), "missing: none; unexpected: vision.blocks.0.attn_residual.down.bias"),
        (lambda folder: edit_config(folder, where=["decoder", "encoder", "vision"]), "missing: text.encoder.blocks.0.mlp_residual"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(tmp_path, damage, named):
    saved(tmp_path)
    damage(tmp_path)
    model = pair()[0]
    adapters.apply_adapters(model, name="caption")
    before = snapshot(model)
    with pytest.raises(ValueError, match=named) as caught:
        adapter_files.load_adapter(model, tmp_path)
    assert "\n" not in str(caught.value) and snapshot(model) == before


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def test_missing_files_and_other_bases_are_named(tmp_path):
    saved(tmp_path)
    model = pair()[0]
    with pytest.raises(ValueError, match=r"was made for another backbone \(sha256 0123456789ab, here ffffffffffff\)$"):
        adapter_files.load_adapter(model, tmp_path, "f" * 64)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: no such file"):
        adapter_files.load_adapter(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere.adapter_config.json: no such file"):
        adapter_files.load_adapter(model, tmp_path / "nowhere")
    assert adapters.adapter_names(model) == []


def test_a_place_that_this_model_lacks_is_named(tmp_path):
    saved(tmp_path)
    model = pair()[0]
    model.vision = nn.Identity()
    with pytest.raises(ValueError, match=r"adapter_config.json does not fit: the vision \(Identity\) has no residual connections"):
        adapter_files.load_adapter(model, tmp_path)
    assert adapters.adapter_names(model) == []
