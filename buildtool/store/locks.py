"""File locks that die with their process (flock): one builder per key, and prune alone."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from buildtool.store.errors import SdxlError

_held: set[int] = set()


def _forget_in_child() -> None:
    # A forked worker shares the lock; one that outlives a killed builder would keep it forever.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _open(path: Path, create: bool) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # another user's, say: local disks lock it all the same


def _flock(descriptor: int, flags: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, flags)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise SdxlError(
                f"The file system of {path.parent} has no file locks.",
                "Name a place on a local disk with --artifacts DIR.",
            ) from None
        raise
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the name still means the file that was locked: prune may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def acquire(
    path: Path,
    *,
    shared: bool = False,
    wait: bool = True,
    create: bool = True,
    waiting: Callable[[str], None] | None = None,
) -> int | None:
    """Locks a file.

    Args:
        path: the lock's file; its folder exists.
        shared: any number of holders, none of them exclusive.
        wait: for the holder to release it, or to die.
        create: make the file if it isn't there.
        waiting: told the holder, such as ``process 123``, once, before a wait.

    Returns:
        What :func:`release` takes; None if it is held by another and ``wait`` is False.

    Raises:
        SdxlError: the file system has no locks.
        OSError: the file can't be opened.
    """
    flags = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        descriptor = _open(path, create)
        try:
            if not _flock(descriptor, flags | fcntl.LOCK_NB, path):
                if not wait:
                    os.close(descriptor)
                    return None
                if waiting is not None:
                    waiting(_holder(descriptor))
                    waiting = None
                _flock(descriptor, flags, path)
            if _is_still(descriptor, path):
                if not shared:
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                _held.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        if text.isdigit():
            return f"process {text}"
    return "another process"


def release(descriptor: int) -> None:
    """Unlocks, also for processes that were forked meanwhile."""
    _held.discard(descriptor)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds a lock for the length of a ``with`` block; see :func:`acquire`."""
    descriptor = acquire(path, shared=shared, waiting=waiting)
    assert descriptor is not None, "acquire() only gives up if it is told not to wait"
    try:
        yield
    finally:
        release(descriptor)
