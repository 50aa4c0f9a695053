"""DPM-Solver++ of second order: the interface and numbers of ``DPMSolverMultistepScheduler`` (arXiv 2211.01095)."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from buildtool.store.errors import SdxlError
from runtimes.schedulers.common import Config, Scheduler, cumulative_alphas, karras, timesteps_of


class DPMSolver2MConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """scheduler_config.json; names and defaults are diffusers'."""

    solver_order: Literal[2] = 2
    algorithm_type: Literal["dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float | None = None
    """None stands for -infinity, which JSON can't hold."""


class DPMSolver2MStep(NamedTuple):
    prev_sample: torch.Tensor


class DPMSolver2M(Scheduler):
    """``sigmas`` is a float32 CPU tensor of n+1 noise levels, ``timesteps`` an int64 tensor of n."""

    name = "DPMSolverMultistepScheduler"
    settings = DPMSolver2MConfig
    refused = ("use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas", "thresholding", "variance_type")
    init_noise_sigma = 1.0

    def __init__(self, config: DPMSolver2MConfig) -> None:
        super().__init__(config)
        self.alphas_cumprod = cumulative_alphas(config)
        self._train_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        self.sigmas = self._train_sigmas
        self._last: torch.Tensor | None = None
        self._start(torch.arange(config.num_train_timesteps - 1, -1, -1, dtype=torch.float32), None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the noise levels of a run: a number of steps, or own timesteps.

        Raises:
            ValueError: not exactly one of the two is given.
            SdxlError: own timesteps where the configuration derives them from the sigmas.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass exactly one of num_inference_steps and timesteps")
        c = self.config
        if timesteps is not None and (c.use_karras_sigmas or c.use_exponential_sigmas):
            raise SdxlError("The model's scheduler derives timesteps from sigmas: it takes no custom timesteps.")
        n = num_inference_steps or len(timesteps or ())
        steps = self._spaced(n) if timesteps is None else np.array(timesteps).astype(np.int64)
        train = self._train_sigmas.numpy()
        if c.use_karras_sigmas or c.use_exponential_sigmas:
            high, low = float(train[-1]), float(train[0])
            levels = karras(high, low, n) if c.use_karras_sigmas else np.exp(np.linspace(np.log(high), np.log(low), n))
            steps = timesteps_of(levels, train)
            if c.use_karras_sigmas and c.beta_schedule != "squaredcos_cap_v2":
                steps = steps.round()
        else:
            levels = np.interp(steps, np.arange(len(train)), train)
        last = float(self._train_sigmas[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        self.sigmas = torch.from_numpy(np.concatenate([levels, [last]]).astype(np.float32))
        self.num_inference_steps = len(steps)
        self._last = None
        self._start(torch.from_numpy(steps).to(torch.int64), device)

    def _spaced(self, n: int) -> np.ndarray:
        """n training timesteps, descending, int64: those of n+1 without the last, unlike Euler's."""
        c = self.config
        lambdas = torch.log(self.alphas_cumprod.sqrt()) - torch.log((1 - self.alphas_cumprod).sqrt())
        lowest = -float("inf") if c.lambda_min_clipped is None else c.lambda_min_clipped
        end = c.num_train_timesteps - int(torch.searchsorted(lambdas.flip(0), lowest))
        if c.timestep_spacing == "linspace":
            return np.linspace(0, end - 1, n + 1).round()[::-1][:-1].astype(np.int64)
        if c.timestep_spacing == "leading":
            return (np.arange(n + 1) * (end // (n + 1)))[::-1][:-1].astype(np.int64) + c.steps_offset
        return np.arange(end, 0, -c.num_train_timesteps / n).round().astype(np.int64) - 1

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The latents as they are."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> DPMSolver2MStep:
        """From one noise level to the next, with the clean latents of this step and the one before.

        The first step is of first order, and so is the last where it would be unstable. Computes in
        float32 and returns ``prev_sample`` in the model output's dtype.
        """
        c, i, n = self.config, self._index(timestep), len(self.timesteps)
        final = i == n - 1 and (c.euler_at_final or (c.lower_order_final and n < 15) or c.final_sigmas_type == "zero")
        original = self._original(model_output, sample, self.sigmas[i])
        before, self._last = self._last, original
        sample = sample.to(torch.float32)

        alpha_t, sigma_t, lambda_t = self._levels(i + 1)
        _, sigma_s, lambda_s = self._levels(i)
        h = lambda_t - lambda_s
        shrink = alpha_t * (torch.exp(-h) - 1.0)
        prev_sample = (sigma_t / sigma_s) * sample - shrink * original
        if before is not None and not final:
            r = (lambda_s - self._levels(i - 1)[2]) / h
            slope = (1.0 / r) * (original - before)
            if c.solver_type == "heun":
                prev_sample = prev_sample + (alpha_t * ((torch.exp(-h) - 1.0) / h + 1.0)) * slope
            else:
                prev_sample = prev_sample - 0.5 * shrink * slope
        self._step_index = i + 1
        return DPMSolver2MStep(prev_sample.to(original.dtype))

    def _original(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The clean latents that the model's answer stands for."""
        alpha, sigma = _alpha_sigma(sigma)
        kind = self.config.prediction_type
        if kind == "epsilon":
            return (sample - sigma * model_output) / alpha
        return alpha * sample - sigma * model_output if kind == "v_prediction" else model_output

    def _levels(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """alpha, sigma and half the log signal-to-noise ratio at step i, 0-dim, CPU."""
        alpha, sigma = _alpha_sigma(self.sigmas[i])
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean latents with the noise of ``timesteps`` (1-D, one for each sample) added."""
        sigmas = self.sigmas.to(original_samples.device, original_samples.dtype)
        sigma = sigmas[self._noised_at(timesteps)].flatten().view(-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = _alpha_sigma(sigma)
        return alpha * original_samples + sigma * noise


def _alpha_sigma(sigma: torch.Tensor) -> tuple[Any, Any]:
    """What is left of the data and how much noise there is, for latents of unit variance."""
    alpha = 1 / ((sigma**2 + 1) ** 0.5)
    return alpha, sigma * alpha
