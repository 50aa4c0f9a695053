"""Euler's method for SDXL: the interface and the numbers of diffusers' ``EulerDiscreteScheduler``.

Every expression keeps diffusers' order, dtype and library (numpy here, torch there): results are
equal bit for bit, and so are pictures. Sigmas stay on the CPU. A 0-dim CPU tensor enters a GPU
kernel as an argument, so a step neither copies nor waits.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from buildtool.store.errors import SdxlError
from runtimes.noise import Generators, randn
from runtimes.schedulers.common import Config, Step, karras, no_integer, spaced, timesteps_of
from runtimes.schedulers.sigmas import SigmaScheduler


class EulerConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """scheduler_config.json; names and defaults are diffusers'."""

    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    @property
    def timesteps_are_log_sigmas(self) -> bool:
        return self.timestep_type == "continuous" and self.prediction_type == "v_prediction"


class EulerDiscrete(SigmaScheduler):
    """A schedule of noise levels and the step from one to the next.

    ``sigmas`` is a float32 CPU tensor of n+1 noise levels (in units of the data's deviation),
    ``timesteps`` a float32 tensor of n on the device given to ``set_timesteps``.
    """

    name = "EulerDiscreteScheduler"
    settings = EulerConfig
    refused = ("use_beta_sigmas", "use_flow_sigmas")

    def __init__(self, config: EulerConfig) -> None:
        super().__init__(config)
        self._set(np.arange(config.num_train_timesteps)[::-1], self.sigmas, None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Chooses the noise levels of a run: a number of steps, or own timesteps, or own sigmas.

        Own sigmas are descending and hold the last one too: n+1 of them make n steps.

        Raises:
            ValueError: not exactly one of the three is given.
            SdxlError: own timesteps where the configuration derives them from the sigmas.
        """
        if sum(choice is not None for choice in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("Pass exactly one of num_inference_steps, timesteps and sigmas")
        c = self.config
        if timesteps is not None and (c.use_karras_sigmas or c.use_exponential_sigmas or c.timesteps_are_log_sigmas):
            raise SdxlError("The model's scheduler derives timesteps from sigmas: it takes no custom timesteps.")
        train = self._train_sigmas.numpy()
        if sigmas is not None:
            self.num_inference_steps = len(sigmas) - 1
            levels = np.array(sigmas).astype(np.float32)
            self._set(timesteps_of(levels[:-1], train), torch.from_numpy(levels), device)
            return

        if timesteps is not None:
            steps = np.array(timesteps).astype(np.float32)
            n = len(steps)
        else:
            assert num_inference_steps is not None
            n = num_inference_steps
            steps = spaced(c, n)
        self.num_inference_steps = n
        if c.interpolation_type == "linear":
            levels = np.interp(steps, np.arange(len(train)), train)
        else:  # n+1 levels; diffusers appends the last sigma to these as well
            levels = torch.linspace(np.log(train[-1]), np.log(train[0]), n + 1).exp().numpy()
        if c.use_karras_sigmas or c.use_exponential_sigmas:
            low = c.sigma_min if c.sigma_min is not None else float(levels[-1])
            high = c.sigma_max if c.sigma_max is not None else float(levels[0])
            levels = karras(high, low, n) if c.use_karras_sigmas else np.exp(np.linspace(np.log(high), np.log(low), n))
            steps = timesteps_of(levels, train)
        last = float(self._train_sigmas[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        self._set(steps, torch.from_numpy(np.concatenate([levels, [last]]).astype(np.float32)), device)

    def _set(self, timesteps: np.ndarray, sigmas: torch.Tensor, device: torch.device | str | None) -> None:
        self.sigmas = sigmas
        host = torch.from_numpy(timesteps.astype(np.float32))
        if self.config.timesteps_are_log_sigmas:
            host = torch.tensor([0.25 * sigma.log() for sigma in sigmas[:-1]])  # one by one: SIMD logs differ
        self._start(host, device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Step:
        """From one noise level to the next (Karras et al. 2022, algorithm 2, first order).

        Computes in float32 and returns ``prev_sample`` in the model output's dtype. ``return_dict``
        is diffusers'; the answer is a named tuple either way. ``timestep`` only counts in the first
        call after ``set_timesteps``.

        Raises:
            ValueError: an integer as timestep (an index of the schedule, most likely).
        """
        no_integer(timestep)
        i = self._index(timestep)
        sigma = self.sigmas[i]
        sample = sample.to(torch.float32)

        churned = s_churn > 0 and s_tmin <= sigma <= s_tmax
        gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1) if churned else 0.0
        sigma_hat = sigma * (gamma + 1)
        if gamma > 0:
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype) * s_noise
            sample = sample + noise * (sigma_hat**2 - sigma**2) ** 0.5

        original = self._original(model_output, sample, sigma, sigma_hat)
        derivative = (sample - original) / sigma_hat
        prev_sample = sample + derivative * (self.sigmas[i + 1] - sigma_hat)
        self._step_index = i + 1
        return Step(prev_sample.to(model_output.dtype), original)
