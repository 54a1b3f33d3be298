"""What is said about scenes: captions with nothing but the truth, plain descriptions that tell all of it, questions with right answers.

Captions are checked by a parser of its own, which knows the grammar of English noun phrases used here and geometry, and nothing of the code that
writes captions; questions likewise.
"""

import math
import random
import re
from collections import Counter

import pytest

from data import scenes
from data.scene_language import describe
from data.scene_questions import QUESTIONS, questions
from data.scene_truth import COLOURS, HELD_OUT, make_scene

COLOUR = "red|orange|yellow|green|blue|purple|pink|brown|black|white"
SHAPE = "circle|square|triangle|star|heart|cross|ring|diamond"
NUMBER = {"a": 1, "an": 1, "the": 1, "a single": 1, "two": 2, "three": 3, "four": 4}
SIZE = {"small": "small", "little": "small", "large": "large", "big": "large"}
NOUN_PHRASE = re.compile(
    rf"\b(?P<number>a single|an|a|the|two|three|four) (?:(?P<size>{'|'.join(SIZE)}) )?(?:(?P<colour>{COLOUR}) )?"
    rf"(?P<noun>{SHAPE}|shape|object)(?P<plural>es|s)?\b(?! sky| background)"
)
RELATION = re.compile(r"^ (?:is |sits )?(?:to the )?(left of|right of|above|over|below|under|next to|beside|between) $")
SECOND_RELATION = re.compile(r"^ and (?:to the )?(left of|right of|above|over|below|under|next to|beside) $")
PLACE = re.compile(
    r"(?:in the (?P<corner>top|bottom) (?P<side>left|right) corner|at the (?P<edge>top|bottom)"
    r"|on the (?P<flank>left|right) side|in the (?P<middle>middle))$"
)
BACKGROUND = {
    "grass": "grass|grassy",
    "sand": "sand|sandy",
    "sky": "the sky|blue sky|cloudy",
    "night": "night|dark",
    "snow": "snow|snowy",
    "stripes": "striped|stripes",
    "checks": "checks|checkered",
    "speckles": "speckled|speckles",
    "gradient": "fading|fades",
}


def matching(scene, phrase):
    return [
        item
        for item in scene.objects
        if (phrase["noun"] in ("shape", "object") or item.shape == phrase["noun"])
        and (phrase["colour"] is None or item.colour == phrase["colour"])
        and (phrase["size"] is None or item.size == SIZE[phrase["size"]])
    ]


def is_true(relation, a, b):
    gap = math.dist((a.x, a.y), (b.x, b.y)) - a.radius - b.radius
    return {
        "left of": b.x - a.x > 0.1 and b.x - a.x > abs(a.y - b.y),
        "right of": a.x - b.x > 0.1 and a.x - b.x > abs(a.y - b.y),
        "above": b.y - a.y > 0.1 and b.y - a.y > abs(a.x - b.x),
        "over": b.y - a.y > 0.1 and b.y - a.y > abs(a.x - b.x),
        "below": a.y - b.y > 0.1 and a.y - b.y > abs(a.x - b.x),
        "under": a.y - b.y > 0.1 and a.y - b.y > abs(a.x - b.x),
        "next to": gap < 0.1,
        "beside": gap < 0.1,
    }[relation]


def check(caption, scene):
    """Assert every claim of a caption; returns the kinds of claim it made."""
    kinds = Counter()
    phrases = list(NOUN_PHRASE.finditer(caption))
    assert phrases, caption
    for phrase in phrases:
        found = matching(scene, phrase)
        assert len(found) == NUMBER[phrase["number"]], (caption, phrase.group(), scene)
        assert bool(phrase["plural"]) == (len(found) > 1), caption
        assert phrase["number"] not in ("a", "an") or (phrase["number"] == "an") == (
            phrase.group()[len(phrase["number"]) + 1] in "aeiou"
        )
        kinds["count"] += len(found) > 1
    if phrases[0]["number"] == "a single":
        assert len(scene.objects) == 1, caption
    subject = matching(scene, phrases[0])[0]
    gaps = [caption[a.end() : b.start()] for a, b in zip(phrases, phrases[1:], strict=False)]
    for index, between in enumerate(gaps):
        relation = RELATION.match(between) or SECOND_RELATION.match(between)
        if relation is None:
            assert between in (", ", " and ") or re.fullmatch(r" [a-z ]+: ", between), (caption, between)
            continue
        kinds["relation"] += 1
        first = matching(scene, phrases[index + 1])[0]
        if relation[1] == "between":
            kinds["between"] += 1
            second = matching(scene, phrases[index + 2])[0]
            detour = math.dist((first.x, first.y), (subject.x, subject.y)) + math.dist(
                (subject.x, subject.y), (second.x, second.y)
            )
            assert detour < 1.1 * math.dist((first.x, first.y), (second.x, second.y)), (caption, scene)
        else:
            assert is_true(relation[1], subject, first), (caption, scene)
    if not any(RELATION.match(between) for between in gaps) and not PLACE.search(caption):
        # A caption that lists objects lists them all.
        listed = phrases[1:] if ": " in caption else phrases
        assert sum(len(matching(scene, phrase)) for phrase in listed) == len(scene.objects), (caption, scene)
        kinds["list"] += 1
    if where := PLACE.search(caption):
        kinds["place"] += 1
        words = {word for word in where.groups() if word}
        assert "left" not in words or subject.x < 0.4, caption
        assert "right" not in words or subject.x > 0.6, caption
        assert "top" not in words or subject.y < 0.4, caption
        assert "bottom" not in words or subject.y > 0.6, caption
        assert "middle" not in words or max(abs(subject.x - 0.5), abs(subject.y - 0.5)) < 0.12, caption
    for kind, words in BACKGROUND.items():
        if re.search(rf"\b({words})\b", caption):
            kinds["background"] += 1
            assert scene.background.kind == kind, (caption, scene.background)
    if named := re.search(
        r"\b(?:on|against) (?:a )?(?:plain |fading )?(grey|blue|green|pink|yellow|white|black) (?!sand|snow|grass)",
        caption,
    ):
        assert scene.background.colour == named[1], (caption, scene.background)
    return kinds


def test_every_caption_is_true(train_scenes, val_scenes):
    kinds = Counter()
    for row in [*train_scenes, *val_scenes]:
        for caption in row.captions:
            kinds += check(caption, row.image.scene)
    for kind in ("count", "relation", "between", "list", "place", "background"):
        assert kinds[kind] > 100, kinds


def test_the_checker_notices_lies(train_scenes):
    """Captions of another scene, and relations turned round, are nearly always refused."""
    refused = total = 0
    for row, other in zip(train_scenes[:300], train_scenes[1:301], strict=True):
        for caption in other.captions:
            total += 1
            try:
                check(caption, row.image.scene)
            except AssertionError:
                refused += 1
    assert refused > 0.97 * total
    swap = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    for row in train_scenes[:300]:
        for caption in row.captions:
            for word, opposite in swap.items():
                if caption.count(word) == 1:
                    with pytest.raises(AssertionError):
                        check(caption.replace(word, opposite), row.image.scene)


def test_captions_are_many_different_and_few_words(train_scenes):
    assert all(len(row.captions) == 5 == len(set(row.captions)) for row in train_scenes)
    words = {word for row in train_scenes for caption in row.captions for word in re.findall(r"[a-z]+", caption)}
    assert 80 <= len(words) <= 120
    assert all(re.fullmatch(r"[a-z]+([,:]? [a-z]+)*", caption) for row in train_scenes for caption in row.captions)
    starts = {" ".join(caption.split()[:2]) for row in train_scenes for caption in row.captions}
    assert len(starts) > 60


BACKGROUND_NAMES = {
    "plain": "plain {}", "gradient": "fading {}", "stripes": "{} stripes", "checks": "{} checks", "speckles": "{} speckles",
    "grass": "green grass", "sand": "yellow sand", "sky": "blue sky", "night": "dark sky", "snow": "white snow",
}  # fmt: skip


def background_name(scene):
    return BACKGROUND_NAMES[scene.background.kind].format(scene.background.colour)


def test_a_description_tells_everything(train_scenes, val_scenes):
    for row in [*train_scenes, *val_scenes]:
        scene = row.image.scene
        objects, background = describe(scene, random.Random(row.id)).split(" on ")
        assert background == background_name(scene)
        listed = [re.fullmatch(rf"(small|large) ({COLOUR}) ({SHAPE}) at ([0-9]) ([0-9])", text).groups() for text in objects.split(", ")]
        truth = [(item.size, item.colour, item.shape, str(math.floor(10 * item.x)), str(math.floor(10 * item.y))) for item in scene.objects]
        assert sorted(listed) == sorted(truth)
    several = next(row.image.scene for row in train_scenes if len(row.image.scene.objects) == 4)
    assert len({describe(several, random.Random(seed)) for seed in range(60)}) > 12
    assert describe(several, random.Random(1)) == describe(several, random.Random(1))


def arguable(relation, a, b):
    """Whether the relation might be claimed at all."""
    gap = math.dist((a.x, a.y), (b.x, b.y)) - a.radius - b.radius
    offset = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "over": b.y - a.y, "below": a.y - b.y, "under": a.y - b.y}
    return offset[relation] > 0.05 if relation in offset else gap < 0.14


def at(item, words, side):
    fits = {"left": item.x < side, "right": item.x > 1 - side, "top": item.y < side, "bottom": item.y > 1 - side}
    fits["middle"] = max(abs(item.x - 0.5), abs(item.y - 0.5)) < 0.1
    return all(fits[word] for word in words)


def the_one(scene, words):
    """The only object that the words fit."""
    if place := PLACE.search(words):
        assert words.startswith("the shape ")
        found = [item for item in scene.objects if at(item, [word for word in place.groups() if word], 0.4)]
    else:
        found = matching(scene, NOUN_PHRASE.fullmatch(words))
    assert len(found) == 1, (words, scene)
    return found[0]


def short_name(item):
    return f"{'an' if item.colour == 'orange' else 'a'} {item.colour} {item.shape}"


def right_answer(question, scene):
    """(kind of question, its answer), after checking that no other answer could be given."""
    relation = "(?:to the )?(left of|right of|above|over|below|under|next to|beside)"
    if question == "what is the background":
        return "background", background_name(scene)
    if question == "what colour is the background":
        landscape = {"grass": "green", "sand": "yellow", "sky": "blue", "snow": "white"}
        return "background colour", scene.background.colour or landscape[scene.background.kind]
    if found := re.fullmatch("is the background (.+)", question):
        return "is background", "yes" if found[1] == background_name(scene) else "no"
    if found := re.fullmatch("(?:is there|do you see) (an? .+)|is (an? .+) in the picture", question):
        return "is there", "yes" if matching(scene, NOUN_PHRASE.fullmatch(found[1] or found[2])) else "no"
    if found := re.fullmatch("are there (.+)", question):
        phrase = NOUN_PHRASE.fullmatch(found[1])
        count = len(matching(scene, phrase))
        assert count <= NUMBER[phrase["number"]]
        return "are there", "yes" if count == NUMBER[phrase["number"]] else "no"
    if found := re.fullmatch("how many (.+) (?:are there|do you see|are in the picture)", question):
        return "how many", ("none", "one", "two", "three", "four")[len(matching(scene, NOUN_PHRASE.fullmatch(f"two {found[1]}")))]
    if found := re.fullmatch("what colour (?:is|has) (.+)", question):
        return "colour", the_one(scene, found[1]).colour
    if found := re.fullmatch("what size is (.+)|is (.+) small or large", question):
        return "size", the_one(scene, found[1] or found[2]).size
    if found := re.fullmatch("what is between (.+) and (.+)", question):
        a, b = (the_one(scene, words) for words in found.groups())
        length = math.dist((a.x, a.y), (b.x, b.y))
        detours = [
            ((math.dist((a.x, a.y), (item.x, item.y)) + math.dist((item.x, item.y), (b.x, b.y))) / length, short_name(item))
            for item in scene.objects
            if item is not a and item is not b
        ]
        assert min(detours)[0] < 1.1
        return "what is between", min(detours)[1]
    if found := re.fullmatch(f"what is {relation} (the .+)", question):
        item = the_one(scene, found[2])
        others = [other for other in scene.objects if other is not item and arguable(found[1], other, item)]
        assert len(others) == 1 and is_true(found[1], others[0], item), (question, scene)
        return "what is related", short_name(others[0])
    if found := re.fullmatch("is (the .+?) (left or right of|above or below) (the .+)", question):
        a, b = the_one(scene, found[1]), the_one(scene, found[3])
        sides = ("left of", "right of") if found[2] == "left or right of" else ("above", "below")
        return "which side", next(side for side in sides if is_true(side, a, b)).split()[0]
    if found := re.fullmatch(f"is (the .+?) {relation} (the .+)", question):
        a, b = the_one(scene, found[1]), the_one(scene, found[3])
        assert is_true(found[2], a, b) or not arguable(found[2], a, b)
        return "is related", "yes" if is_true(found[2], a, b) else "no"
    if found := re.fullmatch("where is (.+)", question):
        item = the_one(scene, found[1])
        words = [word for word in ("top", "bottom", "left", "right", "middle") if at(item, [word], 0.36)]
        assert words == [word for word in ("top", "bottom", "left", "right") if at(item, [word], 0.41)] or words == ["middle"]
        phrases = {"middle": "in the middle", "top": "at the top", "bottom": "at the bottom"}
        return "where", f"in the {' '.join(words)} corner" if len(words) == 2 else phrases.get(words[0], f"on the {words[0]} side")
    if PLACE.fullmatch(question.removeprefix("what is ")):
        return "what is there", short_name(the_one(scene, question.replace("what is", "the shape")))
    return "shape", the_one(scene, question.removeprefix("what is ")).shape


def test_every_question_has_the_right_answer(train_scenes, val_scenes):
    rng, answers = random.Random(0), {}
    vocabulary = {word for row in train_scenes for caption in row.captions for word in re.findall("[a-z]+", caption)}
    for row in [*train_scenes, *val_scenes]:
        for question, answer in questions(row.image.scene, rng, 8):
            kind, right = right_answer(question, row.image.scene)
            assert answer == right, (question, answer, row.image.scene)
            answers.setdefault(kind, Counter())[answer] += 1
            assert 1 <= len(answer.split()) <= 5 and set(answer.split()) <= vocabulary | {"yes", "no", "none", "one"}, answer
    assert len(answers) == len(QUESTIONS) + 1 and all(sum(counts.values()) > 100 for counts in answers.values()), answers
    for kind in ("is there", "are there", "is related", "is background"):
        counts = answers[kind]
        assert counts.keys() == {"yes", "no"} and 0.42 < counts["yes"] / counts.total() < 0.58, (kind, counts)
    assert answers["how many"].keys() == {"none", "one", "two", "three", "four"}
    assert answers["colour"].keys() == COLOURS.keys()


def test_a_wrong_no_is_near_the_truth_and_never_gives_held_out_pairs_away(train_scenes):
    """Training questions name no held-out pair; half of the absent things swap one word for another object's."""
    rng, near, absent = random.Random(0), 0, 0
    for row in train_scenes:
        scene = row.image.scene
        for question, answer in questions(scene, rng, 8):
            words = question.split()
            assert not HELD_OUT & set(zip(words, words[1:], strict=False)), question
            if answer == "no" and (found := re.search(rf"\ban? (?:(?:small|little|large|big) )?({COLOUR}) ({SHAPE})\b", question)):
                absent += 1
                near += scene.count(colour=found[1]) > 0 and scene.count(shape=found[2]) > 0
                assert scene.count(colour=found[1]) + scene.count(shape=found[2]) > 0
    assert absent > 100 and near / absent > 0.3


def test_questions_follow_the_generator():
    scene = make_scene("val", 3)
    assert questions(scene, random.Random(7), 20) == questions(scene, random.Random(7), 20) != questions(scene, random.Random(8), 20)
    assert questions(scene, random.Random(7), 0) == []
    assert len(set(questions(scene, random.Random(0), 200))) > 60
