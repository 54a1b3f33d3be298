"""Seconds from the start of a process to the end of its first training step, at the size of `--preset base`.

    python scripts/bench/cold_start.py [--starts 3] [--threads N] [--compile-peer] [--json PATH|-]

Ours is `python train.py` as a user runs it, from local files of ViT-B/16 and Flan-T5-base with random weights and a folder of JPEG files, until the line of
step 1 stands in its metrics.jsonl: reading and checking weights, the evaluation before the first step and its checkpoint included. X1 has an absolute
limit, so its "peer" is the limit of 15 s; X1-peft is a script of transformers + peft that does no more than a first step, and with --compile-peer the same
under torch.compile, which takes minutes. Files are in the page cache. CPU seconds stand beside the wall seconds, for a machine that is not idle.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import common

LIMIT = 15.0
IMAGES, VAL_IMAGES = 16, 4
PATIENCE = 600
VISION = "ViT-B-16-quickgelu"
IDS = ("X1", "X1-peft")
PACKAGES = ("torch", "transformers", "peft")


def write_files(folder: Path) -> None:
    """Under folder: data/, and the backbones as transformers saves them, vision/ and text/."""
    import torch
    from safetensors.torch import save_file

    from captioner import clip_hf
    from captioner.t5 import T5, T5Config
    from captioner.tokenizer import train_tokenizer
    from captioner.vit import VisionConfig, VisionTransformer
    from captioner.weights import clip_to_hf, t5_to_hf

    common.write_photographs(folder / "data", IMAGES)
    common.write_photographs(folder / "data", VAL_IMAGES, "val")
    vision, text = VisionConfig.from_name(VISION), T5Config.from_name("flan-t5-base")
    for name, values, state in (
        ("vision", clip_hf.clip_config_to_hf(vision), clip_to_hf(VisionTransformer(vision), vision)),
        ("text", t5_values(text), t5_to_hf(T5(text).state_dict(), text)),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values), encoding="utf-8")
        save_file({key: tensor.detach().to(torch.float32).contiguous() for key, tensor in state.items()}, folder / name / "model.safetensors", {"format": "pt"})
    lines = (folder / "data" / "train" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    train_tokenizer([caption for line in lines for caption in json.loads(line)["captions"]], folder / "text" / "spiece.model", 300)


def t5_values(config) -> dict:
    """config.json of a T5 with an untied head, as transformers reads it."""
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "feed_forward_proj", "dropout_rate")
    values = {name: getattr(config, name) for name in names}
    return values | {"model_type": "t5", "tie_word_embeddings": False, "decoder_start_token_id": config.decoder_start_token_id}


def start_ours(folder: Path, threads: int | None) -> tuple[float, float]:
    """Wall seconds until train.py has done its first step, and the CPU seconds that it took."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [
        sys.executable, str(common.REPOSITORY / "train.py"), "--preset", "base", "--vision", f"{VISION}:{folder / 'vision'}", "--text", str(folder / "text"),
        "--data", str(folder / "data"), "--batch-size", "8", "--max-steps", "2", "--eval-every", "2", "--log-every", "1", "--output", str(run),
        *(["--threads", str(threads)] if threads else []),
    ]  # fmt: skip
    start, before = time.perf_counter(), cpu_seconds_of_children()
    with open(folder / "ours.log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            while not trained(run / "metrics.jsonl"):
                if process.poll() or time.perf_counter() - start > PATIENCE:
                    log.seek(0)
                    raise RuntimeError(f"train.py did not come to its first step: {(log.read().strip().splitlines() or ['no output'])[-1]}")
                time.sleep(0.02)
            seconds = time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
    return seconds, cpu_seconds_of_children() - before


def cpu_seconds_of_children() -> float:
    """CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def trained(metrics: Path) -> bool:
    """Whether the first step stands in the file."""
    return metrics.is_file() and '"split": "train"' in metrics.read_text(encoding="utf-8")


def start_peer(folder: Path, threads: int | None, compiled: bool) -> tuple[float, float]:
    """Wall seconds and CPU seconds of a process of `peer_step`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--peer-step", str(folder), *(["--compile-peer"] if compiled else [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    start, before = time.perf_counter(), cpu_seconds_of_children()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the peer did not come to its first step: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return seconds, cpu_seconds_of_children() - before


def peer_step(folder: Path, compiled: bool) -> None:
    """The first training step of transformers + peft in bf16 from the same files: CLIP in the step, LoRA on the decoder, no evaluation."""
    import torch
    from peft import LoraConfig, get_peft_model
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionModel, T5ForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vision = CLIPVisionModel.from_pretrained(folder / "vision", dtype=torch.bfloat16).to(device)
    text = T5ForConditionalGeneration.from_pretrained(folder / "text", dtype=torch.bfloat16).to(device)
    settings = LoraConfig(r=8, lora_dropout=0.1, use_rslora=True, target_modules=r"decoder\..*\.(q|k|v|o|wi_0|wi_1|wo)", task_type="SEQ_2_SEQ_LM")
    text = get_peft_model(text, settings).train()
    bridge = torch.nn.Linear(768, 768, dtype=torch.bfloat16, device=device)
    parameters = [*bridge.parameters(), *(parameter for parameter in text.parameters() if parameter.requires_grad)]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, fused=True)
    step = torch.compile(text) if compiled else text
    images = [Image.open(folder / "data" / "train" / f"{index}.jpg").convert("RGB") for index in range(8)]
    pixels = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"].to(device, torch.bfloat16)
    labels = torch.randint(2, 300, (8, 14), device=device)
    with torch.no_grad():
        tokens = vision(pixels).last_hidden_state
    loss = step(encoder_outputs=BaseModelOutput(bridge(tokens)), labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    loss.item()


def run(starts: int = 3, only: Collection[str] | None = None, threads: int | None = None, compiled: bool = False) -> list[dict]:
    """The rows named, or both; the two sides' processes alternate."""
    from captioner.runtime import choose_device, choose_precision

    only = IDS if only is None else only
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        for _ in range(starts):
            ours.append(start_ours(folder, threads))
            if "X1-peft" in only:
                theirs.append(start_peer(folder, threads, compiled))
    wall, cpu = zip(*ours)
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    facts = {"device": device.type, "threads": threads, "clock": "wall seconds", "our_cpu_seconds": min(cpu)}
    rows = []
    if "X1" in only:
        what = "from the start of train.py to the end of step 1, base"
        limit = dict(theirs=[LIMIT] * len(wall), peer="limit", peer_version=f"{LIMIT:g} s")
        rows.append(common.row("X1", what, ours=wall, **limit, must=1.0, dtype=precision, **facts))
    if "X1-peft" in only:
        what = f"the same; theirs without evaluation{', compiled' if compiled else ''}"
        their_wall, their_cpu = zip(*theirs)
        facts["peer_cpu_seconds"] = min(their_cpu)
        rows.append(common.row("X1-peft", what, ours=wall, theirs=their_wall, peer="peft", must=None, dtype=f"{precision} vs bf16", **facts))
    return rows


def main() -> int:
    parser = common.argument_parser(__doc__.split("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="ID,ID", help=f"rows, of {', '.join(IDS)}")
    parser.add_argument("--starts", type=int, default=3, metavar="N", help="processes of each side (default 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch on both sides")
    parser.add_argument("--compile-peer", action="store_true", help="the peer under torch.compile")
    parser.add_argument("--peer-step", type=Path, metavar="DIR", help="do the peer's first step from the files of DIR")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(IDS):
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(IDS)}")
    if arguments.peer_step:
        peer_step(arguments.peer_step, arguments.compile_peer)
        return 0
    rows = run(arguments.starts, arguments.only, arguments.threads, arguments.compile_peer)
    common.report(rows, arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
