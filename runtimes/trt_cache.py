"""What TensorRT-RTX compiled for this very GPU, kept so that a next start doesn't compile it again."""

import contextlib
import os
import re
from pathlib import Path


def places(engine: Path, gpu: str, version: str) -> list[Path]:
    """Where an engine's compiled kernels may be kept, the best place first.

    Beside the artifact's folder (which is sealed, so not in it), for whoever runs it next; where that can't be
    written, in this user's cache.

    Args:
        engine: the engine's file.
        gpu: the GPU's name.
        version: the library's.
    """
    artifact = engine.absolute().parent
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{artifact.name}.{engine.stem}.{gpu}.{version}.jit")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxl-build" / "jit"
    return [artifact.parent / name, cache / name]


def read(candidates: list[Path]) -> bytes:
    """The first that is there; empty if none is."""
    for path in candidates:
        with contextlib.suppress(OSError):
            return path.read_bytes()
    return b""


def write(candidates: list[Path], data: "bytes | memoryview") -> Path | None:
    """Keeps it in the first place that can be written, whole or not at all; None where there is no such place."""
    for path in candidates:
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            if path is not candidates[0]:
                path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(data)
            staged.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                staged.unlink()
            continue
        return path
    return None
