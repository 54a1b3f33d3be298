"""What is said about scenes: captions from a grammar, and plain descriptions.

Every noun phrase of a caption names exactly as many objects as the scene has of that description; every relation follows from the objects' centres.
"""

import random
from collections.abc import Callable

from data.scene_phrases import (
    DETAILS,
    NUMBERS,
    Description,
    background_name,
    background_phrase,
    description_of,
    noun_phrase,
    own_descriptions,
    phrase_for,
    place_phrase,
    plain_pairs,
    relation_word,
    unique_objects,
)
from data.scene_truth import Scene, SceneObject, is_between, place, plain_relations

CAPTIONS_PER_SCENE = 5
OPENINGS = ("a picture of", "a drawing of", "an image of", "a scene with")


def captions(scene: Scene, rng: random.Random, number: int = CAPTIONS_PER_SCENE) -> tuple[str, ...]:
    """Different true captions of a scene."""
    found: list[str] = []
    while len(found) < number:
        template = rng.choices(list(TEMPLATES), weights=list(TEMPLATES.values()))[0]
        caption = template(scene, rng)
        if caption is not None and caption not in found:
            found.append(caption)
    return tuple(found)


def _listing(scene: Scene, rng: random.Random) -> str:
    """a red circle and two blue stars on the grass"""
    return f"{_everything(scene, rng)} {background_phrase(scene.background, rng)}"


def _there_is(scene: Scene, rng: random.Random) -> str:
    """there are two blue stars and a red circle on the grass"""
    return f"{_there(_everything(scene, rng))} {background_phrase(scene.background, rng)}"


def _background_first(scene: Scene, rng: random.Random) -> str:
    """on the grass there is a red circle"""
    return f"{background_phrase(scene.background, rng)} {_there(_everything(scene, rng))}"


def _picture_of(scene: Scene, rng: random.Random) -> str:
    """a picture of a red circle on the grass"""
    return f"{rng.choice(OPENINGS)} {_everything(scene, rng)} {background_phrase(scene.background, rng)}"


def _count(scene: Scene, rng: random.Random) -> str:
    """three shapes on the grass"""
    number, word = len(scene.objects), rng.choice(("shape", "object"))
    if number == 1:
        return f"a single {rng.choice((word, scene.objects[0].shape))} {background_phrase(scene.background, rng)}"
    return f"{NUMBERS[number]} {word}s {background_phrase(scene.background, rng)}"


def _count_and_list(scene: Scene, rng: random.Random) -> str | None:
    """three shapes on the grass: a red circle and two blue stars"""
    if len(scene.objects) == 1:
        return None
    return f"{_count(scene, rng)}: {_everything(scene, rng)}"


def _relation(scene: Scene, rng: random.Random) -> str | None:
    """a small red circle to the left of a blue star on the grass"""
    pair = _related_pair(scene, rng)
    if pair is None:
        return None
    a, relation, b = pair
    background = f" {background_phrase(scene.background, rng)}" if rng.random() < 0.6 else ""
    return f"{phrase_for(scene, a, rng, 'a')} {relation} {phrase_for(scene, b, rng, 'a')}{background}"


def _relation_sentence(scene: Scene, rng: random.Random) -> str | None:
    """the red circle is above the blue star"""
    pair = _related_pair(scene, rng)
    if pair is None:
        return None
    a, relation, b = pair
    article = rng.choice(("a", "the"))
    verb = "is" if article == "the" else rng.choice(("is", "sits"))
    return f"{phrase_for(scene, a, rng, article)} {verb} {relation} {phrase_for(scene, b, rng, article)}"


def _two_relations(scene: Scene, rng: random.Random) -> str | None:
    """a red circle is above a blue star and next to a green square"""
    pairs = plain_pairs(scene)
    rng.shuffle(pairs)
    for a, b in pairs:
        others = [(c, d) for c, d in pairs if c is a and d is not b]
        if others:
            c = rng.choice(others)[1]
            first, second = (relation_word(rng.choice(plain_relations(a, item)), rng) for item in (b, c))
            if first != second:
                subject, one, other = (phrase_for(scene, item, rng, "a") for item in (a, b, c))
                return f"{subject} is {first} {one} and {second} {other}"
    return None


def _between(scene: Scene, rng: random.Random) -> str | None:
    """a green square between a red circle and a blue star"""
    unique = unique_objects(scene)
    found = [(m, a, b) for m in unique for a in unique for b in unique if a is not b and is_between(m, a, b)]
    if not found:
        return None
    middle, a, b = (phrase_for(scene, item, rng, "a") for item in rng.choice(found))
    return f"{middle} between {a} and {b}"


def _placed(scene: Scene, rng: random.Random) -> str | None:
    """a red circle in the top left corner"""
    item = rng.choice(scene.objects)
    where = place(item)
    if not where or not own_descriptions(scene, item):
        return None
    words = place_phrase(where)
    if rng.random() < 0.5:
        return f"{phrase_for(scene, item, rng, 'a')} {words}"
    return f"the {phrase_for(scene, item, rng, '')} is {words}"


# Template -> how often it is tried.
TEMPLATES: dict[Callable[[Scene, random.Random], str | None], int] = {
    _listing: 5,
    _there_is: 3,
    _background_first: 2,
    _picture_of: 3,
    _count: 1,
    _count_and_list: 1,
    _relation: 6,
    _relation_sentence: 3,
    _two_relations: 2,
    _between: 12,
    _placed: 2,
}


def _there(listing: str) -> str:
    return f"there {'is' if listing.split()[0] in ('a', 'an', 'one') else 'are'} {listing}"


def _everything(scene: Scene, rng: random.Random) -> str:
    """All objects, those of one description counted together."""
    detail = rng.choices(DETAILS, weights=(4, 4, 1, 1))[0]
    groups: dict[Description, int] = {}
    for item in rng.sample(scene.objects, len(scene.objects)):
        description = description_of(item, detail)
        groups[description] = groups.get(description, 0) + 1
    phrases = [noun_phrase(description, number, rng) for description, number in groups.items()]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _related_pair(scene: Scene, rng: random.Random) -> tuple[SceneObject, str, SceneObject] | None:
    pairs = plain_pairs(scene)
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return a, relation_word(rng.choice(plain_relations(a, b)), rng), b


def describe(scene: Scene, rng: random.Random) -> str:
    """small red circle at 3 7, large blue star at 8 2 on green grass: all that is in the picture, for a reader who does not see it.

    Every object comes once, in random order, with its column and row, 0 to 9 from the top left.
    """
    objects = rng.sample(scene.objects, len(scene.objects))
    listing = ", ".join(f"{item.size} {item.colour} {item.shape} at {int(10 * item.x)} {int(10 * item.y)}" for item in objects)
    return f"{listing} on {background_name(scene.background.kind, scene.background.colour)}"
