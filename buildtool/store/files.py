"""What the store does to a disk: durable writes, digests, links, and replacing a folder in one step."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import FileEntry, check_relative

ASIDE = ".old"
"""Suffix of a folder that is moved aside while a new one takes its name."""

_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM)
_NO_LINK = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Listed(Protocol):
    """A manifest, or the part of one that lists its files."""

    @property
    def files(self) -> Mapping[str, FileEntry]: ...


NEARLY_FULL = 1 << 20
"""Bytes; a disk with less free is taken for full when a write failed without saying why."""


def human_size(count: float) -> str:
    """Bytes as people read them, in powers of ten: ``8.5 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write on the disk of ``path`` (or of its nearest parent that exists)."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return 0


def disk_error(error: OSError, path: Path, *, written: int = 0) -> SdxlError | None:
    """The one line that a user needs when the disk, not the program, is at fault; None for other errors.

    Args:
        error: what the system said.
        path: the folder that was written to; named in the message.
        written: bytes that the interrupted work had already put there.
    """
    if error.errno in _FULL:
        had = f" after {human_size(written)}" if written else ""
        quota = " (a quota)" if error.errno == errno.EDQUOT else ""
        return SdxlError(
            f"The disk of {path} is full{quota}{had}: {human_size(free_bytes(path))} are free.",
            "Make room (sdxl-build prune --dry-run) or name another place with --artifacts DIR.",
        )
    if error.errno == errno.EROFS:
        return SdxlError(f"{path} is on a read-only disk.", "Name a place that can be written with --artifacts DIR.")
    if error.errno in _REFUSED:
        return SdxlError(
            f"{path} cannot be written by this user ({error.strerror}).",
            "Name a place that can be written with --artifacts DIR.",
        )
    if error.errno == errno.ENOTDIR:
        return SdxlError(f"{path} is not a folder, or runs through a file.", "Name a folder with --artifacts DIR.")
    return None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk into an :class:`SdxlError` that names ``path``."""
    try:
        yield
    except OSError as error:
        told = disk_error(error, path)
        if told is None:
            raise
        raise told from error


def make_folder(path: Path) -> None:
    """``mkdir -p`` that survives a crash: each new folder is synced into its parent."""
    missing = []
    place = path
    while not place.exists():
        missing.append(place)
        place = place.parent
    for folder in reversed(missing):
        try:
            folder.mkdir()
        except FileExistsError:  # a builder beside us, or a file: then the next line says so
            pass
        except FileNotFoundError as error:  # /proc and the like say so of every new folder
            if folder.parent.is_dir():
                raise PermissionError(errno.EACCES, "no folder can be made there", str(folder)) from error
            raise
        sync(folder.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below ``folder``, itself last."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            if not path.is_symlink():
                sync(path)
        sync(Path(place))


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk; the name's folder is the caller's to sync."""
    path.write_bytes(data)
    sync(path)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file's bytes, as 64 hex digits. ``progress`` is told how many bytes each read added."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes; reads both whole."""
    if a.stat().st_size != b.stat().st_size:
        return False
    left, right = bytearray(_CHUNK), bytearray(_CHUNK)
    with open(a, "rb") as first, open(b, "rb") as second:
        while count := first.readinto(left):
            if second.readinto(right) != count or left != right:
                return False
    return True


def file_names(folder: Path) -> Iterator[str]:
    """Every file and link below ``folder``, as ``/``-separated names relative to it; links are not followed."""
    pending = [""]
    while pending:
        inside = pending.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                else:
                    yield name


def describe(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, FileEntry]:
    """Size and digest of every file below ``folder``, by name.

    Args:
        known: digests that are known already (a blob's name is its digest): those files are not read.
    """
    known = known or {}
    return {
        name: FileEntry(size=(folder / name).stat().st_size, sha256=known.get(name) or sha256_of(folder / name))
        for name in sorted(file_names(folder))
    }


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a manifest names, after following links.

    Raises:
        SdxlError: the name, or a link on its way, leaves the folder.
    """
    check_relative(name)
    path = folder / name
    real, root = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath((real, root)) != root:
        raise SdxlError(f"{path} is a link that leaves the artifact's folder.", "Copy the artifact with: cp -aL")
    return path


def problem_with(folder: Path, name: str, entry: FileEntry, *, digest: bool = False) -> str:
    """What is wrong with one listed file, or nothing. Reads its bytes only if ``digest`` is asked for."""
    try:
        path = inside(folder, name)
        found = path.stat()
    except SdxlError as error:
        return error.message
    except OSError:
        return f"{folder / name} is missing."
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is not a file."
    if found.st_size != entry.size:
        return f"{path} has {found.st_size} bytes instead of {entry.size}."
    if digest:
        try:
            actual = sha256_of(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}."
        if actual != entry.sha256:
            return f"{path} was changed after it was built (sha256 {actual[:8]}… instead of {entry.sha256[:8]}…)."
    return ""


def missing_files(folder: Path, listed: Listed) -> list[str]:
    """One line for each file of the manifest that is absent, has another size, or leaves the folder. Reads no file."""
    found = (problem_with(folder, name, entry) for name, entry in listed.files.items())
    return [problem for problem in found if problem]


def link(source: Path, target: Path) -> bool:
    """Gives ``source`` a second name; copies it where the disk can't (another disk, too many links, no links).

    Returns:
        True for a hard link, False for a copy, which costs disk space: worth telling.
    """
    make_folder(target.parent)
    try:
        os.link(source, target)
        return True
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    shutil.copyfile(source, target)
    target.chmod(source.stat().st_mode & 0o777)
    sync(target)
    return False


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder; nothing there is fine."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def tree_size(folder: Path) -> int:
    """Bytes of the files below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    with contextlib.suppress(OSError):
        for name in file_names(folder):
            with contextlib.suppress(OSError):
                total += (folder / name).lstat().st_size
    return total


def install(stage: Path, target: Path) -> None:
    """Gives a finished folder its name in one step, in place of whatever had it.

    A crash leaves the old folder or the new one under that name, or, on file systems that cannot
    exchange two names, the old one under ``<name>.old``, where :func:`recover` finds it.
    ``stage`` is gone afterwards.
    """
    make_folder(target.parent)
    while True:
        try:
            os.rename(stage, target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if _exchange(stage, target):
            break
        _move_aside(target)
    sync(target.parent)
    sync(stage.parent)
    remove(stage)
    remove(aside_of(target))


def aside_of(target: Path) -> Path:
    """Where :func:`install` puts what had the name, if it cannot exchange the two."""
    return target.with_name(target.name + ASIDE)


def recover(target: Path) -> Path:
    """Undoes an :func:`install` that died between its two renames.

    Returns:
        Where the folder is now: ``target``, or its old place if this user may not rename it.
    """
    aside = aside_of(target)
    if os.path.lexists(target) or not aside.is_dir():
        return target
    try:
        os.rename(aside, target)
    except OSError:
        return target if os.path.lexists(target) else aside
    return target


def _move_aside(target: Path) -> None:
    remove(aside_of(target))
    try:
        os.rename(target, aside_of(target))
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # overlayfs: the folder is part of a read-only lower layer (a Docker image)
        hint = f"Remove it with: rm -r '{target}'"
        raise SdxlError(f"{target} cannot be replaced on this file system.", hint) from None


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    result: Callable[..., int] = function
    return result


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step; False where the kernel or the file system can't."""
    function = _renameat2()
    if function is None:
        return False
    return function(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def safetensors_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """A safetensors file's header (``__metadata__`` included), where its data begins, and its size in bytes.

    Raises:
        OSError: it can't be read.
        ValueError: it is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file")
    return header, 8 + length, size
