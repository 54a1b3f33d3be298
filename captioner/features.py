"""Features of a frozen image encoder, computed once and kept on disk as safetensors shards.

A folder holds one encoder's tokens: its name is a hash of the encoder's weights and adapters, the transform and the dtype, so another encoder can never read them by
mistake. An image is found by the hash of its content, so renaming files costs nothing and changing one recomputes it. index.json names whole shards alone,
with their hashes: what is damaged is encoded again. Shards are mapped into memory, so that a folder may be larger than it. In fp32 the tokens equal those of
live encoding to the bit, see `captioner.runtime.frozen_tokens`.
Legend: N image tokens, D encoder width.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from captioner.backbones import Backbone
from captioner.cli import say
from captioner.errors import UserError
from captioner.files import describe_os_error, locked, read_json, save_tensors, sha256_of, sync, write_text
from captioner.frozen_vit import is_plain, prepare_frozen, release_frozen
from captioner.job import Job
from captioner.runtime import frozen_tokens
from captioner.weights import fingerprint
from data.bad_images import BadImageLedger, BadRow
from data.dataset import Batches, CaptionDataset, make_loader
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
        self.index: dict[str, list] = {}  # shard and position by content
        self.hashes: dict[str, str] = {}  # SHA-256 by shard
        self.intact: set[tuple[str, str]] = set()  # shards and hashes that were compared
        self.read_index()
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
        verify: bool = True,
    ) -> None:
        """Encode the rows whose content is not on disk yet, a shard at a time; an interrupt keeps the finished shards. Bad images go to the ledger.

        verify: compare the shards that are needed with their hashes, and encode again what is damaged.

        Images are encoded together by their place among all rows, not among the missing ones, since the last bits of a product may depend on what else is
        in it: features are the same after any number of kills. One process at a time adds to a folder; others wait for it, as items of `progress`.
        """
        distinct: dict[str, list[Row]] = {}
        for row in rows:
            try:
                content = self.content[row.image.name] = row.image.fingerprint()
            except BadImage as bad:
                ledger.record(BadRow.of(row, bad))
                continue
            distinct.setdefault(content, []).append(row)
        if verify:
            self.forget_damaged(distinct, progress)
        if distinct.keys() <= self.index.keys():
            return
        with self.only_writer(distinct, progress):
            self.encode(distinct, ledger, device, workers, batch_size, images_per_shard, progress)

    def encode(
        self,
        distinct: dict[str, list[Row]],
        ledger: BadImageLedger,
        device: torch.device,
        workers: int,
        batch_size: int,
        images_per_shard: int,
        progress: Callable[[Iterable, str], Iterable],
    ) -> None:
        """Write shards with what the index lacks of the rows by content; other arguments as of `prepare`."""
        dataset = CaptionDataset([dataclasses.replace(rows[0], id=content) for content, rows in distinct.items()], self.backbone.transform)
        lacking = [index for index, content in enumerate(distinct) if content not in self.index]
        if not lacking:
            return
        pieces = [list(piece) for _, piece in itertools.groupby(lacking, key=lambda index: index // batch_size)]
        loaders = [
            make_loader(dataset, None, size, list(itertools.chain.from_iterable(alike)), workers, ledger=ByContent(ledger, distinct))
            for size, alike in itertools.groupby(sorted(pieces, key=len, reverse=True), key=len)
        ]
        module = self.backbone.module.to(device).eval()
        release_frozen(module)  # an fp32 store wants the encoder as it is
        if self.in_bf16:
            prepare_frozen(module, self.dtype)
        contents, tokens = [], []
        try:
            for batch in progress(InTurn(loaders), f"encoding {len(lacking)} images once"):
                with torch.inference_mode():
                    tokens.append(frozen_tokens(module, batch["pixel_values"].to(device)).to("cpu", self.dtype))  # (B, N, D) or (B, C, N, D)
                contents += batch["ids"]
                if len(contents) >= images_per_shard:
                    self.write_shard(contents, tokens)
                    contents, tokens = [], []
            if contents:
                self.write_shard(contents, tokens)
        finally:
            release_frozen(module)

    def read_index(self) -> None:
        """Take over what index.json says; nothing where there is none, or one that holds something else."""
        self.index, self.hashes = {}, {}
        if not self.index_path.is_file():
            return
        try:
            index = read_json(self.index_path, limit=None)
        except UserError:
            index = None
        images, hashes = (index.get("images"), index.get("shards")) if isinstance(index, dict) else (None, None)
        if are_places(images) and are_hashes(hashes) and {name for name, _ in images.values()} <= hashes.keys():
            self.index, self.hashes = images, hashes
        else:
            say(f"{self.index_path} is damaged or of an older version: the images are encoded again")

    def forget_damaged(self, contents: Iterable[str], progress: Callable[[Iterable, str], Iterable]) -> None:
        """Take out of the index what can not be read as it was written, among the shards that hold these contents."""
        needed = {self.index[content][0] for content in contents if content in self.index}
        unknown = sorted(name for name in needed if (name, self.hashes[name]) not in self.intact)
        last = {name: position for name, position in sorted(self.index.values())} if unknown else {}
        for name in progress(unknown, "checking features") if unknown else ():
            if reason := self.damage(name, last[name]):
                say(f"{self.directory / name}: {reason}; its images are encoded again")
                self.index = {content: place for content, place in self.index.items() if place[0] != name}
                del self.hashes[name]
            else:
                self.intact.add((name, self.hashes[name]))

    def damage(self, name: str, last: int) -> str | None:
        """Why a shard can not be used, None where it is what was written and has a last position, the highest that the index names."""
        path = self.directory / name
        try:
            if sha256_of(path) != self.hashes[name]:
                return "damaged"
            rows = safe_open(path, framework="pt").get_slice("tokens").get_shape()[0]
        except (OSError, SafetensorError) as error:
            return describe_os_error(error) if isinstance(error, OSError) else str(error)
        return None if last < rows else "the index names images that it does not hold"

    @contextlib.contextmanager
    def only_writer(self, contents: Iterable[str], progress: Callable[[Iterable, str], Iterable]) -> Iterator[None]:
        """The only process in this block with this folder, once others have left it; what killed ones left, and what is damaged of these contents, is gone."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self.directory, os.W_OK):  # nobody adds to it; what is missing may be bad images alone
            yield
            return

        def wait(is_ours: Callable[[], bool]) -> None:
            say(f"waiting for the process that adds to {self.directory}")
            for _ in progress(iter(is_ours, True), "waiting"):
                time.sleep(0.2)

        with locked(self.directory / ".lock", wait):
            self.read_index()
            self.forget_damaged(contents, progress)
            self.clear_leftovers()
            yield

    def clear_leftovers(self) -> None:
        """Delete what killed writers left: files half written, and shards that the index does not name."""
        named = {name for name, _ in self.index.values()}
        for path in (*self.directory.glob(".*.safetensors.*"), *self.directory.glob(".index.json.*"), *self.directory.glob("*.safetensors")):
            if path.name not in named:
                path.unlink()

    def write_shard(self, contents: list[str], tokens: list[Tensor]) -> None:
        """Add one shard file, then the index that names it."""
        name = f"{len(list(self.directory.glob('*.safetensors'))):05d}-{contents[0][:8]}.safetensors"
        save_tensors(self.directory / name, {"tokens": torch.cat(tokens)})
        sync(self.directory)
        self.hashes[name] = sha256_of(self.directory / name)
        for position, content in enumerate(contents):
            self.index[content] = [name, position]
        write_text(self.index_path, json.dumps({**self.facts, "shards": self.hashes, "images": self.index}))

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

    def read(self, name: str, positions: int | list[int]) -> Tensor:
        """Tokens (N, D) at a position of a shard, or (R, N, D) at R positions of it. Raises UserError on a damaged shard."""
        try:
            if name not in self.shards:
                self.shards[name] = safe_open(self.directory / name, framework="pt").get_slice("tokens")
            shard = self.shards[name]
            return shard[positions] if isinstance(positions, int) else shard[:][positions]
        except (OSError, SafetensorError, IndexError) as error:
            reason = describe_os_error(error) if isinstance(error, OSError) else error
            raise UserError(f"{self.directory / name}: cannot read features ({reason}); the next start encodes them again") from error

    def places(self, rows: Sequence[Row]) -> dict[str, tuple[str, int]]:
        """Shard and position by content, each content once and in the order of the shards, for the rows that have features."""
        contents = {self.content.get(row.image.name, "") for row in rows}
        found = {content: tuple(self.index[content]) for content in contents if content in self.index}
        return dict(sorted(found.items(), key=lambda item: item[1]))


class ByContent:
    """A ledger for rows whose ids are hashes of content: notes every row that has it, under its own id."""

    def __init__(self, ledger: BadImageLedger, rows: dict[str, list[Row]]):
        self.ledger, self.rows = ledger, rows

    def record(self, bad: BadRow) -> None:
        for row in self.rows[bad.id]:
            message = bad.message.replace(bad.path, row.image.name, 1)
            self.ledger.record(dataclasses.replace(bad, id=row.id, path=row.image.name, message=message))


class InTurn:
    """The batches of several loaders, one after another, and how many they are."""

    def __init__(self, loaders: Sequence[Batches]):
        self.loaders = loaders

    def __iter__(self) -> Iterator[dict]:
        return itertools.chain.from_iterable(self.loaders)

    def __len__(self) -> int:
        return sum(map(len, self.loaders))


def are_places(images: Any) -> bool:
    """Whether a JSON value is an index: [file name of a shard, position in it] by content."""
    if not isinstance(images, dict):
        return False
    for place in images.values():  # not `all` of a generator: there may be millions
        if type(place) is not list or len(place) != 2 or type(place[0]) is not str or type(place[1]) is not int or not 0 <= place[1] < 2**63:
            return False
    names = {name for name, _ in images.values()}
    return all(Path(name).name == name and name.isprintable() and name.endswith(".safetensors") for name in names)


def are_hashes(shards: Any) -> bool:
    """Whether a JSON value is a SHA-256 in hexadecimal by name."""
    return isinstance(shards, dict) and all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in shards.values())


def prepared_store(
    directory: Path,
    backbone: Backbone,
    precision: str,
    stack: Sequence[str],
    rows: Sequence[Row],
    ledger: BadImageLedger,
    device: torch.device,
    workers: int,
    job: Job,
) -> FeatureStore:
    """The store of an encoder, prepared for the rows by the job's main process, before the others read it. Raises Stopped, in all, where a signal came."""
    with job.processes.main_first():
        store = FeatureStore(directory, backbone, precision, stack)
        store.prepare(rows, ledger, device, workers, progress=job.progress, verify=job.processes.is_main)
    return store


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
            self.tokens[filled : filled + len(positions)] = store.read(name, positions).to(device)
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
