"""Latent consistency models' few steps: the interface and numbers of ``LCMScheduler`` (arXiv 2310.04378)."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from buildtool.store.errors import SdxlError
from runtimes.noise import Generators, randn
from runtimes.schedulers.common import AlphaScheduler, Config, at_most_trained

SIGMA_DATA = 0.5


class LCMConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """scheduler_config.json; names and defaults are diffusers'. ``timestep_spacing`` isn't read there either."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True


class LCMStep(NamedTuple):
    prev_sample: torch.Tensor
    denoised: torch.Tensor


class LCM(AlphaScheduler):
    """``timesteps`` is an int64 tensor on the device given to ``set_timesteps``."""

    name = "LCMScheduler"
    settings = LCMConfig
    refused = ("thresholding",)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the timesteps of a run among those that the model was distilled on, or own ones.

        Raises:
            ValueError: not exactly one of the two is given, or own timesteps that don't descend.
            SdxlError: more steps than the model was distilled on.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass exactly one of num_inference_steps and timesteps")
        c = self.config
        if timesteps is not None:
            if any(b >= a for a, b in itertools.pairwise(timesteps)):
                raise ValueError("Own timesteps have to descend")
            if timesteps[0] >= c.num_train_timesteps:
                raise ValueError(f"Own timesteps are below {c.num_train_timesteps}")
            steps = np.array(timesteps, dtype=np.int64)
        else:
            assert num_inference_steps is not None
            at_most_trained(num_inference_steps, c)
            known = np.arange(1, c.original_inference_steps + 1) * (c.num_train_timesteps // c.original_inference_steps)
            if num_inference_steps > len(known):
                raise SdxlError(
                    f"{num_inference_steps} steps were asked for; LCM has {len(known)} "
                    "(its setting original_inference_steps).",
                    "4 to 8 steps are usual.",
                )
            chosen = np.floor(np.linspace(0, len(known), num=num_inference_steps, endpoint=False)).astype(np.int64)
            steps = (known - 1)[::-1][chosen]
        self.num_inference_steps = len(steps)
        self._start(torch.from_numpy(steps), device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMStep:
        """Clean latents, and fresh noise of the next timestep on them in every step but the last."""
        i = self._index(timestep)
        now = torch.tensor(int(self._host_timesteps[i]))
        alpha = self.alphas_cumprod[now]
        scaled = now * self.config.timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        original = self._clipped(self._original(model_output, sample, alpha)[0])
        denoised = out * original + skip * sample
        prev_sample = denoised
        if i + 1 != self.num_inference_steps:
            alpha_next = self.alphas_cumprod[int(self._host_timesteps[i + 1])]
            noise = randn(model_output.shape, generator, model_output.device, denoised.dtype)
            prev_sample = alpha_next.sqrt() * denoised + (1 - alpha_next).sqrt() * noise
        self._step_index = i + 1
        return LCMStep(prev_sample, denoised)
