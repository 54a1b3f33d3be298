"""Variety of captions, judged scenes, texts embedded in pieces."""

import pytest

from captioner import metrics, scoring
from data import scenes


def test_variety_counts_images_that_share_a_caption():
    found = scoring.variety(["a dog", "a cat", "a dog", "a dog", "", "a black cat"])
    assert found == {"duplicates": 3 / 6, "mean_words": (2 + 2 + 2 + 2 + 0 + 3) / 6}


def test_text_scores_name_their_tokenisation():
    captions, references = ["A dog.", "a cat"], [["a dog"], ["a bird"]]
    corpus, items = scoring.score_text(captions, references, "none")
    assert corpus.pop("tokenize") == "none" and corpus.pop("n") == 2
    assert (corpus, items) == metrics.score(captions, references, "none")


def test_scenes_are_judged_each_by_its_own_truth():
    rows = scenes.split("val", 5)
    corpus, judgements = scoring.judge_scenes([row.captions[0] for row in rows], rows)
    assert corpus["hallucination"] == 0 and len(judgements) == 5
    corpus, judgements = scoring.judge_scenes([row.captions[0] for row in rows[1:] + rows[:1]], rows)
    assert corpus["hallucination"] == sum(one.false for one in judgements) / sum(one.stated for one in judgements) > 0


def test_what_a_report_shows_of_a_caption():
    row = {"image_id": "a", "caption": "x", "Bleu_1": 0.5, "Bleu_4": 0.25, "CIDEr": 1.5, "scorer": "Tiny:x"}
    assert scoring.item_scores(row) == {"CIDEr": 1.5, "Bleu_4": 0.25}
    facts = {"stated": 3, "false": 2, "named": 1, "objects": 4, "errors": ["a dog", "a cat"]}
    assert scoring.item_scores({"facts": facts}) == {"false": 2, "recall": 0.25}


def test_texts_are_embedded_once_in_pieces():
    class Scorer:
        name = "Tiny"
        pieces: list = []

        def embed_texts(self, texts, prompt):
            self.pieces.append(list(texts))

    texts = [f"caption {number:04}" for number in range(1100)]
    descriptions = []
    scoring.embed_captions(Scorer(), [*texts[1:], *texts[:50], "short"], lambda items, description: descriptions.append(description) or items)
    assert [len(piece) for piece in Scorer.pieces] == [1024, 77]
    assert sum(Scorer.pieces, []) == ["short", *texts[1:], texts[0]], "those of like length share a batch"
    assert descriptions == ["embedding 1101 captions for Tiny"]


def test_corpus_scores_are_shown_with_scorer_and_cut_texts():
    lines: list[str] = []
    scoring.show({"Bleu_4": 0.5, "CIDEr": 1.25, "CLIPScore": 0.75, "n": 3, "tokenize": "ptb", "scorer": "Tiny:x", "truncated": 2}, lines.append)
    assert [line.split()[0] for line in lines] == ["Bleu_4", "CIDEr", "CLIPScore", "n"]
    assert "Tiny:x" in lines[-1] and "2 texts cut" in lines[-1] and "1.2500" in lines[1]


@pytest.mark.parametrize("name", ["RERANKER", "SCORER"])
def test_default_clips_exist_in_open_clip(name):
    import open_clip

    architecture, tag = getattr(scoring, name).split(":")
    assert tag in open_clip.list_pretrained_tags_by_model(architecture)
