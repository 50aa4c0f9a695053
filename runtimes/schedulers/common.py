"""What the schedulers share: their configuration, the training schedule, and the position in a run.

Every expression keeps diffusers' order, dtype and library (numpy here, torch there): results are
equal bit for bit, and so are pictures. Noise levels stay on the CPU. A 0-dim CPU tensor enters a
GPU kernel as an argument, so a step neither copies nor waits.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch

from buildtool.store.errors import SdxlError

# Settings that saved configurations carry along and only some schedulers read; diffusers' others ignore them too.
KNOWN = frozenset({
    "clip_sample", "clip_sample_range", "sample_max_value", "set_alpha_to_one", "skip_prk_steps", "variance_type",
    "thresholding", "dynamic_thresholding_ratio", "algorithm_type", "solver_order", "solver_type", "solver_p",
    "predict_x0", "predict_epsilon", "disable_corrector", "lower_order_final", "euler_at_final", "use_lu_lambdas",
    "lambda_min_clipped", "original_inference_steps", "timestep_scaling", "flow_shift", "shift",
    "use_dynamic_shifting", "time_shift_type", "noise_sampler_seed", "interpolation_type", "use_karras_sigmas",
    "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "sigma_min", "sigma_max", "timestep_type",
    "final_sigmas_type",
})  # fmt: skip

S = TypeVar("S", bound="Scheduler")


class Step(NamedTuple):
    """What a step gives, by diffusers' names: latents of the next noise level, and the clean ones it expects."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


OTHER = "Pass a scheduler made with diffusers: Pipeline(..., scheduler=...)."


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every scheduler_config.json says; names and defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: list[float] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample", "original_sample"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False


class Scheduler:
    """Configuration and position in the schedule: what all have in common."""

    order = 1
    name: ClassVar[str]
    """diffusers' name of the class."""
    settings: ClassVar[type[Config]]
    refused: ClassVar[tuple[str, ...]] = ()
    """Settings that diffusers' class has and this one only knows as false."""

    config: Any
    timesteps: torch.Tensor
    num_inference_steps: int | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @classmethod
    def from_config(cls: type[S], config: Mapping[str, Any], **overrides: Any) -> S:
        """From the contents of scheduler_config.json; ``overrides`` replace single settings.

        Raises:
            SdxlError: another scheduler's configuration, an unknown setting, or a value not served.
        """
        given = {**config, **overrides}
        name = given.get("_class_name", cls.name)
        if name not in (cls.name, cls.name.removesuffix("Scheduler")):
            raise SdxlError(f"The model's scheduler is {name}, and this one is built in for {cls.name}.", OTHER)
        fields = {field.name for field in msgspec.structs.fields(cls.settings)}
        for key in cls.refused:
            if given.pop(key, None):
                raise SdxlError(f"The scheduler's setting {key}=true is not supported.", OTHER)
        given = {key: v for key, v in given.items() if key[0] != "_" and (key in fields or key not in KNOWN)}
        try:
            parsed = msgspec.convert(given, cls.settings)
        except msgspec.ValidationError as error:
            raise SdxlError(f"The scheduler's configuration is not supported: {error}.", OTHER) from None
        if given.get("use_karras_sigmas") and given.get("use_exponential_sigmas"):
            raise SdxlError("The scheduler's configuration sets use_karras_sigmas and use_exponential_sigmas.", OTHER)
        return cls(parsed)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def step_index(self) -> int | None:
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the run starts; without it the first call looks its timestep up (and waits for a GPU's)."""
        self._begin_index = begin_index

    def _start(self, timesteps: torch.Tensor, device: torch.device | str | None) -> None:
        """A new run over ``timesteps`` (steps,), a CPU tensor."""
        self._host_timesteps: list[float] = timesteps.tolist()
        self.timesteps = timesteps.to(device) if device is not None else timesteps
        self._step_index = self._begin_index = None

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

    def _noised_at(self, timesteps: torch.Tensor) -> list[int]:
        """Where in the schedule ``add_noise`` is: image-to-image before the first step, inpainting after it."""
        if self._begin_index is None:
            return [self.index_for_timestep(t) for t in timesteps]
        return [self._begin_index if self._step_index is None else self._step_index] * timesteps.shape[0]


class AlphaScheduler(Scheduler):
    """A schedule in cumulative alphas, as DDPM's: latents of unit variance, integer timesteps."""

    init_noise_sigma = 1.0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.alphas_cumprod = torch.cumprod(1.0 - betas(config), dim=0)
        self.final_alpha_cumprod = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]
        self._start(torch.arange(config.num_train_timesteps - 1, -1, -1), None)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The latents as they are."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean latents with the noise of ``timesteps`` (1-D, one for each sample) added."""
        alphas = self.alphas_cumprod.to(device=original_samples.device).to(dtype=original_samples.dtype)
        alpha = alphas[timesteps.to(original_samples.device)].view(-1, *[1] * (original_samples.ndim - 1))
        return alpha**0.5 * original_samples + (1 - alpha) ** 0.5 * noise

    def _original(
        self, model_output: torch.Tensor, sample: torch.Tensor, alpha: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latents and the noise that the model's answer stands for."""
        beta, kind = 1 - alpha, self.config.prediction_type
        if kind == "epsilon":
            return (sample - beta**0.5 * model_output) / alpha**0.5, model_output
        if kind == "v_prediction":
            return alpha**0.5 * sample - beta**0.5 * model_output, alpha**0.5 * model_output + beta**0.5 * sample
        return model_output, (sample - alpha**0.5 * model_output) / beta**0.5

    def _clipped(self, original: torch.Tensor) -> torch.Tensor:
        limit = self.config.clip_sample_range
        return original.clamp(-limit, limit) if self.config.clip_sample else original


def no_integer(timestep: object) -> None:
    """Refuses what is an index of the schedule, most likely.

    Raises:
        ValueError: an integer as timestep.
    """
    if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
        raise ValueError("Pass one of scheduler.timesteps as the timestep, not an integer")


def at_most_trained(steps: int, config: Config) -> None:
    """Raises:
    SdxlError: more steps than the schedule has.
    """
    if steps > config.num_train_timesteps:
        raise SdxlError(
            f"{steps} steps were asked for; this scheduler has {config.num_train_timesteps}.", "Ask for fewer."
        )


def betas(c: Config) -> torch.Tensor:
    """The noise that each training step adds, (num_train_timesteps,), float32."""
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


def cumulative_alphas(c: Config) -> torch.Tensor:
    """What is left of the data after each training step, (num_train_timesteps,), float32; never 0."""
    alphas = torch.cumprod(1.0 - betas(c), dim=0)
    if c.rescale_betas_zero_snr:
        alphas[-1] = 2**-24  # close to 0, so that the first sigma is not infinite
    return alphas


def _zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Lin et al. 2023, algorithm 1: the last step holds noise alone."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def spaced(c: Config, n: int) -> np.ndarray:
    """n training timesteps, descending, float32 (Lin et al. 2023, table 2)."""
    total = c.num_train_timesteps
    if c.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, n, dtype=np.float32)[::-1].copy()
    if c.timestep_spacing == "leading":
        return (np.arange(n) * (total // n))[::-1].astype(np.float32) + np.float32(c.steps_offset)
    return np.arange(total, 0, -total / n).round().astype(np.float32) - np.float32(1)


def karras(high: float, low: float, n: int) -> np.ndarray:
    """n noise levels (Karras et al. 2022, equation 5, rho = 7), descending, float64."""
    ramp = np.linspace(0, 1, n)
    return (high ** (1 / 7.0) + ramp * (low ** (1 / 7.0) - high ** (1 / 7.0))) ** 7.0


def timesteps_of(sigmas: np.ndarray, train_sigmas: np.ndarray) -> np.ndarray:
    """Fractional training timesteps of noise levels, by interpolation in log sigma."""
    logs = np.log(train_sigmas)
    return np.array([_position(np.log(np.maximum(sigma, 1e-10)), logs) for sigma in sigmas])


def _position(log_sigma: np.floating[Any], logs: np.ndarray) -> float:
    """Fractional index of ``log_sigma`` in the ascending ``logs``, clamped to its ends."""
    low = int(np.cumsum(log_sigma - logs >= 0).argmax().clip(max=len(logs) - 2))
    weight = np.clip((logs[low] - log_sigma) / (logs[low] - logs[low + 1]), 0, 1)
    return float(1 - weight) * low + float(weight) * (low + 1)
