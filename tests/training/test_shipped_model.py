"""The model in the package: small enough, complete, and what its parts say of each other fits."""

import json
from pathlib import Path

import pytest
import torch

from training import architecture

FOLDER = Path(__file__).parents[2] / "buildtool" / "data" / "tiny"


def test_sizes() -> None:
    assert sum(path.stat().st_size for path in architecture.base_files(FOLDER)) <= 25_000_000
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 33_000_000


@pytest.mark.parametrize(
    ("part", "stated"),
    [
        ("text_encoder", architecture.TEXT_ENCODER),
        ("text_encoder_2", architecture.TEXT_ENCODER_2),
        ("unet", architecture.UNET),
        ("refiner/unet", architecture.REFINER),
        ("scheduler", architecture.SCHEDULER),
    ],
)
def test_configs_are_the_architecture(part: str, stated: dict[str, object]) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((FOLDER / part / name).read_text())
    assert {key: config[key] for key in stated} == stated


def test_everything_is_half_precision_and_finite() -> None:
    from safetensors.torch import load_file

    files = list(FOLDER.rglob("*.safetensors"))
    assert len(files) == 6
    for file in files:
        for name, tensor in load_file(file).items():
            assert tensor.dtype == torch.float16, (file, name)
            assert tensor.isfinite().all(), (file, name)


def test_latents_have_unit_deviation() -> None:
    import random

    from diffusers import AutoencoderKL

    from training import world
    from training.render import render

    vae = AutoencoderKL.from_pretrained(FOLDER, subfolder="vae")
    pictures = render([world.sample(random.Random(f"unit {seed}")) for seed in range(12)])
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
        drawn = vae.decode(latents / vae.config.scaling_factor).sample
    assert latents.std().item() == pytest.approx(1.0, abs=0.15)
    assert (drawn - pictures).abs().mean() < 0.03


def test_the_refiner_takes_the_base_models_parts() -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
    from PIL import Image

    base = StableDiffusionXLPipeline.from_pretrained(FOLDER)
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        FOLDER / "refiner",
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        vae=base.vae,
        scheduler=base.scheduler,
    )
    refiner.set_progress_bar_config(disable=True)
    picture = refiner("a red circle", image=Image.new("RGB", (256, 256)), strength=0.2, num_inference_steps=5).images[0]
    assert picture.size == (256, 256)
