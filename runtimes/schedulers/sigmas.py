"""Schedules in noise levels whose first latents are unit noise times the largest: the Euler family."""

from typing import Any

import torch

from runtimes.schedulers.common import Scheduler, cumulative_alphas


class SigmaScheduler(Scheduler):
    """``sigmas`` is a float32 CPU tensor of n+1 noise levels (in units of the data's deviation),
    ``timesteps`` a float32 tensor of n on the device given to ``set_timesteps``."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.alphas_cumprod = cumulative_alphas(config)
        self._train_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        self.sigmas = torch.cat([self._train_sigmas.flip(0), torch.zeros(1)])
        self._start(torch.arange(config.num_train_timesteps - 1, -1, -1, dtype=torch.float32), None)

    @property
    def init_noise_sigma(self) -> torch.Tensor:
        """What unit noise is multiplied with to make the first latents; float32, 0-dim, CPU."""
        largest = self.sigmas.max()
        return largest if self.config.timestep_spacing != "leading" else (largest**2 + 1) ** 0.5

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The latents as the model wants them: divided by sqrt(sigma² + 1); any shape and dtype."""
        sigma = self.sigmas[self._index(timestep)]
        return sample / ((sigma**2 + 1) ** 0.5)

    def _original(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        sigma: torch.Tensor,
        sigma_hat: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The clean latents that the model's answer stands for; ``sigma_hat`` is the level after churning."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return sample - (sigma if sigma_hat is None else sigma_hat) * model_output
        if kind == "v_prediction":
            return model_output * (-sigma / (sigma**2 + 1) ** 0.5) + (sample / (sigma**2 + 1))
        return model_output

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean latents with the noise of ``timesteps`` (1-D, one for each sample) added."""
        sigmas = self.sigmas.to(original_samples.device, original_samples.dtype)
        sigma = sigmas[self._noised_at(timesteps)].flatten()
        return original_samples + noise * sigma.view(-1, *[1] * (original_samples.ndim - 1))
