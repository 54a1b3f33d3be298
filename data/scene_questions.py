"""Questions about scenes with their only right answers."""

import random
from collections.abc import Callable

from data.scene_phrases import (
    DETAILS,
    NUMBERS,
    SIZE_WORDS,
    Description,
    background_name,
    description_of,
    noun,
    noun_phrase,
    phrase_for,
    place_phrase,
    plain_pairs,
    relation_word,
    unique_objects,
)
from data.scene_truth import (
    BACKGROUND_KINDS,
    COLOURS,
    HELD_OUT,
    JUDGED_BETWEEN,
    PLACES,
    RELATIONS,
    SHAPES,
    Scene,
    SceneObject,
    is_at,
    is_between,
    place,
    plain_relations,
)


def questions(scene: Scene, rng: random.Random, number: int) -> list[tuple[str, str]]:
    """Questions about a scene with their only right answers, one to five words; the same question may come twice.

    Relations are asked about only where they are plain, or for "no" not even arguably true. A "no" names a held-out pair only if the scene has one.
    """
    found: list[tuple[str, str]] = []
    while len(found) < number:
        template = rng.choices(list(QUESTIONS), weights=list(QUESTIONS.values()))[0]
        pair = template(scene, rng)
        if pair is not None:
            found.append(pair)
    return found


Question = tuple[str, str] | None


def _is_there(scene: Scene, rng: random.Random) -> Question:
    """is there a small red circle"""
    description, answer = description_of(rng.choice(scene.objects), rng.choice(DETAILS)), rng.choice(("yes", "no"))
    if answer == "no":
        description = _absent(scene, description, rng)
    opening = rng.choice(("is there {}", "do you see {}", "is {} in the picture"))
    return opening.format(noun_phrase(description, 1, rng)), answer


def _are_there(scene: Scene, rng: random.Random) -> Question:
    """are there two red circles"""
    counts = {description_of(item, detail): 0 for item in scene.objects for detail in DETAILS}
    counts = {description: scene.count(*description) for description in counts}
    several = [description for description, count in counts.items() if count > 1]
    fewer = [description for description, count in counts.items() if count + 1 < len(NUMBERS)]
    if not several or not fewer:
        return None
    answer = rng.choice(("yes", "no"))
    description = rng.choice(several if answer == "yes" else fewer)
    return f"are there {noun_phrase(description, counts[description] + (answer == 'no'), rng)}", answer


def _how_many(scene: Scene, rng: random.Random) -> Question:
    """how many red circles are there"""
    description = description_of(rng.choice(scene.objects), rng.choice((*DETAILS, (False, False, False))))
    if any(description) and rng.random() < 0.2:
        description = _absent(scene, description, rng)
    number = scene.count(*description)
    ending = rng.choice(("are there", "do you see", "are in the picture"))
    return f"how many {noun(description, True, rng)} {ending}", NUMBERS[number] if number else "none"


def _which(scene: Scene, rng: random.Random, item: SceneObject, size: bool, colour: bool, shape: bool) -> str | None:
    """Words for an object that leave out what is asked for: its description if that is its own, or its place; None where there is neither."""
    fitting = [description_of(item, detail) for detail in ((False, colour, shape), (size, colour, shape))]
    phrases = [f"the {noun(description, False, rng)}" for description in fitting if scene.count(*description) == 1]
    if _place_of_its_own(scene, item):
        phrases.append(f"the shape {place_phrase(place(item))}")
    return rng.choice(phrases) if phrases else None


def _what_colour(scene: Scene, rng: random.Random) -> Question:
    """what colour is the circle"""
    item = rng.choice(scene.objects)
    which = _which(scene, rng, item, size=True, colour=False, shape=True)
    return (f"what colour {rng.choice(('is', 'has'))} {which}", item.colour) if which else None


def _what_shape(scene: Scene, rng: random.Random) -> Question:
    """what is the red shape"""
    item = rng.choice(scene.objects)
    which = _which(scene, rng, item, size=True, colour=True, shape=False)
    return (f"what is {which}", item.shape) if which else None


def _what_size(scene: Scene, rng: random.Random) -> Question:
    """is the red circle small or large"""
    item = rng.choice(scene.objects)
    which = _which(scene, rng, item, size=False, colour=True, shape=True)
    return (rng.choice(("what size is {}", "is {} small or large")).format(which), item.size) if which else None


def _what_is_related(scene: Scene, rng: random.Random) -> Question:
    """what is above the red circle"""
    found = []
    for item in unique_objects(scene):
        for relation in RELATIONS:
            others = [other for other in scene.objects if scene.related([other], relation, [item])]
            if len(others) == 1 and relation in plain_relations(others[0], item):
                found.append((others[0], relation, item))
    if not found:
        return None
    answer, relation, item = rng.choice(found)
    return f"what is {relation_word(relation, rng)} {phrase_for(scene, item, rng)}", _name(answer, rng)


def _is_related(scene: Scene, rng: random.Random) -> Question:
    """is the red circle above the blue star"""
    pairs = plain_pairs(scene)
    if not pairs:
        return None
    (a, b), answer = rng.choice(pairs), rng.choice(("yes", "no"))
    relation = rng.choice(plain_relations(a, b) if answer == "yes" else [word for word in RELATIONS if not scene.related([a], word, [b])])
    return f"is {phrase_for(scene, a, rng)} {relation_word(relation, rng)} {phrase_for(scene, b, rng)}", answer


def _which_side(scene: Scene, rng: random.Random) -> Question:
    """is the red circle left or right of the blue star"""
    pairs = [(a, relation, b) for a, b in plain_pairs(scene) for relation in plain_relations(a, b) if relation != "next to"]
    if not pairs:
        return None
    a, relation, b = rng.choice(pairs)
    choice = "above or below" if relation in ("above", "below") else "left or right of"
    return f"is {phrase_for(scene, a, rng)} {choice} {phrase_for(scene, b, rng)}", relation.split()[0]


def _what_is_between(scene: Scene, rng: random.Random) -> Question:
    """what is between the red circle and the blue star"""
    unique, found = unique_objects(scene), []
    for a in unique:
        for b in unique:
            middles = [item for item in scene.objects if a is not b and is_between(item, a, b, *JUDGED_BETWEEN)]
            if len(middles) == 1 and is_between(middles[0], a, b):
                found.append((middles[0], a, b))
    if not found:
        return None
    middle, a, b = rng.choice(found)
    return f"what is between {phrase_for(scene, a, rng)} and {phrase_for(scene, b, rng)}", _name(middle, rng)


def _where_is(scene: Scene, rng: random.Random) -> Question:
    """where is the red circle"""
    found = [item for item in unique_objects(scene) if place(item) and all(is_at(item, [word]) == (word in place(item)) for word in PLACES)]
    if not found:
        return None
    item = rng.choice(found)
    return f"where is {phrase_for(scene, item, rng)}", place_phrase(place(item))


def _what_is_there(scene: Scene, rng: random.Random) -> Question:
    """what is in the top left corner"""
    found = [item for item in scene.objects if _place_of_its_own(scene, item)]
    if not found:
        return None
    item = rng.choice(found)
    return f"what is {place_phrase(place(item))}", _name(item, rng)


def _what_background(scene: Scene, rng: random.Random) -> Question:
    """what is the background"""
    background = scene.background
    if background.kind != "night" and rng.random() < 0.5:
        return "what colour is the background", background.seen_colour
    return "what is the background", background_name(background.kind, background.colour)


def _is_background(scene: Scene, rng: random.Random) -> Question:
    """is the background green grass"""
    background, answer = (scene.background.kind, scene.background.colour), rng.choice(("yes", "no"))
    if answer == "no":
        others = [(kind, colour) for kind, facts in BACKGROUND_KINDS.items() for colour in facts.colours if (kind, colour) != background]
        close = [other for other in others if other[0] == background[0] or other[1] == background[1] != ""]
        background = rng.choice(close if close and rng.random() < 0.5 else others)
    return f"is the background {background_name(*background)}", answer


# Template -> how often it is tried.
QUESTIONS: dict[Callable[[Scene, random.Random], Question], int] = {
    _is_there: 4,
    _are_there: 2,
    _how_many: 3,
    _what_colour: 3,
    _what_shape: 3,
    _what_size: 2,
    _what_is_related: 4,
    _is_related: 4,
    _which_side: 2,
    _what_is_between: 6,
    _where_is: 3,
    _what_is_there: 2,
    _what_background: 1,
    _is_background: 1,
}


def _name(item: SceneObject, rng: random.Random) -> str:
    return noun_phrase((None, item.colour, item.shape), 1, rng)


def _place_of_its_own(scene: Scene, item: SceneObject) -> bool:
    """Whether an object is plainly at a place, and no other arguably is."""
    where = place(item)
    return bool(where) and not any(is_at(other, where) for other in scene.objects if other is not item)


def _absent(scene: Scene, description: Description, rng: random.Random) -> Description:
    """A description of nothing in the scene, one word away from the given one; half the time the word is borrowed from another object."""
    choices = []
    for index, words in enumerate((SIZE_WORDS, COLOURS, SHAPES)):
        if description[index]:
            choices += [(*description[:index], word, *description[index + 1 :]) for word in words]
    choices = [choice for choice in choices if not scene.count(*choice) and (scene.held_out or choice[1:] not in HELD_OUT)]
    seen = {word for item in scene.objects for word in (item.size, item.colour, item.shape)}
    borrowed = [choice for choice in choices if seen.issuperset(filter(None, choice))]
    return rng.choice(borrowed if borrowed and rng.random() < 0.5 else choices)
