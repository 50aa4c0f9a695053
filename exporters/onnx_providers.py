"""ONNX Runtime's execution providers that an onnx artifact can be built for. Imports nothing heavy."""

import importlib
from dataclasses import dataclass

from exporters.base import ExportError


@dataclass(frozen=True)
class Provider:
    """One of them.

    Args:
        title: ONNX Runtime's name of it, which the manifest has.
        device: torch's name of the kind of device that it runs on.
        install: the pip line for an ONNX Runtime that has it.
    """

    title: str
    device: str
    install: str


PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", "cpu", "pip install 'sdxl-build[onnx]'"),
    "cuda": Provider("CUDAExecutionProvider", "cuda", "pip install onnxruntime-gpu"),
    "tensorrt": Provider("TensorrtExecutionProvider", "cuda", "pip install onnxruntime-gpu tensorrt"),
    "nv-tensorrt-rtx": Provider("NvTensorRTRTXExecutionProvider", "cuda", "pip install onnxruntime-trt-rtx"),
}
"""``--provider`` -> what it names."""


def choose(asked: str, device: str) -> str:
    """ONNX Runtime's name of the provider asked for.

    Args:
        asked: a key of :data:`PROVIDERS`.
        device: ``cpu`` or ``cuda``.

    Raises:
        ExportError: it runs on another kind of device.
    """
    provider = PROVIDERS[asked]
    if provider.device == device:
        return provider.title
    fitting = ", ".join(name for name, each in PROVIDERS.items() if each.device == device)
    if device == "cpu":
        raise ExportError(
            f"--provider {asked} runs on a GPU, and the artifact is for a CPU.",
            f"For a CPU there is: {fitting}. For this machine's GPU: --gpu auto",
        )
    raise ExportError(
        f"--provider {asked} runs on a CPU, and the artifact is for a GPU.",
        f"For a GPU there are: {fitting}. For a CPU: --gpu cpu",
    )


def check_installed(title: str) -> None:
    """Refuses a provider that the installed ONNX Runtime lacks: what was built couldn't be checked here.

    Raises:
        ExportError: it isn't there, or ONNX Runtime isn't.
    """
    row = next((each for each in PROVIDERS.values() if each.title == title), PROVIDERS["cpu"])
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError:
        raise ExportError(
            "The onnx backend checks what it builds with onnxruntime, which is not installed.", row.install
        ) from None
    there = ort.get_available_providers()
    if row.title not in there:
        raise ExportError(
            f"{row.title} was asked for, and onnxruntime {ort.__version__} here has: {', '.join(there)}.", row.install
        )
