"""What a build would make: spec -> key. Imports no torch and reads no weights, so that a hit is quick."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildtool import gpu, models, unet_options
from buildtool.checkpoint.configs import vae_scale_factor
from buildtool.progress import Progress
from buildtool.store import interpreter, machine
from buildtool.store.errors import SdxlError
from buildtool.store.key import KEY_VERSION, ArtifactKey, CodeKey
from exporters import dynamic, onnx_providers, registry, trt_flavor
from exporters.base import ExportError

DEFAULT_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
COMPONENTS = {"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2", "unet": "unet", "vae_decoder": "vae"}
"""Component -> whose config and weights it is made of. The exporters' table, without importing torch."""
ENCODER = {"vae_encoder": "vae"}
"""The same, for ``with_encoder``: text to image has no use for it."""
UNSIZED = ("text_encoder", "text_encoder_2")
# Settings of a VAE's config that its graph doesn't read: fine-tunes that differ in them share code.
NOT_COMPILED = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size")

NOT_IN_CODE = (
    "golden",
    "encoder",
    "freeu",
    "deepcache",
    "segments",
    "vae_tile",
    "lora",
    "dynamic",
    "fp8",
    "no_negative_prompt",
)
"""Options that shape no component's code, or not every component's."""


@dataclass(frozen=True)
class Spec:
    """What the command line asked for."""

    backend: str
    model: str = DEFAULT_MODEL
    revision: str | None = None
    variant: str | None = None
    config: Path | None = None
    gpu: str = "auto"
    gpu_index: int | None = None
    resolutions: tuple[tuple[int, int], ...] = ()
    batch: int = 1
    precision: str | None = None
    vae: str = "default"
    vae_tile: tuple[int, int] | None = None
    """Largest size that the VAE's decoder makes at once, in pixels; larger pictures are decoded in tiles."""
    with_encoder: bool = False
    """Whether the artifact has the VAE's encoder too, for image to image."""
    freeu: str | None = None
    """FreeU's ``s1,s2,b1,b2``."""
    deepcache: str | None = None
    """DeepCache's ``INTERVAL[:BRANCH]``."""
    no_negative_prompt: bool = False
    """Whether guided steps take no text but the prompt's."""
    segments: int | None = None
    """Parts that the UNet is compiled in; None for one piece."""
    lora: tuple[str, ...] = ()
    """``FILE[:SCALE]`` each, added to the weights in this order."""
    spare_tokens: int = 0
    """Rows of the text encoders' word tables for textual inversions that come at run time."""
    artifacts: Path = Path("artifacts")
    force: bool = False
    flavor: str = "auto"
    """Which of a backend's libraries builds."""
    compiler: str = "auto"
    """Which of OneDiff's compilers builds."""
    mode: str | None = None
    """nexfort's mode, names joined with ``:``; None for the backend's own."""
    compatibility: str = "none"
    """Which GPUs besides the one that is present shall run what is tuned for it."""
    dynamic: str | None = None
    """The range of sizes that engines make, ``MINxMIN..MAXxMAX``."""
    provider: str | None = None
    """What of ONNX Runtime runs it; None for its CPU or CUDA provider."""
    golden: bool = True
    """Whether the artifact has golden tensors; without, nobody can check its numbers."""
    jobs: int = 0
    """Compilers at once; 0 for as many as there are cores, up to one a variant."""


@dataclass(frozen=True)
class Plan:
    """One artifact to be: its key and those of its components' code."""

    spec: Spec
    source: models.Source
    target: gpu.Target
    width: int
    height: int
    key: ArtifactKey
    code_keys: dict[str, CodeKey]

    @property
    def compiled_configs(self) -> dict[str, Any]:
        """The components' configs as code is compiled for them: the text encoders' word tables with the spare rows."""
        found, spare = self.source.configs, self.spec.spare_tokens
        return {n: {**c, "vocab_size": c["vocab_size"] + spare} if n in UNSIZED else c for n, c in found.items()}

    @property
    def command(self) -> tuple[str, ...]:
        """The command that builds exactly this artifact."""
        spec = self.spec
        words = ["sdxl-build", spec.backend, "--model", spec.model]
        for option, value in (("--revision", self.source.revision), ("--variant", spec.variant)):
            words += [option, value] if value else []
        words += ["--config", str(spec.config)] if spec.config else []
        words += ["--gpu", "cpu" if self.target.device == "cpu" else self.target.name.replace("+", ",")]
        words += ["--resolution", f"{self.width}x{self.height}", "--batch", str(spec.batch)]
        words += ["--precision", self.key.precision]
        words += ["--vae", spec.vae] if spec.vae != "default" else []
        words += ["--vae-tile", "{}x{}".format(*spec.vae_tile)] if spec.vae_tile else []
        words += ["--with-encoder"] if spec.with_encoder else []
        for option, value in (("--freeu", spec.freeu), ("--deepcache", spec.deepcache)):
            words += [option, value] if value else []
        words += ["--no-negative-prompt"] if spec.no_negative_prompt else []
        words += ["--segments", str(spec.segments)] if spec.segments is not None else []
        for text in spec.lora:
            words += ["--lora", text]
        words += ["--spare-tokens", str(spec.spare_tokens)] if spec.spare_tokens else []
        for option, value in (("--provider", spec.provider), ("--dynamic", spec.dynamic)):
            words += [option, value] if value else []
        words += ["--compiler", self.key.options["compiler"]] if "compiler" in self.key.options else []
        words += ["--mode", spec.mode] if spec.mode else []
        if "flavor" in self.key.options:
            words += ["--flavor", self.key.options["flavor"]]
            words += [] if spec.golden else ["--no-golden"]
            words += ["--compatibility", spec.compatibility] if spec.compatibility != "none" else []
        return (*words, "--artifacts", str(spec.artifacts))


def plan(spec: Spec, progress: Progress | None = None) -> list[Plan]:
    """Resolves a spec to one plan a resolution. Imports no torch and reads no weights that it knows.

    Raises:
        SdxlError: the model, the GPU or an option can't be served.
    """
    row = registry.backend(spec.backend)
    target = _target(spec, row)
    flavor = ""
    if row.flavors:
        flavor = _flavor(spec, row, target)
        if spec.compatibility != "none" and flavor != "tensorrt":
            raise SdxlError(
                f"--compatibility {spec.compatibility} is for TensorRT proper; TensorRT-RTX builds for --gpu.",
                "Leave it out, or name several targets: --gpu sm86,sm89",
            )
        row = row.flavored(flavor)
    precision = spec.precision or ("fp32" if target.device == "cpu" else "fp16")
    if precision not in row.precisions:
        raise SdxlError(
            f"The {spec.backend} backend has no precision {precision}.", f"Try: {', '.join(row.precisions)}."
        )
    if target.device == "cpu" and precision != "fp32":
        raise SdxlError(f"On a CPU the {spec.backend} backend runs in fp32, not {precision}.", "Leave --precision out.")
    if precision == "fp8" and not set(target.names) <= set(registry.FP8_TARGETS):
        raise SdxlError(
            f"--precision fp8 needs a GPU that multiplies in fp8 ({', '.join(registry.FP8_TARGETS)}), "
            f"and {target.name} doesn't.",
            "Try: fp16.",
        )
    if spec.batch < 1:
        raise SdxlError(f"--batch is the images per call, at least 1; {spec.batch} was given.")
    if spec.dynamic and not row.flavors:
        raise SdxlError(
            f"The {spec.backend} backend compiles for one size, and --dynamic {spec.dynamic} asks for a range.",
            "Build several: repeat --resolution. A range: sdxl-build trt",
        )
    if spec.dynamic and spec.freeu:
        raise SdxlError("--freeu filters a picture of one size; --dynamic asks for a range.", "Leave one of them out.")
    if spec.segments is not None and spec.deepcache is not None:
        raise SdxlError(
            f"--segments {spec.segments} and --deepcache {spec.deepcache} cut the UNet in two ways.",
            "Leave one of them out.",
        )
    if spec.provider:
        try:
            row = row.provided(target.device, onnx_providers.choose(spec.provider, target.device))
        except ExportError as error:
            raise SdxlError(error.message, error.hint) from None
    if not row.targets:
        gpu.require_present(target, spec.backend)

    def hashing(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress.update(done, total)

    source = models.resolve(
        spec.model,
        revision=spec.revision,
        variant=spec.variant,
        vae=spec.vae,
        config_dir=spec.config,
        progress=hashing,
    )
    loras: list[Any] = []
    if spec.lora:
        from buildtool import lora

        source, loras = lora.fuse(source, spec.lora, hashing)
    if row.flavors:
        upcast = bool(source.configs["vae"].get("force_upcast", False))
        try:
            trt_flavor.check_types(flavor, target.names, precision, upcast)
        except ExportError as error:
            raise SdxlError(error.message, error.hint) from None
    factor = vae_scale_factor(source.configs["vae"])
    plans = []
    for width, height in spec.resolutions or (source.default_size,):
        if width < factor or height < factor or width % factor or height % factor:
            raise SdxlError(
                f"{width}x{height} can't be made: both sides have to be multiples of {factor}.",
                f"Try --resolution {max(round(width / factor), 1) * factor}x{max(round(height / factor), 1) * factor}.",
            )
        plans.append(_plan(spec, row, source, target, width, height, precision, factor, loras))
    return plans


def _target(spec: Spec, row: registry.Backend) -> gpu.Target:
    """What ``--gpu`` names; backends with flavors build for GPUs only, whether they are here or not."""
    elsewhere = "Name the GPU that it is for, which needn't be here: --gpu sm86"
    if row.flavors and spec.gpu.strip().lower() == "auto" and not machine.gpus():
        raise SdxlError("No GPU was found on this machine.", elsewhere)
    target = gpu.resolve_target(spec.gpu, spec.gpu_index)
    if row.flavors and target.device == "cpu":
        raise SdxlError(f"The {spec.backend} backend builds for NVIDIA GPUs, not for a CPU.", elsewhere)
    return target


def _flavor(spec: Spec, row: registry.Backend, target: gpu.Target) -> str:
    """The flavor that builds: the one asked for, or the best of those that are installed."""
    installed = {name for name, flavor in row.flavors.items() if machine.versions(*flavor.distributions)}
    if not gpu.usable(target):
        installed.discard("tensorrt")
    here = target.names[0] if target.gpu_name != "any" else ""
    try:
        return trt_flavor.choose(spec.flavor, target.names, here, installed)
    except ExportError as error:
        raise SdxlError(error.message, error.hint) from None


def _plan(
    spec: Spec,
    row: registry.Backend,
    source: models.Source,
    target: gpu.Target,
    width: int,
    height: int,
    precision: str,
    factor: int,
    loras: list[Any],
) -> Plan:
    toolchain = _toolchain(row, target)
    options = dict(row.options.get(target.device, {}))
    if precision == "fp32":  # who asks for it wants all of it; elsewhere it is for what is upcast (the VAE)
        options.pop("tf32", None)
    if row.flavors:
        options |= {"golden": spec.golden, "compatibility": spec.compatibility}
    if row.apart:
        options["compiler"], packages = interpreter.choose(spec.compiler, interpreter.named())
        toolchain |= {f"onediff.{name}": version for name, version in packages.items()}
        if options["compiler"] != "nexfort":
            options.pop("mode")
            if spec.mode:
                raise SdxlError(f"{options['compiler']} has no --mode.", "It is nexfort's: --compiler nexfort")
        elif spec.mode:
            options["mode"] = interpreter.mode(spec.mode, target.device)
    if precision == "fp8":
        options["fp8"] = True  # which of the UNet's products: exporters.fp8
    if spec.with_encoder:  # left out where it isn't, so that such artifacts keep their keys
        options["encoder"] = True
    if spec.dynamic is not None:
        options["dynamic"] = _dynamic(spec.dynamic, source, width, height, factor)
    if spec.freeu is not None:
        options["freeu"] = unet_options.freeu(spec.freeu, source.configs["unet"])
    if spec.deepcache is not None:
        options["deepcache"] = unet_options.deepcache(spec.deepcache, source.configs["unet"])
    if spec.no_negative_prompt:
        options["no_negative_prompt"] = unet_options.no_negative_prompt(spec.segments, source.configs["pipeline"])
    if spec.segments is not None:
        options["segments"] = unet_options.segments(spec.segments, source.configs["unet"])
    tile = _tile(spec, width, height, factor)
    if tile != (width, height):
        options["vae_tile"] = list(tile)
    if loras:
        options["lora"] = loras
    if spec.spare_tokens:
        options["spare_tokens"] = spec.spare_tokens
    gpu_name = target.gpu_name if row.tunes else "any"
    key = ArtifactKey(
        key_version=KEY_VERSION,
        backend=spec.backend,
        model=source.name,
        revision=source.revision,
        variant=source.variant,
        weights=source.weights,
        configs=source.configs,
        tokenizers=source.tokenizers,
        target=target.name,
        gpu_name=gpu_name,
        width=width,
        height=height,
        batch=spec.batch,
        precision=precision,
        vae=Path(spec.vae).resolve().name if Path(spec.vae).is_dir() else spec.vae,
        options=options,
        toolchain={**toolchain, **_installed("transformers", "tokenizers", hint="pip install sdxl-build")},
    )
    half = "fp16" if precision == "fp8" else precision  # of all but the UNet
    upcast = half == "fp16" and source.configs["vae"].get("force_upcast", False)
    computes = {"unet": precision, "vae": "fp32" if upcast else half}
    codes = {}
    for component, of in (COMPONENTS | (ENCODER if spec.with_encoder else {})).items():
        if of not in source.configs:  # a refiner has one text encoder
            continue
        config = {n: v for n, v in source.configs[of].items() if of != "vae" or n not in NOT_COMPILED}
        sized = component not in UNSIZED
        own = tile if component == "vae_decoder" else (width, height)
        codes[component] = CodeKey(
            key_version=KEY_VERSION,
            backend=spec.backend,
            component=component,
            config={**config, "vae_scale_factor": factor} if component == "unet" else config,
            target=target.name,
            gpu_name=gpu_name,
            width=own[0] if sized else 0,
            height=own[1] if sized else 0,
            batch=spec.batch if sized else 0,
            precision=computes.get(of, half),
            options=_code_options(row, options, source.weights[of], of == "vae" and upcast)
            | (_unet_code_options(options) if component == "unet" else {})
            | ({"spare_tokens": spec.spare_tokens} if component in UNSIZED and spec.spare_tokens else {})
            | ({"dynamic": options["dynamic"]} if sized and "dynamic" in options else {}),
            toolchain=toolchain,
        )
    return Plan(spec, source, target, width, height, key, codes)


def _tile(spec: Spec, width: int, height: int, factor: int) -> tuple[int, int]:
    """(width, height) that the VAE's decoder makes at once.

    Raises:
        SdxlError: ``--vae-tile`` is no size that it can make.
    """
    asked = spec.vae_tile or (width, height)
    if min(asked) < factor or any(side % factor for side in asked):
        raise SdxlError(
            f"--vae-tile {asked[0]}x{asked[1]} can't be made: both sides have to be multiples of {factor}.",
            "Try --vae-tile 512x512",
        )
    return min(asked[0], width), min(asked[1], height)


def _dynamic(asked: str, source: models.Source, width: int, height: int, factor: int) -> dict[str, list[int]]:
    """The range of sizes that ``--dynamic`` names, which has to hold the resolution."""
    step = dynamic.step(factor, source.configs["unet"])
    try:
        sizes = dynamic.parse(asked, step)
        dynamic.check_holds(sizes, width, height, step)
    except ExportError as error:
        raise SdxlError(error.message, error.hint) from None
    return sizes


def _code_options(row: registry.Backend, options: Mapping[str, Any], weights: str, upcast: bool) -> dict[str, Any]:
    """What of the artifact's options shapes a component's code; with it the digest of weights that the code holds."""
    if row.weighted:
        return {**{n: v for n, v in options.items() if n not in NOT_IN_CODE}, "weights": weights}
    read = {n: v for n, v in options.items() if (n == "tf32" and upcast) or n in ("compiler", "mode")}
    # The CUDA provider's graphs are its own; those of other providers on a GPU are told apart from them.
    return {**read, "provider": row.provider} if row.provider else read


def _unet_code_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What of the UNet's options is compiled; how often the whole UNet runs is the runtime's business."""
    made = {name: options[name] for name in ("freeu", "segments", "no_negative_prompt") if name in options}
    return {**made, "deepcache": options["deepcache"]["branch"]} if "deepcache" in options else made


def _toolchain(row: registry.Backend, target: gpu.Target) -> dict[str, str]:
    """Versions that shape the code, from metadata alone."""
    torch = machine.torch_version()
    if not torch:
        raise SdxlError("torch is not installed.", "pip install torch")
    found = {"exporter": str(row.version), **torch, **_installed(*row.distributions, hint=row.install)}
    if target.device == "cuda" and row.on_gpu:
        found |= _installed(*row.on_gpu, hint=f"pip install {' '.join(row.on_gpu)}")
    if row.one_of:
        there = machine.versions(*row.one_of)
        if not there:
            raise SdxlError(f"{row.one_of[0]} is not installed, and building needs it.", row.install)
        found |= dict([next(iter(there.items()))])
    return found


def _installed(*distributions: str, hint: str) -> dict[str, str]:
    found = machine.versions(*distributions)
    missing = [name for name in distributions if name not in found]
    if missing:
        raise SdxlError(f"{', '.join(missing)} is not installed, and building needs it.", hint)
    return found
