"""Runs the onnx backend's graphs with ONNX Runtime, on weights files that all its sessions map."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buildtool.store import machine
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Component, Manifest, TensorSpec, Variant
from runtimes.base import Engine, Loader, rebuild_hint

INSTALL = {
    "CPUExecutionProvider": "pip install 'sdxl-build[onnx]'",
    "CUDAExecutionProvider": "pip install onnxruntime-gpu",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu tensorrt",
    "NvTensorRTRTXExecutionProvider": "pip install onnxruntime-trt-rtx",
}
"""ONNX Runtime's names of what can run a graph -> the pip line for it."""

# ONNX's numbers of element types (onnx.TensorProto.DataType).
ELEMENTS = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


class OnnxSessionEngine(Engine):
    """A session whose outputs are its own buffers; inputs and outputs are bound by pointer, not copied.

    ONNX Runtime maps the weights file that the graph names. Giving it tensors instead
    (``SessionOptions.add_initializer``) would not do: what it rearranges when it loads, the
    convolutions' weights, it reads from the file all the same.
    """

    def __init__(
        self, path: Path, name: str, variant: Variant, provider: str, device: torch.device, tf32: bool = False
    ) -> None:
        super().__init__(name, variant, device)
        ort = _onnxruntime(provider)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        settings: dict[str, str] = {}
        unwanted: list[str] = []
        if device.type == "cuda":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")  # one slow node would be silent
            settings = _settings(provider, variant, device, tf32)
        else:
            # Packing and folding (of the transposed matrices) would copy most weights, once a session.
            options.add_session_config_entry("session.disable_prepacking", "1")
            unwanted.append("ConstantFolding")
        try:
            self._session = ort.InferenceSession(
                str(path),
                options,
                providers=[(provider, settings)],
                disabled_optimizers=unwanted,
                enable_fallback=0,  # it would try other providers, print that to stdout and raise their error
            )
        except Exception as error:  # its exceptions have no base of their own
            first = str(error).partition("\n")[0].rstrip(".")
            raise SdxlError(
                f"onnxruntime {ort.__version__} can't load {path}: {first}.", _advice(ort, provider)
            ) from error
        if self._session.get_providers()[0] != provider:
            raise SdxlError(
                f"{path} is to run on {provider}, which does not start here: onnxruntime {ort.__version__} fell back "
                f"to {self._session.get_providers()[0]}.",
                "See what is there: sdxl-build doctor",
            )
        self._binding = self._session.io_binding()
        self._results = [_buffer(spec, device) for spec in variant.outputs]
        for spec, tensor in zip(variant.outputs, self._results, strict=True):
            self._binding.bind_output(spec.name, *self._place(spec), tensor.data_ptr())

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        for spec, tensor in zip(self.inputs, inputs, strict=True):
            self._binding.bind_input(spec.name, *self._place(spec), tensor.data_ptr())
        if self.device.type == "cuda":  # it runs on a stream of its own, and returns when that is done
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(self._binding)
        return tuple(self._results)

    def _place(self, spec: TensorSpec) -> tuple[str, int, int, tuple[int, ...]]:
        return self.device.type, self.device.index or 0, ELEMENTS[spec.dtype], spec.shape


def _settings(provider: str, variant: Variant, device: torch.device, tf32: bool) -> dict[str, str]:
    """A provider's own options on a GPU; each refuses those of the others."""
    settings = {"device_id": str(device.index or 0)}
    if provider == "CUDAExecutionProvider":
        settings |= {"use_tf32": str(int(tf32)), "arena_extend_strategy": "kSameAsRequested"}
    if provider == "TensorrtExecutionProvider" and any(spec.dtype == "float16" for spec in variant.outputs):
        settings["trt_fp16_enable"] = "1"  # else it computes fp16 graphs in fp32
    return settings


def _buffer(spec: TensorSpec, device: torch.device) -> Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device=device)


def _advice(ort: Any, provider: str) -> str:
    """What to try where a graph doesn't load.

    The CUDA provider uses the CUDA libraries that torch has loaded; with others than those it was built for it
    doesn't start, and then every node is left to the CPU.
    """
    wanted, there = str(getattr(ort, "cuda_version", "") or ""), str(torch.version.cuda or "")
    if provider == "CUDAExecutionProvider" and wanted.partition(".")[0] != there.partition(".")[0]:
        return (
            f"It was built for CUDA {wanted or 'none'}, torch for CUDA {there or 'none'}: install the two for one CUDA."
        )
    return "If it is older than the graph's operators: pip install -U onnxruntime" + (
        "-gpu" if provider == "CUDAExecutionProvider" else ""
    )


def _onnxruntime(provider: str) -> Any:
    """The library.

    Raises:
        SdxlError: it isn't installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        raise SdxlError(
            "The artifact runs with onnxruntime, which is not installed.", INSTALL.get(provider, "")
        ) from None


class OnnxSessionLoader(Loader):
    """Any ONNX Runtime that knows a graph's operators runs it, whatever versions built it."""

    name = "onnx_session"

    def check_machine(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        provider = _provider(folder, manifest)
        there = _onnxruntime(provider).get_available_providers()
        if provider not in there:
            version = ", ".join(f"{n} {v}" for n, v in machine.versions("onnxruntime", "onnxruntime-gpu").items())
            raise SdxlError(
                f"{folder} runs on {provider}; {version or 'the onnxruntime'} here has: {', '.join(there)}.",
                INSTALL[provider],
            )

    def _engine(
        self,
        path: Path,
        name: str,
        component: Component,
        variant: Variant,
        weights: Mapping[str, Tensor],
        options: Mapping[str, Any],
        device: torch.device,
    ) -> Engine:
        return OnnxSessionEngine(path, name, variant, options["provider"], device, bool(options.get("tf32", False)))


def _provider(folder: Path, manifest: Manifest) -> str:
    provider = manifest.key.options.get("provider")
    if provider not in INSTALL:
        raise SdxlError(
            f"{folder} names the provider {provider!r}; this installation knows: {', '.join(INSTALL)}.",
            rebuild_hint(manifest),
        )
    return str(provider)
