"""A procedurally drawn data set: scenes of a few shapes, their pictures at any size, and true captions.

A scene is a function of (seed, split, index) alone. One to four objects, each a shape, a colour and a size at a place,
stand apart from each other on one of ten kinds of background. Captions come from a grammar; every noun phrase names
exactly as many objects as the scene has of that description, and every relation follows from the objects' centres. Some
(colour, shape) pairs are held out: they never occur in train, and occur in every second scene of val and test.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from data.images import MAX_PIXELS
from data.rows import DataError, Row

VERSION = 1
SPLITS = {"train": 4000, "val": 500, "test": 500}
CAPTIONS_PER_SCENE = 5
DEFAULT_SIZE = 64

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
    horizontal = "left" if item.x < 0.36 else "right" if item.x > 0.64 else ""
    vertical = "top" if item.y < 0.36 else "bottom" if item.y > 0.64 else ""
    if horizontal or vertical:
        return tuple(word for word in (vertical, horizontal) if word)
    return ("middle",) if abs(item.x - 0.5) < 0.1 and abs(item.y - 0.5) < 0.1 else ()


def _gap(a: SceneObject, b: SceneObject) -> float:
    return math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius


@dataclass(frozen=True)
class BackgroundKind:
    """How a kind of background is named, which colours it may take (or none), and which objects it would hide."""

    phrases: tuple[str, ...]
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
    "plain": BackgroundKind(
        ("on a {colour} background", "on a plain {colour} background", "against a {colour} background"),
        ("grey", "blue", "green", "pink", "yellow", "white", "black"),
    ),
    "gradient": BackgroundKind(
        ("on a fading {colour} background", "on {colour} that fades to white"),
        ("blue", "green", "pink", "yellow"),
        ("white", "yellow"),
    ),
    "stripes": BackgroundKind(
        ("on a {colour} striped background", "on {colour} stripes"),
        ("grey", "blue", "green", "pink"),
        ("white", "yellow"),
    ),
    "checks": BackgroundKind(
        ("on a {colour} checkered background", "on {colour} checks"),
        ("grey", "blue", "green", "pink"),
        ("white", "yellow"),
    ),
    "speckles": BackgroundKind(
        ("on a {colour} speckled background", "on {colour} speckles"),
        ("grey", "blue", "pink", "yellow"),
        ("white",),
    ),
    "grass": BackgroundKind(("on the grass", "on green grass", "on a grassy background"), hides=("green", "brown")),
    "sand": BackgroundKind(
        ("on the sand", "on yellow sand", "on a sandy background"), hides=("yellow", "white", "orange")
    ),
    "sky": BackgroundKind(("in the sky", "in a blue sky", "in a cloudy sky"), hides=("blue", "white")),
    "night": BackgroundKind(("in the night sky", "at night", "in a dark sky"), hides=("black", "brown", "purple")),
    "snow": BackgroundKind(("on the snow", "on white snow", "on a snowy background"), hides=("white", "yellow")),
}


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


OVERSAMPLING = 4


def draw(scene: Scene, size: int = DEFAULT_SIZE) -> Image.Image:
    """The picture of a scene, RGB, size x size pixels, with anti-aliased objects."""
    image = _draw_background(scene.background, size)
    for item in scene.objects:
        centre_x, centre_y, radius = item.x * size, item.y * size, item.radius * size
        left, top = math.floor(centre_x - radius) - 1, math.floor(centre_y - radius) - 1
        side = math.ceil(2 * radius) + 4
        mask = Image.new("L", (side * OVERSAMPLING,) * 2)
        canvas = ImageDraw.Draw(mask)
        _draw_shape(
            canvas,
            item.shape,
            (centre_x - left) * OVERSAMPLING,
            (centre_y - top) * OVERSAMPLING,
            radius * OVERSAMPLING,
            math.radians(item.angle),
        )
        image.paste(item.tint, (left, top), mask.reduce(OVERSAMPLING))
    return image


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, angle: float) -> None:
    if shape in ("circle", "ring"):
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = 0.55 * radius
            canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    cos, sin = math.cos(angle), math.sin(angle)
    outline = [(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos)) for u, v in OUTLINES[shape]]
    canvas.polygon(outline, fill=255)


def _spokes(angles: Sequence[float], radii: Sequence[float]) -> list[tuple[float, float]]:
    """Points at angles (degrees, clockwise from the top) and radii."""
    return [(r * math.sin(math.radians(a)), -r * math.cos(math.radians(a))) for a, r in zip(angles, radii, strict=True)]


def _heart() -> list[tuple[float, float]]:
    """The classic curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled into the unit circle."""
    points = []
    for step in range(40):
        t = 2 * math.pi * step / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 17))
    return points


# Corners in units of the radius, y down, all inside the unit circle.
OUTLINES = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": _spokes((0, 120, 240), (1, 1, 1)),
    "star": _spokes(range(0, 360, 36), (1, 0.42) * 5),
    "heart": _heart(),
    "cross": [
        (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
        (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
    ],
    "diamond": [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)],
}  # fmt: skip

TEXTURE = 32  # textures are grids of this many cells a side, whatever the picture's size


def _draw_background(background: Background, size: int) -> Image.Image:
    noise = np.frombuffer(np.random.Philox(key=background.seed).random_raw(TEXTURE * TEXTURE // 8).tobytes(), np.uint8)
    noise = noise.reshape(TEXTURE, TEXTURE, 1) / 255.0  # 0 to 1
    down = (np.arange(TEXTURE) / (TEXTURE - 1)).reshape(TEXTURE, 1, 1)  # 0 at the top, 1 at the bottom
    pixels = PAINTERS[background.kind](background, noise, down)
    pixels = np.broadcast_to(pixels, (TEXTURE, TEXTURE, 3))
    texture = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    hard_edged = background.kind in ("stripes", "checks")
    return texture.resize((size, size), Image.Resampling.NEAREST if hard_edged else Image.Resampling.BILINEAR)


def _rgb(*channels: int) -> np.ndarray:
    return np.array(channels, dtype=np.float64)


def _base(background: Background) -> np.ndarray:
    return _rgb(*BACKGROUND_COLOURS[background.colour][0])


def _plain(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _base(background)


def _gradient(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _base(background) * 0.92 * (1 - down) + 250 * down


def _stripes(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    stripe = (np.arange(TEXTURE) // 4 % 2).reshape(TEXTURE, 1, 1)
    if background.seed % 2:
        stripe = stripe.transpose(1, 0, 2)
    return _base(background) * (1 - stripe) + 240 * stripe


def _checks(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    step = np.arange(TEXTURE) // 4
    check = ((step[:, None] + step[None, :]) % 2)[..., None]
    return _base(background) * (1 - check) + 240 * check


def _speckles(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _base(background) - 70 * (noise > 0.85)


def _grass(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _rgb(105, 175, 75) - 18 * down + 28 * (noise - 0.5)


def _sand(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _rgb(228, 205, 150) + 6 * np.sin(down * 40) + 14 * (noise - 0.5)


def _sky(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    across = (np.arange(TEXTURE) / (TEXTURE - 1)).reshape(1, TEXTURE, 1)
    cloud = np.zeros((TEXTURE, TEXTURE, 1))
    for k in range(3):
        x, y = (0.1 + 0.8 * float(noise[k, j, 0]) for j in range(2))
        cloud = np.maximum(cloud, np.clip(1.4 - np.hypot((across - x) / 0.2, (down - y) / 0.09), 0, 1))
    blue = _rgb(115, 180, 235) + _rgb(45, 30, 12) * down
    return blue * (1 - 0.75 * cloud) + 255 * 0.75 * cloud


def _night(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _rgb(10, 12, 40) + _rgb(8, 8, 22) * down + 110 * (noise > 0.985)


def _snow(background: Background, noise: np.ndarray, down: np.ndarray) -> np.ndarray:
    return _rgb(238, 243, 250) - _rgb(26, 18, 8) * (noise * down)


PAINTERS: dict[str, Callable[[Background, np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "speckles": _speckles,
    "grass": _grass,
    "sand": _sand,
    "sky": _sky,
    "night": _night,
    "snow": _snow,
}


NUMBERS = ("no", "one", "two", "three", "four")
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "next to": ("next to", "beside"),
}
OPENINGS = ("a picture of", "a drawing of", "an image of", "a scene with")
# Which of (size, colour, shape) a noun phrase states; without the shape the noun is "shape".
DETAILS = ((True, True, True), (False, True, True), (False, False, True), (False, True, False))


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
    return f"{_everything(scene, rng)} {_where(scene, rng)}"


def _there_is(scene: Scene, rng: random.Random) -> str:
    """there are two blue stars and a red circle on the grass"""
    return f"{_there(_everything(scene, rng))} {_where(scene, rng)}"


def _background_first(scene: Scene, rng: random.Random) -> str:
    """on the grass there is a red circle"""
    return f"{_where(scene, rng)} {_there(_everything(scene, rng))}"


def _picture_of(scene: Scene, rng: random.Random) -> str:
    """a picture of a red circle on the grass"""
    return f"{rng.choice(OPENINGS)} {_everything(scene, rng)} {_where(scene, rng)}"


def _count(scene: Scene, rng: random.Random) -> str:
    """three shapes on the grass"""
    number, noun = len(scene.objects), rng.choice(("shape", "object"))
    if number == 1:
        return f"a single {rng.choice((noun, scene.objects[0].shape))} {_where(scene, rng)}"
    return f"{NUMBERS[number]} {noun}s {_where(scene, rng)}"


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
    background = f" {_where(scene, rng)}" if rng.random() < 0.6 else ""
    return f"{_one(scene, a, rng, 'a')} {relation} {_one(scene, b, rng, 'a')}{background}"


def _relation_sentence(scene: Scene, rng: random.Random) -> str | None:
    """the red circle is above the blue star"""
    pair = _related_pair(scene, rng)
    if pair is None:
        return None
    a, relation, b = pair
    article = rng.choice(("a", "the"))
    verb = "is" if article == "the" else rng.choice(("is", "sits"))
    return f"{_one(scene, a, rng, article)} {verb} {relation} {_one(scene, b, rng, article)}"


def _two_relations(scene: Scene, rng: random.Random) -> str | None:
    """a red circle is above a blue star and next to a green square"""
    pairs = _plain_pairs(scene)
    rng.shuffle(pairs)
    for a, b in pairs:
        others = [(c, d) for c, d in pairs if c is a and d is not b]
        if others:
            c = rng.choice(others)[1]
            first, second = (_word(rng.choice(plain_relations(a, item)), rng) for item in (b, c))
            if first != second:
                subject, one, other = (_one(scene, item, rng, "a") for item in (a, b, c))
                return f"{subject} is {first} {one} and {second} {other}"
    return None


def _between(scene: Scene, rng: random.Random) -> str | None:
    """a green square between a red circle and a blue star"""
    unique = [item for item in scene.objects if _descriptions(scene, item)]
    found = [(m, a, b) for m in unique for a in unique for b in unique if a is not b and is_between(m, a, b)]
    if not found:
        return None
    middle, a, b = (_one(scene, item, rng, "a") for item in rng.choice(found))
    return f"{middle} between {a} and {b}"


def is_between(middle: SceneObject, a: SceneObject, b: SceneObject) -> bool:
    """Whether the centre of `middle` is near the inner part of the line from a to b."""
    if middle is a or middle is b:
        return False
    dx, dy = b.x - a.x, b.y - a.y
    length = math.hypot(dx, dy)
    along = ((middle.x - a.x) * dx + (middle.y - a.y) * dy) / length**2
    across = abs((middle.x - a.x) * dy - (middle.y - a.y) * dx) / length
    return 0.25 < along < 0.75 and across < 0.08


def _placed(scene: Scene, rng: random.Random) -> str | None:
    """a red circle in the top left corner"""
    item = rng.choice(scene.objects)
    where = place(item)
    if not where or not _descriptions(scene, item):
        return None
    if where == ("middle",):
        words = "in the middle"
    elif len(where) == 2:
        words = f"in the {' '.join(where)} corner"
    elif where[0] in ("top", "bottom"):
        words = f"at the {where[0]}"
    else:
        words = f"on the {where[0]} side"
    if rng.random() < 0.5:
        return f"{_one(scene, item, rng, 'a')} {words}"
    return f"the {_one(scene, item, rng, '')} is {words}"


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


def _where(scene: Scene, rng: random.Random) -> str:
    background = scene.background
    return rng.choice(BACKGROUND_KINDS[background.kind].phrases).format(colour=background.colour)


def _there(listing: str) -> str:
    return f"there {'is' if listing.split()[0] in ('a', 'an', 'one') else 'are'} {listing}"


def _everything(scene: Scene, rng: random.Random) -> str:
    """All objects, those of one description counted together."""
    detail = rng.choices(DETAILS, weights=(4, 4, 1, 1))[0]
    groups: dict[tuple[str | None, ...], int] = {}
    for item in rng.sample(scene.objects, len(scene.objects)):
        description = _describe(item, detail)
        groups[description] = groups.get(description, 0) + 1
    phrases = [_noun_phrase(description, number, rng) for description, number in groups.items()]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _describe(item: SceneObject, detail: tuple[bool, bool, bool]) -> tuple[str | None, str | None, str | None]:
    return tuple(
        value if kept else None for value, kept in zip((item.size, item.colour, item.shape), detail, strict=True)
    )


def _noun_phrase(description: tuple[str | None, ...], number: int, rng: random.Random, article: str = "a") -> str:
    """number 1 takes the article ("a" becomes "an" where it must), more take the plural."""
    size, colour, shape = description
    noun = shape or "shape"
    if number > 1:
        noun += "es" if noun.endswith("s") else "s"
    words = [rng.choice(SIZE_WORDS[size])] if size else []
    words += [word for word in (colour, noun) if word]
    if number > 1:
        words.insert(0, NUMBERS[number])
    elif article == "a":
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    elif article:
        words.insert(0, article)
    return " ".join(words)


def _descriptions(scene: Scene, item: SceneObject) -> list[tuple[str | None, ...]]:
    """The descriptions that fit this object and no other."""
    found = (_describe(item, detail) for detail in DETAILS)
    return [description for description in found if scene.count(*description) == 1]


def _one(scene: Scene, item: SceneObject, rng: random.Random, article: str) -> str:
    """A noun phrase for one object that fits no other."""
    descriptions = _descriptions(scene, item)
    weights = [3 if description[1] and description[2] else 1 for description in descriptions]
    return _noun_phrase(rng.choices(descriptions, weights=weights)[0], 1, rng, article)


def _plain_pairs(scene: Scene) -> list[tuple[SceneObject, SceneObject]]:
    """Pairs of objects that can be told from all others and stand in a plain relation."""
    unique = [item for item in scene.objects if _descriptions(scene, item)]
    return [(a, b) for a in unique for b in unique if a is not b and plain_relations(a, b)]


def _related_pair(scene: Scene, rng: random.Random) -> tuple[SceneObject, str, SceneObject] | None:
    pairs = _plain_pairs(scene)
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return a, _word(rng.choice(plain_relations(a, b)), rng), b


def _word(relation: str, rng: random.Random) -> str:
    return rng.choice(RELATION_WORDS[relation])


@dataclass(frozen=True)
class SceneImage:
    """A picture that is drawn when it is opened; `scene` is the truth about it."""

    scene: Scene
    name: str
    size: int = DEFAULT_SIZE

    def open(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The picture in mode RGB; a drawn picture has no hostile size, so `max_pixels` is not needed."""
        return draw(self.scene, self.size)

    def fingerprint(self) -> str:
        """SHA-256 of the scene, the size and the version of the drawing code."""
        return hashlib.sha256(f"{VERSION}/{self.size}/{self.scene!r}".encode()).hexdigest()


def split(name: str, count: int | None = None, size: int = DEFAULT_SIZE, seed: int = 0) -> list[Row]:
    """The first `count` rows of a split (train, val, test); `row.image.scene` is the truth."""
    if name not in SPLITS:
        raise DataError(f"no split {name!r} of scenes: choose from {', '.join(SPLITS)}")
    rows = []
    for index in range(SPLITS[name] if count is None else count):
        scene = make_scene(name, index, seed)
        texts = captions(scene, random.Random(f"captions/{VERSION}/{seed}/{name}/{index}"))
        row_id = f"scene-{name}-{index:05d}"
        rows.append(Row(id=row_id, image=SceneImage(scene, row_id, size), captions=texts))
    return rows
