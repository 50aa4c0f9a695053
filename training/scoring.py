"""Held-out prompts, pictures of them, and the judge's word on those."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from training import world
from training.captions import describe, read
from training.judge import Verdict, judge

Draw = Callable[[list[str], list[int]], Sequence[NDArray[np.uint8]]]  # prompts and seeds to pictures


def held_out_prompts(count: int, seed: int = 0, width: int = 256, height: int = 256) -> list[str]:
    """Prompts that name every place and the background, each with a (colour, shape, place) never trained on."""
    scenes = world.held_out_scenes(seed, width, height)
    return [
        describe(next(scenes), random.Random(f"held out prompt {seed} {number}"), complete=True)
        for number in range(count)
    ]


def score(draw: Draw, prompts: Sequence[str], *, seed: int = 0, batch: int = 16) -> list[Verdict]:
    """Draw each prompt once, picture `i` from seed `seed + i`, and judge it against what the prompt says."""
    verdicts: list[Verdict] = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        pictures = draw(some, [seed + start + number for number in range(len(some))])
        verdicts += [judge(picture, read(prompt)) for picture, prompt in zip(pictures, some, strict=True)]
    return verdicts


def as_uint8(images: Sequence[object]) -> list[NDArray[np.uint8]]:
    """PIL images to uint8 [height, width, 3]."""
    return [np.asarray(image) for image in images]


def diffusers_draw(
    pipeline: object, *, steps: int, guidance: float, width: int = 256, height: int = 256, negative: str | None = None
) -> Draw:
    """Draw with a `StableDiffusionXLPipeline`, each picture's noise from its own generator on the CPU."""

    def draw(prompts: list[str], seeds: list[int]) -> list[NDArray[np.uint8]]:
        found = pipeline(  # type: ignore[operator]
            prompt=prompts,
            negative_prompt=None if negative is None else [negative] * len(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        return as_uint8(found.images)

    return draw
