"""Prune removes what no artifact needs, and nothing that one does."""

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from buildtool.store import files, manifest
from buildtool.store.errors import SdxlError
from buildtool.store.prune import age_in_days
from buildtool.store.store import Pruned, Store, verify_files


def days_ago(days: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(days=days)).isoformat()


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def disk_usage(root: Path) -> int:
    """Bytes of all files, each inode once."""
    sizes = {p.lstat().st_ino: p.lstat().st_size for p in root.rglob("*") if p.is_file() and "lock" not in p.name}
    return sum(sizes.values())


@pytest.fixture
def exporter(standin: Any, store: Store) -> Any:
    return standin.StandInExporter(store)


def test_an_empty_store_and_a_clean_one_lose_nothing(store: Store, exporter: Any, standin: Any) -> None:
    assert store.prune() == Pruned()
    assert not store.root.exists()
    built = exporter.build(standin.example_key())
    assert store.prune().removed == []
    assert verify_files(built) == []


def test_old_artifacts_go_with_what_only_they_used(store: Store, exporter: Any, standin: Any) -> None:
    new = exporter.build(standin.example_key(), created=days_ago(29))
    same_weights = exporter.build(standin.example_key(width=128), created=days_ago(31))
    other = exporter.build(
        standin.example_key(model="other", weights={"unet": "77" * 32}, width=256), created=days_ago(300)
    )
    code = {path.name for path in (store.base / "code").iterdir()}
    before = names(store.root), disk_usage(store.root)

    planned = store.prune(older_than=30, dry_run=True)
    assert (names(store.root), disk_usage(store.root)) == before
    pruned = store.prune(older_than=30)
    assert pruned == planned
    assert sorted(pruned.artifacts) == sorted([same_weights, other])
    assert len(pruned.code) == 2 and len(code) == 3
    assert len(pruned.blobs) == 1  # the blob that the new one shares stays
    assert disk_usage(store.root) == before[1] - pruned.bytes
    assert [folder for folder, _ in store.artifacts()] == [new]
    assert verify_files(new) == []
    assert not (store.base / "other").exists()  # no empty folders are left
    assert list((store.base / "locks").iterdir()) == []
    assert store.prune(older_than=30) == Pruned()
    assert exporter.build(standin.example_key(width=128)) == same_weights


def test_weights_and_code_that_nothing_uses_go(store: Store, exporter: Any, standin: Any) -> None:
    built = exporter.build(standin.example_key())
    files.remove(built)
    pruned = store.prune()
    assert (len(pruned.artifacts), len(pruned.code), len(pruned.blobs)) == (0, 1, 1)
    assert 84_000 < pruned.bytes < 85_000  # and code.json
    assert list((store.base / "blobs/sha256").iterdir()) == list((store.base / "code").iterdir()) == []


def test_space_of_a_file_with_another_name_does_not_come_free(
    store: Store, exporter: Any, standin: Any, tmp_path: Path
) -> None:
    built = exporter.build(standin.example_key(), created=days_ago(2))
    os.link(built / "weights/unet.safetensors", tmp_path / "mine")
    pruned = store.prune(older_than=1)
    assert 0 < pruned.bytes < 64_000
    assert (tmp_path / "mine").stat().st_size == 64_000


def test_what_killed_builds_left_goes_and_what_living_ones_write_stays(store: Store, standin: Any) -> None:
    left = store.staging / "123-abc"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"x" * 1000)
    (store.staging / "123-abc.lock").write_text("123")
    orphan = store.staging / "99-no-lock"
    orphan.mkdir()
    with store.stage() as living:
        planned = store.prune(dry_run=True)
        assert sorted(planned.staging) == [left, orphan]
        assert planned.bytes == 1000
        with store.building("ab" * 32):  # a build cleans up too
            assert {path.name for path in store.staging.iterdir()} == {living.name, f"{living.name}.lock"}
        assert living.is_dir()
    left.mkdir()
    assert store.prune().staging == [left]
    assert list(store.staging.iterdir()) == []


def test_kernels_go_with_the_artifact_whose_runs_compiled_them(store: Store, exporter: Any, standin: Any) -> None:
    stays = exporter.build(standin.example_key(), created=days_ago(29))
    goes = exporter.build(standin.example_key(width=128), created=days_ago(31))
    gpu = "NVIDIA-GeForce-RTX-3090.1.7.1.116.jit"
    kernels = {f: f.with_name(f"{f.name}.unet.cfg.{gpu}") for f in (stays, goes)}  # as runtimes.trt_cache names them
    unfinished = goes.with_name(f".{kernels[goes].name}.4711")
    foreign = goes.with_name("notes.txt")
    for path in (*kernels.values(), unfinished, foreign):
        path.write_bytes(b"compiled")

    assert store.prune().kernels == []
    pruned = store.prune(older_than=30)
    assert sorted(pruned.kernels) == sorted([kernels[goes], unfinished])
    assert kernels[stays].is_file() and foreign.is_file()
    assert not kernels[goes].exists() and not unfinished.exists()


def test_never_under_a_running_build(store: Store, standin: Any) -> None:
    for context in (store.building("ab" * 32), store.stage()):
        with context, pytest.raises(SdxlError, match="A build is running") as caught:
            store.prune()
        assert "\n" not in str(caught.value)
    assert store.prune().removed == []


def test_damaged_artifacts_are_named_and_left_alone(store: Store, exporter: Any, standin: Any) -> None:
    broken = exporter.build(standin.example_key())
    newer = exporter.build(standin.example_key(batch=2))
    holed = exporter.build(standin.example_key(batch=4))
    (broken / manifest.MANIFEST).write_bytes(b"{")
    (newer / manifest.MANIFEST).write_bytes(b'{"schema_version": 2}')
    (holed / "golden.safetensors").unlink()
    pruned = store.prune(older_than=1000)
    assert {path for path, _ in pruned.damaged} == {broken, newer, holed}
    assert pruned.removed == []
    assert all(path.is_dir() for path in (broken, newer, holed))


def test_what_an_interrupted_replacement_left(store: Store, exporter: Any, standin: Any) -> None:
    built = exporter.build(standin.example_key())
    waiting = exporter.build(standin.example_key(batch=2))
    files.aside_of(built).mkdir()  # died before it removed the old one
    waiting.rename(files.aside_of(waiting))  # died between the two renames
    assert store.prune().staging == [files.aside_of(built)]
    assert [folder for folder, _ in store.artifacts()] == [built, waiting]
    assert verify_files(waiting) == []


def test_folders_that_are_not_ours_stay(store: Store, exporter: Any, standin: Any) -> None:
    exporter.build(standin.example_key())
    (store.root / "notes").mkdir()
    (store.root / "notes/a.txt").write_text("mine")
    (store.base / "notes.txt").write_text("mine")
    (store.base / "tiny/readme.txt").write_text("mine")
    store.prune(older_than=1000)
    assert (store.root / "notes/a.txt").exists()
    assert (store.base / "notes.txt").exists()
    assert (store.base / "tiny/readme.txt").exists()


def test_age_reads_utc_however_it_is_written() -> None:
    now = datetime(2026, 3, 2, tzinfo=timezone.utc).timestamp()
    for text in ("2026-03-01T00:00:00Z", "2026-03-01T00:00:00", "2026-03-01T02:00:00+02:00"):
        assert age_in_days(text, now) == 1
    assert age_in_days("2026-03-01T12:00:00.500000+00:00", now) == pytest.approx(0.5, abs=1e-4)
