"""Memory modes on the GPU: what is freed is free, and pictures stay the same."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from runtimes import gpu_upload
from runtimes.segments import Copies, Turns
from tests.gpu.conftest import Run
from tests.gpu.helpers import DEVICE, outputs, psnr, random_inputs, relative
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


@pytest.fixture(scope="module", params=[3, 4])
def segmented(request: pytest.FixtureRequest, command: Run, store_root: Path, artifacts: dict[str, Path]) -> Path:
    """tiny in fp16, its UNet in an odd and in an even number of segments."""
    words = ["torch", "--model", "tiny", "--gpu", "auto", "--precision", "fp16", "--segments", str(request.param)]
    done = command("buildtool.cli", *words, "--json", "--artifacts", str(store_root))
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["artifacts"][0]["path"])


@pytest.mark.parametrize("variant", ["cfg", "nocfg"])
@torch.inference_mode()
def test_segments_compute_what_the_whole_unet_computes(
    segmented: Path, artifacts: dict[str, Path], variant: str
) -> None:
    whole = runtimes.load(artifacts["fp16"]).artifacts[0].engine("unet", variant)
    ours, turns = (runtimes.load(segmented, memory=m).artifacts[0].engine("unet", variant) for m in MEMORY)
    given = random_inputs(whole)
    (wanted,), (made,) = outputs(whole, given), outputs(ours, given)
    assert relative(made, wanted) <= 1e-2
    for _ in range(2):  # the second time, the first segment's weights are on their way already
        (again,) = outputs(turns, given)
        assert relative(again, made) <= 1e-3


MEMORY = ("resident", "sequential")


def late_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that take long to begin: nobody may compute before."""
    start = Copies.start

    def slow(self: Copies, *arguments: Any) -> None:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(20_000_000)
        start(self, *arguments)

    monkeypatch.setattr(Copies, "start", slow)


def late_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that take long to begin: nobody may copy over their weights before they are through."""
    await_ = Copies.await_

    def slow(self: Copies, side: int) -> None:
        await_(self, side)
        torch.cuda._sleep(20_000_000)

    monkeypatch.setattr(Copies, "await_", slow)


@pytest.mark.parametrize("late", [None, late_copies, late_computing])
def test_pictures_of_segments_in_turns_are_the_resident_ones(
    segmented: Path, late: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = draw(runtimes.load(segmented), "pt").clone()
    if late is not None:
        late(monkeypatch)
    ours = runtimes.load(segmented, memory="sequential")
    for _ in range(2):
        assert psnr(draw(ours, "pt"), resident) >= 50


def test_segments_in_turns_take_two_buffers_and_give_them_back(segmented: Path) -> None:
    gc.collect()
    before = gpu_upload.held_bytes()
    ours = runtimes.load(segmented, memory="sequential")
    there = ours.artifacts[0]
    latents = draw(ours, "latent")
    (turns,) = there._weights._turns.values()
    assert isinstance(turns._copies, Copies) and isinstance(turns, Turns)
    assert gpu_upload.held_bytes() <= before  # nothing was uploaded past torch
    assert all(host.data.is_pinned() for host in there._weights._host.values()) and there._weights._host
    file = there.manifest.files[there.manifest.components["unet"].weights]
    largest = max(span.size for span in turns._spans)
    assert there._weights.bytes == turns.bytes == 2 * largest < file.size
    freed = weakref.ref(turns.buffers[0])
    del turns
    ours.decode(latents)
    assert freed() is None and not there._weights._turns


def test_denoising_in_turns_takes_less_than_with_all_weights(segmented: Path) -> None:
    """By torch's own count, in which uploaded weights are not: these are added."""
    peaks = {}
    for mode in ("model-offload", "sequential"):
        gc.collect()
        torch.cuda.empty_cache()
        ours = runtimes.load(segmented, memory=mode)
        draw(ours, "latent")  # libraries take their workspaces
        gc.collect()
        before = torch.cuda.memory_allocated(DEVICE)
        there = ours.artifacts[0]
        weights = there._weights.bytes
        torch.cuda.reset_peak_memory_stats(DEVICE)
        engine = there.engine("unet", "cfg")
        outputs(engine, random_inputs(engine))
        peaks[mode] = weights + torch.cuda.max_memory_allocated(DEVICE) - before
        saved = there.manifest.files[there.manifest.components["unet"].weights].size - weights
        del ours, there, engine
    assert peaks["sequential"] <= peaks["model-offload"] - 0.9 * saved
