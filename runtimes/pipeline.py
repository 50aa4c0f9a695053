"""``StableDiffusionXLPipeline.__call__`` on compiled engines."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buildtool.store.errors import SdxlError
from buildtool.store.lora import Lora
from buildtool.store.manifest import Manifest
from runtimes import (
    deepcache,
    encode,
    image_to_image,
    images,
    memory,
    no_negative,
    refiner,
    schedulers,
    stages,
    starts,
    steps,
)
from runtimes.artifact import Artifact
from runtimes.base import Clock, Size
from runtimes.denoiser import Conditioning, Denoiser
from runtimes.embedding_files import Embedding
from runtimes.embeddings import Embeddings
from runtimes.lora import Loras
from runtimes.noise import randn
from runtimes.sizes import build_command, described, find

Generators = torch.Generator | list[torch.Generator] | None
REFUSED = ("clip_skip", "cross_attention_kwargs", "ip_adapter_image", "ip_adapter_image_embeds")


@dataclass(frozen=True)
class PipelineOutput:
    """``images``: a list of PIL images, or (N, H, W, 3) numpy, (N, 3, H, W) torch, latents (N, C, h, w)."""

    images: Any


@dataclass
class Pipeline:
    """SDXL on the engines of one or several artifacts (several resolutions of one model).

    Args:
        artifacts: opened artifacts that share a device and a model.
        scheduler: a name in ``runtimes.schedulers.SCHEDULERS``, or any diffusers scheduler; the one that the
            artifact's ``scheduler.json`` names where None is given.
        memory: one of ``runtimes.memory.MODES``; the artifacts were opened with the same.
        beside: a pipeline whose weights and engines the artifacts share.
    """

    artifacts: Sequence[Artifact]
    scheduler: Any = None
    memory: str = "resident"
    beside: "Pipeline | None" = field(default=None, repr=False)
    _named: dict[str, Any] = field(default_factory=dict, repr=False)
    _parts: dict[Size, tuple[encode.PromptEncoder, Denoiser]] = field(default_factory=dict, repr=False)

    _resized: dict[Size, Artifact] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.scheduler, str) or (self.scheduler is None and schedulers.is_built_in(self._settings)):
            self.scheduler = schedulers.make(self._settings, self.scheduler)
        self._clock = Clock(self.device)
        stages.announce(self.memory)
        self._steps: dict[str, int] = {}
        self._loras, self._embeddings = Loras(self.artifacts), Embeddings(self.artifacts)
        family = frozenset[str]().union(*(artifact.family for artifact in self.artifacts))
        for artifact in self.artifacts:
            artifact.family = family
        self._others: list[Pipeline] = []
        if self.beside is not None:
            self._others = [self.beside, *self.beside._others]
            own = [artifact.manifest for artifact in self.artifacts]
            for other in self._others:
                theirs = [artifact.manifest for artifact in other.artifacts]
                refiner.check_loras(other._loras.active or (), theirs, own)
            for other in self._others:
                other._others.append(self)

    @property
    def device(self) -> torch.device:
        return self.artifacts[0].device

    @property
    def sizes(self) -> list[Size]:
        """(width, height) of every artifact."""
        return [artifact.size for artifact in self.artifacts]

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of the last call (or of the last of its stages, called by itself) by stage: ``load`` (engines that
        it was first to need), ``encode``, ``denoise``, ``decode``."""
        return dict(self._clock.seconds)

    @property
    def unet_steps(self) -> dict[str, int]:
        """Steps of the last call that took the whole UNet (``full``), and DeepCache's between them (``shallow``)."""
        return dict(self._steps)

    def manifest(self, width: int, height: int) -> Manifest:
        """The manifest of the artifact that makes this size."""
        return self._artifact(height, width).manifest

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: images.OutputType = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        image: Any = None,
        strength: float = 0.3,
        denoising_start: float | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        guidance_until: float = 1.0,
        scheduler: Any = None,
        progress: Callable[[int, int], None] | None = None,
        **refused: Any,
    ) -> PipelineOutput | tuple[Any]:
        """Makes pictures; arguments and defaults are diffusers' own.

        ``image``, ``strength`` and ``denoising_start`` are those of ``StableDiffusionXLImg2ImgPipeline``: ``image`` is
        a PIL image, a list of them, a tensor (N, 3, H, W) in 0…1, or latents (N, C, h, w), which need no encoder.
        So are ``aesthetic_score`` and ``negative_aesthetic_score``, which a refiner reads in place of the target size.

        Args beyond diffusers':
            guidance_until: fraction of the steps that are guided: ``int(n * f) + 1`` of the n that run
                for f below 1, all for 1.
            scheduler: for this call, instead of the pipeline's: a name, or a diffusers scheduler.
            progress: called with (steps done, steps in all).

        Raises:
            SdxlError: a size that no artifact makes, an argument that a compiled graph can't serve, or a refiner with
                no ``image``.
            ValueError, TypeError: arguments that contradict each other, as in diffusers.
        """
        _refuse(refused, callback_on_step_end_tensor_inputs)
        if not 0.0 <= guidance_until <= 1.0:
            raise ValueError(f"guidance_until is a fraction from 0 to 1, not {guidance_until}.")
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength is a fraction from 0 to 1, not {strength}.")
        if denoising_start is not None and image is None:
            raise ValueError("denoising_start goes with image: a picture, or the latents to go on from.")
        scheduler = self._scheduler(scheduler)
        artifact = self._artifact(height, width)
        cached = deepcache.interval(artifact.manifest) > 1
        if guidance_scale > 1:
            deepcache.check(artifact.manifest, guidance_until)
        for text in (negative_prompt, negative_prompt_2):
            no_negative.check(artifact.manifest, text)
        refiner.require_start(artifact.manifest, image)
        encodes = image is not None and latents is None and not image_to_image.are_latents(artifact, image)
        if encodes:
            starts.require_encoder(artifact.manifest)
        encoder, denoiser = self._parts_of(artifact)
        width, height = artifact.size
        guides = guidance_scale > 1
        self._clock.start()
        # Engines are loaded just before they are needed: on a GPU the UNet's weights arrive while prompts are encoded.
        self._load(artifact, {(name, "main"): prompt is not None for name in memory.text_encoders(artifact.manifest)})
        self._clock.stop("load")

        # 1. Conditions, one row an image: every prompt times num_images_per_prompt.
        texts = Texts(prompt, prompt_2, negative_prompt, negative_prompt_2)
        positive, negative = texts.embeddings(
            encoder,
            (prompt_embeds, pooled_prompt_embeds),
            (negative_prompt_embeds, negative_pooled_prompt_embeds),
            zeros=artifact.manifest.pipeline.force_zeros_for_empty_prompt,
            guides=guides,
        )
        count = positive[0].shape[0] * num_images_per_prompt
        embeds, pooled = (each.repeat_interleave(num_images_per_prompt, dim=0) for each in positive)
        asked = encode.Sizes(
            original_size,
            crops_coords_top_left,
            target_size,
            negative_original_size,
            negative_crops_coords_top_left,
            negative_target_size,
            aesthetic_score,
            negative_aesthetic_score,
        )
        sizes, negative_sizes = encode.time_ids(asked, artifact.manifest, (height, width), image is not None)
        without, pooled_without = (each.repeat_interleave(num_images_per_prompt, dim=0) for each in negative)
        conditioning = Conditioning(
            embeds, pooled, sizes.repeat(count, 1), without, pooled_without, negative_sizes.repeat(count, 1)
        )
        self._clock.stop("encode")
        encoding = {("vae_encoder", "main"): encodes}
        denoising = {
            ("unet", "cfg"): guides,
            ("unet", "nocfg"): not guides or guidance_until < 1,
            ("unet", "cfg" + deepcache.SHALLOW): guides and cached,
            ("unet", "nocfg" + deepcache.SHALLOW): not guides and cached,
        }
        decoding = {("vae_decoder", "main"): output_type != "latent"}
        if self.memory == memory.RESIDENT:  # what a later stage can't load is told before the steps are run
            self._load(artifact, {**encoding, **denoising, **decoding})
        self._load(artifact, encoding)
        self._clock.stop("load")

        # 2. Time steps and noise.
        times = steps.choose(
            scheduler,
            self.device,
            num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            denoising_end=denoising_end,
            strength=None if image is None else strength,
            denoising_start=denoising_start,
        )
        started = latents is not None
        latents = self._latents(artifact, count, embeds.dtype, generator, latents, image)
        if image is None:
            latents = latents * scheduler.init_noise_sigma
        elif not started and denoising_start is None:
            noise = randn(latents.shape, generator, self.device, latents.dtype)
            latents = scheduler.add_noise(latents, noise, times[:1].repeat(count))
        self._clock.stop("denoise")
        self._load(artifact, denoising)
        self._clock.stop("load")
        guided = len(times) if guidance_until == 1 else min(int(len(times) * guidance_until) + 1, len(times))
        denoiser.prepare(
            conditioning,
            times,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guided=guided if guides else 0,
        )
        extra = _step_arguments(scheduler, eta, generator)

        # 3. The loop.
        for i, t in enumerate(times):
            scaled = scheduler.scale_model_input(latents, t)
            noise = denoiser(scaled, i)
            latents = scheduler.step(noise, t, latents, **extra, return_dict=False)[0].to(latents.dtype)
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, i, t, {"latents": latents}) or {}
                latents = changed.get("latents", latents)
            if progress is not None:
                progress(i + 1, len(times))
        self._steps = denoiser.steps
        self._clock.stop("denoise")
        self._load(artifact, decoding)
        self._clock.stop("load")

        # 4. Pictures.
        if output_type == "latent":
            made = latents
        else:
            made = images.postprocess(images.decode(artifact, latents), output_type)
        self._clock.stop("decode")
        return PipelineOutput(made) if return_dict else (made,)

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """Puts exactly these LoRAs into the weights, in place; none gives back the artifact's own bits.

        Raises:
            SdxlError: a file is no LoRA of this model, the backend's engines hold their weights, or they don't stay
                in memory.
        """
        if loras:
            memory.refuse_loras(self.memory)
            self._check_loras(loras)
        self._loras.use(loras)

    def _check_loras(self, loras: Sequence[Lora]) -> None:
        others = [artifact.manifest for other in self._others for artifact in other.artifacts]
        refiner.check_loras(loras, [artifact.manifest for artifact in self.artifacts], others)

    def load_lora_weights(self, path: str | os.PathLike[str], scale: float = 1.0) -> None:
        """Adds a LoRA to those that are in the weights (diffusers' ``load_lora_weights`` and ``fuse_lora``).

        Args:
            path: a safetensors file with kohya's or diffusers' names.
            scale: how much of it.

        Raises:
            SdxlError: as for :meth:`set_loras`.
        """
        self.set_loras([*(self._loras.active or ()), Lora(Path(path), scale)])

    def unload_lora_weights(self) -> None:
        """Takes every LoRA out of the weights: they are the artifact's again, bit by bit."""
        self.set_loras(())

    def set_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        """Makes exactly these textual inversions known to later calls' prompts; none gives back the original bits.

        Raises:
            SdxlError: a file is no textual inversion of this model, or the artifact has no spare rows for it.
        """
        self._embeddings.use(embeddings)

    def load_textual_inversion(self, path: str | os.PathLike[str], token: str | None = None) -> None:
        """Adds a word to those that prompts may have (diffusers' ``load_textual_inversion``, for both text encoders).

        Args:
            path: a safetensors file with ``clip_l`` and ``clip_g``.
            token: the word; the file's name without its ending where None is given.

        Raises:
            SdxlError: as for :meth:`set_embeddings`.
        """
        self.set_embeddings([*self._embeddings.active, Embedding(Path(path), token or Path(path).stem)])

    def unload_textual_inversion(self) -> None:
        """Takes every such word out again."""
        self.set_embeddings(())

    @torch.inference_mode()
    def decode(self, latents: Tensor, output_type: images.OutputType = "pil") -> Any:
        """Pictures of the loop's latents (N, C, h, w), such as ``output_type="latent"`` gives.

        Latents of a loaded size go through that artifact's decoder; larger ones through the first artifact's
        that they are not smaller than, in overlapping tiles (diffusers' VAE tiling).

        Raises:
            ValueError: not latents, or smaller than every artifact's.
        """
        if output_type == "latent":
            return latents
        factor = self.artifacts[0].manifest.pipeline.vae_scale_factor
        height, width = (n * factor for n in latents.shape[-2:])
        fitting = [a for a in self.artifacts if a.size[0] <= width and a.size[1] <= height]
        exact = [a for a in fitting if a.size == (width, height)]
        artifact = (exact or fitting or list(self.artifacts))[0]
        self._clock.start()
        self._load(artifact, {("vae_decoder", "main"): True})
        self._clock.stop("load")
        made = images.postprocess(images.decode(artifact, latents.to(self.device)), output_type)
        self._clock.stop("decode")
        return made

    @torch.inference_mode()
    def encode_prompt(
        self,
        prompt: str | list[str],
        prompt_2: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a call's prompts become, as diffusers' ``encode_prompt`` gives it.

        Returns:
            ``prompt_embeds`` (N, 77, D), ``negative_prompt_embeds``, ``pooled_prompt_embeds`` (N, P) and
            ``negative_pooled_prompt_embeds``, one row a prompt: arguments of a call. Without guidance the negative ones
            are the positive ones, which nobody reads.
        """
        artifact = self._artifact(height, width)
        encoder, _ = self._parts_of(artifact)
        self._clock.start()
        self._load(artifact, {(name, "main"): True for name in memory.text_encoders(artifact.manifest)})
        self._clock.stop("load")
        zeros = artifact.manifest.pipeline.force_zeros_for_empty_prompt
        texts = Texts(prompt, prompt_2, negative_prompt, negative_prompt_2)
        (embeds, pooled), (negative, negative_pooled) = texts.embeddings(
            encoder, (None, None), (None, None), zeros=zeros, guides=do_classifier_free_guidance
        )
        self._clock.stop("encode")
        return embeds, negative, pooled, negative_pooled

    @torch.inference_mode()
    def encode_start_image(
        self,
        image: Any,
        count: int,
        dtype: torch.dtype,
        generator: Generators = None,
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """The latents (count, C, h, w) that a call starts from that is given this ``image``, and may be given instead.

        Args:
            image: as for a call.
            dtype: that of the call's ``prompt_embeds``.
            generator: draws what the call would have drawn for it; the same one, not a new one, goes to the call.
        """
        artifact = self._artifact(height, width)
        starts.require_encoder(artifact.manifest)
        self._clock.start()
        self._load(artifact, {("vae_encoder", "main"): True})
        self._clock.stop("load")
        made = image_to_image.latents(artifact, image, count, generator, dtype)
        self._clock.stop("encode")
        return made

    def _artifact(self, height: int | None, width: int | None) -> Artifact:
        """The artifact that makes a size; the first where none is asked for.

        Raises:
            SdxlError: none of the loaded artifacts makes it.
        """
        first = self.artifacts[0]
        wanted = (width or first.size[0], height or first.size[1])
        manifests = [artifact.manifest for artifact in self.artifacts]
        number = find(manifests, wanted)
        if number is not None:
            artifact = self.artifacts[number]
            if artifact.size != wanted and wanted not in self._resized:
                self._resized[wanted] = artifact.resized(wanted)
            return artifact if artifact.size == wanted else self._resized[wanted]
        raise SdxlError(
            f"No loaded artifact makes {wanted[0]}x{wanted[1]}; they make: {described(manifests)}.",
            f"Build it: {build_command(first.manifest, wanted)}",
        )

    def _load(self, artifact: Artifact, wanted: dict[tuple[str, str], bool]) -> None:
        """Loads the engines that a stage will use, so that no stage's time holds a load; where not all components
        stay in memory, they take the others' place."""
        needed = [name for name, yes in wanted.items() if yes]
        if needed and self.memory != memory.RESIDENT:
            stages.free(artifact, {component for component, _ in needed})
        for component, variant in needed:
            artifact.engine(component, variant)

    def _parts_of(self, artifact: Artifact) -> tuple[encode.PromptEncoder, Denoiser]:
        if artifact.size not in self._parts:
            self._parts[artifact.size] = (encode.PromptEncoder(artifact, self._embeddings), Denoiser(artifact))
        return self._parts[artifact.size]

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return self.artifacts[0].json("scheduler.json")

    def _scheduler(self, asked: Any) -> Any:
        """The scheduler of a call.

        Raises:
            SdxlError: there is none of that name, or the artifact's own is not built in.
        """
        if asked is None:
            return schedulers.make(self._settings) if self.scheduler is None else self.scheduler
        if not isinstance(asked, str):
            return asked
        if asked not in self._named:
            self._named[asked] = schedulers.make(self._settings, asked)
        return self._named[asked]

    def _latents(
        self,
        artifact: Artifact,
        count: int,
        dtype: torch.dtype,
        generator: Generators,
        given: Tensor | None,
        image: Any,
    ) -> Tensor:
        """Unit start noise (N, C, h, w), drawn as diffusers' ``randn_tensor`` draws it; a picture's; or given."""
        config, (width, height) = artifact.manifest.pipeline, artifact.size
        factor = config.vae_scale_factor
        shape = (count, config.latent_channels, height // factor, width // factor)
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"There are {len(generator)} generators for {count} images.")
        if given is None and image is not None:
            given = image_to_image.latents(artifact, image, count, generator, dtype)
        elif given is None:
            given = randn(shape, generator, self.device, dtype)
        elif tuple(given.shape) != shape:
            raise ValueError(
                f"latents have shape {tuple(given.shape)}; {count} images of {width}x{height} take {shape}."
            )
        return given.to(device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Texts:
    """The four prompts of a call, each one text or a list of as many as there are prompts."""

    prompt: str | list[str] | None
    prompt_2: str | list[str] | None
    negative_prompt: str | list[str] | None
    negative_prompt_2: str | list[str] | None

    def embeddings(
        self,
        encoder: encode.PromptEncoder,
        positive: tuple[Tensor | None, Tensor | None],
        negative: tuple[Tensor | None, Tensor | None],
        *,
        zeros: bool,
        guides: bool,
    ) -> tuple[encode.Encoded, encode.Encoded]:
        """(prompt_embeds, pooled) and the negative pair, one row a prompt; given embeddings win over texts.

        Without a negative prompt the negative pair is zeros where the model says so (``zeros``).
        """
        embeds, pooled = positive
        if self.prompt is not None and embeds is not None:
            raise ValueError("Pass prompt or prompt_embeds, not both.")
        if self.prompt is None and embeds is None:
            raise ValueError("Pass prompt or prompt_embeds.")
        if embeds is not None and pooled is None:
            raise ValueError("prompt_embeds go with pooled_prompt_embeds; pass both.")
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt or []
        rows = len(prompts) if embeds is None else embeds.shape[0]
        if rows == 0:
            raise ValueError("There is no prompt.")
        if embeds is None or pooled is None:
            embeds, pooled = encoder(list(zip(prompts, _rows(self.prompt_2, prompts, "prompt_2"), strict=True)))
        out, (negative_embeds, negative_pooled) = (embeds, pooled), negative
        if not guides:
            return out, out
        if negative_embeds is not None and negative_pooled is not None:
            return out, (negative_embeds, negative_pooled)
        if negative_embeds is not None or negative_pooled is not None:
            raise ValueError("negative_prompt_embeds go with negative_pooled_prompt_embeds; pass both.")
        if self.negative_prompt is None and zeros:
            return out, (torch.zeros_like(embeds), torch.zeros_like(pooled))
        texts = _rows(self.negative_prompt or "", [""] * rows, "negative_prompt")
        return out, encoder(list(zip(texts, _rows(self.negative_prompt_2, texts, "negative_prompt_2"), strict=True)))


def _rows(texts: str | list[str] | None, default: list[str], name: str) -> list[str]:
    """One text a prompt: the default where none is given, one text for all, or a list of the same length."""
    if not texts:
        return default
    if isinstance(texts, str):
        return [texts] * len(default)
    if len(texts) != len(default):
        raise ValueError(f"{name} has {len(texts)} texts for {len(default)} prompts.")
    return texts


def _step_arguments(scheduler: Any, eta: float, generator: Generators) -> dict[str, Any]:
    """What this scheduler's ``step`` takes besides noise, time and sample."""
    taken = inspect.signature(scheduler.step).parameters
    return {n: v for n, v in (("eta", eta), ("generator", generator)) if n in taken}


def _refuse(arguments: dict[str, Any], callback_inputs: Sequence[str]) -> None:
    """Arguments of diffusers that a compiled graph can't serve are refused by name.

    Raises:
        SdxlError: one of them is set.
        TypeError: no such argument.
    """
    for name, value in arguments.items():
        if name not in REFUSED:
            raise TypeError(f"Pipeline() has no argument {name!r}.")
        if value is not None:
            raise SdxlError(f"{name} changes the network, and a compiled graph is fixed.", f"Leave {name} out.")
    others = [name for name in callback_inputs if name != "latents"]
    if others:
        raise SdxlError(
            f"A callback can see and change latents, not {', '.join(others)}: conditions are laid out once."
        )
