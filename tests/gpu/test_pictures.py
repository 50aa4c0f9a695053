"""Pictures on the GPU against diffusers' own pipeline there, in the same precision on the same weights.

Rounding alone, eager against eager in fp32 on a CPU, moves the latents of three prompts after 20 steps by 1e-3 of their
norm in fp16 and by 8e-3 in bf16, and pictures by 72 and 53 dB. `BOUNDS` allow two ways of rounding ten times that.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from buildtool import models
from runtimes.diffusers_bridge import attach
from tests.gpu.conftest import PRECISIONS
from tests.gpu.helpers import DEVICE, psnr, relative

pytestmark = pytest.mark.gpu

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BOUNDS = {"fp32": (1e-3, 70.0), "fp16": (1e-2, 50.0), "bf16": (8e-2, 33.0)}
"""Precision -> relative difference of latents at most, PSNR of decoded pictures at least (dB)."""
PROMPT = "a large red circle on the left"


def diffusers_pipeline(precision: str) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(models.TINY, dtype=DTYPES[precision], add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(DEVICE)


@pytest.fixture(scope="module", autouse=True)
def exact_fp32() -> Iterator[None]:
    """diffusers in fp32 is a reference only without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(scope="module", params=PRECISIONS)
def pair(artifacts: dict[str, Path], request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """(precision, ours, diffusers')."""
    folders = [artifacts[request.param], *([artifacts["wide"]] if request.param == "fp16" else [])]
    return request.param, runtimes.load([*folders]), diffusers_pipeline(request.param)


@pytest.fixture(scope="module")
def halves(artifacts: dict[str, Path]) -> tuple[Any, Any]:
    """ours, of two resolutions, and diffusers', both in fp16."""
    return runtimes.load([artifacts["fp16"], artifacts["wide"]]), diffusers_pipeline("fp16")


def draw(pipe: Any, output_type: str, seed: int = 1, **arguments: Any) -> Any:
    call = {"prompt": PROMPT, "num_inference_steps": 20, "output_type": output_type, **arguments}
    return pipe(generator=torch.Generator().manual_seed(seed), **call).images


def compare(precision: str, ours: Any, theirs: Any, **arguments: Any) -> None:
    most, least = BOUNDS[precision]
    latents = relative(*(draw(pipe, "latent", **arguments) for pipe in (ours, theirs)))
    pictures = psnr(*(draw(pipe, "pt", **arguments) for pipe in (ours, theirs)))
    print(f"{precision} {arguments}: latents differ by {latents:.1e}, pictures by {pictures:.1f} dB")
    assert latents <= most
    assert pictures >= least


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_pictures_are_diffusers_own(pair: tuple[str, Any, Any], guidance_scale: float) -> None:
    compare(*pair, guidance_scale=guidance_scale)


def test_negative_prompt_and_second_resolution(halves: tuple[Any, Any]) -> None:
    compare("fp16", *halves, negative_prompt="green, striped", width=320, height=192)


def test_several_images_of_a_prompt(halves: tuple[Any, Any]) -> None:
    compare("fp16", *halves, num_images_per_prompt=3, num_inference_steps=5)


def test_fp16_is_as_near_to_fp32_as_diffusers_fp16_is(halves: tuple[Any, Any]) -> None:
    exact = draw(diffusers_pipeline("fp32"), "latent")
    mine, theirs = (relative(draw(pipe, "latent"), exact) for pipe in halves)
    print(f"from fp32: ours {mine:.1e}, diffusers' {theirs:.1e}")
    assert mine <= 3 * theirs


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_start_noise_is_diffusers_bit_for_bit(halves: tuple[Any, Any], where: str) -> None:
    seen: list[torch.Tensor] = []
    for pipe in halves:
        usual = pipe.scheduler.step

        @functools.wraps(usual)
        def step(noise: Any, time: Any, sample: torch.Tensor, *rest: Any, _usual: Any = usual, **named: Any) -> Any:
            seen.append(sample.clone())
            return _usual(noise, time, sample, *rest, **named)

        pipe.scheduler.step = step
        try:
            generator = torch.Generator(where).manual_seed(7)
            pipe(PROMPT, num_inference_steps=1, output_type="latent", generator=generator)
        finally:
            del pipe.scheduler.step
    assert len(seen) == 2
    assert seen[0].dtype == seen[1].dtype == torch.float16
    assert torch.equal(*seen)


def test_two_runs_give_the_same_bits(halves: tuple[Any, Any]) -> None:
    ours, _ = halves
    first = draw(ours, "pt")
    draw(ours, "pt", seed=2, width=320, height=192)
    assert torch.equal(first, draw(ours, "pt"))
    assert not torch.equal(first, draw(ours, "pt", seed=2))


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 3}])
def test_the_bridges_pictures_are_the_pipelines_own(
    artifacts: dict[str, Path], halves: tuple[Any, Any], arguments: dict[str, Any]
) -> None:
    attached = attach(diffusers_pipeline("fp16"), artifacts["fp16"])
    compare("fp16", attached, halves[1], **arguments)


def test_the_bridges_scheduler_callback_and_image_to_image(artifacts: dict[str, Path]) -> None:
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

    picture = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    seen: list[int] = []

    def note(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        return tensors

    made = []
    for attaches in (False, True):
        pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(
            models.TINY, dtype=torch.float16, add_watermarker=False
        ).to(DEVICE)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        if attaches:
            attach(pipe, artifacts["fp16"])
        made.append(draw(pipe, "latent", image=picture, strength=0.6, callback_on_step_end=note))
    assert seen == [*range(12)] * 2
    assert relative(made[1], made[0]) <= BOUNDS["fp16"][0]
