"""Runs the torch backend's packages: AOTInductor code, weights attached by pointer."""

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from buildtool.store import machine
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Component, Manifest, Variant
from runtimes import timeline
from runtimes.base import Engine, Loader, check_target, rebuild_hint
from runtimes.cuda_graph import GraphedCall
from runtimes.gpu_upload import out_of_memory

_idle: dict[tuple[object, ...], list[Any]] = {}
"""Packages whose engines are gone, by file and device. Torch never unloads their code, so an engine that comes back
takes one of these rather than a further copy of it."""


class TorchPackageEngine(Engine):
    """A ``.pt2`` package with its constants attached; on a GPU it runs as a CUDA graph unless told otherwise.

    The package is opened through torch's C++ loader: ``torch._inductor.aoti_load_package`` does the
    same after seconds of imports that only a compiler needs.

    Args:
        tf32: whether fp32 products may use TF32 (a VAE that is upcast in an fp16 artifact).
        graphs: whether to replay calls as a CUDA graph.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        variant: Variant,
        weights: Mapping[str, Tensor],
        device: torch.device,
        tf32: bool = False,
        graphs: bool = True,
    ) -> None:
        super().__init__(name, variant, device)
        with timeline.span(f"open {name}"):
            self._open(path, variant)
        self._variant, self._tf32 = variant, tf32
        self._graph: GraphedCall | None = None
        self.attach(weights)
        if device.type == "cuda" and graphs:
            self._graph = GraphedCall(name, self._launch, variant.inputs, variant.outputs, device)

    def _open(self, path: Path, variant: Variant) -> None:
        # One runner and no thread of its own: what CUDA graphs need, and weights are shared anyway.
        index = -1 if self.device.index is None else self.device.index
        try:
            stat = path.stat()
            idle = _idle.setdefault((path, stat.st_ino, stat.st_size, stat.st_mtime_ns, index), [])
            self._package = idle.pop() if idle else _load(path, index)
        except (RuntimeError, OSError) as error:  # it unpacks the file below TMPDIR and opens the library there
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
        weakref.finalize(self, idle.append, self._package).atexit = False

    def attach(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the code read these tensors, by address: changed in place, the next call sees it.

        A CUDA graph holds addresses too, so it is recorded again if there was one.

        Args:
            weights: the component's stored tensors by name, as the manifest lays them out.
        """
        self.constants = {constant: weights[stored] for constant, stored in self._variant.constants.items()}
        # user_managed: the package keeps pointers and no copies, so the tensors must live as long.
        self._package.load_constants(_borrowed(self.constants), False, True, True)
        if self._graph is not None:
            self._graph.forget("its weights have moved")

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        if self.device.type == "cpu":
            return tuple(self._package.boxed_run(inputs))
        if self._graph is not None and self._graph.settled:
            return self._graph(inputs)
        with out_of_memory_told(self.name, self.device):
            return tuple(self._launch(inputs)) if self._graph is None else self._graph(inputs)

    def _launch(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        with _tf32(self._tf32):
            return tuple(self._package.boxed_run(list(inputs)))


def _load(path: Path, index: int) -> Any:
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, index)


def _borrowed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same memory in tensors that don't own it.

    Torch (2.13) never lets go of user-managed constants, not even with their package: with the tensors themselves,
    no weights would ever be freed.
    """
    make: Any = torch._C._construct_storage_from_data_pointer
    storages: dict[int, Any] = {}
    made = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in storages:
            storages[address] = make(address, tensor.device, storage.nbytes())
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        made[name] = empty.set_(storages[address], tensor.storage_offset(), tensor.shape, tensor.stride())
    return made


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """TF32 as the artifact says, whatever this process has set; torch reads these at every product."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextlib.contextmanager
def out_of_memory_told(what: str, device: torch.device) -> Iterator[None]:
    """A full GPU as one line. Compiled code says only that some call failed, so the allocator is asked.

    What compiled code then writes to stderr itself (60 lines of C++ frames) is left out.
    """
    before = torch.cuda.memory_stats(device).get("num_ooms", 0)
    with held_stderr() as held:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or torch.cuda.memory_stats(device).get("num_ooms", 0) > before:
                held.truncate(0)
                free, total = torch.cuda.mem_get_info(device)
                raise out_of_memory(f"what {what} computes", free, total) from error
            raise


@contextlib.contextmanager
def held_stderr() -> Iterator[IO[bytes]]:
    """What this process writes to stderr, its libraries in C too, goes to a file first, and to stderr at the end."""
    with tempfile.TemporaryFile() as held:
        try:
            stderr = os.dup(2)
        except OSError:  # a process without one
            yield held
            return
        try:
            os.dup2(held.fileno(), 2)
            yield held
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            with contextlib.suppress(OSError), open(2, "wb", closefd=False) as again:
                shutil.copyfileobj(held, again)


class TorchPackageLoader(Loader):
    name = "torch_package"
    takes_weights = True

    def check_machine(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        built, here = manifest.key.toolchain["torch"], machine.torch_version().get("torch", "none")
        if built != here:
            raise SdxlError(
                f"{folder} was built with torch {built}; torch {here} is installed here, and compiled code "
                "runs only with the torch that built it.",
                rebuild_hint(manifest).removesuffix(" --force"),
            )
        check_target(folder, manifest, device)

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
        tf32, graphs = bool(options.get("tf32", False)), bool(options["cuda_graphs"])
        return TorchPackageEngine(path, name, variant, weights, device, tf32, graphs)
