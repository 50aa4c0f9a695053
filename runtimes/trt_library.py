"""TensorRT and TensorRT-RTX as the runtime sees them: which is needed, whether it is here, and what it says."""

import importlib
import threading
from dataclasses import dataclass
from typing import Any

from buildtool.store import machine
from buildtool.store.errors import SdxlError


@dataclass(frozen=True)
class Flavor:
    """One of the two libraries.

    Args:
        title: as errors call it.
        module: its Python module.
        distributions: packages that bring it, as an artifact's toolchain may name them.
    """

    title: str
    module: str
    distributions: tuple[str, ...]


FLAVORS = {
    "rtx": Flavor("TensorRT-RTX", "tensorrt_rtx", ("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12")),
    "tensorrt": Flavor("TensorRT", "tensorrt", ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")),
}
"""By the name that an artifact's ``options.flavor`` has."""


def built_with(flavor: Flavor, toolchain: dict[str, str]) -> tuple[str, str]:
    """The package that built an artifact, and its version; empty if the toolchain doesn't tell."""
    return next(((name, toolchain[name]) for name in flavor.distributions if name in toolchain), ("", ""))


def load(flavor: Flavor, built: tuple[str, str], again: str = "") -> Any:
    """The library, in the version that built an artifact: engines run with no other.

    Args:
        built: the package and the version, from :func:`built_with`.
        again: how to build with the version that is here.

    Raises:
        SdxlError: it isn't installed, is another version, or doesn't start.
    """
    package, version = built
    install = f"pip install {package or flavor.distributions[0]}" + (f"=={version}" if version else "")
    try:
        library = importlib.import_module(flavor.module)
    except ImportError as error:
        if error.name == flavor.module:
            raise SdxlError(
                f"The artifact runs with {flavor.title} {version}, which is not installed.", install
            ) from None
        raise SdxlError(f"{flavor.title} does not start: {error}.", install) from error
    except OSError as error:
        raise SdxlError(f"{flavor.title} does not start: {error}.", install) from error
    here = machine.versions(package).get(package) or str(library.__version__)
    if version and here != version:
        raise SdxlError(
            f"The artifact was built with {flavor.title} {version}; {here} is installed here, and engines run only "
            "with the version that built them.",
            f"{install}. {again}".rstrip(),
        )
    return library


class Words:
    """What a library said of late: its errors, for the one line that the user sees."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: list[str] = []

    def add(self, severity: Any, message: str) -> None:
        if severity.name in ("ERROR", "INTERNAL_ERROR"):
            with self._lock:
                self._errors.append(" ".join(message.split()))

    def take(self) -> str:
        """The errors since the last time, the first of which names the cause."""
        with self._lock:
            said, self._errors = self._errors, []
        return said[0][:400].rstrip(". ") if said else "it gave no reason"


def logger(library: Any, words: Words) -> Any:
    """The library's logger that keeps errors in ``words``."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            words.add(severity, message)

    return Log()
