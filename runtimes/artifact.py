"""An artifact's folder, opened: its manifest, and its engines as they are asked for."""

import copy
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buildtool.store import machine
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from buildtool.store.store import missing_files
from runtimes import gpu_upload, memory, registry, sizes
from runtimes.base import Engine, Size, rebuild_hint
from runtimes.cuda_graph import GraphPool
from runtimes.gpu_upload import Uploads
from runtimes.weights import Weights

_SLACK = 1.25
"""Of a block that the tensors of a call lie in one after another, for the holes between them."""

Engines = dict[tuple[str, ...], Engine]
"""Loaded engines by their inputs' shapes and the digests of code and weights: artifacts of several resolutions share
them."""


class Artifact:
    """One artifact on one device.

    Args:
        folder: the artifact's folder.
        manifest: its manifest, already read.
        device: where its engines run.
        weights, engines: shared with the other artifacts of a pipeline.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, device: torch.device, weights: Weights, engines: Engines
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.device = device
        self._weights = weights
        self._engines = engines
        self.family = frozenset(entry.sha256 for entry in manifest.files.values())
        """Digests of the files of all artifacts of its pipeline, which says so."""
        self._origin: Artifact | None = None
        problems = missing_files(folder, manifest)
        if problems:
            raise SdxlError(problems[0], rebuild_hint(manifest))
        for name in {component.loader for component in manifest.components.values()}:
            registry.loader(name).check_machine(folder, manifest, device)

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return self.manifest.key.width, self.manifest.key.height

    def resized(self, size: Size) -> "Artifact":
        """The same artifact for another (width, height) that it makes; weights and engines are shared."""
        made = copy.copy(self)
        made.manifest, made._origin = sizes.resized(self.manifest, size), self
        return made

    @property
    def batch(self) -> int:
        return self.manifest.key.batch

    def engine(self, component: str, variant: str = "main") -> Engine:
        """A loaded variant. One whose check was deferred to this machine is checked first.

        Raises:
            SdxlError: a file is missing or changed, or the check fails.
        """
        described = self.manifest.components[component]
        form = described.variants[variant]
        files = [*form.files, described.weights] if described.weights else form.files
        shapes = str([spec.shape for spec in form.inputs])  # one file may serve several sizes
        digests = (component, variant, shapes, *(self.manifest.files[f].sha256 for f in files))
        if digests not in self._engines:
            made = self.unchecked_engine(component, variant)
            if form.check.status == "deferred" and self._origin is not None:
                self._origin.engine(component, variant)  # golden tensors are of its size
            elif form.check.status == "deferred":
                from runtimes import check

                check.ensure(self, component, variant, made)
            self._engines[digests] = made
        return self._engines[digests]

    def unchecked_engine(self, component: str, variant: str) -> Engine:
        """A variant loaded anew, whatever its check says; for checking it."""
        loader = registry.loader(self.manifest.components[component].loader)
        return loader.engine(self.folder, self.manifest, component, variant, self.device, self._weights)

    def free(self, keep: Collection[str]) -> bool:
        """Lets go of all engines and weights but those of the components to keep, for every artifact that shares them.

        Another model's, which may be beside these, are kept where they are made of the same files.

        Returns:
            Whether there were any.
        """
        own = {digests for digests in self._engines if digests[0] in keep and self.family.issuperset(digests[3:])}
        others = self._engines.keys() - own
        for digests in others:
            del self._engines[digests]
        kept = {digest for digests in self._engines for digest in digests[3:]}
        return self._weights.free(kept) or bool(others)

    def tensors(self, component: str) -> dict[str, Tensor]:
        """A component's stored tensors by name: those that its engines read."""
        return self._weights.tensors(self.folder, self.manifest, component)

    def restore(self, component: str, names: Collection[str]) -> None:
        """Gives stored tensors that were changed the bits of the artifact's file again.

        Raises:
            SdxlError: it can't be read any more.
        """
        self._weights.restore(self.folder, self.manifest, component, names)

    def holds(self, component: str) -> bool:
        """Whether a component's weights are in memory."""
        return self._weights.holds(self.manifest.files[self.manifest.components[component].weights].sha256)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the artifact, such as ``scheduler.json``."""
        import json

        try:
            parsed: dict[str, Any] = json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            raise SdxlError(f"{self.folder} lacks the file {name}.", "Check it: sdxl-build verify") from None
        except ValueError:
            raise SdxlError(f"{self.folder / name} is no JSON.", "Check it: sdxl-build verify") from None
        return parsed


def device_for(manifest: Manifest, asked: str | torch.device | None) -> torch.device:
    """The device that an artifact runs on: its target's, or the one asked for if it is of that kind.

    Raises:
        SdxlError: the artifact is for a GPU and torch sees none, or for another kind of device.
    """
    kind = "cpu" if manifest.key.target.startswith("cpu") else "cuda"
    device = torch.device(asked) if asked is not None else torch.device(kind)
    if device.type != kind:
        raise SdxlError(f"The artifact was built for {manifest.key.target}; it can't run on {device}.")
    if kind == "cuda":
        if not machine.gpus():
            raise SdxlError(
                f"The artifact was built for {manifest.key.target}, and there is no GPU here.",
                "See what is there: sdxl-build doctor",
            )
        index = device.index if device.index is not None else torch.cuda.current_device()
        machine.require_gpu(index)
        device = torch.device("cuda", index)
    return device


def open_all(
    paths: list[str | os.PathLike[str]],
    device: str | torch.device | None,
    uploads: Uploads | None = None,
    mode: str = memory.RESIDENT,
) -> list[Artifact]:
    """Opens artifacts of the same model that differ in resolution, on one device.

    Args:
        uploads: their weights, where somebody began to upload them already.
        mode: one of ``runtimes.memory.MODES``.

    Raises:
        SdxlError: a folder is no artifact, can't run here, or doesn't belong to the others.
    """
    if not paths:
        raise SdxlError("No artifact was named.", "List what is there with: sdxl-build ls")
    read = [(Path(path), manifests.read(path)) for path in paths]
    memory.check(mode, [manifest for _, manifest in read])
    where = device_for(read[0][1], device)
    first = read[0][1].key
    taken: dict[Size, Path] = {}
    for path, manifest in read:
        key = manifest.key
        if (key.tokenizers, key.configs["scheduler"]) != (first.tokenizers, first.configs["scheduler"]):
            raise SdxlError(f"{path} and {read[0][0]} are of different models; load them one at a time.")
        if (key.width, key.height) in taken:
            raise SdxlError(f"{path} and {taken[key.width, key.height]} both make {key.width}x{key.height}.")
        taken[key.width, key.height] = path
    weights = Weights(where, offload=mode in memory.OFFLOADING, sequential=mode == memory.SEQUENTIAL)
    engines = Engines()
    opened = [Artifact(path, manifest, where, weights, engines) for path, manifest in read]
    if where.type == "cuda" and mode == memory.RESIDENT:
        variants = [v for _, manifest in read for c in manifest.components.values() for v in c.variants.values()]
        GraphPool.want(where, int(_SLACK * max(variant.activation_bytes for variant in variants)))
    # Once nothing is left to refuse: the weights come in while engines are opened and prompts encoded.
    if uploads is None and where.type == "cuda":
        uploads = gpu_upload.begin(read, where.index or 0, memory.ahead(mode))
    weights.expect(uploads)
    return opened


def open_beside(
    paths: list[str | os.PathLike[str]], device: str | torch.device | None, mode: str, other: Artifact
) -> list[Artifact]:
    """Opens another model's artifacts, which share with ``other`` what both have the same of weights and engines.

    Args:
        mode: the one that ``other`` was opened with.

    Raises:
        SdxlError: as for :func:`open_all`, or they run on another device.
    """
    opened = open_all(paths, other.device if device is None else device, other._weights.expected, mode)
    for artifact in opened:
        if artifact.device != other.device:
            raise SdxlError(
                f"{artifact.folder} would run on {artifact.device}; what it is loaded beside runs on {other.device}."
            )
        artifact._weights, artifact._engines = other._weights, other._engines
    return opened
