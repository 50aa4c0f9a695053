"""The compiled pipeline against ``StableDiffusionXLPipeline`` on the same weights, on the CPU in fp32.

Bound: after 20 steps, latents differ by at most 1e-4 of their standard deviation (max abs).

What an argument means is compared on the micro model, whose steps take a twentieth of the trained one's; numbers that
the trained model's sizes and weights could spoil, and pictures, on ``tiny``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from buildtool import models
from runtimes import schedulers
from runtimes.euler import EulerDiscrete
from runtimes.pipeline import Pipeline
from tests.conftest import Builder

pytestmark = pytest.mark.slow

BOUND = 1e-4
STEPS = 20
LONG = "a very long prompt about " + "many small red circles and large blue squares, " * 14 + "the end"


@pytest.fixture(scope="module")
def diffusers_pipeline() -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(models.TINY, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(tiny_artifact: Path) -> Pipeline:
    return runtimes.load(tiny_artifact)


@pytest.fixture(scope="module")
def micro(micro_artifact: Path) -> Pipeline:
    return runtimes.load(micro_artifact)


@pytest.fixture(scope="module")
def micro_pipeline(micro_model: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(micro_model, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def micro_pairs(micro_wide_artifact: Path) -> Pipeline:
    """96x64, in batches of two."""
    return runtimes.load(micro_wide_artifact)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def difference(ours: Any, theirs: Any) -> float:
    """Max abs difference of latents in standard deviations of the reference."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.std())


def compare(
    ours: Pipeline, theirs: Any, numbers: tuple[int, ...] = (1,), bound: float = BOUND, **arguments: Any
) -> None:
    call = {"num_inference_steps": STEPS, "output_type": "latent", **arguments}
    reference = theirs(generator=seeds(*numbers), **call).images
    assert difference(ours(generator=seeds(*numbers), **call).images, reference) <= bound


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_trained_model(ours: Pipeline, diffusers_pipeline: Any, guidance_scale: float) -> None:
    compare(
        ours,
        diffusers_pipeline,
        prompt="a large red circle on the left",
        guidance_scale=guidance_scale,
        negative_prompt="green, striped",
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("negative_prompt", [None, "", "green, striped"])
def test_guidance_and_negative_prompt(
    micro: Pipeline, micro_pipeline: Any, guidance_scale: float, negative_prompt: str | None
) -> None:
    compare(
        micro,
        micro_pipeline,
        prompt="a large red circle on the left",
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
    )


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a red square"},
        {"prompt_2": "two blue squares"},
        {"negative_prompt": None},
        {"negative_prompt": ""},
        {"negative_prompt_2": "yellow"},
        {"guidance_scale": 5.1},
        {"guidance_rescale": 0.7},
        {"guidance_until": 0.5},
        {"original_size": (64, 72)},
        {"crops_coords_top_left": (0, 8)},
        {"target_size": (64, 72)},
        {"negative_original_size": (64, 72)},
        {"negative_crops_coords_top_left": (0, 8)},
        {"negative_target_size": (64, 72)},
        {"denoising_end": 0.9},
        {"num_inference_steps": 6},
    ],
    ids=lambda other: "-".join(map(str, (*other, *other.values()))),
)
def test_the_micro_model_tells_any_argument(micro: Pipeline, other: dict[str, Any]) -> None:
    """None that was lost or mistaken would go unseen below."""
    call = {"prompt": "a red circle", "negative_prompt": "green", "num_inference_steps": 5, "output_type": "latent"}
    call |= {"negative_original_size": (64, 64), "negative_target_size": (64, 64)}  # diffusers takes both or none
    plain, changed = (micro(generator=seeds(1), **{**call, **more}).images for more in ({}, other))
    assert difference(changed, plain) > 10 * BOUND


@pytest.mark.parametrize("prompt", ["wow! a red circle!!", "un café crème à Ängelholm, naïve 漢字 🦊", LONG, ""])
def test_prompts(micro: Pipeline, micro_pipeline: Any, prompt: str) -> None:
    compare(micro, micro_pipeline, prompt=prompt)


def test_both_prompts(micro: Pipeline, micro_pipeline: Any) -> None:
    compare(
        micro,
        micro_pipeline,
        prompt="a red circle",
        prompt_2="two blue squares",
        negative_prompt="green",
        negative_prompt_2="yellow",
        num_inference_steps=5,
    )


def test_two_images_of_a_prompt(micro: Pipeline, micro_pipeline: Any) -> None:
    compare(micro, micro_pipeline, (3, 4), prompt="a red circle", num_images_per_prompt=2)


def test_three_prompts_on_batch_1(micro: Pipeline, micro_pipeline: Any) -> None:
    prompts = ["a red circle", "two blue squares!", "a yellow star on grass"]
    compare(micro, micro_pipeline, (5, 6, 7), prompt=prompts, negative_prompt=["green", "", "red"])


def test_four_images_on_batch_2(micro_pairs: Pipeline, micro_pipeline: Any) -> None:
    call = {"prompt": ["a red circle", "a star"], "num_images_per_prompt": 2, "width": 96, "height": 64}
    compare(micro_pairs, micro_pipeline, (1, 2, 3, 4), **call)


def test_three_images_on_batch_2_pad_the_last_chunk(micro_pairs: Pipeline, micro_pipeline: Any) -> None:
    prompts = ["a red circle on the left", "a blue star at the top", "a large green square on the right"]
    compare(micro_pairs, micro_pipeline, (1, 2, 3), prompt=prompts, width=96, height=64)


def test_second_resolution(micro_artifact: Path, micro_wide_artifact: Path, micro_pipeline: Any) -> None:
    both = runtimes.load([micro_artifact, micro_wide_artifact])
    compare(both, micro_pipeline, prompt="a red circle", width=96, height=64)
    compare(both, micro_pipeline, prompt="a red circle", width=64, height=64)


def test_one_generator_draws_for_all(micro: Pipeline, micro_pipeline: Any) -> None:
    # Prompts that the model is decided about: where it isn't ("a", "b") it amplifies rounding, on an EPYC too far.
    call = {"prompt": ["a red circle", "a blue star"], "num_inference_steps": 5, "output_type": "latent"}
    reference = micro_pipeline(generator=seeds(9)[0], **call).images
    assert difference(micro(generator=seeds(9)[0], **call).images, reference) <= BOUND


def test_micro_conditioning(micro: Pipeline, micro_pipeline: Any) -> None:
    compare(
        micro,
        micro_pipeline,
        prompt="a red circle",
        original_size=(512, 384),
        crops_coords_top_left=(16, 32),
        target_size=(256, 192),
        negative_original_size=(48, 80),
        negative_crops_coords_top_left=(8, 8),
        negative_target_size=(128, 128),
        num_inference_steps=5,
    )


def test_guidance_rescale(micro: Pipeline, micro_pipeline: Any) -> None:
    compare(micro, micro_pipeline, prompt="a red circle", guidance_rescale=0.7, num_inference_steps=5)


def test_denoising_end(micro: Pipeline, micro_pipeline: Any) -> None:
    compare(micro, micro_pipeline, prompt="a red circle", denoising_end=0.8)


@pytest.mark.parametrize("until", [0.0, 0.5, 0.75])
def test_guidance_until_is_the_callback_that_drops_guidance(micro: Pipeline, micro_pipeline: Any, until: float) -> None:
    def drop(pipeline: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == int(pipeline.num_timesteps * until):
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            tensors["add_text_embeds"] = tensors["add_text_embeds"].chunk(2)[-1]
            tensors["add_time_ids"] = tensors["add_time_ids"].chunk(2)[-1]
            pipeline._guidance_scale = 0.0
        return tensors

    call = {"prompt": "a red circle", "num_inference_steps": STEPS, "output_type": "latent"}
    reference = micro_pipeline(
        generator=seeds(1),
        callback_on_step_end=drop,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds", "add_time_ids"],
        **call,
    ).images
    assert difference(micro(generator=seeds(1), guidance_until=until, **call).images, reference) <= BOUND
    everything = micro(generator=seeds(1), **call).images
    assert difference(everything, reference) > 10 * BOUND


def test_custom_sigmas_and_timesteps(micro: Pipeline, micro_pipeline: Any) -> None:
    """On the trained weights four steps so far apart amplify rounding: eager differs from itself by 1e-3 when its start
    noise changes by 1e-7."""
    compare(micro, micro_pipeline, prompt="a red circle", sigmas=[14.0, 7.0, 3.0, 1.0, 0.3, 0.0])
    compare(micro, micro_pipeline, prompt="a red circle", timesteps=[900, 600, 300, 50])


def test_given_latents_and_embeddings(micro: Pipeline, micro_pipeline: Any) -> None:
    embeds, negative, pooled, negative_pooled = micro_pipeline.encode_prompt("a red circle", negative_prompt="green")
    compare(
        micro,
        micro_pipeline,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        latents=torch.randn(1, 4, 8, 8, generator=seeds(2)[0]),
        num_inference_steps=5,
    )


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
def test_every_scheduler(micro: Pipeline, micro_pipeline: Any, name: str) -> None:
    """On weights that don't amplify rounding: LCM's noise on a model that knows no LCM does, on the trained ones."""
    import diffusers

    row, usual = schedulers.SCHEDULERS[name], micro_pipeline.scheduler
    its = getattr(diffusers, row.diffusers).from_config(usual.config, **row.settings)
    call = {"prompt": ["a large red circle", "a blue star"], "num_inference_steps": 8, "output_type": "latent"}
    micro_pipeline.scheduler = its
    try:
        reference = micro_pipeline(generator=seeds(1, 2), **call).images
    finally:
        micro_pipeline.scheduler = usual
    assert difference(micro(generator=seeds(1, 2), scheduler=name, **call).images, reference) <= 1e-3
    # The same engines: not a bit differs between our scheduler and diffusers'.
    named, given = (micro(generator=seeds(1, 2), scheduler=s, **call).images for s in (name, its))
    assert torch.equal(named, given)
    assert isinstance(micro.scheduler, EulerDiscrete)  # one call's scheduler is not the next one's


def test_another_scheduler_of_diffusers(tiny_artifact: Path, diffusers_pipeline: Any) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(diffusers_pipeline.scheduler.config)
    ours = runtimes.load(tiny_artifact, scheduler=scheduler)
    usual, diffusers_pipeline.scheduler = diffusers_pipeline.scheduler, scheduler
    try:
        compare(ours, diffusers_pipeline, bound=1e-3, prompt="a red circle", eta=0.3, num_inference_steps=5)
    finally:
        diffusers_pipeline.scheduler = usual


def test_a_callback_sees_and_changes_latents(micro: Pipeline, micro_pipeline: Any) -> None:
    def halve(pipeline: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5} if i == 2 else tensors

    compare(micro, micro_pipeline, prompt="a red circle", callback_on_step_end=halve, num_inference_steps=5)


@pytest.mark.parametrize("output_type", ["pt", "np"])
def test_pixels(ours: Pipeline, diffusers_pipeline: Any, output_type: str) -> None:
    call = {"prompt": "a red circle", "num_inference_steps": 5, "output_type": output_type}
    mine, reference = (p(generator=seeds(1), **call).images for p in (ours, diffusers_pipeline))
    assert mine.shape == reference.shape
    assert float(abs(torch.as_tensor(mine) - torch.as_tensor(reference)).max()) < 1e-4


def test_pictures(ours: Pipeline, diffusers_pipeline: Any) -> None:
    import numpy

    call = {"prompt": ["a red circle", "a star"], "num_inference_steps": 5}
    mine, reference = (p(generator=seeds(1, 2), **call).images for p in (ours, diffusers_pipeline))
    for a, b in zip(mine, reference, strict=True):
        assert (a.mode, a.size) == (b.mode, b.size)
        assert int(abs(numpy.asarray(a, dtype=int) - numpy.asarray(b, dtype=int)).max()) <= 1


def test_the_tiny_vae(sdxl_build: Builder, tiny_artifact: Path) -> None:
    from diffusers import AutoencoderTiny, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(models.TINY, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = AutoencoderTiny.from_pretrained(models.TINY / "vae_tiny", dtype=torch.float32)
    built = sdxl_build("tiny", "--vae", "tiny")
    assert built["hit"] or built["compiled"] == ["vae_decoder.main"]
    call = {"prompt": "a red circle", "num_inference_steps": 5, "output_type": "pt"}
    mine, reference = (p(generator=seeds(1), **call).images for p in (runtimes.load(built["path"]), pipeline))
    assert float((mine - reference).abs().max()) < 1e-4
