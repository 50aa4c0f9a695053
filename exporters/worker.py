"""Compiles one variant in a process of its own, which :mod:`exporters.nursery` starts.

Reads a job (JSON) from a file and writes the result beside it. Its standard input is a leash: when it closes, because
the builder is done or dead, the worker and its compilers end.
"""

import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from exporters.base import ExportError, Request


def main(job: Path) -> int:
    """Runs a job file: ``backend``, ``component``, ``variant``, ``configs``, ``request``, ``out``.

    Writes ``<job>.result``: the variant's description, or ``error`` and ``hint``; meanwhile ``<job>.progress``, the
    part that is done, if the compiler tells. Of no component, it makes what all of them need, and writes nothing.
    Returns the exit code.
    """
    threading.Thread(target=_end_with_builder, daemon=True).start()
    gc.set_threshold(50_000, 50, 50)  # a compiler's graphs are alive to the end: looking through them is a tenth of it
    asked: dict[str, Any] = json.loads(job.read_bytes())
    result = job.with_suffix(".result")
    from exporters import registry, sdxl

    try:
        request = Request(**asked["request"])
        exporter = registry.exporter(asked["backend"])
        if not asked["component"]:
            exporter.begin(request, Path(asked["out"]))
            return 0
        exporter.progress = _Progress(job.with_suffix(".progress"))
        code = exporter.export(
            sdxl.component(asked["component"], request.options),
            asked["variant"],
            asked["configs"],
            request,
            Path(asked["out"]),
        )
    except ExportError as error:
        with contextlib.suppress(OSError):  # the log may lie on a disk that is full
            traceback.print_exc()
        result.write_text(json.dumps({"error": error.message, "hint": error.hint}))
        return 1
    result.write_text(json.dumps(dataclasses.asdict(code)))
    return 0


class _Progress:
    """Keeps the part that is done in a file, for the builder to show."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._next = 0.0

    def __call__(self, part: float) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.2
            with contextlib.suppress(OSError):  # it is only shown
                self._file.write_text(f"{part:.4f}")


def _end_with_builder() -> None:
    while os.read(0, 1024):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Inductor's worker pool would be waited for
