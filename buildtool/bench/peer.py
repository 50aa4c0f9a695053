"""The same model without the project: diffusers' pipeline, as it is or through a library that makes it faster.

``python -m buildtool.bench.peer NAME ENGINE PROMPTS STARTED`` is a peer's own process; it prints what
``sdxl-run --json`` would. Nothing else of the project imports diffusers to draw.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildtool import lora, models
from buildtool.store import machine
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest

OPTIONS = ("steps", "guidance", "guidance_until", "negative_prompt")
"""The options of a run that peers know."""


@dataclass(frozen=True)
class Peer:
    title: str
    distribution: str = "diffusers"
    """What has to be installed."""
    gpu: bool = False
    """Whether it is for NVIDIA GPUs alone."""


PEERS: Mapping[str, Peer] = {
    "eager": Peer("diffusers eager"),
    "compile": Peer("diffusers torch.compile"),
    "stable-fast": Peer("stable-fast", "stable-fast", gpu=True),
    "deepcache": Peer("DeepCache 3:0", "DeepCache"),
}


def check(name: str, manifest: Manifest, options: Mapping[str, Any]) -> None:
    """Looks at everything that can be refused without importing torch.

    Raises:
        SdxlError: it isn't installed or doesn't run here, doesn't know an option, or the model isn't there any more.
    """
    peer = PEERS[name]
    if not machine.versions(peer.distribution):
        raise SdxlError(f"--peer {name}: {peer.distribution} is not installed.", f"pip install {peer.distribution}")
    if peer.gpu and manifest.key.target.startswith("cpu"):
        raise SdxlError(
            f"--peer {name} is for NVIDIA GPUs; the first engine was built for {manifest.key.target}.", "Leave it out."
        )
    for option in options:
        if option not in OPTIONS:
            raise SdxlError(f"--peer {name}: peers know no option {option}.", f"They know {', '.join(OPTIONS)}.")
    until = options.get("guidance_until", 1.0)
    if name == "deepcache" and isinstance(until, int | float) and until < 1:
        raise SdxlError(
            f"--peer deepcache reuses features of guided steps; it doesn't go with guidance-until={until}.",
            "Measure them in two commands.",
        )
    source(manifest)


def source(manifest: Manifest) -> models.Source:
    """The checkpoint that an artifact was built from.

    Raises:
        SdxlError: it isn't there, or isn't the same any more.
    """

    def given(option: str) -> list[str]:
        return [value for word, value in zip(manifest.command, manifest.command[1:], strict=False) if word == option]

    def one(option: str) -> str | None:
        return next(iter(given(option)), None)

    model = one("--model") or manifest.key.model
    try:
        found = models.resolve(
            model,
            revision=one("--revision"),
            variant=one("--variant"),
            vae=one("--vae") or "default",
            config_dir=one("--config"),
        )
        if given("--lora"):
            found, _ = lora.fuse(found, given("--lora"))
    except SdxlError as error:
        raise SdxlError(f"--peer: the model that the artifact was built from can't be read: {error}") from None
    if found.weights != manifest.key.weights:
        raise SdxlError(f"--peer: {model} is not what the artifact was built from any more.", "Build it again.")
    return found


def pipeline(name: str, manifest: Manifest, device: Any) -> Any:
    """diffusers' pipeline with the model on ``device`` in the artifact's precision, made faster by what ``name`` is."""
    import diffusers
    import torch
    from transformers import CLIPTokenizer

    from exporters import sdxl

    if device.type == "cuda":
        torch.cuda.set_device(device)
    found = source(manifest)
    dtype = sdxl.TENSORS[manifest.key.precision]

    def model(component: str) -> Any:
        row = sdxl.component(component)
        made: Any = row.reference(found.configs[row.source], found.tensors(row.source), str(device)).model
        return made.to(dtype)

    encoders = {component: model(component) for component in ("text_encoder", "text_encoder_2")}
    for encoder in encoders.values():
        encoder.set_attn_implementation("sdpa")
    schedule = dict(found.configs["scheduler"])
    made = diffusers.StableDiffusionXLPipeline(
        vae=model("vae_decoder"),
        unet=model("unet"),
        **encoders,
        tokenizer=CLIPTokenizer.from_pretrained(found.tokenizer_folders["tokenizer"]),
        tokenizer_2=CLIPTokenizer.from_pretrained(found.tokenizer_folders["tokenizer_2"]),
        scheduler=getattr(diffusers, schedule.pop("_class_name")).from_config(schedule),
        force_zeros_for_empty_prompt=manifest.pipeline.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    if "freeu" in manifest.key.options:
        made.enable_freeu(**manifest.key.options["freeu"])
    if device.type == "cuda":
        for part in (made.unet, made.vae):
            torch.nn.Module.to(part, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _FASTER[name](made, device)


def _compile(made: Any, device: Any) -> Any:
    import torch

    graphs: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
    made.unet = torch.compile(made.unet, fullgraph=True, dynamic=False, **graphs)
    return made


def _stable_fast(made: Any, device: Any) -> Any:
    """As its README says, with xFormers and Triton where they are installed."""
    from sfast.compilers.diffusion_pipeline_compiler import (  # type: ignore[import-not-found]
        CompilationConfig,
        compile,
    )

    config = CompilationConfig.Default()
    config.enable_xformers = bool(machine.versions("xformers"))
    config.enable_triton = bool(machine.versions("triton"))
    config.enable_cuda_graph = True
    return compile(made, config)


def _deepcache(made: Any, device: Any) -> Any:
    from DeepCache import DeepCacheSDHelper  # type: ignore[import-not-found]

    helper = DeepCacheSDHelper(pipe=made)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    return made


_FASTER: Mapping[str, Callable[[Any, Any], Any]] = {
    "eager": lambda made, device: made,
    "compile": _compile,
    "stable-fast": _stable_fast,
    "deepcache": _deepcache,
}


class Clock:
    """Spans as those of ``sdxl-run``'s timeline, in seconds from the process's start.

    Args:
        started: ``time.time()`` when the process was started.
    """

    def __init__(self, started: float, device: Any) -> None:
        self._started, self._device = started, device
        self.spans: list[dict[str, Any]] = []

    def now(self) -> float:
        """Seconds since the process started, once the GPU has done what it was told."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.time() - self._started

    def add(self, name: str, start: float) -> None:
        self.spans.append({"name": name, "start": start, "end": self.now()})


def call(
    made: Any, manifest: Manifest, lines: Sequence[Mapping[str, Any]], clock: Clock, output_type: str = "pil"
) -> Any:
    """One call of the pipeline: a picture for each of some lines of a prompts file, which differ in prompt and seed.

    Args:
        made: from :func:`pipeline`.
        clock: gets the spans ``encode``, ``denoise`` and ``decode``.
        output_type: diffusers' own: ``pil`` for a list of pictures, ``latent`` for the loop's latents (N, C, h, w).
    """
    import torch

    first = lines[0]
    steps = first.get("steps", 50)
    last_guided = int(steps * first.get("guidance_until", 1.0))
    conditions = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    begin = loop = decoding = clock.now()
    set_timesteps = made.scheduler.set_timesteps

    def starts(*args: Any, **kwargs: Any) -> Any:  # the call between the prompts' encoding and the loop
        nonlocal loop
        clock.add("encode", begin)
        loop = clock.now()
        return set_timesteps(*args, **kwargs)

    def after_step(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal decoding
        if step == last_guided and pipe.do_classifier_free_guidance:
            tensors |= {name: tensors[name].chunk(2)[-1] for name in conditions}
            pipe._guidance_scale = 0.0
        if step == steps - 1:
            clock.add("denoise", loop)
            decoding = clock.now()
        return tensors

    negative = first.get("negative_prompt")
    made.scheduler.set_timesteps = starts
    try:
        images = made(
            prompt=[line["prompt"] for line in lines],
            negative_prompt=None if negative is None else [negative] * len(lines),
            width=manifest.key.width,
            height=manifest.key.height,
            num_inference_steps=steps,
            guidance_scale=first.get("guidance", 5.0),
            generator=[torch.Generator("cpu").manual_seed(line["seed"]) for line in lines],
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=conditions,
            output_type=output_type,
        ).images
    finally:
        made.scheduler.set_timesteps = set_timesteps
    clock.add("decode", decoding)
    return images


def draw(made: Any, manifest: Manifest, lines: list[dict[str, Any]], clock: Clock) -> None:
    """Pictures of :func:`call`, saved where the lines say."""
    for line, image in zip(lines, call(made, manifest, lines, clock), strict=True):
        start = clock.now()
        image.save(line["out"])
        clock.add("save", start)


def main(name: str, engine: str, prompts: str, started: str) -> None:
    import torch

    manifest = manifests.read(Path(engine))
    lines = [json.loads(line) for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    device = torch.device("cpu" if manifest.key.target.startswith("cpu") else "cuda:0")
    clock = Clock(float(started), device)
    made = pipeline(name, manifest, device)
    if device.type == "cuda":  # weights pass through fp32 on their way
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock.add("load", 0.0)
    batch = manifest.key.batch
    for start in range(0, len(lines), batch):
        draw(made, manifest, lines[start : start + batch], clock)
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated()
    images = [{"steps": line.get("steps", 50)} for line in lines]
    print(json.dumps({"timeline": clock.spans, "images": images, "peak_memory_bytes": peak}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SdxlError as problem:
        sys.exit(f"Error: {problem}")
