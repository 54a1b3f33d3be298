"""Features of a frozen image encoder, computed once and kept on disk as safetensors shards.

A folder holds one encoder's tokens: its name is a hash of the encoder's weights and adapters, the transform and the dtype, so another encoder can never read them by
mistake. An image is found by the hash of its content, so renaming files costs nothing and changing one recomputes it.
Legend: N image tokens, D encoder width.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from captioner.backbones import Backbone
from captioner.errors import UserError
from captioner.files import describe_os_error, read_json, save_tensors, write_text
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
        dataset = CaptionDataset([dataclasses.replace(row, id=content) for content, row in missing.items()], self.backbone.transform)
        loader = make_loader(dataset, None, batch_size, range(len(dataset)), workers, ledger=ledger)
        contents, tokens = [], []
        for batch in progress(loader, f"encoding {len(missing)} images once"):
            with torch.inference_mode():
                tokens.append(module(batch["pixel_values"].to(device)).to("cpu", self.dtype))  # (B, N, D)
            contents += batch["ids"]
            if len(contents) >= images_per_shard:
                self.write_shard(contents, tokens)
                contents, tokens = [], []
        if contents:
            self.write_shard(contents, tokens)

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
        try:
            if name not in self.shards:
                self.shards[name] = safe_open(self.directory / name, framework="pt").get_slice("tokens")
            return self.shards[name][position]
        except (OSError, SafetensorError) as error:
            reason = describe_os_error(error) if isinstance(error, OSError) else error
            raise UserError(f"{self.directory / name}: cannot read features ({reason}); delete {self.directory} to encode again") from error
