"""An engine of TensorRT for a range of sizes. Written for a GPU that it supports, not run yet."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import runtimes
from runtimes.pipeline import Pipeline
from tests.conftest import Builder
from tests.gpu.helpers import relative

pytestmark = pytest.mark.gpu


def latents(pipeline: Pipeline, width: int, height: int) -> Tensor:
    made = pipeline(
        "a red circle",
        width=width,
        height=height,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    )
    found: Tensor = made.images
    return found.clone()


def test_a_range_gives_what_an_engine_of_each_size_gives(
    micro_trt_artifact: Path, micro_model: Path, sdxl_build: Builder
) -> None:
    """64x64 beside the fixed engine; another size and back, on one load."""
    words = ("--gpu", "auto", "--precision", "fp32", "--dynamic", "64x64..128x128", "--resolution", "96x96")
    ranged = runtimes.load(sdxl_build(str(micro_model), *words, backend="trt")["path"])
    fixed = latents(runtimes.load(micro_trt_artifact), 64, 64)
    first = latents(ranged, 64, 64)
    assert relative(first, fixed) < 1e-2
    assert latents(ranged, 112, 80).shape[-2:] == (10, 14)
    assert torch.equal(latents(ranged, 64, 64), first)
