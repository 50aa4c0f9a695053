"""Denoising diffusion implicit models: the interface and numbers of ``DDIMScheduler`` (arXiv 2010.02502)."""

from typing import Literal

import numpy as np
import torch

from runtimes.noise import Generators, randn
from runtimes.schedulers.common import AlphaScheduler, Config, Step, at_most_trained


class DDIMConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """scheduler_config.json; names and defaults are diffusers'."""

    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True


class DDIM(AlphaScheduler):
    """``timesteps`` is an int64 tensor on the device given to ``set_timesteps``."""

    name = "DDIMScheduler"
    settings = DDIMConfig
    refused = ("thresholding",)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Chooses the timesteps of a run.

        Raises:
            SdxlError: more steps than the schedule has.
        """
        at_most_trained(num_inference_steps, self.config)
        n, total = num_inference_steps, self.config.num_train_timesteps
        self.num_inference_steps = n
        if self.config.timestep_spacing == "linspace":
            steps = np.linspace(0, total - 1, n).round()[::-1].astype(np.int64)
        elif self.config.timestep_spacing == "leading":
            steps = (np.arange(n) * (total // n))[::-1].astype(np.int64) + self.config.steps_offset
        else:
            steps = np.round(np.arange(total, 0, -total / n)).astype(np.int64) - 1
        self._start(torch.from_numpy(steps), device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Step:
        """From one timestep to the next (equation 12); ``eta`` from 0 to 1 is the share of fresh noise."""
        assert self.num_inference_steps is not None, "set_timesteps comes first"
        i = self._index(timestep)
        now = int(self._host_timesteps[i])
        before = now - self.config.num_train_timesteps // self.num_inference_steps
        alpha = self.alphas_cumprod[now]
        alpha_before = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        original, noise = self._original(model_output, sample, alpha)
        original = self._clipped(original)

        variance = ((1 - alpha_before) / (1 - alpha)) * (1 - alpha / alpha_before)
        deviation = eta * variance**0.5
        direction = (1 - alpha_before - deviation**2) ** 0.5 * noise
        prev_sample = alpha_before**0.5 * original + direction
        if eta > 0:
            fresh = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            prev_sample = prev_sample + deviation * fresh
        self._step_index = i + 1
        return Step(prev_sample, original)
