"""The image encoder against transformers' CLIPVisionModel and open_clip, ViT-B/16 with QuickGELU at 224 pixels.

    python scripts/bench/encoder.py [--only ID,ID] [--pairs 7] [--threads N] [--json PATH|-]

Random weights, the same on all sides, no gradients; ours is the frozen form (captioner/frozen_vit.py), which is what training and captioning use. Theirs
in bf16 is the whole model in bf16, which is faster than autocast. C6 is measured on the CPU at 16 and 4 images, E1 on a GPU at 256, where open_clip is
also compiled (torch.compile, max-autotune). The tokens of the last block are compared before anything is timed: equal in fp32, and in bf16 at most twice
as far from fp32 as theirs.
"""

import copy
import time
from collections.abc import Callable, Collection

import common
import torch
from torch import Tensor, nn

from captioner import clip_hf
from captioner.backbones import build_vision
from captioner.frozen_vit import prepare_frozen
from captioner.vit import VisionTransformer, clip_config
from captioner.weights import OPEN_CLIP_VIT, clip_to_hf, export

NAME = "ViT-B-16-quickgelu"
BATCHES, CUDA_BATCH = (16, 4), 256
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = {BF16: "bf16", FP32: "fp32"}
# Row: peer, our dtype, theirs, bar.
CPU_ROWS = {
    "C6-hf": ("transformers", BF16, FP32, 3.5),
    "C6-open-clip": ("open_clip_torch", BF16, BF16, 1.0),
    "C6-hf-bf16": ("transformers", BF16, BF16, None),
    "C6-hf-fp32": ("transformers", FP32, FP32, None),
}
CUDA_ROWS = {"E1-hf": ("transformers", BF16, BF16, 1.4), "E1-open-clip": ("open_clip_torch", BF16, BF16, None), "E1-open-clip-compiled": ("open_clip_torch", BF16, BF16, 1.1)}
CUDA_IDS = tuple(CUDA_ROWS)
IDS = (*(f"{id}-B{batch}" for batch in BATCHES for id in CPU_ROWS), *CUDA_IDS)
PACKAGES = ("torch", "transformers", "open_clip_torch")


class OpenClip(nn.Module):
    """open_clip's image tower without its pooling: pixels → tokens of its last block."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.tower.transformer(self.tower._embeds(pixel_values))


class HuggingFace(nn.Module):
    """transformers' CLIPVisionModel: pixels → tokens of its last block."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.tower(pixel_values).last_hidden_state


def build_peer(package: str, vision: VisionTransformer) -> nn.Module:
    """A peer in fp32 with the weights of our tower."""
    if package == "transformers":
        import transformers

        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**clip_hf.clip_config_to_hf(vision.config)))
        tower.load_state_dict(clip_to_hf(vision, vision.config))
        return HuggingFace(tower).eval().requires_grad_(False)
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    settings = clip_config(NAME)
    tower = _build_vision_tower(settings["embed_dim"], CLIPVisionCfg(**settings["vision_cfg"]), settings.get("quick_gelu", False))
    state = {name.removeprefix("visual."): tensor for name, tensor in export(vision, OPEN_CLIP_VIT).items()}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"proj", "ln_post.weight", "ln_post.bias"}:
        raise RuntimeError(f"the peer's weights do not fit: missing {missing}, unexpected {unexpected}")
    return OpenClip(tower).eval().requires_grad_(False)


def sides(device: torch.device, wanted: Collection[tuple[str, torch.dtype]]) -> dict[tuple[str, torch.dtype], nn.Module]:
    """Encoders by package ("ours" among them) and dtype: the wanted ones, and both of ours and transformers', which the check needs."""
    torch.manual_seed(0)
    vision = build_vision(NAME).module.requires_grad_(False)
    peers = {package: build_peer(package, vision).to(device) for package in {"transformers", *(package for package, _ in wanted)} - {"ours"}}
    result = {(package, dtype): copy.deepcopy(peer).to(dtype) for package, peer in peers.items() for dtype in (FP32, BF16)}
    for dtype in (FP32, BF16):
        result["ours", dtype] = copy.deepcopy(vision).to(device)
        prepare_frozen(result["ours", dtype], dtype)
    return result


def check(encoders: dict[tuple[str, torch.dtype], nn.Module], pixels: Tensor) -> dict[str, float]:
    """Relative errors of the tokens against transformers in fp32, by side; raises RuntimeError where ours are too far off."""
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default is TF32 for convolutions, such as transformers' in fp32
    expected = encoders["transformers", FP32](pixels)
    errors = {}
    for (package, dtype), encoder in encoders.items():
        tokens = encoder(pixels.to(dtype)).float()
        errors[f"{package} {DTYPES[dtype]}"] = ((tokens - expected).norm() / expected.norm()).item()
    if not errors["ours fp32"] < 1e-4 or not errors["ours bf16"] <= 2 * errors["transformers bf16"]:
        raise RuntimeError(f"the sides do not give the same tokens: relative errors {errors}")
    return errors


def measure(rows: dict, batch: int, suffix: str, device: torch.device, pairs: int, clock: Callable[[], float] | None) -> list[dict]:
    """One row for each of `rows`; each encoder of a dtype is timed on pixels of its own dtype."""
    encoders = sides(device, [(package, dtype) for package, _, dtype, _ in rows.values()])
    pixels = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(device)
    clock = clock or (time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter)
    result = []
    with torch.inference_mode():
        errors = check(encoders, pixels[:4])
        for id, (package, ours, theirs, must) in rows.items():
            peer = encoders[package, theirs]
            if id.endswith("compiled"):
                peer = torch.compile(peer, mode="max-autotune")
            functions = {"ours": timed(encoders["ours", ours], pixels.to(ours)), "theirs": timed(peer, pixels.to(theirs))}
            seconds = common.interleave(functions, pairs, warmup=3 if device.type == "cuda" else 1, clock=clock)
            result.append(
                common.row(
                    id + suffix, f"CLIP ViT-B/16 encodes {batch} images" + (", theirs compiled" if id.endswith("compiled") else ""), **seconds,
                    peer=package, must=must, dtype=f"{DTYPES[ours]} vs {DTYPES[theirs]}", device=device.type, threads=torch.get_num_threads(),
                    clock=common.clock_name(clock), relative_errors=errors,
                    images_per_second=batch / sorted(seconds["ours"])[len(seconds["ours"]) // 2],
                )
            )  # fmt: skip
    return result


def timed(encoder: nn.Module, pixels: Tensor) -> Callable[[], None]:
    """A function that encodes once and returns when the device has done it."""

    def encode() -> None:
        encoder(pixels)
        if pixels.device.type == "cuda":
            torch.cuda.synchronize()

    return encode


def run(pairs: int = 7, only: Collection[str] | None = None, clock: Callable[[], float] | None = None) -> list[dict]:
    """The rows named, or all that this machine can measure. clock defaults to wall time, and to CPU seconds with one thread on the CPU."""
    only = IDS if only is None and torch.cuda.is_available() else set(IDS) - set(CUDA_IDS) if only is None else only
    if (named := sorted(set(only) & set(CUDA_IDS))) and not torch.cuda.is_available():
        raise RuntimeError(f"{', '.join(named)} needs a CUDA device")
    result = []
    for batch in BATCHES:
        rows = {id: row for id, row in CPU_ROWS.items() if f"{id}-B{batch}" in only}
        if rows:
            result += measure(rows, batch, f"-B{batch}", torch.device("cpu"), pairs, clock)
    rows = {id: row for id, row in CUDA_ROWS.items() if id in only}
    return result + (measure(rows, CUDA_BATCH, "", torch.device("cuda"), pairs, clock) if rows else [])


def main() -> int:
    arguments = common.parse_rows(common.row_parser(__doc__.split("\n")[0], IDS, pairs=7), IDS)
    common.report(run(arguments.pairs, arguments.only), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
