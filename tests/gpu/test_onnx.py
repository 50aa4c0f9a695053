"""The onnx backend on the GPU, by ONNX Runtime's CUDA provider. Written for it, not run yet."""

from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from buildtool.store import manifest as manifests
from tests.conftest import Builder
from tests.gpu.helpers import psnr

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def onnx_artifact(request: pytest.FixtureRequest, sdxl_build: Builder) -> Path:
    """tiny for this GPU; a node without a CUDA kernel, or numbers that are off, fail the build."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider here: pip install onnxruntime-gpu")
    return sdxl_build("tiny", "--gpu", "auto", "--precision", request.param, backend="onnx")["path"]


def test_every_variant_passed_its_check_on_the_cuda_provider(onnx_artifact: Path) -> None:
    manifest = manifests.read(onnx_artifact)
    assert manifest.key.options["provider"] == "CUDAExecutionProvider"
    checks = [variant.check for c in manifest.components.values() for variant in c.variants.values()]
    assert len(checks) == 5 and {check.status for check in checks} == {"passed"}


def test_it_makes_the_picture_that_the_torch_backend_makes(onnx_artifact: Path, artifacts: dict[str, Path]) -> None:
    precision = manifests.read(onnx_artifact).key.precision

    def picture(path: Path) -> Any:
        generator = torch.Generator().manual_seed(1)
        made = runtimes.load(path)("a red circle", num_inference_steps=10, generator=generator, output_type="pt")
        return made.images

    found = psnr(picture(onnx_artifact), picture(artifacts[precision]))
    print(f"{precision}: {found:.1f} dB")
    assert found > (30 if precision == "fp16" else 50)
