"""An artifact with spare rows in its word tables, without compiling: its text encoders run in eager mode."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from buildtool import models
from buildtool.store import manifest as manifests
from buildtool.store.manifest import FileEntry
from exporters import sdxl, weights
from exporters.base import StoredTensor
from runtimes.base import Engine
from runtimes.embedding_files import TABLE
from runtimes.memory import TEXT_ENCODERS
from runtimes.torch_package import TorchPackageLoader


def write(folder: Path, artifact: Path, model: Path, spare: int) -> Path:
    """A copy of the plain artifact of ``model`` with the weights files and the manifest of a build with spare rows."""
    shutil.copytree(artifact, folder)
    manifest, source = manifests.read(artifact), models.resolve(str(model))
    components, files = dict(manifest.components), dict(manifest.files)
    for name in TEXT_ENCODERS:
        described = components[name]
        table = described.tensors[TABLE]
        longer = msgspec.structs.replace(table, shape=(table.shape[0] + spare, table.shape[1]))
        components[name] = msgspec.structs.replace(described, tensors={**described.tensors, TABLE: longer})
        plan = {n: StoredTensor(t.shape, t.dtype, t.stride, t.sources) for n, t in components[name].tensors.items()}
        path = folder / described.weights
        path.unlink()  # a link into the store
        weights.write(path, plan, source.tensors(name))
        data = path.read_bytes()
        files[described.weights] = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    key = msgspec.structs.replace(manifest.key, options={**manifest.key.options, "spare_tokens": spare})
    made = msgspec.structs.replace(manifest, key=key, key_digest=key.digest, components=components, files=files)
    (folder / manifests.MANIFEST).unlink()
    (folder / manifests.MANIFEST).write_bytes(manifests.encode(made))
    return folder


class EagerText(Engine):
    """A text encoder's graph as the exporter makes it, on the artifact's tensors where they lie."""

    def __init__(self, name: str, variant: Any, tensors: Mapping[str, Tensor], config: Any, device: Any) -> None:
        super().__init__(name, variant, device)
        longer = {**config, "vocab_size": tensors[TABLE].shape[0]}
        self._graph = sdxl.component(name.partition(".")[0]).graph(longer, "cpu", torch.float32).module
        self._graph.load_state_dict(dict(tensors), assign=True)
        self.constants = tensors

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = self._graph(*inputs)
        return made


def run_in_eager_mode(patch: pytest.MonkeyPatch, folder: Path, model: Path) -> None:
    """The text encoders of one artifact of ``model``, until the patch is undone."""
    compiled, configs = TorchPackageLoader._engine, models.resolve(str(model)).configs

    def engine(self: Any, path: Any, name: str, component: Any, variant: Any, tensors: Any, *rest: Any) -> Engine:
        of = name.partition(".")[0]
        if of in TEXT_ENCODERS and path.parent == folder:
            return EagerText(name, variant, tensors, configs[of], rest[-1])
        return compiled(self, path, name, component, variant, tensors, *rest)

    patch.setattr(TorchPackageLoader, "_engine", engine)
