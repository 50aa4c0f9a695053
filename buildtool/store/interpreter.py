"""The other Python that OneDiff runs in: which one, and whether it has what OneDiff needs. Imports nothing heavy."""

import functools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from buildtool.store.errors import SdxlError

VARIABLE = "SDXL_ONEDIFF_PYTHON"
WORKER = Path(__file__).resolve().parents[2] / "exporters" / "onediff_worker.py"
"""The program that runs there. It is started and never imported."""
COMPILERS = ("nexfort", "oneflow")
"""OneDiff's two, the one that ``auto`` prefers first."""
NEWEST_PYTHON = (3, 12)
"""The last that nexfort has wheels for; the first is 3.8."""
MODES = ("cudagraphs", "benchmark", "low-precision", "max-autotune", "max-optimize", "O2", "O3")
"""What nexfort's mode may be made of. Not ``freezing``, which puts one checkpoint's weights into the code."""
DOCS = "Set one up as docs/onediff.md says"


def named() -> str:
    """The interpreter's path, from ``$SDXL_ONEDIFF_PYTHON``.

    Raises:
        SdxlError: none is named.
    """
    path = os.environ.get(VARIABLE, "")
    if not path:
        raise SdxlError(
            "OneDiff runs in a Python of its own (its torch is older than this one's), and none is named.",
            f"{DOCS}, then: export {VARIABLE}=PATH",
        )
    return path


def environment() -> dict[str, str]:
    """The variables that its processes get: this Python's own packages are not for it."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def versions(python: str) -> dict[str, str]:
    """What is installed there: distribution -> version, ``python``, and ``nexfort_wants_torch`` where nexfort says so.

    Raises:
        SdxlError: it doesn't start.
    """
    return dict(_versions(python))


@functools.cache
def _versions(python: str) -> Mapping[str, str]:
    command = [python, str(WORKER), "versions"]
    hint = f"{DOCS}, and name its python: export {VARIABLE}=PATH"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    except (OSError, subprocess.TimeoutExpired) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SdxlError(f"OneDiff's Python, {python}, does not start: {said}.", hint) from None
    try:
        found = {str(name): str(value) for name, value in json.loads(done.stdout).items()}
    except (ValueError, AttributeError):
        lines = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
        raise SdxlError(f"OneDiff's Python, {python}, does not work: {lines[-1]}.", hint) from None
    return found


def choose(asked: str, python: str) -> tuple[str, dict[str, str]]:
    """The compiler that builds there, and the versions that shape its code.

    Args:
        asked: ``nexfort``, ``oneflow`` or ``auto``.

    Raises:
        SdxlError: the interpreter lacks something, or has it in a version that doesn't work.
    """
    found = versions(python)
    compiler = asked
    if asked == "auto":
        compiler = next((name for name in COMPILERS if name in found), COMPILERS[0])
    problem = lacks(compiler, found, python)
    if problem:
        raise SdxlError(*problem)
    shaping = ("python", "torch", "triton", "onediff", compiler, "diffusers", "transformers")
    return compiler, {name: found[name] for name in shaping if name in found}


def mode(asked: str, device: str) -> str:
    """nexfort's mode for ``--mode``, names joined with ``:``; always with its caches, which are what an artifact keeps.

    Raises:
        SdxlError: a name that is none, or that needs a GPU.
    """
    names = asked.split(":")
    for name in names:
        if name not in MODES:
            raise SdxlError(f"--mode {asked}: {name!r} is none of nexfort's modes.", f"There are: {', '.join(MODES)}.")
    if device == "cpu" and "cudagraphs" in names:
        raise SdxlError(f"--mode {asked}: cudagraphs needs a GPU.", "Leave it out.")
    return ":".join([*names, "cache-all"])


def lacks(compiler: str, found: Mapping[str, str], python: str) -> tuple[str, str] | None:
    """What keeps a compiler from working there: the line and what to do about it; None if nothing is known to.

    Args:
        found: what :func:`versions` says.
    """
    pip = f"{shlex.quote(python)} -m pip install"
    if found["system"] != "linux":
        return f"OneDiff's compilers are for Linux; {python} runs on {found['system']}.", "On Windows, use WSL 2."
    if not (3, 8) <= _numbers(found["python"])[:2] <= NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        return f"OneDiff's compilers run on Python 3.8 to {newest}; {python} is {found['python']}.", f"{DOCS}."
    for package in ("torch", "onediff", compiler, "diffusers", "transformers"):
        if package in found:
            continue
        if package == "oneflow":
            return (
                f"{python} has no oneflow. onediff {found['onediff']} needs a build that is not on PyPI.",
                "Get one from the OneFlow project, or try: --compiler nexfort",
            )
        return f"{python} has no {package}.", f"{pip} -r requirements/onediff.txt"
    wanted = found.get("nexfort_wants_torch", "")
    if compiler == "nexfort" and wanted and found["torch"] != wanted:
        plain = wanted.partition("+")[0]
        return (
            f"nexfort {found['nexfort']} runs with torch {wanted}; {python} has {found['torch']}.",
            f"{pip} torch=={plain}",
        )
    if compiler == "oneflow" and _numbers(found["oneflow"]) <= (0, 9, 0) and "dev" not in found["oneflow"]:
        return (
            f"onediff {found['onediff']} needs a newer oneflow than {found['oneflow']}, the last one on PyPI.",
            "Get one from the OneFlow project, or try: --compiler nexfort",
        )
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
