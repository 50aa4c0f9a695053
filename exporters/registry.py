"""Backends by name. One row a backend; its module is imported when it is asked to export."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from exporters.base import Exporter, ExportError
from exporters.trt_flavor import FLAVORS, Flavor

PRECISIONS = ("fp32", "fp16", "bf16")
FP8_TARGETS = ("sm89", "sm90", "sm100", "sm103", "sm120", "sm121")
"""GPUs that multiply in fp8."""


@dataclass(frozen=True)
class Backend:
    """What has to be known of a backend before (and on a cache hit: without) importing its exporter.

    Args:
        exporter: ``module:class``.
        loader: the runtimes' registry name of what loads its files.
        distributions: packages whose versions shape the code and so belong in its key.
        version: raised when the exporter writes other code for the same request.
        tunes: whether the code is tuned for the exact GPU, whose name then belongs in the key.
        install: the pip line for what it needs.
        options: device kind -> what the artifact's key says of how it is run there.
        precisions: what it can compute in, on a GPU.
        on_gpu: packages that it needs besides, for a GPU; they are in the key too.
        weighted: whether compiled code holds the weights, whose digest then belongs in its key.
        targets: what it builds for on any machine; empty: only for what is present.
        one_of: packages that bring the same library under several names; one is needed, and is in the key.
        flavors: libraries that it can build with, by name; :meth:`flavored` gives the row of one.
        provider: what runs it, where that isn't what its options say by themselves (:meth:`provided`).
        apart: whether it compiles in an interpreter of its own, whose versions then belong in the key.
        forks: whether its compilers are forked from a process that has imported what they need: tried on a GPU.
    """

    exporter: str
    loader: str
    distributions: tuple[str, ...]
    version: int
    tunes: bool
    install: str
    options: Mapping[str, Mapping[str, Any]]
    precisions: tuple[str, ...] = PRECISIONS
    on_gpu: tuple[str, ...] = ()
    weighted: bool = False
    targets: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    flavors: Mapping[str, Flavor] = field(default_factory=dict)
    provider: str = ""
    apart: bool = False
    forks: bool = False

    def flavored(self, name: str) -> "Backend":
        """The row of one of its flavors."""
        flavor = self.flavors[name]
        return replace(
            self,
            one_of=flavor.distributions,
            tunes=not flavor.targets,
            targets=flavor.targets,
            install=flavor.install,
            options={kind: {**options, "flavor": name} for kind, options in self.options.items()},
        )

    def provided(self, device: str, provider: str) -> "Backend":
        """The row for another of ONNX Runtime's execution providers; itself for the one that it has anyway."""
        options = self.options[device]
        if options["provider"] == provider:
            return self
        return replace(self, provider=provider, options={device: {**options, "provider": provider}})


BACKENDS = {
    "torch": Backend(
        exporter="exporters.torch_package:TorchExporter",
        loader="torch_package",
        distributions=("diffusers",),
        version=7,
        tunes=True,
        install="pip install sdxl-build",
        options={"cuda": {"tf32": True}},
        precisions=(*PRECISIONS, "fp8"),
        on_gpu=("triton",),
        forks=True,
    ),
    "onnx": Backend(
        exporter="exporters.onnx_graph:OnnxExporter",
        loader="onnx_session",
        distributions=("diffusers", "onnx", "onnxscript", "onnx-ir", "onnx-graphsurgeon"),
        version=3,
        tunes=False,
        install="pip install 'sdxl-build[onnx]'",
        options={
            "cpu": {"provider": "CPUExecutionProvider"},
            "cuda": {"provider": "CUDAExecutionProvider", "tf32": True},
        },
    ),
    "trt": Backend(
        exporter="exporters.trt_engine:TrtExporter",
        loader="trt_engine",
        distributions=("diffusers", "onnx", "onnxscript", "onnx-ir", "onnx-graphsurgeon"),
        version=2,
        tunes=False,
        install="pip install 'sdxl-build[trt]'",
        options={"cuda": {"tf32": True}},
        weighted=True,
        flavors=FLAVORS,
    ),
    "onediff": Backend(
        exporter="exporters.onediff_graph:OnediffExporter",
        loader="onediff_graph",
        distributions=("diffusers",),
        version=1,
        tunes=True,
        install="pip install sdxl-build",
        options={"cuda": {"mode": "cudagraphs:max-autotune:cache-all"}, "cpu": {"mode": "cache-all"}},
        apart=True,
    ),
}


def backend(name: str) -> Backend:
    """The row of a backend.

    Raises:
        ExportError: there is none of that name.
    """
    if name not in BACKENDS:
        raise ExportError(f"There is no backend {name!r}.", f"There are: {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def exporter(name: str) -> Exporter:
    """The exporter of a backend.

    Raises:
        ExportError: no such backend, or a library that it needs is missing.
    """
    row = backend(name)
    module, _, cls = row.exporter.partition(":")
    try:
        made: Exporter = getattr(importlib.import_module(module), cls)()
    except ImportError as error:
        raise ExportError(f"The backend {name} needs {error.name}, which is not installed.", row.install) from None
    return made
