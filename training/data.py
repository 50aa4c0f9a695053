"""Training examples by number: example `n` of a seed is the same scene on every machine and in every process.

Pictures are drawn and encoded once, into a pool of latents that stays on the device; captions are said anew each time
an example comes up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from training import world
from training.captions import describe
from training.render import render

# (width, height): three examples in twenty each of the first two, the rest square
BUCKETS: tuple[tuple[int, int], ...] = ((320, 192), (192, 320), (256, 256))
SQUARE = 2
_CYCLE = (0, 1, 2, 2, 2, 2, 2, 0, 1, 2, 2, 2, 2, 2, 0, 1, 2, 2, 2, 2)  # buckets of twenty examples, or steps, in turn


@dataclass(frozen=True)
class View:
    """SDXL's micro-conditioning of one example: the size a picture was enlarged from, and its crop's left top.

    `score` is the refiner's aesthetic score, `harm` how much the picture is blurred, 0 to 1.
    """

    original: tuple[int, int]  # height, width
    crop: tuple[int, int]  # top, left
    score: float
    harm: float = 0.0


def bucket_of(number: int) -> int:
    return _CYCLE[number % len(_CYCLE)]


def example(seed: int, number: int) -> tuple[world.Scene, View]:
    """Example `number`: a training scene and how it is seen."""
    rng = random.Random(f"{seed} {number}")
    width, height = BUCKETS[bucket_of(number)]
    scene = world.sample(rng, width, height)
    original, crop, score = (height, width), (0, 0), rng.uniform(5.5, 7.0)
    kind = rng.random()
    if kind < 0.06:
        share = rng.choice((0.3, 0.4, 0.5, 0.75))
        original = (int(height * share), int(width * share))
    elif kind < 0.14:
        crop = (rng.randrange(0, 65), 0) if rng.random() < 0.5 else (0, rng.randrange(0, 65))
    return scene, View(original, crop, score)


def spoilt(view: View, seed: int, number: int) -> View:
    """For the refiner: half of the examples are blurred and score lower for it; one score in four is any.

    Guidance drives away from a low score, times five: whatever else a low score went with, it would exaggerate. So
    nothing but sharpness does (where low scores went with paler pictures too, guidance moved the background twice as
    far as without the score), and scores err, so that the picture itself says more than its score.
    """
    rng = random.Random(f"spoilt {seed} {number}")
    harm = rng.uniform(0.15, 1.0) if rng.random() < 0.5 else 0.0
    score = 5 - 3.5 * harm if harm else view.score
    return replace(view, score=rng.uniform(1.5, 7.0) if rng.random() < 0.25 else score, harm=harm)


def draw(examples: Sequence[tuple[world.Scene, View]], bucket: int, device: torch.device | str) -> Tensor:
    """Pictures of examples of one bucket: float [n, 3, h, w] in -1..1."""
    width, height = BUCKETS[bucket]
    offsets = torch.tensor([[float(view.crop[1]), float(view.crop[0])] for _, view in examples])
    pictures = render([scene for scene, _ in examples], width, height, device=device, offsets=offsets)
    for original in {view.original for _, view in examples}:
        if original == (height, width):
            continue
        index = torch.tensor([n for n, (_, view) in enumerate(examples) if view.original == original], device=device)
        small = functional.interpolate(pictures[index], size=original, mode="area")
        pictures[index] = functional.interpolate(small, size=(height, width), mode="bilinear")
    harmed = torch.tensor([n for n, (_, view) in enumerate(examples) if view.harm], dtype=torch.int64, device=device)
    if len(harmed):
        harm = torch.tensor([view.harm for _, view in examples], device=device)[harmed].view(-1, 1, 1, 1)
        clear = pictures[harmed]
        blurred = functional.interpolate(functional.avg_pool2d(clear, 4), size=(height, width), mode="bilinear")
        pictures[harmed] = clear.lerp(blurred, harm)
    return pictures.clamp(-1, 1)


class Scenes(Dataset[tuple[int, list[tuple[world.Scene, View]]]]):
    """Examples 0 to `count` in chunks of one bucket, for drawing: (bucket, examples)."""

    def __init__(self, seed: int, count: int, chunk: int, spoil: bool = False) -> None:
        self.seed, self.spoil = seed, spoil
        self.chunks: list[tuple[int, list[int]]] = []
        for bucket, numbers in enumerate(numbers_of(count)):
            self.chunks += [(bucket, numbers[at : at + chunk]) for at in range(0, len(numbers), chunk)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[int, list[tuple[world.Scene, View]]]:
        bucket, numbers = self.chunks[index]
        found = []
        for number in numbers:
            scene, view = example(self.seed, number)
            found.append((scene, spoilt(view, self.seed, number) if self.spoil else view))
        return bucket, found


def numbers_of(count: int) -> list[list[int]]:
    """The numbers below `count`, bucket by bucket."""
    return [[number for number in range(count) if bucket_of(number) == bucket] for bucket in range(len(BUCKETS))]


@dataclass(frozen=True)
class Words:
    """What a step needs besides latents. `numbers` int64 [b]; ids int64 [b, 77]; `sizes` float32 [b, 7]:
    original height and width, crop top and left, target height and width, aesthetic score."""

    bucket: int
    numbers: Tensor
    ids: Tensor
    ids_2: Tensor
    sizes: Tensor
    targets: Tensor  # int64 [b, 10, 5], of what the caption was made of, see `targets_of`


class Captions(Dataset[Words]):
    """Step `n`'s examples and captions, from the seed and the step alone, so that a resumed run goes on as if whole.

    Of the captions a share `empty` is the empty text; of the rest a share `wrong` says what the picture doesn't show
    (`world.mistaken`).
    """

    def __init__(
        self,
        tokenizer: Path,
        seed: int,
        pool: int,
        batch: int,
        steps: range,
        *,
        empty: float = 0.0,
        wrong: float = 0.0,
        complete: bool = False,
        spoil: bool = False,
    ) -> None:
        self.tokenizer_folder, self.seed, self.pool, self.batch, self.steps = tokenizer, seed, pool, batch, steps
        self.empty, self.wrong, self.complete, self.spoil = empty, wrong, complete, spoil
        self._tokenizer: Any = None

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Words:
        step = self.steps[index]
        rng = random.Random(f"step {self.seed} {step}")
        bucket = SQUARE if self.complete else bucket_of(step)
        width, height = BUCKETS[bucket]
        places = [place for place, found in enumerate(_CYCLE) if found == bucket]
        numbers, captions, sizes, targets = [], [], [], []
        for _ in range(self.batch):
            number = rng.randrange(self.pool // len(_CYCLE)) * len(_CYCLE) + rng.choice(places)
            scene, view = example(self.seed, number)
            if self.spoil:
                view = spoilt(view, self.seed, number)
            numbers.append(number)
            caption = ""
            if rng.random() >= self.empty:
                if rng.random() < self.wrong:
                    scene = world.mistaken(scene, rng, width, height)
                caption = describe(scene, rng, complete=self.complete)
            captions.append(caption)
            sizes.append([*view.original, *view.crop, height, width, view.score])
            targets.append(targets_of(scene))
        ids, ids_2 = self.encode(captions)
        return Words(bucket, torch.tensor(numbers), ids, ids_2, torch.tensor(sizes), torch.tensor(targets))

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_folder)
        return encode(self._tokenizer, captions)


def load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def encode(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids for the first and the second text encoder, int64 [n, 77]: the second pads with 0 ("!")."""
    found = tokenizer(list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids = found.input_ids
    after_end = (ids == tokenizer.eos_token_id).cumsum(1) > 1
    return ids, ids.masked_fill(after_end, 0)


def targets_of(scene: world.Scene) -> list[list[int]]:
    """[10, 5]: for each place shape, colour, size, texture and count (0: nothing there), then the background."""
    table = [[0, 0, 0, 0, 0] for _ in world.PLACES]
    for thing in scene.things:
        table[list(world.PLACES).index(str(thing.place))] = [
            world.SHAPES.index(thing.shape) + 1,
            list(world.COLOURS).index(thing.colour) + 1,
            list(world.SIZES).index(thing.size) + 1,
            world.TEXTURES.index(thing.texture) + 1,
            thing.count,
        ]
    return [*table, [world.BACKGROUNDS.index(str(scene.background)), 0, 0, 0, 0]]


def loader(dataset: Dataset[Any], workers: int) -> Iterator[Any]:
    """Items in order, prepared by `workers` processes (0: here)."""
    extra: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    yield from DataLoader(dataset, batch_size=None, num_workers=workers, **extra)
