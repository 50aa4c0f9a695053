"""``benchmarks/build.py``: whole builds, and what each adds to a store."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import build
from buildtool.store import manifest as manifests
from tests import micro


def test_a_file_with_two_names_is_on_the_disk_once(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(1000))
    os.link(tmp_path / "blob", tmp_path / "weights")
    (tmp_path / "name").symlink_to("blob")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "code").write_bytes(bytes(10))
    assert build.disk(tmp_path) == 1010


def test_a_build_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"first artifact: sdxl-build ended with 1\. .*nothing-of-that-name"):
        build.main(["--model", "./nothing-of-that-name", "--gpu", "cpu", "--artifacts", str(tmp_path)])


def test_builds_before_one_that_fails_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: Any) -> Any:
        yield SimpleNamespace(manifest=None, what="first artifact", seconds=1.0, added=2, told={})
        raise SystemExit("Error: further resolution: sdxl-build ended with 1.")

    monkeypatch.setattr(build, "measure", measure)
    monkeypatch.setattr(build, "cells", lambda made: [made.what])
    monkeypatch.setattr(build.report, "hardware", lambda *_: {})
    monkeypatch.setattr(build.report, "footer", lambda *_: "footer")
    with pytest.raises(SystemExit, match="further resolution"):
        build.main(["--artifacts", str(tmp_path), "--json", str(tmp_path / "told.json")])
    assert [each["what"] for each in json.loads((tmp_path / "told.json").read_text())["builds"]] == ["first artifact"]
    out = capsys.readouterr().out
    assert "| first artifact |" in out and "footer" in out


@pytest.mark.slow
def test_a_further_checkpoint_compiles_nothing(
    micro_model: Path, micro_artifact: Path, store_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a store of its own, which nobody else adds to, with the micro model's code in it."""
    for component in manifests.read(micro_artifact).components.values():
        code = Path("v1/code") / component.code_key
        shutil.copytree(store_root / code, tmp_path / "store" / code)
    other = micro.write(tmp_path / "micro-of-a-benchmark", seed=9)
    told, store = tmp_path / "told.json", tmp_path / "store"
    words = ["--model", str(micro_model), "--other-model", str(other), "--gpu", "cpu", "--artifacts", str(store)]
    assert build.main([*words, "--json", str(told)]) == 0
    first, further, again = json.loads(told.read_text())["builds"]
    assert [each["told"]["hit"] for each in (first, further, again)] == [False, False, True]
    assert first["told"]["compiled"] == further["told"]["compiled"] == []
    weights = sum(path.stat().st_size for path in other.rglob("*.safetensors"))
    assert weights / 2 < further["added"] < 2 * weights + 1_000_000 and again["added"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| build | seconds |")
    assert [line.split(" | ")[4] for line in lines[2:5]] == ["nothing", "nothing", "a hit"]
