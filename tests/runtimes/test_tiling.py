"""VAE tiling: tiles cover everything, no seam shows, and the picture is the untiled one's."""

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import runtimes
from buildtool import models
from runtimes import images, tiling
from training import world
from training.render import render


@pytest.mark.parametrize("length", [32, 33, 40, 56, 57, 64, 100, 128])
def test_tiles_cover_all_and_overlap_by_a_quarter(length: int) -> None:
    begins = tiling.starts(length, 32)
    assert begins[0] == 0 and begins[-1] == length - 32
    assert all(0 < b - a <= 24 for a, b in pairwise(begins))


def test_tiles_that_agree_give_the_whole() -> None:
    latents = torch.randn(2, 3, 20, 13)

    def enlarged(part: Tensor) -> Tensor:
        return part.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    assert torch.allclose(tiling.decode(enlarged, latents, (8, 8), 2), enlarged(latents), atol=1e-6)


def test_a_decoder_may_make_less_than_its_artifact() -> None:
    """``--vae-tile``: a stand-in decoder of 8x8 latents for an artifact of 16x12."""

    class Decoder:
        inputs = (SimpleNamespace(name="latents", shape=(1, 4, 8, 8), dtype="float32"),)

        def __call__(self, latents: Tensor) -> tuple[Tensor]:
            assert latents.shape == (1, 4, 8, 8)
            return (latents[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3),)

    config = SimpleNamespace(latents_mean=None, latents_std=None, scaling_factor=0.5, vae_scale_factor=8)
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(pipeline=config), engine=lambda name: Decoder())
    latents = torch.randn(2, 4, 16, 12)
    made = images.decode(artifact, latents)
    assert torch.allclose(made, 2 * latents[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3), atol=1e-5)


@pytest.mark.parametrize("guide", [0.0, 0.3, 1.0])
def test_tiles_that_disagree_leave_no_seam(guide: float) -> None:
    """Each stand-in tile has a colour of its own: the picture goes from one to the next in small steps."""
    colours = iter(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, guide]))
    pixels = tiling.decode(
        lambda part: next(colours).expand(part.shape[0], 3, 256, 256), torch.zeros(1, 4, 64, 64), (32, 32), 8
    )
    steps = [pixels.diff(dim=axis).abs().max().item() for axis in (2, 3)]
    assert max(steps) < 0.04


def test_colours_are_those_of_the_whole() -> None:
    """A stand-in decoder that normalises what it gets, as a VAE's does: tiles of one picture differ in colour."""
    across = torch.linspace(-1, 1, 32)
    latents = torch.stack([across.expand(32, 32), across[:, None].expand(32, 32), torch.zeros(32, 32)])[None]
    latents[:, :, 10:20, 14:27] += torch.tensor([2.0, -1.0, 1.5]).view(1, 3, 1, 1)

    def normalised(part: Tensor) -> Tensor:
        part = (part - part.mean(dim=(2, 3), keepdim=True)) / (0.5 + part.std(dim=(2, 3), keepdim=True))
        return part.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3) / 2

    def error(pixels: Tensor) -> float:
        return (pixels - normalised(latents)).square().mean().sqrt().item()

    blended, disagreement = tiling._blend(normalised, latents, (16, 16), 8)
    assert error(blended) > 0.1 and disagreement.min() > 0.05
    assert error(tiling.decode(normalised, latents, (16, 16), 8)) < error(blended) / 4


@pytest.mark.slow
def test_untiled_pictures() -> None:
    """Pictures of tiny's world, enlarged, against diffusers' untiled decode. Blended tiles alone reach 30.7 dB."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(models.TINY, subfolder="vae").eval()
    first, second = random.Random("1"), random.Random("2")
    scenes = [[world.sample(first) for _ in range(5)][-1], world.sample(second)]
    with torch.inference_mode():
        enlarged = functional.interpolate(render(scenes), (384, 384), mode="bicubic").clamp(-1, 1)
        latents = vae.encode(enlarged).latent_dist.mode()
        whole = (vae.decode(latents).sample * 0.5 + 0.5).clamp(0, 1)
        tiled = tiling.decode(lambda part: vae.decode(part).sample, latents, (32, 32), 8)
        errors = (tiled * 0.5 + 0.5).clamp(0, 1) - whole
    for error in errors.split(1):
        assert -10 * torch.log10((error**2).mean()) >= 35
        # Where tiles end (every 8th row is a place where one may), the error steps no more than elsewhere.
        rows = error.diff(dim=2).abs().mean(dim=(0, 1, 3))
        columns = error.diff(dim=3).abs().mean(dim=(0, 1, 2))
        begins = [8 * b for b in tiling.starts(384 // 8, 32)]
        borders = [b - 1 for b in {*begins, *(b + 256 for b in begins)} if 0 < b < 384]
        for steps in (rows, columns):
            assert steps[borders].max() <= 2 * steps.mean() + 1e-3


@pytest.mark.slow
def test_an_artifact_decodes_in_tiles(micro_model: Path, micro_artifact: Path) -> None:
    """A compiled decoder's tiles, through ``Pipeline.decode``."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(micro_model, subfolder="vae").eval()
    pipeline = runtimes.load(micro_artifact)
    latents = torch.randn(2, 4, 13, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        pixels = tiling.decode(lambda part: vae.decode(part).sample, latents, (8, 8), 8)
    made = pipeline.decode(latents * vae.config.scaling_factor, "pt")
    assert made.shape == (2, 3, 104, 64)
    assert (made - (pixels * 0.5 + 0.5).clamp(0, 1)).abs().max() < 1e-3
    with pytest.raises(ValueError, match="from 8x8 on"):
        pipeline.decode(torch.zeros(1, 4, 4, 16))
