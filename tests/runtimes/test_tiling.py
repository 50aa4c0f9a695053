"""VAE tiling: tiles cover everything, no seam shows, and the picture is the untiled one's."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import runtimes
from buildtool import models
from runtimes import images, tiling


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


def test_tiles_that_disagree_leave_no_seam() -> None:
    """Each stand-in tile has a colour of its own: the picture goes from one to the next in small steps."""
    colours = iter(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]))
    pixels = tiling.decode(
        lambda part: next(colours).expand(part.shape[0], 3, 256, 256), torch.zeros(1, 4, 64, 64), (32, 32), 8
    )
    steps = [pixels.diff(dim=axis).abs().max().item() for axis in (2, 3)]
    assert max(steps) < 0.04


@pytest.mark.slow
def test_the_untiled_picture(tiny_artifact: Path) -> None:
    """One of tiny's own pictures, enlarged, against diffusers' untiled decode."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(models.TINY, subfolder="vae").eval()
    pipeline = runtimes.load(tiny_artifact)
    with torch.inference_mode():
        drawn = pipeline(
            "a large red circle on the left", num_inference_steps=20, generator=torch.Generator().manual_seed(1)
        ).images[0]
        enlarged = torch.from_numpy(np.array(drawn.resize((384, 512)))).permute(2, 0, 1)[None] / 127.5 - 1
        latents = vae.encode(enlarged).latent_dist.mode()
        whole = (vae.decode(latents).sample * 0.5 + 0.5).clamp(0, 1)
    tiled = pipeline.decode(latents * vae.config.scaling_factor, "pt")
    assert tiled.shape == whole.shape
    error = tiled - whole
    psnr = -10 * torch.log10((error**2).mean())
    assert psnr >= 35
    # Where tiles end (every 8th row is a place where one may), the error steps no more than elsewhere.
    rows = error.diff(dim=2).abs().mean(dim=(0, 1, 3))
    columns = error.diff(dim=3).abs().mean(dim=(0, 1, 2))
    for steps, length in ((rows, 512), (columns, 384)):
        begins = [8 * b for b in tiling.starts(length // 8, 32)]
        borders = [b - 1 for b in {*begins, *(b + 256 for b in begins)} if 0 < b < length]
        assert steps[borders].max() <= 2 * steps.mean() + 1e-3


@pytest.mark.slow
def test_smaller_latents_are_refused(tiny_artifact: Path) -> None:
    with pytest.raises(ValueError, match="from 32x32 on"):
        runtimes.load(tiny_artifact).decode(torch.zeros(1, 4, 16, 64))
