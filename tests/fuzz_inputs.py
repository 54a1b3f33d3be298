"""The kinds of input that are fuzzed: a good one of each, how a command reads it, and whether what was read is right."""

import copy
import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lora
import train
from captioner import bundle, checkpoint, checkpoint_store, weights
from captioner.backbones import build_vision
from captioner.demo import CLIPS, TEXTS
from captioner.errors import UserError
from captioner.files import write_json
from captioner.model import Captioner
from captioner.t5 import T5, T5Config
from captioner.tokenizer import Tokenizer
from captioner.trainer import TrainState
from data import readers
from data.images import BadImage
from data.rows import DataError, FileImage
from data.transforms import ImageTransform
from tests.fuzzing import Input

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_TOWER = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
# The second has no form as a CLIPVisionModel: a run keeps it in vision.safetensors.
CLIPS |= {"ViT-Fuzzed": {"embed_dim": 8, "vision_cfg": TINY_TOWER}, "ViT-Fuzzed-Scaled": {"embed_dim": 8, "vision_cfg": TINY_TOWER | {"ls_init_value": 0.5}}}
TINY_TEXT = {
    "vocab_size": 500, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False, "dropout_rate": 0.0,
}  # fmt: skip
NO_HASHES = {"vision": {"hash": None}, "text": {"hash": None}}


# ---- good ones -------------------------------------------------------------------------------------------


@functools.cache
def bare(vision: str) -> Captioner:
    """A random captioner with two tiny backbones and nothing added; nobody changes it."""
    torch.manual_seed(0)
    return Captioner(build_vision(vision).module, T5(T5Config.from_dict(TINY_TEXT)).eval()).eval()


@functools.cache
def vocabulary() -> Tokenizer:
    return Tokenizer(TEXTS["t5-tiny-scenes"] / "spiece.model")


def with_parts(model: Captioner, kinds: tuple[str, ...]) -> Captioner:
    """A copy with random LoRA, a bottleneck adapter, a soft prompt."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    if "lora" in kinds:
        lora.apply_lora(model, where=("decoder", "vision"), rank={"decoder": 2, "vision": 3}, generator=generator)
    if "adapters" in kinds:
        lora.apply_adapters(model, reduction=4, generator=generator)
    if "prompt" in kinds:
        lora.apply_soft_prompt(model, torch.randn(3, 16, generator=generator), ("decoder", "encoder"))
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter.normal_(std=0.1, generator=generator)
    return model


def write_run(folder: Path, vision: str = "ViT-Fuzzed", kinds: tuple[str, ...] = ("lora", "adapters", "prompt")) -> None:
    """A run directory whose backbones travel with it and have no hash, as after training them: nothing but checks of the files can find damage."""
    model = with_parts(bare(vision), kinds)
    source = {"weights": None, "hash": None, "embedded": True}
    facts = {
        "vision": source | {"name": vision, "image_size": 16, "transform": ImageTransform(16).to_dict()},
        "text": source | {"name": "t5-tiny"},
        **checkpoint.no_parts(), **checkpoint.parts_of(model), "stack": list(lora.get_stack(model)),
    }  # fmt: skip
    checkpoint.save_weights(model, vocabulary(), facts, folder)
    settings = {"data": "scenes", "batch_size": 4, "lr": 0.001, "lora_targets": ["attn"], "val_split": "val", "resume": None}
    write_json(folder / "config.json", {"format": checkpoint.FORMAT, "settings": settings, "model": facts, "versions": {"torch": torch.__version__}})


def write_settings(folder: Path) -> None:
    """A run as train.py writes it down, without weights: what `--resume` reads first."""
    write_run(folder, kinds=())
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"settings": dataclasses.asdict(train.Settings(data="scenes", text_config="t5-tiny"))})


def write_checkpoint(folder: Path) -> None:
    """A run with one checkpoint of its step 3, in the middle of being published."""
    write_run(folder)
    write_moments(folder)
    published = [folder / name for name in ("adapter", "adapters", "prompt", "bridge.safetensors", "vision", "text", "optimizer.safetensors")]

    def copy_files(target: Path) -> None:
        for path in published:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target / path.name)

    state = TrainState(step=3, best=[0.5, -1.0], best_step=3, scores={"loss": 1.0}, losses=[1.5], metrics_bytes=10)
    checkpoint_store.write(folder, 3, copy_files, dataclasses.asdict(state))
    write_json(folder / "checkpoints" / "publishing.json", {"checkpoint": "step-00000003"})


def write_clip_folder(folder: Path) -> None:
    """A CLIP image tower as Hugging Face writes it, with its preprocessing, and one as open_clip does."""
    (folder / "hugging face").mkdir()
    (folder / "open clip").mkdir()
    checkpoint.save_vision(bare("ViT-Fuzzed").vision, folder / "hugging face", torch.float32)
    preprocessing = {
        "crop_size": {"height": 16, "width": 16}, "do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.3, 0.3, 0.3], "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": 20},
    }  # fmt: skip
    write_json(folder / "hugging face" / "vision" / "preprocessor_config.json", preprocessing)
    write_json(folder / "open clip" / "open_clip_config.json", {"model_cfg": {"quick_gelu": False}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}})
    save_file(weights.export(bare("ViT-Fuzzed").vision, weights.OPEN_CLIP_VIT), folder / "open clip" / "open_clip_model.safetensors")


def write_shards(folder: Path) -> None:
    """A run whose T5 is in two shards with an index."""
    write_run(folder, kinds=())
    text = folder / "text"
    tensors = load_file(text / "model.safetensors")
    (text / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, text / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    write_json(text / "model.safetensors.index.json", index)


def write_bundle(folder: Path) -> None:
    write_run(folder / "run")
    bundle.pack(folder / "run", folder / "run.safetensors")


def write_images(folder: Path) -> None:
    """A data folder with a split, and files that no row may reach."""
    split = folder / "train"
    (split / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.png", "c.jpg", "secret.png")):
        Image.new("RGB", (6, 4), (40 * number, 9, 9)).save(split / name)
    outside = folder.parent / "outside"
    (split / "linked.png").symlink_to(outside / "train" / "secret.png")
    (split / "link").symlink_to(outside / "train")
    rows = [
        {"file_name": "a.png", "captions": ["one", "two words"]}, {"file_name": "deep/b.png", "caption": "three"}, {"file_name": "c.jpg", "text": "four", "more": 1},
    ]  # fmt: skip
    (split / readers.metadata_jsonl.FILE_NAME).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_pictures(folder: Path) -> None:
    """One picture of each kind of mode and format."""
    grey = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    pictures = {
        "rgb.png": Image.new("RGB", (8, 6), "red"), "rgba.png": Image.new("RGBA", (8, 6), (9, 9, 9, 99)), "grey16.png": Image.fromarray(grey),
        "palette.gif": Image.new("P", (8, 6)), "rgb.jpg": Image.new("RGB", (8, 6), "blue"), "cmyk.jpg": Image.new("CMYK", (8, 6)),
        "rgb.webp": Image.new("RGB", (8, 6), "green"), "rgb.tiff": Image.new("RGB", (8, 6)), "float.tiff": Image.new("F", (8, 6), 0.5),
        "rgb.bmp": Image.new("RGB", (8, 6)),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(folder / name)


PICTURES = ("rgb.png", "rgba.png", "grey16.png", "palette.gif", "rgb.jpg", "cmyk.jpg", "rgb.webp", "rgb.tiff", "float.tiff", "rgb.bmp")


def write_moments(folder: Path) -> None:
    """Moments of AdamW after one step."""
    parameters, optimizer = optimizer_of()
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.save_optimizer(optimizer, {parameter: name for name, parameter in parameters.items()}, folder / "optimizer.safetensors")


def optimizer_of() -> tuple[dict[str, torch.Tensor], torch.optim.AdamW]:
    parameters = {"bridge.weight": torch.nn.Parameter(torch.zeros(4, 3)), "bridge.bias": torch.nn.Parameter(torch.zeros(4))}
    return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)


# ---- reading and judging ---------------------------------------------------------------------------------


def stored(path: Path) -> dict[str, np.ndarray]:
    """The fp32 tensors of a safetensors file, by its format's description and nothing of ours."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], dtype="<f4").reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    }


def check_equal(found: dict[str, torch.Tensor], path: Path) -> None:
    """Tensors are the fp32 ones of a file, those that it keeps in another type aside."""
    expected = stored(path)
    for name, tensor in found.items():
        assert name not in expected or np.array_equal(tensor.detach().numpy(), expected[name]), f"{name} is not that of {path.name}"


@torch.no_grad()
def check_usable(model: Captioner, tokenizer: Tokenizer, transform: ImageTransform) -> None:
    """Every number is finite fp32, and a picture goes through to text."""
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all(), f"{name} is {tensor.dtype} or not finite"
    assert len(tokenizer) <= model.text.config.vocab_size
    pixels = transform(Image.new("RGB", (20, 30), "red"))[None]
    assert pixels.shape == (1, 3, model.vision.image_size, model.vision.image_size), f"images of {list(pixels.shape)}"
    assert pixels.isfinite().all(), "pixels are not finite"
    memory = model.encode(pixels)
    logits = model.decoder_logits(memory, torch.tensor([[5, 6, 1]]))
    assert logits.shape == (1, 3, model.text.config.vocab_size)
    tokenizer.decode(logits.argmax(-1))


def read_run(folder: Path) -> None:
    """A run directory, as evaluate.py opens it."""
    config = checkpoint.read_config(folder)
    assert isinstance(config["settings"]["data"], str), "settings.data is no text"
    model, tokenizer, transform = checkpoint.load(folder)
    check_usable(model, tokenizer, transform)
    check_equal(dict(model.bridge.named_parameters()), folder / "bridge.safetensors")
    facts = config["model"]
    assert checkpoint.parts_of(model) == {key: facts[key] for key in ("lora", "adapters", "prompt")}
    assert list(lora.get_stack(model)) == facts["stack"] and transform.image_size == facts["vision"]["image_size"]
    if (folder / "vision.safetensors").is_file():
        check_equal(checkpoint.base_state(model.vision), folder / "vision.safetensors")


def read_settings(folder: Path) -> None:
    """The settings of a run that is gone on with; each has the type of its default, where it has one."""
    settings = train.resolve(["--resume", str(folder)])
    for name, default in vars(train.Settings()).items():
        value = getattr(settings, name)
        assert default is None or name in ("lora_rank", "given") or type(value) in (type(default), *([int] if type(default) is float else [])), f"{name} is {value!r}"
        assert not isinstance(value, float) or abs(value) < 1e31, f"{name} is {value}"


def read_checkpoint(folder: Path) -> None:
    """The newest checkpoint, as a resume takes it up, and the files at the top of the run."""
    check_usable(*checkpoint.load(folder))
    saved = checkpoint_store.newest(folder, lambda line: None)
    check_usable(*checkpoint.load(folder, checkpoint="last"))
    state = TrainState.of(saved)
    assert type(state.step) is int and state.metrics_bytes >= 0 and all(isinstance(loss, (int, float)) for loss in state.losses)
    read_moments(saved.path)
    good = folder.parent / "good" / "checkpoints"
    for path in saved.path.rglob("*.safetensors"):
        assert path.read_bytes() == (good / path.relative_to(saved.path.parent)).read_bytes(), f"{path.name} is damaged, and its checkpoint counts as whole"


def read_bundle(folder: Path) -> None:
    checkpoint.read_config(folder / "run.safetensors")
    check_usable(*checkpoint.load(folder / "run.safetensors"))


def read_clip_folder(folder: Path) -> None:
    for place in ("hugging face/vision", "open clip"):
        tower = build_vision(f"ViT-Fuzzed:{folder / place}")
        pixels = tower.transform(Image.new("RGB", (20, 30), "red"))[None]
        with torch.no_grad():
            tokens = tower.module(pixels)
        assert pixels.isfinite().all() and tokens.shape == (1, 5, 16)


def read_added(folder: Path) -> None:
    """An adapter of any kind onto bare backbones; where it is refused, the model is as it was."""
    model = copy.deepcopy(bare("ViT-Fuzzed"))
    try:
        checkpoint.load_adapter(model, folder, NO_HASHES)
    except UserError:
        before = bare("ViT-Fuzzed").state_dict()
        assert model.state_dict().keys() == before.keys(), "refused, and half of it is in the model"
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "refused, and the weights have changed"
        raise
    check_usable(model, vocabulary(), ImageTransform(16))
    added = lora.adapter_parameters(model)
    assert added, "loaded, and nothing was added"
    expected = stored(folder / "adapter_model.safetensors").values()
    for name, parameter in added.items() if not lora.prompts(model) else ():
        kept = any(np.array_equal(parameter.detach().numpy(), tensor) for tensor in expected)
        assert kept or len(expected) < len(added), f"{name} is in no tensor of the file"


def read_rows(folder: Path) -> None:
    rows = readers.read(folder, "train")
    assert rows and len({row.id for row in rows}) == len(rows)
    inside = os.path.realpath(folder) + os.sep
    for row in rows:
        assert os.path.realpath(row.image.path).startswith(inside), f"{row.id!r} leads to {row.image.path}"
        assert row.captions and all(caption.strip() and caption.encode("utf-8") for caption in row.captions)
        try:
            assert row.image.open().mode == "RGB" and len(row.image.fingerprint()) == 64
        except BadImage as error:
            assert "\n" not in str(error)


def read_pictures(folder: Path) -> None:
    bad = None
    for name in PICTURES:
        try:
            image = FileImage(folder / name).open()
            assert image.mode == "RGB" and np.asarray(image).ndim == 3
        except BadImage as error:
            bad = error
    if bad is not None:
        raise bad


def read_moments(folder: Path) -> None:
    parameters, optimizer = optimizer_of()
    checkpoint.load_optimizer(optimizer, parameters, folder / "optimizer.safetensors")
    expected = stored(folder / "optimizer.safetensors")
    for name, parameter in parameters.items():
        moments = optimizer.state[parameter]
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}, f"{name} has {sorted(moments)}"
        for key, value in moments.items():
            shape = () if key == "step" else parameter.shape
            assert value.shape == shape and value.dtype == torch.float32 and value.isfinite().all(), f"{name}/{key} is {value}"
            assert np.array_equal(value.numpy(), expected[f"{name}/{key}"])
        assert moments["step"] >= 0 and (moments["exp_avg_sq"] >= 0).all(), f"{name} has negative moments"
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def write_added(folder: Path, kind: str) -> None:
    """One adapter alone, in the folder itself."""
    model = with_parts(bare("ViT-Fuzzed"), (kind,))
    if kind == "lora":
        lora.save_peft(model, folder, checkpoint.to_donor_name, "t5", under="text.", metadata={"base_sha256": "0" * 64})
    elif kind == "adapters":
        lora.save_adapter(model, "caption", folder)
    else:
        lora.save_prompt(model, folder)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
INPUTS = {
    one.name: one
    for one in (
        Input("metadata.jsonl", write_images, ("train/metadata.jsonl",), read_rows, (DataError,)),
        Input("images", write_pictures, PICTURES, read_pictures, (BadImage,)),
        Input("config.json", write_run, ("config.json",), read_run, (UserError,)),
        Input("settings", write_settings, ("config.json",), read_settings, (UserError,)),
        Input("LoRA", functools.partial(write_added, kind="lora"), ADAPTER_FILES, read_added, (UserError,)),
        Input("bottleneck adapter", functools.partial(write_added, kind="adapters"), ADAPTER_FILES, read_added, (UserError,)),
        Input("soft prompt", functools.partial(write_added, kind="prompt"), ADAPTER_FILES, read_added, (UserError,)),
        Input("bridge.safetensors", functools.partial(write_run, kinds=()), ("bridge.safetensors",), read_run, (UserError,)),
        Input("vision.safetensors", functools.partial(write_run, vision="ViT-Fuzzed-Scaled", kinds=()), ("vision.safetensors", "config.json"), read_run, (UserError,)),
        Input("vision/", functools.partial(write_run, kinds=()), ("vision/model.safetensors", "vision/config.json"), read_run, (UserError,)),
        Input("text/", functools.partial(write_run, kinds=()), ("text/model.safetensors", "text/config.json", "text/spiece.model"), read_run, (UserError,)),
        Input("shards", write_shards, ("text/model.safetensors.index.json", "text/model-00001-of-00002.safetensors", "text/config.json"), read_run, (UserError,)),
        Input(
            "CLIP folder", write_clip_folder,
            (
                "hugging face/vision/model.safetensors", "hugging face/vision/preprocessor_config.json", "hugging face/vision/config.json",
                "open clip/open_clip_model.safetensors", "open clip/open_clip_config.json",
            ),
            read_clip_folder, (UserError,),
        ),
        Input("optimizer.safetensors", write_moments, ("optimizer.safetensors",), read_moments, (UserError,)),
        Input(
            "checkpoint", write_checkpoint,
            tuple(f"checkpoints/{name}" for name in ("step-00000003/complete.json", "step-00000003/bridge.safetensors", "publishing.json")),
            read_checkpoint, (UserError,),
        ),
        Input("bundle", write_bundle, ("run.safetensors",), read_bundle, (UserError,)),
    )
}  # fmt: skip
