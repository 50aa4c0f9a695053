"""What is measured: an artifact with a set of options, in ``sdxl-run`` processes of its own."""

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest

RUN = (sys.executable, "-m", "runtimes.cli")


@dataclass(frozen=True)
class Case:
    """An artifact and the fields that every line of its prompts file gets (``steps``, ``guidance_until``, …)."""

    number: int
    folder: Path
    manifest: Manifest
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        key = self.manifest.key
        words = [f"{key.backend} {key.precision} {key.width}x{key.height}"]
        words += [f"{name} {_told(value)}" for name, value in key.options.items() if name in ("freeu", "deepcache")]
        words += [f"{name.replace('_', '-')}={value}" for name, value in self.options.items()]
        return ", ".join(words)


@dataclass
class Result:
    """Seconds by the process's own timeline; a picture's are from the prompt to the saved file.

    ``first`` is from the process's start to the first saved picture; ``build`` what the compilers took that built the
    artifact, added up; None if its code was there already.
    """

    case: Case
    build: float | None
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    steps_per_second: float = 0.0
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return mean(self.seconds)

    @property
    def spread(self) -> float:
        """Standard deviation of a picture's seconds; 0 of a single one."""
        return stdev(self.seconds) if len(self.seconds) > 1 else 0.0


def parse_options(text: str) -> dict[str, Any]:
    """``steps=20 guidance-until=0.75`` as fields of ``sdxl-run``'s JSON lines; quotes work as in a shell.

    Raises:
        SdxlError: a word that is no ``name=value``.
    """
    found: dict[str, Any] = {}
    for word in shlex.split(text):
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise SdxlError(f"{word!r} in --with {text!r} is no NAME=VALUE.", 'Write --with "steps=20 guidance=5".')
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.replace("-", "_")] = value
    return found


def open_cases(folders: Sequence[Path], options: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Every artifact with every set of options, in that order.

    Raises:
        SdxlError: a folder is no artifact.
    """
    pairs = [(folder, manifests.read(folder), some) for folder in folders for some in options]
    return [Case(number, *pair) for number, pair in enumerate(pairs, 1)]


def check(case: Case, prompts: Sequence[tuple[str, int]], folder: Path) -> None:
    """Has ``sdxl-run`` look at the case without loading anything.

    Raises:
        SdxlError: what it said, in its words.
    """
    _run(case, ["--dry-run"], _write(case, prompts, 1, folder))


def measure(case: Case, prompts: Sequence[tuple[str, int]], runs: int, folder: Path) -> Result:
    """One process: a batch of the first prompt to warm up, then all prompts ``runs`` times.

    Args:
        prompts: (text, seed) pairs.
        folder: where pictures and the prompts file go.

    Raises:
        SdxlError: what ``sdxl-run`` said when it failed.
    """
    report = _run(case, [], _write(case, prompts, runs, folder))
    spans: dict[str, list[tuple[float, float]]] = {}
    for span in report["timeline"]:
        spans.setdefault(span["name"], []).append((span["start"], span["end"]))
    batch = case.manifest.key.batch
    saved = [end for _, end in spans["save"]]
    # A call of the pipeline makes a batch of pictures; the first call warms up.
    calls = [saved[start : start + batch] for start in range(0, len(saved), batch)]
    steps = report["images"][-1]["steps"]
    loops = spans["denoise"][1:]
    return Result(
        case=case,
        build=sum(s for stage, s in case.manifest.build_seconds.items() if stage.endswith(": compile")) or None,
        first=saved[0],
        seconds=[(call[-1] - before[-1]) / len(call) for before, call in itertools.pairwise(calls)],
        steps_per_second=steps * len(loops) / sum(end - start for start, end in loops),
        peak_memory_bytes=report["peak_memory_bytes"],
        pictures=[_picture(case, folder, number) for number in range(len(prompts))],
    )


def _picture(case: Case, folder: Path, number: int) -> Path:
    return folder / f"case{case.number}-prompt{number + 1}.png"


def _write(case: Case, prompts: Sequence[tuple[str, int]], runs: int, folder: Path) -> Path:
    """The prompts file: in front a batch of the first prompt, to warm up."""
    lines = [
        {"prompt": text, "seed": seed, **case.options, "out": str(_picture(case, folder, number))}
        for number, (text, seed) in enumerate(prompts)
    ]
    file = folder / f"case{case.number}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [lines[0]] * case.manifest.key.batch + lines * runs))
    return file


def _run(case: Case, words: Sequence[str], prompts: Path) -> dict[str, Any]:
    command = [*RUN, "--engine", str(case.folder), "--prompts", str(prompts), "--json", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"sdxl-run ended with {done.returncode}"]
        raise SdxlError(f"{case.name}: {said[-1].removeprefix('Error: ')}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _told(value: Any) -> str:
    return ":".join(str(part) for part in value.values()) if isinstance(value, dict) else str(value)
