"""What an artifact costs to build: the first one, a further resolution, a further checkpoint, and a hit.

    python benchmarks/build.py --model random:sdxl-base --other-model random:sdxl-base:1 --other-resolution 1152x896
    python benchmarks/build.py --model tiny --other-model random:tiny --other-resolution 320x192 --gpu cpu

Each is a whole `sdxl-build` process by its parent's clock, one after the other, in a store that is empty at first and
is removed at the end. With `--artifacts` it is kept, and what lies in it already is a hit, which the table says.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from buildtool.store import manifest as manifests
from buildtool.store.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Build:
    """One `sdxl-build` process. `added`: what the store grew by, bytes; a file with several names counts once."""

    what: str
    seconds: float
    processor_seconds: float
    added: int
    told: dict[str, Any]

    @property
    def manifest(self) -> Manifest:
        return manifests.read(Path(self.told["path"]))

    @property
    def slowest(self) -> str:
        """What took longest of what ran, side by side in part, as the build tells it."""
        seconds: dict[str, float] = self.told.get("seconds", {})
        first = sorted(seconds.items(), key=lambda each: -each[1])[:3]
        return ", ".join(f"{name} {value:.0f}" for name, value in first if value >= 0.5)

    @property
    def compiled(self) -> str:
        if self.told["hit"]:
            return "a hit"
        return ", ".join(self.told["compiled"]) or "nothing"


def disk(store: Path) -> int:
    """Bytes of a store's files; hard links count once."""
    found = {}
    for path in store.rglob("*"):
        if path.is_file() and not path.is_symlink():
            told = path.stat()
            found[told.st_ino] = told.st_size
    return sum(found.values())


def build(what: str, store: Path, words: Sequence[str]) -> Build:
    """Runs `sdxl-build` with some words.

    Raises:
        SystemExit: it failed; its own words are in the message.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    print(f"{what}: begins …", file=sys.stderr, flush=True)
    before, used = disk(store), resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "buildtool.cli", *words, "--artifacts", str(store), "--json"],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - begin
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"Error: {what}: sdxl-build ended with {done.returncode}. {done.stderr.strip()[-2000:]}")
    (told,) = json.loads(done.stdout)["artifacts"]
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(f"{what}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return Build(what, seconds, processor, disk(store) - before, told)


HEADERS = ("build", "seconds", "processor seconds", "added on disk", "compiled", "longest parts, s")


def cells(b: Build) -> list[str]:
    """A row of the table, by ``HEADERS``."""
    return [b.what, f"{b.seconds:.1f}", f"{b.processor_seconds:.0f}", report.size(b.added), b.compiled, b.slowest]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch", help="of sdxl-build")
    parser.add_argument("--model", default="random:sdxl-base")
    parser.add_argument("--other-model", metavar="MODEL", help="a further checkpoint of the same architecture")
    parser.add_argument("--resolution", metavar="WxH", help="of the first build; default the model's own")
    parser.add_argument("--other-resolution", metavar="WxH", help="a further resolution of the first checkpoint")
    parser.add_argument("--with", dest="options", action="append", default=[], metavar="OPTION", help="further words")
    parser.add_argument("--gpu", default="auto")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="a store to use and to keep")
    parser.add_argument("--json", metavar="FILE", help="the measurements, to a file")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, store: Path) -> Iterator[Build]:
    """The builds, each when it has ended."""
    common = [options.backend, "--gpu", options.gpu, *options.options]
    size = ["--resolution", options.resolution] if options.resolution else []
    first = [*common, "--model", options.model, *size]
    yield build("first artifact", store, first)
    if options.other_resolution:
        words = [*common, "--model", options.model, "--resolution", options.other_resolution]
        yield build("further resolution", store, words)
    if options.other_model:
        yield build("further checkpoint", store, [*common, "--model", options.other_model, *size])
    yield build("the first once more", store, first)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    with tempfile.TemporaryDirectory(prefix="sdxl-build-") as scratch:
        store = options.artifacts or Path(scratch)
        shown, told = report.Table(HEADERS), []
        footer = ""
        try:
            for made in measure(options, store):
                where = report.hardware(made.manifest)
                footer = footer or report.footer([made.manifest], where, words)
                shown.add(cells(made))
                told.append({"what": made.what, "seconds": made.seconds, "added": made.added, "told": made.told})
                about = {"hardware": where, "command": report.command_line(words)}
                report.write_json(options.json, {"builds": told, **about})
        finally:  # also of those that came before one that failed
            print(f"\n{footer}" if footer else "", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
