"""A trained run in other people's formats, with a certificate that what was written computes what the run does.

| format | what is written                                                                                        |
| ------ | ------------------------------------------------------------------------------------------------------ |
| peft   | LoRA and soft prompt as `peft` loads them; backbones that live elsewhere are named, as in the run      |
| merged | LoRA folded into the weights, both backbones as directories that `transformers` loads                  |
| bundle | everything as one safetensors file (captioner/bundle.py)                                               |

All of them load by `captioner.load`. What was written is read back by it and captions eight drawn scenes; its logits are compared with the run's.
"""

import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import lora
from captioner import bundle, checkpoint, checkpoint_store, generate
from captioner.demo import TEXTS
from captioner.errors import UsageError, UserError
from captioner.files import write_json, write_text
from captioner.model import Captioner
from captioner.runtime import versions
from captioner.tokenizer import Tokenizer
from data import scenes
from data.transforms import ImageTransform

FORMATS = ("peft", "merged", "bundle")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_IMAGES, PROBE_TOKENS = 8, 20
CERTIFICATE = "certificate.json"


class Difference(NamedTuple):
    """Differences of logits in standard deviations of the logits."""

    largest: float
    mean: float


# A trained demo run merged: 3e-6 and 4e-7 in fp32, 0.016 and 0.001 in bf16; with LoRA's scale wrong by a tenth 0.3 and 0.045. Random weights without any
# training, which magnify rounding most: 2e-4 and 2e-6, 0.4 and 0.017.
TOLERANCE = {"fp32": Difference(1e-3, 1e-5), "bf16": Difference(1.0, 0.03)}


class Probe(NamedTuple):
    """What a captioner says about the probe images."""

    ids: Tensor  # (B, T) greedy captions, the start token first
    captions: list[str]
    logits: Tensor  # (L, V) at the L tokens of the captions that were asked for


class Exported(NamedTuple):
    """One finished export."""

    output: Path
    certificate: dict
    certificate_path: Path


def export(
    run: str | Path,
    format: str,
    output: str | Path | None = None,
    *,
    dtype: str = "fp32",
    fold_rslora: bool = False,
    dequantize: bool = False,
    checkpoint_name: str | None = None,
    stack: Sequence[str] | None = None,
) -> Exported:
    """Write a run (a directory, or a bundle) in a format of FORMATS to output, which must not exist, and certify it.

    output: RUN/exports/FORMAT unless given, a bundle's RUN/exports/NAME.safetensors. dtype: of bridge and backbones in the files, a key of DTYPES; what
    was added to the backbones stays fp32. fold_rslora (peft): write alpha * sqrt(rank) with `use_rslora` false. dequantize (merged): merge into the
    dequantised weights of a 4-bit base. checkpoint_name, stack: as `checkpoint` and `stack` of `captioner.load`.
    Raises UserError, and leaves nothing behind, where output exists, the run has nothing for the format or a 4-bit base to merge into, the disk is full,
    or what was written gives other logits than the run beyond TOLERANCE or, in fp32, another greedy caption.
    """
    run = Path(run)
    output = default_output(run, format) if output is None else Path(output)
    certificate_path = output.with_name(f"{output.stem}.certificate.json") if format == "bundle" else output / CERTIFICATE
    config = checkpoint.read_config(run)
    check(run, config["model"], format, output, certificate_path, dtype, fold_rslora, dequantize)
    model, tokenizer, transform = checkpoint.load(run, checkpoint=checkpoint_name, stack=stack)
    expected = look(model, tokenizer, transform)
    facts = prepare(model, config["model"], format, dtype, dequantize)
    with staged(output) as folder:
        written = folder / "run" if format == "bundle" else folder / output.name
        checkpoint.save_weights(model, tokenizer, facts, written, DTYPES[dtype], fold_rslora)
        write_json(written / "config.json", config | {"model": facts})
        if format == "bundle":
            bundle.pack(written, folder / output.name)
            written = folder / output.name
        else:
            write_text(written / "README.md", readme(model, facts, format, fold_rslora))
        del model
        found = look(*checkpoint.load(written), ids=expected.ids)
        comparison = compare(expected, found, dtype)
        if comparison["failure"]:
            raise UserError(f"{output}: not exported: {comparison['failure']}")
        certificate = {
            "format": format, "dtype": dtype, "run": run.resolve().name, "checkpoint": checkpoint_name, "stack": facts["stack"],
            "fold_rslora": fold_rslora, "dequantized": dequantize,
            **{key: value for key, value in comparison.items() if key != "failure"}, "files": digests(written), "versions": versions(),
        }  # fmt: skip
        if format == "bundle":
            write_json(folder / certificate_path.name, certificate)
            (folder / certificate_path.name).rename(certificate_path)
        else:
            write_json(written / CERTIFICATE, certificate)
        written.rename(output)
    return Exported(output, certificate, certificate_path)


def default_output(run: Path, format: str) -> Path:
    """Where an export goes unless told: inside a run directory, beside a bundle."""
    if bundle.is_bundle(run):
        return run.with_name(f"{run.stem}-{format}" + (bundle.SUFFIX if format == "bundle" else ""))
    return run / "exports" / (f"{run.resolve().name}{bundle.SUFFIX}" if format == "bundle" else format)


def check(run: Path, facts: dict, format: str, output: Path, certificate_path: Path, dtype: str, fold_rslora: bool, dequantize: bool) -> None:
    """Refuse, before anything is loaded, what cannot be exported so."""
    for what, value, choices in (("format", format, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in choices:
            raise UsageError(f"unknown {what} {value!r}: one of {', '.join(choices)}")
    if fold_rslora and format != "peft":
        raise UsageError("--fold-rslora is for --format peft: the others are read by programs that know its scaling, or have no LoRA left")
    if dequantize and format != "merged":
        raise UsageError("--dequantize is for --format merged: the others keep the base in 4 bits")
    if format == "bundle" and output.suffix != bundle.SUFFIX:
        raise UsageError(f"--output {output}: a bundle is a file whose name ends in {bundle.SUFFIX}")
    for path in (output, certificate_path):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} is there already: choose another --output")
    if format == "peft" and not facts["lora"] and not facts["prompt"]:
        raise UserError(f"{run}: it has neither LoRA nor a soft prompt, so there is nothing for PEFT to load: --format merged or bundle writes the rest")
    if fold_rslora and not facts["lora"]:
        raise UsageError(f"--fold-rslora: {run} has no LoRA")
    if dequantize and not facts["base_bits"]:
        raise UsageError(f"--dequantize: the base of {run} is not in 4 bits")
    if format == "merged" and facts["base_bits"] and not dequantize:
        raise UserError(
            f"{run}: LoRA is not merged into a base in 4 bits, where rounding to 16 levels loses most of a small update: --dequantize merges in full precision "
            "into the dequantised weights, --format peft or bundle keeps LoRA beside the base"
        )


def prepare(model: Captioner, facts: dict, format: str, dtype: str, dequantize: bool) -> dict:
    """Make a loaded run what the format holds, in place; the facts of its config.json."""
    facts = copy.deepcopy(facts) | {"stack": list(lora.get_stack(model))}
    with checkpoint.translated():
        if dequantize:
            lora.dequantize_base(model)
            facts["base_bits"] = None
        if format == "merged":
            lora.merge_lora(model, remove=True)
            facts["lora"] = []
    if format != "peft":
        facts["vision"]["embedded"] = facts["text"]["embedded"] = True
    checkpoint.stamp(model, facts, dtype=DTYPES[dtype])
    return facts


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A hidden folder beside output; at the end, however it comes, the folder and those made for it that are empty are gone."""
    made = [parent for parent in output.parents if not parent.exists()]
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


@torch.inference_mode()
def look(model: Captioner, tokenizer: Tokenizer, transform: ImageTransform, ids: Tensor | None = None) -> Probe:
    """Greedy captions of the probe images, and logits along the captions ids (B, T), its own unless given."""
    pixels = torch.stack([transform(row.image.open()) for row in scenes.split("val", PROBE_IMAGES)])  # (B, 3, H, W)
    memory = model.encode(pixels)
    own = generate.greedy(model, memory, max_new_tokens=PROBE_TOKENS)
    labels = (own if ids is None else ids)[:, 1:]
    ended = (labels == tokenizer.eos_id).int()
    kept = ended.cumsum(1) - ended == 0  # up to and with the first eos
    logits = model.decoder_logits(memory, labels.masked_fill(~kept, -100))
    return Probe(own, tokenizer.decode(own), logits[kept].float())


def compare(expected: Probe, found: Probe, dtype: str) -> dict:
    """The figures of a certificate; `failure` is None or what is beyond tolerance."""
    differences, spread = (found.logits - expected.logits).abs(), expected.logits.std()
    largest, mean = differences.max(), differences.mean()
    relative, allowed = Difference((largest / spread).item(), (mean / spread).item()), TOLERANCE[dtype]
    names = [row.id for row in scenes.split("val", PROBE_IMAGES)]
    captions = [{"image": name, "run": a, "export": b} for name, a, b in zip(names, expected.captions, found.captions, strict=True)]
    changed = sum(caption["run"] != caption["export"] for caption in captions)
    same = changed == 0 and torch.equal(expected.ids, found.ids)
    # Written so that a difference that is not a number fails.
    within = relative.largest <= allowed.largest and relative.mean <= allowed.mean
    failure = None
    if not within or not (same or dtype != "fp32"):
        failure = (
            f"read back, its logits differ from the run's by up to {relative.largest:.2g} and on average {relative.mean:.2g} of their standard deviation, "
            f"where {dtype} may by {allowed.largest:g} and {allowed.mean:g}; {changed} of {len(captions)} greedy captions are others"
        )
    return {
        "logits": {
            "largest_difference": largest.item(), "mean_difference": mean.item(), "standard_deviation": spread.item(), "count": differences.numel(),
            "relative": relative._asdict(), "tolerance": allowed._asdict(),
        },
        "same_captions": same, "captions": captions, "failure": failure,
    }  # fmt: skip


def digests(written: Path) -> dict[str, dict]:
    """Bytes and SHA-256 of every file, by its name in the export."""
    found = {}
    for file in checkpoint_store.files_of(written):
        name = file.name if file == written else file.relative_to(written).as_posix()
        found[name] = checkpoint_store.describe(file)
    return found


def readme(model: Captioner, facts: dict, format: str, fold_rslora: bool) -> str:
    """README.md of a directory: what each file loads onto, with which calls."""
    vision, text = facts["vision"], facts["text"]
    vision_name = ":".join(part for part in (vision["name"], vision["weights"]) if part)
    has_hf_vision = checkpoint.hf_vision_config(model.vision) is not None
    lines = [
        f"# An exported captioner ({format})",
        "",
        f"Image encoder {vision_name}, decoder {text['name']}. `captioner.load` of the program that wrote it, and its commands, take this directory as a run.",
        "The parts for other programs are below. The bridge between the two models is not theirs, so PEFT or transformers alone have the decoder only, which",
        "needs the bridge's output as its memory. `certificate.json` says how far the files, read back, are from the run.",
        "",
        "| file | what it is | loads by |",
        "| --- | --- | --- |",
        '| bridge.safetensors | linear map from image tokens to the decoder\'s memory | `safetensors.torch.load_file`: "weight" (D, D_vision), "bias"'
        + (' and "view_embedding" (views, D), added to all tokens of a view' if model.views else "")
        + " |",
    ]
    if text["embedded"]:
        calls = '`transformers.T5ForConditionalGeneration.from_pretrained("text")`, `T5Tokenizer.from_pretrained("text")`'
        lines.append(f"| text/ | the T5 and its vocabulary | {calls} |")
    if vision["embedded"] and has_hf_vision:
        lines.append('| vision/ | the image encoder; its pooled output means nothing | `transformers.CLIPVisionModel.from_pretrained("vision")` |')
    elif vision["embedded"]:
        lines.append("| vision.safetensors | the image encoder, which Hugging Face's CLIPVisionModel cannot express | `captioner.load` only |")
    if checkpoint.TEXT_PLACES & set(facts["lora"]):
        lines.append('| adapter/ | LoRA of the T5 | `peft.PeftModel.from_pretrained(t5, "adapter")` |')
    if "vision" in facts["lora"]:
        onto = "CLIPVisionModel" if has_hf_vision else "timm model, as the attribute `trunk` of a module"
        lines.append(f'| adapter/vision/ | LoRA of the image encoder | `peft.PeftModel.from_pretrained(vision, "adapter/vision")` onto its {onto} |')
    if facts["prompt"]:
        kind = "with `task_ids` of zeros, `labels`, and some `input_ids` that nothing reads beside `encoder_outputs`" if "decoder" in facts["prompt"] else "with the prompt's tokens as input of the encoder"
        lines.append(f'| prompt/ | soft prompt of the {" and ".join(facts["prompt"])} | `peft.PeftModel.from_pretrained(t5, "prompt")`, called {kind} |')
    lines += [f"| adapters/{name}/ | bottleneck adapter{'' if name in facts['stack'] else ', off'} | `captioner.load` only |" for name in facts["adapters"]]
    notes = []
    if fold_rslora:
        notes.append("LoRA is written with alpha * sqrt(rank) and `use_rslora` false: the same scaling for runtimes that know only alpha / rank.")
    if facts["lora"] and facts["base_bits"]:
        notes.append("LoRA was trained beside a base in 4 bits (NF4); beside the plain weights it gives slightly other logits.")
    if format == "merged" and (facts["adapters"] or facts["prompt"]):
        notes.append("Bottleneck adapters and soft prompts are not linear updates of weights and cannot be merged: they stand beside the merged models.")
    lines += [line for note in notes for line in ("", note)]
    return "\n".join([*lines, "", *recipe(facts, has_hf_vision), ""])


def recipe(facts: dict, has_hf_vision: bool) -> list[str]:
    """Lines of README.md: code that captions an image without this program, where that can be."""
    vision, text = facts["vision"], facts["text"]
    if not has_hf_vision or facts["adapters"] or facts["prompt"] or "views" in vision["transform"]:
        return ["Only `captioner.load` puts this captioner together: it has parts that the other programs do not know."]
    from_vision = '"vision"' if vision["embedded"] else f"...  # {vision['name']}:{vision['weights']} in Hugging Face's form"
    # The embedded demo T5 is no repository; transformers 5 would keep bf16 files in bf16.
    from_text = '"text"' if text["embedded"] else f"...  # {text['name']}, a directory of this program" if text["name"] in TEXTS else repr(text["name"])
    has_lora = bool(facts["lora"])
    lines = [
        "Pixels are resized and normalised as config.json says under model.vision.transform.",
        "",
        "```python",
        "import torch",
        "from safetensors.torch import load_file",
        "from transformers import CLIPVisionModel, T5ForConditionalGeneration",
        "from transformers.modeling_outputs import BaseModelOutput",
        *(["from peft import PeftModel"] if has_lora else []),
        "",
        f"vision = CLIPVisionModel.from_pretrained({from_vision}, dtype=torch.float32)" if vision["embedded"] else f"vision = {from_vision}",
        f"t5 = {from_text}" if from_text.startswith("...") else f"t5 = T5ForConditionalGeneration.from_pretrained({from_text}, dtype=torch.float32)",
        *(['vision = PeftModel.from_pretrained(vision, "adapter/vision")'] if "vision" in facts["lora"] else []),
        *(['t5 = PeftModel.from_pretrained(t5, "adapter")'] if checkpoint.TEXT_PLACES & set(facts["lora"]) else []),
        'bridge = load_file("bridge.safetensors")',
        "tokens = vision(pixel_values=pixel_values).last_hidden_state  # (B, N, D_vision)",
        'memory = tokens.float() @ bridge["weight"].float().T + bridge["bias"].float()  # (B, N, D)',
        "ids = t5.generate(encoder_outputs=BaseModelOutput(memory), max_new_tokens=20, do_sample=False)",
        "```",
    ]
    return lines
