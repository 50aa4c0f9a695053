"""Compilers beside the builder, with a stand-in for the interpreter that runs them."""

import time
from pathlib import Path

import pytest

from buildtool import compiler
from buildtool.progress import Progress
from exporters.base import ExportError, Request

REQUEST = Request(64, 64, 1, "fp32", "cpu", "cpu-avx2")


def jobs(*names: str) -> list[compiler.Job]:
    return [compiler.Job("torch", name, "main", {}, REQUEST) for name in names]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A "compiler" that takes 0.2 s and answers; that of ``wrong`` fails."""
    script = tmp_path / "stand-in-python"
    script.write_text(
        '#!/bin/sh\nsleep 0.2\ncase "$3" in\n'
        '*wrong*) echo \'{"error": "no", "hint": "try less"}\' > "${3%.job}.result"; exit 1;;\n'
        '*) echo \'{"file": "x"}\' > "${3%.job}.result";;\nesac\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(compiler.sys, "executable", str(script))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return scratch


def test_the_next_compiler_starts_while_the_builder_is_busy(stand_in: Path) -> None:
    progress = Progress(quiet=True)
    with compiler.Pool(1, progress) as pool:
        pool.start(jobs("unet", "vae_decoder", "text_encoder"), stand_in)
        until = time.monotonic() + 20
        while len(list(stand_in.glob("*.result"))) < 3 and time.monotonic() < until:
            time.sleep(0.01)  # busy with fp32 eager, say
        assert len(list(stand_in.glob("*.result"))) == 3
        time.sleep(1.0)
        assert [pool.result(name, "main") for name in ("unet", "text_encoder", "vae_decoder")] == [{"file": "x"}] * 3
    # Its own time, not the time until somebody asked for it.
    assert all(progress.seconds[f"{name}.main: compile"] < 1.0 for name in ("unet", "vae_decoder", "text_encoder"))


def test_one_that_fails_is_told_in_its_own_words(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path))  # where its log is kept
    with compiler.Pool(2, Progress(quiet=True)) as pool:
        pool.start(jobs("wrong", "text_encoder"), stand_in)
        with pytest.raises(ExportError, match=r"no\. The compiler's words: .*wrong.*try less"):
            pool.result("wrong", "main")


def test_a_watch_that_fails_is_told_and_not_waited_for(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: compiler.Pool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.Pool, "_collect", full)
    with compiler.Pool(1, Progress(quiet=True)) as pool:
        pool.start(jobs("unet"), stand_in)
        with pytest.raises(OSError, match="No space"):
            pool.result("unet", "main")
