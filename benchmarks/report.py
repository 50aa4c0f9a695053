"""What the measuring programs share: spreads, Markdown tables, and the line that says where they ran."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from buildtool.store import machine
from buildtool.store.manifest import Manifest


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    least: float
    p10: float
    p90: float
    most: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value. Percentiles are the nearest values, not interpolated ones: they were measured."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("nothing was measured")

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Spread(statistics.median(ordered), ordered[0], rank(0.1), rank(0.9), ordered[-1], len(ordered))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a cell's bars are escaped."""
    return "\n".join([_line(headers), _line(["---"] * len(headers)), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


class Table:
    """A Markdown table on stdout, row by row as it is measured: a program that is cut off has told what it knew."""

    def __init__(self, headers: Sequence[str]) -> None:
        self._headers = headers
        self._begun = False

    def add(self, *rows: Sequence[str]) -> None:
        if not self._begun:
            print(table(self._headers, []))
            self._begun = True
        for row in rows:
            print(_line(row))
        sys.stdout.flush()


def size(count: float) -> str:
    """Bytes as the tables have them: decimal units, as GPUs are sold."""
    if abs(count) < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB" if abs(count) < 1e9 else f"{count / 1e9:.2f} GB"


def describe(manifest: Manifest) -> str:
    """What an artifact is, without saying where it lies."""
    key = manifest.key
    options = "".join(f", {name} {value}" for name, value in sorted(key.options.items()))
    return (
        f"{key.model} {key.width}x{key.height}, batch {key.batch}, {key.precision}, VAE {key.vae}, {key.backend}, "
        f"{key.target}{options}"
    )


def on_gpu(manifest: Manifest) -> bool:
    return not manifest.key.target.startswith("cpu")


def hardware(manifest: Manifest, index: int = 0) -> dict[str, str]:
    """What an artifact runs on here, and the versions that matter. Imports no torch."""
    told = {"system": f"Linux {platform.release()}" if sys.platform == "linux" else platform.platform()}
    if on_gpu(manifest):
        gpu = next((gpu for gpu in machine.gpus() if gpu.index == index), None)
        told["GPU"] = gpu.name if gpu else "none"
        told["driver"] = gpu.driver if gpu else "none"
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    told["CPU"] = f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    told["Python"] = platform.python_version()
    told.update(machine.torch_version())
    for name in ("triton", "diffusers", "transformers"):
        try:
            told[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    threads = os.environ.get("OMP_NUM_THREADS")
    return {**told, **({"OMP_NUM_THREADS": threads} if threads else {}), "date": str(datetime.date.today())}


def command_line(arguments: Sequence[str]) -> str:
    """The program's own command line, folders by their names alone."""
    words = [Path(word).resolve().name if Path(word).is_dir() else word for word in arguments]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def footer(manifests: Sequence[Manifest], where: dict[str, str], arguments: Sequence[str]) -> str:
    """What belongs under a table: artifacts, hardware, versions, and the command."""
    artifacts = "; ".join(dict.fromkeys(describe(manifest) for manifest in manifests))
    versions = ", ".join(f"{name} {value}" for name, value in where.items())
    return f"{artifacts}.\n{versions}; load {os.getloadavg()[0]:.1f}.\n\n`{command_line(arguments)}`"


def write_json(path: str | None, value: dict[str, Any]) -> None:
    """Writes the measurements to a file, if one was asked for; spreads as objects.

    A program calls it with all that it knows whenever it knows more: the file is replaced as a whole.
    """
    if path:
        text = json.dumps(value, indent=1, default=lambda each: asdict(each) if isinstance(each, Spread) else str(each))
        part = Path(f"{path}.part")
        part.write_text(text + "\n")
        part.replace(path)
