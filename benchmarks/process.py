"""A measured process of its own that tells what it does, line by line, and ends with the program that started it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent

Event = dict[str, Any]


class Failed(Exception):
    """The process ended in failure, or its time was up; the message says which, in a line."""


def events(
    command: Sequence[str], limit: float | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[Event]:
    """Starts a process and gives what it tells (see :func:`teller`), as it tells it.

    Args:
        command: a command line.
        limit: seconds after which it is killed, with all processes that it started.
        settings: more environment variables.

    Raises:
        Failed: it ended with another code than 0, or its time was up.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # kept open: its end tells the process that this program is gone
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": paths, **(settings or {})},
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            yield from map(json.loads, _lines(process, process.stdout, limit))
            if process.wait():
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["it said nothing"]
                raise Failed(f"ended with {process.returncode}: {said[-1].removeprefix('Error: ')[:200]}")
        finally:
            _kill(process)


def _lines(process: subprocess.Popen[bytes], pipe: IO[bytes], limit: float | None) -> Iterator[bytes]:
    begin, rest = time.monotonic(), b""
    while True:
        gone = process.poll() is not None
        if select.select([pipe], [], [], 0 if gone else 0.2)[0]:
            data = os.read(pipe.fileno(), 1 << 16)
            *whole, rest = (rest + data).split(b"\n")
            yield from whole
            if not data:
                return
        elif gone:  # something that it started still holds the pipe
            return
        if limit is not None and time.monotonic() - begin > limit:
            raise Failed(f"cut off: its {limit:g} s were up")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started, such as compilers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def teller() -> Callable[[Event], None]:
    """In the measured process: what sends an event to the program that started it.

    stdout is stderr from then on, since libraries print; and when the starter is gone, so is this process.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_starter, daemon=True).start()

    def tell(event: Event) -> None:
        print(json.dumps(event), file=out, flush=True)

    return tell


def _end_with_starter() -> None:
    while os.read(0, 1 << 10):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def python(program: Path, *words: str) -> list[str]:
    """The command line of one of these programs."""
    return [sys.executable, str(program), *words]
