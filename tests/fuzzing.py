"""Structure-aware damage to files, and a watch over what reading them does. The inputs themselves are in tests/fuzz_inputs.py.

A mutation is drawn by hypothesis: values of JSON, tensors and headers of safetensors files, raw bytes, and what stands in a file's place.
"""

import contextlib
import copy
import functools
import json
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import hypothesis
import safetensors.torch
import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

MEMORY_LIMIT = 2 * 2**30  # bytes that one process may allocate beyond what it has when the mutations begin
SLOW_SECONDS = 5.0  # of processor time, for one mutation
HANG_SECONDS = 60  # of the clock, after which one is interrupted
LONGEST_MESSAGE = 3000
MOST_TURNS = 20  # of hypothesis, which draws the same damage more than once

NAMES = (
    "", ".", "..", "/", "../outside", "../../outside", "../../../outside/secret", "/etc/passwd", "C:\\secret", "..\\outside", "a/../../outside", "link/secret.png",
    "linked.png", "a\0b", "a\nb", "a\rb", "\x1b[31mred", "\ud800", "x" * 5000, "a:b", "\u202eabc", "step-1.tar.gz", "file://x", "~", "$HOME", "%s{}{0}", "pipe",
)  # fmt: skip
WORDS = (
    "timm/resnet18", "timm/vit_giant_patch14_clip_224", "ViT-bigG-14", "ViT-B-16", "ViT-Tiny-Scenes", "RN50", "openai", "decoder", "vision", "encoder", "gelu", "relu", "LORA", "BOTTLENECK", "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING", "all-linear", "(a+)+$", ".*", "(", "lora", "prompt", "bridge", "caption", "NaN", "4", "true", "F32", "None",
)  # fmt: skip
NUMBERS = (
    -1, 0, 1, 2, 3, 4, 7, 8, 2**16, 2**31 - 1, 2**31, 10**9, 10**12, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e-320, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [{}], {"": {}}, [None], [0.5], ["../../outside"], ["decoder", "decoder"], {"a": 1}, [1, 2, 3])
HOSTILE = (*NAMES, *WORDS, *NUMBERS, *OTHERS)
DUPLICATE = "@duplicate@"  # marks a key in the text that loses the mark and then stands there twice


# ---- JSON ------------------------------------------------------------------------------------------------


def places(value, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value, its own included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in places(child, (*path, key)))]


def at(value, path: tuple):
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


def no_way_out(name) -> str | None:
    """For JSON whose values name no files."""


def mutate_json(data: st.DataObject, value, way_out: Callable[[object], str | None] = no_way_out) -> tuple[str, str]:
    """(JSON text of a damaged value, what was done to it); way_out(name) is the path of an outside file in the place of the file that name is of, if any."""
    value = copy.deepcopy(value)
    done = [_mutate_value(data, value, way_out) for _ in range(data.draw(st.sampled_from((1, 1, 1, 2, 4))))]
    value = next((new for _, new in done if new is not None), value)
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from((None, 2))))
    return text.replace(DUPLICATE, ""), "; ".join(what for what, _ in done)


def _mutate_value(data: st.DataObject, root, way_out: Callable[[object], str | None]) -> tuple[str, object | None]:
    """Damage root in place at one path: (what was done, a new root or None)."""
    path = data.draw(st.sampled_from(places(root)))
    hostile = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
    if not path:
        return (f"root = {short(hostile)}", [hostile]) if data.draw(st.integers(0, 9)) == 0 else ("nothing", None)
    parent, key = at(root, path[:-1]), path[-1]
    old, name = parent[key], ".".join(map(str, path))
    if way_out(old) is not None and data.draw(st.integers(0, 2)) == 0:
        parent[key] = way_out(old)
        return f"{name} = {short(parent[key])}", None
    kind = data.draw(st.sampled_from(("replace", "replace", "nudge", "delete", "rename", "add", "duplicate", "wrap", "copy")))
    if kind == "delete":
        del parent[key]
        return f"{name} deleted", None
    if kind == "add":
        target = parent if isinstance(parent, dict) else None
        if target is None:
            parent.insert(key, hostile)
        else:
            target[str(data.draw(st.sampled_from((*NAMES, "extra"))))] = hostile
        return f"{short(hostile)} beside {name}", None
    if kind == "duplicate" and isinstance(parent, dict):
        parent[f"{key}{DUPLICATE}"] = hostile
        return f"{name} again = {short(hostile)}", None
    if kind == "rename" and isinstance(parent, dict):
        new = way_out(key) if way_out(key) is not None and data.draw(st.integers(0, 2)) == 0 else None
        new = new or data.draw(st.sampled_from((*NAMES, f"{key}x", str(key).upper())))
        parent[new] = parent.pop(key)
        return f"{name} renamed {new!r:.40}", None
    if kind == "wrap":
        parent[key] = data.draw(st.sampled_from(([old], {"value": old}, str(old), [old, old])))
        return f"{name} = {short(parent[key])}", None
    if kind == "copy":
        parent[key] = copy.deepcopy(at(root, data.draw(st.sampled_from(places(root)))))
        return f"{name} = {short(parent[key])}", None
    if kind == "nudge" and isinstance(old, (int, float)):
        parent[key] = data.draw(st.sampled_from((old + 1, old - 1, old * 2, -old, float(old), old + 0.5, str(old), old / 2)))
        return f"{name} = {short(parent[key])}", None
    parent[key] = hostile
    return f"{name} = {short(hostile)}", None


def short(value) -> str:
    """A value in the description of a mutation."""
    return f"{value!r:.60}"


def mutate_text(data: st.DataObject, content: bytes) -> tuple[bytes, str]:
    """Damage that a JSON value cannot express: depth, digits, encodings, bytes."""
    depth = data.draw(st.sampled_from((50, 1500, 200_000)))
    huge = {
        "deep lists": b"[" * depth + b"]" * depth,
        "deep objects": b'{"a":' * depth + b"1" + b"}" * depth,
        "unclosed": b"[" * depth,
        "many digits": b'{"a": ' + b"9" * 5000 + b"}",
        "empty": b"",
        "a mark of byte order": b"\xef\xbb\xbf" + content,
        "UTF-16": content.decode("utf-8", "replace").encode("utf-16"),
        "no UTF-8": content.replace(b"a", b"\xff", 1),
        "a zero byte": content[: len(content) // 2] + b"\0" + content[len(content) // 2 :],
        "lines of a Mac": content.replace(b"\n", b"\r"),
        "digits inside": content.replace(b"1", b"1" * 5000, 1),
        "depth inside": content.replace(b":", b": " + b"[" * depth + b"]" * depth + b', "b":', 1),
        "NaN inside": content.replace(b"1", b"NaN", 1),
        "twice": content + content,
    }
    name = data.draw(st.sampled_from([*huge, "bytes", "bytes"]))
    return mutate_bytes(data, content) if name == "bytes" else (huge[name], name)


# ---- bytes -----------------------------------------------------------------------------------------------


def mutate_bytes(data: st.DataObject, content: bytes) -> tuple[bytes, str]:
    """Cut, lengthened, flipped, or with a part in another place."""
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    kind = data.draw(st.sampled_from(("cut", "flip", "flip", "flips", "lengthen", "insert", "remove", "zeros")))
    if kind == "cut":
        return content[:place], f"cut at {place}"
    if kind == "lengthen":
        return content + b"\xff" * data.draw(st.sampled_from((1, 8, 4096))), "lengthened"
    if kind == "insert":
        return content[:place] + data.draw(st.binary(min_size=1, max_size=16)) + content[place:], f"bytes put in at {place}"
    count = data.draw(st.integers(1, 64))
    if kind == "remove":
        return content[:place] + content[place + count :], f"{count} bytes taken out at {place}"
    if kind == "zeros":
        return content[:place] + bytes(min(count, len(content) - place)) + content[place + count :], f"{count} zeros at {place}"
    flipped = bytearray(content)
    for offset in range(place, min(len(content), place + (1 if kind == "flip" else count))):
        flipped[offset] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(flipped), f"bits flipped at {place}"


# ---- safetensors -----------------------------------------------------------------------------------------

DTYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.uint64,
)  # fmt: skip
DTYPE_NAMES = ("F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "U16", "f32", "", "X9")
LENGTHS = (0, 1, 7, 100_000_000, 100_000_001, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)


def split_header(content: bytes) -> tuple[dict, bytes]:
    """Header and data of a whole safetensors file: eight bytes of length, JSON, tensors (https://github.com/huggingface/safetensors#format)."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_header(text: str, body: bytes, length: int | None = None) -> bytes:
    """Inverse of `split_header` for a header that need not be true; length is its own unless given."""
    header = text.encode("utf-8", "surrogatepass")
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def mutate_tensors(data: st.DataObject, content: bytes) -> tuple[bytes, str]:
    """One damage to a safetensors file: its tensors (the file itself is whole then), its header, its length, its bytes."""
    kind = data.draw(st.sampled_from(("tensor", "tensor", "tensor", "tensor", "header", "header", "length", "metadata", "bytes", "bytes")))
    header, body = split_header(content)
    if kind == "header":
        text, what = mutate_json(data, header)
        return join_header(text, body), f"header: {what}"
    if kind == "length":
        length = data.draw(st.sampled_from((*LENGTHS, int.from_bytes(content[:8], "little") + data.draw(st.integers(-9, 9)))))
        return max(0, length).to_bytes(8, "little") + content[8:], f"header length {length}"
    if kind == "bytes":
        return mutate_bytes(data, content)
    if kind == "metadata":
        metadata, what = _mutate_metadata(data, header.get("__metadata__") or {"format": "pt"})
        return join_header(json.dumps(header | {"__metadata__": metadata}), body), f"metadata: {what}"
    tensors, metadata = load(content), header.get("__metadata__")
    what = _mutate_tensor(data, tensors)
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata), what


def _mutate_metadata(data: st.DataObject, metadata: dict[str, str]) -> tuple[dict, str]:
    """Damaged metadata of a header, or one JSON text in it damaged."""
    texts = [key for key, text in metadata.items() if text.startswith("{") and len(text) > 2]
    if not texts or data.draw(st.integers(0, 2)) == 0:
        text, what = mutate_json(data, metadata)
        return json.loads(text), what
    key = data.draw(st.sampled_from(texts))
    text, what = mutate_json(data, json.loads(metadata[key]))
    return metadata | {key: text}, f"{key}: {what}"


def _mutate_tensor(data: st.DataObject, tensors: dict[str, torch.Tensor]) -> str:
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    kind = data.draw(st.sampled_from(("value", "value", "dtype", "rows", "shape", "empty", "scalar", "drop", "add", "rename", "swap", "huge")))
    if kind == "value" and tensor.numel() and tensor.is_floating_point():
        value = data.draw(st.sampled_from((float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45)))
        tensors[name] = tensor = tensor.clone()
        tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
        return f"{name} holds {value}"
    if kind == "dtype":
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors[name] = tensor.to(dtype)
        return f"{name} as {dtype}"
    if kind == "rows" and tensor.ndim:
        rows = data.draw(st.sampled_from((0, 1, len(tensor) + 1, 2 * len(tensor), max(0, len(tensor) - 1))))
        tensors[name] = torch.zeros((rows, *tensor.shape[1:]), dtype=tensor.dtype)
        return f"{name} has {rows} rows"
    if kind == "shape":
        tensors[name] = data.draw(st.sampled_from((tensor.reshape(-1), tensor[None], tensor.T if tensor.ndim == 2 else tensor[..., None])))
        return f"{name} has shape {list(tensors[name].shape)}"
    if kind == "empty":
        tensors[name] = torch.empty((data.draw(st.sampled_from((0, 2**20, 2**40))), 0), dtype=tensor.dtype)
        return f"{name} has shape {list(tensors[name].shape)}"
    if kind == "scalar":
        tensors[name] = torch.tensor(1.0)
        return f"{name} is one number"
    if kind == "huge":
        tensors[name] = torch.full(tensor.shape, 1e300, dtype=torch.float64)
        return f"{name} is beyond fp32"
    if kind == "swap":
        other = data.draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
        return f"{name} and {other} swapped"
    new = data.draw(st.sampled_from((f"{name}x", name.upper(), name.replace("0", "1"), name.replace("0", "9" * 30), *(text for text in NAMES if "\ud800" not in text))))
    if kind == "rename":
        tensors[new] = tensors.pop(name)
        return f"{name} renamed {new!r:.40}"
    if kind == "add":
        tensors[new] = torch.zeros(3)
        return f"{new!r:.40} beside {name}"
    del tensors[name]
    return f"{name} dropped"


# ---- files -----------------------------------------------------------------------------------------------


def mutate_file(data: st.DataObject, path: Path, twin: Path) -> str:
    """Damage the content of one file, by its kind, or put something else in its place; what was done. Its twin is the same file of the input outside."""

    def way_out(name) -> str | None:
        inside = isinstance(name, str) and not os.path.isabs(name) and not os.path.normpath(name).startswith("..")
        return os.path.relpath(twin.parent / name, path.parent) if inside and os.path.isfile(path.parent / name) else None

    instead = data.draw(st.integers(0, 19))
    if instead == 0:
        return f"{path.name}: {_put_instead(data, path, twin)}"
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content, what = mutate_tensors(data, content)
    elif path.suffix in (".json", ".jsonl") and instead < 17:
        parse, text = (json.loads, content) if path.suffix == ".json" else (_parse_lines, content)
        damaged, what = mutate_json(data, parse(text), way_out)
        damaged = damaged if path.suffix == ".json" else _write_lines(damaged)
        content = damaged.encode("utf-8", "surrogatepass")
    elif path.suffix in (".json", ".jsonl"):
        content, what = mutate_text(data, content)
    else:
        content, what = mutate_bytes(data, content)
    path.unlink()
    path.write_bytes(content)
    return f"{path.name}: {what}"


def _parse_lines(content: bytes) -> list:
    return [json.loads(line) for line in content.splitlines()]


def _write_lines(text: str) -> str:
    value = json.loads(text, object_pairs_hook=lambda pairs: pairs and _Pairs(pairs) or {})
    return "\n".join(_dump(line) for line in value) if isinstance(value, list) and not isinstance(value, _Pairs) else _dump(value)


class _Pairs(list):
    """The items of an object, keys that stand there twice included."""


def _dump(value) -> str:
    if isinstance(value, _Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dump(item)}" for key, item in value) + "}"
    return "[" + ", ".join(map(_dump, value)) + "]" if isinstance(value, list) else json.dumps(value)


def _put_instead(data: st.DataObject, path: Path, twin: Path) -> str:
    kind = data.draw(st.sampled_from(("nothing", "a folder", "a pipe", "an endless device", "a link to nothing", "a link to itself", "a link out", "no access", "zeros")))
    if kind == "no access":
        path.chmod(0)
        return kind
    if kind == "zeros":
        os.truncate(path, 3 * 2**30)  # without a block on the disk
        return "3 GB, zeros behind the content"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        target = {"an endless device": "/dev/zero", "a link to nothing": path.with_name("nothing"), "a link to itself": path, "a link out": twin}
        path.symlink_to(target[kind])
    return f"{kind} in its place"


# ---- the watch -------------------------------------------------------------------------------------------

# Audit events of changes: where their arguments have paths, each with that of the descriptor of the folder it may be relative to.
CHANGES = {
    "os.mkdir": ((0, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),),
    "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),), "os.truncate": ((0, None),),
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Free to read beside what Python imports from: the project's files, and what the system tells of this process and machine.
READABLE = (str(Path(__file__).resolve().parents[1]), "/proc", "/sys")


def within(path: str, folders: Iterable[str]) -> bool:
    """Whether a path is one of the folders or in one."""
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


def telling(function: Callable, place: int, flags: int) -> Callable:
    """A function of safetensors that opens the file in its argument `place`, with the audit event that Python's own `open` has."""

    @functools.wraps(function, updated=())
    def told(*arguments, **options):
        path = options["filename"] if "filename" in options else arguments[place]
        sys.audit("open", os.fspath(path), None, flags)
        return function(*arguments, **options)

    return told


@contextlib.contextmanager
def safetensors_heard() -> Iterator[None]:
    """In the block, files that safetensors opens are audit events, in every module that is loaded: it is written in Rust, which Python does not see."""
    functions = (safetensors.safe_open, 0, os.O_RDONLY), (safetensors.serialize_file, 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    replaced = []
    for function, place, flags in functions:
        name, told = function.__name__, telling(function, place, flags)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is function:
                replaced.append((module, name, function))
                setattr(module, name, told)
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


class Watch:
    """Between `with` and its end, notes every path that this process changes outside `temporary`, and every file that it opens outside `inside`.

    Seen are files that Python or safetensors open; of what another library opens by itself, only changes in the scratch directory are found, by `listing`.
    Free to read are also folders of `sys.path`, READABLE, and what stands in the place of a damaged file (`damaged`): a link there may be followed. Reads in
    `outside` count wherever it is. An audit hook cannot be taken away: there is one for all watches, and it does nothing in between.
    """

    current: "Watch | None" = None
    installed = False

    def __init__(self, temporary: Path, inside: Iterable[Path], outside: Path, damaged: Iterable[Path]):
        self.temporary, self.outside = str(temporary), str(outside)
        self.inside = {str(temporary), *map(str, inside)}
        self.readable = {*READABLE, *(os.path.realpath(folder) for folder in sys.path if folder)}
        self.damaged = set(map(str, damaged))
        self.seen: list[str] = []

    def __enter__(self):
        if not Watch.installed:
            sys.addaudithook(Watch.hear)
            Watch.installed = True
        self.heard = safetensors_heard()
        self.heard.__enter__()
        Watch.current = self
        return self

    def __exit__(self, *_):
        Watch.current = None
        self.heard.__exit__(None, None, None)

    @staticmethod
    def hear(event: str, arguments: tuple) -> None:
        watch = Watch.current
        if watch is None or (event != "open" and event not in CHANGES):
            return
        Watch.current = None  # what is looked up here is not heard
        try:
            watch.note(event, arguments)
        finally:
            Watch.current = watch

    def note(self, event: str, arguments: tuple) -> None:
        writes = event != "open" or bool((arguments[2] or 0) & WRITING)
        for place, folder in CHANGES.get(event, ((0, None),)):
            if isinstance(arguments[place], int) or arguments[place] is None:
                continue
            path = os.fsdecode(arguments[place])
            if folder is not None and arguments[folder] not in (-1, None):
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[folder]}"), path)
            elif not writes and not os.path.isabs(path) and not os.path.lexists(path):
                continue  # relative to the descriptor of a folder, which the event does not name; the current folder is empty
            real = os.path.realpath(path)
            if writes and not within(real, (self.temporary, os.devnull)):
                self.seen.append(f"{event} of {real}")
            elif not writes and not self.may_read(os.path.abspath(path), real):
                self.seen.append(f"{real} was read")

    def may_read(self, path: str, real: str) -> bool:
        """Whether a file may be opened as path that is truly at real."""
        if path in self.damaged or within(real, self.inside):
            return True
        return within(real, self.readable) and not within(real, (self.outside,))


def listing(folder: Path) -> dict[str, tuple]:
    """Everything in a folder; of what is no folder also inode, size and time of change."""
    found = {}
    for parent, folders, files in os.walk(folder):
        found |= {os.path.join(parent, name): () for name in folders}
        for name in files:
            status = os.lstat(os.path.join(parent, name))
            found[os.path.join(parent, name)] = (stat.S_IFMT(status.st_mode), status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def kilobytes(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def memory_limit(limit: int) -> Iterator[None]:
    """Refuse allocations beyond what the process has now and limit bytes (RLIMIT_DATA), and start the count of its peak anew."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    resource.setrlimit(resource.RLIMIT_DATA, (kilobytes("VmData") + limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class Hang(BaseException):
    """One mutation took HANG_SECONDS."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise Hang in the block after so many seconds of the clock."""

    def stop(number, frame):
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def processor_seconds() -> float:
    """Of this process and the ones it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# ---- the run ---------------------------------------------------------------------------------------------


@dataclass
class Input:
    """One kind of input."""

    name: str
    make: Callable[[Path], None]  # writes a good one into a folder
    files: tuple[str, ...]  # those that are damaged
    read: Callable[[Path], None]  # what a command does with it; AssertionError where it accepts something that is not right
    expected: tuple[type[Exception], ...]  # exceptions that commands print as one line


@dataclass
class Report:
    """What became of the mutations of one kind of input."""

    input: str
    mutations: int = 0
    loaded: int = 0
    refused: int = 0
    tracebacks: int = 0  # other exceptions, messages of several lines
    wrong: int = 0  # loaded, and not what the file says or not usable
    outside: int = 0  # wrote anywhere, or read outside its folder, as far as `Watch` sees
    slow: int = 0
    peak_bytes: int = 0  # resident memory beyond that before the first mutation
    slowest_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)  # what was done → what happened
    messages: dict[str, int] = field(default_factory=dict)  # every refusal, without the path

    @property
    def failed(self) -> bool:
        return bool(self.failures)

    def to_dict(self) -> dict:
        """As JSON values, without the messages."""
        return {key: value for key, value in asdict(self).items() if key != "messages"}


def fuzz(kind: Input, mutations: int, folder: Path, seed: int = 0) -> Report:
    """Damage a good input in so many different ways and read each; folder is a scratch directory. The same seed damages in the same ways."""
    good, case, outside, temporary, elsewhere = (folder / name for name in ("good", "case", "outside", "temporary", "elsewhere"))
    for path in (good, outside, temporary, elsewhere):
        path.mkdir(parents=True)
    kind.make(good)
    kind.make(outside)
    report = Report(kind.name)
    shutil.copytree(good, case, symlinks=True)
    kind.read(case)  # the undamaged one must load; imports happen here
    shutil.rmtree(case)
    done: set[str] = set()
    previous = os.getcwd(), tempfile.tempdir, sys.dont_write_bytecode
    os.chdir(elsewhere)
    tempfile.tempdir, sys.dont_write_bytecode = str(temporary), True

    def damage_and_read(data: st.DataObject) -> None:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(good, case, symlinks=True)
        names = data.draw(st.sampled_from([(name,) for name in kind.files] + [kind.files[:2]]))
        what = "; ".join([mutate_file(data, case / name, outside / name) for name in names])
        if what not in done and len(done) < mutations:
            done.add(what)
            record(report, kind, folder, case, temporary, what)

    try:
        with memory_limit(MEMORY_LIMIT):
            before = kilobytes("VmHWM")
            for turn in range(MOST_TURNS):
                if len(done) < mutations:
                    drive(damage_and_read, mutations - len(done) + 10, seed * MOST_TURNS + turn)
            report.peak_bytes = kilobytes("VmHWM") - before
    finally:
        os.chdir(previous[0])
        tempfile.tempdir, sys.dont_write_bytecode = previous[1:]
    return report


def drive(test: Callable[[st.DataObject], None], count: int, seed: int) -> None:
    """Let hypothesis draw at most so many examples for test."""
    settings = hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck)
    )
    hypothesis.seed(seed)(settings(hypothesis.given(st.data())(test)))()


def record(report: Report, kind: Input, folder: Path, case: Path, temporary: Path, what: str) -> None:
    """Read one damaged input and note what happens."""
    before, started, failed = listing(folder), processor_seconds(), None
    report.mutations += 1
    with Watch(temporary, (case, folder / "good"), folder / "outside", (case / name for name in kind.files)) as watch:
        try:
            with time_limit(HANG_SECONDS):
                kind.read(case)
            report.loaded += 1
        except kind.expected as error:
            report.refused += 1
            message = str(error)
            plain = message.replace(str(case), "…")
            report.messages[plain] = report.messages.get(plain, 0) + 1
            if not message.strip() or not message.isprintable() or len(message) > LONGEST_MESSAGE:
                failed, report.tracebacks = f"not one line: {message!r:.300}", report.tracebacks + 1
        except AssertionError as error:
            failed, report.wrong = f"wrong: {error}", report.wrong + 1
        except Hang:
            failed, report.slow = f"took more than {HANG_SECONDS} s", report.slow + 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed, report.tracebacks = f"{type(error).__name__}: {error!s:.300} at {_where(error)}", report.tracebacks + 1
    seconds = processor_seconds() - started
    report.slowest_seconds = max(report.slowest_seconds, seconds)
    if failed is None and seconds > SLOW_SECONDS:
        failed, report.slow = f"took {seconds:.1f} s", report.slow + 1
    changed = before.items() ^ listing(folder).items()
    if watch.seen or changed:
        failed, report.outside = f"{failed or ''} {[*watch.seen, *sorted({path for path, _ in changed})][:3]}", report.outside + 1
    if failed is not None:
        report.failures.append(f"{what} → {failed}")


def _where(error: BaseException) -> str:
    """File and line of the last two frames."""
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(f"{Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return " < ".join(reversed(frames[-4:]))
