"""Drawing is deterministic, and the shapes are where and what they should be."""

import random

import pytest
import torch

from training import world
from training.render import render, to_uint8
from training.world import Scene, Thing


def test_the_same_scenes_are_the_same_pictures_alone_and_in_a_batch() -> None:
    scenes = [world.sample(random.Random(seed)) for seed in range(6)]
    together = render(scenes)
    assert torch.equal(together, render(scenes))
    for number, scene in enumerate(scenes):
        assert torch.equal(render([scene])[0], together[number])
    assert together.shape == (6, 3, 256, 256)
    assert together.min() >= -1
    assert together.max() <= 1


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shape_fills_its_box(shape: str) -> None:
    scene = Scene((Thing(shape, "red", "large", place="centre"),), "white")
    picture = to_uint8(render([scene]))[0].float()
    rows, columns = (picture[..., 1] < 140).nonzero().T
    radius = scene.spots(256, 256)[0].radius
    for low, high in ((rows.min(), rows.max()), (columns.min(), columns.max())):
        assert (high - low + 1).item() / 2 == pytest.approx(radius, rel=0.17)
        assert (high + low + 1).item() / 2 == pytest.approx(128, abs=3)


def test_a_crop_is_the_same_canvas_moved() -> None:
    scene = Scene((Thing("ring", "blue", place="centre"),), "grey")
    whole = render([scene])
    moved = render([scene], offsets=torch.tensor([[20.0, 8.0]]))
    assert torch.equal(moved[..., :-8, :-20], whole[..., 8:, 20:])


def test_textures_differ() -> None:
    pictures = [
        render([Scene((Thing("square", "green", "large", texture, place="centre"),), "white")])
        for texture in world.TEXTURES
    ]
    for number, one in enumerate(pictures):
        for other in pictures[:number]:
            assert (one - other).abs().mean() > 0.005
