"""`captioner.load` and run directories: the Python contract, hashes, damage."""

import json
import os

import pytest
import torch

import captioner
import lora
import train
from captioner import checkpoint
from captioner.errors import UserError
from captioner.tokenizer import train_tokenizer


@pytest.fixture
def t5_directory(tmp_path):
    """A tiny Flan-T5-shaped directory as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path / "t5"
    tokenizer = train_tokenizer(["a plain red picture", "everything here is blue", "some words more"], folder / "spiece.model", 60)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_the_python_contract(t5_directory):
    torch.manual_seed(0)
    model, tokenizer, transform = captioner.load(vision="ViT-Tiny-Scenes", text=str(t5_directory))
    pixels = torch.randn(2, 3, 64, 64)
    labels = torch.tensor([[5, 6, 1], [7, 1, -100]])
    tokens = model.vision(pixels)
    assert tokens.shape == (2, 65, 128) and transform.image_size == 64
    memory = model.encode(pixels)
    assert torch.equal(memory, model.bridge(tokens))
    logits = model(pixels, labels)
    assert logits.shape == (2, 3, len(tokenizer))
    assert torch.equal(logits, model.decoder_logits(memory, labels))
    assert captioner.generate.greedy(model, memory, max_new_tokens=5).shape[0] == 2
    assert captioner.generate.beam_search(model, memory, num_beams=4, max_length=6).shape[0] == 2
    sampled = captioner.generate.sample(model, memory, n=3, top_p=0.9, temperature=0.5, top_k=50, repetition_penalty=1.2, max_new_tokens=5, seed=0)
    assert sampled.shape[:2] == (2, 3)
    names = lora.apply_lora(model, targets=("attn", "ffn"), where=("decoder",), rank=8, alpha=8, dropout=0.1)
    assert len(names) == 2 * (4 + 4 + 3) and "text.decoder.blocks.0.cross_attn.q_proj" in names
    assert torch.allclose(model(pixels, labels), logits, atol=1e-6), "identity at step 0"


def test_adapters_made_by_peft_load_onto_bare_backbones(t5_directory, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def donor():
        return transformers.T5ForConditionalGeneration.from_pretrained(t5_directory).eval()

    peer = peft.get_peft_model(donor(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)).eval()
    peer.save_pretrained(tmp_path / "lora")
    prompt = peft.get_peft_model(donor(), peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1))
    prompt.save_pretrained(tmp_path / "prompt")
    memory, labels = torch.randn(2, 7, 32), torch.randint(2, 40, (2, 5))
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=memory)
    with torch.no_grad():
        expected = peer(encoder_outputs=output, labels=labels).logits
        model, _, _ = captioner.load(vision="ViT-Tiny-Scenes", text=str(t5_directory), adapters=[tmp_path / "lora", tmp_path / "prompt"])
        torch.testing.assert_close(model.decoder_logits(memory, labels), expected, rtol=0, atol=1e-5)
        merged, _, _ = captioner.load(vision="ViT-Tiny-Scenes", text=str(t5_directory), adapters=[tmp_path / "lora"], merge=True)
        torch.testing.assert_close(merged.decoder_logits(memory, labels), expected, rtol=0, atol=1e-5)
    assert model.encode(torch.randn(1, 3, 64, 64)).shape[1] == model.vision.num_tokens + 3, "the encoder reads peft's prompt"
    with pytest.raises(UserError, match="nowhere.*no such file"):
        captioner.load(vision="ViT-Tiny-Scenes", text=str(t5_directory), adapters=[tmp_path / "nowhere"])
    with pytest.raises(UserError, match="a run brings its own adapters"):
        captioner.load("runs/none", adapters=[tmp_path / "lora"])


def test_load_takes_a_run_or_two_backbones():
    with pytest.raises(UserError, match="run directory, or both"):
        captioner.load(vision="ViT-Tiny-Scenes")
    with pytest.raises(UserError, match="no such run directory"):
        captioner.load("runs/none")


@pytest.fixture
def frozen_run(tiny_data, t5_directory, tmp_path):
    """A run whose decoder is frozen and lives elsewhere."""
    flags = ["--data", str(tiny_data), "--vision", "ViT-Tiny-Scenes", "--image-size", "16", "--text", str(t5_directory), "--train-base", "none",
             "--batch-size", "4", "--max-steps", "3", "--precision", "fp32", "--device", "cpu", "--output", str(tmp_path / "run"), "--lr", "0.01"]  # fmt: skip
    assert train.main(flags) == 0
    return tmp_path / "run"


def test_a_frozen_decoder_is_named_not_copied(frozen_run, t5_directory):
    assert not (frozen_run / "text").exists() and (frozen_run / "vision" / "model.safetensors").exists()
    facts = json.loads((frozen_run / "config.json").read_text())["model"]
    assert facts["text"]["name"] == str(t5_directory) and len(facts["text"]["hash"]) == 64 and not facts["text"]["embedded"]
    model, tokenizer, _ = captioner.load(frozen_run)
    merged, _, _ = captioner.load(frozen_run, merge=True)
    memory, labels = torch.randn(2, 5, 32), torch.tensor([[5, 6, 1], [7, 1, -100]])
    assert torch.allclose(model.decoder_logits(memory, labels), merged.decoder_logits(memory, labels), atol=1e-5)
    assert not lora.adapter_parameters(merged)


def test_a_frozen_decoder_in_bf16(frozen_run, tiny_data, t5_directory, tmp_path):
    flags = ["--data", str(tiny_data), "--vision", "ViT-Tiny-Scenes", "--image-size", "16", "--text", str(t5_directory), "--train-base", "none",
             "--batch-size", "4", "--max-steps", "3", "--precision", "bf16", "--device", "cpu", "--output", str(tmp_path / "bf16"), "--lr", "0.01"]  # fmt: skip
    assert train.main(flags) == 0
    rounded, _, _ = captioner.load(tmp_path / "bf16")
    exact, _, _ = captioner.load(frozen_run)
    assert torch.equal(rounded.text.lm_head.weight, exact.text.lm_head.weight), "read again from where it lives"
    assert torch.allclose(rounded.bridge.weight, exact.bridge.weight, atol=0.05)


def test_the_adapter_opens_in_peft(frozen_run, t5_directory):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import BaseModelOutput

    base = transformers.T5ForConditionalGeneration.from_pretrained(t5_directory).eval()
    theirs = peft.PeftModel.from_pretrained(base, frozen_run / "adapter").eval()
    ours, _, _ = captioner.load(frozen_run)
    memory, labels = torch.randn(2, 5, 32), torch.tensor([[5, 6, 1], [7, 8, 1]])
    logits = theirs(encoder_outputs=BaseModelOutput(memory), labels=labels).logits
    assert torch.allclose(ours.decoder_logits(memory, labels), logits, atol=1e-5)


def test_changed_base_weights_are_refused(frozen_run, t5_directory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.T5Config.from_pretrained(t5_directory)
    transformers.T5ForConditionalGeneration(config).save_pretrained(t5_directory)
    with pytest.raises(UserError, match="not those the run was trained with"):
        captioner.load(frozen_run)
    (t5_directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        captioner.load(frozen_run)


def test_a_damaged_adapter_is_an_error_that_names_it(frozen_run):
    path = frozen_run / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(UserError, match="adapter"):
        captioner.load(frozen_run)
    config = json.loads((frozen_run / "adapter" / "adapter_config.json").read_text())
    path.write_bytes(content)
    (frozen_run / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(UserError, match="shape"):
        captioner.load(frozen_run)


def test_the_newest_run_is_the_one_trained_last(tmp_path):
    for age, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        for file in ("config.json", "bridge.safetensors"):
            (tmp_path / name / file).write_text("{}")
            os.utime(tmp_path / name / file, (1000 + age, 1000 + age))
    (tmp_path / "unfinished").mkdir()
    assert checkpoint.newest_run(tmp_path).name == "new"
