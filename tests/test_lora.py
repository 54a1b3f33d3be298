"""LoRA layers against peft and autograd, injection, the one list of trained parameters."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora
from captioner.model import Captioner
from captioner.t5 import T5, T5Config, input_groups
from lora.adapters import apply_adapters
from lora.inject import lora_modules
from lora.layers import LoRALinear
from lora.quant import quantize_base

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class TinyVision(nn.Module):
    """Names of a ViT block, without its arithmetic."""

    def __init__(self):
        super().__init__()
        self.width = 24
        self.attn = nn.ModuleDict({name: nn.Linear(24, 24) for name in ATTENTION})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(24, 48), "fc2": nn.Linear(48, 24)})


def tiny_captioner(num_layers: int = 0, tied: bool = False, dropout: float = 0.0) -> Captioner:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=num_layers,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        tie_word_embeddings=tied,
    )
    return Captioner(TinyVision(), T5(config))


def random_B(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in lora.adapter_parameters(model).items():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


# ---- the layer against peft ------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_pefts(bias, rslora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=bias)
    ours = LoRALinear(copy.deepcopy(base), rank=8, alpha=6, dropout=0.0, rslora=rslora)
    config = peft.LoraConfig(r=8, lora_alpha=6, lora_dropout=0.0, use_rslora=rslora, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    A, B = torch.randn(8, 24), torch.randn(40, 8)
    with torch.no_grad():
        for target, source in (
            (ours.lora_A, A),
            (theirs.lora_A["default"].weight, A),
            (ours.lora_B, B),
            (theirs.lora_B["default"].weight, B),
        ):
            target.copy_(source)
    x, upstream = torch.randn(2, 6, 24), torch.randn(2, 6, 40)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, reference = ours(found), theirs(expected)
    y.backward(upstream), reference.backward(upstream)
    assert ours.scaling == theirs.scaling["default"] == (6 / math.sqrt(8) if rslora else 6 / 8)
    for a, b in (
        (y, reference),
        (found.grad, expected.grad),
        (ours.lora_A.grad, theirs.lora_A["default"].weight.grad),
        (ours.lora_B.grad, theirs.lora_B["default"].weight.grad),
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4 * b.abs().max().item())


def test_dropout_keeps_and_scales_as_pefts():
    peft = pytest.importorskip("peft")
    base = nn.Linear(200, 200, bias=False)
    nn.init.zeros_(base.weight)
    config = peft.LoraConfig(r=200, lora_alpha=200, lora_dropout=0.3, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0].train()
    ours = LoRALinear(base, rank=200, alpha=200, dropout=0.3, rslora=False).train()
    with torch.no_grad():
        for A_or_B in (ours.lora_A, ours.lora_B, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight):
            A_or_B.copy_(torch.eye(200))
        torch.manual_seed(0)
        found, expected = ours(torch.ones(1000, 200)), theirs(torch.ones(1000, 200))
    # Four standard deviations of the mean of 200,000 draws.
    spread = 4 * math.sqrt(0.3 * 0.7 / 200_000)
    for y in (found, expected):
        assert (y != 0).double().mean().item() == pytest.approx(0.7, abs=spread)
    assert found.max().item() == pytest.approx(expected.max().item(), rel=1e-4)
    assert set(found.unique().tolist()) == {0.0, found.max().item()}


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_first_values_are_pefts(rank, init):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights="gaussian" if init == "gaussian" else True)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(4000, 3)), config).base_model.model[0]
    layer = LoRALinear(nn.Linear(4000, 3), rank=rank, init=init)
    ours, expected = layer.lora_A.detach(), theirs.lora_A["default"].weight.detach()
    assert ours.std().item() == pytest.approx(expected.std().item(), rel=0.03)
    assert abs(ours.mean().item()) < 0.1 * expected.std().item()
    for quantile in (0.01, 0.25, 0.75, 0.99):
        level = expected.flatten().quantile(quantile)
        assert (ours < level).double().mean().item() == pytest.approx(quantile, abs=0.02)
    assert not layer.lora_B.any() and not theirs.lora_B["default"].weight.any()
    if init == "gaussian":
        assert ours.std().item() == pytest.approx(1 / rank, rel=0.03)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(5,), (2, 7)])
def test_step_0_is_the_base_layer_bit_for_bit(bias, rows):
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=bias)
    x = torch.randn(*rows, 24)
    expected = base(x)
    layer = LoRALinear(base, dropout=0.1)
    assert torch.equal(layer.train()(x), expected) and torch.equal(layer.eval()(x), expected)


def test_merged_equals_unmerged_and_merging_is_idempotent():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 40), dropout=0.0)
    nn.init.normal_(layer.lora_B)
    before, x = layer.base.weight.clone(), torch.randn(9, 24)
    unmerged = layer(x)
    layer.merge()
    once = layer.base.weight.clone()
    layer.merge()
    assert layer.merged and torch.equal(layer.base.weight, once) and not torch.equal(once, before)
    layer.train(), layer.eval()
    assert torch.equal(layer.base.weight, once)
    assert torch.allclose(layer(x), unmerged, atol=1e-5 * unmerged.abs().max().item())
    assert torch.equal(layer(x), F.linear(x, layer.base.weight, layer.base.bias))
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.base.weight, before) and torch.equal(layer(x), unmerged)


def test_a_low_precision_base_keeps_fp32_adapters_and_rounds_once_on_merging():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 40, bias=False).bfloat16(), dropout=0.0)
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    expected = (layer.base.weight.float() + layer.scaling * layer.lora_B @ layer.lora_A).bfloat16()
    x = torch.randn(9, 24).bfloat16()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    layer.merge()
    assert torch.equal(layer.base.weight, expected)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(base_dtype):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 40).to(base_dtype), dropout=0.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 24, requires_grad=True)
    exact = (
        F.linear(x, layer.base.weight.float(), layer.base.bias.float())
        + layer.scaling * x @ layer.lora_A.t() @ layer.lora_B.t()
    )
    exact_gradients = torch.autograd.grad(exact.sum(), (x, layer.lora_A, layer.lora_B))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    for found, expected in zip(
        (y, x.grad, layer.lora_A.grad, layer.lora_B.grad), (exact, *exact_gradients), strict=True
    ):
        assert found.dtype in (torch.bfloat16, torch.float32)
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -2}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": -8.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": math.inf}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"init": "zeros"}, "gaussian"),
    ],
)
def test_settings_that_make_no_sense(settings, named):
    with pytest.raises(ValueError, match=named):
        LoRALinear(nn.Linear(4, 4), **settings)
    model = tiny_captioner()
    with pytest.raises(ValueError, match=named):
        lora.apply_lora(model, **settings)
    assert not lora.adapter_parameters(model)


def test_only_linears_are_wrapped():
    with pytest.raises(ValueError, match="Embedding"):
        LoRALinear(nn.Embedding(4, 4))


# ---- injection -------------------------------------------------------------------------------------------


def test_names_are_exact_and_in_module_order():
    names = lora.apply_lora(tiny_captioner(num_layers=2), ("attn", "ffn"), ("decoder",))
    assert names == [
        f"text.decoder.blocks.{block}.{layer}"
        for block in range(2)
        for layer in (
            *(f"self_attn.{name}" for name in ATTENTION),
            *(f"cross_attn.{name}" for name in ATTENTION),
            "mlp.wi_0",
            "mlp.wi_1",
            "mlp.wo",
        )
    ]


@pytest.mark.parametrize(
    ("targets", "where", "expected"),
    [
        (("cross_attn.q_proj",), ("decoder",), [f"text.decoder.blocks.{i}.cross_attn.q_proj" for i in range(2)]),
        (
            ("wo",),
            ("encoder", "decoder"),
            [f"text.{part}.blocks.{i}.mlp.wo" for part in ("encoder", "decoder") for i in range(2)],
        ),
        (("ffn", "q_proj"), ("vision",), ["vision.attn.q_proj", "vision.mlp.fc1", "vision.mlp.fc2"]),
        (
            ("self_attn",),
            ("decoder",),
            [f"text.decoder.blocks.{i}.self_attn.{name}" for i in range(2) for name in ATTENTION],
        ),
        (
            ("q_proj", "q_proj"),
            ("decoder", "decoder"),
            [f"text.decoder.blocks.{i}.{kind}.q_proj" for i in range(2) for kind in ("self_attn", "cross_attn")],
        ),
        (("blocks.1.mlp",), ("decoder",), [f"text.decoder.blocks.1.mlp.{name}" for name in ("wi_0", "wi_1", "wo")]),
        (
            ("q", "v"),
            ("encoder", "vision"),
            [
                *(f"vision.attn.{name}" for name in ("q_proj", "v_proj")),
                *(f"text.encoder.blocks.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")),
            ],
        ),
        (
            ("cross_attn.k", "out_proj", "wi_1"),
            ("decoder",),
            [
                f"text.decoder.blocks.{i}.{name}"
                for i in range(2)
                for name in ("self_attn.o_proj", "cross_attn.k_proj", "cross_attn.o_proj", "mlp.wi_1")
            ],
        ),
    ],
)
def test_targets(targets, where, expected):
    model = tiny_captioner(num_layers=2)
    bases = {name: model.get_submodule(name) for name in expected}
    assert lora.apply_lora(model, targets, where, rank=2) == expected
    for name in expected:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoRALinear) and layer.base is bases[name] and not layer.base.weight.requires_grad
    assert isinstance(model.bridge, nn.Linear) and isinstance(model.text.lm_head, nn.Linear)


@pytest.mark.parametrize(
    ("targets", "where", "named"),
    [
        (("attention",), ("decoder",), "attn, ffn"),
        (("proj",), ("decoder",), "unknown LoRA target 'proj'"),
        (("q_pro",), ("decoder",), "q_proj"),
        (("mlp.fc1",), ("decoder",), "'mlp.fc1' matches no linear layer in the decoder"),
        (("cross_attn",), ("decoder", "vision"), "'cross_attn' matches no linear layer in the vision"),
        (("q.proj",), ("decoder",), "unknown LoRA target"),
        (("x.q",), ("decoder",), "unknown LoRA target 'x.q'"),
        (("wi",), ("decoder",), "unknown LoRA target 'wi'"),
        (("attn",), ("everywhere",), "decoder, encoder, vision"),
        (("attn",), ("encoder",), "no encoder"),
        ((), ("decoder",), "targets"),
        ("attn", ("decoder",), "targets"),
        (("attn",), (), "where"),
    ],
)
def test_errors_name_the_thing_and_change_nothing(targets, where, named):
    model = tiny_captioner()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=named) as caught:
        lora.apply_lora(model, targets, where)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == before


def test_a_rank_for_each_place():
    model = tiny_captioner(num_layers=1)
    lora.apply_lora(model, ("attn",), ("decoder", "vision", "encoder"), rank={"decoder": 8, "vision": 4, "encoder": 2})
    for name, layer in lora_modules(model).items():
        rank = 4 if name.startswith("vision.") else 2 if name.startswith("text.encoder.") else 8
        assert layer.rank == rank == layer.lora_A.shape[0] and layer.scaling == 8 / math.sqrt(rank)


@pytest.mark.parametrize(
    ("rank", "named"),
    [
        ({"decoder": 8}, "decoder, vision: missing: vision; unexpected: none"),
        ({"decoder": 8, "vision": 4, "encoder": 4, "text": 1}, "missing: none; unexpected: encoder, text"),
        ({}, "missing: decoder, vision"),
        ({"decoder": 8, "vision": 0}, "rank must be at least 1, not 0"),
    ],
)
def test_ranks_must_name_exactly_the_places(rank, named):
    model = tiny_captioner()
    with pytest.raises(ValueError, match=named):
        lora.apply_lora(model, ("attn",), ("decoder", "vision"), rank=rank)
    assert not lora_modules(model)


def test_timm_transformers_have_attention_and_mlp_too():
    timm = pytest.importorskip("timm")
    vision = timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=0)
    vision.width = 24
    model = Captioner(vision, tiny_captioner().text)
    names = lora.apply_lora(model, ("attn", "ffn"), ("vision",))
    assert names == [f"vision.blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def test_linears_inside_adapters_get_no_lora():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Identity()
            self.adapters = nn.ModuleDict({"caption": nn.ModuleDict({"down": nn.Linear(32, 2), "wo": nn.Linear(2, 32)})})

        def adapter_parameters(self):
            return {name: parameter for name, parameter in self.named_parameters() if name.startswith("adapters.")}

    model = tiny_captioner()
    expected = lora.apply_lora(tiny_captioner())
    model.text.decoder.blocks[0].mlp_residual = Adapter()
    with pytest.raises(ValueError, match="unknown LoRA target 'down'"):
        lora.apply_lora(model, ("down",))
    assert lora.apply_lora(model) == expected


def test_a_second_injection_is_refused_until_the_first_is_folded_in():
    model = tiny_captioner()
    lora.apply_lora(model, ("attn",))
    with pytest.raises(ValueError, match="already"):
        lora.apply_lora(model, ("ffn",))
    random_B(model)
    memory, labels = torch.randn(2, 4, 32), torch.randint(2, 50, (2, 5))
    expected = model.eval().decoder_logits(memory, labels)
    lora.merge_lora(model, remove=True)
    assert not lora.adapter_parameters(model) and not any(isinstance(module, LoRALinear) for module in model.modules())
    assert torch.allclose(model.decoder_logits(memory, labels), expected, atol=1e-5)
    assert lora.apply_lora(model, ("ffn",))


def test_a_generator_fixes_the_first_values():
    models = [tiny_captioner() for _ in range(2)]
    for model in models:
        lora.apply_lora(model, generator=torch.Generator().manual_seed(9))
    first, second = (lora.adapter_parameters(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len({first[name].flatten()[0].item() for name in first if name.endswith("lora_A")}) == len(first) / 2


def test_whole_model_merge_and_unmerge():
    model = tiny_captioner()
    lora.apply_lora(model)
    random_B(model)
    before = copy.deepcopy(model.state_dict())
    memory, labels = torch.randn(2, 4, 32), torch.randint(2, 50, (2, 5))
    model.eval()
    unmerged = model.decoder_logits(memory, labels)
    for _ in range(2):
        lora.merge_lora(model)
    assert torch.allclose(model.decoder_logits(memory, labels), unmerged, atol=1e-5)
    lora.unmerge_lora(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_4_bit_base_is_not_merged_and_nothing_else_is_either():
    pytest.importorskip("bitsandbytes")
    model = tiny_captioner()
    quantize_base(model, parts=("text",))
    # The vision layers stand first in the model, and could be merged.
    names = lora.apply_lora(model, ("attn",), ("vision", "decoder"))
    random_B(model)
    before = copy.deepcopy(model.state_dict())
    for remove in (False, True):
        with pytest.raises(ValueError, match="4-bit"):
            lora.merge_lora(model, remove=remove)
    assert list(lora_modules(model)) == names and not any(layer.merged for layer in lora_modules(model).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- what is trained -------------------------------------------------------------------------------------


class Prompt(nn.Module):
    """A trained prefix as a T5 stack takes it."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(3, 32))

    def forward(self, batch):
        return self.embeddings.expand(batch, -1, -1)

    def adapter_parameters(self):
        return {"embeddings": self.embeddings}


def with_everything() -> Captioner:
    """LoRA, two bottleneck adapters and a soft prompt in one decoder."""
    model = tiny_captioner()
    for name in ("question", "caption"):
        apply_adapters(model, ("ffn",), ("decoder",), reduction=8, name=name)
    lora.apply_lora(model, ("q", "v"), rank=2)
    model.text.decoder.prefix = Prompt()
    return model


def kind_of(name: str) -> str:
    found = [kind for kind in ("lora_", "prefix", "question", "caption", "bridge") if kind in name]
    return found[0] if found else "base"


def test_every_kind_of_adapter_is_listed():
    listed = lora.adapter_parameters(with_everything())
    assert {kind_of(name) for name in listed} == {"lora_", "prefix", "question", "caption"}
    parameters = dict(with_everything().named_parameters())
    assert listed.keys() == {name for name in parameters if kind_of(name) not in ("base", "bridge")}
    assert "text.decoder.prefix.embeddings" in listed
    assert "text.decoder.blocks.1.cross_attn.v_proj.lora_B" in listed


@pytest.mark.parametrize(
    ("frozen", "still"),
    [
        ((), {"lora_", "prefix", "question", "caption", "bridge"}),
        (("lora",), {"prefix", "question", "caption", "bridge"}),
        (("prompt", "question"), {"lora_", "caption", "bridge"}),
        (("caption", "bridge"), {"lora_", "prefix", "question"}),
        (("lora", "prompt", "bridge", "question", "caption"), set()),
    ],
)
@pytest.mark.parametrize("also", [("bridge",), ("bridge", "text.decoder")])
def test_frozen_parts_stay_as_they_are(frozen, still, also):
    model = with_everything()
    trainable = lora.set_trainable(model, also, frozen)
    assert {kind_of(name) for name in trainable} == still | ({"base"} if len(also) > 1 else set())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trainable)


@pytest.mark.parametrize("frozen", ["answer", "vision", "base"])
def test_what_is_not_there_cannot_be_frozen(frozen):
    model = with_everything()
    with pytest.raises(ValueError, match=rf"'{frozen}' to freeze: .*lora.*question, caption, bridge"):
        lora.set_trainable(model, ("bridge",), (frozen,))
    with pytest.raises(ValueError, match="'lora' to freeze: what would be trained is bridge"):
        lora.set_trainable(tiny_captioner(), ("bridge",), ("lora",))


def test_the_table_has_a_row_for_each_adapter():
    model = with_everything()
    rows = lora.parameter_table(model, lora.set_trainable(model, frozen=("question",)))
    assert [row.part for row in rows[-5:]] == ["LoRA", "adapter question", "adapter caption", "soft prompt", "total"]
    table = {row.part: row for row in rows}
    # Two linears of 32 and 4 with their biases in each of two blocks; four linears of 32 and 16 in each.
    assert table["adapter question"] == ("adapter question", 0, 2 * (2 * 32 * 4 + 32 + 4))
    assert table["adapter caption"].trainable == table["adapter caption"].total == table["adapter question"].total
    assert table["soft prompt"] == ("soft prompt", 96, 96) and table["LoRA"] == ("LoRA", *[8 * 2 * 48] * 2)
    assert table["total"].total == sum(parameter.numel() for parameter in model.parameters())


def test_the_table_counts_numbers_in_4_bits():
    pytest.importorskip("bitsandbytes")
    model = tiny_captioner(tied=True)
    lora.apply_lora(model)
    expected = lora.parameter_table(model, lora.set_trainable(model))
    packed = tiny_captioner(tied=True)
    quantize_base(packed)
    lora.apply_lora(packed)
    assert lora.parameter_table(packed, lora.set_trainable(packed)) == expected


def test_a_training_step_moves_the_listed_parameters_and_nothing_else():
    model = tiny_captioner(dropout=0.1)
    lora.apply_lora(model)
    trainable = lora.set_trainable(model, also=("bridge",))
    assert set(trainable) == set(lora.adapter_parameters(model)) | {"bridge.weight", "bridge.bias"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(trainable)
    random_B(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.01)
    loss, count = model.train().loss(model.bridge(torch.randn(2, 4, 24)), torch.randint(2, 50, (2, 5)))
    (loss / count).backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(trainable)


@pytest.mark.parametrize("laid_out", [False, True])
def test_the_decoder_with_fused_layers_trains_as_with_the_reference(laid_out):
    gradients = []
    for kernel in ("reference", "auto"):
        lora.use_kernel(kernel)
        model = tiny_captioner(dropout=0.1)
        lora.apply_lora(model, generator=torch.Generator().manual_seed(0))
        trainable = lora.set_trainable(model)
        random_B(model)
        if laid_out and kernel == "auto":
            lora.lay_out(group for block in model.text.decoder.blocks for group in input_groups(block))
        generator = torch.Generator().manual_seed(1)
        features, labels = torch.randn(2, 4, 24, generator=generator), torch.randint(2, 50, (2, 5), generator=generator)
        torch.manual_seed(11)
        lora.seed_dropout(model, 2, 3)
        model.train().loss(model.bridge(features), labels)[0].backward()
        gradients.append({name: parameter.grad for name, parameter in trainable.items()})
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()), name


def test_the_report_of_kernels_counts_layers():
    model = tiny_captioner()
    lora.apply_lora(model)
    (line,) = lora.kernel_report(model, 8, torch.device("cpu"), torch.float32)
    assert line.startswith(f"fused on {len(lora_modules(model))} layers (CPU")


def test_base_weights_train_beside_their_adapters():
    model = tiny_captioner()
    lora.apply_lora(model)
    trainable = lora.set_trainable(model, also=("bridge", "text"))
    random_B(model)
    loss, _ = model.loss(model.bridge(torch.randn(2, 4, 24)), torch.randint(2, 50, (2, 5)))
    loss.backward()
    name = "text.decoder.blocks.0.cross_attn.k_proj.base.weight"
    assert name in trainable and trainable[name].grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in trainable.values())


def test_tied_weights_are_listed_and_counted_once():
    model = tiny_captioner(tied=True)
    trainable = lora.set_trainable(model, also=("text",))
    assert "text.embedding.weight" in trainable and "text.lm_head.weight" not in trainable
    assert len({id(parameter) for parameter in trainable.values()}) == len(trainable)
    rows = {row.part: row for row in lora.parameter_table(model, trainable)}
    assert rows["embeddings + head"].total == 50 * 32


def test_an_unknown_part_is_named_with_the_choices():
    with pytest.raises(ValueError, match="'txt'.*vision, bridge, text"):
        lora.set_trainable(tiny_captioner(), also=("txt",))


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_sums_to_the_models_parameters(tied):
    model = tiny_captioner(num_layers=1, tied=tied)
    plain = sum(parameter.numel() for parameter in model.parameters())
    lora.apply_lora(model, rank=4)
    trainable = lora.set_trainable(model)
    rows = lora.parameter_table(model, trainable)
    assert [row.part for row in rows] == [
        "vision",
        "bridge",
        "text encoder",
        "text decoder",
        "embeddings + head",
        "LoRA",
        "total",
    ]
    assert (
        rows[-1].total
        == sum(row.total for row in rows[:-1])
        == sum(parameter.numel() for parameter in model.parameters())
    )
    assert (
        rows[-1].trainable
        == sum(row.trainable for row in rows[:-1])
        == sum(parameter.numel() for parameter in trainable.values())
    )
    adapters = next(row for row in rows if row.part == "LoRA")
    # Per decoder block 4 + 4 attention linears between 32 and 2 * 8, wi_0 and wi_1 from 32 to 40, wo back.
    assert (
        adapters.trainable == adapters.total == 2 * 4 * (8 * (32 + 16) + 3 * (32 + 40))
        and plain + adapters.total == rows[-1].total
    )
    text = lora.format_parameter_table(rows)
    assert (
        len(text.splitlines()) == len(rows) + 1
        and f"{rows[-1].total:,}" in text
        and len({len(line) for line in text.splitlines()}) == 1
    )
