"""How long from nothing to a picture: a fresh process for each run, timed stage by stage.

    python benchmarks/startup.py --engine "$(sdxl-build torch --model tiny --gpu cpu)"

Files are in the disk cache from the second run on; the first is left out. CLOCK_MONOTONIC is one clock for all
processes of a machine, so a child can tell when it was started by its parent's watch.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = {
    "python": "process start to the first line of Python",
    "imports": "torch and runtimes",
    "open": "manifest, sizes of files, scheduler",
    "engines": "compiled code loaded, weights attached",
    "encode": "prompt through both text encoders, first call",
    "loop starts": "all of the above",
    "first step": "",
    "other steps": "",
    "decode": "VAE, first call",
    "save": "PNG",
    "first picture": "all of the above",
    "sdxl-run": "the whole command, exit included",
}


def child(engine: str, steps: int, out: str, began: float) -> None:
    """Makes one picture through the public interface and prints its stages' seconds as JSON."""
    seconds = {"python": time.monotonic() - began}

    last = time.monotonic()

    def lap(name: str) -> None:
        nonlocal last
        now = time.monotonic()
        seconds[name], last = now - last, now

    import torch

    import runtimes.pipeline
    import runtimes.session
    from runtimes import png
    from runtimes.jobs import Parameters

    lap("imports")
    pipeline = runtimes.load(engine)
    width, height = pipeline.sizes[0]
    lap("open")
    done: list[float] = []
    made: Any = pipeline(
        "a red circle on grass",
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        progress=lambda step, total: done.append(time.monotonic()),
    )
    stages = pipeline.timings
    seconds["engines"], seconds["encode"] = stages["load"], stages["encode"]
    seconds["loop starts"] = last + stages["load"] + stages["encode"] - began
    seconds["first step"] = done[0] - began - seconds["loop starts"]
    seconds["other steps"] = done[-1] - done[0]
    last = done[-1]
    seconds["decode"] = stages["decode"]
    last += stages["decode"]
    asked = Parameters(
        prompt="a red circle on grass", negative_prompt=None, seed=1, width=width, height=height, steps=steps,
        guidance=5.0, guidance_until=1.0, scheduler="euler",
    )  # fmt: skip
    Path(out).write_bytes(png.encode(made.images[0], asked, pipeline.manifest(width, height)))
    lap("save")
    seconds["first picture"] = time.monotonic() - began
    print(json.dumps(seconds))


def measure(engine: str, steps: int, runs: int) -> list[dict[str, float]]:
    """Stages' seconds of each run; one more run goes before them, to fill the disk cache."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        out = str(Path(scratch) / "picture.png")
        words = ["--prompt", "a red circle on grass", "--steps", str(steps), "--seed", "1", "--out", out, "--quiet"]
        for _ in range(runs + 1):
            began = time.monotonic()
            command = [sys.executable, __file__, "--engine", engine, "--steps", str(steps), "--child", repr(began), out]
            told = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            seconds = json.loads(told)
            began = time.monotonic()
            run = [sys.executable, "-m", "runtimes.cli", "--engine", engine, *words]
            subprocess.run(run, stdout=subprocess.DEVNULL, check=True)
            seconds["sdxl-run"] = time.monotonic() - began
            found.append(seconds)
            print(f"run {len(found) - 1}: first picture after {seconds['first picture']:.3f} s", file=sys.stderr)
    return found[1:]


def machine(engine: str) -> str:
    """Hardware, versions and load, in a line."""
    import torch

    from buildtool.store import manifest

    key = manifest.read(engine).key
    if key.target.startswith("cpu"):
        text = Path("/proc/cpuinfo").read_text()
        names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
        hardware = f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    else:
        hardware = torch.cuda.get_device_name()
    return (
        f"{hardware}; Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; load {os.getloadavg()[0]:.2f} before; {datetime.date.today()}; "
        f"{key.model} {key.width}x{key.height}, batch {key.batch}, {key.precision}, {key.backend}, {key.target}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="the artifact's folder")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--child", nargs=2, metavar=("BEGAN", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.engine, options.steps, options.child[1], float(options.child[0]))
        return
    where = machine(options.engine)
    found = measure(options.engine, options.steps, options.runs)
    print(where)
    words = f"python benchmarks/startup.py --engine DIR --steps {options.steps} --runs {options.runs}"
    threads = os.environ.get("OMP_NUM_THREADS")
    print(f"`{f'OMP_NUM_THREADS={shlex.quote(threads)} ' if threads else ''}{words}`\n")
    print("| stage | median, s | min to max | |\n| --- | --- | --- | --- |")
    for stage, meaning in STAGES.items():
        values = [seconds[stage] for seconds in found]
        note = meaning or f"{options.steps - 1 if stage == 'other steps' else 1} of {options.steps}, guided"
        print(f"| {stage} | {statistics.median(values):.3f} | {min(values):.3f} to {max(values):.3f} | {note} |")


if __name__ == "__main__":
    # Started as a file, Python looks for modules beside it; the packages are one folder up, installed or not.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
