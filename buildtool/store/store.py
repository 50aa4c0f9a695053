"""The artifact store: complete-or-miss lookup, one builder per key, commit in one step.

Layout below ``<root>/v1`` (docs: the artifact format)::

    blobs/sha256/<hex>                weights, stored once, read-only
    code/<codekey>/                   compiled variants without weights, shared between checkpoints
    <model>/<target>/<size>…-<key8>/  artifacts
    staging/                          what builders are writing; locks/ and .lock: who builds

Looking up writes nothing. Whatever crashes, a name means a complete folder or a miss.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from buildtool.store import code, files, locks, manifest, summary
from buildtool.store import prune as pruning
from buildtool.store.code import CodeRecord
from buildtool.store.errors import SdxlError
from buildtool.store.files import describe, missing_files
from buildtool.store.key import ArtifactKey, differences
from buildtool.store.manifest import MANIFEST, Manifest
from buildtool.store.prune import Pruned
from buildtool.store.summary import Summary

__all__ = ["Found", "Pruned", "Store", "describe", "missing_files", "verify_files"]

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._,+-]*")


class Found(NamedTuple):
    """A lookup's answer: the artifact, or why there is none."""

    path: Path | None
    reason: str


class _DigestOnly(msgspec.Struct):
    key_digest: str


def verify_files(folder: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> list[str]:
    """One line for each thing that is wrong with an artifact's files, wherever the folder lies; [] if none.

    Reads every byte: the manifest must be what was sealed, every file must be there with its digest, no link
    may leave the folder, and no other file may be in it.

    Args:
        progress: told the bytes of each file that was checked.
    """
    root = Path(folder)
    try:
        listed = manifest.read(root)
    except SdxlError as error:
        return [error.message]
    problems = []
    for name, entry in listed.files.items():
        problems.append(files.problem_with(root, name, entry, digest=True))
        if progress is not None:
            progress(entry.size)
    extra = sorted(set(files.file_names(root)) - listed.files.keys() - {MANIFEST})
    problems += [f"{root / name} is not in the manifest." for name in extra]
    return [problem for problem in problems if problem]


class Store:
    """The store below one ``--artifacts`` folder, which need not exist before the first build.

    Args:
        root: the folder as the user gave it; every path that comes back starts with it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.base = self.root / "v1"
        self.staging = self.base / pruning.STAGING

    # Looking up

    def lookup(self, key: ArtifactKey) -> Path | None:
        """The complete artifact of exactly this key, or None. Reads its manifest and the sizes of its files."""
        return self.find(key).path

    def find(self, key: ArtifactKey) -> Found:
        """Like :meth:`lookup`, with the reason of a miss in one sentence."""
        reason = "Nothing was built with this key."
        for place in self._places(key):
            folder = files.recover(place)
            if not os.path.lexists(folder):
                continue
            try:
                listed = manifest.read(folder)
            except SdxlError as error:
                reason = error.message
                continue
            if listed.key.digest != key.digest:
                continue
            problems = missing_files(folder, listed)
            if not problems:
                return Found(folder, "")
            reason = problems[0]
        return Found(None, reason)

    def nearest(self, key: ArtifactKey) -> tuple[Path, dict[str, tuple[Any, Any]]] | None:
        """The artifact that differs from ``key`` in the fewest ingredients: its folder, and the differences.

        Artifacts of the same backend and model come first. A difference is the ingredient's dotted name
        with what was asked and what is there.
        """
        best: tuple[tuple[int, int], Path, dict[str, tuple[Any, Any]]] | None = None
        for folder in pruning.artifact_folders(self.base):
            try:
                there = summary.read(folder).key
            except SdxlError:
                continue
            found = differences(key, there)
            stranger = (there.backend != key.backend) + (there.model != key.model)
            if best is None or (stranger, len(found)) < best[0]:
                best = ((stranger, len(found)), folder, found)
        return None if best is None else best[1:]

    def artifacts(self) -> Iterator[tuple[Path, Manifest | SdxlError]]:
        """Every artifact folder in order of its name, with its manifest or what is wrong with that."""
        for folder in pruning.artifact_folders(self.base):
            try:
                yield folder, manifest.read(folder)
            except SdxlError as error:
                yield folder, error

    def summaries(self) -> Iterator[tuple[Path, Summary | SdxlError]]:
        """Like :meth:`artifacts`, three times as fast: without the tensors."""
        for folder in pruning.artifact_folders(self.base):
            try:
                yield folder, summary.read(folder)
            except SdxlError as error:
                yield folder, error

    # Building

    @contextlib.contextmanager
    def building(self, key_digest: str, message: Callable[[str], None] | None = None) -> Iterator[None]:
        """Holds the right to build one key; look up again inside, another build may have made it meanwhile.

        Both keys' digests serve. Take the artifact's first, then the codes' in an order that every builder
        keeps: two that take the same two in another order would wait for each other.

        Args:
            message: told, once, that another build of this key is running.

        Raises:
            SdxlError: the store can't be written, or its disk has no locks.
        """

        def waiting(holder: str) -> None:
            if message is not None:
                message(f"another build of this key is running ({holder}), waiting")

        with contextlib.ExitStack() as stack:
            with files.disk_errors(self.root):
                stack.enter_context(self._no_prune(message))
                pruning.clean_staging(self.staging)
                path = self.base / pruning.LOCKS / f"{key_digest}.lock"
                files.make_folder(path.parent)
                stack.enter_context(locks.locked(path, waiting=waiting))
            yield

    @contextlib.contextmanager
    def stage(self, needs: int = 0) -> Iterator[Path]:
        """An empty folder on the store's disk to build in; removed at the end unless it was committed.

        Args:
            needs: bytes that the build expects to write; 0 if it can't tell.

        Raises:
            SdxlError: the store can't be written, less than ``needs`` is free, or the disk filled up meanwhile.
        """
        with contextlib.ExitStack() as stack:
            with files.disk_errors(self.root):
                stack.enter_context(self._no_prune(None))
                folder = self._new_stage(stack)
            free = files.free_bytes(folder)
            if needs > free:
                raise SdxlError(
                    f"This build needs {files.human_size(needs)} on the disk of {self.root}; "
                    f"{files.human_size(free)} are free.",
                    "Make room (sdxl-build prune --dry-run) or name another place with --artifacts DIR.",
                )
            try:
                yield folder
            except Exception as error:
                told = self._disk_full(error, folder)
                if told is None:
                    raise
                raise told from error

    def add_blob(self, path: Path, digest: str = "") -> str:
        """Moves a staged file into the blobs, read-only and on the disk; returns its sha256, ``digest`` if it is known.

        A blob that is there already is compared byte for byte and kept; a damaged one is replaced, so that
        building again mends it.
        """
        digest = digest or files.sha256_of(path)
        target = self.blob(digest)
        with files.disk_errors(self.root):
            files.make_folder(target.parent)
            if target.is_file() and files.same_bytes(path, target):
                path.unlink()
            else:
                path.chmod(0o444)
                files.sync(path)
                os.replace(path, target)
                files.sync(target.parent)
        return digest

    def blob(self, digest: str) -> Path:
        """Where the blob of this sha256 is, or would be."""
        return self.base / pruning.BLOBS / digest

    def link(self, source: Path, target: Path) -> bool:
        """Gives a blob or a file of code a name in the stage: True for a hard link, False if it had to be copied."""
        with files.disk_errors(self.root):
            return files.link(source, target)

    def commit(self, stage: Path, key: ArtifactKey) -> Path:
        """Makes a staged folder, manifest included, the artifact of ``key``: all of it or nothing.

        An artifact of the same key, or a damaged folder, is replaced; one of another key that happens to have
        the same name is left alone, and this one gets a longer name.

        Raises:
            SdxlError: the disk is full, or can't be written.
            ValueError: the stage is not a complete artifact of this key.
        """
        listed = manifest.read(stage)
        if listed.key.digest != key.digest or listed.key_digest != key.digest:
            raise ValueError(f"the manifest in {stage} is of key {listed.key_digest}, not {key.digest}")
        problems = missing_files(stage, listed)
        problems += [f"{n} is not listed" for n in set(files.file_names(stage)) - listed.files.keys() - {MANIFEST}]
        if problems:
            raise ValueError(f"{stage} is not a complete artifact: {'; '.join(problems)}")
        target = self._free_place(key)
        with files.disk_errors(self.root):
            files.sync_tree(stage)
            files.install(stage, target)
        return target

    # Code

    def code(self, digest: str) -> Path | None:
        """The complete folder of a code key, every byte checked (it is about to be linked to), or None."""
        folder = files.recover(self.base / pruning.CODE / digest)
        return folder if folder.is_dir() and not code.problems(folder, digest) else None

    def code_record(self, digest: str) -> CodeRecord:
        """The files of a code folder with their digests, and the ``meta`` that was committed with it."""
        return code.read(self.base / pruning.CODE / digest)

    def attach_code(self, digest: str, stage: Path) -> CodeRecord:
        """Links the files of a code folder into a stage, and returns the record that describes just these.

        Another builder may replace the folder at any moment (``--force``); what it does in between is done again.

        Raises:
            SdxlError: the code is not there, or is damaged.
        """
        folder = self.base / pruning.CODE / digest
        while True:
            record = code.read(folder)
            for name in record.files:
                files.remove(stage / name)
                with contextlib.suppress(FileNotFoundError):
                    self.link(folder / name, stage / name)
            if code.read(folder) == record:
                break
        problems = [files.problem_with(stage, name, entry, digest=True) for name, entry in record.files.items()]
        if any(problems):
            raise SdxlError(f"The code in {folder} is damaged.", "Build again with --force.")
        return record

    def commit_code(self, stage: Path, digest: str, meta: object) -> Path:
        """Makes a staged folder the code of a key, with ``meta`` (a dict or a Struct) beside it.

        Raises:
            SdxlError: the disk is full, or can't be written.
        """
        target = self.base / pruning.CODE / digest
        with files.disk_errors(self.root):
            code.write(stage, digest, meta)
            files.sync_tree(stage)
            files.install(stage, target)
        return target

    # Cleaning up

    def prune(self, older_than: float | None = None, dry_run: bool = False) -> Pruned:
        """Removes what no artifact needs, and artifacts built more than ``older_than`` days ago.

        Raises:
            SdxlError: a build is running, or the store can't be written.
        """
        if not self.base.is_dir():
            return Pruned()
        if dry_run:
            return pruning.plan(self.base, older_than)
        with files.disk_errors(self.root):
            lock = locks.acquire(self.base / pruning.LOCK, wait=False)
            if lock is None:
                raise SdxlError(f"A build is running in {self.root}, so nothing was pruned.", "Try again after it.")
            try:
                planned = pruning.plan(self.base, older_than)
                pruning.carry_out(self.base, planned)
            finally:
                locks.release(lock)
        return planned

    # Inside

    def _places(self, key: ArtifactKey) -> list[Path]:
        """Where the key's artifact may be: its usual name, then longer ones, should another key share the first."""
        model, *rest = key.folder.split("/")
        if model in pruning.RESERVED or model.startswith("."):
            model = f"_{model}"
        for part in (model, *rest):
            if len(rest) != 2 or not _SAFE.fullmatch(part):
                raise ValueError(f"a key's folder is model/target/name, not {key.folder!r}")
        usual = self.base.joinpath(model, *rest)
        digest = key.digest
        return [usual, *(usual.with_name(usual.name + digest[8:end]) for end in (16, 64))]

    def _free_place(self, key: ArtifactKey) -> Path:
        for place in self._places(key):
            if not os.path.lexists(files.recover(place)):
                return place
            try:
                holder = msgspec.json.decode((place / MANIFEST).read_bytes(), type=_DigestOnly).key_digest
            except (OSError, msgspec.DecodeError, UnicodeDecodeError):
                return place
            if holder == key.digest:
                return place
        raise ValueError(f"other keys have every name of {key.digest}")

    @contextlib.contextmanager
    def _no_prune(self, message: Callable[[str], None] | None) -> Iterator[None]:
        files.make_folder(self.base)

        def waiting(holder: str) -> None:
            if message is not None:
                message(f"sdxl-build prune is running ({holder}), waiting")

        with locks.locked(self.base / pruning.LOCK, shared=True, waiting=waiting):
            yield

    def _new_stage(self, stack: contextlib.ExitStack) -> Path:
        """Makes a staging folder with a lock beside it that says for how long its builder lives."""
        folder = self.staging / f"{os.getpid()}-{secrets.token_hex(4)}"
        files.make_folder(self.staging)
        lock = pruning.stage_lock(folder)
        held = locks.acquire(lock)
        assert held is not None

        def clean() -> None:
            # A disk that fails now must not hide why the build did; prune finds what is left.
            with contextlib.suppress(OSError):
                files.remove(folder)
                lock.unlink(missing_ok=True)
            locks.release(held)

        stack.callback(clean)
        folder.mkdir()
        return folder

    def _disk_full(self, error: Exception, stage: Path) -> SdxlError | None:
        """The one line for a build that died because a disk did, whatever library noticed it."""
        written = files.tree_size(stage)
        if isinstance(error, OSError):
            name = error.filename
            ours = isinstance(name, str) and Path(name).absolute().is_relative_to(self.base.absolute())
            full = name is None and error.errno in (errno.ENOSPC, errno.EDQUOT)
            return files.disk_error(error, self.root, written=written) if ours or full else None
        # Compilers and torch's own writers report a full disk in words, or as a failed write.
        said = "No space left on device" in str(error)
        if said or (isinstance(error, RuntimeError) and files.free_bytes(self.root) < files.NEARLY_FULL):
            import tempfile

            # A compiler removes what it couldn't finish, so the full disk may have room again.
            place = min((self.root, Path(tempfile.gettempdir())), key=files.free_bytes)
            return files.disk_error(OSError(errno.ENOSPC, ""), place, written=written)
        return None
