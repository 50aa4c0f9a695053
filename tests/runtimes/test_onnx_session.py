"""What keeps an onnx artifact from running is told in one line (stand-in manifests and libraries)."""

import types
from pathlib import Path

import msgspec
import pytest
import torch

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from runtimes import onnx_session
from runtimes.onnx_session import OnnxSessionEngine, OnnxSessionLoader
from tests.runtimes.stand_in import stand_in_manifest

CPU = torch.device("cpu")


def naming(provider: str | None) -> Manifest:
    plain = stand_in_manifest()
    options = {"provider": provider} if provider else {}
    return msgspec.structs.replace(plain, key=msgspec.structs.replace(plain.key, backend="onnx", options=options))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    there = types.SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"], __version__="1.0")
    monkeypatch.setattr(onnx_session.importlib, "import_module", lambda name: there)


def test_a_provider_that_is_not_there_is_told_and_no_other_taken(library: None) -> None:
    with pytest.raises(SdxlError, match=r"runs on CUDAExecutionProvider; .* has: CPUExecutionProvider\. pip install"):
        OnnxSessionLoader().check_machine(Path("a"), naming("CUDAExecutionProvider"), CPU)
    OnnxSessionLoader().check_machine(Path("a"), naming("CPUExecutionProvider"), CPU)


@pytest.mark.parametrize("provider", [None, "NoSuchProvider"])
def test_an_unknown_provider_is_told(provider: str | None, library: None) -> None:
    with pytest.raises(SdxlError, match="names the provider"):
        OnnxSessionLoader().check_machine(Path("a"), naming(provider), CPU)


def test_a_missing_library_is_told_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name=name)

    monkeypatch.setattr(onnx_session.importlib, "import_module", absent)
    with pytest.raises(SdxlError, match=r"onnxruntime, which is not installed\. pip install 'sdxl-build\[onnx\]'"):
        OnnxSessionLoader().check_machine(Path("a"), naming("CPUExecutionProvider"), CPU)


def test_a_file_that_is_no_graph_is_told(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "unet.onnx").write_bytes(b"no graph")
    form = stand_in_manifest().components["unet"].variants["cfg"]
    with pytest.raises(SdxlError, match=r"can't load .*unet\.onnx"):
        OnnxSessionEngine(tmp_path / "unet.onnx", "unet.cfg", form, "CPUExecutionProvider", CPU)
