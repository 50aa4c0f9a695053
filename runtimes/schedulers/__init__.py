"""Which schedulers are built in, and which one a configuration asks for. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from buildtool.store.errors import SdxlError


@dataclass(frozen=True)
class Named:
    """One scheduler of ``--scheduler``.

    Args:
        sampler: what AUTOMATIC1111's web UI calls it.
        diffusers: the class of scheduler_config.json.
        place: ``module:class`` of ours.
        settings: what its name says beyond the class; they replace the configuration's.
    """

    sampler: str
    diffusers: str
    place: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_EULER = ("EulerDiscreteScheduler", "runtimes.euler:EulerDiscrete")
_ANCESTRAL = ("EulerAncestralDiscreteScheduler", "runtimes.schedulers.euler_ancestral:EulerAncestral")
_DPM = ("DPMSolverMultistepScheduler", "runtimes.schedulers.dpmpp_2m:DPMSolver2M")
_TRAILING = {"timestep_spacing": "trailing"}

SCHEDULERS = {
    "euler": Named("Euler", *_EULER),
    "euler-trailing": Named("Euler", *_EULER, _TRAILING),
    "euler-a": Named("Euler a", *_ANCESTRAL),
    "euler-a-trailing": Named("Euler a", *_ANCESTRAL, _TRAILING),
    "dpmpp-2m": Named("DPM++ 2M", *_DPM, {"use_karras_sigmas": False}),
    "dpmpp-2m-karras": Named("DPM++ 2M", *_DPM, {"use_karras_sigmas": True}),
    "ddim": Named("DDIM", "DDIMScheduler", "runtimes.schedulers.ddim:DDIM"),
    "lcm": Named("LCM", "LCMScheduler", "runtimes.schedulers.lcm:LCM"),
}


def settings_of(config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """The configuration that a scheduler is made of: the checkpoint's own, with what ``name`` says in its place."""
    if name is None or name == _name_of(config):
        return dict(config)
    row = SCHEDULERS[name]
    return {**config, "_class_name": row.diffusers, **row.settings}


def name_of(config: Mapping[str, Any]) -> str:
    """The name in SCHEDULERS of the scheduler that scheduler_config.json asks for.

    Raises:
        SdxlError: its class is none of those built in.
    """
    name = _name_of(config)
    if name is None:
        raise SdxlError(
            f"The model's scheduler is {config['_class_name']}, which is not built in.",
            f"Choose one with --scheduler: {', '.join(SCHEDULERS)}; "
            "or pass one made with diffusers: Pipeline(..., scheduler=...).",
        )
    return name


def is_built_in(config: Mapping[str, Any]) -> bool:
    """Whether ``make(config)`` knows the configuration's class."""
    return _name_of(config) is not None


def make(config: Mapping[str, Any], name: str | None = None) -> Any:
    """The scheduler of scheduler_config.json, or a named one with the settings that the file gives.

    Raises:
        SdxlError: a class, a name or a setting that is not built in.
    """
    if name is not None and name not in SCHEDULERS:
        raise SdxlError(f"There is no scheduler {name!r}.", f"There are: {', '.join(SCHEDULERS)}.")
    module, _, cls = SCHEDULERS[name or name_of(config)].place.partition(":")
    return getattr(import_module(module), cls).from_config(settings_of(config, name))


def _name_of(config: Mapping[str, Any]) -> str | None:
    """The row of the configuration's class that says most of what it sets; a file without a class means Euler."""
    wanted = config.get("_class_name", _EULER[0])
    wanted = wanted if str(wanted).endswith("Scheduler") else f"{wanted}Scheduler"
    fits = [
        name
        for name, row in SCHEDULERS.items()
        if row.diffusers == wanted
        and all(
            bool(config.get(k)) == v if isinstance(v, bool) else config.get(k) == v for k, v in row.settings.items()
        )
    ]
    return max(fits, key=lambda name: len(SCHEDULERS[name].settings), default=None)
