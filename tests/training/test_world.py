"""Scenes are functions of their seed, fit their canvas, and keep the held-out triples out of training."""

import random
from dataclasses import replace

import pytest

from training import data, world
from training.scoring import held_out_prompts

SIZES = [(256, 256), (320, 192), (192, 320)]


def test_a_seed_is_a_scene() -> None:
    first = [world.sample(random.Random(seed)) for seed in range(20)]
    assert first == [world.sample(random.Random(seed)) for seed in range(20)]
    assert len(set(first)) == 20


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_everything_is_on_the_canvas_and_apart(width: int, height: int) -> None:
    for seed in range(100):
        scene = world.sample(random.Random(seed), width, height)
        spots = scene.spots(width, height)
        assert len(spots) == sum(thing.count for thing in scene.things)
        for number, spot in enumerate(spots):
            assert spot.radius <= spot.x <= width - spot.radius
            assert spot.radius <= spot.y <= height - spot.radius
            for other in spots[:number]:
                assert max(abs(spot.x - other.x), abs(spot.y - other.y)) > spot.radius + other.radius


def test_things_that_overlap_do_not_fit() -> None:
    thing = world.Thing("circle", "red", "medium", place="centre")
    apart = world.Scene((thing, replace(thing, colour="blue", size="small", place="top left")), "white")
    assert world.fits(apart, 256, 256)
    assert not world.fits(replace(apart, things=(thing, replace(thing, colour="blue"))), 256, 256)


def test_training_never_shows_a_held_out_triple() -> None:
    for number in range(600):
        scene, _ = data.example(2, number)
        assert not any(world.held_out(thing) for thing in scene.things)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_mistaken_scene_is_another_one_before_the_same_background(width: int, height: int) -> None:
    details = 0
    for seed in range(400):
        rng = random.Random(f"mistaken {seed}")
        scene = world.sample(rng, width, height)
        found = world.mistaken(scene, rng, width, height)
        assert found.background == scene.background
        assert found.things != scene.things
        assert not world.is_held_out(found)
        assert world.fits(found, width, height)
        kinds = [(thing.shape, thing.colour) for thing in found.things]
        assert len(set(kinds)) == len(kinds)
        pairs = list(zip(found.things, scene.things, strict=False))
        apart = [pair for pair in pairs if pair[0] != pair[1]]
        if len(found.things) == len(scene.things) and len(apart) == 1:
            now, before = apart[0]
            names = [name for name in ("shape", "colour", "place") if getattr(now, name) != getattr(before, name)]
            details += len(names) == 1 and now == replace(before, **{names[0]: getattr(now, names[0])})
    assert 160 < details < 240


def test_every_held_out_prompt_has_one() -> None:
    from training.captions import read

    prompts = held_out_prompts(100)
    assert len(set(prompts)) == 100
    for prompt in prompts:
        scene = read(prompt)
        assert any(world.held_out(thing) for thing in scene.things), prompt
        assert scene.background is not None
        assert all(thing.place for thing in scene.things)
    assert prompts != held_out_prompts(100, seed=1)


def test_the_split_is_about_a_twelfth_and_covers_every_shape_and_colour() -> None:
    triples = [
        world.Thing(shape, colour, place=place)
        for shape in world.SHAPES
        for colour in world.COLOURS
        for place in world.PLACES
    ]
    held = [thing for thing in triples if world.held_out(thing)]
    assert 0.06 < len(held) / len(triples) < 0.11
    trained = [thing for thing in triples if not world.held_out(thing)]
    for shape in world.SHAPES:
        assert {thing.colour for thing in trained if thing.shape == shape} == set(world.COLOURS)
        assert {thing.place for thing in trained if thing.shape == shape} == set(world.PLACES)
