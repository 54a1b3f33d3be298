"""BLEU and CIDEr against pycocoevalcap, on published captions or on random ones.

    python scripts/bench/metrics.py [--data DIR] [--repeats N] [--json PATH|-]

M1 scores captions with one reference, split at white space; M1x5 those with five; M2 is M1 with the Penn Treebank
tokenisation, theirs through Java (left out where there is no Java). Both sides start from lists of strings; nothing of
ours is kept from one repeat to the next, and the values are compared before timing.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common import REPOSITORY, argument_parser, interleave, report, row, run_main

from captioner import metrics
from captioner.metrics import ptb

PEER = "pycocoevalcap"
PACKAGES = (PEER, "numpy")
IDS = ("M1", "M1x5", "M2")
NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr")


def run(data: Path | None = None, repeats: int = 7, only: Sequence[str] | None = None) -> list[dict]:
    """Rows M1, M1x5 and M2, or those in `only`.

    `data` is a folder with `references.txt` and files of hypotheses, line k belonging to line k; without one, the
    published captions beside the checkout, or else random ones.
    """
    asked = IDS if only is None else only
    rows = []
    if {"M1", "M2"} & set(asked):
        one = _captions(data)
    if "M1" in asked:
        rows.append(_row("M1", "none", 15.0, *one, repeats))
    if "M1x5" in asked:
        rows.append(_row("M1x5", "none", 9.0, *_five_references(), repeats))
    if "M2" in asked and shutil.which("java"):
        rows.append(_row("M2", "ptb", 10.0, *one, repeats))
    elif "M2" in asked:
        print("M2 left out: no java on PATH for the peer's tokenizer", file=sys.stderr)
    return rows


def _row(
    id: str, tokenize: str, must: float, hypotheses: list[str], references: list[list[str]], source: str, repeats: int
) -> dict:
    what = f"BLEU + CIDEr, {len(hypotheses):,} captions x {len(references[0])} ({source})"
    what += ", with PTB tokens" if tokenize == "ptb" else ""

    def ours() -> dict[str, float]:
        ptb.forget()
        return metrics.score(hypotheses, references, tokenize)[0]

    theirs = _peer(hypotheses, references, tokenize)
    mine, expected = ours(), theirs()
    difference = max(abs(mine[name] - expected[name]) for name in NAMES)
    if difference > 1e-9:
        raise RuntimeError(f"{id}: scores differ by {difference:g}: {mine} against {expected}")
    # Java works in a process of its own, whose seconds only the wall clock has.
    clock = time.perf_counter if tokenize == "ptb" else time.process_time
    seconds = interleave({"ours": ours, "theirs": theirs}, repeats, clock=clock)
    unit = "wall seconds" if tokenize == "ptb" else "cpu seconds"
    return row(id, what, **seconds, peer=PEER, must=must, dtype="float64", clock=unit, largest_difference=difference)


def _peer(hypotheses: list[str], references: list[list[str]], tokenize: str) -> Callable[[], dict[str, float]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def score() -> dict[str, float]:
        results = {k: [hypothesis] for k, hypothesis in enumerate(hypotheses)}
        truths = dict(enumerate(references))
        if tokenize == "ptb":
            with _quiet_children():
                results, truths = (
                    PTBTokenizer().tokenize({k: [{"caption": text} for text in texts] for k, texts in captions.items()})
                    for captions in (results, truths)
                )
        with contextlib.redirect_stdout(io.StringIO()):
            bleu, _ = Bleu(4).compute_score(truths, results, verbose=0)
            cider, _ = Cider().compute_score(truths, results)
        return dict(zip(NAMES, [*bleu, float(cider)]))

    return score


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Java reports its speed on stderr, whose descriptor it inherits."""
    saved = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _captions(data: Path | None) -> tuple[list[str], list[list[str]], str]:
    """Hypotheses, one reference each, and where they are from."""
    if data is None:
        data = _shared() / "gcc-results"
        if not data.is_dir():
            return (*_random_captions(11_267, 1), "random words")
    references = [[line] for line in _lines(data / "references.txt")]
    systems = sorted(path for path in data.glob("*.txt") if path.name != "references.txt")
    if not systems:
        raise FileNotFoundError(f"no hypotheses: {data} has no .txt file beside references.txt")
    return _lines(systems[0]), references, systems[0].stem


def _five_references() -> tuple[list[str], list[list[str]], str]:
    """The captions of Flickr8k beside the checkout, or else random ones; a hypothesis is spliced from two references."""
    files = sorted((_shared() / "flickr8k").glob("*/metadata.jsonl"))
    if not files:
        return (*_random_captions(11_000, 5), "random words")
    references = [json.loads(line)["captions"] for file in files for line in _lines(file)]
    references = [captions for captions in references if len(captions) == 5]
    return [_splice(*captions[:2]) for captions in references], references, "Flickr8k"


def _splice(first: str, second: str) -> str:
    """The first half of one caption and the second half of the other."""
    head, tail = first.split(), second.split()
    return " ".join(head[: len(head) // 2] + tail[len(tail) // 2 :])


def _shared() -> Path:
    return Path(os.environ.get("CAPTIONER_SHARED", REPOSITORY.parent / "shared"))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _random_captions(count: int, references: int) -> tuple[list[str], list[list[str]]]:
    """Captions of 5 to 15 words whose frequencies fall off as in text."""
    draw = random.Random(0)
    words = [f"w{chr(97 + k % 26)}{chr(97 + k // 26 % 26)}{chr(97 + k // 676)}" for k in range(12_000)]
    weights = [1 / (k + 3) for k in range(len(words))]

    def caption() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(5, 15))) + "."

    return [caption() for _ in range(count)], [[caption() for _ in range(references)] for _ in range(count)]


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="references.txt and hypotheses, one caption a line")
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs per row (default 7)")
    arguments = parser.parse_args()
    report(run(arguments.data, arguments.repeats), arguments.json, PACKAGES)


if __name__ == "__main__":
    run_main(main)
