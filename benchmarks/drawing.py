"""The process that draws for picture.py: an artifact, one of the peers, or diffusers in fp32, which the others are
held against. ``python benchmarks/drawing.py TASK`` tells its starter what it measures, as it measures it.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import process, report
from buildtool.bench.cli import PROMPTS
from buildtool.store import manifest as manifests
from buildtool.store.manifest import Manifest

OURS, REFERENCE = "ours", "reference"
PARTS = ("encode", "denoise", "decode")

Request = tuple[str, int]
"""A prompt and a seed."""
Draw = Callable[[Sequence[Request], float, str], tuple[Any, dict[str, float]]]
"""Requests, guidance_until and diffusers' output_type -> pictures or latents, and the seconds of each part."""


@dataclass(frozen=True)
class Task:
    """What a process draws.

    Args:
        who: ``ours``, ``reference``, or one of ``peers.NAMES``.
        artifact: the folder; peers and the reference draw with the model that it was built from.
        precision: of peers and the reference.
        untils: fractions of the steps that are guided, measured one after the other.
        images: pictures a call.
        folder: where pictures and latents go, which nobody times.
    """

    who: str
    artifact: str
    precision: str
    steps: int
    guidance: float
    untils: list[float]
    images: int
    runs: int
    warmup: int
    gpu_index: int
    folder: str

    def command(self) -> list[str]:
        return process.python(Path(__file__), json.dumps(asdict(self)))

    def file(self, until: float, name: str) -> Path:
        return Path(self.folder) / f"{until:g}-{name}"


def requests(count: int, turn: int = 0) -> list[Request]:
    """Prompts and seeds of a call; those of another ``turn`` are others."""
    return [(PROMPTS[(i + turn) % len(PROMPTS)][0], 1 + i + 1000 * turn) for i in range(count)]


def compared(count: int) -> list[int]:
    """Which pictures of a call are held against the reference's: both ends of the batch."""
    return sorted({0, count - 1})


def ours(task: Task, device: Any) -> Draw:
    import torch

    import runtimes

    pipeline = runtimes.load(task.artifact, device=device)

    def draw(asked: Sequence[Request], until: float, output_type: str) -> tuple[Any, dict[str, float]]:
        made: Any = pipeline(
            [text for text, _ in asked],
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            guidance_until=until,
            generator=[torch.Generator().manual_seed(seed) for _, seed in asked],
            output_type=output_type,  # type: ignore[arg-type]
        )
        return made.images, pipeline.timings

    return draw


def theirs(task: Task, manifest: Manifest, device: Any) -> Draw:
    """diffusers' pipeline, channels-last, with UNet and VAE decoder through ``torch.compile`` where the peer is
    that; the decoder isn't where diffusers upcasts it."""
    import msgspec
    import torch

    from benchmarks.peers import COMPILE
    from buildtool.bench import peer

    key = msgspec.structs.replace(manifest.key, precision=task.precision)
    manifest = msgspec.structs.replace(manifest, key=key)
    made = peer.pipeline("eager", manifest, device)
    layout = torch.contiguous_format if task.who == "eager-nchw" else torch.channels_last
    for part in (made.unet, made.vae):
        torch.nn.Module.to(part, memory_format=layout)  # type: ignore[call-overload]
    if task.who in COMPILE:
        how: dict[str, Any] = {"fullgraph": True, "dynamic": False, **COMPILE[task.who]}
        made.unet = torch.compile(made.unet, **how)
        # A VAE that is upcast gets new weights at every call, which CUDA graphs would be recorded anew for.
        if not (made.vae.config.get("force_upcast") and task.precision == "fp16"):
            made.vae.decode = torch.compile(made.vae.decode, **how)
    gc.collect()
    if device.type == "cuda":  # weights pass through fp32 on their way
        torch.cuda.empty_cache()
    # A call draws a batch of the artifact's; the reference, whose numbers are wider, draws one after the other.
    batch = 1 if task.who == REFERENCE else key.batch

    def draw(asked: Sequence[Request], until: float, output_type: str) -> tuple[Any, dict[str, float]]:
        pictures: list[Any] = []
        seconds = dict.fromkeys(PARTS, 0.0)
        options = {"steps": task.steps, "guidance": task.guidance, "guidance_until": until}
        for start in range(0, len(asked), batch):
            lines = [{"prompt": text, "seed": seed, **options} for text, seed in asked[start : start + batch]]
            clock = peer.Clock(time.time(), device)
            pictures += list(peer.call(made, manifest, lines, clock, output_type))
            for span in clock.spans:
                seconds[span["name"]] += span["end"] - span["start"]
        return pictures, seconds

    return draw


def measure(draw: Draw, task: Task, until: float, tell: Callable[[process.Event], None]) -> None:
    """The first call, calls that aren't counted, and those that are: every second draws other prompts and seeds, and
    the last draws what the reference drew. Its pictures are kept, and the latents of one more call."""
    from benchmarks.step import cache_hits

    golden, other = requests(task.images), requests(task.images, turn=1)
    tell({"kind": "setting", "until": until})
    hits, begin = cache_hits(), time.perf_counter()
    draw(golden, until, "pil")
    tell({"kind": "first", "seconds": time.perf_counter() - begin, "cached": cache_hits() > hits})
    pictures: Any = []
    for run in range(-task.warmup, task.runs):
        asked = other if (task.runs - run) % 2 == 0 else golden
        begin = time.perf_counter()
        pictures, parts = draw(asked, until, "pil")  # pictures on the host: nothing is left for the GPU to do
        seconds = time.perf_counter() - begin
        if run >= 0:
            tell({"kind": "run", "seconds": seconds, "parts": {name: parts[name] for name in PARTS}})
    keep(draw, task, until, golden, pictures)
    tell({"kind": "made"})


def keep(draw: Draw, task: Task, until: float, asked: Sequence[Request], pictures: Sequence[Any]) -> None:
    """Saves what is compared: pictures, and the latents that the same call gives."""
    import numpy as np
    import torch

    latents, _ = draw(asked, until, "latent")
    for i in range(len(asked)):
        pictures[i].save(task.file(until, f"{i}.png"))
    rows = [torch.as_tensor(row).float().cpu().numpy() for row in latents]
    np.save(task.file(until, "latents.npy"), np.stack(rows))


def refer(draw: Draw, task: Task, until: float, tell: Callable[[process.Event], None]) -> None:
    """Draws what the others are held against, of every call what :func:`compared` names."""
    tell({"kind": "setting", "until": until})
    begin = time.perf_counter()
    golden = requests(task.images)
    asked = [golden[i] for i in compared(task.images)]
    keep(draw, task, until, asked, draw(asked, until, "pil")[0])
    tell({"kind": "first", "seconds": time.perf_counter() - begin, "cached": False})
    tell({"kind": "made"})


def main(words: Sequence[str]) -> None:
    tell = process.teller()
    task = Task(**json.loads(words[0]))
    manifest = manifests.read(task.artifact)
    import torch

    device = torch.device("cuda", task.gpu_index) if report.on_gpu(manifest) else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if task.who == REFERENCE:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        draw = ours(task, device) if task.who == OURS else theirs(task, manifest, device)
        for until in task.untils:
            (refer if task.who == REFERENCE else measure)(draw, task, until, tell)
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        tell({"kind": "failed", "why": f"{type(error).__name__}: {said[0][:160]}"})


if __name__ == "__main__":
    main(sys.argv[1:])
