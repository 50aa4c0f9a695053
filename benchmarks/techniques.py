"""Every technique of docs/techniques.md, one row each: builds what it needs and measures it through `sdxl-bench`.

    python benchmarks/techniques.py --model tiny --gpu cpu
    python benchmarks/techniques.py --model random:sdxl-base                        # on a GPU
    python benchmarks/techniques.py --model random:sdxl-base --build-only --jobs 3  # first, the rest on a quiet machine

A technique is some options of the build, some of the run, or both, beside those of the baseline: the model as it is, on
a GPU with `--vae fp16-fix`. All artifacts lie in one store; what is there is not built again. Each row is a process of
its own by sdxl-bench's protocol (docs/bench.md): a warm-up, then every prompt `--runs` times. With a memory mode other
than resident, "s a picture" has everything that is loaded in between. PSNR and SSIM are to the baseline's pictures of
the same prompts and seeds. For the model tiny, "right" is the share of pictures that show what their prompts say.

Peak memory on a GPU is the driver's: what the device lacks beyond what it lacked before the row's process began, looked
at every 20 ms; nothing else should use the device meanwhile. "torch" is what sdxl-bench reports, weights and what torch
allocated. On a CPU it is the process's peak in main memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import memory, report
from buildtool.bench import accuracy, cases
from buildtool.bench import cli as bench
from buildtool.bench import report as pages
from buildtool.store import interpreter
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest
from buildtool.store.presets import PRESETS
from runtimes import lora_names

ROOT = Path(__file__).resolve().parent.parent
REFINERS = {
    name: name.replace("sdxl-base", "sdxl") + "-refiner" for name in ("tiny", "random:tiny", "random:sdxl-base")
}
BASELINE = "baseline"
LORA_RANK = 32
VECTORS = 4


@dataclass(frozen=True)
class Technique:
    """Words of ``sdxl-build`` beside the baseline's, and options as ``sdxl-bench --with`` takes them.

    REFINER, LORA, EMBEDDING and PICTURE stand for what this program makes, FEWER for three fifths of the steps, TILE
    for a size.
    """

    name: str
    build: str = ""
    run: str = ""
    needs: str = ""
    """Words of: ``gpu``; ``full``, a model of full size; ``onediff``, an interpreter that has it."""
    peer: str = ""
    backend: str = "torch"


def _preset(name: str) -> str:
    """What ``sdxl-run --preset`` of that name is."""
    return " ".join(f"{option.replace('_', '-')}={value}" for option, value in PRESETS[name].run.items())


TECHNIQUES = (
    Technique(BASELINE),
    Technique("fewer-steps", run="steps=FEWER"),
    Technique("guidance-until", run="guidance-until=0.75"),
    Technique("no-negative-prompt", "--no-negative-prompt"),
    Technique("scheduler", run="scheduler=dpmpp-2m"),
    Technique("deepcache", "--deepcache 3"),
    Technique("freeu", "--freeu 0.6,0.4,1.1,1.2"),
    Technique("vae-default", "--vae default", needs="full"),
    Technique("vae-tiny", "--vae tiny"),
    Technique("vae-tile", "--vae-tile TILE"),
    Technique("fp8", "--precision fp8", needs="gpu"),
    Technique("batch", "--batch 4"),
    Technique("staged", run="memory=staged"),
    Technique("model-offload", run="memory=model-offload", needs="gpu"),
    Technique("sequential", "--segments 8", "memory=sequential", needs="gpu"),
    Technique("lora", run="lora=LORA"),
    Technique("textual-inversion", f"--spare-tokens {VECTORS}", "embedding=EMBEDDING"),
    Technique("image-to-image", "--with-encoder", "image=PICTURE strength=0.5"),
    Technique("refiner", run="refiner=REFINER refine-at=0.8"),
    Technique("refine-strength", run="refiner=REFINER refine-strength=0.3"),
    Technique("fastest", "--preset fastest", _preset("fastest")),
    Technique("fastest-fp8", "--preset fastest --precision fp8", _preset("fastest"), needs="gpu"),
    Technique("quality", "--preset quality", _preset("quality")),
    Technique("vram8", "--vae default", _preset("vram8")),  # a preset of the run alone
    Technique("vram6", "--preset vram6", _preset("vram6"), needs="gpu full"),
    Technique("vram4", "--preset vram4", _preset("vram4"), needs="gpu full"),
    Technique("onediff", "--mode cudagraphs:benchmark", needs="gpu onediff", backend="onediff"),
    Technique("eager", peer="eager"),
    Technique("compile", peer="compile"),
)


@dataclass
class Row:
    technique: str
    build: str
    run: str
    result: cases.Result | None = None
    driver: int | None = None
    """Peak bytes on the GPU."""
    psnr: float = math.nan
    ssim: float = math.nan
    failure: str = ""

    def told(self) -> dict[str, Any]:
        """For the JSON file."""
        told: dict[str, Any] = {"technique": self.technique, "build": self.build, "run": self.run}
        if self.result is None:
            return {**told, "failure": self.failure}
        found = self.result
        return {
            **told,
            "seconds": found.seconds,
            "steps_per_second": found.steps_per_second,
            "load_seconds": found.load,
            "first_call_extra_seconds": found.extra,
            "peak_memory_bytes": {**found.peak_memory_bytes, **({"driver": self.driver} if self.driver else {})},
            "psnr": self.psnr if math.isfinite(self.psnr) else None,
            "ssim": self.ssim if math.isfinite(self.ssim) else None,
            "right": sum(found.judged) / len(found.judged) if found.judged else None,
        }


def headers(gpu: bool) -> list[str]:
    peaks = ["peak, driver", "peak, torch"] if gpu else ["peak memory"]
    figures = ["s a picture", "±", "steps/s", "load, s", "first call, + s"]
    return ["technique", "build", "run", *figures, *peaks, "PSNR, dB", "SSIM", "right"]


def cells(row: Row, gpu: bool) -> list[str]:
    """A row of the table, by :func:`headers`."""
    names = [row.technique, *(f"`{words}`" if words else "" for words in (row.build, row.run))]
    found = row.result
    if found is None:
        return [*names, "failed", *[""] * (len(headers(gpu)) - 5), row.failure]
    figures = ["" if value is None else f"{value:.3f}" for value in (found.mean, found.spread)]
    more = (found.steps_per_second, found.load, found.extra)
    figures += ["" if value is None else f"{value:.2f}" for value in more]
    kinds = ("driver", "cuda") if gpu else ("process",)
    bytes_of = {**found.peak_memory_bytes, "driver": row.driver or 0}
    likeness = "equal" if math.isinf(row.psnr) else "" if math.isnan(row.psnr) else f"{row.psnr:.1f}"
    similarity = "" if math.isnan(row.ssim) else f"{row.ssim:.3f}"
    peaks = [report.size(bytes_of.get(kind, 0)) for kind in kinds]
    return [*names, *figures, *peaks, likeness, similarity, pages.right(found).replace("-", "")]


@dataclass
class Plan:
    """What is asked of the builds and runs of one model, and the artifacts that were built."""

    model: str
    gpu: str
    store: Path
    steps: int
    _built: dict[tuple[str, ...], Path | SdxlError] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        return self.model.startswith(("tiny", "random:tiny"))

    @property
    def on_gpu(self) -> bool:
        return self.gpu != "cpu"

    def lacks(self, technique: Technique) -> str:
        """Why a technique can't be measured here; empty if it can."""
        told = {
            "gpu": (self.on_gpu, "it needs a GPU"),
            "full": (not self.small, "it is for models of full size"),
            "onediff": (bool(os.environ.get(interpreter.VARIABLE)), f"${interpreter.VARIABLE} is not set"),
        }
        return next((why for need in technique.needs.split() for met, why in [told[need]] if not met), "")

    def words(self, build: str = "", refiner: bool = False, backend: str = "torch") -> tuple[str, ...]:
        """What an artifact is built with, in the order of the command line."""
        model = self.model
        if refiner:
            model = REFINERS.get(model, "stabilityai/stable-diffusion-xl-refiner-1.0")
        vae = () if self.small or "--vae " in build or "--preset" in build else ("--vae", "fp16-fix")
        return (backend, "--model", model, "--gpu", self.gpu, *vae, *self.spelled(build).split())

    def spelled(self, build: str) -> str:
        return build.replace("TILE", "192x192" if self.small else "512x512")

    def artifact(self, words: tuple[str, ...]) -> Path:
        """The folder of an artifact, built if it isn't there; asked once, whether it can be built or not.

        Raises:
            SdxlError: it can't be built; the message is the build's own.
        """
        if words not in self._built:
            start = time.perf_counter()
            try:
                self._built[words] = _build(words, self.store)
            except SdxlError as error:
                self._built[words] = error
            found = self._built[words]
            what = found if isinstance(found, SdxlError) else "there"
            print(f"{' '.join(words)}: {what}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        found = self._built[words]
        if isinstance(found, SdxlError):
            raise found
        return found

    def needed(self, techniques: Iterable[Technique]) -> list[tuple[str, ...]]:
        """The artifacts of some techniques, each once."""
        asked = [self.words(technique.build, backend=technique.backend) for technique in techniques]
        asked += [self.words(refiner=True) for technique in techniques if "REFINER" in technique.run]
        return list(dict.fromkeys(asked))


def _build(words: tuple[str, ...], store: Path) -> Path:
    command = [sys.executable, "-m", "buildtool.cli", *words, "--artifacts", str(store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"sdxl-build ended with {done.returncode}"]
        why = next((line for line in said if line.startswith("Error: ")), said[-1])
        raise SdxlError(f"sdxl-build: {why.removeprefix('Error: ')}")
    (told,) = json.loads(done.stdout.strip().splitlines()[-1])["artifacts"]
    return Path(told["path"])


def random_lora(manifest: Manifest, path: Path) -> Path:
    """Writes a LoRA of random numbers for every matrix of the UNet's attention; products of 1e-3 of deviation or so."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (_, _, (rows, columns)) in sorted(lora_names.stored_rows(manifest.components["unet"]).items()):
        if "attentions" in name and name.endswith(".weight"):
            base = "unet." + name.removesuffix(".weight")
            for half, shape in (("lora_B", (rows, LORA_RANK)), ("lora_A", (LORA_RANK, columns))):
                made[f"{base}.{half}.weight"] = (torch.randn(shape, generator=generator) * 0.01).half()
    save_file(made, path)
    return path


def random_embedding(manifest: Manifest, path: Path) -> Path:
    """Writes a textual inversion of random vectors of a deviation like that of SDXL's own words."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    widths = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    made = {}
    for key, component in widths.items():
        shape = (VECTORS, manifest.key.configs[component]["hidden_size"])
        made[key] = torch.randn(shape, generator=generator) * 0.02
    save_file(made, path)
    return path


def new_word(prompt: str) -> str:
    """A word that tokenizers don't have and that a prompt contains: its longest without the first and last letter."""
    return max(prompt.split(), key=len)[1:-1]


class Measurements:
    """Rows of a plan's techniques, measured one after the other."""

    def __init__(self, plan: Plan, prompts: Sequence[tuple[str, int]], runs: int, out: Path) -> None:
        self._plan, self._prompts, self._runs, self._out = plan, prompts, runs, out
        self._same: dict[str, Row] = {}
        self._reference: cases.Result | None = None
        self.results: list[cases.Result] = []

    @property
    def read(self) -> list[Manifest]:
        return [result.case.manifest for result in self.results]

    def row(self, technique: Technique) -> Row:
        """A technique's row; one that fails says so. Several names of the same thing are measured once."""
        row = Row(technique.name, self._plan.spelled(technique.build) or technique.peer, technique.run)
        try:
            if why := self._plan.lacks(technique):
                raise SdxlError(why)
            folder = self._plan.artifact(self._plan.words(technique.build, backend=technique.backend))
            options = {"steps": self._plan.steps, **cases.parse_options(technique.run)}
            options = {name: self._made(value, folder) for name, value in options.items()}
            row.run = " ".join(f"{name.replace('_', '-')}={cases.told(name, value)}" for name, value in options.items())
            key = json.dumps([str(folder), options, technique.peer], sort_keys=True)
            if key not in self._same:
                case = cases.Case(len(self._same) + 1, folder, manifests.read(folder), options, technique.peer)
                self._same[key] = self._measure(case, technique.name == BASELINE)
            return replace(self._same[key], technique=row.technique, build=row.build, run=row.run)
        except SdxlError as error:
            row.failure = " ".join(str(error).split())
        except Exception as error:  # whatever it is, the rows that come are worth having
            traceback.print_exc()
            row.failure = " ".join(f"{type(error).__name__}: {error}".split())
        return row

    def _measure(self, case: cases.Case, baseline: bool) -> Row:
        def look() -> int:
            return memory.used(0) if self._plan.on_gpu else 0

        row = Row("", "", "")
        cases.check(case, self._prompts, self._out)
        before = memory.settled(look)
        with memory.Sampler(look, 0.02) as sampler:
            row.result = cases.measure(case, self._prompts, self._runs, self._out)
        self.results.append(row.result)
        self._reference = row.result if baseline else self._reference
        row.driver = sampler.most - before if self._plan.on_gpu else None
        if self._reference and "image" not in case.options:  # which starts from a picture instead of noise
            row.psnr, row.ssim = pages.likeness(row.result, self._reference)
            if why := accuracy.judge([row.result], self._prompts):
                print(why, file=sys.stderr)
        return row

    def _made(self, value: Any, folder: Path) -> Any:
        made: dict[str, Callable[[], Any]] = {
            "FEWER": lambda: self._plan.steps * 3 // 5,
            "REFINER": lambda: str(self._plan.artifact(self._plan.words(refiner=True))),
            "PICTURE": self._picture,
            "LORA": lambda: [str(self._lora())],
            "EMBEDDING": lambda: [f"{self._embedding(folder)}:{new_word(self._prompts[0][0])}"],
        }
        return made[value]() if isinstance(value, str) and value in made else value

    def _picture(self) -> str:
        if self._reference is None:
            raise SdxlError("there is no picture of the baseline to start from")
        return str(self._reference.pictures[0])

    def _embedding(self, folder: Path) -> Path:
        path = self._out / "random-word.safetensors"
        return path if path.exists() else random_embedding(manifests.read(folder), path)

    def _lora(self) -> Path:
        path = self._out / "random.safetensors"
        if not path.exists():
            random_lora(manifests.read(self._plan.artifact(self._plan.words())), path)
        return path


def select(plan: Plan, only: Sequence[str], skip: Sequence[str]) -> tuple[list[Technique], list[Technique]]:
    """The baseline and what was asked for by name, or all that can be measured here; and what is left out, of all."""
    asked = [t for t in TECHNIQUES if t.name == BASELINE or (t.name in only if only else t.name not in skip)]
    left = [] if only else [technique for technique in asked if plan.lacks(technique)]
    return [technique for technique in asked if technique not in left], left


def own_prompts(plan: Plan, count: int) -> list[tuple[str, int]]:
    """sdxl-bench's prompts; for a tiny model those of its world, none of which it was trained on."""
    if not plan.small:
        return list(bench.PROMPTS[:count])
    from training.scoring import held_out_prompts

    return [(prompt, seed) for seed, prompt in enumerate(held_out_prompts(count))]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [technique.name for technique in TECHNIQUES]
    one: dict[str, Any] = {"action": "append", "default": [], "choices": names, "metavar": "NAME"}
    parser.add_argument("--model", default="random:sdxl-base", help="of sdxl-build; tiny for a CPU")
    parser.add_argument("--gpu", default="auto", help="of sdxl-build; cpu for a CPU")
    parser.add_argument("--only", **one, help="the baseline and this technique; repeatable")
    parser.add_argument("--skip", **one, help="all but this technique; repeatable")
    parser.add_argument("--list", action="store_true", help="the techniques and their options, and nothing else")
    parser.add_argument("--steps", type=int, default=50, help="the baseline's")
    parser.add_argument(
        "--prompts", type=int, default=4, metavar="N", help="how many, of four; a tiny model has any number"
    )
    parser.add_argument("--runs", type=int, default=5, help="times that every prompt is drawn, after a warm-up")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), metavar="STORE", help="the store")
    parser.add_argument("--build-only", action="store_true", help="build what the techniques need, and measure nothing")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="builds side by side, all before the first row"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the pictures and sdxl-bench's page; kept")
    parser.add_argument("--json", metavar="FILE", help="the measurements, to a file")
    return parser.parse_args(arguments)


def build(plan: Plan, techniques: Sequence[Technique], jobs: int) -> int:
    """Builds all artifacts of some techniques, side by side; how many couldn't be built."""

    def one(words: tuple[str, ...]) -> int:
        try:
            plan.artifact(words)
        except SdxlError:  # told already
            return 1
        return 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(one, plan.needed(techniques)))


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if a technique failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    if options.list:
        needs = {"gpu": "a GPU", "full": "a full-size model", "onediff": "OneDiff's interpreter"}
        print(
            report.table(
                ("name", "build", "run", "needs"),
                [
                    [t.name, t.build or t.peer, t.run, " and ".join(needs[need] for need in t.needs.split())]
                    for t in TECHNIQUES
                ],
            )
        )
        return 0
    plan = Plan(options.model, options.gpu, options.artifacts, options.steps)
    techniques, left = select(plan, options.only, options.skip)
    if options.build_only or options.jobs > 1:
        failed = build(plan, techniques, options.jobs)
        if options.build_only:
            return min(failed, 1)
    with contextlib.ExitStack() as stack:
        out = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out.mkdir(parents=True, exist_ok=True)
        return measure(plan, techniques, left, options, words, out.resolve())


def measure(
    plan: Plan,
    techniques: Sequence[Technique],
    left: Sequence[Technique],
    options: argparse.Namespace,
    words: Sequence[str],
    out: Path,
) -> int:
    """Prints and writes row after row; 0, or 1 if one failed."""
    prompts = own_prompts(plan, options.prompts)
    measurements = Measurements(plan, prompts, options.runs, out)
    shown, rows = report.Table(headers(plan.on_gpu)), []
    print(
        f"{plan.model}: {len(prompts)} prompts, {options.runs} runs of each, {plan.steps} steps, guidance 5.\n",
        flush=True,
    )
    for technique in techniques:
        print(f"{technique.name} …", file=sys.stderr, flush=True)
        rows.append(measurements.row(technique))
        shown.add(cells(rows[-1], plan.on_gpu))
        read = measurements.read
        where = report.hardware(read[0]) if read else {}
        told = {"rows": [row.told() for row in rows], "hardware": where, "load": os.getloadavg()[0]}
        report.write_json(
            options.json, {**told, "command": report.command_line(words), "left_out": [t.name for t in left]}
        )
    if left:
        print("\nNot measured: " + "; ".join(f"{t.name}, {plan.lacks(t)}" for t in left) + ".")
    if measurements.results:
        print(f"\n{report.footer(measurements.read[:1], where, words)}", flush=True)
        if options.out:
            about = {"command": report.command_line(words), **where}
            print(f"\n{pages.write(measurements.results, prompts, about, out)}")
    return 1 if any(row.failure for row in rows) else 0


if __name__ == "__main__":
    # What this program starts has to find the project, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    raise SystemExit(main())
