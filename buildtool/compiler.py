"""Compilers at work: one process a variant, as many at once as the machine has cores for."""

import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildtool.progress import Progress
from buildtool.store import files
from buildtool.store.errors import SdxlError
from exporters.base import ExportError, Request


@dataclass(frozen=True)
class Job:
    """One variant to compile."""

    backend: str
    component: str
    variant: str
    configs: dict[str, dict[str, Any]]
    request: Request

    @property
    def name(self) -> str:
        return f"{self.component}.{self.variant}"


class Pool:
    """Runs ``python -m exporters.worker`` for each job; leaving the context ends those still running.

    A worker's standard input is a pipe that closes when this process ends, however it ends: then the
    worker ends too.

    Args:
        at_once: processes at the same time; 0 for one a core.
        gpu_index: the one visible GPU that the processes see, as ``cuda:0``; None for none in particular.
    """

    def __init__(self, at_once: int, progress: Progress, gpu_index: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self._at_once = at_once or cores
        self._progress = progress
        self._environment = {
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // 2)),
            "AOT_INDUCTOR_ENABLE_LINE_TABLES": "0",  # a debugger's: the exporter would strip them
            **os.environ,
        }
        if gpu_index is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = visible_device(gpu_index)
        self._waiting: list[Job] = []
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._codes: dict[str, int] = {}
        self._scratch = Path()
        self._lock = threading.Lock()  # of everything that changes
        self._closed = False
        self._error: Exception | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        with self._lock:
            self._end()

    def _end(self) -> None:
        for process, _ in self._running.values():
            if process.stdin is not None:
                process.stdin.close()
            process.wait()

    def start(self, jobs: Sequence[Job], scratch: Path) -> None:
        """Starts compiling; ``scratch`` is a folder for everything that is in between."""
        self._scratch = scratch
        (scratch / "tmp").mkdir()
        # The UNet takes longest, so it goes first.
        self._waiting = sorted(jobs, key=lambda job: job.component != "unet")
        self._fill()
        threading.Thread(target=self._watch, name="compilers", daemon=True).start()

    def _watch(self) -> None:
        """Starts the next compiler when one has ended, whatever the builder is doing meanwhile."""
        while not self._closed:
            with self._lock:
                if not (self._running or self._waiting) or self._closed:
                    return
                try:
                    self._collect()
                except Exception as error:  # a full disk: told to who waits for the result
                    self._error = error
                    return
            time.sleep(0.05)

    def result(self, component: str, variant: str) -> dict[str, Any]:
        """Waits for a variant: its description, as the exporter gave it.

        Raises:
            ExportError: it can't be compiled; the compiler's own words are in the log that this names.
        """
        name = f"{component}.{variant}"
        while name not in self._codes:
            time.sleep(0.05)
            if self._error is not None:
                raise self._error
            with self._lock:  # one that failed ends the build: it isn't worth waiting for the others
                name = next((n for n, code in self._codes.items() if code), name)
        answer = self._answer(name)
        if self._codes[name] == 0 and answer:
            return answer
        if not answer and files.free_bytes(self._scratch) < files.NEARLY_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the store says whose disk
        log = self._keep_log(name)
        if "error" in answer:
            raise ExportError(f"{answer['error'].rstrip('.')}. The compiler's words: {log}.", answer["hint"])
        how = f"signal {-self._codes[name]}" if self._codes[name] < 0 else f"exit code {self._codes[name]}"
        raise SdxlError(f"The compiler of {name} ended with {how}: {_last_line(log)}. Its words: {log}.")

    def fail(self, error: Exception) -> None:
        """Whoever waits for a result gets this error: something else of the build has failed."""
        self._error = error

    def file(self, component: str, variant: str, name: str) -> Path:
        """Where a compiled variant's file is."""
        return self._scratch / f"{component}.{variant}" / name

    def _answer(self, name: str) -> dict[str, Any]:
        """What a worker left of its result; nothing if it died, or if the disk was full."""
        with contextlib.suppress(OSError, ValueError):
            answer: dict[str, Any] = json.loads((self._scratch / f"{name}.result").read_bytes())
            return answer
        return {}

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._at_once:
            job = self._waiting.pop(0)
            out = self._scratch / job.name
            out.mkdir()
            asked = self._scratch / f"{job.name}.job"
            asked.write_text(json.dumps({**dataclasses.asdict(job), "out": str(out.absolute())}))
            # Intermediate files go with the scratch folder: a compiler that is killed leaves none in /tmp.
            places = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
            environment = self._environment | {name: str((self._scratch / p).absolute()) for name, p in places.items()}
            with open(self._scratch / f"{job.name}.log", "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "exporters.worker", str(asked.absolute())],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            self._running[job.name] = (process, time.perf_counter())

    def _collect(self) -> None:
        for name, (process, began) in list(self._running.items()):
            code = process.poll()
            if code is None:
                self._show(name)
                continue
            if process.stdin is not None:
                process.stdin.close()
            del self._running[name]
            self._codes[name] = code
            self._progress.beside(name, 1.0)
            self._progress.add(f"{name}: compile", time.perf_counter() - began)
        self._fill()

    def _show(self, name: str) -> None:
        """How far a compiler is, if it tells."""
        with contextlib.suppress(OSError, ValueError):
            self._progress.beside(name, float((self._scratch / f"{name}.progress").read_text()))

    def _keep_log(self, name: str) -> Path:
        """Saves a failed compiler's log from the scratch folder, which is about to go."""
        log = self._scratch / f"{name}.log"
        handle, kept = tempfile.mkstemp(prefix=f"sdxl-build-{name}-", suffix=".log")
        os.close(handle)
        with contextlib.suppress(OSError):
            Path(kept).write_bytes(log.read_bytes())
        return Path(kept)


def visible_device(index: int) -> str:
    """The value of ``CUDA_VISIBLE_DEVICES`` with which a process sees only this one's device ``index``."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[index] if index < len(visible) else str(index)


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].strip().rstrip(".")
    return "it said nothing"
