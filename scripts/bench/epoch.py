"""An epoch of LoRA training from JPEG files, images included, against the usual pipeline of transformers + peft.

    python scripts/bench/epoch.py [--only ID,ID] [--pairs 3] [--images 32] [--batch-size 16] [--threads N] [--json PATH|-]

ViT-B/16 and the decoder of Flan-T5-base with the same random weights, Flickr8k photographs written as JPEG, or drawn scenes where there are none, one
caption of an image an epoch. Theirs decodes and prepares every image (Pillow, CLIPImageProcessor) and encodes it (CLIPVisionModel) in every step, batches
are random and padded to their longest caption. Ours is what `train.py --cache-features` does: the first epoch encodes every image once into a feature
store, later ones read it, and batches are of about one length; on a GPU the features stay in its memory. Ours is in bf16 where the device multiplies it in
hardware, else in fp32. C3 rows are measured on the CPU: theirs in fp32, as it trains by default there, or all in bf16 (C3-bf16). T rows on a GPU: CLIP and
the base in bf16, peft's adapters in fp32, worker processes on both sides; T4 has features given on both sides. Both sides' losses on one batch are compared
first.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import common
import torch
import train_step
from PIL import Image
from torch import Tensor, nn

from captioner import clip_hf
from captioner.backbones import build_vision
from captioner.features import DeviceFeatures, FeatureStore
from captioner.runtime import choose_precision
from captioner.tokenizer import Tokenizer, train_tokenizer
from captioner.weights import clip_to_hf
from data.buckets import CaptionLengths, bucket_edges, bucketed_order
from data.collate import pad_labels, pick_caption
from data.bad_images import BadImageLedger
from data.dataset import CaptionDataset, epoch_order, make_loader
from data.readers import read
from data.rows import Row

SIZE, VISION = "flan-t5-base", "ViT-B-16-quickgelu"
MAX_TOKENS = 40
# Row: what is compared, device, the peer's form (see train_step.py), bar.
ROWS = {
    "C3": ("later", "cpu", "fp32", 6.0),
    "C3-first": ("first", "cpu", "fp32", None),
    "C3-bf16": ("later", "cpu", "bf16", None),
    "T4": ("cached", "cuda", "default", 10.0),
    "T5-first": ("first", "cuda", "default", 2.0),
    "T5": ("later", "cuda", "default", 7.0),
}
FORMS = {"fp32": "fp32", "bf16": "bf16", "default": "bf16 with fp32 adapters"}
IDS = tuple(ROWS)
CUDA_IDS = tuple(id for id, row in ROWS.items() if row[1] == "cuda")
IMAGES, BATCH_SIZE = {"cpu": 32, "cuda": 4096}, {"cpu": 16, "cuda": 128}
PACKAGES = ("torch", "transformers", "peft", "pillow")


class Ours:
    """Our side: `prepare` encodes the images once, `epoch` trains on the features."""

    def __init__(self, rows: list[Row], tokenizer: Tokenizer, folder: Path, batch_size: int, device: torch.device, precision: str):
        self.rows, self.tokenizer, self.folder, self.batch_size, self.device, self.precision = rows, tokenizer, folder, batch_size, device, precision
        self.vision = build_vision(VISION)
        self.model, trainable = train_step.build_ours(SIZE)
        self.parameters = list(trainable.values())
        self.trainable = trainable
        self.passes = 0

    def start(self) -> None:
        """As train.py does before its first step."""
        self.model.to(self.device)
        train_step.prepare(self.model, self.trainable, self.precision)
        self.model.train()
        self.loss = train_step.our_loss(self.model, self.precision)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-4, weight_decay=0.0, fused=True)
        self.lengths = CaptionLengths(self.rows, self.tokenizer.encode, MAX_TOKENS)

    def encode(self) -> FeatureStore | DeviceFeatures:
        """A new feature store of all images, as train.py keeps it."""
        store = FeatureStore(Path(tempfile.mkdtemp(dir=self.folder)), self.vision, self.precision)
        store.prepare(self.rows, BadImageLedger("fail"), self.device, workers_for(self.device), batch_size=self.batch_size)
        return DeviceFeatures(store, self.rows, self.device) if DeviceFeatures.fit(store, self.rows, self.device) else store

    def features(self, store: FeatureStore | DeviceFeatures, rows: Sequence[Row]) -> Tensor:
        """(B, N, D) of these rows on the device."""
        return store.gather(torch.stack([store.get(row) for row in rows])).to(self.device)

    def batches(self, store: FeatureStore | DeviceFeatures, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(self.rows), 0, epoch)
        order = bucketed_order(order, self.lengths.of_epoch("1", 0, epoch), bucket_edges(MAX_TOKENS), self.batch_size, 0, epoch)
        dataset, dtype = CaptionDataset(self.rows, features=store), torch.float32 if self.precision == "fp32" else torch.bfloat16
        loader = make_loader(dataset, self.tokenizer.encode, self.batch_size, order, epoch=epoch, max_caption_tokens=MAX_TOKENS)
        for batch in loader:
            yield batch["features"].to(self.device, dtype), batch["labels"].flatten(0, 1).to(self.device)

    def epoch(self, store: FeatureStore | DeviceFeatures) -> None:
        train_epoch(self.batches(store, self.passes), self.loss, self.parameters, self.optimizer)
        self.passes += 1


class Images(torch.utils.data.Dataset):
    """Item k: pixels (3, 224, 224) of a file as CLIPImageProcessor prepares them."""

    def __init__(self, rows: list[Row]):
        from transformers import CLIPImageProcessor

        self.rows, self.processor = rows, CLIPImageProcessor()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.rows[index].image.path) as image:
            return self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


class Peer:
    """Their side: every epoch decodes and encodes every image."""

    def __init__(self, ours: Ours, form: str):
        """form: of train_step.py."""
        import transformers

        self.rows, self.tokenizer, self.batch_size, self.device = ours.rows, ours.tokenizer, ours.batch_size, ours.device
        self.text = train_step.build_peer(ours.model).to(self.device).train()
        self.dtype = train_step.prepare_peer(self.text, form)
        config = ours.vision.module.config
        self.vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**clip_hf.clip_config_to_hf(config)))
        self.vision.load_state_dict(clip_to_hf(ours.vision.module, config))
        self.vision = self.vision.eval().requires_grad_(False).to(self.device, self.dtype)
        self.images = Images(self.rows)
        self.loss = train_step.peer_loss(self.text, self.dtype)
        self.parameters = [parameter for parameter in self.text.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-4, weight_decay=0.0, fused=True)
        self.passes = 0

    def encode(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.vision(pixels.to(self.device, self.dtype)).last_hidden_state

    def labels(self, indices: list[int], epoch: int) -> Tensor:
        """(B, T), padded with -100 to the longest."""
        captions = [pick_caption(self.rows[index].id, self.rows[index].captions, 0, epoch) for index in indices]
        return pad_labels([[ids] for ids in self.tokenizer.encode(captions)], MAX_TOKENS).flatten(0, 1).to(self.device)

    def batches(self, features: Tensor | None, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(self.rows), 0, epoch)
        pieces = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if features is not None:
            yield from ((features[piece], self.labels(piece, epoch)) for piece in pieces)
            return
        loader = torch.utils.data.DataLoader(self.images, batch_sampler=pieces, num_workers=workers_for(self.device))
        for pixels, piece in zip(loader, pieces, strict=True):
            yield self.encode(pixels), self.labels(piece, epoch)

    def epoch(self, features: Tensor | None = None) -> None:
        train_epoch(self.batches(features, self.passes), self.loss, self.parameters, self.optimizer)
        self.passes += 1


def train_epoch(batches: Iterator[tuple[Tensor, Tensor]], loss: Callable, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step for each batch; returns when the device is done."""
    for features, labels in batches:
        train_step.update(loss, parameters, optimizer, features, labels).item()


def workers_for(device: torch.device) -> int:
    """Worker processes that decode images: a GPU is not kept waiting, a small CPU computes."""
    return (os.cpu_count() or 1) if device.type == "cuda" else 0


def check(ours: Ours, peer: Peer, store: FeatureStore | DeviceFeatures) -> list[float]:
    """Losses of both sides on one batch of images without dropout; raises RuntimeError where they are more than 3 % apart."""
    ours.model.eval()
    peer.text.eval()
    some = range(min(4, len(ours.rows)))
    labels = peer.labels(list(some), 0)
    with torch.no_grad():
        mine = ours.loss(ours.features(store, [ours.rows[index] for index in some]), labels).item()
        theirs = peer.loss(peer.encode(torch.stack([peer.images[index] for index in some])), labels).item()
    ours.model.train()
    peer.text.train()
    if abs(mine - theirs) > 0.03 * theirs:
        raise RuntimeError(f"the two sides do not compute the same: loss {mine} here, {theirs} there")
    return [mine, theirs]


def run(pairs: int = 3, images: int | None = None, batch_size: int | None = None, only: Collection[str] | None = None, clock=None) -> list[dict]:
    """The rows named, or all that this machine can measure. Sizes default to IMAGES and BATCH_SIZE of the rows' device."""
    has_gpu = torch.cuda.is_available()
    wanted = {id: row for id, row in ROWS.items() if (id in only if only is not None else has_gpu or id not in CUDA_IDS)}
    if not has_gpu and (named := [id for id in wanted if id in CUDA_IDS]):
        raise RuntimeError(f"{', '.join(named)} needs a CUDA device")
    result = []
    for device in ("cpu", "cuda"):
        if chosen := {id: row for id, row in wanted.items() if row[1] == device}:
            with tempfile.TemporaryDirectory() as name:
                sizes = images or IMAGES[device], batch_size or BATCH_SIZE[device]
                result += measure(chosen, Path(name), *sizes, torch.device(device), pairs, clock)
    return result


def measure(wanted: dict, folder: Path, images: int, batch_size: int, device: torch.device, pairs: int, clock) -> list[dict]:
    """One row for each of `wanted`, both sides' epochs interleaved."""
    source = common.write_photographs(folder / "data", images)
    rows = read(folder / "data", "train")
    torch.manual_seed(0)
    ours = Ours(rows, vocabulary(rows, folder), folder, batch_size, device, choose_precision("auto", device))
    peers = {form: Peer(ours, form) for form in {form for _, _, form, _ in wanted.values()}}
    ours.start()
    store = ours.encode()
    losses = {form: check(ours, peer, store) for form, peer in peers.items()}
    features = ours.features(store, rows) if any(kind == "cached" for kind, *_ in wanted.values()) else None
    epochs = {}
    for kind, _, form, _ in wanted.values():
        epochs["ours", kind == "first"] = (lambda: ours.epoch(ours.encode())) if kind == "first" else (lambda: ours.epoch(store))
        epochs[form, kind == "cached"] = functools.partial(peers[form].epoch, features if kind == "cached" else None)
    clock = clock or (time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter)
    seconds = common.interleave(epochs, pairs, clock=clock)
    titles = {"later": "epochs 2 and later", "first": "epoch 1, features encoded once", "cached": "epoch from cached features on both sides"}
    details = dict(peer="peft", device=device.type, threads=torch.get_num_threads(), clock=common.clock_name(clock))
    result = []
    for id, (kind, _, form, must) in wanted.items():
        what = f"{titles[kind]}: {images} JPEG files ({source}), B={batch_size}, {SIZE} decoder"
        both = dict(ours=seconds["ours", kind == "first"], theirs=seconds[form, kind == "cached"], losses=losses[form])
        result.append(common.row(id, what, must=must, dtype=f"{ours.precision} vs {FORMS[form]}", **both, **details))
    return result


def vocabulary(rows: list[Row], folder: Path) -> Tokenizer:
    """Flan-T5's pieces where they lie beside the checkout, so that captions have their real lengths; else pieces learned from the captions."""
    shared = Path(os.environ.get("CAPTIONER_SHARED", common.REPOSITORY.parent / "shared")) / "t5" / "spiece.model"
    if shared.is_file():
        return Tokenizer(shared)
    return train_tokenizer([caption for row in rows for caption in row.captions], folder / "spiece.model", 300)


def main() -> int:
    parser = common.row_parser(__doc__.split("\n")[0], IDS, pairs=3)
    parser.add_argument("--images", type=int, metavar="N", help="images of an epoch (default 32 on the CPU, 4096 on a GPU)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="images a step (default 16 on the CPU, 128 on a GPU)")
    arguments = common.parse_rows(parser, IDS)
    common.report(run(arguments.pairs, arguments.images, arguments.batch_size, arguments.only), arguments.json, PACKAGES)
    return 0


if __name__ == "__main__":
    common.run_main(main)
