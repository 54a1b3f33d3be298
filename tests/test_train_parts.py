"""The training command with LoRA, adapters, soft prompts and a 4-bit base together: what is trained, kept, switched, resumed and refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import captioner
import evaluate
import lora
import train
from captioner import checkpoint, cli, generate
from captioner.errors import UserError
from captioner.runtime import recompute_blocks
from tests.conftest import write_tiny_data

OF_THE_BASE = ("--vision", "--image-size", "--text-config", "--vocab-size", "--train-base", "--output")
EVERYTHING = [
    "--lora-where", "decoder,vision", "--lora-rank", "decoder=4,vision=2", "--adapters", "attn,ffn", "--adapter-where", "decoder,vision",
    "--adapter-reduction", "4", "--soft-prompt", "a red picture", "--gradient-checkpointing",
]  # fmt: skip


def run(flags) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as exit_info:
        cli.run_command(train.main, [str(flag) for flag in flags])
    return exit_info.value.code


@pytest.fixture
def base_run(tiny_flags, tmp_path) -> Path:
    """A run whose backbones are trained, without LoRA."""
    assert run([*tiny_flags, "--lora-targets", "none", "--max-steps", "6", "--lr", "5e-3", "--output", tmp_path / "base"]) == 0
    return tmp_path / "base"


@pytest.fixture
def adapt(tiny_flags, base_run, tmp_path):
    """adapt(name, *flags) trains on base_run, or on --base among the flags, and gives the new run."""
    common = [word for flag, value in zip(tiny_flags[::2], tiny_flags[1::2], strict=True) if flag not in OF_THE_BASE for word in (flag, value)]

    def train_run(name: str, *flags, code: int = 0) -> Path:
        source = [] if "--base" in flags else ["--base", base_run]
        assert run([*common, *source, "--lr", "5e-3", *flags, "--output", tmp_path / name]) == code
        return tmp_path / name

    return train_run


def state(path: Path, **options) -> dict[str, torch.Tensor]:
    return captioner.load(path, checkpoint="last", **options)[0].state_dict()


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def logits(model, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = torch.randn(2, 3, 16, 16, generator=generator), torch.randint(2, 60, (2, 5), generator=generator)
    with torch.no_grad():
        return model(pixels, labels)


def test_all_kinds_are_trained_together_saved_and_loaded(adapt, base_run, capsys):
    path = adapt("all", *EVERYTHING, "--max-steps", "3")
    table = capsys.readouterr().err
    assert all(row in table for row in ("LoRA", "adapter caption", "soft prompt"))
    facts = checkpoint.read_config(path)["model"]
    assert facts["lora"] == ["decoder", "vision"] and facts["adapters"] == facts["stack"] == ["caption"] and facts["prompt"] == ["decoder"] and facts["frozen"] == []
    for name in ("adapter/adapter_config.json", "adapter/vision/adapter_model.safetensors", "adapters/caption/adapter_config.json", "prompt/adapter_config.json"):
        assert (path / name).is_file() and (checkpoint.directory_of(path, "last") / name).is_file(), name
    assert json.loads((path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert json.loads((path / "adapter" / "vision" / "adapter_config.json").read_text())["r"] == 2
    model, tokenizer, _ = captioner.load(path)
    assert model.text.decoder.prefix.embeddings.shape[0] == len(tokenizer.encode(["a red picture"])[0]) - 1
    base = checkpoint.base_state(captioner.load(base_run)[0])
    assert changed(base, checkpoint.base_state(model)) == {"bridge.weight", "bridge.bias"}
    up = [tensor for name, tensor in model.state_dict().items() if name.endswith(("lora_B", "up.weight"))]
    assert len(up) > 10 and all(tensor.abs().max() > 0 for tensor in up)
    merged, _, _ = captioner.load(path, merge=True)
    assert torch.allclose(logits(model), logits(merged), atol=1e-4)


def test_all_kinds_resume_bit_for_bit(adapt, monkeypatch):
    flags = [*EVERYTHING, "--lora-dropout", "0.1", "--max-steps", "4", "--eval-every", "2"]
    whole = adapt("whole", *flags)
    step = train.Trainer.train_step

    def stop_after_three(self, batches, lr):
        if self.state.step == 3:
            raise KeyboardInterrupt
        return step(self, batches, lr)

    monkeypatch.setattr(train.Trainer, "train_step", stop_after_three)
    parts = adapt("parts", *flags, code=130)
    monkeypatch.undo()
    assert run(["--resume", parts]) == 0
    a, b = state(whole), state(parts)
    assert a.keys() == b.keys() and not changed(a, b)


def test_recomputed_blocks_give_the_same_training_and_lora_gets_its_gradients(adapt):
    flags = ["--lora-where", "decoder,vision", "--lora-dropout", "0.1", "--dropout", "0.2", "--adapters", "ffn", "--adapter-where", "decoder,vision", "--max-steps", "3"]
    kept = adapt("kept", *flags)
    recomputed = adapt("recomputed", *flags, "--gradient-checkpointing")
    a, b = state(kept), state(recomputed)
    assert not changed(a, b)
    b_matrices = [tensor for name, tensor in b.items() if name.endswith("lora_B")]
    assert len(b_matrices) > 10 and all(tensor.abs().max() > 0 for tensor in b_matrices)


def test_recomputing_keeps_fewer_activations(base_run):
    def kept_bytes(model) -> int:
        kept: dict[int, int] = {}

        def note(tensor):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.loss(model.encode(torch.randn(2, 3, 16, 16)), torch.randint(2, 60, (2, 12)))[0].backward()
        assert all(parameter.grad is not None for parameter in lora.adapter_parameters(model).values())
        return sum(kept.values())

    plain, _, _ = captioner.load(base_run)
    lora.apply_lora(plain, where=("decoder", "vision"), dropout=0.0)
    lora.set_trainable(plain)
    before = kept_bytes(plain)
    assert recompute_blocks(plain) == len(plain.vision.blocks) + len(plain.text.decoder.blocks)
    plain.zero_grad()
    assert kept_bytes(plain) < before


def test_a_question_adapter_below_a_frozen_caption_adapter(adapt):
    caption = adapt("caption", "--lora-targets", "none", "--adapters", "attn,ffn", "--soft-prompt", "4")
    question = adapt(
        "question", "--base", caption, "--lora-targets", "none", "--adapters", "ffn", "--adapter-name", "question", "--stack", "question,caption", "--freeze", "bridge"
    )
    facts = checkpoint.read_config(question)["model"]
    assert facts["adapters"] == ["caption", "question"] and facts["stack"] == ["question", "caption"] and facts["frozen"] == ["bridge", "caption", "prompt"]
    before, after = state(caption), state(question)
    assert not changed(before, after), "the new adapter is all that was trained"
    assert any(".adapters.question." in name for name in after)
    alone, both = captioner.load(question, stack=["caption"])[0], captioner.load(question)[0]
    assert torch.equal(logits(alone), logits(captioner.load(caption)[0])) and not torch.equal(logits(alone), logits(both))
    trained_on = adapt("on", "--base", question, "--lora-targets", "none", "--unfreeze", "caption,prompt")
    moved = changed(after, state(trained_on))
    assert any(".adapters.caption." in name for name in moved) and "text.decoder.prefix.embeddings" in moved and not any(".adapters.question." in name for name in moved)


def test_a_frozen_prompt_stays_the_words_it_was(adapt, base_run):
    path = adapt("frozen", "--soft-prompt", "a plain", "--freeze", "prompt")
    model, tokenizer, _ = captioner.load(path)
    ids = torch.tensor(tokenizer.encode(["a plain"])[0][:-1])
    assert torch.equal(model.text.decoder.prefix.embeddings, captioner.load(base_run)[0].text.embedding(ids))


def test_words_that_the_vocabulary_lacks_are_told(adapt, capsys):
    adapt("unknown", "--soft-prompt", "a 図", "--max-steps", "1")
    assert "soft prompt: 1 of the " in capsys.readouterr().err


def test_an_instruction_to_the_encoder(tiny_flags, tmp_path):
    """T5's encoder reads the prompt, the decoder reads that beside the image, and LoRA in the encoder is trained."""
    config = json.loads((tmp_path / "tiny.json").read_text()) | {"num_layers": 2}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    flags = [*tiny_flags, "--lora-where", "decoder,encoder", "--adapters", "ffn", "--adapter-where", "encoder"]
    assert run([*flags, "--soft-prompt", "describe the red picture", "--prompt-where", "encoder,decoder"]) == 0
    model, tokenizer, transform = captioner.load(tmp_path / "run")
    words = len(tokenizer.encode(["describe the red picture"])[0]) - 1
    memory = model.encode(torch.randn(2, 3, 16, 16))
    assert memory.shape[1] == model.vision.num_tokens + words
    trained = [tensor for name, tensor in model.state_dict().items() if "text.encoder." in name and name.endswith(("lora_B", "up.weight"))]
    assert trained and all(tensor.abs().max() > 0 for tensor in trained)
    assert generate.beam_search(model, memory, num_beams=3, max_length=8).shape[0] == 2


def test_a_4_bit_base(adapt, base_run, capsys):
    pytest.importorskip("bitsandbytes")
    path = adapt("quantised", "--base-bits", "4", "--max-steps", "3")
    assert "base in 4 bits" in capsys.readouterr().err
    model, _, _ = captioner.load(path)
    assert any(isinstance(module, lora.Linear4bit) for module in model.modules())
    with pytest.raises(UserError, match="4-bit.*dequantize_base"):
        captioner.load(path, merge=True)
    merged, _, _ = captioner.load(path, dequantize=True, merge=True)
    assert torch.allclose(logits(model), logits(merged), atol=1e-4) and not any(isinstance(module, lora.Linear4bit) for module in merged.modules())
    on_top = adapt("on-top", "--base", path, "--max-steps", "1")
    assert checkpoint.read_config(on_top)["model"]["base_bits"] is None
    resumed = checkpoint.read_config(path)["model"]
    assert resumed["base_bits"] == 4 and resumed["text"]["hash"] is not None


@pytest.mark.parametrize(
    "flags, code, named",
    [
        (["--lora-rank", "decoder=4"], 0, ""),
        (["--lora-rank", "vision=4"], 2, "missing: decoder; unexpected: vision"),
        (["--lora-rank", "decoder=x"], 2, "--lora-rank"),
        (["--lora-targets", "attn,nothing"], 2, "unknown LoRA target 'nothing'"),
        (["--adapter-style", "parallel"], 2, "--adapter-style says nothing without --adapters"),
        (["--prompt-where", "encoder"], 2, "--prompt-where says nothing without --soft-prompt"),
        (["--adapters", "all"], 2, "'all' is not one of attn, ffn"),
        (["--adapters", "ffn", "--adapter-name", "../x"], 2, "../x"),
        (["--adapters", "ffn", "--stack", "none"], 2, "adapter caption would be trained, and is not in --stack"),
        (["--adapters", "ffn", "--stack", "other"], 2, "other"),
        (["--freeze", "prompt"], 2, "'prompt'"),
        (["--freeze", "bridge", "--lora-targets", "none"], 2, "nothing is left to train"),
        (["--unfreeze", "caption"], 2, "--base brings no adapters and no prompt"),
        (["--lora-where", "encoder"], 2, "no encoder"),
        (["--soft-prompt", "a", "--prompt-where", "encoder"], 2, "encoder"),
        (["--soft-prompt", "0"], 2, "prompt"),
        (["--soft-prompt", "-3"], 2, "length must be from 1"),
        (["--soft-prompt", " "], 2, "--soft-prompt is empty"),
        (["--lora-rank", "decoder=4,decoder=2"], 2, "names a place twice"),
        (["--freeze", "lora", "--unfreeze", "lora"], 2, "--freeze and --unfreeze both name lora"),
        (["--base-bits", "8"], 2, "--base-bits"),
        (["--base-bits", "4", "--train-base", "text"], 2, "--base-bits keeps the backbones frozen"),
        (["--cache-features", "c", "--adapters", "ffn", "--adapter-where", "vision"], 2, "--cache-features needs a frozen image encoder"),
    ],
)
def test_contradictions_are_named_in_one_line(adapt, capsys, flags, code, named):
    path = adapt("refused", *flags, "--max-steps", "1", code=code)
    if code:
        assert not path.exists(), "nothing is left of a run that was refused"
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 1 and named in lines[0]


def test_a_4_bit_base_below_adapters_of_another_run(adapt, capsys):
    pytest.importorskip("bitsandbytes")
    caption = adapt("caption", "--adapters", "ffn", "--soft-prompt", "2", "--max-steps", "2")
    path = adapt("on-4-bits", "--base", caption, "--base-bits", "4", "--max-steps", "2")
    assert "is merged in full precision and then rounded to 4 bits" in capsys.readouterr().err
    model, _, _ = captioner.load(path)
    assert any(isinstance(module, lora.Linear4bit) for module in model.modules()) and lora.get_stack(model) == ("caption",)
    before, after = state(caption), model.state_dict()
    assert not changed({name: tensor for name, tensor in before.items() if ".adapters." in name or "prefix" in name}, after)


def test_features_of_another_stack_are_not_shared(adapt, tmp_path):
    """Adapters in the image encoder change its features: with them on or off, the cache is another one."""
    path = adapt("vision", "--adapters", "ffn", "--adapter-where", "vision", "--max-steps", "6")
    found = {}
    for name, flags in (("on", []), ("off", ["--stack", "none"])):
        for cache in ([], ["--cache-features", str(tmp_path / "cache")]):
            output = tmp_path / f"{name}-{len(cache)}"
            assert evaluate.main([str(path), "--decode", "beam", "--no-report", *flags, *cache, "--output", str(output)]) == 0
            found[name, len(cache)] = json.loads((output / "scores.json").read_text())
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for name in ("on", "off"):
        assert found[name, 0]["CIDEr"] == pytest.approx(found[name, 2]["CIDEr"]) and found[name, 0]["stack"] == (["caption"] if name == "on" else [])


def test_unfrozen_parts_in_the_image_encoder_need_live_features(adapt, tmp_path, capsys):
    path = adapt("vision", "--lora-targets", "none", "--adapters", "ffn", "--adapter-where", "vision", "--max-steps", "1")
    adapt("on", "--base", path, "--lora-targets", "none", "--unfreeze", "caption", "--cache-features", str(tmp_path / "cache"), code=2)
    assert "what --unfreeze names has parts in it" in capsys.readouterr().err


def test_an_encoder_that_reads_nothing_is_not_trained_and_the_run_resumes(tiny_flags, tmp_path, monkeypatch, capsys):
    config = json.loads((tmp_path / "tiny.json").read_text()) | {"num_layers": 2}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    assert run([*tiny_flags, "--max-steps", "2", "--eval-every", "2"]) == 0
    table = capsys.readouterr().err
    assert next(line.split()[2] for line in table.splitlines() if line.startswith("text encoder")) == "0"
    assert run(["--resume", tmp_path / "run", "--workers", "0"]) == 0


def test_folders_that_are_not_what_the_config_says_are_refused(adapt):
    path = adapt("parts", "--lora-where", "decoder,vision", "--adapters", "ffn", "--soft-prompt", "2", "--max-steps", "1")
    kept = (path / "config.json").read_text()
    for key, value, message in (
        ("lora", ["decoder"], "adapter/vision: an adapter that the run's config.json does not name"),
        ("lora", ["decoder", "encoder", "vision"], "its folders hold lora decoder, vision, its config.json says decoder, encoder, vision"),
        ("prompt", [], "prompt: an adapter that the run's config.json does not name"),
        ("prompt", ["encoder"], "its folders hold prompt decoder, its config.json says encoder"),
        ("adapters", ["other"], "adapters/caption: an adapter that the run's config.json does not name"),
        ("adapters", "caption", 'model.adapters is "caption", which no run has'),
        ("base_bits", 3, "model.base_bits is 3, which no run has"),
        ("stack", None, "model.stack is null, which no run has"),
    ):
        config = json.loads(kept)
        config["model"][key] = value
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=re.escape(message)):
            captioner.load(path)
    (path / "config.json").write_text(kept)
    for folder, key, value in (("adapters/caption", "where", 5), ("adapters/caption", "where", [["a"]]), ("adapter/vision", "target_modules", [5])):
        file = path / folder / "adapter_config.json"
        settings = json.loads(file.read_text())
        file.unlink()
        file.write_text(json.dumps(settings | {key: value}))
        with pytest.raises(UserError, match="adapter_config.json"):
            captioner.load(path)
        file.unlink()
        file.write_text(json.dumps(settings))
    bridge = load_file(path / "bridge.safetensors")
    bridge["weight"][0, 0] = float("nan")
    (path / "bridge.safetensors").unlink()
    save_file(bridge, path / "bridge.safetensors")
    with pytest.raises(UserError, match="bridge.safetensors does not fit Bridge: weight has values that are not finite"):
        captioner.load(path)


def test_an_adapter_of_another_run_is_refused(adapt, tiny_flags, tmp_path, capsys):
    """What a run's adapters were made for is in their files: other backbones are told by their hash."""
    path = adapt("mine", "--adapters", "ffn", "--soft-prompt", "2")
    write_tiny_data(tmp_path / "other-data")
    assert run([*tiny_flags, "--seed", "5", "--lora-targets", "none", "--max-steps", "1", "--output", tmp_path / "other-base"]) == 0
    other = adapt("other", "--base", tmp_path / "other-base", "--adapters", "ffn", "--soft-prompt", "2")
    for folder in ("adapter", "adapters/caption", "prompt"):
        file = path / folder / "adapter_model.safetensors"
        kept = file.read_bytes()
        file.unlink()
        file.write_bytes((other / folder / "adapter_model.safetensors").read_bytes())
        with pytest.raises(UserError, match=r"made for another backbone \(sha256 [0-9a-f]{12}, here [0-9a-f]{12}\)"):
            captioner.load(path)
        file.write_bytes(kept)
    captioner.load(path)


def test_the_kernels_flag_is_obeyed_or_refused_without_a_trace(adapt, capsys, monkeypatch):
    monkeypatch.setattr("lora.functional._kernel", "auto")  # the command sets it for its process, which is ours here
    flags = ["--lora-where", "decoder", "--lora-dropout", "0.1", "--max-steps", "3"]
    chosen = state(adapt("chosen", *flags))
    assert "LoRA kernel: fused on " in capsys.readouterr().err
    plain = state(adapt("plain", *flags, "--lora-kernel", "reference"))
    assert "LoRA kernel: reference on " in capsys.readouterr().err
    assert all(torch.allclose(chosen[name], plain[name], atol=1e-4) for name in chosen)
    if not torch.cuda.is_available():
        refused = adapt("refused", *flags, "--lora-kernel", "triton", code=2)
        assert "--lora-kernel triton: " in capsys.readouterr().err and not refused.exists()
