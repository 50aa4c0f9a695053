"""What keeps an onnx artifact from running is told in one line (stand-in manifests and libraries)."""

import types
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest, TensorSpec
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


def test_a_file_that_is_no_graph_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "unet.onnx").write_bytes(b"no graph")
    form = stand_in_manifest().components["unet"].variants["cfg"]
    with pytest.raises(SdxlError, match=r"can't load .*unet\.onnx"):
        OnnxSessionEngine(tmp_path / "unet.onnx", "unet.cfg", form, "CPUExecutionProvider", CPU)
    assert capsys.readouterr().out == ""  # stdout is for paths


def test_each_provider_is_given_its_own_settings() -> None:
    """Another's are refused by ONNX Runtime. None of these was run but the CUDA provider's."""
    form = stand_in_manifest().components["unet"].variants["cfg"]
    single, half = (
        msgspec.structs.replace(form, outputs=(TensorSpec(name="x", shape=(1,), dtype=dtype, stride=(1,)),))
        for dtype in ("float32", "float16")
    )
    gpu = torch.device("cuda:1")
    assert onnx_session._settings("NvTensorRTRTXExecutionProvider", half, gpu, tf32=True) == {"device_id": "1"}
    assert onnx_session._settings("TensorrtExecutionProvider", single, gpu, tf32=True) == {"device_id": "1"}
    fp16 = onnx_session._settings("TensorrtExecutionProvider", half, gpu, tf32=False)
    assert fp16 == {"device_id": "1", "trt_fp16_enable": "1"}


@pytest.mark.parametrize(
    ("torchs", "told"),
    [
        ("13.0", r"only the CPU. It was built for CUDA 12\.8, torch for CUDA 13\.0: install the two for one CUDA\."),
        (None, r"only the CPU. It was built for CUDA 12\.8, torch for CUDA none: install the two for one CUDA\."),
        ("12.6", r"only the CPU. If it is older than the graph's operators: pip install -U onnxruntime-gpu"),
    ],
)
def test_cuda_libraries_that_are_not_the_providers_are_told(
    torchs: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Options:
        def add_session_config_entry(self, name: str, value: str) -> None:
            asked[name] = value

    def session(path: str, options: Options, **words: Any) -> None:
        asked.update(words)
        raise RuntimeError("nodes are assigned to the default CPU EP; only the CPU.")

    stand_in = types.SimpleNamespace(
        SessionOptions=Options, InferenceSession=session, __version__="1.0", cuda_version="12.8"
    )
    monkeypatch.setattr(onnx_session.importlib, "import_module", lambda name: stand_in)
    monkeypatch.setattr(torch.version, "cuda", torchs)
    form = stand_in_manifest().components["unet"].variants["cfg"]
    with pytest.raises(SdxlError, match=told):
        OnnxSessionEngine(tmp_path / "unet.onnx", "unet.cfg", form, "CUDAExecutionProvider", torch.device("cuda:1"))
    assert asked["enable_fallback"] == 0 and asked["session.disable_cpu_ep_fallback"] == "1"
    assert asked["providers"] == [
        ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"})
    ]
