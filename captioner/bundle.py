"""A bundle: a whole run directory, without checkpoints, as one safetensors file.

| in the run directory                     | in the bundle                                                          |
| ---------------------------------------- | ---------------------------------------------------------------------- |
| tensor NAME of FILE.safetensors          | tensor `FILE.safetensors/NAME`                                         |
| header metadata of FILE.safetensors      | header metadata `FILE.safetensors`, a JSON object                      |
| config.json and the like                 | header metadata of that name, the text of the file                     |
| text/spiece.model                        | tensor `text/spiece.model`, uint8                                      |

FILE is the path inside the run directory. Only the paths that a run can have are written or read: a bundle from elsewhere names no others.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from captioner.errors import UserError
from captioner.files import replacing, save_tensors, write_text
from captioner.tokenizer import FILE_NAME
from captioner.weights import one_line

SUFFIX = ".safetensors"
MARK, VERSION = "captioner_bundle", "1"
CONFIG_FILE = "config.json"
VOCABULARY = f"text/{FILE_NAME}"
_ADAPTER = r"(?:adapter|adapter/vision|prompt|adapters/[A-Za-z0-9_-]+)"
_TENSOR_FILE = rf"(?:(?:bridge|vision)\.safetensors|(?:text|vision)/model\.safetensors|{_ADAPTER}/adapter_model\.safetensors)"
TENSOR_FILE = re.compile(_TENSOR_FILE)
TENSOR = re.compile(rf"({_TENSOR_FILE})/(.+)", re.DOTALL)
TEXT_FILE = re.compile(rf"config\.json|(?:text|vision)/config\.json|{_ADAPTER}/adapter_config\.json")


def is_bundle(run: Path) -> bool:
    """Whether a path is a file that must be a bundle to be a run."""
    return run.suffix == SUFFIX and run.is_file()


def pack(directory: Path, path: Path) -> None:
    """Write the run in directory as a bundle. Raises UserError for a file that a bundle has no place for, and where the disk is full."""
    tensors: dict[str, Tensor] = {}
    metadata = {MARK: VERSION}
    for file in sorted(file for file in directory.rglob("*") if file.is_file()):
        name = file.relative_to(directory).as_posix()
        if name == VOCABULARY:
            tensors[name] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        elif TEXT_FILE.fullmatch(name):
            metadata[name] = file.read_text(encoding="utf-8")
        elif TENSOR_FILE.fullmatch(name):
            with safe_open(file, "pt") as opened:
                tensors |= {f"{name}/{key}": opened.get_tensor(key) for key in opened.keys()}
                metadata[name] = json.dumps(opened.metadata() or {})
        else:
            raise UserError(f"{file}: a bundle has no place for it")
    save_tensors(path, tensors, metadata)


@contextlib.contextmanager
def opened(run: Path) -> Iterator[Path]:
    """run itself where it is no bundle; a bundle as a run directory, which is gone afterwards.

    Raises UserError where the file is damaged, no bundle, or has names that no run has; errors about the directory's files name the bundle.
    """
    if not is_bundle(run):
        yield run
        return
    with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
        try:
            unpack(run, Path(folder))
            yield Path(folder)
        except UserError as error:
            raise UserError(str(error).replace(folder, str(run))) from error


def unpack(path: Path, directory: Path) -> None:
    """Inverse of `pack`; writes nothing outside directory."""
    with read(path) as (file, texts, files):
        for name, text in texts.items():
            write_text(directory / name, text)
        for name, (keys, metadata) in files.items():
            tensors = {own: file.get_tensor(key) for own, key in keys.items()}
            if name != VOCABULARY:
                save_tensors(directory / name, tensors, metadata)
                continue
            content = tensors[FILE_NAME]
            if content.dtype != torch.uint8 or content.ndim != 1:
                raise UserError(f"{path}: {VOCABULARY} is {str(content.dtype).removeprefix('torch.')} {list(content.shape)}, not the bytes of a file")
            with replacing(directory / name) as temporary:
                temporary.write_bytes(content.numpy().tobytes())


def read_config(path: Path) -> dict:
    """The config.json inside a bundle. Raises UserError as `opened`."""
    with read(path) as (_, texts, _):
        return json_object(texts[CONFIG_FILE], f"{path}: its {CONFIG_FILE}")


@contextlib.contextmanager
def read(path: Path):
    """(open file, text files by name, tensor files by name: keys in the bundle by their own names, and metadata), all names checked."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get(MARK) != VERSION:
                raise UserError(f"{path}: not a bundle (its header has {MARK} {header.get(MARK)!r:.200}, not {VERSION!r})")
            texts = {name: text for name, text in header.items() if TEXT_FILE.fullmatch(name)}
            files = {name: ({}, file_metadata(path, name, text)) for name, text in header.items() if TENSOR_FILE.fullmatch(name)}
            foreign = sorted(header.keys() - texts.keys() - files.keys() - {MARK})
            for key in file.keys():
                found = TENSOR.fullmatch(key)
                if key == VOCABULARY:
                    files[VOCABULARY] = ({FILE_NAME: key}, None)
                elif found and found[1] in files:
                    files[found[1]][0][found[2]] = key
                else:
                    foreign.append(key)
            if foreign:
                rest = f", … ({len(foreign)} in all)" if len(foreign) > 4 else ""
                raise UserError(f"{path}: names that no bundle has: {', '.join(f'{name!r:.200}' for name in foreign[:4])}{rest}")
            if CONFIG_FILE not in texts:
                raise UserError(f"{path}: an incomplete bundle: no {CONFIG_FILE} in its header")
            yield file, texts, files
    except SafetensorError as error:
        raise UserError(f"cannot read {path}, a damaged or incomplete safetensors file: {one_line(error)}") from error


def file_metadata(path: Path, name: str, text: str) -> dict[str, str]:
    """The header metadata of one packed file."""
    what = f"{path}: its metadata of {name}"
    metadata = json_object(text, what)
    if not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{what} are not all strings")
    if any("\ud800" <= character <= "\udfff" for pair in metadata.items() for word in pair for character in word):
        raise UserError(f"{what} holds half a surrogate pair, which no file can")
    return metadata


def json_object(text: str, what: str) -> dict:
    """A JSON object from its text; what is how messages call it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} is not a JSON object")
    return value
