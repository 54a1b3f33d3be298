"""How much of what a caption says about a scene is false, and how many of the scene's objects it names.

In the spirit of CHAIR (arXiv 1809.02156), the share of mentioned objects that are not in the picture; every mention counts, as in its CHAIRi. Here
the truth is complete, so besides objects also numbers, colours, sizes, relations, places and the background are judged, no annotator's omission makes
an error, and recall stands beside hallucination. A fact is one noun phrase with its number and adjectives ("two blue stars"), one relation between
noun phrases, one place of a noun phrase, one kind or one colour of the background. Relations and places of what is not there are not judged,
because its noun phrase is already false. Words that are not understood state nothing.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from data.scene_phrases import NUMBERS, RELATION_WORDS, SIZE_WORDS
from data.scene_truth import BACKGROUND_COLOURS, COLOURS, JUDGED_BETWEEN, SHAPES, Scene, SceneObject, is_at, is_between

SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
RELATION_OF = {words[-1]: relation for relation, words in RELATION_WORDS.items()} | {relation: relation for relation in RELATION_WORDS}
KIND_OF = {
    "plain": "plain",
    "fading": "gradient",
    "fades": "gradient",
    "striped": "stripes",
    "stripes": "stripes",
    "checkered": "checks",
    "checks": "checks",
    "speckled": "speckles",
    "speckles": "speckles",
    "grassy": "grass",
    "grass": "grass",
    "sandy": "sand",
    "sand": "sand",
    "cloudy": "sky",
    "sky": "sky",
    "dark": "night",
    "night": "night",
    "snowy": "snow",
    "snow": "snow",
}
BACKGROUND_NOUNS = ("background", "stripes", "checks", "speckles", "grass", "sand", "sky", "night", "snow")


def _any(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(words)})"


COLOUR = _any({**COLOURS, **BACKGROUND_COLOURS})
# Alternatives in the order in which they are to be tried, for lower-case words with one space between them; bounded, so that no text takes long.
FACT = re.compile(
    rf"\b(?:(?P<again>and )?(?:(?:to|on) the )?(?P<relation>{_any(RELATION_OF)}|between)"
    r"|(?:in|at|on) the (?P<place>(?:top|bottom)(?: left| right)?|left|right|middle)(?: corner| side)?"
    rf"|(?P<fades>(?:{COLOUR} )?(?:that )?fades)(?: to {COLOUR})?"
    rf"|(?P<background>(?:(?:{_any(KIND_OF)}|{COLOUR}|background) ){{0,8}}{_any(BACKGROUND_NOUNS)})"
    rf"|(?:(?P<number>a single|an?|the|{_any(NUMBERS)}) )?(?P<looks>(?:(?:{_any(SIZE_OF)}|{COLOUR}) ){{0,8}})"
    rf"(?P<noun>{_any(SHAPES)}|shape|object)(?:es|s)?)\b"
)


@dataclass(frozen=True)
class Judgement:
    """Facts stated and how many of them are false (`errors`, in words); objects of the scene and how many of them are named by colour or shape."""

    stated: int
    false: int
    named: int
    objects: int
    errors: tuple[str, ...]


@dataclass(frozen=True)
class NounPhrase:
    """A noun phrase, its number (1 for an article), the objects that fit its words, and whether it is true and tells colour or shape."""

    words: str
    number: int
    fitting: list[SceneObject]
    is_true: bool
    is_specific: bool


def judge(caption: str, scene: Scene) -> Judgement:
    """Judge any text against the truth about a scene."""
    matches = list(FACT.finditer(" ".join(re.findall("[a-z]+", caption.lower()))))
    phrases = [_noun_phrase(match, scene) if match["noun"] else None for match in matches]
    facts: list[tuple[str, bool]] = []
    nearest = subject = None
    for index, (match, phrase) in enumerate(zip(matches, phrases, strict=True)):
        if phrase:
            nearest = phrase
            facts.append((phrase.words, phrase.is_true))
        elif match["relation"]:
            # "a is above b and next to c" goes on about a.
            subject = subject if match["again"] and subject else nearest
            facts += _relation(subject, match, matches[index + 1 : index + 3], phrases[index + 1 : index + 3], scene)
        elif match["place"] and nearest and nearest.fitting:
            words = match["place"].split()
            facts.append((f"{nearest.words} {match[0]}", any(is_at(item, words) for item in nearest.fitting)))
        elif match["background"] or match["fades"]:
            facts += _background((match["background"] or match["fades"]).split(), scene)
    errors = tuple(words for words, is_true in facts if not is_true)
    return Judgement(len(facts), len(errors), _count_named([phrase for phrase in phrases if phrase]), len(scene.objects), errors)


def totals(judgements: Iterable[Judgement]) -> dict[str, float]:
    """Over all captions: false facts / stated facts, and named objects / objects; 0.0 where there are none."""
    judgements = list(judgements)
    stated, objects = sum(item.stated for item in judgements), sum(item.objects for item in judgements)
    return {
        "hallucination": sum(item.false for item in judgements) / stated if stated else 0.0,
        "recall": sum(item.named for item in judgements) / objects if objects else 0.0,
    }


def _noun_phrase(match: re.Match, scene: Scene) -> NounPhrase:
    looks, shape = match["looks"].split(), match["noun"] if match["noun"] in SHAPES else None
    sizes, colours = {SIZE_OF[word] for word in looks if word in SIZE_OF}, {word for word in looks if word not in SIZE_OF}
    fitting = [item for item in scene.find(shape=shape) if sizes <= {item.size} and colours <= {item.colour}]
    number = NUMBERS.index(match["number"]) if match["number"] in NUMBERS else None
    if match["number"] == "a single":
        is_true = len(fitting) == 1 == len(scene.objects)
    else:
        is_true = len(fitting) == number if number is not None else bool(fitting)
    return NounPhrase(match[0], 1 if number is None else number, fitting, is_true, bool(shape or colours))


def _relation(
    subject: NounPhrase | None, match: re.Match, next_matches: list[re.Match], next_phrases: list[NounPhrase | None], scene: Scene
) -> list[tuple[str, bool]]:
    """The fact that a relation states, or none: `next_*` are the two matches behind the relation."""
    first, second = [*next_phrases, None, None][:2]
    if not subject or not first:
        return []
    words = f"{subject.words} {match['relation']} {first.words}"
    if match["relation"] != "between":
        if not subject.fitting or not first.fitting:
            return []
        return [(words, scene.related(subject.fitting, RELATION_OF[match["relation"]], first.fitting))]
    if second and next_matches[0].string[next_matches[0].end() : next_matches[1].start()] == " and ":
        words += f" and {second.words}"
    elif first.number > 1:
        second = first
    else:
        return []
    if not subject.fitting or not first.fitting or not second.fitting:
        return []
    pairs = [(a, b) for a in first.fitting for b in second.fitting if a is not b]
    return [(words, any(is_between(item, a, b, *JUDGED_BETWEEN) for item in subject.fitting for a, b in pairs))]


def _background(words: list[str], scene: Scene) -> list[tuple[str, bool]]:
    """One fact for each kind and each colour."""
    # The dark sky is the night; any other dark background is not.
    silent = {"sky"} if not {"dark", "night"}.isdisjoint(words) else set()
    silent |= {"dark"} if "sky" not in words else set()
    stated: dict[str, str] = {}  # a kind or a colour -> the word that states it
    for word in words:
        if word in KIND_OF and word not in silent:
            stated.setdefault(KIND_OF[word], word)
        elif word in COLOURS or word in BACKGROUND_COLOURS:
            stated.setdefault(word, word)
    truth = (scene.background.kind, scene.background.seen_colour)
    return [(f"background: {word}", fact in truth) for fact, word in stated.items()]


def _count_named(phrases: Iterable[NounPhrase]) -> int:
    """How many objects are named, each by one phrase; the phrases that fit fewest objects choose first."""
    named: set[int] = set()
    for phrase in sorted((phrase for phrase in phrases if phrase.is_specific), key=lambda phrase: len(phrase.fitting)):
        named.update([id(item) for item in phrase.fitting if id(item) not in named][: phrase.number])
    return len(named)
