"""From nothing to a saved picture: `sdxl-run` in a fresh process, by its parent's clock, and where the time goes.

    python benchmarks/cold_start.py "$(sdxl-build torch --model random:sdxl-base)" --peer diffusers
    python benchmarks/cold_start.py DIR --cold        # the artifact's files out of the page cache before each run

The artifact's files are read once before, and one run that isn't counted goes ahead, so that libraries lie in the page
cache too; how much of the artifact does is looked up before every run. The peer is a fresh Python process with
diffusers' own pipeline, eager, in the artifact's precision, with weights that are drawn on the device: it reads no
weights from a disk at all, so its true start is later than what is told here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a large red circle on the left and a small blue star on the right"


@dataclass(frozen=True)
class Span:
    """A part of a run, in seconds from the start of its process. Parts may overlap."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Run:
    saved: float
    """Seconds until the picture's file was there."""
    ended: float
    """Seconds until the process was gone."""
    spans: list[Span]
    resident: float
    """Share of the artifact's bytes that lay in the page cache before."""


def files_of(folder: Path, manifest: Manifest) -> list[Path]:
    return [folder / name for name in (*manifest.files, manifests.MANIFEST)]


def resident(paths: Sequence[Path]) -> float:
    """Share of some files' bytes in the page cache; nothing is read in to know it."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = there = 0
    for path in paths:
        length = path.stat().st_size
        if not length:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) as mapped:
            count = -(-length // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * count)()
            view = ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(length), flags)
            del view
            if failed:
                return float("nan")
            pages += count
            there += sum(byte & 1 for byte in bytes(flags))
    return there / pages if pages else float("nan")


def warm(paths: Sequence[Path]) -> None:
    """Reads files, as a run would find them that isn't the first."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def drop(paths: Sequence[Path]) -> None:
    """Takes files out of the page cache; what isn't written yet is written first. Some file systems don't obey."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def timed(command: Sequence[str], picture: Path) -> tuple[float, float, str]:
    """Seconds from spawning a process until a file is there and until it has ended, and its stdout.

    Raises:
        SystemExit: it failed; its own words are in the message.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, stdin=subprocess.DEVNULL)
        saved = ended = 0.0
        while not ended:
            # The file first: what is seen after the end was there before it.
            gone = process.poll() is not None
            now = time.perf_counter() - begin
            if not saved and picture.exists():
                saved = now
            if gone:
                ended = now
            else:
                time.sleep(0.001)
        out.seek(0)
        errors.seek(0)
        if process.returncode or not saved:
            said = errors.read().strip()
            raise SystemExit(f"Error: {' '.join(command[:4])} … ended with {process.returncode}. {said[-2000:]}")
        return saved, ended, out.read()


def spans_of(told: Mapping[str, Any]) -> list[Span]:
    """The parts that a run told of: its timeline, or its seconds by stage one after the other if it has none."""
    timeline = told.get("timeline")
    if timeline is not None:
        return [Span(str(each["name"]), float(each["start"]), float(each["end"])) for each in timeline]
    spans, last = [], 0.0
    for name, seconds in told.get("seconds", {}).items():
        if name != "total":
            spans.append(Span(name, last, last + seconds))
            last += seconds
    return spans


def numbered(spans: Sequence[Span]) -> list[Span]:
    """Parts of the same name, told apart by a number: they are averaged over runs by name."""
    seen: dict[str, int] = {}
    named = []
    for span in spans:
        seen[span.name] = seen.get(span.name, 0) + 1
        name = span.name if seen[span.name] == 1 else f"{span.name} ({seen[span.name]})"
        named.append(Span(name, span.start, span.end))
    return named


@dataclass(frozen=True)
class Part:
    """One part over all runs that had it."""

    name: str
    start: report.Spread
    end: report.Spread
    seconds: report.Spread


def parts(runs: Sequence[Sequence[Span]]) -> list[Part]:
    """Medians of every part's start, end and length, by their start."""
    by_name: dict[str, list[Span]] = {}
    for spans in runs:
        for span in numbered(spans):
            by_name.setdefault(span.name, []).append(span)
    made = [
        Part(
            name,
            report.spread([s.start for s in spans]),
            report.spread([s.end for s in spans]),
            report.spread([s.end - s.start for s in spans]),
        )
        for name, spans in by_name.items()
    ]
    return sorted(made, key=lambda part: (part.start.median, part.end.median))


def measure_ours(options: argparse.Namespace, folder: Path, manifest: Manifest) -> Iterator[Run]:
    """The counted runs, each when it has ended."""
    paths = files_of(folder, manifest)
    warm(paths)
    for number in range(-options.warmup, options.runs):
        if options.cold and number >= 0:
            drop(paths)
        share = resident(paths)
        with tempfile.TemporaryDirectory() as scratch:
            picture = Path(scratch) / "picture.png"
            command = [sys.executable, "-m", "runtimes.cli", "--engine", str(folder), "--prompt", PROMPT]
            command += ["--steps", str(options.steps), "--guidance", str(options.guidance), "--seed", "1"]
            command += ["--guidance-until", str(options.guidance_until), "--out", str(picture), "--json", "--quiet"]
            if report.on_gpu(manifest) and options.gpu_index:
                command += ["--gpu-index", str(options.gpu_index)]
            saved, ended, out = timed(command, picture)
        if number >= 0:
            yield Run(saved, ended, spans_of(json.loads(out)), share)


def measure_diffusers(options: argparse.Namespace, folder: Path) -> Iterator[Run]:
    """The counted runs, each when it has ended."""
    for number in range(-options.warmup, options.peer_runs):
        with tempfile.TemporaryDirectory() as scratch:
            picture = Path(scratch) / "picture.png"
            command = [sys.executable, __file__, str(folder), "--child", str(picture), "--steps", str(options.steps)]
            command += ["--guidance", str(options.guidance), "--gpu-index", str(options.gpu_index)]
            saved, ended, out = timed(command, picture)
        if number >= 0:
            spans = spans_of(json.loads(out.strip().splitlines()[-1]))
            yield Run(saved, ended, spans, float("nan"))


def child(folder: Path, manifest: Manifest, picture: Path, options: argparse.Namespace) -> None:
    """The peer: diffusers' pipeline with random weights of the artifact's configs; prints its timeline."""
    from runtimes import timeline

    timeline.add("python", 0.0, timeline.now())
    with timeline.span("import torch"):
        import torch
    with timeline.span("import diffusers, transformers"):
        import diffusers
        from diffusers import StableDiffusionXLPipeline
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        from buildtool.models import TINY  # any tokenizer of its kind takes the same time

    key = manifest.key
    device = torch.device("cuda", options.gpu_index) if report.on_gpu(manifest) else torch.device("cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(key.precision, torch.float16)

    def filled(cls: Any, name: str) -> Any:
        config = {k: v for k, v in key.configs[name].items() if k != "_class_name"}
        with torch.device("meta"):
            made = cls(CLIPTextConfig(**config)) if name.startswith("text") else cls.from_config(config)
        made = made.to_empty(device=device).to(dtype)
        for own, weight in made.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02)
            else:
                weight.fill_(0.0 if own.endswith("bias") else 1.0)
        for module in made.modules():
            if isinstance(getattr(module, "position_ids", None), torch.Tensor):
                module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
        return made.eval()

    with timeline.span("random weights on the device"), torch.no_grad():
        pipeline = StableDiffusionXLPipeline(
            vae=filled(getattr(diffusers, key.configs["vae"]["_class_name"]), "vae"),
            text_encoder=filled(CLIPTextModel, "text_encoder"),
            text_encoder_2=filled(CLIPTextModelWithProjection, "text_encoder_2"),
            tokenizer=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(TINY / "tokenizer_2"),
            unet=filled(diffusers.UNet2DConditionModel, "unet"),
            scheduler=diffusers.EulerDiscreteScheduler.from_config(key.configs["scheduler"]),
            add_watermarker=False,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
    pipeline.set_progress_bar_config(disable=True)
    with timeline.span("first picture"):
        (made,) = pipeline(
            PROMPT, height=key.height, width=key.width, num_inference_steps=options.steps,
            guidance_scale=options.guidance, generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip
    with timeline.span("save"):
        part = picture.with_suffix(".part")
        made.save(part, format="PNG")
        part.replace(picture)
    print(json.dumps({"timeline": timeline.as_dicts()}))


def render(runs: Sequence[Run]) -> str:
    """Totals by the parent's clock, then every part."""

    def range_of(values: report.Spread) -> str:
        return f"{values.least:.3f} to {values.most:.3f}"

    rows = []
    for name, values in (("**saved picture**", [r.saved for r in runs]), ("process gone", [r.ended for r in runs])):
        found = report.spread(values)
        rows.append([name, "0.000", f"{found.median:.3f}", f"{found.median:.3f}", range_of(found)])
    for part in parts([run.spans for run in runs]):
        figures = (part.start.median, part.end.median, part.seconds.median)
        rows.append([part.name, *(f"{figure:.3f}" for figure in figures), range_of(part.seconds)])
    return report.table(("part", "start, s", "end, s", "seconds", "min to max"), rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", metavar="ARTIFACT", help="the artifact's folder")
    parser.add_argument("--runs", type=int, default=5, help="counted runs")
    parser.add_argument("--warmup", type=int, default=1, help="runs before them")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--guidance-until", type=float, default=1.0, help="ours only")
    parser.add_argument("--cold", action="store_true", help="take the artifact out of the page cache before each run")
    parser.add_argument("--peer", action="append", default=[], choices=["diffusers"])
    parser.add_argument("--peer-runs", type=int, default=3)
    parser.add_argument("--gpu-index", type=int, default=0, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="the measurements, to a file")
    parser.add_argument("--child", metavar="PICTURE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.runs, options.peer_runs) < 1 or options.warmup < 0:
        parser.error("--runs and --peer-runs are at least 1, --warmup at least 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    folder = Path(options.artifact)
    try:
        manifest = manifests.read(folder)
    except SdxlError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if options.child:
        child(folder, manifest, Path(options.child), options)
        return 0
    where = report.hardware(manifest, options.gpu_index)
    runs: dict[str, list[Run]] = {}

    def collect(name: str, measured: Iterator[Run]) -> list[Run]:
        """All runs; each is printed and the file written anew when it has ended, so that one who cuts this off keeps
        what there was."""
        shown = report.Table(("run", "saved picture, s", "process gone, s", "of the artifact in the page cache"))
        for run in measured:
            runs.setdefault(name, []).append(run)
            share = "" if math.isnan(run.resident) else f"{100 * run.resident:.0f}%"
            shown.add([f"{name}, {len(runs[name])}", f"{run.saved:.3f}", f"{run.ended:.3f}", share])
            summary = {
                name: {"saved": report.spread([r.saved for r in some]), "ended": report.spread([r.ended for r in some])}
                for name, some in runs.items()
            }
            told = {"summary": summary, "runs": {name: [asdict(run) for run in some] for name, some in runs.items()}}
            about = {"hardware": where, "command": report.command_line(words)}
            report.write_json(options.json, {**told, **about})
        return runs[name]

    print(f"{report.footer([manifest], where, words)}\n", flush=True)
    ours = collect("ours", measure_ours(options, folder, manifest))
    share = report.spread([run.resident for run in ours])
    weights = sum(manifest.files[name].size for name in {c.weights for c in manifest.components.values() if c.weights})
    print(f"\n`sdxl-run`, {options.steps} steps, guidance {options.guidance:g}, until {options.guidance_until:g}\n")
    print(render(ours))
    how = "they had been dropped" if options.cold else "read once before"
    print(
        f"\nMedian of {options.runs} fresh processes after {options.warmup} uncounted. "
        f"Of the artifact ({report.size(weights)} of weights) {100 * share.least:.0f}% to {100 * share.most:.0f}% "
        f"lay in the page cache before a run: {how}. "
        "Parts are by the process's own clock (its start is known to 0.01 s), totals by the parent's.",
        flush=True,
    )
    if options.peer:
        print(f"\ndiffusers, eager, {manifest.key.precision}, random weights made on the device\n", flush=True)
        theirs = collect("diffusers", measure_diffusers(options, folder))
        print(f"\n{render(theirs)}")
        print(f"\nMedian of {options.peer_runs} fresh processes.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
