"""A refiner beside its base model on the GPU: diffusers' numbers, weights that are there once, memory modes."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from buildtool import models
from runtimes import gpu_upload
from tests.gpu.conftest import Run
from tests.gpu.helpers import DEVICE, psnr, relative
from tests.gpu.test_pictures import BOUNDS, diffusers_pipeline, draw

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def refiner_artifact(artifacts: dict[str, Path], command: Run, store_root: Path) -> Path:
    """tiny's refiner in fp16: all but its UNet is tiny's."""
    words = ["torch", "--model", "tiny-refiner", "--gpu", "auto", "--precision", "fp16", "--json"]
    built = command("buildtool.cli", *words, "--artifacts", str(store_root))
    assert built.returncode == 0, built.stderr
    (row,) = json.loads(built.stdout)["artifacts"]
    assert row["hit"] or row["compiled"] == ["unet.cfg", "unet.nocfg"]
    return Path(row["path"])


def load(base: Path, refiner: Path, memory: str = "resident") -> tuple[Any, Any]:
    first = runtimes.load(base, memory=memory)
    return first, runtimes.load(refiner, memory=memory, beside=first)


def both(pair: tuple[Any, Any], output_type: str, at: float | None) -> Any:
    """The base's latents, gone on with at ``at`` or, if that is None, refined as a picture."""
    latents = draw(pair[0], "latent", **({} if at is None else {"denoising_end": at}))
    return draw(pair[1], output_type, image=latents, **({} if at is None else {"denoising_start": at}))


@pytest.mark.parametrize("at", [0.8, 0.9, None])
def test_pictures_are_diffusers_own(artifacts: dict[str, Path], refiner_artifact: Path, at: float | None) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    base = diffusers_pipeline("fp16")
    shared = {name: getattr(base, name) for name in ("text_encoder_2", "tokenizer_2", "vae", "scheduler")}
    second = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        models.TINY / models.REFINER, dtype=torch.float16, add_watermarker=False, **shared
    ).to(DEVICE)
    second.set_progress_bar_config(disable=True)
    ours = load(artifacts["fp16"], refiner_artifact)
    latents = relative(*(both(pair, "latent", at) for pair in (ours, (base, second))))
    pictures = psnr(*(both(pair, "pt", at) for pair in (ours, (base, second))))
    print(f"{at}: latents differ by {latents:.1e}, pictures by {pictures:.1f} dB")
    assert latents <= BOUNDS["fp16"][0] and pictures >= BOUNDS["fp16"][1]


def test_the_refiner_adds_its_unet_alone(artifacts: dict[str, Path], refiner_artifact: Path) -> None:
    gc.collect()  # other tests' engines
    before = gpu_upload.held_bytes()
    pair = load(artifacts["fp16"], refiner_artifact)
    both(pair, "pt", 0.8)
    pair[0].decode(torch.zeros(1, 4, 32, 32, device=DEVICE, dtype=torch.float16))
    manifests = [pipeline.artifacts[0].manifest for pipeline in pair]
    files = {m.files[c.weights].sha256: m.files[c.weights].size for m in manifests for c in m.components.values()}
    assert len(files) == 5  # of four components and three
    assert gpu_upload.held_bytes() - before <= sum(files.values())
    assert pair[1].artifacts[0].engine("text_encoder_2") is pair[0].artifacts[0].engine("text_encoder_2")


@pytest.mark.parametrize("mode", ["staged", "model-offload"])
def test_memory_modes_give_the_resident_picture(artifacts: dict[str, Path], refiner_artifact: Path, mode: str) -> None:
    resident = both(load(artifacts["fp16"], refiner_artifact), "pt", 0.8).clone()
    ours = load(artifacts["fp16"], refiner_artifact, mode)
    for _ in range(2):  # what was freed comes back
        assert psnr(both(ours, "pt", 0.8), resident) >= 50
    assert {digests[0] for digests in ours[0].artifacts[0]._engines} == {"vae_decoder"}


def test_the_command_line_in_every_mode(
    artifacts: dict[str, Path], refiner_artifact: Path, command: Run, tmp_path: Path
) -> None:
    pictures = []
    for mode in ("resident", "staged", "model-offload"):
        words = ["--engine", str(artifacts["fp16"]), "--refiner", str(refiner_artifact), "--refine-at", "0.8"]
        words += ["--prompt", "a large red circle on the left", "--seed", "1", "--steps", "20", "--memory", mode]
        done = command("runtimes.cli", *words, "--json", "--out", str(tmp_path / f"{mode}.png"))
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["unet_steps"]["full"] == 20 and told["images"][0]["refiner"] == "tiny-refiner"
        pictures.append(Path(told["images"][0]["path"]))
    assert all(picture.stat().st_size for picture in pictures)
