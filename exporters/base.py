"""What every backend's exporter shares: the request, what it leaves behind, and the errors."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from exporters.sdxl import Component, Configs


class ExportError(Exception):
    """A user can mend it: what was asked, what is there, and in ``hint`` what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a variant; ``dtype`` is torch's name without ``torch.``"""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stride: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the weights file holds it: the joined sources, then this shape, dtype and stride.

    The sources are joined along their first dimension, flattened first where ``shape`` has one
    dimension, and padded with zeros up to ``shape[0]``. With a ``recipe`` they are what that takes
    (:data:`exporters.fp8.RECIPES`).
    """

    shape: tuple[int, ...]
    dtype: str
    stride: tuple[int, ...]
    sources: tuple[str, ...]
    recipe: str = ""


@dataclass(frozen=True)
class Request:
    """What is to be built, apart from the model.

    Args:
        width, height: pixels, multiples of 8.
        batch: images per call.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``fp8``.
        device: torch's name of the device to trace and compile on, ``cpu`` or ``cuda:0``.
        target: ``cpu-avx512``, ``sm90``, …: what the code has to run on.
        options: the backend's own options.
        weights: for backends that compile with the weights: their file, laid out as :meth:`Exporter.layout` says.
        caches: a folder for what later builds can use; empty for none.
    """

    width: int
    height: int
    batch: int
    precision: str
    device: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    caches: str = ""


@dataclass(frozen=True)
class VariantCode:
    """One compiled variant: its file, what goes in and out, and the weights that it reads.

    ``constants`` maps the code's own names to stored tensors; ``tensors`` says how those are stored
    (empty for engines that hold their weights). ``others`` are files that belong into the artifact too.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, str]
    tensors: dict[str, StoredTensor]
    others: tuple[str, ...] = ()


class Exporter(abc.ABC):
    """Turns one variant of a component into files. One subclass a backend; the registry has its row."""

    name: ClassVar[str]
    progress: Callable[[float], None] = staticmethod(lambda part: None)
    """Told how much of a variant is compiled, from 0 to 1, by compilers that say so; from any thread."""

    @abc.abstractmethod
    def check_request(self, request: Request) -> None:
        """Says at once, before any work, what can't be built.

        Raises:
            ExportError: the request, or what is missing here to serve it.
        """

    def prepare(self, device: str) -> None:  # noqa: B027
        """Imports what compiling needs, and starts nothing: a backend that forks its compilers has them inherit it.

        Args:
            device: torch's name of what will be compiled for; ``cpu`` or a GPU, which must not be touched.
        """

    def begin(self, request: Request, out: Path) -> None:  # noqa: B027
        """Makes what all compilers of a build for a GPU will need, in a process of its own, while they work towards it.

        Args:
            out: a folder for what isn't needed any more afterwards.
        """

    def check_room(self, parameters: Mapping[str, int], request: Request) -> int:
        """How many compilers at once this machine has memory for, at least one; 0 for any number.

        Args:
            parameters: component's source -> how many numbers its weights are.

        Raises:
            ExportError: not even one.
        """
        return 0

    def layout(self, component: "Component", configs: "Configs", request: Request) -> dict[str, StoredTensor]:
        """How the file of ``Request.weights`` has to be laid out; {} for backends that compile without weights."""
        return {}

    def share(self, engine: Path, known: Mapping[str, Path]) -> dict[str, Path]:
        """Takes out of a compiled file what other files have too, so that it can be stored once.

        Args:
            engine: the file, which is replaced.
            known: digest -> files of what is shared already.

        Returns:
            What else can be shared from now on: sha256 -> its file, beside the engine.
        """
        return {}

    def shared(self, component: str, engine: Path) -> dict[str, str]:
        """What a compiled file shares with others: sha256 -> the file's name in the artifact's folder."""
        return {}

    def export(
        self, component: "Component", variant: str, configs: "Configs", request: Request, out: Path
    ) -> VariantCode:
        """Compiles one variant into ``out``; its file is named ``<component>[.<variant>]`` and a suffix.

        Raises:
            ExportError: the compiler failed; its own words are in the log.
        """
        self.check_request(request)
        if variant not in component.variants:
            raise ValueError(f"{component.name} has no variant {variant!r}")
        stem = component.name if component.variants == ("main",) else f"{component.name}.{variant}"
        code = self._export(component, variant, configs, request, out, stem)
        if not (out / code.file).is_file():
            raise RuntimeError(f"{self.name} left no {code.file}")
        return code

    @abc.abstractmethod
    def _export(
        self, component: "Component", variant: str, configs: "Configs", request: Request, out: Path, stem: str
    ) -> VariantCode: ...
