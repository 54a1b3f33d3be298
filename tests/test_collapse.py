"""A collapsing training is told from a healthy, a young and a small one by its captions."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.util import ngrams

from captioner import collapse, generate, metrics, weights
from captioner.collapse import diagnose, ended, measure
from captioner.t5 import T5, T5Config
from data import scenes
from tests.tiny_t5 import hf_model

EOS = 1
IMAGES = 150


@pytest.fixture(scope="module")
def references() -> list[str]:
    return [row.captions[0] for row in scenes.split("val", IMAGES)]


@pytest.fixture(scope="module")
def healthy() -> list[str]:
    """Captions of the same pictures that are as good as references, a quarter of them also another image's."""
    captions = [row.captions[1] for row in scenes.split("val", IMAGES)]
    return [captions[index % 6] if index < IMAGES // 4 else caption for index, caption in enumerate(captions)]


def scores(captions, references, loss=1.3, ends=None, **more) -> dict:
    """What an evaluation knows of captions; all of them end unless `ends` says otherwise."""
    cider, _ = metrics.cider(captions, [[text] for text in references], tokenize="ptb")
    return {"loss": loss, "CIDEr": cider, "n": len(captions), **measure(captions, ends or [True] * len(captions)), **more}


def truth(references) -> dict:
    return measure(references, [True] * len(references))


def test_a_decoder_that_sees_and_one_that_ignores_its_pictures():
    theirs = hf_model("v1.1", num_layers=3, num_decoder_layers=3)
    text = T5(T5Config.from_dict(theirs.config.to_dict() | {"tie_word_embeddings": False, "scale_decoder_outputs": False})).eval()
    weights.load_into(text, dict(theirs.state_dict()), weights.HF_T5, "transformers")
    memory = torch.randn(40, 9, 24, generator=torch.Generator().manual_seed(0))

    def measured(memory) -> dict:
        ids = generate.greedy(SimpleNamespace(text=text), memory)
        return measure([" ".join(map(str, row)) for row in ids.tolist()], ended(ids, EOS))

    seeing, blind = measured(memory), measured(0 * memory)
    assert seeing["commonest"] < 0.1 and seeing["duplicates"] < 0.2
    assert blind["commonest"] == blind["duplicates"] == 1
    with torch.no_grad():
        text.lm_head.weight[EOS] *= 4
        assert 0 < measured(memory)["eos_share"] < 1
        text.lm_head.weight[EOS] = 0
    assert measured(memory)["eos_share"] == 0


def test_rows_end_with_eos_or_at_the_limit_of_tokens():
    ids = torch.tensor([[0, 5, 6, EOS, 0], [0, 5, 6, 7, 8], [0, 5, 6, 7, EOS], [0, EOS, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert ended(ids, EOS) == [True, False, True, True, False]
    assert ended(torch.tensor([[EOS, 5, 6]]), EOS) == [False], "a start token is no end"
    assert json.loads(json.dumps(ended(ids, EOS))) == ended(ids, EOS), "travels between processes as JSON"


def test_measures_of_captions_worked_by_hand():
    captions = ["a red ring", "a red ring", "post post post post", "", "a blue ring  a blue ring"]
    found = measure(captions, [True, True, False, True, True])
    # Words: 3 + 3 + 4 + 0 + 6 = 16, of them a, red, ring, post, blue. Bigrams: 2 + 2 + 3 + 0 + 5 = 12, of them
    # a-red, red-ring, post-post, a-blue, blue-ring, ring-a.
    assert found == pytest.approx(
        {
            "eos_share": 4 / 5, "empty": 1 / 5, "distinct_1": 5 / 16, "distinct_2": 6 / 12, "repetition": (2 / 3 + 2 / 5) / 5, "commonest": 2 / 5,
            "duplicates": 2 / 5, "mean_words": 16 / 5,
        }
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join), min_size=1, max_size=8))
def test_distinct_and_repetition_equal_those_of_nltk_ngrams(captions):
    found = measure(captions, [True] * len(captions))
    for n in (1, 2):
        grams = [list(ngrams(caption.split(), n)) for caption in captions]
        together = [gram for one in grams for gram in one]
        assert found[f"distinct_{n}"] == (len(set(together)) / len(together) if together else 0)
    assert math.isclose(found["repetition"], sum(1 - len(set(one)) / len(one) for one in grams if one) / len(captions))


@pytest.mark.parametrize(("captions", "ends"), [([], []), (["a"], []), (["a"], [True, False])])
def test_measures_need_captions_and_an_end_for_each(captions, ends):
    with pytest.raises(ValueError, match="captions"):
        measure(captions, ends)


def rings(*colours: str):
    """Captions of as many kinds, in turn."""
    return lambda texts: [f"a {colours[index % len(colours)]} ring" for index in range(len(texts))]


def with_other_sentences(texts):
    return [f"{text} and {other} and {text[::-1]}" for text, other in zip(texts, texts[1:] + texts[:1])]


# What becomes of healthy captions, whether they end, and what is said of it.
COLLAPSED = {
    "constant": (rings("red"), True, "100% are one and the same (5%)"),
    "nearly constant": (rings("red", "blue"), True, "50% are one and the same (5%)"),
    "few captions": (rings("red", "blue", "green", "pink"), True, "100% are the same as another image's"),
    "empty": (lambda texts: [""] * len(texts), True, "100% are empty (0%)"),
    "a third empty": (lambda texts: ["" if index % 3 == 0 else text for index, text in enumerate(texts)], True, "33% are empty (0%)"),
    "post post post": (lambda texts: ["post " * 30 for _ in texts], False, "0% end with EOS (100%)"),
    "own word for ever": (lambda texts: [f"word{index} " * 30 for index in range(len(texts))], False, "97% of their word pairs are repeats"),
    "repeats and ends": (lambda texts: [f"{index}" + " a ring" * 5 for index in range(len(texts))], True, "70% of their word pairs are repeats"),
    "two sentences more": (with_other_sentences, True, "words on average"),
}


@pytest.mark.parametrize("kind", COLLAPSED)
def test_captions_that_collapse_after_a_healthy_evaluation(kind, healthy, references):
    spoil, ends, words = COLLAPSED[kind]
    best = scores(healthy, references, step=400)
    # The loss stays where it was: captions alone must tell.
    now = scores(spoil(healthy), references, ends=[ends] * IMAGES)
    found = diagnose(now, best, truth(references), progress=0.3)
    assert found and found.since_best and words in found.line
    assert "step 400" in found.line and "\n" not in found.line


def test_half_of_the_captions_without_an_end(healthy, references):
    best = scores(healthy, references, step=2)
    now = scores(["a", *healthy[1:]], references, ends=[index % 2 == 0 for index in range(IMAGES)])
    assert diagnose(now, best, truth(references), 0.1).line.endswith(": 50% end with EOS (100%)")


@pytest.mark.parametrize("best_captions", ["healthy", "constant"])
def test_a_loss_ten_times_the_best_is_a_collapse_whatever_the_captions_are(best_captions, healthy, references):
    captions = healthy if best_captions == "healthy" else ["a red ring"] * IMAGES
    best = scores(captions, references, step=20)
    found = diagnose(scores(captions, references, loss=13.0), best, truth(references), 0.1)
    assert found.since_best and "validation loss 13 (1.3)" in found.line
    assert diagnose(scores(captions, references, loss=2.6), best, truth(references), 0.1) is None, "overfitting"
    assert diagnose(scores(captions, references, loss=0.9), {**best, "loss": 0.1}, truth(references), 0.1) is None, "a small loss may grow"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_non_finite_loss_is_told_in_any_case(loss):
    now = scores(["a ring"], ["a ring"], loss=loss)
    assert diagnose(now, None, truth(["a ring"]), 0.0) == collapse.Collapse(f"collapse: the validation loss is {loss}", since_best=False)
    assert diagnose(now, scores(["a ring"], ["a ring"], step=1), truth(["a ring"]), 0.0).since_best


def test_one_caption_for_all_from_start_to_end_is_told_though_nothing_is_better(references):
    constant, expected = scores(["a red ring"] * IMAGES, references), truth(references)
    best = None
    told = []
    for step in range(0, 101, 10):
        told.append(diagnose(constant, best, expected, step / 100))
        best = {**constant, "step": 0}
    assert told[:5] == [None] * 5, "a model may learn slowly"
    assert all(found and not found.since_best and "100% are one and the same (1%)" in found.line for found in told[5:])


def test_an_untrained_model_and_a_slow_start_raise_no_alarm(healthy, references):
    # As the demo does it: the untrained model never ends, but says different things; then it says one thing for all, with a lower loss.
    drawn = random.Random(0)
    noise = [" ".join(drawn.choices(["ring", "a", "pink", "two"], k=22)) for _ in references]
    expected = truth(references)
    untrained = scores(noise, references, loss=5.3, ends=[index % 3 == 0 for index in range(IMAGES)])
    assert diagnose(untrained, None, expected, 0.0) is None
    assert untrained["CIDEr"] < collapse.USEFUL_CIDER
    early = scores(["a red ring"] * IMAGES, references, loss=3.0)
    assert diagnose(early, {**untrained, "step": 0}, expected, 0.2) is None
    # Some other untrained decoder: short, different captions that end.
    strange = scores([f"word{index}" for index in range(IMAGES)], references, loss=9.0)
    assert diagnose(early, {**strange, "step": 0}, expected, 0.2) is None
    assert diagnose(scores(healthy, references), {**early, "step": 20}, expected, 1.0) is None


@pytest.mark.parametrize("cider", [0.19, 0.6])
def test_captions_that_grow_as_long_as_the_references_are_no_collapse(cider, healthy, references):
    best = scores([f"ring {index}" for index in range(IMAGES)], references, CIDEr=0.2, step=10)
    assert diagnose(scores(healthy, references, CIDEr=cider), best, truth(references), 0.2) is None


def test_an_evaluation_that_scores_better_is_no_collapse(healthy, references):
    now, best = scores([f"{text} {text}" for text in healthy], references, loss=13.0, CIDEr=0.6), scores(healthy, references, CIDEr=0.5, step=10)
    assert diagnose(now, best, truth(references), 1.0) is None
    assert diagnose({**now, "CIDEr": 0.4}, best, truth(references), 1.0).since_best


def test_after_a_healthy_best_the_references_alone_raise_no_alarm(healthy, references):
    best = scores(healthy, references, duplicates=0.45, step=10)
    now = scores(healthy, references, duplicates=0.6)
    assert diagnose(now, best, truth(references), 1.0) is None
    assert diagnose(now, None, truth(references), 1.0).line.endswith("60% are the same as another image's (1%)")


@pytest.mark.parametrize("progress", [0.1, 1.0])
def test_references_that_are_all_alike_may_be_learned(progress):
    references = ["a photo of a cell"] * 50
    now = scores(references, references)
    assert diagnose(now, {**scores([f"a cell {index}" for index in range(50)], references), "step": 0}, truth(references), progress) is None
    assert diagnose(now, {**now, "step": 0}, truth(references), progress) is None
    classes = ["a cat", "a dog"] * 25
    assert diagnose(scores(classes, classes), None, truth(classes), progress) is None
    found = diagnose(scores(["a cat"] * 50, classes), {**scores(classes, classes, CIDEr=5.0), "step": 7}, truth(classes), progress)
    assert found.since_best and "100% are one and the same (50%)" in found.line


def test_references_longer_than_a_caption_may_be_have_no_end_to_learn(healthy, references):
    expected = measure(references, [False] * IMAGES)
    now = scores(healthy, references, ends=[False] * IMAGES)
    assert diagnose(now, None, expected, 1.0) is None
    assert diagnose(now, None, truth(references), 1.0).line.endswith("0% end with EOS (100%)")


def test_few_images_tell_nothing(references):
    few = collapse.FEWEST_IMAGES - 1
    best = {**scores([f"a ring {index}" for index in range(few)], references[:few], CIDEr=1.0), "step": 4}
    assert diagnose(scores(["a ring"] * few, references[:few], loss=50.0), best, truth(references[:few]), 1.0) is None
    best = {**scores([f"a ring {index}" for index in range(few + 1)], references[: few + 1], CIDEr=1.0), "step": 4}
    assert diagnose(scores(["a ring"] * (few + 1), references[: few + 1]), best, truth(references[: few + 1]), 1.0).since_best


def test_noise_of_healthy_evaluations_raises_no_alarm():
    """Evaluations of 20 to 60 images from one healthy distribution: 27% of the captions are common ones, 95% end, 2% are empty."""
    drawn = random.Random(1)
    words = [f"w{index}" for index in range(300)]

    def evaluation(count: int) -> dict:
        def caption(index: int) -> str:
            if drawn.random() < 0.02:
                return ""
            if drawn.random() < 0.27:
                return f"a common picture {drawn.randrange(3)}"
            return " ".join(drawn.choices(words, k=drawn.randrange(6, 16)))

        captions = [caption(index) for index in range(count)]
        ends = [drawn.random() < 0.95 for _ in captions]
        return {"loss": drawn.uniform(1.2, 1.8), "CIDEr": drawn.uniform(0.4, 0.9), "n": count, **measure(captions, ends)}

    for _ in range(300):
        count = drawn.randrange(collapse.FEWEST_IMAGES, 60)
        expected = truth([" ".join(drawn.choices(words, k=10)) for _ in range(count)])
        best = {**evaluation(count), "step": 1, "CIDEr": 0.9}
        assert diagnose(evaluation(count), best, expected, drawn.random()) is None


def test_measures_are_numbers_for_a_metrics_line(healthy, references):
    found = scores(healthy, references)
    assert json.loads(json.dumps(found)) == found and all(math.isfinite(value) for value in found.values())
