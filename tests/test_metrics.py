"""BLEU and CIDEr-D: worked examples, nltk where definitions agree, pycocoevalcap, published numbers, errors."""

import contextlib
import io
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from captioner import metrics
from captioner.metrics import bleu, cider, ngrams, score

BLEU_NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"]
WORDS = "a the dog cat runs on grass red ball and man in of jumps over".split()
# BLEU-1 … BLEU-4, CIDEr
# fmt: off
PUBLISHED = {
    "base-attn-ffn_beam": (
        0.1855347052824929, 0.10044291651703253, 0.060555578529375195, 0.03849081449311731, 0.43363701296557405,
    ),
    "base-attn-ffn_bestof10": (
        0.2162821029450326, 0.1067289563372452, 0.05841097710892219, 0.03342200706799457, 0.4519655124398798,
    ),
    "large-attn_sample": (
        0.17888999137977338, 0.07957534626436429, 0.039267468548054046, 0.020536034556917913, 0.32255264364816394,
    ),
}
# fmt: on


def peer_scores(hypotheses, references):
    """pycocoevalcap on captions that are tokens joined by spaces: corpus dict and per-item dicts, named as ours."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    truths = dict(enumerate(references))
    results = {k: [hypothesis] for k, hypothesis in enumerate(hypotheses)}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu_corpus, bleu_items = Bleu(4).compute_score(truths, results, verbose=0)
        cider_corpus, cider_items = Cider().compute_score(truths, results)
    corpus = dict(zip(BLEU_NAMES, bleu_corpus)) | {"CIDEr": float(cider_corpus)}
    items = [dict(zip(BLEU_NAMES, row[:4])) | {"CIDEr": float(row[4])} for row in zip(*bleu_items, cider_items)]
    return corpus, items


def random_corpus(seed, count, most_references):
    """Captions of 0 to 12 words (references of 1 and more), with duplicates and a hypothesis of one word."""
    draw = random.Random(seed)

    def caption(least):
        return " ".join(draw.choices(WORDS, k=draw.randint(least, 12)))

    hypotheses = [caption(0) for _ in range(count)]
    references = [[caption(1) for _ in range(draw.randint(1, most_references))] for _ in range(count)]
    hypotheses[0] = ""
    hypotheses[-1] = "dog"
    if count > 3:
        references[1] = [hypotheses[1] or "dog"] * 2
        references[2] = references[1] + references[2]
        hypotheses[2] = "the the the the the the the"
    return hypotheses, references


def assert_equal_to_peer(hypotheses, references):
    corpus, items = score(hypotheses, references, tokenize="none")
    expected_corpus, expected_items = peer_scores(hypotheses, references)
    assert corpus == pytest.approx(expected_corpus, rel=1e-9, abs=1e-12)
    assert len(items) == len(expected_items)
    for item, expected in zip(items, expected_items):
        assert item == pytest.approx(expected, rel=1e-9, abs=1e-12)


# Worked by hand


def test_bleu_clips_repeated_words():
    references = [["the cat is on the mat", "there is a cat on the mat"]]
    corpus, items = bleu(["the the the the the the the"], references, tokenize="none")
    assert corpus["Bleu_1"] == pytest.approx(2 / 7, abs=1e-8)
    assert items == [pytest.approx(corpus)]


def test_bleu_brevity_penalty_takes_the_closest_length_and_the_shorter_of_two():
    one_short = bleu(["a b c"], [["a b c d", "a b c d e f"]], tokenize="none")[0]
    assert one_short["Bleu_1"] == pytest.approx(math.exp(1 - 4 / 3), abs=1e-8)
    tie = bleu(["a b c"], [["a b c d", "a b"]], tokenize="none")[0]
    assert tie["Bleu_1"] == pytest.approx(1.0, abs=1e-8)


def test_bleu_corpus_value_sums_counts_instead_of_averaging():
    corpus, items = bleu(["a b c d", "x"], [["a b c d"], ["y"]], tokenize="none")
    assert corpus["Bleu_1"] == pytest.approx(4 / 5, abs=1e-8)
    assert [item["Bleu_1"] for item in items] == pytest.approx([1.0, 0.0], abs=1e-8)


def test_cider_of_a_perfect_and_an_unrelated_caption():
    # every n-gram stands in one of two documents, so each cosine of the first item is 1; the second shares nothing
    corpus, items = cider(["a b c d e", "p q"], [["a b c d e"], ["v w x y z"]], tokenize="none")
    assert items == pytest.approx([10.0, 0.0])
    assert corpus == pytest.approx(5.0)


def test_cider_length_is_counted_in_bigrams():
    # unigrams a b of a b c: cosine 2/sqrt(6), bigram a b of a b, b c: 1/sqrt(2), lengths 1 and 2 bigrams
    _, items = cider(["a b", "z"], [["a b c"], ["y"]], tokenize="none")
    assert items[0] == pytest.approx(10 * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72))
    # one word against none: both have no bigrams, so there is no length penalty
    _, items = cider(["a", "z"], [["a b"], ["y"]], tokenize="none")
    assert items[0] == pytest.approx(10 * (1 / math.sqrt(2)) / 4 * math.exp(-1 / 72))


def test_cider_clips_the_hypothesis_and_averages_over_references():
    # "a a" against "a": min(2, 1) * 1 / (2 * 1) = 1/2 of the unigrams; "b" matches nothing; one bigram more than either
    _, items = cider(["a a", "z"], [["a", "b"], ["y"]], tokenize="none")
    assert items[0] == pytest.approx(10 * (0.5 / 4) / 2 * math.exp(-1 / 72))


def test_cider_of_one_item_is_zero():
    assert cider(["a b c"], [["a b c"]], tokenize="none") == (0.0, [0.0])


# Other people's programs


def test_corpus_bleu_equals_nltk():
    nltk_bleu = pytest.importorskip("nltk.translate.bleu_score")
    hypotheses, references = random_corpus(11, 60, 4)
    # nltk counts one n-gram in a caption too short to have any
    hypotheses = [text + " a red ball runs" for text in hypotheses]
    split_references = [[reference.split() for reference in own] for own in references]
    split_hypotheses = [hypothesis.split() for hypothesis in hypotheses]
    expected = [
        nltk_bleu.corpus_bleu(split_references, split_hypotheses, weights=(1 / n,) * n) for n in (1, 2, 3, 4)
    ]
    corpus, _ = bleu(hypotheses, references, tokenize="none")
    assert expected[3] > 0
    assert list(corpus.values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("corpus", [(0, 40, 1), (1, 40, 5), (2, 7, 3), (3, 2, 2), (4, 150, 5)])
def test_equal_to_pycocoevalcap_on_random_corpora(corpus):
    assert_equal_to_peer(*random_corpus(*corpus))


@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [
        (["a dog runs"], [["a dog runs on grass", "the dog"]]),  # one item
        (["dog"], [["dog"]]),
        ([""], [["a dog"]]),
        (["", ""], [["a dog"], ["the cat", "a dog"]]),
        (["a dog", "a dog"], [["a dog", "a dog"], ["a dog"]]),
        (["a dog a dog a dog", "cat"], [["a dog", ""], ["cat cat cat"]]),  # an empty reference
        (["unseen words only here now", "a cat"], [["a dog"], ["a cat"]]),
    ],
)
def test_equal_to_pycocoevalcap_on_edge_cases(hypotheses, references):
    assert_equal_to_peer(hypotheses, references)


def test_keys_too_wide_to_pack_are_sorted_the_same():
    draw = np.random.default_rng(0)
    position, key = np.arange(500), draw.integers(0, 40, 500)
    packed = ngrams._sort_by_key(position, key, 40, 500)
    wide = ngrams._sort_by_key(position, key, 1 << 60, 500)
    for a, b in zip(packed, wide):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("system", PUBLISHED)
def test_published_numbers(system, shared_dir):
    def lines(name):
        return (shared_dir / "gcc-results" / f"{name}.txt").read_text(encoding="utf-8").splitlines()

    hypotheses, references = lines(system), [[line] for line in lines("references")]
    corpus, items = score(hypotheses, references, tokenize="none")
    assert list(corpus.values()) == pytest.approx(PUBLISHED[system], abs=1e-9)
    assert np.mean([item["CIDEr"] for item in items]) == pytest.approx(PUBLISHED[system][4], abs=1e-9)


def test_items_of_published_captions_equal_pycocoevalcap(shared_dir):
    def lines(name):
        return (shared_dir / "gcc-results" / f"{name}.txt").read_text(encoding="utf-8").splitlines()[:600]

    references = [list(pair) for pair in zip(lines("references"), lines("large-attn_sample"))]
    assert_equal_to_peer(lines("base-attn-ffn_beam"), references)


# The interface


def test_score_is_all_metrics_at_once():
    hypotheses, references = random_corpus(5, 30, 3)
    corpus, items = score(hypotheses, references, tokenize="none")
    bleu_corpus, bleu_items = bleu(hypotheses, references, tokenize="none")
    cider_corpus, cider_items = cider(hypotheses, references, tokenize="none")
    assert corpus == bleu_corpus | {"CIDEr": cider_corpus}
    assert items == [own | {"CIDEr": value} for own, value in zip(bleu_items, cider_items)]
    assert list(corpus) == [*BLEU_NAMES, "CIDEr"]
    assert all(type(value) is float for value in [*corpus.values(), *items[0].values(), *cider_items])


def test_tokenize_says_what_a_token_is():
    hypotheses, references = ["A dog's ball.", "the cat"], [["a dog 's ball"], ["the cat"]]
    assert bleu(hypotheses, references)[0]["Bleu_1"] == pytest.approx(1.0, abs=1e-6)
    assert bleu(hypotheses, references, tokenize="none")[0]["Bleu_1"] < 0.5


@pytest.mark.parametrize("metric", [bleu, cider, score])
@pytest.mark.parametrize(
    ("hypotheses", "references", "tokenize", "message"),
    [
        (["a", "b"], [["a"]], "none", "2 hypotheses but references for 1 items"),
        ([], [], "none", "no hypotheses to score"),
        (["a", "b"], [["a"], []], "none", "item 1 has no reference"),
        (["a"], [["a"]], "moses", "unknown tokenize 'moses': choose from ptb, none"),
        (["a", "b"], [["a"], "b"], "none", "item 1: references must be a list of strings"),
        ("ab", [["a"], ["b"]], "none", "not one string"),
        (["a", None], [["a"], ["b"]], "none", "item 1: a caption must be a string, not NoneType"),
    ],
)
def test_unfit_input_is_named(metric, hypotheses, references, tokenize, message):
    with pytest.raises(ValueError, match=message):
        metric(hypotheses, references, tokenize=tokenize)


def test_importing_metrics_needs_no_torch():
    code = "import sys, captioner.metrics; captioner.metrics.bleu(['a'], [['a']]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_a_metric_is_one_entry(monkeypatch):
    def words(counts):
        lengths = counts.length[counts.hypothesis].astype(float)
        return {"words": float(lengths.mean())}, {"words": lengths}

    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, words))
    corpus, items = score(["a b", "a b c d"], [["a"], ["b"]], tokenize="none")
    assert corpus["words"] == 3.0
    assert [item["words"] for item in items] == [2.0, 4.0]
