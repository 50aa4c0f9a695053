"""The judge's own error on drawn scenes, clean and spoilt, is under 2%; and it doesn't wave wrong pictures through."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from training import world
from training.judge import judge, look, place_of, shares
from training.render import render, to_uint8
from training.world import Scene, Thing


def spoil(pictures: torch.Tensor, seed: int) -> torch.Tensor:
    """Blur, grain and slow shifts of colour, of the kind that a small VAE leaves."""
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = pictures.shape
    blurred = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    grain = 0.04 * torch.randn(pictures.shape, generator=generator)
    patches = torch.randn(count, 3, height // 8, width // 8, generator=generator)
    return blurred + grain + 0.05 * functional.interpolate(patches, size=(height, width), mode="bilinear")


@pytest.mark.parametrize("spoilt", [False, True], ids=["clean", "spoilt"])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (320, 192)])
def test_error_under_two_percent(width: int, height: int, spoilt: bool) -> None:
    verdicts = []
    for start in range(0, 200, 25):
        scenes = [world.sample(random.Random(f"judge {width} {start + n}"), width, height) for n in range(25)]
        pictures = render(scenes, width, height)
        if spoilt:
            pictures = spoil(pictures, start)
        verdicts += [
            judge(picture, scene.described()) for picture, scene in zip(to_uint8(pictures).numpy(), scenes, strict=True)
        ]
    table = shares(verdicts)
    assert all(share > 0.98 for share in table.values()), table


def test_a_wrong_attribute_is_seen() -> None:
    """Judge each picture against a prompt that differs in one attribute: it must say no to that attribute."""
    passed = 0
    for seed in range(120):
        rng = random.Random(f"wrong {seed}")
        scene = world.sample(rng)
        picture = to_uint8(render([scene])).numpy()[0]
        thing = scene.things[0]
        others = scene.described().things[1:]
        attribute = ("shape", "colour", "place")[seed % 3]
        choices = {"shape": world.SHAPES, "colour": tuple(world.COLOURS), "place": tuple(world.PLACES)}[attribute]
        wrong = rng.choice([choice for choice in choices if choice != getattr(thing, attribute)])
        verdict = judge(picture, Scene((replace(thing, **{attribute: wrong}), *others), scene.background))
        # Swapping a thing's kind for one that is elsewhere in the scene still makes a wrong count of it.
        passed += verdict.right
    assert passed == 0


def test_what_is_missing_or_too_much_is_wrong() -> None:
    circle, star = Thing("circle", "red", place="left"), Thing("star", "blue", place="right")
    both = Scene((circle, star), "white")
    picture = to_uint8(render([both])).numpy()[0]
    assert judge(picture, both).right
    assert not judge(picture, Scene((circle,), "white")).right
    assert not judge(picture, Scene((circle, star, Thing("ring", "green", place="top")), "white")).right
    assert not judge(picture, Scene((replace(circle, place="right"), replace(star, place="left")), "white")).right
    assert judge(picture, Scene((replace(circle, place=None), star), None)).right


def test_an_unclear_blob_has_no_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 16, 16, generator=generator)
    picture = to_uint8(functional.interpolate(noise, size=(256, 256), mode="bicubic")).numpy()[0]
    asked = Scene((Thing("circle", "red", place="centre"),), "white")
    assert not judge(picture, asked).right


def test_look_at_an_empty_picture() -> None:
    assert look(to_uint8(render([Scene((), "night")])).numpy()[0]) == []


def test_places() -> None:
    for place, (x, y) in world.PLACES.items():
        assert place_of(x + 0.1, y - 0.1) == place
