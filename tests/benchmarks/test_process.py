"""``benchmarks/process.py``: what a measured process tells, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import process

TELLER = "from benchmarks import process\ntell = process.teller()\n"


def program(path: Path, code: str) -> list[str]:
    path.write_text(TELLER + code)
    return process.python(path)


def test_events_come_as_they_are_told_and_what_libraries_print_does_not(tmp_path: Path) -> None:
    code = "print('a library')\ntell({'n': 1})\nimport time; time.sleep(30)\n"
    told = process.events(program(tmp_path / "a.py", code))
    assert next(told) == {"n": 1}  # long before the process ends
    told.close()


def test_a_limit_keeps_what_was_told_and_kills_all_that_was_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "tell({'child': child.pid})\nchild.wait()\n"
    )
    told = process.events(program(tmp_path / "a.py", code), limit=1.5)
    child = next(told)["child"]
    with pytest.raises(process.Failed, match=r"its 1\.5 s were up"):
        next(told)
    assert _gone(child)


def test_a_process_that_crashes_is_quoted(tmp_path: Path) -> None:
    told = process.events(program(tmp_path / "a.py", "tell({'n': 1})\nraise ValueError('the reason')\n"))
    assert next(told) == {"n": 1}
    with pytest.raises(process.Failed, match="ended with 1: ValueError: the reason"):
        next(told)


def test_it_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    measured = program(tmp_path / "measured.py", "import os, time\ntell({'pid': os.getpid()})\ntime.sleep(60)\n")
    starter = tmp_path / "starter.py"
    starter.write_text(
        "from benchmarks import process\n"
        f"for event in process.events({measured!r}):\n    print(event['pid'], flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(process.ROOT)}
    running = subprocess.Popen([sys.executable, str(starter)], stdout=subprocess.PIPE, text=True, env=environment)
    assert running.stdout is not None
    pid = int(running.stdout.readline())
    running.send_signal(signal.SIGKILL)  # as a time limit ends it: nothing of it runs any more
    running.wait()
    running.stdout.close()
    assert _gone(pid)


def _gone(pid: int) -> bool:
    """Whether a process is dead within some seconds; one that nobody waits for stays as a zombie."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
