"""Runs the torch backend's packages: AOTInductor code, weights attached by pointer."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buildtool.store import machine
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Component, Manifest, Variant
from runtimes.base import Engine, Loader, rebuild_hint


class TorchPackageEngine(Engine):
    """A ``.pt2`` package with its constants attached.

    The package is opened through torch's C++ loader: ``torch._inductor.aoti_load_package`` does the
    same after seconds of imports that only a compiler needs.
    """

    def __init__(
        self, path: Path, name: str, variant: Variant, weights: Mapping[str, Tensor], device: torch.device
    ) -> None:
        super().__init__(name, variant, device)
        # One runner and no thread of its own: what CUDA graphs need, and weights are shared anyway.
        index = -1 if device.index is None else device.index
        try:
            self._package = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)
        except RuntimeError as error:  # it unpacks the file below TMPDIR and opens the library there
            said = str(error).strip().partition("\n")[0]
            raise SdxlError(
                f"{path} cannot be loaded: {said}.",
                f"It is unpacked in {tempfile.gettempdir()}, which needs room and must not be mounted noexec; "
                f"TMPDIR names another. Is the file whole? sdxl-build verify {path.parent}",
            ) from error
        wanted = set(self._package.get_constant_fqns())
        if wanted != variant.constants.keys():
            raise SdxlError(
                f"{path} reads other weights than its manifest says: "
                f"{', '.join(sorted(wanted ^ variant.constants.keys())[:4])}."
            )
        self.constants = {constant: weights[stored] for constant, stored in variant.constants.items()}
        # user_managed: the package keeps pointers and no copies, so the tensors must live as long.
        self._package.load_constants(self.constants, False, True, True)

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._package.boxed_run(inputs))


class TorchPackageLoader(Loader):
    name = "torch_package"

    def check_machine(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        built, here = manifest.key.toolchain["torch"], machine.torch_version().get("torch", "none")
        if built != here:
            raise SdxlError(
                f"{folder} was built with torch {built}; torch {here} is installed here, and compiled code "
                "runs only with the torch that built it.",
                rebuild_hint(manifest).removesuffix(" --force"),
            )
        target = manifest.key.target
        if target.startswith("cpu-"):
            level = target.removeprefix("cpu-")
            if not machine.cpu_runs(level):
                raise SdxlError(
                    f"{folder} was built for processors with {level}; this one has {machine.cpu_isa()}.",
                    f"Build it on this machine: {' '.join(manifest.command)}",
                )
            return
        major, minor = torch.cuda.get_device_capability(device)
        if target != f"sm{major}{minor}":
            raise SdxlError(
                f"{folder} was built for {target}; {torch.cuda.get_device_name(device)} is sm{major}{minor}.",
                f"Build it on this machine: {' '.join(manifest.command)}",
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
        return TorchPackageEngine(path, name, variant, weights, device)
