"""The truth about a drawn scene: its objects, their relations and places, its background; and the making of random scenes.

A scene is a function of (seed, split, index) alone. One to four objects, each a shape, a colour and a size at a place, stand apart from each other on
one of ten kinds of background. Some (colour, shape) pairs are held out: they never occur in train, and occur in every second scene of val and test.
"""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

VERSION = 1

COLOURS = {
    "red": (214, 39, 40),
    "orange": (250, 135, 20),
    "yellow": (250, 220, 40),
    "green": (30, 150, 60),
    "blue": (35, 80, 215),
    "purple": (125, 45, 165),
    "pink": (250, 125, 190),
    "brown": (125, 75, 35),
    "black": (20, 20, 22),
    "white": (252, 252, 252),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
HELD_OUT = frozenset(
    {
        ("red", "triangle"),
        ("orange", "diamond"),
        ("yellow", "circle"),
        ("green", "heart"),
        ("blue", "star"),
        ("purple", "square"),
        ("pink", "cross"),
        ("white", "ring"),
    }
)
# Radius as a fraction of the picture's side, from and to.
SIZES = {"small": (0.08, 0.1), "large": (0.155, 0.185)}
MARGIN = 0.025  # least distance of an object from the border and from any other object

# A relation is stated when it is plain to see, and judged true of a caption when it is not wrong.
STATED_OFFSET, JUDGED_OFFSET = 0.12, 0.04
STATED_GAP, JUDGED_GAP = 0.09, 0.15
STATED_SIDE, JUDGED_SIDE = 0.36, 0.42
STATED_MIDDLE, JUDGED_MIDDLE = 0.1, 0.15
STATED_BETWEEN, JUDGED_BETWEEN = (0.25, 0.08), (0.15, 0.12)  # see is_between
RELATIONS = ("left of", "right of", "above", "below", "next to")
PLACES = ("left", "right", "top", "bottom", "middle")


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; x, y (down) and radius are fractions of the side, angle is in degrees, tint the RGB drawn."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[int, int, int]


@dataclass(frozen=True)
class Background:
    """A kind of background, the colour its name carries (empty for a landscape), and the seed of its texture."""

    kind: str
    colour: str
    seed: int

    @property
    def seen_colour(self) -> str:
        """The colour that anybody would name, a landscape's too."""
        return self.colour or LANDSCAPE_COLOURS[self.kind]


@dataclass(frozen=True)
class Scene:
    """The truth about a picture."""

    objects: tuple[SceneObject, ...]
    background: Background

    @property
    def held_out(self) -> bool:
        """Whether an object has a (colour, shape) pair that train never shows."""
        return any((item.colour, item.shape) in HELD_OUT for item in self.objects)

    def find(self, size: str | None = None, colour: str | None = None, shape: str | None = None) -> list[SceneObject]:
        """The objects that fit a description; None fits anything."""
        return [
            item
            for item in self.objects
            if size in (None, item.size) and colour in (None, item.colour) and shape in (None, item.shape)
        ]

    def count(self, size: str | None = None, colour: str | None = None, shape: str | None = None) -> int:
        """How many objects fit a description."""
        return len(self.find(size, colour, shape))

    def related(self, first: Sequence[SceneObject], relation: str, second: Sequence[SceneObject]) -> bool:
        """Whether some object of `first` stands in the relation to another of `second`, by the judging thresholds."""
        return any(relation in relations(a, b, JUDGED_OFFSET, JUDGED_GAP) for a in first for b in second if a is not b)


def relations(a: SceneObject, b: SceneObject, offset: float, gap: float) -> set[str]:
    """The relations of a to b: centres `offset` apart along an axis; "next to" with at most `gap` between them."""
    found = set()
    if abs(a.x - b.x) >= offset:
        found.add("left of" if a.x < b.x else "right of")
    if abs(a.y - b.y) >= offset:
        found.add("above" if a.y < b.y else "below")
    if _gap(a, b) <= gap:
        found.add("next to")
    return found


def plain_relations(a: SceneObject, b: SceneObject) -> list[str]:
    """The relations of a to b that nobody would dispute: along the axis on which they are further apart, or close."""
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    found = relations(a, b, STATED_OFFSET, STATED_GAP)
    if dx < 1.5 * dy:
        found -= {"left of", "right of"}
    if dy < 1.5 * dx:
        found -= {"above", "below"}
    return [relation for relation in RELATIONS if relation in found]


def place(item: SceneObject) -> tuple[str, ...]:
    """Where an object is in the picture: () where that is not plain, else one or two of PLACES."""
    horizontal = "left" if item.x < STATED_SIDE else "right" if item.x > 1 - STATED_SIDE else ""
    vertical = "top" if item.y < STATED_SIDE else "bottom" if item.y > 1 - STATED_SIDE else ""
    if horizontal or vertical:
        return tuple(word for word in (vertical, horizontal) if word)
    return ("middle",) if abs(item.x - 0.5) < STATED_MIDDLE and abs(item.y - 0.5) < STATED_MIDDLE else ()


def _gap(a: SceneObject, b: SceneObject) -> float:
    return math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius


def is_at(item: SceneObject, words: Collection[str]) -> bool:
    """Whether it is not wrong to say that an object is at a place, given as words of PLACES."""
    fits = {
        "left": item.x < JUDGED_SIDE,
        "right": item.x > 1 - JUDGED_SIDE,
        "top": item.y < JUDGED_SIDE,
        "bottom": item.y > 1 - JUDGED_SIDE,
        "middle": max(abs(item.x - 0.5), abs(item.y - 0.5)) < JUDGED_MIDDLE,
    }
    return all(fits[word] for word in words)


def is_between(middle: SceneObject, a: SceneObject, b: SceneObject, share: float = STATED_BETWEEN[0], width: float = STATED_BETWEEN[1]) -> bool:
    """Whether the centre of `middle` is at most `width` from the line from a to b, and not in the `share` of it next to either end."""
    if middle is a or middle is b:
        return False
    dx, dy = b.x - a.x, b.y - a.y
    length = math.hypot(dx, dy)
    along = ((middle.x - a.x) * dx + (middle.y - a.y) * dy) / length**2
    across = abs((middle.x - a.x) * dy - (middle.y - a.y) * dx) / length
    return share < along < 1 - share and across < width


@dataclass(frozen=True)
class BackgroundKind:
    """Which colours a kind of background may take (or none), and which objects it would hide."""

    colours: tuple[str, ...] = ("",)
    hides: tuple[str, ...] = ()


# Background colours are pale or dark enough to stand apart from the objects; `hides` lists objects too close to them.
BACKGROUND_COLOURS = {
    "grey": ((150, 152, 156), ()),
    "blue": ((165, 205, 240), ("blue", "white")),
    "green": ((170, 215, 165), ("green", "white", "yellow")),
    "pink": ((250, 205, 220), ("pink", "white")),
    "yellow": ((252, 236, 150), ("yellow", "white", "orange")),
    "white": ((248, 248, 246), ("white", "yellow")),
    "black": ((28, 28, 32), ("black", "brown")),
}
BACKGROUND_KINDS = {
    "plain": BackgroundKind(("grey", "blue", "green", "pink", "yellow", "white", "black")),
    "gradient": BackgroundKind(("blue", "green", "pink", "yellow"), ("white", "yellow")),
    "stripes": BackgroundKind(("grey", "blue", "green", "pink"), ("white", "yellow")),
    "checks": BackgroundKind(("grey", "blue", "green", "pink"), ("white", "yellow")),
    "speckles": BackgroundKind(("grey", "blue", "pink", "yellow"), ("white",)),
    "grass": BackgroundKind(hides=("green", "brown")),
    "sand": BackgroundKind(hides=("yellow", "white", "orange")),
    "sky": BackgroundKind(hides=("blue", "white")),
    "night": BackgroundKind(hides=("black", "brown", "purple")),
    "snow": BackgroundKind(hides=("white", "yellow")),
}
LANDSCAPE_COLOURS = {"grass": "green", "sand": "yellow", "sky": "blue", "night": "black", "snow": "white"}


def make_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Scene `index` of a split."""
    rng = random.Random(f"scene/{VERSION}/{seed}/{split}/{index}")
    held_out = split != "train" and index % 2 == 1
    background, hidden = _make_background(rng)
    number = rng.choices((1, 2, 3, 4), weights=(15, 35, 30, 20))[0]
    looks = _make_looks(rng, number, hidden, held_out)
    while True:
        objects = _place_objects(rng, looks)
        if objects is not None:
            return Scene(objects, background)


def _make_background(rng: random.Random) -> tuple[Background, set[str]]:
    kind = rng.choice(list(BACKGROUND_KINDS))
    colour = rng.choice(BACKGROUND_KINDS[kind].colours)
    hidden = set(BACKGROUND_KINDS[kind].hides)
    if colour:
        hidden |= set(BACKGROUND_COLOURS[colour][1]) | {colour}
    return Background(kind, colour, rng.getrandbits(32)), hidden


def _make_looks(rng: random.Random, number: int, hidden: set[str], held_out: bool) -> list[tuple[str, str, str]]:
    """(size, colour, shape) of each object; with `held_out` one or more pairs are held out, else none."""
    pairs = [(colour, shape) for colour in COLOURS if colour not in hidden for shape in SHAPES]
    seen = [pair for pair in pairs if pair not in HELD_OUT]
    looks = []
    for place_in_list in range(number):
        choices = (
            sorted(pair for pair in HELD_OUT if pair[0] not in hidden) if held_out and place_in_list == 0 else seen
        )
        colour, shape = rng.choice(choices)
        looks.append((rng.choice(list(SIZES)), colour, shape))
    if number > 1 and rng.random() < 0.35:
        # A twin, so that captions can count.
        looks[-1] = looks[0]
    rng.shuffle(looks)
    return looks


def _place_objects(rng: random.Random, looks: list[tuple[str, str, str]]) -> tuple[SceneObject, ...] | None:
    """Objects at random places that keep their distance; None where the last ones found no room."""
    objects = []
    for size, colour, shape in looks:
        radius = rng.uniform(*SIZES[size])
        tint = tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in COLOURS[colour])
        angle = rng.uniform(-10, 10)
        for _ in range(30):
            x, y = (rng.uniform(radius + MARGIN, 1 - radius - MARGIN) for _ in range(2))
            item = SceneObject(shape, colour, size, round(x, 4), round(y, 4), round(radius, 4), round(angle, 1), tint)
            if all(_gap(item, other) >= MARGIN for other in objects):
                objects.append(item)
                break
        else:
            return None
    return tuple(objects)
