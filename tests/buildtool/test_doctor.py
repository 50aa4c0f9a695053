"""Each finding of the doctor, on machines that have it and machines that don't."""

import importlib.metadata
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from buildtool import doctor
from buildtool.doctor import Row
from buildtool.store import machine
from buildtool.store.machine import Gpu
from tests import standin_interpreter

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", "sm90", 85 * 10**9, "580.159")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CXX", raising=False)
    yield


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_whole_report_has_one_line_each_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from buildtool import doctor; rows = doctor.report(Path(sys.argv[1]));"
        "assert rows and all('\\n' not in row.detail + row.hint for row in rows), rows;"
        "assert {'Python', 'torch', 'C++ compiler', 'memory', 'disk', 'backend trt'} <= {row.name for row in rows};"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "artifacts")], check=True)
    assert not (tmp_path / "artifacts").exists()


def test_torch_without_byte_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert doctor.byte_code() == [], "the first start keeps it"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (row,) = doctor.byte_code()
    assert row.status == "warn" and row.hint == f"python -m compileall -q {tmp_path}"
    subprocess.run([sys.executable, *row.hint.split()[1:]], check=True)
    assert doctor.byte_code() == []


@needs_compiler
def test_a_good_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    row = doctor.compiler()
    assert row.status == "ok" and "g++" in row.detail
    monkeypatch.setenv("CXX", "g++")
    assert "from $CXX" in doctor.compiler().detail


@needs_compiler
def test_a_compiler_that_links_libstdcxx_statically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "cxx", 'exec g++ -static-libstdc++ -static-libgcc "$@"')))
    row = doctor.compiler()
    assert (row.status, "statically" in row.detail) == ("warn", True)
    assert "export CXX=g++" in row.hint


@needs_compiler
def test_compilers_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = script(tmp_path / "old", '[ "$1" = --version ] && echo "old 4.8" && exit; echo "error: no c++20" >&2; exit 1')
    monkeypatch.setenv("CXX", str(old))
    assert doctor.compiler() == Row(
        "C++ compiler",
        "missing",
        f"{old} (from $CXX): old 4.8; it cannot build a C++20 library: error: no c++20",
        "Set $CXX to a newer one.",
    )
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", "exit 3")))
    assert "does not start" in doctor.compiler().detail
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.compiler().status == "missing" and "export CXX=g++" in doctor.compiler().hint


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.compiler().status == "missing"
    assert "apt-get install g++" in doctor.compiler().hint


@pytest.mark.parametrize(
    ("found", "gpus", "status"),
    [
        ({"torch": "2.13.0+cpu", "cuda": "none"}, [], "ok"),
        ({"torch": "2.13.0+cu130", "cuda": "13.0"}, [H100], "ok"),
        ({"torch": "2.13.0+cpu", "cuda": "none"}, [H100], "warn"),
        ({"torch": "2.9.1+cu130", "cuda": "13.0"}, [H100], "missing"),
        ({"torch": "2.12.0a0+git12", "cuda": "none"}, [], "ok"),
        ({}, [], "missing"),
    ],
)
def test_torch(monkeypatch: pytest.MonkeyPatch, found: dict[str, str], gpus: list[Gpu], status: str) -> None:
    monkeypatch.setattr(machine, "torch_version", lambda: found)
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    assert doctor.torch().status == status


def test_gpus_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_version", lambda: {"torch": "2.13.0+cu130", "cuda": "13.0"})
    monkeypatch.setattr(machine, "gpus", lambda: [H100])
    assert doctor.gpus() == [
        Row("driver", "ok", "580.159"),
        Row("GPU 0", "ok", "NVIDIA H100 80GB HBM3, sm90, 85 GB"),
    ]
    old = Gpu(0, H100.name, "sm90", 1, "550.54")
    monkeypatch.setattr(machine, "gpus", lambda: [old])
    assert doctor.gpus()[0].status == "warn" and "580" in doctor.gpus()[0].hint
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--gpu cpu" in doctor.gpus()[0].hint and "CUDA_VISIBLE_DEVICES=''" in doctor.gpus()[0].detail


def test_triton_is_only_missing_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "versions", lambda *dists: {})
    monkeypatch.setattr(machine, "gpus", list)
    assert doctor.triton().status == "ok"
    monkeypatch.setattr(machine, "torch_version", lambda: {"torch": "2.13.0+cu130", "cuda": "13.0"})
    monkeypatch.setattr(machine, "gpus", lambda: [H100])
    assert doctor.triton().status == "missing"


def test_libraries_against_the_ranges_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = ["diffusers<0.43,>=0.36", "click>=8.1", "torch>=2.11", 'onnx>=1; extra == "onnx"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda dist: requires)
    monkeypatch.setattr(machine, "versions", lambda *dists: {"diffusers": "0.42.1", "click": "8.3.0"})
    assert doctor.libraries() == [
        Row("diffusers", "ok", "0.42.1"),
        Row("libraries", "ok", "all 2 are in their tested ranges"),
    ]
    monkeypatch.setattr(machine, "versions", lambda *dists: {"diffusers": "0.50.0"})
    newer, absent = doctor.libraries()
    assert (newer.name, newer.status) == ("diffusers", "warn") and newer.hint == "pip install 'diffusers<0.43,>=0.36'"
    assert (absent.name, absent.status) == ("click", "missing")


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    row = doctor.disk(tmp_path / "not" / "made yet")
    assert (row.status, "1 GB free" in row.detail) == ("warn", True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    assert doctor.disk(tmp_path).status == "ok"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in doctor.disk(tmp_path).detail


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_meminfo", lambda field: 8 * 10**9)
    assert doctor.memory().status == "warn" and "tiny" in doctor.memory().hint


def test_what_each_backend_would_need(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, str] = {}
    monkeypatch.setattr(machine, "versions", lambda *dists: {d: v for d, v in installed.items() if d in dists})
    assert doctor.backend("torch").status == "missing"
    assert doctor.backend("onnx") == Row(
        "backend onnx",
        "warn",
        "needs onnx, onnxscript, onnx-graphsurgeon, onnxruntime or onnxruntime-gpu",
        "pip install onnx onnxscript onnx-graphsurgeon onnxruntime",
    )
    installed.update({"onnx": "1.20", "onnxscript": "0.7", "onnx-graphsurgeon": "0.6", "onnxruntime-gpu": "1.24"})
    assert doctor.backend("onnx").status == "ok" and "onnxruntime-gpu 1.24" in doctor.backend("onnx").detail


def test_either_tensorrt_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = {"onnx": "1.20", "onnxscript": "0.7", "onnx-graphsurgeon": "0.6"}
    for library in ({"tensorrt_rtx": "1.7"}, {"tensorrt": "11.4"}, {"tensorrt_rtx_cu12": "1.7"}):
        installed = graphs | library
        monkeypatch.setattr(machine, "versions", lambda *d, i=installed: {n: v for n, v in i.items() if n in d})
        assert doctor.backend("trt").status == "ok"
    monkeypatch.setattr(machine, "versions", lambda *d: {n: v for n, v in graphs.items() if n in d})
    assert (doctor.backend("trt").status, doctor.backend("trt").hint) == ("warn", "pip install tensorrt_rtx")


def test_onediff_is_looked_for_in_its_own_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SDXL_ONEDIFF_PYTHON", raising=False)
    row = doctor.onediff()
    assert row.status == "warn" and "none is named" in row.detail and "docs/onediff.md" in row.hint
    monkeypatch.setenv("SDXL_ONEDIFF_PYTHON", str(standin_interpreter.write(tmp_path / "has")))
    row = doctor.onediff()
    assert row.status == "ok" and "onediff 1.2.0+standin, nexfort 0.1.dev330+standin, torch" in row.detail
    monkeypatch.setenv("SDXL_ONEDIFF_PYTHON", str(standin_interpreter.write(tmp_path / "lacks", {"onediff": "1.2.0"})))
    row = doctor.onediff()
    assert row.status == "warn" and "has no nexfort" in row.detail and "requirements/onediff.txt" in row.hint


def test_python_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    assert doctor.python_headers().status == "warn"
    (tmp_path / "Python.h").touch()
    assert doctor.python_headers().status == "ok"
