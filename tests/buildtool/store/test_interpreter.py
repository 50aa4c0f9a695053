"""The Python that OneDiff runs in: what is missing there is told in one line, with what to do."""

from pathlib import Path

import pytest

from buildtool.store import interpreter
from buildtool.store.errors import SdxlError
from tests import standin_interpreter

WORKS = {
    "python": "3.10.13",
    "system": "linux",
    "torch": "2.4.0+cu121",
    "triton": "3.0.0",
    "onediff": "1.2.0",
    "nexfort": "0.1.dev330",
    "nexfort_wants_torch": "2.4.0+cu121",
    "diffusers": "0.32.2",
    "transformers": "4.48.3",
}
"""What the worker says of an environment that docs/onediff.md sets up."""


def test_nothing_is_wrong_with_the_documented_environment() -> None:
    assert interpreter.lacks("nexfort", WORKS, "py") is None
    newer = {**WORKS, "oneflow": "0.9.1.dev20240719+cu121"}
    assert interpreter.lacks("oneflow", newer, "py") is None


@pytest.mark.parametrize(
    ("compiler", "changes", "words", "hint"),
    [
        ("nexfort", {"system": "win32"}, "for Linux; py runs on win32", "WSL 2"),
        ("nexfort", {"python": "3.13.0"}, "Python 3.8 to 3.12; py is 3.13.0", "docs/onediff.md"),
        ("nexfort", {"python": "3.7.9"}, "Python 3.8 to 3.12; py is 3.7.9", "docs/onediff.md"),
        ("nexfort", {"torch": None}, "py has no torch", "py -m pip install -r requirements/onediff.txt"),
        ("nexfort", {"onediff": None}, "py has no onediff", "py -m pip install -r requirements/onediff.txt"),
        ("nexfort", {"nexfort": None}, "py has no nexfort", "py -m pip install -r requirements/onediff.txt"),
        ("nexfort", {"diffusers": None}, "py has no diffusers", "py -m pip install -r requirements/onediff.txt"),
        ("nexfort", {"torch": "2.5.1+cu124"}, "runs with torch 2.4.0+cu121; py has 2.5.1", "pip install torch==2.4.0"),
        ("oneflow", {}, "py has no oneflow. onediff 1.2.0 needs a build that is not on PyPI", "--compiler nexfort"),
        ("oneflow", {"oneflow": "0.9.0"}, "needs a newer oneflow than 0.9.0", "--compiler nexfort"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    compiler: str, changes: dict[str, str | None], words: str, hint: str
) -> None:
    there = {name: version for name, version in {**WORKS, **changes}.items() if version is not None}
    told = interpreter.lacks(compiler, there, "py")
    assert told is not None and words in told[0] and hint in told[1]
    assert "\n" not in " ".join(told)


def test_no_interpreter_and_one_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(interpreter.VARIABLE, raising=False)
    with pytest.raises(SdxlError, match=r"none is named\. Set one up as docs/onediff\.md says, then: export"):
        interpreter.named()
    with pytest.raises(SdxlError, match="does not start: No such file"):
        interpreter.versions(str(tmp_path / "nothing"))
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no modules >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(SdxlError, match="does not work: no modules"):
        interpreter.versions(str(broken))


def test_auto_takes_nexfort_and_the_versions_come_from_there(tmp_path: Path) -> None:
    python = str(standin_interpreter.write(tmp_path / "both", {**standin_interpreter.INSTALLED, "oneflow": "1.0"}))
    compiler, versions = interpreter.choose("auto", python)
    assert compiler == "nexfort"
    assert versions["nexfort"] == "0.1.dev330+standin" and "oneflow" not in versions
    only = str(standin_interpreter.write(tmp_path / "one", {"onediff": "1.2.0", "oneflow": "1.0"}))
    assert interpreter.choose("auto", only)[0] == "oneflow"
    with pytest.raises(SdxlError, match="has no nexfort"):
        interpreter.choose("nexfort", only)
