"""Builds that are killed, and builds that start together. The exporter is a stand-in."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buildtool.store import files, manifest
from buildtool.store.errors import SdxlError
from buildtool.store.store import Store, verify_files

KILLS = 25
OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written, synced or not: spare a busy disk the builds in this process."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def start(store: Store, standin_script: Path) -> Start:
    """Starts the stand-in exporter on the store in a process of its own; it says ``ready`` before it builds."""
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])

    def started(*options: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(standin_script), str(store.root), *options],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return started


def ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def whole_or_nothing(store: Store, key: Any) -> Path | None:
    """The artifact, every byte of it checked, or None for a miss."""
    found: Path | None = store.lookup(key)
    for folder, listed in store.artifacts():
        assert not isinstance(listed, SdxlError)
        assert verify_files(folder) == []
    for folder in (store.base / "code").glob("*"):
        assert store.code(folder.name) == folder
    for blob in (store.base / "blobs/sha256").glob("*"):
        assert files.sha256_of(blob) == blob.name
    return found


def test_builds_killed_at_random_moments(store: Store, standin: Any, start: Start) -> None:
    """25 builds get SIGKILL at any moment: no broken hit, an older artifact stays, the next build succeeds."""
    moments = random.Random(2)
    died = hits = 0
    for number in range(KILLS):
        key = standin.example_key(width=64 + 8 * number)
        replacing = number % 3 == 0
        if replacing:
            standin.StandInExporter(store).build(key, created=OLD)
        process = start("--width", str(key.width), "--pause", "0.015", "--created", NEW, *(["--force"] * replacing))
        ready(process)
        try:
            process.wait(timeout=moments.uniform(0, 0.32))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        died += process.returncode == -signal.SIGKILL
        found = whole_or_nothing(store, key)
        hits += found is not None
        assert found is not None or not replacing
        assert process.returncode == -signal.SIGKILL or found is not None

        built = standin.StandInExporter(store).build(key)
        assert built == whole_or_nothing(store, key)
        assert list(store.staging.iterdir()) == []
    assert died >= KILLS // 2  # else the moments are too late to prove anything


def die_at_change(number: int, exchange: bool) -> None:
    """This process gets SIGKILL just before its ``number``-th change to the disk."""
    left = [number]

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **more)

        return changed

    for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "chmod", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    files._exchange = dying(files._exchange) if exchange else lambda a, b: False


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("replacing", [True, False], ids=["replacing", "new"])
def test_killed_before_every_change_to_the_disk(store: Store, standin: Any, exchange: bool, replacing: bool) -> None:
    """Not at random: before each mkdir, rename, link, unlink, chmod and sync of a build, until one survives."""
    seen = set()
    for number in itertools.count(1):
        key = standin.example_key() if replacing else standin.example_key(width=64 + 8 * number)
        if replacing:
            standin.StandInExporter(store).build(key, force=True, created=OLD)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                die_at_change(number, exchange)
                standin.StandInExporter(store).build(key, force=True, created=NEW)
                os._exit(0)
            os._exit(1)
        status = os.waitpid(child, 0)[1]
        found = whole_or_nothing(store, key)
        assert found is not None or not replacing
        seen.add(found and manifest.read(found).created)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        built = standin.StandInExporter(store).build(key)
        assert built == whole_or_nothing(store, key) == store.base / key.folder
        assert list(store.staging.iterdir()) == []
    assert number > 20
    assert seen == {OLD, NEW} if replacing else {None, NEW}
    assert not list(store.base.rglob("*.old"))


def test_two_builds_started_together_compile_once(store: Store, standin: Any, start: Start, tmp_path: Path) -> None:
    counter = tmp_path / "compiled"
    builders = [start("--pause", "0.02", "--counter", str(counter)) for _ in range(3)]
    outcomes = [builder.communicate(timeout=60) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert {out for out, _ in outcomes} == {f"ready\n{store.base / standin.example_key().folder}\n"}
    assert counter.read_bytes() == b"+"
    waited = [err for _, err in outcomes if "another build of this key is running" in err]
    assert waited and all(err.count("\n") == 1 for err in waited)


def test_a_killed_builder_hands_over_to_the_one_that_waits(
    store: Store, standin: Any, start: Start, tmp_path: Path
) -> None:
    counter = tmp_path / "compiled"
    slow = start("--pause", "30", "--counter", str(counter))
    ready(slow)
    while not counter.exists():
        assert slow.poll() is None
    waiting = start("--counter", str(counter))
    assert waiting.stderr is not None
    assert f"another build of this key is running (process {slow.pid})" in waiting.stderr.readline()
    with pytest.raises(SdxlError, match="A build is running"):
        store.prune()
    slow.kill()
    slow.communicate()
    out, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0
    assert out.endswith(f"{whole_or_nothing(store, standin.example_key())}\n")
    assert counter.read_bytes() == b"++"


def test_a_living_builders_stage_survives_other_builds(store: Store, standin: Any, start: Start) -> None:
    slow = start("--pause", "0.03")
    ready(slow)
    while slow.poll() is None and not list(store.staging.glob("*[!k]")):  # its folder, not its lock
        pass
    # another key's build cleans staging
    standin.StandInExporter(store).build(standin.example_key(width=128))
    out, err = slow.communicate(timeout=30)
    assert slow.returncode == 0, err
    assert verify_files(out.splitlines()[-1]) == []
