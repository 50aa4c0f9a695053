"""Artifacts that tests share. Each is built once a session, with the command line's own code.

``SDXL_TEST_ARTIFACTS`` names a store to keep them in between sessions.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from buildtool.store import interpreter, machine
from exporters import headers

# A runner that was started in the background ignores Ctrl-C, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
machine.share_cores()  # before torch is imported: CI's cores are shared

from tests import micro, standin_interpreter  # noqa: E402

Builder = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's store, which all of its workers share: the store's own lock lets one build and the others wait."""
    kept = os.environ.get("SDXL_TEST_ARTIFACTS")
    if kept:
        return Path(kept)
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"


@pytest.fixture(scope="session", autouse=True)
def precompiled_headers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The C++ headers that every build for the CPU precompiles, ten seconds of a core, are made once a session."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "headers"
        patch.setenv(headers.VARIABLE, str(folder))
        yield


@pytest.fixture(scope="session")
def sdxl_build(store_root: Path) -> Builder:
    """``sdxl-build BACKEND --gpu cpu …`` in a process of its own: what --json said of the one artifact."""

    def build(model: str, *options: str, root: Path = store_root, backend: str = "torch") -> dict[str, Any]:
        command = [sys.executable, "-m", "buildtool.cli", backend, "--gpu", "cpu", "--model", model, "--json"]
        done = subprocess.run([*command, "--artifacts", str(root), *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (built,) = json.loads(done.stdout)["artifacts"]
        return {**built, "path": Path(built["path"])}

    return build


@pytest.fixture(scope="session")
def build_guided(store_root: Path) -> Callable[..., Path]:
    """``sdxl-build torch`` in this process, without the variants that run without guidance: half of the UNet's work."""

    def build_it(model: Path, **asked: Any) -> Path:
        from buildtool.build import build
        from buildtool.plan import Spec, plan
        from buildtool.progress import Progress
        from exporters import sdxl

        rows = [dataclasses.replace(c, variants=c.variants[:1]) if c.name == "unet" else c for c in sdxl.COMPONENTS]
        with pytest.MonkeyPatch.context() as patch, Progress() as progress:
            patch.setattr(sdxl, "COMPONENTS", tuple(rows))
            (planned,) = plan(Spec("torch", model=str(model), gpu="cpu", artifacts=store_root, **asked))
            return build(planned, progress).path

    return build_it


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the micro model."""
    return micro.write(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture(scope="session")
def micro_artifact(sdxl_build: Builder, micro_model: Path) -> Path:
    """The micro model at 64x64, batch 1."""
    return sdxl_build(str(micro_model))["path"]


@pytest.fixture(scope="session")
def micro_wide_artifact(sdxl_build: Builder, micro_model: Path, micro_artifact: Path) -> Path:
    """The micro model at 96x64, batch 2: the tests of a second resolution and those of batches take one for both."""
    return sdxl_build(str(micro_model), "--resolution", "96x64", "--batch", "2")["path"]


@pytest.fixture(scope="session")
def micro_onnx_artifact(sdxl_build: Builder, micro_model: Path) -> Path:
    """The same with the onnx backend."""
    return sdxl_build(str(micro_model), backend="onnx")["path"]


@pytest.fixture(scope="session")
def micro_refiner_model(tmp_path_factory: pytest.TempPathFactory, micro_model: Path) -> Path:
    """A diffusers folder of a refiner of the micro model."""
    return micro.write_refiner(tmp_path_factory.mktemp("models") / "micro-refiner", micro_model)


@pytest.fixture(scope="session")
def micro_refiner_artifact(sdxl_build: Builder, micro_refiner_model: Path, micro_artifact: Path) -> Path:
    """The micro model's refiner at 64x64, batch 1. All but its UNet is the micro model's code and weights."""
    return sdxl_build(str(micro_refiner_model))["path"]


@pytest.fixture(scope="session")
def micro_spare_artifact(sdxl_build: Builder, micro_model: Path, micro_artifact: Path) -> Path:
    """The micro model with room for six new words; its text encoders alone are compiled, for half a minute of two
    cores: tests that want it look whether artifacts are kept between sessions."""
    return sdxl_build(str(micro_model), "--spare-tokens", "6")["path"]


@pytest.fixture(scope="session")
def standin_onediff(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python that OneDiff runs in, named in the environment: this one, with a stand-in OneDiff."""
    with pytest.MonkeyPatch.context() as patch:
        python = standin_interpreter.write(tmp_path_factory.mktemp("onediff"))
        patch.setenv(interpreter.VARIABLE, str(python))
        yield python


@pytest.fixture(scope="session")
def micro_standin_onediff_artifact(sdxl_build: Builder, micro_model: Path, standin_onediff: Path) -> Path:
    """The micro model with the onediff backend, compiled by a stand-in of nexfort."""
    return sdxl_build(str(micro_model), "--compiler", "nexfort", backend="onediff")["path"]


@pytest.fixture(scope="session")
def micro_encoder_artifact(sdxl_build: Builder, micro_model: Path, micro_artifact: Path) -> Path:
    """The micro model with the VAE's encoder."""
    return sdxl_build(str(micro_model), "--with-encoder")["path"]


@pytest.fixture(scope="session")
def micro_encoder_onnx_artifact(sdxl_build: Builder, micro_model: Path, micro_onnx_artifact: Path) -> Path:
    """The same with the onnx backend."""
    return sdxl_build(str(micro_model), "--with-encoder", backend="onnx")["path"]


@pytest.fixture(scope="session")
def tiny_trt_artifact(sdxl_build: Builder) -> Path:
    """tiny for three GPUs that needn't be here, by TensorRT-RTX, fp16."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'sdxl-build[trt]'")
    return sdxl_build("tiny", "--gpu", "sm86,sm89,sm120", backend="trt")["path"]


@pytest.fixture(scope="session")
def micro_trt_artifact(sdxl_build: Builder, micro_model: Path) -> Path:
    """The micro model for the GPU that is here, with the TensorRT that is, fp32."""
    if not machine.gpus():
        pytest.skip("there is no GPU to run TensorRT on")
    pytest.importorskip("onnx", reason="the trt backend is not installed: pip install 'sdxl-build[trt]'")
    from buildtool.plan import Spec, plan
    from buildtool.store.errors import SdxlError

    try:
        plan(Spec(backend="trt", model=str(micro_model)))
    except SdxlError as error:
        pytest.skip(f"TensorRT can't build for this machine's GPU: {error}")
    return sdxl_build(str(micro_model), "--gpu", "auto", "--precision", "fp32", backend="trt")["path"]


@pytest.fixture(scope="session")
def tiny_artifact(sdxl_build: Builder) -> Path:
    """tiny at its own 256x256, batch 1, fp32, on the CPU."""
    return sdxl_build("tiny")["path"]


@pytest.fixture(scope="session")
def tiny_encoder_artifact(sdxl_build: Builder, tiny_artifact: Path) -> Path:
    """tiny at 256x256 with the VAE's encoder."""
    return sdxl_build("tiny", "--with-encoder")["path"]
