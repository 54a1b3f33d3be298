"""Words and phrases for what is in a scene."""

import random

from data.scene_truth import Background, Scene, SceneObject, plain_relations

NUMBERS = ("no", "one", "two", "three", "four")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "next to": ("next to", "beside"),
}
# Which of (size, colour, shape) a noun phrase states; without the shape the noun is "shape".
DETAILS = ((True, True, True), (False, True, True), (False, False, True), (False, True, False))
BACKGROUND_PHRASES = {
    "plain": ("on a {colour} background", "on a plain {colour} background", "against a {colour} background"),
    "gradient": ("on a fading {colour} background", "on {colour} that fades to white"),
    "stripes": ("on a {colour} striped background", "on {colour} stripes"),
    "checks": ("on a {colour} checkered background", "on {colour} checks"),
    "speckles": ("on a {colour} speckled background", "on {colour} speckles"),
    "grass": ("on the grass", "on green grass", "on a grassy background"),
    "sand": ("on the sand", "on yellow sand", "on a sandy background"),
    "sky": ("in the sky", "in a blue sky", "in a cloudy sky"),
    "night": ("in the night sky", "at night", "in a dark sky"),
    "snow": ("on the snow", "on white snow", "on a snowy background"),
}
BACKGROUND_NAMES = {
    "plain": "plain {colour}",
    "gradient": "fading {colour}",
    "stripes": "{colour} stripes",
    "checks": "{colour} checks",
    "speckles": "{colour} speckles",
    "grass": "green grass",
    "sand": "yellow sand",
    "sky": "blue sky",
    "night": "dark sky",
    "snow": "white snow",
}

# A description is (size, colour, shape), None where it is not stated.
Description = tuple[str | None, str | None, str | None]


def background_phrase(background: Background, rng: random.Random) -> str:
    """on green grass"""
    return rng.choice(BACKGROUND_PHRASES[background.kind]).format(colour=background.colour)


def background_name(kind: str, colour: str) -> str:
    """green grass"""
    return BACKGROUND_NAMES[kind].format(colour=colour)


def relation_word(relation: str, rng: random.Random) -> str:
    """One of RELATIONS in words."""
    return rng.choice(RELATION_WORDS[relation])


def place_phrase(where: tuple[str, ...]) -> str:
    """What `place` returns, in words."""
    if where == ("middle",):
        return "in the middle"
    if len(where) == 2:
        return f"in the {' '.join(where)} corner"
    return f"at the {where[0]}" if where[0] in ("top", "bottom") else f"on the {where[0]} side"


def description_of(item: SceneObject, detail: tuple[bool, bool, bool]) -> Description:
    """The parts of an object's description that `detail` keeps."""
    return tuple(value if kept else None for value, kept in zip((item.size, item.colour, item.shape), detail, strict=True))


def own_descriptions(scene: Scene, item: SceneObject) -> list[Description]:
    """The descriptions that fit this object and no other."""
    found = (description_of(item, detail) for detail in DETAILS)
    return [description for description in found if scene.count(*description) == 1]


def noun(description: Description, plural: bool, rng: random.Random) -> str:
    """small red circles"""
    size, colour, shape = description
    word = shape or "shape"
    if plural:
        word += "es" if word.endswith("s") else "s"
    words = [rng.choice(SIZE_WORDS[size])] if size else []
    return " ".join([*words, colour, word] if colour else [*words, word])


def noun_phrase(description: Description, number: int, rng: random.Random, article: str = "a") -> str:
    """number 1 takes the article ("a" becomes "an" where it must), more take the plural."""
    words = noun(description, number > 1, rng)
    if number > 1:
        return f"{NUMBERS[number]} {words}"
    if article == "a":
        article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}" if article else words


def phrase_for(scene: Scene, item: SceneObject, rng: random.Random, article: str = "the") -> str:
    """A noun phrase for an object that fits no other; the object must have a description of its own."""
    descriptions = own_descriptions(scene, item)
    weights = [3 if description[1] and description[2] else 1 for description in descriptions]
    return noun_phrase(rng.choices(descriptions, weights=weights)[0], 1, rng, article)


def unique_objects(scene: Scene) -> list[SceneObject]:
    """The objects that can be told from all others in words."""
    return [item for item in scene.objects if own_descriptions(scene, item)]


def plain_pairs(scene: Scene) -> list[tuple[SceneObject, SceneObject]]:
    """Pairs of objects that can be told from all others and stand in a plain relation."""
    unique = unique_objects(scene)
    return [(a, b) for a in unique for b in unique if a is not b and plain_relations(a, b)]
