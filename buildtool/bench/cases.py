"""What is measured: an artifact or a peer with a set of options, each in a process of its own."""

import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from buildtool.bench import peer
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest

RUN = (sys.executable, "-m", "runtimes.cli")
PEER = (sys.executable, "-m", "buildtool.bench.peer")
FLAGS = ("refiner", "memory")
"""Options of ``sdxl-run`` that are no fields of its JSON lines, because they hold for the whole process."""

FILES = ("image", "lora", "embedding")
"""Options that name files."""


@dataclass(frozen=True)
class Case:
    """An artifact and the fields that every line of its prompts file gets (``steps``, ``guidance_until``, …), and
    ``FLAGS``.

    With ``peer``, one of ``peer.PEERS``, that one draws with the model that the artifact was built from.
    """

    number: int
    folder: Path
    manifest: Manifest
    options: Mapping[str, Any]
    peer: str = ""

    @property
    def name(self) -> str:
        key = self.manifest.key
        words = [
            f"{peer.PEERS[self.peer].title if self.peer else key.backend} {key.precision} {key.width}x{key.height}"
        ]
        words += [f"batch {key.batch}"] if key.batch > 1 else []
        words += [f"vae {key.vae}"] if key.vae != "default" else []
        if "freeu" in key.options:
            words += ["freeu " + ",".join(str(key.options["freeu"][name]) for name in ("s1", "s2", "b1", "b2"))]
        if "deepcache" in key.options and not self.peer:
            words += ["deepcache {interval}:{branch}".format(**key.options["deepcache"])]
        if "lora" in key.options:
            words += ["{} LoRA built in".format(len(key.options["lora"]))]
        if not self.peer:
            words += ["vae-tile {}x{}".format(*key.options["vae_tile"])] if "vae_tile" in key.options else []
            words += ["with-encoder"] if "encoder" in key.options else []
            words += ["no-negative-prompt"] if "no_negative_prompt" in key.options else []
            for name in ("segments", "spare_tokens", "mode"):
                words += [f"{name.replace('_', '-')} {key.options[name]}"] if name in key.options else []
        words += [f"{name.replace('_', '-')}={told(name, value)}" for name, value in self.options.items()]
        return ", ".join(words)


def told(name: str, value: Any) -> str:
    """An option's value without the folders that it lies in; a refiner by its model, the folder above its target's."""
    if isinstance(value, list):
        return "+".join(told(name, each) for each in value)
    text = str(value)
    if name == "refiner":
        return Path(text).resolve().parts[-3:][0]
    return text.rpartition(os.sep)[2] if name in FILES else text


@dataclass
class Result:
    """Seconds by the process's own timeline; a picture's are from the prompt to the saved file.

    ``load`` is from the process's start until it can be called, ``extra`` what its first call takes beyond a later one
    (compiling, recording graphs, loading what loads late; None where all calls go through their stages together),
    ``first`` from the start to the first saved picture; ``build`` what the compilers took that built the artifact,
    added up; None if its code was there already.
    """

    case: Case
    build: float | None
    load: float = 0.0
    extra: float | None = None
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    steps_per_second: float = 0.0
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    right: list[bool | None] = field(default_factory=list)
    """Whether each picture shows what its prompt says; None where nobody can tell. Empty: nobody looked."""

    @property
    def mean(self) -> float:
        return mean(self.seconds)

    @property
    def spread(self) -> float | None:
        """Standard deviation of a picture's seconds; None of a single one."""
        return stdev(self.seconds) if len(self.seconds) > 1 else None

    @property
    def judged(self) -> list[bool]:
        """The verdicts of the pictures that could be judged."""
        return [verdict for verdict in self.right if verdict is not None]


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


def open_cases(folders: Sequence[Path], options: Sequence[Mapping[str, Any]], peers: Sequence[str] = ()) -> list[Case]:
    """Every artifact with every set of options, then every peer of the first artifact with every set.

    Raises:
        SdxlError: a folder is no artifact.
    """
    read = [(folder, manifests.read(folder), "") for folder in folders]
    read += [(*read[0][:2], name) for name in peers]
    pairs = [(one, some) for one in read for some in options]
    return [Case(i, folder, manifest, some, name) for i, ((folder, manifest, name), some) in enumerate(pairs, 1)]


def check(case: Case, prompts: Sequence[tuple[str, int]], folder: Path) -> None:
    """Has ``sdxl-run`` look at the case without loading anything; peers are asked too.

    Raises:
        SdxlError: what it said, in its words.
    """
    if case.peer:
        peer.check(case.peer, case.manifest, case.options)
    _sdxl_run(case, ["--dry-run"], _write(case, prompts, 1, folder))


def measure(case: Case, prompts: Sequence[tuple[str, int]], runs: int, folder: Path) -> Result:
    """One process: a batch of the first prompt to warm up, then all prompts ``runs`` times.

    Args:
        prompts: (text, seed) pairs.
        folder: where pictures and the prompts file go.

    Raises:
        SdxlError: what the process said when it failed.
    """
    file = _write(case, prompts, runs, folder)
    report = _peer(case, file) if case.peer else _sdxl_run(case, [], file)
    spans: dict[str, list[tuple[float, float]]] = {}
    for span in report["timeline"]:
        spans.setdefault(span["name"], []).append((span["start"], span["end"]))
    batch = case.manifest.key.batch
    saved = sorted(end for _, end in spans["save"])  # a call's files are written side by side
    if len(saved) < len(report["images"]):
        raise SdxlError(
            f"{case.name}: {len(report['images'])} pictures were made, and a timeline ends at {len(saved)}.",
            "Take fewer --prompts or --runs.",
        )
    # A call of the pipeline makes a batch of pictures; the first call warms up.
    calls = [saved[start : start + batch] for start in range(0, len(saved), batch)]
    load = spans["load" if case.peer else "open artifact"][0][1]
    extra = None
    if case.options.get("memory", "resident") == "resident":
        seconds = [(call[-1] - before[-1]) / len(call) for before, call in itertools.pairwise(calls)]
        extra = max(calls[0][-1] - load - mean(seconds) * len(calls[0]), 0.0)
    else:  # the whole file goes from stage to stage together, and no call is one of its own
        seconds = [(saved[-1] - load) / len(saved)]
    build = sum(s for stage, s in case.manifest.build_seconds.items() if stage.endswith(": compile"))
    steps = report["images"][-1]["steps"]
    if "unet_steps" in report:  # of which a run's refiner, or its strength, may make other numbers
        steps = sum(report["unet_steps"].values()) / len(calls)
    each = len(spans["denoise"]) // len(calls)  # with a refiner, two loops a call
    loops = spans["denoise"][each:]
    return Result(
        case=case,
        build=None if case.peer else build or None,
        load=load,
        extra=extra,
        first=saved[0],
        seconds=seconds,
        steps_per_second=steps * len(loops) / each / sum(end - start for start, end in loops),
        peak_memory_bytes=report["peak_memory_bytes"],
        pictures=[_picture(case, folder, number) for number in range(len(prompts))],
    )


def _picture(case: Case, folder: Path, number: int) -> Path:
    return folder / f"case{case.number}-prompt{number + 1}.png"


def _write(case: Case, prompts: Sequence[tuple[str, int]], runs: int, folder: Path) -> Path:
    """The prompts file: in front a batch of the first prompt, to warm up."""
    fields = {name: value for name, value in case.options.items() if name not in FLAGS}
    lines = [
        {"prompt": text, "seed": seed, **fields, "out": str(_picture(case, folder, number))}
        for number, (text, seed) in enumerate(prompts)
    ]
    file = folder / f"case{case.number}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [lines[0]] * case.manifest.key.batch + lines * runs))
    return file


def _sdxl_run(case: Case, words: Sequence[str], prompts: Path) -> dict[str, Any]:
    flags = [word for name in FLAGS if name in case.options for word in (f"--{name}", str(case.options[name]))]
    asked = ["--engine", str(case.folder), *flags, "--prompts", str(prompts), "--json", "--quiet", *words]
    return _run(case, [*RUN, *asked])


def _peer(case: Case, prompts: Path) -> dict[str, Any]:
    return _run(case, [*PEER, case.peer, str(case.folder), str(prompts), str(time.time())])


def _run(case: Case, command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise SdxlError(f"{case.name}: {said[-1].removeprefix('Error: ')}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])  # libraries print, too
    return report
