"""What a store holds by name, and how to remove what nothing needs. Only :class:`Store` calls this."""

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from buildtool.store import files, locks, summary
from buildtool.store.errors import SdxlError

BLOBS = "blobs/sha256"
CODE = "code"
LOCKS = "locks"
STAGING = "staging"
LOCK = ".lock"
KERNELS = r"\.jit(\.\d+)?$"
"""Ending of the files beside an artifact's folder in which runs keep what TensorRT-RTX compiled for their card; with
a process's number where it was killed while it wrote one."""
RESERVED = frozenset({"blobs", CODE, LOCKS, STAGING})
"""Folders of the store that a model's name must not take."""


class Pruned(msgspec.Struct, kw_only=True):
    """What was removed, or with ``dry_run`` would be; paths as the store gives them."""

    artifacts: list[Path] = []
    """Built longer ago than was asked for."""
    code: list[Path] = []
    """Used by no artifact that stays."""
    blobs: list[Path] = []
    """Weights of no artifact that stays."""
    staging: list[Path] = []
    """Left by builds that were killed, or by a replacement that was interrupted."""
    kernels: list[Path] = []
    """Compiled by runs of artifacts that are gone."""
    damaged: list[tuple[Path, str]] = []
    """Artifacts that are left alone although no build will use them, and what is wrong with each."""
    bytes: int = 0
    """Disk space that comes free: files whose last name goes."""

    @property
    def removed(self) -> list[Path]:
        return [*self.artifacts, *self.code, *self.blobs, *self.staging, *self.kernels]


def _folders(place: Path) -> list[Path]:
    try:
        with os.scandir(place) as entries:
            return sorted(place / e.name for e in entries if e.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        raise SdxlError(f"{place} cannot be read by this user.", f"See who may: ls -ld '{place}'") from None


def artifact_folders(base: Path) -> Iterator[Path]:
    """Every ``<model>/<target>/<name>`` below the store's base, damaged ones too."""
    for model in _folders(base):
        if model.name in RESERVED or model.name.startswith("."):
            continue
        for target in _folders(model):
            for folder in _folders(target):
                if not folder.name.endswith(files.ASIDE):
                    yield folder
                elif not os.path.lexists(usual := folder.with_name(folder.name.removesuffix(files.ASIDE))):
                    yield files.recover(usual)


def _kernels(base: Path, gone: Iterable[Path]) -> list[Path]:
    """Compiled kernels, ``<artifact>.<engine>.<GPU>.<version>.jit``, whose artifact isn't there or goes too."""
    doomed = set(gone)
    found = []
    for place in (target for model in _folders(base) if model.name not in RESERVED for target in _folders(model)):
        # One that is damaged, or aside, may come back; no artifact's name has a dot in it.
        stay = {folder.name.partition(".")[0] for folder in _folders(place) if folder not in doomed}
        found += [
            place / name
            for name in sorted(_names(place))
            if re.search(KERNELS, name) and name.lstrip(".").partition(".")[0] not in stay
        ]
    return found


def _asides(base: Path) -> list[Path]:
    """Folders that an interrupted replacement moved aside."""
    places = [target for model in _folders(base) if model.name not in RESERVED for target in _folders(model)]
    found = (folder for place in [*places, base / CODE] for folder in _folders(place))
    return [folder for folder in found if folder.name.endswith(files.ASIDE)]


def stage_lock(folder: Path) -> Path:
    """Held while the builder of this staging folder lives. It lies beside it: the folder itself gets renamed."""
    return folder.with_name(f"{folder.name}.lock")


def _abandoned(staging: Path) -> Iterator[tuple[Path, int | None]]:
    """Staging folders whose builder is dead, each with the lock that we now hold on it."""
    for name in sorted({Path(p).name.removesuffix(".lock") for p in _names(staging)}):
        folder = staging / name
        try:
            lock = locks.acquire(stage_lock(folder), wait=False, create=False)
        except FileNotFoundError:
            # The lock goes last and comes first; a folder without one belongs to nobody.
            if os.path.lexists(folder):
                yield folder, None
            continue
        if lock is not None:
            yield folder, lock


def _names(place: Path) -> list[str]:
    try:
        return os.listdir(place)
    except (FileNotFoundError, NotADirectoryError):
        return []


def clean_staging(staging: Path) -> None:
    """Removes what killed builders left behind; never the folder of one that lives."""
    for folder, lock in _abandoned(staging):
        try:
            files.remove(folder)
            stage_lock(folder).unlink(missing_ok=True)
        finally:
            if lock is not None:
                locks.release(lock)


def age_in_days(created: str, now: float | None = None) -> float:
    """Days since a manifest's ``created``, UTC unless it says otherwise."""
    when = datetime.fromisoformat(created.replace("Z", "+00:00"))  # Python 3.10 doesn't know the Z
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return ((time.time() if now is None else now) - when.timestamp()) / 86400


def plan(base: Path, older_than: float | None) -> Pruned:
    """What a prune removes; changes nothing.

    Args:
        older_than: days; artifacts built longer ago go too.
    """
    found = Pruned()
    blobs, code = set(), set()
    for folder in artifact_folders(base):
        try:
            listed = summary.read(folder)
            old = older_than is not None and age_in_days(listed.created) > older_than
        except (SdxlError, ValueError) as error:
            found.damaged.append((folder, error.message if isinstance(error, SdxlError) else str(error)))
            continue
        if old:
            found.artifacts.append(folder)
            continue
        found.damaged += [(folder, problem) for problem in files.missing_files(folder, listed)[:1]]
        blobs |= {entry.sha256 for entry in listed.files.values()}
        code |= {component.code_key for component in listed.components.values()}
    asides = _asides(base)
    # One whose folder is gone stays: recover() gives it back its name when it is looked up.
    found.staging = [a for a in asides if os.path.lexists(a.with_name(a.name.removesuffix(files.ASIDE)))]
    found.code = [f for f in _folders(base / CODE) if f.name not in code and f not in asides]
    found.blobs = [base / BLOBS / name for name in sorted(_names(base / BLOBS)) if name not in blobs]
    found.kernels = _kernels(base, found.artifacts)
    for folder, lock in _abandoned(base / STAGING):
        found.staging.append(folder)
        if lock is not None:
            locks.release(lock)
    found.bytes = _freed(found.removed)
    return found


def _freed(paths: Iterable[Path]) -> int:
    """Bytes that come free: a file with several names counts when all of them go."""
    names: dict[tuple[int, int], int] = {}
    freed = 0
    for path in paths:
        inside = [path / name for name in files.file_names(path)] if path.is_dir() else [path]
        for file in inside:
            with contextlib.suppress(OSError):
                found = file.lstat()
                node = (found.st_dev, found.st_ino)
                names[node] = names.get(node, 0) + 1
                if names[node] == found.st_nlink:
                    freed += found.st_size
    return freed


def carry_out(base: Path, planned: Pruned) -> None:
    """Removes what was planned. The caller holds the store alone.

    Folders go through staging, so that a crash leaves a whole artifact or none.
    """
    files.make_folder(base / STAGING)
    for number, folder in enumerate([*planned.artifacts, *planned.code]):
        doomed = base / STAGING / f"{os.getpid()}-pruned-{number}"
        try:
            os.rename(folder, doomed)
        except OSError:
            # overlayfs can't rename what a read-only lower layer holds
            doomed = folder
        files.remove(doomed)
        files.remove(files.aside_of(folder))
    for path in [*planned.blobs, *planned.staging, *planned.kernels]:
        files.remove(path)
    clean_staging(base / STAGING)
    for name in _names(base / LOCKS):
        # nobody holds one: every builder has the store's lock too
        files.remove(base / LOCKS / name)
    for model in _folders(base):
        if model.name not in RESERVED:
            for place in [*_folders(model), model]:
                with contextlib.suppress(OSError):
                    place.rmdir()
