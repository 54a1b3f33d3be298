"""BLEU and CIDEr against pycocoevalcap, on published captions (one reference each) or on random ones.

    python scripts/bench/metrics.py [--data DIR] [--repeats N] [--json PATH|-]

M1 scores captions split at white space; M2 includes the Penn Treebank tokenisation, theirs through Java (left out
where there is no Java). Both sides start from lists of strings; nothing of ours is kept from one repeat to the next,
and the values are compared before timing.
"""

import contextlib
import io
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common import REPOSITORY, argument_parser, interleave, report, row

from captioner import metrics
from captioner.metrics import ptb

PEER = "pycocoevalcap"
PACKAGES = (PEER, "numpy")
NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "CIDEr")


def run(data: Path | None = None, repeats: int = 7) -> list[dict]:
    """Rows M1 and M2.

    `data` is a folder with `references.txt` and files of hypotheses, line k belonging to line k; without one, the
    published captions beside the checkout, or else random ones.
    """
    hypotheses, references, source = _captions(data)
    what = f"BLEU + CIDEr, {len(hypotheses):,} captions x {len(references[0])} reference ({source})"
    rows = [_row("M1", what, "none", 10.0, hypotheses, references, repeats)]
    if shutil.which("java"):
        rows.append(_row("M2", what + ", with PTB tokens", "ptb", 5.0, hypotheses, references, repeats))
    else:
        print("M2 left out: no java on PATH for the peer's tokenizer", file=sys.stderr)
    return rows


def _row(
    id: str, what: str, tokenize: str, must: float, hypotheses: list[str], references: list[list[str]], repeats: int
) -> dict:
    def ours() -> dict[str, float]:
        ptb.forget()
        return metrics.score(hypotheses, references, tokenize)[0]

    theirs = _peer(hypotheses, references, tokenize)
    mine, expected = ours(), theirs()
    difference = max(abs(mine[name] - expected[name]) for name in NAMES)
    if difference > 1e-9:
        raise RuntimeError(f"{id}: scores differ by {difference:g}: {mine} against {expected}")
    seconds = interleave({"ours": ours, "theirs": theirs}, repeats)
    return row(id, what, **seconds, peer=PEER, must=must, dtype="float64", largest_difference=difference)


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
    if data is None:
        data = Path(os.environ.get("CAPTIONER_SHARED", REPOSITORY.parent / "shared")) / "gcc-results"
        if not data.is_dir():
            return (*_random_captions(11_267), "random words")
    references = [[line] for line in _lines(data / "references.txt")]
    systems = sorted(path for path in data.glob("*.txt") if path.name != "references.txt")
    if not systems:
        raise FileNotFoundError(f"no hypotheses: {data} has no .txt file beside references.txt")
    return _lines(systems[0]), references, systems[0].stem


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _random_captions(count: int) -> tuple[list[str], list[list[str]]]:
    """Captions of 5 to 15 words whose frequencies fall off as in text."""
    draw = random.Random(0)
    words = [f"w{chr(97 + k % 26)}{chr(97 + k // 26 % 26)}{chr(97 + k // 676)}" for k in range(12_000)]
    weights = [1 / (k + 3) for k in range(len(words))]

    def caption() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(5, 15))) + "."

    return [caption() for _ in range(count)], [[caption()] for _ in range(count)]


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="references.txt and hypotheses, one caption a line")
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs per row (default 7)")
    arguments = parser.parse_args()
    report(run(arguments.data, arguments.repeats), arguments.json, PACKAGES)


if __name__ == "__main__":
    main()
