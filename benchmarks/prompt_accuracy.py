"""Does the tiny model draw what a prompt says? Held-out prompts, one picture each, looked at by the judge.

    python benchmarks/prompt_accuracy.py "$(sdxl-build torch --model tiny --gpu cpu)"
    python benchmarks/prompt_accuracy.py --diffusers buildtool/data/tiny --guidance 1

An artifact of the tiny model in any backend and precision is scored through `sdxl-run`; `--diffusers FOLDER` scores a
diffusers folder through `StableDiffusionXLPipeline`, for comparison. A held-out prompt names at least one (colour,
shape, place) that no training scene has (`training/world.py`); `right` is the share of pictures with every named shape,
colour, count and place, and nothing besides (`training/judge.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from buildtool.store import manifest
from training.judge import shares
from training.scoring import Draw, as_uint8, diffusers_draw, held_out_prompts, score


@contextlib.contextmanager
def sdxl_run(engine: str, **settings: Any) -> Iterator[Draw]:
    """Draw with `sdxl-run --prompts -` in a process of its own: JSON lines in, PNG files out, the model stays loaded.

    Args:
        engine: an artifact's folder.
        settings: `steps`, `guidance`, `negative_prompt`, `width`, `height` of every line.
    """
    command = [sys.executable, "-m", "runtimes.cli", "--engine", engine, "--prompts", "-", "--quiet"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def one(prompt: str, seed: int) -> Image.Image:
            line = {"prompt": prompt, "seed": seed, "out": f"{folder}/{seed}.png", **settings}
            process.stdin.write(json.dumps(line) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or '{"error": "sdxl-run has ended"}')
            if "error" in answer:
                raise SystemExit(f"Error: {answer['error']}")
            with Image.open(answer["images"][0]["path"]) as picture:
                return picture.convert("RGB")

        yield lambda prompts, seeds: as_uint8([one(p, s) for p, s in zip(prompts, seeds, strict=True)])
        process.stdin.close()


@contextlib.contextmanager
def open_pipeline(options: argparse.Namespace) -> Iterator[tuple[Draw, tuple[int, int]]]:
    kind: dict[str, Any] = {"steps": options.steps, "guidance": options.guidance}
    if options.diffusers:
        from diffusers import StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline.from_pretrained(options.diffusers)
        pipeline.set_progress_bar_config(disable=True)
        width, height = options.size or (256, 256)
        yield (
            diffusers_draw(pipeline, width=width, height=height, negative=options.negative_prompt, **kind),
            (
                width,
                height,
            ),
        )
        return
    key = manifest.read(options.engine).key
    width, height = options.size or (key.width, key.height)
    with sdxl_run(options.engine, width=width, height=height, negative_prompt=options.negative_prompt, **kind) as draw:
        yield draw, (width, height)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("engine", nargs="?", help="an artifact's folder")
    parser.add_argument("--diffusers", metavar="FOLDER", help="a diffusers folder instead of an artifact")
    parser.add_argument("--prompts", type=int, default=200, help="how many held-out prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--negative-prompt", default=None)
    parser.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i")
    parser.add_argument("--list", type=int, default=0, help="which list of held-out prompts")
    parser.add_argument("--size", type=_size, default=None, help="WxH; default: the artifact's first, or 256x256")
    parser.add_argument("--batch", type=int, default=8, help="prompts a call")
    parser.add_argument("--least", type=float, default=0.0, help="exit with 1 if a smaller share is right")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--wrong", action="store_true", help="list the prompts that went wrong, and what is there")
    options = parser.parse_args(arguments)
    if bool(options.engine) == bool(options.diffusers):
        parser.error("give an artifact's folder, or --diffusers FOLDER")
    with open_pipeline(options) as (draw, size):
        prompts = held_out_prompts(options.prompts, options.list, *size)
        start = time.perf_counter()
        verdicts = score(draw, prompts, seed=options.seed, batch=options.batch)
        seconds = time.perf_counter() - start
    table = shares(verdicts)
    if options.json:
        run = {
            "engine": options.engine or options.diffusers,
            "prompts": options.prompts,
            "steps": options.steps,
            "guidance": options.guidance,
            "size": f"{size[0]}x{size[1]}",
            "seconds_a_picture": round(seconds / len(prompts), 3),
        }
        print(json.dumps({**run, **{name: round(share, 4) for name, share in table.items()}}))
    else:
        width = max(map(len, table))
        for name, share in table.items():
            print(f"{name:{width}}  {100 * share:5.1f}%")
        print(f"{seconds / len(prompts):.2f} s a picture, {len(prompts)} prompts, {size[0]}x{size[1]}")
    if options.wrong:
        for prompt, verdict in zip(prompts, verdicts, strict=True):
            if not verdict.right:
                print(f"{prompt}\n    {verdict.seen}", file=sys.stderr)
    return 0 if table["right"] >= options.least else 1


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; one is 320x192") from None
    return width, height


if __name__ == "__main__":
    raise SystemExit(main())
