"""The UNet as the loop sees it: conditions once, then one call a step, in chunks of any batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from buildtool.store.manifest import TensorSpec
from runtimes import deepcache, no_negative
from runtimes.artifact import Artifact
from runtimes.base import Engine


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told besides latents and time, for all N images of a run.

    ``prompt_embeds`` (N, 77, D), ``pooled_prompt_embeds`` (N, P), ``time_ids`` (N, 6); the negative
    ones have the same shapes, and are read only in guided steps.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    time_ids: Tensor
    negative_prompt_embeds: Tensor
    negative_pooled_prompt_embeds: Tensor
    negative_time_ids: Tensor


class Denoiser:
    """Predicts the noise of N latents with an artifact's UNet of batch B.

    ``prepare`` lays the conditions out once a run; calling it with a step's number runs that step.
    The first ``guided`` steps use the variant ``cfg`` (unconditional and conditional in one batch),
    the rest ``nocfg``. With DeepCache, that is so in every so many steps; the ones between run the shallow
    variant, on the feature that the last of those left.

    Args:
        artifact: where the variants come from; each is loaded when a run first needs it.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._chunks: list[slice] = []
        self._conditions: dict[str, list[dict[str, Tensor]]] = {}
        self._samples: dict[str, Tensor] = {}
        self._interval = deepcache.interval(artifact.manifest)
        self._features: list[Tensor] = []
        self.steps = {"full": 0, "shallow": 0}
        """How many steps of the run so far took the whole UNet, and how many a shallow variant."""

    def prepare(
        self,
        conditioning: Conditioning,
        timesteps: Tensor,
        *,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guided: int = 0,
    ) -> None:
        """Lays out what stays the same for a run.

        Args:
            conditioning: for all N images.
            timesteps: (steps,), of the steps that will run.
            guidance_scale: weight of the prompt against the negative prompt in guided steps.
            guidance_rescale: phi of arXiv 2305.08891, section 3.4; 0 leaves it out.
            guided: how many of the steps, from the first, are guided; with DeepCache, all or none.
        """
        batch, device = self._artifact.batch, self._artifact.device
        count = conditioning.prompt_embeds.shape[0]
        self._chunks = [slice(i, min(i + batch, count)) for i in range(0, count, batch)]
        # 16 bytes apart: compiled code copies an input that lies elsewhere, and complains of it on stderr.
        self._times = torch.zeros(len(timesteps), 4, dtype=torch.float32, device=device)
        self._times[:, 0] = timesteps
        self._guided, self._scale, self._rescale = guided, guidance_scale, guidance_rescale
        self._conditions, self._features = {}, []
        self.steps = {"full": 0, "shallow": 0}
        for variant, needed in (("cfg", guided > 0), ("nocfg", guided < len(timesteps))):
            if needed:
                self._conditions[variant] = [self._lay_out(variant, conditioning, c) for c in self._chunks]
                sample = self._engine(variant).inputs[0]
                self._samples[variant] = _buffer(sample, device)
                if self._interval > 1:
                    feature = self._engine(variant).outputs[1]
                    self._features = [_buffer(feature, device) for _ in self._chunks]

    def __call__(self, latents: Tensor, i: int) -> Tensor:
        """The predicted noise (N, C, h, w) of scaled latents (N, C, h, w) at step ``i``."""
        variant = "cfg" if i < self._guided else "nocfg"
        shallow = i % self._interval > 0
        self.steps["shallow" if shallow else "full"] += 1
        engine = self._engine(variant + deepcache.SHALLOW if shallow else variant)
        sample, batch = self._samples[variant], self._artifact.batch
        noise = torch.empty_like(latents)
        for number, (chunk, conditions) in enumerate(zip(self._chunks, self._conditions[variant], strict=True)):
            here = latents[chunk]
            count = here.shape[0]
            sample[:count].copy_(here)
            if variant == "cfg":
                sample[batch : batch + count].copy_(here)
            if shallow:
                conditions = {**conditions, "feature": self._features[number]}
            out, *feature = engine(sample=sample, timestep=self._times[i, :1], **conditions)
            if feature:  # the engine's own buffer, which its next call overwrites
                self._features[number].copy_(feature[0])
            noise[chunk] = self._guide(out[:count], out[batch : batch + count]) if variant == "cfg" else out[:count]
        return noise

    def _engine(self, variant: str) -> Engine:
        """Asked for at every step: a denoiser holds no engine, which may have to go between two runs."""
        return self._artifact.engine("unet", variant)

    def _guide(self, uncond: Tensor, text: Tensor) -> Tensor:
        guided = uncond + self._scale * (text - uncond)
        return rescale(guided, text, self._rescale) if self._rescale > 0 else guided

    def _lay_out(self, variant: str, conditioning: Conditioning, chunk: slice) -> dict[str, Tensor]:
        """The conditions of one chunk, padded with its last image up to the engine's batch."""
        engine, batch = self._engine(variant), self._artifact.batch
        dtypes = {spec.name: getattr(torch, spec.dtype) for spec in engine.inputs}
        pairs = {
            "encoder_hidden_states": (conditioning.negative_prompt_embeds, conditioning.prompt_embeds),
            "text_embeds": (conditioning.negative_pooled_prompt_embeds, conditioning.pooled_prompt_embeds),
            "time_ids": (conditioning.negative_time_ids, conditioning.time_ids),
        }

        def padded(tensor: Tensor) -> Tensor:
            part = tensor[chunk]
            return torch.cat([part, part[-1:].expand(batch - part.shape[0], *part.shape[1:])])

        laid_out: dict[str, Tensor] = {}
        rows_of = {spec.name: spec.shape[0] for spec in engine.inputs}
        for name, (negative, positive) in pairs.items():
            rows = [negative, positive] if variant == "cfg" else [positive]
            if rows_of[name] < len(rows) * batch:  # of a UNet whose negative prompt is zeros
                if negative.any():
                    raise no_negative.refused(self._artifact.manifest)
                rows = [positive]
            joined = torch.cat([padded(tensor) for tensor in rows])
            laid_out[name] = joined.to(device=self._artifact.device, dtype=dtypes[name]).contiguous()
        return laid_out


def _buffer(spec: TensorSpec, device: torch.device) -> Tensor:
    return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device)


def rescale(guided: Tensor, text: Tensor, phi: float) -> Tensor:
    """Brings guided noise back to the deviation of the prompt's own (arXiv 2305.08891, section 3.4)."""
    axes = list(range(1, text.ndim))
    factor = text.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return phi * (guided * factor) + (1 - phi) * guided
