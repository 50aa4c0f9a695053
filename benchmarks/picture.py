"""From the prompt to the picture in a process that is warm: ours and the peers', side by side.

    python benchmarks/picture.py "$(sdxl-build torch --model random:sdxl-base --vae fp16-fix)" --peer eager
    python benchmarks/picture.py DIR DIR_FP8 --guidance-until 0.75 --peer eager --peer compile --peer-limit 300

A call starts with the prompt's text and ends with a PIL picture on the host: text encoders, steps, VAE, no PNG. Every
artifact and every peer has a process of its own, one after the other: ours, then the peers (diffusers with the model
that the first artifact was built from), in the order asked for. A row is printed as soon as it is measured.

Nothing is faster by being wrong: before all that, diffusers draws the same prompts and seeds eagerly in fp32 (TF32
off) for each model, and the pictures of a call that was timed are held against those (PSNR, the worst of those
compared), as are the latents of one more call. What diffusers eager in the same precision differs by is the measure.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import drawing, process, report
from benchmarks.drawing import OURS, PARTS, REFERENCE, Task
from buildtool.bench import peer
from buildtool.bench.likeness import psnr
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest

PEERS = ("eager", "eager-nchw", "compile", "max-autotune")
HEADERS = (
    "guided", "by", "s", "p10 to p90", "min", "pictures/s", "ratio", *PARTS, "first call, s", "PSNR, dB",
    "latents' error",
)  # fmt: skip


@dataclass
class Row:
    """An artifact or a peer with one ``guidance_until``."""

    name: str
    ours: bool
    until: float
    images: int
    first_call_seconds: float | None = None
    first_call_cached: bool = False
    runs: list[float] = field(default_factory=list)
    """Seconds of each timed call, for all of its pictures."""
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})
    ratio: float | None = None
    """Its median over that of the first artifact: how many times as long it takes."""
    psnr: float | None = None
    latents_error: float | None = None
    failure: str = ""

    @property
    def seconds(self) -> report.Spread | None:
        return report.spread(self.runs) if self.runs else None

    @property
    def pictures_per_second(self) -> float | None:
        return self.images / self.seconds.median if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        likeness = {"psnr": _finite(self.psnr, "equal"), "latents_error": _finite(self.latents_error, "not finite")}
        found = {"seconds": self.seconds, "pictures_per_second": self.pictures_per_second}
        return {**asdict(self), **likeness, **found}


def _finite(number: float | None, word: str) -> float | str | None:
    """JSON knows no infinity."""
    return number if number is None or math.isfinite(number) else word


Tell = Callable[[Row], None]


def follow(task: Task, name: str, limit: float | None = None, settings: dict[str, str] | None = None) -> Iterator[Row]:
    """Runs a task and gives each of its rows when it is measured; what failed or was cut off has its reason.

    Args:
        name: the row's.
        limit: seconds that the task has.
        settings: environment variables of its process.
    """
    done = 0
    row: Row | None = None
    print(f"{name}: loads …", file=sys.stderr, flush=True)
    try:
        for event in process.events(task.command(), limit, settings):
            kind = event["kind"]
            if kind == "failed":
                raise process.Failed(event["why"])
            if kind == "setting":
                row = Row(name, task.who == OURS, event["until"], task.images)
                print(f"{name}, guided until {row.until:g}: first call …", file=sys.stderr, flush=True)
            assert row is not None
            if kind == "first":
                row.first_call_seconds, row.first_call_cached = event["seconds"], event["cached"]
                print(f"{name}: first call took {event['seconds']:.2f} s", file=sys.stderr, flush=True)
            elif kind == "run":
                row.runs.append(event["seconds"])
                for part, seconds in event["parts"].items():
                    row.parts[part].append(seconds)
            elif kind == "made":
                done += 1
                yield row
                row = None
    except process.Failed as error:
        for until in task.untils[done:]:
            failed = row if row is not None else Row(name, task.who == OURS, until, task.images)
            failed.failure, row = str(error), None
            yield failed


class References:
    """diffusers in fp32, drawn once for every model, size and ``guidance_until`` that artifacts share.

    Args:
        precision: that of the reference; ``same`` as the peers', or ``none`` of it at all.
    """

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._tasks: dict[Any, Task] = {}
        self._failures: dict[tuple[Any, float], str] = {}

    def draw(self, manifest: Manifest, task: Task) -> None:
        """Draws what a task is held against, if it wasn't yet."""
        group = _group(manifest)
        if group in self._tasks or self._precision == "none":
            return
        folder = Path(task.folder).parent / f"reference-{len(self._tasks)}"
        folder.mkdir()
        fields = {**asdict(task), "who": REFERENCE, "folder": str(folder)}
        fields["precision"] = self._precision if self._precision != "same" else task.precision
        self._tasks[group] = Task(**fields)
        name = f"reference, diffusers eager, {fields['precision']}, VAE {manifest.key.vae}"
        for row in follow(self._tasks[group], name):
            if row.failure:
                self._failures[group, row.until] = row.failure
                print(f"{name}: {row.failure}", file=sys.stderr, flush=True)

    @property
    def failed(self) -> bool:
        return bool(self._failures)

    def compare(self, manifest: Manifest, task: Task, row: Row) -> None:
        """Fills in how far a row's pictures and latents are from the reference's."""
        import numpy as np

        group = _group(manifest)
        if row.failure or group not in self._tasks or (group, row.until) in self._failures:
            return
        reference, chosen = self._tasks[group], drawing.compared(task.images)
        row.psnr = min(
            psnr(task.file(row.until, f"{own}.png"), reference.file(row.until, f"{number}.png"))
            for number, own in enumerate(chosen)
        )
        wanted = np.load(reference.file(row.until, "latents.npy")).astype(np.float64)
        made = np.load(task.file(row.until, "latents.npy")).astype(np.float64)[chosen]
        wrong = made.shape != wanted.shape or not np.isfinite(made).all()
        row.latents_error = float("inf") if wrong else float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


def _group(manifest: Manifest) -> Any:
    """What artifacts have in common that draw the same pictures."""
    key = manifest.key
    return tuple(sorted(key.weights.items())), key.vae, key.width, key.height


def render(row: Row) -> list[str]:
    """A row's cells, by ``HEADERS``."""
    first = "" if row.first_call_seconds is None else f"{row.first_call_seconds:.2f}"
    first += " (cached)" if row.first_call_cached else ""
    cells = [f"{row.until:g}", row.name]
    found = row.seconds
    if found is None:
        return [*cells, "failed", *[""] * (len(HEADERS) - 6), first, "", row.failure]
    cells += [f"{found.median:.3f}", f"{found.p10:.3f} to {found.p90:.3f}", f"{found.least:.3f}"]
    cells += [f"{row.pictures_per_second:.3f}", "" if row.ratio is None else f"{row.ratio:.2f}"]
    cells += [f"{report.spread(row.parts[part]).median:.3f}" for part in PARTS]
    if row.failure:
        return [*cells, first, "", f"after {found.count} calls: {row.failure}"]
    likeness = "" if row.psnr is None else f"{row.psnr:.1f}" if math.isfinite(row.psnr) else "equal"
    return [*cells, first, likeness, "not compared" if row.latents_error is None else f"{row.latents_error:.1e}"]


def titles(read: Sequence[Manifest], folders: Sequence[str]) -> list[str]:
    """Artifacts as the table has them; by their folders' names, where that isn't enough."""
    names = []
    for manifest in read:
        key = manifest.key
        options = "".join(f", {name} {value}" for name, value in sorted(key.options.items()))
        names.append(f"ours, {key.backend} {key.precision}, VAE {key.vae}, batch {key.batch}{options}")
    if len({*names}) < len(names):
        names = [f"{name}, {Path(folder).resolve().name}" for name, folder in zip(names, folders, strict=True)]
    return names


def parse(arguments: Sequence[str], steps: int, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="artifacts' folders; peers are of the first")
    parser.add_argument("--steps", type=int, default=steps, help="default %(default)s")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument(
        "--guidance-until",
        dest="untils",
        type=float,
        action="append",
        metavar="FRACTION",
        help="of the steps that is guided, default 1; repeatable: each is measured",
    )
    parser.add_argument("--images", type=int, metavar="N", help="pictures a call, default the first artifact's batch")
    parser.add_argument("--runs", type=int, default=10, help="timed calls of each")
    parser.add_argument("--warmup", type=int, default=2, help="calls of each before them, after the first")
    parser.add_argument("--peer", action="append", default=[], choices=PEERS, help="repeatable")
    parser.add_argument(
        "--peer-limit",
        type=float,
        metavar="SECONDS",
        help="for each peer, compiling included; what it had measured by then is told",
    )
    parser.add_argument(
        "--reference",
        choices=["fp32", "same", "none"],
        default="fp32",
        help="precision of what the others are held against; same: that of the first artifact; none: not compared",
    )
    parser.add_argument("--fresh-cache", action="store_true", help="peers compile with an empty compiler's cache")
    parser.add_argument("--gpu-index", type=int, default=0, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="the measurements, to a file, after every row")
    options = parser.parse_args(arguments)
    if min(options.runs, options.steps) < 1 or options.warmup < 0 or (options.images or 1) < 1:
        parser.error("--runs, --steps and --images are at least 1, --warmup at least 0")
    options.untils = list(dict.fromkeys(options.untils or [1.0]))
    if not all(0 <= until <= 1 for until in options.untils):
        parser.error("--guidance-until is a fraction from 0 to 1")
    return options


def run(options: argparse.Namespace, read: Sequence[Manifest], scratch: Path, tell: Tell) -> bool:
    """Measures all; true if ours and what they are held against all ended well."""
    from benchmarks.peers import title

    key = read[0].key
    precision = "fp16" if key.precision == "fp8" else key.precision
    references = References(options.reference)
    names = titles(read, options.artifacts)
    todo = [(OURS, *each) for each in zip(options.artifacts, read, names, strict=True)]
    label = f"{precision}, VAE {key.vae}, batch {key.batch}"
    asked = dict.fromkeys(options.peer)
    todo += [(name, options.artifacts[0], read[0], f"{title(name, 'unet')}, {label}") for name in asked]
    medians: dict[float, float] = {}
    good = True
    for number, (who, folder, manifest, name) in enumerate(todo):
        place = scratch / str(number)
        place.mkdir()
        task = Task(
            who=who,
            artifact=folder,
            precision=precision,
            steps=options.steps,
            guidance=options.guidance,
            untils=options.untils,
            images=options.images or key.batch,
            runs=options.runs,
            warmup=options.warmup,
            gpu_index=options.gpu_index,
            folder=str(place),
        )
        references.draw(manifest, task)
        settings = {"TORCHINDUCTOR_CACHE_DIR": str(place / "cache")} if options.fresh_cache else {}
        for row in follow(task, name, None if who == OURS else options.peer_limit, settings):
            references.compare(manifest, task, row)
            if row.seconds is not None:
                row.ratio = row.seconds.median / medians.setdefault(row.until, row.seconds.median)
            good = good and not (row.ours and row.failure)
            tell(row)
    return good and not references.failed


def main(
    arguments: Sequence[str] | None = None,
    *,
    steps: int = 30,
    description: str | None = __doc__,
    headers: Sequence[str] = HEADERS,
) -> int:
    """0, or 1 if one of ours or a reference failed. ``headers``: some of ``HEADERS``, in the table's order."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words, steps, description)
    try:
        read = [manifests.read(folder) for folder in options.artifacts]
        for manifest in read if options.reference != "none" else read[: len(options.peer)][:1]:
            peer.source(manifest)  # the model that diffusers draws with is there
    except SdxlError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    images = options.images or read[0].key.batch
    where = report.hardware(read[0], options.gpu_index)
    rows: list[Row] = []
    shown = report.Table(headers)

    def write(complete: bool) -> None:
        told = {"steps": options.steps, "guidance": options.guidance, "rows": [row.as_dict() for row in rows]}
        about = {"complete": complete, "hardware": where, "command": report.command_line(words)}
        report.write_json(options.json, {**told, **about})

    def tell(row: Row) -> None:
        rows.append(row)
        cells = dict(zip(HEADERS, render(row), strict=True))
        shown.add([cells[name] for name in headers])
        write(complete=False)

    print(f"{images} picture{'s' if images > 1 else ''} a call, {options.steps} steps, guidance {options.guidance:g}\n")
    print(f"{report.footer(read, where, words)}\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        good = run(options, read, Path(scratch), tell)
    counts = sorted({len(row.runs) for row in rows if row.runs})
    against = {"fp32": "diffusers eager in fp32, TF32 off", "same": "diffusers eager in the peers' precision"}
    print(
        f"\nMedian of {', '.join(map(str, counts)) or 'no'} calls each after {options.warmup} and the first, by the "
        "clock; parts are seconds by each process's own clock. PSNR and the latents' relative error are to "
        f"{against.get(options.reference, 'nothing: it was not compared')}."
    )
    write(complete=True)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
