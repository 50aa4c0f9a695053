"""Artifacts with DeepCache and FreeU against diffusers, where the same schedule is done by hooks on its modules.

Bound: latents differ by at most 1e-3 of their standard deviation (max abs).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import runtimes
from buildtool.store.errors import SdxlError
from runtimes import deepcache
from runtimes.pipeline import Pipeline
from tests.conftest import Builder
from tests.runtimes.stand_in import stand_in_manifest
from tests.runtimes.test_parity import difference, seeds

BOUND = 1e-3
FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}


class Steps:
    """DeepCache as its authors' package does it: every module of a UNet remembers what it gave, and those below the
    branch give that again in the steps between.

    Places are those of the package: the block (0 the outermost, down or up) and the layer in it.
    """

    def __init__(self, unet: Any, interval: int, branch: int) -> None:
        self.interval, self.step = interval, -1
        self.block, self.layer = divmod(branch, unet.config.layers_per_block + 1)
        self.saved: list[tuple[nn.Module, Any]] = []
        for i, block in enumerate(unet.down_blocks):
            for modules in (block.resnets, getattr(block, "attentions", ())):
                for j, module in enumerate(modules):
                    self.remember(module, i > self.block or (i == self.block and j >= self.layer))
            for module in block.downsamplers or ():
                self.remember(module, i >= self.block)
        self.remember(unet.mid_block, True)
        for i, block in enumerate(reversed(unet.up_blocks)):
            for modules in (block.resnets, getattr(block, "attentions", ())):
                for j, module in enumerate(reversed(modules)):
                    self.remember(module, i > self.block or (i == self.block and j > self.layer))
            for module in block.upsamplers or ():
                self.remember(module, i > self.block)
        forward = unet.forward
        self.saved.append((unet, forward))

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return forward(*args, **kwargs)

        unet.forward = counted

    def remember(self, module: nn.Module, deep: bool) -> None:
        forward = module.forward
        self.saved.append((module, forward))
        given: list[Any] = []

        def remembered(*args: Any, **kwargs: Any) -> Any:
            if not deep or self.step % self.interval == 0:
                given[:] = [forward(*args, **kwargs)]
            # A copy, because FreeU scales what it is given in place.
            return given[0].clone() if isinstance(given[0], torch.Tensor) else given[0]

        module.forward = remembered  # type: ignore[method-assign]


@contextmanager
def deepcached(pipeline: Any, interval: int, branch: int) -> Iterator[None]:
    steps = Steps(pipeline.unet, interval, branch)
    try:
        yield
    finally:
        for module, forward in steps.saved:
            module.forward = forward  # type: ignore[method-assign]


def diffusers_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def micro_cached(sdxl_build: Builder, micro_model: Path, micro_onnx_artifact: Path) -> Pipeline:
    """The micro model with DeepCache and FreeU, by the backend that is quick to build."""
    options = ("--deepcache", "3:1", "--freeu", ",".join(map(str, FREEU.values())))
    return runtimes.load(sdxl_build(str(micro_model), *options, backend="onnx")["path"])


@pytest.mark.parametrize(("guidance_scale", "count"), [(5.0, 1), (1.0, 2)])
def test_latents_are_those_of_the_same_schedule_in_diffusers(
    micro_cached: Pipeline, micro_model: Path, guidance_scale: float, count: int
) -> None:
    """Two pictures on batch 1: each chunk has a feature of its own."""
    call: dict[str, Any] = {"prompt": ["a red circle", "two blue squares"][:count], "guidance_scale": guidance_scale}
    call |= {"num_inference_steps": 8, "output_type": "latent"}
    theirs = diffusers_pipeline(micro_model)
    theirs.enable_freeu(**FREEU)
    plain = theirs(generator=seeds(1, 2)[:count], **call).images
    with deepcached(theirs, interval=3, branch=1):
        reference = theirs(generator=seeds(1, 2)[:count], **call).images
    made = micro_cached(generator=seeds(1, 2)[:count], **call).images
    assert difference(made, reference) <= BOUND
    assert difference(plain, reference) > 10 * BOUND
    assert micro_cached.unet_steps == {"full": 3, "shallow": 5}
    without = diffusers_pipeline(micro_model)
    with deepcached(without, interval=3, branch=1):
        assert difference(without(generator=seeds(1, 2)[:count], **call).images, reference) > 10 * BOUND


def test_a_run_begins_with_the_whole_unet(micro_cached: Pipeline) -> None:
    """What an earlier run left doesn't matter."""
    call: dict[str, Any] = {"prompt": "a", "num_inference_steps": 4, "output_type": "latent"}
    first = micro_cached(generator=seeds(1), **call).images
    micro_cached(**{**call, "prompt": "b", "num_inference_steps": 2})
    assert torch.equal(micro_cached(generator=seeds(1), **call).images, first)


def test_variants_share_one_file_of_weights(micro_cached: Pipeline) -> None:
    artifact = micro_cached.artifacts[0]
    unet = artifact.manifest.components["unet"]
    assert unet.variants.keys() == {"cfg", "nocfg", "cfg_shallow", "nocfg_shallow"}
    weights = [file for file in artifact.manifest.files if file.startswith("weights/unet")]
    assert weights == [unet.weights]
    assert set(unet.variants["cfg_shallow"].constants) < set(unet.variants["cfg"].constants)
    outputs = {name: [spec.name for spec in variant.outputs] for name, variant in unet.variants.items()}
    assert outputs["cfg"] == ["noise_pred", "feature"] and outputs["cfg_shallow"] == ["noise_pred"]


def test_guidance_that_ends_within_the_run_is_refused_before_work_starts(micro_cached: Pipeline) -> None:
    calls = micro_cached.artifacts[0].engine("text_encoder").calls
    with pytest.raises(SdxlError, match=r"--guidance-until 0\.5 can't be had with DeepCache") as caught:
        micro_cached("a", guidance_until=0.5)
    assert "--deepcache" not in caught.value.hint and "--freeu 0.9,0.2,1.3,1.4" in caught.value.hint
    assert micro_cached.artifacts[0].engine("text_encoder").calls == calls
    micro_cached("a", guidance_scale=1.0, guidance_until=0.5, num_inference_steps=1, output_type="latent")


def test_a_diffusers_pipeline_is_refused(micro_cached: Pipeline, micro_model: Path) -> None:
    from runtimes import diffusers_bridge

    with pytest.raises(SdxlError, match="built with DeepCache"):
        diffusers_bridge.attach(diffusers_pipeline(micro_model), micro_cached.artifacts[0].folder)


def test_an_artifact_without_it_runs_the_whole_unet_in_every_step(micro_onnx_artifact: Path) -> None:
    assert deepcache.interval(stand_in_manifest()) == 1
    deepcache.check(stand_in_manifest(), guidance_until=0.5)
    pipeline = runtimes.load(micro_onnx_artifact)
    pipeline("a", num_inference_steps=4, guidance_until=0.5, output_type="latent")
    assert pipeline.unet_steps == {"full": 4, "shallow": 0}


@pytest.mark.slow
def test_by_the_torch_backend(build_guided: Callable[..., Path], micro_model: Path, micro_artifact: Path) -> None:
    """The innermost cut of the model, with FreeU; cuts at every place are compared in tests/exporters."""
    built = build_guided(micro_model, deepcache="2:3", freeu=",".join(map(str, FREEU.values())))
    ours, theirs = runtimes.load(built), diffusers_pipeline(micro_model)
    call: dict[str, Any] = {"prompt": "a large red circle on the left", "num_inference_steps": 20}
    call |= {"output_type": "latent", "negative_prompt": "green, striped"}
    theirs.enable_freeu(**FREEU)
    with deepcached(theirs, interval=2, branch=3):
        reference = theirs(generator=seeds(1), **call).images
    assert difference(ours(generator=seeds(1), **call).images, reference) <= BOUND
    assert ours.unet_steps == {"full": 10, "shallow": 10}
