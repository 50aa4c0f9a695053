"""Loaders by the name that manifests use, imported when asked for. One line a backend."""

import importlib

from buildtool.store.errors import SdxlError
from runtimes.base import Loader

LOADERS = {
    "onediff_graph": "runtimes.onediff_graph:OnediffGraphLoader",
    "onnx_session": "runtimes.onnx_session:OnnxSessionLoader",
    "torch_package": "runtimes.torch_package:TorchPackageLoader",
    "trt_engine": "runtimes.trt_engine:TrtEngineLoader",
}


def loader(name: str) -> Loader:
    """The loader that a manifest names.

    Raises:
        SdxlError: this installation has none of that name.
    """
    if name not in LOADERS:
        raise SdxlError(
            f"The artifact needs the loader {name!r}; this installation has: {', '.join(LOADERS)}.",
            "Update it: pip install -U sdxl-build",
        )
    module, _, cls = LOADERS[name].partition(":")
    made: Loader = getattr(importlib.import_module(module), cls)()
    return made
