"""Weights on their way to a GPU, with a stand-in for libcuda: its device memory is this process's own."""

import ctypes
import os
import threading
import time
from pathlib import Path

import pytest

from buildtool.store.errors import SdxlError
from runtimes import gpu_upload, timeline
from runtimes.gpu_upload import CHUNK, SMALL_CHUNK, Driver, Uploads


class StandInCuda:
    """The functions of libcuda that an upload calls. Copies happen when their event is waited for, not before."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room, self.total = room, room
        self.blocks: dict[int, ctypes.Array] = {}
        self.pending: dict[int, list[tuple[int, int, int]]] = {}
        self.threads_with_context: set[int] = set()
        self._handles = 0
        self._lock = threading.Lock()

    def _new(self) -> int:
        with self._lock:
            self._handles += 1
            return self._handles

    def _memory(self, size: int) -> int:
        block = ctypes.create_string_buffer(max(size, 1))
        address = ctypes.addressof(block)
        with self._lock:
            self.blocks[address] = block
        return address

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0 if index == 0 else 101

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 7
        return 0

    def cuCtxSetCurrent(self, context):
        assert context.value == 7
        self.threads_with_context.add(threading.get_ident())
        return 0

    def cuMemAlloc_v2(self, address, size):
        assert threading.get_ident() in self.threads_with_context
        if size.value > self.room:
            return gpu_upload.OUT_OF_MEMORY
        self.room -= size.value
        address._obj.value = self._memory(size.value)
        return 0

    def cuMemFree_v2(self, address):
        del self.blocks[address.value]
        return 0

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = self.room, self.total
        return 0

    def cuMemHostAlloc(self, address, size, flags):
        address._obj.value = self._memory(size.value)
        return 0

    def cuMemFreeHost(self, address):
        del self.blocks[address.value]
        return 0

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = self._new()
        return 0

    def cuEventCreate(self, event, flags):
        event._obj.value = self._new()
        return 0

    def cuMemcpyHtoDAsync_v2(self, to, source, size, stream):
        assert threading.get_ident() in self.threads_with_context
        self.pending.setdefault(stream.value, []).append((to.value, source.value, size.value))
        return 0

    def cuEventRecord(self, event, stream):
        self.pending[-event.value] = self.pending.pop(stream.value, [])
        return 0

    def cuEventSynchronize(self, event):
        for to, source, size in self.pending.pop(-event.value, []):
            ctypes.memmove(to, source, size)
        return 0

    def cuStreamSynchronize(self, stream):
        return 0

    def cuStreamDestroy_v2(self, stream):
        return 0

    def cuEventDestroy_v2(self, event):
        return 0


def arrived(upload: gpu_upload.Upload) -> bytes:
    interface = upload.__cuda_array_interface__
    assert interface["shape"] == (upload.size,) and interface["typestr"] == "|u1"
    return ctypes.string_at(interface["data"][0], upload.size)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    sizes = {"small": 1000, "exact": 2 * CHUNK, "long": 3 * CHUNK + 12345}
    made = {name: tmp_path / f"{name}.safetensors" for name in sizes}
    for name, path in made.items():
        path.write_bytes(os.urandom(sizes[name]))
    return made


def test_every_byte_arrives_at_its_place(files: dict[str, Path]) -> None:
    cuda = StandInCuda()
    uploads = Uploads(files, 0, cuda)
    for name, path in files.items():
        assert arrived(uploads.take(name)) == path.read_bytes()
    assert not cuda.pending
    assert {f"weights {name}" for name in files} <= {span.name for span in timeline.spans()}


def test_device_memory_is_freed_with_the_last_reference(files: dict[str, Path]) -> None:
    cuda = StandInCuda()
    uploads = Uploads({"long": files["long"]}, 0, cuda)
    upload = uploads.take("long")
    address = upload.address
    assert address in cuda.blocks and "long" not in uploads
    held = gpu_upload.held_bytes()
    del upload
    until = time.monotonic() + 10
    while address in cuda.blocks and time.monotonic() < until:
        time.sleep(0.01)  # the last reader is about to end
    assert address not in cuda.blocks and gpu_upload.held_bytes() <= held - files["long"].stat().st_size


def test_parts_are_sent_again_to_where_they_lie(files: dict[str, Path]) -> None:
    cuda, path = StandInCuda(), files["long"]
    upload = Uploads({"long": path}, 0, cuda).take("long")
    ctypes.memset(upload.address, 0, upload.size)
    spans = [(100, 200), (CHUNK - 5, CHUNK + 3 * SMALL_CHUNK + 7), (upload.size - 3, upload.size)]
    gpu_upload.send_again(path, spans, upload.address, 0, cuda)
    wanted = bytearray(upload.size)
    for begin, end in spans:
        wanted[begin:end] = path.read_bytes()[begin:end]
    assert arrived(upload) == wanted and upload.address in cuda.blocks, "the memory stays its owner's"
    gpu_upload.send_again(path, [], upload.address, 0, cuda)


def test_a_full_gpu_is_told_in_one_line_to_everyone_who_waits(files: dict[str, Path]) -> None:
    uploads = Uploads(files, 0, StandInCuda(room=2 * CHUNK))
    for name in files:
        with pytest.raises(SdxlError, match=r"no room for the 0\.0\d GB of .*free.*--vae") as told:
            uploads.take(name)
        assert "\n" not in str(told.value)


def test_a_missing_file_is_told_by_name(files: dict[str, Path]) -> None:
    files["exact"].unlink()
    with pytest.raises(SdxlError, match=r"exact\.safetensors cannot be read: No such file"):
        Uploads(files, 0, StandInCuda()).take("exact")


def test_a_file_that_shrinks_meanwhile_is_no_upload(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: 0)
    with pytest.raises(SdxlError, match="became shorter"):
        Uploads(files, 0, StandInCuda()).take("small")


def test_a_failing_driver_is_not_waited_for_forever(files: dict[str, Path]) -> None:
    with pytest.raises(SdxlError, match=r"cuDeviceGet failed with CUDA error 101\. .*doctor"):
        Uploads(files, 3, StandInCuda()).take("small")


def test_a_gpu_without_room_for_a_context_is_told(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    full = StandInCuda()
    monkeypatch.setattr(full, "cuDevicePrimaryCtxRetain", lambda context, device: gpu_upload.OUT_OF_MEMORY)
    with pytest.raises(SdxlError, match=r"GPU 0 is full.*--gpu-index"):
        Uploads(files, 0, full).take("small")


def test_driver_frees_pinned_memory(files: dict[str, Path]) -> None:
    cuda = StandInCuda()
    with Driver(0, cuda).pinned(100) as address:
        assert address in cuda.blocks
    assert address not in cuda.blocks
