"""Lookups that are complete or a miss, builds one at a time, and disks that fail."""

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from buildtool.store import files, locks, manifest
from buildtool.store.errors import SdxlError
from buildtool.store.key import ArtifactKey
from buildtool.store.store import Store, describe, verify_files


@pytest.fixture
def exporter(standin: Any, store: Store) -> Any:
    return standin.StandInExporter(store)


@pytest.fixture
def key(standin: Any) -> ArtifactKey:
    made: ArtifactKey = standin.example_key()
    return made


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every name below a folder with its inode, time of change and size."""
    found = {}
    for place, folders, names in os.walk(root):
        for name in [".", *folders, *names]:
            status = os.lstat(Path(place, name))
            found[str(Path(place, name))] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def one_line(error: SdxlError) -> str:
    assert "\n" not in str(error)
    return str(error)


# Looking up


def test_a_build_is_found_again(store: Store, exporter: Any, key: ArtifactKey) -> None:
    assert store.find(key) == (None, "Nothing was built with this key.")
    built = exporter.build(key)
    assert built == store.lookup(key) == store.root / "v1" / key.folder
    assert verify_files(built) == []
    assert list(store.staging.iterdir()) == []


def test_a_lookup_writes_nothing(store: Store, exporter: Any, standin: Any, key: ArtifactKey) -> None:
    assert store.lookup(key) is None
    assert not store.root.exists()
    built = exporter.build(key)
    before = snapshot(store.root)
    assert store.lookup(key) == built
    assert store.lookup(standin.example_key(batch=2)) is None
    assert store.nearest(standin.example_key(batch=2)) is not None
    assert len(list(store.artifacts())) == 1
    assert snapshot(store.root) == before


@pytest.mark.parametrize("name", ["unet.cfg.pt2", "weights/unet.safetensors", "golden.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "folder"])
def test_a_file_that_is_not_whole_makes_a_miss(
    store: Store, exporter: Any, key: ArtifactKey, name: str, damage: str
) -> None:
    built = exporter.build(key)
    path = built / name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(data[:-1] if damage == "cut" else data + b"x")
    found = store.find(key)
    assert found.path is None
    assert name in found.reason
    assert [problem for problem in verify_files(built) if name in problem]
    assert exporter.build(key) == built == store.lookup(key)
    assert verify_files(built) == []


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"schema_version": 2}'])
def test_a_broken_manifest_is_a_miss_with_a_reason(
    store: Store, exporter: Any, key: ArtifactKey, content: bytes | None
) -> None:
    built = exporter.build(key)
    if content is None:
        (built / manifest.MANIFEST).unlink()
    else:
        (built / manifest.MANIFEST).write_bytes(content)
    found = store.find(key)
    assert found.path is None
    assert str(built) in found.reason
    assert exporter.build(key) == built
    assert verify_files(built) == []


def test_a_file_where_the_folder_belongs_is_a_miss(store: Store, exporter: Any, key: ArtifactKey) -> None:
    place = store.base / key.folder
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    assert store.lookup(key) is None
    assert exporter.build(key) == place
    assert store.lookup(key) == place


def test_another_key_with_the_same_name_is_a_miss_and_survives(
    store: Store, exporter: Any, standin: Any, key: ArtifactKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if the first eight digits were the same
    monkeypatch.setattr(ArtifactKey, "folder", property(lambda key: "tiny/cpu-avx2/64x64-b1-fp32-torch-00000000"))
    other = standin.example_key(vae="tiny")
    first = exporter.build(key)
    assert store.lookup(other) is None
    second = exporter.build(other)
    assert first != second
    assert (store.lookup(key), store.lookup(other)) == (first, second)
    assert exporter.build(other, force=True) == second
    third = exporter.build(standin.example_key(vae="fp16-fix"))
    assert len({first, second, third}) == 3
    assert [verify_files(path) for path in (first, second, third)] == [[], [], []]

    # damaged, it is still another key's: its owner may mend it
    (first / "golden.safetensors").unlink()
    shutil.rmtree(second)
    assert exporter.build(other) == second
    assert (first / manifest.MANIFEST).is_file()


@pytest.mark.parametrize("model", ["blobs", "code", "locks", "staging", "..", ".", ".hidden"])
def test_a_model_named_like_a_part_of_the_store(store: Store, exporter: Any, standin: Any, model: str) -> None:
    key = standin.example_key(model=model)
    built = exporter.build(key)
    assert built == store.lookup(key)
    assert built.resolve().is_relative_to(store.base.resolve())
    assert [folder for folder, _ in store.artifacts()] == [built]
    store.prune()
    assert verify_files(built) == []


@pytest.mark.parametrize("model", ["", "a/b", "/etc", "../up", "a\nb"])
def test_a_model_that_is_no_name_is_a_bug(store: Store, standin: Any, model: str) -> None:
    with pytest.raises(ValueError):
        store.lookup(standin.example_key(model=model))


def test_paths_stay_as_the_user_gave_them(
    standin: Any, key: ArtifactKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("some artifacts/of mine")
    built = standin.StandInExporter(store).build(key)
    assert str(built) == f"some artifacts/of mine/v1/{key.folder}"
    assert store.lookup(key) == built
    assert [path for path, _ in store.artifacts()] == [built]


def test_nearest_names_the_fewest_differences(store: Store, exporter: Any, standin: Any, key: ArtifactKey) -> None:
    assert store.nearest(key) is None
    near = exporter.build(standin.example_key(batch=2))
    exporter.build(standin.example_key(batch=2, precision="bf16"))
    exporter.build(standin.example_key(model="another"))
    assert store.nearest(key) == (near, {"batch": (1, 2)})

    # the same model comes before a stranger that differs in less
    far = standin.example_key(width=128, height=128, batch=4, vae="tiny")
    assert store.nearest(far) == (
        near,
        {"batch": (4, 2), "width": (128, 64), "height": (128, 64), "vae": ("tiny", "default")},
    )

    (near / manifest.MANIFEST).write_bytes(b"broken")
    found = store.nearest(key)
    assert found is not None and set(found[1]) == {"batch", "precision"}


# Building


def test_weights_and_code_are_stored_once(store: Store, exporter: Any, standin: Any, key: ArtifactKey) -> None:
    first, second = exporter.build(key), exporter.build(standin.example_key(batch=2))
    for name in ("weights/unet.safetensors", "unet.cfg.pt2"):
        assert (first / name).samefile(second / name)
        assert (first / name).stat().st_mode & 0o777 == 0o444
    assert (first / "weights/unet.safetensors").stat().st_nlink == 3
    [blob] = (store.base / "blobs/sha256").iterdir()
    assert blob.name == files.sha256_of(blob) == manifest.read(first).files["weights/unet.safetensors"].sha256


def test_a_copy_is_made_where_links_cannot_be(
    store: Store, exporter: Any, key: ArtifactKey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_link(source: Any, target: Any) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    source = tmp_path / "source"
    source.write_bytes(b"weights")
    source.chmod(0o444)
    assert store.link(source, tmp_path / "linked") is True
    monkeypatch.setattr(os, "link", no_link)
    assert store.link(source, tmp_path / "deep/copied") is False
    assert (tmp_path / "deep/copied").read_bytes() == b"weights"
    assert (tmp_path / "deep/copied").stat().st_mode & 0o777 == 0o444
    built = exporter.build(key)
    assert verify_files(built) == []
    assert (built / "unet.cfg.pt2").stat().st_nlink == 1


def test_building_again_mends_a_damaged_blob_and_damaged_code(
    store: Store, exporter: Any, standin: Any, key: ArtifactKey
) -> None:
    built = exporter.build(key)
    blob = store.blob(manifest.read(built).files["weights/unet.safetensors"].sha256)
    [code] = (store.base / "code").iterdir()
    for path in (blob, code / "unet.cfg.pt2"):
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
    assert store.lookup(key) == built  # sizes are right: only verify sees it
    assert len(verify_files(built)) == 2
    assert store.code(code.name) is None
    exporter.build(key, force=True)
    assert verify_files(built) == []
    assert store.code(code.name) == code


def test_code_comes_back_with_what_was_kept(store: Store, tmp_path: Path) -> None:
    with store.stage() as stage:
        (stage / "parts").mkdir()
        (stage / "parts/a.pt2").write_bytes(b"code")
        assert store.code("cd" * 32) is None
        folder = store.commit_code(stage, "cd" * 32, {"constants": {"a": 1}, "list": [1.5, None]})
    assert store.code("cd" * 32) == folder == store.base / "code" / ("cd" * 32)
    record = store.code_record("cd" * 32)
    assert record.meta == {"constants": {"a": 1}, "list": [1.5, None]}
    assert record.files == {"parts/a.pt2": manifest.FileEntry(size=4, sha256=files.sha256_of(folder / "parts/a.pt2"))}
    assert store.code("ce" * 32) is None


def test_code_that_is_replaced_while_it_is_linked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(content: bytes) -> None:
        with store.stage() as stage:
            (stage / "a.pt2").write_bytes(content)
            (stage / "b.pt2").write_bytes(content)
            store.commit_code(stage, "cd" * 32, {"kept": content.decode()})

    replacements = [b"new!", b"last"]
    link = files.link

    def linked(source: Path, target: Path) -> bool:
        done = link(source, target)
        if replacements and target.name == "a.pt2":
            commit(replacements.pop(0))
        return done

    commit(b"code")
    monkeypatch.setattr(files, "link", linked)
    with store.stage() as stage:
        record = store.attach_code("cd" * 32, stage)
        assert record.meta == {"kept": "last"}
        assert describe(stage) == record.files
        assert (stage / "b.pt2").read_bytes() == b"last"


def test_code_that_is_damaged_is_not_linked(store: Store) -> None:
    with store.stage() as stage:
        (stage / "a.pt2").write_bytes(b"code")
        folder = store.commit_code(stage, "cd" * 32, {})
    (folder / "a.pt2").chmod(0o644)
    (folder / "a.pt2").write_bytes(b"edoc")
    with store.stage() as stage, pytest.raises(SdxlError, match="damaged"):
        store.attach_code("cd" * 32, stage)
    with store.stage() as stage, pytest.raises(SdxlError, match="cannot be read"):
        store.attach_code("ce" * 32, stage)


@pytest.mark.parametrize("damage", ["code", "size", "missing", "record", "no record", "other key"])
def test_damaged_code_is_a_miss(store: Store, damage: str) -> None:
    with store.stage() as stage:
        (stage / "a.pt2").write_bytes(b"code")
        folder = store.commit_code(stage, "cd" * 32, {"kept": "this"})
    digest = "cd" * 32
    if damage in ("code", "size"):
        (folder / "a.pt2").chmod(0o644)
        (folder / "a.pt2").write_bytes(b"edoc" if damage == "code" else b"codes")
    elif damage == "missing":
        (folder / "a.pt2").unlink()
    elif damage == "record":
        text = (folder / "code.json").read_text()
        (folder / "code.json").write_text(text.replace("this", "that"))
    elif damage == "no record":
        (folder / "code.json").unlink()
    else:
        digest = "ce" * 32
        folder.rename(folder.with_name(digest))
    assert store.code(digest) is None


def test_the_stage_goes_whatever_happens(store: Store) -> None:
    with store.stage() as stage:
        assert stage.is_relative_to(store.base)
        (stage / "deep").mkdir()
        (stage / "deep/file").write_bytes(b"x")
    with pytest.raises(ZeroDivisionError), store.stage() as other:
        assert other != stage
        raise ZeroDivisionError
    assert list(store.staging.iterdir()) == []


@pytest.mark.parametrize("flaw", ["missing", "size", "unlisted", "other key"])
def test_an_incomplete_stage_is_never_committed(
    store: Store, standin: Any, key: ArtifactKey, flaw: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError), store.stage() as stage:
        (stage / "weights").mkdir()
        (stage / "weights/unet.safetensors").write_bytes(b"weights")
        (stage / "unet.cfg.pt2").write_bytes(b"code")
        sealed = standin.example_manifest(key, describe(stage))
        (stage / manifest.MANIFEST).write_bytes(manifest.encode(sealed))
        if flaw == "missing":
            (stage / "unet.cfg.pt2").unlink()
        elif flaw == "size":
            (stage / "unet.cfg.pt2").write_bytes(b"codes")
        elif flaw == "unlisted":
            (stage / "notes.txt").write_bytes(b"")
        store.commit(stage, standin.example_key(batch=2) if flaw == "other key" else key)
    assert list(store.artifacts()) == []


def test_everything_is_on_the_disk_before_it_gets_its_name(
    store: Store, exporter: Any, key: ArtifactKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    seen: list[str] = []
    fsync, install = os.fsync, files.install

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(stage: Path, target: Path) -> None:
        below = [stage, *stage.rglob("*")]
        assert {path.stat().st_ino for path in below} <= synced
        seen.extend(path.name for path in below)
        install(stage, target)
        assert target.parent.stat().st_ino in synced
        assert target.parent.parent.stat().st_ino in synced

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(files, "install", check)
    exporter.build(key)
    assert {"manifest.json", "unet.safetensors", "weights", "code.json"} <= set(seen)
    assert (store.base / "blobs/sha256").stat().st_ino in synced


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_force_replaces(
    store: Store, exporter: Any, key: ArtifactKey, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    built = exporter.build(key)
    opened = open(built / "golden.safetensors", "rb")  # noqa: SIM115 - a run that has the old one open
    (built / "left over").write_bytes(b"x")
    assert exporter.build(key, force=True, created="2026-05-05T00:00:00Z") == built
    assert manifest.read(built).created == "2026-05-05T00:00:00Z"
    assert verify_files(built) == []
    assert len(opened.read()) == 3000
    opened.close()
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def test_renames_that_died_halfway_are_undone_at_the_next_look(
    store: Store, exporter: Any, key: ArtifactKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = exporter.build(key)
    built.rename(files.aside_of(built))
    assert [folder for folder, _ in store.artifacts()] == [built]
    built.rename(files.aside_of(built))
    assert store.lookup(key) == built
    assert not files.aside_of(built).exists()

    # on a read-only disk it is used where it is
    built.rename(files.aside_of(built))

    def read_only(source: Any, target: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", read_only)
        assert store.lookup(key) == files.aside_of(built)
    assert exporter.build(key) == built


# Two at once


def test_others_wait_and_take_the_result(store: Store, standin: Any, key: ArtifactKey, tmp_path: Path) -> None:
    counter = tmp_path / "compiled"
    started, told = threading.Event(), threading.Event()
    messages: list[str] = []
    results: list[Path] = []

    def message(text: str) -> None:
        messages.append(text)
        told.set()

    def second() -> None:
        started.wait(10)
        results.append(standin.StandInExporter(Store(store.root), counter=counter).build(key, message=message))

    thread = threading.Thread(target=second)
    thread.start()
    with store.building(key.digest):
        started.set()
        assert told.wait(10)
        assert results == []
        with store.building("ab" * 32, messages.append):
            pass  # another key doesn't wait
        # this thread's turn with the same key; the lock is already ours
        with store.stage() as stage:
            built = _commit_by_hand(store, standin, key, stage)
    thread.join(10)
    assert results == [built]
    assert not counter.exists()
    assert messages == [f"another build of this key is running (process {os.getpid()}), waiting"]


def _commit_by_hand(store: Store, standin: Any, key: ArtifactKey, stage: Path) -> Path:
    (stage / "weights").mkdir()
    (stage / "weights/unet.safetensors").write_bytes(b"weights")
    (stage / "unet.cfg.pt2").write_bytes(b"code")
    sealed = standin.example_manifest(key, describe(stage))
    (stage / manifest.MANIFEST).write_bytes(manifest.encode(sealed))
    return store.commit(stage, key)


def test_a_forked_child_does_not_keep_the_lock(store: Store, key: ArtifactKey) -> None:
    """A compiler's worker that outlives its killed parent must not block the key."""
    path = store.base / "locks" / f"{key.digest}.lock"
    with store.building(key.digest):
        [holder] = [fd for fd in locks._held if os.path.samestat(os.fstat(fd), path.stat())]
        child = os.fork()
        if child == 0:
            with contextlib.suppress(OSError):
                os.fstat(holder)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert locks.acquire(path, wait=False) is None  # and the child's end did not release it


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = locks.acquire(path)
    assert first is not None
    got: list[int | None] = []
    waiting = threading.Event()
    thread = threading.Thread(target=lambda: got.append(locks.acquire(path, waiting=lambda _: waiting.set())))
    thread.start()
    assert waiting.wait(10)
    path.unlink()  # as prune does
    locks.release(first)
    thread.join(10)
    assert got[0] is not None
    assert os.path.samestat(os.fstat(got[0]), path.stat())
    locks.release(got[0])


# Disks


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, times: int = 1_000) -> Iterator[None]:
    """``os.<name>`` fails with this error, as it does on a full or read-only disk."""
    real = getattr(os, name)
    left = [times]

    def fail(path: Any, *rest: Any, **more: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(path) if isinstance(path, (str, Path)) else None)
        return real(path, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        yield


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("enter", ["building", "stage"])
def test_a_store_that_cannot_be_written(
    store: Store, key: ArtifactKey, monkeypatch: pytest.MonkeyPatch, enter: str, code: int
) -> None:
    context = store.building(key.digest) if enter == "building" else store.stage()
    with failing(monkeypatch, "mkdir", code), pytest.raises(SdxlError) as caught, context:
        pass
    assert str(store.root) in one_line(caught.value)
    assert "--artifacts" in caught.value.hint


def test_a_store_on_a_read_only_disk_still_answers(
    store: Store, exporter: Any, key: ArtifactKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = exporter.build(key)
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    with failing(monkeypatch, "mkdir", errno.EROFS):
        assert store.lookup(key) == built
        assert store.prune(dry_run=True).removed == []
        with pytest.raises(SdxlError, match="read-only") as caught, store.stage():
            pass
    one_line(caught.value)


def test_a_root_that_is_a_file(tmp_path: Path, key: ArtifactKey) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    assert store.lookup(key) is None
    assert list(store.artifacts()) == []
    with pytest.raises(SdxlError, match="not a folder") as caught, store.building(key.digest):
        pass
    one_line(caught.value)


def test_a_place_where_no_folder_can_be_made_is_told(key: ArtifactKey) -> None:
    """The kernel's own file system says "no such file" of a new folder, as if its parent weren't there."""
    store = Store(Path("/proc/artifacts"))
    with pytest.raises(SdxlError, match="cannot be written") as caught, store.building(key.digest):
        pass
    assert "no folder can be made there" in str(caught.value)


def test_a_disk_that_is_too_small_is_told_before_the_build(store: Store) -> None:
    with pytest.raises(SdxlError, match=r"needs 1000\.0 TB .* are free") as caught, store.stage(needs=10**15):
        pass
    one_line(caught.value)
    assert list(store.staging.iterdir()) == []
    with store.stage(needs=1):
        pass


@pytest.mark.parametrize("when", ["write", "commit"])
def test_a_disk_that_fills_up_leaves_nothing(
    store: Store, exporter: Any, standin: Any, key: ArtifactKey, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write says it: without a name

    with monkeypatch.context() as patched:
        if when == "write":
            patched.setattr(exporter, "_rest", full)
        else:
            patched.setattr(files, "sync_tree", full)
        with pytest.raises(SdxlError, match=r"is full.* are free") as caught:
            exporter.build(key)
    assert str(store.root) in one_line(caught.value)
    assert list(store.staging.iterdir()) == []
    assert list(store.artifacts()) == []
    assert verify_files(exporter.build(key)) == []


def test_a_full_disk_is_recognised_in_a_librarys_words(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")
    with pytest.raises(RuntimeError), store.stage():
        raise failure
    monkeypatch.setattr(files, "free_bytes", lambda path: 4096)
    with pytest.raises(SdxlError, match=r"full after 7 bytes") as caught, store.stage() as stage:
        (stage / "part").write_bytes(b"weights")
        raise failure
    assert caught.value.__cause__ is failure


def test_other_errors_of_a_build_keep_their_traceback(store: Store, tmp_path: Path, key: ArtifactKey) -> None:
    with pytest.raises(FileNotFoundError), store.building(key.digest), store.stage():
        (tmp_path / "not the store's").read_bytes()
    with pytest.raises(PermissionError), store.stage():
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "model"))


# Checking


def test_any_changed_byte_is_found(store: Store, exporter: Any, key: ArtifactKey, tmp_path: Path) -> None:
    built = tmp_path / "copied elsewhere"
    shutil.copytree(exporter.build(key), built)
    shutil.rmtree(store.root)
    assert verify_files(built) == []
    for name in list(files.file_names(built)):
        path = built / name
        good = path.read_bytes()
        path.chmod(0o644)
        for position in (0, len(good) // 2, len(good) - 1):
            bad = bytearray(good)
            bad[position] ^= 1
            path.write_bytes(bad)
            [problem] = verify_files(str(built))
            assert name in problem and "\n" not in problem
        path.write_bytes(good)
    assert verify_files(built) == []


def test_files_that_do_not_belong_are_found(store: Store, exporter: Any, key: ArtifactKey) -> None:
    built = exporter.build(key)
    (built / "weights/extra.bin").write_bytes(b"")
    (built / "link").symlink_to("manifest.json")
    assert verify_files(built) == [f"{built}/{name} is not in the manifest." for name in ("link", "weights/extra.bin")]


@pytest.mark.parametrize("whole_folder", [False, True])
def test_links_that_leave_the_folder_are_refused(
    store: Store, exporter: Any, key: ArtifactKey, tmp_path: Path, whole_folder: bool
) -> None:
    built = exporter.build(key)
    name = "weights" if whole_folder else "weights/unet.safetensors"
    shutil.move(built / name, tmp_path / "outside")
    (built / name).symlink_to(tmp_path / "outside")
    assert store.lookup(key) is None
    assert any("leaves the artifact's folder" in problem for problem in verify_files(built))


def test_a_link_to_the_artifact_itself_is_fine(store: Store, exporter: Any, key: ArtifactKey, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(exporter.build(key))
    assert verify_files(tmp_path / "latest") == []


def test_progress_counts_every_byte(store: Store, exporter: Any, key: ArtifactKey) -> None:
    built = exporter.build(key)
    counted: list[int] = []
    assert verify_files(built, counted.append) == []
    assert sum(counted) == sum(entry.size for entry in manifest.read(built).files.values())


def test_no_artifact_is_one_problem(tmp_path: Path) -> None:
    [problem] = verify_files(tmp_path / "nothing")
    assert "does not exist" in problem


def test_a_blob_whose_digest_is_known_is_not_read_for_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sha256_of", lambda path: pytest.fail("it is read once more"))
    path, digest = tmp_path / "w", hashlib.sha256(b"weights").hexdigest()
    path.write_bytes(b"weights")
    assert store.add_blob(path, digest) == digest
    assert not path.exists() and store.blob(digest).read_bytes() == b"weights"
    assert store.blob(digest).stat().st_mode & 0o222 == 0
