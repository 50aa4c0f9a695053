"""What every backend's runtime shares: engines that check what they are given, and their loaders."""

import abc
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from buildtool.store import machine
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Component, Manifest, TensorSpec, Variant
from runtimes import timeline
from runtimes.weights import Weights

Size = tuple[int, int]


class EngineInputError(ValueError):
    """An engine was given what it wasn't compiled for. Compiled code would compute nonsense from it."""


class Engine(abc.ABC):
    """A loaded, callable variant.

    Call it with its inputs by name; it returns its outputs as a tuple in the manifest's order.
    Outputs may be buffers of the engine's own that the next call overwrites.

    Args:
        name: ``<component>.<variant>``, for messages.
        variant: the manifest's description: names, shapes, dtypes, strides.
        device: where inputs have to be.
    """

    def __init__(self, name: str, variant: Variant, device: torch.device) -> None:
        self.name = name
        self.inputs = variant.inputs
        self.outputs = variant.outputs
        self.device = device
        self.calls = 0
        self._expected = [_Expected(spec) for spec in variant.inputs]

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs the variant.

        Raises:
            EngineInputError: a name, shape, dtype, stride or device that it wasn't compiled for.
        """
        if inputs.keys() != {e.name for e in self._expected}:
            names = [e.name for e in self._expected]
            raise EngineInputError(
                f"{self.name} takes {', '.join(names)}; it was given {', '.join(inputs) or 'nothing'}."
            )
        ordered = [inputs[e.name] for e in self._expected]
        for tensor, expected in zip(ordered, self._expected, strict=True):
            problem = expected.problem(tensor, self.device)
            if problem:
                raise EngineInputError(f"{self.name}: {expected.name} {problem}.")
        self.calls += 1
        return self._run(ordered)

    @abc.abstractmethod
    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The outputs for inputs that have been checked, in the manifest's order."""


class _Expected:
    """An input's spec in torch's terms, made once."""

    def __init__(self, spec: TensorSpec) -> None:
        self.name = spec.name
        self.shape = torch.Size(spec.shape)
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.stride = spec.stride

    def problem(self, tensor: Tensor, device: torch.device) -> str | None:
        if tensor.shape != self.shape:
            return f"has shape {tuple(tensor.shape)}, it was compiled for {tuple(self.shape)}"
        if tensor.dtype != self.dtype:
            return f"is {tensor.dtype}, it was compiled for {self.dtype}"
        if tensor.device != device:
            return f"is on {tensor.device}, the engine on {device}"
        strides = zip(self.shape, tensor.stride(), self.stride, strict=True)
        if any(size > 1 and got != want for size, got, want in strides):
            return f"has strides {tensor.stride()}, it was compiled for {self.stride}"
        return None


class Loader(abc.ABC):
    """Makes engines of an artifact's files. One subclass a backend; the manifest names it."""

    name: ClassVar[str]
    takes_weights: ClassVar[bool] = False
    """Whether engines are given the weights as tensors, or read the weights file by themselves."""

    @abc.abstractmethod
    def check_machine(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        """Says before anything is loaded what keeps the artifact from running here.

        Raises:
            SdxlError: another GPU or processor, another torch, a missing library.
        """

    def engine(
        self, folder: Path, manifest: Manifest, component: str, variant: str, device: torch.device, weights: Weights
    ) -> Engine:
        """Loads one variant of an artifact whose files were seen to be there.

        Raises:
            SdxlError: a file is not what the manifest describes.
        """
        described = manifest.components[component]
        form = described.variants[variant]
        turns = None
        if form.segments and weights.sequential:
            turns, tensors = weights.turns(folder, manifest, component)
        else:
            tensors = weights.tensors(folder, manifest, component) if self.takes_weights else {}
        # A CUDA graph holds the addresses of weights.
        options = {**manifest.key.options, "cuda_graphs": not weights.offload}
        name = f"{component}.{variant}"
        if form.segments:
            from runtimes import segments

            # Where they stay in memory, one graph has them all.
            graph = options["cuda_graphs"] and device.type == "cuda"
            own = {**options, "cuda_graphs": False}
            parts = [
                self._engine(folder / part.file, f"{name}.{number}", described, part, tensors, own, device)
                for number, part in enumerate(segments.forms(form), 1)
            ]
            return segments.SegmentedEngine(name, form, device, parts, turns, graph)
        return self._engine(folder / form.file, name, described, form, tensors, options, device)

    @abc.abstractmethod
    def _engine(
        self,
        path: Path,
        name: str,
        component: Component,
        variant: Variant,
        weights: Mapping[str, Tensor],
        options: Mapping[str, Any],
        device: torch.device,
    ) -> Engine: ...


def check_target(folder: Path, manifest: Manifest, device: torch.device) -> None:
    """Whether code that was compiled for this very kind of processor or GPU runs here.

    Raises:
        SdxlError: it is of another kind.
    """
    target = manifest.key.target
    if target.startswith("cpu-"):
        level = target.removeprefix("cpu-")
        if not machine.cpu_runs(level):
            raise SdxlError(
                f"{folder} was built for processors with {level}; this one has {machine.cpu_isa()}.",
                f"Build it on this machine: {' '.join(manifest.command)}",
            )
        return
    major, minor = torch.cuda.get_device_capability(device)
    if target != f"sm{major}{minor}":
        raise SdxlError(
            f"{folder} was built for {target}; {torch.cuda.get_device_name(device)} is sm{major}{minor}.",
            f"Build it on this machine: {' '.join(manifest.command)}",
        )


def rebuild_hint(manifest: Manifest) -> str:
    """The command that makes the artifact again."""
    return f"Build it again: {' '.join(manifest.command)} --force"


class Clock:
    """Seconds by stage of the last call. A device is waited for only where a stage ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        self.seconds.clear()
        self._last = time.perf_counter()

    def stop(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self.seconds[stage] = self.seconds.get(stage, 0.0) + took
        end = timeline.now()
        if took >= 1e-3:  # what a call had nothing to do in
            timeline.add(stage, end - took, end)
