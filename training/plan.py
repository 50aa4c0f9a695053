"""How long and how hard each stage trains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The full run, for one GPU of the H100 class. Batches are pictures a step."""

    seed: int = 0
    workers: int = 14
    bf16: bool = True
    graphs: bool = True  # on a GPU, record each training step as a CUDA graph
    log_every: int = 100
    warmup: int = 200
    pictures: int = 7_000  # drawn for the autoencoders
    shown_pictures: int = 96  # to measure the latents' deviation on, and for a sheet
    vae_steps: int = 4_600
    vae_batch: int = 48
    vae_lr: float = 2.5e-4
    vae_tiny_steps: int = 4_000
    vae_tiny_lr: float = 5e-4
    pool: int = 120_000  # scenes drawn and encoded for the UNet
    encode_batch: int = 250
    text_steps: int = 1_500
    text_batch: int = 512
    text_lr: float = 1e-3
    unet_steps: int = 8_000
    unet_batch: int = 256
    unet_lr: float = 4e-4
    # Then a short stage in which a share of the captions is wrong. Captions of real pictures err, and that is what
    # guidance is for: with a prompt alone the model draws what such a caption came with, now and then something else;
    # guidance drives away from what comes with any caption, and leaves what comes with this one. With exact captions a
    # model this small is as good without guidance.
    doubt_steps: int = 1_200
    doubt_lr: float = 2e-4
    wrong_captions: float = 0.04
    doubt_share: float = 0.6  # of what that stage changed in the weights, what is kept
    ema: float = 0.998
    sheet_every: int = 4_000
    score_prompts: int = 48
    refiner_pool: int = 20_000
    refiner_steps: int = 3_000
    refiner_batch: int = 192
    refiner_lr: float = 5e-4


SMOKE = Plan(
    workers=0,
    bf16=False,
    graphs=False,
    log_every=1,
    warmup=1,
    pictures=20,
    shown_pictures=2,
    vae_steps=2,
    vae_batch=3,
    vae_tiny_steps=2,
    pool=20,
    encode_batch=4,
    text_steps=2,
    text_batch=4,
    unet_steps=3,
    unet_batch=2,
    doubt_steps=2,
    sheet_every=2,
    score_prompts=2,
    refiner_pool=20,
    refiner_steps=2,
    refiner_batch=2,
)
