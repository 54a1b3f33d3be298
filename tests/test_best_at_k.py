"""Expected best of k against all subsets."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from captioner.metrics.best_at_k import best_at_k, subset_weights


def brute_force(scores, values):
    """Mean over images and over all subsets of k of the value that the highest score chooses; max() takes the first of equals."""
    n = scores.shape[1]
    images = [
        [np.mean([value[max(subset, key=lambda sample: score[sample])] for subset in combinations(range(n), k)]) for k in range(1, n + 1)]
        for score, value in zip(scores, values, strict=True)
    ]
    return np.mean(images, axis=0)


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("levels", [2, 1000])
def test_all_subsets_agree(n, levels):
    """Two levels of scores give ties nearly everywhere."""
    generator = np.random.default_rng(n)
    scores, values = generator.integers(levels, size=(7, n)) / levels, generator.normal(size=(7, n))
    assert best_at_k(scores) == pytest.approx(brute_force(scores, scores), abs=1e-12)
    assert best_at_k(scores, values) == pytest.approx(brute_force(scores, values), abs=1e-12)


def test_ends_are_the_mean_and_the_choice_of_argmax():
    generator = np.random.default_rng(0)
    scores, values = generator.integers(3, size=(50, 10)), generator.normal(size=(50, 10))
    curve = best_at_k(scores, values)
    assert curve.shape == (10,) and curve[0] == pytest.approx(values.mean())
    assert curve[-1] == pytest.approx(values[np.arange(50), scores.argmax(1)].mean())
    assert np.all(np.diff(best_at_k(scores)) >= 0), "more samples never lower the expected best score"


def test_many_samples_lose_no_precision():
    weights = subset_weights(300)
    for k, rank in ((1, 7), (10, 300), (150, 151), (299, 299), (300, 300)):
        assert weights[k - 1, rank - 1] == pytest.approx(comb(rank - 1, k - 1) / comb(300, k), rel=1e-12)
    assert weights.sum(1) == pytest.approx(np.ones(300))


@pytest.mark.parametrize(
    ("scores", "values", "named"),
    [
        (np.zeros(3), None, "(3,)"),
        (np.zeros((2, 3)), np.zeros((2, 2)), "(2, 2)"),
        (np.zeros((0, 3)), None, "at least one"),
        (np.full((1, 2), np.nan), None, "NaN"),
    ],
)
def test_refused(scores, values, named):
    with pytest.raises(ValueError) as error:
        best_at_k(scores, values)
    assert named in str(error.value)
