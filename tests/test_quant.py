"""The 4-bit base against bitsandbytes, peft and plain layers with the dequantised weights."""

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora
from captioner import generate
from captioner.model import Bridge, Captioner
from captioner.t5 import T5, T5Config
from captioner.vit import VisionConfig, VisionTransformer
from lora.layers import LoRALinear
from lora.quant import Embedding4bit, Linear4bit, NF4Weight, base_bytes, dequantize_base, pack, quantize_base, unpack

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra `quant`)"
)
cuda = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])
on_each_device = pytest.mark.parametrize("device", ["cpu", cuda])
SHAPES = [(64, 128), (300, 31), (7, 9), (1, 1), (65, 64)]  # (out, in); the second and third end within a block


def tiny_captioner(tied: bool = False, width: int = 64, layers: int = 2, device: str = "cpu") -> Captioner:
    torch.manual_seed(0)
    vision = VisionTransformer(VisionConfig(image_size=32, patch_size=16, width=48, layers=2, heads=3))
    config = T5Config(
        vocab_size=80, d_model=width, d_kv=12, d_ff=96, num_layers=0, num_decoder_layers=layers, num_heads=4,
        dropout_rate=0.0, tie_word_embeddings=tied,
    )  # fmt: skip
    return Captioner(vision, T5(config)).to(device)


def random_batch(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    pixels, labels = torch.randn(3, 3, 32, 32, generator=generator), torch.randint(2, 80, (3, 7), generator=generator)
    return pixels.to(device), labels.to(device)


def packed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{own}": buffer.clone()
        for name, module in model.named_modules()
        if isinstance(module, NF4Weight)
        for own, buffer in module.named_buffers()
    }


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max().clamp(min=1e-30)


# ---- packing ---------------------------------------------------------------------------------------------


@needs_bitsandbytes
@on_each_device
@pytest.mark.parametrize("shape", [(64, 128), (300, 32), (128, 70)])
def test_bits_and_values_are_those_of_bitsandbytes(shape, device):
    from bitsandbytes import functional

    torch.manual_seed(0)
    weight = torch.randn(shape)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = NF4Weight(weight.to(device))
    assert torch.equal(ours.packed.flatten()[: len(theirs)].cpu(), theirs.flatten())
    assert torch.equal(ours.absmax.cpu(), state.absmax)
    levels = functional.get_4bit_type("nf4", device="cpu")
    numbers = levels[torch.stack([theirs >> 4, theirs & 15], -1).flatten().int()]
    expected = (numbers * state.absmax.repeat_interleave(64)[: len(numbers)]).view(shape)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = ours.dequantized(dtype)
        assert found.dtype == dtype and found.device.type == device and torch.equal(found.cpu(), expected.to(dtype))
    if shape[1] >= 64:  # bitsandbytes 0.50 reads wrong scales on a CPU where a row is narrower than a block
        assert torch.equal(functional.dequantize_4bit(theirs, state), expected)


@needs_bitsandbytes
@on_each_device
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
def test_quantising_dequantised_values_gives_the_same_bits(shape, size, device):
    torch.manual_seed(1)
    weight = size * torch.randn(shape, device=device)
    weight[0] = 0  # a block of zeros has the scale 0
    packed, absmax = pack(weight)
    values = unpack(packed, absmax, weight.shape, torch.float32)
    again, scales = pack(values)
    assert torch.equal(packed, again) and torch.equal(absmax, scales)
    assert torch.equal(unpack(again, scales, weight.shape, torch.float32), values)
    assert not values[0].any() and values.abs().max() == weight.abs().max()


@needs_bitsandbytes
def test_a_weight_that_is_not_finite_is_refused_by_name_and_nothing_changes():
    model = tiny_captioner()
    with torch.no_grad():
        model.text.decoder.blocks[1].mlp.wo.weight[0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"text\.decoder\.blocks\.1\.mlp\.wo: NaN or infinite"):
        quantize_base(model)
    assert not any(isinstance(module, NF4Weight) for module in model.modules())


# ---- the linear layer ------------------------------------------------------------------------------------


@needs_bitsandbytes
@on_each_device
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_output_and_gradient_are_those_of_the_dequantised_weight(shape, bias, dtype, tolerance, device):
    torch.manual_seed(0)
    layer = Linear4bit(nn.Linear(shape[1], shape[0], bias=bias, device=device))
    weight = layer.dequantized(torch.float32).to(dtype)
    x = torch.randn(2, 5, shape[1], dtype=dtype, device=device)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(found)
    reference = F.linear(expected, weight, None if layer.bias is None else layer.bias.to(dtype))
    upstream = torch.randn_like(reference)
    y.backward(upstream), reference.backward(upstream)
    assert y.dtype == found.grad.dtype == dtype
    assert_close(y, reference, tolerance)
    assert_close(found.grad, expected.grad, tolerance)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@on_each_device
def test_output_and_gradient_are_those_of_bitsandbytes_layer(device):
    import bitsandbytes

    torch.manual_seed(0)
    base = nn.Linear(128, 96)
    theirs = bitsandbytes.nn.Linear4bit(128, 96, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4")
    theirs.load_state_dict(base.state_dict())
    theirs = theirs.to(device)
    ours = Linear4bit(base).to(device)
    x = torch.randn(4, 6, 128, device=device)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, reference = ours(found), theirs(expected)
    upstream = torch.randn_like(reference)
    y.backward(upstream), reference.backward(upstream)
    assert_close(y, reference, 1e-5)
    assert_close(found.grad, expected.grad, 1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("rows", [(), (0, 4), (1,), (2, 3, 4)])
def test_any_number_of_axes(rows):
    layer = Linear4bit(nn.Linear(31, 12))
    x = torch.randn(*rows, 31, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*rows, 12) and x.grad.shape == x.shape


@needs_bitsandbytes
def test_gradients_against_finite_differences_with_a_trained_bias():
    torch.manual_seed(0)
    layer = Linear4bit(nn.Linear(9, 5)).double()
    assert not layer.bias.requires_grad
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: torch.func.functional_call(layer, {"bias": bias}, x), (x, layer.bias))


@needs_bitsandbytes
@on_each_device
def test_autocast_computes_in_its_dtype(device):
    torch.manual_seed(0)
    layer = Linear4bit(nn.Linear(64, 48, device=device))
    x = torch.randn(8, 64, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
        expected = F.linear(x, layer.dequantized(torch.float32), layer.bias)
    y.float().sum().backward()
    assert y.dtype == expected.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert_close(y, expected, 1e-2)


@needs_bitsandbytes
@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(wrapped):
    layer = Linear4bit(nn.Linear(256, 512, bias=False))
    kept = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    model = LoRALinear(layer, rank=2, dropout=0.0) if wrapped else layer
    x = torch.randn(3, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        y = model(x)
    own = {buffer.data_ptr() for buffer in layer.buffers()}
    assert own <= {tensor.data_ptr() for tensor in kept}
    others = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert sum(tensor.nbytes for tensor in others) < 0.1 * 512 * 256
    y.sum().backward()
    assert x.grad is not None


@needs_bitsandbytes
def test_no_full_weight_stays_in_the_module():
    linear = nn.Linear(256, 512)
    layer = Linear4bit(linear)
    assert {name for name, _ in layer.named_parameters()} == {"bias"}
    held = sum(tensor.nbytes for tensor in layer.buffers())
    assert held == 256 * 512 // 2 + 4 * (256 * 512 // 64)
    assert layer.weight.shape == linear.weight.shape and layer.weight.dtype == torch.float32
    with pytest.raises(TypeError):
        F.linear(torch.randn(2, 256), layer.weight)
    with pytest.raises(TypeError):
        layer.weight * 2


@needs_bitsandbytes
def test_casting_keeps_the_scales_in_fp32():
    layer = Linear4bit(nn.Linear(64, 32))
    expected = layer.dequantized(torch.float32)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16 and layer.weight.absmax.dtype == torch.float32
    assert torch.equal(layer.dequantized(torch.float32), expected)
    layer.float()
    assert layer.weight.dtype == torch.float32 and torch.equal(copy.deepcopy(layer).dequantized(torch.float32), expected)


# ---- the embedding ---------------------------------------------------------------------------------------


@needs_bitsandbytes
@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_rows_are_those_of_the_dequantised_table(dtype, device):
    torch.manual_seed(0)
    table = Embedding4bit(nn.Embedding(50, 128)).to(device, dtype)
    ids = torch.randint(0, 50, (3, 4), device=device)
    rows = table(ids)
    assert rows.dtype == dtype and torch.equal(rows, F.embedding(ids, table.weight.dequantized(dtype)))
    assert table(ids[:0]).shape == (0, 4, 128)


@needs_bitsandbytes
@pytest.mark.parametrize("index", [-1, 50])
def test_rows_that_are_not_there(index):
    with pytest.raises(IndexError):
        Embedding4bit(nn.Embedding(50, 64))(torch.tensor([index]))


@needs_bitsandbytes
def test_a_width_that_shares_blocks():
    with pytest.raises(ValueError, match="multiple of 64, not 40"):
        Embedding4bit(nn.Embedding(50, 40))
    model = tiny_captioner(width=40)
    names = quantize_base(model)
    assert type(model.text.embedding) is nn.Embedding and "text.lm_head" in names
    tied = tiny_captioner(width=40, tied=True)
    names = quantize_base(tied)
    assert tied.text.lm_head.weight is tied.text.embedding.weight and "text.lm_head" not in names
    assert "text.decoder.blocks.0.mlp.wo" in names


# ---- a whole model ---------------------------------------------------------------------------------------


@needs_bitsandbytes
def test_every_linear_and_the_token_embedding_and_nothing_else():
    model = tiny_captioner()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "bridge"]
    names = quantize_base(model)
    assert set(names) == {*linears, "text.embedding"} and len(names) == len(set(names))
    order = [name for name, _ in model.named_modules()]
    assert names == sorted(names, key=order.index)
    assert {name for name, module in model.named_modules() if isinstance(module, Linear4bit | Embedding4bit)} == set(names)
    assert type(model.bridge) is Bridge and type(model.vision.patch_embed) is nn.Conv2d
    assert type(model.text.decoder.position_bias.embedding) is nn.Embedding
    only = tiny_captioner()
    assert set(quantize_base(only, ["vision"])) == {name for name in names if name.startswith("vision.")}


@needs_bitsandbytes
@pytest.mark.parametrize("tied", [False, True])
def test_dequantising_is_the_inverse(tied):
    model = tiny_captioner(tied=tied)
    plain, kinds = model.state_dict(), [type(module) for module in model.modules()]
    names = quantize_base(model)
    pixels, labels = random_batch()
    expected = model(pixels, labels)
    bits = packed_state(model)
    shared = model.text.embedding.weight is model.text.lm_head.weight
    assert shared == tied
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(dequantize_base(model)) == set(names) and not dequantize_base(model)
    assert [type(module) for module in model.modules()] == kinds
    assert (model.text.embedding.weight is model.text.lm_head.weight) == tied
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.shape == plain[name].shape
        assert torch.equal(tensor, state[name]), name
        quantised = name.rpartition(".")[0] in names and name.endswith("weight")
        assert torch.equal(tensor, plain[name]) != quantised, name
    assert torch.equal(model(pixels, labels), expected)
    quantize_base(model)
    assert packed_state(model).keys() == bits.keys()
    assert all(torch.equal(tensor, bits[name]) for name, tensor in packed_state(model).items())


@needs_bitsandbytes
def test_the_state_dict_is_the_plain_models_and_loading_it_quantises():
    source, target, plain = tiny_captioner(), tiny_captioner(), tiny_captioner()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.5)
    quantize_base(source), quantize_base(target)
    assert list(source.state_dict()) and set(source.state_dict()) == set(plain.state_dict())
    bits = packed_state(source)
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(tensor, bits[name]) for name, tensor in packed_state(target).items())
    plain.load_state_dict(source.state_dict())
    pixels, labels = random_batch()
    assert torch.equal(plain(pixels, labels), source(pixels, labels))
    state = source.state_dict()
    weight = state.pop("text.lm_head.weight")
    with pytest.raises(RuntimeError, match=r"Missing.*text\.lm_head\.weight"):
        target.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"text\.lm_head\.weight has shape \[80, 63\], expected \[80, 64\]"):
        target.load_state_dict(state | {"text.lm_head.weight": weight[:, 1:]})


@needs_bitsandbytes
@on_each_device
def test_moving_keeps_ties_and_values(device):
    model = tiny_captioner(tied=True).eval()
    quantize_base(model)
    assert not any(module.training for module in model.modules())
    expected = model.state_dict()
    model.to(device)
    assert model.text.embedding.weight is model.text.lm_head.weight
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in model.state_dict().items())


@needs_bitsandbytes
def test_a_model_with_lora_is_refused():
    model = tiny_captioner()
    lora.apply_lora(model)
    with pytest.raises(ValueError, match=r"has LoRA already, text\.decoder\.blocks\.0\.self_attn\.q_proj the first"):
        quantize_base(model)
    assert not any(isinstance(module, NF4Weight) for module in model.modules())


@needs_bitsandbytes
def test_unknown_parts_and_a_second_time():
    model = tiny_captioner()
    with pytest.raises(ValueError, match="no part 'txt': the model has vision, bridge, text"):
        quantize_base(model, ("vision", "txt"))
    with pytest.raises(ValueError, match="no part 'txt'"):
        base_bytes(model, ("txt",))
    assert not any(isinstance(module, NF4Weight) for module in model.modules())
    quantize_base(model, ("text", "text"))
    with pytest.raises(ValueError, match="^text is in 4 bits already$"):
        quantize_base(model)
    with pytest.raises(ValueError, match="^vision.patch_embed has no nn.Linear to put into 4 bits$"):
        quantize_base(model, ["vision.patch_embed"])
    assert type(model.vision.blocks[0].mlp.fc1) is nn.Linear


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = tiny_captioner()
    for attempt in (lambda: quantize_base(model), lambda: Linear4bit(nn.Linear(4, 4))):
        with pytest.raises(ValueError, match="^a 4-bit base needs bitsandbytes: pip install bitsandbytes$"):
            attempt()
    assert not any(isinstance(module, NF4Weight) for module in model.modules()) and not dequantize_base(model)


def test_importing_lora_does_not_import_bitsandbytes():
    import subprocess

    code = "import sys, lora, lora.quant; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_bitsandbytes
@pytest.mark.parametrize("tied", [False, True])
def test_memory(tied):
    torch.manual_seed(0)
    vision = VisionTransformer(VisionConfig(image_size=32, patch_size=8, width=192, layers=2, heads=3))
    config = T5Config(
        vocab_size=4000, d_model=192, d_kv=64, d_ff=384, num_layers=0, num_decoder_layers=3, num_heads=3,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Captioner(vision, T5(config))
    parameters = {id(parameter): parameter for part in (vision, model.text) for parameter in part.parameters()}
    whole = sum(parameter.numel() for parameter in parameters.values())
    assert base_bytes(model) == (4 * whole, 2 * whole)
    assert base_bytes(model.to(torch.bfloat16)) == (2 * whole, 2 * whole)
    quantize_base(model.float())
    now, bf16 = base_bytes(model)
    lora.apply_lora(model, where=("decoder", "vision"))
    assert bf16 == 2 * whole and now < 0.35 * bf16 and base_bytes(model) == (now, bf16)
    text = base_bytes(model, ["text"])
    assert text.now + base_bytes(model, ["vision"]).now == now
    held = {tensor.data_ptr(): tensor.nbytes for part in (vision, model.text) for tensor in (*part.parameters(), *part.buffers())}
    trained = sum(parameter.nbytes for parameter in lora.adapter_parameters(model).values())
    assert now == sum(held.values()) - trained


# ---- LoRA on top -----------------------------------------------------------------------------------------


@needs_bitsandbytes
@on_each_device
@pytest.mark.parametrize("shape", [(40, 64), (300, 31)])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_over_4_bits_is_pefts_over_the_dequantised_weight(shape, bias, device):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = LoRALinear(Linear4bit(nn.Linear(shape[1], shape[0], bias=bias)), rank=8, alpha=8, dropout=0.0)
    plain = ours.base.plain(nn.Parameter(ours.base.dequantized(torch.float32)))
    config = peft.LoraConfig(r=8, lora_alpha=8, use_rslora=True, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(plain), config).base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(nn.init.normal_(ours.lora_B))
    ours, theirs = ours.to(device), theirs.to(device)
    x = torch.randn(2, 6, shape[1], device=device)
    upstream = torch.randn(2, 6, shape[0], device=device)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, reference = ours(found), theirs(expected)
    y.backward(upstream), reference.backward(upstream)
    for a, b in (
        (y, reference),
        (found.grad, expected.grad),
        (ours.lora_A.grad, theirs.lora_A["default"].weight.grad),
        (ours.lora_B.grad, theirs.lora_B["default"].weight.grad),
    ):
        assert_close(a, b, 1e-5)
    ((weight, projected, lora_B),) = ours.parts(x, [ours])
    joined = x @ weight.t() + projected @ lora_B.t() + (0 if plain.bias is None else plain.bias.to(device))
    assert_close(joined, y, 1e-5)


@needs_bitsandbytes
@on_each_device
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_lora_is_in_higher_precision_beside_a_low_precision_product(mode, device):
    torch.manual_seed(0)
    layer = LoRALinear(Linear4bit(nn.Linear(64, 48)), dropout=0.0).to(device)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(32, 64, device=device)
    exact = F.linear(x, layer.base.dequantized(torch.float32), layer.base.bias) + x @ layer.delta_weight().t()
    exact_gradients = torch.autograd.grad(
        (F.linear(x, layer.base.dequantized(torch.float32)) + layer.scaling * x @ layer.lora_A.t() @ layer.lora_B.t()).sum(),
        (layer.lora_A, layer.lora_B),
    )
    with torch.autocast(device, torch.bfloat16, enabled=mode == "autocast"):
        y = layer(x.bfloat16() if mode == "bf16" else x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32
    assert_close(y, exact, 0.02)
    assert_close(layer.lora_A.grad, exact_gradients[0], 0.03)
    assert_close(layer.lora_B.grad, exact_gradients[1], 0.03)


@needs_bitsandbytes
def test_lora_drops_its_input_as_beside_a_plain_base():
    torch.manual_seed(0)
    quantised = LoRALinear(Linear4bit(nn.Linear(64, 48)), dropout=0.4)
    nn.init.normal_(quantised.lora_B)
    plain = copy.deepcopy(quantised)
    plain.base = quantised.base.plain(nn.Parameter(quantised.base.dequantized(torch.float32), requires_grad=False))
    results = []
    for layer in (quantised, plain):
        x = torch.ones(9, 64, requires_grad=True)
        torch.manual_seed(3)
        y = layer.train()(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.lora_A.grad, layer.lora_B.grad))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 1e-5)


@needs_bitsandbytes
def test_merging_is_refused_with_the_alternative_which_works():
    model = tiny_captioner()
    quantize_base(model)
    lora.apply_lora(model, dropout=0.0)
    with torch.no_grad():
        for name, parameter in lora.adapter_parameters(model).items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    layer = model.text.decoder.blocks[0].mlp.wo
    bits = packed_state(model)
    for merge in (layer.merge, lambda: lora.merge_lora(model)):
        with pytest.raises(ValueError, match=r"4-bit base.*16 levels.*beside the base, or dequantize_base\(model\)"):
            merge()
    assert not layer.merged and all(torch.equal(tensor, bits[name]) for name, tensor in packed_state(model).items())
    pixels, labels = random_batch()
    expected = model.eval()(pixels, labels)
    assert layer in model.modules() and "text.decoder.blocks.0.mlp.wo.base" in dequantize_base(model)
    assert isinstance(layer.base, nn.Linear) and not layer.base.weight.requires_grad
    assert_close(model(pixels, labels), expected, 1e-5)
    lora.merge_lora(model, remove=True)
    assert_close(model(pixels, labels), expected, 1e-4)


@needs_bitsandbytes
@on_each_device
@pytest.mark.parametrize("autocast", [False, True])
def test_training_lowers_the_loss_and_never_touches_the_base(autocast, device):
    model = tiny_captioner(device=device)
    quantize_base(model)
    lora.apply_lora(model, where=("decoder", "vision"), dropout=0.1, generator=torch.Generator(device).manual_seed(0))
    trainable = lora.set_trainable(model)
    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if name not in trainable}
    bits = packed_state(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.01)
    pixels, labels = random_batch(device)
    torch.manual_seed(1)
    losses = []
    for _ in range(40):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss, count = model.train().loss(model.encode(pixels), labels)
        (loss / count).backward()
        assert all(parameter.grad is not None for parameter in trainable.values())
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item() / count)
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(tensor, bits[name]) for name, tensor in packed_state(model).items())
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())


# ---- decoding --------------------------------------------------------------------------------------------


@needs_bitsandbytes
@on_each_device
@pytest.mark.parametrize("tied", [False, True])
def test_captions_are_those_of_the_dequantised_model(tied, device):
    model = tiny_captioner(tied=tied, device=device).eval()
    quantize_base(model)
    plain = copy.deepcopy(model)
    dequantize_base(plain)
    pixels, _ = random_batch(device)
    with torch.no_grad():
        memory = model.encode(pixels)
    assert torch.equal(
        generate.greedy(model, memory, max_new_tokens=8), generate.greedy(plain, memory, max_new_tokens=8)
    )
    found = generate.beam_search(model, memory, num_beams=3, max_length=8)
    assert torch.equal(found, generate.beam_search(plain, memory, num_beams=3, max_length=8))
    found = generate.sample(model, memory, n=2, max_new_tokens=6)
    assert torch.equal(found, generate.sample(plain, memory, n=2, max_new_tokens=6))


@needs_bitsandbytes
def test_decoding_under_autocast_follows_the_dtype_of_the_embedding():
    model = tiny_captioner().eval()
    quantize_base(model)
    memory = torch.randn(2, 5, 64)
    exact = generate.greedy(model, memory, max_new_tokens=6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generate.greedy(model, memory, max_new_tokens=6), exact)
        model.text.embedding.to(torch.bfloat16)
        assert generate.greedy(model, memory, max_new_tokens=6).shape == exact.shape
