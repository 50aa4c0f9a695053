"""Starts compilers' processes that have imported all: ``python -m exporters.nursery BACKEND DEVICE SCRATCH LEASH``.

It imports what the backend's compiler needs, once, and makes each compiler by a fork, where sixteen that start by
themselves all import the same on cores that the others want. Nothing is computed here, and no GPU touched: a process
that has, can't be forked. Compilers of backends with which this was not tried are started anew.

Reads names of jobs, a line each, from its standard input; SCRATCH has their files, ``<name>.job``. Answers
``<exit code> <name>`` when one has ended; before that ``ready``, and what is slower than it could be: ``says <words>``.
What a job says goes to ``<name>.log``. At the end of the input all of them end.
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

BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""Has torch ask NVML whether there is a GPU, as its compiler does when it is imported, and not CUDA."""


def main(scratch: Path, leash: int, forks: bool, answers: int) -> None:
    """Serves until the input ends.

    Args:
        leash: a pipe's end whose other end the builder has: each compiler's standard input.
        forks: whether compilers go on in what was forked, or start anew.
        answers: where to answer.
    """
    # Whoever started the builder may ignore it, and then no child could be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.stdout.flush()  # or each fork has what was not written yet
    gc.collect()
    gc.freeze()  # what is there is looked through by no compiler's collector
    if forks and _driver_is_up():
        forks = False
        _slower(answers, "an import has initialized CUDA")
    _answer(answers, "ready")
    running: dict[int, str] = {}
    waiting = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.02 if running else None)
        if ready:
            said = os.read(0, 65536)
            if not said:
                break
            *lines, waiting = (waiting + said).split(b"\n")
            for name in map(bytes.decode, lines):
                running[_start(scratch / f"{name}.job", leash, forks, answers)] = name
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                _answer(answers, f"{os.waitstatus_to_exitcode(status)} {running.pop(pid)}")
    for pid in running:
        for end in (os.killpg, os.kill):  # one that isn't the leader of its group yet is alone
            with contextlib.suppress(ProcessLookupError):
                end(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _answer(answers: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the builder is gone, or about to close the input
        os.write(answers, f"{line}\n".encode())


def _slower(answers: int, why: str) -> None:
    _answer(answers, f"says Compilers import what they need by themselves, which is slower: {why}.")


def _start(job: Path, leash: int, forks: bool, answers: int) -> int:
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
        log = os.open(job.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for end, target in ((leash, 0), (log, 1), (log, 2)):
            os.dup2(end, target)
        os.close(answers)  # or nobody would notice the end of this process's parent
        if not forks:
            os.execv(sys.executable, [sys.executable, "-m", "exporters.worker", str(job)])
        code = worker.main(job)
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


def run(backend: str, device: str, scratch: str, leash: str) -> None:
    """Imports, and serves."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    row = registry.backend(backend)
    if row.forks:
        os.environ[BY_NVML] = "1"
        try:
            registry.exporter(backend).prepare(device)
        except Exception as error:  # the jobs meet it again, and tell if they can't go on
            traceback.print_exc()
            _slower(answers, " ".join(f"{type(error).__name__}: {error}".split()).rstrip("."))
    main(Path(scratch), int(leash), row.forks, answers)


if __name__ == "__main__":
    run(*sys.argv[1:])
