"""Compilers beside the builder, with a stand-in for what they run."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from buildtool import compiler
from buildtool.progress import Progress
from buildtool.store.errors import SdxlError
from exporters.base import ExportError, Request

REQUEST = Request(64, 64, 1, "fp16", "cuda:0", "sm90")  # nothing here touches a GPU


SLOWER = "Compilers import what they need by themselves, which is slower: {}."


def jobs(*names: str) -> list[compiler.Job]:
    return [compiler.Job("torch", name, "main", {}, REQUEST) for name in names]


STAND_IN = """
import json, os, signal, sys, threading, time
from exporters import nursery, worker

class Exporter:
    def prepare(self, device):
        print("the banner of a library")
        print("another", flush=True)
        if os.path.exists(os.path.join(sys.argv[3], "broken")):
            raise OSError("broken library.")

def main(job):
    threading.Thread(target=worker._end_with_builder, daemon=True).start()
    if job.stem == "begin":
        if (job.parent / "slow").exists():
            time.sleep(600)
        print("no room for headers", flush=True)
        return 1
    time.sleep(0.2)
    print("about", job.stem, flush=True)
    if "wrong" in job.stem:
        job.with_suffix(".result").write_text(json.dumps({"error": "no", "hint": "try less"}))
        return 1
    if "killed" in job.stem:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "long" in job.stem:
        time.sleep(600)
    if "orphan" in job.stem:
        os.kill(os.getppid(), signal.SIGKILL)
    job.with_suffix(".result").write_text(json.dumps({"file": "x"}))
    return 0

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as what started the builder may have it
worker.main, nursery.registry.exporter = main, lambda name: Exporter()
nursery.run(*sys.argv[1:])
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A "compiler" that takes 0.2 s and answers; that of ``wrong`` fails, ``killed`` and ``orphan`` end badly.

    What is made for all of them beforehand fails each time, which nobody has to notice.
    """
    script = tmp_path / "stand_in_nursery.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(compiler, "NURSERY", (str(script),))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path))  # where logs of what failed are kept
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def running(scratch: Path, *names: str, at_once: int, progress: Progress | None = None) -> Iterator[compiler.Pool]:
    with compiler.Pool(progress or Progress(quiet=True)) as pool:
        pool.prepare(jobs(*names), scratch)
        pool.start(jobs(*names), at_once)
        yield pool


def test_the_next_compiler_starts_while_the_builder_is_busy(scratch: Path) -> None:
    progress = Progress(quiet=True)
    with running(scratch, "unet", "vae_decoder", "text_encoder", at_once=1, progress=progress) as pool:
        until = time.monotonic() + 20
        while len(list(scratch.glob("*.result"))) < 3 and time.monotonic() < until:
            time.sleep(0.01)  # busy with fp32 eager, say
        assert len(list(scratch.glob("*.result"))) == 3
        time.sleep(2.0)
        assert [pool.result(name, "main") for name in ("unet", "text_encoder", "vae_decoder")] == [{"file": "x"}] * 3
    # Its own time, not the time until somebody asked for it. The first one's has what all of them import in it.
    assert all(progress.seconds[f"{name}.main: compile"] < 1.0 for name in ("vae_decoder", "text_encoder"))


def test_one_that_fails_is_told_in_its_own_words(scratch: Path) -> None:
    with running(scratch, "wrong", "text_encoder", at_once=2) as pool:
        with pytest.raises(ExportError, match=r"no\. The compiler's words: .*wrong.*try less") as told:
            pool.result("wrong", "main")
        (log,) = (word.rstrip(".") for word in told.value.message.split() if ".log" in word)
        assert Path(log).read_text() == "about wrong.main\n"


def test_one_that_a_signal_ends_is_told(scratch: Path) -> None:
    with running(scratch, "killed", at_once=2) as pool, pytest.raises(SdxlError, match="ended with signal 11: about"):
        pool.result("killed", "main")


def test_where_cuda_is_up_already_compilers_start_by_themselves(scratch: Path, tmp_path: Path) -> None:
    """What is forked then can't use a GPU. A stand-in for the interpreter answers for the compiler."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "{\\"file\\": \\"$2\\"}" > "${3%.job}.result"\n')
    python.chmod(0o755)
    script = tmp_path / "stand_in_nursery.py"
    up = f"nursery._driver_is_up, sys.executable = (lambda: True), {str(python)!r}\n"
    script.write_text(STAND_IN.replace("nursery.run(", f"{up}nursery.run("))
    progress, said = telling()
    with running(scratch, "unet", at_once=1, progress=progress) as pool:
        assert pool.result("unet", "main") == {"file": "exporters.worker"}
    assert said == [SLOWER.format("an import has initialized CUDA")]


def test_what_could_not_be_made_for_all_is_told(scratch: Path) -> None:
    progress, said = telling()
    with running(scratch, "unet", at_once=1, progress=progress) as pool:
        pool.result("unet", "main")
    assert said == [
        "What all compilers need is made by those that need it first, which is slower: no room for headers."
    ]


def test_imports_that_fail_are_left_to_the_compilers(scratch: Path) -> None:
    (scratch / "broken").touch()
    progress, said = telling()
    with running(scratch, "unet", at_once=1, progress=progress) as pool:
        assert pool.result("unet", "main") == {"file": "x"}
    assert said[0] == SLOWER.format("OSError: broken library")


def test_a_build_that_ends_before_it_compiles_leaves_nothing_at_work(scratch: Path) -> None:
    (scratch / "slow").touch()
    with compiler.Pool(Progress(quiet=True)) as pool:
        pool.prepare(jobs("unet"), scratch)
        until = time.monotonic() + 20
        while not _groups(scratch) and time.monotonic() < until:
            time.sleep(0.05)
        assert _groups(scratch), "what is made for all of them is under way"
    assert not _groups(scratch)


def test_a_store_may_be_called_anything(scratch: Path) -> None:
    odd = scratch / "my store\nof ü"
    odd.mkdir()
    with running(odd, "unet", at_once=1) as pool:
        assert pool.result("unet", "main") == {"file": "x"}


def test_a_build_that_ends_at_once_waits_for_no_imports(scratch: Path, tmp_path: Path) -> None:
    script = tmp_path / "stand_in_nursery.py"
    script.write_text(f"import time\ntime.sleep(60)\n{STAND_IN}")
    began = time.monotonic()
    with running(scratch, "unet", at_once=1):
        time.sleep(0.3)
    assert time.monotonic() - began < 10


def telling() -> tuple[Progress, list[str]]:
    """Progress, and what it was told to say."""
    progress, said = Progress(quiet=True), list[str]()
    progress.say = said.append  # type: ignore[method-assign]
    return progress, said


def test_what_starts_them_is_told_if_it_dies_and_its_compilers_end(scratch: Path) -> None:
    with running(scratch, "long", "orphan", at_once=2) as pool:
        with pytest.raises(SdxlError, match="What starts the compilers ended with signal 9"):
            pool.result("orphan", "main")
        assert _groups(scratch), "long is at work still, with nobody above it"
    until = time.monotonic() + 10
    while _groups(scratch) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _groups(scratch), "its leash is gone"


def test_compilers_at_work_end_with_the_pool(scratch: Path) -> None:
    with running(scratch, "long", at_once=1):
        until = time.monotonic() + 20
        while not _groups(scratch) and time.monotonic() < until:
            time.sleep(0.05)
        assert _groups(scratch)
    assert not _groups(scratch)


def _groups(scratch: Path) -> list[int]:
    """Compilers at work: processes whose log is open below the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                says = os.readlink(entry / "fd" / "1")
                if says.startswith(str(scratch)) and not says.endswith("nursery.log"):
                    found.append(int(entry.name))
    return found


def test_a_watch_that_fails_is_told_and_not_waited_for(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: compiler.Pool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.Pool, "_collect", full)
    with running(scratch, "unet", at_once=1) as pool, pytest.raises(OSError, match="No space"):
        pool.result("unet", "main")
