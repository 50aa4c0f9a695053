"""A stand-in for ``onediff.infer_compiler`` of onediff 1.2.0: compiles nothing, and keeps files as the compilers do.

Matched with the real source: ``compile(torch_module, *, backend, options)`` is that of onediff's
src/onediff/infer_compiler/backends/compiler.py; the module that it gives wraps the one that it was given, as
backends/nexfort/deployable_module.py does. The cache file, ``compiledgraph/<hash>/entry`` below
``$TORCHINDUCTOR_CACHE_DIR`` where ``NEXFORT_GRAPH_CACHE`` is 1, is what nexfort 0.1.dev330 was seen to write on a CPU.
``save_graph`` and ``load_graph`` have the arguments of backends/oneflow/deployable_module.py.
"""

import hashlib
import os
from pathlib import Path

import torch


class StandInModule(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        object.__setattr__(self, "_torch_module", module)

    def forward(self, *args, **kwargs):
        if os.environ["NEXFORT_GRAPH_CACHE"] == "1":
            self._cache([args, kwargs])
        return self._torch_module(*args, **kwargs)

    def _cache(self, inputs):
        shapes = [tuple(leaf.shape) for leaf in torch.utils._pytree.tree_leaves(inputs) if hasattr(leaf, "shape")]
        parameters = [(name, tuple(p.shape)) for name, p in self._torch_module.named_parameters()]
        digest = hashlib.sha256(repr((shapes, parameters)).encode()).hexdigest()
        entry = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "compiledgraph" / digest / "entry"
        if not entry.exists():
            entry.parent.mkdir(parents=True)
            entry.write_text("stand-in")

    def __getattr__(self, name):
        return getattr(self._torch_module, name)


def compile(torch_module, *, backend="oneflow", options=None):
    assert backend == "nexfort" and set(options) == {"mode", "dynamic"}
    assert os.environ["NEXFORT_ENABLE_TRITON_AUTOTUNE_CACHE"] == "0"  # its authors' word to who has no licence
    return StandInModule(torch_module)


class StandInGraph(StandInModule):
    loaded = False

    def forward(self, *args, **kwargs):
        return self._torch_module(*args, **kwargs)

    def save_graph(self, file_path, *, process_state_dict=lambda x: x):
        Path(file_path).write_text("stand-in graph")

    def load_graph(self, file_path, device=None, run_warmup=True, *, state_dict=None):
        assert Path(file_path).read_text() == "stand-in graph"
        object.__setattr__(self, "loaded", True)


def oneflow_compile(torch_module, *, options=None):
    return StandInGraph(torch_module)
