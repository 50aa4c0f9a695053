"""A compiled UNet and VAE decoder inside an existing ``StableDiffusionXLPipeline``.

The one module here that imports diffusers: whoever calls it has a diffusers pipeline anyway.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import runtimes
from buildtool.store.errors import SdxlError
from runtimes import deepcache, images
from runtimes.artifact import Artifact


def attach(pipe: Any, path: str | os.PathLike[str], *, vae: bool = True) -> Any:
    """Replaces the UNet and the VAE's decoder of a diffusers SDXL pipeline by an artifact's, in place.

    The pipeline's schedulers, callbacks, image-to-image and prompt handling stay its own. The
    replaced weights are freed. The artifact has to be of the same checkpoint: it brings its own weights.

    Args:
        pipe: a ``StableDiffusionXLPipeline`` or one of its image-to-image and inpainting kin, on the
            artifact's device and in its precision.
        path: an artifact's folder.
        vae: False leaves the VAE alone.

    Returns:
        ``pipe``.

    Raises:
        SdxlError: no SDXL pipeline, another architecture, device or dtype, or an adapter is loaded.
    """
    name = type(pipe).__name__
    if "StableDiffusionXL" not in name or "ControlNet" in name:
        raise SdxlError(f"A compiled UNet goes into a StableDiffusionXLPipeline or its kin, not into {name}.")
    if getattr(pipe.unet, "peft_config", None):
        raise SdxlError("The pipeline has a LoRA loaded, which compiled code would ignore.", "Fuse it, then build.")
    (artifact,) = runtimes.load(path).artifacts
    key = artifact.manifest.key
    if deepcache.interval(artifact.manifest) > 1:
        raise SdxlError(
            f"{path} was built with DeepCache, which needs to know a step's number; a diffusers pipeline doesn't tell.",
            f"Build without: {deepcache.without(artifact.manifest)}",
        )
    if key.options.get("no_negative_prompt"):
        raise SdxlError(
            f"{path} was built without a negative prompt; a diffusers pipeline gives a text for one at every step.",
            "Build it without --no-negative-prompt.",
        )
    ours, theirs = key.configs["unet"], pipe.unet.config
    for field in ("block_out_channels", "cross_attention_dim", "in_channels"):
        if _plain(ours[field]) != _plain(theirs[field]):
            raise SdxlError(
                f"{path} is of another architecture: its UNet's {field} is {_plain(ours[field])}, "
                f"the pipeline's {_plain(theirs[field])}."
            )
    if pipe.device.type != artifact.device.type:
        raise SdxlError(f"{path} runs on {artifact.device}; the pipeline is on {pipe.device}.", "Move it: pipe.to(...)")
    unet = CompiledUNet(artifact, pipe.unet)
    if unet.dtype != pipe.unet.dtype:
        raise SdxlError(
            f"{path} takes {unet.dtype}; the pipeline is in {pipe.unet.dtype}.", f"Load it with dtype={unet.dtype}."
        )
    pipe.unet = unet
    if vae:
        decoder = _Decoder(artifact)
        pipe.vae.decode = decoder
        pipe.vae.decoder = None
        pipe.vae.register_to_config(force_upcast=False)  # the compiled decoder upcasts by itself
    return pipe


class CompiledUNet(nn.Module):
    """Stands for a ``UNet2DConditionModel`` in a pipeline: the same call, any batch, one resolution."""

    def __init__(self, artifact: Artifact, replaced: Any) -> None:
        super().__init__()
        self.config = replaced.config
        # SDXL pipelines look up here how long time_ids and pooled embedding are together.
        width = replaced.add_embedding.linear_1.in_features
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        self._artifact = artifact
        self._specs = {spec.name: spec for spec in artifact.engine("unet", "cfg").inputs}

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._specs["sample"].dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return self._artifact.device

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **refused: Any,
    ) -> Any:
        """The predicted noise of ``sample`` (N, C, h, w), for any N: rows are independent.

        Raises:
            SdxlError: another resolution, time steps that differ within a call, or an argument that
                a compiled graph can't serve (a ControlNet's residuals, adapters).
        """
        given = sorted(name for name, value in refused.items() if value is not None and value != {})
        if given:
            raise SdxlError(f"The compiled UNet can't take {', '.join(given)}: its graph is fixed.")
        if tuple(sample.shape[1:]) != self._specs["sample"].shape[1:]:
            width, height = self._artifact.size
            raise SdxlError(
                f"The artifact makes {width}x{height}; the pipeline asks for latents {tuple(sample.shape)}."
            )
        time = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).to(self.device)
        if time.numel() > 1 and not bool((time == time[0]).all()):
            raise SdxlError("The compiled UNet takes one time step a call; the pipeline gave several.")
        conditions = {**(added_cond_kwargs or {}), "encoder_hidden_states": encoder_hidden_states}
        noise = self._rows(sample, time[:1], conditions)
        if not return_dict:
            return (noise,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=noise)

    def _rows(self, sample: Tensor, time: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Runs rows through the variant whose batch fits them best, the last chunk padded."""
        variant = "cfg" if sample.shape[0] >= self._specs["sample"].shape[0] else "nocfg"
        engine = self._artifact.engine("unet", variant)
        batch = engine.inputs[0].shape[0]
        rows = {"sample": sample, **conditions}
        made = []
        for start in range(0, sample.shape[0], batch):
            chunk = {name: tensor[start : start + batch] for name, tensor in rows.items()}
            count = chunk["sample"].shape[0]
            inputs = {
                name: torch.cat([part, part[-1:].expand(batch - count, *part.shape[1:])])
                .to(getattr(torch, self._specs[name].dtype))
                .contiguous()
                for name, part in chunk.items()
            }
            made.append(engine(**inputs, timestep=time)[0][:count].clone())
        return torch.cat(made)


class _Decoder:
    """Stands for ``AutoencoderKL.decode``."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def __call__(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        engine = self._artifact.engine("vae_decoder")
        want = engine.inputs[0]
        factor = self._artifact.manifest.pipeline.vae_scale_factor
        width, height = self._artifact.size
        if tuple(z.shape[1:]) != (want.shape[1], height // factor, width // factor):
            raise SdxlError(f"The artifact makes {width}x{height}; the pipeline asks for latents {tuple(z.shape)}.")
        pixels = images.in_tiles(engine, z.to(getattr(torch, want.dtype)), factor).to(z.dtype)
        if not return_dict:
            return (pixels,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=pixels)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
