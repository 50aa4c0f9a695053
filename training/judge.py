"""Look at a picture and say which shapes, colours, sizes, textures and places are there.

Classical image analysis in numpy, nothing learned: things are the connected areas of strong colour, a colour is the
nearest hue, a shape is the nearest of eight templates after moving and scaling, a place is the third of the picture
that the centre falls in. Deterministic. Its own error on drawn scenes is measured in `tests/training`.
"""

from __future__ import annotations

import colorsys
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from training.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, Thing, unit

CHROMA = 50.0  # strongest less weakest channel, 0..255: backgrounds stay under 30, colours' dark tones above 65
LEAST_RADIUS = 0.035  # specks under this share of the unit are no things
CLEAR_SHAPE = 0.74  # overlap with the best template under which a shape counts as none
ONE_COLOUR = 0.75  # share of an area's pixels that must agree on its colour
GRID = 48  # templates are GRID x GRID samples
REACH = 1.25  # of a template, in square roots of its area, from its centre

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """One connected area. `shape` or `colour` is "unclear" where nothing matches well; centre in shares, 0..1."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """Which of a prompt's claims hold. `right`: every named shape, colour, count and place, and nothing besides.

    The other fields say the same of one attribute each, whatever the others do; sizes, textures and the background
    don't enter `right`. A field is None where the prompt says nothing of the kind.
    """

    right: bool
    shapes: bool
    colours: bool
    places: bool | None
    counts: bool
    sizes: bool
    textures: bool
    background: bool | None
    seen: tuple[Seen, ...] = field(default=(), compare=False)


def look(picture: NDArray[np.uint8]) -> list[Seen]:
    """Everything in `picture`, uint8 [height, width, 3] RGB, biggest first."""
    height, width, _ = picture.shape
    pixels = picture.astype(np.float32)
    coloured = _median(pixels.max(2) - pixels.min(2)) > CHROMA
    labels, count = _components(coloured)
    length = unit(width, height)
    found: list[tuple[int, Seen]] = []
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    for label in range(1, count + 1):
        if sizes[label] < (LEAST_RADIUS * length) ** 2 * 2:
            continue
        rows, columns = np.nonzero(labels == label)
        box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        mask = labels[box] == label
        shape, overlap = _shape(mask)
        colour, texture = _paint(pixels[box], mask)
        # The middle of the bounding box, which is how things are placed; a centre of mass would favour heavy ends.
        x = (columns.min() + columns.max() + 1) / 2 / width
        y = (rows.min() + rows.max() + 1) / 2 / height
        size = _size(shape, float(sizes[label]), length)
        found.append((int(sizes[label]), Seen(shape, colour, size, texture, float(x), float(y), overlap)))
    return [seen for _, seen in sorted(found, key=lambda pair: -pair[0])]


def background(picture: NDArray[np.uint8]) -> str:
    """The background that `picture` resembles most where it shows no thing."""
    height, width, _ = picture.shape
    pixels = picture.astype(np.float32)
    free = ~_grown(_median(pixels.max(2) - pixels.min(2)) > CHROMA, 4)
    if not free.any():
        return "unclear"
    errors = [float(np.abs(pixels - drawn)[free].mean()) for drawn in _drawn_backgrounds(width, height)]
    return BACKGROUNDS[int(np.argmin(errors))]


def judge(picture: NDArray[np.uint8], asked: Scene) -> Verdict:
    """Compare what `picture` (uint8 [height, width, 3]) shows with what `asked` names."""
    seen = look(picture)
    wanted = [(thing.shape, thing.colour) for thing in asked.things for _ in range(thing.count)]
    there = Counter((one.shape, one.colour) for one in seen)
    named = [thing for thing in asked.things if thing.place is not None]
    counts = len(seen) == len(wanted)
    places = all(_placed(thing, seen) for thing in named) if named else None
    return Verdict(
        right=there == Counter(wanted) and places is not False,
        shapes=Counter(one.shape for one in seen) == Counter(shape for shape, _ in wanted),
        colours=Counter(one.colour for one in seen) == Counter(colour for _, colour in wanted),
        places=places,
        counts=counts,
        sizes=all(any(one.size == thing.size for one in _matches(thing, seen)) for thing in asked.things),
        textures=all(
            bool(_matches(thing, seen)) and all(one.texture == thing.texture for one in _matches(thing, seen))
            for thing in asked.things
        ),
        background=None if asked.background is None else background(picture) == asked.background,
        seen=tuple(seen),
    )


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of verdicts that hold, attribute by attribute, over those that say something of it."""
    names = ("right", "shapes", "colours", "places", "counts", "sizes", "textures", "background")
    table = {}
    for name in names:
        said = [bool(getattr(verdict, name)) for verdict in verdicts if getattr(verdict, name) is not None]
        table[name] = sum(said) / len(said) if said else float("nan")
    return table


def place_of(x: float, y: float) -> str:
    """The place on the three-by-three grid that holds the point `x`, `y` (shares of width and height)."""
    return min(PLACES, key=lambda place: max(abs(x - PLACES[place][0]), abs(y - PLACES[place][1])))


def _matches(thing: Thing, seen: Sequence[Seen]) -> list[Seen]:
    return [one for one in seen if one.shape == thing.shape and one.colour == thing.colour]


def _placed(thing: Thing, seen: Sequence[Seen]) -> bool:
    """Whether all that looks like `thing` is, together, where `thing` belongs; a row also has to be one."""
    ones = _matches(thing, seen)
    if not ones:
        return False
    x, y = float(np.mean([one.x for one in ones])), float(np.mean([one.y for one in ones]))
    if place_of(x, y) != thing.place:
        return False
    if thing.count == 1:
        return True
    across = thing.place in ("left", "right")
    return all(place_of(one.x if across else x, y if across else one.y) == thing.place for one in ones)


def _median(image: Floats) -> Floats:
    """3 x 3 median: takes off specks and thin rims, keeps corners."""
    padded = np.pad(image, 1, mode="edge")
    height, width = image.shape
    stack = np.stack([padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)])
    middle: Floats = np.partition(stack, 4, axis=0)[4]
    return middle


def _grown(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    for axis in (0, 1):
        padded = np.pad(mask, [(by, by) if axis == other else (0, 0) for other in (0, 1)])
        length = mask.shape[axis]
        windows = [np.take(padded, range(shift, shift + length), axis=axis) for shift in range(2 * by + 1)]
        mask = np.logical_or.reduce(windows)
    return mask


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Label 4-connected areas 1, 2, …: runs row by row, joined where they touch the row above."""
    labels = np.zeros(mask.shape, np.int32)
    parent: list[int] = [0]

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    above: list[tuple[int, int, int]] = []
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], line, [False])).astype(np.int8)))
        here: list[tuple[int, int, int]] = []
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            touching = [root(label) for first, last, label in above if first < stop and start < last]
            label = min(touching) if touching else len(parent)
            if not touching:
                parent.append(label)
            for other in touching:
                parent[other] = label
            labels[row, start:stop] = label
            here.append((start, stop, label))
        above = here
    roots = sorted({root(label) for label in range(1, len(parent))})
    number = {label: index + 1 for index, label in enumerate(roots)}
    final = np.array([0] + [number[root(label)] for label in range(1, len(parent))], np.int32)
    return final[labels], len(roots)


def _normalised(mask: NDArray[np.bool_], shift: tuple[float, float] = (0.0, 0.0), scale: float = 1.0) -> Floats:
    """`mask` about its centre of mass, scaled by its area, on GRID x GRID samples (bilinear)."""
    rows, columns = np.nonzero(mask)
    length = np.sqrt(mask.sum()) * scale
    steps = (np.arange(GRID) + 0.5) / GRID * 2 - 1
    y = rows.mean() + (steps * REACH + shift[1]) * length
    x = columns.mean() + (steps * REACH + shift[0]) * length
    padded = np.pad(mask.astype(np.float32), 1)
    y, x = np.clip(y + 1, 0, padded.shape[0] - 1.001), np.clip(x + 1, 0, padded.shape[1] - 1.001)
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = (y - y0)[:, None], (x - x0)[None, :]
    top = padded[y0][:, x0] * (1 - fx) + padded[y0][:, x0 + 1] * fx
    bottom = padded[y0 + 1][:, x0] * (1 - fx) + padded[y0 + 1][:, x0 + 1] * fx
    sampled: Floats = (top * (1 - fy) + bottom * fy).astype(np.float32)
    return sampled


@functools.cache
def _templates() -> tuple[tuple[str, ...], Floats, Floats]:
    """Names, samples [n, GRID * GRID] of every shape a little moved and scaled, and each one's sum."""
    names, samples = [], []
    for shape in SHAPES:
        mask = _drawn_mask(shape, 90.0)
        for scale in (0.95, 1.0, 1.05):
            for dx in (-0.03, 0.0, 0.03):
                for dy in (-0.03, 0.0, 0.03):
                    names.append(shape)
                    samples.append(_normalised(mask, (dx, dy), scale).ravel())
    stacked = np.stack(samples)
    return tuple(names), stacked, stacked.sum(1)


def _drawn_mask(shape: str, radius: float) -> NDArray[np.bool_]:
    import torch

    from training.render import coverage

    steps = torch.arange(int(2.4 * radius)) - 1.2 * radius + 0.5
    drawn = coverage(shape, steps[None, :], steps[:, None], torch.tensor(radius))
    mask: NDArray[np.bool_] = (drawn > 0.5).numpy()
    return mask


@functools.cache
def _areas() -> dict[str, float]:
    """Each shape's area in squares of its radius."""
    return {shape: float(_drawn_mask(shape, 90.0).sum()) / 90.0**2 for shape in SHAPES}


@functools.cache
def _drawn_backgrounds(width: int, height: int) -> list[Floats]:
    import torch

    from training.render import backgrounds

    drawn = backgrounds(BACKGROUNDS, torch.full((len(BACKGROUNDS), 2), 0.5), height, width, torch.zeros(8, 2))
    return [picture.permute(1, 2, 0).numpy() for picture in drawn]


def _shape(mask: NDArray[np.bool_]) -> tuple[str, float]:
    names, templates, sums = _templates()
    sample = _normalised(mask).ravel()
    # Soft intersection over union; the product of two soft masks is close to their minimum.
    shared = templates @ sample
    overlaps = shared / (sums + sample.sum() - shared)
    best = int(np.argmax(overlaps))
    overlap = float(overlaps[best])
    return (names[best] if overlap >= CLEAR_SHAPE else "unclear"), overlap


@functools.cache
def _hues() -> tuple[tuple[str, ...], NDArray[np.float64]]:
    hues = [colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))[0] for rgb in COLOURS.values()]
    return tuple(COLOURS), np.array(hues)


def _paint(pixels: Floats, mask: NDArray[np.bool_]) -> tuple[str, str]:
    """Colour and texture of the pixels under `mask`."""
    inside = pixels[mask]
    strongest, weakest = inside.max(1), inside.min(1)
    chroma = np.maximum(strongest - weakest, 1e-3)
    red, green, blue = inside.T
    hue = np.where(
        strongest == red,
        ((green - blue) / chroma) % 6,
        np.where(strongest == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    names, hues = _hues()
    away = np.abs(hue[:, None] / 6 - hues[None, :])
    votes = np.bincount(np.minimum(away, 1 - away).argmin(1)[chroma > CHROMA], minlength=len(names))
    if votes.sum() == 0:
        return "unclear", "unclear"
    best = int(votes.argmax())
    if votes[best] < ONE_COLOUR * votes.sum():
        return "unclear", "unclear"
    return names[best], _texture(pixels, mask, max(COLOURS[names[best]]))


def _texture(pixels: Floats, mask: NDArray[np.bool_], bright: float) -> str:
    """Solid, striped or dotted, by how much is dark and whether it repeats along the stripes' direction."""
    inner = mask & ~_grown(~np.pad(mask, 2), 2)[2:-2, 2:-2]
    if inner.sum() < 30:
        inner = mask
    dark = (pixels.max(2) < bright * 0.775) & inner
    share = dark.sum() / inner.sum()
    if share < 0.11:
        return "solid"
    # Stripes run down to the left: moving along them changes nothing. Dots, half a pitch away, are background.
    step = 8
    if min(mask.shape) <= 2 * step:
        return "striped" if share > 0.4 else "dotted"
    both = inner[:-step, step:] & inner[step:, :-step]
    if both.sum() < 20:
        return "striped" if share > 0.4 else "dotted"
    same = (dark[:-step, step:] == dark[step:, :-step])[both].mean()
    return "striped" if same > 0.75 else "dotted"


def _size(shape: str, area: float, length: float) -> str:
    radius = np.sqrt(area / _areas().get(shape, 2.2)) / length
    return min(SIZES, key=lambda size: abs(np.log(radius / SIZES[size])))
