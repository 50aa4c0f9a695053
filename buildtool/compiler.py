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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildtool.progress import Progress
from buildtool.store import files
from buildtool.store.errors import SdxlError
from exporters import registry
from exporters.base import ExportError, Request

NURSERY = ("-m", "exporters.nursery")
BEGIN = "begin"


@dataclass(frozen=True)
class Job:
    """One variant to compile; of no component, what all of a build's need."""

    backend: str
    component: str
    variant: str
    configs: dict[str, dict[str, Any]]
    request: Request

    @property
    def name(self) -> str:
        return f"{self.component}.{self.variant}" if self.component else self.variant


class Pool:
    """Runs ``exporters.worker`` for each job, in processes of :mod:`exporters.nursery`; leaving the context ends them.

    They end too when this process does, however it ends: a pipe closes then that they all hold.

    Args:
        gpu_index: the one visible GPU that the processes see, as ``cuda:0``; None for none in particular.
    """

    def __init__(self, progress: Progress, gpu_index: int | None = None) -> None:
        self._at_once = self._cores = len(os.sched_getaffinity(0))
        self._progress = progress
        self._gpu_index = gpu_index
        self._waiting: list[Job] = []
        self._running: dict[str, float] = {}
        self._codes: dict[str, int] = {}
        self._scratch = Path()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._leash = -1
        self._said = b""
        self._ready = False
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
        if self._nursery is not None:
            assert self._nursery.stdin is not None and self._nursery.stdout is not None
            with contextlib.suppress(Exception):  # whatever else there is to tell, it is over
                for _ in self._ended():
                    pass
            if not self._ready:
                self._nursery.kill()  # it still imports, and has nobody to end
            with contextlib.suppress(BrokenPipeError):  # it died
                self._nursery.stdin.close()
            os.close(self._leash)
            self._nursery.wait()
            self._nursery.stdout.close()
            self._nursery = None

    def prepare(self, jobs: Sequence[Job], scratch: Path) -> None:
        """Begins with what any of these jobs needs; ``scratch`` is a folder for everything that is in between."""
        self._scratch = scratch
        (scratch / "tmp").mkdir()
        held, self._leash = os.pipe()
        try:
            with open(scratch / "nursery.log", "wb") as log:
                self._nursery = subprocess.Popen(
                    [
                        *(sys.executable, *NURSERY),
                        *(jobs[0].backend, jobs[0].request.device, str(scratch.absolute()), str(held)),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment(),
                    pass_fds=(held,),
                    start_new_session=True,
                )
        finally:
            os.close(held)
        assert self._nursery.stdout is not None
        os.set_blocking(self._nursery.stdout.fileno(), False)
        if registry.backend(jobs[0].backend).forks and jobs[0].request.device != "cpu":
            self._ask(dataclasses.replace(jobs[0], component="", variant=BEGIN, configs={}))

    def _environment(self) -> dict[str, str]:
        environment = {
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, self._cores // 2)),
            "AOT_INDUCTOR_ENABLE_LINE_TABLES": "0",  # a debugger's: the exporter would strip them
            **os.environ,
        }
        if self._gpu_index is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible_device(self._gpu_index)
        # Intermediate files go with the scratch folder: a compiler that is killed leaves none in /tmp.
        places = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
        return environment | {name: str((self._scratch / place).absolute()) for name, place in places.items()}

    def start(self, jobs: Sequence[Job], at_once: int = 0) -> None:
        """Starts compiling what was prepared: ``at_once`` processes at the same time, 0 for one a core."""
        self._at_once = at_once or self._cores
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
        ending = _ending(self._codes[name])
        raise SdxlError(f"The compiler of {name} {ending}: {_last_line(log)}. Its words: {log}.")

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
            self._ask(job)
            self._running[job.name] = time.perf_counter()

    def _ask(self, job: Job) -> None:
        out = self._scratch / job.name
        out.mkdir()
        asked = self._scratch / f"{job.name}.job"
        asked.write_text(json.dumps({**dataclasses.asdict(job), "out": str(out.absolute())}))
        assert self._nursery is not None and self._nursery.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which its output's end tells
            self._nursery.stdin.write(f"{job.name}\n".encode())
            self._nursery.stdin.flush()

    def _collect(self) -> None:
        for name, code in self._ended():
            self._codes[name] = code
            self._progress.beside(name, 1.0)
            self._progress.add(f"{name}: compile", time.perf_counter() - self._running.pop(name))
        for name in self._running:
            self._show(name)
        self._fill()

    def _ended(self) -> Iterator[tuple[str, int]]:
        """Jobs that have ended, with their exit codes.

        Raises:
            SdxlError: what starts them is dead.
        """
        assert self._nursery is not None and self._nursery.stdout is not None
        said = self._nursery.stdout.read()
        if said == b"" and self._running:
            ending, log = _ending(self._nursery.wait()), self._keep_log("nursery")
            raise SdxlError(f"What starts the compilers {ending}: {_last_line(log)}. Its words: {log}.")
        *lines, self._said = (self._said + (said or b"")).split(b"\n")
        for line in map(bytes.decode, lines):
            kind, _, rest = line.partition(" ")
            if kind == "ready":
                self._ready = True
            elif kind == "says":
                self._progress.say(rest)
            elif rest != BEGIN:
                yield rest, int(kind)
            elif kind != "0":
                why = _last_line(self._scratch / f"{BEGIN}.log")
                self._progress.say(
                    f"What all compilers need is made by those that need it first, which is slower: {why}."
                )

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


def _ending(code: int) -> str:
    return f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].strip().rstrip(".")
    return "it said nothing"
