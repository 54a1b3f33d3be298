"""Features of a frozen image encoder, computed once and kept on disk as safetensors shards.

A folder holds one encoder's tokens: its name is a hash of the encoder's weights and adapters, the transform and the dtype, so another encoder can never read them by
mistake. An image is found by the hash of its content, so renaming files costs nothing and changing one recomputes it.
Legend: N image tokens, D encoder width.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from captioner.backbones import Backbone
from captioner.errors import UserError
from captioner.files import describe_os_error, read_json, save_tensors, write_text
from captioner.frozen_vit import is_plain, prepare_frozen, release_frozen
from captioner.weights import fingerprint
from data.dataset import BadImageLedger, BadRow, CaptionDataset, make_loader
from data.images import BadImage
from data.rows import Row


# What is kept is what the encoder's consumer computes in.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FeatureStore:
    """Tokens (N, D) of the rows given to `prepare`; a `data.dataset.FeatureStore`."""

    def __init__(self, directory: Path, backbone: Backbone, precision: str = "fp32", stack: Sequence[str] = ()):
        """stack: the adapters of the encoder that are on, which its weights do not show."""
        self.backbone, self.dtype = backbone, DTYPES[precision]
        facts = {"encoder": fingerprint(backbone.module), "transform": backbone.transform.to_dict(), "dtype": str(self.dtype)}
        facts |= {"stack": list(stack)} if stack else {}
        self.in_bf16 = self.dtype == torch.bfloat16 and is_plain(backbone.module)  # other encoders compute in fp32 and are rounded at the end
        facts |= {"arithmetic": "bf16"} if self.in_bf16 else {}
        self.directory = Path(directory) / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.index_path = self.directory / "index.json"
        self.index = read_json(self.index_path)["images"] if self.index_path.is_file() else {}
        self.facts = {"backbone": backbone.name, **facts}
        self.content: dict[str, str] = {}  # by the image's name: ids repeat across splits
        self.shards: dict[str, safe_open] = {}

    def prepare(
        self,
        rows: Sequence[Row],
        ledger: BadImageLedger,
        device: torch.device,
        workers: int = 0,
        batch_size: int = 64,
        images_per_shard: int = 1024,
        progress: Callable[[Iterable, str], Iterable] = lambda batches, _: batches,
    ) -> None:
        """Encode the rows whose content is not on disk yet, a shard at a time; an interrupt keeps the finished shards. Bad images go to the ledger."""
        missing: dict[str, Row] = {}
        for row in rows:
            try:
                content = self.content[row.image.name] = row.image.fingerprint()
            except BadImage as bad:
                ledger.record(BadRow(row.id, bad.name, bad.reason, str(bad)))
                continue
            if content not in self.index:
                missing[content] = row
        if not missing:
            return
        module = self.backbone.module.to(device).eval()
        release_frozen(module)  # an fp32 store wants the encoder as it is
        if self.in_bf16:
            prepare_frozen(module, self.dtype)
        dataset = CaptionDataset([dataclasses.replace(row, id=content) for content, row in missing.items()], self.backbone.transform)
        loader = make_loader(dataset, None, batch_size, range(len(dataset)), workers, ledger=ledger)
        contents, tokens = [], []
        try:
            for batch in progress(loader, f"encoding {len(missing)} images once"):
                with torch.inference_mode():
                    tokens.append(module(batch["pixel_values"].to(device)).to("cpu", self.dtype))  # (B, N, D)
                contents += batch["ids"]
                if len(contents) >= images_per_shard:
                    self.write_shard(contents, tokens)
                    contents, tokens = [], []
            if contents:
                self.write_shard(contents, tokens)
        finally:
            release_frozen(module)

    def write_shard(self, contents: list[str], tokens: list[Tensor]) -> None:
        """Add one shard file, then the index that names it."""
        name = f"{len(list(self.directory.glob('*.safetensors'))):05d}-{contents[0][:8]}.safetensors"
        save_tensors(self.directory / name, {"tokens": torch.cat(tokens)})
        for position, content in enumerate(contents):
            self.index[content] = [name, position]
        write_text(self.index_path, json.dumps({**self.facts, "images": self.index}))

    def get(self, row: Row) -> Tensor | None:
        """(N, D) in the store's dtype; None where `prepare` found the image bad. Raises UserError on a damaged shard."""
        place = self.index.get(self.content.get(row.image.name, ""))
        if place is None:
            return None
        name, position = place
        return self.read(name, position)

    def gather(self, found: Tensor) -> Tensor:
        """What `get` gave is the tokens already: (B, N, D)."""
        return found

    def read(self, name: str, positions: int | slice) -> Tensor:
        """Tokens (N, D) at a position of a shard, or (R, N, D) of a slice of it. Raises UserError on a damaged shard."""
        try:
            if name not in self.shards:
                self.shards[name] = safe_open(self.directory / name, framework="pt").get_slice("tokens")
            return self.shards[name][positions]
        except (OSError, SafetensorError) as error:
            reason = describe_os_error(error) if isinstance(error, OSError) else error
            raise UserError(f"{self.directory / name}: cannot read features ({reason}); delete {self.directory} to encode again") from error

    def places(self, rows: Sequence[Row]) -> dict[str, tuple[str, int]]:
        """Shard and position by content, each content once and in the order of the shards, for the rows that have features."""
        contents = {self.content.get(row.image.name, "") for row in rows}
        found = {content: tuple(self.index[content]) for content in contents if content in self.index}
        return dict(sorted(found.items(), key=lambda item: item[1]))


class DeviceFeatures:
    """A `data.dataset.FeatureStore` that keeps the features of the rows in one tensor (R, N, D) on a device, images of equal content once.

    Worker processes find places in it; the training process gathers a batch there, so that nothing is copied from the host.
    """

    def __init__(self, store: FeatureStore, rows: Sequence[Row], device: torch.device):
        """store: prepared for the rows. Raises UserError on a damaged shard."""
        places = store.places(rows)
        shape = next((store.read(*place).shape for place in places.values()), ())
        self.tokens = torch.empty((len(places), *shape), dtype=store.dtype, device=device)
        filled = 0
        for name, members in itertools.groupby(places.values(), key=lambda place: place[0]):
            positions = [position for _, position in members]
            self.tokens[filled : filled + len(positions)] = store.read(name, slice(None))[positions].to(device)
            filled += len(positions)
        order = {content: place for place, content in enumerate(places)}
        found = {row.image.name: order.get(store.content.get(row.image.name, "")) for row in rows}
        self.place = {name: place for name, place in found.items() if place is not None}

    @staticmethod
    def fit(store: FeatureStore, rows: Sequence[Row], device: torch.device) -> bool:
        """Whether the features of the rows take at most half of the free memory of a CUDA device; False on others, whose memory holds the files already."""
        places = store.places(rows)
        if device.type != "cuda" or not places:
            return False
        return len(places) * store.read(*next(iter(places.values()))).nbytes <= torch.cuda.mem_get_info(device)[0] // 2

    def __getstate__(self) -> dict:
        """Without the tokens: worker processes look up places only."""
        return {"place": self.place}

    def get(self, row: Row) -> Tensor | None:
        """The row's place in `tokens`, 0-d int64; None where it has no features."""
        place = self.place.get(row.image.name)
        return None if place is None else torch.tensor(place)

    def gather(self, found: Tensor) -> Tensor:
        """Places (B,) → tokens (B, N, D) on the device."""
        return self.tokens.index_select(0, found.to(self.tokens.device))
