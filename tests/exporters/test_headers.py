"""Precompiled headers that one build keeps for the next; the compiler is a stand-in."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporters import headers
from exporters.base import ExportError


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Headers that had to be made, in the folder of a build's own."""
    from torch._inductor import codecache

    names: list[str] = []
    own = tmp_path / "own"

    def precompile(header: str, *_: Any, fails: bool = False) -> str:
        path = own / f"{header}.gch"
        if not path.exists():
            path.write_text("half")
            if fails:
                raise RuntimeError
            path.write_text("whole")
            names.append(header)
        return str(own / header)

    monkeypatch.setattr(codecache, "_HEADER_DIR", str(own))
    monkeypatch.setattr(codecache, "_precompile_header", precompile)
    return names


def build(tmp_path: Path, header: str, **more: Any) -> str:
    from torch._inductor import codecache

    for file in (tmp_path / "own").glob("*"):  # goes with the build before
        file.unlink()
    with headers.kept():
        return codecache._precompile_header(header, "command", **more)


def test_a_header_is_made_once(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(headers.VARIABLE, str(tmp_path / "kept"))
    for header in ("a.h", "a.h", "b.h", "a.h"):
        path = build(tmp_path, header)
        assert path == str(tmp_path / "own" / header) and Path(f"{path}.gch").read_text() == "whole"
    assert made == ["a.h", "b.h"]


def test_half_a_header_is_not_kept(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(headers.VARIABLE, str(tmp_path / "kept"))
    with pytest.raises(RuntimeError):
        build(tmp_path, "a.h", fails=True)
    assert list((tmp_path / "kept").iterdir()) == []
    build(tmp_path, "a.h")
    assert made == ["a.h"]


def test_headers_on_another_disk_are_copied(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setenv(headers.VARIABLE, str(tmp_path / "kept"))
    for header in ("a.h", "b.h", "a.h"):
        build(tmp_path, header)
    assert made == ["a.h", "b.h"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["a.h.gch", "b.h.gch"]


def test_a_full_disk_keeps_no_half_of_a_header(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def copy(source: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(shutil, "copyfile", copy)
    monkeypatch.setenv(headers.VARIABLE, str(tmp_path / "kept"))
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path, "a.h")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_folder_that_cannot_be_is_told(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(headers.VARIABLE, str(tmp_path / "file" / "kept"))
    with pytest.raises(ExportError, match=r"SDXL_HEADERS names .*kept, where no folder can be made: Not a directory"):
        build(tmp_path, "a.h")


def test_without_a_folder_each_build_makes_its_own(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(headers.VARIABLE)
    (tmp_path / "own").mkdir()
    assert [build(tmp_path, "a.h") for _ in range(2)] and made == ["a.h", "a.h"]


def test_torch_still_has_what_is_replaced() -> None:
    from torch._inductor import codecache

    assert callable(codecache._precompile_header) and Path(codecache._HEADER_DIR).name == "precompiled_headers"
