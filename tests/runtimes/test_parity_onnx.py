"""The onnx backend's pipeline against ``StableDiffusionXLPipeline`` on the same weights, on the CPU in fp32.

Bound: after 20 steps, latents differ by at most 1e-3 of their standard deviation (max abs).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from runtimes.pipeline import Pipeline
from tests.conftest import Builder
from tests.runtimes.test_parity import compare, difference, diffusers_pipeline, seeds

__all__ = ["diffusers_pipeline"]  # the fixture

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow
BOUND = 1e-3


@pytest.fixture(scope="module")
def tiny_onnx_artifact(sdxl_build: Builder) -> Path:
    return sdxl_build("tiny", backend="onnx")["path"]


@pytest.fixture(scope="module")
def ours(tiny_onnx_artifact: Path) -> Pipeline:
    return runtimes.load(tiny_onnx_artifact)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("prompt", ["a large red circle on the left", "wow! two blue squares, café"])
def test_latents_after_20_steps(ours: Pipeline, diffusers_pipeline: Any, prompt: str, guidance_scale: float) -> None:
    compare(
        ours,
        diffusers_pipeline,
        bound=BOUND,
        prompt=prompt,
        guidance_scale=guidance_scale,
        negative_prompt="green, striped",
    )


def test_outputs_that_the_next_call_overwrites_do_no_harm(ours: Pipeline, diffusers_pipeline: Any) -> None:
    """Engines return their own buffers: three prompts and pictures on batch 1 would show a missing copy."""
    prompts = ["a red circle", "two blue squares!", "a yellow star on grass"]
    call = {"prompt": prompts, "negative_prompt": ["green", "", "red"], "num_inference_steps": 3, "output_type": "pt"}
    mine, reference = (p(generator=seeds(5, 6, 7), **call).images for p in (ours, diffusers_pipeline))
    assert difference(mine, reference) <= BOUND
    assert float((mine[0] - mine[1]).abs().max()) > 0.1


def test_both_backends_make_the_same_latents(ours: Pipeline, tiny_artifact: Path) -> None:
    call = {"prompt": "a red circle", "num_inference_steps": 5, "output_type": "latent"}
    made = [p(generator=torch.Generator().manual_seed(1), **call).images for p in (ours, runtimes.load(tiny_artifact))]
    assert difference(*made) <= BOUND
