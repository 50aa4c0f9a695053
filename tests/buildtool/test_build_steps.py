"""Steps of a build that happen beside each other or when memory runs out, without compilers and models."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from buildtool import compiler, gpu_room
from buildtool.build import _Build
from buildtool.progress import Progress
from buildtool.store import manifest as manifests
from buildtool.store.manifest import Variant
from exporters import sdxl
from exporters.base import Request
from tests.runtimes.stand_in import stand_in_manifest

STAGE = Path("stage")
NAMES = ("first", "second", "third")


def a_build(**attributes: Any) -> _Build:
    """A build that has only what a step looks at."""
    made = object.__new__(_Build)
    plain = {
        "progress": Progress(quiet=True),
        "on_gpu": False,
        "_assembled": {},
        "_stopped": False,
        "golden": {},
        "_pool": None,
    }
    table = {name: name for name in NAMES}
    made.__dict__.update({**plain, "table": table, "row": SimpleNamespace(weighted=False), **attributes})
    return made


def test_golden_tensors_come_from_the_cpu_once_the_gpu_has_no_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, str]] = []

    def golden(row: Any, configs: Any, tensors: Any, request: Request) -> dict[str, str]:
        """Stands in for fp32 eager; the second component doesn't fit the GPU."""
        made.append((row, request.device))
        if row == "second" and request.device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return {row: request.device}

    monkeypatch.setattr(sdxl, "golden", golden)
    monkeypatch.setattr(gpu_room, "release", lambda: None)
    planned = SimpleNamespace(spec=SimpleNamespace(golden=True))
    build = a_build(planned=planned, source=SimpleNamespace(configs={}))
    build._golden({name: {} for name in NAMES}, Request(64, 64, 1, "fp16", "cuda:0", "sm90", {}))
    assert build.golden == {"first": "cuda:0", "second": "cpu", "third": "cpu"}
    assert made == [("first", "cuda:0"), ("second", "cuda:0"), ("second", "cpu"), ("third", "cpu")]
    (line,) = capsys.readouterr().err.splitlines()
    assert "on the CPU" in line and "the GPU's memory ran out" in line


def test_components_are_assembled_beside_each_other() -> None:
    met = threading.Barrier(len(NAMES), timeout=5)

    def assemble(name: str, tensors: Any, stage: Path) -> str:
        met.wait()
        return f"{name} of {[*tensors]} in {stage}"

    build = a_build(_assemble=assemble)
    with build._assembler(STAGE) as submit:
        for name in NAMES:
            submit(name, {name: 0})
    made: list[Any] = [build._assembled[name].result(0) for name in NAMES]
    assert made == [f"{name} of {[name]} in stage" for name in NAMES]


def test_engines_that_hold_their_weights_are_assembled_one_after_the_other() -> None:
    began: list[str] = []
    running = threading.Lock()

    def assemble(name: str, tensors: Any, stage: Path) -> None:
        assert running.acquire(blocking=False), "one at a time"
        began.append(name)
        time.sleep(0.02)
        running.release()

    build = a_build(_assemble=assemble, row=SimpleNamespace(weighted=True))
    order = ["third", "first", "second"]
    with build._assembler(STAGE) as submit:
        for name in order:
            submit(name, {})
    assert began == order and not any(done.exception(0) for done in build._assembled.values())


def test_a_build_that_fails_waits_for_no_weights() -> None:
    began = threading.Event()
    ended: list[str] = []

    def assemble(name: str, tensors: Any, stage: Path) -> None:
        """Stands in for a file that takes 5 s to write."""
        began.set()
        deadline = time.monotonic() + 5
        try:
            while time.monotonic() < deadline:
                build._wrote(1, 2)
                time.sleep(0.01)
            ended.append(f"{name} written")
        except InterruptedError:
            ended.append(f"{name} interrupted")
            raise

    build = a_build(_assemble=assemble, row=SimpleNamespace(weighted=True))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), build._assembler(STAGE) as submit:
        submit("first", {})
        submit("second", {})
        assert began.wait(5)
        raise KeyboardInterrupt
    assert ended == ["first interrupted"] and time.monotonic() - start < 4
    assert isinstance(build._assembled["first"].exception(0), InterruptedError)
    assert build._assembled["second"].cancelled()


def test_weights_that_cannot_be_written_end_the_build_at_once() -> None:
    def assemble(name: str, tensors: Any, stage: Path) -> None:
        raise OSError(28, "No space left on device")

    with compiler.Pool(Progress(quiet=True)) as pool:
        build = a_build(_assemble=assemble, _pool=pool)
        with build._assembler(STAGE) as submit:
            submit("first", {})
        with pytest.raises(OSError, match="No space"):
            pool.result("unet", "cfg")  # whose compiler would go on for minutes


def test_a_thread_that_assembles_uses_the_builds_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[int, bool]] = []
    here = threading.current_thread()
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: chosen.append((i, threading.current_thread() is here)))
    build = a_build(
        on_gpu=True,
        planned=SimpleNamespace(target=SimpleNamespace(index=1)),
        _assemble=lambda name, tensors, stage: None,
    )
    with build._assembler(STAGE) as submit:
        submit("unet", {})
    assert chosen == [(1, False)]


def test_what_each_variant_takes_of_a_gpu_is_in_the_manifest() -> None:
    plain = stand_in_manifest()
    unet = plain.components["unet"]
    forms = {"cfg": unet.variants["cfg"], "nocfg": unet.variants["cfg"]}
    unchecked = msgspec.structs.replace(plain, components={"unet": msgspec.structs.replace(unet, variants=forms)})

    def passed(name: str, form: Variant) -> Variant:
        check = msgspec.structs.replace(form.check, error={name: 0.0})
        return msgspec.structs.replace(form, check=check, activation_bytes=7_000_000 if name == "unet.cfg" else 0)

    made = a_build()._with_checks(unchecked, passed)
    read = manifests.decode(manifests.encode(made), "x").components["unet"].variants
    assert {name: form.activation_bytes for name, form in read.items()} == {"cfg": 7_000_000, "nocfg": 0}
    assert [form.check.error for form in read.values()] == [{"unet.cfg": 0.0}, {"unet.nocfg": 0.0}]
    assert a_build()._with_checks(unchecked, lambda name, form: form) == unchecked


def test_the_check_says_what_a_variant_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from buildtool import golden

    result = {"error": {"sample": 0.0}, "tolerance": 1e-4, "passed": True}
    asked: list[Any] = []

    def run(folder: Path, waiting: Any) -> golden.Checked:
        asked.append((folder, waiting))
        return golden.Checked({"unet.cfg": {**result, "activation_bytes": 5}})

    monkeypatch.setattr(golden, "run", run)
    waiting = object()
    build = a_build(present=True, golden={"x": 0}, _waiting=waiting)
    made = build._checked(tmp_path, stand_in_manifest())
    assert made.components["unet"].variants["cfg"].activation_bytes == 5
    assert asked == [(tmp_path, waiting)]
