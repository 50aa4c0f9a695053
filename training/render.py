"""Draw scenes with signed distance functions, in batches, on any device.

All distances are in pixels, negative inside. Shapes stand upright with their bounding box about the centre; a
shape's `radius` is half of a circle's diameter, the others are drawn to look as large as that circle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.world import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene

DARK = 0.55  # a texture's second tone: the colour times this
STRIPE = 18.0  # pixels from stripe to stripe
DOT_PITCH, DOT_RADIUS = 17.0, 5.2

BACKGROUND_COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((250, 250, 250), (250, 250, 250)),
    "black": ((18, 18, 20), (18, 18, 20)),
    "grey": ((128, 128, 132), (128, 128, 132)),
    "beige": ((232, 222, 204), (232, 222, 204)),
    "gradient": ((240, 240, 244), (74, 74, 82)),
    "checkerboard": ((228, 228, 231), (186, 186, 191)),
    "meadow": ((206, 218, 232), (158, 168, 140)),
    "night": ((22, 26, 46), (235, 235, 240)),
}
SQUARE = 32.0  # a checkerboard's square, in pixels
HORIZON = 0.55  # where the meadow's sky ends, as a share of the height
NIGHT_STARS = 18


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.96 * r


def _box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    across, down = x.abs() - half_width, y.abs() - half_height
    outside = torch.hypot(across.clamp(min=0), down.clamp(min=0))
    return outside + torch.maximum(across, down).clamp(max=0)


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return _box(x, y, 0.84 * r, 0.84 * r)


def _diamond(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x.abs() + y.abs() - 1.08 * r) / math.sqrt(2)


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    # Half-planes of an equilateral triangle that points up; centred on its bounding box.
    side = 1.05 * r
    top = y + 0.9 * r
    return torch.maximum((x.abs() * math.sqrt(3) - top) / 2, top - side * math.sqrt(3))


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.74 * r).abs() - 0.22 * r


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.98 * r, 0.34 * r), _box(x, y, 0.34 * r, 0.98 * r))


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    # Fold the plane into one tenth of a five-pointed star, then the distance to one edge.
    y = y - 0.06 * r
    tenth = math.pi / 5
    angle = torch.atan2(x, -y)
    folded = torch.remainder(angle + tenth, 2 * tenth) - tenth
    length = torch.hypot(x, y)
    px, py = length * folded.sin().abs(), length * folded.cos()
    outer, inner = 1.1 * r, 0.47 * r
    # From the tip (0, outer) to the notch at angle `tenth`.
    ex, ey = inner * math.sin(tenth), inner * math.cos(tenth) - outer
    cross = px * ey - (py - outer) * ex
    return -cross / torch.hypot(ex, ey)


def _heart(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    # Inigo Quilez's heart (https://iquilezles.org/articles/distfunctions2d), point down, of height about 1.1.
    scale = 1.72 * r
    x, y = x.abs() / scale, 0.56 - y / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    tip = torch.minimum(
        x.square() + (y - 1).square(),
        (x - 0.5 * (x + y).clamp(min=0)).square() + (y - 0.5 * (x + y).clamp(min=0)).square(),
    ).sqrt() * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, tip) * scale


DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
}


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel the shape covers, 0..1, for pixel centres at `x`, `y` from the shape's centre."""
    return (0.5 - DISTANCES[shape](x, y, radius)).clamp(0, 1)


def backgrounds(names: Sequence[str], phases: Tensor, height: int, width: int, offset: Tensor) -> Tensor:
    """Float [n, 3, height, width] in 0..255. `phases` [n, 2] in 0..1 moves the night's stars, `offset` [n, 2] all."""
    device = phases.device
    ys = torch.arange(height, device=device).view(1, -1, 1) + 0.5 + offset[:, 1].view(-1, 1, 1)
    xs = torch.arange(width, device=device).view(1, 1, -1) + 0.5 + offset[:, 0].view(-1, 1, 1)
    pairs = torch.tensor([BACKGROUND_COLOURS[name] for name in names], device=device, dtype=torch.float32)
    kind = torch.tensor([BACKGROUNDS.index(name) for name in names], device=device)
    share = torch.zeros(len(names), height, width, device=device)
    row = (ys / height).clamp(0, 1).expand_as(share)
    chosen = (kind == BACKGROUNDS.index("gradient")).nonzero()[:, 0]
    share[chosen] = row[chosen]
    chosen = (kind == BACKGROUNDS.index("checkerboard")).nonzero()[:, 0]
    share[chosen] = ((ys // SQUARE + xs // SQUARE) % 2)[chosen].float()
    chosen = (kind == BACKGROUNDS.index("meadow")).nonzero()[:, 0]
    share[chosen] = ((ys - HORIZON * height).clamp(-0.5, 0.5) + 0.5).expand_as(share)[chosen]
    chosen = (kind == BACKGROUNDS.index("night")).nonzero()[:, 0]
    if len(chosen):
        stars = torch.zeros(len(chosen), height, width, device=device)
        for number in range(NIGHT_STARS):
            # The R2 sequence spreads any number of points evenly (Roberts, 2018).
            x = ((phases[chosen, 0] + number * 0.7548776662) % 1).view(-1, 1, 1) * width
            y = ((phases[chosen, 1] + number * 0.5698402910) % 1).view(-1, 1, 1) * height
            distance = torch.hypot(xs[chosen] - x, ys[chosen] - y)
            stars = torch.maximum(stars, (1.9 - distance).clamp(0, 1))
        share[chosen] = stars
    first, second = pairs[:, 0, :, None, None], pairs[:, 1, :, None, None]
    return first + (second - first) * share[:, None]


def render(
    scenes: Sequence[Scene],
    width: int = 256,
    height: int = 256,
    *,
    device: torch.device | str = "cpu",
    offsets: Tensor | None = None,
) -> Tensor:
    """Float [n, 3, height, width] in -1..1, every scene with its background named.

    `offsets` [n, 2]: pixels that the view is moved right and down over a canvas of the same size (a crop's left top).
    """
    count = len(scenes)
    offset = torch.zeros(count, 2) if offsets is None else offsets.cpu()
    phases = torch.tensor([scene.jitter[0][2:] if scene.jitter else (0.37, 0.61) for scene in scenes])
    names = [str(scene.background) for scene in scenes]
    picture = backgrounds(names, phases.to(device), height, width, offset.to(device))
    layers = [scene.spots(width, height) for scene in scenes]
    # Layer by layer, shape by shape: a picture has at most one spot in a layer, so nothing is written twice.
    for layer in range(max((len(spots) for spots in layers), default=0)):
        for shape in SHAPES:
            chosen = [n for n, spots in enumerate(layers) if len(spots) > layer and spots[layer].shape == shape]
            if not chosen:
                continue
            spots = [layers[n][layer] for n in chosen]
            numbers = torch.tensor(
                [
                    [spot.x - offset[n, 0], spot.y - offset[n, 1], spot.radius, TEXTURES.index(spot.texture)]
                    for n, spot in zip(chosen, spots, strict=True)
                ]
            ).to(device)
            colours = torch.tensor([COLOURS[spot.colour] for spot in spots], dtype=torch.float32).to(device)
            x = (torch.arange(width, device=device) + 0.5).view(1, 1, -1) - numbers[:, 0].view(-1, 1, 1)
            y = (torch.arange(height, device=device) + 0.5).view(1, -1, 1) - numbers[:, 1].view(-1, 1, 1)
            covered = coverage(shape, x, y, numbers[:, 2].view(-1, 1, 1))[:, None]
            tone = 1 - (1 - DARK) * _texture(x, y, numbers[:, 3].view(-1, 1, 1))[:, None]
            index = torch.tensor(chosen, device=device)
            below = picture[index]
            picture[index] = below + (colours[:, :, None, None] * tone - below) * covered
    return picture / 127.5 - 1


def to_uint8(pictures: Tensor) -> Tensor:
    """[n, 3, h, w] in -1..1 to uint8 [n, h, w, 3] on the CPU."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _texture(x: Tensor, y: Tensor, kind: Tensor) -> Tensor:
    """How much of the dark tone a pixel has: stripes down to the left, dots on a square lattice, or none."""
    along = torch.remainder((x + y) / math.sqrt(2), STRIPE)
    stripes = (STRIPE / 4 - (along - STRIPE / 2).abs() + 0.5).clamp(0, 1)
    px = torch.remainder(x + DOT_PITCH / 2, DOT_PITCH) - DOT_PITCH / 2
    py = torch.remainder(y + DOT_PITCH / 2, DOT_PITCH) - DOT_PITCH / 2
    dots = (DOT_RADIUS - torch.hypot(px, py) + 0.5).clamp(0, 1)
    none = torch.zeros_like(stripes)
    return torch.where(kind == 1, stripes, torch.where(kind == 2, dots, none))
