"""DeepCache and FreeU on the GPU: features that CUDA graphs leave and take, against the same schedule in diffusers."""

import json
from pathlib import Path

import pytest
import torch

import runtimes
from tests.gpu.conftest import Run
from tests.gpu.helpers import relative
from tests.gpu.test_pictures import BOUNDS, diffusers_pipeline, draw
from tests.runtimes.test_deepcache import FREEU, deepcached

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("freeu", [False, True])
def test_latents_are_those_of_the_same_schedule_in_diffusers(command: Run, store_root: Path, freeu: bool) -> None:
    words = ["torch", "--model", "tiny", "--gpu", "auto", "--precision", "fp16", "--deepcache", "3:1"]
    words += ["--freeu", ",".join(map(str, FREEU.values()))] if freeu else []
    built = command("buildtool.cli", *words, "--json", "--artifacts", str(store_root))
    assert built.returncode == 0, built.stderr
    ours, theirs = runtimes.load(json.loads(built.stdout)["artifacts"][0]["path"]), diffusers_pipeline("fp16")
    if freeu:
        theirs.enable_freeu(**FREEU)
    two = {"num_images_per_prompt": 2}  # on batch 1: each has a feature of its own
    with deepcached(theirs, interval=3, branch=1):
        reference = draw(theirs, "latent", **two)
    made = draw(ours, "latent", **two)
    assert relative(made, reference) <= BOUNDS["fp16"][0]
    assert ours.unet_steps == {"full": 7, "shallow": 13}
    assert torch.equal(draw(ours, "latent", **two), made)
