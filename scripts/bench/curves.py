"""Cost curves: seconds and memory of a training step against batch, caption length and rank, and of decoding against the number of beams.

    python scripts/bench/curves.py [--repeats 3] [--threads N] [--json PATH|-] [--plot PATH]

The sizes are those of train_step.py and decode.py; all but the one that varies stay at B=8 images, T=20 tokens, rank 8. Ours trains as train.py does,
in bf16 where the processor has matrix instructions for it, else in fp32; theirs (transformers + peft) has all its weights in that dtype. Beams are those of
one image and 20 tokens. Seconds are the least of `repeats` after a warm-up; memory is what the process, or the GPU, needs at its peak above what it held
before. Nothing is compared here: train_step.py and decode.py do that.
"""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import common
import decode
import torch
import train_step
from torch import nn

from captioner import generate
from captioner.runtime import PeakMemory, choose_precision, process_memory
from captioner.t5 import T5Config

SIZE = "flan-t5-base"
BATCH, TOKENS, RANK = 8, 20, 8
# What varies, its values, and whether the peer is measured there too.
CURVES = {
    "batch": ("images in a step", (2, 4, 8, 16, 32), True),
    "length": ("tokens of a caption", (8, 16, 32, 64), True),
    "rank": ("rank of LoRA", (1, 4, 16, 64), False),
    "beams": ("beams", (1, 2, 4, 10), True),
}
COLOURS = {"ours": "#1f5fa8", "peer": "#c4622d"}
PACKAGES = ("torch", "transformers", "peft")


def train_sides(rank: int, with_peer: bool, precision: str, device: torch.device) -> dict[str, tuple[Callable, list[nn.Parameter]]]:
    """Loss and trained parameters by side, in training mode."""
    torch.manual_seed(0)
    model, trainable = train_step.build_ours(SIZE, rank)
    sides = {}
    if with_peer:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        peer = train_step.build_peer(model).to(device, dtype).train()
        sides["peer"] = (train_step.peer_loss(peer, dtype), [parameter for parameter in peer.parameters() if parameter.requires_grad])
    model.to(device).train()
    train_step.prepare(model, trainable, precision)
    return {"ours": (train_step.our_loss(model, precision), list(trainable.values())), **sides}


def train_point(side: tuple[Callable, list[nn.Parameter]], images: int, tokens: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds and bytes of a step of `images` images and captions of `tokens` tokens."""
    config = T5Config.from_name(SIZE)
    features = torch.randn(images, train_step.IMAGE_TOKENS, config.d_model, device=device)
    labels = torch.randint(2, config.vocab_size, (images, tokens), device=device)
    return cost(train_step.make_step(*side, features, labels), device, repeats)


def decode_sides(precision: str, device: torch.device) -> dict[str, Callable[[int], Callable[[], object]]]:
    """By side: number of beams → a function that decodes one image."""
    model = decode.build_ours()
    peer = decode.build_peer(model).to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    model = SimpleNamespace(text=model.text.to(device))
    memory = torch.randn(1, decode.IMAGE_TOKENS, model.text.config.d_model, device=device)

    def ours(beams: int) -> Callable[[], object]:
        generate.prepare_for_decoding(model, rows=beams, precision=precision)
        return lambda: generate.beam_search(model, memory, num_beams=beams, max_new_tokens=decode.NEW_TOKENS)

    def theirs(beams: int) -> Callable[[], object]:
        from transformers.modeling_outputs import BaseModelOutput

        options = dict(attention_mask=torch.ones(memory.shape[:2], dtype=torch.long, device=device), max_new_tokens=decode.NEW_TOKENS, do_sample=False)
        return lambda: peer.generate(encoder_outputs=BaseModelOutput(memory.to(peer.dtype)), num_beams=beams, **options)

    return {"ours": ours, "peer": theirs}


def cost(work: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds, CPU seconds where there is one thread, and bytes that `work` needs above what is held before it."""
    on_gpu = device.type == "cuda"
    clock = time.process_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter
    work()
    gc.collect()
    if not on_gpu:
        ctypes.CDLL(None).malloc_trim(0)
    peak, before = PeakMemory(device), torch.cuda.memory_allocated() if on_gpu else process_memory("VmRSS")
    seconds = []
    for _ in range(repeats):
        start = clock()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return {"seconds": min(seconds), "bytes": peak.bytes() - before}


def run(repeats: int = 3) -> dict[str, dict]:
    """By curve: `values` of what varies, and for each side `seconds` and `bytes` of each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision("auto", device)
    facts = {"precision": precision, "device": device.type, "threads": torch.get_num_threads()}
    curves = {name: {"x": label, "values": list(values), **facts} for name, (label, values, _) in CURVES.items()}
    for name, (_, values, with_peer) in CURVES.items():
        sides = decode_sides(precision, device) if name == "beams" else None if name == "rank" else train_sides(RANK, with_peer, precision, device)
        points: dict[str, list[dict]] = {}
        for value in values:
            at = train_sides(value, False, precision, device) if name == "rank" else sides
            for side, part in at.items():
                if name == "beams":
                    point = cost(part(value), device, repeats)
                else:
                    point = train_point(part, value if name == "batch" else BATCH, value if name == "length" else TOKENS, device, repeats)
                points.setdefault(side, []).append(point)
        curves[name] |= {side: {unit: [point[unit] for point in of_side] for unit in ("seconds", "bytes")} for side, of_side in points.items()}
    return curves


def plot(curves: dict[str, dict], path: Path) -> None:
    """A PNG of two rows, seconds and memory, and a column for each curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(curves), 6), layout="constrained")
    for column, (name, curve) in enumerate(curves.items()):
        for row, (unit, scale, label) in enumerate((("seconds", 1, "seconds"), ("bytes", 1e6, "peak memory, MB"))):
            axes = figure.add_subplot(2, len(curves), row * len(curves) + column + 1)
            for side in (side for side in COLOURS if side in curve):
                heights = [value / scale for value in curve[side][unit]]
                axes.plot(curve["values"], heights, color=COLOURS[side], marker="o", markersize=4, label={"ours": "ours", "peer": "transformers + peft"}[side])
            axes.set_xticks(curve["values"], [str(value) for value in curve["values"]], fontsize=8)
            axes.set_xlim(0, 1.03 * curve["values"][-1])
            axes.set_ylim(0, 1.08 * max(value / scale for side in COLOURS if side in curve for value in curve[side][unit]))
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel(curve["x"])
            if column == 0 or name == "beams":
                axes.set_ylabel(label)
            if row == 0:
                axes.set_title("decoding one image" if name == "beams" else f"training step: {name}", fontsize=10)
            if row == 0 and column == 0:
                axes.legend(frameon=False, fontsize=8)
    first = next(iter(curves.values()))
    figure.suptitle(f"{SIZE} decoder, {train_step.IMAGE_TOKENS} image tokens, {first['precision']}, {first['device']}; B={BATCH}, T={TOKENS}, rank {RANK} where not varied", fontsize=10)
    figure.savefig(path, format="png", dpi=120)


def main() -> int:
    parser = common.argument_parser(__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each point (default 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch; with 1, CPU seconds are measured")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="draw the curves as PNG")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    curves = run(arguments.repeats)
    for name, curve in curves.items():
        for side in (side for side in COLOURS if side in curve):
            print(f"{name:8}{side:6}" + "".join(f"  {x}: {s:.3f} s {b / 1e6:.0f} MB" for x, s, b in zip(curve["values"], *curve[side].values())), file=sys.stderr)
    if arguments.plot:
        plot(curves, arguments.plot)
    if arguments.json:
        text = json.dumps({"environment": common.environment(PACKAGES), "curves": curves}, indent=2) + "\n"
        sys.stdout.write(text) if arguments.json == "-" else Path(arguments.json).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    common.run_main(main)
