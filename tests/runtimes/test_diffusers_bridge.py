"""A compiled UNet and VAE inside diffusers' own pipelines, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from buildtool import models
from buildtool.store.errors import SdxlError
from runtimes.diffusers_bridge import attach

pytestmark = pytest.mark.slow


def load(folder: Path = models.TINY, image_to_image: bool = False) -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    cls = StableDiffusionXLImg2ImgPipeline if image_to_image else StableDiffusionXLPipeline
    pipe = cls.from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **arguments: Any) -> Any:
    call = {"prompt": "a red circle", "num_inference_steps": 20, "output_type": "latent", **arguments}
    return pipe(generator=torch.Generator().manual_seed(1), **call).images


@pytest.fixture(scope="module")
def plain() -> Any:
    return load()


@pytest.fixture(scope="module")
def attached(tiny_artifact: Path) -> Any:
    return attach(load(), tiny_artifact)


@pytest.mark.parametrize(
    "arguments", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 3, "num_inference_steps": 5}]
)
def test_pictures_are_the_pipelines_own(plain: Any, attached: Any, arguments: dict[str, Any]) -> None:
    reference = latents(plain, **arguments)
    assert float((latents(attached, **arguments) - reference).abs().max() / reference.std()) <= 1e-4


def test_the_decoder_too(plain: Any, attached: Any) -> None:
    one, two = (latents(p, num_inference_steps=3, output_type="pt", num_images_per_prompt=2) for p in (plain, attached))
    assert float((one - two).abs().max()) < 2e-3  # half a grey level
    assert attached.vae.decoder is None


def test_its_scheduler_and_callback_work(plain: Any, attached: Any) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    def halve(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.9}

    made = []
    for pipe in (plain, attached):
        usual, pipe.scheduler = pipe.scheduler, EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        made.append(latents(pipe, num_inference_steps=5, callback_on_step_end=halve))
        pipe.scheduler = usual
    assert float((made[1] - made[0]).abs().max() / made[0].std()) <= 1e-3


def test_image_to_image_works(tiny_artifact: Path) -> None:
    picture = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    plain = load(image_to_image=True)
    reference = latents(plain, image=picture, strength=0.6)
    made = latents(attach(plain, tiny_artifact), image=picture, strength=0.6)
    assert float((made - reference).abs().max() / reference.std()) <= 1e-3


def test_what_cannot_be_served_is_refused_by_name(attached: Any) -> None:
    with pytest.raises(SdxlError, match="cross_attention_kwargs"):
        latents(attached, cross_attention_kwargs={"gligen": 1})
    with pytest.raises(SdxlError, match="makes 256x256"):
        latents(attached, width=320, height=192)


def test_another_architecture_is_refused(micro_artifact: Path, plain: Any) -> None:
    with pytest.raises(SdxlError, match="another architecture: its UNet's block_out_channels"):
        attach(load(), micro_artifact)


def test_another_pipeline_is_refused(tiny_artifact: Path) -> None:
    with pytest.raises(SdxlError, match="not into object"):
        attach(object(), tiny_artifact)
