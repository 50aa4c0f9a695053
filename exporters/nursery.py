"""Starts compilers' processes that have imported all: ``python -m exporters.nursery BACKEND DEVICE SCRATCH LEASH``.

It imports what the backend's compiler needs, once, and makes each compiler by a fork. Sixteen that start by themselves
all import the same, and take three times as long as one. Nothing is computed here, and no GPU touched: a process that
has, can't be forked. Compilers of backends with which this was not tried are started anew.

Reads job files' names, a line each, from its standard input, and answers ``<exit code> <job file>`` when one has ended.
Before that it says ``ready``, and what is slower than it should be: ``says <words>``. What a job says goes to the
``.log`` beside it. At the end of the input all of them end.
"""

import contextlib
import ctypes
import gc
import os
import select
import signal
import sys
import traceback
import warnings
from pathlib import Path

from exporters import registry, worker
from exporters.base import ExportError

BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Has torch ask NVML whether there is a GPU, as its compiler does when it is imported, and not CUDA."""


def main(leash: int, forks: bool) -> None:
    """Serves until the input ends.

    Args:
        leash: a pipe's end whose other end the builder has: each compiler's standard input.
        forks: whether compilers go on in what was forked, or start anew.
    """
    gc.collect()
    gc.freeze()  # what is there is looked through by no compiler's collector
    if forks and _driver_is_up():
        forks = False
        os.write(1, b"says Compilers import everything themselves, which is slower: an import has initialized CUDA.\n")
    os.write(1, b"ready\n")
    running: dict[int, str] = {}
    waiting = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.02 if running else None)
        if ready:
            said = os.read(0, 65536)
            if not said:
                break
            *lines, waiting = (waiting + said).split(b"\n")
            for line in lines:
                job = os.fsdecode(line)
                running[_start(job, leash, forks)] = job
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                answer = f"{os.waitstatus_to_exitcode(status)} {running.pop(pid)}\n"
                os.write(1, os.fsencode(answer))
    for pid in running:
        for end in (os.killpg, os.kill):  # one that isn't the leader of its group yet is alone
            with contextlib.suppress(ProcessLookupError):
                end(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _start(job: str, leash: int, forks: bool) -> int:
    """A process that runs a job, in a session and group of its own; its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: libraries may keep some, which sleep
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.pop(BY_NVML, None)
        log = os.open(Path(job).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for end, target in ((leash, 0), (log, 1), (log, 2)):
            os.dup2(end, target)
        if not forks:
            os.execv(sys.executable, [sys.executable, "-m", "exporters.worker", job])
        code = worker.main(Path(job))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # Inductor's worker pool would be waited for


def _driver_is_up() -> bool:
    """Whether something initialized CUDA, as a library's import could: what is forked then can't use a GPU."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(library.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0)


if __name__ == "__main__":
    backend, device, _, end = sys.argv[1:]  # the third is for who lists processes
    row = registry.backend(backend)
    if row.forks:
        os.environ[BY_NVML] = "1"
        with contextlib.suppress(ExportError):  # the job will say what is missing
            registry.exporter(backend).prepare(device)
    main(int(end), row.forks)
