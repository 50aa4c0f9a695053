"""Digests of weights files: from the hub cache's blob names, or hashed once and remembered."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes are done, and how many there are."""

_CHUNK = 8 << 20
_VERSION = 1
# A file changed within the clock's granularity of its hashing keeps its mtime: too young to remember.
_YOUNG_NS = 2_000_000_000


def memo_path() -> Path:
    """``$XDG_CACHE_HOME/sdxl-build/digests.json``, below ``~/.cache`` by default."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "sdxl-build" / "digests.json"


def of_files(files: Sequence[Path], progress: Progress | None = None) -> str:
    """sha256, as 64 hex digits, of a component's weights: of its file, or of the list of its shards' digests.

    A file whose digest is remembered, or that the hub's cache names by its digest, isn't read.
    """
    digests = [of_file(path, progress) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def of_file(path: Path, progress: Progress | None = None) -> str:
    """sha256 of a file, as 64 hex digits."""
    blob = _blob_name(path)
    if blob:
        return blob
    identity = _identity(path)
    known = _load(memo_path()).get(identity)
    if known:
        return known
    digest = _hash(path, progress)
    if _identity(path) == identity and time.time_ns() - path.stat().st_mtime_ns > _YOUNG_NS:
        _remember(memo_path(), identity, digest)
    return digest


def _blob_name(path: Path) -> str | None:
    # The hub's cache links snapshots/<commit>/<file> to blobs/<etag>; for LFS files the etag is the sha256.
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    return None


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"


def _hash(path: Path, progress: Progress | None) -> str:
    total, done, sha = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            done += len(chunk)
            if progress:
                progress(f"hashing {path.name}", done, total)
    return sha.hexdigest()


def _load(memo: Path) -> dict[str, str]:
    """What is remembered; a memo that is absent, damaged or of another version is as good as empty."""
    try:
        data = json.loads(memo.read_bytes())
        if data["version"] != _VERSION:
            return {}
        files = data["files"].items()
        return {k: v for k, v in files if isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(memo: Path, identity: str, digest: str) -> None:
    """Adds an entry; a memo that can't be written only costs the next run a hash."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(OSError, Timeout):
        memo.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{memo}.lock", timeout=5):
            data = {"version": _VERSION, "files": {**_load(memo), identity: digest}}
            handle, name = tempfile.mkstemp(dir=memo.parent, prefix="digests-")
            try:
                with os.fdopen(handle, "w", encoding="ascii") as file:
                    json.dump(data, file, indent=0)
                os.replace(name, memo)
            except BaseException:
                os.unlink(name)
                raise
