"""Image to image against ``StableDiffusionXLImg2ImgPipeline`` on the same weights, on the CPU in fp32.

Bound: latents differ by at most 1e-3 of their standard deviation (max abs).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import runtimes
from buildtool import models
from runtimes import image_to_image, schedulers
from runtimes.pipeline import Pipeline
from tests.runtimes.test_parity import difference, seeds

pytestmark = pytest.mark.slow

BOUND = 1e-3
CALL = {"prompt": "a large red circle", "num_inference_steps": 10, "output_type": "latent"}


def from_diffusers(folder: Path = models.TINY) -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        folder, dtype=torch.float32, add_watermarker=False, requires_aesthetics_score=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs(micro_model: Path) -> Any:
    """The micro model, whose random weights amplify no rounding: the trained ones do, eager's too."""
    return from_diffusers(micro_model)


@pytest.fixture(scope="module")
def ours(micro_encoder_artifact: Path) -> Pipeline:
    return runtimes.load(micro_encoder_artifact)


@pytest.fixture(scope="module")
def trained(tiny_encoder_artifact: Path) -> Pipeline:
    return runtimes.load(tiny_encoder_artifact)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    # With texture: on flat colours eager's moments are 8e-5 off fp64's (the engine's 1e-6), which runs amplify.
    grain = torch.randint(0, 256, (256, 256, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = Image.fromarray(grain.numpy())
    ImageDraw.Draw(made).ellipse((30, 60, 150, 180), fill="red")
    return made


@pytest.fixture(scope="module")
def small(picture: Image.Image) -> Image.Image:
    """What the micro model takes."""
    return picture.crop((20, 50, 84, 114))


def compare(ours: Pipeline, theirs: Any, numbers: tuple[int, ...] = (1,), **arguments: Any) -> None:
    reference = theirs(generator=seeds(*numbers), **{**CALL, **arguments}).images
    assert difference(ours(generator=seeds(*numbers), **{**CALL, **arguments}).images, reference) <= BOUND


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_strength(ours: Pipeline, theirs: Any, small: Image.Image, strength: float) -> None:
    compare(ours, theirs, image=small, strength=strength)


def test_a_pictures_latents_with_the_trained_weights(trained: Pipeline, picture: Image.Image) -> None:
    theirs = from_diffusers()
    reference = theirs.prepare_latents(
        theirs.image_processor.preprocess(picture), None, 2, 1, torch.float32, "cpu", seeds(1, 2), add_noise=False
    )
    mine = image_to_image.latents(trained.artifacts[0], picture, 2, seeds(1, 2), torch.float32)
    assert difference(mine, reference) <= BOUND


def test_strength_decides_how_far_from_the_picture(trained: Pipeline, picture: Image.Image) -> None:
    start = image_to_image.latents(trained.artifacts[0], picture, 1, seeds(1), torch.float32)
    near, far = (trained(generator=seeds(1), image=picture, strength=s, **CALL).images for s in (0.2, 0.9))
    assert (near - start).std() < (far - start).std()


@pytest.mark.parametrize("name", ["euler-a", "dpmpp-2m-karras", "ddim"])
def test_other_schedulers(ours: Pipeline, theirs: Any, small: Image.Image, name: str) -> None:
    import diffusers

    row, usual = schedulers.SCHEDULERS[name], theirs.scheduler
    theirs.scheduler = getattr(diffusers, row.diffusers).from_config(usual.config, **row.settings)
    try:
        reference = theirs(generator=seeds(1), image=small, strength=0.6, **CALL).images
    finally:
        theirs.scheduler = usual
    mine = ours(generator=seeds(1), image=small, strength=0.6, scheduler=name, **CALL).images
    assert difference(mine, reference) <= BOUND


def test_one_picture_for_several_images(ours: Pipeline, theirs: Any, small: Image.Image) -> None:
    compare(ours, theirs, (1, 2), image=small, strength=0.5, num_images_per_prompt=2)


def test_one_generator_for_several_images(ours: Pipeline, theirs: Any, small: Image.Image) -> None:
    call = {**CALL, "image": small, "strength": 0.5, "num_images_per_prompt": 2}
    reference = theirs(generator=seeds(3)[0], **call).images
    assert difference(ours(generator=seeds(3)[0], **call).images, reference) <= BOUND


def test_a_tensor_and_several_pictures(ours: Pipeline, theirs: Any, small: Image.Image) -> None:
    other = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tensor = (image_to_image.pixels([small, other], 64, 64) + 1) / 2
    compare(ours, theirs, (1, 2), image=tensor, strength=0.5, prompt=["a red circle", "a blue star"])


def test_denoising_start_goes_on_from_latents(ours: Pipeline, theirs: Any) -> None:
    latents = ours(generator=seeds(1), denoising_end=0.6, **CALL).images
    compare(ours, theirs, image=latents, denoising_start=0.6)
    # Two halves of one run are the run.
    whole = ours(generator=seeds(1), **CALL).images
    second = ours(generator=seeds(1), image=latents, denoising_start=0.6, **CALL).images
    assert difference(second, whole) <= BOUND


def test_denoising_start_of_a_picture(ours: Pipeline, theirs: Any, small: Image.Image) -> None:
    compare(ours, theirs, image=small, denoising_start=0.5, denoising_end=0.9)


def test_an_encoder_changes_nothing_in_text_to_image(trained: Pipeline, tiny_artifact: Path) -> None:
    plain = runtimes.load(tiny_artifact)(generator=seeds(1), **CALL).images
    assert torch.equal(trained(generator=seeds(1), **CALL).images, plain)


def test_pil_pictures_are_resized() -> None:
    assert image_to_image.pixels(Image.new("L", (50, 30), 255), 256, 192).shape == (1, 3, 192, 256)
    for wrong in (torch.zeros(1, 3, 8, 8), "a.png", []):
        with pytest.raises(ValueError):
            image_to_image.pixels(wrong, 256, 192)
