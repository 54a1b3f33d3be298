"""adapter_config.json of `peft`: what a LoRA asks for, checked, and which modules it means by peft's rules."""

import json
import re
import reprlib
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
# Settings of peft that change what an adapter computes and that we do not have, with their values of no effect.
# Other initialisations than these change the base weights too.
WITHOUT_EFFECT = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None, []),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
# An expression from a file can take Python's `re` exponential time: a process of its own matches, which can be stopped.
REGEX_SECONDS = 4  # of processor time: a machine busy with other work gives them late
REGEX_PATIENCE = 60  # seconds of the clock
MAX_CONFIG_BYTES = 2**24
REGEX_MATCHER = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_CPU)[1]))
patterns, names = json.load(sys.stdin)
try:
    json.dump([[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns], sys.stdout)
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    sys.exit(str(error))
"""


def read_config(directory: str | Path) -> dict[str, Any]:
    """adapter_config.json of a directory, of any kind of adapter (`peft_type`). Raises FileNotFoundError where it is
    missing, ValueError where it is no JSON object.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return config


def read_lora_config(directory: Path) -> dict[str, Any]:
    """`read_config`, checked to be a LoRA that LoRALinear can compute. Raises ValueError where it is not."""
    config, path = read_config(directory), directory / CONFIG_FILE
    for key, values in WITHOUT_EFFECT.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{path}: {key} = {reprlib.repr(config[key])} is not supported")
    for key in REQUIRED:
        if config.get(key) is None:
            raise ValueError(f"{path}: lacks {key}")
    for key, (holds, must_be) in VALID.items():
        if config.get(key) is not None and not holds(config[key]):
            raise ValueError(f"{path}: {key} = {reprlib.repr(config[key])} is not {must_be}")
    return config


def is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**20


def is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e9


def are_names(value: Any) -> bool:
    """A regular expression, or a list of names."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


# What the settings that we do have must be, and how a message says it.
VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (is_rank, "a whole number from 1 to 1048576"),
    "lora_alpha": (is_alpha, "a number above 0 and at most 1e9"),
    "lora_dropout": (lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "target_modules": (lambda value: are_names(value) and len(value) > 0, "a regular expression or a list of names"),
    "exclude_modules": (are_names, "a regular expression or a list of names"),
    "rank_pattern": (
        lambda value: isinstance(value, dict) and all(map(is_rank, value.values())),
        "an object of whole numbers from 1 to 1048576",
    ),
    "alpha_pattern": (
        lambda value: isinstance(value, dict) and all(map(is_alpha, value.values())),
        "an object of numbers above 0 and at most 1e9",
    ),
}


def default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and the others by a regular expression that matches one whole module path, as peft
    reads them: re.match(rf"(.*\\.)?({key})$", path).
    """
    default = Counter(values.values()).most_common(1)[0][0]
    return default, {f"^{re.escape(path)}": value for path, value in values.items() if value != default}


def read_patterns(config: dict[str, Any], donors: list[str], path: Path) -> tuple[set[str], dict[str, dict[str, Any]]]:
    """By peft's rules: which donor modules the config targets, and rank and alpha of each."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    keys = {key: rf"(.*\.)?({key})" for key in (*ranks, *alphas)}
    expressions = [value for value in (targets, excluded) if isinstance(value, str) and value.lower() != "all-linear"]
    matched = full_matches([*expressions, *keys.values()], donors, path)

    def among(value: str | list[str]) -> set[str]:
        if isinstance(value, str):
            return set(donors) if value.lower() == "all-linear" else matched[value]
        ends = set(value)
        return {donor for donor in donors if not ends.isdisjoint(suffixes(donor))}

    def first_of(patterns: dict[str, float], donor: str, default: float) -> float:
        return next((value for key, value in patterns.items() if donor in matched[keys[key]]), default)

    settings = {
        donor: {"rank": first_of(ranks, donor, config["r"]), "alpha": first_of(alphas, donor, config["lora_alpha"])}
        for donor in donors
    }
    return among(targets) - among(excluded), settings


def full_matches(patterns: Iterable[str], names: list[str], path: Path) -> dict[str, set[str]]:
    """The names that each regular expression of the config at path matches whole."""
    patterns = list(dict.fromkeys(patterns))
    if not patterns:
        return {}
    command = [sys.executable, "-I", "-S", "-c", REGEX_MATCHER, str(REGEX_SECONDS)]
    question, too_slow = json.dumps([patterns, names]), f"{path}: its regular expressions take more than"
    try:
        answer = subprocess.run(command, input=question, capture_output=True, text=True, timeout=REGEX_PATIENCE)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{too_slow} {REGEX_PATIENCE} s: {short(patterns)}") from None
    if answer.returncode == -signal.SIGXCPU:
        raise ValueError(f"{too_slow} {REGEX_SECONDS} s: {short(patterns)}")
    if answer.returncode:
        reason = answer.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{path}: no regular expressions ({reason}): {short(patterns)}")
    return {pattern: set(found) for pattern, found in zip(patterns, json.loads(answer.stdout), strict=True)}


def suffixes(name: str) -> list[str]:
    """name, and it without its first components: `a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def untouched_targets(targets: str | list[str], donors: Iterable[str]) -> list[str]:
    """The listed targets that no donor module of the file fits."""
    fitting = {suffix for donor in donors for suffix in suffixes(donor)}
    return [] if isinstance(targets, str) else [target for target in targets if target not in fitting]


def short(names: Iterable[str], limit: int = 8) -> str:
    """A sorted list for a message, cut after limit names; names are cut to 200 characters and stay on one line."""
    names = sorted(names)
    shown = [name if name.isprintable() else ascii(name) for name in names[:limit]]
    rest = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(name if len(name) <= 200 else f"{name[:200]}…" for name in shown) + rest if names else "none"
