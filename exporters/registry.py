"""Backends by name. One row a backend; its module is imported when it is asked to export."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporters.base import Exporter, ExportError


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
    """

    exporter: str
    loader: str
    distributions: tuple[str, ...]
    version: int
    tunes: bool
    install: str
    options: Mapping[str, Mapping[str, Any]]


BACKENDS = {
    "torch": Backend(
        exporter="exporters.torch_package:TorchExporter",
        loader="torch_package",
        distributions=("diffusers",),
        version=2,
        tunes=True,
        install="pip install sdxl-build",
        options={"cuda": {"tf32": True}},
    ),
    "onnx": Backend(
        exporter="exporters.onnx_graph:OnnxExporter",
        loader="onnx_session",
        distributions=("diffusers", "onnx", "onnxscript", "onnx-ir", "onnx-graphsurgeon"),
        version=1,
        tunes=False,
        install="pip install 'sdxl-build[onnx]'",
        options={"cpu": {"provider": "CPUExecutionProvider"}},
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
