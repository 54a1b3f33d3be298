"""Exports: each format read back by us, by `peft` and by `transformers`; what is wrong is refused and leaves nothing."""

import hashlib
import importlib.metadata
import importlib.util
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import captioner
import lora
from captioner import bundle, checkpoint, checkpoint_store, cli, demo, generate
from captioner.backbones import build_text, build_vision
from captioner.errors import UsageError, UserError
from captioner.export import export
from captioner.model import Captioner
from tests import tiny_clip, tiny_t5
from tests.conftest import REPOSITORY

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402

EVERYTHING = dict(lora_where=("decoder", "vision"), adapters=("caption", "question"), prompt=("decoder",))
WITH_ENCODER = dict(lora_where=("decoder", "encoder"), prompt=("decoder", "encoder"))
ONLY_LORA = dict(lora_where=("decoder", "vision"))
SCALED = tiny_clip.CONFIG | {"vision_cfg": tiny_clip.CONFIG["vision_cfg"] | {"ls_init_value": 0.5}}


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch):
    monkeypatch.setitem(demo.CLIPS, "Tiny", tiny_clip.CONFIG)
    monkeypatch.setitem(demo.CLIPS, "TinyScaled", SCALED)


@pytest.fixture
def make_run(tmp_path):
    """Function that writes a run of tiny random backbones, all of whose parts matter."""

    def make(
        lora_where=(), adapters=(), prompt=(), variant="v1.1", vision="Tiny", base_bits=None, embedded=(True, True), name="run", **t5_changes
    ):
        folder, t5, clip = tmp_path / name, tmp_path / f"{name}-t5", tmp_path / f"{name}-clip.safetensors"
        donor = tiny_t5.hf_model(variant, **t5_changes)
        with torch.no_grad():
            for parameter in (value for key, value in donor.named_parameters() if key.endswith(".q.weight")):
                parameter.mul_(0.3)  # attention that is less of a switch magnifies rounding less
        tiny_t5.save(donor, t5)
        spec = tiny_clip.save(clip, 0) if vision == "Tiny" else vision
        torch.manual_seed(1)
        image, text = build_vision(spec), build_text(str(t5))
        model = Captioner(image.module, text.module).eval()
        torch.nn.init.normal_(model.bridge.weight)
        facts = {part: checkpoint.describe(built, travels) for part, built, travels in zip(("vision", "text"), (image, text), embedded)}
        facts |= checkpoint.no_parts()
        if base_bits:
            checkpoint.quantize(model, facts)
        checkpoint.stamp(model, facts)
        if lora_where:
            lora.apply_lora(model, ("attn", "ffn"), lora_where, rank=4, alpha=6.0, dropout=0.0)
            facts["lora"] = sorted(lora_where)
        for adapter in adapters:
            lora.apply_adapters(model, ("attn", "ffn"), ("decoder", "vision"), 4, name=adapter)
        if prompt:
            lora.apply_soft_prompt(model, lora.initial_prompt(model.text.embedding, None, 3), prompt)
        with torch.no_grad():
            for parameter in lora.adapter_parameters(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        facts |= {"adapters": list(adapters), "stack": list(adapters[:1]), "prompt": sorted(prompt)}
        if adapters:
            lora.set_stack(model, facts["stack"])
        checkpoint.save_weights(model, text.tokenizer, facts, folder)
        checkpoint.write_config(folder, {"data": "scenes"}, facts, {})
        return folder

    return make


@torch.no_grad()
def computed(run) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy ids of random pixels, through `captioner.load`."""
    model, tokenizer, transform = captioner.load(run)
    pixels = torch.randn(3, 3, transform.image_size, transform.image_size, generator=torch.Generator().manual_seed(5))
    memory = model.encode(pixels)
    labels = torch.randint(2, len(tokenizer), (3, 6), generator=torch.Generator().manual_seed(6))
    return model.decoder_logits(memory, labels), generate.greedy(model, memory, max_new_tokens=8)


def assert_same(run, exported, atol=5e-4):
    (expected, ids), (found, other) = computed(run), computed(exported)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    assert torch.equal(ids, other)
    assert expected.std() > 1000 * atol, "the comparison means something"


def output_of(format, tmp_path):
    return tmp_path / ("out.safetensors" if format == "bundle" else "out")


PARTS = {"everything": EVERYTHING, "encoder": WITH_ENCODER, "tied": ONLY_LORA | {"variant": "v1.0"}, "decoder only": ONLY_LORA | {"num_layers": 0}}


@pytest.mark.parametrize("format", ["peft", "merged", "bundle"])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_every_format_gives_the_run_back(make_run, tmp_path, parts, format):
    run, out = make_run(**parts), output_of(format, tmp_path)
    done = export(run, format, out)
    assert done.output == out and json.loads(done.certificate_path.read_text()) == done.certificate
    assert_same(run, out)
    certificate = done.certificate
    assert certificate["same_captions"] and all(row["run"] == row["export"] for row in certificate["captions"]) and len(certificate["captions"]) == 8
    assert certificate["logits"]["relative"]["mean"] <= certificate["logits"]["tolerance"]["mean"] <= 1e-5
    written = {file.relative_to(out).as_posix() if out.is_dir() else file.name: file for file in checkpoint_store.files_of(out)}
    written.pop("certificate.json", None)
    assert {name: row["sha256"] for name, row in certificate["files"].items()} == {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in written.items()
    }
    assert certificate["versions"]["torch"] == importlib.metadata.version("torch")
    model, _, _ = captioner.load(out)
    kinds = {name.rpartition(".")[2] for name in lora.adapter_parameters(model)}
    assert ("lora_A" in kinds) == (format != "merged") and ("embeddings" in kinds) == bool(parts.get("prompt"))
    assert lora.get_stack(model) == tuple(parts.get("adapters", ())[:1])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_peft_loads_lora_of_both_models(make_run, tmp_path):
    run = make_run(**ONLY_LORA, num_layers=0)
    for options, out in (({}, tmp_path / "plain"), ({"fold_rslora": True}, tmp_path / "folded")):
        export(run, "peft", out, **options)
        for folder in ("adapter", "adapter/vision"):
            config = json.loads((out / folder / "adapter_config.json").read_text())
            assert (config["use_rslora"], config["lora_alpha"]) == ((True, 6.0) if not options else (False, 12.0))
        theirs, info = transformers.T5ForConditionalGeneration.from_pretrained(out / "text", output_loading_info=True)
        assert not any(info.values()), info
        theirs = peft.PeftModel.from_pretrained(theirs, out / "adapter").eval()
        tower, info = transformers.CLIPVisionModel.from_pretrained(out / "vision", output_loading_info=True)
        assert not any(info.values()), info
        tower = peft.PeftModel.from_pretrained(tower, out / "adapter" / "vision").eval()
        ours, tokenizer, _ = captioner.load(run)
        pixels, labels = torch.randn(2, 3, 32, 32), torch.randint(2, len(tokenizer), (2, 5))
        with torch.no_grad():
            tokens = ours.vision(pixels)
            torch.testing.assert_close(tower(pixel_values=pixels).last_hidden_state, tokens, rtol=0, atol=1e-4)
            memory = ours.bridge(tokens)
            expected = ours.decoder_logits(memory, labels)
            torch.testing.assert_close(theirs(encoder_outputs=BaseModelOutput(memory), labels=labels).logits, expected, rtol=1e-5, atol=1e-4)
            plain = theirs.base_model.model
            with theirs.disable_adapter():
                assert not torch.allclose(plain(encoder_outputs=BaseModelOutput(memory), labels=labels).logits, expected, atol=1e-2), "LoRA matters"


def test_peft_loads_a_soft_prompt(make_run, tmp_path):
    run = make_run(prompt=("encoder", "decoder"))
    export(run, "peft", tmp_path / "out")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out" / "text")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "prompt").eval()
    ours, tokenizer, _ = captioner.load(run)
    words, labels = torch.randint(2, len(tokenizer), (2, 4)), torch.randint(2, len(tokenizer), (2, 5))
    with torch.no_grad():
        logits = theirs(input_ids=words, labels=labels, task_ids=torch.zeros(2, dtype=torch.long)).logits
        torch.testing.assert_close(logits[:, 3:], ours.text(words, labels), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", ["peft", "merged"])
@pytest.mark.parametrize("sizes", [{"num_decoder_layers": 2}, {"num_layers": 0}, {"variant": "v1.0", "num_decoder_layers": 2}], ids=str)
def test_the_code_in_the_readme_captions_without_us(make_run, tmp_path, monkeypatch, format, sizes):
    run = make_run(**ONLY_LORA | sizes)
    export(run, format, tmp_path / "out")
    for kind, folder in ((transformers.T5ForConditionalGeneration, "text"), (transformers.CLIPVisionModel, "vision")):
        _, info = kind.from_pretrained(tmp_path / "out" / folder, output_loading_info=True)
        assert not any(info.values()), info
    monkeypatch.chdir(tmp_path / "out")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
    model, tokenizer, transform = captioner.load(run)
    names = {"pixel_values": torch.randn(3, 3, 32, 32)}
    with torch.no_grad():
        exec(code, names)
        memory = model.encode(names["pixel_values"])
        torch.testing.assert_close(names["memory"], memory, rtol=0, atol=1e-4)
        assert torch.equal(names["ids"], generate.greedy(model, memory, max_new_tokens=20))
    assert transformers.T5Tokenizer.from_pretrained("text")("a red dog").input_ids == tokenizer.encode(["a red dog"])[0]


def test_bf16_halves_the_backbones_and_is_certified(make_run, tmp_path):
    run = make_run(**EVERYTHING)
    for format in ("peft", "merged", "bundle"):
        done = export(run, format, output_of(format, tmp_path / format), dtype="bf16")
        assert 0 < done.certificate["logits"]["relative"]["mean"] < 0.03
        (expected, _), (found, _) = computed(run), computed(done.output)
        assert (found - expected).abs().mean() < 0.1 * expected.std()
        state = load_file(done.output) if format == "bundle" else {}
        for name in () if format == "bundle" else ("bridge", "text/model", "vision/model", "prompt/adapter_model", "adapters/caption/adapter_model"):
            state |= {f"{name}.safetensors/{key}": tensor for key, tensor in load_file(done.output / f"{name}.safetensors").items()}
        for key, tensor in state.items():
            base = key.startswith(("bridge", "text/model", "vision/model"))
            assert tensor.dtype == (torch.bfloat16 if base else torch.uint8 if key.endswith("spiece.model") else torch.float32), key


def test_a_tower_that_clip_cannot_express_keeps_our_names(make_run, tmp_path):
    run = make_run(lora_where=("decoder", "vision"), vision="TinyScaled")
    for format in ("merged", "bundle"):
        export(run, format, output_of(format, tmp_path))
        assert_same(run, output_of(format, tmp_path))
    assert (tmp_path / "out" / "vision.safetensors").is_file() and not (tmp_path / "out" / "vision").exists()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "cannot express" in text and "```" not in text


def test_backbones_that_live_elsewhere_are_named_by_peft_and_packed_by_the_others(make_run, tmp_path):
    run = make_run(**ONLY_LORA, embedded=(False, False))
    export(run, "peft", tmp_path / "named")
    assert not (tmp_path / "named" / "text").exists() and not (tmp_path / "named" / "vision").exists()
    for format in ("merged", "bundle"):
        export(run, format, output_of(format, tmp_path))
    before = computed(run)
    for file in [tmp_path / "run-clip.safetensors", *(tmp_path / "run-t5").iterdir()]:
        file.unlink()
    for out in (tmp_path / "out", tmp_path / "out.safetensors"):
        torch.testing.assert_close(computed(out)[0], before[0], rtol=0, atol=5e-4)
    with pytest.raises(UserError, match="run-clip"):
        captioner.load(tmp_path / "named")


def test_an_export_can_be_exported(make_run, tmp_path):
    run = make_run(**EVERYTHING)
    export(run, "bundle", tmp_path / "a.safetensors", stack=("question", "caption"))
    export(tmp_path / "a.safetensors", "peft", tmp_path / "b")
    export(tmp_path / "b", "merged", tmp_path / "c")
    done = export(tmp_path / "c", "bundle")
    assert done.output == tmp_path / "c" / "exports" / "c.safetensors"
    assert lora.get_stack(captioner.load(done.output)[0]) == ("question", "caption")
    with pytest.raises(AssertionError):
        assert_same(run, done.output)
    assert_same(tmp_path / "a.safetensors", done.output)
    assert export(tmp_path / "a.safetensors", "merged").output == tmp_path / "a-merged"


def listing(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_scale_is_refused_and_leaves_nothing(make_run, tmp_path, monkeypatch, dtype):
    run = make_run(**ONLY_LORA)
    before = listing(tmp_path)
    exact, save_peft = lora.LoRALinear.delta_weight, lora.save_peft

    def save_with_another_alpha(model, directory, *arguments, **options):
        save_peft(model, directory, *arguments, **options)
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1.5 * config["lora_alpha"]}))

    monkeypatch.setattr(lora.LoRALinear, "delta_weight", lambda self: 1.5 * exact(self))
    monkeypatch.setattr(lora, "save_peft", save_with_another_alpha)
    for format in ("merged", "peft", "bundle"):
        with pytest.raises(UserError, match="not exported: read back, its logits differ from the run's by up to") as caught:
            export(run, format, tmp_path / "new" / output_of(format, tmp_path).name, dtype=dtype)
        assert "\n" not in str(caught.value)
        assert listing(tmp_path) == before


def test_in_fp32_another_caption_is_refused(make_run, tmp_path, monkeypatch):
    run = make_run(**ONLY_LORA)
    before, greedy, calls = listing(tmp_path), generate.greedy, []

    def other_the_second_time(*arguments, **options):
        ids = greedy(*arguments, **options)
        calls.append(ids)
        return ids if len(calls) % 2 else ids.roll(1, 0)

    monkeypatch.setattr(generate, "greedy", other_the_second_time)
    with pytest.raises(UserError, match="greedy captions are others"):
        export(run, "merged", tmp_path / "out")
    assert listing(tmp_path) == before
    assert export(run, "merged", tmp_path / "out", dtype="bf16").certificate["same_captions"] is False


def test_a_full_disk_leaves_nothing(make_run, tmp_path, monkeypatch):
    run = make_run(**EVERYTHING)
    before = listing(tmp_path)
    for module, name in ((checkpoint, "save_text"), (bundle, "save_tensors")):
        with monkeypatch.context() as patch:

            def full(*_, **__):
                raise UserError("the disk is full")

            patch.setattr(module, name, full)
            with pytest.raises(UserError, match="the disk is full"):
                export(run, "bundle", tmp_path / "out.safetensors")
        assert listing(tmp_path) == before


def test_what_is_there_is_never_overwritten(make_run, tmp_path):
    run = make_run(**ONLY_LORA)
    (tmp_path / "out").mkdir()
    (tmp_path / "out.safetensors").write_text("mine")
    (tmp_path / "other.certificate.json").write_text("mine")
    for format, name in (("peft", "out"), ("merged", "out"), ("bundle", "out.safetensors"), ("bundle", "other.safetensors")):
        with pytest.raises(UserError, match="is there already: choose another --output"):
            export(run, format, tmp_path / name)
    assert (tmp_path / "out.safetensors").read_text() == "mine" and not list((tmp_path / "out").iterdir())


def test_flags_that_say_nothing_are_refused(make_run, tmp_path):
    run, bare = make_run(**ONLY_LORA), make_run(adapters=("caption",), name="bare")
    wrong = [
        (run, "merged", {"fold_rslora": True}, "--fold-rslora is for --format peft"),
        (run, "peft", {"dequantize": True}, "--dequantize is for --format merged"),
        (run, "merged", {"dequantize": True}, "is not in 4 bits"),
        (run, "bundle", {"output": tmp_path / "x"}, "ends in .safetensors"),
        (run, "onnx", {}, "one of peft, merged, bundle"),
        (run, "peft", {"dtype": "fp8"}, "one of fp32, bf16"),
    ]
    for folder, format, options, message in wrong:
        with pytest.raises(UsageError, match=re.escape(message)):
            export(folder, format, **options)
    with pytest.raises(UserError, match="neither LoRA nor a soft prompt"):
        export(bare, "peft")
    with pytest.raises(UserError, match="has no checkpoint last"):
        export(run, "merged", checkpoint_name="last")
    with pytest.raises(UserError, match="caption"):
        export(bare, "merged", stack=("question",))
    assert not (run / "exports").exists()


@pytest.mark.parametrize("encoder_layers", [2, 0])
def test_a_base_in_4_bits(make_run, tmp_path, encoder_layers):
    pytest.importorskip("bitsandbytes")
    run = make_run(**ONLY_LORA, base_bits=4, num_layers=encoder_layers)
    with pytest.raises(UserError, match="--dequantize merges in full precision.*--format peft or bundle keeps LoRA beside"):
        export(run, "merged", tmp_path / "out")
    for format, options in (("merged", {"dequantize": True}), ("peft", {}), ("bundle", {})):
        export(run, format, output_of(format, tmp_path / format), **options)
        assert_same(run, output_of(format, tmp_path / format))
        facts = checkpoint.read_config(output_of(format, tmp_path / format))["model"]
        assert facts["base_bits"] == (None if format == "merged" else 4)
    half = export(run, "bundle", tmp_path / "half.safetensors", dtype="bf16").certificate
    assert 0 < half["logits"]["relative"]["mean"] < 0.03


@pytest.fixture
def packed(make_run, tmp_path):
    run = make_run(**EVERYTHING)
    return export(run, "bundle", tmp_path / "x.safetensors").output


def rewritten(path, add=None, drop=(), metadata=None):
    """The bundle with other tensors or header, None in metadata drops a key."""
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys() if not key.startswith(tuple(drop) or "\0")}
    header = {key: value for key, value in (header | (metadata or {})).items() if value is not None}
    save_file(tensors | (add or {}), path, header)


def test_a_truncated_bundle_is_an_error_in_one_line(packed):
    content = packed.read_bytes()
    for size in (0, 4, 300, len(content) // 2, len(content) - 1):
        packed.write_bytes(content[:size])
        for use in (captioner.load, checkpoint.read_config):
            with pytest.raises(UserError, match="x.safetensors, a damaged or incomplete safetensors file") as caught:
                use(packed)
            assert "\n" not in str(caught.value)


ESCAPES = ["../evil", "/tmp/evil", "adapters/../../evil", "adapters/a/../../../evil", "text/../../evil", "adapter\n", "checkpoints/best", ".", "text/deeper"]


@pytest.mark.parametrize("folder", ESCAPES)
def test_a_bundle_names_no_file_outside(packed, tmp_path, monkeypatch, folder):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(bundle.tempfile, "tempdir", str(temporary))
    content = packed.read_bytes()
    for damage in (
        {"metadata": {f"{folder}/config.json": "{}"}},
        {"metadata": {f"{folder}/model.safetensors": "{}"}, "add": {f"{folder}/model.safetensors/x": torch.zeros(1)}},
        {"add": {f"{folder}/spiece.model": torch.zeros(1, dtype=torch.uint8)}},
    ):
        packed.write_bytes(content)
        rewritten(packed, **damage)
        before = listing(tmp_path)
        with pytest.raises(UserError, match="names that no bundle has"):
            captioner.load(packed)
        assert listing(tmp_path) == before and not (tmp_path.parent / "evil").exists()


def test_an_incomplete_or_foreign_bundle_says_what_is_wrong(packed, tmp_path):
    content = packed.read_bytes()
    gone = {"adapter/vision/adapter_config.json": None, "adapter/vision/adapter_model.safetensors": None}
    other = {"text/model.safetensors/shared.weight": torch.zeros(192, 24)}
    names = [
        ({"drop": ["bridge.safetensors/bias"]}, "missing: bias"),
        ({"drop": ["text/spiece.model"]}, "no spiece.model"),
        ({"drop": ["vision/model.safetensors/pre_layrnorm.weight"]}, "missing: norm_pre.weight"),
        ({"drop": ["adapter/vision/"], "metadata": gone}, "adapter/vision"),
        ({"metadata": {"config.json": None}}, "no config.json in its header"),
        ({"metadata": {"config.json": "{"}}, "its config.json is not JSON"),
        ({"metadata": {"config.json": "[]"}}, "not a JSON object"),
        ({"metadata": {"config.json": '{"format": 99}'}}, "format 99"),
        ({"metadata": {"captioner_bundle": None}}, "not a bundle"),
        ({"metadata": {"captioner_bundle": "2"}}, "not a bundle"),
        ({"metadata": {"bridge.safetensors": "no"}}, "metadata of bridge.safetensors is not JSON"),
        ({"drop": ["text/spiece.model"], "add": {"text/spiece.model": torch.zeros(2, 2)}}, "not the bytes of a file"),
        ({"drop": ["bridge.safetensors/weight"], "add": {"bridge.safetensors/weight": torch.zeros(2, 2)}}, "shape"),
        ({"drop": ["text/model.safetensors/shared.weight"], "add": other}, "not those the run was trained"),
    ]
    for damage, message in names:
        packed.write_bytes(content)
        rewritten(packed, **damage)
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            captioner.load(packed)
        assert "\n" not in str(caught.value) and "captioner-" not in str(caught.value), "no name of a temporary folder"
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="not a bundle"):
        captioner.load(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="no such run directory or bundle"):
        captioner.load(tmp_path / "none.safetensors")


def test_packing_keeps_every_byte_that_matters(make_run, tmp_path):
    run = make_run(**EVERYTHING)
    bundle.pack(run, tmp_path / "x.safetensors")
    with bundle.opened(tmp_path / "x.safetensors") as folder:
        assert listing(folder) == listing(run)
        for file in checkpoint_store.files_of(run):
            other = folder / file.relative_to(run)
            if file.suffix != ".safetensors":
                assert other.read_bytes() == file.read_bytes()
                continue
            with safe_open(file, "pt") as a, safe_open(other, "pt") as b:
                assert (a.metadata() or {}) == (b.metadata() or {}) and set(a.keys()) == set(b.keys())
                assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())
    assert not folder.exists()
    (run / "notes.txt").write_text("more")
    with pytest.raises(UserError, match="no place"):
        bundle.pack(run, tmp_path / "y.safetensors")


@pytest.fixture(scope="module")
def command():
    """Exit code of scripts/export.py."""
    spec = importlib.util.spec_from_file_location("export_command", REPOSITORY / "scripts" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words) -> int:
        with pytest.raises(SystemExit) as exit_info:
            cli.run_command(module.main, [str(word) for word in words])
        return exit_info.value.code

    return run


def test_the_command(trained, command, tmp_path, capsys):
    assert command("--format", "merged", "--json", "-") == 0, "the newest run"
    shown = capsys.readouterr()
    certificate = json.loads(shown.out)
    out = trained / "exports" / "merged"
    assert certificate["output"].endswith("exports/merged") and (out / "certificate.json").is_file()
    assert "text/model.safetensors" in shown.err and "the same greedy captions" in shown.err and "logits differ by up to" in shown.err
    assert checkpoint.newest_run().name == "tiny", "an export is not the newest run"
    assert_same(trained, out)
    assert command(trained, "--format", "merged") == 1
    assert "exports/merged is there already" in capsys.readouterr().err
    assert command(trained, "--format", "peft", "--checkpoint", "last", "--output", tmp_path / "last", "--fold-rslora") == 0
    assert command(trained, "--format", "bundle", "--dtype", "bf16", "--output", tmp_path / "x.safetensors") == 0
    assert (tmp_path / "x.certificate.json").is_file()
    capsys.readouterr()
    for words, message in (
        (["--format", "onnx"], "invalid choice: 'onnx'"), ([], "--format is needed: one of peft, merged, bundle"),
        (["--formal", "peft"], "did you mean --format"),
        (["--format", "peft", "--dequantize"], "--dequantize is for --format merged"),
    ):  # fmt: skip
        assert command(trained, *words) == 2
        assert message in capsys.readouterr().err
    assert command(tmp_path / "none", "--format", "peft") == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such run directory or bundle\n"


def test_the_other_commands_take_a_bundle(trained, command, tmp_path, capsys):
    import best_of_n
    import evaluate

    bundled = tmp_path / "x.safetensors"
    assert command(trained, "--format", "bundle", "--output", bundled) == 0
    scores = {}
    for run in (trained, bundled):
        assert evaluate.main([str(run), "--decode", "greedy", "--device", "cpu", "--json", str(tmp_path / "scores.json")]) == 0
        scores[run] = json.loads((tmp_path / "scores.json").read_text())
    assert scores[bundled]["CIDEr"] == scores[trained]["CIDEr"]
    assert (tmp_path / "x-results" / "val-greedy" / "captions.jsonl").is_file()
    assert best_of_n.main([str(bundled), "--n", "2", "--device", "cpu", "--reranker", "ViT-Tiny-Scenes:demo", "--scorer", "ViT-Tiny-Scenes:scorer"]) == 0
    assert (tmp_path / "x-results" / "val-best-of-2").is_dir()
