"""Memory modes on the GPU: what is freed is free, and pictures stay the same."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

import runtimes
from runtimes import gpu_upload
from tests.gpu.helpers import DEVICE, psnr
from tests.gpu.test_pictures import draw

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["staged", "model-offload"])
def test_pictures_are_the_resident_ones(artifacts: dict[str, Path], mode: str) -> None:
    resident = draw(runtimes.load(artifacts["fp16"]), "pt").clone()
    ours = runtimes.load(artifacts["fp16"], memory=mode)
    for _ in range(2):  # what was freed comes back
        assert psnr(draw(ours, "pt"), resident) >= 50


def test_freed_weights_and_graphs_give_their_memory_back(artifacts: dict[str, Path]) -> None:
    gc.collect()  # other tests' engines
    before = gpu_upload.held_bytes()
    pipeline = runtimes.load(artifacts["fp16"], memory="staged")
    there = pipeline.artifacts[0]
    draw(pipeline, "latent")
    unet = weakref.ref(there.engine("unet", "cfg"))
    files = {name: there.manifest.files[c.weights].size for name, c in there.manifest.components.items()}
    assert gpu_upload.held_bytes() - before <= files["unet"]  # the text encoders, which were ahead, have gone
    latents = torch.zeros(1, 4, 32, 32, device=DEVICE, dtype=torch.float16)
    pipeline.decode(latents)
    assert unet() is None and gpu_upload.held_bytes() - before <= files["vae_decoder"]


def test_offloaded_weights_wait_in_pinned_memory_and_nothing_is_recorded(artifacts: dict[str, Path]) -> None:
    gc.collect()
    before = gpu_upload.held_bytes()
    pipeline = runtimes.load(artifacts["fp16"], memory="model-offload")
    there = pipeline.artifacts[0]
    draw(pipeline, "latent")
    assert gpu_upload.held_bytes() <= before  # nothing was uploaded past torch
    assert all(host.data.is_pinned() for host in there._weights._host.values()) and there._weights._host
    assert there.engine("unet", "cfg")._graph is None  # type: ignore[attr-defined]
    assert 0 < there._weights.bytes <= there.manifest.files[there.manifest.components["unet"].weights].size
