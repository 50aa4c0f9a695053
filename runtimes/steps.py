"""Which time steps a run takes, as diffusers' ``retrieve_timesteps``, ``get_timesteps`` and ``denoising_end``."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from buildtool.store.errors import SdxlError


def choose(
    scheduler: Any,
    device: torch.device,
    count: int,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    denoising_end: float | None = None,
    strength: float | None = None,
    denoising_start: float | None = None,
) -> Tensor:
    """Sets the scheduler's schedule and returns the time steps that will run, (steps,).

    Args:
        scheduler: ours or diffusers'.
        count: steps of the whole schedule.
        timesteps, sigmas: own ones instead.
        denoising_end: fraction of the schedule where the run stops.
        strength: of image to image: fraction of the steps that runs, the last ones.
        denoising_start: fraction of the schedule where the run starts, instead of ``strength``.

    Raises:
        SdxlError: a scheduler that takes no own timesteps or sigmas, or no step is left to run.
        ValueError: arguments that contradict each other.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("Only one of timesteps or sigmas can be passed.")
    own: dict[str, Any] = {n: v for n, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
    for name in own:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise SdxlError(f"{type(scheduler).__name__} takes no {name} of your own.", "Pass num_inference_steps.")
    scheduler.set_timesteps(device=device, **(own or {"num_inference_steps": count}))
    times: Tensor = scheduler.timesteps
    trained = scheduler.config.num_train_timesteps
    start, end = _inside(denoising_start), _inside(denoising_end)
    if start is not None:
        first = len(times) - _count(times < round(trained - start * trained))
    elif strength is None:
        return _until(times, end, trained)
    else:
        total = len(times) // scheduler.order if own else count
        first = max(total - int(total * strength), 0) * scheduler.order
    times = times[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if len(times) == 0:
        asked = f"strength {strength:g}" if start is None else f"denoising_start {start:g}"
        raise SdxlError(f"With {asked}, none of {first} steps is left to run.", "Ask for more steps.")
    if start is not None and end is not None and start >= end:
        raise ValueError(f"denoising_start {start} is not below denoising_end {end}.")
    return _until(times, end, trained)


def _until(times: Tensor, end: float | None, trained: int) -> Tensor:
    return times if end is None else times[: _count(times >= round(trained - end * trained))]


def _inside(fraction: float | None) -> float | None:
    """A fraction that means something to diffusers: those from 0 to 1 without the ends."""
    return fraction if fraction is not None and 0 < fraction < 1 else None


def _count(mask: Tensor) -> int:
    return int(mask.sum())
