"""Weights files from the disk into GPU memory, by threads that need no torch.

They begin before torch is imported, and go on while packages open and the prompt is encoded: reading
(from the page cache, mostly) and the bus take their time, and nobody waits who doesn't need that file.
The driver is called through ctypes, which leaves Python's lock while a call runs.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from runtimes import timeline

CHUNK = 16 << 20
"""Bytes a thread reads and sends at a time while torch is imported, which holds Python's lock: each chunk waits for
it. 5 GB took 0.5 s so; on another machine, with chunks of 4 MB, 1.25 s."""
SMALL_CHUNK = 4 << 20
"""The same where nothing else runs: 25 GB/s to an H100 instead of 14, as there is less memory to lock at first."""
THREADS = 8
"""Readers at most; 16 are no faster."""

OUT_OF_MEMORY = 2
_PORTABLE = 1  # cuMemHostAlloc: pinned for every context
_NO_TIMING = 2  # cuEventCreate


class DriverError(Exception):
    """A call of libcuda failed; ``code`` is its CUresult."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} failed with CUDA error {code}")
        self.call, self.code = call, code


def call(library: Any, name: str, *arguments: Any) -> None:
    """Calls a function of libcuda.

    Raises:
        DriverError: it failed.
        AttributeError: the driver is too old to have it.
    """
    code = getattr(library, name)(*arguments)
    if code:
        raise DriverError(name, code)


class Driver:
    """The few calls of libcuda that an upload needs, on one device's primary context (the one torch uses).

    Args:
        index: the device's number among the visible ones.
        library: libcuda, or a stand-in with its functions.

    Raises:
        DriverError, OSError: there is no such device, or no driver.
    """

    def __init__(self, index: int, library: Any = None) -> None:
        self.index = index
        self._cuda = library if library is not None else ctypes.CDLL("libcuda.so.1")
        self._device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.enter()

    def _call(self, name: str, *arguments: Any) -> None:
        call(self._cuda, name, *arguments)

    def enter(self) -> None:
        """Makes the context this thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """Device memory; its address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self.enter()
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def memory(self) -> tuple[int, int]:
        """(free, all) bytes of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    @contextlib.contextmanager
    def pinned(self, size: int) -> Iterator[int]:
        """Page-locked host memory, which the device reads by itself; its address."""
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), _PORTABLE)
        try:
            yield int(address.value or 0)
        finally:
            self._call("cuMemFreeHost", address)

    @contextlib.contextmanager
    def stream(self) -> Iterator[ctypes.c_void_p]:
        made = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(made), 1)  # doesn't wait for the default stream
        try:
            yield made
        finally:
            self._call("cuStreamSynchronize", made)
            self._call("cuStreamDestroy_v2", made)

    @contextlib.contextmanager
    def event(self) -> Iterator[ctypes.c_void_p]:
        made = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(made), _NO_TIMING)
        try:
            yield made
        finally:
            self._call("cuEventDestroy_v2", made)

    def send(self, to: int, source: int, size: int, stream: ctypes.c_void_p, event: ctypes.c_void_p) -> None:
        """Starts a copy from pinned memory; ``event`` tells when ``source`` may be written again."""
        copied = (ctypes.c_uint64(to), ctypes.c_void_p(source), ctypes.c_size_t(size), stream)
        self._call("cuMemcpyHtoDAsync_v2", *copied)
        self._call("cuEventRecord", event, stream)

    def wait(self, event: ctypes.c_void_p) -> None:
        self._call("cuEventSynchronize", event)


_held = 0
_held_lock = threading.Lock()


def _count(size: int) -> None:
    global _held
    with _held_lock:
        _held += size


def held_bytes() -> int:
    """GPU memory that uploaded weights take in this process; torch's own statistics don't have it."""
    return _held


@dataclass
class Upload:
    """One weights file on its way to the device. The memory is freed when nothing refers to this any more.

    With an ``address`` and ``spans`` (first byte, end) from the start, those parts of the file go to memory that is
    somebody else's.
    """

    path: Path
    size: int
    address: int = 0
    spans: Sequence[tuple[int, int]] = ()
    error: Exception | None = None
    _began: float = 0.0
    _left: int = 0
    _done: threading.Event = field(default_factory=threading.Event)
    _driver: Driver | None = None

    def wait(self) -> None:
        """Returns when the whole file is on the device.

        Raises:
            SdxlError: it could not be read, or the device's memory is full.
        """
        self._done.wait()
        if self.error is not None:
            raise self.error

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The file as bytes (uint8), for ``torch.as_tensor``, which keeps this object."""
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}

    def __del__(self) -> None:
        if self.address and self._driver is not None:
            _count(-self.size)
            with contextlib.suppress(Exception):  # the interpreter or the driver is shutting down
                self._driver.free(self.address)


class Uploads:
    """Files on their way to one device, each at most once; waited for one by one.

    Args:
        files: digest -> file or parts of one, in the order in which they will be needed.
        index: the device's number among the visible ones.
        library: libcuda, or a stand-in with its functions.
        chunk: bytes a thread reads and sends at a time.
    """

    def __init__(self, files: Mapping[str, Path | Upload], index: int, library: Any = None, chunk: int = CHUNK) -> None:
        self._files = {digest: path if isinstance(path, Upload) else Upload(path, 0) for digest, path in files.items()}
        self._order = [*self._files.values()]  # let go when all are under way
        self._index, self._library, self._chunk = index, library, chunk
        self._lock = threading.Lock()
        self._chunks: Iterator[tuple[Upload, int, int]] = iter(())
        self._cancelled = False
        threading.Thread(target=self._run, name="weights", daemon=True).start()

    def __contains__(self, digest: str) -> bool:
        return digest in self._files

    def take(self, digest: str) -> Upload:
        """A file that is wholly on the device; it is the caller's, and no longer one of these.

        Raises:
            SdxlError: it could not be read, or the device's memory is full.
        """
        self._files[digest].wait()
        return self._files.pop(digest)

    def cancel(self) -> None:
        """Starts no further chunk: what would use them has failed."""
        self._cancelled = True

    def _run(self) -> None:
        try:
            with timeline.span("GPU context"):
                driver = _driver(self._index, self._library)
            for upload in self._order:
                self._allocate(driver, upload)
            self._chunks = self._all_chunks()
            total = sum(upload.size for upload in self._order)
            count = max(1, min(THREADS, (os.cpu_count() or 2) // 2, -(-total // self._chunk)))
            readers = [threading.Thread(target=self._read, args=(driver,), daemon=True) for _ in range(count)]
            for reader in readers:
                reader.start()
        except Exception as error:
            self._fail(error)

    def _allocate(self, driver: Driver, upload: Upload) -> None:
        if upload.spans:
            upload._left = upload.size
            return
        try:
            upload.size = upload._left = upload.path.stat().st_size
            upload.spans = [(0, upload.size)]
            upload.address, upload._driver = driver.allocate(upload.size), driver
            _count(upload.size)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            free, total = driver.memory()
            raise out_of_memory(f"the {upload.size / 1e9:.2f} GB of {upload.path.name}", free, total) from None

    def _all_chunks(self) -> Iterator[tuple[Upload, int, int]]:
        while self._order:
            upload = self._order.pop(0)
            upload._began = timeline.now()
            for begin, end in upload.spans:
                for offset in range(begin, end, self._chunk):
                    yield upload, offset, min(self._chunk, end - offset)

    def _next(self) -> tuple[Upload, int, int] | None:
        with self._lock:
            return None if self._cancelled else next(self._chunks, None)

    def _read(self, driver: Driver) -> None:
        """One reader: fills one half of its pinned memory while the other is on the bus."""
        try:
            driver.enter()
            with contextlib.ExitStack() as stack:
                base = stack.enter_context(driver.pinned(2 * self._chunk))
                stream = stack.enter_context(driver.stream())
                events = [stack.enter_context(driver.event()) for _ in range(2)]
                memory = memoryview((ctypes.c_char * (2 * self._chunk)).from_address(base))
                files: dict[Path, int] = {}
                sent: list[tuple[Upload, int] | None] = [None, None]
                turn = 0
                while (chunk := self._next()) is not None:
                    upload, offset, size = chunk
                    self._landed(driver, events[turn], sent, turn)
                    if upload.path not in files:
                        files[upload.path] = os.open(upload.path, os.O_RDONLY)
                        stack.callback(os.close, files[upload.path])
                    _fill(
                        memory[turn * self._chunk : turn * self._chunk + size], files[upload.path], offset, upload.path
                    )
                    driver.send(upload.address + offset, base + turn * self._chunk, size, stream, events[turn])
                    sent[turn] = (upload, size)
                    turn = 1 - turn
                for side in (turn, 1 - turn):
                    self._landed(driver, events[side], sent, side)
        except Exception as error:
            self._fail(error)

    def _landed(self, driver: Driver, event: ctypes.c_void_p, sent: list[tuple[Upload, int] | None], side: int) -> None:
        """Waits for what was sent from one half, and says so of a file whose last byte that was."""
        waiting, sent[side] = sent[side], None
        if waiting is None:
            return
        driver.wait(event)
        upload, size = waiting
        with self._lock:
            upload._left -= size
            whole = upload._left == 0
        if whole:
            timeline.add(f"weights {upload.path.stem}", upload._began, timeline.now())
            upload._done.set()

    def _fail(self, error: Exception) -> None:
        """Everyone who waits is told; what is there already stays."""
        self._cancelled = True
        if isinstance(error, DriverError):
            error = SdxlError(f"The GPU's driver failed: {error}.", "See what is there: sdxl-build doctor")
        if isinstance(error, OSError) and error.filename is not None:
            error = SdxlError(f"{error.filename} cannot be read: {error.strerror}.", "Check it: sdxl-build verify")
        for upload in [*self._files.values()]:
            if not upload._done.is_set():
                upload.error = error
                upload._done.set()


def send_again(path: Path, spans: Sequence[tuple[int, int]], address: int, index: int, library: Any = None) -> None:
    """Parts of a file to where they lie on the device already; returns when they are there.

    Args:
        spans: (first byte, end) of each.
        address: that of the file's first byte on the device.
        index: the device's number among the visible ones.
        library: libcuda, or a stand-in with its functions.

    Raises:
        SdxlError: the file could not be read, or the driver failed.
    """
    size = sum(end - begin for begin, end in spans)
    if size:
        Uploads({"": Upload(path, size, address, spans)}, index, library, SMALL_CHUNK).take("")


def _driver(index: int, library: Any) -> Driver:
    """The driver, whose first act on a device takes memory there already."""
    try:
        return Driver(index, library)
    except DriverError as error:
        if error.code != OUT_OF_MEMORY:
            raise
        raise SdxlError(
            f"GPU {index} is full: there is no room for this process's own context, about half a GB.",
            "See who uses it: nvidia-smi. Another GPU: --gpu-index",
        ) from None


def _fill(memory: memoryview, file: int, offset: int, path: Path) -> None:
    """Reads exactly as many bytes as there is room for."""
    while memory:
        got = os.preadv(file, [memory], offset)
        if got == 0:
            raise SdxlError(f"{path} became shorter while it was read.", "Check the artifact: sdxl-build verify")
        memory, offset = memory[got:], offset + got


def out_of_memory(what: str, free: int, total: int) -> SdxlError:
    """The answer to a full GPU: the numbers in one line, and what makes it less."""
    return SdxlError(
        f"The GPU has no room for {what}: {free / 1e9:.2f} GB of its {total / 1e9:.1f} GB are free.",
        "Close what else uses it, run with --memory staged, or build smaller: --vae fp16-fix or --vae tiny, "
        "a lower --resolution or --batch.",
    )


LOADERS = ("torch_package",)
"""Those that take weights as tensors; the others' engines read their files by themselves."""
ORDER = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")


def weights_files(
    artifacts: Sequence[tuple[Path, Manifest]], components: Sequence[str] | None = None
) -> dict[str, Path]:
    """Digest -> weights file of some artifacts' components (None: all), each digest once, in the order of a run."""

    def rank(name: str) -> int:
        return ORDER.index(name) if name in ORDER else len(ORDER)

    wanted: dict[str, Path] = {}
    names = {n for _, m in artifacts for n in m.components if components is None or n in components}
    for name in sorted(names, key=lambda n: (rank(n), n)):
        for folder, manifest in artifacts:
            component = manifest.components.get(name)
            if component is not None and component.weights and component.loader in LOADERS:
                wanted.setdefault(manifest.files[component.weights].sha256, folder / component.weights)
    return wanted


def begin(
    artifacts: Sequence[tuple[Path, Manifest]], index: int = 0, components: Sequence[str] | None = None
) -> Uploads | None:
    """Starts to upload the weights of some artifacts' components (None: all); nothing to do (None) for a CPU's."""
    files = weights_files(artifacts, components)
    if not files or any(manifest.key.target.startswith("cpu") for _, manifest in artifacts):
        return None
    return Uploads(files, index)
