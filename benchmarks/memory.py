"""GPU memory: the peak of a run, what each engine adds, and that a second resolution adds no weights.

    python benchmarks/memory.py "$(sdxl-build torch --model random:sdxl-base)"
    python benchmarks/memory.py DIR_1024x1024 DIR_768x1344        # the second's weights are the first's
    python benchmarks/memory.py --preset vram4 DIR                # the peak of a run alone: nothing stays loaded

"driver" is what the device lacks (total less free, as cudaMemGetInfo has it) beyond what it lacked before the measured
process began: its context, libraries' code, CUDA graphs and everything else that torch's allocator doesn't count. This
program looks every few milliseconds while `sdxl-run` runs, and a process of its own loads engine after engine and tells
what each added. On the CPU "driver" is resident memory. Nothing else should use the device meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from buildtool.store.presets import PRESETS
from runtimes.memory import MODES, RESIDENT

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a large red circle on the left"
SETTLED = 0.25
"""Seconds without a change after which uploads and what they need are taken to be over."""


@dataclass(frozen=True)
class Mark:
    """The device's memory at one point of a process, in bytes."""

    name: str
    driver: int
    """Used on the device by everybody, or this process's resident memory on the CPU."""
    allocated: int
    reserved: int
    weights: int
    """Bytes of weights that the runtime says it holds."""


@dataclass(frozen=True)
class Peak:
    """A run of ``sdxl-run``."""

    artifacts: list[str]
    driver: int
    """At most, beyond the baseline."""
    torch_allocated: int | None
    samples: int


def resident(pid: int | str = "self") -> int:
    """A process's resident memory in bytes; 0 when it has gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def used(index: int) -> int:
    """Bytes of a GPU that aren't free, whoever holds them."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return total - free


class Sampler:
    """Looks at a number every few milliseconds, from a thread, and keeps the largest.

    Args:
        look: gives the number.
        pause: seconds between two looks.
    """

    def __init__(self, look: Callable[[], int], pause: float = 0.003) -> None:
        self._look, self._pause = look, pause
        self._over = threading.Event()
        self.most = 0
        self.count = 0

    def __enter__(self) -> Sampler:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, self._look())
            self.count += 1
            time.sleep(self._pause)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def weights_by_component(read: Sequence[Manifest]) -> dict[str, dict[str, int]]:
    """Component -> digest -> bytes of its weights files: one entry where all artifacts share it."""
    found: dict[str, dict[str, int]] = {}
    for manifest in read:
        for name, component in manifest.components.items():
            if component.weights:
                entry = manifest.files[component.weights]
                found.setdefault(name, {})[entry.sha256] = entry.size
    return found


def weights_held(pipeline: Any) -> int:
    """Bytes of weights on the device as the runtime counts them; 0 where it doesn't say."""
    stores = {id(store): store for a in pipeline.artifacts if (store := getattr(a, "_weights", None)) is not None}
    return sum(int(getattr(store, "bytes", 0)) for store in stores.values())


def random_inputs(engine: Any) -> dict[str, Any]:
    """Unit-normal numbers and small token ids for an engine."""
    import torch

    made = {}
    for spec in engine.inputs:
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            made[spec.name] = torch.randn(spec.shape, device=engine.device, dtype=torch.float32).to(dtype)
        else:
            made[spec.name] = torch.randint(0, 100, spec.shape, device=engine.device, dtype=dtype)
    return made


def child(folders: Sequence[str], index: int, steps: int) -> None:
    """Loads engine after engine of some artifacts, then makes a picture with each; prints its marks as JSON."""
    import torch

    import runtimes

    gpu = report.on_gpu(manifests.read(folders[0]))
    marks: list[Mark] = []
    pipeline: Any = None

    def look() -> int:
        return used(index) if gpu else resident()

    def mark(name: str) -> None:
        if gpu:
            torch.cuda.synchronize(index)
        last, since = look(), time.perf_counter()
        while gpu and time.perf_counter() - since < SETTLED:
            time.sleep(0.01)
            now = look()
            if now != last:
                last, since = now, time.perf_counter()
        counted = (torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)) if gpu else (0, 0)
        marks.append(Mark(name, last, *counted, weights_held(pipeline) if pipeline is not None else 0))
        print(f"{name}: {report.size(last)} used", file=sys.stderr, flush=True)

    with torch.inference_mode():
        if gpu:
            torch.zeros(1, device=f"cuda:{index}")
        mark("context" if gpu else "python, torch")
        pipeline = runtimes.load([*folders], device=f"cuda:{index}" if gpu else None)
        mark("artifacts opened, weights uploading" if gpu else "artifacts opened")
        for artifact in pipeline.artifacts:
            where = f" {artifact.size[0]}x{artifact.size[1]}" if len(folders) > 1 else ""
            for component, described in artifact.manifest.components.items():
                for variant in described.variants:
                    engine = artifact.engine(component, variant)
                    mark(f"{component}.{variant}{where} loaded")
                    if not engine.calls:  # else another resolution's, shared
                        engine(**random_inputs(engine))
                        mark(f"{component}.{variant}{where} first call")
        if gpu:
            torch.cuda.reset_peak_memory_stats(index)
    for width, height in pipeline.sizes:
        generator = torch.Generator().manual_seed(1)
        pipeline(PROMPT, width=width, height=height, num_inference_steps=steps, generator=generator)
    mark("pictures made")
    peaks = (torch.cuda.max_memory_allocated(index), torch.cuda.max_memory_reserved(index)) if gpu else (0, 0)
    told = {"marks": [asdict(m) for m in marks], "max_allocated": peaks[0], "max_reserved": peaks[1]}
    print(json.dumps(told))


def _spawn(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, stdin=subprocess.DEVNULL)


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process printed last, as JSON.

    Raises:
        SystemExit: it failed; what it said is on stderr already.
    """
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"Error: a measured process ended with {process.returncode}.")
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def settled(look: Callable[[], int]) -> int:
    """A number once it has stopped changing: the last process's memory is given back after its end."""
    last, since = look(), time.perf_counter()
    while time.perf_counter() - since < SETTLED:
        time.sleep(0.01)
        now = look()
        if now != last:
            last, since = now, time.perf_counter()
    return last


def measure_run(folders: Sequence[str], read: Sequence[Manifest], options: argparse.Namespace) -> Peak:
    """The peak of one ``sdxl-run`` that makes a picture with each artifact."""
    gpu, index = report.on_gpu(read[0]), options.gpu_index
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [json.dumps({"prompt": PROMPT, "width": m.key.width, "height": m.key.height, "seed": 1}) for m in read]
        (Path(scratch) / "jobs.jsonl").write_text("\n".join(jobs) + "\n")
        command = [sys.executable, "-m", "runtimes.cli", *(w for f in folders for w in ("--engine", str(f)))]
        command += ["--prompts", f"{scratch}/jobs.jsonl", "--steps", str(options.steps), "--json", "--quiet"]
        command += ["--out", f"{scratch}/{{index}}.png"]
        command += [] if options.guidance_until is None else ["--guidance-until", str(options.guidance_until)]
        if gpu and index:
            command += ["--gpu-index", str(index)]
        for option, value in (("--preset", options.preset), ("--memory", options.memory)):
            command += [option, value] if value else []
        baseline = settled(lambda: used(index)) if gpu else 0
        process = _spawn(command)
        with Sampler(lambda: used(index) if gpu else resident(process.pid)) as sampler:
            told = _answer(process)
    names = [Path(f).resolve().name for f in folders]
    return Peak(names, sampler.most - baseline, told["peak_memory_bytes"].get("cuda"), sampler.count)


def measure_engines(folders: Sequence[str], options: argparse.Namespace, gpu: bool) -> dict[str, Any]:
    """The marks of a process that loads engine after engine, less what the device lacked before."""
    index = options.gpu_index
    baseline = settled(lambda: used(index)) if gpu else 0
    command = [sys.executable, __file__, *map(str, folders), "--child", "--steps", str(options.steps)]
    told = _answer(_spawn([*command, "--gpu-index", str(index)]))
    marks = [Mark(**mark) for mark in told.pop("marks")]
    return {**told, "marks": [Mark(m.name, m.driver - baseline, m.allocated, m.reserved, m.weights) for m in marks]}


def render_marks(marks: Sequence[Mark]) -> str:
    rows = []
    last = 0
    for mark in marks:
        added = mark.driver - last
        figures = (added, mark.driver, mark.allocated, mark.reserved, mark.weights)
        rows.append([mark.name, *(report.size(figure) for figure in figures)])
        last = mark.driver
    return report.table(("after", "added, driver", "driver", "torch allocated", "torch reserved", "weights held"), rows)


PEAK_HEADERS = ("`sdxl-run` with", "peak, driver", "peak, torch allocated", "looks")


def peak_cells(peak: Peak) -> list[str]:
    """A row of the table of peaks, by ``PEAK_HEADERS``."""
    allocated = "" if peak.torch_allocated is None else report.size(peak.torch_allocated)
    return [" and ".join(peak.artifacts), report.size(peak.driver), allocated, str(peak.samples)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT", help="artifacts of one model, several resolutions")
    parser.add_argument("--steps", type=int, default=4, help="of a picture; the peak doesn't depend on them")
    parser.add_argument("--guidance-until", type=float, help="below 1: unet.nocfg runs too")
    parser.add_argument("--memory", choices=MODES, help="sdxl-run's")
    parser.add_argument("--preset", choices=[*PRESETS], help="sdxl-run's, but for --steps")
    parser.add_argument("--gpu-index", type=int, default=0, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="the measurements, to a file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if loading a second artifact made the weights grow."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    if options.child:
        child(options.artifacts, options.gpu_index, options.steps)
        return 0
    try:
        read = [manifests.read(path) for path in options.artifacts]
    except SdxlError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    gpu = report.on_gpu(read[0])
    if gpu:
        used(options.gpu_index)  # this process's own context is part of the baseline
    chosen = [options.artifacts[:1]] + ([options.artifacts] if len(read) > 1 else [])
    where = report.hardware(read[0], options.gpu_index)
    mode = options.memory or (PRESETS[options.preset].run if options.preset else {}).get("memory", RESIDENT)
    files = weights_by_component(read)
    peaks: list[Peak] = []
    engines: list[dict[str, Any]] = []

    def write(**more: Any) -> None:
        told = {"peaks": [asdict(peak) for peak in peaks], "weights": files}
        told["engines"] = [{**m, "marks": [asdict(mark) for mark in m["marks"]]} for m in engines]
        about = {"hardware": where, "command": report.command_line(words)}
        report.write_json(options.json, {**told, **more, **about})

    print(f"{report.footer(read, where, words)}\n\nWeights by component:\n")
    rows = [[n, report.size(sum(by.values())), str(len(by))] for n, by in files.items()]
    total = sum(sum(by.values()) for by in files.values())
    print(report.table(("component", "bytes", "files"), [*rows, ["all", report.size(total), ""]]))
    print("", flush=True)
    shown = report.Table(PEAK_HEADERS)
    for folders in chosen:
        peaks.append(measure_run(folders, read[: len(folders)], options))
        shown.add(peak_cells(peaks[-1]))
        write()
    for folders in chosen if mode == RESIDENT else ():
        measured = measure_engines(folders, options, gpu)
        engines.append(measured)
        print(f"\nEngine after engine, {' and '.join(Path(f).resolve().name for f in folders)}:\n")
        print(render_marks(measured["marks"]), flush=True)
        write()
        if gpu:
            figures = measured["max_allocated"], measured["max_reserved"]
            print(f"\nA picture after that: torch allocated at most {report.size(figures[0])}, reserved", end=" ")
            print(f"{report.size(figures[1])}.", flush=True)
    held = [measured["marks"][-1].weights for measured in engines]
    grown = held[-1] - held[0] if held else 0
    if len(held) > 1:
        more = engines[-1]["marks"][-1].driver - engines[0]["marks"][-1].driver
        print(
            f"\nThe further artifacts added {report.size(grown)} of weights, and {report.size(more)} in all (driver)."
        )
    write(weights_grown=grown)
    return 1 if grown else 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        raise SystemExit(main())
