"""What is in a store: the functions behind ``sdxl-build ls``, ``show``, ``verify`` and ``prune``.

They return data; ``listing_text`` says it for people. No torch: `verify` starts it in a process of its own.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from buildtool.golden import run as run_golden
from buildtool.store import files, machine, manifest
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from buildtool.store.prune import age_in_days
from buildtool.store.store import Pruned, Store, missing_files, verify_files
from buildtool.store.summary import Summary

_DISTRIBUTIONS = ("torch", "triton", "tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "onnxruntime-gpu", "nexfort")
"""Packages that an artifact can't do without. Other names of a toolchain may be no packages at all."""
_DAYS = {"h": 1 / 24, "d": 1.0, "w": 7.0}


class Row(msgspec.Struct, kw_only=True):
    """One artifact, as ``ls`` lists it."""

    path: str
    model: str
    size: str = ""
    """``<width>x<height>`` in pixels."""
    batch: int = 0
    precision: str = ""
    backend: str = ""
    target: str = ""
    created: str = ""
    age_days: float = 0.0
    own_bytes: int = 0
    """Disk space that only this artifact's folder uses."""
    shared_bytes: int = 0
    """Disk space of files that have other names too: in the blobs, the code, or another artifact."""
    problem: str = ""
    """Why no run and no build will use it; empty for a whole artifact."""
    stale: list[str] = []
    """What differs on this machine from the one it was built for, a sentence each."""
    rebuild: str = ""
    """The command that builds it again, here."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine has that artifacts depend on."""

    gpus: tuple[machine.Gpu, ...]
    versions: Callable[[str], str | None]
    """The installed version of a package, or of ``cuda``; None if it isn't here."""
    cpu_runs: Callable[[str], bool]


class Verified(msgspec.Struct, kw_only=True):
    """What ``verify`` found."""

    path: str
    problems: list[str]
    """Of the files, or of the check itself; a sentence each."""
    variants: dict[str, dict[str, Any]]
    """``unet.cfg`` -> error, tolerance, passed, as the golden tensors through the engines gave them."""
    checked: bool
    """Whether the golden tensors ran."""
    passed: bool


def this_machine() -> Machine:
    """What is here now, without importing torch."""
    torch = machine.torch_version()

    def version(name: str) -> str | None:
        return torch.get(name) or machine.versions(name).get(name)

    return Machine(gpus=tuple(machine.gpus()), versions=version, cpu_runs=machine.cpu_runs)


def ls(store: Store, *, stale: bool = False, here: Machine | None = None) -> list[Row]:
    """Every artifact of the store, in order of its folder.

    Args:
        stale: only those that this machine wouldn't build the same way, with the reasons.
        here: what to compare with; this machine if left out.
    """
    rows = []
    for folder, found in store.summaries():
        row = _row(store, folder, found)
        if stale:
            if isinstance(found, SdxlError):
                continue
            here = here or this_machine()
            row.stale = stale_reasons(found, here)
            if not row.stale:
                continue
        rows.append(row)
    return rows


def _row(store: Store, folder: Path, found: Summary | SdxlError) -> Row:
    own, shared = _bytes(folder)
    model, target, _ = folder.relative_to(store.base).parts
    row = Row(path=str(folder), model=model, target=target, own_bytes=own, shared_bytes=shared)
    if isinstance(found, SdxlError):
        row.problem = found.message
        return row
    key = found.key
    row.model, row.target, row.backend, row.precision = key.model, key.target, key.backend, key.precision
    row.size, row.batch, row.created = f"{key.width}x{key.height}", key.batch, found.created
    row.problem = next(iter(missing_files(folder, found)), "")
    row.rebuild = shlex.join(found.command)
    try:
        row.age_days = age_in_days(found.created)
    except ValueError:
        row.problem = row.problem or f"Its manifest says it was made {found.created!r}, which is no time."
    return row


def _bytes(folder: Path) -> tuple[int, int]:
    own = shared = 0
    with contextlib.suppress(FileNotFoundError):  # pruned or replaced while we look
        for name in files.file_names(folder):
            found = (folder / name).lstat()
            if found.st_nlink > 1:
                shared += found.st_size
            else:
                own += found.st_size
    return own, shared


def stale_reasons(listed: Manifest | Summary, here: Machine) -> list[str]:
    """Why this machine would not build the artifact as it is, a sentence each; [] if it would.

    Compared are the versions in the key, the GPU or instruction set of the target, and the driver.
    """
    key = listed.key
    reasons = []
    for name, was in key.toolchain.items():
        now = here.versions(name)
        if now is None and name in _DISTRIBUTIONS:
            reasons.append(f"It needs {name} {was}, which is not installed here.")
        elif now is not None and now != was:
            reasons.append(f"It was built with {name} {was}; here is {now}.")
    if key.target.startswith("cpu-"):
        isa = key.target.removeprefix("cpu-")
        if not here.cpu_runs(isa):
            reasons.append(f"It is for processors with {isa}, which this one lacks.")
        return reasons
    targets = key.target.split("+")
    fitting = [gpu for gpu in here.gpus if gpu.target in targets]
    if key.gpu_name != "any":
        fitting = [gpu for gpu in fitting if gpu.name == key.gpu_name]
    if not fitting:
        wanted = key.target if key.gpu_name == "any" else f"{key.gpu_name} ({key.target})"
        there = ", ".join(sorted({f"{gpu.name} ({gpu.target})" for gpu in here.gpus})) or "no GPU"
        reasons.append(f"It is for {wanted}; here is {there}.")
    elif (was := listed.built_with.get("driver", "")) and was not in {gpu.driver for gpu in fitting}:
        reasons.append(f"It was built under driver {was}; here is {fitting[0].driver}.")
    return reasons


def show(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything that an artifact's manifest says, with ``path``, ``own_bytes``, ``shared_bytes`` and ``problems``.

    ``problems`` are files that are missing or have another size; `verify` looks at the bytes.

    Raises:
        SdxlError: the folder is no artifact, or its manifest is damaged.
    """
    root = Path(folder)
    listed = manifest.read(root)
    own, shared = _bytes(root)
    head = {"path": str(root), "own_bytes": own, "shared_bytes": shared, "problems": missing_files(root, listed)}
    return {**head, **manifest.as_dict(listed)}


def verify(
    folder: str | os.PathLike[str], *, golden: bool = True, progress: Callable[[int], None] | None = None
) -> Verified:
    """Checks every byte of an artifact, then runs its golden tensors in a fresh process.

    An artifact with damaged files is not run: it holds native code.

    Args:
        golden: False checks the files only, on a machine without the GPU for example.
        progress: told the bytes of each file that was checked.

    Raises:
        SdxlError: there is no artifact in that folder.
    """
    root = Path(folder)
    if not (root / manifest.MANIFEST).is_file():
        manifest.read(root)
    result = Verified(path=str(root), problems=verify_files(root, progress), variants={}, checked=False, passed=False)
    if golden and not result.problems:
        checked = run_golden(root)
        result.variants, result.checked = checked.variants, bool(checked.variants)
        result.problems += [checked.problem] if checked.problem else []
    result.passed = not result.problems and all(v.get("passed", False) for v in result.variants.values())
    return result


def parse_age(text: str) -> float:
    """Days from ``30d``, ``12h`` or ``4w``.

    Raises:
        SdxlError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text.strip().lower())
    if not found:
        raise SdxlError(f"{text!r} is no age.", "Give hours, days or weeks: --older-than 12h, 30d or 4w")
    return float(found[1]) * _DAYS[found[2]]


def prune(store: Store, *, older_than: str | None = None, dry_run: bool = False) -> Pruned:
    """Removes what no artifact needs, and with ``older_than`` (``30d``) the artifacts built before that.

    Raises:
        SdxlError: not an age, a build is running, or the store can't be written.
    """
    return store.prune(None if older_than is None else parse_age(older_than), dry_run)


def pruned_as_dict(pruned: Pruned, dry_run: bool) -> Mapping[str, Any]:
    """For ``prune --json``."""
    names = ("artifacts", "code", "blobs", "staging", "kernels")
    return {
        "dry_run": dry_run,
        **{name: [str(path) for path in getattr(pruned, name)] for name in names},
        "damaged": [{"path": str(path), "problem": problem} for path, problem in pruned.damaged],
        "bytes": pruned.bytes,
    }
