"""Euler's method for SDXL: the interface and the numbers of diffusers' ``EulerDiscreteScheduler``.

Every expression keeps diffusers' order, dtype and library (numpy here, torch there): results are
equal bit for bit, and so are pictures. Sigmas stay on the CPU. A 0-dim CPU tensor enters a GPU
kernel as an argument, so a step neither copies nor waits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch

from buildtool.store.errors import SdxlError
from runtimes.noise import Generators, randn

CLASSES = ("EulerDiscreteScheduler", "EulerDiscrete")

# Settings of other schedulers that saved configurations carry along; diffusers' Euler ignores them too.
IGNORED = frozenset({
    "clip_sample", "clip_sample_range", "sample_max_value", "set_alpha_to_one", "skip_prk_steps", "variance_type",
    "thresholding", "dynamic_thresholding_ratio", "algorithm_type", "solver_order", "solver_type", "solver_p",
    "predict_x0", "predict_epsilon", "disable_corrector", "lower_order_final", "euler_at_final", "use_lu_lambdas",
    "lambda_min_clipped", "original_inference_steps", "timestep_scaling", "flow_shift", "shift",
    "use_dynamic_shifting", "time_shift_type", "noise_sampler_seed",
})  # fmt: skip


class EulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """scheduler_config.json; names and defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: list[float] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample", "original_sample"] = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: Literal[False] | None = False
    use_flow_sigmas: Literal[False] | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    @property
    def timesteps_are_log_sigmas(self) -> bool:
        return self.timestep_type == "continuous" and self.prediction_type == "v_prediction"


class EulerStep(NamedTuple):
    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class EulerDiscrete:
    """A schedule of noise levels and the step from one to the next.

    ``sigmas`` is a float32 CPU tensor of n+1 noise levels (in units of the data's deviation),
    ``timesteps`` a float32 tensor of n on the device given to ``set_timesteps``.
    """

    order = 1

    def __init__(self, config: EulerConfig) -> None:
        self.config = config
        betas = _betas(config)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if config.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # close to 0, so that the first sigma is not infinite
        self._train_sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        sigmas = self._train_sigmas.flip(0)
        self.num_inference_steps: int | None = None
        self._set(np.arange(config.num_train_timesteps)[::-1], torch.cat([sigmas, torch.zeros(1)]), None)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> "EulerDiscrete":
        """From the contents of scheduler_config.json; ``overrides`` replace single settings.

        Raises:
            SdxlError: another scheduler's configuration, an unknown setting, or a value not served.
        """
        settings = {**config, **overrides}
        name = settings.get("_class_name", CLASSES[0])
        other = "Pass a scheduler made with diffusers: Pipeline(..., scheduler=...)."
        if name not in CLASSES:
            raise SdxlError(f"The model's scheduler is {name}; EulerDiscreteScheduler is the one built in.", other)
        settings = {key: value for key, value in settings.items() if key[0] != "_" and key not in IGNORED}
        for key in ("use_beta_sigmas", "use_flow_sigmas"):
            if settings.get(key):
                raise SdxlError(f"The scheduler's setting {key}=true is not supported.", other)
        try:
            parsed = msgspec.convert(settings, EulerConfig)
        except msgspec.ValidationError as error:
            raise SdxlError(f"The scheduler's configuration is not supported: {error}.", other) from None
        if parsed.use_karras_sigmas and parsed.use_exponential_sigmas:
            raise SdxlError("The scheduler's configuration sets use_karras_sigmas and use_exponential_sigmas.", other)
        return cls(parsed)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # -- the schedule ------------------------------------------------------------------------------

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
            self._set(self._timesteps_of(levels[:-1]), torch.from_numpy(levels), device)
            return

        if timesteps is not None:
            steps = np.array(timesteps).astype(np.float32)
            n = len(steps)
        else:
            assert num_inference_steps is not None
            n = num_inference_steps
            steps = _spaced(c, n)
        self.num_inference_steps = n
        if c.interpolation_type == "linear":
            levels = np.interp(steps, np.arange(len(train)), train)
        else:  # n+1 levels; diffusers appends the last sigma to these as well
            levels = torch.linspace(np.log(train[-1]), np.log(train[0]), n + 1).exp().numpy()
        if c.use_karras_sigmas or c.use_exponential_sigmas:
            low = c.sigma_min if c.sigma_min is not None else float(levels[-1])
            high = c.sigma_max if c.sigma_max is not None else float(levels[0])
            if c.use_karras_sigmas:  # Karras et al. 2022, equation 5, rho = 7
                ramp = np.linspace(0, 1, n)
                levels = (high ** (1 / 7.0) + ramp * (low ** (1 / 7.0) - high ** (1 / 7.0))) ** 7.0
            else:
                levels = np.exp(np.linspace(np.log(high), np.log(low), n))
            steps = self._timesteps_of(levels)
        last = float(self._train_sigmas[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        self._set(steps, torch.from_numpy(np.concatenate([levels, [last]]).astype(np.float32)), device)

    def _set(self, timesteps: np.ndarray, sigmas: torch.Tensor, device: torch.device | str | None) -> None:
        self.sigmas = sigmas
        host = torch.from_numpy(timesteps.astype(np.float32))
        if self.config.timesteps_are_log_sigmas:
            host = torch.tensor([0.25 * sigma.log() for sigma in sigmas[:-1]])  # one by one: SIMD logs differ
        self._host_timesteps: list[float] = host.tolist()
        self.timesteps = host.to(device) if device is not None else host
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _timesteps_of(self, sigmas: np.ndarray) -> np.ndarray:
        """Fractional training timesteps of noise levels, by interpolation in log sigma."""
        logs = np.log(self._train_sigmas.numpy())
        return np.array([_position(np.log(np.maximum(sigma, 1e-10)), logs) for sigma in sigmas])

    @property
    def init_noise_sigma(self) -> torch.Tensor:
        """What unit noise is multiplied with to make the first latents; float32, 0-dim, CPU."""
        largest = self.sigmas.max()
        return largest if self.config.timestep_spacing != "leading" else (largest**2 + 1) ** 0.5

    # -- the position in it ------------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the run starts; without it the first call looks its timestep up (and waits for a GPU's)."""
        self._begin_index = begin_index

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: Sequence[float] | torch.Tensor | None = None
    ) -> int:
        """Where a timestep is in the schedule; of two equal ones the second, as diffusers does for image-to-image.

        Raises:
            ValueError: the timestep is not in the schedule.
        """
        schedule: Any = self._host_timesteps if schedule_timesteps is None else schedule_timesteps
        wanted = float(torch.as_tensor(timestep, dtype=torch.float32))
        found = [i for i, t in enumerate(schedule) if float(t) == wanted]
        if not found:
            raise ValueError(f"The timestep {wanted:g} is not one of scheduler.timesteps")
        return found[1] if len(found) > 1 else found[0]

    def _index(self, timestep: float | torch.Tensor) -> int:
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        return self._step_index

    # -- the step ----------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The latents as the model wants them: divided by sqrt(sigma² + 1); any shape and dtype."""
        sigma = self.sigmas[self._index(timestep)]
        return sample / ((sigma**2 + 1) ** 0.5)

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
    ) -> EulerStep:
        """From one noise level to the next (Karras et al. 2022, algorithm 2, first order).

        Computes in float32 and returns ``prev_sample`` in the model output's dtype. ``return_dict``
        is diffusers'; the answer is a named tuple either way. ``timestep`` only counts in the first
        call after ``set_timesteps``.

        Raises:
            ValueError: an integer as timestep (an index of the schedule, most likely).
        """
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError("Pass one of scheduler.timesteps as the timestep, not an integer")
        i = self._index(timestep)
        sigma = self.sigmas[i]
        sample = sample.to(torch.float32)

        churned = s_churn > 0 and s_tmin <= sigma <= s_tmax
        gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1) if churned else 0.0
        sigma_hat = sigma * (gamma + 1)
        if gamma > 0:
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype) * s_noise
            sample = sample + noise * (sigma_hat**2 - sigma**2) ** 0.5

        kind = self.config.prediction_type
        if kind == "epsilon":
            original = sample - sigma_hat * model_output
        elif kind == "v_prediction":
            original = model_output * (-sigma / (sigma**2 + 1) ** 0.5) + (sample / (sigma**2 + 1))
        else:
            original = model_output

        derivative = (sample - original) / sigma_hat
        prev_sample = sample + derivative * (self.sigmas[i + 1] - sigma_hat)
        self._step_index = i + 1
        return EulerStep(prev_sample.to(model_output.dtype), original)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean latents with the noise of ``timesteps`` (1-D, one for each sample) added."""
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:  # image-to-image before the first step, inpainting after it
            begin = self._begin_index if self._step_index is None else self._step_index
            indices = [begin] * timesteps.shape[0]
        sigma = self.sigmas.to(original_samples.device, original_samples.dtype)[indices].flatten()
        return original_samples + noise * sigma.view(-1, *[1] * (original_samples.ndim - 1))


def _betas(c: EulerConfig) -> torch.Tensor:
    n = c.num_train_timesteps
    if c.trained_betas is not None:
        betas = torch.tensor(c.trained_betas, dtype=torch.float32)
    elif c.beta_schedule == "linear":
        betas = torch.linspace(c.beta_start, c.beta_end, n, dtype=torch.float32)
    elif c.beta_schedule == "scaled_linear":
        betas = torch.linspace(c.beta_start**0.5, c.beta_end**0.5, n, dtype=torch.float32) ** 2
    else:  # Nichol and Dhariwal 2021, equation 17
        bar = [np.cos((i / n + 0.008) / 1.008 * np.pi / 2) ** 2 for i in range(n + 1)]
        betas = torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(n)], dtype=torch.float32)
    return _zero_terminal_snr(betas) if c.rescale_betas_zero_snr else betas


def _zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Lin et al. 2023, algorithm 1: the last step holds noise alone."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def _spaced(c: EulerConfig, n: int) -> np.ndarray:
    """n training timesteps, descending, float32 (Lin et al. 2023, table 2)."""
    total = c.num_train_timesteps
    if c.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, n, dtype=np.float32)[::-1].copy()
    if c.timestep_spacing == "leading":
        return (np.arange(n) * (total // n))[::-1].astype(np.float32) + np.float32(c.steps_offset)
    return np.arange(total, 0, -total / n).round().astype(np.float32) - np.float32(1)


def _position(log_sigma: np.floating[Any], logs: np.ndarray) -> float:
    """Fractional index of ``log_sigma`` in the ascending ``logs``, clamped to its ends."""
    low = int(np.cumsum(log_sigma - logs >= 0).argmax().clip(max=len(logs) - 2))
    weight = np.clip((logs[low] - log_sigma) / (logs[low] - logs[low + 1]), 0, 1)
    return float(1 - weight) * low + float(weight) * (low + 1)
