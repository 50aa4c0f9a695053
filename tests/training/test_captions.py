"""What `describe` says, `read` understands; and `read` understands what people type."""

import random
from dataclasses import replace

import pytest

from training import world
from training.captions import describe, read
from training.world import Scene, Thing


@pytest.mark.parametrize(("width", "height"), [(256, 256), (320, 192)])
def test_a_complete_caption_says_the_whole_scene(width: int, height: int) -> None:
    for seed in range(1000):
        rng = random.Random(f"caption {seed}")
        scene = world.sample(rng, width, height)
        caption = describe(scene, rng, complete=True)
        assert read(caption) == scene.described(), caption


def test_an_incomplete_caption_says_nothing_wrong() -> None:
    unsaid_places = unsaid_backgrounds = 0
    for seed in range(1000):
        rng = random.Random(f"caption {seed}")
        scene = world.sample(rng)
        caption = describe(scene, rng)
        found = read(caption)
        assert found.background in (None, scene.background), caption
        assert len(found.things) == len(scene.things), caption
        for thing, said in zip(scene.things, found.things, strict=True):
            assert said in (thing, replace(thing, place=None)), caption
        unsaid_places += found.things[0].place is None
        unsaid_backgrounds += found.background is None
    assert unsaid_places > 50
    assert unsaid_backgrounds > 80


def test_captions_vary() -> None:
    scene = world.sample(random.Random(3))
    said = {describe(scene, random.Random(seed)) for seed in range(200)}
    assert len(said) > 100
    lengths = [len(caption.split()) for caption in said]
    assert min(lengths) < 12 < 25 < max(lengths)


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red circle", Scene((Thing("circle", "red"),), None)),
        (
            "Two tiny striped blue stars at the bottom, black background",
            Scene((Thing("star", "blue", "small", "striped", 2, "bottom"),), "black"),
        ),
        (
            "In the upper left there is an orange heart and on the right a big violet hoop with dots, in a meadow",
            Scene(
                (
                    Thing("heart", "orange", place="top left"),
                    Thing("ring", "purple", "large", "dotted", place="right"),
                ),
                "meadow",
            ),
        ),
        ("an astronaut riding a horse", Scene((), None)),
    ],
)
def test_read(prompt: str, scene: Scene) -> None:
    assert read(prompt) == scene
