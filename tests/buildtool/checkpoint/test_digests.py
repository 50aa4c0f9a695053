"""Digests of weights: right, remembered, and never trusted when the memo or the file is not what it was."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from buildtool.checkpoint import digests


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights")
    age(path)
    return path


def age(path: Path, seconds: float = 60) -> None:
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, progress: object) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(digests, "_hash", refuse)


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    assert digests.of_file(file, lambda *step: seen.append(step)) == sha256(b"weights")
    assert seen == [("hashing weights.safetensors", 7, 7)]
    forbid_reading(monkeypatch)
    assert digests.of_file(file) == sha256(b"weights")


def test_a_changed_file_is_read_again(file: Path) -> None:
    digests.of_file(file)
    file.write_bytes(b"WEIGHTS")
    age(file, 30)
    assert digests.of_file(file) == sha256(b"WEIGHTS")


def test_a_file_too_young_to_tell_changes_by_its_time_is_not_remembered(file: Path) -> None:
    then = time.time_ns()
    os.utime(file, ns=(then, then))
    digests.of_file(file)
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(then, then))
    assert digests.of_file(file) == sha256(b"WEIGHTS")


@pytest.mark.parametrize("memo", [b"", b"{", b"[]", b'{"version": 99, "files": {}}', b'{"version": 1, "files": 3}'])
def test_a_damaged_memo_is_ignored_and_mended(file: Path, memo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    digests.memo_path().parent.mkdir(parents=True)
    digests.memo_path().write_bytes(memo)
    assert digests.of_file(file) == sha256(b"weights")
    forbid_reading(monkeypatch)
    assert digests.of_file(file) == sha256(b"weights")


def test_a_memo_entry_that_is_no_digest_is_ignored(file: Path) -> None:
    digests.of_file(file)
    memo = json.loads(digests.memo_path().read_text())
    digests.memo_path().write_text(json.dumps({**memo, "files": dict.fromkeys(memo["files"], "../../x")}))
    assert digests.of_file(file) == sha256(b"weights")


def test_a_memo_that_cannot_be_written_costs_nothing_but_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # below a file, nothing can be made
    assert digests.of_file(file) == sha256(b"weights")


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(16)]
    for i, path in enumerate(files):
        path.write_bytes(bytes([i]))
        age(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(digests.of_file, files))
    forbid_reading(monkeypatch)
    assert [digests.of_file(path) for path in files] == [sha256(bytes([i])) for i in range(16)]
    assert [path.name for path in digests.memo_path().parent.iterdir() if path.name.startswith("digests-")] == []


def test_a_blob_of_the_hubs_cache_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_reading(monkeypatch)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("ab" * 32)).write_bytes(b"")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "blobs" / ("ab" * 32))
    assert digests.of_file(tmp_path / "link.safetensors") == "ab" * 32


def test_shards_have_a_digest_of_all_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"a")
    second.write_bytes(b"b")
    assert digests.of_files([first]) == sha256(b"a")
    assert len({digests.of_files(files) for files in ([first], [second], [first, second], [second, first])}) == 4
