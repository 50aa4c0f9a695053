"""torch's precompiled C++ headers, kept from one build to the next where a folder is named for them."""

import contextlib
import os
import shutil
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporters.base import ExportError

VARIABLE = "SDXL_HEADERS"
"""Names the folder. The headers take 270 MB and ten seconds of a core; without it, each build makes them anew."""


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Torch takes its precompiled headers from the folder, and those that it has to make are kept there.

    They are made where they always are, below the build's own temporary folder, and linked when they are whole: a
    compiler that is killed leaves none in the folder. torch names them by their flags, their text and the compiler.

    Raises:
        ExportError: there can be no such folder.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        yield
        return
    from torch._inductor import codecache

    folder, here = Path(named), Path(codecache._HEADER_DIR)
    make = codecache._precompile_header
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"{VARIABLE} names {folder}, where no folder can be made: {error.strerror}.", f"Change or unset {VARIABLE}."
        ) from error
    here.mkdir(parents=True, exist_ok=True)
    for header in folder.glob("*.gch"):
        _link(header, here / header.name)

    def made(*arguments: Any, **more: Any) -> str:
        path: str = make(*arguments, **more)
        _link(Path(f"{path}.gch"), folder / f"{Path(path).name}.gch")
        return path

    with unittest.mock.patch.object(codecache, "_precompile_header", made):
        yield


def _link(source: Path, target: Path) -> None:
    """A whole file or none; a copy, where the folder is on another disk."""
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError:
        part = target.with_suffix(f".{os.getpid()}")
        try:
            shutil.copyfile(source, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
