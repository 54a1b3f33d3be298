"""What the README and the scripts tell people to run exists and parses."""

import re
import shlex
import subprocess

import pytest

import best_of_n
import evaluate
import train
from captioner import cli
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.sh"))


def commands(text: str) -> list[list[str]]:
    """The words of every `python train.py …`, `evaluate.py …` and `best_of_n.py …`, variables and continuation lines included."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"python (?:train|evaluate|best_of_n)\.py[^\n`|#&;]*", joined)
    return [shlex.split(re.sub(r"\$\{?\w+\}?", "X", re.sub(r'"\$(@|\{@:2\})"', "", line))) for line in found]


SHOWN = commands(README) + [words for script in SCRIPTS for words in commands(script.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_every_shown_command_parses(words):
    words = [word for word in words if word not in ("…", "...")]
    if {"--help", "--resume", "--like"} & set(words) and "auto" not in words:
        assert words[-1] == "--help" or words[2] in ("--resume", "--like")
    elif words[1] == "train.py":
        train.resolve(words[2:])
    elif words[1] == "best_of_n.py":
        best_of_n.check(cli.parse_settings(best_of_n.Settings, words[2:], ""))
    else:
        evaluate.check(cli.parse_settings(evaluate.Settings, words[2:], ""))


def test_there_are_commands_to_check():
    assert len(SHOWN) >= 6


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_every_path_that_the_readme_names_exists():
    for path in re.findall(r"`((?:captioner|lora|data|scripts|tests)/[\w./-]*)`", README):
        assert (REPOSITORY / path).exists(), path
    for script in re.findall(r"bash (scripts/[\w./-]+)", README):
        assert (REPOSITORY / script).is_file(), script
