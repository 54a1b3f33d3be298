"""What every command shares: flags made from a dataclass, exit codes, signals. Imports no torch."""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path


def choose_waiting(environment: typing.MutableMapping[str, str] = os.environ, load: Path = Path("/proc/loadavg")) -> None:
    """How OpenMP threads wait for each other: spinning for a moment on an idle machine, else asleep; what the environment says already stays.

    A training step on two cores takes 1.5 s with short spinning, 1.9 s asleep; beside one busy process 4.7 s, 2.8 s, and 10.7 s with libgomp's own default.
    Read by libgomp when torch is imported.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(environment):
        return
    try:
        running = int(load.read_text().split()[3].partition("/")[0])  # processes that run or could, this one included
    except (OSError, ValueError, IndexError):
        running = 2
    environment |= {"GOMP_SPINCOUNT": "30000"} if running <= 1 else {"OMP_WAIT_POLICY": "passive"}


choose_waiting()
# oneDNN keeps scratch memory with each of its last 1,024 products; with texts of every length that comes to 12 GB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

from captioner.errors import UsageError, UserError  # noqa: E402
from captioner.files import describe_os_error  # noqa: E402

DONE, FAILED, USAGE, SOME_BAD = 0, 1, 2, 3  # the exit codes; an interrupt exits with 128 + signal number


def setting(default, help: str, choices: Iterable | None = None, parse: Callable[[str], object] | None = None):
    """A dataclass field that becomes a flag: its default, its help text, for a closed set its choices, and for a syntax of its own the parser."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices) if choices else None, "parse": parse})


def comma_list(choices: tuple[str, ...] | None) -> Callable[[str], tuple[str, ...]]:
    """Parser of `a,b`; `none` is the empty list. Rejects words outside choices by naming them."""

    def parse(text: str) -> tuple[str, ...]:
        words = () if text == "none" else tuple(word.strip() for word in text.split(",") if word.strip())
        for word in words:
            if choices and word not in choices:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(choices)} (or none)")
        return words

    return parse


class Parser(argparse.ArgumentParser):
    """argparse that names the closest flags where one is unknown, in one of several processes."""

    def error(self, message: str) -> typing.NoReturn:
        if not is_main_process():
            sys.exit(USAGE)
        super().error(message)

    def parse_known(self, argv: list[str] | None):
        parsed, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=3)
            self.error(f"unknown argument {unknown[0]!r}" + (f", did you mean {' or '.join(close)}?" if close else f"; the flags are {' '.join(flags)}"))
        return parsed


def parse_settings(cls, argv: list[str] | None, description: str, presets: dict[str, dict] | None = None):
    """Instance of the dataclass cls from command-line words.

    Each field made by `setting` is one kebab-case flag; a field named in `cls.positional` is a positional argument. With presets, the row named by
    `--preset` replaces the defaults and flags replace the row. The instance's `given` attribute is the set of field names that were on the command line.
    Exits with 2 and a message that names the choices on an unknown flag or value.
    """
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, choices = hints[field.name], field.metadata["choices"]
        optional = isinstance(kind, types.UnionType)
        if optional:
            kind = next(member for member in typing.get_args(kind) if member is not type(None))
        shown = (",".join(field.default) or "none") if isinstance(field.default, tuple) else field.default
        text = field.metadata["help"].replace("%", "%%") + ("" if optional and field.default is None else f" (default: {shown})")
        options: dict = {"help": text, "default": argparse.SUPPRESS}
        if field.name in getattr(cls, "positional", ()):
            nargs = "*" if field.metadata.get("repeat") else "?"
            parser.add_argument(field.name, nargs=nargs, metavar=field.name.upper(), **options)
            continue
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_args(kind) == (str, str):
            parser.add_argument(flag, nargs=2, metavar=("A", "B"), **options)
        elif typing.get_origin(kind) is tuple and field.metadata.get("repeat"):
            parser.add_argument(flag, action="append", metavar="FILE", **options)
        elif typing.get_origin(kind) is tuple:
            metavar = ",".join(choices) if choices else "A,B"
            parser.add_argument(flag, type=comma_list(choices), metavar=metavar, **options)
        elif field.metadata.get("parse"):
            parser.add_argument(flag, type=field.metadata["parse"], metavar=field.name.rpartition("_")[2].upper(), **options)
        else:
            parser.add_argument(flag, type=kind, choices=choices, metavar=None if choices else kind.__name__.upper(), **options)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_known(argv)).items()}
    preset = {}
    if presets is not None:
        preset = presets[given.get("preset", next(field.default for field in dataclasses.fields(cls) if field.name == "preset"))]
    settings = cls(**(preset | given))
    settings.given = frozenset(given)
    return settings


def repeated(help: str):
    """A dataclass field whose flag, or positional argument, may be given several times: a tuple of strings."""
    return dataclasses.field(default=(), metadata={"help": help, "choices": None, "repeat": True})


def require_positive(settings, *names: str) -> None:
    """Raise UsageError that names the flag where a setting that is given is below 1."""
    for name in names:
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Parser of a flag that stays the text that it is, once check(text) raises no ValueError."""

    def parse(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse


def run_command(main: Callable[[list[str] | None], int], argv: list[str] | None = None, expected: tuple[type[Exception], ...] = ()) -> typing.NoReturn:
    """Run main and exit with its code; UserError, the expected exceptions and disk errors become one line on stderr and exit code 1 or 2."""
    keep_freed_memory()
    try:
        code = main(argv)
    except (UserError, *expected) as error:
        code = USAGE if isinstance(error, UsageError) else FAILED
        # What is wrong with the flags is the same in all processes: one says it.
        if code == FAILED or is_main_process():
            print(f"{'' if str(error).startswith('process ') else own_name()}error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{own_name()}error: {describe_os_error(error)}", file=sys.stderr)
        code = FAILED
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch has no class of its own for a worker that died
            raise
        print(f"{own_name()}error: a process that decodes images died: {str(error).splitlines()[0]} Give it more memory or fewer --workers", file=sys.stderr)
        code = FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.exit(code)


def keep_freed_memory() -> bool:
    """Make glibc keep freed tensors for the next ones, where it would return them to the kernel and fault every page in again; False without glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # parameters by their numbers in malloc.h
        return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
    return False


def is_main_process() -> bool:
    """Whether this is the process that speaks to people: the only one, or the first that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def own_name() -> str:
    """The beginning of an error's line that says which of several processes it is from; nothing for the main one."""
    return "" if is_main_process() else f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: "


def say(line: str) -> None:
    """A line for people on stderr, above a progress bar if there is one; from the main process alone."""
    from tqdm import tqdm

    if is_main_process():
        tqdm.write(line, file=sys.stderr)


def progress(items: Iterable, description: str) -> Iterable:
    """The items, with a progress bar on stderr if that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=description, disable=None if is_main_process() else True, unit="batch", dynamic_ncols=True)


class StopSignal:
    """Between `with` and its end, the first SIGINT or SIGTERM sets `number` for loops to poll; a second one ends the process at once.

    Under a launcher, which passes signals on to processes that may have got them already, one that follows within PASSED_ON seconds does not count.
    """

    PASSED_ON = 2.0
    number: int | None = None

    def __enter__(self):
        self.previous = {which: signal.signal(which, self.receive) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, frame):
        launched = "WORLD_SIZE" in os.environ
        if self.number is None:
            self.number, self.came = number, time.monotonic()
            if is_main_process():
                # Straight to the file: the signal may have come in the middle of another line.
                os.write(2, b"stopping at the next safe point; a second signal ends at once\n")
            if not launched:
                for which in self.previous:
                    signal.signal(which, signal.SIG_DFL)
        elif time.monotonic() - self.came > self.PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __exit__(self, *_):
        for which, handler in self.previous.items():
            signal.signal(which, handler)

    @property
    def exit_code(self) -> int:
        return 128 + self.number
