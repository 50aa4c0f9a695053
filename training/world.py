"""The world that the tiny model draws: scenes of coloured shapes, and which of them are held out.

A scene has one to three things. A thing is a shape with a colour, a size, a texture, a count and a place on a
three-by-three grid; several of a kind stand in a row (in a column at the left and right edges). Behind them is one of
eight backgrounds. Everything is drawn from `random.Random`, so a seed is a scene on every machine.

Held out: one in twelve of the (colour, shape, place) triples, chosen by hash, appears in no training scene at all.
A held-out prompt names at least one of them.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "orange": (250, 138, 20),
    "yellow": (252, 226, 40),
    "green": (35, 165, 65),
    "cyan": (40, 200, 220),
    "blue": (35, 75, 220),
    "purple": (135, 50, 190),
    "pink": (250, 130, 190),
}
SIZES = {"small": 0.09, "medium": 0.125, "large": 0.18}  # radius, as a share of the scene's unit
TEXTURES = ("solid", "striped", "dotted")
BACKGROUNDS = ("white", "black", "grey", "beige", "gradient", "checkerboard", "meadow", "night")
PLACES: dict[str, tuple[float, float]] = {  # x, y as shares of width and height, from the top left
    "top left": (0.2, 0.2),
    "top": (0.5, 0.2),
    "top right": (0.8, 0.2),
    "left": (0.2, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.8, 0.5),
    "bottom left": (0.2, 0.8),
    "bottom": (0.5, 0.8),
    "bottom right": (0.8, 0.8),
}
ROW_PLACES = ("top", "left", "centre", "right", "bottom")  # where several of a kind can stand
ROW_GAP = 0.24  # between neighbours' centres in a row, as a share of the side along it
GAP = 4.0  # least number of pixels between the boxes of two things
REACH = 1.08  # half a bounding box, at most, in radii
HELD_OUT_ONE_IN = 12


@dataclass(frozen=True)
class Thing:
    """One phrase's worth of a scene. `place` is None where a prompt leaves it open."""

    shape: str
    colour: str
    size: str = "medium"
    texture: str = "solid"
    count: int = 1
    place: str | None = None


@dataclass(frozen=True)
class Spot:
    """One drawn shape: centre and radius in pixels."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `background` is None where a prompt leaves it open.

    `jitter` moves the things a little off their places, four numbers in 0..1 each, by thing; it isn't described by
    any prompt.
    """

    things: tuple[Thing, ...]
    background: str | None
    jitter: tuple[tuple[float, float, float, float], ...] = ()

    def described(self) -> Scene:
        """The scene without what no prompt can say."""
        return replace(self, jitter=())

    def spots(self, width: int, height: int) -> list[Spot]:
        """Every shape of the scene on a canvas of `width` x `height` pixels."""
        jitters = self.jitter or ((0.5, 0.5, 0.5, 0.5),) * len(self.things)
        return [
            spot
            for thing, jitter in zip(self.things, jitters, strict=True)
            for spot in _spots(thing, jitter, width, height)
        ]


def held_out(thing: Thing) -> bool:
    """Whether training never shows this colour of this shape at this place."""
    digest = hashlib.sha256(f"{thing.colour} {thing.shape} {thing.place}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


_HELD_OUT = {
    (colour, shape, place)
    for colour in COLOURS
    for shape in SHAPES
    for place in PLACES
    if held_out(Thing(shape, colour, place=place))
}


def is_held_out(scene: Scene) -> bool:
    return any((thing.colour, thing.shape, thing.place) in _HELD_OUT for thing in scene.things)


def unit(width: int, height: int) -> float:
    """The length in pixels that sizes are shares of: between the short side and the mean side."""
    return 0.5 * (min(width, height) + math.sqrt(width * height))


def sample(rng: random.Random, width: int = 256, height: int = 256, *, hold_out: bool = True) -> Scene:
    """A random scene that fits the canvas.

    With `hold_out` (training) it has no held-out triple; without it (evaluation) its first thing is one.
    """
    while True:
        background = rng.choice(BACKGROUNDS)
        things: list[Thing] = []
        for number in range(rng.choices((1, 2, 3), (3, 4, 3))[0]):
            thing = _thing(rng)
            while (
                any((thing.shape, thing.colour) == (other.shape, other.colour) for other in things)
                or ((thing.colour, thing.shape, thing.place) in _HELD_OUT and (hold_out or number > 0))
                or ((thing.colour, thing.shape, thing.place) not in _HELD_OUT and not hold_out and number == 0)
            ):
                thing = _thing(rng)
            things.append(thing)
        rng.shuffle(things)
        jitter = tuple((rng.random(), rng.random(), rng.random(), rng.random()) for _ in things)
        scene = Scene(tuple(things), background, jitter)
        if fits(scene, width, height):
            return scene


def mistaken(scene: Scene, rng: random.Random, width: int = 256, height: int = 256) -> Scene:
    """What a wrong caption says of `scene`: every other time all things are another scene's, else of one thing the
    colour, the shape or the place is another.

    Like any training scene it has no held-out triple: captions that name one and are always wrong would teach that
    such captions are to be ignored. The background stays as it is. Sampling begins with noise of mean 0, which a white
    or black picture would not have left; a model that knew captions to be wrong about backgrounds would take that noise
    for a sign that this caption is.
    """
    if rng.random() < 0.5:
        for _ in range(100):
            number = rng.randrange(len(scene.things))
            changed = _changed(scene.things[number], rng)
            rest = (*scene.things[:number], *scene.things[number + 1 :])
            found = replace(scene, things=(*scene.things[:number], changed, *scene.things[number + 1 :]))
            if (
                (changed.colour, changed.shape, changed.place) not in _HELD_OUT
                and all((changed.shape, changed.colour) != (other.shape, other.colour) for other in rest)
                and fits(found, width, height)
            ):
                return found
    while True:
        found = replace(sample(rng, width, height), background=scene.background)
        if found.described() != scene.described():
            return found


def fits(scene: Scene, width: int, height: int) -> bool:
    """Whether the things' boxes keep `GAP` pixels apart and none leaves the canvas."""
    jitters = scene.jitter or ((0.5, 0.5, 0.5, 0.5),) * len(scene.things)
    before: list[Spot] = []
    for thing, jitter in zip(scene.things, jitters, strict=True):
        spots = list(_spots(thing, jitter, width, height))
        for spot in spots:
            reach = REACH * spot.radius
            if not (spot.x - reach > 0 and spot.x + reach < width and spot.y - reach > 0 and spot.y + reach < height):
                return False
            for other in before:
                apart = REACH * (spot.radius + other.radius) + GAP
                if abs(spot.x - other.x) < apart and abs(spot.y - other.y) < apart:
                    return False
        before += spots
    return True


def held_out_scenes(seed: int = 0, width: int = 256, height: int = 256) -> Iterator[Scene]:
    """Scenes for evaluation, without end: different seeds, different lists."""
    number = 0
    while True:
        yield sample(random.Random(f"held out {seed} {number}"), width, height, hold_out=False)
        number += 1


def _thing(rng: random.Random) -> Thing:
    colour = rng.choice(tuple(COLOURS))
    shape = rng.choice(SHAPES)
    texture = rng.choices(TEXTURES, (6, 2, 2))[0]
    if rng.random() < 0.2:
        return Thing(shape, colour, "small", texture, rng.randint(2, 4), rng.choice(ROW_PLACES))
    return Thing(shape, colour, rng.choice(tuple(SIZES)), texture, 1, rng.choice(tuple(PLACES)))


def _changed(thing: Thing, rng: random.Random) -> Thing:
    """`thing` with another colour, another shape or at another place."""
    kind = rng.choice(("colour", "shape", "place"))
    if kind == "colour":
        return replace(thing, colour=rng.choice([colour for colour in COLOURS if colour != thing.colour]))
    if kind == "shape":
        return replace(thing, shape=rng.choice([shape for shape in SHAPES if shape != thing.shape]))
    places = PLACES if thing.count == 1 else ROW_PLACES
    return replace(thing, place=rng.choice([place for place in places if place != thing.place]))


def _spots(thing: Thing, jitter: tuple[float, float, float, float], width: int, height: int) -> Iterator[Spot]:
    if thing.place is None:
        raise ValueError("a thing without a place can't be drawn")
    x, y = PLACES[thing.place]
    upright = thing.place in ("left", "right")
    # A row keeps to the middle of its axis: four in a row just fit.
    loose = 0.012 if thing.count == 1 else 0.006
    x += loose * (2 * jitter[0] - 1)
    y += loose * (2 * jitter[1] - 1)
    radius = SIZES[thing.size] * unit(width, height) * (0.97 + 0.06 * jitter[2])
    for number in range(thing.count):
        offset = ROW_GAP * (number - (thing.count - 1) / 2)
        across, down = (0.0, offset) if upright else (offset, 0.0)
        yield Spot(thing.shape, thing.colour, thing.texture, (x + across) * width, (y + down) * height, radius)
