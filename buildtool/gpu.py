"""What an artifact is built for: the value of ``--gpu`` becomes a target, without importing torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from buildtool.store import machine
from buildtool.store.errors import SdxlError

TARGETS: dict[str, str] = {
    "sm75": "Turing: T4, RTX 20",
    "sm80": "Ampere: A100, A30",
    "sm86": "Ampere: A10, A40, RTX 30",
    "sm87": "Ampere: Jetson Orin",
    "sm89": "Ada: L4, L40, RTX 40",
    "sm90": "Hopper: H100, H200",
    "sm100": "Blackwell: B200",
    "sm103": "Blackwell: B300",
    "sm120": "Blackwell: RTX 50, RTX PRO",
    "sm121": "Blackwell: GB10",
}
"""Known GPU targets, and what they are."""


@dataclass(frozen=True)
class Target:
    """What to build for.

    Attributes:
        name: ``cpu-<instruction set>``, ``sm90``, or several joined with ``+`` (one engine for several GPUs).
        gpu_name: the exact GPU that is present and fits; ``any`` on the CPU, or where none that fits is here.
        device: ``cpu`` or ``cuda``.
        index: the device's number; 0 where there is none.
    """

    name: str
    gpu_name: str
    device: Literal["cpu", "cuda"]
    index: int

    @property
    def names(self) -> tuple[str, ...]:
        """The single targets that ``name`` holds."""
        return tuple(self.name.split("+"))

    @property
    def torch_device(self) -> str:
        """``cpu``, or ``cuda:<index>``."""
        return self.device if self.device == "cpu" else f"cuda:{self.index}"


def resolve_target(gpu: str, index: int | None = None) -> Target:
    """The target that ``--gpu`` names.

    Args:
        gpu: ``auto`` (a GPU of this machine), ``cpu``, ``smNN``, or a list such as ``sm86,sm89``.
        index: which of the visible GPUs; the first one (that fits) by default.

    Raises:
        SdxlError: ``auto`` without a GPU, a target that is not known, or no GPU of that number.
    """
    asked = [name.strip().lower() for name in gpu.split(",") if name.strip()]
    if asked == ["auto"]:
        present = machine.gpus()
        if not present:
            raise SdxlError("No GPU was found on this machine.", "To build for its CPU, add: --gpu cpu")
        chosen = present[0] if index is None else machine.require_gpu(index)
        return Target(chosen.target, chosen.name, "cuda", chosen.index)
    if asked == ["cpu"]:
        if index is not None:
            raise SdxlError("--gpu cpu and --gpu-index contradict each other.", "Leave one out.")
        return Target(f"cpu-{machine.cpu_isa()}", "any", "cpu", 0)
    unknown = [name for name in asked if name not in TARGETS]
    if unknown or not asked:
        what = f"a list cannot hold {unknown[0]!r}" if unknown and unknown[0] in ("auto", "cpu") else "not a target"
        raise SdxlError(f"--gpu {gpu!r}: {what}.", f"Give auto, cpu, or one or several of {', '.join(TARGETS)}.")
    names = sorted(set(asked), key=list(TARGETS).index)
    fitting = _fitting(names) if index is None else machine.require_gpu(index)
    if fitting is not None and fitting.target not in names:
        raise SdxlError(f"GPU {index} is {fitting.name} ({fitting.target}), not {gpu}.", f"Try --gpu {fitting.target}.")
    if fitting is None:
        return Target("+".join(names), "any", "cuda", 0)
    return Target("+".join(names), fitting.name, "cuda", fitting.index)


def require_present(target: Target, backend: str) -> None:
    """Checks that a backend which builds only for the GPU that is present can build for ``target``.

    Raises:
        SdxlError: a list of targets, or no visible GPU of that one.
    """
    if target.device == "cpu":
        return
    if len(target.names) > 1:
        raise SdxlError(
            f"The {backend} backend builds for one target, and {', '.join(target.names)} were asked for.",
            "Give one --gpu; lists are for trt.",
        )
    if _fitting(target.names) is None:
        present = machine.gpus()
        here = ", ".join(f"{g.name} ({g.target})" for g in present) or "none"
        hint = f"Try --gpu {present[0].target}." if present else "Build on such a machine, or try --gpu cpu."
        raise SdxlError(
            f"The {backend} backend builds for the GPU that is present: {target.name} was asked for, "
            f"this machine has {here}.",
            hint,
        )
    machine.require_gpu(target.index)


def usable(target: Target) -> bool:
    """Whether a GPU of the target is here and torch can use it, so that what is built can be run at once."""
    if target.gpu_name == "any":
        return False
    try:
        machine.require_gpu(target.index)
    except SdxlError:
        return False
    return True


def _fitting(names: Sequence[str]) -> machine.Gpu | None:
    return next((gpu for gpu in machine.gpus() if gpu.target in names), None)
