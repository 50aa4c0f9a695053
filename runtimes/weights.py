"""Weights files in memory: each read once, however many engines and resolutions use it."""

import contextlib
import logging
import mmap
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from buildtool.store.errors import SdxlError
from buildtool.store.files import safetensors_header
from buildtool.store.manifest import Component, Manifest, StoredTensor
from runtimes import timeline
from runtimes.gpu_upload import Uploads, send_again

if TYPE_CHECKING:
    from runtimes.segments import Turns

log = logging.getLogger("runtimes")

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}

_BLOCK = 1 << 18  # bytes that are compared at a time
_PORTABLE = 1  # cudaHostRegister: page-locked for every context
_READ_ONLY = 8  # the device only reads it, so that a file may be mapped so


class Weights:
    """Weights files on one device, by digest.

    On the CPU a file is mapped, privately: pages are shared with every process that runs the
    artifact until somebody writes to a tensor. On a GPU it is uploaded.

    Args:
        device: where the tensors are.
        offload: whether files are kept in pinned host memory, and copied from there each time they are needed.
        sequential: whether segments take turns on the device, where there are any.
    """

    def __init__(self, device: torch.device, offload: bool = False, sequential: bool = False) -> None:
        self.device, self.offload, self.sequential = device, offload, sequential
        self._turns: dict[str, Turns] = {}
        self._host: dict[str, HostFile] = {}
        self._uploads: Uploads | None = None
        self._files: dict[str, tuple[Tensor, dict[str, Any]]] = {}

    def expect(self, uploads: Uploads | None) -> None:
        """Files that are on their way to the device already."""
        self._uploads = uploads

    @property
    def bytes(self) -> int:
        """Bytes of weights held, each file counted once."""
        return sum(data.nbytes for data, _ in self._files.values()) + sum(turns.bytes for turns in self._turns.values())

    @property
    def expected(self) -> Uploads | None:
        """Files that are on their way; those that come later are loaded when they are asked for."""
        return self._uploads

    def holds(self, digest: str) -> bool:
        """Whether a file is on the device."""
        return digest in self._files

    def free(self, keep: Collection[str]) -> bool:
        """Lets go of all files on the device but those of some digests.

        Returns:
            Whether there were any.
        """
        others = {*self._files, *self._turns}.difference(keep)
        for digest in others:
            self._files.pop(digest, None)
            self._turns.pop(digest, None)
        return bool(others)

    def tensors(self, folder: Path, manifest: Manifest, component: str) -> dict[str, Tensor]:
        """A component's tensors as its compiled code takes them: shape, dtype and stride.

        Raises:
            SdxlError: the file is missing, cut short, or not what the manifest describes.
        """
        described = manifest.components[component]
        data, header = self._file(folder / described.weights, manifest.files[described.weights].sha256)
        where = f"{folder / described.weights}"
        return {name: _view(name, stored, data, header, where) for name, stored in described.tensors.items()}

    def restore(self, folder: Path, manifest: Manifest, component: str, names: Collection[str]) -> None:
        """Gives stored tensors, which somebody changed in place, the bits of the file again.

        Raises:
            SdxlError: the file can't be read any more, or is another one.
        """
        described = manifest.components[component]
        path, digest = folder / described.weights, manifest.files[described.weights].sha256
        data, header = self._file(path, digest)
        _, start, size = _header(path)
        if size - start != data.numel():
            raise SdxlError(
                f"{path} is not the file any more that was loaded.", "Check the artifact: sdxl-build verify"
            )
        places = sorted(header[name]["data_offsets"] for name in names)
        if self.device.type == "cpu":
            original = self._data(path, digest, size)[start:]
            for begin, end in places:
                parts = (torch.split(each[begin:end], _BLOCK) for each in (data, original))
                for part, kept in zip(*parts, strict=True):
                    if not torch.equal(part, kept):  # else its pages stay the file's, shared with other processes
                        part.copy_(kept)
            return
        spans = [(start + begin, start + end) for begin, end in places]
        torch.cuda.synchronize(self.device)  # no call may still be reading
        send_again(path, spans, data.data_ptr() - start, self.device.index or 0)

    def turns(self, folder: Path, manifest: Manifest, component: str) -> "tuple[Turns, dict[str, Tensor]]":
        """What brings a component's segments to the device, each in its turn, and where its tensors are then.

        Raises:
            SdxlError: as for :meth:`tensors`.
        """
        from runtimes.segments import Span, Turns

        described = manifest.components[component]
        path, digest = folder / described.weights, manifest.files[described.weights].sha256
        header, start, size = _header(path)
        owners = owned(described)
        spans = []
        for names in owners:
            places = [header.get(name, {"data_offsets": (0, size)})["data_offsets"] for name in names]
            if start + max(end for _, end in places) > size:
                raise SdxlError(f"{path} lacks tensors of a segment.", "Check the artifact: sdxl-build verify")
            spans.append(Span(start + min(begin for begin, _ in places), start + max(end for _, end in places)))
        if digest not in self._turns:
            self._turns[digest] = Turns(self._on_host(path, digest, size).data, spans, self.device)
        turns = self._turns[digest]
        tensors = {}
        for number, names in enumerate(owners):
            buffer, first = turns.buffer(number), spans[number].begin - start
            for name in names:
                tensors[name] = _view(name, described.tensors[name], buffer, header, str(path), first)
        return turns, tensors

    def _file(self, path: Path, digest: str) -> tuple[Tensor, dict[str, Any]]:
        if digest not in self._files:
            self._files[digest] = self._read(path, digest)
        return self._files[digest]

    def _read(self, path: Path, digest: str) -> tuple[Tensor, dict[str, Any]]:
        header, start, size = _header(path)
        return self._data(path, digest, size)[start:], header

    def _data(self, path: Path, digest: str, size: int) -> Tensor:
        """The whole file as bytes (uint8) on the device."""
        if self.offload:
            waiting = self._on_host(path, digest, size)
            with timeline.span(f"copy {path.stem}"):
                return waiting.data.to(self.device, copy=True)
        if self.device.type == "cpu":
            return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        uploads = self._uploads
        if uploads is None or digest not in uploads:
            uploads = Uploads({digest: path}, self.device.index or 0)
        # The tensor keeps the upload, which owns the memory.
        return torch.as_tensor(uploads.take(digest), device=self.device)

    def _on_host(self, path: Path, digest: str, size: int) -> "HostFile":
        """A whole file in host memory, where it stays."""
        if digest not in self._host:
            self._host[digest] = HostFile(path, size, pin=self.device.type == "cuda")
        return self._host[digest]


def owned(component: Component) -> list[set[str]]:
    """The stored tensors that each segment reads, in any of the component's variants."""
    counts = {len(variant.segments) for variant in component.variants.values()}
    return [
        {stored for v in component.variants.values() for stored in v.segments[number].constants.values()}
        for number in range(min(counts))
    ]


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """A safetensors file's header, where its data begins, and its size in bytes.

    Raises:
        SdxlError: it is missing, or no such file.
    """
    try:
        return safetensors_header(path)
    except FileNotFoundError:
        raise SdxlError(f"{path} is missing.", "Check the artifact: sdxl-build verify") from None
    except ValueError:
        raise SdxlError(f"{path} is no safetensors file.", "Check the artifact: sdxl-build verify") from None


class HostFile:
    """A file's bytes in host memory, page-locked: the GPU copies from there by itself.

    Locked are the pages in which the system caches the file, so that nothing is read twice or held twice. Where it
    doesn't allow that, they are copied into memory of our own, and that is locked.
    """

    def __init__(self, path: Path, size: int, pin: bool) -> None:
        self._address: int | None = None
        with timeline.span(f"read {path.stem}"):
            self.data = _mapped(path, size)
            if not pin or self._lock(_PORTABLE | _READ_ONLY) == 0:
                return
            _forget_cuda_error()
            self.data = self.data.clone()
            code = self._lock(_PORTABLE)
        if code:
            _forget_cuda_error()
            log.info("%s can't be page-locked (CUDA error %d): it is copied more slowly.", path.name, code)

    def _lock(self, flags: int) -> int:
        """CUDA's error, 0 for none."""
        address = self.data.data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, self.data.nbytes, flags))  # type: ignore[no-untyped-call]
        self._address = None if code else address
        return code

    def __del__(self) -> None:
        if self._address is not None:
            with contextlib.suppress(Exception):  # the interpreter or the driver is shutting down
                torch.cuda.cudart().cudaHostUnregister(self._address)  # type: ignore[no-untyped-call]


def _forget_cuda_error() -> None:
    """CUDA keeps a call's error for whoever launches next; a launch takes it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _mapped(path: Path, size: int) -> Tensor:
    """A whole file as bytes (uint8) that nobody may write to."""
    with open(path, "rb") as file, warnings.catch_warnings():
        if os.fstat(file.fileno()).st_size != size:
            raise SdxlError(f"{path} became shorter while it was read.", "Check the artifact: sdxl-build verify")
        warnings.simplefilter("ignore", UserWarning)  # torch's, that it could be written to
        return torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), dtype=torch.uint8)


def _view(name: str, stored: StoredTensor, data: Tensor, header: dict[str, Any], where: str, first: int = 0) -> Tensor:
    """The view of a flat stored tensor that compiled code takes; refused if the file disagrees.

    ``data`` are the file's from byte ``first`` on.
    """
    dtype: torch.dtype = getattr(torch, stored.dtype)
    entry = header.get(name)
    needed = _extent(stored) * dtype.itemsize
    if entry is None or entry["dtype"] != NAMES[stored.dtype]:
        raise SdxlError(f"{where} has no {stored.dtype} tensor {name!r}.", "Check the artifact: sdxl-build verify")
    begin, end = (at - first for at in entry["data_offsets"])
    if end - begin < needed or end > data.numel():
        raise SdxlError(f"{where} is cut short at {name!r}.", "Check the artifact: sdxl-build verify")
    return data[begin : begin + needed].view(dtype).as_strided(stored.shape, stored.stride)


def _extent(stored: StoredTensor) -> int:
    """Elements from the first to the last of a strided tensor."""
    if 0 in stored.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(stored.shape, stored.stride, strict=True))
