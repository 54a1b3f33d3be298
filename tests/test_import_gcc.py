"""Importing checkpoints of GCC-caption-lora: a random model in that layout, written with transformers, against the run that comes out."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import captioner
import lora
from captioner import cli, demo
from captioner.tokenizer import Tokenizer
from tests import tiny_clip, tiny_t5
from tests.conftest import REPOSITORY

transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(REPOSITORY / "scripts"))
import import_gcc_checkpoint  # noqa: E402

ATTENTION = ("SelfAttention", "EncDecAttention")
TARGETS = {"attn": ATTENTION, "attn,ffn": (*ATTENTION, "DenseReluDense")}
CLIP = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)


class LoraLayer(nn.Module):
    """The formula of that project's LoRA layer, with its names."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base_layer.out_features, bias=False)
        self.scaling = alpha / math.sqrt(rank)

    @property
    def weight(self):
        """transformers' T5 asks `wo` for the dtype of its weight."""
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_b(self.lora_a(x)) * self.scaling


def plain_t5(variant: str) -> nn.Module:
    """A random T5 whose captions are not empty: with a tied head, a start token with an embedding would be the likeliest word forever."""
    model = tiny_t5.hf_model(variant)
    with torch.no_grad():
        model.shared.weight[0] = 0
    return model


class Donor(nn.Module):
    """An image tower, a bridge and a T5, under that project's names."""

    def __init__(self, variant: str = "v1.1", targets: str = "attn", rank: int = 8, alpha: float = 8.0):
        super().__init__()
        torch.manual_seed(0)
        self.vision_model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
        self.text_model = plain_t5(variant)
        self.bridge_proj = nn.Linear(CLIP["hidden_size"], tiny_t5.SIZES["d_model"])
        for name, module in list(self.text_model.decoder.named_modules()):
            if isinstance(module, nn.Linear) and any(target in name for target in TARGETS[targets]):
                parent, _, child = name.rpartition(".")
                setattr(self.text_model.decoder.get_submodule(parent), child, LoraLayer(module, rank, alpha))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "lora_" in name or name.startswith("vision_model."):
                    parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
        self.eval()

    def encoded(self, pixel_values):
        memory = self.bridge_proj(self.vision_model(pixel_values=pixel_values).last_hidden_state)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=memory)

    @torch.no_grad()
    def forward(self, pixel_values, labels):
        return self.text_model(encoder_outputs=self.encoded(pixel_values), labels=labels).logits

    @torch.no_grad()
    def greedy(self, pixel_values, max_new_tokens: int):
        # transformers' cache has as many layers as the encoder, one too few here.
        options = dict(do_sample=False, num_beams=1, use_cache=False, max_new_tokens=max_new_tokens)
        return self.text_model.generate(encoder_outputs=self.encoded(pixel_values), **options)


def state_of(donor: Donor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in donor.state_dict().items()}


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """A spiece.model; the architectures of the tiny image towers are there too."""
    monkeypatch.setitem(demo.CLIPS, "Tiny-quickgelu", tiny_clip.CONFIG | {"quick_gelu": True})
    big = tiny_clip.CONFIG["vision_cfg"] | {"image_size": 64}
    monkeypatch.setitem(demo.CLIPS, "Tiny-64-quickgelu", tiny_clip.CONFIG | {"quick_gelu": True, "vision_cfg": big})
    (tmp_path / "spiece.model").write_bytes(tiny_t5.vocabulary())
    return tmp_path / "spiece.model"


@pytest.fixture
def call(tmp_path, vocabulary):
    """Exit code of the import of a state dict, or of a path; further flags come last."""

    def run(state, *flags) -> int:
        if isinstance(state, dict):
            save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
            state = tmp_path / "model.safetensors"
        words = [state, "--tokenizer", vocabulary, "--vision", "Tiny-quickgelu", "--output", tmp_path / "run", *flags]
        with pytest.raises(SystemExit) as exit_info:
            cli.run_command(import_gcc_checkpoint.main, [str(word) for word in words], expected=(ValueError,))
        return exit_info.value.code

    return run


def check_equal(donor: Donor, run, merge: bool = False):
    """The run's logits and greedy captions are the donor's; returns its model."""
    model, tokenizer, transform = captioner.load(run, merge=merge)
    generator = torch.Generator().manual_seed(1)
    pixels, labels = torch.randn(3, 3, 32, 32, generator=generator), torch.randint(2, 150, (3, 5), generator=generator)
    labels[1, 3:] = -100
    with torch.no_grad():
        logits = model(pixels, labels)
        ids = captioner.generate.greedy(model, model.encode(pixels), max_new_tokens=8)
    expected = donor(pixels, labels)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    expected = donor.greedy(pixels, 8)
    assert torch.equal(ids, expected) and expected[:, 1:].any()
    assert tokenizer.decode(ids) == tokenizer.decode(expected)
    assert transform.image_size == 32
    return model


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("variant", tiny_t5.VARIANTS)
def test_logits_and_captions_of_the_run(call, tmp_path, variant, targets, capsys):
    donor = Donor(variant, targets)
    assert call(state_of(donor), "--json", "-") == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    model = check_equal(donor, tmp_path / "run")
    check_equal(donor, tmp_path / "run", merge=True)
    adapted = {name for name, module in model.named_modules() if isinstance(module, lora.LoRALinear)}
    assert adapted == set(summary["lora"]) and len(adapted) == sum(isinstance(module, LoraLayer) for module in donor.modules())
    assert "rank 8" in captured.err and summary["ranks"] == [8] and summary["text"]["num_decoder_layers"] == 3
    for name in tiny_t5.SIZES.keys() - {"dropout_rate"}:
        assert summary["text"][name] == tiny_t5.SIZES[name], name


def test_another_rank_and_alpha(call, tmp_path):
    donor = Donor(rank=3, alpha=5.0)
    assert call(state_of(donor), "--alpha", "5") == 0
    check_equal(donor, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 5, True)


def test_the_adapter_opens_in_peft(call, tmp_path):
    peft = pytest.importorskip("peft")
    donor = Donor(targets="attn,ffn")
    assert call(state_of(donor)) == 0
    theirs = peft.PeftModel.from_pretrained(plain_t5("v1.1"), tmp_path / "run" / "adapter").eval()
    pixels, labels = torch.randn(2, 3, 32, 32), torch.tensor([[5, 6, 1], [7, 8, 1]])
    with torch.no_grad():
        logits = theirs(encoder_outputs=donor.encoded(pixels), labels=labels).logits
    torch.testing.assert_close(logits, donor(pixels, labels), rtol=1e-4, atol=1e-4)


def under(prefix: str, state: dict) -> dict:
    """The state with the image tower one level deeper, as from a CLIPVisionModel of transformers 4."""
    return {name.replace("vision_model.", prefix, 1): tensor for name, tensor in state.items()}


def test_what_a_checkpoint_may_look_like(call, tmp_path):
    donor = Donor("v1.0")
    state = state_of(donor)
    aliases = ["text_model.shared.weight", "text_model.encoder.embed_tokens.weight", "text_model.lm_head.weight"]
    assert set(aliases) <= state.keys()
    extra = {"vision_model.vision_model.embeddings.position_ids": torch.arange(5)[None]}
    variants = {
        "deeper": under("vision_model.vision_model.", state) | extra,
        "one-name": {name: tensor for name, tensor in state.items() if name not in aliases},
        "no-encoder": {name: tensor for name, tensor in state.items() if ".encoder.block." not in name and "encoder.final" not in name},
    }
    for name, variant in variants.items():
        assert call(variant, "--output", tmp_path / name) == 0
        check_equal(donor, tmp_path / name)


def test_a_directory_with_shards(call, tmp_path):
    donor = Donor()
    state = state_of(donor)
    folder = tmp_path / "checkpoint-5088"
    folder.mkdir()
    shards = {f"model-{number}.safetensors": dict(list(state.items())[number::2]) for number in (0, 1)}
    for file, part in shards.items():
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    assert call(folder) == 0
    check_equal(donor, tmp_path / "run")


def test_lora_in_the_image_tower_and_in_t5s_encoder(call, tmp_path):
    donor = Donor()
    torch.manual_seed(3)
    attention = donor.vision_model.encoder.layers[1].self_attn
    attention.q_proj = LoraLayer(attention.q_proj, 8, 8.0)
    block = donor.text_model.encoder.block[0].layer[0].SelfAttention
    block.q = LoraLayer(block.q, 8, 8.0)
    assert call(state_of(donor)) == 0
    model = check_equal(donor, tmp_path / "run")
    assert isinstance(model.get_submodule("vision.blocks.1.attn.q_proj"), lora.LoRALinear)
    assert isinstance(model.get_submodule("text.encoder.blocks.0.self_attn.q_proj"), lora.LoRALinear)


def test_bf16_is_read(call, tmp_path):
    donor = Donor().bfloat16()
    assert call(state_of(donor)) == 0
    check_equal(donor.float(), tmp_path / "run")


def test_the_image_size_is_that_of_the_position_table(call, tmp_path):
    donor = Donor()
    assert call(state_of(donor), "--vision", "Tiny-64-quickgelu") == 0
    check_equal(donor, tmp_path / "run")


def test_evaluate_and_best_of_n_use_the_run(call, tmp_path, tiny_data, monkeypatch, capsys):
    import best_of_n
    import evaluate

    monkeypatch.setitem(demo.CLIPS, "Tiny", tiny_clip.CONFIG)
    assert call(state_of(Donor()), "--data", tiny_data) == 0
    run, clip = tmp_path / "run", tiny_clip.save(tmp_path / "clip.safetensors", 1)
    assert evaluate.main([str(run), "--decode", "greedy", "--no-report", "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 4
    flags = ["--n", "2", "--num-beams", "2", "--reranker", clip, "--scorer", clip, "--no-report", "--json", str(tmp_path / "best.json")]
    assert best_of_n.main([str(run), *flags]) == 0
    assert len(json.loads((tmp_path / "best.json").read_text())["best_at_k"]) == 2


@pytest.mark.parametrize("kind", ["directory", "repository"])
def test_the_vocabulary_of_a_directory_or_a_repository(call, tmp_path, vocabulary, kind, monkeypatch):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(vocabulary.read_bytes())
    files = {("google/flan-t5-base", "spiece.model"): folder / "spiece.model"}
    monkeypatch.setattr(import_gcc_checkpoint.weights, "fetch", lambda repo, file: files[repo, file])
    assert call(state_of(Donor()), "--tokenizer", folder if kind == "directory" else "google/flan-t5-base") == 0
    assert len(Tokenizer(tmp_path / "run" / "text" / "spiece.model")) == len(Tokenizer(vocabulary))


# ---- what is refused -------------------------------------------------------------------------------------

ADAPTED = "text_model.decoder.block.0.layer.0.SelfAttention.q"
MLP = "text_model.decoder.block.0.layer.2.DenseReluDense"
EMBEDDINGS = [f"text_model.{name}.weight" for name in ("shared", "lm_head", "encoder.embed_tokens", "decoder.embed_tokens")]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda s: s.pop(f"{ADAPTED}.lora_b.weight"), f"missing: {ADAPTED}.lora_b.weight; unexpected: none"),
        (lambda s: s.pop(f"{ADAPTED}.base_layer.weight"), f"missing: {ADAPTED}.base_layer.weight; unexpected: none"),
        (lambda s: (s.pop(f"{ADAPTED}.lora_a.weight"), s.pop(f"{ADAPTED}.lora_b.weight")), f"missing: {ADAPTED}.lora_a.weight, {ADAPTED}.lora_b.weight;"),
        (lambda s: s.update({f"{ADAPTED}.weight": torch.zeros(15, 24)}), f"missing: none; unexpected: {ADAPTED}.weight"),
        (lambda s: s.update({"qformer.x": torch.zeros(1)}), "missing: none; unexpected: qformer.x"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("bridge_proj.")], "missing: bridge_proj.*; unexpected: none"),
        (lambda s: [s.pop(name) for name in list(s) if "lora_" in name or "base_layer" in name], "missing: text_model.*.lora_a.weight; unexpected: none"),
        (lambda s: s.pop("bridge_proj.bias"), "bridge_proj of {source} does not fit Bridge: missing: bias; unexpected: none"),
        (lambda s: s.update({"bridge_proj.weight": torch.zeros(24, 31)}), "does not fit Bridge: weight has shape [24, 31], expected [24, 32]"),
        (lambda s: s.pop("vision_model.pre_layrnorm.bias"), "vision_model of {source} does not fit VisionTransformer: missing: norm_pre.bias; unexp"),
        (lambda s: s.update({"vision_model.head.weight": torch.zeros(1)}), "unknown keys: head.weight"),
        (lambda s: s.pop("text_model.decoder.final_layer_norm.weight"), "text_model of {source} does not fit T5: missing: decoder.norm.weight; unexp"),
        (lambda s: s.update({"text_model.extra.weight": torch.zeros(1)}), "text_model of {source} does not fit T5: unknown keys: extra.weight"),
        (lambda s: s.pop(f"{MLP}.wi_0.weight"), f"missing: {MLP}.wi.weight"),
        (lambda s: s.update({"text_model.shared.weight": torch.zeros(5)}), "unexpected: text_model.shared.weight of shape [5]"),
        (lambda s: s.update({f"{ADAPTED}.lora_a.weight": torch.zeros(8, 23)}), f"{ADAPTED} has lora_a [8, 23] and lora_b [15, 8] beside [15, 24]"),
        (lambda s: s.update({f"{ADAPTED}.lora_b.weight": torch.zeros(15, 4)}), f"{ADAPTED} has lora_a [8, 24] and lora_b [15, 4] beside [15, 24]"),
        (lambda s: s.update({"text_model.lm_head.base_layer.weight": s.pop("text_model.lm_head.weight"), "text_model.lm_head.lora_a.weight": torch.zeros(8, 24),
                             "text_model.lm_head.lora_b.weight": torch.zeros(192, 8)}), "missing: none; unexpected: text_model.lm_head"),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit(call, tmp_path, capsys, edit, named):
    state = state_of(Donor())
    edit(state)
    assert call(state) == 1
    message = capsys.readouterr().err
    source = str((tmp_path / "model.safetensors").resolve())
    assert message.startswith("error: ") and message.count("\n") == 1 and named.format(source=source) in message and source in message
    assert not (tmp_path / "run").exists()


def test_pickles_and_absent_files(call, tmp_path, capsys):
    torch.save(state_of(Donor()), tmp_path / "pytorch_model.bin")
    for path in (tmp_path / "pytorch_model.bin", tmp_path):
        assert call(path) == 1
        assert "is a pickle" in capsys.readouterr().err
    assert call(tmp_path / "nothing") == 1
    assert "no such file or directory" in capsys.readouterr().err


def test_other_vocabularies(call, tmp_path, vocabulary, capsys):
    state = state_of(Donor())
    assert call(state, "--tokenizer", tmp_path / "no.model") == 1
    assert "is neither a file nor a directory, and cannot get spiece.model" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert call(state, "--tokenizer", tmp_path / "empty") == 1
    assert "no such sentencepiece file" in capsys.readouterr().err
    assert call(state | {name: state[name][:100] for name in EMBEDDINGS}) == 1
    assert "ids, more than the 100 rows of the embedding" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--alpha", "0"], 2, "--alpha must be above 0"),
        (["--vision", "Tiny-quickgelu:openai"], 2, "its weights come from the checkpoint"),
        (["--vision", "timm/resnet18"], 2, "name a ViT architecture of open_clip alone"),
        (["--vision", "ViT-B-99"], 1, "unknown architecture 'ViT-B-99'; closest: ViT-B-"),
        (["--vision", "ViT-B-32-quickgelu"], 1, "does not fit VisionTransformer"),
        (["--rank", "8"], 2, "unknown argument '--rank'"),
    ],
)
def test_flags_that_are_refused(call, capsys, flags, code, named):
    assert call(state_of(Donor()), *flags) == code
    assert named in capsys.readouterr().err


def test_both_paths_are_needed_and_no_run_is_overwritten(call, tmp_path, vocabulary, capsys):
    for words, named in (([], "name the checkpoint"), (["somewhere"], "--tokenizer is needed")):
        with pytest.raises(SystemExit) as exit_info:
            cli.run_command(import_gcc_checkpoint.main, words)
        assert exit_info.value.code == 2 and named in capsys.readouterr().err
    state = state_of(Donor())
    assert call(state) == 0
    assert call(state) == 1
    assert "already holds a run" in capsys.readouterr().err
