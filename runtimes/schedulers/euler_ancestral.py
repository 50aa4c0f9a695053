"""Euler's method with fresh noise in each step: the interface and numbers of ``EulerAncestralDiscreteScheduler``."""

from typing import Literal

import numpy as np
import torch

from runtimes.noise import Generators, randn
from runtimes.schedulers.common import Config, Step, no_integer, spaced
from runtimes.schedulers.sigmas import SigmaScheduler


class EulerAncestralConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """scheduler_config.json; names and defaults are diffusers'."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class EulerAncestral(SigmaScheduler):
    """``sigmas`` and ``timesteps`` are as in ``EulerDiscrete``."""

    name = "EulerAncestralDiscreteScheduler"
    settings = EulerAncestralConfig

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Chooses the noise levels of a run."""
        self.num_inference_steps = num_inference_steps
        steps = spaced(self.config, num_inference_steps)
        train = self._train_sigmas.numpy()
        levels = np.interp(steps, np.arange(len(train)), train)
        self.sigmas = torch.from_numpy(np.concatenate([levels, [0.0]]).astype(np.float32))
        self._start(torch.from_numpy(steps), device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Step:
        """From one noise level to the next, by way of a lower one and noise drawn with ``generator``.

        Computes in float32 and returns ``prev_sample`` in the model output's dtype.

        Raises:
            ValueError: an integer as timestep (an index of the schedule, most likely).
        """
        no_integer(timestep)
        i = self._index(timestep)
        sigma, sigma_to = self.sigmas[i], self.sigmas[i + 1]
        sample = sample.to(torch.float32)
        original = self._original(model_output, sample, sigma)
        sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
        sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
        derivative = (sample - original) / sigma
        prev_sample = sample + derivative * (sigma_down - sigma)
        noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
        prev_sample = prev_sample + noise * sigma_up
        self._step_index = i + 1
        return Step(prev_sample.to(model_output.dtype), original)
