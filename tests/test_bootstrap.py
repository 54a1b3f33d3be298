"""The paired bootstrap against a slow one that scores resampled corpora with pycocoevalcap."""

import numpy as np
import pytest

from captioner.metrics import score
from captioner.metrics.bootstrap import item_counts, mean_group, paired_bootstrap, ratio_group, text_groups

WORDS = "a the red dog runs over green lawn with two boats by water".split()


def corpus(items: int, seed: int):
    """(captions of A, captions of B, references): random words, B nearer to the references."""
    generator = np.random.default_rng(seed)

    def text(length):
        return " ".join(generator.choice(WORDS, size=length))

    references = [[text(generator.integers(4, 9)) for _ in range(generator.integers(1, 4))] for _ in range(items)]
    a = [text(generator.integers(3, 9)) for _ in references]
    b = [own[0] if generator.random() < 0.3 else text(generator.integers(3, 9)) for own in references]
    return a, b, references


def draws_as_indices(items: int, draws: int, seed: int) -> list[np.ndarray]:
    """The items of every draw, one number for each time that an item is drawn."""
    counts = np.concatenate(list(item_counts(items, draws, seed)), axis=1).astype(int)
    return [np.repeat(np.arange(items), column) for column in counts.T]


def test_draws_are_resamples_with_replacement():
    counts = np.concatenate(list(item_counts(40, 70, 3)), axis=1)
    assert counts.shape == (40, 70) and np.all(counts.sum(0) == 40)
    assert counts.mean() == 1 and counts.var() == pytest.approx(1 - 1 / 40, abs=0.1)
    assert np.array_equal(counts, np.concatenate(list(item_counts(40, 70, 3)), axis=1))
    assert not np.array_equal(counts, np.concatenate(list(item_counts(40, 70, 4)), axis=1))


def test_bleu_of_every_draw_is_that_of_the_resampled_corpus():
    """pycocoevalcap's BLEU on each drawn corpus gives the same interval."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    a, b, references = corpus(25, 0)
    found = paired_bootstrap(text_groups(a, b, references, "none"), draws=40, seed=5)
    drawn = []
    for chosen in draws_as_indices(25, 40, 5):
        gts = {place: references[item] for place, item in enumerate(chosen)}
        values = [bleu.Bleu(4).compute_score(gts, {place: [texts[item]] for place, item in enumerate(chosen)}, verbose=0)[0] for texts in (a, b)]
        drawn.append(np.subtract(values[1], values[0]))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    for order in range(4):
        difference = found[f"Bleu_{order + 1}"]
        assert (difference.low, difference.high) == pytest.approx((low[order], high[order]), abs=1e-9)


def test_cider_keeps_the_document_frequencies_of_the_whole_set():
    """The mean over drawn items of pycocoevalcap's per-item values of the whole set."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    a, b, references = corpus(25, 1)
    gts = dict(enumerate(references))
    items = [cider.Cider().compute_score(gts, {item: [text] for item, text in enumerate(texts)})[1] for texts in (a, b)]
    drawn = [np.mean(items[1][chosen] - items[0][chosen]) for chosen in draws_as_indices(25, 40, 5)]
    found = paired_bootstrap(text_groups(a, b, references, "none"), draws=40, seed=5)["CIDEr"]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-9)
    better = items[1] - items[0]
    assert (found.wins, found.losses, found.ties) == ((better > 1e-9).sum(), (better < -1e-9).sum(), (abs(better) <= 1e-9).sum())


def test_values_are_those_of_the_metrics():
    a, b, references = corpus(30, 2)
    found = paired_bootstrap(text_groups(a, b, references, "ptb"), draws=10)
    for texts, side in ((a, "a"), (b, "b")):
        for name, value in score(texts, references, "ptb")[0].items():
            assert getattr(found[name], side) == pytest.approx(value, abs=1e-12)
    assert all(difference.difference == difference.b - difference.a for difference in found.values())


def test_a_ratio_is_taken_of_sums_and_lower_may_be_better():
    generator = np.random.default_rng(0)
    false, stated = generator.integers(0, 2, size=(2, 20)), generator.integers(0, 4, size=(2, 20))
    group = ratio_group("hallucination", (false[0], stated[0]), (false[1], stated[1]), lower_is_better=True)
    found = paired_bootstrap([group], draws=50, seed=1)["hallucination"]
    ratios = [false[side].sum() / stated[side].sum() for side in (0, 1)]
    assert (found.a, found.b) == pytest.approx(tuple(ratios))
    drawn = [false[1][i].sum() / stated[1][i].sum() - false[0][i].sum() / stated[0][i].sum() for i in draws_as_indices(20, 50, 1)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    own = [np.divide(false[side], stated[side], out=np.zeros(20), where=stated[side] > 0) for side in (0, 1)]
    assert found.wins == (own[1] < own[0]).sum() and found.losses == (own[1] > own[0]).sum()


def test_equal_systems_differ_by_exactly_nothing():
    a, _, references = corpus(300, 3)
    for difference in paired_bootstrap([*text_groups(a, list(a), references, "ptb"), mean_group("x", np.ones(300) / 3, np.ones(300) / 3)]).values():
        assert difference.low == difference.high == difference.difference == 0
        assert (difference.wins, difference.losses, difference.ties) == (0, 0, 300)


def test_a_known_shift_excludes_zero_and_noise_does_not():
    generator = np.random.default_rng(0)
    a, noise = generator.normal(size=(2, 400))
    shifted = paired_bootstrap([mean_group("x", a, a + 0.2 + 0.1 * noise)])["x"]
    assert 0.18 < shifted.low < 0.2 < shifted.high < 0.22
    # The normal interval of a mean of 400 differences with standard deviation 0.1.
    assert shifted.high - shifted.low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)
    unsure = paired_bootstrap([mean_group("x", a, a + noise)])["x"]
    assert unsure.low < 0 < unsure.high


def test_refused():
    with pytest.raises(ValueError, match="0 draws"):
        paired_bootstrap([mean_group("x", np.zeros(2), np.zeros(2))], draws=0)
    with pytest.raises(ValueError, match=r"\[2, 3\] items"):
        paired_bootstrap([mean_group("x", np.zeros(2), np.zeros(2)), mean_group("y", np.zeros(3), np.zeros(3))])
